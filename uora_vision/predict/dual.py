"""Models of images and texts (CLIP, SigLIP) from open_clip or transformers, behind one small class."""

from __future__ import annotations

import difflib
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .images import InputFormat
from .network import failing_fast

Tokens = dict[str, Tensor]
"""What a text tower reads, by the name of its argument, each (n, length)."""
CHUNK = 256
"""Texts at a time."""
HIGHEST_SCALE = math.log(100)
"""CLIP was trained with its logit scale below 100."""
OUTSIDE = ("logit_scale", "logit_bias", "text_decoder.")
"""Of neither tower: the temperature, and CoCa's decoder, which a contrastive loss does not reach."""


class Dual(nn.Module):
    """A model of two towers whose features are compared.

    Args:
        model: of open_clip or transformers; adapters go into it.
        tokenize: texts -> what the text tower reads.
        form: what the image tower reads.
        hub: whether it is of transformers.
        source: by what `load_predictor` finds it: a model, and a tag or file of weights.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenize: Callable[[Sequence[str]], Tokens],
        form: InputFormat,
        hub: bool,
        source: tuple[str, str | None],
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenize, self.form, self.hub = tokenize, form, hub
        self.source = source

    @property
    def sigmoid(self) -> bool:
        """Whether each pair is judged by itself, as SigLIP does, and not among the others, as CLIP does."""
        return getattr(self.model, "logit_bias", None) is not None

    def forward(self, images: Tensor, tokens: Tokens | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Features of the images (n, width) and of the texts (m, width), each of length 1; scale and bias of their
        products. No texts, no features of them."""
        scale = self.model.logit_scale
        if self.training and scale.requires_grad and not self.sigmoid:
            with torch.no_grad():
                scale.clamp_(max=HIGHEST_SCALE)
        text = None if tokens is None else self.encode_text(tokens)
        return self.encode_image(images), text, scale.exp(), getattr(self.model, "logit_bias", None)

    def encode_image(self, images: Tensor) -> Tensor:
        found = self.model.get_image_features(images) if self.hub else self.model.encode_image(images)
        return nn.functional.normalize(getattr(found, "pooler_output", found).float(), dim=-1)

    def encode_text(self, tokens: Tokens) -> Tensor:
        found = self.model.get_text_features(**tokens) if self.hub else self.model.encode_text(tokens["text"])
        return nn.functional.normalize(getattr(found, "pooler_output", found).float(), dim=-1)

    def example(self, images: Tensor, tokens: Tokens) -> Any:
        """Input of the model itself, for `uora.verify`."""
        return {"pixel_values": images, **tokens} if self.hub else (images, tokens["text"])

    def tower(self, name: str) -> str | None:
        """`image` or `text`: where the parameter of that name is; None for neither."""
        if name.startswith(OUTSIDE):
            return None
        return "image" if name.startswith(("visual.", "vision_model.", "visual_projection.")) else "text"


def fill(template: str, names: Sequence[str]) -> list[str]:
    """The text of each class; an underscore in a name is a space."""
    return [template.replace("{}", name.replace("_", " ")) for name in names]


@torch.no_grad()
def text_features(dual: Dual, tokens: Tokens, device: torch.device) -> Tensor:
    """Features of many texts, (n, width)."""
    count = len(next(iter(tokens.values())))
    parts = [{key: value[k : k + CHUNK].to(device) for key, value in tokens.items()} for k in range(0, count, CHUNK)]
    return torch.cat([dual.encode_text(part) for part in parts])


