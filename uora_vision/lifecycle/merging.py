"""Merging: the adapter added into the weights, and the plain model given back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DeadAdapterError, StateError
from ..maths.forms import exact, folded
from ..structure.checks import check_whole
from ..structure.example import call, evaluating, float_tensors
from ..structure.survey import Survey
from ..weights.kinds import check_module, raw
from ..weights.matrix import from_matrix, to_matrix
from ..weights.quantised import dequantised, float_type, is_quantised
from .adapter import CHILD, Adapter
from .apply import take_out
from .library import (
    LIBRARY,
    MERGED,
    Library,
    active_entry,
    adapters,
    check_outside,
    check_owner,
    check_switch,
    house,
    known_name,
    library_of,
)
from .shares import check_share, towards
from .undo import Undo


@dataclass(frozen=True)
class MergeReport:
    """What a merge changed, measured.

    Args:
        weights: number of merged weights.
        weight_error: largest |stored - exact| over all entries of the merged weights, from rounding to their type.
        output_error: largest |merged - unmerged| of the outputs in eval mode, None without an example input or where
            no output is of floats, as where the model gives labels.
        output_scale: largest |output| of the unmerged model, None where output_error is.

    Example:
        >>> import uora_vision as uora
        >>> print(uora.MergeReport(weights=8, weight_error=0.0, output_error=2e-6, output_scale=3.1))
        merged 8 weights; largest rounding of a weight 0; largest difference of an output 2e-06, of outputs up to 3.1
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


@dataclass(eq=False)
class Merged:
    """What `unmerge` needs of a model that was merged reversibly.

    Args:
        library: its adapters, none of which is in the model meanwhile.
        originals: the merged weights as they were, by path.
        replaced: by the layer of floats that stands in the model now, the quantised one whose place it has.
        trained: names of the parameters of the model that trained.
    """

    library: Library
    originals: dict[str, Tensor]
    replaced: dict[nn.Module, nn.Module]
    trained: set[str]


