"""What a projection is, from who owns it: its owner's other projections, their shapes, and what they are called.

Each rule sees a `Unit` and claims members of it; the first claim holds. A rule goes by structure (q, k and v beside
each other; a layer that widens and one that narrows), and by the words that this field uses for the parts, never by the
name of a model. `register_rule` adds a rule for an architecture of one's own.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigError
from ..weights.kinds import base_class
from ..weights.role import ATTENTION, MLP, Role
from .bare import method_source
from .candidates import IN_PROJECTIONS, Candidate, Unit
from .row_order import QKV, Packed, forward_source, packed
from .words import (
    ATTENTION_WORDS,
    BESIDE,
    BESIDE_ATTENTION,
    MLP_WORDS,
    MLPS,
    OUTPUTS,
    POSITION,
    QUERIES,
    SQUEEZE,
    STATE_SPACE,
    kind_of,
)

Claims = dict[str, tuple[Role, ...]]

Rule = Callable[[Unit], Claims]

COORDINATES = 4  # so few inputs are positions or a single map, not features


def multihead_attention(unit: Unit) -> Claims:
    """Bare in-projections of nn.MultiheadAttention and what is modelled after it: q, k and v, in this order."""
    if "in_proj_weight" not in unit.module._parameters:
        return {}
    claims: Claims = {}
    for name, candidate in unit.members.items():
        rows = candidate.shape[0]
        if name == "in_proj_weight":
            claims[name] = Packed(QKV).roles(unit.module, rows, ATTENTION) or (Role("qkv", ATTENTION, 0, rows),)
        elif name in IN_PROJECTIONS:
            claims[name] = (Role(name[0], ATTENTION, 0, rows),)
        elif name in OUTPUTS:
            claims[name] = (Role("proj", ATTENTION, 0, rows),)
    return claims


def recurrent(unit: Unit) -> Claims:
    """torch's recurrent layers: a projection for every gate, in torch's order of gates."""
    if any(isinstance(child, nn.RNNBase) for child in unit.module.children()):
        return {n: (Role("proj", ATTENTION, 0, s.shape[0]),) for n, s in unit.members.items() if n in ("fc", "proj")}
    if not isinstance(unit.module, nn.RNNBase | nn.RNNCellBase):
        return {}
    mode = unit.module.mode if isinstance(unit.module, nn.RNNBase) else unit.class_name
    gates = {"LSTM": "ifgo", "GRU": "rzn"}.get(mode.removesuffix("Cell"), "h")
    claims: Claims = {}
    for name, candidate in unit.members.items():
        names = ("projection",) if name.startswith("weight_hr") else tuple(gates)
        if roles := Packed(names).roles(unit.module, candidate.shape[0], ATTENTION):
            claims[name] = roles
    return claims


def experts(unit: Unit) -> Claims:
    """Stacks of experts, 3-D: the projections of every expert."""
    claims: Claims = {}
    stacks = {name: c for name, c in unit.members.items() if c.form.startswith("stack")}
    used = min(
        (len(c.weight) for c in stacks.values()), default=0
    )  # LongCat's experts that do nothing have no way back
    for name, candidate in stacks.items():
        n = candidate.weight.shape[0]
        rows = candidate.shape[0] // n
        parts = [(name if name != "weight" else unit.path.rpartition(".")[2] or name, 0, rows, 0, 0)]
        if name == "gate_up_proj" and rows % 2 == 0:
            half = rows // 2
            interleaved = "::2" in "".join(forward_source_of(unit.module))
            parts = (
                [("gate", 0, half, 1, 2), ("up", 1, half, 1, 2)] if interleaved
                else [("gate", 0, half, 0, 0), ("up", half, half, 0, 0)]
            )  # fmt: skip
        attends = in_attention(unit, name) or "A_log" in unit.module._parameters
        group = ATTENTION if attends else MLP
        claims[name] = tuple(
            Role(f"{part}_{e}", group, e * rows + start, size, block, stride)
            for e in range(used)
            for part, start, size, block, stride in parts
        )
    return claims


def mlp(unit: Unit) -> Claims:
    """A layer that widens the features and one that narrows them, by the names that are used for them, or one after the
    other in something that is called an MLP."""
    if _called(unit, SQUEEZE):
        return {}
    claims: Claims = {}
    for ins, out in MLPS:
        for members in _by_place(unit, (*ins, out)):
            down = members.get(out)
            ups = [name for name in ins if name in members]
            if down is None or not ups or not _widens(members[ups[0]][1], down[1], len(ups), unit):
                continue
            for token, (name, candidate) in members.items():
                claims.setdefault(name, _roles(unit, name, token, candidate, MLP))
    if _called(unit, MLP_WORDS) and not POSITION.search(unit.path):
        rest = [(n, s) for n, s in unit.members.items() if n not in claims and not s.spatial]
        if claims:
            claims |= {name: _roles(unit, name, name.partition(".")[0], candidate, MLP) for name, candidate in rest}
        elif len(rest) == 2 and _widens(rest[0][1], rest[1][1], 1, unit):
            claims = {n: _roles(unit, n, token, s, MLP) for (n, s), token in zip(rest, ("fc1", "fc2"), strict=True)}
    return claims | _pairs_in_sequence(unit, claims)


def attention(unit: Unit) -> Claims:
    """Queries, keys and values, apart or packed, and the projection of what comes out."""
    usable = {n: c for n, c in unit.members.items() if not c.spatial and c.shape[1] > COORDINATES}
    found = {n: QUERIES[token] for n in usable if (token := _token(n, QUERIES))}
    loose = {n: kind for n in usable if n not in found and (kind := _kind(unit, n, usable))}
    letters = {letter for kind in (*found.values(), *loose.values()) for letter in kind if letter in QKV}
    if len(letters) > 1 or (loose and in_attention(unit, next(iter(loose)))):
        found |= loose
    claims: Claims = {}
    for name, candidate in unit.members.items():
        if name in found:
            claims[name] = _roles(unit, name, found[name], candidate, ATTENTION)
            continue
        token = _token(name, BESIDE if found else OUTPUTS)
        if token and not candidate.spatial and (found or in_attention(unit, name)):
            claims[name] = _roles(unit, name, BESIDE[token], candidate, ATTENTION)
    return claims


def _kind(unit: Unit, name: str, members: Mapping[str, Candidate]) -> str | None:
    """What of q, k and v a member is by the words of its name; what queries have of positions is a part of them if what
    they have of content is apart from it."""
    own = () if "." in name else (unit.path.rpartition(".")[2],)
    for part in (*reversed(name.split(".")), *own):
        if kind := kind_of(part):
            return kind
    twin = name.replace("_pos_", "_content_")
    return kind_of(twin.rpartition(".")[2]) if twin != name and twin in members else None


def parallel_block(unit: Unit) -> Claims:
    """A block whose first projection makes the MLP's hidden features and q, k and v at once."""
    if "in_proj" not in unit.members or not hasattr(unit.module, "in_split"):
        return {}
    claims: Claims = {}
    for name, candidate in unit.members.items():
        rows = candidate.shape[0]
        if name == "in_proj":
            claims[name] = tuple(
                Role(r.name, ATTENTION if r.name in QKV else MLP, r.start, r.rows)
                for r in packed(unit.module, name, rows, MLP, name)
            )
        elif name in ("attn_out_proj", "out_proj"):
            claims[name] = (Role("proj", ATTENTION, 0, rows),)
        elif name == "mlp_out_proj":
            claims[name] = (Role("fc2", MLP, 0, rows),)
    return claims


