r"""Download one data file of a study: the only step of the data stage that uses the network.

By hand:

    python scripts/fetch_data.py --config config/config.yaml --dataset hellaswag \
        --out results/default/data/raw/hellaswag.arrow
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_routing.cli import run
from moe_routing.config.study import load_config
from moe_routing.data.sources import fetch, raw_path, source_of
from moe_routing.errors import InputError
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments and download."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="study config (YAML)")
    parser.add_argument("--dataset", required=True, help="evaluation set, or 'calibration'")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("results/.wheels"),
        help="folder that keeps wheels between calls (default: %(default)s)",
    )
    arguments = parser.parse_args()
    clock.started()
    source = source_of(load_config(arguments.config), arguments.dataset)
    expected = raw_path(arguments.out.parent, arguments.dataset, source).name
    if arguments.out.name != expected:
        raise InputError(f"--out is {arguments.out.name}; allowed for this source: {expected}")
    fetch(source, arguments.out, arguments.cache)


if __name__ == "__main__":
    run(main)
