"""The efficiency stage: interleaved times, and distinct experts of batches of documents."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose

from moe_routing.config.cells import TIMING_FILE, UNIQUE_FILE, measured
from moe_routing.config.study import StudyConfig, load_config
from moe_routing.data.items import Item, write_items
from moe_routing.engine.routed import routed
from moe_routing.errors import InputError
from moe_routing.evaluation.efficiency import (
    SelectionRecorder,
    expected_unique,
    interleaved,
    measure_efficiency,
    unique_table,
)
from moe_routing.evaluation.study_model import write_model
from moe_routing.routing.strategies import parse_strategy
from moe_routing.workflow import write_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small_study(tmp_path, calibration, rows):
    """A calibrated study of six strategies, one of them the baseline under another id."""
    source = {"kind": "local", "path": "unused"}
    config = StudyConfig.model_validate({
        "study": "small",
        "model": {"path": str(ROOT / "resources" / "olmoe-nano")},
        "calibration": {"source": source},
        "datasets": {"wikipedia": {"source": source}},
        "strategies": ["stock", "regular_k1", "regular_k4", "regular_k8", "bh_k8_a005"],
        "controls": ["shuffle.bh_k8_a005", "bh_k8_a005_mass-matched"],
        "statistics": {"primary": {"strategy": "bh_k8_a005", "dataset": "wikipedia"}},
        "analysis": {"efficiency": {"tokens": 64, "batch_sizes": [1, 4]}},
    })  # fmt: skip
    write_config(config, tmp_path / "config.yaml")
    write_model(config, tmp_path, "study.yaml")
    calibration.save(tmp_path / "calibration")
    (tmp_path / "data").mkdir()
    passages = [row["passage"] for row in rows("wikipedia")[:5]]
    items = [Item(text, text, "", (text,), None) for text in passages]
    write_items(items, tmp_path / "data" / "wikipedia.parquet")
    return tmp_path


def unique_by_enumeration(used_LDSE, size):
    """The mean over all batches: every set of documents, every token of each."""
    layers, documents, tokens, _ = used_LDSE.shape
    batches = [
        used_LDSE[:, list(chosen), list(positions)].any(1).sum(1)
        for chosen in combinations(range(documents), size)
        for positions in product(range(tokens), repeat=size)
    ]
    assert len(batches[0]) == layers
    return np.mean(batches, axis=0)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_expected_unique_experts_are_the_mean_over_all_batches(size):
    used_LDSE = np.random.default_rng(size).random((2, 4, 3, 6)) < 0.3
    found = expected_unique(used_LDSE.mean(2), size)
    assert_allclose(found, unique_by_enumeration(used_LDSE, size), rtol=1e-12)


def test_one_token_needs_its_own_experts_and_many_need_no_more_than_there_are():
    used_LDE = np.random.default_rng(0).random((3, 64, 16))
    table = unique_table("a", used_LDE, [1, 8, 64, 128])
    assert table["batch_size"].unique().tolist() == [1, 8, 64]  # there are 64 documents
    one = table[table["batch_size"] == 1]
    assert_allclose(one["unique_experts"], one["mean_experts"])
    means = table.groupby("batch_size")["unique_experts"].mean()
    assert means.is_monotonic_increasing
    assert means[64] == pytest.approx(16, abs=1e-6)
    assert (table["documents"] == 64).all()


def test_repeats_are_interleaved_and_their_order_is_seeded():
    def order_of(seed):
        called = []
        runs = {name: lambda name=name: float(called.append(name) or len(called)) for name in "abc"}
        return called, interleaved(runs, 5, np.random.default_rng(seed))

    called, found = order_of(0)
    for repeat in range(5):
        assert sorted(called[3 * repeat : 3 * repeat + 3]) == ["a", "b", "c"]
        for name in "abc":
            assert called[int(found[name][repeat]) - 1] == name
            assert 3 * repeat < found[name][repeat] <= 3 * repeat + 3
    assert order_of(0)[0] == called
    assert any(order_of(seed)[0] != called for seed in range(1, 4))


def test_selections_are_those_of_the_routing(model, tokenizer):
    ids_BS = torch.tensor(tokenizer("One sentence of a few words, and one more.")["input_ids"])[
        None
    ]
    recorder = SelectionRecorder()
    with torch.inference_mode(), routed(model, "regular_k3", recorder=recorder):
        model.base_model(ids_BS)
    assert sorted(recorder.used_TE) == list(range(16))
    for used_TE in recorder.used_TE.values():
        assert used_TE.shape == (ids_BS.shape[1], 64)
        assert (used_TE.sum(1) == 3).all()


def test_what_has_no_choices_of_its_own_is_not_measured(small_study):
    config = load_config(small_study / "config.yaml")
    names = measured(config)
    assert names[0] == "stock"
    assert "regular_k1" in names
    assert "shuffle.bh_k8_a005" not in names


def test_every_strategy_has_every_repeat_and_equal_routings_have_equal_times(small_study):
    measure_efficiency(small_study)
    timing = pd.read_csv(small_study / TIMING_FILE)
    config = load_config(small_study / "config.yaml")
    assert list(timing["strategy"].unique()) == measured(config)
    assert (timing.groupby("strategy")["repeat"].apply(list).map(tuple) == (0, 1, 2, 3, 4)).all()
    assert (timing["seconds"] > 0).all()
    assert (timing["tokens"] == 64).all()
    seconds = timing.pivot_table(index="repeat", columns="strategy", values="seconds")
    assert (seconds["regular_k8"] == seconds["stock"]).all()
    assert (seconds["regular_k1"] != seconds["stock"]).any()
    unique = pd.read_csv(small_study / UNIQUE_FILE)
    assert set(unique["layer"]) == set(range(16))
    families = [parse_strategy(name).family.name for name in unique["strategy"].unique()]
    assert len(families) == len(set(families))
    # Static top-k needs exactly k experts for one token, and the nearest to 4 is chosen.
    regular = unique.query("strategy == 'regular_k4' and batch_size == 1")
    assert_allclose(regular["unique_experts"], 4)
    assert {"regular_k1", "bh_k8_a005_mass-matched"}.isdisjoint(unique["strategy"])
    measure_efficiency(small_study)
    pd.testing.assert_frame_equal(pd.read_csv(small_study / UNIQUE_FILE), unique)


def test_too_little_text_names_the_key(small_study):
    path = small_study / "config.yaml"
    path.write_text(path.read_text().replace("tokens: 64", "tokens: 640000"))
    with pytest.raises(InputError, match=r"analysis.efficiency.tokens is 640000; allowed: at most"):
        measure_efficiency(small_study)
