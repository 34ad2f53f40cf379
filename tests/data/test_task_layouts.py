"""The layouts of hub, archive and local files make the same items; bad rows are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_routing.data.documents import read_documents
from moe_routing.data.rows import read_rows
from moe_routing.data.tasks import load_items
from moe_routing.errors import InputError

JsonRows = Callable[[str], list[dict]]
Write = Callable[[list[dict]], Path]


def test_hellaswag_from_the_archive_s_arrow_stream(
    json_rows: JsonRows, data_files: Path, tmp_path: Path
) -> None:
    table = pa.Table.from_pylist(json_rows("hellaswag"))
    path = tmp_path / "hellaswag.arrow"
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    expected = load_items("hellaswag", data_files / "hellaswag.jsonl")
    assert load_items("hellaswag", path) == expected
    numbers = [{**row, "label": int(row["label"])} for row in json_rows("hellaswag")]
    pq.write_table(pa.Table.from_pylist(numbers), tmp_path / "hellaswag.parquet")
    assert load_items("hellaswag", tmp_path / "hellaswag.parquet") == expected


def test_lambada_from_the_archive_s_requests(json_rows: JsonRows, write_json_lines: Write) -> None:
    texts = [" ".join(row["text"].split()) for row in json_rows("lambada")]
    requests = [
        {"request": {"context": text.rpartition(" ")[0], "continuation": " " + text.split()[-1]}}
        for text in texts
    ]
    from_requests = load_items("lambada", write_json_lines(requests))
    assert from_requests == load_items("lambada", write_json_lines([{"text": t} for t in texts]))


def test_wikitext_from_the_hub_s_lines(data_files: Path, write_json_lines: Write) -> None:
    lines = (data_files / "wikitext.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    # Salesforce/wikitext: a line per row with its break, blank lines emptied.
    rows = [{"text": line if line.strip() else ""} for line in lines]
    expected = load_items("wikitext", data_files / "wikitext.txt")
    assert len(expected) == 4
    assert load_items("wikitext", write_json_lines(rows)) == expected


def test_wikipedia_keeps_each_passage_once(json_rows: JsonRows, write_json_lines: Write) -> None:
    rows = json_rows("wikipedia")
    items = load_items("wikipedia", write_json_lines([rows[0], *rows, rows[5]]))
    assert [item.continuations for item in items] == [(row["passage"],) for row in rows]
    assert [item.words for item in items] == [len(row["passage"].split()) for row in rows]
    assert [item.bytes for item in items] == [len(row["passage"].encode()) for row in rows]
    assert {item.context for item in items} == {""}


def test_documents_of_a_text_file_are_its_blocks(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\nOne\nstill one\n\n \nTwo\x0ctwo\n", encoding="utf-8")
    assert read_documents(read_rows(path)) == ["One\nstill one", "Two\x0ctwo"]


def test_documents_of_wikitext_are_running_text(data_files: Path) -> None:
    documents = read_documents(read_rows(data_files / "wikitext.txt"))
    items = load_items("wikitext", data_files / "wikitext.txt")
    assert [(document,) for document in documents] == [item.continuations for item in items]


def test_text_without_headings_does_not_pass_for_wikitext(data_files: Path) -> None:
    with pytest.raises(InputError, match=r"calibration\.txt: no line is a WikiText heading"):
        load_items("wikitext", data_files / "calibration.txt")


@pytest.mark.parametrize("dataset", ["hellaswag", "lambada", "wikipedia", "wikitext"])
def test_missing_column_is_named(
    dataset: str, json_rows: JsonRows, write_json_lines: Write
) -> None:
    column = {"hellaswag": "source_id", "wikipedia": "passage"}.get(dataset, "text")
    rows = json_rows("lambada" if dataset == "wikitext" else dataset)
    del rows[3][column]
    path = write_json_lines(rows)
    with pytest.raises(InputError, match=rf"rows\.jsonl: row 4: column '{column}' is missing"):
        load_items(dataset, path)


@pytest.mark.parametrize(
    ("dataset", "column", "value", "problem"),
    [
        ("hellaswag", "ctx_a", "  ", "is empty"),
        ("hellaswag", "activity_label", None, "is None; text is needed"),
        ("hellaswag", "endings", ["a", "b", "", "d"], "is empty"),
        ("hellaswag", "endings", [], r"is \[\]; a list of texts"),
        ("hellaswag", "endings", ["a", "b", "[step]", "d"], "no text but its"),
        ("hellaswag", "label", "", "is ''; allowed: 0, 1, 2, 3"),
        ("hellaswag", "label", 4, "is '4'; allowed: 0, 1, 2, 3"),
        ("lambada", "text", "", "is empty"),
        ("lambada", "text", "word", "needs words before it"),
        ("lambada", "text", "ends in a space ", "ends in a space"),
        ("lambada", "text", "half \ud83d emoji", "surrogate"),
        ("lambada", "request", {"context": "a"}, "continuation' is missing"),
        ("lambada", "request", {"context": "a", "continuation": "b"}, "a space must lead it"),
        ("lambada", "request", 3, "is 3; a context and a continuation"),
        ("wikipedia", "passage", "", "is empty"),
        ("wikitext", "page", "\n", "is empty"),
    ],
)
def test_bad_value_is_named_by_file_row_and_column(
    dataset: str,
    column: str,
    value: object,
    problem: str,
    json_rows: JsonRows,
    write_json_lines: Write,
) -> None:
    rows = [{"page": "a"}, {"page": "b"}] if dataset == "wikitext" else json_rows(dataset)
    rows[1] = {**rows[1], column: value}
    path = write_json_lines(rows)
    with pytest.raises(InputError, match=rf"rows\.jsonl: row 2: column '.*{column}.*{problem}"):
        load_items(dataset, path)
