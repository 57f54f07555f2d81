"""The trace says what the model's source code says: who consumes each weight, and which rows go where."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.levit import Levit
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.sequencer import Sequencer2d
from timm.models.shvit import SHViT
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from uora_vision.structure.trace import Trace, Use, trace

Rows = tuple[int, ...]
PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 2, "num_classes": 5}
STAGED = {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
        "max_position_embeddings": 32, "intermediate_size": 48, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 0}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_local_experts": 4}


def grouped_products_on_meta() -> bool:
    """Torch 2.11 has the grouped product of experts on meta in bfloat16 only, 2.15 in float32 too."""
    rows, ends = torch.empty(4, 16, device="meta"), torch.empty(2, dtype=torch.int32, device="meta")
    try:
        torch._grouped_mm(rows, torch.empty(2, 16, 16, device="meta"), offs=ends)
    except RuntimeError:
        return False
    return True


def traced(make: Callable[[], nn.Module], *shapes: tuple[int, ...], vocabulary: int = 0) -> Trace:
    """The trace of a model, checked to be the same on the meta device and to leave the model's output as it was."""
    inputs = [torch.randint(vocabulary, s) if vocabulary else torch.randn(s) for s in shapes]
    model = make().eval()
    with torch.no_grad():
        before = model(*inputs)
        found = trace(model, tuple(inputs))
        after = model(*inputs)
    torch.testing.assert_close(tensors(after), tensors(before), rtol=0, atol=0)
    with torch.device("meta"):
        hollow = make()
    assert trace(hollow, tuple(t.to("meta") for t in inputs)) == found
    return found


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [t for value in values for t in tensors(value)]


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, **options)


def language_model(config: Any, **options: Any) -> Callable[[], nn.Module]:
    return partial(transformers.AutoModelForCausalLM.from_config, config, **options)


def by_heads(heads: int, *sizes: int) -> list[Rows]:
    """Rows that are laid out (heads, sum of sizes), split along the second."""
    rows = torch.arange(heads * sum(sizes)).view(heads, -1).split(list(sizes), 1)
    return [tuple(part.flatten().tolist()) for part in rows]


def in_turn(*sizes: int) -> list[Rows]:
    return by_heads(1, *sizes)


def qkv(parts: list[Rows]) -> dict[str, Rows]:
    return dict(zip("qkv", parts, strict=True))


def check_packed(found: Trace, name: str, parts: list[Rows]) -> None:
    assert found.rows[name] == tuple(parts)
    assert found.flows[name] == qkv(parts)


def only_use(found: Trace, name: str) -> Use:
    (use,) = found.uses[name]
    return use


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


LEVIT = {"img_size": 64, "embed_dim": (16, 24), "key_dim": 4, "depth": (1, 1), "num_heads": (2, 3), "num_classes": 5}
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


def test_lstm_weights_are_found_in_the_list_they_come_in() -> None:
    make = partial(Sequencer2d, layers=(1,) * 4, embed_dims=(16,) * 4, hidden_sizes=(4,) * 4, num_classes=5)
    found = traced(make, (1, 3, 56, 56))
    path = "stages.0.blocks.0.rnn_tokens.rnn_v"
    for name in ("weight_ih_l0", "weight_hh_l0_reverse"):
        use = only_use(found, f"{path}.{name}")
        assert (use.op, use.reader, use.called, use.where.partition(":")[0]) == ("lstm", path, True, "sequencer.py")
    assert found.unused == ()


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


# transformers


GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50, "n_positions": 32, "bos_token_id": 0,
        "eos_token_id": 1}  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("config", "name", "op", "parts"),
    [
        (transformers.GPT2Config(**GPT2), "transformer.h.0.attn.c_attn", "addmm", in_turn(32, 32, 32)),
        (
            transformers.GPTNeoXConfig(**TEXT),
            "gpt_neox.layers.1.attention.query_key_value",
            "linear",
            by_heads(4, 8, 8, 8),
        ),
        (
            transformers.FalconConfig(new_decoder_architecture=True, num_kv_heads=2, **TEXT),
            "transformer.h.1.self_attention.query_key_value",
            "matmul",
            by_heads(2, 16, 8, 8),
        ),
        (
            transformers.FalconConfig(new_decoder_architecture=False, multi_query=True, **TEXT),
            "transformer.h.1.self_attention.query_key_value",
            "matmul",
            in_turn(32, 8, 8),
        ),
        (
            transformers.FalconConfig(new_decoder_architecture=False, multi_query=False, alibi=True, **TEXT),
            "transformer.h.1.self_attention.query_key_value",
            "matmul",
            by_heads(4, 8, 8, 8),
        ),
        (transformers.Phi3Config(**GROUPED), "model.layers.1.self_attn.qkv_proj", "linear", in_turn(32, 16, 16)),
    ],
)
def test_packed_attention_of_language_models(
    config: Any, name: str, op: str, parts: list[Rows], attention: str
) -> None:
    make = language_model(config, attn_implementation=attention)
    found = traced(make, (2, 7), vocabulary=50)
    check_packed(found, f"{name}.weight", parts)
    assert (only_use(found, f"{name}.weight").op, only_use(found, f"{name}.weight").called) == (op, True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_s_separate_projections(attention: str) -> None:
    """Grouped heads, and rotary embedding, which adds rows of one projection to each other without parting them."""
    found = traced(
        language_model(transformers.LlamaConfig(**GROUPED), attn_implementation=attention), (2, 7), vocabulary=50
    )
    for role, rows in (("q", 32), ("k", 16), ("v", 16)):
        assert found.flows[f"model.layers.1.self_attn.{role}_proj.weight"] == {role: in_turn(rows)[0]}
    assert found.rows == {}
    assert len(found.flows) == 6
    assert found.unused == ()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("experts", "op"), [("eager", "linear"), ("grouped_mm", "grouped_mm")])
def test_experts_of_mixtral(experts: str, op: str, attention: str) -> None:
    """In the second layer: what routing multiplies with is a softmax too, and no attention."""
    config = transformers.MixtralConfig(**EXPERTS)
    make = language_model(config, experts_implementation=experts, attn_implementation=attention)
    found = trace(make(), torch.randint(50, (2, 7)))
    path = "model.layers.1.mlp.experts"
    use = only_use(found, f"{path}.gate_up_proj")
    assert (use.op, use.reader, use.called) == (op, path, True)
    assert found.rows[f"{path}.gate_up_proj"] == tuple(in_turn(48, 48))
    assert set(found.rows) == {f"model.layers.{k}.mlp.experts.gate_up_proj" for k in range(2)}
    flows = {name: set(flow) for name, flow in found.flows.items()}
    assert flows == {f"model.layers.{k}.self_attn.{r}_proj.weight": {r} for k in range(2) for r in "qkv"}
    if experts == "grouped_mm" and grouped_products_on_meta():
        with torch.device("meta"):
            hollow = make()
        assert trace(hollow, torch.randint(50, (2, 7), device="meta")) == found


@pytest.mark.parametrize(("experts", "op"), [("eager", "matmul"), ("grouped_mm", "grouped_mm")])
def test_experts_of_gpt_oss_interleave_gate_and_up(experts: str, op: str) -> None:
    """Its weights are (experts, in, out), and rows are counted along the last dimension."""
    config = transformers.GptOssConfig(**EXPERTS, head_dim=8, layer_types=["full_attention"] * 2)
    found = trace(language_model(config, experts_implementation=experts)(), torch.randint(50, (2, 7)))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert only_use(found, name).op == op
    assert found.rows[name] == (tuple(range(0, 96, 2)), tuple(range(1, 96, 2)))


