"""The whole graph on real items: what it makes, and that it can be killed and run again."""

from __future__ import annotations

import html as html_module
import json
import re
import shutil

import pandas as pd
import pytest
from without_torch import without_torch
from workflow_runs import SMOKE, make_checkout, offline, snakemake

from moe_routing.reporting.article_figures import ARTICLE_FIGURES

LEFT_OUT = "bh_k8_b2"
"""No level that 32 toggled tokens allow keeps so few experts."""
MIXTURES = ("mixture.bh_k8_a005", "mixture.certified_k8_m005")
"""What the contrasts are against, on HellaSwag alone."""


def cells_of(folder):
    return pd.read_csv(folder / "results/smoke/comparison/full_routing_results.csv")


def items_of(folder, dataset):
    """Return the items of every cell of a set that is not left out."""
    paths = sorted((folder / "results/smoke/cells").glob(f"*/{dataset}.parquet"))
    return [pd.read_parquet(path) for path in paths if path.parent.name != LEFT_OUT]


def test_one_row_a_cell_and_no_empty_value(smoke_run):
    cells = cells_of(smoke_run[0])
    assert len(cells) == 7 * 3
    assert not cells.duplicated(["strategy", "dataset"]).any()
    assert cells.notna().all().all()
    assert (cells.ci_low <= cells.value).all()
    assert (cells.value <= cells.ci_high).all()


def test_static_strategies_spend_exactly_k(smoke_run):
    cells = cells_of(smoke_run[0])
    static = cells[cells.family.isin(["stock", "regular", "uniform"])]
    assert (static.mean_experts == static.k).all()
    adaptive = cells[cells.family == "adaptive"]
    assert adaptive.mean_experts.between(4, 8).all()
    bh = cells[cells.family == "bh"]
    assert (bh.mean_experts <= bh.k).all()
    assert (bh.mean_experts >= 1).all()


def test_every_strategy_saw_the_same_items(smoke_run):
    for dataset in ("wikipedia", "hellaswag", "lambada"):
        ids = [items["id"].tolist() for items in items_of(smoke_run[0], dataset)]
        assert len(ids) == 7 + 4 + 4 + 1 + len(MIXTURES) * (dataset == "hellaswag")
        assert all(other == ids[0] for other in ids)


def test_controls_stand_beside_the_cells(smoke_run):
    comparison = smoke_run[0] / "results/smoke/comparison"
    cells, controls, metrics = (
        pd.read_csv(comparison / f"{name}.csv", keep_default_na=False)
        for name in ("full_routing_results", "controls", "all_metrics")
    )
    assert list(controls.columns) == list(cells.columns)
    names = ["regular_k1", "shuffle.bh_k8_a005", "counts.bh_k8_a005", "bh_k8_a005_mass-matched"]
    expected = [name for name in names for _ in range(3)]
    assert controls["strategy"].tolist() == [*expected, *MIXTURES]
    declared = pd.read_csv(smoke_run[0] / "results/smoke/statistics/primary.csv")
    assert declared["against"].tolist() == list(MIXTURES)
    levers, budgets = (
        pd.read_csv(comparison / f"{name}.csv", keep_default_na=False)
        for name in ("levers", "budgets")
    )
    assert list(levers.columns) == list(budgets.columns) == list(cells.columns)
    every = pd.concat([cells, controls, levers, budgets])["strategy"]
    assert set(metrics["strategy"]) == set(every)
    assert not levers["strategy"].isin([*cells["strategy"], *names]).any()
    assert set(budgets["strategy"]) == {"regular_k4", "topp_k8_b4"}
    # Static, shuffled and reweighted: the same numbers of experts as their bases.
    experts = pd.concat([cells, controls]).pivot(
        index="strategy", columns="dataset", values="mean_experts"
    )
    assert (experts.loc["regular_k1"] == 1).all()
    table = pd.read_csv(smoke_run[0] / "results/smoke/statistics/controls.csv")
    assert table.groupby("strategy")["kind"].unique().map(list).to_dict() == {
        "regular_k1": ["static"],
        "shuffle.bh_k8_a005": ["shuffle"],
        "counts.bh_k8_a005": ["counts"],
        "bh_k8_a005_mass-matched": ["weighting"],
    }
    assert (table.query("base == 'bh_k8_a005'")["base_mean_experts"] < 8).all()


def test_levers_use_what_was_certified_and_fitted(smoke_run):
    results = smoke_run[0] / "results/smoke"
    certified, scaled = "certified_k8_m005", "absolute_k8_b3_consequence_compensated_scaled"
    certificate = json.loads((results / f"calibration/certificates/{certified}.json").read_text())
    assert certificate["risk"] <= certificate["margin"] == 0.05
    scales = {path.stem: path for path in (results / "calibration/scales").glob("*.json")}
    assert set(scales) == {scaled, "stock_scaled"}
    assert 0.6 <= json.loads(scales[scaled].read_text())["scale"] <= 1.8
    budgets = pd.read_csv(results / "statistics/matched_budgets.csv")
    budgets = budgets.set_index(["strategy", "dataset"])
    assert set(budgets.loc[scaled, "reference"]) == {"stock_scaled"}
    assert budgets.loc[scaled, "mean_experts"].between(2, 4.5).all()
    assert budgets.loc[certified, "mean_experts"].between(1, 6).all()
    assert (budgets["low"] <= budgets["loss_over_stock"]).all()
    assert (budgets["loss_over_stock"] <= budgets["high"]).all()


