"""Calibration text: seeded, disjoint, enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from moe_routing.data.calibration import Document, select_text, write_documents
from moe_routing.data.items import document_item
from moe_routing.errors import InputError

TEXTS = [" ".join(f"w{place}x{word}" for word in range(20)) for place in range(100)]


def _select(seed: int = 0, tokens: int = 100, taken: tuple[int, ...] = ()) -> tuple[Document, ...]:
    items = [document_item("d", place, TEXTS[place], TEXTS[place]) for place in taken]
    return select_text(TEXTS, items, tokens, np.random.default_rng(seed)).documents


def test_same_seed_same_text_another_seed_another() -> None:
    assert _select(0) == _select(0)
    assert _select(0) != _select(1)


def test_pool_is_four_times_what_is_asked_for() -> None:
    result = select_text(TEXTS, [], 100, np.random.default_rng(0))
    assert (result.n_pool, result.n_dropped, result.n_words) == (20, 0, 400)
    assert [TEXTS[int(document.id[-5:])] for document in result.documents] == [
        document.text for document in result.documents
    ]


def test_documents_of_the_evaluation_sets_are_dropped() -> None:
    everything = _select(0)
    taken = tuple(int(document.id[-5:]) for document in everything[:7])
    assert _select(0, taken=taken) == everything[7:]


def test_too_little_left_is_an_error() -> None:
    with pytest.raises(InputError, match=r"^80 words are left in 4 documents \(16 of 20 overlap"):
        _select(0, taken=tuple(int(document.id[-5:]) for document in _select(0)[:16]))
    with pytest.raises(InputError, match=r"2000 words .* \(0 of 100 .* calibration.tokens is 2001"):
        _select(0, tokens=2001)


def test_documents_apart_are_the_last_ones_that_do_not_overlap() -> None:
    alone = select_text(TEXTS, [], 100, np.random.default_rng(0))
    both = select_text(TEXTS, [], 100, np.random.default_rng(0), apart=10)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert both.documents == alone.documents
    assert not alone.apart
    assert [int(document.id[-5:]) for document in both.apart] == order[:-11:-1].tolist()
    last = int(order[-1])
    items = [document_item("d", last, TEXTS[last], TEXTS[last])]
    fewer = select_text(TEXTS, items, 100, np.random.default_rng(0), apart=10)
    assert (fewer.apart[:9], fewer.n_dropped) == (both.apart[1:], 0)
    assert fewer.documents == both.documents
    assert fewer.fingerprint != both.fingerprint != alone.fingerprint


def test_of_a_small_source_the_pool_leaves_the_documents_apart() -> None:
    result = select_text(TEXTS, [], 1600, np.random.default_rng(0), apart=15)
    assert (len(result.documents), len(result.apart), result.n_pool) == (85, 15, 85)
    assert not {*result.documents} & {*result.apart}
    with pytest.raises(InputError, match=r"1700 words are .* calibration.tokens is 1701"):
        select_text(TEXTS, [], 1701, np.random.default_rng(0), apart=15)


def test_too_few_documents_apart_is_an_error() -> None:
    taken = np.random.default_rng(0).permutation(len(TEXTS))[:-2]
    items = [document_item("d", place, TEXTS[place], TEXTS[place]) for place in taken]
    with pytest.raises(InputError, match=r"^2 documents are left to .* calibration.documents is 3"):
        select_text(TEXTS, items, 0, np.random.default_rng(0), apart=3)


def test_fingerprint_follows_the_documents() -> None:
    results = [select_text(TEXTS, [], 100, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert results[0].fingerprint == results[1].fingerprint != results[2].fingerprint


def test_file_holds_id_and_text(tmp_path: Path) -> None:
    write_documents([Document("a", "text\nof ü"), Document("b", "x")], tmp_path / "c.parquet")
    rows = pq.read_table(tmp_path / "c.parquet").to_pylist()
    assert rows == [{"id": "a", "text": "text\nof ü"}, {"id": "b", "text": "x"}]
