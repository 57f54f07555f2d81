"""An image, as it is kept, as the pixels that a person sees."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import DataError

Item = np.ndarray | Path | bytes | Callable[[], Image.Image]
"""An image: an array (h, w, 3) of uint8, a path, the encoded bytes, or what gives a PIL image when called."""


def pixels(item: Item, name: str) -> np.ndarray:
    """(h, w, 3) uint8, RGB; turned as its EXIF data say, and of 16 bits the upper 8.

    Args:
        name: what to call an image that has no path.

    Raises:
        DataError: it cannot be read.
    """
    if isinstance(item, np.ndarray):
        return item
    try:
        if callable(item):
            return _rgb(item())
        with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item) as image:
            return _rgb(image)
    except Exception as error:  # PIL's decoders raise types of their own, SyntaxError and struct.error among them
        raise DataError(f"cannot read {item if isinstance(item, Path) else name}: {_reason(error)}") from error


def inspect(item: Item) -> tuple[str, str | None]:
    """A digest of an image's content, and why it cannot be read; None where it can, to its last pixel."""
    if isinstance(item, np.ndarray):
        return _digest(np.ascontiguousarray(item).data), None
    try:
        if callable(item):
            return _digest(np.ascontiguousarray(_rgb(item())).data), None
        content = item if isinstance(item, bytes) else item.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (1, 1))  # a JPEG is read to its end, but not computed in full size
            _rgb(image)
        return _digest(content), None
    except Exception as error:
        return "", _reason(error)


def _rgb(image: Image.Image) -> np.ndarray:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        values = np.asarray(upright).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 0xFFFF:
            raise ValueError("it has grey values beyond 16 bits; save it with 8 or 16")
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    if upright.mode == "F":
        raise ValueError("its grey values are fractions, of a range that nothing tells; save it with 8 or 16 bits")
    return np.asarray(upright.convert("RGB"))


def _digest(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
