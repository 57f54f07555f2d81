"""Every model of timm and open_clip, and the main families of transformers, ready to be built.

An entry builds its model whole on the meta device, or for real: small, float32, on the CPU, with an example input and
noise for weights, such that every path is alive and the output moves about as much as the input. No downloads.
"""

from __future__ import annotations

import inspect
import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
import transformers
from timm.models._registry import _model_to_module
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

BATCH = 3  # a batch norm over two values gives plus and minus one, whatever they are
logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of models without weights


@dataclass(frozen=True)
class Entry:
    """One model. `reduced` says what `real` leaves out, `note` what differs from the library's own way to build it."""

    library: str
    name: str
    family: str
    reduced: str = ""
    note: str = ""

    def meta(self) -> nn.Module:
        """The model at full size on the meta device."""
        with torch.device("meta"), _quick_init():
            return BUILDERS[self.library][0](self.name, small=False)

    def real(self) -> tuple[nn.Module, Any]:
        """The model in eval mode with random float32 weights, and an example input: see `call`."""
        with torch.random.fork_rng(devices=[]), _quick_init() as skipped:
            torch.manual_seed(0)
            model = BUILDERS[self.library][0](self.name, small=True)
        example = BUILDERS[self.library][1](self.name, model, torch.Generator().manual_seed(1))
        _fill(model, skipped)
        _silence_dropout(model)
        _calibrate(model.eval(), example)
        return model, example


def call(model: nn.Module, example: Any) -> Any:
    """The model's output for an example input: a tensor, a tuple of arguments or a dict of keywords."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


@contextmanager
def _quick_init() -> Iterator[set[int]]:
    """Skip large random draws into given tensors, as `_fill` comes after; yields the addresses left unset."""
    skipped: set[int] = set()

    def skip(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        skipped.add(tensor.data_ptr())
        return tensor

    class Skip(TorchFunctionMode):
        draws = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            kwargs = kwargs or {}
            if func in self.draws:
                tensor = args[0] if args else kwargs["tensor"]
                if tensor.is_meta or tensor.numel() > 10_000:
                    return skip(tensor)
            return func(*args, **kwargs)

    truncated = ("timm.layers.weight_init._trunc_normal_", "torch.nn.init._no_grad_trunc_normal_")
    with mock.patch(truncated[0], skip), mock.patch(truncated[1], skip), Skip():
        yield skipped


@torch.no_grad()
def _fill(model: nn.Module, skipped: set[int]) -> None:
    """Matrices: N(0, 1/fan_in). Gains that start at (nearly) 0: around 0.75. All else: what it was plus noise."""
    noise, start = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)), 0
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or not p.numel():
                continue
            fan_in = _fan_in(module, name, p)
            if not fan_in and p.data_ptr() in skipped:
                p.zero_()
            if not fan_in and _is_faint_gain(name, p):
                p.fill_(0.75)
            for piece in p.view(-1).split(500_000):
                part = noise[start : start + len(piece)]
                torch.mul(part, fan_in**-0.5, out=piece) if fan_in else piece.add_(part, alpha=0.1)
                start = (start + 104_729) % 500_000  # other noise for each piece, at no cost


def _fan_in(module: Any, name: str, p: nn.Parameter) -> int:
    """The number of inputs that one output of this matrix sums over; 0 for what is no matrix."""
    if p.ndim < 2 or (p.numel() == max(p.shape) and not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))):
        return 0
    if isinstance(module, nn.Embedding):
        return 4
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return p.shape[0] // module.groups * p[0, 0].numel()
    if isinstance(module, transformers.pytorch_utils.Conv1D):
        return p.shape[0]
    if hasattr(module, "weight_shape"):  # timm's CondConv2d: (experts, flattened kernel)
        return torch.Size(module.weight_shape[1:]).numel()
    if name.endswith("weight") or name.startswith("weight_"):
        return p.shape[1:].numel()
    if "proj" in name and "bias" not in name:  # bare matrices and stacks of them lie either way round
        return max(p.shape[-2:])
    return 0


def _is_faint_gain(name: str, p: nn.Parameter) -> bool:
    """Whether this multiplies a path and starts at 0, or at a small constant, as layer scales do."""
    low, high = p.aminmax()
    named = name == "weight" or re.search("gain|gamma|gate|gating|scale", name)
    return bool((named or low == high != 0) and -0.3 < low <= high < 0.3)


def _silence_dropout(model: nn.Module) -> None:
    """Dropout, drop path and layer drop off, so that train mode is deterministic."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or isinstance(module, nn.modules.dropout._DropoutNd)):
                setattr(module, name, 0.0)


