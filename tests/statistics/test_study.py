"""The tables of a study with planted effects: found where they are, not found where they aren't."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
from planted import (
    ARMS,
    BASELINE,
    COARSE_FLIPS,
    COARSE_NATS,
    CONTROLS,
    GAIN,
    ITEMS,
    LEVERS,
    LOSS,
    NUMERICS,
    RIVAL,
    TASK_OF,
    ZERO,
    Arm,
    describe_model,
    settings,
    write_planted,
)
from statsmodels.stats.multitest import multipletests

from moe_routing.config.study import StudyConfig, as_control
from moe_routing.errors import InputError
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import parse_strategy
from moe_routing.statistics.cells import load_cells, make_panel
from moe_routing.statistics.columns import TABLES
from moe_routing.statistics.intervals import metric_intervals
from moe_routing.statistics.primary import Declared
from moe_routing.statistics.study_tables import study_tables, write_statistics
from moe_routing.statistics.verdict import Verdict
from moe_routing.vocabulary import METRICS

MAIN_METRICS = {"wikitext": "nats_per_token", "hellaswag": "accuracy_norm", "lambada": "accuracy"}


STATIC = ("regular_k1", "regular_k2", "regular_k4", "regular_k6")
DECLARED = (
    Declared(LOSS, BASELINE, "hellaswag", "accuracy_norm"),
    Declared(ZERO, f"shuffle.{ZERO}", "wikitext", "nats_per_token"),
    Declared(GAIN, BASELINE, "wikitext", "nats_per_token"),
)
TIMES = pd.DataFrame(
    [
        {"strategy": name, "repeat": r, "seconds": seconds * (1 + r / 10), "tokens": 500}
        for name, seconds in {BASELINE: 1.0, LOSS: 0.5, ZERO: 0.8}.items()
        for r in range(5)
    ]
)


def tables_of(folder, datasets=tuple(ITEMS), strategies=tuple(ARMS), seed=0, **changes):
    chosen = settings(**changes)
    primary = chosen.primary
    return study_tables(
        folder / "cells",
        pd.read_csv(folder / "comparison" / "full_routing_results.csv"),
        strategies=strategies,
        datasets={name: TASK_OF[name] for name in datasets},
        settings=chosen,
        seed=seed,
        declared=[
            Declared(primary.strategy, BASELINE, primary.dataset, MAIN_METRICS[primary.dataset])
        ],
    )


def overview_of(folder):
    """Return the cells of strategies, controls and levers."""
    names = ("full_routing_results", "controls", "levers")
    parts = [pd.read_csv(folder / "comparison" / f"{name}.csv") for name in names]
    return pd.concat(parts, ignore_index=True)


def full_tables_of(folder, datasets=tuple(ITEMS), seed=0):
    """Return the tables with controls, numerics arms and levers."""
    return study_tables(
        folder / "cells",
        overview_of(folder),
        strategies=tuple(ARMS),
        datasets={name: TASK_OF[name] for name in datasets},
        settings=settings(),
        seed=seed,
        controls={name: as_control(parse_strategy(name), BASELINE) for name in CONTROLS},
        numerics=NUMERICS,
        budgets=(*STATIC, *LEVERS),
        declared=DECLARED,
        times=TIMES,
    )


@pytest.fixture(scope="module")
def tables(planted_folder):
    return full_tables_of(planted_folder)


@pytest.fixture(scope="module")
def small_tables(small_folder):
    return full_tables_of(small_folder)


def row_of(table, strategy, dataset, metric=None):
    metric = metric or MAIN_METRICS[dataset]
    chosen = (
        (table["strategy"] == strategy)
        & (table["dataset"] == dataset)
        & (table["metric"] == metric)
    )
    assert chosen.sum() == 1
    return table[chosen].iloc[0]


@pytest.mark.parametrize("dataset", ITEMS)
@pytest.mark.parametrize(
    ("strategy", "expected"),
    [(LOSS, Verdict.WORSE), (ZERO, Verdict.NON_INFERIOR), (GAIN, Verdict.BETTER)],
)
def test_planted_effects_get_the_right_verdict(tables, strategy, expected, dataset):
    row = row_of(tables["paired"], strategy, dataset)
    gain = ARMS[strategy].nats if dataset == "wikitext" else ARMS[strategy].gain
    assert row["difference"] == pytest.approx(gain, abs=5e-4)
    assert row["low"] < gain < row["high"]
    assert row["verdict"] == expected


def test_intervals_of_the_planted_loss_exclude_zero_and_those_of_the_zero_hold_it(tables):
    loss, zero = (row_of(tables["paired"], s, "hellaswag") for s in (LOSS, ZERO))
    assert loss["high"] < 0
    assert loss["p_adjusted"] < 0.001
    assert zero["low"] < 0 < zero["high"]
    assert (zero["p_value"], zero["lost"], zero["gained"]) == (1, 120, 120)
    assert zero["flip_proportion"] == pytest.approx(0.06)


def test_margins_are_met_and_missed_as_planted(tables):
    margins = tables["noninferiority"].set_index(["strategy", "dataset", "metric"])
    for dataset, metric in MAIN_METRICS.items():
        assert not margins.loc[(LOSS, dataset, metric), "noninferior"]
        assert margins.loc[(ZERO, dataset, metric), "noninferior"]
        assert margins.loc[(GAIN, dataset, metric), "noninferior"]
        assert not margins.loc[(GAIN, dataset, metric), "equivalent"]
    assert (margins["p_tost_adjusted"] >= margins["p_tost"]).all()
    assert (margins["p_value"] <= margins["alpha"]).equals(
        margins["upper_bound"] < margins["margin"]
    )
    np.testing.assert_allclose(margins["p_value"], margins["p_clustered_t"], atol=0.02)
    # No margin is declared for nats of a whole word.
    assert "nats_per_target" not in margins.index.get_level_values("metric")


@pytest.mark.parametrize(("strategy", "expected"), [(ZERO, True), (GAIN, False), (LOSS, False)])
def test_equivalence_is_claimed_of_a_planted_zero_alone(planted_folder, strategy, expected):
    """Of the primary contrast, which is tested alone."""
    strategies, contrast = (BASELINE, strategy), {"strategy": strategy, "dataset": "lambada"}
    tables = tables_of(planted_folder, ("lambada",), strategies, **contrast)
    assert row_of(tables["primary"], strategy, "lambada")["equivalent"] == expected


def test_tests_respect_clusters(tables):
    paired = tables["paired"].set_index(["dataset", "metric"])
    assert paired.loc["hellaswag", "n_clusters"].unique().tolist() == [2000]
    alone = paired.loc[("lambada", "accuracy")]
    np.testing.assert_allclose(alone["p_mcnemar"], alone["p_value"], atol=0.06)


@pytest.mark.parametrize("name", ["paired", "controls", "matched_compute", "primary"])
def test_a_p_value_and_its_interval_never_disagree(tables, small_tables, name):
    for table in (tables[name], small_tables[name]):
        rows = table[table["difference"].notna()]
        outside = (rows["low"] > 0) | (rows["high"] < 0)
        assert outside.equals(rows["p_value"] <= 0.05)


def test_those_of_budgets_and_levers_agree_too(tables, small_tables):
    for own in (tables, small_tables):
        rows = own["matched_budgets"]
        for value, low, high in (
            ("p_stock", "low", "high"), ("p_value", "static_low", "static_high")
        ):  # fmt: skip
            tested = rows[rows[value].notna()]
            outside = (tested[low] > 0) | (tested[high] < 0)
            assert outside.equals(tested[value] <= 0.05)
        levers = own["levers"]
        outside = (levers["low"] > 0) | (levers["high"] < 0)
        assert outside.equals(levers["p_value"] <= 0.05)


@pytest.mark.parametrize("name", ["paired", "noninferiority", "controls", "matched_compute"])
def test_main_metrics_are_corrected_by_holm_within_their_set(tables, name):
    table = tables[name]
    if "main" in table:
        main = table["main"].astype(bool)
        assert (table["family"][main] == table["dataset"][main]).all()
        assert set(table["family"][~main]) == {"exploratory"}
    for family, rows in table.groupby("family"):
        method = "fdr_bh" if family == "exploratory" else "holm"
        np.testing.assert_allclose(
            rows["p_adjusted"], multipletests(rows["p_value"], method=method)[1]
        )


def test_declared_contrasts_are_tested_in_their_order(tables):
    primary = tables["primary"].set_index("order")
    assert primary["verdict"].tolist() == ["worse", "non-inferior", "better"]
    # The second shows no difference, so the third is exploratory.
    assert primary["confirmatory"].tolist() == [True, True, False]
    first, second = primary.loc[1], primary.loc[2]
    assert (first["strategy"], first["against"], first["against_mean_experts"]) == (
        LOSS, BASELINE, 8
    )  # fmt: skip
    assert first["difference"] == pytest.approx(-0.03)
    assert not first["equivalent"]
    assert (second["difference"], second["equivalent"]) == (pytest.approx(0, abs=1e-9), True)
    assert second["against"] == f"shuffle.{ZERO}"


def test_power_comes_from_a_pilot_at_equal_budget_and_never_from_the_tested_pair(tmp_path):
    """Two random controls differ by a known noise; the arm's own spread is ten times as large."""
    folder = write_planted(tmp_path, items={"wikitext": 200})
    base = pd.read_parquet(folder / "cells" / ZERO / "wikitext.parquet")
    rng = np.random.default_rng(0)
    for name in (f"shuffle.{ZERO}", f"layermean.{ZERO}"):
        noise = rng.normal(0, 0.01, len(base)) * base["tokens"]
        frame = base.assign(log_likelihood=base["log_likelihood"] + noise)
        (folder / "cells" / name).mkdir(exist_ok=True)
        frame.to_parquet(folder / "cells" / name / "wikitext.parquet")
    controls = (f"shuffle.{ZERO}", f"layermean.{ZERO}")
    tables = study_tables(
        folder / "cells",
        overview_of(folder),
        strategies=tuple(ARMS),
        datasets={"wikitext": "perplexity"},
        settings=settings(),
        seed=0,
        controls={name: as_control(parse_strategy(name), BASELINE) for name in controls},
        declared=[Declared(ZERO, BASELINE, "wikitext", "nats_per_token")],
    )
    (row,) = tables["primary"].itertuples()
    assert row.pilot == " against ".join(controls)
    tokens = base["tokens"].to_numpy()
    expected = 0.01 * np.sqrt(2) * np.sqrt((tokens**2).sum()) / tokens.sum()
    assert row.pilot_standard_error == pytest.approx(expected, rel=0.15)
    assert row.minimum_detectable_difference == pytest.approx(
        2.8016 * row.pilot_standard_error, 1e-4
    )
    assert row.standard_error > 1.8 * row.pilot_standard_error


