"""Overlap by 13-grams, against a slow loop."""

from __future__ import annotations

import string

import numpy as np

from moe_routing.data.items import Item, document_item
from moe_routing.data.overlap import item_ngrams, ngrams, overlapping, words

SENTENCE = "one two three four five six seven eight nine ten eleven twelve thirteen"


def _document(text: str) -> Item:
    return document_item("d", 0, text, text)


def test_planted_overlap_is_found_whatever_its_case_and_marks() -> None:
    planted = "Before it: One, two - three; FOUR five six (seven) eight nine ten eleven twelve "
    documents = ["nothing of the kind", planted + "'thirteen'. After it.", planted + "fourteen"]
    assert overlapping(documents, [_document(f"x y z {SENTENCE} w")]) == {1}


def test_overlap_across_context_and_continuation() -> None:
    context, _, rest = SENTENCE.partition(" seven")
    choices = (" something else", f" seven{rest} and more")
    item = Item("q", "q", f"a b c {context}", choices, 0)
    assert overlapping([SENTENCE, "another text"], [item]) == {0}
    shorter = Item("q", "q", f"a b c {context}", choices[:1], 0)
    assert overlapping([SENTENCE, "another text"], [shorter]) == set()


def test_short_texts_overlap_only_when_equal() -> None:
    item = _document("A short text.")
    assert overlapping(["a short text", "short text", "a short text too", "..."], [item]) == {0}
    assert overlapping(["...", ""], [_document("!?")]) == set()


def test_equals_slow_loop_on_random_words() -> None:
    rng = np.random.default_rng(3)

    def text(count: int) -> str:
        return " ".join(rng.choice(list(string.ascii_lowercase[:2]), count))

    found = 0
    for _ in range(50):
        documents = [text(int(rng.integers(13, 30))) for _ in range(6)]
        context = text(int(rng.integers(13, 20)))
        item = Item("q", "q", context, (" " + text(5), " " + text(9)), 0)
        wholes = [f"{context}{continuation}" for continuation in item.continuations]
        slow = {
            place
            for place, document in enumerate(documents)
            for start in range(0, len(document) - 24, 2)
            if any(document[start : start + 25] in whole for whole in wholes)
        }
        found += len(slow)
        assert overlapping(documents, [item]) == slow
    # Some overlap and some don't, or this shows nothing.
    assert 0 < found < 300


def test_ngrams() -> None:
    assert list(ngrams(["a", "b", "c", "d"], 3)) == ["a b c", "b c d"]
    assert list(ngrams(["a"], 3)) == ["a"]
    assert list(ngrams([], 3)) == []
    item = Item("q", "q", "a b c", (" d", " e f"), 0)
    assert list(item_ngrams(item, 3)) == ["a b c", "b c d", "b c e", "c e f"]


def test_words_are_the_same_in_tokenized_and_running_text() -> None:
    assert words("the well @-@ known 's , one") == words("The well-known's, ONE")
