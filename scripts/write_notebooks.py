"""Write report/notebooks/*.ipynb from the pages of the same names, without outputs.

By hand: python scripts/write_notebooks.py
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, write the notebooks."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--source", type=Path, default=Path("report"), help="folder of the pages")
    source = parser.parse_args().source

    from moe_routing.reporting.render import write_source_notebooks

    clock.started()
    for path in write_source_notebooks(source):
        print(path)


if __name__ == "__main__":
    run(main)