def test_matched_compute_finds_who_beats_the_static_curve(tables):
    matched = tables["matched_compute"]
    # At 5 experts the curve is half-way between -3 pp at k = 4 and -1 pp at k = 6.
    zero = row_of(matched, ZERO, "hellaswag")
    assert (zero["k_low"], zero["k_high"], zero["weight_high"]) == (4, 6, 0.5)
    assert zero["difference"] == pytest.approx(0.02, abs=5e-4)
    assert zero["verdict"] == "better"
    # Beside the chord from 4 to 6 experts, that from 2 to 4 reaches -2 pp at 5, that from 6 to 8
    # -2 pp too: a convex curve can be no better than the better of both.
    assert zero["chord_excess"] == pytest.approx(0, abs=5e-4)
    # Between k = 2 (0.30 nats) and k = 4 (0.10) the curve is at 0.20; the arm loses 0.05.
    loss = row_of(matched, LOSS, "wikitext")
    assert loss["difference"] == pytest.approx(-0.15)
    # From 6 (0.04) over 4 to 3 experts: 0.13; from 1 (0.80) over 2 to 3: less. So 0.20 - 0.13.
    assert loss["chord_excess"] == pytest.approx(0.07)
    assert loss["low"] < -0.15 < loss["high"] < 0
    # On a point of the curve, against that point; a rival, which is worse than the baseline.
    rival = row_of(matched, RIVAL, "wikitext")
    assert (rival["k_low"], rival["k_high"], rival["verdict"]) == (4, 4, "better")
    assert rival["difference"] == pytest.approx(0.05 - 0.10)
    # Points of a curve have nothing to be compared with, nor have controls that take apart.
    assert set(matched["strategy"]) == {"adaptive_k2", LOSS, ZERO, GAIN, RIVAL}


