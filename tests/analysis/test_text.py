"""The analyses read running text; without any, the texts that the study has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_routing.analysis.text import read_text, text_dataset
from moe_routing.data.items import read_items, write_items
from moe_routing.data.tasks import load_items

DATA_FILES = Path(__file__).resolve().parents[1] / "data_files"


@pytest.mark.parametrize(
    ("datasets", "name"),
    [
        (("hellaswag", "lambada", "wikipedia", "wikitext"), "wikipedia"),
        (("hellaswag", "lambada"), "lambada"),
        (("hellaswag",), "hellaswag"),
    ],
)
def test_the_set_that_the_analyses_read(datasets, name):
    assert text_dataset(datasets) == name


@pytest.mark.parametrize("name", ["wikipedia", "lambada", "hellaswag"])
def test_every_kind_of_item_is_read_as_a_document(tmp_path, name):
    path = tmp_path / "data" / f"{name}.parquet"
    write_items(load_items(name, DATA_FILES / f"{name}.jsonl")[:3], path)
    items = read_items(path)
    documents = read_text(SimpleNamespace(datasets={name: None}), tmp_path)
    assert [item.id for item in documents] == [item.id for item in items]
    assert {(item.context, item.label) for item in documents} == {("", None)}
    for item, document in zip(items, documents, strict=True):
        right = item.continuations[item.label or 0]
        assert document.continuations == (item.context + right,)
