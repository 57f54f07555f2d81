"""Finds the projections of a model and says what each is, from how the model is built.

One walk over the modules; every Linear is shown to the rules in turn, and the first that knows it names its roles. A
rule sees a `Site`: the module, what it is called, who owns it, and the owner's other children. Rules go by structure
(who owns what, shapes, what the owner's forward does with the output), because lists of model names rot.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from .layers import Role, is_adapted

ATTENTION, MLP = "attn", "mlp"


@dataclass(frozen=True)
class Site:
    """A Linear in its surroundings.

    Args:
        path: of the module, such as `blocks.0.attn.qkv`.
        module: the Linear.
        parent: the module that owns it.
    """

    path: str
    module: nn.Linear
    parent: nn.Module

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.module.out_features, self.module.in_features

    @cached_property
    def siblings(self) -> dict[str, nn.Linear]:
        return {name: child for name, child in self.parent.named_children() if isinstance(child, nn.Linear)}

    @cached_property
    def forward_source(self) -> str:
        """Source of the parent's forward, empty where it cannot be read."""
        return _source(type(self.parent))

    @property
    def weight_is_read(self) -> bool:
        """Whether the parent takes the weight itself rather than call the module (timm's BEiT, EVA, SwinV2)."""
        return (
            re.search(rf"\bself\.{re.escape(self.name)}\.weight\b(?!\.(dtype|device))", self.forward_source) is not None
        )


@dataclass(frozen=True)
class Finding:
    """What the walk says of one Linear: its roles, or why it has none.

    Args:
        site: where it is.
        roles: the projections in it, empty if it is not adapted.
        rule: name of the rule that decided, or the reason for leaving it.
        block: number of its block through the model, None outside of blocks.
    """

    site: Site
    roles: tuple[Role, ...]
    rule: str
    block: int | None


# `reshape(B, N, 3, self.num_heads, ...)`: the 3 stands before the heads.
_SPLIT_IN_THREE = re.compile(r"(?:reshape|view)\((?:(?!heads)[^()])*\b3,\s*(?:self\.)?(?:num_)?heads\b")

Rule = Callable[[Site], tuple[Role, ...] | None]


def fused_qkv(site: Site) -> tuple[Role, ...] | None:
    """`qkv` beside an output projection of a third of its rows. The three are told apart only where the owner's forward
    splits the rows into (3, heads, ...); other orders (levit and tiny_vit interleave heads) stay one projection."""
    if site.name != "qkv" or "proj" not in site.siblings:
        return None
    out, _ = site.shape
    thirds = out == 3 * site.siblings["proj"].in_features and not getattr(site.parent, "head_first", False)
    if thirds and _SPLIT_IN_THREE.search(site.forward_source):
        rows = out // 3
        return tuple(Role(name, ATTENTION, k * rows, rows) for k, name in enumerate("qkv"))
    return (Role("qkv", ATTENTION, 0, out),)


def split_attention(site: Site) -> tuple[Role, ...] | None:
    """Separate query, key, value (or a fused key-value) and output projections under one owner."""
    names = {"q": "q", "k": "k", "v": "v", "kv": "kv", "q_proj": "q", "k_proj": "k", "v_proj": "v",
             "proj": "proj", "out_proj": "proj", "o_proj": "proj"}  # fmt: skip
    held = {names[name] for name in site.siblings if name in names}
    fused = "qkv" in site.siblings
    if site.name not in names or "proj" not in held or not (fused or ("q" in held and held & {"k", "v", "kv"})):
        return None
    return (Role(names[site.name], ATTENTION, 0, site.shape[0]),)


def two_layer_mlp(site: Site) -> tuple[Role, ...] | None:
    """`fc1` and `fc2` (and the gates of gated MLPs) that widen the features and bring them back."""
    fc1 = next((site.siblings[n] for n in ("fc1", "fc1_x") if n in site.siblings), None)
    fc2 = site.siblings.get("fc2")
    if fc1 is None or fc2 is None or site.name not in ("fc1", "fc1_g", "fc1_x", "fc2"):
        return None
    if fc1.in_features <= 4:  # an MLP over coordinates makes position biases (timm's rel_pos and meta_mlp)
        return None
    return (Role(site.name, MLP, 0, site.shape[0]),)


RULES: tuple[tuple[str, Rule], ...] = (
    ("fused qkv", fused_qkv),
    ("split attention", split_attention),
    ("two-layer MLP", two_layer_mlp),
)


def walk(model: nn.Module) -> Iterator[Finding]:
    """Every Linear of a model, in the model's order, with what the rules say of it."""
    heads = head_names(model)
    blocks: dict[str, int] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if not isinstance(module, nn.Linear) or not path:
            continue
        parent = modules[path.rpartition(".")[0]]
        site = Site(path, module, parent)
        if any(path == head or path.startswith(head + ".") for head in heads):
            yield Finding(site, (), "part of the head", None)
            continue
        if type(module).forward is not nn.Linear.forward and not is_adapted(module):
            yield Finding(site, (), f"{type(module).__name__} computes something of its own", None)
            continue
        name, roles = next(((n, r) for n, rule in RULES if (r := rule(site))), ("no rule knows it", ()))
        block_path = _block(path) if roles else None
        block = None if block_path is None else blocks.setdefault(block_path, len(blocks))
        yield Finding(site, roles, name, block)


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that turn features into predictions: what timm calls the classifier, or a last Linear of a
    customary name."""
    config = getattr(model, "pretrained_cfg", None)
    named = config.get("classifier") if isinstance(config, dict) else None
    names = [named] if isinstance(named, str) else list(named or ())
    names += [name for name in ("head", "head_dist", "fc", "classifier") if name not in names]
    present = dict(model.named_modules())
    kept: list[str] = []
    for name in names:
        if name in present and not any(name.startswith(other + ".") for other in kept):
            kept = [other for other in kept if not other.startswith(name + ".")] + [name]
    return tuple(name for name in kept if any(True for _ in present[name].parameters()))


def _block(path: str) -> str | None:
    """The innermost numbered ancestor: `blocks.3.attn.qkv` lies in `blocks.3`."""
    match = re.match(r"(.*\.\d+|\d+)\.", path)
    return match[1] if match else None


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return ""
