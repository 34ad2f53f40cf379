"""Write replications.csv: what a study has in common with its replications on other models.

By hand: python scripts/replications.py --results results/default
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run
from moe_routing.usage import JobClock


def main(clock: JobClock) -> None:
    """Parse arguments, write the table."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    results = parser.parse_args().results

    from moe_routing.reporting.replications import write_replications
    from moe_routing.reporting.results import StudyResults

    clock.started()
    print(write_replications(StudyResults.load(results)).to_string(index=False))


if __name__ == "__main__":
    run(main)