def test_low_rank_attention_of_deepseek() -> None:
    """Keys are copied into an empty tensor, from two projections."""
    config = transformers.DeepseekV3Config(
        **{**TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 2},
        topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=12,
        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    if not grouped_products_on_meta():
        pytest.skip(f"torch {torch.__version__} cannot run the experts on meta")
    found = traced(language_model(config), (2, 7), vocabulary=50)
    path = "model.layers.1.self_attn"
    keys, values = by_heads(4, 8, 8)
    latent, rotary = in_turn(12, 4)
    assert found.flows[f"{path}.kv_b_proj.weight"] == {"k": keys, "v": values}
    assert found.rows[f"{path}.kv_a_proj_with_mqa.weight"] == (latent, rotary)
    assert found.flows[f"{path}.kv_a_proj_with_mqa.weight"] == {"k": rotary}
    assert found.flows[f"{path}.q_b_proj.weight"] == {"q": in_turn(48)[0]}


# Laws


class Packed(nn.Module):
    """A Linear whose output is handled as told."""

    def __init__(self, out: int, use: Callable[[Tensor], Any], width: int = 6) -> None:
        super().__init__()
        self.packed = nn.Linear(width, out)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self.packed(x))


def packed(out: int, use: Callable[[Tensor], Any]) -> Trace:
    return traced(lambda: Packed(out, use), (2, 5, 6))


@settings(deadline=None, max_examples=25)
@given(heads=st.integers(1, 4), sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4), first=st.booleans())
def test_any_split_is_found(heads: int, sizes: list[int], first: bool) -> None:
    def use(y: Tensor) -> list[Tensor]:
        y = y.view(*y.shape[:-1], heads, sum(sizes))
        y = y.permute(2, 0, 3, 1) if first else y
        return [part.sum() for part in y.split(sizes, dim=2 if first else 3)]

    found = packed(heads * sum(sizes), use)
    assert found.rows["packed.weight"] == tuple(by_heads(heads, *sizes))


def test_partition_is_the_finest_that_the_uses_make() -> None:
    """Overlapping uses part the rows where they differ; rows that no use took are a part too."""
    found = packed(10, lambda y: (y[..., 1:6].sum(), y[..., 4:8].sum()))
    assert found.rows["packed.weight"] == ((0, 8, 9), (1, 2, 3), (4, 5), (6, 7))


def test_a_thousand_parts_are_no_trouble() -> None:
    found = trace(Packed(1024, lambda y: [part.sum() for part in y.unbind(-1)]), torch.randn(1, 1, 6))
    assert found.rows["packed.weight"] == tuple((k,) for k in range(1024))


def rotated(y: Tensor) -> Tensor:
    """Rotary embedding, with the halves of the last axis taken apart and put together."""
    first, second = y.chunk(2, -1)
    return y * 0.6 + torch.cat([-second, first], -1) * 0.8


def rotated_halves(y: Tensor) -> Tensor:
    first, second = y.chunk(2, -1)
    return torch.cat([first * 0.6 - second * 0.8, second * 0.6 + first * 0.8], -1)


@pytest.mark.parametrize(
    ("change", "axis"),
    [
        (lambda y: F.gelu(y * 2 + 1), -1),
        (lambda y: F.layer_norm(y, (8,)).softmax(-1), -1),
        (lambda y: y.double().to(torch.half).clone(), -1),
        (lambda y: rotated(y.unflatten(-1, (2, 4))).flatten(-2), -1),
        (lambda y: rotated_halves(y.unflatten(-1, (2, 4))).flatten(-2), -1),
        (lambda y: torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (4, 2))) * 1j).flatten(-2), -1),
        (lambda y: F.pad(y, (0, 0, 1, 1), value=1.0).roll(1, 1).flip(0), -1),
        (
            lambda y: y.unflatten(-1, (2, 4)).transpose(1, 2).contiguous().view(4, 5, 4)  # heads in the batch
            .view(2, 2, 5, 4).transpose(1, 2).flatten(-2),
            -1,
        ),
        (lambda y: torch.stack([y[..., :4], y[..., 4:]]).permute(1, 2, 0, 3).reshape(2, 5, 8), -1),
        (lambda y: F.unfold(y.mT.unsqueeze(-1), (3, 1), padding=(1, 0)).view(2, 8, 3, 5), 1),
        (lambda y: F.max_pool1d(y.mT, 2), 1),
        (lambda y: y.amax(1, keepdim=True), -1),
        (lambda y: y.mT.mean(-1), 1),
        (lambda y: y[:, torch.arange(5, device=y.device) % 2], -1),
        (lambda y: y.new_empty(2, 5, 8).copy_(y), -1),
    ],
    ids=[
        "elementwise", "norm", "casts", "rotary", "rotary by halves", "complex rotary", "pad and roll", "memory",
        "stack", "unfold", "pool", "maximum", "mean", "index", "copy",
    ],
)  # fmt: skip
def test_rows_are_followed_without_being_parted(change: Callable[[Tensor], Tensor], axis: int) -> None:
    """They stay one group, and when they are parted afterwards, each is still known."""
    assert packed(8, lambda y: change(y).sum()).rows == {}
    taken = trace(Packed(8, lambda y: [part.sum() for part in change(y).split([4, 4], axis)]), torch.randn(2, 5, 6))
    assert taken.rows["packed.weight"] == tuple(in_turn(4, 4))


