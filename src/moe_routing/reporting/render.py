"""Render the report: by Quarto if it is installed, else as a preview from the same sources.

The cells of each page run once, in a copy of the sources; every format is made from their outputs.
The pages are checked before they replace those in the results folder. If Quarto fails, or its pages
do not pass the checks, the preview is made instead.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import yaml

from moe_routing.config.study import config_file
from moe_routing.errors import InputError
from moe_routing.files import atomic_path
from moe_routing.reporting.checks import check_pages, check_word
from moe_routing.reporting.crossref import resolve
from moe_routing.reporting.pages import (
    ARTICLE,
    FIGURES,
    NOTEBOOKS,
    VARIABLE,
    collected,
    outputs,
)
from moe_routing.reporting.qmd import Page, run_pages, source_notebook, titled
from moe_routing.reporting.word import finish_word

PREVIEW_NOTE = (
    "This is a preview made without Quarto: the same text, numbers and figures in a simpler layout."
)

_FORMAT = "markdown-yaml_metadata_block"
_WRITERS = {".docx": "docx", ".typ": "typst"}
OUTPUT_DIR = "_rendered"
"""The output folder that _quarto.yml names."""

QUARTO_SECONDS = 900
"""Time limit of Quarto for all pages."""

PANDOC = 3
"""Oldest supported major version; cross-references need figures as blocks."""

_CONFIG = re.compile(r"^CONFIG = .*$", re.MULTILINE)
"""The line of a notebook's first cell that names the study."""

_REPOSITORY = re.compile(r'^(REPOSITORY = .*? or )""', re.MULTILINE)
"""The line of a notebook's first cell that names the repository to clone."""

_KERNEL = {
    "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
    "display_name": "Python 3",
    "language": "python",
}
"""Jupyter's kernel ``python3``: this Python."""

# What rendering leaves; notebooks, which Quarto would take for pages; and _environment, whose paths
# are wrong in a copy.
_NOT_COPIED = ("*_files", ".quarto", OUTPUT_DIR, FIGURES, "*.ipynb", "_environment")


class Executed(NamedTuple):
    """The pages after their cells were run.

    Attributes:
        folder: the copy of the sources that they were run in.
        article: the article.
        notebooks: the notebooks by name.
    """

    folder: Path
    article: Page
    notebooks: dict[str, Page]


Renderer = Callable[[Executed], Path]
"""Makes HTML and docx of executed pages and returns the folder they are in."""


class Rendered(NamedTuple):
    """How a report was rendered.

    Attributes:
        by: ``quarto`` or ``preview``.
        problem: why Quarto's pages were not used, if Quarto was given.
    """

    by: str
    problem: str = ""


def render(source: Path, results: Path, *, quarto: str | None = None) -> Rendered:
    """Render ``source`` (the folder report/) from ``results`` into ``results``/report.

    Args:
        source: folder with _quarto.yml and the pages.
        results: folder of the study.
        quarto: path of Quarto; None makes the preview.

    Raises:
        InputError: a cell fails, a reference, citation or image leads nowhere, a page would call
            another host, or a tool is missing. If only Quarto fails, the preview is made.
    """
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; run this in the repository")
    problem = ""
    address = repository_address(source.resolve().parent)
    with tempfile.TemporaryDirectory() as name, _results_named(results), _sources_named(name):
        pages = _execute(source, Path(name) / "report", results)
        if quarto:
            try:
                _publish(partial(_quarto_pages, quarto), pages, results, address)
                return Rendered("quarto")
            except (InputError, OSError) as error:
                problem = _shortened(str(error), Path(name))
        _publish(_preview_pages, pages, results, address)
    return Rendered("preview", problem)


def render_pdf(source: Path, results: Path, *, quarto: str | None = None) -> Path:
    """Render the article as ``results``/report/index.pdf by Typst and return it.

    Args:
        source: folder with _quarto.yml and the pages.
        results: folder of the study.
        quarto: path of Quarto, which brings Typst; None takes pandoc and the package ``typst``.

    Raises:
        InputError: a cell fails, a reference or citation leads nowhere, or a tool is missing.
    """
    with tempfile.TemporaryDirectory() as name, _results_named(results), _sources_named(name):
        folder = Path(name) / "report"
        page = _execute(source, folder, results, notebooks=()).article
        made = _quarto_pdf(quarto, page) if quarto else _preview_pdf(page)
        with atomic_path(results / "report" / f"{ARTICLE}.pdf") as temporary:
            shutil.copyfile(made, temporary)
    return results / "report" / f"{ARTICLE}.pdf"


