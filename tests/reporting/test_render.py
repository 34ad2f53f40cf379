"""The manuscript renders from a results folder, every cell and all; broken sources do not."""

from __future__ import annotations

import base64
import html as html_module
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml
from planted_results import add_analyses, make_study, planted_config

from moe_routing.analysis.outputs import ABLATION, ANALYSES, CONSEQUENCE, VALIDITY
from moe_routing.errors import InputError
from moe_routing.figures.baseline import draw_baseline
from moe_routing.figures.bh import draw_bh
from moe_routing.reporting import notebook, protocol
from moe_routing.reporting import render as rendering
from moe_routing.reporting.article import DOWNLOADED, Article, results_folder
from moe_routing.reporting.article_figures import ARTICLE_FIGURES, CAPTIONS, COMPARISON, DRAWN_BY
from moe_routing.reporting.checks import check_pages
from moe_routing.reporting.notebook import EXCLUDED_FORMATS
from moe_routing.reporting.pages import NOTEBOOKS, outputs, sources
from moe_routing.reporting.qmd import read_page, source_notebook
from moe_routing.reporting.render import (
    OUTPUT_DIR,
    PREVIEW_NOTE,
    Rendered,
    find_pandoc,
    render,
    render_pdf,
    repository_address,
)
from moe_routing.routing.strategies import controls, families
from moe_routing.vocabulary import DATASETS

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "report"
FIGURES = 10
"""Seven of the comparison, two of each analysis that was made: baseline and BH."""


@pytest.fixture(scope="module")
def rendered(planted, nano, outputs, toggles):
    add_analyses(planted, nano, outputs, toggles)
    draw_baseline(planted.folder / "baseline")
    draw_bh(planted.folder / "bh")
    (planted.folder / "run.json").write_text('{"config_file": "config/mine.yaml"}')
    assert render(SOURCE, planted.folder) == ("preview", "")
    return planted.folder / "report"


@pytest.fixture(scope="module")
def executed(rendered, tmp_path_factory):
    """The article after its cells were run, in a folder of its own."""
    with rendering._results_named(rendered.parent):
        folder = tmp_path_factory.mktemp("run") / "report"
        return rendering._execute(SOURCE, folder, rendered.parent, notebooks=()).article


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(SOURCE, tmp_path / "report"))


def text_of(path):
    body = re.sub(r"(?s)<style.*?</style>|<[^>]+>", "", path.read_text(encoding="utf-8"))
    return re.sub(r"\s+", " ", body.replace("\N{NO-BREAK SPACE}", " "))


def test_every_file_is_there_and_nothing_else(rendered):
    found = {path.relative_to(rendered).as_posix() for path in rendered.rglob("*.*")}
    assert found == set(outputs())
    assert all((SOURCE / name).is_file() for name in sources())


def test_first_screen_says_what_was_asked_found_and_on_which_model(rendered):
    text = text_of(rendered / "index.html")
    start = text[: text.index("Abstract A mixture")]
    assert PREVIEW_NOTE in start
    assert "Question. How many of its 8 experts does a token need?" in start
    assert "is worse than the stock model: its length-normalised accuracy on HellaSwag" in start
    assert "is lower by 3.0 percentage points [" in start
    assert "Measured on a small model (olmoe-nano, 16 million parameters)" in start


def test_abstract_says_the_same(rendered):
    text = text_of(rendered / "index.html")
    abstract = text[text.index("Abstract A mixture") : text.index("1 Question OLMoE")]
    assert "BH routing did worse than the stock model on HellaSwag, by 3.0 percentage" in abstract
    assert len(abstract.split()) <= 150


def test_pages_have_tables_figures_with_alt_text_and_references(rendered):
    html = (rendered / "index.html").read_text(encoding="utf-8")
    images = re.findall(r"<img[^>]*>", html)
    assert len(images) == FIGURES
    texts = {html_module.unescape(found) for found in re.findall(r' alt="([^"]+)"', html)}
    assert texts <= {figure.alt for figure in ARTICLE_FIGURES.values()}
    assert all('src="data:image/png;base64,' in image for image in images)
    assert html.count("<table") >= 6
    assert "{python}" not in html
    assert "Benjamini, Yoav" in html
    assert "<math" in html


@pytest.mark.parametrize(
    ("name", "figures"), [("baseline", 4), ("bh_routing", 6), ("comparison", 5)]
)
def test_figures_of_notebooks_have_captions_and_alt_text(rendered, name, figures):
    html = (rendered / "notebooks" / f"{name}.html").read_text(encoding="utf-8")
    shown = r"(?s)<p><img[^>]* alt=\"([^\"]+)\"[^>]*></p>\s*<p><em>Figure (\d+): (.*?)</em></p>"
    found = re.findall(shown, html)
    assert [int(number) for _, number, _ in found] == list(range(1, figures + 1))
    assert html.count("<img") == figures
    texts = [alt for alt, _, _ in found] + [" ".join(text.split()) for _, _, text in found]
    assert len(set(texts)) == 2 * figures


