"""An adapter folder in PEFT's own layout, and what PEFT can adapt of a model. Nothing here imports PEFT.

Checked against PEFT 0.21.2.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ..errors import ExportError
from ..lifecycle.adapter import Adapter
from ..lifecycle.library import adapters_in, library_of
from ..lifecycle.trained_parts import STATISTICS, trained_tensors
from ..storage.base import published_name
from ..storage.folder import CONFIG_FILE, TENSOR_FILE, folder_path, write_atomically
from ..structure.candidates import is_read
from ..structure.checks import check_whole
from ..structure.row_order import forward_source
from ..structure.survey import Survey
from ..structure.targets import Projection
from ..weights.kinds import base_class, call_form
from ..weights.quantised import is_quantised

PREFIX = "base_model.model."
"""Before every name in PEFT's files."""


@dataclass(frozen=True)
class AdaptedWeight:
    """An adapted weight.

    Args:
        projection: where it is.
        module: that holds it.
        adapter: its vectors.
    """

    projection: Projection
    module: nn.Module
    adapter: Adapter

    @property
    def path(self) -> str:
        return self.projection.path

    @property
    def dtype(self) -> torch.dtype:
        """In which factors of its dW are written: float32, or float64 for such a base."""
        weight = self.module._parameters[self.projection.tensor]
        assert weight is not None
        return torch.float32 if is_quantised(weight) else torch.promote_types(torch.float32, weight.dtype)


def adapted_weights(model: nn.Module) -> list[AdaptedWeight]:
    """What the active adapter adapts.

    Raises:
        StateError: there is none, or the model is spread over processes.
    """
    survey = Survey(model)
    check_whole(survey)
    library, found = library_of(model), adapters_in(survey)
    placement = library.entries[library.active or ""].placement
    return [AdaptedWeight(p, m, found[p.path]) for p, m in zip(placement.projections, placement.modules, strict=True)]


def check_expressible(model: nn.Module, weights: list[AdaptedWeight], method: str) -> None:
    """Whether PEFT computes with an adapter of every weight.

    Args:
        method: `LoRA` or `VeRA`.

    Raises:
        ExportError: it does not; names the weights, and says why.
    """
    modules = dict(model.named_modules())
    holders: dict[nn.Module, int] = {}
    for parent in modules.values():
        for child in parent._modules.values():
            if child is not None:
                holders[child] = holders.get(child, 0) + 1
    reasons: dict[str, list[str]] = {}
    for w in weights:
        reason = _reason(w, modules, method)
        if reason is None and holders.get(w.module, 0) > 1:
            reason = "its layer is in the model under several names, and PEFT would adapt the first alone"
        if reason is not None:
            reasons.setdefault(reason, []).append(w.path)
    if reasons:
        shown = "; ".join(f"{_list(paths)}: {reason}" for reason, paths in reasons.items())
        raise ExportError(
            f"PEFT's {method} cannot express this adapter. {shown}. merge() the model and hand on its state dict "
            "instead, or exclude= these weights when you train."
        )


def in_attention(w: AdaptedWeight) -> bool:
    """Whether a weight is one that PEFT's LoRA adapts with the whole nn.MultiheadAttention that it is in."""
    return w.projection.tensor == "in_proj_weight"


def _reason(w: AdaptedWeight, modules: Mapping[str, nn.Module], method: str) -> str | None:
    p, module = w.projection, w.module
    if method == "LoRA" and in_attention(w):
        return _attention_reason(p.module_path, modules)
    if p.tensor != "weight":
        return "a tensor of its own, not the weight of a layer that PEFT replaces"
    if not p.module_path:
        return "the model itself is this layer"
    if p.read and isinstance(modules[_above(p.module_path)], nn.MultiheadAttention):
        return "PEFT adds the update of an attention's out_proj twice (github.com/huggingface/peft/pull/3774)"
    if method == "LoRA" and p.path.rpartition(".")[2] in _RENAMED and _is_mixture(modules[""]):
        return (
            "PEFT renames targets of that name in a mixture of experts, and leaves the layer out (its "
            "utils/transformers_weight_conversion.py)"
        )
    if p.read and not _computes_linear(p.module_path, modules):
        return (
            "the model reads this weight, or may, without calling its layer; PEFT's layer would be passed by and "
            "change nothing (inject with example_input= if the layer is called)"
        )
    if isinstance(module, nn.Linear) or p.form == "transposed":
        return None
    if method == "VeRA":
        return "PEFT's VeRA adapts Linear layers alone"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups > 1 or max(module.dilation) > 1 or module.padding_mode != "zeros":
            return "PEFT's convolutions know neither groups nor dilation nor another padding than zeros"
        return None
    return f"PEFT does not adapt {base_class(module).__name__}"


