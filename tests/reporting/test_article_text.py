"""The article is short, its sentences are short, and it says nothing twice: on a complete study."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import planted_ablation
import planted_consequence
import pytest
from test_findings_needed import dead_layers, rates, worst
from test_findings_validity import domains, setting, simulation

from moe_routing.analysis import findings as baseline
from moe_routing.analysis.null_size import call_designs, call_nulls
from moe_routing.analysis.outputs import ALL_LAYERS
from moe_routing.analysis.tables import write_csv
from moe_routing.errors import InputError
from moe_routing.reporting import findings_ablation, findings_consequence, findings_needed
from moe_routing.reporting.article import Article
from moe_routing.reporting.article_figures import ARTICLE_FIGURES
from moe_routing.reporting.comparison_report import comparison_report
from moe_routing.reporting.findings_analyses import VERDICT_TABLE
from moe_routing.reporting.findings_validity import DOMAINS, SIMULATION
from moe_routing.reporting.pages import VARIABLE
from moe_routing.reporting.qmd import run_page
from moe_routing.reporting.results import StudyResults

REPORT = Path(__file__).resolve().parents[2] / "report"
LONGEST, MEAN = 36, 17
"""Words of a sentence, at most and on average."""


def analyses():
    """Return planted tables of every analysis that the article has sentences on, by path."""
    rate = rates([0.9, 1.3], 1.1)
    dead = rate.assign(dead_slots=0.04, dead_slots_low=0.03, dead_slots_high=0.05, dead=0.125)
    planted = planted_consequence.removals()
    return {
        **{f"ablation/{name}.csv": one for name, one in planted_ablation.all_tables().items()},
        findings_consequence.LAW_FILE: planted_consequence.law_table(planted),
        findings_consequence.CORRELATIONS_FILE: planted_consequence.correlation_table(planted),
        findings_needed.RATES: pd.concat(
            [
                rate,
                rates([2.0] * 2, 2.0, part="routed"),
                rates([0.2], 0.2, procedure="by", levels=(0.05, 0.1)),
                rates([0.4], 0.4, procedure="block_exact", levels=(0.05, 0.1)),
                rates([2.0], 2.0, text="lambada"),
            ]
        ),
        findings_needed.WORST_EXPERTS: worst(0.06),
        findings_needed.DEAD_LAYERS: dead_layers(1.6),
        findings_needed.DEAD_EXPERTS: dead,
        SIMULATION: simulation(setting("bh", 0.01), setting("hc", 0.3), setting("by", 0.01)),
        VERDICT_TABLE: verdict(),
        DOMAINS: domains(2.0),
    }


def verdict():
    """Return the verdict on a null that fails in one layer and may fail in another."""
    sizes = {"0": 0.15, "1": 0.05, "2": 0.065, ALL_LAYERS: 0.09}
    rows = [
        {"null": "n", "design": "d", "alpha": 0.05, "layer": layer, "size": size, "low": 0.0,
         "high": 1.0, "n_tokens": 6000 if layer == ALL_LAYERS else 2000}
        for layer, size in sizes.items()
    ]  # fmt: skip
    return call_nulls(
        call_designs(pd.DataFrame(rows), level=0.05, largest_size=0.06, confidence=0.95)
    )


def router():
    """Return what the baseline analysis states of random logits."""
    rng = np.random.default_rng(0)
    options = {"confidence": 0.95, "resamples": 99, "rng": rng}
    document_T, values_LT = np.repeat(np.arange(20), 5), rng.random((4, 100))
    return {
        "imbalance": baseline.imbalance(rng.integers(1, 9, (20, 4, 8)), **options),
        "depth": baseline.depth_trend(values_LT, document_T, **options),
        "ease": baseline.ease_and_weight(values_LT[0], values_LT, document_T, **options),
    }


@pytest.fixture(scope="module")
def complete(at_budgets, tmp_path_factory):
    """A study that has every analysis; its missing figures are empty files."""
    folder = shutil.copytree(at_budgets.folder, tmp_path_factory.mktemp("text") / "complete")
    for name, table in analyses().items():
        (folder / name).parent.mkdir(exist_ok=True)
        table.to_csv(folder / name, index=False)
    advice = {
        "statement": "No setting was shown to beat `stock`.", "n_tokens": 1588,
        "against_static_curve": {"a": {}, "b": {}}, "beats_line_only": ["b"],
    }  # fmt: skip
    for name, value in (
        ("bh/recommendation.json", advice),
        ("baseline/baseline_findings.json", router()),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, default=float), encoding="utf-8")
    for figure in ARTICLE_FIGURES.values():
        path = folder / figure.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return replace(at_budgets, folder=folder)


@pytest.fixture(scope="module")
def page(complete, tmp_path_factory):
    """The article as Markdown."""
    source = shutil.copytree(REPORT, tmp_path_factory.mktemp("source") / "report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(complete.folder))
        return run_page(source / "index.qmd", echo=False).markdown  # copies figures beside itself


def prose(text):
    """Return running text: no tables, captions, figures, formulas, sources, citations or markup."""
    text = re.sub(r"\$\$.*?\$\$", " ", text, flags=re.DOTALL)
    lines = ["" if re.match(r"\s*(\||: |!\[|#|:::)", line) else line for line in text.splitlines()]
    text = "\n".join(re.sub(r"^- ", "\n", line) for line in lines)
    return re.sub(r"\[[^\]]*\]\{\.source\}|\[[^\]@]*@[^\]]*\]|\{[^}]*\}", " ", text)


def words(text):
    return re.findall(r"[^\s]*\w[^\s]*", re.sub(r"[*`$]", " ", text))


def sentences(text):
    """Return the sentences of running text, each on one line."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", prose(text))]
    found = [one for part in paragraphs for one in re.split(r"(?<=[.!?])\s+(?=[A-Z*`($@\d])", part)]
    return [one for one in found if len(words(one)) > 1]


