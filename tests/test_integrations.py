"""Each training tool itself, over a small model: when it re-draws, what its checkpoints hold, and that runs go on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import banks, small_vit, wake
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import uora_vision as uora
from uora_vision.integrations.state import after_step, changing_state, frozen_names

transformers = pytest.importorskip("transformers", reason="needs transformers")
accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

from uora_vision.integrations.accelerate import prepare_reinitializer  # noqa: E402
from uora_vision.integrations.transformers import UoraCallback, adapter_only  # noqa: E402

# Awake d are normal: at 0.2 some 16 % of them are dead.
REDRAW: dict[str, Any] = {"threshold": 0.2, "alpha": uora.AlphaDecay(0.9), "every": 2}
WORDS = ["[PAD]", "[EOS]", "[UNK]", *"abcdefghijklmnop"]


def vit() -> nn.Module:
    return wake(uora.inject(small_vit(), rank=8))


def same(one: nn.Module, two: nn.Module) -> None:
    """Two models are equal to the bit in b, d, head, A and B."""
    first, second = changing_state(one) | banks(one), changing_state(two) | banks(two)
    assert first.keys() == second.keys()
    assert [name for name, t in first.items() if not torch.equal(t, second[name])] == []


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def base_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if not p.requires_grad)


class Overflow(nn.Module):
    """Its output is infinite in the second forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, loss: Tensor) -> Tensor:
        self.calls += 1
        return loss * float("inf") if self.calls == 2 else loss


# transformers and TRL


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return wake(uora.inject(transformers.BertForSequenceClassification(config), rank=8))


def examples() -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(WORDS), (32, 6), generator=g)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) % 3} for row in ids]