def test_what_was_not_drawn_is_said(rendered):
    text = text_of(rendered / "index.html")
    assert "Not drawn: the analysis validity/ was not run." in text
    assert "The ablation was not run in this study." in text


@pytest.mark.parametrize("label", ["fig-pareto", "fig-bh-quality"])
def test_a_figure_that_should_be_there_is_asked_for(rendered, tmp_path, monkeypatch, label):
    monkeypatch.chdir(tmp_path)  # figures are copied beside the page
    folder = Path(shutil.copytree(rendered.parent, tmp_path / "planted"))
    article = Article.load(folder)
    path = folder / ARTICLE_FIGURES[label].path
    assert f"(_figures/{label}.png)" in article.figure(label)
    copied = tmp_path / "_figures" / f"{label}.png"
    assert copied.read_bytes() == (folder / ARTICLE_FIGURES[label].path).read_bytes()
    path.unlink()
    with pytest.raises(InputError, match=r"\.png: the figure is missing; run the workflow"):
        article.figure(label)


def test_a_figure_that_the_config_does_not_plan_is_explained(tmp_path):
    config = planted_config(
        strategies=("stock", "regular_k4"),
        datasets=("hellaswag",),
        primary=("regular_k4", "hellaswag"),
    )
    article = Article(make_study(tmp_path / "planted", config, items=200))
    assert article.figure("fig-budgets") == (
        "*Not drawn: this run has no rules at matched budgets.*"
    )
    assert article.figure("fig-layers").startswith("*Not drawn: no strategy of this run has")
    with pytest.raises(InputError, match="the figure is missing"):
        article.figure("fig-forest")


def test_article_figures_are_drawn_and_shown():
    made = {path.lstrip("/") for part in ANALYSES for path in part.plot_paths("", "png")}
    made |= {f"{COMPARISON}/{name}.png" for name in CAPTIONS}
    assert {figure.path for figure in ARTICLE_FIGURES.values()} <= made
    assert {f"{COMPARISON}/{name}.png" for name in CAPTIONS} <= {
        p.path for p in ARTICLE_FIGURES.values()
    }
    shown = {
        f"{one.name}/{one.name}_plots/{p}.png"
        for one in (VALIDITY, ABLATION, CONSEQUENCE)
        for p in one.plots
    }
    assert shown <= {figure.path for figure in ARTICLE_FIGURES.values()}
    article = (SOURCE / "index.qmd").read_text(encoding="utf-8")
    assert [label for label in ARTICLE_FIGURES if f'a.figure("{label}")' not in article] == []
    parts = {part.name: part.files for part in ANALYSES}
    for figure in ARTICLE_FIGURES.values():
        for folder, _, name in (source.partition("/") for source in figure.sources):
            assert name in parts.get(folder, [name]), name


@pytest.mark.parametrize("figure", ["fig-binding", "fig-simulation"])
def test_the_validity_section_has_the_figure(figure):
    text = (SOURCE / "index.qmd").read_text(encoding="utf-8")
    section = text[text.index("{#sec-validity}") : text.index("{#sec-ablation}")]
    assert f'a.figure("{figure}")' in section
    named = section + Path(protocol.__file__).read_text(encoding="utf-8")
    assert f'a.ref("{figure}"' in section or f"@{figure} " in named


def test_docx_holds_text_and_figures(rendered):
    with zipfile.ZipFile(rendered / "index.docx") as archive:
        names = archive.namelist()
        text = archive.read("word/document.xml").decode()
    assert sum(name.startswith("word/media/") for name in names) == FIGURES
    assert "percentage points" in text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_valid_were_run_and_start_by_themselves(rendered, name):
    path = rendered / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "git" in code[0].source
    assert "start(" in code[0].source
    assert code[0].source.count("CONFIG = ") == 1
    assert '\nCONFIG = "config/mine.yaml"\n' in code[0].source
    assert "GPU" in code[0].outputs[0].text
    assert all(cell.execution_count for cell in code)
    assert "errors" not in {o.output_type for cell in code for o in cell.outputs}
    assert str(ROOT) not in path.read_text(encoding="utf-8")


