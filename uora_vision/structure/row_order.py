"""Row order of packed weights: which rows of one weight are q, which k, which v.

The order is a convention of the forward that takes the output apart; nothing in the weight shows it. The common orders
(thirds or halves one after the other, or those of each head together) are read off the owner's code; the others are
listed with where they are taken apart. An order that is in neither place is not guessed: the weight then counts as one
projection.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from ..weights.kinds import base_class
from ..weights.role import Role
from .bare import method_source

Count = Callable[[Any], int]


@dataclass(frozen=True)
class Packed:
    """How the rows of a packed weight are divided.

    Args:
        names: of the projections, in the order of their rows.
        sizes: rows of each, from the owner; None if all are equal.
        times: how often the sequence repeats, from the owner: the number of heads where the parts of a head lie
            together; None if it does not repeat.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> heads = uora.Packed(("q", "k", "v"), times=lambda owner: 2)  # q, k, v of head 0, then of head 1
        >>> [(role.name, role.span.indices()) for role in heads.roles(nn.Linear(8, 12), 12, "attn")]
        [('q', [0, 1, 6, 7]), ('k', [2, 3, 8, 9]), ('v', [4, 5, 10, 11])]
    """

    names: Sequence[str]
    sizes: Callable[[Any], Sequence[int]] | None = None
    times: Count | None = None

    def roles(self, owner: nn.Module, rows: int, group: str) -> tuple[Role, ...] | None:
        """The projections in a weight of so many rows; None if they do not add up to it."""
        times = 1 if self.times is None else int(self.times(owner))
        whole, rest = divmod(rows, times)
        sizes = [whole // len(self.names)] * len(self.names) if self.sizes is None else list(self.sizes(owner))
        if rest or sum(sizes) != whole or min(sizes) < 1:
            return None
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        return tuple(
            Role(name, group, start, size * times, *((size, whole) if times > 1 else ()))
            for name, start, size in zip(self.names, starts, sizes, strict=True)
        )


QKV = ("q", "k", "v")

_per_head = lambda m: m.num_heads  # noqa: E731

_keys_and_values = lambda m: (m.key_dim, m.key_dim, m.val_dim)  # noqa: E731

TABLE: dict[str, Packed] = {
    # timm 1.0.31
    "levit.Attention.qkv": Packed(QKV, _keys_and_values, _per_head),  # levit.py:320
    "levit.AttentionDownsample.kv": Packed("kv", lambda m: (m.key_dim, m.val_dim), _per_head),  # levit.py:456
    "efficientformer.Attention.qkv": Packed(QKV, _keys_and_values, _per_head),  # efficientformer.py:116
    "tiny_vit.Attention.qkv": Packed(QKV, _keys_and_values, _per_head),  # tiny_vit.py:283
    "focalnet.FocalModulation.f": Packed(("q", "ctx", "gates"), lambda m: m.input_split),  # focalnet.py:105
    "convit.GPSA.qk": Packed("qk"),  # convit.py:88, in get_attention
    "efficientvit_msra.CascadedGroupAttention.qkvs": Packed(QKV, _keys_and_values),  # efficientvit_msra.py:269
    "efficientvit_mit.LiteMLA.qkv": Packed(QKV, None, lambda m: m.qkv.conv.out_channels // (3 * m.dim)),  # :376
    "shvit.SHSA.qkv": Packed(QKV, lambda m: (m.qk_dim, m.qk_dim, m.pdim)),  # shvit.py:210
    "iformer.SHMA.v_gate": Packed(("v", "gate")),  # iformer.py:218
    "lowformer.ConvAttention.pwise": Packed(QKV, None, _per_head),  # lowformer.py:302
    "cpubone.ConvAttention.pwise": Packed(QKV, None, _per_head),  # as lowformer
    "efficientvim.HSMSSD.BCdt_proj": Packed(("B", "C", "dt")),  # efficientvim.py:320
    "efficientvim.HSMSSD.hz_proj": Packed(("h", "z")),  # efficientvim.py:327
    "halo_attn.HaloAttn.kv": Packed("kv", lambda m: (m.dim_head_qk, m.dim_head_v), _per_head),  # halo_attn.py:230
    "bottleneck_attn.BottleneckAttn.qkv": Packed(QKV, lambda m: (m.dim_out_qk, m.dim_out_qk, m.dim_out_v)),  # :172
    "lambda_layer.LambdaLayer.qkv": Packed(QKV, lambda m: (m.num_heads * m.dim_qk, m.dim_qk, m.dim_v)),  # :151
    "mobilevit.LinearSelfAttention.qkv_proj": Packed(QKV, lambda m: (1, m.embed_dim, m.embed_dim)),  # mobilevit.py:338
    "diff_attention.DiffAttention.qkv": Packed(QKV),  # diff_attention.py:137
    "vision_transformer.ParallelScalingBlock.in_proj": Packed(("fc1", *QKV), lambda m: m.in_split),  # :420
    "vision_transformer.DiffParallelScalingBlock.in_proj": Packed(("fc1", *QKV), lambda m: m.in_split),  # :583
    "mambaout.GatedConvBlock.fc1": Packed(("fc1_g", "fc1_x")),  # mambaout.py: act(g) * cat(i, conv(c))
    "mlp.GatedMlp.fc1": Packed("uv"),  # layers/mlp.py; taken apart by SpatialGatingUnit, mlp_mixer.py:216
    # torchvision 0.29: shifted_window_attention of swin_transformer.py and of video/swin_transformer.py
    "swin_transformer.ShiftedWindowAttention.qkv": Packed(QKV),
    "swin_transformer.ShiftedWindowAttention3d.qkv": Packed(QKV),
    # diffusers 0.42
    "transformer_flux2.Flux2ParallelSelfAttention.to_qkv_mlp_proj": Packed(
        (*QKV, "gate", "up"), lambda m: (m.inner_dim,) * 3 + (m.mlp_hidden_dim,) * m.mlp_mult_factor
    ),
    # transformers 5.23
    "modeling_gpt_neox.GPTNeoXAttention.query_key_value": Packed(QKV, None, lambda m: m.config.num_attention_heads),
    "modeling_bloom.BloomAttention.query_key_value": Packed(QKV, None, _per_head),  # view(..., heads, 3, head_dim)
    "modeling_mpt.MptAttention.Wqkv": Packed(QKV),  # chunk(3)
    "modeling_codegen.CodeGenAttention.qkv_proj": Packed("qvk", None, lambda m: 4),  # mp_num = 4; q, v, k
    "modeling_phi3.Phi3Attention.qkv_proj": Packed(
        QKV, lambda m: tuple(n * m.head_dim for n in (
            m.config.num_attention_heads, m.num_key_value_heads, m.num_key_value_heads))
    ),
    "modeling_levit.LevitAttention.queries_keys_values": Packed(
        QKV, lambda m: _levit(m), lambda m: m.num_attention_heads
    ),
    "modeling_levit.LevitAttentionSubsample.keys_values": Packed(
        ("k", "v"), lambda m: _levit(m)[1:], lambda m: m.num_attention_heads
    ),
    "modeling_mobilevitv2.MobileViTV2LinearSelfAttention.qkv_proj": Packed(
        QKV, lambda m: (1, m.embed_dim, m.embed_dim)
    ),
    "modeling_minimax.MiniMaxLightningAttention.qkv_proj": Packed(QKV, None, lambda m: m.num_attention_heads),
    "modeling_mamba.MambaMixer.in_proj": Packed("xz"),  # chunk(2)
    "modeling_mamba.MambaMixer.x_proj": Packed(
        ("dt", "B", "C"), lambda m: (m.time_step_rank, m.ssm_state_size, m.ssm_state_size)
    ),
}  # fmt: skip
"""By the file and class of the owner and the name of the projection in it."""


def packed(owner: nn.Module, name: str, rows: int, group: str, default: str) -> tuple[Role, ...]:
    """The roles in a weight; one of the name `default` if its rows are not known to be divided.

    Args:
        owner: module whose forward takes the output apart.
        name: of the projection in the owner.
        default: what the weight is by its name: `qkv`, `kv`, `qk`, `gate_up` are packed, others only by the table.
    """
    for cls in base_class(owner).__mro__:
        key = f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}.{name}"
        entry = _SPECIAL[key](owner) if key in _SPECIAL else TABLE.get(key)
        if entry is not None:
            return entry.roles(owner, rows, group) or (Role(default, group, 0, rows),)
    parts = {"qkv": QKV, "kv": ("k", "v"), "qk": ("q", "k"), "gate_up": ("gate", "up")}.get(default)
    order = Packed(parts) if parts and default == "gate_up" else _latent(owner, default)
    if parts is not None and order is None:
        order = _read(owner, parts)
    return (order and order.roles(owner, rows, group)) or (Role(default, group, 0, rows),)


def _latent(m: Any, default: str) -> Packed | None:
    """Multi-head latent attention (DeepSeek): what is shared by all heads, then made keys and values of each."""
    if default == "kv_a" and hasattr(m, "kv_lora_rank") and hasattr(m, "qk_rope_head_dim"):
        return Packed(("kv_a", "k_rope"), lambda m: (m.kv_lora_rank, m.qk_rope_head_dim))
    if default == "kv_b" and hasattr(m, "qk_nope_head_dim") and hasattr(m, "v_head_dim") and hasattr(m, "num_heads"):
        return Packed("kv", lambda m: (m.qk_nope_head_dim, m.v_head_dim), _per_head)
    return None


def _read(owner: Any, parts: tuple[str, ...]) -> Packed | None:
    """The order in which the owner's code takes an output apart; None if the code does not show it."""
    cls = base_class(owner)
    if _in_sequence(cls, len(parts)):
        return Packed(parts)
    kind, names = _split(cls, parts)
    try:
        values = [int(getattr(owner, name)) for name in names]
    except (AttributeError, TypeError, ValueError):
        return None
    if kind == "heads":
        return Packed(parts, None, lambda _: values[0])
    if kind == "grouped":
        heads = int(owner.config.num_attention_heads)
        return Packed(parts, lambda m: tuple(n * values[0] for n in (heads, values[1], values[1])))
    return Packed(parts, (lambda _: values) if len(values) > 1 else None) if kind == "sizes" else None


