"""What is adapted and what trains, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..structure.paths import lies_within
from ..structure.planning import say_new
from ..structure.survey import Survey
from ..structure.towers import Tower, counted, tower_table
from ..tables import render
from ..weights.quantised import full_shape
from .library import active_entry, adapters_in


@dataclass(frozen=True, repr=False)
class Summary:
    """Counts of an injected model. `print(summary)` shows a table.

    Args:
        rows: (role, count, shape, trained parameters) of each kind of projection.
        rank: of the adapters.
        adapter_parameters: trained by the adapters.
        other_trained: trained besides (head, norms, biases).
        total: parameters of the base.
        new: paths of modules that look new and do not train wholly.
        train: the option of the adapter.
        towers: what is adapted of each tower of a model that has several; empty for others.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> counts = uora.summary(model)
        >>> counts.adapter_parameters, counts.rows[0]
        (136, ('attn.q', 1, '16 x 16', 20))
    """

    rows: tuple[tuple[str, int, str, int], ...]
    rank: int
    adapter_parameters: int
    other_trained: int
    total: int
    new: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    towers: tuple[Tower, ...] = ()

    @property
    def trained(self) -> int:
        return self.adapter_parameters + self.other_trained

    def __repr__(self) -> str:
        share = lambda n: f"{100 * n / self.total:.3f} %"  # noqa: E731
        rows: list[tuple[object, ...]] = [(*row, share(row[3])) for row in self.rows]
        rows.append(("head and other base parts", "", "", self.other_trained, share(self.other_trained)))
        count = sum(row[1] for row in self.rows)
        table = render(
            f"UORA at rank {self.rank} on {self.total:,} frozen or trained base parameters",
            ("role", "count", "out x in", "trained", "share of base"),
            rows,
            ("total", count, "", self.trained, share(self.trained)),
        )
        table += f"\n{tower_table(self.towers)}" if self.towers else ""
        return f"{table}\n{say_new(self.new, self.train)}" if self.new else table


def summary(model: nn.Module) -> Summary:
    """What is adapted: role, count, shape, trained parameters, share of the model.

    Raises:
        StateError: the model is not injected.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> found = uora.summary(model)
        >>> found.trained, found.total  # rank + out for each of q, k, v, proj, linear1, linear2
        (136, 2224)
    """
    survey, train = Survey(model), tuple(active_entry(model).config.train)
    found = adapters_in(survey)
    flags = {name: held.tensor.requires_grad for name, held in survey.parameters.items()}
    frozen = [name for name, trains in flags.items() if not trains]
    new = [path for path in survey.parts.new if any(lies_within(name, (path,)) for name in frozen)]
    rank = next(iter(found.values())).d.shape[1]
    rows: dict[tuple[str, str], list[int]] = {}
    for adapter in found.values():
        for role in adapter.roles:
            entry = rows.setdefault((role.kind, f"{role.rows} x {adapter.width}"), [0, 0])
            entry[0] += 1
            entry[1] += role.rows + rank
    mine = sum(p.numel() for adapter in found.values() for p in adapter.parameters())
    sizes = {p: full_shape(m, p).numel() for m in model.modules() for p in m._parameters.values() if p is not None}
    everything = sum(sizes.values())  # of packed weights, what they stand for
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen_vectors = sum(p.numel() for a in found.values() for p in a.parameters() if not p.requires_grad)
    return Summary(
        rows=tuple((label, n, shape, params) for (label, shape), (n, params) in rows.items()),
        rank=rank,
        adapter_parameters=mine,
        other_trained=trained - mine + frozen_vectors,
        total=everything - mine,
        new=tuple(new) if train else (),
        train=train,
        towers=counted(survey.towers, [(path, sum(p.numel() for p in a.parameters())) for path, a in found.items()]),
    )
