"""The data stage as its scripts run it, on the small real files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from moe_routing.config.study import LocalSource, StudyConfig
from moe_routing.data.items import fingerprint, read_items, write_items
from moe_routing.data.overlap import overlapping
from moe_routing.data.prepare import (
    check_overlap,
    prepare_calibration,
    prepare_dataset,
)
from moe_routing.data.sources import CALIBRATION, describe, fetch, raw_path, sets_apart, source_of
from moe_routing.data.tasks import load_items
from moe_routing.errors import InputError

FILES = {
    "wikipedia": "wikipedia.jsonl",
    "hellaswag": "hellaswag.jsonl",
    "lambada": "lambada.jsonl",
    "wikitext": "wikitext.txt",
}


@pytest.fixture
def study(data_files: Path) -> Callable[..., StudyConfig]:
    """Return a builder of a study on the excerpts."""

    def build(calibration: str = "calibration.txt", tokens: int = 1500, **values: object) -> object:
        datasets = {
            name: {"source": {"kind": "local", "path": str(data_files / file)}, "items": 4}
            for name, file in FILES.items()
        }
        source = {"kind": "local", "path": str(data_files / calibration)}
        config = {
            "study": "test",
            "seed": 5,
            "model": {"path": "resources/none"},
            "calibration": {"source": source, "tokens": tokens, "documents": 2},
            "datasets": datasets,
            "strategies": ["stock"],
            "statistics": {"primary": {"strategy": "stock", "dataset": "hellaswag"}},
        }
        return StudyConfig.model_validate({**config, **values})

    return build


def _run(config: StudyConfig, folder: Path) -> dict:
    """Run the whole stage; return the manifest."""
    for name in [*config.datasets, CALIBRATION]:
        source = source_of(config, name)
        fetch(source, raw_path(folder / "raw", name, source), folder / "cache")
    for name in config.datasets:
        prepare_dataset(config, name, folder / "raw", folder / f"{name}.parquet")
    prepare_calibration(config, folder / "raw", folder, folder / "calibration.parquet")
    return json.loads((folder / "calibration.json").read_text())


def test_whole_stage(study: Callable[..., StudyConfig], data_files: Path, tmp_path: Path) -> None:
    config = study()
    manifest = _run(config, tmp_path)
    texts = [row["text"] for row in pq.read_table(tmp_path / "calibration.parquet").to_pylist()]
    assert manifest["documents"] == len(texts)
    assert manifest["words"] == sum(len(text.split()) for text in texts) >= 1500
    assert manifest["overlap"]["documents_in_source"] == 71
    assert manifest["overlap"]["documents_dropped"] == 0
    assert manifest["source"] == config.calibration.source.model_dump()
    for name, file in FILES.items():
        everything = load_items(name, data_files / file)
        chosen = read_items(tmp_path / f"{name}.parquet")
        assert len(chosen) == 4
        assert set(chosen) <= set(everything)
        assert overlapping(texts, everything) == set()
        assert manifest["evaluation"][name] == {
            "source": config.datasets[name].source.model_dump(),
            "items_evaluated": 4,
            "items_checked_for_overlap": len(everything),
            "sha256": fingerprint(chosen),
        }


def test_same_config_same_bytes_another_seed_others(
    study: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    runs = {"a": study(), "b": study(), "c": study(seed=6)}
    for name, config in runs.items():
        _run(config, tmp_path / name)
    for file in ("hellaswag.parquet", "calibration.parquet", "calibration.json"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in runs)
        assert a == b
        assert a != c


def test_items_outside_the_subset_are_checked_too(
    study: Callable[..., StudyConfig], data_files: Path, tmp_path: Path
) -> None:
    passages = (data_files / "wikipedia.jsonl").read_text(encoding="utf-8").splitlines()
    planted = [json.loads(line)["passage"].upper() for line in passages]
    own = (data_files / "calibration.txt").read_text(encoding="utf-8")
    path = tmp_path / "planted.txt"
    path.write_text("\n\n".join([own, *(f"Again: {text}" for text in planted)]), encoding="utf-8")
    manifest = _run(study(calibration=str(path), tokens=2000), tmp_path)
    assert manifest["overlap"]["documents_in_source"] == 71 + 12
    assert manifest["overlap"]["documents_dropped"] == 12
    text = (tmp_path / "calibration.parquet").read_bytes()
    assert b"Again" not in text


def test_calibration_from_the_same_source_takes_what_is_not_evaluated(
    study: Callable[..., StudyConfig], data_files: Path, tmp_path: Path
) -> None:
    manifest = _run(study(calibration="wikipedia.jsonl", tokens=200), tmp_path)
    assert manifest["overlap"]["documents_checked"] == 10
    assert (manifest["documents"], manifest["documents_apart"]) == (6, 2)
    files = [tmp_path / f"{name}.parquet" for name in ("calibration", "certification")]
    texts = [row["text"] for file in files for row in pq.read_table(file).to_pylist()]
    evaluated = [item.continuations[0] for item in read_items(tmp_path / "wikipedia.parquet")]
    everything = load_items("wikipedia", data_files / "wikipedia.jsonl")
    assert sorted(texts + evaluated) == sorted(item.continuations[0] for item in everything)


def test_too_little_text_names_the_key(study: Callable[..., StudyConfig], tmp_path: Path) -> None:
    problem = r"^calibration.source: \S+calibration.txt: 6487 words .* calibration.tokens is 7000"
    with pytest.raises(InputError, match=problem):
        _run(study(tokens=7000), tmp_path)
    assert not (tmp_path / "calibration.parquet").exists()


def test_too_many_items_names_the_key(
    study: Callable[..., StudyConfig], data_files: Path, tmp_path: Path
) -> None:
    source = {"kind": "local", "path": str(data_files / "hellaswag.jsonl")}
    config = study(datasets={"hellaswag": {"source": source, "items": 25}})
    with pytest.raises(InputError, match=r"^datasets.hellaswag.items is 25; the data set has 24$"):
        _run(config, tmp_path)


def test_local_file_that_is_not_there_or_unreadable(tmp_path: Path) -> None:
    source = LocalSource(kind="local", path=str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match=r"none.jsonl: no such file \(source.path\)"):
        fetch(source, tmp_path / "out.jsonl", tmp_path)
    assert describe(source) == source.path
    with pytest.raises(InputError, match=r"lambada: source 'a.csv': unknown format; allowed: "):
        raw_path(tmp_path, "lambada", LocalSource(kind="local", path="a.csv"))


def test_scripts_do_the_same(
    study: Callable[..., StudyConfig], tmp_path: Path, run_script: Callable
) -> None:
    config = study()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    _run(config, tmp_path / "package")
    out = tmp_path / "scripts"
    common = ("--config", path, "--dataset", "lambada")
    fetched = run_script("fetch_data.py", *common, "--out", out / "raw" / "lambada.jsonl")
    raw = ("--raw", out / "raw", "--out", out / "l.parquet")
    prepared = run_script("prepare_data.py", *common, *raw)
    for code, _, said in (fetched, prepared):
        assert code == 0
        assert re.fullmatch(r"usage: .*\n", said)
    assert (out / "l.parquet").read_bytes() == (tmp_path / "package/lambada.parquet").read_bytes()


def test_scripts_say_what_is_wrong_in_one_line(
    study: Callable[..., StudyConfig], tmp_path: Path, run_script: Callable
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(study().model_dump(mode="json")))
    common = ("--config", path, "--out", tmp_path / "lambada.parquet", "--dataset")
    code, _, said = run_script("fetch_data.py", *common, "lambada")
    assert code == 2
    assert said == "error: --out is lambada.parquet; allowed for this source: lambada.jsonl\n"
    code, _, said = run_script("prepare_data.py", *common, "mmlu", "--raw", tmp_path)
    assert code == 2
    assert said.startswith("error: data set 'mmlu' is not in the config; allowed: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "lambada.parquet").exists()


def test_a_set_that_shares_nothing_leaves_the_calibration_text_as_it_is(
    study: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    config = study()
    _run(config, tmp_path)
    assert sets_apart(config, tmp_path) == list(config.datasets)
    (tmp_path / "hellaswag.parquet").unlink()
    assert "hellaswag" not in sets_apart(config, tmp_path)
    prepare_dataset(config, "hellaswag", tmp_path / "raw", tmp_path / "hellaswag.parquet")
    out = tmp_path / "overlap" / "hellaswag.json"
    check_overlap(config, "hellaswag", tmp_path / "raw", tmp_path, out)
    assert json.loads(out.read_text())["items_checked"] > 4
    assert (tmp_path / "calibration.json").is_file()


def test_a_set_that_shares_text_has_it_drawn_again(
    study: Callable[..., StudyConfig], tmp_path: Path
) -> None:
    config = study(calibration="wikipedia.jsonl", tokens=200)
    _run(config, tmp_path)
    items = read_items(tmp_path / "wikipedia.parquet")
    texts = pq.read_table(tmp_path / "calibration.parquet").to_pylist()
    shared = replace(items[0], continuations=(texts[0]["text"],))
    write_items([*items[1:], shared], tmp_path / "wikipedia.parquet")
    with pytest.raises(InputError, match=r"datasets\.wikipedia: 1 documents of the calibration"):
        check_overlap(config, "wikipedia", tmp_path / "raw", tmp_path, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    assert sets_apart(config, tmp_path) == list(config.datasets)
    assert not (tmp_path / "calibration.json").exists()
