"""Which rows of a layer's input belong to which sample of the batch, found by experiment.

Windows are cut out of images and put one after the other (Swin), towers put the sequence first (open_clip), attention
flattens both: nothing in a module tells where the samples are. So the model is run on the batch, and again with one
sample changed; the rows that change are that sample's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..private import tree_map, tree_map_only
from ..structure.example import evaluating


class Pattern(NamedTuple):
    """Where the samples of a batch are in a tensor.

    Args:
        axis: the dimension along which they lie.
        major: whether the entries of one sample follow one another there, as windows of one image do; else those of
            all samples take turns.
    """

    axis: int
    major: bool

    def split(self, x: Tensor, batch: int) -> tuple[Tensor, int]:
        """A view of x with a dimension for the samples alone, and which one that is."""
        n = x.shape[self.axis]
        if n == batch:
            return x, self.axis
        parts = (batch, n // batch) if self.major else (n // batch, batch)
        return x.unflatten(self.axis, parts), self.axis + (not self.major)

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """(batch, n) of each sample, so that it can be added to x (..., n)."""
        rows = self.rows(torch.arange(len(values), device=values.device), x.shape[self.axis])
        return values[rows].view(*[1] * self.axis, len(rows), *[1] * (x.dim() - self.axis - 2), -1)

    def rows(self, index: Tensor, n: int) -> Tensor:
        """What `index` (batch,) says of each sample, for all n entries along the axis."""
        times = n // len(index)
        return index.repeat_interleave(times) if self.major else index.repeat(times)


class Recorder:
    """What layers are given in one run: of every row, one number that depends on all of its values."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}

    def see(self, path: str, x: Tensor) -> None:
        weights = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=torch.float64).cos()
        self.seen.setdefault(path, []).append(x.detach().double() @ weights)


def find_patterns(
    module: nn.Module, args: Any, kwargs: Any, batch: int, record: Callable[[Recorder | None], None]
) -> dict[tuple[str, int], Pattern | None]:
    """By path of a layer and number of dimensions of its input: where the samples are, None where that is not clear.

    The module runs three times, in eval mode and without gradients, and once more with another number of samples where
    a layer's input is the same for all.

    Args:
        module: what is called with the batch.
        args, kwargs: its arguments; samples lie along the first dimension of those tensors that are as long as `batch`.
        batch: number of samples, at least 2.
        record: makes the layers tell a recorder what they are given; None for no longer.
    """
    samples = (0, batch - 1)
    runs = [(args, kwargs), *(_changed((args, kwargs), batch, sample) for sample in samples)]
    with _watched(module, record) as watch:
        first, *others = [watch(*run) for run in runs]
        changed = {
            path: [[c.get(path, [])[i : i + 1] for c in others] for i in range(len(first[path]))] for path in first
        }
        fixed = {path for path, calls in changed.items() for i, c in enumerate(calls) if _same(first[path][i], c)}
        longer = watch(*_longer((args, kwargs), batch)) if fixed else {}
    found: dict[tuple[str, int], Pattern | None] = {}
    for path, calls in first.items():
        for i, rows in enumerate(calls):
            key = path, rows.dim() + 1
            if path in fixed:
                pattern = _growing(rows.shape, [r.shape for r in longer.get(path, [])[i : i + 1]], batch)
            else:
                pattern = _pattern(rows, [r for c in changed[path][i] for r in c], batch, samples)
            found[key] = pattern if found.get(key, pattern) == pattern else None
    return found


@contextmanager
def _watched(module: nn.Module, record: Callable[[Recorder | None], None]) -> Iterator[Callable[[Any, Any], Any]]:
    """Runs the module, and gives what its layers were given."""

    def watch(args: Any, kwargs: Any) -> dict[str, list[Tensor]]:
        recorder = Recorder()
        record(recorder)
        # What a run writes to (a cache of keys and values) must be as before for the next.
        args, kwargs = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else copy.deepcopy(t), (args, kwargs))
        with torch.no_grad():
            module.forward(*args, **kwargs)
        return recorder.seen

    try:
        with evaluating(module):
            yield watch
    finally:
        record(None)


