"""The optimizers that Trainer, Lightning and Accelerate bring are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import uora_vision as uora

pytest.importorskip("trl")
pytest.importorskip("lightning")
import accelerate
import transformers
from training_tools import arguments, bert, examples

from uora_vision.integrations.accelerate import prepare_reinitializer
from uora_vision.integrations.transformers import UoraCallback, adapter_only


def trainer_of(folder: Path, base: Any, **given: Any) -> Any:
    options = {name: given.pop(name) for name in ("weight_decay", "optim") if name in given}
    return base(
        model=bert(), args=arguments(folder, max_steps=1, **options), train_dataset=examples(),
        callbacks=[UoraCallback()], **given,
    )  # fmt: skip


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_trainer_of_adapters_has_the_groups_of_param_groups(tmp_path: Path, optim: str) -> None:
    base = adapter_only(transformers.Trainer)
    trainer = trainer_of(tmp_path, base, weight_decay=0.1, optim=optim, head_lr=1e-3)
    optimizer, trained = trainer.create_optimizer(), trainer.model
    groups = [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    wanted = [(g["name"], g["lr"], g["weight_decay"]) for g in uora.param_groups(trained, 1e-2, 1e-3, 0.1)]
    assert groups == wanted and ("adapter", 1e-2, 0.0) in groups
    assert groups[-2:] == [("head", 1e-3, 0.1), ("head_vectors", 1e-3, 0.0)]


def test_a_trainer_of_adapters_trains_parameters_around_the_injected_model(tmp_path: Path) -> None:
    class Around(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.extra = bert(), torch.nn.Linear(3, 3)

        def forward(self, **x: Any) -> Any:
            return self.bert(**x)

    trainer = adapter_only(transformers.Trainer)(model=Around(), args=arguments(tmp_path, weight_decay=0.1))
    held = {id(p): g["weight_decay"] for g in trainer.create_optimizer().param_groups for p in g["params"]}
    assert held.keys() == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert [held[id(p)] for p in trainer.model.extra.parameters()] == [0.1, 0.0]


@pytest.mark.slow
def test_an_optimizer_that_was_given_is_kept_and_looked_at(tmp_path: Path) -> None:
    base = adapter_only(transformers.Trainer)
    trainer = trainer_of(tmp_path, base)
    trainer.optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], weight_decay=0.1)
    kept = trainer.optimizer
    with pytest.warns(uora.UoraWarning, match="decay"):
        trainer.train()
    assert trainer.create_optimizer().param_groups is kept.param_groups


@pytest.mark.slow
def test_decay_by_a_plain_trainer_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(uora.UoraWarning, match="decay"):
        trainer_of(tmp_path, transformers.Trainer, weight_decay=0.1).train()


@pytest.mark.slow
def test_a_trainer_whose_optimizer_lacks_the_adapter_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, transformers.Trainer)
    trainer.optimizer = torch.optim.SGD(trainer.model.classifier.parameters())
    with pytest.raises(uora.ConfigError, match="has 0 of the"):
        trainer.train()


@pytest.mark.parametrize("decays", [False, True])
def test_accelerate_is_looked_at(decays: bool) -> None:
    model = bert()
    accelerator = accelerate.Accelerator(cpu=True)
    part = [p for p in model.parameters() if p.requires_grad] if decays else model.classifier.parameters()
    prepared = accelerator.prepare(model, torch.optim.AdamW(part, weight_decay=0.1))
    if decays:
        with pytest.warns(uora.UoraWarning, match="decay"):
            prepare_reinitializer(accelerator, *prepared)
    else:
        with pytest.raises(uora.ConfigError, match="has 0 of the"):
            prepare_reinitializer(accelerator, *prepared)


@pytest.mark.parametrize("decays", [False, True])
def test_lightning_is_looked_at(tmp_path: Path, decays: bool) -> None:
    from lightning.pytorch import LightningModule, Trainer

    from uora_vision.integrations.lightning import UoraCallback as Callback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = bert()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.net(**batch).loss

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.net.parameters() if p.requires_grad]
            if not decays:
                trained = [a.d for a in uora.adapters(self.net).values()]
            return torch.optim.SGD(trained, lr=1e-3, weight_decay=0.1)

    data = [{k: v if k != "labels" else torch.tensor(v) for k, v in row.items()} for row in examples()[:2]]
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path, callbacks=[Callback()],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    if decays:
        with pytest.warns(uora.UoraWarning, match="decay"):
            trainer.fit(Module(), loader)
    else:
        with pytest.raises(uora.ConfigError, match=r"lacks .*b"):
            trainer.fit(Module(), loader)
