"""WikiText (Merity et al. 2016, arXiv 1609.07843) by document, as the harness scores it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from moe_routing.data.items import Item, document_item
from moe_routing.data.rows import Row
from moe_routing.errors import InputError


def wikitext_items(rows: Sequence[Row], dataset: str) -> list[Item]:
    """Return one item per page; see :func:`wikitext_pages` for the layouts.

    Raises:
        InputError: a missing column, an empty page, or lines without any heading.
    """
    return [
        document_item(dataset, number, original=page, scored=detokenize(page))
        for number, page in enumerate(wikitext_pages(rows))
    ]


def wikitext_pages(rows: Sequence[Row]) -> list[str]:
    """Return pages from any of three layouts; WikiText-2 raw test has 62 in each.

    ``page``, a page per row (hub, EleutherAI/wikitext_document_level); ``text``, a line per row
    (hub, Salesforce/wikitext); ``line``, the raw file.

    Raises:
        InputError: a missing column, an empty page, or lines without any heading.
    """
    if "page" in rows[0]:
        return [row.text("page") for row in rows]
    lines = _raw_lines(rows)
    if not any(is_heading(line) for line in lines):
        raise InputError(f"{rows[0].origin}: no line is a WikiText heading (' = Title = ')")
    return list(_split_pages(lines))


def has_headings(rows: Sequence[Row]) -> bool:
    """Return whether any line opens a page, as in WikiText and not in other text."""
    return any(is_heading(str(row.values.get("text", row.values.get("line", "")))) for row in rows)


def is_heading(line: str) -> bool:
    """Say whether a line opens a page.

    The rule of the hub's page-level set, which takes the tail of two formulas in WikiText-2's test
    split (``= 1 rad / s and a nominal impedance k =``) for a title: 62 pages are 60 articles.
    """
    line = line.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")


def _raw_lines(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the raw file, without their breaks."""
    if "line" in rows[0]:
        return [row.text("line", allow_empty=True) for row in rows]
    # The hub keeps a line's break but empties a blank line, which is one space in the raw file;
    # the last line has a break too.
    texts = [row.text("text", allow_empty=True) for row in rows]
    return [*(text.removesuffix("\n") if text else " " for text in texts), ""]


def _split_pages(lines: Iterable[str]) -> Iterable[str]:
    page: list[str] = []
    for line in lines:
        if is_heading(line):
            if any(part.strip() for part in page):
                yield "\n".join(page)
            page = []
        page.append(line)
    if any(part.strip() for part in page):
        yield "\n".join(page)


def detokenize(page: str) -> str:
    """Return running text: the harness's ``wikitext_detokenizer``, its quirks included.

    The steps keep its order, including two patterns that never match as intended, because word
    perplexities are comparable only for the same scored text.
    """
    page = page.replace("s '", "s'")
    page = re.sub(r"/' [0-9]/", r"/'[0-9]/", page)
    for separated, joined in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        page = page.replace(separated, joined)
    for mark in ":;.!?,":
        page = page.replace(f" {mark} ", f"{mark} ")
    page = re.sub(r"\(\s*([^\)]*?)\s*\)", r"(\1)", page)
    page = re.sub(r"\[\s*([^\]]*?)\s*\]", r"[\1]", page)
    page = re.sub(r"{\s*([^}]*?)\s*}", r"{\1}", page)
    page = re.sub(r"\"\s*([^\"]*?)\s*\"", r'"\1"', page)
    page = re.sub(r"'\s*([^']*?)\s*'", r"'\1'", page)
    for separated, joined in (
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" ° ", "°"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    ):
        page = page.replace(separated, joined)
    return page
