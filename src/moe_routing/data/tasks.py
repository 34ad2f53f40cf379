"""The items of each data set, from its data file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moe_routing.data.documents import wikipedia_items
from moe_routing.data.hellaswag import hellaswag_items
from moe_routing.data.items import Item
from moe_routing.data.lambada import lambada_items
from moe_routing.data.rows import Row, read_rows
from moe_routing.data.wikitext import wikitext_items

ITEM_MAKERS: Mapping[str, Callable[[Sequence[Row], str], list[Item]]] = {
    "wikitext": wikitext_items,
    "wikipedia": wikipedia_items,
    "hellaswag": hellaswag_items,
    "lambada": lambada_items,
}


def load_items(dataset: str, path: Path | str, origin: str | None = None) -> list[Item]:
    """Return every item of a data set from its data file.

    Args:
        dataset: one of the names in :data:`moe_routing.vocabulary.DATASETS`.
        path: the data file.
        origin: what errors call the file; its path by default.

    Raises:
        InputError: a broken file, a missing column or an empty item, named by file, row and column.
    """
    return ITEM_MAKERS[dataset](read_rows(path, origin), dataset)