def _execute(
    source: Path, folder: Path, results: Path, notebooks: Sequence[str] = NOTEBOOKS
) -> Executed:
    """Copy the sources into a folder and run the article and notebooks there, each once."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    pages = [(folder / f"{ARTICLE}.qmd", False)]
    pages += [(folder / "notebooks" / f"{name}.qmd", True) for name in notebooks]
    article, *others = run_pages(pages)
    if "date" in article.front:
        article.front["date"] = collected(results)
    return Executed(folder, article, dict(zip(notebooks, others, strict=True)))


def _publish(make: Renderer, pages: Executed, results: Path, address: str) -> None:
    """Make all files of the report, check them, and copy them into the results folder."""
    made, staged = make(pages), pages.folder.parent / "staged"
    for name, page in pages.notebooks.items():
        path = made / "notebooks" / f"{name}.ipynb"
        _write_notebook(page, path, config_file(results), address)
    finish_word(made / f"{ARTICLE}.docx")
    _copy(made, staged)  # the check sees what is published, without other files
    check_pages(sorted(staged.rglob("*.html")))
    check_word(staged / f"{ARTICLE}.docx")
    _copy(staged, results / "report")


@contextmanager
def _sources_named(scratch: str) -> Iterator[None]:
    """Make errors name a page without the temporary folder."""
    try:
        yield
    except InputError as error:
        raise InputError(_shortened(str(error), Path(scratch))) from error


def _shortened(text: str, scratch: Path) -> str:
    for folder in (scratch.resolve(), scratch):
        text = re.sub(f"{re.escape(str(folder))}/(?:staged|report/{OUTPUT_DIR}|report)/", "", text)
    return text


@contextmanager
def _results_named(results: Path) -> Iterator[None]:
    """Set the environment in which the cells find the results and this package.

    They run in this Python, whatever kernels, start-up files and backends the user has.
    """
    if not results.is_dir():
        raise InputError(f"{results}: no such results folder")
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    with tempfile.TemporaryDirectory() as jupyter:
        kernel = Path(jupyter) / "kernels" / "python3" / "kernel.json"
        kernel.parent.mkdir(parents=True)
        kernel.write_text(json.dumps(_KERNEL), encoding="utf-8")
        values: dict[str, str | None] = {
            VARIABLE: str(results.resolve()),
            "PYTHONPATH": os.pathsep.join(paths),
            "QUARTO_PYTHON": sys.executable,
            "NO_COLOR": "1",  # for the messages of Quarto
            "JUPYTER_PATH": jupyter,
            "IPYTHONDIR": jupyter,
            "PYTHONSTARTUP": None,
            "MPLBACKEND": None,
        }
        before = {name: os.environ.get(name) for name in values}
        _set_environment(values)
        try:
            yield
        finally:
            _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    """Set environment variables; None removes one."""
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _copy(made: Path, folder: Path) -> None:
    """Copy every expected file, each atomically."""
    for name in outputs():
        if not (made / name).is_file():
            raise InputError(f"{name}: was not rendered")
    for name in outputs():
        with atomic_path(folder / name) as temporary:
            shutil.copyfile(made / name, temporary)


def _run(
    command: Sequence[str | Path],
    folder: Path,
    stdin: str | None = None,
    timeout: float | None = None,
) -> str:
    """Run a program and return its output; the relevant line of its log becomes the error.

    A program that is interrupted or exceeds the time limit is killed with all its children.
    """
    name = Path(command[0]).name
    try:
        program = subprocess.Popen(  # noqa: S603 (our own arguments)
            [str(part) for part in command], cwd=folder, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"{name} cannot be run: {error.strerror or error}") from error
    try:
        output, log = program.communicate(stdin, timeout)
    except BaseException as error:
        with suppress(OSError):
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise InputError(f"{name} did not finish within {timeout:g} seconds") from error
        raise
    if program.returncode:
        lines = [line for line in log.splitlines() if line.strip()]
        raise InputError(f"{name} failed: {_relevant_line(lines)}")
    return output


def _relevant_line(lines: list[str]) -> str:
    """Return the most relevant line of a log: an error, else a warning, else the last one."""
    for word in ("ERROR", "Error", "WARNING"):
        for line in lines:
            if word in line:
                return line.strip()
    return lines[-1].strip() if lines else "it printed no message"


# By Quarto.


def _quarto_pages(quarto: str, pages: Executed) -> Path:
    """Render the executed pages as notebooks, whose cells Quarto does not run."""
    project = yaml.safe_load((pages.folder / "_quarto.yml").read_text(encoding="utf-8"))
    project["project"]["render"] = [f"{ARTICLE}.ipynb", "notebooks/*.ipynb"]
    project["execute"]["enabled"] = False
    (pages.folder / "_quarto.yml").write_text(yaml.safe_dump(project), encoding="utf-8")
    for page in (pages.article, *pages.notebooks.values()):
        _write_executed(page)
    _run([quarto, "render", pages.folder], pages.folder, timeout=QUARTO_SECONDS)
    return pages.folder / OUTPUT_DIR


def _quarto_pdf(quarto: str, page: Page) -> Path:
    """Render the executed article with the profile of _quarto-pdf.yml."""
    _write_executed(page)
    notebook, folder = page.path.with_suffix(".ipynb"), page.path.parent
    command = [quarto, "render", notebook, "--profile", "pdf", "--to", "typst", "--no-execute"]
    _run(command, folder, timeout=QUARTO_SECONDS)
    return folder / OUTPUT_DIR / f"{ARTICLE}.pdf"


def _write_executed(page: Page) -> None:
    """Write a page with its outputs in place of its source, as Quarto reads notebooks."""
    import nbformat

    notebook = deepcopy(page.notebook)
    front = yaml.safe_dump(page.front, sort_keys=False, allow_unicode=True)
    notebook.cells.insert(0, nbformat.v4.new_raw_cell(f"---\n{front}---"))
    nbformat.write(notebook, page.path.with_suffix(".ipynb"))
    page.path.unlink()


# The preview.


def _preview_pages(pages: Executed) -> Path:
    """Render the executed pages by pandoc."""
    pandoc, made = find_pandoc(), pages.folder.parent / "preview"
    (made / "notebooks").mkdir(parents=True)
    document = _document(pages.article, pandoc, pages.folder)
    for suffix in ("html", "docx"):
        _write(document, pages.article, made / f"{ARTICLE}.{suffix}", pandoc, pages.folder)
    for name, page in pages.notebooks.items():
        path = made / "notebooks" / f"{name}.html"
        _write(_document(page, pandoc, pages.folder), page, path, pandoc, pages.folder)
    return made


def _preview_pdf(page: Page) -> Path:
    """Write the executed article as Typst by pandoc, and compile it."""
    try:
        typst = import_module("typst")
    except ImportError as error:
        raise InputError("a PDF needs Quarto, or: pip install typst") from error
    pandoc, folder = find_pandoc(), page.path.parent
    text, pdf = page.path.with_suffix(".typ"), page.path.with_suffix(".pdf")
    _write(_document(page, pandoc, folder), page, text, pandoc, folder)
    try:
        typst.compile(text, output=pdf, root=folder)
    except typst.TypstError as error:
        raise InputError(f"typst failed: {_relevant_line(str(error).splitlines())}") from error
    return pdf


def find_pandoc() -> str:
    """Return the path of pandoc: on the PATH if new enough, else from pypandoc-binary.

    Raises:
        InputError: there is none.
    """
    if (found := shutil.which("pandoc")) and _major(found) >= PANDOC:
        return found
    try:
        import pypandoc

        return pypandoc.get_pandoc_path()
    except (ImportError, OSError) as error:
        raise InputError(
            f"the preview needs pandoc {PANDOC} or later: pip install pypandoc-binary"
        ) from error


def _major(pandoc: str) -> int:
    try:
        match = re.search(r"pandoc\D* (\d+)", _run([pandoc, "--version"], Path.cwd(), timeout=60))
    except InputError:
        return 0
    return int(match[1]) if match else 0


def _document(page: Page, pandoc: str, source: Path) -> dict:
    """Return pandoc's syntax tree of a page with its references resolved."""
    bibliography = source / "references.bib"
    text = _run([pandoc, "-f", _FORMAT, "-t", "json"], page.path.parent, page.markdown)
    keys = set(re.findall(r"^@\w+\{([^,\s]+),", bibliography.read_text(encoding="utf-8"), re.M))
    return resolve(json.loads(text), str(page.path), keys)