@cache
def _split(cls: type, parts: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """How the code of a class splits an output into parts, and the attributes that say their sizes: `heads` where the
    parts of a head lie together, `sizes` where they follow each other, `grouped` where fewer keys and values do."""
    source, n = method_source(cls), len(parts)
    heads = (
        rf"(?:view|reshape)\([^()]*?self\.(\w*heads\w*),\s*{n},\s*(?:self\.)?\w*(?:head|dim)\w*\)",
        rf"\([^()]*?self\.(\w*heads\w*),\s*{n}\s*\*\s*self\.\w*head\w*\)",
    )
    for pattern in heads:
        if match := re.search(pattern, source):
            return "heads", (match[1],)
    names = r",\s*".join(rf"{part}\w*" for part in parts)
    if re.search(rf"\b{names}\s*=\s*self\.transpose_for_scores\(\w+\)\.chunk\({n}\b", source):
        return "heads", ("num_attention_heads",)
    if re.search(rf"\b{names}\s*=\s*(?:\w|\.|\([^()]*\))*\.(?:chunk\({n}\b|split\(self\.\w+\s*[,)])", source):
        return "sizes", ()
    if re.search(rf"\b{names}\s*=\s*torch\.chunk\(\s*\w+,\s*{n}\b", source):
        return "sizes", ()
    whole = "".join(parts)  # qkv = self.to_qkv(x).chunk(3, dim=-1), which is taken apart by name afterwards
    chunked = re.search(rf"\b(\w*{whole})\s*=\s*self\.\w*{whole}\w*\([^()]*\)\.chunk\({n}\b", source)
    beside = r"\b(\w*qkv)\s*=\s*\(self\.\w*q\w*\([^()]*\),\s*\*self\.\w*kv\w*\([^()]*\)\.chunk\(2\b"
    chunked = chunked or (re.search(beside, source) if whole == "kv" else None)
    if chunked and re.search(rf"\b{names}\s*=[^\n]*\b{chunked[1]}\b", source):
        return "sizes", ()
    sizes = r",\s*".join([r"self\.(\w+)"] * n)
    taken = rf"\b{names}\s*=\s*(?:torch\.split\(\s*\w+,|(?:\w|\.|\([^()]*\))*\.split\()\s*[\[(]\s*{sizes}\s*,?\s*[\])]"
    if match := re.search(taken, source):
        return "sizes", match.groups()
    if n == 3 and re.search(r"q\w*\s*=\s*qkv\[\.\.\., : ?query_pos\]", source):
        return "grouped", ("head_dim", "num_key_value_heads")
    return "", ()


def _falcon(m: Any) -> Packed:
    """modeling_falcon.py, _split_heads: groups of queries with a key and a value, or all queries, a key, a value."""
    if m.new_decoder_architecture:
        shared = m.num_heads // m.num_kv_heads
        return Packed(QKV, lambda m: (shared * m.head_dim, m.head_dim, m.head_dim), lambda m: m.num_kv_heads)
    if m.multi_query:
        return Packed(QKV, lambda m: (m.num_heads * m.head_dim, m.head_dim, m.head_dim))
    return Packed(QKV, None, _per_head)


def _maxxvit(m: Any) -> Packed:
    """maxxvit.py:307 and attention2d.py:355: heads before the parts, or after."""
    return Packed(QKV, None, _per_head if m.head_first else None)


def _gpt2(m: Any) -> Packed:
    """modeling_gpt2.py and what was made after it: keys and values only, where another module holds the queries."""
    return Packed(("k", "v") if "q_attn" in m._modules else QKV)


def _gpt_bigcode(m: Any) -> Packed:
    """modeling_gpt_bigcode.py:203: all queries with one key and value, or a query, key and value of each head."""
    if m.multi_query:
        return Packed(QKV, lambda m: (m.embed_dim, m.kv_dim, m.kv_dim))
    return Packed(QKV, None, _per_head)


def _levit(m: Any) -> tuple[int, ...]:
    return (m.key_dim, m.key_dim, m.attention_ratio * m.key_dim)


_SPECIAL: dict[str, Callable[[Any], Packed]] = {
    "modeling_gpt2.GPT2Attention.c_attn": _gpt2,
    "modeling_decision_transformer.DecisionTransformerGPT2Attention.c_attn": _gpt2,
    "modeling_imagegpt.ImageGPTAttention.c_attn": _gpt2,
    "modeling_gpt_bigcode.GPTBigCodeAttention.c_attn": _gpt_bigcode,
    "modeling_falcon.FalconAttention.query_key_value": _falcon,
    "attention2d.Attention2d.qkv": _maxxvit,
    "maxxvit.Attention2d.qkv": _maxxvit,
    "maxxvit.AttentionCl.qkv": _maxxvit,
    "gcvit.WindowAttentionGlobal.qkv": lambda m: Packed("kv" if m.use_global else QKV),  # gcvit.py:219 and 226
    "mlp.GluMlp.fc1": lambda m: Packed(("fc1_x", "fc1_g") if m.gate_last else ("fc1_g", "fc1_x")),  # layers/mlp.py
}


@cache
def _in_sequence(owner: type, parts: int) -> bool:
    """Whether the forward splits an output into (parts, heads, ...), as in `reshape(B, N, 3, self.num_heads, ...)`."""
    pattern = (
        rf"(?:reshape|view)\((?:(?!heads|groups)[^()])*\b{parts},\s*"
        r"(?:(?:self\.)?(?:num_)?(?:attention_)?(?:heads|groups)\b|-1,\s*self\.\w*head)"
    )
    return re.search(pattern, method_source(owner)) is not None


@cache
def forward_source(cls: type) -> str:
    """Source of a class's forward, empty where it cannot be read."""
    try:
        return inspect.getsource(cls.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError, AttributeError):
        return ""
