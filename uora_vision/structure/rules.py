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
from .candidates import IN_PROJECTIONS, Candidate, Unit
from .row_order import QKV, Packed, forward_source, packed

Claims = dict[str, tuple[Role, ...]]

Rule = Callable[[Unit], Claims]

_QUERIES = {
    "q": "q", "wq": "q", "query": "q", "q_proj": "q", "to_q": "q", "to_query": "q", "q_lin": "q", "query_proj": "q",
    "q_attn": "q", "q_a_proj": "q_a", "q_b_proj": "q_b", "query_key_value": "qkv", "qkv": "qkv", "qkvs": "qkv",
    "Wqkv": "qkv", "qkv_proj": "qkv", "c_attn": "qkv", "to_qkv": "qkv", "W_pack": "qkv", "pwise": "qkv", "qk": "qk",
    "k": "k", "wk": "k", "key": "k", "k_proj": "k", "to_k": "k", "to_key": "k", "k_lin": "k", "key_proj": "k",
    "v": "v", "wv": "v", "value": "v", "v_proj": "v", "to_v": "v", "to_value": "v", "v_lin": "v", "value_proj": "v",
    "v_gate": "v_gate", "kv": "kv", "kv_proj": "kv", "to_kv": "kv", "kv_a_proj_with_mqa": "kv_a", "kv_b_proj": "kv_b",
}  # fmt: skip

_OUTPUTS = {
    "proj": "proj", "out_proj": "proj", "o_proj": "proj", "o": "proj", "wo": "proj", "out": "proj", "to_out": "proj",
    "out_lin": "proj", "output": "proj", "dense": "proj", "c_proj": "proj", "projection": "proj",
    "attn_out_proj": "proj",
}  # fmt: skip

_BESIDE = {**_OUTPUTS, "final": "final", "attn": "attn", "aggreg": "aggreg"}
"""What else is an attention's if q, k or v are beside it."""

_STATE_SPACE = {"in_proj", "x_proj", "dt_proj", "BCdt_proj", "hz_proj", "out_proj"}

_MLPS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("fc1", "fc1_g", "fc1_x"), "fc2"), (("c_fc",), "c_proj"), (("gate_proj", "up_proj", "gate_up_proj"), "down_proj"),
    (("up",), "down"), (("w1", "w3"), "w2"), (("w0", "w1"), "w2"), (("w12",), "w3"), (("wi", "wi_0", "wi_1"), "wo"),
    (("dense_h_to_4h",), "dense_4h_to_h"), (("fc_in",), "fc_out"), (("lin1",), "lin2"), (("linear1",), "linear2"),
    (("intermediate",), "output"), (("weights_in",), "weights_out"), (("pwconv1",), "pwconv2"), (("pw1",), "pw2"),
    (("ln1",), "ln2"), (("f1", "f2"), "g"),
)  # fmt: skip
"""Names of the layers that lead into the hidden width of an MLP, and of the one that leads out of it."""

_MLP_WORDS = re.compile(r"mlp|ffn|feed_?forward|channel_mixer|glu", re.IGNORECASE)

_ATTENTION_WORDS = re.compile(r"attention|attn", re.IGNORECASE)

_SQUEEZE = re.compile(r"^(se|SE[A-Z]\w*|\w*Squeeze\w*|SplitAttn)$")

POSITION = re.compile(r"rel_?pos|cpb|meta_mlp|pos_|_pos\b|position|bias", re.IGNORECASE)

TALKING_HEADS = re.compile(r"talking|proj_[lw]$")

COORDINATES = 4  # so few inputs are positions or a single map, not features

ROUTERS = re.compile(r"(^|[._])(router|gate|routing_fn)$")


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
        elif name in _OUTPUTS:
            claims[name] = (Role("proj", ATTENTION, 0, rows),)
    return claims


def recurrent(unit: Unit) -> Claims:
    """torch's recurrent layers: a projection for every gate, in torch's order of gates."""
    if any(isinstance(child, nn.RNNBase) for child in unit.module.children()):
        return {n: (Role("proj", ATTENTION, 0, s.shape[0]),) for n, s in unit.members.items() if n in ("fc", "proj")}
    if not isinstance(unit.module, nn.RNNBase):
        return {}
    gates = {"LSTM": "ifgo", "GRU": "rzn"}.get(unit.module.mode, "h")
    claims: Claims = {}
    for name, candidate in unit.members.items():
        names = ("projection",) if name.startswith("weight_hr") else tuple(gates)
        if roles := Packed(names).roles(unit.module, candidate.shape[0], ATTENTION):
            claims[name] = roles
    return claims


