"""What a trace shows of vision models and towers."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
from timm.models.levit import Levit
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.sequencer import Sequencer2d
from timm.models.shvit import SHViT
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn
from traced import LEVIT, PLAIN, Rows, by_heads, check_packed, in_turn, only_use, qkv, timm_model, traced

from uora_vision.structure.trace import trace

STAGED = {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}


# timm


def test_vit() -> None:
    found = traced(timm_model("vit_base_patch16_224", **PLAIN), (2, 3, 32, 32))
    name = "blocks.0.attn.qkv.weight"
    check_packed(found, name, in_turn(48, 48, 48))
    use = only_use(found, name)
    assert (use.op, use.reader, use.called) == ("linear", "blocks.0.attn.qkv", True)
    assert re.fullmatch(r"attention\.py:\d+", use.where)
    assert set(found.rows) == set(found.flows) == {name}
    assert only_use(found, "patch_embed.proj.weight").op == "conv2d"
    assert (only_use(found, "cls_token").op, only_use(found, "pos_embed").op) == ("cat", "add")
    assert found.unused == ()


TINY_VIT = {"embed_dims": (16, 32, 32, 32), "depths": (1,) * 4, "num_heads": (1, 1, 2, 1), "window_sizes": (4,) * 4}
MAXVIT = {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 64), "stem_width": 16}
SHVIT = {"embed_dim": (32, 48, 64), "partial_dim": (8, 12, 16), "qk_dim": (4,) * 3, "depth": (1,) * 3, "types": "iss"}


@pytest.mark.parametrize(
    ("make", "weight", "parts"),
    [
        (partial(Levit, **LEVIT), "stages.0.blocks.0.attn.qkv.linear", by_heads(2, 4, 4, 8)),
        (timm_model("tiny_vit_5m_224", **TINY_VIT), "stages.2.blocks.0.attn.qkv", by_heads(2, 16, 16, 16)),
        (timm_model("maxvit_nano_rw_256", **MAXVIT), "stages.1.blocks.0.attn_grid.attn.qkv", by_heads(2, 32, 32, 32)),
        (partial(SHViT, **SHVIT), "stages.1.blocks.0.mixer.m.qkv.c", in_turn(4, 4, 12)),
    ],
    ids=["levit", "tiny_vit", "maxvit", "shvit"],
)
def test_rows_of_heads_and_of_unequal_parts(make: Callable[[], nn.Module], weight: str, parts: list[Rows]) -> None:
    check_packed(traced(make, (2, 3, 64, 64)), f"{weight}.weight", parts)


def test_key_and_value_of_levit_s_downsampling() -> None:
    found = traced(partial(Levit, **LEVIT), (1, 3, 64, 64))
    keys, values = by_heads(4, 4, 16)
    owner = "stages.1.downsample.attn_downsample"
    assert found.flows[f"{owner}.kv.linear.weight"] == {"k": keys, "v": values}
    assert found.flows[f"{owner}.q.ln.linear.weight"] == {"q": in_turn(16)[0]}


@pytest.mark.parametrize(
    ("name", "options", "size", "path", "file"),
    [
        ("beit_base_patch16_224", PLAIN, 32, "blocks.0.attn", "beit.py"),
        ("eva02_tiny_patch14_224", PLAIN, 32, "blocks.0.attn", "eva.py"),
        ("swinv2_tiny_window8_256", STAGED, 64, "layers.0.blocks.0.attn", "swin_transformer_v2.py"),
    ],
)
def test_a_weight_that_the_parent_reads(name: str, options: dict[str, Any], size: int, path: str, file: str) -> None:
    found = traced(timm_model(name, **options), (2, 3, size, size))
    use = only_use(found, f"{path}.qkv.weight")
    assert (use.op, use.reader, use.called, use.where.partition(":")[0]) == ("linear", path, False, file)
    assert only_use(found, f"{path}.proj.weight").called
    width = 16 if "swin" in name else 48
    check_packed(found, f"{path}.qkv.weight", in_turn(width, width, width))


def test_packed_gate_of_eva() -> None:
    found = traced(timm_model("eva02_tiny_patch14_224", **PLAIN), (2, 3, 32, 32))
    assert found.rows["blocks.0.mlp.fc1.weight"] == tuple(in_turn(128, 128))
    assert "blocks.0.mlp.fc1.weight" not in found.flows


def test_attention_over_channels_is_reported_as_it_acts() -> None:
    """DaViT multiplies k and v into its scores and takes q as the values."""
    options = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2)}
    found = traced(timm_model("davit_tiny", **options), (2, 3, 64, 64))
    first, second, third = in_turn(16, 16, 16)
    assert found.flows["stages.0.blocks.0.1.attn.qkv.weight"] == {"q": second, "k": third, "v": first}
    assert found.flows["stages.0.blocks.0.0.attn.qkv.weight"] == qkv([first, second, third])


def test_pooling_between_the_projection_and_attention() -> None:
    config = MultiScaleVitCfg(depths=(1, 1), embed_dim=32, num_heads=1)
    found = traced(partial(MultiScaleVit, config, img_size=(64, 64)), (1, 3, 64, 64))
    check_packed(found, "stages.0.blocks.0.attn.qkv.weight", in_turn(32, 32, 32))
    check_packed(found, "stages.1.blocks.0.attn.qkv.weight", in_turn(64, 64, 64))


def test_separate_query_with_latents_from_a_parameter() -> None:
    found = traced(timm_model("vit_base_patch16_siglip_224", **PLAIN), (2, 3, 32, 32))
    assert found.flows["attn_pool.q.weight"] == {"q": in_turn(48)[0]}
    assert found.flows["attn_pool.kv.weight"] == dict(zip("kv", in_turn(48, 48), strict=True))
    assert only_use(found, "attn_pool.latent").op == "linear:input"


def test_cnn_has_uses_but_no_groups() -> None:
    found = traced(timm_model("convnext_tiny", depths=(1,) * 4, dims=(8, 16, 24, 32)), (2, 3, 64, 64))
    assert found.rows == {} and found.flows == {} and found.unused == ()
    assert only_use(found, "stages.0.blocks.0.conv_dw.weight").op == "conv2d"
    assert only_use(found, "stages.0.blocks.0.mlp.fc1.weight").op == "linear"


@pytest.mark.slow
def test_lstm_weights_are_found_in_the_list_they_come_in() -> None:
    make = partial(Sequencer2d, layers=(1,) * 4, embed_dims=(16,) * 4, hidden_sizes=(4,) * 4, num_classes=5)
    found = traced(make, (1, 3, 56, 56))
    path = "stages.0.blocks.0.rnn_tokens.rnn_v"
    for name in ("weight_ih_l0", "weight_hh_l0_reverse"):
        use = only_use(found, f"{path}.{name}")
        assert (use.op, use.reader, use.called, use.where.partition(":")[0]) == ("lstm", path, True, "sequencer.py")
    assert found.unused == ()


@pytest.mark.slow
def test_convolutional_separable_attention() -> None:
    found = traced(timm_model("mobilevitv2_050"), (1, 3, 64, 64))
    name = "stages.2.1.transformer.0.attn.qkv_proj.weight"
    assert only_use(found, name).op == "conv2d"
    assert found.rows[name] == tuple(in_turn(1, 64, 64))
    assert name not in found.flows, "nothing here is a query or a key to attention"


def test_parallel_block_packs_mlp_and_attention() -> None:
    make = partial(VisionTransformer, **PLAIN, block_fn=ParallelScalingBlock)
    found = traced(make, (2, 3, 32, 32))
    parts = in_turn(192, 48, 48, 48)
    assert found.rows["blocks.0.in_proj.weight"] == tuple(parts)
    assert found.flows["blocks.0.in_proj.weight"] == qkv(parts[1:])


# torch and open_clip


class Encoder(nn.Module):
    """nn.MultiheadAttention with one packed weight, and with three."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 2, kdim=8, vdim=8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        out, _ = self.cross(x, x[..., :8], x[..., 8:])
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_torch_attention_even_where_it_would_take_its_fused_path(frozen: bool) -> None:
    model = Encoder().eval().requires_grad_(not frozen)
    found = trace(model, torch.randn(2, 5, 16))
    check_packed(found, "layer.self_attn.in_proj_weight", in_turn(16, 16, 16))
    packed, out = (only_use(found, f"layer.self_attn.{name}") for name in ("in_proj_weight", "out_proj.weight"))
    assert (packed.op, packed.reader, packed.called) == ("multi_head_attention", "layer.self_attn", True)
    assert (out.op, out.reader, out.called) == ("multi_head_attention", "layer.self_attn", False)
    assert out.where.startswith("activation.py:")
    for role in "qkv":
        assert found.flows[f"cross.{role}_proj_weight"] == {role: in_turn(16)[0]}
    assert only_use(found, "layer.linear1.weight").called
    assert found.unused == ()


