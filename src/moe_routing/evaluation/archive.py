"""A finished study as one file, without what only making it needs."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

from moe_routing.evaluation.store import FOLDER as STORE
from moe_routing.files import atomic_path

ARCHIVED = "archived.txt"
"""In the results folder of an unpacked archive: nothing before the tables can be made again."""
_LEFT_OUT = ("logs", "benchmarks", STORE, "data/raw")
_SUFFIXES_LEFT_OUT = (".safetensors", ".partial")
_KEPT = ("baseline/router_logits.safetensors",)  # a notebook reads it
_NOTE = """This study was unpacked from an archive. Without this file, the workflow asks for the
model, the data and the calibration as well, and makes them again.
"""


def write_archive(results: Path, out: Path) -> None:
    """Pack the results of a study, with what statistics, figures and the article are made from.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_path(out) as temporary, tarfile.open(temporary, "w:gz") as archive:
        for path in sorted(results.rglob("*")):
            name = path.relative_to(results)
            if path.is_file() and not _is_left_out(name):
                archive.add(path, Path(results.name) / name)
        note = _NOTE.encode()
        entry = tarfile.TarInfo(f"{results.name}/{ARCHIVED}")
        entry.size = len(note)
        archive.addfile(entry, BytesIO(note))


def _is_left_out(name: Path) -> bool:
    text = name.as_posix()
    folders = any(text.startswith(f"{folder}/") for folder in _LEFT_OUT)
    return text not in _KEPT and (folders or name.suffix in _SUFFIXES_LEFT_OUT)
