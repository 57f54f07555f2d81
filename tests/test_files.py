"""Saving, loading and merging: the same function in another process, and no half-read or half-written adapters."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import kill, small_vit, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_inject import assert_same, snapshot
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.files import CONFIG_FILE, TENSOR_FILE

Make = Callable[..., nn.Module]


LOADER = """
import sys, torch, uora_vision as uora
from conftest import small_vit
x = torch.load(sys.argv[1] + "/x.pt")
for folder in sys.argv[2:]:
    model = uora.load(small_vit(), folder)
    torch.save(model(x).detach(), folder + "/y.pt")
"""


class TestRoundTrip:
    @pytest.mark.slow  # it imports torch and timm again
    def test_a_fresh_process_computes_the_same_to_the_bit(self, images: Tensor, tmp_path: Path) -> None:
        models = {tmp_path / scope: trained(scope=scope) for scope in ("shared", "quorum", "layer")}
        for folder, model in models.items():
            uora.save(model, folder)
        torch.save(images, tmp_path / "x.pt")
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-c", LOADER, str(tmp_path), *map(str, models)]
        subprocess.run(command, env=environment, check=True, timeout=300)
        for folder, model in models.items():
            assert torch.equal(torch.load(folder / "y.pt"), model(images)), folder.name

    @pytest.mark.parametrize("scope", [None, "shared", "quorum", "layer"])
    @pytest.mark.parametrize("options", [{}, {"layout": "slice", "seed": 5}, {"init": "kaiming", "exclude": "k"}])
    def test_outputs_head_options_and_log_come_back(
        self, images: Tensor, tmp_path: Path, scope: str | None, options: dict[str, Any]
    ) -> None:
        model = trained(scope=scope, **options)
        assert uora.save(model, tmp_path / "a") == tmp_path / "a"
        base = small_vit()
        assert uora.load(base, str(tmp_path / "a")) is base
        assert torch.equal(base(images), model(images))
        assert torch.equal(base.head.weight, model.head.weight)
        assert base.uora.config == model.uora.config and len(base.uora.log) == len(model.uora.log)
        trains = lambda m: {n for n, p in m.named_parameters() if p.requires_grad}  # noqa: E731
        assert trains(base) == trains(model)

    def test_norms_and_biases_that_train_come_back(self, images: Tensor, tmp_path: Path) -> None:
        model = trained(train=("norm", "bias", "head"))
        with torch.no_grad():
            model.blocks[0].norm1.weight.mul_(2), model.blocks[1].mlp.fc2.bias.add_(1)
        uora.save(model, tmp_path)
        assert torch.equal(uora.load(small_vit(), tmp_path)(images), model(images))

    def test_running_statistics_that_moved_come_back(self, tmp_path: Path) -> None:
        """A frozen BatchNorm in training mode still moves its statistics, and the adapter was trained with them."""
        make = lambda: timm.create_model(  # noqa: E731
            "tiny_vit_5m_224", num_classes=7, embed_dims=(16, 32, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1),
            window_sizes=(4, 4, 4, 2),
        )  # fmt: skip
        x = torch.randn(2, 3, 64, 64)
        torch.manual_seed(0)
        model = uora.inject(make(), rank=4).train()
        for _ in range(3):
            model(x + 2)
        uora.save(model.eval(), tmp_path)
        torch.manual_seed(0)
        assert torch.equal(uora.load(make(), tmp_path).eval()(x), model(x))

    def test_a_bfloat16_base(self, images: Tensor, tmp_path: Path) -> None:
        make = lambda: small_vit().bfloat16()  # noqa: E731
        model = trained(make, scope="layer")
        uora.save(model, tmp_path)
        assert torch.equal(uora.load(make(), tmp_path)(images.bfloat16()), model(images.bfloat16()))

    def test_training_goes_on_from_a_loaded_adapter_with_fresh_draws(self, tmp_path: Path) -> None:
        model = trained(scope="shared")
        uora.save(model, tmp_path)
        again = uora.load(small_vit(), tmp_path)
        for m in (model, again):
            kill(m, {"blocks.0.attn.qkv.q": [1, 7]})
            uora.Reinitializer(m).step()
        assert torch.equal(model.uora.a(64), again.uora.a(64))

    @pytest.mark.parametrize(("targets", "limit"), [("attention+mlp", 450_000), ("qv", 110_000)])
    def test_sizes_at_rank_256_on_vit_base(self, tmp_path: Path, targets: str, limit: int) -> None:
        with torch.device("meta"):
            model = timm.create_model("vit_base_patch16_224")
        model.to_empty(device="cpu")  # never touched: only b and d are written
        uora.save(uora.inject(model, targets=targets, train=()), tmp_path)
        vectors = 4 * uora.summary(model).adapter_parameters
        assert vectors < (tmp_path / TENSOR_FILE).stat().st_size < limit
        assert sum(f.stat().st_size for f in tmp_path.iterdir()) < limit

    def test_no_bank_is_stored(self, tmp_path: Path) -> None:
        model = trained(scope="layer")
        uora.save(model, tmp_path)
        tensors = load_file(tmp_path / TENSOR_FILE)
        known = {"log/entries", "log/alpha", "base/head.weight", "base/head.bias"}
        known |= {
            f"vectors/{path}/{r.name}.{v}" for path, a in uora.adapters(model).items() for r in a.roles for v in "bd"
        }
        assert set(tensors) == known
        with safe_open(tmp_path / TENSOR_FILE, framework="pt") as file:
            assert "blocks.0.attn.qkv.q/A" in json.loads(file.metadata()["matrices"])


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any], **metadata: str) -> None:
    with safe_open(folder / TENSOR_FILE, framework="pt") as file:
        metadata = {**file.metadata(), **metadata}
    tensors = load_file(folder / TENSOR_FILE)
    change(tensors)
    save_file(tensors, folder / TENSOR_FILE, metadata=metadata)


B, D = "vectors/blocks.0.attn.qkv/k.b", "vectors/blocks.0.attn.qkv/k.d"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), "does not exist"),
    "no tensors": (lambda f: (f / TENSOR_FILE).unlink(), "does not exist"),
    "config cut": (lambda f: (f / CONFIG_FILE).write_text((f / CONFIG_FILE).read_text()[:99]), "not valid JSON"),
    "config of bytes": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "config empty": (lambda f: (f / CONFIG_FILE).write_text(""), "not valid JSON"),
    "foreign config": (
        lambda f: (f / CONFIG_FILE).write_text('{"peft_type": "LORA"}'),
        "not an adapter of uora_vision",
    ),
    "a list": (lambda f: (f / CONFIG_FILE).write_text("[1]"), "not an adapter of uora_vision"),
    "newer": (lambda f: edit_config(f, format_version=99), "format version 99"),
    "no version": (lambda f: edit_config(f, format_version=None), "format version None"),
    "no projections": (lambda f: edit_config(f, projections=[]), "damaged"),
    "projections of another kind": (lambda f: edit_config(f, projections=[{"path": 3}]), "damaged"),
    "a path that is a list": (lambda f: edit_config(f, projections=[{"path": [], "in": 64, "roles": []}]), "damaged"),
    "unknown option": (lambda f: edit_config(f, config={"rank": 8, "colour": 1}), "damaged"),
    "bad option": (lambda f: edit_config(f, config={"rank": 0}), "damaged"),
    "no matrices": (lambda f: edit_tensors(f, len, matrices="[]"), "damaged"),
    "matrices of another kind": (lambda f: edit_tensors(f, len, matrices="[[]]"), "damaged"),
    "foreign tensors": (lambda f: save_file({"x": torch.ones(1)}, f / TENSOR_FILE), "damaged"),
    "base of another kind": (lambda f: edit_config(f, base=None, projections=[{}]), "damaged"),
    "files of two adapters": (
        lambda f: uora.save(trained(seed=3), f / "b") and os.replace(f / "b" / TENSOR_FILE, f / TENSOR_FILE),
        "of different adapters",
    ),
    "tensors cut": (lambda f: os.truncate(f / TENSOR_FILE, (f / TENSOR_FILE).stat().st_size - 100), "truncated"),
    "tensors cut in the header": (lambda f: os.truncate(f / TENSOR_FILE, 40), "truncated"),
    "tensors empty": (lambda f: (f / TENSOR_FILE).write_bytes(b""), "truncated"),
    "header of nonsense": (lambda f: (f / TENSOR_FILE).write_bytes(struct.pack("<Q", 5) + b"hello"), "damaged"),
    "nan": (lambda f: edit_tensors(f, lambda t: t[D].__setitem__(2, torch.nan)), "NaN or infinite values in .*k.d"),
    "inf in the head": (lambda f: edit_tensors(f, lambda t: t["base/head.bias"].fill_(-torch.inf)), "base/head.bias"),
    "nan in alpha": (lambda f: edit_tensors(f, lambda t: t["log/alpha"].fill_(torch.nan)), "log/alpha"),
    "a vector missing": (lambda f: edit_tensors(f, lambda t: t.pop(B)), "k.b is missing"),
    "a vector too much": (lambda f: edit_tensors(f, lambda t: t.update(x=torch.ones(1))), "x is not in its config"),
    "a vector too short": (lambda f: edit_tensors(f, lambda t: t.update({B: t[B][:5].clone()})), r"shape \(5,\)"),
    "no log": (lambda f: edit_tensors(f, lambda t: t.pop("log/entries")), "damaged"),
    "log of other shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"log/alpha": torch.ones(1)})),
        "damaged|shapes",
    ),
    "log out of range": (lambda f: edit_tensors(f, lambda t: t["log/entries"][:, 2].fill_(200)), "log"),
    "log with gaps": (lambda f: edit_tensors(f, lambda t: t["log/entries"][:, 3].add_(1)), "gaps"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of one block with redraws of its own."""
    model = trained(lambda: small_vit(depth=1), steps=2, scope="layer", targets="qv")
    return uora.save(model, tmp_path_factory.mktemp("saved") / "adapter")


