"""Weights of attention and MLPs that no gradient reaches because of how their model is built, as its code shows."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache

from torch import nn

from ..weights.kinds import base_class
from ..weights.role import Role
from .paths import ancestors, joined, lies_within
from .row_order import forward_source

POOL = "cannot receive a gradient: this model takes the features before this pooling head"

ZEROS = "cannot receive a gradient: the first queries are zeros, so that this attention mixes equal values"


def find_unused(modules: Mapping[str, nn.Module], claimed: Mapping[str, tuple[Role, ...]]) -> dict[str, str]:
    """The reason, by path.

    Args:
        modules: of the model, by path.
        claimed: roles of the weights of attention and MLPs, by path.
    """
    pools, firsts = tuple(_pools(modules)), tuple(_first_attentions(modules))
    found = {path: ZEROS for path, roles in claimed.items() if lies_within(path, firsts) and roles[0].name != "proj"}
    return found | {path: POOL for path in claimed if lies_within(path, pools)}


def _pools(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """SigLIP's pooling heads, a learned query over the features, in models that hand the features themselves on."""
    for path, module in modules.items():
        if "probe" in module._parameters and path.rpartition(".")[2] == "head":
            for above in ancestors(path):
                source = _image_features(base_class(modules[above]))
                if ".get_image_features(" in source:  # of the model within
                    continue
                if re.search(r"= \w+\.last_hidden_state|\(\w+\.last_hidden_state|\.hidden_states\[", source):
                    yield path


def _first_attentions(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """DETR's decoder starts from zeros: in its first attention, to which only positions are added, all values are the
    bias, and their mean is the same whatever the queries and keys are."""
    for path, module in modules.items():
        for _, child in _FROM_ZEROS.findall(forward_source(base_class(module))):
            block = joined(path, f"{child}.layers.0")
            code = forward_source(base_class(modules[block])) if block in modules else ""
            before, attends, _ = code.partition("self.self_attn(")
            if attends and "norm(" not in before:  # a norm makes one vector of its bias out of zeros
                yield joined(block, "self_attn")


_FROM_ZEROS = re.compile(r"\b(\w+) = torch\.zeros(?:_like)?\([^)]*quer(?:.|\n)*?self\.(\w+)\(\s*inputs_embeds=\1,")


@cache
def _image_features(cls: type) -> str:
    try:
        return inspect.getsource(inspect.unwrap(cls.get_image_features))  # type: ignore[attr-defined]
    except (OSError, TypeError, AttributeError):
        return ""
