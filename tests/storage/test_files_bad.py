"""Damaged, foreign and malicious adapters: one clear error, and a model that nobody touched."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_vit, trained
from damage import JUNK, OLD, Place, Target, drop, look, metadata_of, places, put, rewrite
from golden import DATA, golden_adapter
from unchanged import assert_same, snapshot

import uora_vision as uora
from uora_vision.storage.folder import CONFIG_FILE, TENSOR_FILE, read_folder

DESCRIBED = json.loads(metadata_of(DATA / "adapter_v3")["config"])
# Of version 2's options there are two copies, which are compared.
OPTIONS = [p for p in places(OLD) if p[0] == "config"]
REST = [p for p in places(OLD) if p not in OPTIONS]
NULLABLE = [("base", n) for n in ("architecture", "name", "parameter_tensors", "fingerprint", "sketch")]
NULLABLE += [("bank_fingerprint",), ("config", "blocks")]
FREE = [("versions",), ("config", "targets"), ("config", "exclude"), ("config", "train"), ("config", "blocks")]
"""Fields that only record what was asked for: other values of the right type change no weight."""
ODD_NAMES = [
    "",
    ".",
    "..",
    "weight",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "blocks..0",
    ".uora",
    "q\x00",
    "🦜",
    "\uff51",
]


def junk_for(value: Any) -> list[Any]:
    """What a field is replaced by: all of its own kind, and one of any other kind, as wrong as the next."""
    kind, others = kind_of(value), {kind_of(junk): junk for junk in JUNK}
    own = [junk for junk in (*JUNK, *ODD_NAMES) if kind_of(junk) is kind or (value is None and type(junk) is str)]
    return [*own, *(junk for other, junk in others.items() if other is not kind)]


def kind_of(value: Any) -> type:
    return int if type(value) is float else type(value)


def named(place: Place) -> str:
    return ".".join(map(str, place))


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(DATA / "adapter_v3")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "adapter_v3", tmp_path / "a"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "adapter_v2", tmp_path / "a"))


class TestFields:
    @pytest.mark.parametrize("place", list(places(DESCRIBED)), ids=named)
    def test_missing(self, target: Target, folder: Path, place: Place) -> None:
        rewrite(folder, lambda c: drop(c, place))
        free = any(place[: len(f)] == f and len(place) > len(f) for f in FREE)
        assert target.outcome(folder) == ("same" if free else "refused")

    @pytest.mark.slow
    @pytest.mark.parametrize("place", list(places(DESCRIBED)), ids=named)
    def test_of_another_type_or_out_of_range(self, target: Target, folder: Path, place: Place) -> None:
        given = look(DESCRIBED, place)
        original = (folder / TENSOR_FILE).read_bytes()
        for junk in junk_for(given):
            (folder / TENSOR_FILE).write_bytes(original)
            rewrite(folder, lambda c, junk=junk: put(c, place, junk))
            outcome = target.outcome(folder)
            number = type(junk) in (int, float) and type(given) in (int, float)
            if not (type(junk) is type(given) or number or (junk is None and place in NULLABLE)):
                nullable = place in NULLABLE and (given is None or isinstance(junk, str | int | list))
                assert outcome == "refused" or nullable, f"{named(place)} = {junk!r} was taken"

    @pytest.mark.slow
    @pytest.mark.parametrize("place", REST, ids=named)
    def test_of_version_2(self, target: Target, old: Path, place: Place) -> None:
        """Nothing guards its numbers: refused, or the same weights."""
        for junk in [KeyError, *junk_for(look(OLD, place))]:
            described = json.loads(json.dumps(OLD))
            drop(described, place) if junk is KeyError else put(described, place, junk)
            (old / CONFIG_FILE).write_text(json.dumps(described))
            outcome = target.outcome(old)
            if junk is KeyError and place[0] != "versions":
                assert outcome == "refused"

    @pytest.mark.parametrize("place", OPTIONS, ids=named)
    def test_of_version_2s_options(self, target: Target, old: Path, place: Place) -> None:
        for junk in [KeyError, *junk_for(look(OLD, place))]:
            described = json.loads(json.dumps(OLD))
            drop(described, place) if junk is KeyError else put(described, place, junk)
            if described == OLD:
                continue
            (old / CONFIG_FILE).write_text(json.dumps(described))
            assert target.outcome(old) == "refused"

    def test_an_unknown_field(self, target: Target, folder: Path) -> None:
        for place in [p for p in places(DESCRIBED) if isinstance(look(DESCRIBED, p), dict) and p[0] != "versions"]:
            shutil.copytree(DATA / "adapter_v3", folder, dirs_exist_ok=True)
            rewrite(folder, lambda c, place=place: put(c, (*place, "surprise"), 1))
            assert target.outcome(folder) == "refused", place

    @pytest.mark.parametrize("key", ["format", "config", "sha256"])
    def test_metadata(self, target: Target, folder: Path, key: str) -> None:
        for change in (lambda m: m.pop(key), lambda m: m.update({key: ""}), lambda m: m.update({key: "[]"})):
            shutil.copytree(DATA / "adapter_v3", folder, dirs_exist_ok=True)
            rewrite(folder, metadata=change, seal=False)
            assert target.outcome(folder) == "refused"


TENSORS = ["vectors", "log/entries", "log/alpha", "base/head.weight", "base/norm.bias"]


class TestTensors:
    @pytest.mark.parametrize("name", TENSORS)
    @pytest.mark.parametrize("which", ["adapter_v3", "adapter_v2"])
    def test_every_tensor(self, target: Target, tmp_path: Path, name: str, which: str) -> None:
        if which == "adapter_v2" and name == "vectors":
            name = "vectors/blocks.0.attn.qkv/k.b"
        changes: dict[str, Callable[[dict[str, Any]], Any]] = {
            "missing": lambda t: t.pop(name),
            "renamed": lambda t: t.update({name + "x": t.pop(name)}),
            "of another type": lambda t: t.update({name: t[name].to(torch.int64)}),
            "of another type, too": lambda t: t.update({name: t[name].to(torch.bool)}),
            "shorter": lambda t: t.update({name: t[name][:-1].clone()}),
            "longer": lambda t: t.update({name: torch.cat([t[name], t[name][:1]])}),
            "of more dimensions": lambda t: t.update({name: t[name][None]}),
            "empty": lambda t: t.update({name: t[name][:0].clone()}),
            "of no dimension": lambda t: t.update({name: t[name].flatten()[0].clone()}),
        }
        for what, change in changes.items():
            folder = shutil.copytree(DATA / which, tmp_path / "a", dirs_exist_ok=True)
            rewrite(Path(folder), tensors=change, seal=which == "adapter_v3")
            if what == "missing" and name.startswith("base/"):
                continue  # which parts trained is told by the tensors alone
            assert target.outcome(Path(folder)) == "refused", what

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("name", ["vectors", "log/alpha", "base/head.weight"])
    def test_numbers_that_are_none(self, target: Target, folder: Path, name: str, value: float) -> None:
        rewrite(folder, tensors=lambda t: t[name].view(-1)[1:2].fill_(value))
        assert target.outcome(folder) == "refused"

    @pytest.mark.parametrize("name", ["x", "", "base/", "base", "vectors/x", *(f"base/{n}" for n in ODD_NAMES)])
    def test_one_too_many(self, target: Target, folder: Path, name: str) -> None:
        rewrite(folder, tensors=lambda t: t.update({name: torch.ones(2)}))
        assert target.outcome(folder) == "refused"

    @pytest.mark.parametrize(
        "change",
        [
            lambda e: e[0].fill_(-1),
            lambda e: e[:, 2].fill_(200),
            lambda e: e[:, 1].fill_(200),
            lambda e: e[:, 3].add_(1),
            lambda e: e[:, 4].fill_(2),
            lambda e: e[:, 0].copy_(e[:, 0].flip(0)),
            lambda e: e[0, 0].fill_(2**31 - 1),
            lambda e: e[0].copy_(e[1]),
        ],
    )
    def test_a_log_that_cannot_be(self, target: Target, folder: Path, change: Callable[[Any], Any]) -> None:
        rewrite(folder, tensors=lambda t: change(t["log/entries"]))
        assert target.outcome(folder) == "refused"

    @pytest.mark.slow
    @pytest.mark.parametrize("saved", ["changed", "all"])
    def test_rows_of_the_banks(self, target: Target, tmp_path: Path, saved: Any) -> None:
        uora.save(golden_adapter(), tmp_path, save_banks=saved)
        whole = (tmp_path / TENSOR_FILE).read_bytes()
        for name in ("banks/rows", "banks/shared")[: 2 if saved == "all" else 1]:
            for change in (
                lambda t: t[:-1].clone(),
                lambda t: t.double(),
                lambda t: t.view(1, -1),
                lambda t: torch.cat([t[:-1], t[-1:] * torch.nan]),
                lambda t: torch.cat([t[:-1], t[-1:] + 1]),
            ):
                (tmp_path / TENSOR_FILE).write_bytes(whole)
                assert target.outcome(tmp_path) == "same"
                rewrite(tmp_path, tensors=lambda t, name=name, change=change: t.update({name: change(t[name])}))
                assert target.outcome(tmp_path) == "refused"


class Trap:
    """Its pickle would make a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tensors": (lambda f: (f / TENSOR_FILE).unlink(), "does not exist"),
    "tensors cut": (lambda f: os.truncate(f / TENSOR_FILE, (f / TENSOR_FILE).stat().st_size - 100), "truncated"),
    "tensors cut in the header": (lambda f: os.truncate(f / TENSOR_FILE, 40), "truncated"),
    "tensors longer": (lambda f: (f / TENSOR_FILE).open("ab").write(b"\0" * 4), "checksum|truncated"),
    "tensors empty": (lambda f: (f / TENSOR_FILE).write_bytes(b""), "truncated"),
    "a header of nonsense": (lambda f: (f / TENSOR_FILE).write_bytes(struct.pack("<Q", 5) + b"hello"), "JSON"),
    "a header of terabytes": (
        lambda f: (f / TENSOR_FILE).write_bytes(struct.pack("<Q", 2**45) + b"{}"), "bytes is announced"
    ),
    "a header that is a list": (lambda f: (f / TENSOR_FILE).write_bytes(struct.pack("<Q", 2) + b"[]"), "no object"),
    "tensors are a folder": (lambda f: ((f / TENSOR_FILE).unlink(), (f / TENSOR_FILE).mkdir()), "cannot be read"),
    "foreign tensors": (
        lambda f: __import__("safetensors.torch").torch.save_file({"x": torch.ones(1)}, f / TENSOR_FILE),
        "not an adapter of uora_vision",
    ),
    "a pickle": (lambda f: (f / TENSOR_FILE).write_bytes(pickle.dumps(Trap(f / "trapped"))), "truncated"),
    "a pickle of torch": (lambda f: torch.save(Trap(f / "trapped"), f / TENSOR_FILE), "truncated"),
    "a pickled configuration": (lambda f: (f / CONFIG_FILE).write_bytes(pickle.dumps(Trap(f / "trapped"))), "JSON"),
    "config cut": (lambda f: (f / CONFIG_FILE).write_text((f / CONFIG_FILE).read_text()[:99]), "not valid JSON"),
    "config of bytes": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "config empty": (lambda f: (f / CONFIG_FILE).write_text(""), "not valid JSON"),
    "config is a folder": (lambda f: ((f / CONFIG_FILE).unlink(), (f / CONFIG_FILE).mkdir()), "cannot be read"),
    "foreign config": (lambda f: (f / CONFIG_FILE).write_text('{"peft_type": "LORA"}'), "not an adapter of uora_vis"),
    "config a list": (lambda f: (f / CONFIG_FILE).write_text("[1]"), "not an adapter of uora_vision"),
    "config nested": (lambda f: (f / CONFIG_FILE).write_text("[" * 100_000), "nested too deeply"),
    "config edited": (
        lambda f: (f / CONFIG_FILE).write_text((f / CONFIG_FILE).read_text().replace('"seed": 11', '"seed": 12')),
        "edited.*may be deleted",
    ),
    "config with a key twice": (
        lambda f: (f / CONFIG_FILE).write_text((f / CONFIG_FILE).read_text().replace("{", '{"format": "x",', 1)),
        "'format' is there twice",
    ),
    "config with NaN": (
        lambda f: (f / CONFIG_FILE).write_text((f / CONFIG_FILE).read_text().replace('"seed": 11', '"seed": NaN')),
        "holds NaN",
    ),
    "config of a newer format": (
        lambda f: (f / CONFIG_FILE).write_text(json.dumps({"format": "uora_vision", "format_version": 99})),
        "format version 99.*a newer one",
    ),
    "newer": (lambda f: rewrite(f, lambda c: c.update(format_version=5)), "format version 5.*a newer one"),
    "much older": (lambda f: rewrite(f, lambda c: c.update(format_version=1)), "format version 1"),
    "description nested": (
        lambda f: rewrite(f, metadata=lambda m: m.update(config="[" * 100_000)), "nested too deeply"
    ),
    "description with a key twice": (
        lambda f: rewrite(f, metadata=lambda m: m.update(config=m["config"].replace("{", '{"base": 1, ', 1))), "twice"
    ),
    "header with a key twice": (lambda f: twice_in_header(f), "'vectors' is there twice"),
    "a rank of billions": (lambda f: rewrite(f, lambda c: c["config"].update(rank=2**40)), "rank must be below"),
    "rows of billions": (
        lambda f: rewrite(f, lambda c: c["projections"][0]["roles"][0].update(rows=2**31 - 1)), "numbers"
    ),
    "a shape of terabytes": (lambda f: huge_shape(f), "truncated"),
    "another number's bits": (lambda f: flip(f, -3), "checksum"),
}  # fmt: skip