def _computes_linear(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a Linear whose forward is its own (Falcon's) is called, and computes what a Linear does."""
    module = modules[path]
    if not isinstance(module, nn.Linear) or call_form(module) is not None or is_read(path, dict(modules)):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, module.in_features, generator=generator, device="cpu").to(module.weight)
    with torch.no_grad():
        return torch.allclose(module(x), nn.functional.linear(x, module.weight, module.bias), rtol=1e-3, atol=1e-5)


_RENAMED = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def _is_mixture(model: nn.Module) -> bool:
    """Whether a model of transformers holds stacks of experts."""
    of_transformers = hasattr(getattr(model, "config", None), "model_type")
    return of_transformers and any(p.dim() == 3 and "experts" in name for name, p in model.named_parameters())


def _attention_reason(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    module = modules[path]
    if not isinstance(module, nn.MultiheadAttention):
        return f"in {base_class(module).__name__}, of which PEFT adapts only the layers that are called"
    if not path:
        return "the model itself is this layer"
    if module._parameters["in_proj_weight"] is None:
        return "PEFT adapts nn.MultiheadAttention only where q, k and v have one width"
    above = path
    while above:
        above = _above(above)
        source = forward_source(base_class(modules[above]))
        if not source or "in_proj_weight" in source:
            name = base_class(modules[above]).__name__
            return f"{name} above it takes its weights for torch's fast path, past PEFT's layer"
    return None


def written_parts(model: nn.Module, targets: Iterable[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The trained parts of the base (the head, norms, biases) as PEFT stores them.

    Modules without adapters go along whole, as `modules_to_save`; biases of adapted layers as with `bias="all"`.

    Args:
        targets: paths of the layers that PEFT replaces.

    Returns:
        The fields of PEFT's configuration, and the tensors by their names there.

    Raises:
        ExportError: PEFT cannot take one of them.
    """
    library, targets = library_of(model), sorted(targets)
    entry = library.entries[library.active or ""]
    parts = {**entry.parts, **trained_tensors(Survey(model))}
    still = [
        n for n, t in library.base_parts.items() if n.endswith(STATISTICS) and n in parts and torch.equal(parts[n], t)
    ]
    parts = {name: t for name, t in parts.items() if name not in still}
    tensors: dict[str, Tensor] = {}
    owners = set()
    for name, t in parts.items():
        owner, _, key = name.rpartition(".")
        if owner and not any(_inside(target, owner) or _inside(owner, target) for target in targets):
            owners.add(owner)
        elif "bias" in key:
            at = f"{owner}.base_layer" if owner in targets else owner
            tensors[f"{PREFIX}{at}.{key}" if at else f"{PREFIX}{key}"] = t
        else:
            raise ExportError(f"{name} was trained too, and PEFT cannot take it: adapted layers are in the same module")
    bias = "all" if tensors else "none"
    owners = {o for o in owners if not any(_inside(o, other) for other in owners if other != o)}
    saved = [key for key, _ in model.named_modules(remove_duplicate=False) if any(key.endswith(o) for o in owners)]
    for key in saved:
        # PEFT takes every module whose name ends in a given one, and adapts nothing in modules of such a name.
        caught = [t for t in targets if _inside(t, key) or re.match(rf"(^|.*\.){key}($|\..*)", t)]
        nested = [o for o in saved if o != key and _inside(o, key)]
        if caught or nested:
            raise ExportError(
                f"{key} was trained too, and PEFT's modules_to_save would catch {(caught + nested)[0]} with it"
            )
        module = model.get_submodule(key)
        tensors |= {f"{PREFIX}{key}.{k}": t for k, t in module.state_dict().items()}
    return {"modules_to_save": sorted(owners) or None, "bias": bias}, tensors


def target_modules(model: nn.Module, targets: list[str]) -> list[str] | str:
    """For PEFT's configuration: paths, or a pattern where the end of another module's path is one of them."""
    paths = [path for path, _ in model.named_modules()]
    if any(path.endswith(f".{t}") for path in paths for t in targets):
        return "|".join(re.escape(t) for t in targets)
    return targets


def write(model: nn.Module, folder: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """Write the two files.

    Returns:
        Their size in bytes.

    Raises:
        ExportError: a value is not finite.
        ConfigError, OptionError: this can be no folder.
        OSError: the folder cannot be written to.
    """
    broken = [name for name, t in tensors.items() if not t.isfinite().all()]
    if broken:
        raise ExportError(f"{broken[0]} holds NaN or infinite values; nothing was written")
    target = folder_path(folder)
    target.mkdir(parents=True, exist_ok=True)
    common = {"base_model_name_or_path": published_name(model), "task_type": None, "inference_mode": True}
    text = json.dumps({**common, **config}, indent=2)
    content = to_bytes({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, {"format": "pt"})
    write_atomically(target / TENSOR_FILE, content)
    write_atomically(target / CONFIG_FILE, text.encode())
    return len(content) + len(text)


def _above(path: str) -> str:
    return path.rpartition(".")[0]


def _inside(path: str, other: str) -> bool:
    """Whether a module is another one, or in it."""
    return path == other or path.startswith(f"{other}.") or not other


def _list(paths: list[str]) -> str:
    return ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