def test_rows_written_into_a_part_of_a_tensor_are_there() -> None:
    def use(y: Tensor) -> tuple[Tensor, Tensor]:
        whole = y.new_zeros(2, 5, 10)
        whole[..., :4].copy_(y[..., 4:])
        whole[..., 4:8] = y[..., :4]
        return whole[..., 2:6].sum(), whole[..., 8:].sum()

    assert packed(8, use).rows["packed.weight"] == ((0, 1, 6, 7), (2, 3, 4, 5))


def test_a_residual_stream_is_no_projection_s_output() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            first, second = (x + self.inner(x)).chunk(2, -1)
            return first.sum(), second.sum()

    assert traced(Residual, (2, 8)).rows == {}


def test_gate_and_what_it_gates_are_two() -> None:
    assert packed(8, lambda y: F.silu(y[..., :3]) * y[..., 3:6]).rows["packed.weight"] == tuple(in_turn(3, 3, 2))
    assert packed(8, lambda y: F.glu(y)).rows["packed.weight"] == tuple(in_turn(4, 4))


@pytest.mark.parametrize(
    ("attend", "order"),
    [
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), "qkv"),
        (lambda q, k, v: ((q * 0.5) @ k.mT).masked_fill(q.new_zeros((), dtype=torch.bool), 0).softmax(-1) @ v, "qkv"),
        (lambda q, k, v: (v.mT @ (k @ q.mT).softmax(dim=-2)).mT, "qkv"),
        (lambda q, k, v: torch.bmm(F.softmax(torch.baddbmm(q.new_zeros(1, 5, 5), k, q.mT), dim=2), v), "kqv"),
        (
            lambda q, k, v: torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k).softmax(2), v),
            "qkv",
        ),
        (
            lambda q, k, v: torch.einsum("...ij,...jd->...id", torch.einsum("...jd,...id->...ij", k, q).softmax(2), v),
            "qkv",
        ),
    ],
    ids=["fused", "explicit", "transposed", "bmm", "einsum", "einsum with keys first"],
)
def test_attention_in_many_spellings(attend: Callable[..., Tensor], order: str) -> None:
    found = packed(12, lambda y: attend(*y.chunk(3, -1)))
    parts = in_turn(4, 4, 4)
    assert found.flows["packed.weight"] == {
        role: parts["qkv".index(name)] for role, name in zip("qkv", order, strict=True)
    }
    assert found.rows["packed.weight"] == tuple(parts)


@pytest.mark.parametrize(
    ("use", "sure"),
    [
        (lambda y: y[..., :4] @ y[..., 4:8].mT @ y[..., 8:], {}),
        (lambda y: (y[..., :4] @ y[..., 4:8].mT).softmax(0) @ y[..., 8:], {}),
        (lambda y: torch.ones(2, 5, 5, device=y.device).softmax(-1) @ y, {}),
        (lambda y: y[..., :5].softmax(-1) @ y[..., 5:], {"v": tuple(range(5, 12))}),
    ],
    ids=["no softmax", "softmax over the batch", "pooling", "outlook"],
)
def test_no_flow_is_claimed_where_it_is_not_certain(use: Callable[[Tensor], Any], sure: dict[str, Rows]) -> None:
    assert packed(12, use).flows.get("packed.weight", {}) == sure