def kinds_of(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return {kind for cell in cells for output in cell.outputs for kind in output.get("data", {})}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_output_of_a_notebook_is_html(rendered, name):
    kinds = kinds_of(nbformat.read(rendered / "notebooks" / f"{name}.ipynb", as_version=4))
    assert "text/markdown" in kinds
    assert not kinds & set(EXCLUDED_FORMATS)


def test_no_output_of_the_article_is_html(executed):
    kinds = kinds_of(executed.notebook)
    assert "text/markdown" in kinds
    assert not kinds & set(EXCLUDED_FORMATS)


def test_data_frames_are_tables_of_the_notebooks(rendered):
    html = (rendered / "notebooks" / "baseline.html").read_text(encoding="utf-8")
    heads = re.findall(r"(?s)<thead>(.*?)</thead>", html)
    assert any("avg_max_weight" in head and "entropy" in head for head in heads)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_show_no_markup_of_pandoc(rendered, name):
    text = (rendered / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert "{.source}" not in text
    assert "{#tbl" not in text


def first_cell(name):
    _, notebook = read_page(SOURCE / "notebooks" / f"{name}.qmd")
    return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outside_the_repository_a_notebook_asks_for_an_address_and_does_nothing(
    tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOE_ROUTING_REPOSITORY", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("ran a program"))
    with pytest.raises(SystemExit, match="Set REPOSITORY in this cell to the address") as said:
        exec(first_cell(name), {})  # noqa: S102 (the page's own code)
    assert "\n" not in str(said.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outside_the_repository_a_notebook_clones_and_installs(tmp_path, monkeypatch, name):
    first = first_cell(name)
    ran = []

    def run(command, *, check):
        assert check
        ran.append(command)
        if command[0] == "git":
            Path(command[-1]).mkdir()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE_ROUTING_REPOSITORY", "file:///somewhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("subprocess.run", run)
    exec(first[: first.index("from moe_routing")], {})  # noqa: S102 (the page's own code)
    git, pip = ran
    assert git[:2] == ["git", "clone"]
    assert git[-2:] == ["file:///somewhere", "moe-routing-study"]
    assert pip[1:4] == ["-m", "pip", "install"]
    assert pip[4] == "./moe-routing-study[workflow]"


def test_a_notebook_goes_on_in_the_clone_and_names_the_gpu(tmp_path, monkeypatch, capsys):
    (tmp_path / notebook.CLONE).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebook, "show_markdown", lambda: None)
    monkeypatch.setattr(notebook, "prepare", lambda *files: (Path.cwd(), *files))
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert notebook.start("c.yaml", "a", "b") == (tmp_path / notebook.CLONE, "c.yaml", "a", "b")
    assert capsys.readouterr().out.startswith("No GPU. The default study runs on the CPU")

    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'Tesla T4, 15360 MiB'\n")
    smi.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda _: str(smi))
    assert notebook.gpu_line().startswith("GPU: Tesla T4, 15360 MiB. ")


def test_a_replaced_package_asks_for_a_restart(monkeypatch):
    monkeypatch.setattr(notebook, "version", lambda _: "999")
    with pytest.raises(SystemExit, match="Restart session, then run all cells again"):
        notebook.start("c.yaml", "a")


def test_notebooks_begin_with_the_same_cell():
    cells = []
    for name in NOTEBOOKS:
        first = first_cell(name)
        cells.append(first[: first.index("results = start(")])
    assert len(set(cells)) == 1


def git(folder, *arguments):
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("citation", "origin", "address"),
    [
        ("repository-code: https://one.org/a", "https://two.org/b", "https://one.org/a"),
        ("title: x", "https://two.org/b.git", "https://two.org/b.git"),
        ("title: x", "https://me:secret@two.org:8443/b", "https://two.org:8443/b"),
        ("title: x", "git@two.org:b.git", ""),
        ("title: x", "/srv/b", ""),
        ("title: x", None, ""),
        ("", "https://two.org/b", "https://two.org/b"),
        (None, "https://two.org/b", "https://two.org/b"),
    ],
)
def test_the_repository_is_that_of_the_citation_or_of_the_clone(
    tmp_path, citation, origin, address
):
    git(tmp_path, "init")
    if origin:
        git(tmp_path, "remote", "add", "origin", origin)
    if citation is not None:
        (tmp_path / "CITATION.cff").write_text(citation)
    assert repository_address(tmp_path) == address


@pytest.mark.parametrize("address", ["https://one.org/a", ""])
def test_a_notebook_names_the_repository(tmp_path, copy, address):
    (copy.parent / "CITATION.cff").write_text(f"repository-code: '{address}'\n")
    line = (
        'REPOSITORY = os.environ.get("MOE_ROUTING_REPOSITORY") or ""  # its address, for git clone'
    )
    for name in NOTEBOOKS:
        assert f"\n{line}\n" in (copy / "notebooks" / f"{name}.qmd").read_text()
    stubbed(copy, body=f"```{{python}}\nimport os\n{line}\n```", article=True)
    (tmp_path / "results").mkdir()
    render(copy, tmp_path / "results", quarto=quarto(tmp_path))
    for name in NOTEBOOKS:
        path = tmp_path / "results" / "report" / "notebooks" / f"{name}.ipynb"
        cells = nbformat.read(path, as_version=4).cells
        code = next(cell.source for cell in cells if cell.cell_type == "code")
        assert code == f"import os\n{line.replace(chr(34) * 2, json.dumps(address))}"


def test_pages_load_nothing_and_lead_to_one_another(rendered):
    links = {}
    for page in ("index.html", *(f"notebooks/{name}.html" for name in NOTEBOOKS)):
        html = (rendered / page).read_text(encoding="utf-8")
        loaded = re.findall(
            r'<(?:img|script|link|iframe|source)\b[^>]*?(?:src|href)="([^"]+)"', html
        )
        assert [address for address in loaded if not address.startswith("data:")] == []
        links[page] = set(re.findall(r'<a\b[^>]*?href="([^"]+)"', html))
    assert {f"notebooks/{name}.html" for name in NOTEBOOKS} <= links["index.html"]
    assert {f"notebooks/{name}.ipynb" for name in NOTEBOOKS} <= links["index.html"]
    assert all("../index.html" in links[f"notebooks/{name}.html"] for name in NOTEBOOKS)


def test_wide_tables_scroll_in_themselves_and_what_is_long_breaks():
    css = (SOURCE / "styles.css").read_text(encoding="utf-8")
    assert re.search(r'div\[id\^="tbl-"\][^{}]* \{ overflow-x: auto; \}', css)
    assert re.search(r"\.csl-entry a[^{}]* \{ overflow-wrap: anywhere; \}", css)
    assert not re.search(r"\.source \{[^}]*nowrap", css)


def test_bibliography_and_citations_agree():
    entries = re.findall(r"^@\w+\{([^,\s]+),", (SOURCE / "references.bib").read_text(), re.M)
    texts = [(SOURCE / name).read_text() for name in sources() if name.endswith(".qmd")]
    texts.append(Path(protocol.__file__).read_text())
    texts += [dataset.citation for dataset in DATASETS.values()]
    texts += [cls.family.selection for cls in (families() | controls()).values()]
    cited = set(re.findall(r"@([a-z]+\d{4})\b", " ".join(texts)))
    assert cited == set(entries)
    assert len(entries) == len(set(entries))


def test_rendering_twice_gives_the_same_notebook(rendered):
    text = (rendered / "notebooks" / "comparison.ipynb").read_text(encoding="utf-8")
    assert "execution" not in json.dumps([c["metadata"] for c in json.loads(text)["cells"]])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("See @tbl-nowhere.", "cross-reference '@tbl-nowhere' leads nowhere"),
        ("See [@nobody2024].", "citation '@nobody2024' is not in references.bib"),
        ("```{python}\n1 / 0\n```", "ZeroDivisionError: division by zero"),
        ("So `{python} 1 / 0`.", "ZeroDivisionError: division by zero"),
        ("![Gone](gone.png)", "gone.png"),
        ("[Gone](gone.html)", "link to gone.html leads nowhere"),
    ],
)
def test_a_broken_article_is_one_line_and_leaves_the_old_one(tmp_path, copy, body, said):
    (copy / "index.qmd").write_text(f"---\ntitle: x\n---\n\n{body}\n", encoding="utf-8")
    stubbed(copy)
    old = tmp_path / "results" / "report" / "index.html"
    old.parent.mkdir(parents=True)
    old.write_text("old", encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(said)) as error:
        render(copy, tmp_path / "results")
    assert "\n" not in str(error.value)
    assert [path.name for path in old.parent.rglob("*")] == ["index.html"]
    assert old.read_text(encoding="utf-8") == "old"


