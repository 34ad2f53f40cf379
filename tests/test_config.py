"""Bad config ends in one line that names file, key, value and what is allowed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from moe_routing.config import StudyConfig, load_config
from moe_routing.errors import InputError
from moe_routing.pretraining.config import PretrainConfig
from moe_routing.reference import reference_files
from moe_routing.schema import load_yaml
from moe_routing.workflow import sections

ROOT = Path(__file__).resolve().parents[1]
LOCAL = {"kind": "local", "path": "items.jsonl"}
STUDIES = ["config.yaml", "olmoe-1b-7b.yaml", "smoke.yaml"]


@pytest.fixture
def values():
    return yaml.safe_load((ROOT / "config" / "config.yaml").read_text())


def message_of(values, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", STUDIES)
def test_shipped_study_is_valid(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    load_config(ROOT / "config" / name)


def test_shipped_pretraining_is_valid():
    load_yaml(PretrainConfig, ROOT / "config" / "pretrain.yaml")


@pytest.mark.parametrize("name", STUDIES[:2])
def test_full_studies_have_69_cells(name):
    config = load_config(ROOT / "config" / name)
    assert len(config.strategies) * len(config.datasets) == 69


def change(values, key, value):
    values = copy.deepcopy(values)
    *parents, last = key.split(".")
    inner = values
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return values


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("sede", 1, "sede: unknown key; did you mean 'seed'?"),
        ("model.dtyp", "float32", "model.dtyp: unknown key; did you mean 'dtype'?"),
        ("model.dtype", "float8", "model.dtype is 'float8'; input should be 'float32', 'bfl"),
        ("seed", -1, "seed is -1; input should be greater than or equal to 0"),
        ("seed", "x", "seed is 'x'; input should be a valid integer"),
        ("statistics.confidence", 1.5, "statistics.confidence is 1.5; input should be less than 1"),
        ("calibration.source.sha256", "abc", "calibration.source.archive.sha256 is 'abc'"),
        ("datasets.piqa", {"source": LOCAL}, "unknown data set 'piqa'; allowed: wikitext, wikip"),
        ("strategies", ["regulr_k8"], "'regulr_k8'; did you mean 'regular'?"),
        ("strategies", ["bh_k8_a100"], "strategy 'bh_k8_a100': alpha is 1.0; input"),
        ("strategies", ["bh_k8_a000"], "strategy 'bh_k8_a000': alpha is 0.0; input"),
        ("strategies", ["regular_k8", "bh_k0_a005"], "'bh_k0_a005': max_k is 0"),
        ("strategies", ["regular_k8", "bh_k8_a005_pooledd"], "unknown part 'pooledd'"),
        ("strategies", ["regular_k8", "regular_k8"], "'regular_k8' is listed twice"),
        ("strategies", ["regular_k2"], "baseline is 'regular_k8'; allowed: regular_k2"),
        ("strategies", [], "strategies is []"),
        ("calibration.nulls", ["poled"], "calibration: nulls has 'poled'; allowed: within_token"),
        ("calibration.nulls", ["pooled"], "calibration.nulls lacks 'within_token'"),
    ],
)  # fmt: skip
def test_bad_value_is_one_line(values, tmp_path, key, value, expected):
    assert expected in message_of(change(values, key, value), tmp_path)


def test_missing_key(values, tmp_path):
    del values["study"]
    assert message_of(values, tmp_path) == "study: Field required"


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_not_yaml(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("a: [1,")
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(path)


def test_a_rule_depends_only_on_its_sections(values):
    study = StudyConfig.model_validate(values)
    other = StudyConfig.model_validate(change(values, "datasets.lambada.items", 7))
    assert sections(study, "model", "datasets.hellaswag") == sections(
        other, "model", "datasets.hellaswag"
    )
    assert sections(study, "datasets.lambada") != sections(other, "datasets.lambada")


@pytest.mark.parametrize("name", list(reference_files()))
def test_reference_is_made_from_the_models(name):
    assert (ROOT / name).read_text(encoding="utf-8") == reference_files()[name]
