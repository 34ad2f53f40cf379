"""Text that calibration and evaluation share, by word 13-grams (Brown et al. 2020, appendix C)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from moe_routing.data.items import Item

NGRAM = 13
"""Texts overlap if they share this many words in a row."""


def words(text: str) -> list[str]:
    """Return lower-case words without punctuation, tokenized and running text alike."""
    return re.findall(r"\w+", text.lower())


def ngrams(tokens: Sequence[str], n: int = NGRAM) -> Iterator[str]:
    """Yield each run of ``n`` words; a shorter text is one run, an empty one none."""
    if not tokens:
        return
    for start in range(max(1, len(tokens) - n + 1)):
        yield " ".join(tokens[start : start + n])


def item_ngrams(item: Item, n: int = NGRAM) -> Iterator[str]:
    """Yield the n-grams of the context with each continuation after it."""
    context = words(item.context)
    yield from ngrams(context, n)
    for continuation in item.continuations:
        # N-grams within the context were yielded above.
        yield from ngrams([*context[-(n - 1) :], *words(continuation)], n)


def overlapping(documents: Sequence[str], items: Iterable[Item]) -> set[int]:
    """Return the indices of the documents that share an n-gram with any item.

    A document shorter than an n-gram overlaps only an item text with exactly the same words.
    """
    indices: dict[str, list[int]] = {}
    for index, document in enumerate(documents):
        for ngram in ngrams(words(document)):
            indices.setdefault(ngram, []).append(index)
    found: set[int] = set()
    for item in items:
        for ngram in item_ngrams(item):
            found.update(indices.get(ngram, ()))
    return found