@torch.no_grad()
def merge(
    model: nn.Module,
    example_input: Any = None,
    *,
    shares: Mapping[str, float] | None = None,
    reversible: bool = False,
    dequantize: bool = False,
    on_report: Callable[[MergeReport], None] | None = None,
) -> MergeReport:
    """Add every dW to its weight, in place, and take the adapter out: the original classes and state-dict keys.

    The sum is formed in float32 (float64 for a float64 base) and rounded once to the type of the weight. A base stored
    in bfloat16 or float16 rounds young updates away; merge `model.float()` for an exact copy.

    Args:
        example_input: if given, the outputs before and after are compared, in eval mode; not with `shares`.
        shares: of several adapters by name: W becomes W + sum(share * dW), and what they trained of the base (heads)
            becomes base + sum(share * (trained - base)). By default the active adapter alone, with a share of 1.
        reversible: keep the adapters and the original bits of the adapted weights, so that `unmerge` can undo it.
            That costs as much memory as these weights have, since a sum cannot be undone to the last bit; nothing else
            is copied. Until then nothing in the model trains, and no adapter can be put into it.
        dequantize: replace every adapted layer that is stored quantised by an nn.Linear that holds the values of its
            codes plus dW: in the type of its inputs for torchao, in that of the base's first parameter of floats (its
            embedding) for bitsandbytes. Hooks on the old layer are lost. Other quantised layers stay as they are.
        on_report: called with the report too, before this returns.

    Returns:
        What was measured. The model trains where it did before `inject`, or nowhere if the merge is reversible.

    Raises:
        StateError: the model is not injected, is merged already, is spread over processes, or has adapters on quantised
            weights and `dequantize` is not set; `shares` names adapters that are not there, or whose heads differ in
            shape.
        ConfigError: a share is not finite, or `shares` comes with `reversible`.
        DeadAdapterError: a merged weight would not be finite; nothing is changed.

    Example:
        >>> import torch, uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> report = uora.merge(model, torch.randn(2, 5, 16))  # model is a plain one now
        >>> report.weights, report.output_error < 1e-5
        (4, True)
    """
    check_module(model)
    if MERGED in model.__dict__:
        raise StateError("this model is merged already; unmerge() it first")
    library = library_of(model)
    check_outside(library)
    check_whole(Survey(model))
    if shares is None:
        active_entry(model)
        names = {str(library.active): 1.0}
    else:
        names = _checked(library, shares, reversible)
        check_switch(Survey(model), library)
    placements = [known_name(library, name).placement for name in names]
    owners = {p.path: (m, p) for x in placements for p, m in zip(x.projections, x.modules, strict=True)}
    weights = {path: raw(module, p.tensor) for path, (module, p) in owners.items()}
    packed = {path: module for path, (module, _) in owners.items() if is_quantised(weights[path])}
    if packed and not dequantize:
        raise StateError(
            f"{len(packed)} of {len(weights)} adapted weights ({next(iter(packed))}, ...) are quantised, and their "
            "codes cannot hold W + dW. merge(model, dequantize=True) replaces these layers by plain ones of floats; or "
            "keep the adapter beside the base, as save() does."
        )
    before = _outputs(model, None if shares else example_input)
    floats = _float_type(model)
    types = {path: float_type(w, floats) if path in packed else w.dtype for path, w in weights.items()}
    sums = {path: dequantised(packed[path]) if path in packed else w for path, w in weights.items()}
    sums = {path: w.to(torch.promote_types(types[path], torch.float32)) for path, w in sums.items()}
    parts = _parts(library, names) if shares else {}
    with library.undo(model, *names):
        active = library.active
        for name, share in names.items():
            library.switch(model, name)
            for adapter in adapters(model).values():
                sums[adapter.name] = _plus(sums[adapter.name], adapter, share)
        library.switch(model, active)
    merged = {path: _rounded(exact, types[path]) for path, exact in sums.items()}
    broken = [name for name, (weight, _) in merged.items() if not weight.isfinite().all()]
    if broken:
        raise DeadAdapterError(
            f"merging would give weights that are not finite in {', '.join(broken)}; nothing was changed"
        )
    plain: dict[nn.Module, nn.Module] = {
        module: _plain_linear(module, merged[name][0]) for name, module in packed.items()
    }
    with library.undo(model) as undo:
        if shares:
            library.switch(model, None)
            for name, value in parts.items():
                undo.write(library.base_parts[name], value)
        if reversible:
            originals = {name: weight.detach().clone() for name, weight in weights.items() if name not in packed}
            _set_aside(model, originals, {new: old for old, new in plain.items()})
        else:
            take_out(model, library)
        for name, (weight, _) in merged.items():
            if name not in packed:
                undo.write(weights[name], weight)
        _replace(model, plain)
    report = MergeReport(len(merged), max(error for _, error in merged.values()))
    if before:
        after = _outputs(model, example_input)
        error = max(_size(x - y) for x, y in zip(before, after or [], strict=True))
        report = MergeReport(report.weights, report.weight_error, error, max(map(_size, before)))
    if on_report is not None:
        on_report(report)
    return report


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge(model, reversible=True)`: every weight has its old bits again, and the adapters are as they were.

    Parameters of adapters are the same objects, so an optimizer and a `Reinitializer` of theirs go on.

    Returns:
        The same model.

    Raises:
        StateError: the model was not merged reversibly, or its weights were replaced, cast or reshaped since; it stays
            merged then.

    Example:
        >>> import torch, uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> report = uora.merge(model, reversible=True)
        >>> model = uora.unmerge(model)
        >>> uora.active_adapter(model)
        'default'
    """
    check_module(model)
    merged = model.__dict__.get(MERGED)
    if not isinstance(merged, Merged):
        raise StateError(f"this {type(model).__name__} was not merged with merge(model, reversible=True)")
    library = merged.library
    check_owner(library)
    entry = library.entries[library.active or ""]
    weights = {
        p.path: owner._parameters.get(p.tensor)
        for p, owner in zip(entry.placement.projections, entry.placement.modules, strict=True)
    }
    there = set(model.modules())
    gone = [path for path, old in merged.originals.items() if not _like(weights[path], old)]
    gone += [
        p.path
        for p, owner in zip(entry.placement.projections, entry.placement.modules, strict=True)
        if owner not in there and owner not in merged.replaced.values()
    ]
    if gone:
        raise StateError(
            f"{gone[0]} is not the weight that was merged: it was replaced, cast, reshaped or fused since. Undo that, "
            "or load() the adapter into a fresh base."
        )
    there_too = [library, entry, entry.bank, *(entry.modules or ()), *merged.replaced.values()]
    with Undo(Survey(model), there_too).or_break(library) as undo:
        _replace(model, merged.replaced)
        for path, old in merged.originals.items():
            weight = weights[path]
            assert weight is not None
            undo.write(weight, old)
        del model.__dict__[MERGED]
        model.__dict__[LIBRARY] = library
        modules = entry.materialise()
        house(model, entry.bank.to(modules[0].b.device), modules)
        library.attach(model, entry, modules)
        for name, p in model.named_parameters():
            if name in merged.trained:
                p.requires_grad_(True)
    return model


def _set_aside(model: nn.Module, originals: dict[str, Tensor], replaced: dict[nn.Module, nn.Module]) -> None:
    """Take all adapters out of a model into its `Merged`, without a change to anything else."""
    library = library_of(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    library.detach(Survey(model))
    del model.__dict__[LIBRARY]
    model._modules.pop(CHILD, None)
    for p in model.parameters():
        p.requires_grad_(False)
    model.__dict__[MERGED] = Merged(library, originals, replaced, trained)


def _like(weight: Tensor | None, old: Tensor) -> bool:
    return weight is not None and weight.shape == old.shape and weight.dtype == old.dtype


def _checked(library: Library, shares: Mapping[str, float], reversible: bool) -> dict[str, float]:
    for name, share in shares.items():
        known_name(library, name)
        check_share(f"the share of {name!r}", share)
    if not shares or reversible:
        raise ConfigError("shares must name an adapter" if not shares else "a merge of shares cannot be reversible")
    return dict(shares)


def _parts(library: Library, shares: Mapping[str, float]) -> dict[str, Tensor]:
    """What becomes of the trained parts of the base."""
    return {
        name: towards(name, own, [(share, library.entries[n].parts.get(name, own)) for n, share in shares.items()])
        for name, own in library.base_parts.items()
        if own.is_floating_point()
    }


def _plus(weight: Tensor, adapter: Adapter, share: float) -> Tensor:
    """A weight with a share of an adapter's dW added, in the type of the weight."""
    update = adapter.update()
    update = update._replace(b=share * update.b.to(weight.dtype), d=update.d.to(weight.dtype))
    with exact(weight):
        return from_matrix(folded(to_matrix(weight, adapter.form), update), adapter.form, weight.shape)


def _rounded(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """A merged weight in a type, and its largest rounding error."""
    if exact.dtype == dtype:
        return exact, 0.0
    stored = exact.to(dtype)
    return stored, (stored.to(exact) - exact).abs().max().item()


def _float_type(model: nn.Module) -> torch.dtype:
    """The type of the base's first parameter of floats, as of its embedding; float32 if it has none."""
    base = (p for m in model.modules() if not isinstance(m, Adapter) for p in m._parameters.values())
    return next((p.dtype for p in base if type(p) is nn.Parameter and p.is_floating_point()), torch.float32)


def _plain_linear(module: nn.Module, weight: Tensor) -> nn.Linear:
    """An nn.Linear of this weight and the old bias, in the old one's mode, frozen as it was."""
    bias = module._parameters["bias"]
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=bias.requires_grad)
    return plain.train(module.training)


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, under every path that those have."""
    for path, module in list(model.named_modules(remove_duplicate=False)) if new else ():
        if module in new:
            model.set_submodule(path, new[module])


def _size(t: Tensor) -> float:
    """Largest |entry|, 0 if there is none."""
    return t.abs().max().item() if t.numel() else 0.0


def _outputs(model: nn.Module, example_input: Any) -> list[Tensor] | None:
    if example_input is None:
        return None
    with evaluating(model):
        return [t.double() for t in float_tensors(call(model, example_input))]
