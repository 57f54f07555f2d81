"""Metrics of written texts against values worked out by hand, or by another implementation."""

from __future__ import annotations

import math

import pytest
from common.language import generation_metrics as gm
from nltk.translate.nist_score import corpus_nist

TEXTS = ["the cat sat on the mat today", "a dog ran in the big park now"]
REFS = [["the cat sat on a mat today"], ["a dog ran in a very big park now"]]


def test_texts_equal_to_a_reference_score_highest() -> None:
    found = gm.score_texts(TEXTS, [["something else entirely", text] for text in TEXTS])
    assert found["bleu"] == pytest.approx(100)
    assert found["rouge_l"] == pytest.approx(1)
    assert found["meteor_stem"] == pytest.approx((1 - 0.5 / 7**3 + 1 - 0.5 / 8**3) / 2)  # one chunk of all words
    assert gm.cider(TEXTS, [[text] for text in TEXTS]) == pytest.approx(10)


def test_bleu_by_its_formula() -> None:
    text, refs = "the cat sat on the mat by the door", ["the cat sat on a mat", "There is a cat on the mat by the Door"]
    # "the" counts twice, as often as one reference has it; "sat on the" and what holds it is in none. The reference of
    # 10 words is closest in length to the 9.
    precisions = [8 / 9, 8 / 8, 6 / 7, 4 / 6]
    expected = 100 * math.prod(precisions) ** 0.25 * math.exp(1 - 10 / 9)
    assert gm.bleu([text], [refs]) == pytest.approx(expected)


def test_nist_by_its_formula() -> None:
    # References of 4 words: a twice, b and c once. Information: log2(4/2) for a, log2(4/1) for b; "a b": log2(2/1).
    found = gm.nist(["a b"], [["a b a c"]])
    penalty = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(2 / 4) ** 2)
    assert found == pytest.approx(((1 + 2) / 2 + 1 / 1) * penalty)
    assert gm.nist(["a b"], [["a b a"]]) == pytest.approx(  # two thirds of the length are worth half
        0.5 * ((math.log2(3 / 2) + math.log2(3)) / 2 + 1)
    )


def test_nist_with_one_reference_each_is_that_of_nltk() -> None:
    expected = corpus_nist([[ref.split() for ref in group] for group in REFS], [text.split() for text in TEXTS])
    assert gm.nist(TEXTS, REFS) == pytest.approx(expected)


def test_nist_takes_words_from_all_references() -> None:
    # Each reference has one of the words: nltk would count one of them only.
    assert gm.nist(["a b"], [["a c", "d b"]]) == pytest.approx((math.log2(4) + math.log2(4)) / 2)


def test_meteor_matches_stems_by_its_formula() -> None:
    # "cats" for "cat": 2 of 2 words, 2 of 3 of the reference, in one chunk.
    mean = 1 * (2 / 3) / (0.9 * 1 + 0.1 * (2 / 3))
    assert gm.meteor_stem(["the cats"], [["the cat sat"]]) == pytest.approx(mean * (1 - 0.5 * (1 / 2) ** 3))


def test_rouge_l_by_its_formula() -> None:
    # The longest common subsequence of "a b c d" and "a c d e f" is "a c d"; the other reference has less.
    precision, recall, beta = 3 / 4, 3 / 5, 1.2
    expected = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert gm.rouge_l(["a b c d"], [["a c d e f", "g h"]]) == pytest.approx(expected)


def test_cider_rewards_rare_words_and_is_none_for_one_text() -> None:
    references = [["a cheap pub by the river"], ["a cheap cafe in the centre"], ["a cheap pub near the sea"]]
    told = [group[0] for group in references]
    common = gm.cider(["a cheap thing of the past", *told[1:]], references)
    rare = gm.cider(["one more pub at some river", *told[1:]], references)
    assert gm.cider(["nothing", *told[1:]], references) < common + 1e-9 < rare < gm.cider(told, references)
    assert gm.score_texts(["a"], [["a"]])["cider"] is None


def test_case_and_marks_do_not_count_where_the_challenge_ignores_them() -> None:
    left, right = gm.score_texts(TEXTS, REFS), gm.score_texts([t.upper() for t in TEXTS], REFS)
    assert left == pytest.approx(right)
    assert gm.words("The Café, £20-25: it's 4.5!") == ["the", "café", "£20", "25", "it's", "4.5"]


def test_empty_texts_score_nothing() -> None:
    found = gm.score_texts(["", ""], REFS)
    assert set(found.values()) == {0}


@pytest.mark.parametrize(("texts", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_texts_without_references_are_refused(texts: list[str], references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        gm.score_texts(texts, references)
