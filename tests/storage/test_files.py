"""Saving and loading: the same function in another process, at other paths, over the right base only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import kill, small_vit, trained, wake
from golden import DATA, golden_adapter, golden_images, golden_model, state
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from unchanged import assert_same, snapshot

import uora_vision as uora
from uora_vision.maths.bank import Bank
from uora_vision.storage.folder import CONFIG_FILE, TENSOR_FILE, read_folder

LOADER = """
import sys, torch, uora_vision as uora
from conftest import small_vit
x = torch.load(sys.argv[1] + "/x.pt")
for folder in sys.argv[2:]:
    model = uora.load(small_vit(), folder)
    torch.save(model(x).detach(), folder + "/y.pt")
"""


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / TENSOR_FILE, framework="pt") as file:
        return file.metadata()


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


OPTIONS: list[dict[str, Any]] = [{}, {"layout": "slice", "seed": 5}, {"init": "kaiming", "exclude": "k"}]
PAIRED = [
    (scope, banks, OPTIONS[(i + j) % 3])
    for i, scope in enumerate((None, "shared", "quorum", "layer"))
    for j, banks in enumerate((None, "changed", "all"))
]
"""Every two of the three together."""


class TestRoundTrip:
    @pytest.mark.slow  # it imports torch and timm again
    def test_a_fresh_process_computes_the_same_to_the_bit(self, images: Tensor, tmp_path: Path) -> None:
        """After many firings, in every scope, interpolated both ways."""
        models = {}
        for scope in ("shared", "quorum", "layer"):
            for interpolation in ("linear", "spherical"):
                model = trained(scope=scope, steps=40, interpolation=interpolation)
                assert len(model.uora.log) > 100
                models[tmp_path / f"{scope}-{interpolation}"] = model
        for folder, model in models.items():
            uora.save(model, folder)
        torch.save(images, tmp_path / "x.pt")
        here = Path(__file__).parents[1]
        path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-c", LOADER, str(tmp_path), *map(str, models)]
        subprocess.run(command, env=environment, check=True, timeout=300)
        for folder, model in models.items():
            assert torch.equal(torch.load(folder / "y.pt"), model(images)), folder.name

    @pytest.mark.parametrize(("scope", "save_banks", "options"), PAIRED)
    def test_outputs_head_options_and_log_come_back(
        self, images: Tensor, tmp_path: Path, scope: str | None, save_banks: Any, options: dict[str, Any]
    ) -> None:
        model = trained(scope=scope, **options)
        assert uora.save(model, tmp_path / "a", save_banks=save_banks) == tmp_path / "a"
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

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_an_adapted_model_that_was_converted_as_a_whole(self, tmp_path: Path, dtype: torch.dtype) -> None:
        model = trained().to(dtype)
        uora.save(model, tmp_path)
        again = uora.load(small_vit(), tmp_path)
        for one, two in zip(uora.adapters(model).values(), uora.adapters(again).values(), strict=True):
            assert torch.equal(one.b.float(), two.b) and torch.equal(one.d.float(), two.d)

    @pytest.mark.slow
    def test_a_bfloat16_base(self, images: Tensor, tmp_path: Path) -> None:
        make = lambda: small_vit().bfloat16()  # noqa: E731
        model = trained(make, scope="layer")
        uora.save(model, tmp_path)
        assert torch.equal(uora.load(make(), tmp_path)(images.bfloat16()), model(images.bfloat16()))

    @pytest.mark.parametrize("scope", ["shared", "layer"])
    @pytest.mark.parametrize("save_banks", [None, "all"])
    def test_training_goes_on_from_a_loaded_adapter_with_fresh_draws(
        self, tmp_path: Path, images: Tensor, scope: Any, save_banks: Any
    ) -> None:
        model = trained(scope=scope)
        uora.save(model, tmp_path, save_banks=save_banks)
        again = uora.load(small_vit(), tmp_path)
        for m in (model, again):
            kill(m, {"blocks.0.attn.qkv.q": [1, 7]})
            uora.Reinitializer(m, scope=scope).step()
            wake(m)
        assert torch.equal(model.uora.a(64), again.uora.a(64)) and torch.equal(model(images), again(images))

    @pytest.mark.parametrize(("targets", "limit"), [("attention+mlp", 421_000), ("qv", 105_500)])
    @pytest.mark.slow
    def test_sizes_at_rank_256_on_vit_base(self, tmp_path: Path, targets: str, limit: int) -> None:
        with torch.device("meta"):
            model = timm.create_model("vit_base_patch16_224")
        model.to_empty(device="cpu")
        for p in model.parameters():
            p.data.zero_()
        uora.save(uora.inject(model, targets=targets, train=()), tmp_path)
        vectors = 4 * uora.summary(model).adapter_parameters
        assert vectors < (tmp_path / TENSOR_FILE).stat().st_size < limit
        assert sum(f.stat().st_size for f in tmp_path.iterdir()) < limit

    def test_no_bank_is_stored_unless_asked_for(self, tmp_path: Path) -> None:
        model = trained(scope="layer")
        sizes = {}
        for save_banks in (None, "changed", "all"):
            uora.save(model, tmp_path, save_banks=save_banks)  # type: ignore[arg-type]
            tensors = load_file(tmp_path / TENSOR_FILE)
            known = {"vectors", "log/entries", "log/alpha", "base/head.weight", "base/head.bias"}
            known |= {"banks/rows"} if save_banks else set()
            assert set(tensors) == known | ({"banks/shared"} if save_banks == "all" else set())
            sizes[save_banks] = sum(t.numel() for t in tensors.values())
        assert "blocks.0.attn.qkv.q/A" in json.loads(metadata(tmp_path)["config"])["matrices"]
        changed = sum(rows.numel() for rows in model.uora.state().own.values())
        assert sizes["changed"] - sizes[None] == changed > 0
        assert sizes["all"] - sizes["changed"] == sum(
            model.uora.get_buffer(name).numel() for name in model.uora.matrices
        )

    def test_a_thousand_experts_take_one_tensor(self, tmp_path: Path) -> None:
        class Experts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up = nn.Parameter(torch.randn(64, 8, 4))
                self.down = nn.Parameter(torch.randn(64, 4, 8))

            def forward(self, x: Tensor) -> Tensor:
                return torch.einsum("eoi,bei->beo", self.down, torch.einsum("eoi,bi->beo", self.up, x).relu()).sum(1)

        torch.manual_seed(1)
        model = nn.Sequential(Experts(), Experts())
        base = {name: p.detach().clone() for name, p in model.named_parameters()}
        wake(uora.inject(model, rank=2, train=()))
        assert sum(len(a.roles) for a in uora.adapters(model).values()) == 256
        uora.save(model, tmp_path)
        assert set(load_file(tmp_path / TENSOR_FILE)) == {"vectors", "log/entries", "log/alpha"}
        again = nn.Sequential(Experts(), Experts())
        again.load_state_dict(base)
        x = torch.randn(3, 4)
        assert torch.equal(uora.load(again, tmp_path)(x), model(x))


class TestVersions:
    @pytest.mark.parametrize("folder", ["adapter_v2", "adapter_v3"])
    def test_adapters_of_every_version_give_the_bits_that_they_gave(self, folder: str) -> None:
        expected = load_file(DATA / "expected.safetensors")
        outputs = expected.pop("outputs")
        model = uora.load(golden_model(), DATA / folder)
        assert same(state(model), expected)
        torch.testing.assert_close(model(golden_images()), outputs)

    def test_what_is_trained_today_is_what_was_trained_then(self, tmp_path: Path) -> None:
        model = golden_adapter()
        uora.save(model, tmp_path)
        assert same(load_file(tmp_path / TENSOR_FILE), load_file(DATA / "adapter_v3" / TENSOR_FILE))
        today, then = read_folder(tmp_path), read_folder(DATA / "adapter_v3")
        assert today.identity == then.identity and today.bank_fingerprint == then.bank_fingerprint
        assert today.projections == then.projections

    def test_upgrading_in_place(self, tmp_path: Path) -> None:
        shutil.copytree(DATA / "adapter_v2", tmp_path, dirs_exist_ok=True)
        before = state(uora.load(golden_model(), tmp_path))
        assert uora.upgrade(tmp_path)
        assert "sha256" in metadata(tmp_path)
        assert same(state(uora.load(golden_model(), tmp_path)), before)
        content = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
        assert not uora.upgrade(tmp_path)
        assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == content

    def test_an_upgrade_of_version_3_declares_what_was_trained(self, tmp_path: Path) -> None:
        shutil.copytree(DATA / "adapter_v3", tmp_path, dirs_exist_ok=True)
        before = state(uora.load(golden_model(), tmp_path))
        assert read_folder(tmp_path).trained is None and uora.upgrade(tmp_path) and not uora.upgrade(tmp_path)
        stored = read_folder(tmp_path)
        assert stored.trained == tuple(sorted(stored.parts)) and "head.bias" in stored.parts
        assert same(state(uora.load(golden_model(), tmp_path)), before)

    def test_the_golden_adapters_are_small(self) -> None:
        for folder in ("adapter_v2", "adapter_v3"):
            assert sum(f.stat().st_size for f in (DATA / folder).iterdir()) < 30_000


class TestBanks:
    @pytest.fixture
    def other_qr(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A LAPACK whose last bits are others."""
        from uora_vision.maths import bank
        from uora_vision.storage import save_load

        real = bank.initial_rows

        def initial(*args: Any) -> Tensor:
            rows = real(*args)
            rows[0, 0] = torch.nextafter(rows[0, 0], torch.tensor(torch.inf))
            return rows

        monkeypatch.setattr(bank, "initial_rows", initial)
        monkeypatch.setattr(save_load, "initial_rows", initial)

    @pytest.mark.slow
    def test_banks_that_come_out_otherwise_are_refused(self, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        uora.save(trained(scope="layer"), tmp_path)
        request.getfixturevalue("other_qr")
        model = small_vit()
        before = snapshot(model)
        with pytest.raises(uora.FormatError, match=r"A and B come out other.*save_banks='all'"):
            uora.load(model, tmp_path)
        assert_same(before, model)

    @pytest.mark.parametrize("scope", ["shared", "layer"])
    def test_banks_in_the_file_load_anywhere(
        self, tmp_path: Path, request: pytest.FixtureRequest, images: Tensor, scope: str
    ) -> None:
        model = trained(scope=scope)
        expected = model(images)
        uora.save(model, tmp_path / "a", save_banks="all")
        request.getfixturevalue("other_qr")
        other = uora.load(small_vit(), tmp_path / "a")
        assert torch.equal(other(images), expected)
        uora.save(other, tmp_path / "b", save_banks="all")
        assert torch.equal(uora.load(small_vit(), tmp_path / "b")(images), expected)

    def test_changed_rows_in_the_file_need_no_replay(
        self, tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = trained(scope="shared")
        uora.save(model, tmp_path, save_banks="changed")
        monkeypatch.setattr(Bank, "redraw", lambda *_: pytest.fail("drew again"))
        assert torch.equal(uora.load(small_vit(), tmp_path)(images), model(images))

    def test_an_unknown_choice(self, tmp_path: Path) -> None:
        with pytest.raises(uora.OptionError, match="changed, all"):
            uora.save(trained(), tmp_path, save_banks="some")  # type: ignore[arg-type]


class TestOther:
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

    def test_loading_over_an_adapter_of_that_name(self, tmp_path: Path) -> None:
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
        with pytest.raises(uora.FormatError, match=r"d of blocks.1.mlp.fc1.fc1 holds NaN or infinite values"):
            uora.save(model, tmp_path)
        assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == kept


def test_the_configuration_beside_the_tensors_says_the_same(tmp_path: Path) -> None:
    uora.save(trained(scope="layer"), tmp_path)
    copy = json.loads((tmp_path / CONFIG_FILE).read_text())
    del copy["sha256"]
    assert copy == json.loads(metadata(tmp_path)["config"])