def test_open_clip() -> None:
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    make = partial(open_clip.CLIP, embed_dim=32, vision_cfg=vision, text_cfg=text)
    inputs = torch.randn(2, 3, 32, 32), torch.randint(50, (2, 8))
    found = trace(make(), inputs)
    for tower in ("visual.", ""):
        attention = f"{tower}transformer.resblocks.0.attn"
        check_packed(found, f"{attention}.in_proj_weight", in_turn(32, 32, 32))
        assert not only_use(found, f"{attention}.out_proj.weight").called
    assert (only_use(found, "visual.proj").op, only_use(found, "visual.proj").reader) == ("matmul", "visual")
    assert only_use(found, "text_projection").reader == ""
    assert only_use(found, "token_embedding.weight").op == "embedding"
    with torch.device("meta"):
        hollow = make()
    assert trace(hollow, tuple(t.to("meta") for t in inputs)) == found
    assert trace(make(), {"image": inputs[0], "text": inputs[1]}) == found


def test_attention_pool_that_hands_its_children_s_weights_to_torch() -> None:
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(32, vision, text)
    found = trace(model, (torch.randn(1, 3, 64, 64), torch.randint(50, (1, 8))))
    for role in "qkv":
        name = f"visual.attnpool.{role}_proj.weight"
        assert found.flows[name] == {role: in_turn(512)[0]}
        use = only_use(found, name)
        assert (use.reader, use.called, use.where.partition(":")[0]) == ("visual.attnpool", False, "modified_resnet.py")
