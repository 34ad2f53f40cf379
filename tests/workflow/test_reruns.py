"""What an edit of the config makes again: planned on the finished smoke study, counted in cells."""

from __future__ import annotations

import copy
import re

import pytest
import yaml
from workflow_runs import snakemake

SETS = ("wikipedia", "hellaswag", "lambada")
STATIC = ("stock", "regular_k4", "regular_k8", "uniform_k4", "regular_k1")
CALIBRATED = (
    "adaptive_k8", "bh_k8_a005", "bh_k64_a005", "shuffle.bh_k8_a005", "counts.bh_k8_a005",
    "bh_k8_a005_mass-matched", "certified_k8_m005", "regular_k3_norm_own", "stock_scaled",
    "absolute_k8_b3_consequence_compensated_scaled", "topp_k8_b4", "bh_k8_b2",
)  # fmt: skip
CONTRASTED = {("mixture.bh_k8_a005", "hellaswag"), ("mixture.certified_k8_m005", "hellaswag")}
"""Scored where the contrasts are, with the mean experts of other cells."""
ARMS = ("bfloat16", "small_batches")
TABLES = {"collect", "statistics", "render_article"}
CALIBRATION = {
    "sample_logits", "toggle_experts", "fit_outputs", "fit_null", "fit_budget", "fit_scale",
    "certify",
}  # fmt: skip


@pytest.fixture(scope="module")
def plan(smoke_run):
    """A function that plans the finished study under an edit: jobs by rule, and cells."""
    folder = smoke_run[0]
    config = yaml.safe_load((folder / "config/smoke.yaml").read_text())

    def planned(edit):
        edited = copy.deepcopy(config)
        edit(edited)
        (folder / "edited.yaml").write_text(yaml.safe_dump(edited, sort_keys=False))
        done = snakemake(folder, "-n", "--configfile", "edited.yaml")
        assert done.returncode == 0, done.stdout + done.stderr
        text = done.stdout + done.stderr
        jobs = dict(re.findall(r"^(\w+) +(\d+)$", text, re.MULTILINE))
        cells = set(re.findall(r": Scoring (\S+) on (\w+) ", text))
        assert len(cells) == int(jobs.get("evaluate", 0))
        return set(jobs) - {"total"}, cells

    return planned


def cells_of(names, datasets=SETS):
    return {(name, dataset) for name in names for dataset in datasets}


@pytest.mark.parametrize(
    "changes", [{"confidence": 0.9}, {"resamples": 300, "margin_accuracy": 0.02}]
)
def test_statistics_score_nothing_again(plan, changes):
    jobs, cells = plan(lambda config: config["statistics"].update(changes))
    assert cells == set()
    assert "statistics" in jobs
    assert not CALIBRATION & jobs
    # Their intervals have the level of the others, and resamples of their own.
    analyses = {"baseline", "bh", "validity", "ablation"}
    assert analyses & jobs == (analyses if "confidence" in changes else set())


def test_resamples_of_the_analyses_make_nothing_else_again(plan):
    jobs, cells = plan(lambda config: config["analysis"].update(resamples=300))
    assert cells == set()
    assert {"baseline", "bh", "validity", "ablation"} <= jobs
    assert not (CALIBRATION | {"collect", "statistics", "toggle_held_out"}) & jobs


@pytest.mark.parametrize("strategy", ["bh_k8_a005", "bh_k64_a005"])
def test_another_primary_contrast_scores_nothing_again(plan, strategy):
    contrast = {"strategy": strategy, "dataset": "lambada"}
    jobs, cells = plan(lambda config: config["statistics"].update(primary=contrast))
    # What the sequence compares is scored on the set of the primary contrast.
    assert cells == {("mixture.certified_k8_m005", "lambada")}
    assert not (CALIBRATION | {"bh", "baseline"}) & jobs
    # The held-out interventions are on the experts that the primary strategy keeps.
    assert ("toggle_held_out" in jobs) == (strategy == "bh_k64_a005")
    assert "statistics" in jobs


