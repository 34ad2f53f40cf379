"""Make evaluation items and calibration text from raw data files, without a network."""

from __future__ import annotations

from pathlib import Path

from moe_routing.config.study import CALIBRATION, StudyConfig
from moe_routing.data.calibration import select_text, write_documents
from moe_routing.data.documents import read_documents
from moe_routing.data.items import Item, fingerprint, read_items, write_items
from moe_routing.data.overlap import NGRAM, overlapping
from moe_routing.data.rows import read_rows
from moe_routing.data.sources import CERTIFICATION_FILE, describe, raw_path
from moe_routing.data.subset import data_rng, seeded_subset
from moe_routing.data.tasks import load_items
from moe_routing.errors import InputError
from moe_routing.files import read_parquet, save_json


def prepare_dataset(config: StudyConfig, name: str, raw: Path, out: Path) -> None:
    """Write the seeded subset of an evaluation set as items.

    Args:
        config: the study.
        name: evaluation set.
        raw: folder of fetched files.
        out: Parquet file; see :mod:`moe_routing.data.items`.

    Raises:
        InputError: a broken file, a missing column, an empty item, or too few items.
    """
    items = _all_items(config, name, raw)
    try:
        chosen = seeded_subset(items, config.datasets[name].items, data_rng(config.seed, name))
    except InputError as error:
        raise InputError(f"datasets.{name}.{error}") from error
    write_items(chosen, out)


def prepare_calibration(config: StudyConfig, raw: Path, prepared: Path, out: Path) -> None:
    """Write calibration text that is disjoint from every evaluation set, and a manifest.

    Text is checked against every item of every set, evaluated or not. For a set with the same
    source as the calibration text it is checked against the items of the subset.

    Args:
        config: the study.
        raw: folder of fetched files, of all sets and of the calibration text.
        prepared: folder of the prepared sets.
        out: Parquet file with columns ``id`` and ``text``; the manifest is ``.json`` beside it, and
            the documents that nothing is fitted on, ``certification.parquet``.

    Raises:
        InputError: a broken file, or too little text is left.
    """
    source = config.calibration.source
    origin = describe(source)
    texts = read_documents(read_rows(raw_path(raw, CALIBRATION, source), origin))
    checked, evaluation = [], {}
    for name, dataset in config.datasets.items():
        evaluated = read_items(prepared / f"{name}.parquet")
        items = _items_to_check(config, name, raw, evaluated)
        checked += items
        evaluation[name] = {
            "source": dataset.source.model_dump(),
            "items_evaluated": len(evaluated),
            "items_checked_for_overlap": len(items),
            "sha256": fingerprint(evaluated),
        }
    rng = data_rng(config.seed, CALIBRATION)
    try:
        apart = config.calibration.documents
        result = select_text(texts, checked, config.calibration.tokens, rng, apart=apart)
    except InputError as error:
        raise InputError(f"calibration.source: {origin}: {error}") from error
    write_documents(result.documents, out)
    write_documents(result.apart, out.with_name(CERTIFICATION_FILE))
    manifest = {
        "source": source.model_dump(),
        "documents": len(result.documents),
        "documents_apart": len(result.apart),
        "words": result.n_words,
        "sha256": result.fingerprint,
        "overlap": {
            "words_in_a_row": NGRAM,
            "documents_in_source": len(texts),
            "documents_checked": result.n_pool,
            "documents_dropped": result.n_dropped,
        },
        "evaluation": evaluation,
    }
    save_json(manifest, out.with_suffix(".json"))


def check_overlap(config: StudyConfig, name: str, raw: Path, prepared: Path, out: Path) -> None:
    """Check that existing calibration text is disjoint from an evaluation set, and write a record.

    A set that is added to a study, or gets other items, is thus no reason to calibrate again.
    Otherwise the manifest of the calibration text is removed: the next run draws it again.

    Args:
        config: the study.
        name: evaluation set.
        raw: folder of fetched files.
        prepared: folder of the prepared set and the calibration text.
        out: JSON file.

    Raises:
        InputError: some text overlaps an item.
    """
    evaluated = read_items(prepared / f"{name}.parquet")
    items = _items_to_check(config, name, raw, evaluated)
    files = (prepared / f"{CALIBRATION}.parquet", prepared / CERTIFICATION_FILE)
    texts = [text for file in files for text in read_parquet(file, "text")["text"]]
    found = overlapping(texts, items)
    if found:
        (prepared / f"{CALIBRATION}.json").unlink(missing_ok=True)
        raise InputError(
            f"datasets.{name}: {len(found)} documents of the calibration text share {NGRAM} words "
            "in a row with its items; allowed: none; give the same command again to draw other "
            "text, after which all strategies that use it are scored again"
        )
    record = {
        "documents_checked": len(texts),
        "items_checked": len(items),
        "sha256": fingerprint(evaluated),
    }
    save_json(record, out)


def _items_to_check(config: StudyConfig, name: str, raw: Path, evaluated: list[Item]) -> list[Item]:
    """Return all items of a set; of one with the source of the calibration text the evaluated."""
    shared = config.datasets[name].source == config.calibration.source
    return evaluated if shared else _all_items(config, name, raw)


def _all_items(config: StudyConfig, name: str, raw: Path) -> list[Item]:
    source = config.datasets[name].source
    return load_items(name, raw_path(raw, name, source), describe(source))