class TestBadInput:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_a_damaged_adapter_is_refused_and_leaves_the_model(self, tmp_path: Path, damage: str) -> None:
        uora.save(trained(scope="layer"), tmp_path)
        action, text = DAMAGE[damage]
        action(tmp_path)
        model = small_vit().train()
        model.norm.weight.requires_grad_(False)
        before = snapshot(model)
        with pytest.raises(uora.FormatError, match=text):
            uora.load(model, tmp_path)
        assert_same(before, model)

    def test_a_folder_that_is_not_there(self, vit: nn.Module, tmp_path: Path) -> None:
        with pytest.raises(uora.FormatError, match=r"nowhere.* does not exist"):
            uora.load(vit, tmp_path / "nowhere")

    @pytest.mark.parametrize(
        "other", [{"depth": 1}, {"depth": 3}, {"embed_dim": 32}, {"mlp_ratio": 2}, {"num_classes": 8}]
    )
    def test_another_architecture_or_number_of_classes(self, tmp_path: Path, other: dict[str, Any]) -> None:
        uora.save(trained(), tmp_path)
        model = small_vit(**other)
        before = snapshot(model)
        with pytest.raises(uora.FormatError, match="num_classes" if "num_classes" in other else "made for"):
            uora.load(model, tmp_path)
        assert_same(before, model)

    def test_a_model_of_another_name_and_the_same_shapes(self, tmp_path: Path) -> None:
        uora.save(trained(), tmp_path)
        other = timm.create_model(
            "deit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=7
        )
        with pytest.raises(uora.FormatError, match=r"vit_tiny_patch16_224.*deit_tiny_patch16_224"):
            uora.load(other, tmp_path)

    def test_loading_over_an_adapter(self, tmp_path: Path) -> None:
        model = trained()
        uora.save(model, tmp_path)
        with pytest.raises(uora.StateError, match="already has an adapter"):
            uora.load(model, tmp_path)

    def test_saving_a_plain_model(self, vit: nn.Module, tmp_path: Path) -> None:
        with pytest.raises(uora.StateError, match="no adapter"):
            uora.save(vit, tmp_path / "a")
        assert not (tmp_path / "a").exists()

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_saving_what_has_diverged_leaves_the_last_good_one(self, tmp_path: Path, value: float) -> None:
        model = trained()
        uora.save(model, tmp_path)
        kept = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
        kill(model, {"blocks.1.mlp.fc1.fc1": [2]}, value)
        with pytest.raises(uora.FormatError, match=r"blocks.1.mlp.fc1/fc1.d is not finite"):
            uora.save(model, tmp_path)
        assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == kept

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_whatever_value_of_the_config_is_replaced_the_answer_is_an_error_of_ours_or_a_model(
        self, data: st.DataObject, saved: Path
    ) -> None:
        shutil.copytree(saved, folder := saved.parent / "fuzzed", dirs_exist_ok=True)
        config = json.loads((folder / CONFIG_FILE).read_text())
        node: Any = config
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = data.draw(st.sampled_from(list(keys)))
            if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.integers(0, 5)) == 0:
                break
            node = node[key]
        junk = st.sampled_from([None, True, -1, 0, 3, 2.5, 10**9, "", "q", [], [1], {}, {"a": 1}, "\x00"])
        node[key] = data.draw(junk)
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        model = small_vit(depth=1)
        before = snapshot(model)
        try:
            uora.load(model, folder)
        except uora.UoraError:
            assert_same(before, model)
        else:
            assert uora.adapters(model)