def state_space(unit: Unit) -> Claims:
    """Selective state spaces (Mamba, HSM-SSD), which stand where attention does."""
    found = {name: _token(name, dict.fromkeys(STATE_SPACE, "")) for name in unit.members}
    tokens = {token for token in found.values() if token}
    if not tokens & {"x_proj", "dt_proj", "BCdt_proj"}:
        return {}
    return {n: _roles(unit, n, t, unit.members[n], ATTENTION) for n, t in found.items() if t}


def focal_modulation(unit: Unit) -> Claims:
    """FocalNet's stand-in for attention: `f` makes query, context and gates, `h` the modulator."""
    if not {"f", "h", "proj"} <= unit.members.keys():
        return {}
    return {n: packed(unit.module, n, unit.members[n].shape[0], ATTENTION, n) for n in ("f", "h", "proj")}


def token_mixing(unit: Unit) -> Claims:
    """A single Linear across tokens (ResMLP)."""
    return {
        name: (Role("tokens", MLP, 0, candidate.shape[0]),)
        for name, candidate in unit.members.items()
        if name == "linear_tokens"
    }


RULES: list[tuple[str, Rule]] = [
    ("multi-head attention", multihead_attention),
    ("recurrent layer", recurrent),
    ("experts", experts),
    ("parallel block", parallel_block),
    ("state space", state_space),
    ("MLP", mlp),
    ("attention", attention),
    ("focal modulation", focal_modulation),
    ("token mixing", token_mixing),
]

