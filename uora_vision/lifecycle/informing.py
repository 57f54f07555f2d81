"""`inform`: rows of A from the gradient of the frozen weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DeadAdapterError, FormatError, OptionError, StateError, warn
from ..maths.bank import Bank
from ..maths.draws import keyed_generator
from ..maths.informed import OVERSAMPLING, Leading, leading_rows
from ..maths.rounding import ROW_TYPES, RowType, round_rows
from ..maths.shared_product import Reduced
from ..maths.widths import Widths
from ..options import hinting
from ..private import tree_map
from ..structure.survey import Survey
from ..tables import shortened
from .adapter import REDUCED, Adapter, own_matrices
from .banks import house
from .inference_mode import outside_inference_mode
from .library import Library, active_entry, bank_of, check_outside, library_of
from .probe import Inputs, Probe, probing
from .verification import as_before

Share = Literal["input", "width"]

MAX_BATCHES = 8


@hinting
@outside_inference_mode
def inform(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    share: Share = "input",
    store: RowType = "int8",
    max_batches: int = MAX_BATCHES,
) -> dict[str, float]:
    """Give the active adapter rows of A that the gradient of the frozen weights asks for, in place of random ones.

    The rows are the leading right singular vectors of the weights' gradients over some batches, as in GiVA
    (arXiv 2604.21901), by a randomised sketch of them: no gradient of a whole weight is kept. To be called after
    `inject`, before training or after a warm-up of the head alone. The model computes what it did before, since b is 0.
    Unlike random rows these cannot be drawn again, so `save` writes them.

    Args:
        model: an injected model, in the mode in which the gradients are to be taken.
        batches: what the model is to learn from, such as a DataLoader. Tensors are moved to the device of the model.
        loss: gives the loss of a batch: `loss(model, batch)`, a tensor of one number. If None, a batch is a dict with
            labels whose model returns a `.loss`, or a pair (inputs, labels) for cross-entropy.
        share: `input`: weights that are given the same input (q, k and v) share A, all others have their own. `width`:
            all weights of one input width share one A, at a small part of the file's size.
        store: type in which rows are kept in the file; they are rounded to it now, so that the file is exact.
        max_batches: how many batches are taken at most.

    Returns:
        Of each adapted weight, by its path: the share of its sketched gradient (squared norm) that lies along the rows.

    Raises:
        StateError: the model is not injected, is merged or routed, or its adapter has trained, was redrawn, or is
            informed already.
        OptionError, ConfigError: there are no batches, or the loss of one is no single finite number.
        DeadAdapterError: no gradient reaches any adapted weight; a head of zeros lets none through.

    Warns:
        UoraWarning: gradients of a lower rank than the adapter's, as of few tokens or classes, or weights without one:
            what is missing is filled with random rows.

    Example:
        >>> import torch, uora_vision as uora
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> model = uora.inject(nn.Sequential(layer, nn.Flatten(), nn.Linear(80, 3)), rank=4)
        >>> batches = [(torch.randn(8, 5, 16), torch.arange(8) % 3) for _ in range(4)]
        >>> shares = uora.inform(model, batches)
        >>> len(shares), all(0.3 < share <= 1 for share in shares.values())
        (4, True)
    """
    if share not in get_args(Share):
        raise ConfigError(f"share must be one of {', '.join(get_args(Share))}, got {share!r}")
    if store not in ROW_TYPES:
        raise ConfigError(f"store must be one of {', '.join(ROW_TYPES)}, got {store!r}")
    library, survey = library_of(model), Survey(model)
    check_outside(library)
    entry = active_entry(model)
    _check_fresh(entry.modules or (), entry.bank)
    sketches, inputs = _sketches(survey, library, batches, loss or _usual_loss, max_batches)
    names, rows = _chosen(sketches, inputs, share, store)
    old = entry.bank
    widths = old.widths._replace(informed=names)
    first = {n: t for n, t in old._first.items() if old.given} | {name: r.rows for name, r in rows.items()}
    replace_bank(model, bank_like(old, widths, first))
    _tell(sketches, names, rows)
    whole = {path: float(bool(t.any())) for path, (_, t) in sketches.items()}  # a rank of the width spans everything
    return whole | {path: rows[names[a.origin]].share for path, (a, _) in sketches.items() if a.origin in names}


def fresh_rows(
    model: nn.Module,
    fired: Sequence[tuple[Adapter, int, Tensor]],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None,
    step: int,
) -> list[Tensor]:
    """For directions that are drawn again, the rows of A that the gradient asks for beside the others of their role.

    Args:
        fired: adapters, each with the number of a role and its directions (k,).
        batches, loss: as of `inform`.
        step: of the optimizer; random rows, where the gradient gives too few, are keyed by it.

    Returns:
        (k, in) float32 for each, the same in all processes.
    """
    sketches, _ = _sketches(Survey(model), library_of(model), batches, loss or _usual_loss, MAX_BATCHES)
    found = []
    for adapter, role, indices in fired:
        matrices, bank = adapter.matrices()[0], adapter.bank
        others = torch.ones(bank.config.rank, dtype=torch.bool)
        others[indices] = False
        beside = matrices[role % len(matrices)].detach().cpu()[others]
        generator = keyed_generator(bank.config.seed, f"{adapter.own(role)[0].name}/fresh", draw=step)
        rows = leading_rows(sketches[adapter.name][1], len(indices), generator, beside).rows
        found.append(_everywhere(round_rows(rows * _length(adapter), "int8"), adapter.b.device))
    return found


def bank_like(old: Bank, widths: Widths, first: Mapping[str, Tensor]) -> Bank:
    """A bank of the same options, type and device.

    Args:
        widths: that name its informed matrices.
        first: see `Bank`.
    """
    buffer = old.get_buffer(next(iter(old.matrices)))
    taken = {name: old._first[name] for name in old.taken if name not in first}
    bank = Bank(old.config, widths, buffer.device, buffer.dtype, taken | dict(first)).train(old.training)
    bank.taken = frozenset(taken)
    bank.__dict__[REDUCED] = Reduced()
    return bank


def replace_bank(model: nn.Module, bank: Bank) -> None:
    """Give the active adapter a bank of its own."""
    library, entry = library_of(model), active_entry(model)
    modules = entry.modules or ()
    with library.undo(model):
        entry.bank = bank
        for module in modules:
            module.__dict__["bank"] = bank
        bank.layers = own_matrices(modules)
        house(model, bank, modules)
        library.keep_from_sending(model)


def informed_rows(model: nn.Module) -> dict[str, Any]:
    """The informed rows of the active adapter, for a checkpoint: {} of one that has none."""
    bank = bank_of(model)
    names = dict(bank.widths.informed)
    return {"names": names, "rows": {name: bank._first[name] for name in names.values()}} if names else {}


def put_informed_rows(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Inverse of `informed_rows`, for a fresh adapter of the same options.

    Raises:
        FormatError: these are no rows of this adapter.
    """
    bank, names, rows = bank_of(model), state.get("names", {}), state.get("rows", {})
    widths = {adapter.origin: adapter.width for adapter in active_entry(model).modules or ()}
    for origin, name in names.items():
        t, wanted = rows.get(name), (bank.config.rank, widths.get(origin))
        if not isinstance(t, Tensor) or t.dtype != torch.float32 or t.shape != wanted or not t.isfinite().all():
            raise FormatError(f"the informed rows {name} of {origin} in this state are none of this adapter")
    if names != bank.widths.informed or any(not torch.equal(bank._first[name], t) for name, t in rows.items()):
        drawn = {n: t for n, t in bank._first.items() if bank.given and n not in bank.widths.informed.values()}
        replace_bank(model, bank_like(bank, bank.widths._replace(informed=names), drawn | rows))


