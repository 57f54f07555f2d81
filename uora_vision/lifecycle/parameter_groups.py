"""Parameter groups for any torch or timm optimizer, and the scale in which their learning rate is told.

An adapted projection adds y = diag(b) B diag(d) A x. Adam moves every entry of b and d by about its rate in a step,
whatever the gradient, so what a rate does to y depends on how large A and B are. Their *gain*, the RMS of the entries
of B A x in units of those of x, is

    s = |A| |B| / sqrt(rank * rows)            |.|: Frobenius norms of A (rank, in) and B (rows, rank)

which is sqrt(rank / rows) for orthonormal banks, and 2 for VeRA's. Through b, a step moves y by about p * d_init * s of
the input's RMS, p the rate of b; through d, it moves d by q / d_init of itself, q the rate of d. Both are the same for
all ranks, widths and laws with

    p = lr / s * (0.1 / d_init)        q = lr * (d_init / 0.1)

and so is all that training does: larger banks or another d_init change nothing. `docs/method.md` has the derivation and
what was measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..structure.paths import ancestors, lies_within
from ..structure.survey import Survey
from .adapter import Adapter
from .library import active_entry, adapters_in
from .trained_parts import base_parameters

LR = 0.05
"""Default learning rate of adapters, in the scale of `param_groups`."""
HEAD_LR = 4e-3
"""Default learning rate of heads, and of other parts of the base."""
D_INIT = 0.1
"""Initial value of d at which `lr` is the rate of d, and of b where the gain is 1."""


def param_groups(
    model: nn.Module,
    lr: float = LR,
    head_lr: float = HEAD_LR,
    weight_decay: float = 0.0,
    *,
    scaled: bool = True,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """What an injected model trains, in groups for Adam or an optimizer of its kind.

    Args:
        lr: learning rate of the adapter. That of b is divided by the gain of its banks, so that the best one hardly
            depends on rank, width, layout or law, and `d_init` is a mere unit: `docs/method.md`.
        head_lr: of heads, of what `train` named by its path, and of norms and biases of the base that train.
        weight_decay: of the head's matrices. Vectors never decay: a decaying d would fire by itself.
        scaled: False for the plain rate of the papers: `lr` for every b and d.
        layer_decay: share of the rate of a block that the one before it has, in (0, 1], as in timm: the last block, and
            what comes after it, has this share of the rate, what comes before all blocks the least, and the head the
            whole rate. The blocks of each tower are counted apart.

    Returns:
        Groups named `adapter` and `base` (one for each rate), `head` and `head_vectors`, those that are not empty.

    Raises:
        StateError: the model is not injected.
        ConfigError: there is no such `layer_decay`.

    Example:
        >>> import torch, uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> groups = uora.param_groups(model, lr=0.05, weight_decay=0.1)
        >>> [(group["name"], len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
        [('adapter', 3, 0.1, 0.0), ('adapter', 4, 0.05, 0.0), ('adapter', 1, 0.141421, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    if not 0 < layer_decay <= 1:
        raise ConfigError(f"layer_decay must be in (0, 1], got {layer_decay!r}")
    config, survey = active_entry(model).config, Survey(model)
    share = (lambda _: 1.0) if layer_decay == 1 else layer_shares(survey, layer_decay)
    d_init = abs(config.d_init) / D_INIT
    rates: dict[float, list[nn.Parameter]] = {}
    for path, adapter in adapters_in(survey).items():
        b, d = (lr / gain(adapter) / d_init, lr * d_init) if scaled else (lr, lr)
        for p, rate in ((adapter.b, b * share(path)), (adapter.d, d * share(path))):
            rates.setdefault(float(f"{rate:.6g}"), []).append(p)  # equal banks, equal to the last bits or not
    vectors = {id(p) for params in rates.values() for p in params}
    asked = [term for term in config.train if term not in ("norm", "bias")]
    heads = {id(survey.tensors[name].tensor) for name in base_parameters(survey, asked)} | {
        id(held.tensor) for name, held in survey.parameters.items() if lies_within(name, survey.parts.heads)
    }
    rest: dict[tuple[str, float], list[nn.Parameter]] = {("base", head_lr): [], ("head", head_lr): []}
    for name, (module, key) in survey.parameters.items():
        part = module._parameters[key]
        assert part is not None
        if id(part) not in vectors and part.requires_grad:
            kind = ("head" if part.dim() > 1 else "head_vectors") if id(part) in heads else "base"
            rate = head_lr * share(name) if kind == "base" else head_lr
            rest.setdefault((kind, rate), []).append(part)
    chosen = [("adapter", params, rate) for rate, params in rates.items()]
    chosen += [(name, params, rate) for (name, rate), params in rest.items() if params]
    return [
        {"name": name, "params": params, "lr": rate, "weight_decay": weight_decay if name == "head" else 0.0}
        for name, params, rate in chosen
    ]


def layer_shares(survey: Survey, decay: float) -> Callable[[str], float]:
    """The share of its rate that a weight or parameter keeps, by its path."""
    held: dict[int, list[set[str]]] = {}
    for path, finding in survey.findings.items():
        if finding.block is not None:
            held.setdefault(finding.block, []).append(set(ancestors(path)))
    tops = [max(set.intersection(*above), key=len) for _, above in sorted(held.items())]
    towers: dict[str, list[str]] = {}
    for top in tops:
        towers.setdefault(re.sub(r"\d+", "*", top), []).append(top)
    left = {top: len(tower) - i for tower in towers.values() for i, top in enumerate(tower)}
    most = 1 + max(left.values(), default=-1)
    order = {name: i for i, name in enumerate(survey.parameters)}
    first = min((i for name, i in order.items() if lies_within(name, tops)), default=0)

    def share(path: str) -> float:
        steps = next((left[above] for above in (path, *ancestors(path)) if above in left), None)
        if steps is None:
            steps = most if order.get(path, order.get(f"{path}.weight", first)) < first else 1
        return decay**steps

    return share


def gain(adapter: Adapter) -> float:
    """s of one adapter; of roles of several heights, which share b, the root of their mean square.

    Of the banks as they were first drawn: a run that is resumed after redraws, or informed after its optimizer was
    made, must come to the same groups. Informed rows are as long as those that they replace.
    """
    bank, squares = adapter.bank, []
    for role in adapter.roles:
        of = adapter.origin, role.name
        a, b = bank.drawn("A", adapter.width, of), bank.drawn("B", role.rows, of)
        square = float(a.double().square().sum()) * float(b.double().square().sum()) / bank.config.rank**2
        # Matrices of weights are rounded, each a little otherwise: they shall not have a group each.
        squares.append(bank.config.rank * (round(square, 2) if bank.widths.of_weights else square))
    return math.sqrt(sum(squares) / sum(role.rows for role in adapter.roles))
