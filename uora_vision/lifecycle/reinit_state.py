"""The state of a Reinitializer in a checkpoint, read strictly."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import LARGEST
from ..errors import FormatError
from ..maths.redraw_log import GIVEN, Redraw, unpack_log


class ReinitState(NamedTuple):
    """What a state holds, checked.

    Args:
        steps: optimizer steps so far.
        counts: steps below the threshold, (layers, r) int64.
        history: every firing, (n, 3) int64.
        log: the redraws of the banks.
        scores: the running means of the criterion, (layers, r) float32; None if it has none.
    """

    steps: int
    counts: Tensor
    history: Tensor
    log: list[Redraw]
    scores: Tensor | None


def read_state(state: Any, layers: list[str], rank: int, banks: dict[str, Any], scored: bool) -> ReinitState:
    """A state that belongs to these adapters.

    Args:
        layers: names of the adapted roles.
        banks: the options by which A and B are drawn.
        scored: whether the criterion has running means.

    Raises:
        FormatError: it lacks something, is damaged, or belongs to other adapters.
    """
    if not isinstance(state, dict):
        raise FormatError(f"a reinitialisation state is a dict, not {type(state).__name__}")
    if lacking := sorted({"steps", "counts", "history", "log", "matrices", "layers", "banks"} - state.keys()):
        raise FormatError(f"this reinitialisation state lacks {', '.join(lacking)}; the checkpoint is not whole")
    tensors = {"counts": state["counts"], "history": state["history"]}
    parts = state["log"] if isinstance(state["log"], dict) else {}
    tensors |= {name: parts[name] for name in ("entries", "alpha", *GIVEN) if name in parts}
    types = {"counts": torch.int64, "history": torch.int64, "entries": torch.int32, "alpha": torch.float64}
    types |= {name: kind for name, kind in GIVEN.items() if name in parts}
    if scored != ("scores" in state):
        raise FormatError(
            "this reinitialisation state is of another criterion: it has "
            + ("no running means, and this one needs them" if scored else "running means, and 'magnitude' has none")
        )
    if scored:
        tensors["scores"], types["scores"] = state["scores"], torch.float32
    if odd := [n for n, kind in types.items() if not isinstance(t := tensors.get(n), Tensor) or t.dtype != kind]:
        raise FormatError(f"{odd[0]} of this reinitialisation state must be a tensor of {types[odd[0]]}")
    if state["layers"] != layers or any(
        tensors[name].shape != (len(layers), rank) for name in ("counts", "scores") if name in tensors
    ):
        raise FormatError("this reinitialisation state belongs to a model with other adapters or another rank")
    if repr(state["banks"]) != repr(banks):
        raise FormatError(
            f"this reinitialisation state belongs to banks with {state['banks']!r:.300}, this model has {banks}; "
            "inject with the options of the run that is continued"
        )
    names, history, steps = state["matrices"], state["history"].cpu(), state["steps"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError("matrices of this reinitialisation state must be a list of names")
    log = unpack_log({name: tensors[name].cpu() for name in ("entries", "alpha", *GIVEN) if name in tensors}, names)
    if type(steps) is not int or not (log[-1].step if log else 0) <= steps < LARGEST:
        raise FormatError(f"{steps!r} steps of this reinitialisation state are none, or fewer than its log has")
    if (state["counts"] < 0).any():
        raise FormatError("counts of this reinitialisation state are below 0")
    top = torch.tensor([steps, len(layers) - 1, rank - 1], device="cpu")
    if history.shape[1:] != (3,) or (history < 0).any() or (history > top).any():
        raise FormatError("history of this reinitialisation state holds numbers that no firing has")
    scores = tensors["scores"].clone() if scored else None
    return ReinitState(steps, state["counts"].clone(), history.clone(), log, scores)
