"""The article and the short report of a study with levers, and of one without."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pandas as pd
import pytest
from planted_levers import (
    CERTIFIED,
    certificate,
    correlation_table,
    damage,
    law_table,
    levers,
    removals,
)

from moe_routing.errors import InputError
from moe_routing.figures.consequence import draw_consequence
from moe_routing.reporting.article import Article
from moe_routing.reporting.article_figures import planned
from moe_routing.reporting.comparison_report import comparison_report
from moe_routing.reporting.plots import draw, write_plots


@pytest.fixture(scope="module")
def study(planted, tmp_path_factory):
    """The planted study, as if levers had been scored, and the toggles analysed."""
    folder = shutil.copytree(planted.folder, tmp_path_factory.mktemp("levers") / "planted")
    certificate().save(folder / "calibration" / "certificates" / f"{CERTIFIED}.json")
    consequence = folder / "consequence"
    consequence.mkdir()
    toggled = removals()
    toggled.to_parquet(consequence / "removals.parquet")
    law_table(toggled).to_csv(consequence / "consequence_law.csv", index=False)
    correlation_table(toggled).to_csv(consequence / "rank_correlations.csv", index=False)
    held_out = damage(wikipedia=(0.007, 0.006, 0.009), lambada=(0.02, 0.015, 0.03))
    return replace(
        planted,
        folder=folder,
        config=planted.config.model_copy(
            update={"levers": [CERTIFIED, "regular_k3_norm_own", "stock_scaled"]}
        ),
        statistics={**planted.statistics, "levers": levers()},
        metrics=pd.concat([planted.metrics, held_out]),
        levers=pd.DataFrame({"strategy": [CERTIFIED], "family": ["certified"]}),
    )


def cells_of(text):
    """The cells of a Markdown table by row, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_table_of_levers_has_every_rule_as_is_and_at_fitted_scale(study):
    text = Article(study).table("tbl-levers")
    assert "Loss over the reference on Wikipedia, in nats per token, with 95 % intervals" in text
    rows = cells_of(text)
    assert all(len(row) == 4 for row in rows)
    assert rows[0][:3] == ["`stock`", "8", "0"]
    assert rows[0][3].startswith("\N{MINUS SIGN}0.0115 [")
    assert rows[0][3].endswith("over `stock`")
    found = {(row[0], row[1]): row[2:] for row in rows}
    best = "one threshold by consequence, compensated"
    assert found[best, "3.05"] == [
        "+0.0099 [+0.0079, +0.0119]", "+0.0064 [+0.0044, +0.0084]",
    ]  # fmt: skip
    assert found[best, "2.05"][1] == "not scored"
    name = f"certified threshold by consequence, compensated (`{CERTIFIED}`)"
    assert found[name, "3.06"][0] == "+0.0090 [+0.0070, +0.0110]"
    assert len(rows) == 1 + 5 + 8 * 3 + 1


def test_tables_of_the_law_and_of_certificates(study):
    article = Article(study)
    law = cells_of(article.table("tbl-law"))
    assert [row[0] for row in law] == list("012345")
    assert all(row[1].startswith(("1.9", "2.0")) and row[4].endswith("e-05") for row in law)
    certified = cells_of(article.table("tbl-certified"))
    assert certified == [
        [f"`{CERTIFIED}`", "at most 0.01", "calibration (n = 128)", "3.1", "0.0091"],
        [f"`{CERTIFIED}`", "at most 0.01", "Wikipedia (n = 24)", "3.06", "0.007 [0.006, 0.009]"],
        [f"`{CERTIFIED}`", "at most 0.01", "LAMBADA (n = 24)", "3.06", "0.02 [0.015, 0.03]"],
    ]


def test_article_and_short_report_say_the_same(study):
    article = Article(study)
    texts = [
        article.listing("levers") + article.listing("lever_factors") + article.say("law")
        + article.listing("plain_experts") + article.listing("certified"),
        comparison_report(study),
    ]  # fmt: skip
    for text in texts:
        assert "scale does not explain the difference." in text
        assert "which experts are kept matters, beyond scale." in text
        assert "with 6.5 (at fitted scale 3 to 8, with none scored between)" in text
        assert "On LAMBADA the damage exceeds the promise" in text
        assert "The law holds in every layer" in text
        assert "the weight says hardly anything about the loss" in text
    assert "## Fewer experts" in texts[1]
    assert "fitted on calibration text" in article.limits()
    assert "No levers were scored" not in article.listing("missing")
    assert "No strategy was certified" not in article.listing("missing")


def test_figures_are_drawn_and_shown(study):
    article = Article(study)
    assert "levers" in planned(study.config)
    with pytest.raises(InputError, match="the figure is missing"):
        article.figure("fig-levers")
    assert "levers" in draw(study)
    write_plots_of(study, "levers")
    draw_consequence(study.folder / "consequence")
    for label, name in (("fig-levers", "levers"), ("fig-law", "consequence_law")):
        text = article.figure(label)
        assert f"{name}.png){{#{label}" in text
        assert article.ref(label) == f"@{label}"


def write_plots_of(study, name):
    """Draw one figure of the comparison."""
    from moe_routing.figures.style import save, use_style
    from moe_routing.reporting.article_figures import COMPARISON

    use_style()
    save(draw(study)[name](), study.folder / COMPARISON / name)


def test_a_study_without_levers_says_so(planted):
    article = Article(planted)
    missing = article.listing("missing")
    assert "No levers were scored: rules that rank experts by anything but the prob" in missing
    assert "No strategy was certified, so none has a bound on its damage." in missing
    for topic in ("levers", "lever_factors", "plain_experts", "certified"):
        assert article.listing(topic, "None.") == "None."
    assert article.say("law", "None.") == "None."
    assert article.table("tbl-levers") == "*Not made: no levers were scored.*"
    assert article.table("tbl-certified") == "*Not made: no strategy was certified.*"
    assert article.table("tbl-law") == "*Not made: the analysis consequence/ was not run.*"
    assert article.figure("fig-levers") == (
        "*Not drawn: this run has no levers whose loss is in nats per token.*"
    )
    assert article.figure("fig-law") == "*Not drawn: the analysis consequence/ was not run.*"
    assert "levers" not in planned(planted.config)
    assert "levers" not in write_plots(planted)
    assert "fitted on calibration text" not in article.limits()


def test_levers_of_last_words_alone_have_no_figure(study):
    config = study.config.model_copy(
        update={"datasets": {"lambada": study.config.datasets["lambada"]}}
    )
    assert "levers" not in planned(config)
    table = study.statistics["levers"].query("dataset == 'lambada'")
    alone = replace(study, config=config, statistics={**study.statistics, "levers": table})
    assert "levers" not in draw(alone)
    assert "on LAMBADA, in nats per last word" in Article(alone).table("tbl-levers")


def test_families_of_levers_are_known(study):
    assert study.family_of[CERTIFIED] == "certified"
