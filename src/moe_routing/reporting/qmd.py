"""Read and run a Quarto page without Quarto: front matter, cells, inline code.

Quarto's rules are followed as far as this repository's pages use them: ``#|`` options (include,
echo, output, code-fold), inline code as ``{python} expression`` between backticks, Markdown output
verbatim.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from moe_routing.errors import InputError
from moe_routing.reporting.pages import FIGURES

if TYPE_CHECKING:
    from jupyter_client.client import KernelClient
    from nbclient import NotebookClient
    from nbformat import NotebookNode

INLINE = re.compile(r"(?<!`)`\{python\}[ \t]([^`]+)`")
"""Inline code: Quarto's pattern."""

CELL_SECONDS = 600
"""Time limit of a cell."""

_OPTION = re.compile(r"^#\|\s?(.*)$")


@dataclass(frozen=True)
class Page:
    """A page after its cells were run.

    Attributes:
        path: the source.
        front: its front matter.
        notebook: cells with outputs; inline code is replaced by its values.
        markdown: input for pandoc.
    """

    path: Path
    front: dict[str, Any]
    notebook: NotebookNode
    markdown: str


def read_page(path: Path) -> tuple[dict[str, Any], NotebookNode]:
    """Return front matter and notebook of a .qmd file.

    Raises:
        InputError: the file is missing, or its front matter is not YAML.
    """
    import jupytext

    if not path.is_file():
        raise InputError(f"{path}: no such page")
    front, body = _split_front(path)
    notebook = jupytext.reads(body, fmt="Rmd")
    notebook.metadata["kernelspec"] = {
        "name": "python3", "display_name": "Python 3", "language": "python",
    }  # fmt: skip
    notebook.metadata.pop("jupytext", None)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # equal sources give equal files
        cell.metadata = {}
    return front, notebook


def titled(front: dict[str, Any], notebook: NotebookNode) -> NotebookNode:
    """Put the title of a page into its notebook, as the first cell, and return the notebook."""
    import nbformat

    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(f"# {front['title']}", id="title"))
    return notebook


def source_notebook(path: Path) -> str:
    """Return the notebook of a page as the text of an .ipynb file, without outputs.

    Raises:
        InputError: see :func:`read_page`; or a Markdown cell has inline code, which a notebook
            cannot run, or a code cell is hidden.
    """
    import nbformat

    front, notebook = read_page(path)
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and INLINE.search(cell.source):
            raise InputError(f"{path}: inline code; a notebook cannot run it")
        if cell.cell_type == "code" and cell_options(cell.source).get("include") is False:
            raise InputError(f"{path}: include: false; a notebook shows every cell")
    return nbformat.writes(titled(front, notebook)) + "\n"


def _split_front(path: Path) -> tuple[dict[str, Any], str]:
    text = path.read_text(encoding="utf-8")
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if not match:
        return {}, text
    try:
        return yaml.safe_load(match[1]) or {}, text[match.end() :]
    except yaml.YAMLError as error:
        raise InputError(f"{path}: front matter: {' '.join(str(error).split())}") from error


def run_page(path: Path, *, echo: bool) -> Page:
    """Run the cells of a page in its folder and return the result; see :func:`run_pages`."""
    return run_pages([(path, echo)])[0]


def run_pages(pages: Sequence[tuple[Path, bool]]) -> list[Page]:
    """Run the cells of each page in its folder and return the results.

    One kernel runs all pages, so that each package is imported once. Before each page it forgets
    all names: a page cannot use what another one defined.

    Args:
        pages: .qmd files, and whether code is shown by default.

    Raises:
        InputError: a cell or inline code fails.
    """
    from nbclient import NotebookClient

    read = [(path, echo, *read_page(path)) for path, echo in pages]
    first, notebook = read[0][0], read[0][3]
    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", coalesce_streams=True,
        extra_arguments=["--log-level=40"],  # errors only
        resources={"metadata": {"path": str(first.resolve().parent)}},
    )  # fmt: skip
    done, path = [], first
    try:
        with client.setup_kernel():
            for path, echo, front, notebook in read:
                if notebook is not client.nb:
                    _forget(client, path)
                    client.nb = notebook
                    client.reset_execution_trackers()
                for number, cell in enumerate(notebook.cells):
                    _run_cell(client, cell, number, path)
                shown = front.get("execute", {}).get("echo", echo)
                markdown = markdown_of(notebook, echo=shown, folder=path.parent)
                done.append(Page(path, front, notebook, markdown))
    except RuntimeError as error:
        raise InputError(
            f"{path}: its Python kernel does not answer; it needs ipykernel"
        ) from error
    return done


def _forget(client: NotebookClient, path: Path) -> None:
    """Make the kernel forget all names, close all figures, and work in the folder of a page."""
    folder = str(path.resolve().parent)
    code = (
        "import sys; 'matplotlib.pyplot' in sys.modules and "
        "sys.modules['matplotlib.pyplot'].close('all')\n"
        f"import os; os.chdir({folder!r})\n"
        "get_ipython().reset(new_session=True)"
    )
    kernel = cast("KernelClient", client.kc)
    client.wait_for_reply(kernel.execute(code, silent=True))


