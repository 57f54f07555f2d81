"""Merging: the adapter added into the weights, and the plain model given back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DeadAdapterError
from .inject import adapters, remove
from .layers import Adapter, adapters_of, raw
from .verify import call, float_tensors


@dataclass(frozen=True)
class MergeReport:
    """What a merge changed, measured.

    Args:
        weights: number of merged weights.
        weight_error: largest |stored - exact| over all entries of the merged weights, from rounding to their type.
        output_error: largest |merged - unmerged| of the outputs in eval mode, None without an example input.
        output_scale: largest |output| of the unmerged model, None without an example input.
    """

    weights: int
    weight_error: float
    output_error: float | None = None
    output_scale: float | None = None

    def __str__(self) -> str:
        text = f"merged {self.weights} weights; largest rounding of a weight {self.weight_error:.2g}"
        if self.output_error is not None:
            text += (
                f"; largest difference of an output {self.output_error:.2g}, of outputs up to {self.output_scale:.2g}"
            )
        return text


@torch.no_grad()
def merge(
    model: nn.Module, example_input: Any = None, *, on_report: Callable[[MergeReport], None] | None = None
) -> nn.Module:
    """Add every dW to its weight, in place, and take the adapter out: the original classes and state-dict keys.

    The sum is formed in float32 (float64 for a float64 base) and rounded once to the type of the weight. A base stored
    in bfloat16 or float16 rounds young updates away; merge `model.float()` for an exact copy.

    Args:
        example_input: if given, the outputs before and after are compared, in eval mode.
        on_report: called with what was measured; by default a line is printed when an example input is given.

    Returns:
        The same model, trainable where it was before `inject`.

    Raises:
        StateError: the model is not injected.
        DeadAdapterError: a merged weight would not be finite; nothing is changed.
    """
    found = adapters(model)
    weights = {a.name: raw(m, tensor) for m in model.modules() for tensor, a in adapters_of(m).items()}
    before = _outputs(model, example_input)
    merged = {name: _merged(weights[name], adapter) for name, adapter in found.items()}
    broken = [name for name, (weight, _) in merged.items() if not weight.isfinite().all()]
    if broken:
        raise DeadAdapterError(
            f"merging would give weights that are not finite in {', '.join(broken)}; nothing was changed"
        )
    for name, (weight, _) in merged.items():
        weights[name].copy_(weight)
    remove(model)
    report = MergeReport(len(merged), max(error for _, error in merged.values()))
    if before is not None:
        after = _outputs(model, example_input)
        error = max((x - y).abs().max().item() for x, y in zip(before, after or [], strict=True))
        report = MergeReport(report.weights, report.weight_error, error, max(x.abs().max().item() for x in before))
    if on_report is not None:
        on_report(report)
    elif before is not None:
        print(report)
    return model


def _merged(weight: Tensor, adapter: Adapter) -> tuple[Tensor, float]:
    """The merged weight in its own type, and its largest rounding error."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    exact = adapter.merged(weight, wide)
    if wide == weight.dtype:
        return exact, 0.0
    stored = exact.to(weight.dtype)
    return stored, (stored.to(wide) - exact).abs().max().item()


def _outputs(model: nn.Module, example_input: Any) -> list[Tensor] | None:
    if example_input is None:
        return None
    flags = {m: m.training for m in model.modules()}
    try:
        model.eval()
        return [t.double() for t in float_tensors(call(model, example_input))]
    finally:
        for module, training in flags.items():
            module.training = training
