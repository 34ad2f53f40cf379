"""Check rendered pages: no broken links, no missing images, no calls to other hosts."""

from __future__ import annotations

import re
import zipfile
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from moe_routing.errors import InputError

_LOADING = {
    "img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "video": "src",
    "audio": "src", "embed": "src", "object": "data", "use": "href",
}  # fmt: skip
"""Attributes that make a browser load something; that of a link does not."""

_CSS_URL = re.compile(r"(?:url\(\s*['\"]?|@import\s+['\"])((?:https?:)?//[^)'\"]+)", re.IGNORECASE)


_REFERENCE = re.compile(r"\?@((?:fig|tbl|sec|eq)-[\w-]+)")
"""What Quarto leaves of an unresolved cross-reference."""

_INLINE = re.compile(r"\{python\}\s")
"""What a version of Quarto without inline code leaves."""

_CITATION = re.compile(
    r'data-cites="[^"]*"[^>]*>(?:(?!</span>).)*?<strong>([^\s<>]+)\?</strong>', re.DOTALL
)
"""What pandoc leaves of a citation without an entry, with or without ``link-citations``."""

_WORD_ANCHOR = re.compile(r'w:anchor="(ref-[^"]+)"')
_WORD_BOOKMARK = re.compile(r'<w:bookmarkStart\b[^>]*\bw:name="([^"]+)"')


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
        """Collect ids, loads and links."""
        values = {name: value or "" for name, value in attrs}
        self.ids.add(values.get("id", ""))
        self.styles.append(values.get("style", ""))
        self._inside_style = tag == "style"
        if tag in _LOADING and values.get(_LOADING[tag]):
            self.loads.append(values[_LOADING[tag]])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])

    def handle_data(self, data: str) -> None:
        """Collect style sheets."""
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
        _check_text(path)
        _check_loads(path, page)
        _check_links(path, page, contents)


def _collect(path: Path) -> _Collector:
    if not path.is_file():
        raise InputError(f"{path}: was not rendered")
    collector = _Collector()
    collector.feed(path.read_text(encoding="utf-8", errors="replace"))
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
            raise InputError(f"{path}: link to {address}: no such anchor on that page")


def _check_text(path: Path) -> None:
    """Refuse what Quarto and pandoc leave of unresolved references and citations."""
    text = path.read_text(encoding="utf-8", errors="replace")
    _check_references(path, text)
    if match := _CITATION.search(text):
        raise _no_entry(path, match[1])


def _check_references(path: Path, text: str) -> None:
    if _INLINE.search(text):
        raise InputError(f"{path}: inline code was not run; Quarto runs it from version 1.4 on")
    if match := _REFERENCE.search(text):
        raise InputError(f"{path}: cross-reference '@{match[1]}' leads nowhere")


def _no_entry(path: Path, key: str) -> InputError:
    return InputError(f"{path}: citation '@{key}' is not in references.bib")


def check_word(path: Path) -> None:
    """Check the references of a rendered Word file; its citations are links into its bibliography.

    Raises:
        InputError: a reference or citation leads nowhere, or it is not a Word file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            text = archive.read("word/document.xml").decode("utf-8", errors="replace")
    except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a Word file: {error}") from error
    _check_references(path, re.sub(r"<[^>]+>", "", text))
    bookmarks = set(_WORD_BOOKMARK.findall(text))
    for anchor in _WORD_ANCHOR.findall(text):
        if anchor not in bookmarks:
            raise _no_entry(path, anchor.removeprefix("ref-"))
