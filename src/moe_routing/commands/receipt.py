"""A receipt: what was compared, in tables, for the terminal, as Markdown, HTML and JSON."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from moe_routing.analysis.tables import markdown, write_json
from moe_routing.files import atomic_path

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;text-align:right;"
    "border-bottom:1px solid #ccc}td:first-child,th:first-child{text-align:left}"
)


@dataclass(frozen=True)
class Section:
    """A table under a title, with a sentence that says what it shows; cells are text."""

    title: str
    note: str
    table: pd.DataFrame

    @property
    def markdown(self) -> str:
        """The section as Markdown; the first column is aligned left."""
        align = "l" + "r" * (self.table.shape[1] - 1)
        parts = (f"## {self.title}", self.note, markdown(self.table, align))
        return "\n\n".join(part for part in parts if part)

    @property
    def html(self) -> str:
        """The section as HTML."""
        table = self.table.to_html(index=False, border=0)
        note = f"<p>{html.escape(self.note)}</p>\n" if self.note else ""
        return f"<h2>{html.escape(self.title)}</h2>\n{note}{table}"


@dataclass(frozen=True)
class Receipt:
    """What a comparison found.

    Attributes:
        title: its title.
        summary: sentences that say what was compared, and how.
        sections: its tables.
        record: everything as plain values: settings, provenance, unrounded tables.
    """

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]
    record: dict[str, object]

    @property
    def markdown(self) -> str:
        """The receipt as Markdown."""
        parts = [f"# {self.title}", *self.summary, *(part.markdown for part in self.sections)]
        return "\n\n".join(parts) + "\n"

    @property
    def html(self) -> str:
        """The receipt as one HTML page that loads nothing."""
        title = html.escape(self.title)
        summary = "\n".join(f"<p>{html.escape(line)}</p>" for line in self.summary)
        body = "\n".join(part.html for part in self.sections)
        return (
            f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n{summary}\n{body}\n"
            "</body>\n</html>\n"
        )

    def write(self, folder: Path) -> None:
        """Write ``receipt.md``, ``receipt.html`` and ``receipt.json``.

        Raises:
            InputError: the disk is full or the folder cannot be written.
        """
        for suffix, text in (("md", self.markdown), ("html", self.html)):
            with atomic_path(folder / f"receipt.{suffix}") as temporary:
                temporary.write_text(text, encoding="utf-8")
        write_json(self.record, folder / "receipt.json")
