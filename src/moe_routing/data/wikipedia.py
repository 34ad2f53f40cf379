"""Wikipedia passages: BoolQ's (Clark et al. 2019, arXiv 1905.10044), or a local file's."""

from __future__ import annotations

from collections.abc import Sequence

from moe_routing.data.documents import read_documents
from moe_routing.data.items import Item, document_item
from moe_routing.data.rows import Row


def wikipedia_items(rows: Sequence[Row], dataset: str) -> list[Item]:
    """Return one item a distinct passage, scored as it stands.

    Rows in an id count distinct passages. This is not WikiText: passages are short, and numbers
    on them compare with each other only.

    Raises:
        InputError: a missing column or an empty passage.
    """
    return [
        document_item(dataset, number, original=text, scored=text)
        for number, text in enumerate(read_documents(rows))
    ]
