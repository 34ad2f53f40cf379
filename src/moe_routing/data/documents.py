"""Plain documents from any source: the ``wikipedia`` set, and calibration text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from moe_routing.data.items import Item, document_item
from moe_routing.data.rows import Row
from moe_routing.data.wikitext import detokenize, has_headings, wikitext_pages


def wikipedia_items(rows: Sequence[Row], dataset: str) -> list[Item]:
    """Return one item per distinct passage, scored as it is.

    The passages are BoolQ's (Clark et al. 2019, arXiv 1905.10044) or those of a local file; ids
    count distinct passages. This is not WikiText: passages are short, and numbers on them are
    comparable only with each other.

    Raises:
        InputError: a missing column or an empty passage.
    """
    return [
        document_item(dataset, number, original=text, scored=text)
        for number, text in enumerate(read_documents(rows))
    ]


def read_documents(rows: Sequence[Row]) -> list[str]:
    """Return the distinct documents of a data file, in order of first appearance.

    Layouts: ``passage`` (BoolQ, whose questions share passages) or ``text``, a document per row;
    ``line``, a text file with an empty line between documents; WikiText in any of its layouts,
    detokenized.

    Raises:
        InputError: none of these columns, or an empty document.
    """
    if "passage" in rows[0]:
        documents = (row.text("passage") for row in rows)
    elif "page" in rows[0] or has_headings(rows):
        documents = (detokenize(page) for page in wikitext_pages(rows))
    elif "line" in rows[0]:
        documents = text_blocks(row.text("line", allow_empty=True) for row in rows)
    else:
        documents = (row.text("text") for row in rows)
    return list(dict.fromkeys(documents))


def text_blocks(lines: Iterable[str]) -> Iterator[str]:
    """Yield the texts between blank lines, whose own lines have no breaks at their ends."""
    for has_text, block in groupby(lines, key=lambda line: bool(line.strip())):
        if has_text:
            yield "\n".join(block)
