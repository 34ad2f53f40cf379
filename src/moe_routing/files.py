"""Files of a study: written whole or not at all, and checked when they are read.

When a file is written, its SHA-256 is recorded in the hidden folder ``.sha256`` beside it. Whoever
reads it compares: a file that is damaged, cut off or replaced by another one is noticed before
anything is computed from it. A file without a record, such as a user's own, is read as it is.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from moe_routing.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

RECORDS = ".sha256"
"""Folder of the records, beside the files."""
RECORDED = {".arrow", ".csv", ".gz", ".json", ".jsonl", ".parquet", ".safetensors", ".txt"}
"""Suffixes of the files that later jobs read."""
ABANDONED = 86_400.0
"""Age in seconds at which a temporary file of another machine counts as one of a killed job."""


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it on success, remove it on failure.

    Temporary files that killed writers of ``path`` left are removed first.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        yield temporary
        if path.suffix in RECORDED:
            # First the record: a file never stands beside a record of older content.
            _record(path).parent.mkdir(exist_ok=True)
            _record(path).write_text(f"{sha256_of(temporary)}\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        # Where nothing can be removed, the error above says more.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def reading(path: Path | str, what: str, origin: str | None = None) -> Iterator[Path]:
    """Yield a path to read from, after comparing the file with its record.

    Args:
        path: the file.
        what: what it should be, for errors.
        origin: what errors call the file, by default its path.

    Raises:
        InputError: the file is missing, cannot be read, is not what was written, or, while it is
            read, turns out not to be what it should be.
    """
    path = Path(path)
    origin = origin or str(path)
    try:
        _compare(path)
        yield path
    except FileNotFoundError as error:
        if error.filename is not None and Path(error.filename) != path:
            raise
        raise InputError(f"{origin}: no such file") from error
    except PermissionError as error:
        raise InputError(f"{origin}: cannot be read: {error.strerror}") from error
    except _damage() as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{origin}: not {what}: {reason:.200}") from error


def _compare(path: Path) -> None:
    """Compare a file with its record, if it has one."""
    try:
        recorded = _record(path).read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        return
    except UnicodeDecodeError:
        recorded = "damaged"
    found = sha256_of(path)
    if found != recorded:
        raise InputError(
            f"{path}: not what was written: its SHA-256 is {found:.12}..., recorded is "
            f"{recorded:.12}...; remove it and run the workflow again"
        )


def _damage() -> tuple[type[Exception], ...]:
    """Return what readers of damaged files raise, of the libraries that are loaded."""
    errors = [OSError, EOFError, LookupError, TypeError, ValueError, AttributeError]
    for module, name in (("safetensors", "SafetensorError"), ("pyarrow", "ArrowException")):
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


def _record(path: Path) -> Path:
    return path.parent / RECORDS / path.name


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _sweep(path: Path) -> None:
    """Remove the temporary files of ``path`` whose writers are gone."""
    for name in glob.glob(f".{glob.escape(path.name)}.*-*-*.partial", root_dir=path.parent):
        left = path.parent / name
        host, process, _ = name.removesuffix(".partial").rpartition(".")[2].split("-")
        with suppress(OSError):
            gone = not _is_alive(process) if host == _host() else False
            if gone or time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return True


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, damaged, not JSON, or not an object.
    """
    with reading(path, "valid JSON"):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise InputError(f"{path}: is a {type(value).__name__}; allowed: a JSON object")
    return value


def save_json(values: object, path: Path | str, indent: int = 2) -> None:
    """Write JSON values, whole or not at all.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")


def read_parquet(path: Path, *columns: str) -> pd.DataFrame:
    """Read a table.

    Args:
        path: the file.
        columns: columns that it must have.

    Raises:
        InputError: the file is missing, damaged, not Parquet, or lacks a column.
    """
    import pandas as pd

    with reading(path, "a Parquet table"):
        table = pd.read_parquet(path)
    for name in columns:
        if name not in table:
            raise InputError(f"{path}: column '{name}' is missing; needed: {', '.join(columns)}")
    return table


def first_existing(*paths: str) -> str:
    """Return the first path that exists, or else the first."""
    return next((path for path in paths if Path(path).exists()), paths[0])
