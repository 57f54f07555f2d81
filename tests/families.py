"""timm's transformer families, small, and one model for every way to hold a projection."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
STAGED = {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "vit_base_patch16_224": (32, PLAIN),
    "vit_small_patch14_reg4_dinov2": (32, PLAIN),
    "vit_base_patch16_siglip_224": (32, PLAIN),
    "vit_relpos_small_patch16_224": (32, PLAIN),
    "vit_base_patch16_rpn_224": (32, PLAIN),
    "deit3_small_patch16_224": (32, PLAIN),
    "deit_tiny_distilled_patch16_224": (32, PLAIN),
    "beit_base_patch16_224": (32, PLAIN),
    "eva02_tiny_patch14_224": (32, PLAIN),
    "vit_small_patch16_dinov3": (32, PLAIN),
    "cait_xxs24_224": (32, PLAIN),
    "xcit_nano_12_p16_224": (32, {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}),
    "aimv2_large_patch14_224": (32, PLAIN),
    "samvit_base_patch16": (32, PLAIN),
    "convit_tiny": (32, {**PLAIN, "local_up_to_layer": 1}),
    "mixer_s16_224": (32, {"img_size": 32}),
    "swin_tiny_patch4_window7_224": (64, {**STAGED, "window_size": 4}),
    "swinv2_tiny_window8_256": (64, {**STAGED, "window_size": 4}),
    "swinv2_cr_tiny_224": (64, {**STAGED, "window_size": 4}),
    "hiera_tiny_224": (64, {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 1), "num_heads": 1, "q_pool": 1,
                            "mask_unit_size": (4, 4)}),
    "davit_tiny": (64, {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2)}),
    "pvt_v2_b0": (64, {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 1, 2, 2)}),
    "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64, "depths": (1, 1), "embed_dim": (64, 128), "stem_width": 16}),
    "tiny_vit_5m_224": (64, {"embed_dims": (16, 32, 32, 32), "depths": (1, 1, 1, 1),
                             "num_heads": (2, 2, 2, 2), "window_sizes": (4, 4, 4, 2)}),
    "convnext_tiny": (64, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "edgenext_xx_small": (64, {}),
    "mobilevit_xxs": (64, {}),
}  # fmt: skip


def small(name: str) -> tuple[nn.Module, Tensor]:
    size, options = FAMILIES[name]
    model = timm.create_model(name, num_classes=5, **options).eval()
    with torch.no_grad():
        for p in model.parameters():  # as if trained: heads and biases start at 0, layer scales near it
            p.add_(torch.randn_like(p) * (p.shape[1] ** -0.5 if p.dim() == 2 else 0.1))
    return model, torch.randn(2, 3, size, size)


# One for every way in which projections are held.
HELD = {
    "Linear, called": "timm/test_vit",
    "weight read, q k v biases apart": "timm/vit_small_patch16_dinov3_qkvb",
    "windows, position MLP": "timm/swinv2_cr_tiny_ns_224",
    "1x1 convolutions": "timm/test_convnext2",
    "1x1 convolutional attention": "timm/mobilevitv2_050",
    "interleaved heads": "timm/levit_128s",
    "grouped convolution": "timm/efficientvit_b0",
    "Conv1d": "timm/efficientvim_m1",
    "parallel block": "timm/vit_pwee_patch16_reg1_gap_256",
    "attention as pool, in a head": "timm/resnet50_clip",
    "tokens": "timm/gmlp_ti16_224",
    "LSTM": "timm/sequencer2d_s",
    "lambda": "timm/lambda_resnet26t",
    "halo": "timm/halonet26t",
    "pure convolutional": "timm/test_resnet",
    "nn.MultiheadAttention": "open_clip/ViT-S-32",
    "separate q k v weights": "open_clip/coca_base",
    "AttentionPool2d": "open_clip/RN50",
    "transformers text tower": "open_clip/roberta-ViT-B-32",
    "packed": "transformers/phi3",
    "transposed": "transformers/gpt2",
    "subclass with a forward of its own": "transformers/falcon_new",
    "experts": "transformers/mixtral",
    "transposed experts, interleaved gates": "transformers/gpt_oss",
    "low-rank attention": "transformers/deepseek_v3",
    "state space": "transformers/mamba",
    "encoder and decoder": "transformers/t5",
    "shared projections": "transformers/deberta-v2",
    "vision and language": "transformers/llava",
}
