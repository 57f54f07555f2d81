"""Adapters as PEFT's users load them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

peft = pytest.importorskip("peft")


def loaded(base: nn.Module, folder: Path) -> nn.Module:
    """As PEFT's users load an adapter; nothing of the folder may be left over or missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = peft.PeftModel.from_pretrained(base, folder)
    names = {name.replace(".default", "").replace(".modules_to_save", "") for name in model.state_dict()}
    assert not set(load_file(folder / "adapter_model.safetensors")) - names
    return model.eval()


def close(got: Tensor, want: Tensor, base: Tensor, tolerance: float = 1e-5) -> None:
    assert (want - base).abs().max() > 0.05 * want.abs().max(), "the adapter changes too little for a comparison"
    assert (got - want).abs().max() < tolerance * want.abs().max()