def test_a_point_of_the_curve_is_compared_as_in_the_paired_table(tables, small_folder):
    """The rival uses exactly 4 experts: the same numbers as with regular_k4 as the baseline."""
    matched = tables["matched_compute"]
    rows = matched[matched["strategy"] == RIVAL].set_index("metric")
    assert rows["chord_excess"].eq(0).all()
    assert rows.loc["accuracy_norm", "interval"] == "score"
    between = row_of(matched, ZERO, "hellaswag")
    assert between["interval"] == "score, interpolated"
    assert row_of(matched, RIVAL, "wikitext")["interval"] == "bootstrap-t"
    paired = study_tables(
        small_folder / "cells",
        overview_of(small_folder),
        strategies=("regular_k4", RIVAL),
        datasets={"lambada": "last_word"},
        settings=settings(strategy=RIVAL, dataset="lambada", baseline="regular_k4"),
        seed=0,
    )["paired"]
    small = row_of(full_tables_of(small_folder, ("lambada",))["matched_compute"], RIVAL, "lambada")
    one, other = small, row_of(paired, RIVAL, "lambada")
    for name in ("difference", "low", "high", "p_value"):
        assert one[name] == pytest.approx(other[name])
    assert one["discordant"] == other["lost"] + other["gained"]


def test_static_controls_prolong_the_curve_of_matched_compute(tables, small_folder):
    """At 1.5 experts the curve is half-way between one expert, a control, and two."""
    inside = row_of(tables["matched_compute"], "adaptive_k2", "wikitext")
    assert (inside["k_low"], inside["k_high"], inside["weight_high"]) == (1, 2, 0.5)
    assert inside["difference"] == pytest.approx(0.60 - (1.00 + 0.40) / 2)
    assert set(tables["matched_compute"]["status"]) == {"matched"}
    alone = tables_of(small_folder)["matched_compute"]
    outside = row_of(alone, "adaptive_k2", "lambada")
    assert (outside["status"], outside["static_family"]) == ("outside the curve", "normalized")
    assert np.isnan(outside["difference"])


def test_matched_compute_does_not_mix_weighting_with_selection(tables, planted_folder):
    """Against the curve of its own weights, by hand; of other weights it would be the opposite."""
    overview = overview_of(planted_folder)
    overview.loc[overview["task"] == "perplexity", "value"] = np.log(overview["value"])
    values = overview.set_index(["strategy", "dataset"])

    def static_value(family, dataset, experts):
        rows = overview.query("family == @family and dataset == @dataset").sort_values("k")
        return np.interp(experts, rows["k"], rows["value"])

    matched = tables["matched_compute"]
    for row in matched[matched["main"]].itertuples():
        assert row.static_family == ("normalized" if row.strategy == "adaptive_k2" else "regular")
        by_hand = static_value(row.static_family, row.dataset, row.mean_experts)
        assert row.static_value == pytest.approx(by_hand)
        assert row.difference == pytest.approx(
            values.loc[(row.strategy, row.dataset), "value"] - by_hand
        )
    adaptive = row_of(matched, "adaptive_k2", "wikitext")
    assert adaptive["verdict"] == "better"
    assert adaptive["value"] > static_value("regular", "wikitext", 1.5) + 0.04


def test_weights_that_no_static_family_has_are_not_compared(small_folder):
    name = f"{ZERO}_mass-matched"
    tables = study_tables(
        small_folder / "cells",
        overview_of(small_folder),
        strategies=(*ARMS, name),
        datasets={"lambada": "last_word"},
        settings=settings(strategy=name, dataset="lambada"),
        seed=0,
    )
    row = row_of(tables["matched_compute"], name, "lambada")
    assert row["status"] == "no curve"
    assert row[["static_family", "difference", "p_value", "verdict"]].isna().all()


