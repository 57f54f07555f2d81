"""An adapter as a folder: `adapter_config.json` and `adapter_model.safetensors`.

The tensors are b and d of every role (`vectors/blocks.0.attn.qkv/q.b`), the trained parts of the base
(`base/head.weight`) and the log of redraws. A and B are not in the file: seed and log rebuild them.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from .bank import pack_log, unpack_log
from .checks import check_weights, plain
from .config import UoraConfig
from .errors import FormatError, StateError
from .inject import adapters, apply_plan, bank_of, check_whole, is_injected, remove
from .layers import Adapter, Role
from .plan import Plan, Projection
from .sharded import class_name, whole, writes
from .sites import Site, find_sites
from .views import disjoint
from .walker import head_names

FORMAT = "uora_vision"
FORMAT_VERSION = 2
STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")
CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"


def save(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the adapter and the trained parts of the base into a folder.

    Each file is replaced as a whole once it is completely on disk, so an interrupted save leaves the last one.

    Of a model that `fully_shard` spreads over processes, all of them must call this: their shards are gathered, and the
    first process alone writes.

    Returns:
        The folder.

    Raises:
        StateError: the model is not injected.
        FormatError: a trained value is NaN or infinite.
    """
    found, bank = adapters(model), bank_of(model)
    log, matrices = pack_log(bank.log)
    tensors = {f"log/{name}": t for name, t in log.items()} | changing_tensors(model)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise FormatError(
                f"{name} is not finite: the training has diverged, and this would not be a usable adapter"
            )
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base": {
            "class": class_name(model),
            "architecture": _architecture(model),
            "parameter_tensors": _parameter_tensors(model),
        },
        "config": bank.config.to_dict(),
        "projections": [
            {
                "path": path,
                "in": adapter.width,
                "roles": [asdict(role) for role in adapter.roles],
            }
            for path, adapter in found.items()
        ],
        "versions": {"torch": torch.__version__},
    }
    target = Path(folder)
    if not writes(list(model.parameters())):
        return target
    target.mkdir(parents=True, exist_ok=True)
    # All that changes between the checkpoints of one run goes into one file, so a crash between the two does no harm.
    metadata = {"format": FORMAT, "matrices": json.dumps(matrices), "config": json.dumps(config["config"])}
    write_atomically(target / TENSOR_FILE, to_bytes(tensors, metadata=metadata))
    write_atomically(target / CONFIG_FILE, (json.dumps(config, indent=1) + "\n").encode())
    return target


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Inject a saved adapter into a plain base, in place; everything is checked before the model is touched.

    Returns:
        The same model, with the trained parts of the base (the head) restored too.

    Raises:
        StateError: the model already has an adapter, or is spread over processes.
        FormatError: a file is missing, damaged, of a newer version, or does not fit this model.
    """
    if is_injected(model):
        raise StateError("this model already has an adapter; merge() or remove() it before loading another")
    check_whole(model)
    source = Path(folder)
    config = _read_config(source / CONFIG_FILE)
    tensors, metadata = read_tensors(source / TENSOR_FILE)
    try:
        if json.loads(metadata["config"]) != config["config"]:
            raise FormatError("its two files are of different adapters, as after a save that was interrupted")
        options = UoraConfig(**config["config"])
        saved = tuple(_saved(entry) for entry in config["projections"])
        log = unpack_log({n: tensors.pop(f"log/{n}") for n in ("entries", "alpha")}, json.loads(metadata["matrices"]))
    except FormatError as error:
        raise FormatError(f"{source} is damaged: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{source} is damaged: {error!r}") from error
    base = {name.removeprefix("base/"): tensors.pop(name) for name in list(tensors) if name.startswith("base/")}
    sites = {site.path: site for site in find_sites(plain(model))}
    projections = tuple(
        Projection(s.module_path, s.tensor, s.form, s.shape, entry.roles, "saved", None, s.read)
        for entry in saved if entry.path in sites for s in [sites[entry.path]]
    )  # fmt: skip
    check_weights(model, projections)
    _check_fit(model, sites, source, config, saved, base)
    _check_vectors(source, saved, tensors, options.rank)

    apply_plan(model, Plan(options, projections, ()))
    try:
        found = adapters(model)
        bank_of(model).replay(log, own_matrices(found))
        refresh_own(found)
    except BaseException:
        remove(model)
        raise
    with torch.no_grad():
        for path, adapter in found.items():
            adapter.b.copy_(torch.cat([tensors[f"vectors/{path}/{r.name}.b"] for r in adapter.roles]))
            adapter.d.copy_(torch.stack([tensors[f"vectors/{path}/{r.name}.d"] for r in adapter.roles]))
        held = _held(model)
        for name, value in base.items():
            held[name].copy_(value)
            if isinstance(held[name], nn.Parameter):
                held[name].requires_grad_(True)
    return model


def changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by its name in the file: views of the vectors, and the base's trained parts.

    Of a sharded model they are copies, gathered: every process must ask for them.
    """
    found = adapters(model)
    tensors: dict[str, Tensor] = {}
    for path, adapter in found.items():
        d, b = whole(adapter.d), whole(adapter.b).split([r.rows for r in adapter.roles])
        for k, role in enumerate(adapter.roles):
            tensors[f"vectors/{path}/{role.name}.b"] = b[k]
            tensors[f"vectors/{path}/{role.name}.d"] = d[k]
    vectors = {id(p) for adapter in found.values() for p in adapter.parameters()}
    base: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in vectors}
    # A frozen BatchNorm in training mode still moves its statistics, and the adapter was trained with them.
    base |= {name: t for name, t in model.named_buffers() if name.endswith(STATISTICS)}
    return tensors | {f"base/{name}": whole(t) for name, t in base.items()}