class StopAt(transformers.TrainerCallback):
    """Saves and stops the run after a step, as an interruption does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def arguments(folder: Path, kind: Any = transformers.TrainingArguments, **options: Any) -> Any:
    given = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "save_strategy": "no", "logging_steps": 1, "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "seed": 3,
    }  # fmt: skip
    return kind(**{**given, **options})


def train_bert(
    folder: Path, base: Any = transformers.Trainer, stop: int | None = None, resume: Any = None, **options: Any
) -> Any:
    callback = UoraCallback(**REDRAW)
    others = [] if stop is None else [StopAt(stop)]
    trainer = base(
        model=bert(), args=arguments(folder, **options), train_dataset=examples(), eval_dataset=examples()[:4],
        callbacks=[callback, *others],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback.reinit


@pytest.fixture(scope="module")
def whole_bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_bert(tmp_path_factory.mktemp("whole"))


def test_trainer_redraws_once_per_optimizer_step(whole_bert: Any) -> None:
    trainer, reinit = whole_bert
    assert trainer.state.global_step == reinit.steps == 4
    assert reinit.firings > 20


@pytest.mark.parametrize("base", [transformers.Trainer, adapter_only(transformers.Trainer)])
def test_trainer_resumes_to_the_bit(base: Any, whole_bert: Any, tmp_path: Path) -> None:
    first, reinit = train_bert(tmp_path, base, stop=2)
    assert reinit.steps == 2 and reinit.firings > 0
    second, reinit = train_bert(tmp_path, base, resume=True)
    whole, expected = whole_bert
    assert (reinit.history() == expected.history()).all() and second.state.global_step == 4
    same(second.model, whole.model)
    assert any(not torch.equal(t, banks(second.model)[n]) for n, t in banks(first.model).items())


def test_trainer_resumes_from_another_folder(whole_bert: Any, tmp_path: Path) -> None:
    train_bert(tmp_path / "old", adapter_only(transformers.Trainer), stop=2)
    train_bert(tmp_path / "new", adapter_only(transformers.Trainer), stop=2, learning_rate=2e-2)  # another run's
    resumed, _ = train_bert(
        tmp_path / "new", adapter_only(transformers.Trainer), resume=str(tmp_path / "old/checkpoint-2")
    )
    same(resumed.model, whole_bert[0].model)


def test_trainer_without_a_state_to_resume_from_says_so(tmp_path: Path) -> None:
    train_bert(tmp_path, stop=2)
    state = tmp_path / "checkpoint-2" / "uora_reinit.pt"
    state.rename(tmp_path / "elsewhere.pt")
    with pytest.raises(uora.StateError, match=r"uora_reinit\.pt"):
        train_bert(tmp_path, resume=True)


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


def test_trainer_of_whole_checkpoints_adds_an_adapter_that_loads(tmp_path: Path) -> None:
    trainer, _ = train_bert(tmp_path, stop=2)
    same(uora.load(uora.remove(bert()), tmp_path / "checkpoint-2" / "uora_adapter"), trainer.model)


@pytest.mark.parametrize("base", [transformers.Trainer, adapter_only(transformers.Trainer)])
def test_trainer_ends_with_the_best_banks(base: Any, tmp_path: Path) -> None:
    trainer, reinit = train_bert(
        tmp_path, base, eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    best = trainer.state.best_global_step
    assert best < 4 and reinit.steps == best and reinit.firings > 0  # the largest loss is an early one
    first, _ = train_bert(tmp_path / "short", stop=best)
    same(trainer.model, first.model)


def test_trainer_logs_firings(tmp_path: Path) -> None:
    trainer, reinit = train_bert(
        tmp_path, adapter_only(transformers.Trainer), report_to=["tensorboard"], max_steps=3,
    )  # fmt: skip
    seen = [entry["firings"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(seen) == 3 and seen[-1] == reinit.firings > 0
    assert tensorboard(tmp_path, "train/firings")[-1] == reinit.firings


def tensorboard(folder: Path, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = folder.rglob("events.out*")
    events = EventAccumulator(str(path))
    events.Reload()
    return [e.value for e in events.Scalars(tag)]


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


# Lightning


def lightning_module(**options: Any) -> Any:
    pl = pytest.importorskip("lightning.pytorch", reason="needs lightning")

    class Module(pl.LightningModule):
        def __init__(self, fused: bool = False, overflow: nn.Module | None = None) -> None:
            super().__init__()
            self.net, self.teacher = vit(), nn.Linear(2, 2).requires_grad_(False)
            self.overflow, self.fused = overflow or nn.Identity(), fused

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.overflow(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def validation_step(self, batch: Any, index: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(uora.param_groups(self.net, lr=1e-2), fused=self.fused)

    return Module(**options)


def pictures(batch: int = 4, n: int = 48) -> DataLoader:
    g = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(n, 3, 32, 32, generator=g), torch.arange(n) % 7), batch)


def train_lightning(folder: Path, epochs: int = 2, resume: Path | None = None, **options: Any) -> Any:
    module = lightning_module(**options.pop("module", {}))
    import lightning.pytorch as pl

    from uora_vision.integrations.lightning import UoraCallback as Callback

    callback = Callback(**REDRAW)
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
    with pytest.raises(RuntimeError, match=r"Missing key.*net\.head\.bias"):
        train_lightning(tmp_path / "cut", resume=tmp_path / "damaged.ckpt")


def test_lightning_validates_with_the_banks_of_the_checkpoint(tmp_path: Path) -> None:
    trainer, trained, _ = train_lightning(tmp_path, epochs=1)
    fresh = lightning_module()
    trainer.validate(fresh, pictures(), ckpt_path=tmp_path / "step=3.ckpt", verbose=False)
    same(fresh.net, trained.net)


def test_lightning_logs_firings(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch", reason="needs lightning")
    from lightning.pytorch.loggers import TensorBoardLogger

    _, _, reinit = train_lightning(
        tmp_path, epochs=1, logger=TensorBoardLogger(tmp_path / "logs"), log_every_n_steps=1
    )  # fmt: skip
    assert tensorboard(tmp_path / "logs", "firings")[-1] == reinit.firings > 0


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


# Accelerate


class Wrapped(nn.Module):
    """A model around the injected one, with a trained part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = vit(), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.net(x))


