"""What a weight is that no word names: what every matrix in a block must be, by what stands beside it.

A matrix that multiplies features within a repeated block is attention's or an MLP's, unless there is a reason for which
it is neither. Those reasons are a short list, and come first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from ..weights.kinds import base_class
from ..weights.role import ATTENTION, MLP, Role
from .bare import method_source, products
from .candidates import Candidate, Unit
from .paths import lies_within
from .row_order import packed
from .rules import COORDINATES, in_attention
from .words import (
    BESIDE,
    HEADS,
    INDEXERS,
    MLP_WORDS,
    NORMS,
    PATCHES,
    POSITION,
    ROUTERS,
    SQUEEZE,
    TALKING_HEADS,
    TIME,
    kind_of,
)

Claims = dict[str, tuple[str, tuple[Role, ...]]]
"""Rule and roles, by path."""


def reason_against(unit: Unit, name: str, candidate: Candidate) -> str | None:
    """Why a weight is neither attention's nor an MLP's whatever its name; None if nothing speaks against it."""
    place = [*unit.path.split("."), *name.split(".")]
    if any(INDEXERS.search(part) for part in place):
        return "cannot receive a gradient: it picks what attention looks at"
    if any(TIME.search(part) for part in place):
        return "embedding of time"
    if any("router" in part.lower() for part in place[:-1]):
        return "routes to experts"
    if candidate.tensor != "weight" and (POSITION.search(candidate.path) or _of_positions(candidate)):
        return "position bias"
    return None


def reason_left(unit: Unit, name: str, candidate: Candidate) -> str | None:
    """Why a weight that no rule knows is never adapted; None if it is on request."""
    if _routes(unit, name, candidate):
        return "routes to experts"
    if POSITION.search(candidate.path):
        return "position bias"
    if TALKING_HEADS.search(candidate.module_path):
        return "mixes heads"
    return None


def stands_apart(path: str) -> bool:
    """Whether a weight makes features of pixels, or the scales of a norm: such are adapted on request alone."""
    return any(PATCHES.search(part) or NORMS.search(part) for part in path.split(".")[:-1])


def why_on_request(unit: Unit, candidate: Candidate) -> str:
    """Why a weight is adapted only if it is asked for."""
    if any(PATCHES.search(part) for part in candidate.path.split(".")[:-1]):
        return "patch embedding"
    if _squeezes(unit):
        return "squeeze-and-excitation"
    if any(NORMS.search(part) for part in unit.path.split(".")):
        return "scale of a norm"
    return "spatial kernel" if candidate.spatial else UNKNOWN


UNKNOWN = "not of attention or MLP"


def heads_within(path: str, known: Mapping[str, tuple[Role, ...]]) -> bool:
    """Whether a weight is of a head in the midst of a model: one without blocks and without attention of its own."""
    parts = path.split(".")
    for i, part in enumerate(parts[:-1]):
        if not HEADS.search(part) or any(other.isdigit() for other in parts[i + 1 : -1]):
            continue
        head = ".".join(parts[: i + 1])
        values = (p for p, roles in known.items() if any("v" in r.name and r.group == ATTENTION for r in roles))
        return not any(lies_within(p, (head,)) for p in values)
    return False


def claim_rest(units: Sequence[tuple[Unit, Mapping[str, Candidate]]], known: Mapping[str, str]) -> Claims:
    """What the matrices are that the rules left in repeated blocks.

    Args:
        units: with what is left in each.
        known: the group of each weight that a rule knows, by path.
    """
    claims: Claims = {}
    rest: dict[str, dict[str, tuple[Unit, str, Candidate]]] = {}
    for unit, left in units:
        usable = {n: c for n, c in left.items() if c.shape[1] > COORDINATES and not c.spatial}
        block = next(reversed(_blocks(f"{unit.path}.")), None)
        if block is not None and _pointwise_mlp(unit, usable):
            claims |= {c.path: ("MLP by structure", _roles(unit, n, c, MLP)) for n, c in usable.items()}
            continue
        groups = {known.get(c.path) for c in unit.members.values()}
        if not usable or (block is None and ATTENTION not in groups):
            continue
        alone = ATTENTION in groups and MLP not in groups and unit.path != block
        attention = block is not None and (alone or mixes_tokens(unit))
        for name, candidate in usable.items():
            bare = candidate.form != "kernel" or candidate.tensor != "weight"
            if (attention and (bare or not any(groups))) or (bare and in_attention(unit, name)):
                claims[candidate.path] = "attention by structure", _roles(unit, name, candidate, ATTENTION)
            elif bare and block is not None and MLP in groups and ATTENTION not in groups and _is_mlp(unit):
                claims[candidate.path] = "MLP by structure", _roles(unit, name, candidate, MLP)
            elif bare and block is not None:
                rest.setdefault(block, {})[candidate.path] = unit, name, candidate
    attends = {*known.items(), *((path, roles[0].group) for path, (_, roles) in claims.items())}
    attending = {block for path, group in attends if group == ATTENTION for block in _blocks(path)}
    for block, members in rest.items():
        owner = next(unit for unit, _, _ in members.values())
        if block in attending or _convolves(owner):
            shapes = {c.shape for u, _ in units for c in u.members.values() if c.path.startswith(f"{block}.")}
            back = [p for p, (u, n, c) in members.items() if c.shape[::-1] in shapes and _leads_back(u, n, c)]
            for path in dict.fromkeys((*_returning(members, block), *back)):
                unit, name, candidate = members[path]
                claims[path] = "MLP by structure", _roles(unit, name, candidate, MLP)
    return claims


def _is_mlp(unit: Unit) -> bool:
    return bool(MLP_WORDS.search(f"{unit.path.rpartition('.')[2]} {unit.class_name}"))


def _pointwise_mlp(unit: Unit, left: Mapping[str, Candidate]) -> bool:
    """Whether a module is two convolutions of single points, of which the first at least doubles the width and the
    second leads back; what has a larger kernel between them is a bottleneck of a convolutional network."""
    if (
        len(left) != 2
        or len(unit.members) != 2
        or any("." in name for name in left)
        or any(c.form != "kernel" or c.groups > 1 for c in left.values())
    ):
        return False
    into, out_of = left.values()
    kernels = [m for m in unit.module.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    widens = into.shape[0] >= 2 * into.shape[1] and into.shape == out_of.shape[::-1]
    return widens and len(kernels) == 2


def _leads_back(unit: Unit, name: str, candidate: Candidate) -> bool:
    """Whether a layer can be the way back of another one of its block that leads into its input width: none of the
    lists of layers between several streams."""
    inner = [".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 1)]
    apart = any(isinstance(unit.module.get_submodule(path), nn.ModuleList) for path in inner)
    return not apart and candidate.shape[0] != candidate.shape[1] and min(candidate.shape) > COORDINATES


def _returning(members: Mapping[str, tuple[Unit, str, Candidate]], block: str) -> list[str]:
    """Layers of a block that follow each other, of which the first ones lead into a width, and the next one back, from
    that width alone or with what attention gave beside it."""
    found: list[str] = []
    ups: list[str] = []
    for path, (unit, _, candidate) in members.items():
        shape = candidate.shape
        first = members[ups[0]][2].shape if ups else None
        if (
            first
            and shape[0] == first[1]
            and any(first[0] in (width, 2 * width) for width in (shape[1], shape[1] - first[1]))
            and _in_turn(unit, block, ups[-1], path)
        ):
            square = shape[0] == shape[1]
            found += [] if square and unit.path == block else [*ups, path]
            ups = [] if not square or unit.path != block else [path]
        else:
            ups = [*ups, path] if first == shape else [path]
    return found


def mixes_tokens(unit: Unit) -> bool:
    """Whether a module stands where attention does: a state space, a linear attention, a recurrence, or a convolution
    along the tokens between two projections."""
    if {"A_log", "dt_bias"} & unit.module._parameters.keys():
        return True
    if re.search(_MIXING, method_source(base_class(unit.module))):
        return True
    linears = [c for c in unit.members.values() if c.form != "kernel"]
    if len(linears) < 2:
        return False
    width, hidden = linears[0].shape[1], linears[-1].shape[1]
    return any(channels == hidden or channels != width for channels in _convolves(unit)) and (
        hidden <= width or all(channels != width for channels in _convolves(unit))
    )


_MIXING = r"scaled_dot_product_attention|attention_interface|delta_rule|rg_lru|selective_scan|selective_state"


def _convolves(unit: Unit) -> list[int]:
    """Channels of the depthwise convolutions that a module holds: itself, past a wrapper, or, of no block, anywhere."""
    block = unit.path.rpartition(".")[2].isdigit()
    near = [m for child in unit.module.children() for m in (child, *child.children())]
    return [
        m.in_channels for m in (near if block else unit.module.modules())
        if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) and m.groups == m.in_channels > 1 and max(m.kernel_size) > 1
    ]  # fmt: skip


def _in_turn(unit: Unit, block: str, one: str, two: str) -> bool:
    """Whether two members can come one after the other: members of a list of modules stand beside each other."""
    a, b = one.split("."), two.split(".")
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    own = unit.path.count(".") + 1 if unit.path else 0
    if shared < own:
        return True
    return not isinstance(unit.module.get_submodule(".".join(a[own:shared])), nn.ModuleList)


def _squeezes(unit: Unit) -> bool:
    return bool(SQUEEZE.search(unit.path.rpartition(".")[2]) or SQUEEZE.search(unit.class_name))


def _routes(unit: Unit, name: str, candidate: Candidate) -> bool:
    place = [*unit.path.split("."), *name.split(".")]
    if any("router" in part.lower() for part in place) or "Router" in unit.class_name or place[-1] == "routing_fn":
        return True
    if not ROUTERS.search(candidate.module_path) and "gate" not in place[-2:]:
        return False
    beside = [*unit.module._modules, *unit.module._parameters, type(candidate.module).__name__]
    return any(re.search("expert|gating|router", word, re.IGNORECASE) for word in beside)


def _of_positions(candidate: Candidate) -> bool:
    """Whether a bare tensor is multiplied with what its module's code calls positions."""
    other = products(candidate.module).get(candidate.tensor, ("", ""))[1] if candidate.tensor != "weight" else ""
    return bool(re.match(r"(r|pos\w*|rel\w*)\b", other))


