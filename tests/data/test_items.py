"""The item schema and its file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_routing.data.items import Item, document_item, fingerprint, read_items, write_items
from moe_routing.errors import InputError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FILLED = TEXT.filter(str.strip)
COUNT = st.none() | st.integers(0, 2**40)
ENDINGS = st.lists(FILLED, min_size=1, max_size=4, unique=True).map(tuple)
ITEMS = st.lists(
    st.builds(Item, TEXT, TEXT, TEXT, ENDINGS, st.none() | st.just(0), COUNT, COUNT),
    min_size=1,
    max_size=4,
    unique_by=lambda item: item.id,
)
QUESTION = Item("q-0", "c", "A man", (" sits.", "  stands."), 1)


@given(ITEMS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_any_items_survive_the_file(tmp_path: Path, items: list[Item]) -> None:
    write_items(items, tmp_path / "items.parquet")
    assert read_items(tmp_path / "items.parquet") == items


def test_columns_are_the_interface(tmp_path: Path) -> None:
    write_items([QUESTION], tmp_path / "items.parquet")
    table = pq.read_table(tmp_path / "items.parquet")
    names = ["id", "cluster", "context", "continuations", "label", "words", "bytes"]
    assert table.column_names == names
    pq.write_table(table.drop_columns(["words", "label"]), tmp_path / "own.parquet")
    with pytest.raises(InputError, match=r"own\.parquet: column 'label' is missing; needed: id"):
        read_items(tmp_path / "own.parquet")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_items(tmp_path / "items.parquet")
    (tmp_path / "items.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a Parquet table"):
        read_items(tmp_path / "items.parquet")


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], "no items; allowed: at least one"),
        ([QUESTION, QUESTION], "id 'q-0' occurs more than once"),
        ([replace(QUESTION, continuations=())], "item 'q-0' has no continuation"),
        ([replace(QUESTION, continuations=(" a", " "))], "item 'q-0' has an empty continuation"),
        ([replace(QUESTION, continuations=(" a", " a"))], "all continuations of item 'q-0' are"),
        ([replace(QUESTION, label=2)], "item 'q-0' has label 2; allowed: 0 to 1"),
        ([replace(QUESTION, label=-1)], "item 'q-0' has label -1; allowed: 0 to 1"),
    ],
)
def test_items_that_cannot_be_scored_are_refused(tmp_path, items, expected):
    write_items(items, tmp_path / "items.parquet")
    with pytest.raises(InputError, match=f"items.parquet: {re.escape(expected)}"):
        read_items(tmp_path / "items.parquet")


def test_choices_lack_one_delimiter_only() -> None:
    assert QUESTION.choices == ("sits.", " stands.")


def test_document_counts_words_and_bytes_of_the_original() -> None:
    item = document_item("d", 7, original=" ein  Café \n", scored="scored")
    # re.split counts the empty text before and after the outer white space.
    assert (item.words, item.bytes) == (4, 13)
    assert (item.id, item.cluster, item.continuations) == ("d-00007", "d-00007", ("scored",))


def test_fingerprint_sees_every_field_and_the_order() -> None:
    changes = [
        {"id": "q-1"},
        {"cluster": "d"},
        {"context": "A man "},
        {"continuations": (" sits.", " stands.")},
        {"label": 0},
        {"words": 1},
        {"bytes": 1},
    ]
    variants = [[QUESTION], *([replace(QUESTION, **change)] for change in changes)]
    assert len({fingerprint(items) for items in variants}) == len(variants)
    other = replace(QUESTION, id="q-1")
    assert fingerprint([QUESTION, other]) != fingerprint([other, QUESTION])
    assert fingerprint([QUESTION]) == fingerprint([replace(QUESTION)])
