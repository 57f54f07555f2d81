"""Damages headers and descriptions of saved adapters at random, and reads them: for a night, not for every test run.

    python scripts/fuzz.py --cases 1000000          # some twenty minutes of one core
    python scripts/fuzz.py --start 400000           # goes on where an earlier run with the same seed was stopped

Every case follows from the seed and its number. Whatever is read fits a model or is refused by an error of the library,
needs no more than 64 MiB beyond the file, and leaves the model alone; a case that breaks this ends the run, named.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import typer

JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**70), 0.5, -1e308, "", "x", "\x00", "\ud800", "A16:0", "../../x",
    "9" * 400, [], [[]], [0], [-1], [10**9], ["x", "x"], {}, {"": {}}, {"A16:0": [0]}, {"A16:0": [-1]},
)  # fmt: skip
Place = tuple[Any, ...]
ABOUT = {
    "task": "image-classification", "model": "timm/vit_tiny_patch16_224", "input_size": [3, 32, 32], "mean": [0.5] * 3,
    "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9,
}  # fmt: skip


class Sample(NamedTuple):
    """A whole adapter to damage: its description, its tensors, and its file."""

    config: dict[str, Any]
    tensors: dict[str, Any]
    content: bytes


def main(
    cases: Annotated[int, typer.Option(min=1, help="how many variants to read")] = 100_000,
    start: Annotated[int, typer.Option(min=0, help="number of the first one")] = 0,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
) -> None:
    import torch
    from rich.progress import track

    from uora_vision.errors import FormatError, StateError, TargetError
    from uora_vision.storage import folder, schema
    from uora_vision.storage.base import Base
    from uora_vision.storage.fit import fit
    from uora_vision.storage.strict_json import parse

    torch.set_num_threads(1)
    whole, model = samples()
    base, before = Base(model), {name: t.clone() for name, t in model.state_dict().items()}
    found, began, limit = Counter[str](), time.monotonic(), 0
    for number in track(range(start, start + cases), description="reading"):
        rng = random.Random(f"{seed}/{number}")
        sample = rng.choice(whole)
        kind = rng.choice(("header", "bytes", "description", "tensors"))
        try:
            if kind in ("header", "bytes"):
                content = (in_header if kind == "header" else in_bytes)(sample.content, rng)
                _, metadata = folder._header(folder.Path("case"), content)
                tensors, config = folder.tensors_of(folder.Path("case"), content), parse(metadata.get("config", "{}"))
            else:
                config, tensors = copy.deepcopy(sample.config), dict(sample.tensors)
                (in_description if kind == "description" else in_tensors)(config, tensors, rng)
                config = parse(json.dumps(config, allow_nan=True).encode("utf-8", "surrogatepass"))
            if not isinstance(config, dict):
                raise FormatError("its configuration is not an object")
            folder.check_version(folder.Path("case"), config)
            stored = schema.from_config(config, tensors)
            fit(stored, base, check_base=False)
            found[f"{kind}: read"] += 1
        except (FormatError, StateError, TargetError):
            found[f"{kind}: refused"] += 1
        except BaseException:
            print(f"\ncase {number} of seed {seed} ({kind}) raised:")
            raise
        limit = limit or (_peak() + 64 * 2**20 if number > start + 200 else 0)
        if limit and _peak() > limit:
            raise SystemExit(f"case {number} of seed {seed} ({kind}) took memory up to {_peak() / 2**20:.0f} MiB")
        if number % 5000 == 0 and any(not t.equal(before[name]) for name, t in model.state_dict().items()):
            raise SystemExit(f"the model changed before case {number} of seed {seed}")
    seconds = time.monotonic() - began
    print(f"{cases:,} cases in {seconds:.0f} s: " + "; ".join(f"{name} {n:,}" for name, n in sorted(found.items())))


def samples() -> tuple[list[Sample], Any]:
    """Adapters with redraws of both kinds, with informed rows and with what predicting needs, and a model for all."""
    import torch
    from safetensors.torch import save as to_bytes
    from torch import nn

    import uora_vision as uora
    from uora_vision.storage import schema
    from uora_vision.storage.folder import read_folder

    def made() -> nn.Module:
        torch.manual_seed(0)
        blocks = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2)]
        return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(48, 3))

    whole = []
    for kind in ("plain", "shared", "layer", "informed"):
        model = uora.inject(made(), rank=4, train=("3",))
        if kind == "informed":
            uora.inform(model, [(torch.randn(8, 3, 16), torch.arange(8) % 3)])
        for adapter in uora.adapters(model).values():
            nn.init.normal_(adapter.b)
            nn.init.normal_(adapter.d)
        if kind in ("shared", "layer"):
            uora.Reinitializer(model, threshold=0.3, scope=kind).step()  # type: ignore[arg-type]
        about = {} if kind == "shared" else {"labels": ["a", "b", "c"], "preprocessing": ABOUT}
        with tempfile.TemporaryDirectory() as place:
            uora.save(model, place, save_banks="changed" if kind == "layer" else None, **about)  # type: ignore[arg-type]
            stored = read_folder(place)
        config, tensors = schema.to_config(stored), schema.to_tensors(stored)
        metadata = {"format": schema.FORMAT, "config": json.dumps(config)}
        whole.append(Sample(config, tensors, to_bytes(tensors, metadata)))
    return whole, made()


def in_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, removed, inserted or cut, mostly where the header is."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) if rng.random() < 0.3 else min(len(data), 3000)) if data else 0
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.choice((1, 8, 100))]
            case 2:
                data[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
            case 3:
                data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**20, 2**40, 2**63)))
            case _:
                del data[at:]
    return bytes(data)


def in_header(content: bytes, rng: random.Random) -> bytes:
    """Characters of the header replaced by some of JSON's, with the length put right."""
    (length,) = struct.unpack("<Q", content[:8])
    header = bytearray(content[8 : 8 + length])
    for _ in range(rng.choice((1, 2, 4))):
        at = rng.randrange(len(header))
        header[at : at + rng.randrange(3)] = rng.choice((b"0", b"9", b"-", b'"', b"{", b"]", b",", b"e", b"\\u0000"))
    return struct.pack("<Q", len(header)) + bytes(header) + content[8 + length :]