def test_an_unknown_figure_or_table_is_an_error(planted):
    article = Article(planted)
    for ask in (article.figure, article.ref):
        with pytest.raises(InputError, match="figure 'fig-gone'; allowed: fig-pareto"):
            ask("fig-gone")
    with pytest.raises(InputError, match="table 'tbl-gone'; allowed: tbl-results"):
        article.table("tbl-gone")


FAKE = """#!{python}
import json, pathlib, sys, yaml, zipfile
folder = pathlib.Path(sys.argv[2])
made = folder / "_rendered"
(made / "notebooks").mkdir(parents=True)
project = yaml.safe_load((folder / "_quarto.yml").read_text())
if project["execute"]["enabled"] or list(folder.rglob("*.qmd")):
    sys.exit("Quarto would run cells")
if (folder / "_environment").exists():
    sys.exit("wrong copy")
with zipfile.ZipFile(made / "index.docx", "w") as archive:
    archive.writestr("word/document.xml", {word!r})
links = ("index.docx", "notebooks/baseline.html", "notebooks/baseline.ipynb")
links = "".join(f'<a href="{{link}}">x</a>' for link in links)
(made / "index.html").write_text(links + '{added}')
for name in ("baseline", "bh_routing", "comparison"):
    page = made / "notebooks" / f"{{name}}.html"
    page.write_text("<p>x</p>")
    head = json.loads((folder / "notebooks" / f"{{name}}.ipynb").read_text())["cells"][0]
    assert head["cell_type"] == "raw"
    if "format" not in yaml.safe_load("".join(head["source"]).strip("-")):
        page.with_suffix(".docx").write_bytes(b"docx")
        page.write_text(f'<a href="{{name}}.docx">MS Word</a>')
sys.exit({status!r})
"""