def between(page, start, end):
    return page.split(start, 1)[1].split(end, 1)[0]


def main_text(page):
    return between(page, "# Question {#sec-question}", "# Reproducibility")


def too_long(text):
    return [one for one in sentences(text) if len(words(one)) > LONGEST]


def test_the_main_text_and_its_sentences_are_short(page):
    main = main_text(page)
    assert 1000 < len(words(prose(main))) <= 2500
    for text in (main, between(page, "# Appendix {#sec-appendix}", "# How to cite")):
        assert len(words(prose(text))) / len(sentences(text)) <= MEAN


def test_no_sentence_is_long(page, complete):
    assert too_long(page.split("# References")[0]) == []
    findings = comparison_report(complete).split("## Findings")[1].split("\n## ")[0]
    assert too_long(re.sub(r" \([\w/.]+\)$", "", findings, flags=re.MULTILINE)) == []


def test_a_long_sentence_is_noticed():
    old = (
        "`pooled` was not shown to keep its size under the complete null (weak control): where no "
        "expert deserves to be selected, BH at 0.05 selects one for 0.065 of the tokens in the "
        "worst layer (layer 7, normal; simultaneous 95 % interval 0.049 to 0.088), and for 0.051 "
        "over all layers in the worst of 4 designs (t4); allowed: 0.06."
    )
    assert too_long(f"Short. {old} [validity/verdict.csv]{{.source}}\n\n| {old} |") == [old]


def test_sentences_that_only_some_studies_have_are_short():
    held_out = {"wikipedia": (0.007, 0.006, 0.009), "hellaswag": (0.012, 0.008, 0.015),
                "lambada": (0.02, 0.015, 0.03)}  # fmt: skip
    certified = findings_consequence.certified(
        {planted_consequence.CERTIFIED: planted_consequence.certificate()},
        planted_consequence.damage(**held_out),
        planted_consequence.budgets(),
    )
    table = planted_ablation.headroom_table()
    orders = findings_ablation.headroom(pd.concat([table, table.assign(text="lambada")]))
    for finding in (*certified, *orders):
        assert too_long(finding.text) == []


def test_the_abstract_is_short_and_has_few_numbers(page):
    abstract = between(page, "## Abstract", "# Question").split("\n", 1)[1]
    assert len(words(prose(abstract))) <= 150
    assert len(re.findall(r"(?<![\w-])\d[\d.,]*", prose(abstract))) <= 4