@pytest.mark.parametrize("dataset", ITEMS)
@pytest.mark.parametrize(
    ("control", "kind", "base", "expected"),
    [
        ("regular_k1", "static", BASELINE, Verdict.WORSE),
        (f"shuffle.{ZERO}", "shuffle", ZERO, Verdict.NON_INFERIOR),
        (f"randomid.{GAIN}", "randomid", GAIN, Verdict.WORSE),
        (f"{ZERO}_mass-matched", "weighting", ZERO, Verdict.BETTER),
        ("normalized_k1", "static", BASELINE, Verdict.WORSE),
        (RIVAL, "rival", BASELINE, Verdict.WORSE),
    ],
)
def test_planted_controls_get_the_right_verdict(tables, control, kind, base, expected, dataset):
    row = row_of(tables["controls"], control, dataset)
    arms, effect = ARMS | CONTROLS, "nats" if dataset == "wikitext" else "gain"
    assert CONTROLS[control].base == base
    planted = getattr(CONTROLS[control], effect)
    assert (row["kind"], row["base"], row["verdict"]) == (kind, base, expected)
    assert row["difference"] == pytest.approx(planted, abs=5e-4)
    assert row["control_value"] - row["base_value"] == pytest.approx(row["difference"])
    assert row["low"] < planted < row["high"]
    assert (row["base_mean_experts"], row["control_mean_experts"]) == (
        arms[base].experts,
        arms[control].experts,
    )
    assert row["p_adjusted"] >= row["p_value"]


def test_controls_are_compared_by_the_functions_of_the_paired_table(small_tables, small_folder):
    """One expert against the baseline: as a control, and had it been a strategy."""
    names = (BASELINE, "regular_k1")
    paired = tables_of(small_folder, strategies=names)["paired"]
    control = small_tables["controls"].query("strategy == 'regular_k1'")
    exact = ["dataset", "metric", "n_items", "n_clusters", "difference", "standard_error"]
    pd.testing.assert_frame_equal(
        paired[exact].reset_index(drop=True), control[exact].reset_index(drop=True)
    )
    # Proportions have an exact interval; that of others is resampled.
    proportions = paired["metric"].map(lambda name: METRICS[name].is_proportion).to_numpy()
    for name in ("low", "high"):
        one, other = paired[name].to_numpy(), control[name].to_numpy()
        np.testing.assert_array_equal(one[proportions], other[proportions])
        np.testing.assert_allclose(one[~proportions], other[~proportions], rtol=0.1)


def test_controls_and_noise_change_no_other_table(small_tables, small_folder):
    alone = tables_of(small_folder)
    changed = {"controls", "numerics", "levers", "matched_budgets", "matched_compute", "primary"}
    changed |= {"pareto", "pareto_time", "timing"}
    for name in set(TABLES) - changed:
        pd.testing.assert_frame_equal(alone[name], small_tables[name])
    assert alone["controls"].empty
    assert alone["numerics"].empty


def test_a_control_without_its_base_is_left_out_and_what_is_missing_is_listed(tmp_path):
    folder = write_planted(tmp_path, items={"lambada": 60, "wikitext": 20})
    shutil.rmtree(folder / "cells" / GAIN)
    (folder / "cells" / "regular_k1" / "wikitext.parquet").unlink()
    (folder / "numerics" / "coarse" / "lambada.parquet").unlink()
    tables = full_tables_of(folder, datasets=("lambada", "wikitext"))
    controls = tables["controls"].drop_duplicates(["strategy", "dataset"])
    assert controls["strategy"].value_counts().to_dict() == {
        "regular_k1": 1, f"shuffle.{ZERO}": 2, f"{ZERO}_mass-matched": 2, "normalized_k1": 2,
        RIVAL: 2,
    }  # fmt: skip
    reasons = tables["missing"].set_index(["dataset", "strategy"])["reason"]
    assert reasons["wikitext", "regular_k1"] == "no cell"
    assert reasons["lambada", BASELINE] == "no cell of numerics arm 'coarse'"
    assert set(tables["numerics"].query("dataset == 'lambada'")["arm"]) == {"same"}


def test_noise_is_measured_and_nothing_is_nothing(tables):
    numerics = tables["numerics"].set_index(["arm", "dataset", "metric"])
    same = numerics.loc["same"]
    assert (same[["difference", "largest_item_difference"]] == 0).all(axis=None)
    nats = same["flips"].isna()  # of documents, and of words
    assert same.index[nats].get_level_values("metric").str.startswith("nats").sum() == 2
    assert (same.loc[nats, ["low", "high"]] == 0).all(axis=None)
    # Of shares an interval has a width also where no item flips.
    proportions = same[~nats]
    assert (proportions["flips"] == 0).all()
    assert (
        (proportions["low"] < 0) & (proportions["high"] > 0) & (proportions["high"] < 0.001)
    ).all()
    coarse = numerics.loc["coarse"]
    assert set(coarse["changed"]) == {"dtype = float16"}
    nats = coarse.loc[("wikitext", "nats_per_token")]
    assert nats["difference"] == pytest.approx(COARSE_NATS)
    assert nats["arm_value"] - nats["baseline_value"] == pytest.approx(COARSE_NATS)
    assert nats["low"] == pytest.approx(nats["high"])  # the same for every token
    # The longest document has 799 tokens or few less.
    assert COARSE_NATS * 700 < nats["largest_item_difference"] < COARSE_NATS * 800
    for dataset, metric in (("hellaswag", "accuracy_norm"), ("lambada", "accuracy")):
        row = coarse.loc[(dataset, metric)]
        assert (row["difference"], row["flips"]) == (0, COARSE_FLIPS)
        assert row["low"] < 0 < row["high"]
        assert row["n_items"] == ITEMS[dataset]