def quarto(folder, added="", status=0, word="<w:t>x</w:t>"):
    """A program that is called like Quarto and leaves pages like Quarto's.

    A page that names no formats gets those of the project, each linked from the HTML page.
    """
    path = folder / "quarto"
    path.write_text(FAKE.format(python=sys.executable, added=added, status=status, word=word))
    path.chmod(0o755)
    return str(path)


def stubbed(copy, formats="format: {html: default}", body="Nothing.", article=False):
    """Replace the notebooks, and the article too, by pages that need no study."""
    for name in NOTEBOOKS:
        page = copy / "notebooks" / f"{name}.qmd"
        page.write_text(f"---\ntitle: y\n{formats}\n---\n\n{body}\n", encoding="utf-8")
    if article:
        (copy / "index.qmd").write_text("---\ntitle: x\n---\n\nNothing.\n", encoding="utf-8")


def test_quarto_renders_where_it_is_installed(tmp_path, copy):
    stubbed(copy, article=True)
    (tmp_path / "results").mkdir()
    assert render(copy, tmp_path / "results", quarto=quarto(tmp_path)) == ("quarto", "")
    made = tmp_path / "results" / "report"
    assert {p.relative_to(made).as_posix() for p in made.rglob("*.*")} == set(outputs())
    assert not (copy / "_rendered").exists()
    for name in NOTEBOOKS:  # written by the workflow, not by Quarto
        nbformat.validate(nbformat.read(made / "notebooks" / f"{name}.ipynb", as_version=4))


def refusal(copy, results, program):
    """Why Quarto's pages are not taken; the preview stands in for them."""
    results.mkdir()
    rendered = render(copy, results, quarto=program)
    assert rendered.by == "preview"
    assert PREVIEW_NOTE in (results / "report" / "index.html").read_text(encoding="utf-8")
    return rendered.problem


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": "ERROR: no such engine"}, "quarto failed: ERROR: no such engine"),
        (
            {"added": "<strong>?@fig-gone</strong>"},
            "index.html: cross-reference '@fig-gone' leads nowhere",
        ),
        (
            {"word": "<w:b/><w:t>?@tbl-gone</w:t>"},
            "index.docx: cross-reference '@tbl-gone' leads nowhere",
        ),
        (
            {"word": '<w:hyperlink w:anchor="ref-x2000">'},
            "index.docx: citation '@x2000' is not in references.bib",
        ),
        (
            {"added": "<script src=https://x.org/y.js></script>"},
            "index.html: loads https://x.org/y.js from another host; pages must work offline",
        ),
        (
            {"added": "<code>{python} a.text(1)</code>"},
            "index.html: inline code was not run; Quarto runs it from version 1.4 on",
        ),
    ],
)
def test_what_quarto_lets_pass_is_refused(tmp_path, copy, fault, said):
    stubbed(copy, article=True)
    assert refusal(copy, tmp_path / "results", quarto(tmp_path, **fault)) == said


def test_a_link_to_a_page_that_is_not_kept_is_refused(tmp_path, copy):
    stubbed(copy, formats="", article=True)
    said = refusal(copy, tmp_path / "results", quarto(tmp_path))
    assert said == "notebooks/baseline.html: link to baseline.docx leads nowhere"


def test_a_program_that_cannot_be_run_is_no_quarto(tmp_path, copy):
    stubbed(copy, article=True)
    (tmp_path / "quarto").write_text("no program")
    said = refusal(copy, tmp_path / "results", str(tmp_path / "quarto"))
    assert said == "quarto cannot be run: Permission denied"


