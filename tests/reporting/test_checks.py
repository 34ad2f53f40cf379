"""Pages that call another host, lack an image or link into nowhere are refused."""

from __future__ import annotations

import subprocess

import pytest

from moe_routing.errors import InputError
from moe_routing.reporting.checks import check_pages, check_word
from moe_routing.reporting.render import find_pandoc

GOOD = """<html><head><style>b { background: url(data:image/png;base64,AA) }</style></head>
<body id="top"><img src="data:image/png;base64,AA"/><img src="here.png"/>
<a href="https://example.org">a source</a><a href="other.html#there">other</a><a href="#top">up</a>
</body></html>"""


def write(folder, text):
    (folder / "here.png").write_bytes(b"png")
    (folder / "other.html").write_text('<p id="there">x</p>')
    (folder / "page.html").write_text(text)
    return [folder / "page.html", folder / "other.html"]


def test_a_page_may_link_to_hosts_but_not_load_from_them(tmp_path):
    check_pages(write(tmp_path, GOOD))


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ('<script src="https://cdn.example.org/x.js"></script>', "from another host"),
        ('<link rel="stylesheet" href="http://example.org/x.css"/>', "from another host"),
        ('<img src="//example.org/x.png"/>', "from another host"),
        ("<style>@import 'https://example.org/x.css';</style>", "a style loads"),
        ('<p style="background: url(https://example.org/x.png)">x</p>', "a style loads"),
        ('<img src="gone.png"/>', "gone.png is missing"),
        ('<a href="gone.html">x</a>', "leads nowhere"),
        ('<a href="other.html#gone">x</a>', "no such anchor"),
        ('<a href="#gone">x</a>', "no such anchor"),
        ("<p>see <strong>?@fig-gone</strong></p>", "cross-reference '@fig-gone' leads nowhere"),
        (
            '<span class="citation" data-cites="x">(<strong>x?</strong>)</span>',
            "citation '@x' is not in references.bib",
        ),
    ],
)
def test_each_fault_is_found(tmp_path, added, said):
    pages = write(tmp_path, GOOD.replace("</body>", f"{added}</body>"))
    with pytest.raises(InputError, match=said):
        check_pages(pages)


def test_a_page_that_was_not_rendered(tmp_path):
    with pytest.raises(InputError, match="was not rendered"):
        check_pages([tmp_path / "none.html"])


BIBLIOGRAPHY = "@book{known2000, title={T}, author={Author, A}, year={2000}}"


def by_pandoc(folder, text, name, *options):
    """A file that pandoc makes of a text, as Quarto calls it."""
    (folder / "references.bib").write_text(BIBLIOGRAPHY)
    command = [find_pandoc(), "--standalone", "--citeproc", "--bibliography=references.bib"]
    subprocess.run(
        [*command, "--metadata=title:x", *options, f"--output={name}"],
        cwd=folder, input=text, text=True, check=True, capture_output=True,
    )  # fmt: skip
    return folder / name


CITED = "Known [@known2000] and {} words. Is **this one?** bold?\n"
GONE = ["[@known2000; @gone1999]", "@gone1999", "[see @gone1999, p. 3]"]
LINKED = "--metadata=link-citations:true"


@pytest.mark.parametrize("options", [(), (LINKED,)])
def test_citations_as_pandoc_writes_them(tmp_path, options):
    check_pages([by_pandoc(tmp_path, CITED.format("@known2000"), "good.html", *options)])
    for gone in GONE:
        page = by_pandoc(tmp_path, CITED.format(gone), "bad.html", *options)
        with pytest.raises(InputError, match=r"citation .@gone1999. is not in references\.bib"):
            check_pages([page])


def test_citations_in_word_files(tmp_path):
    check_word(by_pandoc(tmp_path, CITED.format("@known2000"), "good.docx", LINKED))
    for gone in GONE:
        path = by_pandoc(tmp_path, CITED.format(gone), "bad.docx", LINKED)
        with pytest.raises(InputError, match=r"bad\.docx: citation '@gone1999' is not in"):
            check_word(path)


def test_a_word_file_with_a_reference_into_nowhere(tmp_path):
    path = by_pandoc(tmp_path, "See **?\\@fig-gone**.", "bad.docx", LINKED)
    with pytest.raises(InputError, match="cross-reference '@fig-gone' leads nowhere"):
        check_word(path)
    path.write_bytes(b"no archive")
    with pytest.raises(InputError, match="not a Word file"):
        check_word(path)