@torch.no_grad()
def _calibrate(model: nn.Module, example: Any) -> None:
    """Give each batch norm, in turn, statistics that scale its input for the example to about 1.

    One variance for all channels and a tenth of their means: to normalise every channel by itself, as in train
    mode, makes a deep network of random weights chaotic, and rounding errors would grow a thousandfold.
    """

    def measure(module: Any, args: tuple[Tensor]) -> None:
        dims = [dim for dim in range(args[0].ndim) if dim != 1]
        module.running_mean.copy_(0.1 * args[0].mean(dims))
        rest = args[0] - module.running_mean.view(-1, *[1] * (args[0].ndim - 2))
        module.running_var.fill_(rest.square().mean())

    hooks = [m.register_forward_pre_hook(measure) for m in model.modules() if isinstance(m, _BatchNorm)]
    if hooks:
        call(model, example)
    for hook in hooks:
        hook.remove()


# How models of over 600M parameters are made shallow: patterns of names -> options, or blocks to keep of each stage.
SHALLOW: dict[str, dict[str, Any]] = {
    "vit_[5hg]*_sapiens2": {"depth": 4, "num_kv_heads": (8, 8, 8, 8)},
    "vit_7b_*": {"depth": 2},
    "hiera_huge*": {"stages": (1, 2, 4, 1)},
    "regnety_1280": {"depth": 10, "wa": 482.5},  # the same widths in fewer steps
    "regnety_2560": {"depth": 10, "wa": 692.5},
    "swinv2_cr_giant* swinv2_cr_huge*": {"depths": (2, 2, 2, 2)},
    "coatnet_5_* conv*_xxlarge convnextv2_huge davit_giant mvitv2_huge* resnetv2_152x4*": {"blocks": 2},
    "focalnet_huge*": {"drop_path_rate": 0.0, "blocks": 2},
    "aimv2_[13]b_* *huge_p* *giant* *gigantic* *enormous*": {"depth": 4},
}

# Side of the example image in pixels, where it is not 3 patches (models named by a patch of over 8 pixels) or 64.
SIDES: dict[str, int] = {
    "deepseek_vit_*": 42,
    "gemma4_vit_* inception_[rv]*": 96,
    "crossvit_*": 120,
    "efficientvit_m[0-9]* efficientvim_* levit_* mobilevitv2*": 128,
    "shvit*": 192,
    "efficientformer_* haloregnetz*": 224,
    "bat_resnext26ts *halo*": 256,
}


def _match(table: dict[str, Any], name: str, default: Any) -> Any:
    """The first value whose patterns, separated by spaces, match the name."""
    return next((table[key] for key in table if any(fnmatch(name, pattern) for pattern in key.split())), default)


def _side(name: str) -> int:
    patch = re.search(r"(?:patch|_p)(\d+)", name)
    return _match(SIDES, name, 3 * int(patch[1]) if patch and int(patch[1]) > 8 else 64)


def _timm_image(name: str) -> dict[str, Any]:
    """The option that makes the input small, where the model must know."""
    cfg = timm.models.get_pretrained_cfg(name)
    return {"img_size": _side(name)} if cfg is not None and cfg.fixed_input_size else {}