def test_a_quarto_that_does_not_end_is_ended_with_what_it_started(tmp_path, copy, monkeypatch):
    stubbed(copy, article=True)
    alive = tmp_path / "alive"
    program = tmp_path / "quarto"
    program.write_text(f"#!/bin/sh\n(sleep 4; touch {alive}) &\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(rendering, "QUARTO_SECONDS", 1)
    started = time.monotonic()
    said = refusal(copy, tmp_path / "results", str(program))
    assert said == "quarto did not finish within 1 seconds"
    time.sleep(max(0, 5 - (time.monotonic() - started)))
    assert not alive.exists()


def test_a_page_that_quarto_cannot_make_does_not_cost_the_study(
    tmp_path, copy, monkeypatch, capsys
):
    """The script ends well, with a preview that passes the checks and a warning."""
    stubbed(copy, article=True)
    results = tmp_path / "results"
    results.mkdir()
    quarto(tmp_path, added="<script src=https://x.org/y.js></script>")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", ["x", "--results", str(results), "--source", str(copy)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "render_report.py"), run_name="__main__")
    assert ended.value.code == 0
    made = results / "report"
    assert {path.relative_to(made).as_posix() for path in made.rglob("*.*")} == set(outputs())
    assert PREVIEW_NOTE in (made / "index.html").read_text(encoding="utf-8")
    check_pages(sorted(made.rglob("*.html")))
    said = capsys.readouterr()
    assert said.out == f"{made / 'index.html'} (preview)\n"
    warning = next(line for line in said.err.splitlines() if "warning" in line)
    assert warning == (
        "warning: the report is a preview. Quarto's pages cannot be used: index.html: loads "
        "https://x.org/y.js from another host; pages must work offline. To get them, fix this, "
        f"then run python scripts/render_report.py --results {results}"
    )


@pytest.mark.parametrize(
    ("options", "quarto", "said"),
    [
        ([], None, "preview: there is no Quarto on the PATH"),
        (["--preview"], None, "preview"),
        ([], "/bin/quarto", "preview"),
    ],
)
def test_the_script_says_that_quarto_is_missing(monkeypatch, capsys, options, quarto, said):
    monkeypatch.setattr(shutil, "which", lambda name: quarto)
    monkeypatch.setattr(rendering, "render", lambda *_, **__: Rendered("preview"))
    monkeypatch.setattr(sys, "argv", ["x", "--results", "r", *options])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "scripts" / "render_report.py"), run_name="__main__")
    assert capsys.readouterr().out == f"r/report/index.html ({said})\n"


def test_cells_run_once_for_all_formats_and_both_renderers(tmp_path, copy):
    ran = tmp_path / "ran"
    code = f"with open({str(ran)!r}, 'a') as file:\n    print('x', file=file)"
    stubbed(copy, body=f"```{{python}}\n{code}\n```")
    (copy / "index.qmd").write_text(f"---\ntitle: x\n---\n\n```{{python}}\n{code}\n```\n")
    (tmp_path / "results").mkdir()
    rendered = render(copy, tmp_path / "results", quarto=quarto(tmp_path, status="ERROR: x"))
    assert rendered == ("preview", "quarto failed: ERROR: x")
    assert len(ran.read_text().split()) == 1 + len(NOTEBOOKS)


def test_quarto_gets_the_values_of_inline_code_and_the_day_of_the_results(rendered, executed):
    day = Article.load(rendered.parent).date
    rendering._write_executed(executed)
    cells = nbformat.read(executed.path.with_suffix(".ipynb"), as_version=4).cells
    assert yaml.safe_load(cells[0].source.strip("-"))["date"] == day
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day)
    assert not [cell for cell in cells if "{python}" in cell.source]
    assert sum(len(cell.outputs) for cell in cells if cell.cell_type == "code") > 20


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebooks_are_the_pages_without_outputs(tmp_path, copy, name):
    page = SOURCE / "notebooks" / f"{name}.qmd"
    committed = page.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert committed == source_notebook(page), "run: python scripts/write_notebooks.py"
    notebook = nbformat.reads(committed, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# Notebook: ")
    assert not [cell for cell in notebook.cells if cell.get("outputs")]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("So `{python} 1`.", "inline code; a notebook cannot run it"),
        ("```{python}\n#| include: false\n1\n```", "include: false; a notebook shows every cell"),
    ],
)
def test_a_page_that_is_no_notebook_is_refused(tmp_path, body, said):
    page = tmp_path / "page.qmd"
    page.write_text(f"---\ntitle: x\n---\n\n{body}\n")
    with pytest.raises(InputError, match=said):
        source_notebook(page)