def _check_fresh(adapters: Iterable[Adapter], bank: Bank) -> None:
    if bank.widths.informed:
        raise StateError("this adapter is informed already; inject() another one to inform it anew")
    if bank.log or any(bool(a.b.any()) for a in adapters):
        raise StateError(
            "this adapter has trained, and other rows of A would make it another function; inform() it after inject() "
            "and before training, or train the head alone first"
        )


def _sketches(
    survey: Survey, library: Library, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], most: int
) -> tuple[dict[str, tuple[Adapter, Tensor]], Inputs]:
    """S G of every adapted weight, (l, in), by its path, summed over batches and processes."""
    model = survey.model
    entry = active_entry(model)
    device = (entry.modules or ())[0].b.device
    count = 0
    with as_before(survey), library.undo(model), probing(entry, entry.config.rank + OVERSAMPLING) as (probes, inputs):
        for batch in itertools.islice(batches, most):
            value = loss(model, tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, batch))
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.isfinite():
                shown = value.item() if isinstance(value, Tensor) and value.numel() == 1 else type(value).__name__
                raise OptionError(f"the loss of a batch must be a tensor of one finite number, got {shown}")
            if value.requires_grad:
                value.backward()
            count += 1
        if not count:
            raise OptionError("there are no batches to inform the adapter with")
        found = {probe.adapter.name: (probe.adapter, _summed(probe)) for probe in probes}
    bad = [name for name, (_, t) in found.items() if not t.isfinite().all()]
    if bad:
        raise OptionError(f"gradients are NaN or infinite ({shortened(bad, 3)}); inform in float32 or bfloat16")
    if not any(t.any() for _, t in found.values()):
        raise DeadAdapterError(
            "no gradient reaches any adapted weight. A head of zeros lets none through: train it alone first, or give "
            "it other values."
        )
    return found, inputs


