"""What a study asked and how it measured, in words: prose that depends on the study's parts.

Pure functions from a study to Markdown. What a study does not have, its text does not claim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pandas as pd

from moe_routing.reporting import wording as w
from moe_routing.vocabulary import DATASETS, METRICS, TASKS

if TYPE_CHECKING:
    from moe_routing.reporting.results import Study

ROUTING = "baseline/baseline_routing_stats.csv"


def has_bh(study: Study) -> bool:
    """Return whether Benjamini-Hochberg routing is among the compared strategies."""
    return "bh" in study.families


def nulls(study: Study) -> list[str]:
    """Return the nulls that compared strategies took p-values from, in order."""
    column = study.cells["null"].drop_duplicates()
    return [str(name) for name in column if pd.notna(name) and name != "none"]


def window(study: Study) -> int | None:
    """Return the most tokens that the model reads at once; None if it was not written down.

    The baseline analysis reads text in the windows that cells are scored in.
    """
    if study.config.evaluation.window:
        return study.config.evaluation.window
    table = study.table(ROUTING)
    return None if table.empty else int(table["window"].iloc[0])


def _asked(study: Study) -> str:
    start = f"Does every token need the {study.model.top_k} experts that the model spends on it"
    if not has_bh(study):
        return f"{start}, or do other choices of experts and weights do as well?"
    return (
        f"{start}, and does Benjamini-Hochberg (BH) routing, which lets a statistical test decide, "
        "beat a fixed number?"
    )


def _idea(study: Study) -> str:
    model = study.model.phrase
    if not has_bh(study):
        return (
            f"We ask what other choices of experts, and other weights, do to {model}, whose "
            "weights stay frozen. Benjamini-Hochberg (BH) routing, which leaves the number to a "
            "test, is not among the strategies compared here."
        )
    return (
        f"We ask whether that number can be left to a test, token by token, in {model}, whose "
        f"weights stay frozen. Each of a token's {study.model.experts} router logits is taken as "
        "a test, and the experts that pass the Benjamini-Hochberg (BH) procedure are kept."
    )


def _rule(study: Study) -> str:
    if has_bh(study):
        return "The rule studied here, BH routing, takes"
    return "One such rule, BH routing, which is not among the strategies compared here, takes"


def _nulls(study: Study) -> str:
    text = (
        f"calibrated on {w.count(study.config.calibration.tokens)} tokens of text that shares "
        "nothing with the evaluation sets."
    )
    if nulls(study):
        return f"Strategies took p-values from {w.code(nulls(study))}, {text}"
    start = "No compared strategy takes p-values."
    table = study.table("bh/bh_routing_results.csv")
    if table.empty:
        return start
    tested = [name for name in table["null"].drop_duplicates() if isinstance(name, str)]
    return f"{start} The analysis of BH on text (@sec-bh) takes them from {w.code(tested)}, {text}"


def _scoring(study: Study) -> str:
    size = window(study)
    windows = "windows of the model's context, side by side"
    if size:
        windows = f"windows of {w.count(size)} tokens at a stride of {w.count(size)}"
    tasks = set(study.cells["task"])
    texts = [task.scoring.format(windows=windows) for task in TASKS.values() if task.name in tasks]
    return " ".join(["All items are scored 0-shot, without examples before them.", *texts])


def _divergence(study: Study) -> str:
    if study.divergence.empty:
        return ""
    return (
        "For the same reason the Kullback-Leibler divergence of a strategy's next-token "
        "predictions from the baseline's is measured."
    )


def _ranks(study: Study) -> str:
    if study.statistics["friedman"].empty:
        return ""
    return (
        "Ranks over data sets are compared by Friedman's test and Nemenyi's critical difference "
        "[@friedman1937; @demsar2006]."
    )


def _bh_in_depth(study: Study) -> str:
    if study.table("bh/bh_routing_results.csv").empty:
        return "BH was not run over a grid of max_k, alpha and null in this run."
    return (
        "Beside the cells, BH was run on text over a grid of max_k, alpha and null "
        "(@fig-bh-quality, @fig-bh-saturation)."
    )


def _examined(study: Study) -> str:
    if study.table("validity/verdict.csv").empty:
        return "A null can be examined in designs in which its hypothesis is true."
    return (
        "Each null was examined in designs in which its hypothesis is true, and in such that break "
        "what it assumes; in both no expert stands out, and BH may select one for at most a share "
        "alpha of the tokens. @fig-size shows how often it did, "
        "@fig-bound how marginal nulls do on real text, and @fig-binding whether test, floor or "
        "limit decides there."
    )


PROSE: dict[str, Callable[[Study], str]] = {
    "asked": _asked,
    "idea": _idea,
    "rule": _rule,
    "nulls": _nulls,
    "scoring": _scoring,
    "divergence": _divergence,
    "ranks": _ranks,
    "bh_in_depth": _bh_in_depth,
    "examined": _examined,
}
"""By name; in a page: ``a.text("asked")``."""


def perplexity_rows(study: Study) -> pd.DataFrame:
    """Return the measures of running text beside a token's perplexity, of compared strategies."""
    text = TASKS["perplexity"]
    beside = [name for name in text.metrics if name != text.main_metric]
    rows = study.metrics[study.metrics["strategy"].isin(study.cells["strategy"])]
    return rows[rows["metric"].isin(beside)]


def perplexity_table(study: Study) -> pd.DataFrame:
    """Return word perplexity and a byte, and bits per byte: a row per strategy and data set."""
    rows = perplexity_rows(study)
    several = rows["dataset"].nunique() > 1
    table = []
    for (dataset, strategy), own in rows.groupby(["dataset", "strategy"], sort=False):
        values = {METRICS[row.metric].label: _bracketed(row) for row in own.itertuples()}
        where = {"Data set": DATASETS[dataset].label} if several else {}
        table.append({"Strategy": f"`{strategy}`", **where, **values})
    return pd.DataFrame(table)


def _bracketed(row: object) -> str:
    return w.estimate(row.value, row.ci_low, row.ci_high, row.metric)