def test_a_committed_notebook_runs_from_top_to_bottom(rendered, tmp_path, monkeypatch):
    """In a kernel that finds nothing but its own file and the results."""
    from nbclient import NotebookClient

    monkeypatch.setenv("MOE_ROUTING_RESULTS", str(rendered.parent))
    committed = nbformat.read(SOURCE / "notebooks" / "comparison.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(committed, timeout=300, kernel_name="python3", resources=resources).execute()
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    kinds = [set(out.get("data", {})) for cell in code for out in cell.outputs]
    assert sum("image/png" in kind for kind in kinds) == 5
    assert "text/html" not in set().union(*kinds)


def test_front_matter_is_that_of_the_citation():
    front, _ = read_page(SOURCE / "index.qmd")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert [front["author"]] == [author["name"] for author in citation["authors"]]
    assert front["keywords"] == citation["keywords"]
    assert front["license"] == citation["license"]
    text = " ".join((SOURCE / "index.qmd").read_text(encoding="utf-8").split())
    cited = text[text.index("# How to cite") : text.index("# References")]
    assert front["author"] in cited
    assert f"{front['title']} {front['subtitle']}" in cited
    assert ", ".join(citation["keywords"]) in cited
    assert f"{citation['license']} licence" in cited


def test_the_preview_has_author_day_and_links_to_the_notebooks(rendered):
    html = (rendered / "index.html").read_text(encoding="utf-8")
    assert '<p class="author">The moe-routing-study authors</p>' in html
    assert f'<p class="date">{Article.load(rendered.parent).date}</p>' in html
    front, _ = read_page(SOURCE / "index.qmd")
    for link in front["other-links"]:
        assert f'<a href="{link["href"]}">{link["text"]}</a>' in html


def test_tables_can_be_downloaded_from_the_page_itself(rendered):
    html = (rendered / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'<a download="([^"]+)" href="data:text/csv;base64,([^"]+)"', html)
    tables = {name: base64.b64decode(data) for name, data in links}
    primary = rendered.parent / "statistics" / "primary.csv"
    assert tables["primary.csv"] == primary.read_bytes()
    assert len(tables) > 3
    assert max(map(len, tables.values())) <= DOWNLOADED


def test_pages_have_contents_when_narrow_figures_in_full_size_and_dark_colours(rendered):
    for page in ("index.html", *(f"notebooks/{name}.html" for name in NOTEBOOKS)):
        html = (rendered / page).read_text(encoding="utf-8")
        assert 'box.className = "contents"' in html
        assert 'view.className = "full-size"' in html
        assert "@media (prefers-color-scheme: dark)" in html
    html = yaml.safe_load((SOURCE / "_quarto.yml").read_text(encoding="utf-8"))["format"]["html"]
    assert html["theme"] == {"light": "default", "dark": ["default", "dark.scss"]}  # no web font
    for name in (html["css"], html["include-after-body"], html["theme"]["dark"][1]):
        assert (SOURCE / name).is_file()
        assert name in sources()


def test_the_set_up_of_a_notebook_is_folded(rendered):
    for name in NOTEBOOKS:
        html = (rendered / "notebooks" / f"{name}.html").read_text(encoding="utf-8")
        folded = html[html.index("<details><summary>Set up") : html.index("</details>")]
        assert "importlib" in folded
        assert "<img" not in folded


def test_figures_link_to_the_notebook_that_draws_them(rendered):
    html = (rendered / "index.html").read_text(encoding="utf-8")
    for label, name in DRAWN_BY.items():
        drawn = Path(ARTICLE_FIGURES[label].path).stem
        assert f"{drawn}(" in (SOURCE / "notebooks" / f"{name}.qmd").read_text(encoding="utf-8")
        if f'id="{label}"' in html:
            figure = html[html.index(f'id="{label}"') :]
            assert f'href="notebooks/{name}.html"' in figure[: figure.index("</figure>")]


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PROBE = """<script>
onload = () => parent.postMessage([innerWidth, document.documentElement.scrollWidth], "*");
</script>
"""
FRAMES = """<script>
const said = [];
onmessage = (event) => { said.push(event.data); document.title = JSON.stringify(said); };
</script>
"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
@pytest.mark.parametrize("page", ["index.html", *(f"notebooks/{name}.html" for name in NOTEBOOKS)])
def test_no_page_scrolls_sideways(rendered, tmp_path, page):
    html = (rendered / page).read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>")
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    widths = (1280, 768, 390)
    frames = "".join(f'<iframe src="page.html" width="{width}"></iframe>' for width in widths)
    (tmp_path / "frames.html").write_text(f"<!doctype html>{FRAMES}{frames}", encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", str(tmp_path / "frames.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = json.loads(re.findall(r"<title>(.*?)</title>", done.stdout)[0])
    assert {inner for inner, _ in said} == set(widths)
    assert [(inner, needed) for inner, needed in said if needed > inner] == []


PDF = """#!/bin/sh
[ "$1 $3 $4 $5 $6 $7" = "render --profile pdf --to typst --no-execute" ] || exit 1
[ -f "$2" ] && [ -f _quarto-pdf.yml ] && mkdir _rendered && echo %PDF > _rendered/index.pdf
"""


def test_a_pdf_by_quarto_is_that_of_its_profile(tmp_path, copy):
    stubbed(copy, article=True)
    (tmp_path / "results").mkdir()
    program = tmp_path / "quarto"
    program.write_text(PDF)
    program.chmod(0o755)
    made = render_pdf(copy, tmp_path / "results", quarto=str(program))
    assert made == tmp_path / "results" / "report" / "index.pdf"
    assert made.read_text() == "%PDF\n"
    profile = yaml.safe_load((SOURCE / "_quarto-pdf.yml").read_text(encoding="utf-8"))
    assert list(profile["format"]) == ["typst"]
    assert (SOURCE / profile["format"]["typst"]["include-in-header"]).is_file()


ARTICLE = """---
title: x
---

See @fig-a, @tbl-a and [@holm1979].

![A figure]({image}){{#fig-a fig-alt="x" width=100%}}

| `absolute_k8_b3_consequence_compensated` | b |
|:---------|--:|
{rows}

: A table {{#tbl-a}}

::: {{#refs}}
:::
"""


def test_a_pdf_by_typst_breaks_long_tables_across_pages(tmp_path, copy, planted):
    pytest.importorskip("typst")
    shutil.copy(planted.folder / COMPARISON / "forest.png", copy / "forest.png")
    rows = "\n".join(f"| row{number} | 1 |" for number in range(200))
    text = ARTICLE.format(image="forest.png", rows=rows)
    (copy / "index.qmd").write_text(text, encoding="utf-8")
    (tmp_path / "results").mkdir()
    made = render_pdf(copy, tmp_path / "results").read_bytes()
    assert made.startswith(b"%PDF")
    assert len(re.findall(rb"/Type */Page\b", made)) > 3


def test_a_pdf_without_quarto_and_typst_says_what_to_install(tmp_path, copy, monkeypatch):
    stubbed(copy, article=True)
    (tmp_path / "results").mkdir()
    monkeypatch.setitem(sys.modules, "typst", None)
    with pytest.raises(InputError, match="a PDF needs Quarto, or: pip install typst"):
        render_pdf(copy, tmp_path / "results")


def test_output_folder_is_that_of_quarto():
    assert (
        yaml.safe_load((SOURCE / "_quarto.yml").read_text())["project"]["output-dir"] == OUTPUT_DIR
    )


def test_a_study_is_found_from_the_folder_of_a_page(tmp_path, monkeypatch):
    for study in ("default", "other"):
        (tmp_path / "results" / study).mkdir(parents=True)
        (tmp_path / "results" / study / "config.yaml").touch()
    pages = tmp_path / "report" / "notebooks"
    pages.mkdir(parents=True)
    monkeypatch.chdir(pages)
    monkeypatch.delenv("MOE_ROUTING_RESULTS", raising=False)
    assert results_folder() == tmp_path / "results" / "default"
    monkeypatch.setenv("MOE_ROUTING_RESULTS", "results/other")
    assert results_folder() == tmp_path / "results" / "other"
    monkeypatch.setenv("MOE_ROUTING_RESULTS", str(tmp_path / "results" / "other"))
    assert results_folder() == tmp_path / "results" / "other"
    monkeypatch.setenv("MOE_ROUTING_RESULTS", "results/gone")
    with pytest.raises(InputError, match=r"=results/gone: no config\.yaml in"):
        results_folder()


@pytest.mark.parametrize(("version", "taken"), [("2.17.1.1", False), ("3.9", True)])
def test_an_old_pandoc_on_the_path_is_passed_over(tmp_path, monkeypatch, version, taken):
    program = tmp_path / "pandoc"
    program.write_text(f"#!{sys.executable}\nprint('pandoc {version}')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert (find_pandoc() == str(program)) is taken


def test_folders_that_are_not_there(planted, tmp_path):
    with pytest.raises(InputError, match="no such results folder"):
        render(SOURCE, tmp_path / "none")
    with pytest.raises(InputError, match="no such folder; run this in the repository"):
        render(tmp_path / "none", planted.folder)