def test_what_everyone_reads_uses_words_for_names_and_says_nothing_twice(page):
    box = re.sub(r"!\[.*", "", between(page, "## In short", "## Abstract"))
    abstract = between(page, "## Abstract", "# Question").split("\n", 1)[1]
    first = between(page, "# Results {#sec-results}", "## Rules at matched budgets")
    conclusion = between(page, "# Conclusion {#sec-conclusion}", "# Reproducibility")
    for text in (box, abstract, conclusion):
        assert "`" not in text
        assert "BH routing" in text
    said = [one for text in (box, abstract, first, conclusion) for one in sentences(text)]
    assert len(said) == len(set(said))
    assert not re.search(r"\d\.\d{3}", conclusion)
    assert "**Question.** How many of its 8 experts does a token need?" in box


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "BH routing, at 4.5 experts per token, is better than a fixed number at equal cost: "
         "its loss on Wikipedia is lower by 0.037 nats per token ["),
        ({"verdict": "worse", "difference": 0.02, "low": 0.01, "high": 0.03},
         "is worse than a fixed number at equal cost: its loss on Wikipedia is higher by 0.020"),
        ({"verdict": "inconclusive", "p_value": 0.5},
         "Between BH routing and a fixed number at equal cost no difference could be shown on"),
        ({"verdict": "identical", "difference": 0.0, "p_value": 1.0},
         "BH routing gave the same results as a fixed number at equal cost on every item of"),
        ({"against": "stock"}, "is better than the stock model: its loss on Wikipedia is lower by"),
    ],
)  # fmt: skip
def test_every_outcome_of_the_contrast_has_its_sentences(at_budgets, changes, said):
    table = at_budgets.statistics["primary"].assign(**changes)
    study = replace(at_budgets, statistics={**at_budgets.statistics, "primary": table})
    texts = [Article(study).plain(topic) for topic in ("in_short", "abstract", "conclusion")]
    assert said in texts[0]
    for text in texts:
        assert "`" not in text
        assert too_long(text) == []


def test_a_certificate_answers_how_many_experts_are_enough(at_budgets, monkeypatch):
    name = planted_consequence.CERTIFIED
    monkeypatch.setattr(
        StudyResults, "certificates", {name: planted_consequence.certificate()}, raising=True
    )
    damage = planted_consequence.damage(wikipedia=(0.007, 0.006, 0.009))
    study = replace(at_budgets, metrics=pd.concat([at_budgets.metrics, damage]))
    box, conclusion = (Article(study).plain(topic) for topic in ("in_short", "conclusion"))
    assert box.startswith(
        "Certified routing keeps 3.1 of 8 experts per token. It promises an expected change of the "
        "predictions (KL) of at most 0.01 nats per token; on Wikipedia we measured 0.0070 "
        "[0.0060, 0.0090]."
    )
    assert conclusion.startswith(
        "Where an expected change of 0.01 nats per token is accepted, 3.1 of 8 were enough on "
        "average"
    )
    assert "lowest loss" not in box


def test_a_verdict_against_its_numbers_stops_the_article(at_budgets, tmp_path, monkeypatch):
    folder = shutil.copytree(at_budgets.folder, tmp_path / "turned")
    path = folder / "statistics" / "primary.csv"
    table = pd.read_csv(path)
    write_csv(table.assign(difference=-table["difference"]), path)
    monkeypatch.setenv(VARIABLE, str(folder))
    source = shutil.copytree(REPORT, tmp_path / "report")
    said = r"statistics/primary.csv: the verdict on 'bh_k8_b4' .* its numbers say 'worse'"
    with pytest.raises(InputError, match=said) as stopped:
        run_page(source / "index.qmd", echo=False)
    assert "\n" not in str(stopped.value)


def test_numbers_have_at_most_three_significant_digits(page):
    main = main_text(page).split("# Results")[1]
    numbers = re.findall(r"(?<![\w./])\d+\.\d+", prose(main))
    assert len(numbers) > 10
    assert [one for one in numbers if len(one.replace(".", "").lstrip("0")) > 3] == []


def test_tables_of_the_main_text_have_at_most_eight_rows(page):
    tables = re.findall(r"(?:^\|.*\n)+", page.split("# Appendix")[0], re.MULTILINE)
    assert len(tables) >= 3
    assert max(table.count("\n") - 2 for table in tables) <= 8


def test_every_results_section_opens_with_its_sentence(page):
    results = between(page, "# Results {#sec-results}", "# Limits {#sec-limits}")
    for section in results.split("\n## ")[1:]:
        opening = section.split("\n", 1)[1].strip()
        assert re.match(r"[A-Z*]", opening), opening[:60]
        assert len(re.findall(r"^!\[|^: ", section, re.MULTILINE)) <= 1
