"""Language models and their tokenizers by name, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from uora_vision.predict.network import failing_fast

from ..errors import DataError, ModelError

transformers.utils.logging.set_verbosity_error()  # a new head is no news here
transformers.utils.logging.disable_progress_bar()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; one without a padding token pads with its end token.

    Raises:
        ModelError: there is none, or it has neither token.
    """
    tokenizer = _load(AutoTokenizer, name)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {name!r} has neither a padding token nor an end token; set one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    auto: Any, name: str, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> PreTrainedModel:
    """A pretrained model in float32, or as `options` say.

    Args:
        auto: one of transformers' auto classes.
        name: a folder, or a name on the hub.

    Raises:
        ModelError: it cannot be loaded.
    """
    model = _load(auto, name, **{"dtype": "float32", **options})
    if tokenizer is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            raise ModelError(
                f"the tokenizer of {name!r} has {len(tokenizer)} tokens and its model only "
                f"{model.get_input_embeddings().num_embeddings}: they do not belong together"
            )
    return model


def longest(model: PreTrainedModel, asked: int | None, default: int) -> int:
    """How many tokens an example may have.

    Raises:
        DataError: more was asked for than the model has positions.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and model.config.model_type in ("roberta", "xlm-roberta", "camembert", "deberta"):
        limit -= 2  # their positions begin after the padding's
    if asked is not None and limit is not None and asked > limit:
        raise DataError(f"--max-length {asked} is more than the {limit} positions of {model.config.model_type}")
    return asked if asked is not None else min(default, limit or default)


def _load(auto: Any, name: str, **options: Any) -> Any:
    folder = Path(name)
    try:
        with failing_fast(not folder.is_dir()):
            return auto.from_pretrained(name, **options)
    except Exception as error:  # transformers and the hub's client each raise types of their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else ""
        advice = (
            f"The folder holds {held or 'nothing'}."
            if folder.is_dir()
            else ("Check the name and the network; without a network, give a folder with --model, or try --demo.")
        )
        what = "tokenizer" if auto is AutoTokenizer else "config" if auto is AutoConfig else "model"
        raise ModelError(f"no {what} {name!r}: {reason} {advice}") from error
