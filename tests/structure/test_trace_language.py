"""What a trace shows of language models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from traced import Rows, by_heads, check_packed, grouped_products_on_meta, in_turn, only_use, traced

from uora_vision.structure.trace import trace

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
        "max_position_embeddings": 32, "intermediate_size": 48, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 0}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_local_experts": 4}


def language_model(config: Any, **options: Any) -> Callable[[], nn.Module]:
    return partial(transformers.AutoModelForCausalLM.from_config, config, **options)


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