class Loop:
    """A training loop on Accelerate."""

    def __init__(
        self, make: Callable[[], nn.Module] = vit, accumulate: int = 2, scaler: Any = None, **options: Any
    ) -> None:
        torch.manual_seed(0)
        # What an earlier loop of the process left there: all accelerators share it.
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        self.accelerator.scaler = scaler
        model = make()
        optimizer = torch.optim.SGD(
            (p for p in model.parameters() if p.requires_grad), lr=0.05, momentum=0.9, **options
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.reinit = prepare_reinitializer(self.accelerator, self.model, self.optimizer, **REDRAW)
        self.fired: list[int] = []

    def run(self, batches: Any, loss: Callable[[Tensor], Tensor] = lambda x: x) -> Loop:
        for x, y in batches:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss(nn.functional.cross_entropy(self.model(x), y)))
                self.optimizer.step()
                self.fired.append(self.reinit.step())
                self.optimizer.zero_grad()
        return self


@pytest.mark.parametrize("make", [vit, Wrapped])
def test_accelerate_resumes_to_the_bit_from_an_adapter(make: Any, tmp_path: Path) -> None:
    batches = list(pictures())
    whole = Loop(make).run(batches)
    assert whole.reinit.steps == 6 and whole.reinit.firings > 20
    assert sum(whole.fired) == whole.reinit.firings and not any(whole.fired[::2])
    first = Loop(make).run(batches[:6])
    first.accelerator.save_state(str(tmp_path))
    resumed = Loop(make)
    resumed.run(batches[9:11])  # what it did before must not matter
    resumed.accelerator.load_state(str(tmp_path))
    resumed.run(batches[6:])
    assert (resumed.reinit.history() == whole.reinit.history()).all()
    injected = [next(m for m in run.model.modules() if hasattr(m, "head")) for run in (resumed, whole)]
    same(*injected)
    assert all(torch.equal(t, whole.model.state_dict()[n]) for n, t in resumed.model.state_dict().items())

    assert size(tmp_path) < base_bytes(first.model)
    saved = torch.load(tmp_path / "uora_model.pt", weights_only=True)
    assert saved.keys() == changing_state(first.model).keys() and not frozen_names(first.model) & saved.keys()
    assert not list(tmp_path.glob("*.safetensors"))
    (tmp_path / "uora_model.pt").unlink()
    with pytest.raises(uora.FormatError, match=r"uora_model\.pt"):
        resumed.accelerator.load_state(str(tmp_path))


def test_accumulation_is_one_large_batch() -> None:
    parts, large = Loop(accumulate=2).run(pictures(4)), Loop(accumulate=1).run(pictures(8))
    assert (parts.reinit.history() == large.reinit.history()).all() and parts.reinit.firings > 20
    for name, t in (changing_state(parts.model) | banks(parts.model)).items():
        torch.testing.assert_close(t, (changing_state(large.model) | banks(large.model))[name], rtol=0, atol=1e-6)


def test_accelerate_does_not_redraw_after_a_skipped_step() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    loop = Loop(accumulate=1, scaler=scaler).run(list(pictures())[:4], Overflow())
    assert loop.reinit.steps == 3 and loop.fired[1] == 0


def test_accelerate_wants_a_prepared_model() -> None:
    model = vit()
    with pytest.raises(uora.StateError, match="prepare"):
        prepare_reinitializer(accelerate.Accelerator(cpu=True), model, torch.optim.SGD(model.parameters()))


# What they share


def test_a_step_that_calls_its_parents_step_counts_once() -> None:
    class Derived(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    weight = nn.Parameter(torch.ones(1))
    torch.optim.SGD([weight])  # torch hooks a class's step when the first of its objects is made
    optimizer, calls = Derived([weight]), []
    stop = after_step(optimizer, lambda: calls.append(1))
    optimizer.step()
    assert calls == [1]
    stop()
    optimizer.step()
    assert calls == [1]


def test_a_tied_frozen_weight_does_not_count_as_changing() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    model["a"].requires_grad_(False)
    assert changing_state(model).keys() == {"b.bias", "c.weight", "c.bias"}


def test_the_library_imports_no_training_tool() -> None:
    package = Path(uora.__file__).parent
    tool = re.compile(
        r"^(?:from|import) (?:transformers|trl|lightning|pytorch_lightning|accelerate|\.integrations)", re.M
    )
    files = [*package.glob("*.py"), package / "integrations" / "__init__.py", package / "integrations" / "state.py"]
    assert [p.name for p in files if tool.search(p.read_text())] == []
    assert tool.search((package / "integrations" / "accelerate.py").read_text())
