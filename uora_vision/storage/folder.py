"""An adapter on disk: written so that a crash at any moment leaves a whole one, read so that damage is an error.

`adapter_model.safetensors` holds everything, its description as metadata; `adapter_config.json` is a copy of the
description for people and hubs. So either file may be older than the other, as after a save that was interrupted.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import stat
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..errors import ConfigError, FormatError, OptionError
from ..maths.draws import on_cpu
from . import schema
from .schema import FORMAT, FORMAT_VERSION, shortened
from .stored import Stored
from .strict_json import parse
from .version2 import from_v2

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"

CHECKSUM = "sha256"

STALE = 3600
"""Seconds after which an unfinished file is one of a process that was killed."""

_PENDING = "0" * 64


@on_cpu
def read_folder(folder: str | os.PathLike[str]) -> Stored:
    """A saved adapter, with everything checked that can be checked without a model. Nothing is unpickled.

    Raises:
        FormatError: a file is missing, damaged, or of another version.
        ConfigError, OptionError: see `folder_path`.
    """
    source = folder_path(folder)
    content = content_of(source / TENSOR_FILE)
    header, metadata = _header(source / TENSOR_FILE, content)
    if _is_old(metadata):
        return from_v2(source, _read_json(source / CONFIG_FILE), tensors_of(source / TENSOR_FILE, content), metadata)
    if metadata.get("format") != FORMAT or "config" not in metadata:
        raise FormatError(f"{source / TENSOR_FILE} is not an adapter of uora_vision")
    try:
        config = parse(metadata["config"])
        if not isinstance(config, dict):
            raise FormatError("its configuration is not an object")
        check_version(source, config)
        if metadata[CHECKSUM] != _checksum(header, metadata, content):
            raise FormatError("its checksum is not that of its content: it was truncated, edited or otherwise changed")
        adapter = schema.from_config(config, tensors_of(source / TENSOR_FILE, content))
    except FormatError as error:
        raise _damaged(source / TENSOR_FILE, error) from error
    _check_copy(source / CONFIG_FILE)
    return adapter


@on_cpu
def write_folder(adapter: Stored, folder: str | os.PathLike[str]) -> Path:
    """Write an adapter into a folder, over one that is there.

    Each file is replaced as a whole once it is completely on disk. A process that is killed, a full disk and another
    process that writes to the folder leave an adapter that loads: the old one or a new one.

    Raises:
        FormatError: the adapter could not be read again.
        ConfigError, OptionError: see `folder_path`.
        OSError: the folder cannot be written to.
    """
    target = folder_path(folder)
    config, tensors = schema.to_config(adapter), schema.to_tensors(adapter)
    schema.from_config(config, tensors)
    target.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    text = json.dumps(config, separators=(",", ":"), sort_keys=True, allow_nan=False)
    write_atomically(
        target / TENSOR_FILE, _seal(to_bytes(tensors, {"format": FORMAT, "config": text, CHECKSUM: _PENDING}))
    )
    copy = {**config, CHECKSUM: _config_checksum(config)}
    write_atomically(target / CONFIG_FILE, _lines(copy).encode())
    return target


def folder_path(folder: str | os.PathLike[str]) -> Path:
    """A folder that somebody names.

    Raises:
        OptionError: it is no path.
        ConfigError: no folder can be called so.
    """
    if not isinstance(folder, str | os.PathLike):
        raise OptionError(f"a folder is given as a string or a path, got {folder!r:.60}")
    name = os.fspath(folder)
    if not isinstance(name, str):
        raise OptionError(f"a folder is given as a string or a path of strings, got {folder!r:.60}")
    try:
        named = bool(name) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise ConfigError(f"no folder can be called {name!r:.60}; it is empty, or holds characters that no name has")
    return Path(folder)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment, also after a crash, it is either the old one or the new one, whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is on disk only when the folder is
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def _umask() -> int:
    """What the user wants new files not to be; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def check_version(source: Path, config: dict[str, Any]) -> None:
    """Whether a configuration is one that is read here.

    Raises:
        FormatError: it is of another library, or of a newer version.
    """
    if config.get("format") != FORMAT:
        raise FormatError(f"{source} is not an adapter of uora_vision")
    version = config.get("format_version")
    if type(version) is not int or not 2 <= version <= FORMAT_VERSION:
        raise FormatError(
            f"{source} has format version {shortened(version)}; this uora_vision reads 2 to {FORMAT_VERSION}. Use the "
            "version that wrote it, or a newer one"
        )


def _is_old(metadata: dict[str, str]) -> bool:
    return metadata.get("format") == FORMAT and "config" in metadata and CHECKSUM not in metadata


