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
from moe_routing.files import atomic_path, reading

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
    def right(self) -> int:
        """Index of the right continuation, or of the document."""
        return self.label or 0

    @property
    def text(self) -> str:
        """The context and the right continuation, or the document."""
        return self.context + self.continuations[self.right]

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
        InputError: the file is missing, damaged, not Parquet, lacks a column, or has no items; an
            id occurs twice; an item lacks continuations, or its label is not the index of one.
    """
    path = Path(path)
    with reading(path, "a Parquet table"):
        table = pq.read_table(path)
    names = [field.name for field in fields(Item)]
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise InputError(f"{path}: column '{missing[0]}' is missing; needed: {', '.join(names)}")
    with reading(path, "a table of items"):
        items = [
            Item(**{**row, "continuations": tuple(row["continuations"])})
            for row in table.select(names).to_pylist()
        ]
    check_items(items, str(path))
    return items


def check_items(items: Sequence[Item], origin: str) -> None:
    """Check that items can be scored; ``origin`` names their file in errors.

    Raises:
        InputError: there are none, an id occurs twice, an item has no continuation or an empty one,
            or its label is not the index of a continuation.
    """
    if not items:
        raise InputError(f"{origin}: no items; allowed: at least one")
    seen: set[str] = set()
    for item in items:
        count = len(item.continuations)
        if item.id in seen:
            raise InputError(f"{origin}: id '{item.id}' occurs more than once")
        seen.add(item.id)
        if not all(isinstance(text, str) and text.strip() for text in item.continuations):
            raise InputError(f"{origin}: item '{item.id}' has an empty continuation")
        if not count:
            raise InputError(f"{origin}: item '{item.id}' has no continuation")
        if item.label is None:
            continue
        if not 0 <= item.label < count:
            raise InputError(
                f"{origin}: item '{item.id}' has label {item.label}; allowed: 0 to {count - 1}"
            )
        if count > 1 and len(set(item.continuations)) == 1:
            raise InputError(f"{origin}: all continuations of item '{item.id}' are the same")