def _run_cell(client: NotebookClient, cell: NotebookNode, number: int, path: Path) -> None:
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    if cell.cell_type == "markdown":
        cell.source = _fill_inline(client, cell.source, path)
        return
    try:
        client.execute_cell(cell, number)
    except CellExecutionError as error:
        raise InputError(f"{path}: cell {number}: {error.ename}: {error.evalue}") from error
    except CellTimeoutError as error:
        raise InputError(f"{path}: cell {number}: did not finish within the time limit") from error
    except DeadKernelError as error:
        raise InputError(
            f"{path}: cell {number}: its Python process died, for example from lack of memory"
        ) from error


def _fill_inline(client: NotebookClient, source: str, path: Path) -> str:
    """Replace inline code by its value, as Markdown if the value has that form."""
    expressions = {str(n): code for n, code in enumerate(INLINE.findall(source))}
    if not expressions:
        return source
    kernel = cast("KernelClient", client.kc)  # run_pages has started it
    message = kernel.execute("", user_expressions=expressions)
    reply = cast("dict[str, Any]", client.wait_for_reply(message))  # a timeout raises
    results = reply["content"]["user_expressions"]
    for key, code in expressions.items():
        result = results[key]
        if result["status"] != "ok":
            raise InputError(f"{path}: inline '{code}': {result['ename']}: {result['evalue']}")
    values = iter(_inline_value(results[key]["data"]) for key in expressions)
    return INLINE.sub(lambda _: next(values), source)


def _inline_value(data: dict[str, str]) -> str:
    if "text/markdown" in data:
        return data["text/markdown"]
    plain = data.get("text/plain", "")
    return plain[1:-1] if plain[:1] in "'\"" else plain


def cell_options(source: str) -> dict[str, Any]:
    """Return the ``#|`` options at the top of a cell."""
    lines = []
    for line in source.splitlines():
        match = _OPTION.match(line)
        if not match:
            break
        lines.append(match[1])
    return yaml.safe_load("\n".join(lines)) or {}


def code_of(source: str) -> str:
    """Return a cell's code without its options."""
    lines = source.splitlines()
    while lines and _OPTION.match(lines[0]):
        lines.pop(0)
    return "\n".join(lines).strip()


def markdown_of(notebook: NotebookNode, *, echo: bool, folder: Path | None = None) -> str:
    """Return the Markdown of a notebook that was run: text, code and outputs.

    Args:
        notebook: its cells.
        echo: whether code is shown by default.
        folder: of the page, to write images under; None puts them into the text, which takes
            pandoc seconds to read.
    """
    parts = [_cell_markdown(cell, echo, folder) for cell in notebook.cells]
    return "\n\n".join(part for part in parts if part)


def _cell_markdown(cell: NotebookNode, echo: bool, folder: Path | None) -> str:
    if cell.cell_type == "markdown":
        return cell.source
    options = cell_options(cell.source)
    if options.get("include") is False:
        return ""
    parts = []
    if options.get("echo", echo):
        parts.append(_code(cell.source, options))
    if options.get("output", True) is not False:
        parts += [_output(output, options, folder) for output in cell.outputs]
    return "\n\n".join(part for part in parts if part)


def _code(source: str, options: dict[str, Any]) -> str:
    """Return a cell's code, in a folded block if its options say so."""
    code = f"```python\n{code_of(source)}\n```"
    if not options.get("code-fold"):
        return code
    opened = f"<details><summary>{options.get('code-summary', 'Code')}</summary>"
    return "\n\n".join([_html(opened), code, _html("</details>")])


def _html(text: str) -> str:
    return f"```{{=html}}\n{text}\n```"


def _output(output: NotebookNode, options: dict[str, Any], folder: Path | None) -> str:
    if output.output_type == "stream":
        text = output.text if output.name == "stdout" else ""
        return text if options.get("output") == "asis" else _block(text)
    data = output.get("data", {})
    if "text/markdown" in data:
        return data["text/markdown"]
    if "image/png" in data:
        return _image(data["image/png"], options, folder)
    return _block(data.get("text/plain", ""))


def _image(encoded: str, options: dict[str, Any], folder: Path | None) -> str:
    alt = str(options.get("fig-alt", "")).replace('"', "'")
    address = f"data:image/png;base64,{''.join(encoded.split())}"
    if folder:
        data = base64.b64decode(encoded)
        address = f"{FIGURES}/{hashlib.sha256(data).hexdigest()}.png"
        (folder / FIGURES).mkdir(exist_ok=True)
        (folder / address).write_bytes(data)
    return f'![]({address}){{fig-alt="{alt}"}}'


def _block(text: str) -> str:
    return f"```\n{text.rstrip()}\n```" if text.strip() else ""
