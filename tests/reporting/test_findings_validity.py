"""Sentences about procedures and about what experts specialise in, both ways."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from moe_routing.analysis.outputs import SUM_TO_ZERO
from moe_routing.reporting import findings_validity
from moe_routing.reporting.article import Article


def setting(procedure, fdr, *, alpha=0.05, correlation=0.0, error=0.002):
    return {
        "procedure": procedure, "alpha": alpha, "signals": 0, "correlation": correlation,
        "dependence": SUM_TO_ZERO if correlation < 0 else f"correlation {correlation:g}",
        "fdr": fdr, "fdr_se": error, "repeats": 10000,
    }  # fmt: skip


def simulation(*settings):
    return pd.DataFrame(settings)


def test_procedures_that_kept_alpha_and_those_that_did_not():
    table = simulation(
        setting("bh", 0.051),
        setting("bh", 0.007, alpha=0.01),
        setting("storey", 0.05),
        setting("hc", 0.04),
        setting("hc", 0.3, alpha=0.1),
        setting("bh", 0.035, correlation=0.5),
        setting("storey", 0.1, correlation=0.5),
        setting("hc", 0.35, correlation=0.5),
        setting("bh", 0.04, correlation=-1 / 63),
        setting("hc", 0.35, correlation=-1 / 63),
    )
    independent, correlated, centred = findings_validity.procedures(table, 0.95)
    assert independent.text == (
        "We simulated independent p-values, with 10,000 tokens per setting. The false discovery "
        "rate of Higher Criticism was above alpha, at worst 30.0 % at 0.1. That of "
        "Benjamini-Hochberg and Storey was not shown to be above alpha anywhere."
    )
    assert "that are all correlated by 0.5, with 10,000 tokens" in correlated.text
    assert "rate of Storey and Higher Criticism was above alpha, at worst 35.0 %" in correlated.text
    assert "at 0.05 (Higher Criticism). That of Benjamini-Hochberg was not" in correlated.text
    assert centred.text.startswith(
        "We simulated p-values of statistics whose noise sums to zero in every token, with "
    )
    assert (independent.verdict, correlated.verdict) == ("some kept", "some kept")


@pytest.mark.parametrize(
    ("fdr", "verdict", "said"),
    [
        (
            0.05,
            "all kept",
            ". The false discovery rate of Benjamini-Hochberg and "
            "Benjamini-Yekutieli was not shown to be above alpha anywhere.",
        ),
        (0.5, "none kept", "(Benjamini-Hochberg). No procedure kept it at alpha."),
    ],
)
def test_procedures_that_agree(fdr, verdict, said):
    (finding,) = findings_validity.procedures(
        simulation(setting("bh", fdr), setting("by", fdr)), 0.95
    )
    assert finding.verdict == verdict
    assert said in finding.text


def test_chance_among_many_settings_names_no_procedure():
    """2.5 standard errors above alpha: shown in a single setting, but not in one of a hundred."""
    above = setting("bh", 0.055)
    assert findings_validity.procedures(simulation(above), 0.95)[0].verdict == "none kept"
    rest = [setting("bh", 0.01)] * 99
    assert findings_validity.procedures(simulation(above, *rest), 0.95)[0].verdict == "all kept"
    assert findings_validity.procedures(simulation(above, *rest), 0.2)[0].verdict == "none kept"


def domains(lift, tokens=1000):
    """Expert 0 of layer 3 for lifts; expert 1 is rare, and its lift says nothing."""
    proportions = {"wikipedia": 0.2 * lift, "hellaswag": 0.4 - 0.2 * lift}
    rows = [
        {"domain": name, "layer": 3, "expert": expert, "proportion": scale * proportion,
         "n_tokens": tokens, "lift": proportion / 0.2}
        for name, proportion in proportions.items()
        for expert, scale in ((0, 1.0), (1, 0.001))
    ]  # fmt: skip
    rows[1]["lift"] = 2.0
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("lift", "verdict", "said"),
    [(2.0, "specialised", "1 was used by one of 2"), (1.5, "not specialised", "none were used by")],
)
def test_domains(lift, verdict, said):
    finding = findings_validity.domains(domains(lift))
    assert finding.verdict == verdict
    assert f"Of 1 expert with at least 100 tokens in a layer, {said}" in finding.text
    assert f"is {lift:.2f} (Wikipedia, layer 3); 2 is the most possible." in finding.text


def test_domains_say_nothing_of_one_domain_or_of_few_tokens():
    table = domains(1.5)
    assert findings_validity.domains(table[table["domain"] == "wikipedia"]) is None
    assert findings_validity.domains(domains(1.5, tokens=100)) is None
    assert findings_validity.domains(pd.DataFrame()) is None


@pytest.mark.parametrize(("proportion", "verdict"), [(0.8, "together"), (0.4, "apart")])
def test_coactivation(proportion, verdict):
    rows = [
        {"layer": 2, "tokens_a": 500, "proportion": proportion, "lift": 4 * proportion},
        {"layer": 2, "tokens_a": 500, "proportion": 0.1, "lift": 0.4},
        {"layer": 1, "tokens_a": 20, "proportion": 1.0, "lift": 9.0},
    ]
    finding = findings_validity.coactivation(pd.DataFrame(rows))
    assert finding.verdict == verdict
    many = "1" if proportion > 0.5 else "none"
    assert finding.text.startswith(f"In {many} of 2 ordered pairs of a layer's experts, the second")
    assert (
        f"The maximum is {100 * proportion:.1f} % (layer 2), {4 * proportion:.1f} times"
        in finding.text
    )
    assert findings_validity.coactivation(pd.DataFrame(rows[2:])) is None
    assert findings_validity.coactivation(pd.DataFrame()) is None


@pytest.mark.parametrize(
    ("last", "verdict", "said"),
    [(0.5, "more", "in every layer."), (0.1, "not everywhere", "in 1 of 2 layers.")],
)
def test_vocabulary(last, verdict, said):
    rows = [
        {"role": "input", "layer": 0, "mean_frequent": 0.7, "shuffled_frequent": 0.2},
        {"role": "input", "layer": 1, "mean_frequent": last, "shuffled_frequent": 0.2},
        {"role": "next", "layer": 0, "mean_frequent": 0.0, "shuffled_frequent": 0.2},
        {"role": "input", "layer": 2, "mean_frequent": None, "shuffled_frequent": None},
    ]
    finding = findings_validity.vocabulary(pd.DataFrame(rows))
    assert finding.verdict == verdict
    assert finding.text.endswith(said)
    assert f"ids, {50 * (0.7 + last):.1f} % of an id's tokens" in finding.text
    assert "against 20.0 % after" in finding.text
    assert findings_validity.vocabulary(pd.DataFrame()) is None


def test_the_article_reads_them_from_the_analyses(planted, tmp_path):
    article = Article(replace(planted, folder=tmp_path))
    assert article.say("procedures", "None.") == article.say("specialisation", "None.") == "None."
    for name, table in (
        (findings_validity.SIMULATION, simulation(setting("bh", 0.01))),
        (findings_validity.DOMAINS, domains(1.5)),
    ):
        (tmp_path / name).parent.mkdir()
        table.to_csv(tmp_path / name, index=False)
    article = Article(replace(planted, folder=tmp_path))
    assert "Benjamini-Hochberg was not shown to be above alpha" in article.say("procedures")
    assert "The largest lift is 1.50 (Wikipedia" in article.say("specialisation")
