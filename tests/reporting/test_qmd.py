"""Cells and inline code run as Quarto runs them; what fails is one line."""

from __future__ import annotations

from ast import literal_eval

import pytest

from moe_routing.errors import InputError
from moe_routing.reporting.qmd import INLINE, cell_options, code_of, run_page, run_pages

PAGE = """---
title: A page
---

```{python}
#| include: false
value = 3


class Bold(str):
    def _repr_markdown_(self):
        return f"**{self}**"
```

The value is `{python} value`, `{python} Bold("loud")` and `{python} "plain"`; `code` stays.

```{python}
#| output: asis
print("| a |\\n|---|\\n| 1 |")
```

```{python}
#| echo: true
value + 1
```

```{python}
Bold("last")
```
"""


def written(tmp_path, text):
    path = tmp_path / "page.qmd"
    path.write_text(text)
    return path


def test_a_page_runs(tmp_path):
    page = run_page(written(tmp_path, PAGE), echo=False)
    assert page.front == {"title": "A page"}
    assert "The value is 3, **loud** and plain; `code` stays." in page.markdown
    assert "\n| a |\n|---|\n| 1 |" in page.markdown
    assert "```python\nvalue + 1\n```" in page.markdown
    assert "class Bold" not in page.markdown
    assert page.markdown.rstrip().endswith("**last**")


def test_pages_share_a_kernel_but_no_names_and_each_runs_in_its_folder(tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    code = "import os\n\nknown = 'value' in globals()\nvalue = 1\n(os.getpid(), os.getcwd(), known)"
    for folder in folders:
        folder.mkdir()
        (folder / "page.qmd").write_text(f"```{{python}}\n{code}\n```\n")
    pages = run_pages([(folder / "page.qmd", False) for folder in folders])
    said = [literal_eval(page.markdown.strip("`\n")) for page in pages]
    assert [(folder, known) for _, folder, known in said] == [(str(one), False) for one in folders]
    assert said[0][0] == said[1][0]
    assert [page.notebook.cells[0].execution_count for page in pages] == [1, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```{python}\n1 / 0\n```\n", "cell 0: ZeroDivisionError: division by zero"),
        ("So `{python} 1 / 0`.\n", "inline '1 / 0': ZeroDivisionError: division by zero"),
        ("```{python}\nimport os\nos._exit(1)\n```\n", "cell 0: its Python process died"),
        ("---\ntitle: [\n---\n", "front matter"),
    ],
)
def test_failures_name_the_page(tmp_path, text, said):
    path = written(tmp_path, text)
    with pytest.raises(InputError, match=said) as error:
        run_page(path, echo=False)
    assert str(error.value).startswith(str(path))


def test_inline_pattern_leaves_other_code_alone():
    assert INLINE.findall("`{python} a` and ``{python} b`` and `c` and `{r} d`") == ["a"]


def test_options_and_code_are_told_apart():
    source = '#| label: fig-a\n#| fig-cap: "Text: more"\nx = 1  #| not an option'
    assert cell_options(source) == {"label": "fig-a", "fig-cap": "Text: more"}
    assert code_of(source) == "x = 1  #| not an option"