def twice_in_header(folder: Path) -> None:
    content = (folder / TENSOR_FILE).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    entry = b'"vectors":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    header = content[8 : 8 + length].replace(b"{", b"{" + entry, 1)
    (folder / TENSOR_FILE).write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def huge_shape(folder: Path) -> None:
    content = (folder / TENSOR_FILE).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = re.sub(rb'("vectors":\{"dtype":"F32","shape":\[)\d+', rb"\g<1>999999999999999", content[8 : 8 + length])
    (folder / TENSOR_FILE).write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def flip(folder: Path, at: int) -> None:
    content = bytearray((folder / TENSOR_FILE).read_bytes())
    content[at] ^= 1
    (folder / TENSOR_FILE).write_bytes(content)


class TestFiles:
    @pytest.mark.parametrize("damage", FILES)
    def test_are_refused_with_the_reason(self, target: Target, folder: Path, damage: str) -> None:
        action, text = FILES[damage]
        action(folder)
        with pytest.raises(uora.FormatError, match=text):
            read_folder(folder)
        assert target.outcome(folder) == "refused"
        assert not (folder / "trapped").exists()

    def test_of_version_2_without_its_configuration(self, target: Target, old: Path) -> None:
        (old / CONFIG_FILE).unlink()
        with pytest.raises(uora.FormatError, match="does not exist"):
            read_folder(old)

    def test_the_copy_of_the_configuration_is_not_needed(self, target: Target, folder: Path) -> None:
        (folder / CONFIG_FILE).unlink()
        assert target.outcome(folder) == "same"

    @pytest.mark.parametrize("name", ["nowhere", "no/where"])
    def test_a_folder_that_is_not_there(self, target: Target, tmp_path: Path, name: str) -> None:
        with pytest.raises(uora.FormatError, match=r"where.* does not exist"):
            uora.load(target.model, tmp_path / name)

    def test_an_adapter_of_another_model(self, tmp_path: Path) -> None:
        uora.save(trained(), tmp_path)
        for other in ({"depth": 1}, {"embed_dim": 32}):
            model = small_vit(**other)
            before = snapshot(model)
            with pytest.raises(uora.FormatError, match="made for"):
                uora.load(model, tmp_path)
            assert_same(before, model)