class Shared(nn.Module):
    """A tied head, a weight made of three, one that is only looked at, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight
        self.spare = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.zeros(4, 4))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        assert self.spare.weight.dtype == x.dtype and self.spare.weight.shape == (8, 8)
        torch.zeros_like(self.spare.weight)
        q, k, v = F.linear(x, torch.cat([self.q.weight, self.k.weight, self.v.weight])).chunk(3, -1)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.head(self.normed(x)), self.table.T[:2]


def test_sharing_looking_and_leaving() -> None:
    found = traced(Shared, (2, 5), vocabulary=50)
    assert found.unused == ("spare.weight",)
    assert (only_use(found, "embed.weight").op, only_use(found, "head.weight").op) == ("embedding", "linear")
    assert only_use(found, "embed.weight").called and only_use(found, "head.weight").called
    for role, layer in (("q", "q"), ("k", "k"), ("v", "v")):
        assert found.flows[f"{layer}.weight"] == {role: in_turn(8)[0]}
        use = only_use(found, f"{layer}.weight")
        assert (use.op, use.reader, use.called) == ("linear", "", False)
    assert {use.op for use in found.uses["table"]} == {"T", "getitem"}, "nothing else happens to it"
    assert "linear" in {use.op for use in found.uses["normed.parametrizations.weight.original1"]}


def test_same_module_under_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    found = trace(Twice(), torch.randn(2, 4))
    names = [name for name, p in Twice().named_parameters(remove_duplicate=False) if p.dim() > 1]
    assert list(found.uses) == names == ["a.weight", "b.weight"]
    assert all(use.called and use.reader == "a" for uses in found.uses.values() for use in uses)


# What a trace leaves behind


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_model_and_random_state_are_as_before() -> None:
    vit = timm.create_model("vit_base_patch16_224", **PLAIN, proj_drop_rate=0.5)
    model = nn.Sequential(Noise(), vit).train()
    vit.blocks.eval()
    flags = [m.training for m in model.modules()]
    values = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    trace(model, torch.zeros(1, 3, 32, 32))
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_what_a_model_remembers_of_its_parameters_is_neither_missed_nor_left_behind() -> None:
    """LeViT keeps its biases between eval forwards, until a call of train or eval."""
    model = Levit(**LEVIT).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model(x)
        assert not trace(model, x).unused
        for name, p in model.named_parameters():
            if name.endswith("attention_biases"):
                p.normal_(std=3.0)
        after = model(x)
        assert torch.equal(after, model.eval()(x))


class Keeping(nn.Module):
    """Keeps what it makes of a parameter until it trains again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table, self.kept = nn.Linear(4, 4), nn.Parameter(torch.randn(2, 4)), None

    def train(self, mode: bool = True) -> Keeping:
        if mode:
            self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.table.T @ self.table
        return self.inner(x) @ self.kept


def test_what_a_model_kept_from_an_earlier_forward_is_made_again() -> None:
    model, x = Keeping().eval(), torch.randn(2, 4)
    with torch.no_grad():
        model(x)
        assert not trace(model, x).unused


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError(f"after {self.inner(x).shape}")


def test_an_error_of_the_model_comes_through_and_everything_is_undone() -> None:
    model, seen = nn.Sequential(Failing()), []
    with pytest.raises(ArithmeticError, match="after"):
        trace(model, torch.randn(2, 4))
    assert all(m.training for m in model.modules())
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
    seen.append(torch.overrides._get_current_function_mode_stack())
    assert seen == [[]]


def test_an_error_that_the_model_handles_does_not_confuse_who_reads() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.failing, self.own = Failing(), nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.failing(x)
            except ArithmeticError:
                return x @ self.own

    found = trace(Careful(), torch.randn(2, 4))
    assert only_use(found, "own").reader == "" and only_use(found, "own").called


def test_what_cannot_be_followed_is_let_go() -> None:
    """Reading floats as integers has no meaning for labels; the model runs all the same."""

    def use(y: Tensor) -> tuple[Tensor, Tensor]:
        halves = y.view(torch.int32).view(torch.float32).chunk(2, -1)
        return halves[0].sum(), halves[1].sum()

    found = packed(8, use)
    assert found.rows == {}
    assert only_use(found, "packed.weight").op == "linear"
