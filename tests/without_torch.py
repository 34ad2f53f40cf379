"""An environment without torch and transformers: importing them fails in every process."""

from __future__ import annotations

import os
from pathlib import Path

SITE = '''
import sys


class Absent:
    """Finds nothing of two packages, as on a machine that lacks them."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


sys.meta_path.insert(0, Absent)
'''


def without_torch(folder: Path, *paths: Path) -> dict[str, str]:
    """Return environment variables for processes without either package.

    Args:
        folder: an empty folder, for the module that Python imports as it starts.
        paths: what else goes onto the ``PYTHONPATH``, first to last.
    """
    (folder / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    search = [str(folder), *map(str, paths), *filter(None, own)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(search), "HF_HUB_OFFLINE": "1"}
