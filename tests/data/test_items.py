"""The item schema and its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_routing.data.items import Item, document_item, fingerprint, read_items, write_items
from moe_routing.errors import InputError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
COUNT = st.none() | st.integers(0, 2**40)
ITEMS = st.lists(
    st.builds(Item, TEXT, TEXT, TEXT, st.lists(TEXT).map(tuple), COUNT, COUNT, COUNT), max_size=4
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
    pq.write_table(table.drop_columns(["words", "label"]), tmp_path / "items.parquet")
    with pytest.raises(InputError, match=r"items\.parquet: column 'label' is missing; needed: id"):
        read_items(tmp_path / "items.parquet")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_items(tmp_path / "items.parquet")
    (tmp_path / "items.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"not a readable \.parquet"):
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