registered: OrderedDict[int, tuple[str, Rule]] = OrderedDict()
"""By the number of the handle, the latest last; it takes precedence."""


def register_rule(
    owner: type[nn.Module] | str, roles: Mapping[str, str | Packed | None], group: str = ATTENTION
) -> RemovableHandle:
    """Teach the injector a module of one's own; it takes precedence over the built-in rules.

    Args:
        owner: class of the module that holds the projections, or its name.
        roles: for each projection, by its path in the owner (a bare tensor by its name): what it is, or how it is
            packed, or None to leave it alone.
        group: `attn` or `mlp`.

    Raises:
        ConfigError: the group or a role cannot be used.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> class MyAttention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.n_heads, self.wx, self.wo = 2, nn.Linear(8, 24), nn.Linear(8, 8)
        >>> roles = {"wx": uora.Packed("qkv", times=lambda owner: owner.n_heads), "wo": "proj"}
        >>> with uora.register_rule(MyAttention, roles):  # without `with`, until .remove()
        ...     found = uora.plan(nn.ModuleList([MyAttention()]), rank=4)
        >>> [role.label for p in found.projections for role in p.roles]
        ['attn.q', 'attn.k', 'attn.v', 'attn.proj']
    """
    if group not in (ATTENTION, MLP):
        raise ConfigError(f"group must be {ATTENTION!r} or {MLP!r}, got {group!r}")
    for name, role in roles.items():
        if not (role is None or isinstance(role, Packed) or (isinstance(role, str) and role.isidentifier())):
            raise ConfigError(f"the role of {name!r} must be a name, a Packed or None, got {role!r}")
    label = owner if isinstance(owner, str) else owner.__name__

    def rule(unit: Unit) -> Claims:
        is_owner = unit.class_name == owner if isinstance(owner, str) else isinstance(unit.module, owner)
        if not is_owner:
            return {}
        claims: Claims = {}
        for name, role in roles.items():
            if name not in unit.members:
                raise ConfigError(
                    f"the rule registered for {label} names {name!r}, which {unit.path or 'the model'} does not hold "
                    f"as a weight; it has {', '.join(unit.members)}"
                )
            rows = unit.members[name].shape[0]
            divided = role.roles(unit.module, rows, group) if isinstance(role, Packed) else ()
            if divided is None:
                raise ConfigError(f"the rule registered for {label} does not divide the {rows} rows of {name!r}")
            claims[name] = divided if not isinstance(role, str) else (Role(role, group, 0, rows),)
        return claims

    handle = RemovableHandle(registered)
    registered[handle.id] = f"registered for {label}", rule
    return handle


def apply_rules(unit: Unit) -> dict[str, tuple[str, tuple[Role, ...]]]:
    """Rule and roles of the members of a unit that some rule knows."""
    known: dict[str, tuple[str, tuple[Role, ...]]] = {}
    for label, rule in (*reversed(registered.values()), *RULES):
        for name, roles in rule(unit).items():
            if name not in known:
                known[name] = (label, roles)
    return known


def forward_source_of(module: nn.Module) -> list[str]:
    """Source of the methods of a class that take an output apart: its forward and its gate."""
    cls = base_class(module)
    gate: Any = type("", (), {"forward": getattr(cls, "_apply_gate", None)})
    return [forward_source(cls), forward_source(gate)]


def _roles(unit: Unit, name: str, token: str, candidate: Candidate, group: str) -> tuple[Role, ...]:
    """Roles of a member: of a grouped convolution one per group, of a packed weight one per part."""
    rows = candidate.shape[0]
    if candidate.groups > 1:
        size = rows // candidate.groups
        return tuple(Role(f"{token}_{g}", group, g * size, size) for g in range(candidate.groups))
    return packed(*_holder(unit, name), rows, group, "gate_up" if token == "gate_up_proj" else token)


def _called(unit: Unit, words: re.Pattern[str]) -> bool:
    """Whether the owner's class or its name in its own parent is one of some words."""
    return bool(words.search(unit.class_name) or words.search(unit.path.rpartition(".")[2]))


