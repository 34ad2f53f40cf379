"""Render the article and its notebooks from the results of a study into results/<study>/report.

Uses Quarto if it is on the PATH. Without Quarto, or if its pages cannot be used, writes a preview
from the same sources.
By hand: python scripts/render_report.py --results results/default
"""

import argparse
import shutil
import sys
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, render, print which renderer was used."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    parser.add_argument("--source", type=Path, default=Path("report"), help="folder of the pages")
    parser.add_argument("--preview", action="store_true", help="write a preview without Quarto")
    parser.add_argument("--pdf", action="store_true", help="write the article as a PDF only")
    arguments = parser.parse_args()

    from moe_routing.reporting.render import render, render_pdf

    clock.started()
    quarto = None if arguments.preview else shutil.which("quarto")
    if arguments.pdf:
        print(render_pdf(arguments.source, arguments.results, quarto=quarto))
        return
    rendered = render(arguments.source, arguments.results, quarto=quarto)
    if rendered.problem:
        print(
            f"warning: the report is a preview. Quarto's pages cannot be used: {rendered.problem}. "
            "To get them, fix this, then run "
            f"python scripts/render_report.py --results {arguments.results}",
            file=sys.stderr,
        )
    missing = "" if quarto or arguments.preview else ": there is no Quarto on the PATH"
    print(f"{arguments.results / 'report' / 'index.html'} ({rendered.by}{missing})")


if __name__ == "__main__":
    run(main)
