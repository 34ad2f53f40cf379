"""The item schema of all evaluation sets, and its Parquet file.

``data/<dataset>.parquet`` is the interface to evaluation: columns ``id``, ``cluster``, ``context``,
``continuations``, ``label``, ``words``, ``bytes``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moe_routing.errors import InputError
from moe_routing.files import atomic_path

TARGET_DELIMITER = " "
"""The text between a context and a choice in lm-evaluation-harness."""


_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("cluster", pa.string(), nullable=False),
        pa.field("context", pa.string(), nullable=False),
        pa.field("continuations", pa.list_(pa.string()), nullable=False),
        pa.field("label", pa.int64()),
        pa.field("words", pa.int64()),
        pa.field("bytes", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Item:
    """One thing to score.

    Attributes:
        id: ``<dataset>-<row>``; the row counts from 0, as the harness's ``doc_id`` does.
        cluster: items of one cluster are not independent; standard errors are clustered on it.
        context: text that is read but not scored; empty for a perplexity document.
        continuations: scored texts, each with the delimiter before it: the choices of a multiple
            choice question, the last word, or the whole document.
        label: index of the right continuation; None for a perplexity document.
        words: words of the original document, for word perplexity; None elsewhere.
        bytes: UTF-8 bytes of the original document, for byte perplexity; None elsewhere.
    """

    id: str
    cluster: str
    context: str
    continuations: tuple[str, ...]
    label: int | None
    words: int | None = None
    bytes: int | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        """Continuations without the delimiter.

        Their length in characters is what ``acc_norm`` divides by (lm_eval 0.4.13,
        ``ConfigurableTask.process_results``: ``len(i)`` of each choice).
        """
        return tuple(text.removeprefix(TARGET_DELIMITER) for text in self.continuations)


def item_id(dataset: str, row: int) -> str:
    """Return the id of the item made of a row, counted from 0."""
    return f"{dataset}-{row:05d}"


def document_item(dataset: str, row: int, original: str, scored: str) -> Item:
    """Return a perplexity item: ``scored`` is read by the model, ``original`` is counted.

    Words and bytes are those of lm-evaluation-harness's ``wikitext`` task (``process_results`` in
    ``preprocess_wikitext.py``): white space at either end counts as one more word.
    """
    name = item_id(dataset, row)
    return Item(
        id=name,
        cluster=name,
        context="",
        continuations=(scored,),
        label=None,
        words=len(re.split(r"\s+", original)),
        bytes=len(original.encode("utf-8")),
    )


def fingerprint(items: Sequence[Item]) -> str:
    """Return the SHA-256 of the items in order: every field counts."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(asdict(item), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def write_items(items: Sequence[Item], path: Path | str) -> None:
    """Write items as Parquet.

    Raises:
        InputError: the file cannot be written.
    """
    table = pa.Table.from_pylist([asdict(item) for item in items], schema=_SCHEMA)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def read_items(path: Path | str) -> list[Item]:
    """Read the items that :func:`write_items` wrote, in their order.

    Raises:
        InputError: no such file, not Parquet, or a missing column.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a readable .parquet file: {error}") from error
    names = [field.name for field in fields(Item)]
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise InputError(f"{path}: column '{missing[0]}' is missing; needed: {', '.join(names)}")
    return [
        Item(**{**row, "continuations": tuple(row["continuations"])})
        for row in table.select(names).to_pylist()
    ]