def _check_copy(path: Path) -> None:
    """The copy of the description may be missing or of an earlier save; it must not have been edited."""
    if not path.exists():
        return
    config = _read_json(path)
    if config["format_version"] == 2:
        return
    claimed = config.pop(CHECKSUM, None)
    if claimed != _config_checksum(config):
        raise _damaged(
            path,
            f"its checksum is not that of its content, so it was edited or is damaged; it is a copy of what is in "
            f"{TENSOR_FILE}, and may be deleted",
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = parse(content_of(path))
    except FormatError as error:
        raise _damaged(path, error) from error
    if not isinstance(config, dict):
        raise FormatError(f"{path} is not an adapter of uora_vision")
    check_version(path, config)
    return config


def content_of(path: Path) -> bytes:
    """What is in a regular file.

    Raises:
        FormatError: it is none, or cannot be read.
    """
    try:
        # A pipe would make open() wait for a writer, and a device has no end.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FormatError(f"{path} is no regular file")
            return file.read()
    except FileNotFoundError as error:
        raise _missing(path) from error
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error})") from error


def _header(path: Path, content: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The header of a safetensors file without its metadata, and the metadata."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        if not 0 < length <= len(content) - 8:
            raise FormatError(f"a header of {length:,} bytes is announced in a file of {len(content):,}")
        header = parse(content[8 : 8 + length])
        if not isinstance(header, dict):
            raise FormatError("its header is no object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise FormatError("its metadata are not strings")
    except (FormatError, struct.error) as error:
        raise FormatError(f"{path} is truncated, damaged, or no safetensors file: {error}") from error
    return header, metadata


def tensors_of(path: Path, content: bytes) -> dict[str, Tensor]:
    """The tensors in the content of a safetensors file.

    Raises:
        FormatError: it is none.
    """
    try:
        tensors = from_bytes(content)
    except (SafetensorError, ValueError, TypeError, RuntimeError, KeyError, OverflowError) as error:
        raise FormatError(f"{path} is truncated, damaged, or no safetensors file: {error}") from error
    for name, t in tensors.items():
        if t.dtype not in _DTYPES:
            raise FormatError(f"{path} is damaged: {shortened(name)} is of {t.dtype}")
    return tensors


_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip


def _seal(content: bytes) -> bytes:
    """Put the checksum into the header, in the place that was left for it."""
    header, metadata = _header(Path(TENSOR_FILE), content)
    end = 8 + struct.unpack("<Q", content[:8])[0]
    before, place, after = content[:end].partition(f'"{CHECKSUM}":"{_PENDING}"'.encode())
    assert place
    return (
        before + place.replace(_PENDING.encode(), _checksum(header, metadata, content).encode()) + after + content[end:]
    )


def _checksum(header: dict[str, Any], metadata: dict[str, str], content: bytes) -> str:
    """Of everything in a tensor file but the checksum itself."""
    rest = {name: value for name, value in metadata.items() if name != CHECKSUM}
    digest = hashlib.sha256(json.dumps([header, rest], sort_keys=True).encode())
    digest.update(memoryview(content)[8 + struct.unpack("<Q", content[:8])[0] :])
    return digest.hexdigest()


def _lines(config: dict[str, Any]) -> str:
    """JSON with a line for each field, and for each projection."""
    fields = []
    for name, value in config.items():
        text = json.dumps(value)
        if name == "projections":
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        fields.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _config_checksum(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _sweep(folder: Path) -> None:
    """Remove the unfinished files of processes that were killed a while ago."""
    for name in (CONFIG_FILE, TENSOR_FILE):
        for path in folder.glob(f".{name}.*"):
            try:
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()
            except OSError:
                continue  # another process was faster, or it is not ours to remove


def near(folder: Path) -> str:
    """Of a folder that does not exist, the end of a sentence that names one which does."""
    try:
        names = [] if folder.exists() else [p.name for p in folder.parent.iterdir() if p.is_dir()]
    except OSError:
        return ""
    found = difflib.get_close_matches(folder.name, names, 1)
    return f"; did you mean {folder.parent / found[0]}?" if found else ""


def _missing(path: Path) -> FormatError:
    what = f"an adapter is a folder with {CONFIG_FILE} and {TENSOR_FILE}"
    return FormatError(f"{path} does not exist; {what}{near(path.parent)}")


def _damaged(path: Path, error: object) -> FormatError:
    text = str(error)
    return FormatError(text if text.startswith(str(path.parent)) else f"{path} is damaged: {text}")


def upgrade(folder: str | os.PathLike[str]) -> bool:
    """Rewrite an adapter of an earlier format version, in place: at any moment there is one that loads.

    It gets neither block numbers nor fingerprints, since those need the model; `load` and `save` bring them.

    Returns:
        Whether there was anything to do.

    Raises:
        FormatError: the adapter cannot be read.
        ConfigError, OptionError: this can be no folder.
        OSError: the folder cannot be written to.

    Example:
        >>> import tempfile, uora_vision as uora
        >>> from torch import nn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = uora.save(uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4), folder)
        ...     uora.upgrade(folder)  # it is of the present version
        False
    """
    adapter = read_folder(folder)
    if adapter.trained is not None:
        return False
    write_folder(adapter, folder)
    return True
