"""Whether a plan is complete, judged without the rules: every weight of two or more dimensions is adapted, or is left
for a reason that its module, its shape or its place bears out."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from uora_vision.structure.planning import Plan

REASONS = (
    "embedding", "patch embedding", "head", "router", "position bias", "depthwise or spatial kernel", "norm",
    "squeeze-and-excitation", "cannot receive a gradient", "not of attention or MLP: on request",
)  # fmt: skip
"""The closed list."""

_BY_WORD = (
    ("position bias", r"rel_|relative|pos_|position|_pos\b|bias|cpb|meta_mlp|r_kernel|\.r$|attention_biases"),
    ("head", r"head|class_embed|bbox|score|predict|classifier|lm_|hypernetworks|cls\b|confidence|logit|mask_embedder"),
    ("router", r"router|\.gate$|gate\.\w+$|gating"),
    ("patch embedding", r"patch_?embed|patch_conv|stem|subsampl|downsample|encoder_layers\.\d+\.projection"),
    ("embedding", r"embed|token|latent|query$|queries$|prompt|codebook|time_|quantize|pad_(up|down|left|right)"),
    ("cannot receive a gradient", r"indexer"),
    ("squeeze-and-excitation", r"\bse\b|squeeze|excit|se_block|se_module"),
    ("norm", r"norm|A_log|\.D$|scale|layer_scale|_hc\b|hc_|static_weight"),
)

_UNREACHED = r"decoder\.layers\.0\.self_attn\.|vision_\w+\.head\."
"""DETR's queries start from zeros; models of language take SigLIP's features before its pooling head."""


_BETWEEN = r"\d\.(proj_in|proj_out|before_proj|after_proj|context_proj|plucker_proj)$"
"""Square layers of a block that lead from one stream to another."""


def judge(model: nn.Module, plan: Plan | None, skipped: dict[str, str]) -> dict[str, list[str]]:
    """The paths of the weights that are missed, and of those left for each reason of the closed list.

    Args:
        plan: of the model with the default targets; None if the rules find nothing in it.
        skipped: the reason for which each weight was left, by path.
    """
    adapted = set() if plan is None else {p.path for p in plan.projections}
    attending = {_block(p.path) for p in plan.projections} if plan else set()
    found: dict[str, list[str]] = {"missed": []}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            full = (path if name == "weight" else f"{path}.{name}").lstrip(".")
            if p is None or sum(size > 1 for size in p.shape) < 2 or full in adapted:
                continue
            reason = _reason(full, module, p, attending, skipped.get(full))
            found.setdefault(reason or "missed", []).append(full)
    return found


def _reason(path: str, module: nn.Module, p: Any, attending: set[str | None], stated: str | None) -> str | None:
    """The reason of the closed list that applies; None if the weight is missed."""
    kind = type(module).__name__
    if isinstance(module, nn.Embedding) or "Embedding" in kind:
        return "embedding"
    if "Norm" in kind:
        return "norm"
    if isinstance(module, nn.modules.conv._ConvNd) or (p.dim() > 3 or kind.startswith("Parametrization")):
        spatial = (p.dim() > 3 and max(p.shape[2:]) > 1) or (p.dim() == 3 and p.shape[2] > 1) or p.shape[1] == 1
        return "depthwise or spatial kernel" if spatial else "not of attention or MLP: on request"
    if str(stated).startswith("cannot receive a gradient") and re.search(_UNREACHED, path):
        return "cannot receive a gradient"
    for reason, words in _BY_WORD:
        if re.search(words, path) or (reason == "router" and "Router" in kind):
            return reason
    block = _block(path)
    if stated is None:  # a bare tensor that the plan does not even name
        return None if p.dim() in (2, 3) and min(p.shape) > 8 else "norm"
    if block is None or block not in attending:
        return "not of attention or MLP: on request"
    if p.shape[0] == p.shape[1] and re.search(_BETWEEN, path):
        return "not of attention or MLP: on request"
    # In a block with attention or an MLP, only what changes the width of the stream may stand apart from both.
    changes = p.dim() == 2 and p.shape[0] != p.shape[1] and not re.search(r"attn|attention|mlp|ffn|mixer|mamba", path)
    return "not of attention or MLP: on request" if changes or min(p.shape) <= 8 else None


def _block(path: str) -> str | None:
    """The innermost numbered module around a weight."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts[:-1]) if part.isdigit()), default=None)
    return None if last is None else ".".join(parts[: last + 1])
