"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830) as lm-evaluation-harness asks it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moe_routing.data.items import TARGET_DELIMITER, Item, item_id
from moe_routing.data.rows import Row


def hellaswag_items(rows: Sequence[Row], dataset: str) -> list[Item]:
    """Return one item per row: the four endings after the activity and its context.

    Hub, archive and local files share one layout (``activity_label``, ``ctx_a``, ``ctx_b``,
    ``endings``, ``label``, ``source_id``); the label is text in the first two. Questions cut from
    one video or article share its ``source_id``, which is the cluster.

    Raises:
        InputError: a missing column, an empty text, or a label that is no ending.
    """
    return [_item(row, dataset, number) for number, row in enumerate(rows)]


def _item(row: Row, dataset: str, number: int) -> Item:
    second = row.text("ctx_b", allow_empty=True).capitalize()
    context = preprocess(f"{row.text('activity_label')}: {row.text('ctx_a')} {second}")
    choices = [preprocess(ending) for ending in row.texts("endings")]
    if not all(choice.strip() for choice in choices):
        raise row.error("endings", "has an ending with no text but its [bracketed] title")
    return Item(
        id=item_id(dataset, number),
        cluster=row.text("source_id"),
        context=context,
        continuations=tuple(TARGET_DELIMITER + choice for choice in choices),
        label=_label(row, len(choices)),
    )


def _label(row: Row, n_choices: int) -> int:
    allowed = [str(index) for index in range(n_choices)]
    label = str(row.value("label"))
    if label not in allowed:
        raise row.error("label", f"is '{label}'; allowed: {', '.join(allowed)}")
    return int(label)


def preprocess(text: str) -> str:
    """Return text without WikiHow's bracketed titles (the harness's ``hellaswag/utils.py``).

    The order of the steps matters: a title at the start leaves a space behind, which is part of
    the choice, of its tokens and of its length.
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