def write_source_notebooks(source: Path) -> list[Path]:
    """Write every notebook beside its page, without outputs; return the files.

    Raises:
        InputError: see :func:`moe_routing.reporting.qmd.source_notebook`.
    """
    written = []
    for name in NOTEBOOKS:
        page = source / "notebooks" / f"{name}.qmd"
        with atomic_path(page.with_suffix(".ipynb")) as temporary:
            temporary.write_text(source_notebook(page), encoding="utf-8")
        written.append(page.with_suffix(".ipynb"))
    return written


def _write(document: dict, page: Page, path: Path, pandoc: str, source: Path) -> None:
    """Write a page as HTML, docx or Typst, by the suffix of ``path``."""
    options = [
        "--standalone", "--citeproc", f"--bibliography={source / 'references.bib'}",
        "--metadata=link-citations:true", "--metadata=lang:en", "--number-sections", "--toc",
        "--toc-depth=2", f"--resource-path={page.path.parent}", "--fail-if-warnings",
    ]  # fmt: skip
    shown = ("title", "subtitle", "author", "date")
    options += [f"--metadata={key}:{page.front[key]}" for key in shown if key in page.front]
    if path.suffix == ".html":
        style = Path(__file__).with_name("preview.css")
        options += ["--to=html5", "--embed-resources", "--mathml", f"--css={style}"]
        options += [f"--css={source / 'styles.css'}", "--metadata=document-css:false"]
        options += [f"--variable=include-before:{_head(page)}"]
        options += [f"--include-after-body={source / 'page.html'}"]
    else:
        options += [f"--to={_WRITERS[path.suffix]}"]
        if path.suffix == ".typ":
            options += ["--variable=papersize:a4", f"--include-in-header={source / 'tables.typ'}"]
        note = {"t": "Para", "c": [{"t": "Emph", "c": [{"t": "Str", "c": PREVIEW_NOTE}]}]}
        # The captions have their numbers already.
        plain = {"t": "RawBlock", "c": ["typst", "#set figure(numbering: none)"]}
        document = {**document, "blocks": [plain, note, *document["blocks"]]}
    command = [pandoc, "--from=json", *options, f"--output={path}"]
    _run(command, page.path.parent, json.dumps(document))


