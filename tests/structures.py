"""Small real models of transformers, one for every way in which attention, an MLP or what stands for them is built."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn

TOKENS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = {**TOKENS, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 16}
GPT = {**TOKENS, "n_embd": 64, "n_inner": 80, "n_layer": 2, "n_head": 4, "n_positions": 32}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
STATES = {"mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 8}
SPEECH = {**PLAIN, "conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
          "mask_time_prob": 0.0}  # fmt: skip
LATENT = {**PLAIN, "num_key_value_heads": 4, "first_k_dense_replace": 1, "q_lora_rank": 20, "kv_lora_rank": 24,
          "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "n_routed_experts": 4, "n_group": 2,
          "moe_intermediate_size": 36, "topk_group": 2, "num_experts_per_tok": 2}  # fmt: skip

# Type -> options, and whether the input is tokens, an image of a side, or sound.
# fmt: off
STRUCTURES: dict[str, tuple[dict[str, Any], Any]] = {
    "llama": ({**GROUPED, "intermediate_size": 40}, "tokens"),
    "modernbert": (PLAIN, "tokens"),
    "mamba2": ({**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 8,
        "n_groups": 2, "chunk_size": 8}, "tokens"),
    "albert": ({**PLAIN, "embedding_size": 32}, "tokens"),
    "xlnet": ({"vocab_size": 99, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 80}, "tokens"),
    "deepseek_v3": (LATENT, "tokens"),
    "qwen3_5_text": ({**GROUPED, **DELTA}, "tokens"),
    "recurrent_gemma": ({**GROUPED, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16}, "tokens"),
    "lfm2": ({**GROUPED, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, "tokens"),
    "jetmoe": ({**TOKENS, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1, "num_key_value_heads": 2,
        "kv_channels": 16, "num_local_experts": 3, "num_experts_per_tok": 2}, "tokens"),
    "falcon_h1": ({**GROUPED, **STATES, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8}, "tokens"),
    "longcat_flash": ({**TOKENS, "hidden_size": 64, "ffn_hidden_size": 80, "num_layers": 1, "num_attention_heads": 4,
        "q_lora_rank": 20, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10,
        "head_dim": 8, "moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 36},
        "tokens"),
    "rwkv": ({**TOKENS, "hidden_size": 64, "attention_hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2}, "tokens"),
    "deberta": (PLAIN, "tokens"),
    "squeezebert": ({**PLAIN, "embedding_size": 64}, "tokens"),
    "mobilebert": ({**PLAIN, "embedding_size": 32, "intra_bottleneck_size": 32}, "tokens"),
    "ctrl": ({"vocab_size": 99, "n_embd": 64, "dff": 80, "n_layer": 2, "n_head": 4, "n_positions": 32}, "tokens"),
    "gpt_bigcode": (GPT, "tokens"),
    "persimmon": (PLAIN, "tokens"),
    "gpt_neox_japanese": ({**PLAIN, "intermediate_multiple_size": 2}, "tokens"),
    "wav2vec2-conformer": (SPEECH, "sound"),
    "poolformer": ({"hidden_sizes": [16, 32, 32, 48], "depths": [1, 1, 1, 1]}, 64),
    "dinov3_convnext": ({"hidden_sizes": [16, 32, 32, 48], "depths": [1, 1, 1, 1]}, 64),
    "sam_vision_model": ({**PLAIN, "output_channels": 16, "image_size": 32, "patch_size": 4, "window_size": 4,
        "global_attn_indexes": [1], "mlp_dim": 80}, 32),
    "internvl_vision": ({**PLAIN, "image_size": [32, 32], "patch_size": [8, 8]}, 32),
    "focalnet": ({"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1]}, 64),
    "swiftformer": ({"depths": [1, 1, 1, 2], "embed_dims": [16, 32, 32, 48]}, 64),
}
# fmt: on


def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model with random weights in eval mode, and an example input."""
    options, kind = STRUCTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **options)).float().eval()
        with torch.no_grad():  # some start so near to 0 that nothing moves
            for p in model.parameters():
                p.add_((0.05 if p.dim() < 2 else 0.5 * p.shape[-1] ** -0.5) * torch.randn_like(p))
        x: dict[str, Any] = {"pixel_values": torch.randn(2, 3, kind, kind)} if isinstance(kind, int) else {}
    generator = torch.Generator().manual_seed(1)
    if kind == "tokens":
        x = {"input_ids": torch.randint(3, 98, (3, 24), generator=generator)}
    if kind == "sound":
        x = {"input_values": torch.randn(2, 4000, generator=generator)}
    return model, x | ({"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {})
