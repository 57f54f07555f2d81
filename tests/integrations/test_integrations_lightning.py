"""Lightning: resuming to the bit, skipped steps, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_vit
from torch import Tensor, nn
from training_tools import REDRAW, SALIENT, Overflow, base_bytes, pictures, same, tensorboard, vit

import uora_vision as uora
from uora_vision.integrations.state import frozen_names


def lightning_module(make: Any = vit, **options: Any) -> Any:
    pl = pytest.importorskip("lightning.pytorch", reason="needs lightning")

    class Module(pl.LightningModule):
        def __init__(self, fused: bool = False, overflow: nn.Module | None = None) -> None:
            super().__init__()
            self.net, self.teacher = make(), nn.Linear(2, 2).requires_grad_(False)
            self.overflow, self.fused = overflow or nn.Identity(), fused

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.overflow(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def validation_step(self, batch: Any, index: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(uora.param_groups(self.net, lr=1e-2), fused=self.fused)

    return Module(**options)


def train_lightning(folder: Path, epochs: int = 2, resume: Path | None = None, **options: Any) -> Any:
    module = lightning_module(**options.pop("module", {}))
    import lightning.pytorch as pl

    from uora_vision.integrations.lightning import UoraCallback as Callback

    callback = Callback(**options.pop("redraw", REDRAW), inform=options.pop("inform", 0))
    # At the end of an epoch of 3 steps: in the middle Lightning itself would begin the data again.
    saver = pl.callbacks.ModelCheckpoint(
        folder, every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1, filename="{step}"
    )
    given = {
        "max_epochs": epochs, "accelerator": "cpu", "accumulate_grad_batches": 2, "callbacks": [callback, saver],
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    trainer = pl.Trainer(**{**given, **options})
    trainer.fit(module, pictures(n=24), ckpt_path=resume)
    return trainer, module, callback.reinit


@pytest.mark.slow
def test_lightning_resumes_to_the_bit_from_an_adapter(tmp_path: Path) -> None:
    trainer, whole, expected = train_lightning(tmp_path / "whole")
    assert trainer.global_step == expected.steps == 6 and expected.firings > 20
    _, cut, reinit = train_lightning(tmp_path / "cut", epochs=1)
    assert reinit.steps == 3
    path = tmp_path / "cut" / "step=3.ckpt"
    _, resumed, reinit = train_lightning(tmp_path / "cut", resume=path)
    assert (reinit.history() == expected.history()).all()
    same(resumed.net, whole.net)

    checkpoint = torch.load(path, weights_only=True)
    assert not {"net." + name for name in frozen_names(cut.net)} & checkpoint["state_dict"].keys()
    assert "teacher.weight" in checkpoint["state_dict"]
    assert path.stat().st_size < base_bytes(cut.net)

    # Loading stays strict about what trains.
    del checkpoint["state_dict"]["net.head.bias"]
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(uora.FormatError, match=r"it has no net\.head\.bias"):
        train_lightning(tmp_path / "cut", resume=tmp_path / "damaged.ckpt")


def fresh_vit() -> nn.Module:
    return uora.inject(small_vit(), rank=8)


@pytest.mark.slow
def test_lightning_informs_and_resumes_with_the_rows(tmp_path: Path) -> None:
    given = {"module": {"make": fresh_vit}, "inform": 2}
    _, whole, _ = train_lightning(tmp_path / "whole", **given)
    train_lightning(tmp_path / "cut", epochs=1, **given)
    trainer, resumed, _ = train_lightning(tmp_path / "cut", resume=tmp_path / "cut/step=3.ckpt", **given)
    same(resumed.net, whole.net)
    assert uora.adapters(whole.net)["blocks.0.attn.qkv"].bank.widths.informed
    validated = lightning_module(fresh_vit)
    trainer.validate(validated, pictures(), ckpt_path=tmp_path / "cut/step=6.ckpt", verbose=False)
    same(validated.net, whole.net)


@pytest.mark.slow
def test_lightning_resumes_redraws_by_saliency_with_informed_rows(tmp_path: Path) -> None:
    given = {"redraw": SALIENT | {"batches": list(pictures(n=8))}}
    _, whole, expected = train_lightning(tmp_path / "whole", **given)
    train_lightning(tmp_path / "cut", epochs=1, **given)
    _, resumed, reinit = train_lightning(tmp_path / "cut", resume=tmp_path / "cut/step=3.ckpt", **given)
    assert (reinit.history() == expected.history()).all() and expected.firings > 20
    assert any(e.rows is not None for e in expected.bank.log)
    same(resumed.net, whole.net)


def test_lightning_validates_with_the_banks_of_the_checkpoint(tmp_path: Path) -> None:
    trainer, trained, _ = train_lightning(tmp_path, epochs=1)
    fresh = lightning_module()
    trainer.validate(fresh, pictures(), ckpt_path=tmp_path / "step=3.ckpt", verbose=False)
    same(fresh.net, trained.net)


@pytest.mark.slow
def test_lightning_logs_firings(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch", reason="needs lightning")
    from lightning.pytorch.loggers import TensorBoardLogger

    _, _, reinit = train_lightning(
        tmp_path, epochs=1, logger=TensorBoardLogger(tmp_path / "logs"), log_every_n_steps=1
    )  # fmt: skip
    assert tensorboard(tmp_path / "logs", "firings")[-1] == reinit.firings > 0


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_lightning_does_not_redraw_after_a_skipped_step(fused: bool, tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch", reason="needs lightning")
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer, _, reinit = train_lightning(
        tmp_path, epochs=1, accumulate_grad_batches=1, module={"fused": fused, "overflow": Overflow()},
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
    )  # fmt: skip
    assert trainer.global_step == 6 and reinit.steps == 5
