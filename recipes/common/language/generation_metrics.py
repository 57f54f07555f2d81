"""How close written texts are to references of people, several of them per text: the metrics of the E2E NLG challenge.

BLEU and NIST ignore case and split words as mteval-v13a does. ROUGE-L and CIDEr are those of the COCO captions, over
lower-case words without punctuation. METEOR matches words and stems but no synonyms, which would need WordNet's data,
so it is lower than METEOR 1.5 and carries another name, `meteor_stem`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from nltk.translate.meteor_score import meteor_score
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

WORDS = re.compile(r"[£$€]?\d+(?:[.,]\d+)*|\w+(?:['\u2019]\w+)*")
NIST_ORDER = 5
NIST_BETA = math.log(0.5) / math.log(1.5) ** 2
"""Texts of two thirds of the references' length are worth half."""


def score_texts(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """All metrics of some texts, each with its references.

    Returns:
        `bleu` (0 to 100), `nist` (0 and up), `meteor_stem` and `rouge_l` (0 to 1), `cider` (0 to 10; None for a single
        text, as it weighs words by how rare they are among the texts' references).

    Raises:
        ValueError: there is no text, or one without references.
    """
    if not texts or len(texts) != len(references) or not all(references):
        raise ValueError(
            f"{len(texts)} texts, {len(references)} groups of references, the smallest of "
            f"{min(map(len, references), default=0)}: every text needs a group of at least one"
        )
    return {
        "bleu": bleu(texts, references),
        "nist": nist(texts, references),
        "meteor_stem": meteor_stem(texts, references),
        "rouge_l": rouge_l(texts, references),
        "cider": cider(texts, references) if len(texts) > 1 else None,
    }


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return WORDS.findall(text.lower())


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    streams = [list(column) for column in zip_longest(*references)]  # sacrebleu skips the None of shorter groups
    return BLEU(lowercase=True, force=True).corpus_score(list(texts), streams).score


def nist(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """As mteval-v13a: an n-gram counts up to as often as any one reference has it, and the length to reach is the mean
    of a text's references. (nltk's NIST takes one reference for each order instead, and fails on short texts.)"""
    split = Tokenizer13a()
    told = [[split(ref.lower()).split() for ref in group] for group in references]
    written = [split(text.lower()).split() for text in texts]
    seen = Counter(gram for group in told for ref in group for n in range(1, NIST_ORDER + 1) for gram in _grams(ref, n))
    seen[()] = sum(len(ref) for group in told for ref in group)
    total = 0.0
    for n in range(1, NIST_ORDER + 1):
        information, count = 0.0, 0
        for text, group in zip(written, told, strict=True):
            most: Counter[tuple[str, ...]] = Counter()
            for ref in group:
                most |= Counter(_grams(ref, n))
            found = Counter(_grams(text, n)) & most
            information += sum(times * math.log2(seen[gram[:-1]] / seen[gram]) for gram, times in found.items())
            count += max(0, len(text) - n + 1)
        total += information / count if count else 0.0
    length, wanted = sum(map(len, written)), sum(sum(map(len, group)) / len(group) for group in told)
    ratio = min(1.0, length / wanted) if wanted else 1.0
    return total * math.exp(NIST_BETA * math.log(ratio) ** 2) if ratio else 0.0


def meteor_stem(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over the texts of each one's best reference."""
    none: Any = _NoSynonyms()
    scores = [
        meteor_score([words(ref) for ref in group], words(text), wordnet=none)
        for text, group in zip(texts, references, strict=True)
    ]
    return sum(scores) / len(scores)


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    return float(Rouge().compute_score(*_coco(texts, references))[0])


def cider(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    return float(Cider().compute_score(*_coco(texts, references))[0])


class _NoSynonyms:
    """In WordNet's place."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _coco(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict[int, list[str]], ...]:
    """References and texts as COCO's metrics take them: by number, words with a space between."""
    told = {n: [" ".join(words(ref)) for ref in group] for n, group in enumerate(references)}
    return told, {n: [" ".join(words(text))] for n, text in enumerate(texts)}


def _grams(text: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(text[start:] for start in range(n)), strict=False)
