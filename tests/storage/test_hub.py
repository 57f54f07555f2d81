"""Adapters on the hub, against a stand-in of its endpoint on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import small_vit, trained
from golden import DATA, golden_model, state
from torch import Tensor
from unchanged import assert_same, snapshot

import uora_vision as uora
from uora_vision.storage.folder import CONFIG_FILE, TENSOR_FILE
from uora_vision.storage.hub import CARD_FILE, card, is_repository


class Hub:
    """What huggingface_hub asks an endpoint for to make a repository, commit to it, and download from it."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.asked.append(f"POST {self.path}")
                path = self.path.split("?")[0]
                if path == "/api/repos/create":
                    asked = json.loads(body)
                    name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"].split("/")[-1])))
                    if asked.get("organization") is None and "/" in asked["name"]:
                        name = asked["name"]
                    there = name in hub.repositories
                    hub.repositories.setdefault(name, [])
                    self.answer(409 if there else 200, {"url": f"{hub.url}/{name}", "name": name, "id": name})
                elif path == "/api/validate-yaml":
                    self.answer(200, {"errors": [], "warnings": []})
                elif "/preupload/" in path:
                    files = json.loads(body)["files"]
                    mode = lambda f: "lfs" if f["path"].endswith(".safetensors") else "regular"  # noqa: E731
                    found = [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False} for f in files]
                    self.answer(200, {"files": found})
                elif path.endswith("/info/lfs/objects/batch"):
                    objects = [
                        {**o, "actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}"}}}
                        for o in json.loads(body)["objects"]
                    ]
                    self.answer(200, {"transfer": "basic", "objects": objects})
                elif "/commit/" in path:
                    name = path.removeprefix("/api/models/").split("/commit/")[0]
                    files = dict(hub.repositories[name][-1]) if hub.repositories[name] else {}
                    for line in body.decode().splitlines():
                        what = json.loads(line)
                        value = what["value"]
                        if what["key"] == "file":
                            files[value["path"]] = base64.b64decode(value["content"])
                        elif what["key"] == "lfsFile":
                            files[value["path"]] = hub.large[value["oid"]]
                    hub.repositories[name].append(files)
                    number = f"{len(hub.repositories[name]):040x}"
                    self.answer(200, {"commitOid": number, "commitUrl": f"{hub.url}/{name}/commit/{number}"})
                else:
                    self.answer(404, {})

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.large[self.path.rpartition("/")[2]] = body
                assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
                self.answer(200, {})

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                path = self.path.split("?")[0].lstrip("/")
                if "/resolve/" not in path:
                    name = path.removeprefix("api/models/").split("/revision/")[0]
                    number = f"{len(hub.repositories.get(name, [])):040x}"
                    known = name in hub.repositories
                    self.answer(200 if known else 404, {"id": name, "sha": number, "siblings": []} if known else {})
                    return
                name, rest = path.split("/resolve/")
                revision, _, file = rest.partition("/")
                commits = hub.repositories.get(name)
                if not commits:
                    self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
                    return
                number = len(commits) if revision == "main" else int(revision, 16)
                content = commits[number - 1].get(file)
                if content is None:
                    self.answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": f"{number:040x}"})
                    return
                etag = hashlib.sha256(content).hexdigest()
                self.answer(200, content, {"X-Repo-Commit": f"{number:040x}", "ETag": f'"{etag}"'})

            def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Nothing on the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def commit(self, name: str, files: dict[str, bytes]) -> None:
        self.repositories.setdefault(name, []).append(files)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
    template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "not-a-token")
    yield made
    made.close()