class TestNames:
    @pytest.mark.parametrize("name", [*ODD_NAMES, "blocks.0.attn", "head", "norm.weight"])
    def test_of_paths(self, target: Target, folder: Path, name: str) -> None:
        rewrite(folder, lambda c: c["projections"][0].update(path=name))
        assert target.outcome(folder) in ("refused", "same")  # block and role find it, at whatever path it was
        rewrite(
            folder, lambda c: (c["projections"][0].update(path=name), c["projections"][0]["roles"][0].update(start=1))
        )
        assert target.outcome(folder) == "refused"

    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_of_roles(self, target: Target, folder: Path, name: str) -> None:
        for key in (name, f"0/attn.{name}", f"0/{name}.q", f"{name}/attn.q", f"0/attn.q/{name}"):
            shutil.copytree(DATA / "adapter_v3", folder, dirs_exist_ok=True)
            rewrite(folder, lambda c, key=key: c["projections"][0]["roles"][0].update(key=key))
            assert target.outcome(folder) == "refused", key

    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_of_matrices(self, target: Target, folder: Path, name: str) -> None:
        for i in range(2):
            shutil.copytree(DATA / "adapter_v3", folder, dirs_exist_ok=True)
            rewrite(folder, lambda c, i=i: put(c, ("matrices", i), name))
            assert target.outcome(folder) == "refused"