def _timm(name: str, small: bool) -> nn.Module:
    options = _timm_image(name) | _match(SHALLOW, name, {}) if small else {}
    options |= {"num_classes": 10} if small and not name.endswith("_enc") else {}
    blocks = options.pop("blocks", 4)
    model = timm.create_model(name, pretrained=False, **options)
    return _shortened(model, blocks) if small else model


def _shortened(model: nn.Module, keep: int, large: int = 40_000_000) -> nn.Module:
    """A model of over `large` parameters with the first `keep` of every longer run of equal blocks."""
    runs = [path for path, module in model.named_modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
    for path in reversed(runs) if sum(p.numel() for p in model.parameters()) > large else ():
        run: Any = model.get_submodule(path)
        if len(run) > keep and len({repr(block) for block in [*run][1:]}) == 1 and next(run[0].children(), None):
            model.set_submodule(path, run[:keep])
    return model


def _timm_example(name: str, model: Any, generator: torch.Generator) -> Tensor:
    return torch.randn(BATCH, 3, _side(name), _side(name), generator=generator)


def _timm_entry(name: str) -> Entry:
    reduced = f"shallow where over 40M parameters: {_match(SHALLOW, name, {'blocks': 4})}"
    return Entry("timm", name, _model_to_module[name], reduced)


# Text towers whose configuration open_clip would fetch: type and true sizes.
XLM = {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
DEEP = {"encoder_layers": 24, "encoder_ffn_dim": 8192}
HUB: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta-base": ("roberta", {**XLM, "vocab_size": 50265}),
    "xlm-roberta-base": ("xlm-roberta", XLM),
    "xlm-roberta-large": ("xlm-roberta", {**XLM, **LARGE}),
    "google/mt5-base": ("mt5", {"vocab_size": 250112, "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}),
    "google/mt5-xl": ("mt5", {"vocab_size": 250112, "d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32}),
    "facebook/nllb-200-distilled-600M": ("m2m_100", {"vocab_size": 256206}),
    "facebook/nllb-200-distilled-1.3B": ("m2m_100", {"vocab_size": 256206, **DEEP}),
}
SMALL_TEXT = {"layers": 2, "context_length": 12, "vocab_size": 1000}
SHALLOW_TOWERS: dict[str, dict[str, Any]] = {  # of timm
    "convnext_*": {"depths": (1, 1, 2, 1)},
    "fastvit_mci[34]": {"layers": (1, 1, 1, 1, 1)},
    "fastvit_*": {"layers": (1, 1, 2, 1)},
    "swin_*": {"depths": (2, 2, 2, 2)},
    "*": {"depth": 2},
}


def _clip(name: str, small: bool) -> nn.Module:
    """An open_clip model through its factory, with parts of its configuration replaced."""
    cfg, timm_options = open_clip.get_model_config(name), {}
    cfg.pop("custom_text", None)  # the factory has it from its own copy
    cfg["text_cfg"]["hf_model_pretrained"] = False
    if small:
        vision = cfg["vision_cfg"]
        if tower := vision.get("timm_model_name"):
            vision["image_size"] = _side(tower)
            timm_options = _timm_image(tower) | _match(SHALLOW_TOWERS, tower, {})
        elif isinstance(vision["layers"], list):
            vision |= {"image_size": 64, "layers": [1, 1, 2, 1]}
        else:
            vision |= {"image_size": 3 * vision["patch_size"], "layers": 2}
        for part in {"text_cfg", "multimodal_cfg"} & set(cfg):
            cfg[part] |= SMALL_TEXT
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(timm, "create_model", partial(timm.create_model, **timm_options)),
    ):
        if hub := cfg["text_cfg"].get("hf_model_name"):
            config = transformers.AutoConfig.for_model(HUB[hub][0], **HUB[hub][1])
            if small:
                layers = {key: 2 for key in config.to_dict() if key.endswith("_layers")}
                config.update(layers | {"vocab_size": SMALL_TEXT["vocab_size"]})
            config.save_pretrained(folder)
            cfg["text_cfg"]["hf_model_name"] = folder
        return open_clip.create_model(name, device="cpu" if small else "meta", pretrained_text=False, **cfg)


def _clip_example(name: str, model: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images, and tokens of which the last ends the text by each of open_clip's rules (the highest, or its own)."""
    text = open_clip.get_model_config(name)["text_cfg"]
    tokens = torch.randint(3, 990, (BATCH, SMALL_TEXT["context_length"]), generator=generator)
    tokens[:, -1] = text["eos_id"] if text.get("pool_type") == "eos" else 999
    return torch.randn(BATCH, 3, *open_clip.utils.to_2tuple(model.visual.image_size), generator=generator), tokens


def _clip_entry(name: str) -> Entry:
    cfg = open_clip.get_model_config(name)
    vision, hub = cfg["vision_cfg"], cfg["text_cfg"].get("hf_model_name")
    whole = "CoCa" if "multimodal_cfg" in cfg else "CustomTextCLIP" if cfg.get("custom_text") or hub else "CLIP"
    tower = "ModifiedResNet" if isinstance(vision.get("layers"), list) else "ViT"
    if "timm_model_name" in vision:
        tower = f"timm {_model_to_module[vision['timm_model_name']]}"
    text = f"transformers {HUB[hub][0]}" if hub else "text"
    reduced = "2 layers a tower (where it has stages: 1 or 2 a stage), 12 tokens of 1,000"
    note = f"configuration of {hub} written here instead of fetched" if hub else ""
    return Entry("open_clip", name, f"{whole}: {tower} + {text}", reduced, note)


# Sizes differ from each other, so that a split at the wrong place cannot fit by chance.
TOKENS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOCKS = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = {**TOKENS, **BLOCKS}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 16}
GPT = {**TOKENS, "n_embd": 64, "n_inner": 80, "n_layer": 2, "n_head": 4, "n_positions": 32}
FALCON = {**PLAIN, "hidden_size": 64, "ffn_hidden_size": 80}
VISION = {**BLOCKS, "image_size": 16, "patch_size": 4}
TOWERS = {"text_config": {**PLAIN, "projection_size": 40}, "vision_config": {**VISION, "hidden_size": 40}}

# Name -> what the automatic class is for, options of the small model, options of every size.
# fmt: off
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "starcoder2"], ("CausalLM", GROUPED, {})),
    "qwen3_moe": ("CausalLM", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 36}, {}),
    "gemma3": ("CausalLM", GROUPED | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, {}),
    "gpt2": ("CausalLM", GPT, {}),
    "gpt_neox": ("CausalLM", {**PLAIN, "hidden_size": 64}, {}),
    "opt": ("CausalLM", {**PLAIN, "ffn_dim": 80, "word_embed_proj_dim": 40}, {}),
    "bloom": ("CausalLM", {**TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4}, {}),
    "falcon": ("CausalLM", FALCON, {"multi_query": False}),
    "falcon_multi_query": ("CausalLM", FALCON, {"multi_query": True}),
    "falcon_new": ("CausalLM", {**FALCON, "num_kv_heads": 2}, {"new_decoder_architecture": True, "num_kv_heads": 8}),
    "mpt": ("CausalLM", {**TOKENS, "d_model": 64, "n_heads": 4, "n_layers": 2}, {}),
    "mixtral": ("CausalLM", {**GROUPED, "num_local_experts": 4}, {}),
    "deepseek_v3": ("CausalLM", {**PLAIN, "num_key_value_heads": 4, "first_k_dense_replace": 1, "q_lora_rank": 20,
        "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10, "n_routed_experts": 4,
        "moe_intermediate_size": 36, "n_group": 2, "topk_group": 2, "num_experts_per_tok": 2}, {}),
    "gpt_oss": ("CausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, {}),
    "gptj": ("CausalLM", {**GPT, "rotary_dim": 8}, {}),
    "codegen": ("CausalLM", {**GPT, "n_head": 8, "rotary_dim": 4, "n_ctx": 32}, {}),
    "t5": ("Seq2SeqLM", {**TOKENS, "d_model": 48, "d_kv": 16, "d_ff": 80, "num_heads": 4, "num_layers": 2}, {}),
    "bart": ("Seq2SeqLM", {**TOKENS, "d_model": 48, "encoder_layers": 2, "encoder_ffn_dim": 80, "decoder_ffn_dim": 88,
        "encoder_attention_heads": 4, "decoder_layers": 2, "decoder_attention_heads": 2}, {}),
    "mamba": ("CausalLM", {**PLAIN, "state_size": 8, "time_step_rank": 5}, {}),
    "vit": ("ImageClassification", VISION, {}),
    "deit": ("ImageClassification", VISION, {"architectures": ["DeiTForImageClassificationWithTeacher"]}),
    "beit": ("ImageClassification", VISION, {"use_relative_position_bias": True}),
    "swin": ("ImageClassification", {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4,
        "image_size": 32, "mlp_ratio": 3.0}, {}),
    "dinov2": ("ImageClassification", {**VISION, "mlp_ratio": 3}, {}),
    "dinov3_vit": ("", {**VISION, "num_register_tokens": 2, "pos_embed_rescale": None}, {}),
    "clip": ("", {**TOWERS, "projection_dim": 24}, {}),
    "siglip": ("", TOWERS, {}),
    "siglip2": ("", TOWERS | {"vision_config": {**TOWERS["vision_config"], "num_patches": 16}}, {}),
    "llava": ("ImageTextToText", {"text_config": {**GROUPED, "model_type": "llama"}, "vision_feature_layer": -1,
        "image_token_id": 98, "vision_config": {**TOWERS["vision_config"], "model_type": "clip_vision_model"}}, {}),
    **dict.fromkeys(("bert", "roberta"), ("SequenceClassification", PLAIN, {})),
    "deberta-v2": ("SequenceClassification", PLAIN, {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}),
}
# fmt: on
TYPES = {"gemma3": "gemma3_text", "falcon_multi_query": "falcon", "falcon_new": "falcon"}


def _hugging_face(name: str, small: bool) -> nn.Module:
    purpose, sizes, options = FAMILIES[name]
    config = transformers.AutoConfig.for_model(TYPES.get(name, name), **{**options, **(sizes if small else {})})
    return getattr(transformers, f"AutoModel{purpose and 'For'}{purpose}").from_config(config)


def _hugging_face_example(name: str, model: Any, generator: torch.Generator) -> dict[str, Any]:
    """What the model's forward names, of: 24 tokens a row (so that every expert gets some), an image, or patches."""
    accepted, side = inspect.signature(model.forward).parameters, getattr(model.config, "image_size", 16)
    tokens = torch.randint(3, 98, (BATCH, 24), generator=generator)
    if name == "llava":
        tokens[:, 2:18] = model.config.image_token_id
    shape = (16, 48) if "spatial_shapes" in accepted else (3, side, side)
    inputs = {
        "input_ids": tokens,
        "decoder_input_ids": tokens[:, :9].flip(1),
        "pixel_values": torch.randn(BATCH, *shape, generator=generator),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": torch.full((BATCH, 2), 4),
        "use_cache": False,
    }
    return {name: value for name, value in inputs.items() if name in accepted}


BUILDERS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any]]] = {
    "timm": (_timm, _timm_example),
    "open_clip": (_clip, _clip_example),
    "transformers": (_hugging_face, _hugging_face_example),
}


def entries(pattern: str = "*") -> list[Entry]:
    """The entries whose `library/name` matches a shell pattern, such as `timm/vit_*`."""
    every = [*map(_timm_entry, timm.list_models()), *map(_clip_entry, open_clip.list_models())]
    every += [Entry("transformers", name, name, "2 layers a tower, hidden 16 to 64") for name in FAMILIES]
    return [entry for entry in every if fnmatch(f"{entry.library}/{entry.name}", pattern)]