def test_other_items_score_that_set_only(plan):
    jobs, cells = plan(lambda config: config["datasets"]["lambada"].update(items=7))
    assert cells == cells_of((*STATIC, *CALIBRATED, *ARMS), ["lambada"])
    assert not (CALIBRATION | {"prepare_calibration"}) & jobs
    assert TABLES | {"check_overlap"} <= jobs


def test_a_set_more_scores_that_set_only(plan):
    source = {"kind": "local", "path": "tests/data_files/wikitext.txt"}
    jobs, cells = plan(
        lambda config: config["datasets"].update(wikitext={"source": source, "items": 4})
    )
    assert cells == cells_of((*STATIC, *CALIBRATED, *ARMS), ["wikitext"])
    assert not (CALIBRATION | {"prepare_calibration"}) & jobs
    assert TABLES | {"check_overlap"} <= jobs


@pytest.mark.parametrize("key", ["tokens", "source"])
def test_other_calibration_scores_what_is_calibrated(plan, key):
    values = {
        "tokens": 2000,
        "source": {"kind": "local", "path": "tests/data_files/wikitext.txt"},
    }
    jobs, cells = plan(lambda config: config["calibration"].update({key: values[key]}))
    assert cells == cells_of(CALIBRATED) | CONTRASTED
    assert jobs >= CALIBRATION


def test_another_epsilon_scores_what_tests_against_it(plan):
    jobs, cells = plan(lambda config: config["calibration"].update(epsilon=3e-5))
    names = (
        "bh_k8_a005", "bh_k64_a005", "shuffle.bh_k8_a005", "counts.bh_k8_a005",
        "bh_k8_a005_mass-matched", "bh_k8_b2",
    )  # fmt: skip
    assert cells == cells_of(names) | {("mixture.bh_k8_a005", "hellaswag")}
    assert CALIBRATION & jobs == {"fit_null", "fit_budget"}
    assert "validity" in jobs  # it fits the null itself


def test_other_toggled_tokens_leave_the_logits(plan):
    jobs, cells = plan(lambda config: config["calibration"].update(toggled_tokens=24))
    assert {("bh_k8_a005", "lambada")} <= cells
    assert not cells & cells_of((*STATIC, "adaptive_k8"))
    assert not {"sample_logits", "fit_outputs"} & jobs


def test_grouping_resources_and_threads_make_nothing_again(plan):
    resources = {"strategies_per_job": 2, "mem_mb": 4000, "runtime": 9, "threads": 2}
    jobs, _ = plan(lambda config: config["resources"].update(resources))
    assert jobs == set()


@pytest.mark.parametrize(
    ("more", "made"),
    [
        (
            {"strategies": ["regular_k2", "bh_k16_a005"], "controls": ["topp_k8_p050"]},
            set(),
        ),
        ({"levers": ["regular_k4_scaled"], "budgets": ["topp_k8_b4_scaled"]}, {"fit_scale"}),
        ({"budgets": ["minp_k8_b3"]}, {"fit_budget"}),
    ],
)
def test_strategies_more_score_these_strategies_only(plan, more, made):
    def edit(config):
        for key, names in more.items():
            config[key] += names

    jobs, cells = plan(edit)
    assert cells == cells_of([name for names in more.values() for name in names])
    assert CALIBRATION & jobs == made
    assert jobs >= TABLES


def test_a_control_at_equal_budget_waits_for_its_base(plan):
    jobs, cells = plan(lambda config: config["controls"].append("layermean.topp_k8_b4"))
    assert cells == cells_of(["layermean.topp_k8_b4"])
    assert not CALIBRATION & jobs


def test_an_arm_more_scores_that_arm_only(plan):
    arm = {"name": "eager", "experts_implementation": "eager"}
    jobs, cells = plan(lambda config: config["numerics"].append(arm))
    assert cells == cells_of(["eager"])
    assert "statistics" in jobs


def test_a_set_or_a_strategy_less_scores_nothing(plan):
    def edit(config):
        config["strategies"].remove("uniform_k4")
        del config["datasets"]["lambada"]
        config["analysis"]["held_out"]["datasets"] = ["hellaswag"]

    jobs, cells = plan(edit)
    assert cells == set()
    assert not CALIBRATION & jobs
