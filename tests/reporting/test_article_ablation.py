"""The ablation in the article: of a study that has it, and of one that has not."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import planted_ablation as tables
import pytest

from moe_routing import wording
from moe_routing.figures.ablation import draw_ablation
from moe_routing.reporting.article import Article

PAGE = Path(__file__).resolve().parents[2] / "report" / "index.qmd"
TOPICS = ("ablation", "left_out", "needs", "headroom")
FIGURES = ("fig-ablation", "fig-left-out", "fig-needed")
TABLES = ("tbl-discoveries", "tbl-headroom")


@pytest.fixture(scope="module")
def article(planted, tmp_path_factory):
    """The planted study with the tables and figures of the ablation."""
    folder = shutil.copytree(planted.folder, tmp_path_factory.mktemp("ablation") / "planted")
    (folder / "ablation").mkdir()
    for name, table in tables.all_tables().items():
        table.to_csv(folder / "ablation" / f"{name}.csv", index=False)
    draw_ablation(folder / "ablation")
    return Article(replace(planted, folder=folder))


def rows_of(text):
    """The cells of a Markdown table by row, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_is_told_or_said_to_be_missing(article, planted, topic):
    assert article.listing(topic).startswith("- ")
    assert "ablation/" in article.listing(topic)
    assert Article(planted).listing(topic, "Not done.") == "Not done."
    assert f'a.listing("{topic}"' in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("label", FIGURES)
def test_every_figure_is_shown_or_said_to_be_missing(
    article, planted, label, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # a page's figures are copied beside it
    assert f"{{#{label}" in article.figure(label)
    assert Article(planted).figure(label) == "*Not drawn: the analysis ablation/ was not run.*"


@pytest.mark.parametrize("label", TABLES)
def test_every_table_is_shown_or_said_to_be_missing(article, planted, label):
    assert f"{{#{label}}}" in article.table(label)
    assert Article(planted).table(label) == "*Not made: the analysis ablation/ was not run.*"
    assert f'a.table("{label}")' in PAGE.read_text(encoding="utf-8")


def test_discoveries_of_every_null_stand_beside_the_own_choice(article):
    rows = {row[0]: row[1:] for row in rows_of(article.table("tbl-discoveries"))}
    assert list(rows) == ["the model's own choice", "`needed`", "`pooled`"]
    table = tables.ablation_table()
    for name, null in {"the model's own choice": "none", "`needed`": "needed"}.items():
        own = table[(table["null"] == null) & (table["layer"] == "all") & table["primary"]]
        own = own[own["alpha"].isna() | (own["alpha"] == 0.05)]
        pairs = own.set_index(["part", "effect"])
        kl, loss = pairs.loc[("all", "kl")], pairs.loc[("removed", "loss")]
        fdr = f"{100 * kl['fdr']:.0f}.", f"{100 * kl['fdr']:.1f} [", f"{100 * kl['fdr']:.0f} ["
        assert rows[name][3].startswith(fdr)
        assert float(rows[name][4].split(" [")[0]) == pytest.approx(100 * loss["false"], abs=0.5)
        assert float(rows[name][5].split(" [")[0]) == pytest.approx(100 * loss["harmful"], abs=0.5)
    epsilon = wording.scientific(1e-5)
    assert rows["`pooled`"] == ["0", "0", epsilon, "none made", "too few", "too few"]


def test_orders_are_listed_by_experts_kept(article):
    rows = rows_of(article.table("tbl-headroom"))
    assert [row[0] for row in rows] == ["1"] * 4 + ["2"] * 4
    assert rows[0][1:] == ["router's probability", rows[0][2], "", ""]
    assert rows[3][4] == "100 %"
    table = tables.headroom_table().set_index(["k", "order"])
    row = table.loc[(1, "norm")]
    assert float(rows[1][2].split(" [")[0]) == pytest.approx(row["kl"], rel=0.05)
    closed = re.match(r"([\d.]+) % \[([\d.]+), ([\d.]+)\]", rows[1][4])
    assert [float(x) for x in closed.groups()] == pytest.approx(
        [100 * row[name] for name in ("closed", "closed_low", "closed_high")], abs=0.5
    )