def test_fronts(tables):
    front = tables["pareto"].set_index(["dataset", "strategy"])
    for dataset in ITEMS:
        assert front.loc[(dataset, ZERO), "on_front"]
        assert not front.loc[(dataset, BASELINE), "on_front"]  # as good as ZERO, and dearer
        assert front.loc[(dataset, "regular_k1"), "on_front"]  # the cheapest, a control
        assert front.loc[(dataset, RIVAL), "on_front"] == (dataset != "wikitext")
        assert f"shuffle.{ZERO}" not in front.loc[dataset].index
        assert front.loc[(dataset, GAIN), "front_proportion"] > 0.99
    time = tables["pareto_time"].set_index(["dataset", "strategy"])
    assert time.loc[("hellaswag", BASELINE), "seconds_per_1000_tokens"] == pytest.approx(2.4)
    # As good as ZERO, and slower; their nats differ by rounding only. What was not timed is off.
    assert not time.loc[("wikitext", BASELINE), "on_front"]
    assert not time.loc[("wikitext", GAIN), "on_front"]


def test_time_is_the_median_of_repeats_over_that_of_the_baseline(tables):
    timing = tables["timing"].set_index("strategy")
    assert timing.loc[LOSS, "ratio"] == pytest.approx(0.5)
    assert timing.loc[LOSS, "median_seconds"] == pytest.approx(0.6)
    assert timing.loc[BASELINE, ["ratio", "ratio_low", "ratio_high"]].eq(1).all()
    assert (timing["repeats"] == 5).all()


def test_front_intervals_are_those_of_the_cells(tables, planted_folder):
    front = tables["pareto"].set_index(["dataset", "strategy"])
    cells = pd.read_csv(planted_folder / "comparison" / "full_routing_results.csv")
    cell = cells.set_index(["dataset", "strategy"]).loc[("hellaswag", LOSS)]
    row = front.loc[("hellaswag", LOSS)]
    assert (row["value"], row["low"], row["high"]) == pytest.approx(
        (cell["value"], cell["ci_low"], cell["ci_high"])
    )


def test_power_at_assumed_discordances(tables):
    power = tables["power"]
    assumed = power[power["dataset"] == "lambada"]
    assert assumed["discordance"].tolist() == [0.02, 0.05, 0.10]


def test_a_small_study_can_conclude_nothing_about_a_zero(tmp_path):
    folder = write_planted(tmp_path, items={"hellaswag": 200, "lambada": 200})
    paired = tables_of(folder, datasets=("hellaswag", "lambada"))["paired"]
    for dataset in ("hellaswag", "lambada"):
        assert row_of(paired, ZERO, dataset)["verdict"] == Verdict.INCONCLUSIVE


def test_an_arm_that_changes_nothing_is_identical(tmp_path):
    folder = write_planted(tmp_path, items={"lambada": 100, "wikitext": 30})
    for dataset in ("lambada", "wikitext"):
        source = folder / "cells" / BASELINE / f"{dataset}.parquet"
        shutil.copy(source, folder / "cells" / ZERO / f"{dataset}.parquet")
    tables = tables_of(folder, datasets=("lambada", "wikitext"))
    paired = tables["paired"][tables["paired"]["strategy"] == ZERO]
    assert set(paired["verdict"]) == {"identical"}
    assert (paired["p_value"] == 1).all()
    nats = row_of(paired, ZERO, "wikitext")
    assert nats["low"] == nats["high"] == 0


def test_pure_noise_is_rarely_called_an_effect(tmp_path):
    arms = {BASELINE: ARMS[BASELINE]}
    folder = write_planted(tmp_path, arms=arms, items={"lambada": 400, "wikitext": 40})
    rng = np.random.default_rng(3)
    names = [f"regular_k{i}" for i in range(10, 50)]
    for dataset in ("lambada", "wikitext"):
        base = pd.read_parquet(folder / "cells" / BASELINE / f"{dataset}.parquet")
        for name in names:
            noise = rng.normal(0, 0.1, len(base)) * base["tokens"]
            frame = base.assign(log_likelihood=base["log_likelihood"] + noise)
            if dataset == "lambada":
                flipped = rng.random(len(base)) < 0.08
                frame["correct"] = base["correct"].to_numpy(dtype=bool) ^ flipped
            path = folder / "cells" / name / f"{dataset}.parquet"
            path.parent.mkdir(exist_ok=True)
            frame.to_parquet(path)
    strategies = (BASELINE, *names)
    paired = tables_of(folder, datasets=("lambada", "wikitext"), strategies=strategies)["paired"]
    assert (paired["p_value"] <= 0.05).mean() < 0.10
    assert (paired["p_adjusted"] <= 0.05).sum() <= 1


def test_same_seed_same_tables_other_seed_other_tables(small_folder):
    first, again, other = (tables_of(small_folder, seed=seed) for seed in (0, 0, 1))
    for name in TABLES:
        pd.testing.assert_frame_equal(first[name], again[name])
    for name in ("paired", "matched_compute", "pareto"):
        assert not first[name].equals(other[name])


def test_a_data_set_more_changes_no_other(small_folder):
    alone = tables_of(small_folder, datasets=("lambada",))["paired"]
    among = tables_of(small_folder)["paired"].query("dataset == 'lambada'").reset_index(drop=True)
    drawn = ["difference", "low", "high", "p_value"]
    pd.testing.assert_frame_equal(alone[drawn], among[drawn])


def test_missing_cells_are_listed_and_the_rest_is_computed(tmp_path):
    folder = write_planted(tmp_path, items={"lambada": 100, "hellaswag": 100, "wikitext": 20})
    shutil.rmtree(folder / "cells" / GAIN)
    (folder / "cells" / BASELINE / "wikitext.parquet").unlink()
    (folder / "cells" / ZERO / "lambada.parquet").unlink()
    tables = tables_of(folder)
    missing = tables["missing"]
    assert set(tables["paired"]["dataset"]) == {"lambada", "hellaswag"}
    assert GAIN not in set(tables["paired"]["strategy"])
    assert len(missing) == len(ARMS) + 2 + 1
    reasons = missing.set_index(["dataset", "strategy"])["reason"]
    assert reasons["wikitext", LOSS] == "baseline has no cell"
    assert reasons["wikitext", BASELINE] == "no cell"
    assert reasons["lambada", ZERO] == "no cell"