def logits(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """How well each image (row) goes with each text (column)."""
    product = scale * image @ text.T
    return product if bias is None else product + bias


def load_dual(name: str, pretrained: str | None = None) -> Dual:
    """A pretrained model by name.

    Args:
        name: `hf:NAME` or `transformers/NAME`, or a folder of transformers; a model of open_clip (`open_clip:` or
            `open_clip/` may stand before it), `hf-hub:OWNER/NAME` or `local-dir:FOLDER` of open_clip, or a folder that
            it wrote.
        pretrained: tag or file of the weights, for a model that open_clip names.

    Raises:
        ConfigError: unknown name, weights out of reach, or a model of another kind.
    """
    name = name.replace("transformers/", "hf:", 1) if name.startswith("transformers/") else name
    name = name.removeprefix("open_clip/")
    folder = Path(name.removeprefix("hf:"))
    if folder.is_dir():
        if (folder / "open_clip_config.json").exists():
            return _of_open_clip(f"local-dir:{folder}", None)
        if not (folder / "config.json").exists():
            raise ConfigError(
                f"{folder} holds neither config.json (transformers) nor open_clip_config.json (open_clip)"
            )
        return _of_transformers(str(folder))
    if name.startswith("hf:"):
        return _of_transformers(name.removeprefix("hf:"))
    return _of_open_clip(name.removeprefix("open_clip:"), pretrained)


def _of_open_clip(name: str, pretrained: str | None) -> Dual:
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(f"{name} needs the package open_clip: pip install open_clip_torch") from error
    if not name.startswith(("hf-hub:", "local-dir:")):
        name = name.replace("/", "-")
        _check_weights(name, pretrained, open_clip)
    try:
        logging.disable(logging.ERROR)  # it logs what it then raises
        with failing_fast(not name.startswith("local-dir:")):
            model = open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # the hub, safetensors and open_clip each raise types of their own
        raise _unreachable(name, error, "local-dir:FOLDER, or --pretrained FILE") from error
    finally:
        logging.disable(logging.NOTSET)
    found: dict[str, Any] = open_clip.get_model_preprocess_cfg(model)
    size = found["size"]
    form = InputFormat(
        (size, size) if isinstance(size, int) else tuple(size), tuple(found["mean"]), tuple(found["std"]),
        found["interpolation"], found["resize_mode"] == "squash",
    )  # fmt: skip
    return Dual(model, lambda texts: {"text": tokenizer(list(texts))}, form, False, (f"open_clip/{name}", pretrained))


def _check_weights(name: str, pretrained: str | None, open_clip: Any) -> None:
    """Raise a ConfigError unless open_clip has a model of that name, with those weights."""
    if open_clip.get_model_config(name) is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), 3, 0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "open_clip.list_models() shows all."
        raise ConfigError(f"open_clip has no model {name!r}; {hint} Models of transformers are written hf:NAME.")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None or not (pretrained in tags or Path(pretrained).is_file()):
        what = "needs --pretrained" if pretrained is None else f"has no weights {pretrained!r}"
        raise ConfigError(f"{name} {what}; there are {', '.join(tags) or 'none'}, or give a file of weights")


def _of_transformers(name: str) -> Dual:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    try:
        with failing_fast(not Path(name).is_dir()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of slow processors: only their numbers are read
            config = AutoConfig.from_pretrained(name)
            if config.model_type not in ("clip", "siglip"):
                raise ConfigError(f"{name} is a model of type {config.model_type}; this recipe takes clip and siglip")
            model = AutoModel.from_pretrained(name, dtype=torch.float32)
            tokenizer, processor = AutoTokenizer.from_pretrained(name), AutoImageProcessor.from_pretrained(name)
    except ConfigError:
        raise
    except Exception as error:  # the hub, safetensors and transformers each raise types of their own
        raise _unreachable(name, error, "FOLDER") from error
    side, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    names = ("input_ids", "attention_mask") if config.model_type == "clip" else ("input_ids",)  # as each was trained

    def tokenize(texts: Sequence[str]) -> Tokens:
        found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return {key: found[key] for key in names}

    form = InputFormat(
        (side, side), tuple(processor.image_mean), tuple(processor.image_std),
        {2: "bilinear", 1: "lanczos"}.get(int(processor.resample), "bicubic"), config.model_type == "siglip",
    )  # fmt: skip
    return Dual(model, tokenize, form, True, (f"transformers/{name}", None))


def _unreachable(name: str, error: Exception, instead: str) -> ConfigError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConfigError(
        f"cannot load {name!r}: {reason} Check the name and the network; without a network, give weights on disk with "
        f"--model {instead}, or try --demo."
    )
