"""Transformers' Trainer and TRL: resuming to the bit, skipped steps, checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import banks, wake
from safetensors import safe_open
from torch import Tensor
from training_tools import (
    REDRAW,
    SALIENT,
    WORDS,
    Overflow,
    arguments,
    base_bytes,
    bert,
    examples,
    same,
    size,
    tensorboard,
)

import uora_vision as uora
from uora_vision.integrations.state import frozen_names

transformers = pytest.importorskip("transformers", reason="needs transformers")

from uora_vision.integrations.transformers import UoraCallback, adapter_only  # noqa: E402


class StopAt(transformers.TrainerCallback):
    """Saves and stops the run after a step, as an interruption does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def train_bert(
    folder: Path,
    base: Any = transformers.Trainer,
    stop: int | None = None,
    resume: Any = None,
    redraw: Any = None,
    **options: Any,
) -> Any:
    callback = UoraCallback(**(redraw or REDRAW))
    others = [] if stop is None else [StopAt(stop)]
    trainer = base(
        model=bert(), args=arguments(folder, **options), train_dataset=examples(), eval_dataset=examples()[:4],
        callbacks=[callback, *others],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback.reinit


@pytest.fixture(scope="module")
def whole_bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A whole run of a class of trainers, which have an optimizer each."""
    return functools.cache(lambda base: train_bert(tmp_path_factory.mktemp("whole"), base))


@pytest.mark.slow
def test_trainer_redraws_once_per_optimizer_step(whole_bert: Any) -> None:
    trainer, reinit = whole_bert(transformers.Trainer)
    assert trainer.state.global_step == reinit.steps == 4
    assert reinit.firings > 20


@pytest.mark.parametrize(
    "base", [pytest.param(transformers.Trainer, marks=pytest.mark.slow), adapter_only(transformers.Trainer)]
)
@pytest.mark.slow
def test_trainer_resumes_to_the_bit(base: Any, whole_bert: Any, tmp_path: Path) -> None:
    first, reinit = train_bert(tmp_path, base, stop=2)
    assert reinit.steps == 2 and reinit.firings > 0
    second, reinit = train_bert(tmp_path, base, resume=True)
    whole, expected = whole_bert(base)
    assert (reinit.history() == expected.history()).all() and second.state.global_step == 4
    same(second.model, whole.model)
    assert any(not torch.equal(t, banks(second.model)[n]) for n, t in banks(first.model).items())


@pytest.mark.slow
def test_trainer_resumes_redraws_by_saliency_with_informed_rows(tmp_path: Path) -> None:
    rows = examples()[:8]
    redraw = SALIENT | {"batches": [{key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}]}
    base = adapter_only(transformers.Trainer)
    whole, expected = train_bert(tmp_path / "whole", base, redraw=redraw)
    train_bert(tmp_path / "cut", base, stop=2, redraw=redraw)
    resumed, reinit = train_bert(tmp_path / "cut", base, resume=True, redraw=redraw)
    assert (reinit.history() == expected.history()).all() and expected.firings > 20
    assert any(e.rows is not None for e in expected.bank.log)
    same(resumed.model, whole.model)


@pytest.mark.slow
def test_trainer_resumes_from_another_folder(whole_bert: Any, tmp_path: Path) -> None:
    base = adapter_only(transformers.Trainer)
    train_bert(tmp_path / "old", base, stop=2)
    train_bert(tmp_path / "new", base, stop=2, learning_rate=2e-2)  # another run's
    resumed, _ = train_bert(tmp_path / "new", base, resume=str(tmp_path / "old/checkpoint-2"))
    same(resumed.model, whole_bert(base)[0].model)


@pytest.mark.slow
def test_trainer_without_a_state_to_resume_from_says_so(tmp_path: Path) -> None:
    train_bert(tmp_path, stop=2)
    state = tmp_path / "checkpoint-2" / "uora_reinit.pt"
    state.rename(tmp_path / "elsewhere.pt")
    with pytest.raises(uora.StateError, match=r"uora_reinit\.pt"):
        train_bert(tmp_path, resume=True)


@pytest.mark.slow
def test_trainer_checkpoints_hold_no_base(tmp_path: Path) -> None:
    trainer, _ = train_bert(tmp_path, adapter_only(transformers.Trainer), stop=2, optim="sgd")
    folder = tmp_path / "checkpoint-2"
    assert size(folder) < base_bytes(trainer.model) / 2
    frozen = frozen_names(trainer.model)
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert not frozen & {name.removeprefix("base/") for name in file.keys()}  # noqa: SIM118
    assert not list(folder.rglob("model*")) and not list(folder.rglob("pytorch_model*"))
    trainer.save_model(str(tmp_path / "final"))
    plain = bert()
    same(uora.load(uora.remove(plain), tmp_path / "final"), trainer.model)


@pytest.mark.slow
def test_trainer_of_whole_checkpoints_adds_an_adapter_that_loads(tmp_path: Path) -> None:
    trainer, _ = train_bert(tmp_path, stop=2)
    same(uora.load(uora.remove(bert()), tmp_path / "checkpoint-2" / "uora_adapter"), trainer.model)


@pytest.mark.slow
@pytest.mark.parametrize("base", [transformers.Trainer, adapter_only(transformers.Trainer)])
def test_trainer_ends_with_the_best_banks(base: Any, tmp_path: Path) -> None:
    trainer, reinit = train_bert(
        tmp_path, base, eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    best = trainer.state.best_global_step
    assert best < 4 and reinit.steps == best and reinit.firings > 0  # the largest loss is an early one
    first, _ = train_bert(tmp_path / "short", base, stop=best)
    same(trainer.model, first.model)


@pytest.mark.slow
def test_trainer_logs_firings(tmp_path: Path) -> None:
    trainer, reinit = train_bert(
        tmp_path, adapter_only(transformers.Trainer), report_to=["tensorboard"], max_steps=3,
    )  # fmt: skip
    seen = [entry["firings"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(seen) == 3 and seen[-1] == reinit.firings > 0
    assert tensorboard(tmp_path, "train/firings")[-1] == reinit.firings


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_trainer_does_not_redraw_after_a_skipped_step(optim: str, tmp_path: Path) -> None:
    overflow = Overflow()

    class Fails(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return overflow(super().compute_loss(*args, **kwargs))

    callback = UoraCallback(**REDRAW)
    options = {"gradient_accumulation_steps": 1, "max_steps": 4, "optim": optim, "max_grad_norm": 0}
    trainer = Fails(
        model=bert(), args=arguments(tmp_path, **options), train_dataset=examples(), callbacks=[callback]
    )  # fmt: skip
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.train()
    assert trainer.state.global_step == 4 and callback.reinit is not None
    assert callback.reinit.steps == 3


def train_llama(folder: Path, stop: int | None = None, resume: bool = False) -> Any:
    trl = pytest.importorskip("trl", reason="needs trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    model = wake(uora.inject(transformers.LlamaForCausalLM(config), rank=8))
    texts = [" ".join(WORDS[3 + (i + k) % 16] for k in range(6)) for i in range(32)]
    callback = UoraCallback(**REDRAW)
    trainer = adapter_only(trl.SFTTrainer)(
        model=model, args=arguments(folder, trl.SFTConfig, max_length=16, max_steps=4, bf16=False),
        train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer,
        callbacks=[callback, *([] if stop is None else [StopAt(stop)])],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback.reinit


@pytest.mark.slow
def test_trl(tmp_path: Path) -> None:
    whole, expected = train_llama(tmp_path / "whole")
    assert expected.steps == 4 and expected.firings > 20
    assert [e["firings"] for e in whole.state.log_history if "loss" in e][-1] == expected.firings
    train_llama(tmp_path / "cut", stop=2)
    folder = tmp_path / "cut" / "checkpoint-2"
    assert (folder / "adapter_model.safetensors").exists() and not list(folder.glob("model*"))
    resumed, reinit = train_llama(tmp_path / "cut", resume=True)
    assert (reinit.history() == expected.history()).all()
    same(resumed.model, whole.model)


@pytest.mark.slow
def test_an_informed_adapter_trains_and_is_resumed_with_its_rows(tmp_path: Path) -> None:
    def train(base: Any, resume: Any = None) -> Any:
        model, callback = uora.inject(uora.remove(bert()), rank=4), UoraCallback(inform=2, **REDRAW)
        trainer = base(
            model=model, args=arguments(tmp_path, save_strategy="steps", save_steps=2), train_dataset=examples(),
            callbacks=[callback],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train(adapter_only(transformers.Trainer))
    resumed = train(adapter_only(transformers.Trainer), str(tmp_path / "checkpoint-2"))
    same(whole, resumed)
    names = [a.bank.widths.informed for m in (whole, resumed) for a in [next(iter(uora.adapters(m).values()))]]
    assert names[0] == names[1] != {}
    with pytest.raises(uora.ConfigError, match=r"adapter_only\(Trainer\)"):
        train(transformers.Trainer)