class TestAtomic:
    @pytest.mark.parametrize("call", ["fsync", "replace"])
    @pytest.mark.parametrize("which", [1, 2])
    def test_an_interrupted_save_leaves_an_adapter_that_loads(
        self, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, which: int
    ) -> None:
        """Killed at either file, there is the old adapter or the new one; they differ in log and matrices."""
        old, new = trained(scope="shared", steps=2), trained(scope="layer")
        uora.save(old, tmp_path)
        real, calls = getattr(os, call), []

        def breaks(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == which:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, breaks)
        with pytest.raises(OSError, match="No space"):
            uora.save(new, tmp_path)
        monkeypatch.undo()
        assert sorted(f.name for f in tmp_path.iterdir()) == sorted([CONFIG_FILE, TENSOR_FILE]), (
            "temporary files are left"
        )
        y = uora.load(small_vit(), tmp_path)(images)
        assert torch.equal(y, old(images)) or torch.equal(y, new(images))

    def test_saving_again_replaces(self, images: Tensor, tmp_path: Path) -> None:
        uora.save(trained(scope="shared"), tmp_path)
        model = trained(rank=4)
        uora.save(model, tmp_path)
        assert torch.equal(uora.load(small_vit(), tmp_path)(images), model(images))
        assert len(list(tmp_path.iterdir())) == 2