def in_description(config: dict[str, Any], _: dict[str, Any], rng: random.Random) -> None:
    """Fields replaced by junk or by each other, removed, or doubled under another name."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.choice(list(places(config)))
        holder = _at(config, at[:-1])
        match rng.randrange(4):
            case 0:
                del holder[at[-1]]
            case 1:
                holder[at[-1]] = copy.deepcopy(_at(config, rng.choice(list(places(config)))))
            case 2 if isinstance(holder, dict):
                holder[rng.choice(("x", "labels", "roundings", "rows", "trained", "origin"))] = rng.choice(JUNK)
            case _:
                old = holder[at[-1]]
                near = [old + 1, old - 1, old * 2**20] if type(old) is int else []
                holder[at[-1]] = rng.choice([*JUNK, *near])
        if not config:
            return


def in_tensors(_: dict[str, Any], tensors: dict[str, Any], rng: random.Random) -> None:
    """Tensors of another type, shape or name, with other values, missing or doubled."""
    import torch

    for _ in range(rng.choice((1, 1, 2))):
        if not tensors:
            return
        name = rng.choice(list(tensors))
        t = tensors[name]
        match rng.randrange(6):
            case 0:
                del tensors[name]
            case 1:
                tensors[rng.choice(("x", "base/", "base/x", "rows/x", "labels/x", "base/0.linear1.weight"))] = t
            case 2:
                kinds = (torch.float64, torch.float16, torch.int8, torch.int32, torch.int64, torch.bool, torch.uint8)
                tensors[name] = t.to(rng.choice(kinds))
            case 3:
                tensors[name] = rng.choice((t.flatten()[:-1], t[None], t.flatten(), t.repeat(2, *[1] * (t.dim() - 1))))
            case _ if t.numel():
                values = (0, 1, -1, 2**31 - 1, -(2**31), float("nan"), float("inf"), 1e38)
                value = rng.choice(
                    values if t.is_floating_point() else values[:5] if t.dtype == torch.int32 else (0, 1)
                )
                tensors[name] = t.clone()
                tensors[name].view(-1)[rng.randrange(t.numel())] = value


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Where something stands in a description."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


def _at(value: Any, at: Place) -> Any:
    for key in at:
        value = value[key]
    return value


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    typer.run(main)
