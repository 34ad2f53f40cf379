"""No sentence against a table: every comparison in the text is held against the numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted_items import with_gold
from planted_results import planted_config, write_results

from moe_routing.analysis.tables import write_csv
from moe_routing.evaluation.collect import write_tables
from moe_routing.reporting.article import Article
from moe_routing.reporting.claims import Finding
from moe_routing.reporting.comparison_report import comparison_report
from moe_routing.reporting.plan import TOPICS, findings_on
from moe_routing.reporting.plots import write_plots
from moe_routing.reporting.qmd import run_page
from moe_routing.reporting.results import StudyResults
from moe_routing.statistics.study_tables import write_statistics
from moe_routing.vocabulary import METRICS

REPORT = Path(__file__).resolve().parents[2] / "report"
LEVEL = 0.05
VALUE = {
    "statistics/matched_budgets.csv": "versus_static",
    "statistics/matched_compute.csv": "difference",
}
"""The column of the difference, where it is not ``difference``; losses are turned already."""
LOSSES = ("statistics/matched_budgets.csv", "statistics/levers.csv")

# In nats, 4 experts for every token lose .10 and 4.5, between 4 and 8 (0), lose .0875. The
# thresholds use 4, the others 4.5. LAMBADA shows the reverse of the other sets. On HellaSwag only
# the likelihood moves: accuracy is at chance.
BETTER, EQUAL, WORSE = "absolute_k8_b3_consequence", "absolute_k8_b3", "topp_k8_b3"
FIXED = 0.0875
LOSS = {BETTER: 0.02, EQUAL: 0.10, WORSE: 0.20, "regular_k4": 0.10, "bh_k8_b4": 0.05,
        "mixture.bh_k8_b4": FIXED, "shuffle.bh_k8_b4": FIXED, "regular_k1": 0.30}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study with a rule better than a fixed number at its budget, one equal and one worse."""
    config = planted_config(
        strategies=("stock", "regular_k4", "regular_k8"),
        study="budgets",
        controls=["regular_k1", "mixture.bh_k8_b4", "shuffle.bh_k8_b4"],
        budgets=["bh_k8_b4", BETTER, EQUAL, WORSE],
        main={"hellaswag": "gold_bits_per_byte", "lambada": "gold_bits_per_byte"},
        statistics={
            "primary": {"strategy": "bh_k8_b4", "against": "mixture", "dataset": "wikipedia"},
            "resamples": 999,
        },
    )
    folder = tmp_path_factory.mktemp("budgets") / "budgets"
    write_results(folder, config, {name: -loss for name, loss in LOSS.items()}, items=400)
    rng = np.random.default_rng(0)
    for path in sorted((folder / "cells").glob("*/hellaswag.parquet")):
        items = pd.read_parquet(path)
        right = rng.random(len(items)) < 0.25
        items.assign(correct=right, correct_norm=right).to_parquet(path, index=False)
    stock = pd.read_parquet(folder / "cells" / "stock" / "lambada.parquet")["log_likelihood"]
    for path in sorted((folder / "cells").glob("*/lambada.parquet")):
        items = pd.read_parquet(path)
        turned = items.assign(log_likelihood=2 * stock - items["log_likelihood"])
        with_gold(turned).to_parquet(path, index=False)
    write_tables(config, folder)
    write_statistics(config, folder)
    found = StudyResults.load(folder)
    write_plots(found)
    return found


def row_of(study, claim):
    """Return the one row of a table that a claim is about."""
    table = pd.read_csv(study.folder / claim.source)
    chosen = table["strategy"].eq(claim.strategy) & table["dataset"].eq(claim.dataset)
    chosen &= table["metric"].eq(claim.metric)
    for name, value in claim.key:
        chosen &= table[name].astype(str).eq(value)
    assert chosen.sum() == 1, claim
    return table[chosen].iloc[0]


def contradiction(study, claim):
    """Return why the numbers of the table do not bear a claim; None if they do."""
    row = row_of(study, claim)
    value = row[VALUE.get(claim.source, "difference")]
    p = row["p_adjusted"] if "p_adjusted" in row else row["p_value"]
    higher = METRICS[claim.metric].higher_is_better and claim.source not in LOSSES
    better = (value > 0) == higher
    shown = p <= LEVEL and value != 0
    found = ("better" if better else "worse") if shown else "open"
    if claim.direction == "same":
        return None if value == 0 else f"{claim}: {value} is not 0"
    return None if found == claim.direction else f"{claim}: the table says {found} ({value}, {p})"


def everything(study):
    return [finding for topic in TOPICS for finding in findings_on(study, [topic])]


def test_every_claim_is_borne_by_its_table(study, planted):
    for one in (study, planted):
        stated = [claim for finding in everything(one) for claim in finding.claims]
        assert len(stated) > 50
        assert [text for claim in stated if (text := contradiction(one, claim))] == []