def _same(rows: Tensor, changed: list[list[Tensor]]) -> bool:
    """Whether the input of a layer does not depend on the batch, as that of the first class attention, which is a
    parameter."""
    return all(len(c) == 1 and torch.equal(c[0], rows) for c in changed)


def _growing(shape: torch.Size, longer: list[torch.Size], batch: int) -> Pattern | None:
    """The one dimension that is as long as the batch, and grows with it."""
    if len(longer) != 1 or len(longer[0]) != len(shape):
        return None
    grown = [axis for axis, (n, m) in enumerate(zip(shape, longer[0], strict=True)) if n != m]
    fits = len(grown) == 1 and shape[grown[0]] == batch and longer[0][grown[0]] == batch + 1
    return Pattern(grown[0], True) if fits else None


def _pattern(rows: Tensor, changed: list[Tensor], batch: int, samples: tuple[int, ...]) -> Pattern | None:
    """The one pattern by which all rows that changed belong to the sample that was changed."""
    if len(changed) != len(samples) or any(c.shape != rows.shape for c in changed):
        return None
    largest = rows.nan_to_num().abs().amax() if rows.numel() else 0.0
    for limit in (0.0, 1e-5 * largest):  # devices may round the rows of other samples differently
        differ = [((rows - other).nan_to_num(nan=float("inf")).abs() > limit) for other in changed]
        pairs = list(zip(differ, samples, strict=True))
        fitting = [p for p in _patterns(rows, batch) if all(_fits(p, m, batch, s) for m, s in pairs)]
        if len(fitting) == 1:
            return fitting[0]
    return None


def _patterns(rows: Tensor, batch: int) -> Iterator[Pattern]:
    for axis, n in enumerate(rows.shape):
        if n and n % batch == 0:
            yield Pattern(axis, True)
            if n != batch:
                yield Pattern(axis, False)


def _fits(pattern: Pattern, differ: Tensor, batch: int, sample: int) -> bool:
    moved = differ.movedim(pattern.axis, 0).flatten(1) if differ.dim() > 1 else differ[:, None]
    mine = pattern.rows(torch.arange(batch, device=differ.device), len(moved)) == sample
    return bool(moved[mine].any()) and not bool(moved[~mine].any())


def _changed(arguments: Any, batch: int, sample: int) -> Any:
    """The arguments with one sample replaced by another of the same kind."""
    generator = torch.Generator().manual_seed(0)

    def change(t: Tensor) -> Tensor:
        if t.dim() == 0 or t.shape[0] != batch or t.dtype == torch.bool:
            return t
        new = t.detach().clone()
        if t.is_floating_point():
            noise = torch.randn(t[sample].shape, generator=generator, device="cpu").to(t)
            new[sample] += noise * t.float().std().clamp(min=0.1).to(t)
        else:  # numbers of tokens: others that exist
            new[sample] = torch.where(t[sample] > 0, t[sample] - 1, t[sample] + 1)
        return new

    return tree_map_only(Tensor, change, arguments)


def _longer(arguments: Any, batch: int) -> Any:
    """The arguments with the first sample once more at the end."""
    return tree_map_only(Tensor, lambda t: torch.cat([t, t[:1]]) if t.dim() and t.shape[0] == batch else t, arguments)


def check_batch(arguments: Any, batch: int) -> None:
    """Whether some tensor among the arguments has a sample for each name.

    Raises:
        StateError: none has.
    """
    lengths: list[int] = []
    tree_map_only(Tensor, lambda t: lengths.append(t.shape[0]) if t.dim() else None, arguments)
    if lengths and batch not in lengths:
        beams = lengths[0] % batch == 0
        raise StateError(
            f"{batch} adapters were named, one for each sample, but the model is called with {lengths[0]} samples"
            + (". A beam search runs each sample num_beams times: name each so often" if beams else "")
        )
