"""What is left because no gradient can reach it: that none does is seen on small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import wake
from multimodal import BLOCKS, IMAGES, MODELS, TEXT, TOKENS
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.structure import unused, walk

SIGLIP = {**IMAGES, "model_type": "siglip_vision_model"}
COHERE = {**TEXT, "model_type": "cohere2", "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
POOLED: dict[str, dict[str, Any]] = {
    "gemma3": {**MODELS["gemma3"], "image_token_id": 59},
    "paligemma": {**MODELS["paligemma"], "vision_config": SIGLIP},
    "cohere2_vision": {"vision_config": SIGLIP, "text_config": COHERE, "image_token_id": 59, "downsample_factor": 1,
                       "alignment_intermediate_size": 48},
    "deepseek_vl": {"vision_config": SIGLIP, "text_config": {**TEXT, "model_type": "llama"}, "image_token_id": 59},
    "modernvbert": {"vision_config": SIGLIP, "text_config": {**TOKENS, **BLOCKS, "model_type": "modernbert"},
                    "image_token_id": 59, "pixel_shuffle_factor": 2},
    "llava": {**MODELS["llava"], "vision_config": SIGLIP, "vision_feature_select_strategy": "full",
              "vision_feature_layer": -1},
    "siglip": {"vision_config": IMAGES, "text_config": {**TOKENS, **BLOCKS}},
}  # fmt: skip
FROM_ZEROS = ("detr", "conditional_detr", "table-transformer", "dab-detr")


def built(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model, of which no bias and no gate is zero, and an input."""
    options = POOLED.get(name) or MODELS["detr"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **options)).float().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        if name in FROM_ZEROS:
            return model, {"pixel_values": torch.randn(2, 3, 64, 64)}
        ids = torch.randint(3, 58, (2, 12))
        images = torch.randn(2, 3, 16, 16)
    if name != "siglip":
        ids[:, 1 : 2 if name == "modernvbert" else 5] = 59
    x = {"input_ids": ids, "pixel_values": images[:, None] if name == "modernvbert" else images}
    return model, x | ({"token_type_ids": (ids == 59).long()} if name == "gemma3" else {})


def gradients(model: nn.Module, x: dict[str, Tensor]) -> dict[str, float]:
    """Size of the gradient of each weight, against that of all."""
    output = model(**x)
    features = output.logits_per_image if "logits_per_image" in output else output.last_hidden_state
    features.square().sum().backward()
    norms = {n: 0.0 if p.grad is None else p.grad.norm().item() for n, p in model.named_parameters()}
    return {n.removesuffix(".weight"): norm / max(norms.values()) for n, norm in norms.items()}


@pytest.mark.parametrize("name", [*POOLED, *FROM_ZEROS])
def test_what_is_left_gets_no_gradient_and_the_rest_trains(name: str) -> None:
    model, x = built(name)
    plan, sizes = uora.plan(model, rank=4, train=()), gradients(model, x)
    left = {s.path: s.reason for s in plan.skipped if s.reason.startswith("cannot receive a gradient")}
    five, none = (5, unused.ZEROS), (0, "")
    wanted = {"siglip": none, "table-transformer": none, "conditional_detr": five, "dab-detr": five}
    number, reason = wanted.get(name, (3, unused.ZEROS) if name in FROM_ZEROS else (4, unused.POOL))
    assert len(left) == number and set(left.values()) <= {reason}
    assert all(sizes[path] < 1e-7 for path in left)
    uora.inject(model, rank=4, train=(), example_input=x)


def test_an_adapter_that_was_saved_with_them_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as before:
        before.setattr(walk, "find_unused", lambda *_: {})
        model = wake(uora.inject(built("detr")[0], rank=4, train=()))
        uora.save(model, tmp_path)
    again = uora.load(built("detr")[0], tmp_path)
    old, new = uora.adapters(model), uora.adapters(again)
    assert "decoder.layers.0.self_attn.v_proj" in new and old.keys() == new.keys()
    assert all(torch.equal(old[path].b, new[path].b) for path in old)


def test_a_rule_of_ones_own_takes_precedence() -> None:
    model, _ = built("detr")
    owner = type(model.decoder.layers[0].self_attn)
    with uora.register_rule(owner, {"v_proj": "v", "o_proj": "proj"}):
        assert "decoder.layers.0.self_attn.v_proj" in {p.path for p in uora.plan(model, rank=4, train=()).projections}