def test_budgets_are_kept_or_left_out_with_a_reason(smoke_run):
    results = smoke_run[0] / "results/smoke"
    budgets = {
        path.stem: json.loads(path.read_text())
        for path in (results / "calibration/budgets").glob("*.json")
    }
    scaled = "absolute_k8_b3_consequence_compensated"  # of which only the scaled one is scored
    assert set(budgets) == {"topp_k8_b4", LEFT_OUT, scaled}
    for name in ("topp_k8_b4", scaled):
        assert budgets[name]["status"] == "fitted"
        assert abs(budgets[name]["realised"] - budgets[name]["budget"]) <= 0.1
    record = json.loads((results / "cells/topp_k8_b4/lambada.json").read_text())
    assert record["strategy"]["fitted"] == {"mass": budgets["topp_k8_b4"]["value"]}
    assert 2.5 < record["routing"]["mean_experts"] < 5.5
    assert budgets[LEFT_OUT]["status"] == "left out"
    reason = f"left out: {budgets[LEFT_OUT]['reason']}"
    for dataset in ("wikipedia", "hellaswag", "lambada"):
        file = results / f"cells/{LEFT_OUT}/{dataset}.json"
        assert json.loads(file.read_text()) == {"left_out": reason}


def test_the_contrasts_are_scored_at_equal_budget(smoke_run):
    cells = smoke_run[0] / "results/smoke/cells"
    for name in MIXTURES:
        assert [path.stem for path in sorted((cells / name).glob("*.json"))] == ["hellaswag"]
        base = cells / name.removeprefix("mixture.")
        mixed, own = (
            json.loads((folder / "hellaswag.json").read_text())["routing"]["mean_experts"]
            for folder in (cells / name, base)
        )
        assert mixed == pytest.approx(own, abs=0.05)


def test_divergence_from_the_baseline(smoke_run):
    results = smoke_run[0] / "results/smoke"
    metrics = pd.read_csv(results / "comparison/all_metrics.csv")
    kl = metrics[metrics["metric"] == "kl_from_baseline"].set_index(["strategy", "dataset"])
    assert len(kl) == (7 + 4 + 4 + 1) * 3 + len(MIXTURES)
    assert (kl["n"] == 4).all()
    same = ["stock", "regular_k8"]
    assert (kl.loc[same, ["value", "ci_low", "ci_high"]] == 0).all(axis=None)
    assert (kl.drop(same, level="strategy")["value"] > 1e-4).all()
    assert (kl["ci_low"] <= kl["value"]).all()
    for dataset in ("wikipedia", "hellaswag", "lambada"):
        measured = [items.dropna(subset="kl") for items in items_of(smoke_run[0], dataset)]
        assert len({tuple(items["id"]) for items in measured}) == 1
    items = pd.read_parquet(results / "cells/regular_k4/wikipedia.parquet").dropna(subset="kl")
    mean = items["kl"].sum() / items["tokens"].sum()
    assert kl.loc[("regular_k4", "wikipedia"), "value"] == pytest.approx(mean)


def test_the_baseline_under_another_id_is_scored_and_tested_once(smoke_run):
    results = smoke_run[0] / "results/smoke"
    for dataset in ("wikipedia", "hellaswag", "lambada"):
        stock, same = (results / "cells" / name / dataset for name in ("stock", "regular_k8"))
        assert (
            stock.with_suffix(".parquet").read_bytes() == same.with_suffix(".parquet").read_bytes()
        )
        records = [json.loads(path.with_suffix(".json").read_text()) for path in (stock, same)]
        differing = [key for key in records[0] if records[0][key] != records[1][key]]
        assert differing == ["strategy"]  # the timings are the same, too
    for name in ("paired", "noninferiority", "matched_compute", "pareto"):
        tested = set(pd.read_csv(results / "statistics" / f"{name}.csv")["strategy"])
        assert "bh_k8_a005" in tested
        # Points of the static curve are what others are compared with at matched compute.
        assert ("regular_k4" in tested) == (name != "matched_compute")
        assert "regular_k8" not in tested


def test_noise_arms_score_the_baseline_under_changed_settings(smoke_run):
    results = smoke_run[0] / "results/smoke"
    stock = json.loads((results / "cells/stock/hellaswag.json").read_text())
    for arm, key, value in (
        ("bfloat16", "dtype", "bfloat16"),
        ("small_batches", "token_budget", 256),
    ):
        record = json.loads((results / "numerics" / arm / "hellaswag.json").read_text())
        assert record["numerics"] == {"arm": arm, key: value}
        assert record["strategy"] == stock["strategy"]
        changed = {
            name for name, now in record["provenance"].items() if now != stock["provenance"][name]
        }
        assert changed == {key}
    numerics = pd.read_csv(results / "statistics/numerics.csv").set_index("arm")
    assert set(numerics.index) == {"bfloat16", "small_batches"}
    # Rounding in half precision moves every likelihood, another packing hardly any.
    assert numerics.loc["bfloat16", "largest_item_difference"].min() > 1e-3
    assert numerics.loc["small_batches", "largest_item_difference"].max() < 0.1
    assert (numerics["largest_item_difference"] < 2).all()