def _head(page: Page) -> str:
    """Return what stands above the text of a preview: a note and links to other pages."""
    links = " \u00b7 ".join(
        f'<a href="{link["href"]}">{link["text"]}</a>' for link in page.front.get("other-links", [])
    )
    return f'<p class="preview-note">{PREVIEW_NOTE}</p><p class="links">{links}</p>'


def repository_address(root: Path) -> str:
    """Return the address to clone the repository from; an empty string if there is none.

    It is ``repository-code`` of CITATION.cff, else that of the remote ``origin``, without user name
    and password. Only http(s) addresses are used: others need a key.
    """
    citation = root / "CITATION.cff"
    named = yaml.safe_load(citation.read_text("utf-8")) if citation.is_file() else None
    address = (named or {}).get("repository-code") or _origin(root)
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return ""
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _origin(root: Path) -> str:
    git = shutil.which("git")
    if not git:
        return ""
    found = subprocess.run(  # noqa: S603 (our own arguments)
        [git, "remote", "get-url", "origin"], cwd=root, capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def _write_notebook(page: Page, path: Path, config: str, address: str) -> None:
    """Write a page's notebook with outputs, its title as the first cell.

    It names the study's config and the repository, so it makes the same study when run elsewhere.
    """
    import nbformat

    notebook = titled(page.front, deepcopy(page.notebook))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times differ between equal runs
        if cell.cell_type == "code":
            cell.source = _CONFIG.sub(lambda _: f"CONFIG = {json.dumps(config)}", cell.source)
            cell.source = _REPOSITORY.sub(lambda m: m[1] + json.dumps(address), cell.source)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
