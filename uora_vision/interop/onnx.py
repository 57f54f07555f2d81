"""A plain model as an ONNX file for any batch size."""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..private import tree_leaves, tree_map
from ..structure.example import call, float_tensors

EXTERNAL = 1_500_000_000
"""Bytes of weights from which on they lie beside the file, which can hold 2 GB."""


@torch.no_grad()
def to_onnx(model: nn.Module, example_input: Any, path: Path) -> float | None:
    """Write a model as ONNX, and run it.

    Args:
        model: a plain or merged one, in eval mode.
        example_input: of two samples, the first dimension of every tensor being the batch: a tensor, a tuple of
            arguments or a dict of keyword arguments.

    Returns:
        The largest difference of an output in onnxruntime, relative to the largest output, on three samples; None
        without onnxruntime.

    Raises:
        ExportError: torch cannot export the model.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = {0: torch.export.Dim("batch")}
    dynamic: Any = tree_map(lambda t: batch if isinstance(t, Tensor) else None, example_input)
    keywords = example_input if isinstance(example_input, dict) else None
    arguments = () if keywords else example_input if isinstance(example_input, tuple) else (example_input,)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                arguments,
                str(path),
                kwargs=keywords,
                dynamo=True,
                dynamic_shapes=dynamic if keywords or isinstance(dynamic, tuple) else (dynamic,),
                external_data=size > EXTERNAL,
                verbose=False,
            )
    except Exception as error:  # torch wraps whatever goes wrong in its stages
        raise ExportError(f"torch cannot export {type(model).__name__} to ONNX: {_reason(error)}") from error
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    more = tree_map(lambda t: torch.cat([t, t[:1].flip(-1)]) if isinstance(t, Tensor) else t, example_input)
    want = list(float_tensors(call(copy.deepcopy(model), more)))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = [t for t in tree_leaves(more) if isinstance(t, Tensor)]
    names = [i.name for i in session.get_inputs()]
    got = session.run(None, {name: t.numpy() for name, t in zip(names, given, strict=False)})
    got = [torch.from_numpy(g) for g in got if g.dtype.kind == "f"]
    if len(got) != len(want):
        raise ExportError(f"{path} gives {len(got)} outputs, the model {len(want)}")
    scale = max(t.abs().max().item() for t in want) or 1.0
    return max((g - w).abs().max().item() for g, w in zip(got, want, strict=True)) / scale


def _reason(error: BaseException) -> str:
    """The first line of what lies beneath."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
