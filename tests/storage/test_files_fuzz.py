"""Random damage to a real adapter: it loads to the same weights or is refused, and never changes the model."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from damage import JUNK, OLD, Target, drop, metadata_of, places, put, rewrite
from golden import DATA
from safetensors.torch import load_file

from uora_vision.storage.folder import CONFIG_FILE, TENSOR_FILE


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, overwritten, removed, inserted, doubled or cut, mostly where the header is."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        end = len(data) if rng.random() < 0.5 else min(len(data), 5000)
        at = rng.randrange(end) if end else 0
        length = min(rng.choice((1, 1, 2, 8, 100)), len(data) - at)
        what = rng.randrange(6)
        if what == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            data[at : at + length] = rng.randbytes(length)
        elif what == 2:
            del data[at : at + length]
        elif what == 3:
            data[at:at] = rng.randbytes(length)
        elif what == 4:
            data[at:at] = data[at : at + length]
        else:
            del data[at:]
    return bytes(data)


def in_header(content: bytes, rng: random.Random) -> bytes:
    """A character of the header replaced by one of JSON's, with the length put right."""
    (length,) = struct.unpack("<Q", content[:8])
    header = bytearray(content[8 : 8 + length])
    for _ in range(rng.choice((1, 2))):
        at = rng.randrange(len(header))
        header[at : at + rng.randrange(2)] = rng.choice(
            (b"0", b"9", b"-", b'"', b"{", b"]", b",", b"e", b" ", b"\\u0000")
        )
    return struct.pack("<Q", len(header)) + bytes(header) + content[8 + length :]


def fuzz(folder: Path, count: int, seed: int) -> Counter[str]:
    """`count` damaged variants of each kind; how many were refused, and how many loaded to the same weights."""
    rng, results = random.Random(seed), Counter[str]()
    described = json.loads(metadata_of(DATA / "adapter_v3")["config"])
    fields, old_fields = list(places(described)), list(places(OLD))
    names = list(load_file(DATA / "adapter_v3" / TENSOR_FILE))
    target = Target(DATA / "adapter_v3")

    def field(place: tuple[str | int, ...], value: object) -> None:
        (drop if rng.random() < 0.1 else lambda v, p: put(v, p, rng.choice(JUNK)))(value, place)

    for i in range(count):
        version = "adapter_v2" if i % 4 == 0 else "adapter_v3"
        for kind in ("tensor bytes", "config bytes", "header", "fields", "numbers"):
            shutil.copytree(DATA / version, folder, dirs_exist_ok=True)
            path = folder / (CONFIG_FILE if kind == "config bytes" else TENSOR_FILE)
            if kind == "header":
                path.write_bytes(in_header(path.read_bytes(), rng))
            elif kind.endswith("bytes"):
                path.write_bytes(mutated(path.read_bytes(), rng))
            elif version == "adapter_v2":  # nothing in it tells that a number of a vector was changed
                value = json.loads(json.dumps(OLD))
                field(rng.choice(old_fields), value)
                (folder / CONFIG_FILE).write_text(json.dumps(value))
            elif kind == "fields":  # sealed again, so that the fields themselves are looked at
                place = rng.choice(fields)
                rewrite(folder, lambda c, place=place: field(place, c))
            else:
                name = rng.choice([n for n in names if n.startswith("log/")])
                rewrite(folder, tensors=lambda t, name=name: t[name].view(-1)[rng.randrange(t[name].numel())].add_(1))
            results[f"{kind}, {target.outcome(folder, version == 'adapter_v2')}"] += 1
    return results


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is a place for that: most of the time goes into opening files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as place:
        yield Path(place) / "a"


@pytest.mark.slow
def test_a_few_hundred_damaged_adapters(folder: Path) -> None:
    """`scripts/fuzz.py` tries a million."""
    results = fuzz(folder, 60, seed=1)
    assert results.total() == 300
