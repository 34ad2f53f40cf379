"""The whole article of studies that lack a part: it claims nothing of that part."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from planted_results import add_analyses, figures_as_dots, make_study, planted_config

from moe_routing import wording
from moe_routing.errors import InputError
from moe_routing.figures.baseline import draw_baseline
from moe_routing.figures.bh import draw_bh
from moe_routing.reporting.article import Article
from moe_routing.reporting.checks import check_pages
from moe_routing.reporting.pages import VARIABLE
from moe_routing.reporting.plots import write_plots
from moe_routing.reporting.protocol import PROSE, window
from moe_routing.reporting.qmd import run_page
from moe_routing.reporting.render import _document, _write, find_pandoc
from moe_routing.reporting.tables import hypothesis_of
from moe_routing.vocabulary import TASKS

SOURCE = Path(__file__).resolve().parents[2] / "report"
STATIC = ("stock", "regular_k4", "uniform_k8")


def article_of(study, folder, monkeypatch):
    """The text of the article, every reference resolved and every link in it checked."""
    with figures_as_dots():
        write_plots(study)
    monkeypatch.setenv(VARIABLE, str(study.folder))
    source = shutil.copytree(SOURCE, folder / "report")  # figures are copied beside the page
    page, pandoc = run_page(source / "index.qmd", echo=False), find_pandoc()
    document = _document(page, pandoc, source)
    _write(document, page, folder / "index.html", pandoc, source)
    html = (folder / "index.html").read_text(encoding="utf-8")
    html = re.sub(r'<a\s+href="notebooks/[^"]*"', "<a", html)  # these were not rendered
    (folder / "index.html").write_text(html, encoding="utf-8")
    check_pages([folder / "index.html"])
    text = re.sub(r"(?s)<style.*?</style>|<[^>]+>", "", html)
    return re.sub(r"\s+", " ", text.replace("\N{NO-BREAK SPACE}", " "))


def test_the_article_of_a_study_without_bh(tmp_path, monkeypatch):
    config = planted_config(strategies=STATIC, primary=("uniform_k8", "hellaswag"))
    study = make_study(tmp_path / "s", config, {"uniform_k8": -0.06}, items=300)
    text = article_of(study, tmp_path, monkeypatch)
    for claim in (
        "is Benjamini-Hochberg (BH) routing, which lets a statistical test choose",
        "procedure selects are kept",
        "The rule studied here",
        "Strategies take p-values from",
        "BH was run",
        "Each null was tested",
        "BH controls the proportion",
        "none,",
    ):
        assert claim not in text, claim
    assert "or do other choices of experts and weights do as well?" in text
    assert "is not among the strategies compared here" in text
    assert "No compared strategy takes p-values. No table of this run shows" in text
    assert "BH was not run over a grid of max_k, alpha and null in this run." in text
    assert "no adaptive top-k and no Benjamini-Hochberg routing" in text


def test_the_article_of_a_study_of_one_data_set(tmp_path, monkeypatch, nano, outputs, toggles):
    config = planted_config(
        datasets=("hellaswag",),
        strategies=(*STATIC, "bh_k8_a005"),
        primary=("bh_k8_a005", "hellaswag"),
    )
    study = make_study(tmp_path / "s", config, {"bh_k8_a005": -0.03}, items=300)
    add_analyses(study, nano, outputs, toggles)  # on the questions, for want of running text
    with figures_as_dots():
        draw_baseline(study.folder / "baseline")
        draw_bh(study.folder / "bh")
    text = article_of(study, tmp_path, monkeypatch)
    assert "Multiple choice takes the continuation" in text
    for claim in ("Perplexity is the exponential", "A last word counts", "Kullback-Leibler"):
        assert (claim in text) == (claim == "Kullback-Leibler"), claim
    assert "Not made: this run has no running text." in text
    assert "the analyses of the router, of BH and of its nulls read HellaSwag instead" in text
    assert "In addition to the cells, BH was run on text over a grid" in text
    assert "The rule studied here, BH routing, takes the statistical view literally." in text
    assert "Strategies take p-values from needed, calibrated on 1,024 tokens" in text
    assert "Experts were toggled for 400 tokens of this text." in text
    assert "Under needed, BH controls waste" in text
    assert "for which the null holds" not in text


def test_windows_are_those_of_the_config_or_of_the_model(planted):
    article = Article(planted)
    assert article.text("scoring").startswith("All items are scored zero-shot.")
    settings = planted.config.evaluation.model_copy(update={"window": 96})
    config = planted.config.model_copy(update={"evaluation": settings})
    fields = {name: getattr(planted, name) for name in planted.__dataclass_fields__}
    narrow = type(planted)(**{**fields, "config": config})
    assert window(narrow) == 96
    assert "in windows of 96 tokens at a stride of 96." in Article(narrow).text("scoring")


def test_without_a_config_the_window_is_that_of_the_baseline_analysis(planted, tmp_path):
    fields = {name: getattr(planted, name) for name in planted.__dataclass_fields__}
    study = type(planted)(**{**fields, "folder": tmp_path})
    assert "in windows of the model's context, side by side." in Article(study).text("scoring")
    (tmp_path / "baseline").mkdir()
    pd.DataFrame({"layer": [0], "window": [2048]}).to_csv(
        tmp_path / "baseline" / "baseline_routing_stats.csv", index=False
    )
    assert "in windows of 2,048 tokens at a stride of 2,048." in Article(study).text("scoring")


def test_perplexity_by_word_and_byte_is_that_of_the_table_of_metrics(planted):
    text = Article(planted).table("tbl-perplexity")
    assert "| Strategy" in text
    assert "Data set" not in text
    rows = planted.metrics.query("strategy == 'regular_k4' and dataset == 'wikipedia'")
    rows = rows.set_index("metric").loc[
        list(TASKS["perplexity"].metrics[1:]), ["value", "ci_low", "ci_high"]
    ]
    line = next(line for line in text.splitlines() if line.startswith("| `regular_k4`"))
    said = [float(number.replace(",", "")) for number in re.findall(r"(?<!k)\d[\d,.]*\d", line)]
    assert said == pytest.approx(list(rows.to_numpy().ravel()), rel=5e-3)
    assert "topp" not in text  # controls are not among the compared strategies


def test_limits_are_those_of_the_nulls_of_the_strategies(tmp_path):
    config = planted_config(
        datasets=("hellaswag",),
        strategies=(*STATIC, "bh_k8_a005_pooled"),
        primary=("bh_k8_a005_pooled", "hellaswag"),
        nulls=("pooled",),
    )
    study = make_study(tmp_path / "s", config, items=300)
    limits = Article(study).limits()
    assert "- Under `pooled`, BH controls the proportion of chosen experts for which" in limits
    assert "BH controls waste" not in limits
    assert "toggled" not in Article(study).text("nulls")


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (None, " nats: 0.01 nats shared out over the 64 experts of each of the 16 layers."),
        (2e-5, " nats."),
    ],
)
def test_the_epsilon_in_force_is_a_number(planted, tmp_path, declared, said):
    calibration = planted.config.calibration.model_copy(update={"epsilon": declared})
    config = planted.config.model_copy(update={"calibration": calibration})
    model = replace(planted.model, layers=16, experts=64)
    study = replace(planted, folder=tmp_path, config=config, model=model)
    assert Article(study).text("epsilon") == "$\\varepsilon$ is a parameter of the null."
    nulls = tmp_path / "calibration" / "nulls"
    nulls.mkdir(parents=True)
    value = declared or 0.01 / (16 * 64)
    pd.DataFrame({"epsilon": [value]}).to_csv(nulls / "needed.csv", index=False)
    text = Article(study).text("epsilon").replace("\N{NO-BREAK SPACE}", " ")
    assert text.endswith(f"$\\varepsilon$ is {wording.scientific(value)}{said}")
    epsilon = wording.typeset("2e-05" if declared else "9.77e-06")
    assert f"less than epsilon = {epsilon} nats (KL)" in hypothesis_of(study, "needed")


def test_designs_are_named_and_explained(planted, tmp_path):
    (tmp_path / "validity").mkdir()
    pd.DataFrame({"null": ["pooled"]}).to_csv(tmp_path / "validity" / "verdict.csv", index=False)
    designs = {
        "design": ["real_copula", "unused"], "why": ["the layer's own law", "-"],
        "nulls": ["pooled", None],
    }  # fmt: skip
    pd.DataFrame(designs).to_csv(tmp_path / "validity" / "designs.csv", index=False)
    text = Article(replace(planted, folder=tmp_path)).text("examined")
    assert "@tbl-size).\n\n- *real copula*: the layer's own law.\n\n@fig-bound shows" in text


def test_nulls_about_logits_are_judged_by_weak_control(planted, tmp_path):
    fields = {name: getattr(planted, name) for name in planted.__dataclass_fields__}
    study = type(planted)(**{**fields, "folder": tmp_path})
    (tmp_path / "validity").mkdir()
    pd.DataFrame({"null": ["pooled"]}).to_csv(tmp_path / "validity" / "verdict.csv", index=False)
    text = Article(study).text("examined")
    assert text.startswith(
        "Each null that is about the logits alone was tested in simulated designs."
    )
    assert "To keep this size is weak control" in text
    assert "They take no part in the verdict" in text


def test_an_unknown_text_is_an_error(planted):
    with pytest.raises(InputError, match=f"text 'gone'; allowed: {', '.join(PROSE)}"):
        Article(planted).text("gone")


def test_sentences_name_their_files(planted):
    article = Article(planted)
    assert article.say("primary").endswith(" [statistics/primary.csv]{.source}")
    assert article.say("primary power").count("statistics/primary.csv") == 1
    both = article.say("primary binding")
    assert both.endswith("[statistics/primary.csv, comparison/full_routing_results.csv]{.source}")
    assert Article(planted, notebook=True).say("primary").endswith(" (statistics/primary.csv)")
    assert article.say("router", "Not done.") == "Not done." or "{.source}" in article.say("router")