def test_without_the_static_family_only_the_baseline_is_a_point_of_the_curve(tmp_path):
    arms = {name: arm for name, arm in ARMS.items() if arm.family != "regular" or name == BASELINE}
    folder = write_planted(tmp_path, arms=arms, items={"lambada": 60})
    tables = tables_of(folder, datasets=("lambada",), dataset="lambada")
    assert set(tables["matched_compute"]["status"]) == {"outside the curve"}


def test_a_lone_baseline_gives_empty_tables_with_headers(tmp_path):
    folder = write_planted(tmp_path, arms={BASELINE: ARMS[BASELINE]}, items={"lambada": 60})
    tables = tables_of(folder, datasets=("lambada",), strategies=(BASELINE,))
    for name, columns in TABLES.items():
        assert list(tables[name].columns) == list(columns)
    assert tables["paired"].empty
    assert tables["primary"].empty


def test_strategies_without_telemetry_are_unknown_and_off_the_front(small_folder):
    overview = pd.read_csv(small_folder / "comparison" / "full_routing_results.csv")
    overview = overview[overview["strategy"] != LOSS].drop(columns="tokens_per_second")
    tables = study_tables(
        small_folder / "cells",
        overview,
        strategies=[BASELINE, LOSS],
        datasets={"lambada": "last_word"},
        settings=settings(),
        seed=0,
    )
    assert row_of(tables["matched_compute"], LOSS, "lambada")["status"] == "unknown experts"
    assert tables["pareto"].set_index("strategy")["on_front"].to_dict() == {
        BASELINE: True,
        LOSS: False,
    }
    assert not tables["pareto_time"]["on_front"].any()


def study_config(datasets=tuple(ITEMS), **changes) -> StudyConfig:
    source = {"kind": "local", "path": "text.jsonl"}
    settings_of = {"same": {"token_budget": 128}, "coarse": {"dtype": "float16"}}
    values = {
        "study": "planted",
        "model": {"path": "resources/olmoe-nano"},
        "calibration": {"source": source},
        "datasets": {name: {"source": source} for name in datasets},
        "strategies": list(ARMS),
        "controls": list(CONTROLS),
        "levers": list(LEVERS),
        "numerics": [{"name": name, **changed} for name, changed in settings_of.items()],
        "statistics": settings(),
    }
    return StudyConfig(**values | changes)


