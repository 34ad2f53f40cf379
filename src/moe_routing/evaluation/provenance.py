"""Where a number comes from: versions, commit, seed."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "pandas", "safetensors")


def environment(seed: int) -> dict[str, object]:
    """Return package versions, the commit of the checkout and the seed."""
    return {
        "seed": seed,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit(),
    }


def commit() -> str:
    """Return the commit of the checkout this package runs from, or 'unknown' outside one."""
    result = subprocess.run(
        ["git", "rev-parse", "HEAD"],  # noqa: S607 (the user's git)
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() if result.returncode == 0 else "unknown"
