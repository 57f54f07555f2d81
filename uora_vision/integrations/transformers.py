"""UORA in transformers' Trainer and those derived from it, TRL's SFTTrainer among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigError, FormatError, StateError
from ..lifecycle.criteria import Criterion, Score
from ..lifecycle.informing import inform as inform_adapter
from ..lifecycle.library import bank_of
from ..lifecycle.optimizers import check_optimizer
from ..lifecycle.parameter_groups import param_groups
from ..lifecycle.reinit import Reinitializer, Scope, Source
from ..lifecycle.schedules import AlphaSchedule, ThresholdSchedule
from ..maths.redraw_log import Interpolation
from ..options import UNSET, given, hinting
from ..storage.folder import TENSOR_FILE
from ..storage.save_load import save
from .state import after_step, injected_in, innermost, read_saved, restore, trained_d

REINIT_FILE = "uora_reinit.pt"
ADAPTER_FOLDER = "uora_adapter"

T = TypeVar("T", bound=Trainer)


class UoraCallback(TrainerCallback):
    """Redraws dead directions after every optimizer step that is taken. Takes the options of `Reinitializer`.

    Every checkpoint folder gets the adapter and the state of `reinit`, and `train(resume_from_checkpoint=...)` goes on
    from them. The number of firings so far is logged as `firings`.

    Args:
        inform: how many batches of the training data give the adapter informed rows before the first step (see
            `uora.inform`); 0: none. It needs a trainer of `adapter_only`, whose checkpoints hold the rows.
        inform_loss: the loss of a batch, `inform_loss(model, batch)` with the injected model; see `uora.inform`.

    Raises, when training begins:
        StateError: the model is not injected, or there is no state to resume from.
        ConfigError: `inform` with another trainer, or the optimizer lacks some b or d. One that decays them is warned
            of (`UoraWarning`).

    Example:
        >>> from uora_vision.integrations.transformers import UoraCallback
        >>> callback = UoraCallback(threshold=1e-5, scope="layer")  # Trainer(..., callbacks=[callback])
        >>> callback.options
        {'threshold': 1e-05, 'scope': 'layer'}
    """

    @hinting
    def __init__(
        self,
        *,
        threshold: float | ThresholdSchedule = UNSET,
        alpha: float | AlphaSchedule = UNSET,
        every: int = UNSET,
        scope: Scope = UNSET,
        quorum: float = UNSET,
        interpolation: Interpolation = UNSET,
        relative: bool = UNSET,
        reset_moments: bool = UNSET,
        criterion: Criterion | Score = UNSET,
        source: Source = UNSET,
        batches: Iterable[Any] | None = UNSET,
        loss: Callable[[nn.Module, Any], Tensor] | None = UNSET,
        inform: int = 0,
        inform_loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        self.inform, self.inform_loss = inform, inform_loss
        self.attached = False
        self.options = given(
            threshold=threshold, alpha=alpha, every=every, scope=scope, quorum=quorum, interpolation=interpolation,
            relative=relative, reset_moments=reset_moments, criterion=criterion, source=source, batches=batches,
            loss=loss,
        )  # fmt: skip
        self.reinit: Reinitializer | None = None
        self.resumed: Path | None = None
        self._stop: Callable[[], None] | None = None

    def attach(self, trainer: Trainer) -> UoraCallback:
        """Go to the front of the trainer's callbacks, so that the ones that write logs see `firings`."""
        self.attached = True
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(c for c in callbacks if c is not self)]
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        model, optimizer = injected_in(given["model"]), innermost(given["optimizer"])
        if self.inform and not self.attached:
            raise ConfigError(
                "inform=... needs a trainer of adapter_only(Trainer), since checkpoints of others do not hold informed "
                "rows; or call uora.inform(model, batches) before training"
            )
        if self.inform and not state.global_step:
            inform_adapter(model, given["train_dataloader"], self.inform_loss, max_batches=self.inform)
        if self.reinit is None or self.reinit.bank is not bank_of(model):
            self.reinit = Reinitializer(model, optimizer=given["optimizer"], **self.options)
        else:
            check_optimizer(given["optimizer"], model)
        self.reinit.optimizer = optimizer
        if state.global_step:
            self._load(model, [f for f in (self.resumed, args.resume_from_checkpoint) if f], args, state.global_step)
        self._release()
        self._stop = after_step(optimizer, self.reinit.step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if self.reinit is None or not args.should_save:
            return
        folder = next((f for f in _folders(args, state.global_step) if f.is_dir()), None)
        if folder is None:
            raise StateError(f"the Trainer has written no checkpoint-{state.global_step} in {args.output_dir}")
        model = injected_in(given["model"])
        if not (folder / TENSOR_FILE).exists():  # in the folder itself, from_pretrained would take it for one of peft
            save(model, folder / ADAPTER_FOLDER)
        torch.save({"d": trained_d(model), "reinit": self.reinit.state_dict()}, folder / REINIT_FILE)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if self.reinit is None or logs is None:
            return
        logs["firings"] = self.reinit.firings
        if state.log_history and state.log_history[-1].get("step") == state.global_step:  # a copy, made before
            state.log_history[-1]["firings"] = self.reinit.firings

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._release()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(injected_in(given["model"]), [state.best_model_checkpoint], args, state.best_global_step or 0)

    def _load(self, model: torch.nn.Module, first: list[Any], args: TrainingArguments, step: int) -> None:
        """Take the state from the first folder whose d is the model's: output_dir may hold another run's checkpoint."""
        assert self.reinit is not None
        folders = [*map(Path, first), *_folders(args, step)]
        for path in (folder / REINIT_FILE for folder in folders):
            if path.is_file():
                saved = read_saved(path)
                if not isinstance(saved, dict) or not isinstance(saved.get("d"), torch.Tensor) or "reinit" not in saved:
                    raise FormatError(f"{path} lacks d or reinit; it is not what UoraCallback writes")
                if torch.equal(saved["d"], trained_d(model)):
                    self.reinit.load_state_dict(saved["reinit"])
                    return
        raise StateError(
            f"no {REINIT_FILE} of this run at step {step} in {', '.join(dict.fromkeys(map(str, folders)))}; resume "
            "from a checkpoint that was written with UoraCallback, and set output_dir to its parent folder"
        )

    def _release(self) -> None:
        if self._stop is not None:
            self._stop()
            self._stop = None


def adapter_only(base: type[T]) -> type[T]:
    """A Trainer, derived from `base`, whose checkpoints hold an adapter (see `save`) in place of the whole model.

    Resuming and `load_best_model_at_end` read it, and `load(model, folder)` reads what `save_model(folder)` writes.
    The trainer's model must be the injected one. Its `UoraCallback`s are attached. The optimizer gets the groups of
    `param_groups`, in which b and d do not decay, and takes one argument more:

        trainer = adapter_only(Trainer)(model=model, args=args, head_lr=1e-3, callbacks=[UoraCallback()])

    Args of the class that is returned:
        head_lr: learning rate of the head; that of the arguments if None.

    Example:
        >>> from transformers import Trainer
        >>> from uora_vision.integrations.transformers import adapter_only
        >>> AdapterTrainer = adapter_only(Trainer)  # AdapterTrainer(model=model, args=args, callbacks=[UoraCallback()])
        >>> AdapterTrainer.__name__
        'AdapterOnlyTrainer'
    """

    class AdapterOnly(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, head_lr: float | None = None, **kwargs: Any) -> None:
            self.head_lr = head_lr
            super().__init__(*args, **kwargs)
            for callback in self._uora():
                callback.attach(self)

        def _uora(self) -> list[UoraCallback]:
            return [c for c in self.callback_handler.callbacks if isinstance(c, UoraCallback)]

        def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            given = self.optimizer is not None
            optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
            if not given:
                _regroup(optimizer, self.model, self.head_lr, self.args.weight_decay)
            return optimizer

        def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            if not self.args.should_save:
                return
            folder = save(injected_in(self.model), output_dir or str(self.args.output_dir))
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            restore(injected_in(self.model if model is None else model), resume_from_checkpoint)
            for callback in self._uora():
                callback.resumed = Path(resume_from_checkpoint)

        def _load_best_model(self) -> None:
            restore(injected_in(self.model), str(self.state.best_model_checkpoint))

    AdapterOnly.__name__ = AdapterOnly.__qualname__ = f"AdapterOnly{base.__name__}"
    return AdapterOnly


def _regroup(optimizer: Any, model: torch.nn.Module, head_lr: float | None, weight_decay: float) -> None:
    """Give a fresh optimizer the groups of `param_groups`. One whose groups have options of their own (GaLore), or that
    is none of torch's, keeps its groups, and the callback looks at them."""
    plain = isinstance(optimizer, torch.optim.Optimizer)
    if not plain or any(group.keys() - optimizer.defaults.keys() - {"params"} for group in optimizer.param_groups):
        return
    lr = optimizer.defaults["lr"]
    groups = param_groups(injected_in(model), lr, lr if head_lr is None else head_lr, weight_decay)
    held = {id(p) for group in groups for p in group["params"]}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
    for name, params in (
        ("outside", [p for p in rest if p.dim() > 1]),
        ("outside_vectors", [p for p in rest if p.dim() < 2]),
    ):
        rate = lr if head_lr is None else head_lr
        groups.append({"name": name, "params": params, "lr": rate, "weight_decay": weight_decay * (name == "outside")})
    optimizer.param_groups.clear()
    for group in groups:
        if group["params"]:
            optimizer.add_param_group(group)


def _folders(args: TrainingArguments, step: int) -> list[Path]:
    """Where the Trainer may have put the checkpoint of a step; a search over options has a folder for each trial."""
    root, name = Path(str(args.output_dir)), f"checkpoint-{step}"
    return [root / name, *sorted(root.glob(f"*/{name}"))]