def _blocks(path: str) -> list[str]:
    """The numbered modules around a path, from the outermost."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts[:-1]) if part.isdigit()]


def _roles(unit: Unit, name: str, candidate: Candidate, group: str) -> tuple[Role, ...]:
    rows, parts = candidate.shape[0], [p for p in (*unit.path.split("."), *name.split(".")) if p]
    word = next((p for p in reversed(parts) if not (p.isdigit() or p in _PLAIN)), "weight")
    word = re.sub(r"\W", "_", word)
    if group == ATTENTION and all(p.isdigit() or p in _PLAIN for p in name.split(".")):
        word = kind_of(unit.path.rpartition(".")[2]) or "proj"
    if group == MLP:
        return (Role(word, group, 0, rows),)
    if word in BESIDE or _LEADS_OUT.search(word):
        return (Role("proj", group, 0, rows),)
    inner = name.split(".")
    while len(inner) > 1 and (inner[-1].isdigit() or inner[-1] in _PLAIN):
        inner.pop()
    holder, kind = unit.module.get_submodule(".".join(inner[:-1])), kind_of(word)
    if kind is None and rows == 3 * candidate.shape[1]:
        thirds = packed(holder, inner[-1], rows, group, "qkv")
        if len(thirds) == 3:
            return thirds
    return packed(holder, inner[-1], rows, group, kind or word)


_LEADS_OUT = re.compile(r"(^|_)(out|output|o|post|merge|project|projection)(_(?!in$)|$)|^Wo$")

_PLAIN = {"weight", "linear", "dense", "layer", "layers"}