class TestRoundTrip:
    @pytest.mark.parametrize("scope", [None, "layer"])
    @pytest.mark.slow
    def test_a_model_there_and_back(self, hub: Hub, images: Tensor, scope: str | None) -> None:
        model = trained(scope=scope)
        address = uora.push_to_hub(model, "me/digits", data="digits 5 to 9", metrics={"accuracy": 0.75})
        assert address.startswith(f"{hub.url}/me/digits/commit/")
        (files,) = hub.repositories["me/digits"]
        assert set(files) == {CARD_FILE, CONFIG_FILE, TENSOR_FILE}
        assert torch.equal(uora.load(small_vit(), "me/digits")(images), model(images))

    def test_a_folder_with_metrics_beside_it(self, hub: Hub, images: Tensor, tmp_path: Path) -> None:
        model = trained()
        uora.save(model, tmp_path / "run" / "adapter")
        (tmp_path / "run" / "metrics.json").write_text('{"accuracy": 0.8125, "per_class": [1, 2]}')
        (tmp_path / "run" / "adapter" / "training_args.bin").write_bytes(b"a pickle")
        uora.push_to_hub(tmp_path / "run" / "adapter", "me/digits")
        (files,) = hub.repositories["me/digits"]
        assert set(files) == {CARD_FILE, CONFIG_FILE, TENSOR_FILE}
        assert "| accuracy | 0.8125 |" in files[CARD_FILE].decode()
        assert torch.equal(uora.load(small_vit(), "me/digits")(images), model(images))

    def test_revisions(self, hub: Hub, images: Tensor) -> None:
        first, second = trained(seed=1), trained(seed=2)
        for model in (first, second):
            uora.push_to_hub(model, "me/digits")
        assert torch.equal(uora.load(small_vit(), "me/digits")(images), second(images))
        assert torch.equal(uora.load(small_vit(), "me/digits", revision=f"{1:040x}")(images), first(images))

    @pytest.mark.slow
    def test_an_adapter_of_version_2_and_one_file_alone(self, hub: Hub) -> None:
        files = {f.name: f.read_bytes() for f in (DATA / "adapter_v2").iterdir()}
        hub.commit("me/old", files)
        hub.commit("me/alone", {TENSOR_FILE: (DATA / "adapter_v3" / TENSOR_FILE).read_bytes()})
        expected = state(uora.load(golden_model(), DATA / "adapter_v3"))
        for name in ("me/old", "me/alone"):
            assert all(t.equal(expected[n]) for n, t in state(uora.load(golden_model(), name)).items())

    def test_nothing_but_the_two_files_is_downloaded(self, hub: Hub) -> None:
        files = {f.name: f.read_bytes() for f in (DATA / "adapter_v3").iterdir()}
        hub.commit("me/trap", {**files, "pytorch_model.bin": b"\x80\x04", "code.py": b"raise SystemExit"})
        uora.load(golden_model(), "me/trap")
        assert {a.split("?")[0].rpartition("/")[2] for a in hub.asked if "/resolve/" in a} == {CONFIG_FILE, TENSOR_FILE}

    @pytest.mark.slow  # it imports torch and timm again
    def test_by_the_variable_that_names_the_endpoint(self, hub: Hub, tmp_path: Path) -> None:
        uora.push_to_hub(trained(), "me/digits")
        here = Path(__file__).parents[1]
        code = (
            "import uora_vision as u; from conftest import small_vit; u.load(small_vit(), 'me/digits'); print('done')"
        )
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent)])
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.stdout.strip() == "done", done.stderr


class TestErrors:
    def refused(self, text: str, name: str = "me/digits") -> None:
        model = golden_model()
        before = snapshot(model)
        with pytest.raises(uora.UoraError, match=text) as raised:
            uora.load(model, name)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
        assert_same(before, model)

    def test_offline(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.close()
        self.refused("cannot be reached.*check the network")
        with pytest.raises(uora.HubError, match="cannot be reached"):
            uora.push_to_hub(trained(), "me/digits")

    def test_told_to_be_offline(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        self.refused("cannot be reached")

    def test_what_was_downloaded_loads_offline(self, hub: Hub, images: Tensor) -> None:
        model = trained()
        uora.push_to_hub(model, "me/digits")
        uora.load(small_vit(), "me/digits")
        hub.close()
        assert torch.equal(uora.load(small_vit(), "me/digits")(images), model(images))

    def test_no_such_repository(self, hub: Hub) -> None:
        self.refused("neither a folder here nor a repository")

    def test_a_repository_of_something_else(self, hub: Hub) -> None:
        hub.commit("me/digits", {"pytorch_model.bin": b"\x80\x04"})
        self.refused("holds no adapter_model.safetensors")

    def test_a_damaged_adapter(self, hub: Hub) -> None:
        hub.commit("me/digits", {TENSOR_FILE: b"\x80\x04" * 50})
        self.refused("truncated, damaged, or no safetensors file")

    def test_a_damaged_folder_is_not_uploaded(self, hub: Hub, tmp_path: Path) -> None:
        uora.save(trained(), tmp_path)
        (tmp_path / TENSOR_FILE).write_bytes((tmp_path / TENSOR_FILE).read_bytes()[:-1])
        with pytest.raises(uora.FormatError, match="truncated"):
            uora.push_to_hub(tmp_path, "me/digits")
        assert not hub.repositories

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        self.refused(r"pip install huggingface_hub")

    @pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a", "a/b/c", "a/..", "./a", "", "ü/x", "a/b c"])
    def test_what_is_no_name_of_a_repository_is_a_folder(self, hub: Hub, name: str) -> None:
        assert not is_repository(name)
        self.refused("does not exist|cannot be read|no folder can be", name)
        assert not hub.asked


def test_the_card_says_what_it_is_and_how_to_load_it() -> None:
    from uora_vision.storage.snapshot import collect

    adapter = collect(trained(scope="shared"))
    text = card(
        adapter, "me/digits", "photos of *things*", {"accuracy": 0.123456, "note": "a|b\n<script>", "list": [1]}
    )
    assert text.startswith('---\nlibrary_name: uora_vision\ntags: [uora, adapter]\nbase_model: "timm/vit_tiny')
    for line in (
        "| adapted | 8 weights: attn.k, attn.proj, attn.q, attn.v, mlp.fc1, mlp.fc2 |",
        "| rank | 8, layout shape, drawn haar, seed 0 |",
        f"| trained | {len(adapter.vector):,} parameters of the adapter, {7 * 65:,} of the base |",
        f"| directions redrawn | {sum(len(e.indices) for e in adapter.log):,} |",
        r"| data | photos of \*things\* |",
        "| accuracy | 0.1235 |",
        r"| note | a\|b \<script\> |",
        'uora.load(model, "me/digits")',
    ):
        assert line in text.splitlines(), line
