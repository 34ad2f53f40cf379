"""Known effects are found, known nothings are not: in tables, sentences and the article's text."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
from planted_results import EFFECTS, STRATEGIES, make_study, planted_config

from moe_routing.analysis.tables import write_csv
from moe_routing.reporting import findings
from moe_routing.reporting.article import Article
from moe_routing.reporting.comparison_report import comparison_report
from moe_routing.reporting.plan import findings_on
from moe_routing.reporting.tables import divergence_table, results_table

LOSS, GAIN, ZERO = "bh_k8_a005", "bh_k16_a005", "bh_k64_a005"


def test_table_marks_exactly_the_planted_effects(planted):
    table = results_table(planted)
    for column in table.columns[3:]:
        marked = {
            name.strip("`")
            for name, value in zip(table["Strategy"], table[column], strict=True)
            if "\N{DAGGER}" in value
        }
        assert marked == set(EFFECTS)
        best = table.loc[table[column].str.startswith("**"), "Strategy"]
        assert list(best) == [f"`{GAIN}`"]


def test_summaries_count_the_planted_effects(planted):
    found = findings.against_baseline(
        planted.statistics["paired"], planted.statistics["noninferiority"]
    )
    assert len(found) == 3
    for finding in found:
        assert finding.text.startswith("Of 8 other settings on ")
        assert ", 1 was better (`bh_k16_a005`), 3 worse (" in finding.text
        assert " and 4 not shown to differ" in finding.text


def test_abstract_and_prose_never_contradict_the_table(planted):
    text = Article(planted).say("primary") + comparison_report(planted)
    assert "was less accurate than the stock model" in text
    assert "was more accurate than the stock model" not in text


def test_report_names_model_data_nulls_and_weighting(planted):
    text = comparison_report(planted)
    assert text.startswith("# Routing strategies compared: olmoe-nano")
    assert "a small model (olmoe-nano, 16 million parameters)" in text
    assert "1,500 (HellaSwag)" in text
    assert "BH at 0.05, at most 8, null needed, weights softmax" in text
    assert "| Strategy | What it is | Mean experts | Wikipedia" in text
    assert "![" in text


def test_another_study_is_named_by_its_own_files(tmp_path):
    model = {"path": "allenai/OLMoE-1B-7B-0924", "revision": "a" * 40}
    config = planted_config(
        study="real",
        datasets=("wikitext", "lambada"),
        primary=("bh_k8_a005", "lambada"),
        model=model,
        strategies=("stock", "regular_k4", "bh_k8_a005"),
    )
    study = make_study(tmp_path / "real", config, {"bh_k8_a005": -0.03}, parameters=6_919_096_320)
    article = Article(study)
    text = comparison_report(study)
    assert article.model == "OLMoE-1B-7B-0924"
    assert "small" not in article.model + article.scope
    assert "WikiText-2" in text
    assert "Wikipedia" not in text
    assert article.command == "`snakemake --cores all --configfile results/real/config.yaml`"
    (study.folder / "run.json").write_text('{"config_file": "config/olmoe.yaml"}')
    assert article.command == "`snakemake --cores all --configfile config/olmoe.yaml`"
    (study.folder / "run.json").write_text('{"config_file": "config/config.yaml"}')
    assert article.command == "`snakemake --cores all`"
    missing = article.listing("missing")
    assert "no static top-k with uniform weights and no adaptive top-k" in missing
    assert "no data set of multiple choice (HellaSwag)" in missing
    assert "| Strategy | What it is | Mean experts | WikiText-2" in text
    assert "HellaSwag" not in text.split("## What is missing")[0]


def test_planted_controls_say_what_was_planted(planted):
    article = Article(planted)
    found = {finding.text.split(",")[0]: finding for finding in findings_on(planted, ["controls"])}
    verdicts = [finding.verdict for finding in found.values()]
    assert verdicts == ["worse", "none", "worse", "better", "worse"]  # in the order of the text
    for text in (article.listing("controls"), comparison_report(planted)):
        assert "Which tokens get more experts matters." in text
        assert "Nothing shows that numbers by token do better than numbers by layer" in text
        assert "It matters which experts are chosen." in text
        assert "These weights are better than the strategy's own" in text
        assert "With the rule of `topp_k8_p050` in place of that of `stock`" in text


def test_planted_rival_is_compared_at_matched_compute(planted):
    """Static top-k at 4.5 experts, between 4 and 8, loses 8.75 points; the rival loses 20."""
    rows = planted.statistics["matched_compute"].query("strategy == 'topp_k8_p050' and main")
    row = rows.set_index("dataset").loc["hellaswag"]
    assert (row["mean_experts"], row["static_family"]) == (4.5, "regular")
    assert row["difference"] == pytest.approx(0.0875 - 0.20, abs=1e-3)
    said = "Top-p was worse than static top-k with softmax weights and the same mean number of "
    for text in (Article(planted).listing("matched_summary"), comparison_report(planted)):
        assert f"{said}experts in 3 of 3 comparisons." in text
    assert "topp_k8_p050" not in results_table(planted)["Strategy"].str.cat()


def test_planted_static_curve_reaches_from_one_expert_to_all(planted):
    article = Article(planted)
    assert list(planted.static_curve["k"].unique()) == [1, 4, 8, 64]
    table = article.table("tbl-static")
    points = {"regular_k1": 1, "regular_k4": 4, "stock": 8, "regular_k64": 64}
    assert all(f"`{name}` | {k} |" in table for name, k in points.items())
    said = article.listing("static_curve").replace("\N{NO-BREAK SPACE}", " ")
    assert said.count("More static experts were worse at k = 64.") == 3


def test_planted_noise_is_measured_and_no_smaller_than_it(planted):
    article = Article(planted)
    said = article.listing("numerics")
    assert "the implementation of the experts (eager) or the number format (bfloat16)" in said
    assert "Wikipedia by up to 0.002 nats per token" in said
    assert "HellaSwag by up to 0.067 percentage points (5 items flipped)" in said
    assert "All 12 differences shown against the baseline exceed the numerical noise floor" in said
    assert "{#tbl-numerics}" in article.table("tbl-numerics")


def test_without_an_arm_in_another_format_the_article_says_so(planted):
    said = "the effect of half precision on these results is not known"
    assert said not in Article(planted).listing("missing")
    numerics = planted.statistics["numerics"]
    numerics = numerics[numerics["arm"] == "eager"]
    study = replace(planted, statistics={**planted.statistics, "numerics": numerics})
    assert said in Article(study).listing("missing")


def test_divergence_of_every_strategy_is_in_the_table(planted):
    table = divergence_table(planted).set_index("Strategy")
    assert list(table.columns) == ["Wikipedia (n = 150)", "HellaSwag (n = 1,500)",
                                   "LAMBADA (n = 1,500)"]  # fmt: skip
    assert set(table.index) == {f"`{name}`" for name in STRATEGIES} - {"`stock`", "`regular_k8`"}
    assert table.loc["`bh_k8_a005`"].str.startswith("0.00300 [0.0029").all()
    said = Article(planted).say("divergence")
    assert "0 to 0.01 on HellaSwag" in said
    assert "## Divergence from the baseline's predictions" in comparison_report(planted)


def test_what_was_not_scored_beside_the_comparison_is_said(tmp_path):
    config = planted_config(strategies=("stock", "regular_k4", "bh_k8_a005"))
    config = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"kl_items": 0})}
    )
    study = make_study(tmp_path / "s", config)
    article = Article(study)
    missing = article.listing("missing")
    assert "Of the controls, this run lacks the longer static curve, counts shuffled" in missing
    assert "the numerical noise floor is not known" in missing
    assert "Divergence from the baseline's predictions was not measured." in missing
    assert article.table("tbl-controls") == "*Not made: no controls were scored.*"
    assert article.table("tbl-numerics").startswith("*Not made: the baseline was not scored again")
    assert article.listing("controls", "None.") == "None."
    assert "KL" not in article.table("tbl-results")
    assert list(study.static_curve["k"].unique()) == [4, 8]
    assert study.static_curve["value"].dtype == float
    assert "Controls" not in comparison_report(study)


def test_one_data_set_is_enough_and_the_others_are_missed(tmp_path):
    config = planted_config(
        datasets=("lambada",),
        primary=("bh_k8_a005", "lambada"),
        strategies=("stock", "regular_k4", "bh_k8_a005"),
    )
    article = Article(make_study(tmp_path / "one", config, {"bh_k8_a005": -0.03}))
    assert article.datasets == "LAMBADA (1,500 items)"
    assert "was less accurate than the stock model" in article.say("primary")
    missing = article.listing("missing")
    assert "no data set of running text (WikiText-2 or Wikipedia)" in missing
    assert "no data set of multiple choice (HellaSwag)" in missing


def test_without_bh_the_article_says_so(tmp_path):
    config = planted_config(
        strategies=("stock", "regular_k4", "uniform_k8"), primary=("uniform_k8", "hellaswag")
    )
    article = Article(make_study(tmp_path / "s", config))
    assert "no Benjamini-Hochberg routing" in article.table("tbl-routing")
    assert ", no adaptive top-k and no Benjamini-Hochberg routing." in article.listing("missing")
    assert article.say("binding", "None.") == "None."
    assert article.ref("tbl-routing", "elsewhere") == "elsewhere"
    assert article.figure("fig-layers").startswith("*Not drawn: no strategy of this run has")


def test_cells_of_different_code_are_said(tmp_path):
    study = make_study(tmp_path / "s", planted_config(strategies=("stock", "bh_k8_a005")))
    assert "the cells mix" not in Article(study).listing("missing")
    path = tmp_path / "s" / "comparison" / "provenance.csv"
    made_with = pd.read_csv(path, dtype=str)
    made_with.loc[0, ["code", "commit"]] = "a1"
    write_csv(made_with, path)
    n = len(made_with) - 1
    expected = f"Caution: the cells mix 2 versions of the code: a1 (1 cell), unknown ({n} cells)."
    assert expected in Article(study).listing("missing")
