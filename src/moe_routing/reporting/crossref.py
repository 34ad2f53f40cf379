"""Number figures, tables, equations and sections of a pandoc document and resolve references.

Works on pandoc's JSON syntax tree, with labels and ``@fig-x`` references as Quarto writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moe_routing.errors import InputError

KINDS = {"fig": "Figure", "tbl": "Table", "eq": "Equation", "sec": "Section"}
_LABEL = re.compile(r"^(fig|tbl|eq|sec)-[A-Za-z0-9_-]+$")
_TRAILING = re.compile(r"^\{#((?:tbl|eq)-[A-Za-z0-9_-]+)\}$")

Node = dict[str, Any]


@dataclass
class _Labels:
    """The numbers assigned so far."""

    origin: str
    numbers: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    section: list[int] = field(default_factory=list)

    def add(self, label: str, number: str | None = None) -> str:
        """Assign a number to a label and return it.

        Raises:
            InputError: the label is already taken.
        """
        if label in self.numbers:
            raise InputError(f"{self.origin}: label '{label}' occurs twice")
        kind = label.split("-")[0]
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.numbers[label] = number or str(self.counts[kind])
        return self.numbers[label]


def resolve(document: Node, origin: str, citations: set[str]) -> Node:
    """Return the document with captions numbered and references turned into links.

    Args:
        document: pandoc's JSON.
        origin: the page, for errors.
        citations: keys of the bibliography.

    Raises:
        InputError: a reference or citation leads nowhere, or a label is used twice.
    """
    labels = _Labels(origin)
    blocks = [_number(block, labels) for block in document["blocks"]]

    def change(node: Node) -> Node | list[Node]:
        if node["t"] == "Image":
            return _alt_text(node)
        return _link(node, labels, citations) if node["t"] == "Cite" else node

    return {**document, "blocks": _map(blocks, change)}


def _number(block: Node, labels: _Labels) -> Node:
    kind = block["t"]
    if kind == "Header":
        _number_header(block, labels)
    elif kind == "Figure":
        label = block["c"][0][0]
        if _LABEL.match(label):
            _prefix(block["c"][1], "Figure", labels.add(label))
    elif kind == "Table":
        _number_table(block, labels)
    elif kind == "Para":
        return _number_equation(block, labels)
    elif kind == "Div":
        block["c"][1] = [_number(inner, labels) for inner in block["c"][1]]
    return block


def _number_header(block: Node, labels: _Labels) -> None:
    level, (label, classes, _), _ = block["c"]
    if "unnumbered" in classes:
        return
    labels.section = (labels.section + [0] * level)[:level]
    labels.section[-1] += 1
    if _LABEL.match(label):
        labels.add(label, ".".join(map(str, labels.section)))


def _number_table(block: Node, labels: _Labels) -> None:
    attributes, caption = block["c"][0], block["c"][1]
    if not attributes[0]:
        attributes[0] = _cut_label(caption[1])
    if _LABEL.match(attributes[0]):
        _prefix(caption, "Table", labels.add(attributes[0]))


def _cut_label(blocks: list[Node]) -> str:
    """Remove a trailing ``{#tbl-x}`` from a caption and return its label, or nothing."""
    inlines = blocks[-1]["c"] if blocks else []
    match = _TRAILING.match(inlines[-1]["c"]) if inlines and inlines[-1]["t"] == "Str" else None
    if not match:
        return ""
    del inlines[-1]
    while inlines and inlines[-1]["t"] in ("Space", "SoftBreak"):
        del inlines[-1]
    return match[1]


def _number_equation(block: Node, labels: _Labels) -> Node:
    inlines = block["c"]
    label = _cut_label([block])
    if not label:
        return block
    number = labels.add(label)
    text = {"t": "Str", "c": f"\N{NO-BREAK SPACE}({number})"}
    number_span = {"t": "Span", "c": [["", ["number"], []], [text]]}
    shown = {"t": "Para", "c": [*inlines, number_span]}
    return {"t": "Div", "c": [[label, ["equation"], []], [shown]]}


def _prefix(caption: list[Any], word: str, number: str) -> None:
    """Prefix a caption with, for example, 'Figure 1: '."""
    if not caption[1]:
        caption[1] = [{"t": "Plain", "c": []}]
    inlines = caption[1][0]["c"]
    caption[1][0]["c"] = [
        {"t": "Str", "c": f"{word}\N{NO-BREAK SPACE}{number}:"}, {"t": "Space"}, *inlines,
    ]  # fmt: skip


def _alt_text(node: Node) -> Node:
    """Rename Quarto's fig-alt of an image to alt, as pandoc expects it."""
    (label, classes, values), caption, target = node["c"]
    renamed = [["alt" if name == "fig-alt" else name, value] for name, value in values]
    return {**node, "c": [[label, classes, renamed], caption, target]}


def _link(node: Node, labels: _Labels, citations: set[str]) -> Node | list[Node]:
    keys = [citation["citationId"] for citation in node["c"][0]]
    references = [key for key in keys if _LABEL.match(key)]
    for key in keys:
        if key in references and key not in labels.numbers:
            raise InputError(f"{labels.origin}: cross-reference '@{key}' leads nowhere")
        if key not in references and key not in citations:
            raise InputError(f"{labels.origin}: citation '@{key}' is not in references.bib")
    if not references:
        return node
    if len(references) < len(keys):
        raise InputError(f"{labels.origin}: one bracket mixes citations with '@{references[0]}'")
    return [_reference(key, labels.numbers[key]) for key in references]


def _reference(label: str, number: str) -> Node:
    text = f"{KINDS[label.split('-')[0]]}\N{NO-BREAK SPACE}{number}"
    return {
        "t": "Link",
        "c": [["", ["quarto-xref"], []], [{"t": "Str", "c": text}], [f"#{label}", ""]],
    }


def _map(value: Any, change: Callable[[Node], Node | list[Node]]) -> Any:  # noqa: ANN401 (JSON)
    """Apply ``change`` to every node of a tree, innermost first; lists are spliced in."""
    if isinstance(value, list):
        items: list[Any] = []
        for item in value:
            new = _map(item, change)
            spliced = isinstance(item, dict) and isinstance(new, list)
            items += new if spliced else [new]
        return items
    if not isinstance(value, dict):
        return value
    node = {key: _map(inner, change) for key, inner in value.items()}
    return change(node) if "t" in node else node