def test_written_files_have_a_dictionary_and_the_same_bytes_twice(small_folder, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(small_folder, folder)
    config = study_config(datasets=("hellaswag", "wikitext"))
    write_statistics(config, folder)
    first = {path.name: path.read_bytes() for path in (folder / "statistics").glob("[!.]*")}
    assert set(first) == {f"{name}.csv" for name in (*TABLES, "columns")}
    write_statistics(config, folder)
    assert first == {path.name: path.read_bytes() for path in (folder / "statistics").glob("[!.]*")}
    read = {name: pd.read_csv(folder / "statistics" / f"{name}.csv") for name in TABLES}
    assert read["controls"]["strategy"].drop_duplicates().tolist() == list(CONTROLS)
    assert read["numerics"]["changed"].drop_duplicates().tolist() == list(NUMERICS.values())
    dictionary = pd.read_csv(folder / "statistics" / "columns.csv")
    for name in TABLES:
        assert list(read[name]) == dictionary.query(f"table == '{name}.csv'")["column"].tolist()
    assert dictionary.notna().all(axis=None)
    described = dictionary.query("table == 'cells/<strategy>/<dataset>.parquet'")["column"].tolist()
    cell = pd.read_parquet(folder / "cells" / BASELINE / "lambada.parquet")
    assert described == [*cell.columns, "kl"]


TESTED_ONCE = ("paired", "noninferiority", "matched_compute", "pareto", "primary")


def duplicate_study(folder, strategies, controls=(), weighting="softmax"):
    """Write a study on a copy of the cells with ``stock`` as its baseline; return its tables.

    ``stock`` has the cells of the point of the static curve that it is, with this weighting.
    """
    same = {"softmax": "regular_k8", "renormalised": "normalized_k8"}[weighting]
    for path in (folder / "cells" / BASELINE).glob("[!.]*"):
        for name in {"stock", same, BASELINE}:
            (folder / "cells" / name).mkdir(exist_ok=True)
            if name != BASELINE:
                shutil.copy(path, folder / "cells" / name)
    describe_model(folder, ModelRule(8, weighting))
    table = folder / "comparison" / "full_routing_results.csv"
    cells = pd.read_csv(table, keep_default_na=False)
    base = cells[cells["strategy"] == BASELINE]
    own = {"stock": "stock", same: same.split("_")[0]}
    rows = [
        base.assign(strategy=name, family=family, weighting=weighting)
        for name, family in own.items()
    ]
    others = cells[~cells["strategy"].isin(own)]
    pd.concat([*rows, others]).to_csv(table, index=False)
    write_statistics(
        study_config(
            datasets=("hellaswag",),
            strategies=list(strategies),
            controls=list(controls),
            statistics=settings(baseline="stock"),
        ),
        folder,
    )
    return {path.stem: path.read_bytes() for path in (folder / "statistics").glob("[!.]*")}


@pytest.mark.parametrize(
    ("weighting", "same"), [("softmax", "regular_k8"), ("renormalised", "normalized_k8")]
)
def test_the_baseline_under_another_id_changes_no_table(small_folder, tmp_path, weighting, same):
    others = [name for name in ARMS if name != same]
    with_it, without = tmp_path / "with", tmp_path / "without"
    for folder in (with_it, without):
        shutil.copytree(small_folder, folder)
    first = duplicate_study(with_it, ["stock", *others, same], weighting=weighting)
    second = duplicate_study(without, ["stock", *others], weighting=weighting)
    assert {name: first[name] for name in TESTED_ONCE} == {
        name: second[name] for name in TESTED_ONCE
    }
    compared = set(pd.read_csv(with_it / "statistics" / "paired.csv")["strategy"])
    assert compared == set(others)
    assert ("regular_k8" in compared) == (weighting == "renormalised")


def test_a_control_of_a_duplicate_is_compared_with_what_stands_for_it(small_folder, tmp_path):
    """BH that names raw softmax weights is BH by its short id, on a model with these weights."""
    folder, base, control = tmp_path / "study", f"{ZERO}_softmax", f"shuffle.{ZERO}_softmax"
    shutil.copytree(small_folder, folder)
    cells = folder / "cells"
    shutil.copytree(cells / f"shuffle.{ZERO}", cells / control)
    shutil.copytree(cells / ZERO, cells / base)
    for name in ("full_routing_results", "controls"):
        path = folder / "comparison" / f"{name}.csv"
        table = pd.read_csv(path, keep_default_na=False)
        again = table[table["strategy"].isin([ZERO, f"shuffle.{ZERO}"])]
        renamed = again.assign(strategy=again["strategy"] + "_softmax")
        pd.concat([table, renamed]).to_csv(path, index=False)
    duplicate_study(folder, ["stock", *ARMS, base], [f"shuffle.{ZERO}", control])
    controls = pd.read_csv(folder / "statistics" / "controls.csv")
    assert controls["strategy"].drop_duplicates().tolist() == [f"shuffle.{ZERO}"]
    duplicate_study(folder, ["stock", *ARMS, base], [control])
    controls = pd.read_csv(folder / "statistics" / "controls.csv")
    assert controls["strategy"].drop_duplicates().tolist() == [control]
    assert set(controls["base"]) == {ZERO}


def test_rules_are_compared_at_matched_budgets_and_at_their_own_scale(tables):
    budgets = tables["matched_budgets"].set_index(["strategy", "dataset"])
    text = budgets.xs("wikitext", level="dataset")
    scaled = f"{BASELINE}_scaled"
    assert set(text.index) == {*STATIC, *LEVERS}
    assert text.loc[[*LEVERS], "reference"].to_dict() == {
        "absolute_k8_b3": BASELINE,
        "absolute_k8_b3_consequence": BASELINE,
        scaled: BASELINE,
        "absolute_k8_b3_scaled": scaled,
    }
    for name, arm in LEVERS.items():
        assert text["loss_over_stock"][name] == pytest.approx(arm.nats, abs=1e-9)
        assert text["low"][name] < arm.nats < text["high"][name]
        assert text["mean_experts"][name] == arm.experts
    # At 3 experts the line from 0.30 nats (k = 2) to 0.10 (k = 4) is at 0.20.
    assert text["versus_static"]["absolute_k8_b3"] == pytest.approx(0.06 - 0.20)
    assert text["verdict"]["absolute_k8_b3"] == "better"
    assert text.loc[[*STATIC, scaled], "versus_static"].isna().all()
    assert np.isnan(text["versus_static"]["absolute_k8_b3_scaled"])  # no fixed number was scaled
    own = budgets.reset_index()
    for _, rows in own.groupby("dataset"):
        for raw, adjusted in (("p_stock", "p_stock_adjusted"), ("p_value", "p_adjusted")):
            tested = rows[rows[raw].notna()]
            expected = multipletests(tested[raw], method="holm")[1]
            np.testing.assert_allclose(tested[adjusted], expected)


def test_a_loss_is_positive_where_more_is_better(tables):
    """In accuracy, losing 5 points is a loss of +0.05."""
    row = tables["matched_budgets"].set_index(["strategy", "dataset"]).loc["regular_k2", "lambada"]
    assert row["metric"] == "accuracy"
    assert row["loss_over_stock"] == pytest.approx(0.05, abs=5e-4)
    assert 0 < row["low"] < row["loss_over_stock"] < row["high"]


def test_a_lever_is_compared_with_the_rule_without_it(tables):
    levers = tables["levers"].set_index(["lever", "strategy", "dataset"])
    score = levers.loc["score", "absolute_k8_b3_consequence", "wikitext"]
    assert (score["without"], score["verdict"]) == ("one threshold", "better")
    assert score["difference"] == pytest.approx(0.02 - 0.06)
    tokens = levers.loc["tokens", "absolute_k8_b3", "wikitext"]
    assert (tokens["without"], tokens["difference"]) == ("fixed k", pytest.approx(0.06 - 0.20))


def test_the_same_routing_is_tested_once(tmp_path):
    folder = write_planted(tmp_path, items={"wikitext": 40})
    source = folder / "cells" / "absolute_k8_b3" / "wikitext.parquet"
    shutil.copy(source, folder / "cells" / "absolute_k8_b3_consequence" / "wikitext.parquet")
    tables = full_tables_of(folder, datasets=("wikitext",))
    rows = tables["matched_budgets"].set_index("strategy")
    one, again = rows.loc["absolute_k8_b3"], rows.loc["absolute_k8_b3_consequence"]
    assert again["same_as"] == "absolute_k8_b3"
    assert again["p_adjusted"] == one["p_adjusted"] == one["p_value"]  # the only test as is


def test_every_described_column_is_filled_somewhere(tables):
    never = {
        f"{name}.{column}"
        for name in TABLES
        if name != "missing"
        for column in tables[name].columns[tables[name].isna().all()]
    }
    # Nothing was fitted here, and no two strategies are the same routing.
    assert never == {
        "matched_budgets.parameter", "matched_budgets.fitted_value",
        "matched_budgets.realised_calibration", "matched_budgets.same_as", "paired.same_as",
        "primary.pilot", "primary.pilot_standard_error", "primary.minimum_detectable_difference",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.iloc[1:], "1 items are in one cell only, such as 'item-0'"),
        (lambda d: pd.concat([d, d.iloc[:1]]), "id 'item-0' occurs more than once"),
        (lambda d: d.drop(columns="cluster"), "column 'cluster' is missing"),
        (lambda d: d.assign(cluster="same"), "column 'cluster' differs"),
        (lambda d: d.assign(tokens=d["tokens"] + 1), "column 'tokens' differs"),
        (
            lambda d: d.assign(log_likelihood=np.nan),
            f"{ZERO} on wikitext: column 'log_likelihood' of",
        ),
    ],
)
def test_cells_that_cannot_be_compared_end_in_one_line(tmp_path, damage, message):
    folder = write_planted(tmp_path, items={"wikitext": 20})
    path = folder / "cells" / ZERO / "wikitext.parquet"
    damage(pd.read_parquet(path)).to_parquet(path)
    with pytest.raises(InputError, match=message) as error:
        tables_of(folder, datasets=("wikitext",))
    assert "\n" not in str(error.value)


