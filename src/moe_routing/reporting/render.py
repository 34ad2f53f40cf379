"""Render the report: by Quarto if it is installed, else as a preview from the same sources.

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
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import yaml

from moe_routing.config.study import config_file
from moe_routing.errors import InputError
from moe_routing.files import atomic_path
from moe_routing.reporting.article import VARIABLE
from moe_routing.reporting.checks import check_pages, check_word
from moe_routing.reporting.crossref import resolve
from moe_routing.reporting.pages import ARTICLE, NOTEBOOKS, outputs
from moe_routing.reporting.qmd import Page, cell_options, run_page

PREVIEW_NOTE = (
    "This is a preview made without Quarto: the same text, numbers and figures in a simpler layout."
)

_FORMAT = "markdown-yaml_metadata_block"
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

# Files that Quarto leaves; and _environment, whose paths are wrong in a copy.
_NOT_COPIED = ("*_files", ".quarto", OUTPUT_DIR, "_environment")


Renderer = Callable[[Path, Path, str], Path]
"""Renders a source folder into another folder, for a config file; returns where the pages are."""


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
    with tempfile.TemporaryDirectory() as scratch, _results_named(results):
        if quarto:
            try:
                make = partial(_render_by_quarto, quarto)
                _publish(make, source, results, Path(scratch) / "quarto")
                return Rendered("quarto")
            except (InputError, OSError) as error:
                problem = str(error)
        _publish(_render_preview, source, results, Path(scratch) / "preview")
    return Rendered("preview", problem)


def _publish(make: Renderer, source: Path, results: Path, scratch: Path) -> None:
    """Make the pages, check them, and copy them into the results folder."""
    config, staged = config_file(results), scratch / "staged"
    try:
        made = make(source.resolve(), scratch / "report", config)
        _copy(made, staged)  # the check sees what is published, without other files
        check_pages(sorted(staged.rglob("*.html")))
        check_word(staged / f"{ARTICLE}.docx")
    except InputError as error:
        text = str(error)
        for folder in (staged, scratch):  # errors name the page without the temporary folder
            text = text.replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")
        raise InputError(text) from error
    _copy(staged, results / "report")


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


def _render_by_quarto(quarto: str, source: Path, copy: Path, config: str) -> Path:
    """Render a copy of the sources and return the output folder."""
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    _run([quarto, "render", copy], copy, timeout=QUARTO_SECONDS)
    made, address = copy / OUTPUT_DIR, repository_address(source.parent)
    for name in NOTEBOOKS:
        page = run_page(copy / "notebooks" / f"{name}.qmd", echo=True)
        _write_notebook(page, made / "notebooks" / f"{name}.ipynb", config, address)
    return made


# The preview.


def _render_preview(source: Path, made: Path, config: str) -> Path:
    pandoc, address = find_pandoc(), repository_address(source.parent)
    bibliography = source / "references.bib"
    (made / "notebooks").mkdir(parents=True)
    article = run_page(source / f"{ARTICLE}.qmd", echo=False)
    document = _document(article, pandoc, bibliography)
    _write(document, article, made / f"{ARTICLE}.html", pandoc, source)
    _write(document, article, made / f"{ARTICLE}.docx", pandoc, source)
    for name in NOTEBOOKS:
        page = run_page(source / "notebooks" / f"{name}.qmd", echo=True)
        document = _document(page, pandoc, bibliography)
        _write(document, page, made / "notebooks" / f"{name}.html", pandoc, source)
        _write_notebook(page, made / "notebooks" / f"{name}.ipynb", config, address)
    return made


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


def _document(page: Page, pandoc: str, bibliography: Path) -> dict:
    """Return pandoc's syntax tree of a page with its references resolved."""
    text = _run([pandoc, "-f", _FORMAT, "-t", "json"], page.path.parent, page.markdown)
    keys = set(re.findall(r"^@\w+\{([^,\s]+),", bibliography.read_text(encoding="utf-8"), re.M))
    return resolve(json.loads(text), str(page.path), keys)


def _write(document: dict, page: Page, path: Path, pandoc: str, source: Path) -> None:
    """Write a page as HTML or docx, by the suffix of ``path``."""
    options = [
        "--standalone", "--citeproc", f"--bibliography={source / 'references.bib'}",
        "--metadata=link-citations:true", f"--metadata=title:{page.front.get('title', '')}",
        f"--metadata=subtitle:{page.front.get('subtitle', '')}", "--metadata=lang:en",
        "--number-sections", "--toc", "--toc-depth=2", f"--resource-path={page.path.parent}",
        "--fail-if-warnings",
    ]  # fmt: skip
    if path.suffix == ".html":
        style = Path(__file__).with_name("preview.css")
        options += ["--to=html5", "--embed-resources", "--mathml", f"--css={style}"]
        options += [f"--css={source / 'styles.css'}", "--metadata=document-css:false"]
        note = f'<p class="preview-note">{PREVIEW_NOTE}</p>'
        options += [f"--variable=include-before:{note}"]
    else:
        options += [f"--to={path.suffix[1:]}", f"--metadata=author:{PREVIEW_NOTE}"]
    command = [pandoc, "--from=json", *options, f"--output={path}"]
    _run(command, page.path.parent, json.dumps(document))


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

    Raises:
        InputError: a Markdown cell has inline code, which a notebook cannot run, or a code cell is
            hidden.
    """
    import nbformat

    for cell in page.notebook.cells:
        if cell.cell_type == "markdown" and "`{python}" in cell.source:
            raise InputError(f"{page.path}: inline code; a notebook cannot run it")
        if cell.cell_type == "code" and cell_options(cell.source).get("include") is False:
            raise InputError(f"{page.path}: include: false; a notebook shows every cell")
    title = nbformat.v4.new_markdown_cell(f"# {page.front.get('title', page.path.stem)}")
    title["id"] = "title"
    page.notebook.cells.insert(0, title)
    for cell in page.notebook.cells:
        cell.metadata.pop("execution", None)  # times differ between equal runs
        if cell.cell_type == "code":
            cell.source = _CONFIG.sub(lambda _: f"CONFIG = {json.dumps(config)}", cell.source)
            cell.source = _REPOSITORY.sub(lambda m: m[1] + json.dumps(address), cell.source)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(page.notebook, path)