def _holder(unit: Unit, name: str) -> tuple[nn.Module, str]:
    """The module whose forward takes the output of a member apart, and what it calls the member: the owner or a wrapper
    below it, past wrappers of the projection alone and containers."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part in QUERIES or part in STATE_SPACE), 0)
    return unit.module.get_submodule(".".join(parts[:at])), parts[at]


def _token(name: str, words: Mapping[str, str]) -> str | None:
    return next((s for s in reversed(name.split(".")) if s in words), None)


def _by_place(unit: Unit, tokens: tuple[str, ...]) -> list[dict[str, tuple[str, Candidate]]]:
    """Members that are called one of the tokens, by token, for every container of the owner in which some are."""
    places: dict[str, dict[str, tuple[str, Candidate]]] = {}
    for name, candidate in unit.members.items():
        parts = name.split(".")
        if token := next((s for s in reversed(parts) if s in tokens), None):
            place = ".".join(parts[: parts.index(token)])
            if not candidate.spatial and not POSITION.search(f"{unit.path}.{place}"):
                members = places.setdefault(place, {})
                if token not in members or name.count(".") < members[token][0].count("."):
                    members[token] = (name, candidate)
    return list(places.values())


def _widens(into: Candidate, out_of: Candidate, ups: int, unit: Unit | None = None) -> bool:
    """Whether two layers are the halves of an MLP: the second takes what the first gives (or half of it, if gated), and
    the hidden width is not the narrow waist of a squeeze-and-excitation or of a convolutional bottleneck. A few inputs
    are coordinates: such MLPs make position biases.

    Args:
        unit: the owner, where the names are those of an MLP; then Linear layers may narrow, if nothing is pooled.
    """
    hidden = out_of.shape[1] * out_of.groups
    given, width = into.shape[0], into.shape[1] * into.groups
    return (
        width > COORDINATES
        and hidden <= given
        and (ups > 1 or given <= 3 * hidden)
        and (4 * hidden >= 3 * min(width, out_of.shape[0]) or (unit is not None and _narrow(into, unit)))
    )


def _narrow(into: Candidate, unit: Unit) -> bool:
    return into.form != "kernel" and not re.search(r"pool|\.mean\(", method_source(base_class(unit.module)))


def _pairs_in_sequence(unit: Unit, claims: Claims) -> Claims:
    """Two pointwise layers of an nn.Sequential with nothing but norms, activations and dropout between."""
    found: Claims = {}
    free = {
        n: s for n, s in unit.members.items() if n not in claims and not s.spatial and n not in unit.module._parameters
    }
    for (first, into), (second, out_of) in pairwise(free.items()):
        shared = first.split(".")
        shared = shared[
            : next((i for i, (a, b) in enumerate(zip(shared, second.split("."), strict=False)) if a != b), 0)
        ]
        place = ".".join(shared)
        container = unit.module.get_submodule(place)
        if not isinstance(container, nn.Sequential) or POSITION.search(f"{unit.path}.{place}"):
            continue
        names = [name for name, _ in container.named_children()]
        i, j = (names.index(name.split(".")[len(shared)]) for name in (first, second))
        layers = [m for c in list(container)[i : j + 1] for m in c.modules() if isinstance(m, _LAYERS)]
        if len(layers) == 2 and into.shape[0] > out_of.shape[0] and _widens(into, out_of, 1):
            found[first] = _roles(unit, first, "fc1", into, MLP)
            found[second] = _roles(unit, second, "fc2", out_of, MLP)
    return found


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def in_attention(unit: Unit, name: str) -> bool:
    """Whether a member lies in a module called an attention, as the output of BERT's, whose q, k and v are a module
    beside it, a gate of it, or a convolutional attention."""
    place = [*unit.path.split("."), *name.split(".")[:-1]]
    numbered = [i for i, part in enumerate(place[: unit.path.count(".") + 1]) if part.isdigit()]
    parts = place[(numbered[-1] + 1) if numbered else unit.path.count(".") :]
    modules = [unit.module.get_submodule(".".join(name.split(".")[:i])) for i in range(name.count(".") + 1)]
    words = (*parts, *(base_class(m).__name__ for m in modules))
    return any(ATTENTION_WORDS.search(word) and not BESIDE_ATTENTION.search(word) for word in words)