def test_missing_files_end_in_one_line(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        write_statistics(study_config(), tmp_path)
    with pytest.raises(InputError, match=r"lambada\.parquet: no such file"):
        load_cells(tmp_path, ["regular_k8"], {"lambada": "last_word"})
    path = tmp_path / "regular_k8" / "lambada.parquet"
    path.parent.mkdir()
    path.write_bytes(b"PAR1 cut off")
    with pytest.raises(InputError, match="not a Parquet table"):
        load_cells(tmp_path, ["regular_k8"], {"lambada": "last_word"})
    folder = write_planted(tmp_path, items={"lambada": 30})
    (folder / "cells" / BASELINE / "lambada.parquet").unlink()
    with pytest.raises(InputError, match=f"no data set has a cell of the baseline '{BASELINE}'"):
        tables_of(folder)


def test_items_are_matched_by_id_not_by_position(tmp_path):
    folder = write_planted(tmp_path, items={"hellaswag": 400})
    before = tables_of(folder, datasets=("hellaswag",))["paired"]
    path = folder / "cells" / LOSS / "hellaswag.parquet"
    pd.read_parquet(path).sample(frac=1, random_state=1).to_parquet(path)
    pd.testing.assert_frame_equal(before, tables_of(folder, datasets=("hellaswag",))["paired"])


def test_panel_values_are_those_of_the_cell(planted_folder):
    for dataset, task in TASK_OF.items():
        cells = load_cells(planted_folder / "cells", [LOSS, BASELINE], {dataset: task})
        panel = make_panel(cells)
        rng = np.random.default_rng(0)
        metrics = {
            estimate.metric: estimate.value
            for estimate in metric_intervals(
                cells[0].items, task, confidence=0.95, resamples=100, rng=rng
            )
        }
        perplexities = {
            "nats_per_token": "token_perplexity",
            "nats_per_target": "last_word_perplexity",
        }
        for measure in panel.measures:
            value = panel.value(measure, LOSS)
            if measure.name in perplexities:
                assert np.exp(value) == pytest.approx(metrics[perplexities[measure.name]])
            else:
                assert value == pytest.approx(metrics[measure.name])


def test_script_writes_and_refuses_in_one_line(small_folder, tmp_path, run_script):
    folder = tmp_path / "study"
    code, _, refused = run_script("compute_statistics.py", "--results", folder)
    assert code == 2
    assert refused.count("\n") == 1
    assert "config.yaml" in refused
    shutil.copytree(small_folder, folder)
    config = study_config(datasets=("hellaswag",))
    (folder / "config.yaml").write_text(config.model_dump_json(), encoding="utf-8")
    assert run_script("compute_statistics.py", "--results", folder)[0] == 0
    assert len(pd.read_csv(folder / "statistics" / "primary.csv")) == 1


def test_a_gain_hidden_by_long_documents_is_judged_by_tokens(tmp_path):
    """Most documents improve, the longest one gets worse: the verdict follows the tokens."""
    arms = {BASELINE: ARMS[BASELINE], ZERO: Arm("bh", 8, 5.0)}
    folder = write_planted(tmp_path, arms=arms, items={"wikitext": 60})
    base = pd.read_parquet(folder / "cells" / BASELINE / "wikitext.parquet")
    base["tokens"] = 100
    base.loc[:9, "tokens"] = 5000
    base.to_parquet(folder / "cells" / BASELINE / "wikitext.parquet")
    change = np.where(base["tokens"] > 100, 0.05, -0.02) * base["tokens"]
    arm = base.assign(log_likelihood=base["log_likelihood"] - change)
    arm.to_parquet(folder / "cells" / ZERO / "wikitext.parquet")
    tables = tables_of(folder, datasets=("wikitext",), strategies=(BASELINE, ZERO))
    row = row_of(tables["paired"], ZERO, "wikitext")
    assert row["verdict"] == "worse"
    assert row["p_signed_rank"] < 0.01  # of the opposite sign: documents counting equally
    assert row["difference"] > 0
    assert (change < 0).sum() > 40
