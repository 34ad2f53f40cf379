"""The four analyses run from files to files on the embedded model, and draw their figures."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from held_out_toggles import write_held_out_toggles
from planted_ablation import write_held_out

from moe_routing.analysis.ablation import write_ablation
from moe_routing.analysis.baseline import write_baseline
from moe_routing.analysis.bh import most_demanding, run_arm, write_bh
from moe_routing.analysis.capture import Capture
from moe_routing.analysis.outputs import ABLATION, BASELINE, BH, VALIDITY
from moe_routing.analysis.telemetry import UnionRecorder
from moe_routing.analysis.text import first_items, read_text
from moe_routing.analysis.validity import design_sizes, write_validity
from moe_routing.config.analyses import AnalysisConfig
from moe_routing.config.study import load_config
from moe_routing.data.items import Item, document_item, read_items, write_items
from moe_routing.errors import InputError
from moe_routing.evaluation.cells import score_items
from moe_routing.evaluation.held_out_files import HeldOutFiles
from moe_routing.evaluation.record import RoutingSummary
from moe_routing.evaluation.study_model import write_model
from moe_routing.figures.ablation import draw_ablation
from moe_routing.figures.baseline import draw_baseline
from moe_routing.figures.bh import draw_bh
from moe_routing.figures.series import text_caption
from moe_routing.figures.validity import draw_validity
from moe_routing.routing.calibration import OUTPUTS_FILE, SAMPLE_FILE, TOGGLES_FILE, null_path
from moe_routing.routing.nulls import save_null
from moe_routing.routing.strategies import parse_strategy
from moe_routing.statistics.intervals import metric_intervals

ROOT = Path(__file__).resolve().parents[2]
ANALYSIS = {
    "baseline": {"tokens": 400, "domain_tokens": 60},
    "bh": {
        "tokens": 300, "max_k": [4, 64], "alpha": [0.1], "nulls": ["needed"],
        "fewer_k": [1], "new_tokens": 3, "union": 8,
    },
    "validity": {"tokens": 256, "nulls": ["pooled", "within_token"], "repeats": 100},
    "ablation": {"alpha": [0.01, 0.1]},
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory, nano, calibration):
    """A study folder with everything that the analyses read."""
    root = tmp_path_factory.mktemp("study")
    _write_config(root, ANALYSIS)
    write_model(load_config(root / "config.yaml"), root, "config.yaml")
    texts = [json.loads(line)["passage"] for line in _data("wikipedia.jsonl")]
    passages = [document_item("wikipedia", row, text, text) for row, text in enumerate(texts)]
    write_items(passages, root / "data" / "wikipedia.parquet")
    last_words = [
        Item(f"lambada-{row}", f"lambada-{row}", "The river flows into the", (" sea",), 0)
        for row in range(12)
    ]
    write_items(last_words, root / "data" / "lambada.parquet")
    sample, toggles = calibration.sample, calibration.toggles
    sample.save(root / "calibration" / SAMPLE_FILE)
    toggles.save(root / "calibration" / TOGGLES_FILE)
    calibration.outputs.save(root / "calibration" / OUTPUTS_FILE)
    write_held_out_toggles(root, toggles, ["calibration", "lambada"])
    for name in ("needed", "pooled"):
        path = null_path(root / "calibration", name)
        save_null(calibration.nulls[name], sample, path, toggles)
    return root


def _data(name):
    return (ROOT / "tests" / "data_files" / name).read_text(encoding="utf-8").splitlines()


def _write_config(root, analysis):
    local = {"kind": "local", "path": "unused"}
    config = {
        "study": "test",
        "model": {"path": str(ROOT / "resources" / "olmoe-nano")},
        "calibration": {"source": local, "nulls": ["needed", "pooled"]},
        "datasets": {"wikipedia": {"source": local}, "lambada": {"source": local}},
        "strategies": ["stock", "bh_k8_a010"],
        "statistics": {"primary": {"strategy": "bh_k8_a010", "dataset": "lambada"}},
        "analysis": {"resamples": 100, **analysis},
    }  # fmt: skip
    (root / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def config(results):
    return load_config(results / "config.yaml")


@pytest.fixture(scope="module")
def baseline(results, config):
    return write_baseline(config, results)


@pytest.fixture(scope="module")
def bh(results, config):
    return write_bh(config, results)


@pytest.fixture(scope="module")
def ablation(results, config, calibration):
    files, texts = HeldOutFiles(results), config.held_out_texts
    write_held_out(files, calibration.toggles, texts)
    return write_ablation(config, results)


@pytest.fixture(scope="module")
def validity(results, config, baseline):
    return write_validity(config, results)


@pytest.mark.parametrize(
    ("outputs", "run", "draw"),
    [
        (BASELINE, "baseline", draw_baseline),
        (BH, "bh", draw_bh),
        (VALIDITY, "validity", draw_validity),
        (ABLATION, "ablation", draw_ablation),
    ],
)
def test_exactly_the_promised_files_are_made(results, request, outputs, run, draw):
    request.getfixturevalue(run)
    folder = results / outputs.name
    draw(folder)
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files == set(outputs.files)
    plots = folder / f"{outputs.name}_plots"
    expected = {f"{name}.{suffix}" for name in outputs.plots for suffix in ("png", "svg")}
    assert {path.name for path in plots.iterdir()} == expected
    assert all(path.stat().st_size > 2000 for path in plots.iterdir())
    assert outputs.plot_paths(str(results), "png")[0] == str(plots / f"{outputs.plots[0]}.png")


def test_the_figures_are_those_that_were_asked_for():
    assert len(BASELINE.plots) == 4
    assert len(BH.plots) == 7
    assert BH.plots[-4:] == (
        "bh_vs_topk_by_max_k", "heatmap_alpha_max_k", "saturation_curve", "reduction_percent",
    )  # fmt: skip


def test_by_default_a_null_has_16_rows():
    study = AnalysisConfig().of_model(experts=64, top_k=8).bh
    assert len(study.max_k) * (len(study.alpha) + 1) == 16


def test_baseline_has_a_row_a_layer_and_the_capture_behind_it(results, nano, baseline):
    assert baseline["layer"].tolist() == list(range(16))
    text = Capture.load(results / "baseline" / "router_logits.safetensors")
    assert baseline["n_tokens"].iloc[0] == text.tokens >= 400
    largest = text.logits_LTE.double().softmax(-1).amax(-1).mean(1)
    assert np.allclose(baseline["avg_max_weight"], largest, atol=1e-6)
    prompts = pd.read_csv(results / "baseline" / "baseline_prompts.csv")
    assert prompts["prompt"].nunique() == 3
    assert len(prompts) == 3 * 16
    usage = pd.read_csv(results / "baseline" / "prompt_usage.csv")
    for prompt, rows in prompts.groupby("prompt"):
        tokens = len(nano.tokenizer(prompt)["input_ids"])
        assert set(rows["n_tokens"]) == {tokens}
        assert usage.loc[usage["prompt"] == prompt, "tokens"].sum() == 16 * tokens * 8
    findings = json.loads((results / "baseline" / "baseline_findings.json").read_text())
    assert findings["ease_and_weight"]["n_tokens"] == text.tokens


def test_bh_rows_and_top_k_rows(bh):
    assert bh["strategy"].tolist() == ["bh_k4_a010", "bh_k64_a010", "regular_k4", "regular_k64"]
    assert set(bh["null"]) == {"needed"}
    top = bh[bh["kind"] == "topk"]
    assert np.allclose(top["mean_experts"], top["max_k"])
    assert np.allclose(top["reduction_pct"], 0.0)
    tested = bh[bh["kind"] == "bh"]
    assert (tested["mean_experts"] <= tested["max_k"]).all()
    assert (tested["mean_experts_low"] <= tested["mean_experts"] + 1e-9).all()
    assert np.allclose(tested["reduction_pct"], 100 * (1 - tested["mean_experts"] / [4, 64]))
    assert (bh["generation_tokens"] == 3).all()


def test_generation_has_the_spread_and_binding_of_its_own_steps(results, bh):
    """Of the histogram of 3 tokens in 16 layers, by hand."""
    row = bh.set_index("strategy").loc["bh_k4_a010"]
    layers = pd.read_csv(results / "bh" / "binding_by_layer.csv").query("max_k == 4")
    steps = layers[layers["text"] == "generation"]
    assert set(steps["n_tokens"]) == {3}
    assert row["generation_mean_experts"] == pytest.approx(steps["mean_experts"].mean())
    for name in ("floor_proportion", "cap_proportion", "empty_proportion"):
        assert row[f"generation_{name}"] == pytest.approx(steps[name].mean())
        assert np.allclose(steps[name] * 3, (steps[name] * 3).round())
    quantiles = row[[f"generation_{name}" for name in ("q05", "q25", "median", "q75", "q95")]]
    assert quantiles.is_monotonic_increasing
    assert 1 <= quantiles.min() <= quantiles.max() <= 4
    assert (row["generation_sd_experts"] > 0) == (row["generation_mean_experts"] > 1)
    top = bh.set_index("strategy").loc["regular_k4"]
    assert (top["generation_sd_experts"], top["generation_q05"], top["generation_q95"]) == (0, 4, 4)


def test_binding_by_layer_is_what_the_shares_are_made_of(results, bh):
    layers = pd.read_csv(results / "bh" / "binding_by_layer.csv")
    assert layers.columns.tolist() == [
        "null", "max_k", "alpha", "text", "layer", "mean_experts", "floor_proportion",
        "cap_proportion", "empty_proportion", "n_tokens",
    ]  # fmt: skip
    assert len(layers) == 2 * 2 * 16
    text = layers[layers["text"] == "evaluation"].groupby("max_k")
    tested = bh[bh["kind"] == "bh"].set_index("max_k")
    for name in ("mean_experts", "floor_proportion", "cap_proportion", "empty_proportion"):
        assert np.allclose(text[name].mean(), tested[name])
    assert text["empty_proportion"].nunique().min() > 1
    # The first layer sees the same tokens whatever the cap; at 64 no cap can bind.
    first = layers.query("text == 'evaluation' and layer == 0").set_index("max_k")
    assert first["empty_proportion"].nunique() == 1
    assert first.loc[4, "cap_proportion"] > first.loc[64, "cap_proportion"] == 0


def test_perplexity_is_that_of_the_cells(results, config, nano, calibration, bh):
    items = first_items(read_text(config, results), nano.tokenizer, 300)
    frame = score_items(
        nano, parse_strategy("bh_k4_a010"), items, "wikipedia", config, calibration
    ).items
    rng = np.random.default_rng(0)
    estimate = metric_intervals(frame, "perplexity", confidence=0.95, resamples=100, rng=rng)[0]
    row = bh[bh["strategy"] == "bh_k4_a010"].iloc[0]
    assert row["token_perplexity"] == pytest.approx(estimate.value, rel=1e-5)
    assert row["n_documents"] == len(items)


@pytest.mark.parametrize("strategy", ["bh_k4_a010_pooled", "regular_k4"])
def test_cells_count_floor_and_cap_where_they_bind(results, config, nano, calibration, strategy):
    items = read_items(results / "data" / "wikipedia.parquet")
    scored = score_items(nano, parse_strategy(strategy), items, "wikipedia", config, calibration)
    routing = RoutingSummary.of(scored.statistics)
    histogram_C = np.sum(routing.by_layer["count_histogram"], axis=0)
    at_one, at_four = histogram_C[[1, 4]] / histogram_C.sum()
    if strategy == "regular_k4":
        assert (at_four, routing.floor_proportion, routing.cap_proportion) == (1.0, 0.0, 0.0)
    else:
        # Where the rule itself wants one expert, the floor of one does not bind.
        assert 0 < routing.empty_proportion == routing.floor_proportion < at_one
        assert routing.cap_proportion < at_four


def test_tables_and_captions_name_data_set_and_window(results, nano, bh, baseline):
    window = nano.model.config.max_position_embeddings
    static = pd.read_csv(results / "bh" / "bh_static_curve.csv")
    for table in (bh, static, baseline):
        assert list(table)[-2:] == ["dataset", "window"]
        assert set(table["dataset"]) == {"wikipedia"}
        assert set(table["window"]) == {window}
    for caption in (text_caption(bh), text_caption(baseline)):
        assert caption.startswith(f"Wikipedia, window {window:,}: ")


def test_likelihoods_that_are_not_finite_stop_the_deep_dive(results, config, nano, calibration):
    broken = copy.deepcopy(nano.model)
    with torch.no_grad():
        broken.get_output_embeddings().weight[-1] = torch.nan
    items = read_text(config, results)[:1]
    with pytest.raises(InputError, match="regular_k8 on wikipedia: the log-likelihood"):
        run_arm(
            replace(nano, model=broken), parse_strategy("regular_k8"), items, calibration, config
        )


def test_router_logits_that_are_not_finite_stop_the_deep_dive(
    results, config, nano, calibration, monkeypatch
):
    """As on an accelerator, where the router itself does not look."""

    def spoilt(self):
        statistics = super(UnionRecorder, self).statistics()
        entropy_L = statistics.entropy_L.copy()
        entropy_L[3] = np.nan
        return replace(statistics, entropy_L=entropy_L)

    monkeypatch.setattr(UnionRecorder, "statistics", spoilt, raising=False)
    items = read_text(config, results)[:1]
    with pytest.raises(InputError, match="router logits of layer 3 are not finite"):
        run_arm(nano, parse_strategy("regular_k8"), items, calibration, config)


def test_the_advice_covers_every_arm_but_the_baseline(results, bh):
    advice = json.loads((results / "bh" / "recommendation.json").read_text())
    arms = {"regular_k1", "regular_k4", "regular_k64", "bh_k4_a010", "bh_k64_a010"}
    assert set(advice["differences"]) == arms
    assert advice["baseline"]["strategy"] == "regular_k8"
    assert advice["statement"]


def test_the_saturation_curve_is_made_of_the_widest_run(results, bh):
    curve = pd.read_csv(results / "bh" / "bh_saturation.csv")
    assert curve["max_k"].tolist() == list(range(1, 65))
    assert curve["mean_experts"].is_monotonic_increasing
    widest = bh.set_index("strategy").loc["bh_k64_a010", "mean_experts"]
    assert curve["mean_experts"].iloc[-1] == pytest.approx(widest)
    assert curve.loc[curve["max_k"] == 64, "measured"].item() == pytest.approx(widest)


def test_verdicts_cover_the_nulls_asked_for(results, validity):
    assert validity["null"].tolist() == ["pooled", "within_token"]
    assert validity.loc[0, "worst_size"] < 0.12  # a marginal null, whatever the weights
    designs = pd.read_csv(results / "validity" / "verdict_by_design.csv")
    assert (~designs["if_noise"]).sum() == validity["n_designs"].sum()
    assert (designs["layers"] == 16).all()
    broken = designs[designs["breaks"].notna()]
    assert broken[["null", "design", "if_noise"]].to_numpy().tolist() == [
        ["within_token", "real_marginal", True],
        ["within_token", "real_copula", True],
    ]


def test_the_null_of_the_study_is_verified_on_every_text(results, validity):
    rates = pd.read_csv(results / "validity" / "false_discoveries.csv")
    assert rates["text"].unique().tolist() == ["calibration", "lambada"]
    assert set(rates["procedure"]) == {"bh", "by", "block_exact"}
    assert rates["layer"].nunique() == 17
    # Tested on the very documents of the calibration.
    rule = rates[(rates["part"] == "rule") & (rates["layer"] == "all")]
    assert (rule["fdr"] <= rule["alpha"] * 1.3).all()
    worst = pd.read_csv(results / "validity" / "worst_experts.csv")
    assert set(worst["alpha"]) == {0.1}
    assert set(worst["max_k"]) == {8}
    dead = pd.read_csv(results / "validity" / "dead_experts.csv")
    assert set(dead["dead"]) == {2 / 64}
    assert (dead["dead_slots"] <= dead["fdr"] + 0.05).all()


def test_too_few_tokens_for_a_verdict_are_one_line(config, calibration, rng):
    settings = config.analysis.validity.model_copy(update={"nulls": ["per_expert"]})
    analysis = config.analysis.model_copy(update={"validity": settings})
    with pytest.raises(InputError) as caught:
        design_sizes(config.model_copy(update={"analysis": analysis}), calibration.sample, rng)
    assert str(caught.value) == (
        "analysis.validity.tokens is 256; allowed: more, since null 'per_expert' then has 512 "
        "draws and a verdict at level 0.05 needs 1280"
    )


def test_the_ablation_judges_every_null_by_the_same_toggles(results, calibration, ablation):
    decisions = calibration.toggles.logits_LTE.shape[:2].numel()
    overall = ablation[ablation["layer"] == "all"]
    assert overall.groupby("null", sort=False)["alpha"].nunique().to_dict() == {
        "none": 0, "needed": 2, "pooled": 2,
    }  # fmt: skip
    assert set(overall["n_decisions"]) == {decisions}
    stock = overall[(overall["null"] == "none") & (overall["part"] == "removed")]
    assert set(stock["n_discoveries"]) == {8 * decisions}
    # Fitted on the same toggles, the null needed holds almost by construction.
    rows = overall.query("null == 'needed' and part == 'all' and effect == 'kl' and primary")
    assert (rows["fdr"] <= rows["alpha"] + 0.02).all()
    assert (rows["n_discoveries"] > 0).all()


def test_the_other_tables_of_the_ablation_name_their_text(results, ablation):
    tables = {
        name: pd.read_csv(results / "ablation" / f"{name}.csv")
        for name in ("needed_experts", "class_contrasts", "presence", "joint_removals", "headroom")
    }
    for table in tables.values():
        assert table["text"].unique().tolist() == ["calibration", "lambada"]
    states = pd.read_csv(results / "ablation" / "states.csv")
    assert states.groupby("states", sort=False).size().to_dict() == {"stock": 17, "routed": 17}
    assert set(states["strategy"]) == {"bh_k8_a010"}
    missed = pd.read_csv(results / "ablation" / "left_out.csv")
    arm = missed[missed["bounded"]]
    assert set(arm["strategy"]) == {"bh_k8_a010"}
    assert set(missed.loc[~missed["bounded"], "strategy"]) == {
        "bh_k64_a001", "bh_k64_a010", "bh_k64_a001_pooled", "bh_k64_a010_pooled",
    }  # fmt: skip


def test_too_few_calibration_tokens_stop_the_ablation(results, config, ablation):
    settings = config.analysis.ablation.model_copy(update={"alpha": [1e-6]})
    analysis = config.analysis.model_copy(update={"ablation": settings})
    with pytest.raises(InputError, match="calibration draws; allowed: at least 640") as caught:
        write_ablation(config.model_copy(update={"analysis": analysis}), results)
    assert "\n" not in str(caught.value)


def test_too_few_calibration_tokens_stop_bh_before_any_text_is_scored(results, config, monkeypatch):
    settings = config.analysis.bh.model_copy(update={"alpha": [0.1, 1e-6]})
    analysis = config.analysis.model_copy(update={"bh": settings})
    monkeypatch.setattr("moe_routing.analysis.bh.run_arm", _must_not_run)
    with pytest.raises(
        InputError, match=f"has {112 * 64} calibration draws; allowed: at least 640"
    ) as caught:
        write_bh(config.model_copy(update={"analysis": analysis}), results)
    assert "\n" not in str(caught.value)


def _must_not_run(*_):
    pytest.fail("ran before the check")


@pytest.mark.parametrize("draw", [draw_baseline, draw_bh, draw_validity, draw_ablation])
def test_figures_before_their_tables_are_an_error(tmp_path, draw):
    with pytest.raises(InputError, match="no such file"):
        draw(tmp_path)


def test_a_script_says_so_in_one_line(tmp_path, run_script):
    code, _, said = run_script("analyse.py", "bh", "--results", tmp_path, "--figures")
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_of_each_null_the_arm_that_asks_most_is_built_first():
    names = ["regular_k4", "bh_k8_a010", "bh_k64_a001", "bh_k8_a001", "bh_k8_a005_pooled"]
    found = most_demanding([parse_strategy(name) for name in names])
    assert [arm.id for arm in found] == ["regular_k4", "bh_k64_a001", "bh_k8_a005_pooled"]
