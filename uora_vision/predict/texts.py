"""Texts: told apart, given a value, or continued."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .network import failing_fast
from .tasks import Computed, head_inputs

DEFAULT_NEW = 128
"""Longest answer in tokens, where the adapter does not say."""


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model of transformers; one without a padding token pads with its end token.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        with failing_fast(not Path(name).is_dir()):
            tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers and the hub's client each raise types of their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"no tokenizer {name!r}: {reason}; --model gives a base on disk") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(f"the tokenizer of {name!r} has neither a padding token nor an end token; set one of them")
    return tokenizer


class TextClassification:
    """Texts, or several that belong together, through a model with a head.

    Args:
        model: of transformers, that gives logits.
        tokenizer: its own.
        config: `preprocessing` of the adapter: `columns`, as many texts as an example has, and `max_length`.
    """

    in_threads = False

    def __init__(self, model: Any, tokenizer: Any, config: Mapping[str, Any]) -> None:
        self.model = model
        self.tokenizer, self.count = tokenizer, len(config.get("columns", ("text",)))
        self.length = config.get("max_length")
        model.config.pad_token_id = tokenizer.pad_token_id

    def read(self, item: Any) -> tuple[str, ...]:
        texts = (item,) if isinstance(item, str) else item
        if not isinstance(texts, tuple) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"a text, or a tuple of texts, is expected, not {type(item).__name__}")
        if len(texts) != self.count:
            raise DataError(f"an example of this adapter has {self.count} texts, not {len(texts)}")
        check_text(" ".join(texts))
        return texts

    @torch.no_grad()
    def compute(self, inputs: Sequence[tuple[str, ...]], features: bool, base: bool = False) -> Computed:
        columns = [list(texts) for texts in zip(*inputs, strict=True)]
        cut = {"truncation": True, "max_length": self.length} if self.length else {}
        given = self.tokenizer(*columns, padding=True, return_tensors="pt", **cut).to(self.model.device)
        with head_inputs(self.model, features) as seen:
            logits = self.model(**given).logits
        return Computed(logits.float().cpu(), features=seen() if features else None)


class TextGeneration:
    """Prompts, and what a causal language model writes after them.

    Args:
        model: of transformers.
        tokenizer: its own.
        config: `preprocessing` of the adapter: how a prompt is told, and how is searched for an answer.
    """

    in_threads = False  # a tokenizer is not for several

    def __init__(self, model: Any, tokenizer: Any, config: Mapping[str, Any]) -> None:
        self.model = model
        self.tokenizer, self.config = tokenizer, config
        if config.get("chat_template"):
            tokenizer.chat_template = config["chat_template"]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.limit: int = limit or 2**31

    def read(self, item: Any) -> list[int]:
        if not isinstance(item, str):
            raise DataError(f"a prompt is a text, not {type(item).__name__}")
        check_text(item)
        ids = self._ids(item.strip())
        if len(ids) >= self.limit:
            raise DataError(f"the prompt has {len(ids)} tokens, and the model {self.limit} positions")
        return ids

    @torch.no_grad()
    def compute(self, inputs: Sequence[list[int]], features: bool, base: bool = False) -> Computed:
        if features:
            raise ConfigError("a language model has no head, so there are no embeddings of its answers")
        width, padding = max(map(len, inputs)), self.tokenizer.pad_token_id
        rows = torch.tensor([[padding] * (width - len(ids)) + ids for ids in inputs], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in inputs], device=self.model.device)
        size = self.config.get("no_repeat_ngram_size", 0)
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}
        found = self.model.generate(
            input_ids=rows, attention_mask=mask, do_sample=False, use_cache=True,
            max_new_tokens=min(self.config.get("max_new_tokens", DEFAULT_NEW), self.limit - width),
            num_beams=self.config.get("num_beams", 1), length_penalty=self.config.get("length_penalty", 1.0),
            logits_processor=no_repeats(size, width), pad_token_id=padding,
            eos_token_id=sorted(ends) or None,
        )  # fmt: skip
        texts = self.tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
        return Computed(texts=[text.strip() for text in texts])

    def _ids(self, text: str) -> list[int]:
        if self.config.get("chat_template"):
            turns = [{"role": "user", "content": text}]
            told = str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
            return list(self.tokenizer(told, add_special_tokens=False)["input_ids"])
        ids = list(self.tokenizer(text)["input_ids"])
        if self.config.get("prompt_end") == "eos" and (not ids or ids[-1] != self.tokenizer.eos_token_id):
            ids.append(self.tokenizer.eos_token_id)
        return ids


def check_text(text: str) -> None:
    """Raise a DataError where there is none, or one that no tokenizer takes."""
    if not text.strip():
        raise DataError("there is no text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"it has half of a character, U+{ord(text[error.start]):04X}") from error


def no_repeats(size: int, prompt: int) -> Any:
    """Bans that `size` tokens are written twice. Repeats of the prompt are wanted: names are copied from it.

    Args:
        prompt: length of the prompts.
    """
    from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor

    class NoRepeat(NoRepeatNGramLogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return super().__call__(input_ids[:, prompt:], scores)

    return LogitsProcessorList([NoRepeat(size)] if size else [])


def tokenizer_name(spec: str) -> str:
    """Of a model such as `transformers/NAME`.

    Raises:
        ConfigError: it is of another library.
    """
    if not spec.startswith("transformers/"):
        raise ConfigError(f"{spec} is no model of texts: transformers/NAME_OR_FOLDER is expected")
    return spec.removeprefix("transformers/")


def read_texts(path: Path, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The texts of a file: those columns of a table, the only one that it has, or the lines of a .txt file.

    Raises:
        DataError: it cannot be read, or has no such columns.
    """
    from .frames import as_text, read_frame

    if path.suffix.lower() == ".txt":
        if len(columns) != 1:
            raise DataError(f"{path} has one text in a line, and an example has {len(columns)}; give a table")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        return [(line.strip(),) for line in lines if line.strip()]
    frame = read_frame(path)
    names = list(frame.columns)
    wanted = list(columns) if set(columns) <= set(names) else names if len(columns) == len(names) == 1 else None
    if wanted is None:
        missing = ", ".join(repr(name) for name in columns if name not in names)
        raise DataError(
            f"{path} has no column {missing}; it has {', '.join(map(repr, names))}. --columns names those that hold "
            "the texts"
        )
    return [tuple(as_text(value) for value in row) for row in frame[wanted].itertuples(index=False, name=None)]