def _held(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def own_matrices(found: dict[str, Adapter]) -> dict[str, tuple[str, int]]:
    """For every matrix that a layer may have of its own: the shared one that it starts from, and its width."""
    out = {}
    for adapter in found.values():
        for k, role in enumerate(adapter.roles):
            out[adapter.own_name(k, "A")] = (adapter.bank.matrix("A", adapter.width), adapter.width)
            out[adapter.own_name(k, "B")] = (adapter.bank.matrix("B", role.rows), role.rows)
    return out


def refresh_own(found: dict[str, Adapter]) -> None:
    """Let the adapters take over their own rows, as the bank's log has them."""
    for adapter in found.values():
        adapter.drop_own()
        for k in range(len(adapter.roles)):
            if adapter.bank.draws(adapter.own_name(k, "A")).any():
                adapter.refresh_own(k)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment, also after a crash, it is either the old one or the new one, whole."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class _Saved:
    """An adapted weight as the configuration has it."""

    path: str
    width: int
    roles: tuple[Role, ...]

    @property
    def rows(self) -> int:
        """How many rows the weight must have."""
        return max((role.span.end for role in self.roles), default=0)


def _saved(entry: dict[str, Any]) -> _Saved:
    path, width = entry["path"], entry["in"]
    roles = tuple(Role(**role) for role in entry["roles"])
    numbers = [width, *(n for r in roles for n in (r.start, r.rows, r.block, r.stride))]
    names = [path, *(n for r in roles for n in (r.name, r.group))]
    if not roles or not all(isinstance(n, str) for n in names) or not all(type(n) is int and n >= 0 for n in numbers):
        raise FormatError(f"{entry} is no projection")
    if any(r.rows < 1 or (r.block and (r.rows % r.block or r.stride < r.block)) for r in roles):
        raise FormatError(f"{path} cannot have {roles}")
    if not disjoint([role.span for role in roles]):
        raise FormatError(f"the roles of {path} share rows")
    return _Saved(path, width, roles)


def _parameter_tensors(model: nn.Module) -> int:
    """How many parameters the base has besides its head: the same for any image size and number of classes."""
    vectors = {id(p) for m in model.modules() if isinstance(m, Adapter) for p in m.parameters()}
    heads = head_names(model)
    names = [name for name, p in model.named_parameters() if id(p) not in vectors]
    return sum(not any(name.startswith(head + ".") for head in heads) for name in names)


def _architecture(model: nn.Module) -> str | None:
    config = getattr(model, "pretrained_cfg", None)
    return config.get("architecture") if isinstance(config, dict) else None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FormatError(
            f"{path} does not exist; an adapter is a folder with {CONFIG_FILE} and {TENSOR_FILE}"
        ) from error
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON ({error}); the file is damaged") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise FormatError(f"{path} is not an adapter of uora_vision")
    if config.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {config.get('format_version')!r}; this uora_vision reads {FORMAT_VERSION}. "
            "Use the version that wrote it, or a newer one."
        )
    return config


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise FormatError(
            f"{path} does not exist; an adapter is a folder with {CONFIG_FILE} and {TENSOR_FILE}"
        ) from error
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read ({error}); the file is truncated or damaged") from error
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise FormatError(f"{path} holds NaN or infinite values in {name}; nothing was loaded")
    return tensors, metadata


def _check_fit(
    model: nn.Module,
    sites: dict[str, Site],
    source: Path,
    config: dict[str, Any],
    saved: tuple[_Saved, ...],
    base: dict[str, Tensor],
) -> None:
    made_for = config["base"] if isinstance(config.get("base"), dict) else {}
    what = made_for.get("architecture") or made_for.get("class")
    this = _architecture(model) or type(model).__name__
    if made_for.get("architecture") and _architecture(model) and what != this:
        raise FormatError(f"the adapter in {source} was made for {what}; this model is {this}")
    held = _held(model)
    for entry in saved:
        out, width = sites[entry.path].shape if entry.path in sites else (0, 0)
        if width != entry.width or out < entry.rows:
            here = f"{out} x {width}" if out else "not there"
            raise FormatError(
                f"the adapter in {source} was made for {what}: it adapts {entry.path}, at least {entry.rows} x "
                f"{entry.width}, which in this {type(model).__name__} is {here}. Load it into the architecture that it "
                "was trained on."
            )
    count = _parameter_tensors(model)
    if made_for.get("parameter_tensors", count) != count:
        raise FormatError(
            f"the adapter in {source} was made for a {what} of {made_for['parameter_tensors']} parameter tensors "
            f"besides the head; this {this} has {count}, so its depth or its parts are others"
        )
    for name, t in base.items():
        if name not in held or held[name].shape != t.shape:
            here = f"has shape {tuple(held[name].shape)}" if name in held else "does not exist"
            raise FormatError(
                f"the adapter in {source} holds a trained {name} of shape {tuple(t.shape)}, which in this model "
                f"{here}. Create the model with the same number of classes (num_classes=...)."
            )


def _check_vectors(source: Path, saved: tuple[_Saved, ...], tensors: dict[str, Tensor], rank: int) -> None:
    wanted = {}
    for p in saved:
        for role in p.roles:
            wanted[f"vectors/{p.path}/{role.name}.b"] = (role.rows,)
            wanted[f"vectors/{p.path}/{role.name}.d"] = (rank,)
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        raise FormatError(
            f"{source} is damaged: {odd[0]} is {'missing' if odd[0] in wanted else 'not in its configuration'}"
        )
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise FormatError(f"{source} is damaged: {name} has shape {tuple(tensors[name].shape)}, expected {shape}")