def test_cell_record_carries_its_provenance(smoke_run):
    path = smoke_run[0] / "results/smoke/cells/bh_k8_a005/hellaswag.json"
    record = json.loads(path.read_text())
    assert record["strategy"]["null"] == "needed"
    assert record["strategy"]["weighting"] == "softmax"
    provenance = record["provenance"]
    assert len(provenance["weights_sha256"]) == len(provenance["data_sha256"]) == 64
    assert {"seed", "device", "dtype", "packages", "commit"} <= set(provenance)
    layers = record["routing"]["by_layer"]
    assert len(layers["mean_experts"]) == 16
    tokens = record["routing"]["tokens"]
    assert all(sum(histogram) == tokens for histogram in layers["count_histogram"])


def test_second_run_does_nothing(smoke_run):
    done = snakemake(smoke_run[0], "--cores", "2", *SMOKE)
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout + done.stderr


def test_a_finished_study_is_planned_without_torch(smoke_run, tmp_path):
    """The model is described by then, and the study is checked against it."""
    assert (smoke_run[0] / "results/smoke/model.json").is_file()
    variables = without_torch(tmp_path, smoke_run[0] / "src")
    done = snakemake(smoke_run[0], "-n", *SMOKE, environment=variables)
    assert done.returncode == 0, done.stderr
    assert "Nothing to be done" in done.stdout + done.stderr


def test_report_of_the_workflow_names_a_baseline_left_to_its_default(smoke_run, tmp_path):
    report = tmp_path / "report.html"
    done = snakemake(smoke_run[0], "--report", str(report), *SMOKE)
    assert done.returncode == 0, done.stderr[-4000:]
    html = report.read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![a-z])Baseline: (?:<[^>]*>)*([^<]*)<", html)) == {"stock"}
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>|\\n", " ", html_module.unescape(html)))
    for label in ("fig-forest", "fig-bh-quality", "fig-entropy"):  # the captions of the article
        assert ARTICLE_FIGURES[label].caption in text, label


def test_a_killed_run_ends_in_the_same_cells_as_one_that_was_not(smoke_run, tmp_path):
    """Jobs score other cells in passing. Those of the first start Python, as a user's jobs do."""
    folder = make_checkout(tmp_path / "checkout")
    asked = {"stock": offline(), "bh_k8_a005": None}
    for name, environment in asked.items():
        cell = f"results/smoke/cells/{name}/wikipedia.parquet"
        done = snakemake(folder, cell, "--cores", "2", *SMOKE, environment=environment)
        assert done.returncode == 0, done.stderr[-4000:]
    scored = list((folder / "results/smoke/store/cells").glob("*/*.parquet"))
    assert len(scored) > len(asked)
    for path in scored:
        cell = f"results/smoke/cells/{path.parent.name}/{path.name.split('.')[0]}.parquet"
        assert (smoke_run[0] / cell).read_bytes() == path.read_bytes()


def test_new_weights_rerun_the_study(smoke_run, tmp_path):
    folder = tmp_path / "checkout"
    shutil.copytree(smoke_run[0], folder, symlinks=True)
    resources = (folder / "resources").resolve()
    (folder / "resources").unlink()
    shutil.copytree(resources, folder / "resources")
    (folder / "resources" / "olmoe-nano" / "model.safetensors").touch()
    done = snakemake(folder, "-n", *SMOKE)
    plan = done.stdout + done.stderr
    assert "Fetching and checking the model" in plan
    for name in ("stock", "regular_k4", "bfloat16"):
        assert f"Scoring {name} on lambada" in plan


def test_a_run_after_a_killed_one_scores_no_cell_twice(smoke_run):
    """Each cell is in one log: as a line of the job that scored it, whose or not it was."""
    results = smoke_run[0] / "results" / "smoke"
    logs = results / "logs" / "evaluate"
    lines = [line for path in logs.rglob("*.log") for line in path.read_text().splitlines()]
    scored = [line.split(":")[0] for line in lines if " items, " in line]
    assert len(scored) == len(set(scored)) > 0
    kept = {path.relative_to(results / "store").as_posix() for path in results.glob("store/*/*/*")}
    cells = {name.split("/", 1)[0] + "/" + name.split("/")[1] for name in kept}
    # Cells and numerics arms, mixtures, scales, budgets.
    assert len([name for name in kept if name.endswith(".json")]) == 19 * 3 + 2 + 2 + 3
    fitted = {"calibration/scales", "calibration/budgets"}
    assert cells >= {"cells/stock", "numerics/bfloat16", *fitted}
    assert not [name for name in kept if "claim" in name]
