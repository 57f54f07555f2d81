"""What an adapter says of its task: names of its classes, and how an input is made of what people have.

`FIELDS` is the list of what `preprocessing` may hold. Readers keep fields that they do not know, if these are small, so
that another one needs no other version of the format; whoever writes one must spell it as it is here.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import FormatError, OptionError

MOST = 100_000
"""Classes, and items of any list."""

LONGEST = 1_000
"""Characters of a name, and of any text but those of `LONG`."""

LONG = {"chat_template": 2**17}
"""Characters of texts that are programs."""

_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, ends of lines, what turns the direction of writing, and halves of characters."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def check_labels(value: Any) -> None:
    """Names of the classes, in the order of the outputs of the head. Two classes may have one name, as in ImageNet.

    Raises:
        FormatError: they are none.
    """
    if not isinstance(value, list) or not value:
        raise FormatError("it must be a list of names that is not empty")
    if len(value) > MOST:
        raise FormatError(f"{len(value):,} classes are more than {MOST:,}")
    for name in value:
        if not isinstance(name, str) or not name.strip():
            raise FormatError(f"{_shown(name)} is no name of a class")
        _check_text(name)


def check_preprocessing(value: Any) -> None:
    """An object with the fields of `FIELDS`, any of which may be missing.

    Raises:
        FormatError: a field has a value that cannot be used.
    """
    if not isinstance(value, dict):
        raise FormatError("it must be an object")
    if len(value) > 64:
        raise FormatError(f"{len(value)} fields are more than 64")
    for name, item in value.items():
        if not _NAME.fullmatch(name):
            raise FormatError(f"{_shown(name)} is no name of a field")
        _check_small(name, item)
        if name in FIELDS:
            good, wanted = FIELDS[name]
            if item is not None and not good(item):
                raise FormatError(f"{name} must be {wanted}, not {_shown(item)}")


def sections_of(labels: Sequence[str] | None, preprocessing: Mapping[str, Any] | None) -> dict[str, Any]:
    """Labels and preprocessing as the description of an adapter has them; without those that are None.

    Raises:
        OptionError: a field that does not exist, or a value that cannot be used.
    """
    found: dict[str, Any] = {}
    try:
        if labels is not None:
            if isinstance(labels, str):
                raise FormatError("it must be a list of names that is not empty")
            found["labels"] = list(labels)
            check_labels(found["labels"])
        if preprocessing is not None:
            if odd := [name for name in preprocessing if name not in FIELDS]:
                near = difflib.get_close_matches(str(odd[0]), FIELDS, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FIELDS)}"
                raise OptionError(f"preprocessing has no field {odd[0]!r}; {hint}")
            found["preprocessing"] = {name: _listed(item) for name, item in preprocessing.items() if item is not None}
            check_preprocessing(found["preprocessing"])
    except FormatError as error:
        what = "preprocessing" if "preprocessing" in found else "labels"
        raise OptionError(f"{what}: {error}") from error
    return found


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_small(name: str, value: Any) -> None:
    """Texts, numbers, and lists of them, none of them large."""
    items = value if isinstance(value, list) else [value]
    if len(items) > MOST:
        raise FormatError(f"{name} has {len(items):,} items, more than {MOST:,}")
    for item in items:
        if isinstance(item, str):
            _check_text(item, LONG.get(name))
        elif not isinstance(item, int | float | None) or (isinstance(item, float) and not math.isfinite(item)):
            raise FormatError(f"{name!r} must be a text, a number or a list of them")
        elif isinstance(item, int) and abs(item) >= 2**63:
            raise FormatError(f"{name} has the number {_shown(item)}, which is too large")


def _check_text(text: str, longest: int | None = None) -> None:
    if len(text) > (longest or LONGEST):
        raise FormatError(f"{_shown(text)} has {len(text):,} characters, more than {longest or LONGEST:,}")
    plain = text if longest is None else re.sub(r"[\n\r\t]", "", text)
    if odd := _FORBIDDEN.search(plain):
        raise FormatError(f"{_shown(text)} has the control character U+{ord(odd[0]):04X}")


def _shown(value: Any) -> str:
    """Of a value that others chose: one short line without control characters."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", value) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(n) is int and 0 < n <= 2**16 for n in value)


def _are_channels(value: Any, above: float) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 2**16 and all(_is_number(v) and v > above for v in value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_text(item) for item in value)


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    # What it is for, and of what base.
    "task": (_is_word, "a task as the hub names them, such as image-classification"),
    "model": (_is_text, "a model such as timm/NAME; folders are relative to that of the adapter"),
    "checkpoint": (_is_text, "a tag or a file of weights"),
    # Images: a data config of timm.
    "input_size": (_is_size, "channels, height and width"),
    "mean": (lambda v: _are_channels(v, -math.inf), "a number for each channel"),
    "std": (lambda v: _are_channels(v, 0), "a number above 0 for each channel"),
    "interpolation": (_is_word, "a word such as bicubic"),
    "crop_pct": (lambda v: _is_number(v) and 0 < v <= 1, "a share above 0, at most 1"),
    "crop_mode": (_is_word, "a word such as center, squash or border"),
    "transform": (lambda v: v in ("timm", "albumentations"), "timm or albumentations: which of them resizes"),
    # Images with several labels, or with numbers.
    "cutoff": (lambda v: _is_number(v) and 0 < v < 1, "a probability from which a label counts as there"),
    "targets": (_are_texts, "a name for each number that is told of an image"),
    "target_mean": (lambda v: _are_channels(v, -math.inf), "a number for each target"),
    "target_std": (lambda v: _are_channels(v, 0), "a number above 0 for each target"),
    # CLIP.
    "template": (lambda v: _is_text(v) and "{}" in v, "a text with {} for the name of a class"),
    "prompts": (_are_texts, "a text for each class"),
    # Texts.
    "columns": (_are_texts, "names of the columns that hold the texts of an example"),
    "max_length": (_is_count, "a number of tokens"),
    # Generation.
    "chat_template": (_is_text, "a template as tokenizers have it"),
    "prompt_end": (lambda v: v in ("eos",), "eos: a prompt ends with the end token"),
    "max_new_tokens": (_is_count, "a number of tokens"),
    "num_beams": (_is_count, "a number of beams"),
    "length_penalty": (_is_number, "a number"),
    "no_repeat_ngram_size": (lambda v: type(v) is int and 0 <= v < 2**31, "a number of tokens"),
}
"""Every field of `preprocessing`: whether a value is one, and what it must be."""
