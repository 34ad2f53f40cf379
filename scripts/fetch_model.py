"""Download the model into the Hub's cache if needed, check it and the study, write model.json.

By hand: python scripts/fetch_model.py --results results/default
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, download, check, write."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    results = parser.parse_args().results

    from moe_routing.config.study import config_file, load_config
    from moe_routing.evaluation.study_model import write_model

    clock.started()
    write_model(load_config(results / "config.yaml"), results, config_file(results))


if __name__ == "__main__":
    run(main)
