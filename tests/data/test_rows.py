"""Reading data files of every format, whole and broken."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_routing.data.rows import read_rows, suffix_of
from moe_routing.errors import InputError

VALUES = [{"a": "x", "b": ["1", "ü"]}, {"a": "", "b": []}]


def _write(path: Path) -> None:
    table = pa.Table.from_pylist(VALUES)
    lines = "".join(json.dumps(row) + "\n" for row in VALUES)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        new = pa.ipc.new_file if path.stem == "file" else pa.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)


FILES = ["a.parquet", "stream.arrow", "file.arrow", "a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"]


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    _write(path)
    rows = read_rows(path)
    assert [dict(row.values) for row in rows] == VALUES
    assert [row.number for row in rows] == [1, 2]


@pytest.mark.parametrize("name", [name for name in FILES if name != "a.jsonl"])
def test_truncated_file_is_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    _write(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=rf"{path.name}: not a readable \S+ file: "):
        read_rows(path)


def test_json_error_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(InputError, match=r"a\.jsonl: not a readable .jsonl file: line 3: "):
        read_rows(path)
    path.write_text('{"a": 1}\n[1]\n')
    with pytest.raises(InputError, match="line 2: not a JSON object"):
        read_rows(path)


def test_text_keeps_what_is_no_line_break(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("a\u2028b\x0cc\r\n \nlast".encode())
    assert [row.values["line"] for row in read_rows(path)] == ["a\u2028b\x0cc", " ", "last"]


def test_origin_stands_for_the_path_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    with pytest.raises(InputError, match=r"^the source: row 1: column 'a' is missing; columns: no"):
        read_rows(path, "the source")[0].text("a")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"a\.csv: unknown format; allowed: \.parquet, "):
        read_rows(tmp_path / "a.csv")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match=r"empty\.jsonl: no rows"):
        read_rows(tmp_path / "empty.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"latin\.txt: not a readable .txt file"):
        read_rows(tmp_path / "latin.txt")


def test_suffix_of() -> None:
    assert suffix_of("dir.jsonl/a.jsonl.gz") == ".jsonl.gz"
    assert suffix_of("a.gz") is None