def _summed(probe: Probe) -> Tensor:
    grad = torch.zeros_like(probe.q) if probe.q.grad is None else probe.q.grad
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(grad)
    return grad.detach().cpu()


def _chosen(
    sketches: Mapping[str, tuple[Adapter, Tensor]], inputs: Inputs, share: Share, store: RowType
) -> tuple[dict[str, str], dict[str, Leading]]:
    """The name of its A by the origin of each weight, and the rows by that name."""
    groups: dict[str, list[tuple[Adapter, Tensor]]] = {}
    for path, (adapter, sketch) in sketches.items():
        if adapter.d.shape[1] < adapter.width and sketch.any():  # else A spans everything, or nothing is known
            key = str(adapter.width) if share == "width" else inputs.same.get(path, path)
            groups.setdefault(key, []).append((adapter, sketch))
    names: dict[str, str] = {}
    rows: dict[str, Leading] = {}
    count = dict.fromkeys((a.width for a, _ in sketches.values()), 0)
    for members in groups.values():
        width = members[0][0].width
        name, count[width] = f"A{width}:{count[width]}", count[width] + 1
        # In `width`, layers count alike however large their gradients are.
        total = sum(t.double() / (t.double().norm() if share == "width" else 1) for _, t in members)
        assert isinstance(total, Tensor)
        one = members[0][0]
        config = one.bank.config
        found = leading_rows(total, config.rank, keyed_generator(config.seed, name))
        kept = round_rows(found.rows * _length(one), store)
        rows[name] = found._replace(rows=_everywhere(kept, one.b.device))
        names |= {adapter.origin: name for adapter, _ in members}
    return names, rows


def _everywhere(rows: Tensor, device: torch.device) -> Tensor:
    """Those of the first process: processors may differ in last bits."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return rows
    sent = rows.to(device)
    torch.distributed.broadcast(sent, 0)
    return sent.cpu()


def _length(adapter: Adapter) -> float:
    """Of the rows that are replaced, as a root of a mean of squares: 1 of orthonormal ones. Rates are made for it."""
    drawn = adapter.bank.drawn("A", adapter.width, (adapter.origin, adapter.roles[0].name))
    length = float(drawn.double().square().mean(dim=0).sum().sqrt())
    return 1.0 if abs(length - 1) < 1e-5 else length


def _tell(
    sketches: Mapping[str, tuple[Adapter, Tensor]], names: Mapping[str, str], rows: Mapping[str, Leading]
) -> None:
    rank = next(a.d.shape[1] for a, _ in sketches.values())
    none = [path for path, (_, t) in sketches.items() if not t.any()]
    few = {path: rows[names[a.origin]].found for path, (a, _) in sketches.items() if a.origin in names}
    few = {path: found for path, found in few.items() if found < rank}
    if none:
        warn(f"{len(none)} weights got no gradient and keep random rows: {shortened(none, 4)}")
    if few:
        shown = shortened([f"{path} ({found})" for path, found in few.items()], 4)
        warn(
            f"the gradients of {len(few)} weights have a lower rank than the adapter's {rank}: {shown}. The other rows "
            "are random; more batches, or a smaller rank, fit better."
        )


def _usual_loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        value = getattr(model(**batch), "loss", None)
        if value is None:
            raise OptionError("the model returns no loss for these batches; give loss=lambda model, batch: ...")
        return value  # type: ignore[no-any-return]
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise OptionError("batches are no dicts and no pairs (inputs, labels); give loss=lambda model, batch: ...")
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
