"""Instructions and answers, or whole conversations, as token ids of which only the answers are learned."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from uora_vision.predict.frames import as_text

from ..errors import DataError, ModelError

Messages = list[dict[str, str]]
"""Turns with `role` (system, user, assistant) and `content`."""

ANSWERS = ("output", "response", "completion", "answer")
"""What the column with the answer is called beside `instruction`; the first that is there."""
ROLES = ("system", "user", "assistant")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}Assistant:{% endif %}"
)
"""For a tokenizer that has none. Line breaks are written as strings: templates lose those that follow a tag."""
TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class Encoded:
    """Examples as a trainer wants them, and what became of the others.

    Args:
        rows: `input_ids`, `labels` (-100 where nothing is to be learned) and `length`.
        kept: of every row, the number of its conversation.
        cut: rows that lost their end.
        left_out: conversations of which no answer would have been left.
    """

    rows: Dataset
    kept: list[int]
    cut: int
    left_out: int


def read_dialogues(table: Dataset, source: str) -> tuple[list[Messages], int]:
    """Conversations that end with an answer, and how many rows had none and are left out.

    A table has `messages`, or `instruction` with one of `ANSWERS` and perhaps `input`.

    Raises:
        DataError: it has other columns, turns of another form, or no answer at all.
    """
    names = table.column_names
    answer = next((name for name in ANSWERS if name in names), None)
    if "messages" in names:
        found = [_turns(turns, number, source) for number, turns in enumerate(table["messages"], 1)]
    elif "instruction" in names and answer is not None:
        inputs = table["input"] if "input" in names else [""] * len(table)
        found = [_alpaca(*row) for row in zip(table["instruction"], inputs, table[answer], strict=True)]
    else:
        raise DataError(
            f"{source} has the columns {', '.join(map(repr, names))}; expected 'messages', or 'instruction' (and "
            f"'input') with one of {', '.join(map(repr, ANSWERS))}. Columns of a file without header are named with "
            "--columns."
        )
    dialogues = [turns for turns in found if turns]
    if not dialogues:
        raise DataError(f"none of the {len(found)} rows of {source} has both a question and an answer")
    return dialogues, len(found) - len(dialogues)


def prepare_template(tokenizer: PreTrainedTokenizerBase, folder: Path | None = None) -> str:
    """The chat template of a tokenizer; one that has none gets the one of a run's folder, or `TEMPLATE`.

    Raises:
        ModelError: the tokenizer has no end token, so that no answer would ever end.
    """
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {tokenizer.name_or_path!r} has no end token; set one")
    file = folder / TEMPLATE_FILE if folder is not None else None
    if file is not None and file.is_file():
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
    if not isinstance(tokenizer.chat_template, str):  # several, by name
        tokenizer.chat_template = tokenizer.get_chat_template()
    return tokenizer.chat_template


def encode(dialogues: Sequence[Messages], tokenizer: PreTrainedTokenizerBase, length: int, source: str) -> Encoded:
    """Token ids and labels, of at most `length` tokens.

    Raises:
        DataError: no answer begins within `length` tokens, or the template does not take these roles.
    """
    rows, kept, cut, shortest = [], [], 0, 0
    for number, turns in enumerate(dialogues):
        ids, labels = [], []
        for text, learned in _pieces(turns, tokenizer):
            part = _tokens(text, tokenizer)
            ids += part
            labels += part if learned else [-100] * len(part)
        first = next((n for n, label in enumerate(labels) if label != -100), 0) + 1
        shortest = min(shortest or first, first)
        if first <= length:
            cut += len(ids) > length
            kept.append(number)
            rows.append({"input_ids": ids[:length], "labels": labels[:length], "length": min(length, len(ids))})
    if not rows:
        raise DataError(
            f"none of {len(dialogues)} examples of {source} has an answer within {length} tokens, the first begins at "
            f"{shortest}; raise --max-length, or take a model with more positions"
        )
    return Encoded(Dataset.from_list(rows), kept, cut, len(dialogues) - len(rows))


def prompt_ids(turns: Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a conversation up to where the next answer begins, divided as in training."""
    asked = _render(turns, tokenizer, ask=True)
    last = max((n for n, turn in enumerate(turns, 1) if turn["role"] == "assistant"), default=0)
    known = [text for text, _ in _pieces(turns[:last], tokenizer)] if last else []
    if not asked.startswith(before := "".join(known)):  # the template tells earlier answers in another way
        known, before = [], ""
    return [token for text in (*known, asked[len(before) :]) for token in _tokens(text, tokenizer)]


def question(turns: Messages) -> str:
    """What was said before the last answer, for people to read."""
    said = turns[:-1]
    return said[0]["content"] if len(said) == 1 else "\n".join(f"{t['role']}: {t['content']}" for t in said)


def _pieces(turns: Messages, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The text of a conversation that ends with an answer, cut where an answer begins or ends; whether it is one.

    Every piece becomes tokens by itself: when a model answers, its prompt ends there too. Of a template that tells
    earlier answers in another way than the last (some leave out what was thought), only the last one is learned.
    """
    whole, pieces, done = _render(turns, tokenizer), [], 0
    for n, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        asked, answered = _render(turns[:n], tokenizer, ask=True), _render(turns[: n + 1], tokenizer)
        if not whole.startswith(answered):
            continue
        start = max(done, _shared(asked, answered))
        pieces += [(whole[done:start], False), (whole[start : len(answered)], True)]
        done = len(answered)
    return pieces


def _shared(first: str, second: str) -> int:
    """With how many equal characters they begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def _render(turns: Messages, tokenizer: PreTrainedTokenizerBase, ask: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))
    except Exception as error:  # templates raise what they want
        roles = ", ".join(turn["role"] for turn in turns)
        reason = " ".join(str(error).split())
        raise DataError(f"the chat template cannot tell a conversation of {roles}: {reason}") from error


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Without the tokens that the tokenizer would put around a text: the template has them."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def _alpaca(instruction: Any, given: Any, answer: Any) -> Messages:
    instruction, given, answer = map(as_text, (instruction, given, answer))
    asked = "\n\n".join(filter(None, (instruction, given)))
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}] if asked and answer else []


def _turns(turns: Any, number: int, source: str) -> Messages:
    """A conversation up to its last answer, empty where it has none.

    Raises:
        DataError: it is not in the form of a chat.
    """
    if isinstance(turns, str):  # of a csv file
        with contextlib.suppress(ValueError):
            turns = json.loads(turns)
    if turns is None or turns == "":
        return []
    if not isinstance(turns, list) or not all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns):
        raise DataError(f"row {number} of {source} has messages of another form than [{{'role': ..., 'content': ...}}]")
    if strange := [t["role"] for t in turns if t["role"] not in ROLES]:
        raise DataError(f"row {number} of {source} has the role {strange[0]!r}; expected {', '.join(ROLES)}")
    said = [{"role": t["role"], "content": as_text(t["content"])} for t in turns]
    last = max((n for n, t in enumerate(said) if t["role"] == "assistant" and t["content"]), default=0)
    return said[: last + 1] if last else []
