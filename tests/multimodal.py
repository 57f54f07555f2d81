"""Small models made of towers, one of every family, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import torch
import transformers
from torch import nn

TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {**BLOCKS, "image_size": 16, "patch_size": 8}
TEXT = {**TOKENS, **BLOCKS, "num_key_value_heads": 1, "head_dim": 16}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "intermediate_size": 48, "hidden_size": 32}
SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": 2, "image_size": 32,
        "out_features": ["stage1", "stage2", "stage3", "stage4"]}  # fmt: skip
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1],
          "out_features": ["stage4"]}  # fmt: skip
DETECTION = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 5}  # fmt: skip
SAM_DECODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 48,
               "iou_head_hidden_dim": 16, "iou_head_depth": 2}  # fmt: skip

# Type -> its configuration.
# fmt: off
MODELS: dict[str, dict[str, Any]] = {
    "clip": {"vision_config": IMAGES, "text_config": {**TOKENS, **BLOCKS}, "projection_dim": 16},
    "llava": {"vision_config": {**IMAGES, "model_type": "clip_vision_model"},
        "text_config": {**TEXT, "model_type": "llama"}, "image_token_id": 59},
    "qwen2_5_vl": {"vision_config": {**QWEN, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16},
        "text_config": {**TEXT, **SECTIONS}},
    "qwen3_vl": {"vision_config": {**QWEN, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 16}, "text_config": {**TEXT, **SECTIONS}},
    "internvl": {"vision_config": {**BLOCKS, "image_size": [16, 16], "patch_size": [4, 4]},
        "text_config": {**TEXT, "model_type": "qwen2"}, "image_token_id": 59},
    "smolvlm": {"vision_config": IMAGES, "text_config": {**TEXT, "model_type": "llama"}, "image_token_id": 59},
    "paligemma": {"vision_config": {**IMAGES, "model_type": "siglip_vision_model", "vision_use_head": False},
        "text_config": {**TEXT, "model_type": "gemma"}, "image_token_id": 59, "projection_dim": 32},
    "gemma3": {"vision_config": IMAGES, "text_config": {**TEXT, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"]}, "mm_tokens_per_image": 4},
    "llama4": {"vision_config": {**IMAGES, "patch_size": 4, "vision_output_dim": 32, "projector_input_dim": 32,
        "projector_output_dim": 32, "intermediate_size": 128},
        "text_config": {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "moe_layers": [1]}},
    "blip-2": {"vision_config": IMAGES, "qformer_config": {**TOKENS, **BLOCKS, "encoder_hidden_size": 32},
        "text_config": {**TOKENS, "model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "word_embed_proj_dim": 32}, "num_query_tokens": 4},
    "florence2": {"vision_config": {"embed_dim": [16, 16, 16, 32], "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2], "projection_dim": 32},
        "text_config": {**TOKENS, "model_type": "bart", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}},
    "whisper": {**TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8},
    "sam": {"vision_config": {**BLOCKS, "image_size": 32, "patch_size": 8, "output_channels": 32, "mlp_dim": 48,
        "num_pos_feats": 16, "global_attn_indexes": [1], "window_size": 2},
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
        "mask_decoder_config": SAM_DECODER},
    "sam2": {"vision_config": {"backbone_config": {"model_type": "sam2_hiera_det_model", "hidden_size": 16,
            "num_attention_heads": 1, "image_size": [32, 32], "blocks_per_stage": [1, 1, 1, 1],
            "embed_dim_per_stage": [16, 32, 32, 32], "num_attention_heads_per_stage": [1, 2, 2, 2],
            "window_size_per_stage": [2, 2, 2, 2], "global_attention_blocks": [2]},
        "backbone_channel_list": [32, 32, 32, 16], "fpn_hidden_size": 32},
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
        "mask_decoder_config": SAM_DECODER},
    "mask2former": {"backbone_config": {"model_type": "swin", **SWIN}, "hidden_dim": 32, "feature_size": 32,
        "mask_feature_size": 32, "encoder_feedforward_dim": 48, "dim_feedforward": 48, "encoder_layers": 1,
        "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 5},
    "detr": {**DETECTION, "backbone_config": RESNET, "use_timm_backbone": False, "backbone": None},
    "rt_detr": {"backbone_config": {**RESNET, "model_type": "rt_detr_resnet",
            "out_features": ["stage2", "stage3", "stage4"]},
        "encoder_hidden_dim": 32, "encoder_in_channels": [8, 8, 8], "encoder_ffn_dim": 48, "d_model": 32,
        "decoder_in_channels": [32, 32, 32], "decoder_ffn_dim": 48, "num_queries": 5, "decoder_layers": 2,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2},
}
# fmt: on


def clip(**text: Any) -> nn.Module:
    """open_clip's, of 0.05M parameters."""
    return open_clip.CLIP(
        embed_dim=24,
        vision_cfg=open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=16),
        text_cfg=open_clip.CLIPTextCfg(context_length=8, vocab_size=40, width=48, heads=2, layers=2, **text),
    )


def custom_clip() -> nn.Module:
    """open_clip's of two modules, `visual` and `text`."""
    return open_clip.CustomTextCLIP(
        embed_dim=24,
        vision_cfg=open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=16),
        text_cfg=open_clip.CLIPTextCfg(context_length=8, vocab_size=40, width=48, heads=2, layers=2),
    )


BUILT_BY_HAND: dict[str, Callable[[], nn.Module]] = {
    "open_clip CLIP": clip,
    "open_clip CustomTextCLIP": custom_clip,
}


def multimodal(name: str) -> nn.Module:
    """A model by type, the same each time, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name in BUILT_BY_HAND:
            return BUILT_BY_HAND[name]().eval()
        config = transformers.AutoConfig.for_model(name, **MODELS[name])
        return transformers.AutoModel.from_config(config).float().eval()
