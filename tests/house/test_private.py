"""The private parts of other libraries that `uora_vision.private` names: each test fails when its part goes away."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from uora_vision import private

PACKAGE = Path(private.__file__).parent


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_registries_of_modules() -> None:
    module = nn.BatchNorm1d(2)
    for name in ("_parameters", "_buffers", "_modules"):
        assert isinstance(module.__dict__[name], dict)
    assert module.weight is module._parameters["weight"]


def test_attention_seen_through_shows_its_products() -> None:
    attention, x = nn.MultiheadAttention(8, 2), torch.randn(3, 1, 8)
    arguments = (
        x, x, x, 8, 2, attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0,
        attention.out_proj.weight, attention.out_proj.bias,
    )  # fmt: skip
    whole, inside = Seen(), Seen()
    with whole:
        wanted, _ = F.multi_head_attention_forward(*arguments)
    with inside:
        got, _ = private.seen_through(F.multi_head_attention_forward)(*arguments)
    assert torch.equal(got, wanted)
    assert whole.names == ["multi_head_attention_forward"]
    assert inside.names.count("linear") == 2
    assert F.multi_head_attention_forward.__globals__["has_torch_function"] is torch.overrides.has_torch_function


def test_tensors_inside_vmap_lead_to_their_memory() -> None:
    x, seen = torch.randn(3, 2), []

    def look(row: torch.Tensor) -> torch.Tensor:
        seen.append((private.is_wrapped(row), private.unwrapped(row).data_ptr()))
        return row * 2

    torch.vmap(look)(x)
    assert seen == [(True, x.data_ptr())] and not private.is_wrapped(x)


def test_the_list_of_an_lstm() -> None:
    lstm = nn.LSTM(2, 3)
    assert len(lstm._flat_weights) == len(lstm._flat_weights_names) == 4
    private.forget_flat_weights(lstm)
    assert "_flat_weights" not in lstm.__dict__
    private.renew_flat_weights(lstm)
    assert lstm._flat_weights[0] is lstm.weight_ih_l0


def test_how_a_convolution_pads() -> None:
    convolution = nn.Conv2d(1, 1, 3, padding="same", padding_mode="reflect")
    assert list(private.pads(convolution)) == [1, 1, 1, 1]


def test_a_context_in_which_modes_see_nothing() -> None:
    with Seen() as seen, private.unseen():
        torch.ones(1).add(1)
    assert not seen.names


def test_a_hook_that_runs_before_earlier_ones() -> None:
    order: list[int] = []
    model = nn.Linear(2, 2)
    model.register_load_state_dict_pre_hook(lambda *_: order.append(1))
    handle = private.run_first(model.register_load_state_dict_pre_hook(lambda *_: order.append(2)))
    model.load_state_dict(model.state_dict())
    handle.remove()
    model.load_state_dict(model.state_dict())
    assert order == [2, 1, 1]


def test_names_that_distributed_training_does_not_send() -> None:
    assert private.TORCH_UNSENT in inspect.getsource(DistributedDataParallel)


def test_where_transformers_keeps_a_model_s_name() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    model = transformers.LlamaModel(config)
    assert private.name_or_path(model) is None and private.name_or_path(nn.Linear(1, 1)) is None
    config.name_or_path = "someone/model"
    assert private.name_or_path(model) == "someone/model"


def test_how_bitsandbytes_packs() -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import modules

    source = inspect.getsource(modules)
    assert private.BITSANDBYTES_PACKS in source and "packing_format_for_cpu" in source
    assert not private.packed_for_inference(torch.zeros(1))


@pytest.mark.slow
def test_no_other_file_takes_private_parts() -> None:
    registries = {"_parameters", "_buffers", "_modules"}
    found = []
    for file in PACKAGE.rglob("*.py"):
        if file.name == "private.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                if node.module != "__future__" and any(part.startswith("_") for part in parts):
                    found.append(f"{file.name}: from {node.module} import ...")
            if isinstance(node, ast.Attribute) and re.match(r"_[a-zA-Z]", node.attr) and node.attr not in registries:
                owner = ast.unparse(node.value)
                if owner == "module" or owner.startswith("torch"):
                    found.append(f"{file.name}: {owner}.{node.attr}")
    assert not found


def test_importing_the_package_takes_nothing_heavy() -> None:
    code = (
        "import sys, uora_vision; print([m for m in ('timm', 'transformers', 'open_clip', 'rich') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_when_torch_fx_traces() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(private.in_symbolic_trace())
            return x + 1

    seen: list[bool] = []
    torch.fx.symbolic_trace(Net())
    Net()(torch.zeros(1))
    assert seen == [True, False]


def test_hooks_after_a_gradient_is_added_up() -> None:
    p, seen = nn.Parameter(torch.ones(2)), []
    p.register_post_accumulate_grad_hook(lambda _: seen.append(1))
    with private.no_steps_in_backward([p, torch.ones(1)]):
        p.sum().backward()
    assert not seen
    p.sum().backward()
    assert seen == [1]


def test_what_runs_around_a_call() -> None:
    seen = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x * 2

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            seen.append((private.in_backward(), private.node_in_backward().name()))
            return g * 2

    x = torch.ones(2, requires_grad=True)
    Node.apply(x).sum().backward()
    assert seen == [(True, "NodeBackward")] and not private.in_backward()
    torch.vmap(lambda row: seen.append(private.in_transform()) or row)(x)
    assert seen[1] is True and not private.in_transform()


def test_an_output_that_is_no_view_can_be_changed_in_place() -> None:
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return private.no_view((x * 2).view(2, 2))

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            return (g * 2).view(4)

    x = torch.ones(4, requires_grad=True)
    y = Same.apply(x)
    assert not y._is_view()
    y.add_(1).sum().backward()
    assert torch.equal(x.grad, torch.full((4,), 2.0))