def test_a_turned_table_is_noticed(study, tmp_path):
    """The test above can fail: with every difference negated, hardly a claim survives."""
    import shutil

    folder = shutil.copytree(study.folder, tmp_path / "turned")
    stated = [claim for finding in everything(study) for claim in finding.claims]
    for source in {claim.source for claim in stated}:
        table = pd.read_csv(folder / source)
        name = VALUE.get(source, "difference")
        write_csv(table.assign(**{name: -table[name]}), folder / source)
    turned = replace(study, folder=folder)
    shown = [claim for claim in stated if claim.direction in ("better", "worse")]
    assert all(contradiction(turned, claim) for claim in shown)


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
    best = "one threshold on predicted consequence lost least on Wikipedia"
    for text in (article.plain("abstract"), article.plain("conclusion")):
        assert best in text
        assert "BH routing" in text
        assert "predicted better than fixed numbers of experts mixed to the same mean" in text
    budgets = article.say("budgets")
    assert "2 of 4 settings were better and 1 of 4 was worse than a fixed number" in budgets
    assert re.search(r"one threshold by consequence \| 4 \| \+0\.020", article.table("tbl-budgets"))
    short = comparison_report(study)
    assert f"{best}: +0.0200 nats per token" in short


def test_primary_contrast_is_at_equal_budget_and_can_go_either_way(study):
    (row,) = study.statistics["primary"].itertuples()
    assert (row.strategy, row.against) == ("bh_k8_b4", "mixture.bh_k8_b4")
    assert row.difference == pytest.approx(0.05 - FIXED, abs=1e-6)
    assert row.verdict == "better"
    assert row.pilot == "mixture.bh_k8_b4 against shuffle.bh_k8_b4"


def test_a_set_at_chance_in_accuracy_is_told_by_its_likelihood(study):
    """By likelihood the worse rule is worse; a sentence never says "none" for the set."""
    text = next(f.text for f in findings_on(study, ["budgets"]) if "HellaSwag" in f.text)
    assert "by bits per byte of the right continuation" in text
    for finding in findings_on(study, ["baseline"]):
        assert "by bits per byte" in finding.text or "by loss" in finding.text
        assert "none could be shown to differ" not in finding.text


def test_a_set_that_shows_the_reverse_is_told_apart(study):
    found = {f.text.split(",")[0]: f for f in findings_on(study, ["budgets", "static_curve"])}
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
    assert "shortest median was that of `regular_k1`: 0.50 [0.40, 0.60]" in finding.text
    assert "The same routing under another id did not differ." in finding.text
    table = pd.DataFrame(rows)
    table.loc[1, "ratio_low"] = 1.005
    apart = replace(study, statistics={**study.statistics, "timing": table})
    assert "so the measure is not reliable" in findings_on(apart, ["time"])[0].text


def test_documents_of_one_source_are_not_called_unrelated(planted):
    said = str(Article(planted).text("nulls"))
    assert "documents that are in no evaluation set, though of the same source as those of" in said
    other = planted.config.datasets["wikipedia"].source.model_copy(update={"path": "other.jsonl"})
    datasets = {
        name: one.model_copy(update={"source": other})
        for name, one in planted.config.datasets.items()
    }
    config = planted.config.model_copy(update={"datasets": datasets})
    assert "same source" not in str(Article(replace(planted, config=config)).text("nulls"))


@pytest.fixture(scope="module")
def page(study):
    """The article as Markdown."""
    import os

    from moe_routing.reporting.article import VARIABLE

    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(study.folder)
    try:
        return run_page(REPORT / "index.qmd", echo=False).markdown
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def words(text):
    """Return the words of running text: no tables, captions, figures, sources or markup."""
    lines = [line for line in text.splitlines() if not re.match(r"\s*(\||: |!\[|\$\$|#|:::)", line)]
    plain = re.sub(r"\[[^\]]*\]\{\.source\}|\[@[^\]]*\]|\{[^}]*\}|[*`$]", " ", "\n".join(lines))
    return re.findall(r"[^\s]*\w[^\s]*", plain)


def between(page, start, end):
    return page.split(start, 1)[1].split(end, 1)[0]


def test_the_main_text_is_short(page):
    main = page.split("# Appendix")[0]
    assert 1000 < len(words(main)) <= 2500


def test_the_abstract_is_short_and_has_few_numbers(page):
    abstract = between(page, "## Abstract", "# Question")
    assert len(words(abstract)) <= 150
    assert len(re.findall(r"(?<![\w-])\d[\d.,]*", abstract.split("\n", 1)[1])) <= 4


def test_the_first_screen_uses_no_id_and_the_conclusion_no_number(page):
    box = between(page, "## In short", "## Abstract")
    assert "`" not in re.sub(r"!\[.*", "", box)
    conclusion = between(page, "# Conclusion", "# Reproducibility")
    assert "BH routing" in conclusion
    assert not re.search(r"\d\.\d{3}", conclusion)


def test_tables_of_the_main_text_have_at_most_eight_rows(page):
    for table in re.findall(r"(?:^\|.*\n)+", page.split("# Appendix")[0], re.M):
        assert table.count("\n") - 2 <= 8


def test_claims_are_part_of_a_finding():
    assert Finding("Text.", "file.csv").claims == ()
