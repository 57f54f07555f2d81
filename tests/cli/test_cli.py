"""The command `uora`, each subcommand on good and bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from conftest import wake
from golden import DATA
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.__main__ import main

NAME = "timm/test_vit"
CLASSES = 5


def base() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = timm.create_model("test_vit", num_classes=CLASSES).eval()
        model.norm.bias.data.fill_(0.1)  # as of pretrained weights, whose name is told
        return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base in a file, an adapter of it, an input and the outputs."""
    folder = tmp_path_factory.mktemp("cli")
    model = base()
    save_file(model.state_dict(), folder / "base.safetensors")
    wake(uora.inject(model, rank=4), 2.0)
    with torch.no_grad():
        model.head.weight.normal_()
        reinit = uora.Reinitializer(model, threshold=1e-9)
        for adapter in list(uora.adapters(model).values())[:3]:
            adapter.d[0, 1] = 0
        reinit.step()
        x = torch.randn(3, 3, 160, 160)
        uora.save(model, folder / "adapter")
        return {"folder": folder, "adapter": folder / "adapter", "base": folder / "base.safetensors", "x": x,
                "y": model(x)}  # fmt: skip


def copied(files: dict[str, Any], to: Path) -> Path:
    return Path(shutil.copytree(files["adapter"], to / "adapter"))


def of(files: dict[str, Any]) -> list[str]:
    return ["--model", NAME, "--checkpoint", str(files["base"])]


