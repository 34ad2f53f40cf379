"""LAMBADA (Paperno et al. 2016, arXiv 1606.06031), OpenAI's version: the last word of a passage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_routing.data.items import Item, item_id
from moe_routing.data.rows import Row


def lambada_items(rows: Sequence[Row], dataset: str) -> list[Item]:
    """Return one item per row: the last word after the text before it.

    Hub and local files have a column ``text``, split as lm-evaluation-harness's ``lambada_openai``
    does: at single spaces. So the last word of 7 of the 5,153 passages includes a line break and
    the word before. The archive has a column ``request`` with ``context`` and ``continuation``;
    its passages are the same words with every run of white space made one space, which changes
    4,715 of them, so that likelihoods differ a little from the hub's.

    Raises:
        InputError: a missing column, an empty text, or a text of one word.
    """
    return [_item(row, dataset, number) for number, row in enumerate(rows)]


def _item(row: Row, dataset: str, number: int) -> Item:
    context, continuation = _from_request(row) if "request" in row else _from_text(row)
    name = item_id(dataset, number)
    return Item(id=name, cluster=name, context=context, continuations=(continuation,), label=0)


def _from_text(row: Row) -> tuple[str, str]:
    context, _, last = row.text("text").rpartition(" ")
    if not last.strip():
        raise row.error("text", "ends in a space; a last word is needed")
    if not context.strip():
        raise row.error("text", f"is '{last}'; a last word needs words before it")
    return context, f" {last}"


def _from_request(row: Row) -> tuple[str, str]:
    request = row.value("request")
    if not isinstance(request, Mapping):
        raise row.error("request", f"is {request!r:.60}; a context and a continuation are needed")
    inner = Row(row.origin, row.number, {f"request.{key}": value for key, value in request.items()})
    context, continuation = inner.text("request.context"), inner.text("request.continuation")
    if not continuation.startswith(" "):
        raise inner.error("request.continuation", f"is '{continuation}'; a space must lead it")
    return context, continuation