def experts(unit: Unit) -> Claims:
    """Stacks of experts, 3-D: the projections of every expert."""
    claims: Claims = {}
    for name, candidate in unit.members.items():
        if not candidate.form.startswith("stack"):
            continue
        n = candidate.weight.shape[0]
        rows = candidate.shape[0] // n
        parts = [(name, 0, rows, 0, 0)]
        if name == "gate_up_proj" and rows % 2 == 0:
            half = rows // 2
            interleaved = "::2" in "".join(forward_source_of(unit.module))
            parts = (
                [("gate", 0, half, 1, 2), ("up", 1, half, 1, 2)] if interleaved
                else [("gate", 0, half, 0, 0), ("up", half, half, 0, 0)]
            )  # fmt: skip
        claims[name] = tuple(
            Role(f"{part}_{e}", MLP, e * rows + start, size, block, stride)
            for e in range(n)
            for part, start, size, block, stride in parts
        )
    return claims


def mlp(unit: Unit) -> Claims:
    """A layer that widens the features and one that narrows them, by the names that are used for them, or one after the
    other in something that is called an MLP."""
    if _called(unit, _SQUEEZE):
        return {}
    claims: Claims = {}
    for ins, out in _MLPS:
        for members in _by_place(unit, (*ins, out)):
            down = members.get(out)
            ups = [name for name in ins if name in members]
            if down is None or not ups or not _widens(members[ups[0]][1], down[1], len(ups)):
                continue
            for token, (name, candidate) in members.items():
                claims.setdefault(name, _roles(unit, name, token, candidate, MLP))
    if _called(unit, _MLP_WORDS) and not POSITION.search(unit.path):
        rest = [(n, s) for n, s in unit.members.items() if n not in claims and not s.spatial]
        if claims:
            claims |= {name: _roles(unit, name, name.partition(".")[0], candidate, MLP) for name, candidate in rest}
        elif len(rest) == 2 and _widens(rest[0][1], rest[1][1], 1):
            claims = {n: _roles(unit, n, token, s, MLP) for (n, s), token in zip(rest, ("fc1", "fc2"), strict=True)}
    return claims | _pairs_in_sequence(unit, claims)


def attention(unit: Unit) -> Claims:
    """Queries, keys and values, apart or packed, and the projection of what comes out."""
    found: dict[str, str] = {}
    for name, candidate in unit.members.items():
        if not candidate.spatial and candidate.shape[1] > COORDINATES and (token := _token(name, _QUERIES)):
            found[name] = token
    claims: Claims = {}
    for name, candidate in unit.members.items():
        if name in found:
            claims[name] = _roles(unit, name, _QUERIES[found[name]], candidate, ATTENTION)
            continue
        token = _token(name, _BESIDE if found else _OUTPUTS)
        if token and not candidate.spatial and (found or _in_attention(unit, name)):
            claims[name] = _roles(unit, name, _BESIDE[token], candidate, ATTENTION)
    return claims


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
    found = {name: _token(name, dict.fromkeys(_STATE_SPACE, "")) for name in unit.members}
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
    at = next((i for i, part in enumerate(parts) if part in _QUERIES or part in _STATE_SPACE), 0)
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
                places.setdefault(place, {})[token] = (name, candidate)
    return list(places.values())


def _widens(into: Candidate, out_of: Candidate, ups: int) -> bool:
    """Whether two layers are the halves of an MLP: the second takes what the first gives (or half of it, if gated), and
    the hidden width is not the narrow waist of a squeeze-and-excitation. A few inputs are coordinates: such MLPs make
    position biases."""
    hidden = out_of.shape[1] * out_of.groups
    given, width = into.shape[0], into.shape[1] * into.groups
    return (
        width > COORDINATES
        and hidden <= given
        and (ups > 1 or given <= 3 * hidden)
        and 4 * hidden >= 3 * min(width, out_of.shape[0])
    )


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


def _in_attention(unit: Unit, name: str) -> bool:
    """Whether a member lies in a module called an attention, without q, k and v of its own: the output of BERT's,
    whose q, k and v are a module beside it, or of a convolutional attention."""
    parts = [unit.path.rpartition(".")[2], *name.split(".")[:-1]]
    modules = [unit.module.get_submodule(".".join(name.split(".")[:i])) for i in range(name.count(".") + 1)]
    return any(_ATTENTION_WORDS.search(word) for word in (*parts, *(type(m).__name__ for m in modules)))
