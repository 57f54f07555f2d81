"""Models of which `uora plan` needs no weights: by name, by folder, or by type of transformers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .names import names, resolved, suggestion, text_tower

if TYPE_CHECKING:
    from torch import nn


def on_meta(spec: str) -> tuple[nn.Module, Any]:
    """A model on the meta device, and an input for it. One of transformers given by type has its default sizes.

    Raises:
        ConfigError: there is no such model.
    """
    library, name = resolved(spec)
    if library == "transformers" and not Path(name).is_dir() and name in names(library):
        import torch

        with torch.device("meta"):
            model = _of_type(name)
            return model, _inputs(model, 1)
    with _offline_if_silent(_on_hub(library, name), 3.0) as unreachable:
        if unreachable:
            _check_cached(library, name)
        from ..predict.models import on_meta as made

        return made(f"{library}/{name}")


def _on_hub(library: str, name: str) -> bool:
    """Whether something of a model may have to be fetched."""
    if library == "transformers":
        return not Path(name).is_dir()
    return name.startswith("hf") or (library == "open_clip" and text_tower(name) is not None)


@contextmanager
def _offline_if_silent(needed: bool, seconds: float) -> Iterator[bool]:
    """Inside, what is needed of the hub comes from its cache if the hub does not answer a first question within some
    seconds: libraries would ask five times more, for half a minute. Gives whether that is so."""
    try:
        from huggingface_hub import constants, get_session
    except ImportError:
        needed = False
    if not needed or constants.HF_HUB_OFFLINE:
        yield needed
        return
    answered: list[Any] = []

    def ask() -> None:
        try:
            answered.append(get_session().head(constants.ENDPOINT, timeout=seconds))
        except Exception:  # of its HTTP client, which differs by version
            return

    # A thread, since no timeout bounds the look-up of a host's name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    constants.HF_HUB_OFFLINE = not answered
    try:
        yield not answered
    finally:
        constants.HF_HUB_OFFLINE = False


def _check_cached(library: str, name: str) -> None:
    """Whether the configuration that a model is built from was fetched before; asked before anything large is imported.

    Raises:
        ConfigError: it was not, and the hub cannot be reached.
    """
    from huggingface_hub import errors, try_to_load_from_cache

    repository = text_tower(name) if library == "open_clip" else name
    if library == "timm" or repository is None:
        return
    try:
        if isinstance(try_to_load_from_cache(repository, "config.json"), str):
            return
    except errors.HFValidationError:
        pass
    if library == "open_clip":
        raise ConfigError(
            f"open_clip/{name} takes the configuration of its text tower from {repository} on the Hugging Face hub, "
            "which does not answer; give a model whose text tower is open_clip's own, or one of transformers"
        )
    raise ConfigError(
        f"transformers/{name} is neither a folder nor a model type, and the Hugging Face hub does not answer; give a "
        f"folder with its config.json, or a type{suggestion(name, ('transformers',))}"
    )


def _of_type(name: str) -> Any:
    """A model of a type, by its default configuration: the base model where the type has one."""
    import transformers

    config = transformers.AutoConfig.for_model(name)
    makers = [getattr(transformers, f"AutoModel{task}") for task in TASKS]
    for maker in makers[:-1]:
        try:
            return maker.from_config(config)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
    return makers[-1].from_config(config)


TASKS = (
    "", "ForImageTextToText", "ForCausalLM", "ForSeq2SeqLM", "ForSpeechSeq2Seq", "ForImageClassification",
    "ForObjectDetection", "ForSemanticSegmentation", "ForCTC", "ForPreTraining",
)  # fmt: skip
"""What automatic classes are for; a type has a model for one of these at least."""


def _inputs(model: Any, n: int) -> dict[str, Any]:
    """An input of n samples: an image, or 8 tokens, or both for a model that pairs them."""
    import inspect

    import torch

    accepted, config = inspect.signature(model.forward).parameters, model.config
    tokens = torch.zeros(n, 8, dtype=torch.int64)
    images = {}
    if "pixel_values" in accepted:
        vision = getattr(config, "vision_config", None) or config
        size = getattr(vision, "image_size", None) or 224
        sides = (size, size) if isinstance(size, int) else tuple(size)
        images = {"pixel_values": torch.randn(n, getattr(vision, "num_channels", 3), *sides)}
    if model.main_input_name == "pixel_values":
        return images
    paired = {"input_ids", "pixel_values"} <= set(accepted) and hasattr(config, "projection_dim")
    decoder = {"decoder_input_ids": tokens} if getattr(config, "is_encoder_decoder", False) else {}
    return {"input_ids": tokens} | decoder | (images if paired else {})
