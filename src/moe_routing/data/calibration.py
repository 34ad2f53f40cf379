"""Calibration text: documents that share no 13-gram with an evaluation set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_routing.data.items import Item
from moe_routing.data.overlap import overlapping
from moe_routing.errors import InputError
from moe_routing.files import atomic_path

POOL_FACTOR = 4
"""The overlap check reads this many times the text asked for, so it may drop all but one part."""


@dataclass(frozen=True)
class Document:
    """A calibration text; the id holds its index in the source, counted from 0."""

    id: str
    text: str


@dataclass(frozen=True)
class CalibrationText:
    """The documents of a pool that overlap no evaluation set.

    Attributes:
        documents: kept ones, in random order.
        apart: other ones, to certify on.
        n_pool: documents that were checked.
        n_dropped: those of them that overlap an evaluation item.
    """

    documents: tuple[Document, ...]
    apart: tuple[Document, ...]
    n_pool: int
    n_dropped: int

    @property
    def n_words(self) -> int:
        """Words between white space; a tokenizer makes at least one token of each."""
        return sum(_count_words(document.text) for document in self.documents)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids and texts in order."""
        digest = hashlib.sha256()
        for document in (*self.documents, *self.apart):
            digest.update(f"{document.id}\0{document.text}\0".encode())
        return digest.hexdigest()


def select_text(
    texts: Sequence[str],
    items: Iterable[Item],
    tokens: int,
    rng: np.random.Generator,
    *,
    apart: int = 0,
) -> CalibrationText:
    """Draw documents in random order, then drop those that overlap an item.

    The draw ends at ``POOL_FACTOR * tokens`` words. The result depends on the seed and the texts
    alone, not on a tokenizer.

    Args:
        texts: the documents of the source.
        items: what they must not overlap.
        tokens: words that must be left.
        rng: draws the order.
        apart: number of documents to keep apart from the others, for certification: the last ones
            in the random order that do not overlap.

    Raises:
        InputError: fewer than ``tokens`` words, or than ``apart`` other documents, are left.
    """
    order = [
        Document(f"calibration-{index:05d}", texts[index])
        for index in map(int, rng.permutation(len(texts)))
    ]
    words_before = np.cumsum([0, *(_count_words(document.text) for document in order[:-1])])
    n_pool = int((words_before < POOL_FACTOR * tokens).sum())
    last = range(len(order) - 1, max(-1, len(order) - 1 - POOL_FACTOR * apart), -1)
    checked = sorted({*range(n_pool), *last})
    found = overlapping([order[place].text for place in checked], items)
    dropped = {checked[index] for index in found}
    others = [place for place in last if place not in dropped][:apart]
    pool = [place for place in range(n_pool) if place not in others]
    kept = [order[place] for place in pool if place not in dropped]
    n_dropped = len(pool) - len(kept)
    result = CalibrationText(
        tuple(kept), tuple(order[place] for place in others), len(pool), n_dropped
    )
    if result.n_words < tokens:
        raise InputError(
            f"{result.n_words} words are left in {len(kept)} documents ({n_dropped} of "
            f"{len(pool)} overlap an evaluation set, and {len(others)} are kept apart: "
            f"calibration.documents is {apart}); calibration.tokens is {tokens}, and at least as "
            "many words are needed"
        )
    if len(others) < apart:
        raise InputError(
            f"{len(others)} documents are left to certify and to test on; "
            f"calibration.documents is {apart}"
        )
    return result


def write_documents(documents: Sequence[Document], path: Path | str) -> None:
    """Write documents as Parquet with columns ``id`` and ``text``.

    Raises:
        InputError: the file cannot be written.
    """
    columns = {"id": [d.id for d in documents], "text": [d.text for d in documents]}
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns, schema=schema), temporary)


def _count_words(text: str) -> int:
    return len(text.split())
