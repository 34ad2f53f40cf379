r"""Make the items of an evaluation set, or calibration text disjoint from all sets.

By hand, after fetch_data.py and with the evaluation sets before calibration:

    python scripts/prepare_data.py --config config/config.yaml --dataset hellaswag \
        --raw results/default/data/raw --out results/default/data/hellaswag.parquet
    python scripts/prepare_data.py --config config/config.yaml --dataset calibration \
        --raw results/default/data/raw --out results/default/data/calibration.parquet

Whether a set and existing calibration text are disjoint:

    python scripts/prepare_data.py --config config/config.yaml --dataset hellaswag --check-overlap \
        --raw results/default/data/raw --out results/default/data/overlap/hellaswag.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_routing.cli import run
from moe_routing.config.study import load_config
from moe_routing.data.prepare import (
    check_overlap,
    prepare_calibration,
    prepare_dataset,
)
from moe_routing.data.sources import CALIBRATION, source_of
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments and prepare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="study config (YAML)")
    parser.add_argument("--dataset", required=True, help="evaluation set, or 'calibration'")
    parser.add_argument("--raw", type=Path, required=True, help="folder of downloaded files")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="Parquet file to write; calibration reads the prepared sets beside it and writes a "
        ".json manifest too",
    )
    parser.add_argument(
        "--check-overlap",
        action="store_true",
        help="only check the set against the calibration text in the folder above --out",
    )
    arguments = parser.parse_args()
    clock.started()
    config = load_config(arguments.config)
    source_of(config, arguments.dataset)
    if arguments.check_overlap:
        prepared = arguments.out.parents[1]
        check_overlap(config, arguments.dataset, arguments.raw, prepared, arguments.out)
    elif arguments.dataset == CALIBRATION:
        prepare_calibration(config, arguments.raw, arguments.out.parent, arguments.out)
    else:
        prepare_dataset(config, arguments.dataset, arguments.raw, arguments.out)


if __name__ == "__main__":
    run(main)
