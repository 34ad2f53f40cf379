"""Fetch a split of a hub data set at a pinned commit, with or without a network.

``datasets.load_dataset`` is not used: with ``HF_HUB_OFFLINE=1`` version 5 finds only data sets that
it has prepared before, at any revision. ``snapshot_download`` honours the commit in both cases, and
downloads only the files of the split.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moe_routing.config.study import HubSource
from moe_routing.data.rows import READERS, read_rows
from moe_routing.errors import InputError
from moe_routing.files import atomic_path
from moe_routing.hub import snapshot

if TYPE_CHECKING:
    from huggingface_hub import DatasetCardData

CARD = "README.md"


def fetch_hub(source: HubSource, path: Path) -> None:
    """Write the rows of a split to a Parquet file.

    The files of the split are those that the data set's card declares for it; without a
    declaration, those named after split and subset.

    Raises:
        InputError: see :func:`moe_routing.hub.snapshot`; no such subset or split; or files that no
            reader understands.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = split_files(source)
    rows = [dict(row.values) for file in files for row in read_rows(file)]
    try:
        table = pa.Table.from_pylist(rows)
    except pa.ArrowException as error:
        raise _error(source, f"rows do not have one type per column: {error}") from error
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def split_files(source: HubSource) -> list[Path]:
    """Return the split's files in the hub cache; those that are missing are downloaded.

    Raises:
        InputError: see :func:`fetch_hub`.
    """
    from huggingface_hub.utils import filter_repo_objects

    declared = _declared_patterns(source, _snapshot(source, [CARD]) / CARD)
    patterns = declared or _usual_patterns(source)
    folder = _snapshot(source, patterns)
    present = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = list(filter_repo_objects(present, allow_patterns=patterns))
    if not declared:
        names = [name for name in names if _is_named_after(name, source)]
        _check_shards(source, names)
    if not names:
        subset = f" and subset '{source.subset}'" if source.subset else ""
        raise _error(source, f"no data file of split '{source.split}'{subset}")
    return [folder / name for name in names]


def _snapshot(source: HubSource, patterns: Sequence[str]) -> Path:
    """Return the snapshot folder, with the files that match ``patterns`` in it."""
    return snapshot(_origin(source), source.dataset, source.revision, patterns, kind="dataset")


def _declared_patterns(source: HubSource, card: Path) -> list[str]:
    """Return the file patterns that the card's YAML header gives the split, if it has any.

    Raises:
        InputError: the card declares data files, but not for this subset or split.
    """
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    if not card.is_file():
        return []
    data = DatasetCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    configs = MetadataConfigs.from_dataset_card_data(cast("DatasetCardData", data))
    configs = {name: values for name, values in configs.items() if "data_files" in values}
    if not configs:
        return []
    subset = source.subset or MetadataConfigs(configs).get_default_config_name()
    if subset not in configs:
        raise _error(source, f"subset is {source.subset!r}; allowed: {', '.join(configs)}")
    # Files that are declared without a split are of the split ``train``.
    declared = sanitize_patterns(configs[subset]["data_files"])
    splits = {str(split): list(patterns) for split, patterns in declared.items()}
    if source.split not in splits:
        raise _error(source, f"split is '{source.split}'; allowed: {', '.join(splits)}")
    return splits[source.split]


def _usual_patterns(source: HubSource) -> list[str]:
    """Return patterns that match all files named after split and subset, and perhaps others."""
    names = [source.split]
    if source.subset:
        names = [f"{source.subset}*{source.split}", f"{source.split}*{source.subset}"]
    return [f"*{name}*{suffix}" for name in names for suffix in READERS]


def _is_named_after(name: str, source: HubSource) -> bool:
    """Say whether the split, and the subset if one is asked for, are words of a file's path."""

    def has_word(word: str) -> bool:
        return re.search(rf"(^|[/._-]){re.escape(word)}([/._-]|$)", name) is not None

    return has_word(source.split) and (source.subset is None or has_word(source.subset))


def _check_shards(source: HubSource, names: Sequence[str]) -> None:
    """Refuse files that differ in more than the number of a shard: they are not one data set."""
    kinds = sorted({re.sub(r"\d+", "#", Path(name).name) for name in names})
    folders = sorted({str(Path(name).parent) for name in names})
    if len(kinds) > 1 or len(folders) > 1:
        shown = ", ".join(names[:4])
        raise _error(source, f"several files could be split '{source.split}': {shown}; set subset")


def _origin(source: HubSource) -> str:
    return f"hub data set {source.dataset} @ {source.revision[:12]}"


def _error(source: HubSource, problem: str) -> InputError:
    return InputError(f"{_origin(source)}: {problem}")
