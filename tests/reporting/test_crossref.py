"""Numbers and references of the preview, on pandoc's own syntax trees."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from moe_routing.errors import InputError
from moe_routing.reporting.crossref import resolve
from moe_routing.reporting.render import find_pandoc

TEXT = """
# Before {#sec-before}

## Within {#sec-within}

See @fig-one, @fig-two, @tbl-one, @eq-one and @sec-within; cited by @known2000 and [@known2000].

![First](one.png){#fig-one}

![Second](two.png){#fig-two}

| a | b |
|---|---|
| 1 | 2 |

: Caption of the table. {#tbl-one}

$$
x = y
$$ {#eq-one}

# Aside {.unnumbered}

# After {#sec-after}
"""


def pandoc(text, read, write):
    command = [find_pandoc(), "-f", read, "-t", write, "--wrap=none"]
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return result.stdout


def plain(document):
    html = pandoc(json.dumps(document), "json", "html")
    return re.sub(r"<[^>]+>", "", html).replace("\N{NO-BREAK SPACE}", " ")


def resolved(text):
    return resolve(json.loads(pandoc(text, "markdown", "json")), "page.qmd", {"known2000"})


def test_every_kind_is_numbered_and_linked():
    text = plain(resolved(TEXT))
    assert "See Figure 1, Figure 2, Table 1, Equation 1 and Section 1.1; cited" in text
    assert "Figure 1: First" in text
    assert "Table 1: Caption of the table." in text
    assert "{#tbl-one}" not in text
    assert "{#eq-one}" not in text


def test_links_point_at_ids_that_exist():
    document = json.dumps(resolved(TEXT))
    for label in ("fig-one", "fig-two", "tbl-one", "eq-one", "sec-within"):
        assert f'["#{label}", ""]' in document
        assert f'["{label}", ' in document


def test_unnumbered_sections_do_not_count():
    assert "Section 2" in plain(resolved(TEXT + "\n@sec-after\n"))


def test_several_references_in_one_bracket():
    assert "Figure 1Figure 2" in plain(resolved(TEXT + "\n[@fig-one; @fig-two]\n"))


def test_alternative_text_is_not_the_caption():
    text = '![What it shows](one.png){#fig-one fig-alt="What it looks like"}'
    html = pandoc(json.dumps(resolved(text)), "json", "html")
    assert 'alt="What it looks like"' in html
    assert re.search(r"<figcaption[^>]*>Figure.1: What it shows</figcaption>", html)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("See @fig-none.", "cross-reference '@fig-none' leads nowhere"),
        ("See [@tbl-none].", "cross-reference '@tbl-none' leads nowhere"),
        ("See @nobody1999.", "citation '@nobody1999' is not in references.bib"),
        ("![a](a.png){#fig-a}\n\n![b](b.png){#fig-a}", "label 'fig-a' occurs twice"),
        ("![a](a.png){#fig-a}\n\n[@fig-a; @known2000]", "mixes citations with '@fig-a'"),
        ("| a |\n|---|\n| @fig-none |", "cross-reference '@fig-none' leads nowhere"),
    ],
)
def test_what_leads_nowhere_is_one_error(text, said):
    with pytest.raises(InputError, match=said) as error:
        resolved(text)
    assert str(error.value).startswith("page.qmd: ")
    assert "\n" not in str(error.value)
