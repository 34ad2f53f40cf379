"""Fetch the model into the hub's cache if need be, check its files, write model.json.

By hand: python scripts/fetch_model.py --results results/default
"""

import argparse
import json
from pathlib import Path

from moe_routing.cli import run
from moe_routing.usage import started


def main() -> None:
    """Parse arguments, fetch, check, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the study")
    results = parser.parse_args().results

    from moe_routing.config import load_config
    from moe_routing.files import atomic_path
    from moe_routing.models.loading import describe_checkpoint

    started()
    description = describe_checkpoint(load_config(results / "config.yaml").model)
    with atomic_path(results / "model.json") as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
