"""Rows of a data file in any format, with errors that name file, row and column."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_routing.errors import InputError
from moe_routing.files import reading

NumberedValues = tuple[int, Mapping[str, object]]


@dataclass(frozen=True)
class Row:
    """One row of a data file.

    Attributes:
        origin: what errors call the file.
        number: row, or line of a text file, counted from 1.
        values: value of each column; a line of a .txt file is column ``line``.
    """

    origin: str
    number: int
    values: Mapping[str, object]

    def __contains__(self, column: str) -> bool:
        """Say whether the row has this column."""
        return column in self.values

    def error(self, column: str, problem: str) -> InputError:
        """Return the error for a value of this row."""
        return InputError(f"{self.origin}: row {self.number}: column '{column}' {problem}")

    def value(self, column: str) -> object:
        """Return a value of any type.

        Raises:
            InputError: the column is missing.
        """
        if column not in self.values:
            raise self.error(column, f"is missing; columns: {', '.join(self.values) or 'none'}")
        return self.values[column]

    def text(self, column: str, *, allow_empty: bool = False) -> str:
        """Return a string.

        Raises:
            InputError: the column is missing, not text, or (unless allowed) blank.
        """
        return self._checked(column, self.value(column), allow_empty)

    def texts(self, column: str) -> list[str]:
        """Return a list of strings.

        Raises:
            InputError: the column is missing, not a list, or holds a blank entry.
        """
        entries = self.value(column)
        if not isinstance(entries, list) or not entries:
            raise self.error(column, f"is {entries!r:.60}; a list of texts is needed")
        return [self._checked(column, entry, allow_empty=False) for entry in entries]

    def _checked(self, column: str, entry: object, allow_empty: bool) -> str:
        if not isinstance(entry, str):
            raise self.error(column, f"is {entry!r:.60}; text is needed")
        if not allow_empty and not entry.strip():
            raise self.error(column, "is empty")
        if any("\ud800" <= character <= "\udfff" for character in entry):
            raise self.error(column, "holds half of a surrogate pair; valid Unicode is needed")
        return entry


def suffix_of(name: str) -> str | None:
    """Return the suffix of a file name that has a reader, else None."""
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def read_rows(path: Path | str, origin: str | None = None) -> list[Row]:
    """Read every row of a .parquet, .arrow, .json(l)(.gz) or .txt file.

    Raises:
        InputError: no such file, an unknown or broken format, or no rows; it calls the file
            ``origin``, by default its path.
    """
    path = Path(path)
    origin = origin or str(path)
    suffix = suffix_of(path.name)
    if suffix is None:
        raise InputError(f"{origin}: unknown format; allowed: {', '.join(READERS)}")
    with reading(path, f"a readable {suffix} file", origin):
        try:
            rows = [Row(origin, number, values) for number, values in READERS[suffix](path)]
        except zlib.error as error:
            raise ValueError(str(error)) from error
    if not rows:
        raise InputError(f"{origin}: no rows")
    return rows


def _read_parquet(path: Path) -> Iterator[NumberedValues]:
    import pyarrow.parquet as pq

    return enumerate(pq.read_table(path).to_pylist(), start=1)


def _read_arrow(path: Path) -> Iterator[NumberedValues]:
    """Read Arrow IPC, the stream that ``datasets`` writes or the file format."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        reader = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
        return enumerate(reader.read_all().to_pylist(), start=1)


def _read_json_lines(path: Path) -> Iterator[NumberedValues]:
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(values, dict):
                raise ValueError(f"line {number}: not a JSON object")
            yield number, values


def _read_lines(path: Path) -> Iterator[NumberedValues]:
    # Not splitlines(): form feeds and Unicode separators are part of a line here.
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.split("\n") if text else [], start=1):
        yield number, {"line": line}


READERS: Mapping[str, Callable[[Path], Iterator[NumberedValues]]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".json": _read_json_lines,
    ".json.gz": _read_json_lines,
    ".txt": _read_lines,
}