def fails(arguments: list[Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad input is answered by one line."""
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


class TestItself:
    def test_runs_as_a_module_and_is_installed_as_uora(self) -> None:
        done = subprocess.run([sys.executable, "-m", "uora_vision", "--version"], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout == f"uora_vision {uora.__version__}\n"
        (point,) = entry_points(group="console_scripts", name="uora")
        assert point.load() is main

    def test_help_names_every_command_and_the_exit_codes(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        text = capsys.readouterr().out
        assert all(
            f"\n  {name} " in text for name in ("plan", "inspect", "predict", "merge", "export", "verify", "upgrade")
        )
        assert "1 a check failed, 2 bad input" in text

    def test_a_command_that_does_not_exist(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inject"]) == 2
        assert "No such command" in capsys.readouterr().err

    def test_without_typer_it_says_what_to_install(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("uora_vision.__main__.find_spec", lambda name: None)
        assert main(["plan", NAME]) == 2
        assert capsys.readouterr().err == "error: the command line needs typer: pip install typer\n"


class TestPlan:
    @pytest.mark.slow
    def test_table_with_sizes_and_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", NAME, "--rank", "4", "--diff"]) == 0
        text = capsys.readouterr().out
        assert "The trace confirms it" in text and "about 12.9 kB, and 260.0 kB" in text
        assert main(["plan", NAME, "--rank", "4", "--json", "--targets", "qv"]) == 0
        assert {r["name"] for p in json.loads(capsys.readouterr().out)["projections"] for r in p["roles"]} == {"q", "v"}

    @pytest.mark.parametrize("name", ["open_clip/ViT-B-32", "timm/vit_base_patch16_224"])
    def test_large_models_cost_no_weights(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", name, "--exclude", "k"]) == 0
        assert "weights to adapt at rank 256" in capsys.readouterr().out

    def test_a_folder_of_transformers(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        gpt2(tmp_path)
        assert main(["plan", f"transformers/{tmp_path}", "--diff"]) == 0
        assert "The trace confirms it" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["timm/nope"], "timm has no model 'nope'"), (["vit_"], "is no model of timm, open_clip, transformers"),
            (["timm/resnet18"], "targets='conv'"), ([NAME, "--targets", "q_porj"], "no projection matched"),
            (["transformers/docs"], "cannot be made"), ([NAME, "--rank", "0"], "rank must be"),
            (["open_clip/nope"], "open_clip has no model"), (["timm/"], "is no model of"),
        ],
    )  # fmt: skip
    def test_mistakes_are_one_line(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fails(["plan", *arguments], message, capsys)


def gpt2(folder: Path) -> nn.Module:
    options = {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options)).eval()
    model.save_pretrained(folder)
    return model


class TestInspect:
    def test_says_what_an_adapter_is(self, files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", str(files["adapter"])]) == 0
        text = capsys.readouterr().out
        size = sum(p.stat().st_size for p in files["adapter"].iterdir())
        for part in (
            "timm/test_vit.r160_in1k", "rank 4, seed 0", "24 weights, 36 roles", f"size       {size:,} B",
            "325 in 2 trained tensors", "rows of A and B redrawn, in 1 steps from 1 to 1", "blocks.5.mlp.fc2.fc2",
        ):  # fmt: skip
            assert part in text, part

    def test_json_has_the_numbers(self, files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", str(files["adapter"]), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        model = uora.load(base(), files["adapter"])
        adapter = uora.adapters(model)["blocks.2.attn.qkv"]
        layer = next(row for row in found["layers"] if row["role"] == "blocks.2.attn.qkv.k")
        assert layer["b"] == pytest.approx(adapter.b[64:128].abs().mean().item())
        assert layer["d"] == pytest.approx(adapter.d[1].abs().mean().item())
        assert found["parameters"] == sum(p.numel() for a in uora.adapters(model).values() for p in a.parameters())
        bank = model.get_submodule("uora")
        assert found["firings"]["directions"] == sum(len(e.indices) for e in bank.log)  # type: ignore[union-attr]

    @pytest.mark.slow
    def test_a_picture(self, files: dict[str, Any], tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        assert main(["inspect", str(files["adapter"]), "--png", str(tmp_path / "a.png")]) == 0
        assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"

    def test_earlier_versions(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", str(DATA / "adapter_v2")]) == 0
        assert "48 rows of A and B redrawn, in 4 steps from 1 to 4" in capsys.readouterr().out

    def test_bad_input(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fails(["inspect", tmp_path / "nothing"], "is no folder", capsys)
        fails(["inspect", tmp_path], "adapter_model.safetensors does not exist", capsys)


class TestMerge:
    def test_writes_a_plain_model(
        self, files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["merge", str(files["adapter"]), *of(files), "--output", str(tmp_path / "out")]) == 0
        report, wrote = capsys.readouterr().out.splitlines()
        assert report.startswith("merged 24 weights; ") and "difference of an output" in report
        assert wrote == f"wrote {tmp_path / 'out' / 'model.safetensors'}"
        model = base()
        model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
        assert near(model(files["x"]), files["y"])

    def test_a_folder_of_transformers_with_tied_weights(self, tmp_path: Path) -> None:
        model = wake(uora.inject(gpt2(tmp_path / "base"), rank=4, train=()))
        ids = torch.tensor([[1, 5, 7]])
        want = model(ids).logits
        uora.save(model, tmp_path / "adapter")
        spec = f"transformers/{tmp_path / 'base'}"
        assert main(["merge", str(tmp_path / "adapter"), "--model", spec, "--output", str(tmp_path / "out")]) == 0
        assert near(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, want)

    @pytest.mark.slow
    def test_the_base_that_the_adapter_names(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = wake(uora.inject(gpt2(tmp_path / "base"), rank=4, train=()))
        want = model(torch.tensor([[1, 5, 7]])).logits
        about = {"task": "text-generation", "model": "transformers/../base"}
        uora.save(model, tmp_path / "adapter", preprocessing=about)
        adapter = str(tmp_path / "adapter")
        assert main(["verify", adapter]) == 0
        assert f"ok      fits transformers/{tmp_path / 'base'}, by its fingerprint" in capsys.readouterr().out
        assert main(["merge", adapter, "--output", str(tmp_path / "out")]) == 0
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert near(merged(torch.tensor([[1, 5, 7]])).logits, want)
        assert main(["export", adapter, "--to", "peft-lora", "--output", str(tmp_path / "lora")]) == 0
        shutil.rmtree(tmp_path / "base")
        capsys.readouterr()
        assert main(["verify", adapter]) == 0  # of a base that is not to be had nothing is said
        assert f"-       not held against a base: transformers/{tmp_path / 'base'} cannot" in capsys.readouterr().out
        fails(["merge", adapter, "--output", tmp_path / "none"], "cannot be made", capsys)

    @pytest.mark.slow
    def test_bad_input(self, files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "model.safetensors").write_text("mine")
        there = ["merge", files["adapter"], *of(files), "--output", tmp_path]
        fails(there, "--overwrite replaces it", capsys)
        other = ["merge", files["adapter"], "--model", "timm/test_vit2", "--output", tmp_path / "out"]
        save_file(timm.create_model("test_vit2").state_dict(), tmp_path / "other.safetensors")
        fails([*other, "--checkpoint", tmp_path / "other.safetensors"], "the adapter was made for test_vit", capsys)
        fails([*other, "--checkpoint", files["base"]], "is not of this model", capsys)
        fails(["merge", files["adapter"], "--model", "open_clip/ViT-B-32", "--output", tmp_path / "out"],
              "open_clip needs --checkpoint", capsys)  # fmt: skip
        fails([*other, "--checkpoint", tmp_path / "none.pt"], "cannot be made", capsys)
        assert not (tmp_path / "out").exists() and (tmp_path / "model.safetensors").read_text() == "mine"
        assert main([str(a) for a in (*there, "--overwrite")]) == 0


class TestExport:
    @pytest.mark.parametrize("kind", ["peft-lora", "peft-vera"])
    def test_to_peft(
        self, kind: str, files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        peft = pytest.importorskip("peft")
        assert main(["export", str(files["adapter"]), *of(files), "--to", kind, "--output", str(tmp_path)]) == 0
        assert "exact" in capsys.readouterr().out
        assert near(peft.PeftModel.from_pretrained(base(), tmp_path).eval()(files["x"]), files["y"])

    def test_a_smaller_rank_states_its_error(
        self, files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        to = ["--to", "peft-lora", "--rank", "2", "--output", str(tmp_path)]
        assert main(["export", str(files["adapter"]), *of(files), *to]) == 0
        assert "at rank 2" in (text := capsys.readouterr().out) and "at worst (blocks." in text

    @pytest.mark.slow
    def test_to_onnx(self, files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("onnxscript")
        onnxruntime = pytest.importorskip("onnxruntime")
        path = tmp_path / "new" / "model.onnx"
        assert main(["export", str(files["adapter"]), *of(files), "--to", "onnx", "--output", str(path)]) == 0
        assert "ok      wrote" in capsys.readouterr().out
        session = onnxruntime.InferenceSession(path)
        (got,) = session.run(None, {session.get_inputs()[0].name: files["x"].numpy()})
        assert near(torch.from_numpy(got), files["y"], 1e-4)

    def test_bad_input(self, files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        given = ["export", files["adapter"], *of(files), "--output", tmp_path / "out"]
        fails([*given, "--to", "peft-vera", "--rank", "2"], "--rank goes with", capsys)
        fails([*given, "--to", "peft-lora", "--rank", "0"], "rank must be", capsys)
        assert main([str(a) for a in (*given, "--to", "gguf")]) == 2
        assert "'gguf'" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


class TestVerify:
    def test_a_good_one(self, files: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", str(files["adapter"])]) == 0
        told = capsys.readouterr().out
        assert told.count("ok    ") == 2 and "-       not held against a base" in told
        assert main(["verify", str(files["adapter"]), "--json"]) == 0
        assert [one["passed"] for one in json.loads(capsys.readouterr().out)] == [True, True, None]
        assert main(["verify", str(files["adapter"]), *of(files)]) == 0
        text = capsys.readouterr().out
        assert text.count("ok    ") == 4 and "by its fingerprint" in text

    @pytest.mark.parametrize("spoil", [truncate, flip, lambda f: (f / "adapter_model.safetensors").unlink()])
    def test_damage(
        self, spoil: Callable[[Path], None], files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = copied(files, tmp_path)
        spoil(folder)
        assert main(["verify", str(folder), *of(files)]) == 1
        assert capsys.readouterr().out.startswith("FAILED  files are whole")

    @pytest.mark.slow
    def test_other_weights_and_other_models(
        self, files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = base()
        with torch.no_grad():
            other.blocks[1].attn.qkv.weight.mul_(1.5)
        save_file(other.state_dict(), tmp_path / "other.safetensors")
        given = ["verify", str(files["adapter"]), "--model", NAME, "--checkpoint", str(tmp_path / "other.safetensors")]
        assert main(given) == 1
        assert "FAILED  fits timm/test_vit, by its fingerprint: the adapter was made for other weights" in (
            capsys.readouterr().out
        )
        torch.save(timm.create_model("test_vit3").state_dict(), tmp_path / "third.pt")
        given = ["verify", str(files["adapter"]), "--model", "timm/test_vit3"]
        assert main([*given, "--checkpoint", str(tmp_path / "third.pt")]) == 1
        assert "FAILED  fits timm/test_vit3" in capsys.readouterr().out

    def test_other_matrices(self, files: dict[str, Any], monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
        def other(*arguments: Any) -> Tensor:
            return initial(*arguments) * (1 + 2**-20)

        from uora_vision.maths import bank

        initial = bank.initial_rows
        monkeypatch.setattr(bank, "initial_rows", other)
        assert main(["verify", str(files["adapter"])]) == 1
        assert "FAILED  A and B come out as where it was trained" in capsys.readouterr().out

    def test_bad_input(self, files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fails(["verify", tmp_path / "nothing"], "is no folder", capsys)
        fails(["verify", files["adapter"], "--model", "timm/nope"], "timm has no model", capsys)

    def test_a_repository_on_the_hub(
        self, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        asked = []

        def local_copy(repository: str, revision: str | None = None) -> Path:
            asked.append((repository, revision))
            return Path(files["adapter"])

        monkeypatch.setattr("uora_vision.storage.hub.local_copy", local_copy)
        assert main(["verify", "someone/adapter", "--revision", "v1"]) == 0
        assert main(["inspect", "someone/adapter"]) == 0 and "timm/test_vit" in capsys.readouterr().out
        assert asked == [("someone/adapter", "v1"), ("someone/adapter", None)]

    def test_a_mistyped_folder_may_be_a_repository(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)  # where there is no folder `runs`
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        fails(["verify", "runs/adaptr"], "runs/adaptr is n", capsys)
        fails(["upgrade", "runs/adaptr"], "is no folder", capsys)

    @pytest.mark.slow
    def test_the_real_command(self, files: dict[str, Any], tmp_path: Path) -> None:
        folder = copied(files, tmp_path)
        truncate(folder)
        done = subprocess.run([sys.executable, "-m", "uora_vision", "verify", folder], capture_output=True, text=True)
        assert done.returncode == 1 and "FAILED  files" in done.stdout and "Traceback" not in done.stderr


class TestUpgrade:
    def test_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = shutil.copytree(DATA / "adapter_v2", tmp_path / "old")
        assert main(["verify", str(folder)]) == 0
        assert "`uora upgrade`" in capsys.readouterr().out
        assert main(["upgrade", str(folder)]) == 0
        assert "is of format version 4 now" in capsys.readouterr().out
        assert main(["upgrade", str(folder)]) == 0 and main(["verify", str(folder)]) == 0
        assert "needs no upgrade" in (text := capsys.readouterr().out) and "`uora upgrade`" not in text

    def test_bad_input(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fails(["upgrade", tmp_path / "nothing"], "is no folder", capsys)
        fails(["upgrade", tmp_path], "does not exist", capsys)


def near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((got - want).abs().max() < tolerance * want.abs().max())
