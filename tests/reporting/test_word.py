"""A Word file has whole words in its tables and contents that are there when it is opened."""

from __future__ import annotations

import re
import subprocess
import zipfile
from xml.etree import ElementTree

import pandas as pd
import pytest

from moe_routing.analysis.tables import LONG, markdown
from moe_routing.reporting.render import find_pandoc
from moe_routing.reporting.word import DOCUMENT, finish_word

ID = "absolute_k8_b3_consequence_compensated_scaled"
LINE = 60 * "word "
TEXT = f"""# One & two {{#sec-one}}

## Inner {{#sec-inner}}

### Deeper

| Id | Value |
|:---|---:|
| `{ID}` | **1** |
| `stock` | 2^3^ |

`{ID}` in the text.

# Last
"""


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "x.docx"
    command = [find_pandoc(), "--toc", "--number-sections", f"--output={path}"]
    subprocess.run(command, input=TEXT, text=True, check=True)
    finish_word(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return archive.read(DOCUMENT).decode()


def text_of(xml):
    return re.sub(r"<[^>]+>", "", xml)


def test_contents_are_filled_with_links_to_the_headings(document):
    ElementTree.fromstring(document)  # noqa: S314 (our own file)
    contents = document[document.index("<w:sdtContent>") : document.index("</w:sdtContent>")]
    links = re.findall(r'<w:hyperlink w:anchor="([^"]+)">(.*?)</w:hyperlink>', contents)
    assert [(anchor, text_of(link)) for anchor, link in links] == [
        ("sec-one", "1 One &amp; two"), ("sec-inner", "1.1 Inner"), ("last", "2 Last"),
    ]  # fmt: skip
    assert contents.index("separate") < contents.index("sec-one") < contents.index('"end"')
    assert "w:dirty" not in contents


def test_tables_are_small_and_long_ids_in_them_may_break(document):
    table = document[document.index("<w:tbl>") : document.index("</w:tbl>")]
    assert table.count("<w:r>") == table.count('<w:sz w:val="14" />') > 0
    assert table.count("<w:tr>") == table.count("<w:cantSplit />") == 3
    assert ID.replace("_", "_\N{ZERO WIDTH SPACE}") in table
    rest = document.replace(table, "")
    assert ID in rest
    assert "\N{ZERO WIDTH SPACE}" not in rest
    assert '<w:sz w:val="14" />' not in rest


def test_the_page_is_a4(document):
    assert re.search(r'<w:pgSz w:w="11906" w:h="16838" />.*?<w:pgMar [^>]*/></w:sectPr>', document)


def test_columns_of_a_table_are_as_wide_as_their_longest_word():
    table = pd.DataFrame(
        {
            "Data set": ["Wikipedia"],
            "Text": ["word " * 60],
            "More": ["word " * 60],
            "Id": [f"`{ID}`"],
        }
    )
    rules = [len(rule) for rule in re.findall(r"-+", markdown(table, "llll").splitlines()[1])]
    data, text, more, name = rules
    assert data >= len("Wikipedia")
    assert text == more > data  # what is left goes to those that have more to say
    assert max(map(len, re.split("(?<=_)", ID))) <= name < len(ID)
    assert len(ID) > LONG
