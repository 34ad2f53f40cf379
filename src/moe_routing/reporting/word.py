"""Finish a Word file that pandoc has written: its list of contents, its tables, its page.

Pandoc leaves the contents to be filled by Word on request, and sets tables in the size of the text.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path

from moe_routing.analysis.tables import LONG
from moe_routing.files import atomic_path

DOCUMENT = "word/document.xml"
LEVELS = 2
"""Levels of headings in the list of contents."""

_PAGE = (
    '<w:pgSz w:w="11906" w:h="16838" /><w:pgMar w:top="1134" w:right="1134" w:bottom="1134" '
    'w:left="1134" w:header="567" w:footer="567" w:gutter="0" />'
)
"""A4 with margins of 2 cm, in twentieths of a point."""

_SIZE = '<w:sz w:val="14" /><w:szCs w:val="14" />'
"""The size of the text of tables, in half points."""

_GAPS = (
    '<w:tblCellMar><w:left w:w="40" w:type="dxa" /><w:right w:w="40" w:type="dxa" /></w:tblCellMar>'
)
"""The gaps between columns."""

_ID = re.compile(rf"(?<=>)\w[\w.-]{{{LONG},}}(?=<)")
_TABLE = re.compile(r"<w:tbl>.*?</w:tbl>", re.DOTALL)
_PROPERTIES = re.compile(r"<w:rPr>(.*?)(<w:vertAlign[^>]*/>)?</w:rPr>", re.DOTALL)
_CONTENTS = re.compile(
    r'(<w:fldChar w:fldCharType="begin") w:dirty="true"( />.*?w:fldCharType="separate" />)'
    r'(<w:fldChar w:fldCharType="end" />)',
    re.DOTALL,
)
_HEADING = re.compile(
    r'<w:bookmarkStart [^>]*w:name="([^"]+)" ?/>\s*'
    r'<w:p><w:pPr>(?:(?!</w:pPr>).)*<w:pStyle w:val="Heading(\d)" ?/>.*?</w:pPr>(.*?)</w:p>',
    re.DOTALL,
)


def finish_word(path: Path) -> None:
    """Fill the list of contents, make tables small and keep their rows together, set the page.

    Args:
        path: a .docx file, replaced.
    """
    with atomic_path(path) as temporary:
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(temporary, "w") as new:
            for entry in old.infolist():
                data = old.read(entry)
                if entry.filename == DOCUMENT:
                    data = _finished(data.decode("utf-8")).encode("utf-8")
                new.writestr(entry, data, zipfile.ZIP_DEFLATED)
        shutil.copymode(path, temporary)


def _finished(document: str) -> str:
    document = _TABLE.sub(lambda found: _small(found[0]), document)
    document = re.sub(r"\s*<w:pg(?:Sz|Mar) [^>]*/>", "", document)
    document = document.replace("</w:sectPr>", f"{_PAGE}</w:sectPr>")
    entries = "".join(_entry(*found) for found in _HEADING.findall(document))
    # The field ends in a paragraph of its own, after the entries.
    filled = rf"\1\2</w:r></w:p>{entries}<w:p><w:r>\3"
    return _CONTENTS.sub(filled, document, count=1)


def _small(table: str) -> str:
    """Return a table with small text, narrow gaps, whole rows, and long ids that may break."""
    table = table.replace("<w:tblLook", f"{_GAPS}<w:tblLook", 1)
    table = _ID.sub(lambda found: found[0].replace("_", "_\N{ZERO WIDTH SPACE}"), table)
    table = _PROPERTIES.sub(
        lambda found: f"<w:rPr>{found[1]}{_SIZE}{found[2] or ''}</w:rPr>", table
    )
    table = table.replace("<w:r><w:t", f"<w:r><w:rPr>{_SIZE}</w:rPr><w:t")
    table = table.replace("<w:tr><w:tc>", "<w:tr><w:trPr><w:cantSplit /></w:trPr><w:tc>")
    return table.replace("<w:trPr><w:tblHeader", "<w:trPr><w:cantSplit /><w:tblHeader")


def _entry(anchor: str, level: str, runs: str) -> str:
    """Return a line of the list of contents, a link to its heading; empty for deeper levels."""
    if int(level) > LEVELS:
        return ""
    text = re.sub(r"<w:tab ?/>", " ", runs)
    text = re.sub(r"<[^>]+>", "", text)
    return (
        f'<w:p><w:pPr><w:pStyle w:val="Compact" /><w:ind w:left="{400 * (int(level) - 1)}" />'
        f'</w:pPr><w:hyperlink w:anchor="{anchor}"><w:r><w:rPr><w:rStyle w:val="Hyperlink" />'
        f'</w:rPr><w:t xml:space="preserve">{text}</w:t></w:r></w:hyperlink></w:p>'
    )
