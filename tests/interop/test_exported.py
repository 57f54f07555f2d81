"""A merged model is one that others can take: torch.export, ONNX, TorchScript."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import merged, small_vit, trained
from torch import Tensor

import uora_vision as uora

pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.slow
def test_onnx_runs_on_any_batch_size(images: Tensor, tmp_path: Path, reversible: bool) -> None:
    model = trained(scope="layer")
    want = model(images)
    uora.merge(model, reversible=reversible)
    path = tmp_path / "model.onnx"
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(model, (images[:2],), path, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    session = onnxruntime.InferenceSession(path)
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_torch_export_gives_the_graph_of_the_base(images: Tensor) -> None:
    model = trained()
    want = model(images)
    uora.merge(model)
    exported, base = (torch.export.export(m, (images,)) for m in (model, small_vit()))
    operations = [[n.target for n in program.graph.nodes if n.op == "call_function"] for program in (exported, base)]
    assert operations[0] == operations[1]
    torch.testing.assert_close(exported.module()(images), want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_torchscript(images: Tensor) -> None:
    model = trained()
    want = model(images)
    scripted = torch.jit.script(merged(model))
    torch.testing.assert_close(scripted(images), want, rtol=1e-5, atol=1e-5)
