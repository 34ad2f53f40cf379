"""Generate config/README.md and workflow/schemas/ from the config models.

By hand: python scripts/config_reference.py
"""

import argparse
from pathlib import Path

from moe_routing.cli import first_line, run


def main() -> None:
    """Parse arguments and write the reference."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument(
        "--root", type=Path, default=Path(), help="repository (default: current folder)"
    )
    root = parser.parse_args().root

    from moe_pretraining.settings import PretrainConfig
    from moe_routing.config.reference import reference_files
    from moe_routing.files import atomic_path

    for name, text in reference_files(PretrainConfig).items():
        with atomic_path(root / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(lambda _: main())
