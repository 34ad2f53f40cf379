"""What `quarto render FOLDER` does, as far as this repository's pages ask for it.

Pages are written by pandoc; the cells of a .qmd page are run, those of a notebook are not. As
Quarto does, it adds require.js and jQuery from another host to a page with any output that is HTML
or JavaScript, whichever form of it is shown: ``haveOutputType`` and
``includesForJupyterWidgetDependencies`` in quarto-dev/quarto-cli, src/core/jupyter/widgets.ts.
Cross-references and citations stay as they are written.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import yaml

from moe_routing.reporting.qmd import Page, markdown_of, run_page
from moe_routing.reporting.render import find_pandoc

GENERATOR = '<meta name="generator" content="quarto stand-in">'
WIDGETS = "".join(
    f'<script src="https://cdnjs.cloudflare.com/ajax/libs/{path}"></script>'
    for path in ("require.js/2.3.6/require.min.js", "jquery/3.5.1/jquery.min.js")
)


def has_widgets(page: Page) -> bool:
    """Say whether Quarto would take an output for a widget that needs require.js and jQuery."""
    cells = [cell for cell in page.notebook.cells if cell.cell_type == "code"]
    shown = [out for cell in cells for out in cell.outputs if "data" in out]
    return any({"text/html", "application/javascript"} & set(output.data) for output in shown)


def write(page: Page, path: Path) -> None:
    """Write a page as HTML or docx, by the suffix of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [find_pandoc(), "--from=markdown", "--standalone", "--embed-resources", "--mathml"]
    command += [f"--metadata=title:{page.front['title']}", f"--output={path}"]
    subprocess.run(command, cwd=page.path.parent, input=page.markdown, text=True, check=True)
    if path.suffix == ".html":
        head = GENERATOR + WIDGETS * has_widgets(page)
        path.write_text(path.read_text("utf-8").replace("</head>", f"{head}</head>"), "utf-8")


def read(source: Path, *, echo: bool) -> Page:
    """Run a .qmd page, or read a notebook, whose front matter is its first cell."""
    if source.suffix == ".qmd":
        return run_page(source, echo=echo)
    notebook = nbformat.read(source, as_version=4)
    front = yaml.safe_load(notebook.cells.pop(0).source.strip("-"))
    echo = front.get("execute", {}).get("echo", echo)
    return Page(source, front, notebook, markdown_of(notebook, echo=echo))


def main(folder: Path) -> None:
    """Render every page of the project."""
    project = yaml.safe_load((folder / "_quarto.yml").read_text(encoding="utf-8"))
    for pattern in project["project"]["render"]:
        for source in sorted(folder.glob(pattern)):
            page = read(source, echo=project["execute"]["echo"])
            made = folder / project["project"]["output-dir"] / source.relative_to(folder)
            formats = page.front.get("format", project["format"])
            for suffix in {"html", "docx"} & set(formats):
                write(page, made.with_suffix(f".{suffix}"))


if __name__ == "__main__":
    if sys.argv[1] == "--version":
        sys.exit(print("1.11.0"))
    if sys.argv[1] != "render":
        sys.exit(f"ERROR: unknown command {sys.argv[1]}")
    main(Path(sys.argv[2]))
