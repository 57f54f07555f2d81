"""What can be chosen about an adapter, in one frozen dataclass."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import ConfigError, OptionError
from .options import UNSET, given, hinting

Layout = Literal["shape", "slice"]

Init = Literal["haar", "kaiming", "svd"]

BasePart = Literal["head", "norm", "bias"]


LARGEST = 2**31
"""Bound of ranks and sizes; a saved adapter has no larger ones."""
SMALLEST = 1e-30
"""Of a value at which vectors start, in size: not 0 in any floating-point type but float16."""


@dataclass(frozen=True)
class UoraConfig:
    """Options of `inject`.

    Args:
        rank: number of directions r of every adapted projection.
        targets: what to adapt. Terms joined by `+`, or an iterable of terms. A term is a group (`attention`, `mlp`;
            `all` for both; `conv`, convolutions outside of these; `other`, other Linear layers), the shorthand `qv`, a
            role (`q`, `proj`, `attn.q`) or a pattern over paths (`blocks.1?.attn.*`, which ends in the role:
            `blocks.3.attn.qkv.q`). In a model of several towers, `vision:attention+mlp` means those of one tower: what
            stands before the colon goes for all terms behind it in the same string. A tower's name alone stands for its
            attention and MLP, `connector` for all that connects towers. See `Plan.towers` for those of a model.
        exclude: terms of the same form, taken away from `targets`.
        blocks: numbers of the blocks to adapt, counted through the whole model; negative from its end. None for all.
        d_init: initial value of d.
        seed: of the shared matrices A and B and of their redrawn rows.
        layout: `shape`, one A per input width and one B per output width, each orthonormal; or `slice`, one A and one B
            of the largest widths, of which each layer takes the first part (PEFT's VeRA and the author's code do so).
        init: `haar` (UORA: uniform orthonormal), `kaiming` (VeRA, arXiv 2310.11454) or `svd`: A and B of each
            projection are the leading singular vectors of its frozen weight: nothing of them is saved, and an adapter
            loads into the base that it was trained on.
        dropout: probability of dropping an input element of the low-rank branch while training. Above 0 the branch
            cannot be folded into the weight, and a step costs what PEFT's VeRA costs.
        token_sampling: while training, the gradients of b and d of a Linear layer are estimated, without bias, from one
            token drawn out of every `token_sampling`. Time and saved activations fall, noise rises:
            docs/performance.md. 1 for the exact gradients.
        train: parts of the base that train besides: any of `head`, `norm`, `bias`, and paths of modules or parameters,
            or patterns over these (`decoder`, `*.embed_tokens`, as PEFT's modules_to_save); they are not adapted then.
            Heads are what is named so and what stands around a base model; see `plan`.

    Example:
        >>> import uora_vision as uora
        >>> config = uora.UoraConfig(rank=64, targets="qv", blocks=range(6, 12))
        >>> config.replace(rank=128).rank, config.targets
        (128, ('qv',))
    """

    rank: int = 256
    targets: str | Iterable[str] = "attention+mlp"
    exclude: str | Iterable[str] = ()
    blocks: Iterable[int] | None = None
    d_init: float = 0.1
    seed: int = 0
    layout: Layout = "shape"
    init: Init = "haar"
    dropout: float = 0.0
    token_sampling: int = 1
    train: str | Iterable[str] = ("head",)

    def __post_init__(self) -> None:
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        set_("targets", _terms("targets", self.targets))
        set_("exclude", _terms("exclude", self.exclude))
        set_("train", _terms("train", self.train))
        if self.blocks is not None:
            blocks = tuple(self.blocks) if isinstance(self.blocks, Iterable) else ()
            if not blocks or not all(_is_whole(i) for i in blocks):
                raise ConfigError(f"blocks must be block numbers such as range(6, 12), got {self.blocks!r}")
            set_("blocks", blocks)
        # What is refused here could not be saved after training.
        for name, least, end in (("rank", 1, LARGEST), ("seed", 0, 2**63), ("token_sampling", 1, LARGEST)):
            value = getattr(self, name)
            if not _is_whole(value) or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
            if value >= end:
                raise ConfigError(f"{name} must be below {end}, got {value}")
        if not isinstance(self.d_init, int | float) or not abs(self.d_init) < math.inf or self.d_init == 0:
            raise ConfigError(f"d_init must be finite and not 0 (b would receive no gradient), got {self.d_init!r}")
        if not SMALLEST <= abs(self.d_init) < LARGEST:
            raise ConfigError(f"d_init must be between {SMALLEST} and {LARGEST} in size, got {self.d_init!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.token_sampling > 1 and self.dropout:
            raise ConfigError("token_sampling and dropout cannot be had together; leave one at its default")
        for name, allowed in (("layout", get_args(Layout)), ("init", get_args(Init))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.init == "svd" and self.layout == "slice":
            raise ConfigError("init='svd' gives every projection A and B of its own, and layout='slice' one of all")
        if not self.targets:
            raise ConfigError("targets is empty; name what to adapt, such as 'attention+mlp'")

    @hinting
    def replace(
        self,
        *,
        rank: int = UNSET,
        targets: str | Iterable[str] = UNSET,
        exclude: str | Iterable[str] = UNSET,
        blocks: Iterable[int] | None = UNSET,
        d_init: float = UNSET,
        seed: int = UNSET,
        layout: Layout = UNSET,
        init: Init = UNSET,
        dropout: float = UNSET,
        token_sampling: int = UNSET,
        train: str | Iterable[str] = UNSET,
    ) -> UoraConfig:
        """A copy with some options changed.

        Raises:
            OptionError: an option of that name does not exist.
            ConfigError: a value cannot be used.

        Example:
            >>> import uora_vision as uora
            >>> uora.UoraConfig().replace(r=8)
            Traceback (most recent call last):
            uora_vision.errors.OptionError: no option 'r'; did you mean 'rank'?
        """
        changed = given(
            rank=rank, targets=targets, exclude=exclude, blocks=blocks, d_init=d_init, seed=seed, layout=layout,
            init=init, dropout=dropout, token_sampling=token_sampling, train=train,
        )  # fmt: skip
        return dataclasses.replace(self, **changed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `UoraConfig(**d)` is its inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


UoraConfig.__init__ = hinting(UoraConfig.__init__)  # type: ignore[method-assign]


def chosen(config: UoraConfig | None, **options: Any) -> UoraConfig:
    """The options of a call: those of `config`, or the defaults, with the ones changed that are not `UNSET`.

    Raises:
        OptionError: `config` is no config, or an option does not exist.
        ConfigError: a value cannot be used.
    """
    if config is not None and not isinstance(config, UoraConfig):
        raise OptionError(
            f"config takes a UoraConfig, got {config!r:.60}; single options are keywords: rank=..., targets=..."
        )
    return (config or UoraConfig()).replace(**options)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _terms(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    parts = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise OptionError(f"{name} takes a string or strings, got {value!r}")
    terms = [term.strip() for part in parts for term in _in_tower(name, part)]
    if isinstance(value, set | frozenset):
        terms.sort()
    # Those of one tower come last: joined by `+`, they mean the same.
    terms.sort(key=lambda term: name != "train" and TOWER.match(term) is not None)
    return tuple(dict.fromkeys(term for term in terms if term))


def _in_tower(name: str, text: str) -> list[str]:
    """The terms of a string, each with the tower that was named last before it."""
    terms, tower = text.split("+"), ""
    for i, term in enumerate(terms if name != "train" else ()):
        if match := TOWER.match(term):
            tower, term = match[1], match[2].strip()
            if not term:
                raise ConfigError(f"{name}={text!r} asks for nothing in {tower!r}; write '{tower}:attention+mlp'")
        terms[i] = f"{tower}:{term.strip()}" if tower and term.strip() else term
    return terms


TOWER = re.compile(r"\s*([A-Za-z_]\w*)\s*:(.*)$", re.DOTALL)
"""A term that is asked for in one tower only: its name, and the term."""
