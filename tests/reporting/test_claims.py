"""No sentence against a table: every comparison in the text is held against the numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from planted_budgets import BETTER, EQUAL, FIXED, LOSS, WORSE

from moe_routing.errors import InputError
from moe_routing.reporting.article import Article
from moe_routing.reporting.claims import Finding, hold
from moe_routing.reporting.comparison_report import comparison_report
from moe_routing.reporting.plan import TOPICS, findings_on

REPORT = Path(__file__).resolve().parents[2] / "report"


@pytest.fixture(scope="module")
def study(at_budgets):
    """A study with a rule better than a fixed number at its budget, one equal and one worse."""
    return at_budgets


def everything(study):
    return [finding for topic in TOPICS for finding in findings_on(study, [topic])]


def turned(study, name, column):
    """Return the study with the differences of one table negated, as if a column were damaged."""
    table = study.statistics[name]
    negated = table.assign(**{column: -table[column]})
    return replace(study, statistics={**study.statistics, name: negated})


def test_every_claim_is_borne_by_its_table(study, planted):
    for one in (study, planted):
        assert hold(everything(one), one.statistics, 0.05) > 30


@pytest.mark.parametrize(
    ("topic", "name", "column"),
    [
        ("primary", "primary", "difference"),
        ("budgets", "matched_budgets", "versus_static"),
        ("baseline", "paired", "difference"),
        ("controls", "controls", "difference"),
        ("levers", "levers", "difference"),
    ],
)
def test_a_sentence_against_its_table_stops_the_text(study, topic, name, column):
    assert findings_on(study, [topic])
    with pytest.raises(InputError, match=rf"statistics/{name}.csv: the verdict on .* numbers say"):
        findings_on(turned(study, name, column), [topic])
    with pytest.raises(InputError, match="numbers say"):
        Article(turned(study, name, column)).say(topic)


def test_a_comparison_at_matched_compute_is_held_too(planted):
    with pytest.raises(InputError, match=r"the verdict on .* numbers say"):
        findings_on(turned(planted, "matched_compute", "difference"), ["matched_summary"])


def test_a_difference_that_is_not_significant_is_no_difference(study):
    table = study.statistics["primary"].assign(p_value=0.2)
    said = replace(study, statistics={**study.statistics, "primary": table})
    with pytest.raises(InputError, match="is 'better' and its numbers say 'open'"):
        findings_on(said, ["in_short"])


def test_a_claim_without_a_row_stops_the_text(study):
    claim = replace(findings_on(study, ["primary"])[0].claims[0], strategy="regular_k5")
    with pytest.raises(InputError, match="its numbers say 'nothing'"):
        hold([Finding("Text.", claim.source, claims=(claim,))], study.statistics, 0.05)


COMPARES = re.compile(
    r"\b(better|worse|more accurate|less accurate|helped|cost quality|lost least|"
    r"no difference|not shown to differ)\b"
)
ELSEWHERE = {
    "missing", "recommendation", "router", "specialisation", "held_out", "dead", "validity",
    "procedures", "ablation", "left_out", "needs", "headroom", "law", "held_out_short", "binding",
    "pareto", "pareto_time", "time", "fewest", "chance", "numerics",
}  # fmt: skip
"""Topics whose sentences do not come from paired comparisons of strategies."""


def test_a_sentence_that_compares_carries_its_claims(study, planted):
    for one in (study, planted):
        for topic in set(TOPICS) - ELSEWHERE:
            for finding in findings_on(one, [topic]):
                if COMPARES.search(finding.text):
                    assert finding.claims, (topic, finding.text)


def test_prose_of_the_page_makes_no_comparison_of_its_own():
    """What the page itself says of strategies is definitions; results come from findings."""
    text = (REPORT / "index.qmd").read_text(encoding="utf-8")
    main = text.split("# Results {#sec-results}")[1].split("# Reproducibility")[0]
    prose = re.sub(r"`\{python\}[^`]*`|```.*?```", "", main, flags=re.DOTALL)
    assert not COMPARES.search(prose)


@pytest.mark.parametrize(
    ("strategy", "verdict"), [(BETTER, "better"), (EQUAL, "inconclusive"), (WORSE, "worse")]
)
def test_rules_at_equal_budget_get_the_planted_verdict(study, strategy, verdict):
    table = study.statistics["matched_budgets"].set_index(["strategy", "dataset"])
    row = table.loc[strategy, "wikipedia"]
    assert row["verdict"] == verdict
    assert row["loss_over_stock"] == pytest.approx(LOSS[strategy], abs=1e-6)
    fixed = {4.0: LOSS["regular_k4"], 4.5: FIXED}[row["mean_experts"]]
    assert row["versus_static"] == pytest.approx(LOSS[strategy] - fixed, abs=1e-6)


def test_prose_abstract_and_tables_say_the_right_thing(study):
    article = Article(study)
    best = "one threshold on predicted consequence"
    abstract, conclusion = article.plain("abstract"), article.plain("conclusion")
    assert f"At a budget of 3 experts, {best} lost least. It was better on" in abstract
    assert f"no rule lost less than {best}." in conclusion
    assert "BH routing did better than a fixed number at equal cost on Wikipedia, by" in abstract
    assert "On Wikipedia, BH routing did better than a fixed number at equal cost." in conclusion
    assert "is better than a fixed number at equal cost: its loss" in article.plain("in_short")
    budgets = article.say("budgets")
    said = (
        "2 of 4 settings were better than a fixed number of experts at the same mean (by loss), and"
    )
    assert f"{said} 1 was worse." in budgets
    assert re.search(r"one threshold by consequence \| 4 \| \+0\.020", article.table("tbl-budgets"))
    short = comparison_report(study)
    assert f"{best} lost least on Wikipedia: +0.020 nats per token" in short


def test_primary_contrast_is_at_equal_budget_and_can_go_either_way(study):
    (row,) = study.statistics["primary"].itertuples()
    assert (row.strategy, row.against) == ("bh_k8_b4", "mixture.bh_k8_b4")
    assert row.difference == pytest.approx(0.05 - FIXED, abs=1e-6)
    assert row.verdict == "better"
    assert row.pilot == "mixture.bh_k8_b4 against shuffle.bh_k8_b4"


def test_controls_of_a_rule_at_a_budget_are_compared_with_it(study):
    """Their base is no strategy of the comparison, but its cells are there."""
    rows = study.statistics["controls"].query("base == 'bh_k8_b4'")
    assert set(rows["strategy"]) == {"mixture.bh_k8_b4", "shuffle.bh_k8_b4"}
    said = Article(study).say("controls_short")
    assert said.startswith(
        "Compared with BH routing (`bh_k8_b4`), a control with counts shuffled over tokens was "
    )
    assert "better on LAMBADA" in said
    assert "`shuffle.bh_k8_b4`" in Article(study).table("tbl-controls-primary")


def test_a_set_at_chance_in_accuracy_is_told_by_its_likelihood(study):
    """By likelihood the worse rule is worse; a sentence never says "none" for the set."""
    text = next(f.text for f in findings_on(study, ["budgets"]) if "HellaSwag" in f.text)
    assert "(by bits per byte of the right continuation)" in text
    for finding in findings_on(study, ["baseline"]):
        assert "by bits per byte" in finding.text or "by loss" in finding.text
        assert "none could be shown to differ" not in finding.text


def test_a_set_that_shows_the_reverse_is_told_apart(study):
    found = {f.text.split(",")[0]: f for f in findings_on(study, ["budgets"])}
    assert found["On LAMBADA"].verdict == "mixed"
    text = Article(study).plain("conclusion")
    assert "better on Wikipedia and HellaSwag and worse on LAMBADA" in text


def test_a_metric_at_chance_is_grey_and_never_bold(study):
    article = Article(study)
    column = [row.split(" | ")[1:] for row in article.table("tbl-accuracy").splitlines()[2:5]]
    assert all("at-chance" in cell for row in column for cell in row[:2])
    assert "**" not in article.table("tbl-accuracy").split("at-chance")[0]


def test_the_same_routing_is_counted_once(study):
    paired = study.statistics["paired"]
    again = paired.assign(strategy="regular_k5", same_as="regular_k4")
    twice = replace(study, statistics={**study.statistics, "paired": pd.concat([paired, again])})
    texts = [finding.text for finding in findings_on(study, ["baseline"])]
    assert [finding.text for finding in findings_on(twice, ["baseline"])] == texts


def test_time_is_told_from_repeats_and_never_from_cells(study):
    none = {"timing": pd.DataFrame(), "pareto_time": pd.DataFrame()}
    untimed = replace(study, statistics={**study.statistics, **none})
    assert findings_on(untimed, ["time", "pareto_time"]) == []
    rows = [
        {"strategy": name, "repeats": 5, "median_seconds": ratio, "low": ratio, "high": ratio,
         "seconds_per_1000_tokens": 1.0, "ratio": ratio, "ratio_low": low, "ratio_high": high}
        for name, ratio, low, high in (
            ("stock", 1, 1, 1), ("regular_k8", 1.01, 0.98, 1.03), ("regular_k4", 0.8, 0.7, 0.9),
            ("regular_k1", 0.5, 0.4, 0.6), (WORSE, 1.0, 0.9, 1.1),
        )
    ]  # fmt: skip
    timed = replace(study, statistics={**study.statistics, "timing": pd.DataFrame(rows)})
    (finding,) = findings_on(timed, ["time"])
    assert "2 of 3 settings took less time than `stock` and 0 took more" in finding.text
    assert "Chance alone would make about 0 of them differ" in finding.text
    assert "The least work, `regular_k1`, took 0.50 [0.40, 0.60] times as long" in finding.text
    assert "The same routing under another id did not differ." in finding.text
    table = pd.DataFrame(rows)
    table.loc[1, "ratio_low"] = 1.005
    apart = replace(study, statistics={**study.statistics, "timing": table})
    assert "so the measure is not reliable" in findings_on(apart, ["time"])[0].text


def test_documents_of_one_source_are_not_called_unrelated(planted):
    said = str(Article(planted).text("nulls"))
    assert "Their documents are in no evaluation set, but of the same source as those of" in said
    other = planted.config.datasets["wikipedia"].source.model_copy(update={"path": "other.jsonl"})
    datasets = {
        name: one.model_copy(update={"source": other})
        for name, one in planted.config.datasets.items()
    }
    config = planted.config.model_copy(update={"datasets": datasets})
    assert "same source" not in str(Article(replace(planted, config=config)).text("nulls"))


def test_claims_are_part_of_a_finding():
    assert Finding("Text.", "file.csv").claims == ()
