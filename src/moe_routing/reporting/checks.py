"""What a rendered page must not have: links into nowhere, missing images, calls to other hosts."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from moe_routing.errors import InputError

_LOADING = {
    "img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "video": "src",
    "audio": "src", "embed": "src", "object": "data", "use": "href",
}  # fmt: skip
"""Attributes that make a browser load something; a plain link does not."""

_CSS_URL = re.compile(r"(?:url\(\s*['\"]?|@import\s+['\"])((?:https?:)?//[^)'\"]+)", re.IGNORECASE)


class _Collector(HTMLParser):
    """Collects what a page loads, links to and defines."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.styles: list[str] = []
        self._inside_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note ids, loads and links."""
        values = {name: value or "" for name, value in attrs}
        self.ids.add(values.get("id", ""))
        self.styles.append(values.get("style", ""))
        self._inside_style = tag == "style"
        if tag in _LOADING and values.get(_LOADING[tag]):
            self.loads.append(values[_LOADING[tag]])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])

    def handle_data(self, data: str) -> None:
        """Note style sheets."""
        if self._inside_style:
            self.styles.append(data)

    def handle_endtag(self, tag: str) -> None:
        """Leave a style sheet."""
        self._inside_style = False


def check_pages(pages: list[Path]) -> None:
    """Check rendered HTML pages, and their links to one another.

    Raises:
        InputError: one line for the first problem.
    """
    contents = {path.resolve(): _collect(path) for path in pages}
    for path, page in contents.items():
        _check_loads(path, page)
        _check_links(path, page, contents)
        _check_text(path)


def _collect(path: Path) -> _Collector:
    if not path.is_file():
        raise InputError(f"{path}: was not rendered")
    collector = _Collector()
    collector.feed(path.read_text(encoding="utf-8"))
    return collector


def _check_loads(path: Path, page: _Collector) -> None:
    for address in page.loads:
        parts = urlsplit(address)
        if parts.scheme in ("http", "https") or (parts.netloc and not parts.scheme):
            raise InputError(f"{path}: loads {address} from another host; pages must work offline")
        if not parts.scheme and parts.path and not (path.parent / unquote(parts.path)).is_file():
            raise InputError(f"{path}: {address} is missing")
    for style in page.styles:
        if match := _CSS_URL.search(style):
            raise InputError(f"{path}: a style loads {match[1]} from another host")


def _check_links(path: Path, page: _Collector, contents: dict[Path, _Collector]) -> None:
    for address in page.links:
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not target.is_file():
            raise InputError(f"{path}: link to {address} leads nowhere")
        known = contents.get(target)
        if parts.fragment and known and unquote(parts.fragment) not in known.ids:
            raise InputError(f"{path}: link to {address}: no such place on that page")


def _check_text(path: Path) -> None:
    """Refuse what Quarto and pandoc leave where a reference or citation leads nowhere."""
    text = path.read_text(encoding="utf-8")
    if match := re.search(r"\?@((?:fig|tbl|sec|eq)-[\w-]+)", text):
        raise InputError(f"{path}: cross-reference '@{match[1]}' leads nowhere")
    if match := re.search(r'data-cites="[^"]*"[^>]*>[^<]*<strong>([\w:-]+)\?</strong>', text):
        raise InputError(f"{path}: citation '@{match[1]}' is not in references.bib")
