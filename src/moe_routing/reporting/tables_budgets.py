"""Tables of rules at matched budgets, of the consequence law and of certified strategies."""

from __future__ import annotations

import pandas as pd

from moe_routing import wording
from moe_routing.analysis.tables import TableRow, groups_of, rows_of
from moe_routing.reporting.claims import distinct
from moe_routing.reporting.findings_budgets import LEVER_WORDS, SCALE_WORDS, middle_budget
from moe_routing.reporting.findings_consequence import LAW_FILE
from moe_routing.reporting.names import short_words
from moe_routing.reporting.results import StudyResults
from moe_routing.reporting.tables import datasets_by_task, marked, with_dagger
from moe_routing.routing.certificate import Certificate
from moe_routing.statistics.rules import AS_IS, OMITTED, PLAIN
from moe_routing.vocabulary import DATASETS, DIVERGENCE, METRICS, text_dataset

MOST_ROWS = 8
"""Rows of a table in the body of the article."""


def main_set(study: StudyResults) -> str:
    """Return the data set that the rows of the main table are ordered by."""
    return text_dataset(study.budgets["dataset"].drop_duplicates())


def main_table(study: StudyResults) -> pd.DataFrame:
    """Return the loss over stock of the best rules at the middle budget, as is, by data set.

    The first row is the fixed number of experts; the others are ordered by their loss on the text
    set, whose mean experts are given. A dagger marks losses that differ significantly from those of
    the fixed number.
    """
    rows = distinct(study.budgets)
    budget = middle_budget(rows)
    rows = rows[(rows["scale"] == AS_IS) & (rows["budget"] == budget)]
    text = rows[rows["dataset"] == main_set(study)].sort_values("loss_over_stock", kind="stable")
    plain = [kind == PLAIN for kind in text["kind"]]
    chosen = pd.concat([text.loc[plain], text.loc[[not one for one in plain]]]).head(MOST_ROWS)
    return _by_set(study, rows, chosen)


def _by_set(study: StudyResults, rows: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "Rule": [kind.words for kind in chosen["kind"]],
            "Experts": [wording.experts(value) for value in chosen["mean_experts"]],
        }
    )
    for dataset in datasets_by_task(study):
        own = rows[rows["dataset"] == dataset].set_index("strategy")
        if own.empty:
            continue
        unit = METRICS[own["metric"].iloc[0]].unit
        own = own.reindex(chosen["strategy"])
        table[f"{DATASETS[dataset].label}, {unit}"] = [
            "not run" if pd.isna(row.loss_over_stock) else _loss(row) for row in rows_of(own)
        ]
    return table


def _loss(row: TableRow) -> str:
    text = wording.difference(row.loss_over_stock, row.low, row.high, row.metric, unit=False)
    return with_dagger(text, row.verdict)


def budgets_table(study: StudyResults) -> pd.DataFrame:
    """Return every setting: experts, loss over stock and against a fixed number, by data set."""
    return pd.DataFrame(
        [
            {
                "Strategy": f"`{row.strategy}`",
                "Data set": DATASETS[row.dataset].label,
                "Mean experts": wording.experts(row.mean_experts),
                "Loss over stock": wording.difference(
                    row.loss_over_stock, row.low, row.high, row.metric, unit=False
                ),
                "Against a fixed number": _versus(row),
            }
            for row in rows_of(study.budgets)
        ]
    )


def _versus(row: TableRow) -> str:
    """Return the difference from a fixed number, with a dagger if it was shown."""
    if pd.isna(row.versus_static):
        return ""
    ends = (row.versus_static, row.static_low, row.static_high)
    return with_dagger(wording.difference(*ends, row.metric, unit=False), row.verdict)


def levers_alone(study: StudyResults) -> pd.DataFrame:
    """Return the rows of levers that stand alone, on the text set, at the middle budget."""
    rows = study.statistics["levers"]
    if rows.empty:
        return rows
    alone = (rows["without"] == PLAIN.words) & (rows["dataset"] == main_set(study))
    own = rows[alone & (rows["budget"] == middle_budget(study.budgets))]
    return own[own["difference"].notna()]


def levers_alone_table(study: StudyResults) -> pd.DataFrame:
    """Return each lever alone against a fixed number of experts, as is and at fitted scale."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows_of(levers_alone(study)):
        name = row.strategy.removesuffix("_scaled")
        line = lines.setdefault(
            (row.lever, name),
            {"Lever": LEVER_WORDS[row.lever][1],
             "Rule": f"{short_words(name, study.model.rule.weighting)}, `{name}`",
             "As is": "not run", "At fitted scale": "not run"},
        )  # fmt: skip
        line[SCALE_WORDS[row.scale].capitalize()] = marked(row)
    return pd.DataFrame(list(lines.values())[:MOST_ROWS])


def levers_table(study: StudyResults) -> pd.DataFrame:
    """Return each setting against itself without a lever: a row per setting, by data set."""
    table = []
    rows = study.statistics["levers"]
    for (lever, strategy), own in groups_of(rows, ["lever", "strategy"]):
        by_set = {row.dataset: row for row in rows_of(own)}
        first = own.iloc[0]
        line = {
            "Lever": LEVER_WORDS[lever][1],
            "Strategy": f"`{strategy}`",
            "Without it": first["without"],
        }
        for dataset in datasets_by_task(study):
            row = by_set.get(dataset)
            unit = METRICS[study.main_measures[dataset]].unit
            entry = "" if row is None else marked(row)
            line[f"{DATASETS[dataset].label}, {unit}"] = entry
        table.append(line)
    return pd.DataFrame(table)


def timing_table(study: StudyResults) -> pd.DataFrame:
    """Return the measured times: median seconds and the ratio to the baseline."""
    return pd.DataFrame(
        [
            {
                "Strategy": f"`{row.strategy}`",
                "Seconds": wording.interval(row.median_seconds, row.low, row.high),
                "Ratio to the baseline": wording.interval(row.ratio, row.ratio_low, row.ratio_high),
            }
            for row in rows_of(study.statistics["timing"])
        ]
    )


def law_table(study: StudyResults) -> pd.DataFrame:
    """Return the consequence law by layer, for removals without a substitute."""
    law = study.table(LAW_FILE)
    rows = law[law["dropped"] == OMITTED]
    return pd.DataFrame(
        {
            "Layer": rows["layer"].astype(str),
            "Slope, weight": rows["weight_slope"].map("{:.2f}".format),
            "Slope, norm": rows["norm_slope"].map("{:.2f}".format),
            "R²": rows["r2"].map("{:.2f}".format),
            "$c_l$": rows["constant"].map(wording.scientific),
            "R² of the law": rows["law_r2"].map("{:.2f}".format),
            "Between tokens": [wording.percent(float(part), 0) for part in rows["token_share"]],
        }
    )


def certified_table(study: StudyResults) -> pd.DataFrame:
    """Return each certified strategy: its promise, and its damage by text."""
    table = []
    for name, certificate in study.certificates.items():
        promise = f"at most {certificate.margin:g}"
        first = {"Strategy": f"`{name}`", "Promise": promise}
        table.append({**first, **_calibration(certificate)})
        metrics = study.metrics[
            (study.metrics["strategy"] == name) & (study.metrics["metric"] == DIVERGENCE.name)
        ]
        table += [{**first, **_held_out(row, study.budgets)} for row in rows_of(metrics)]
    return pd.DataFrame(table)


def _calibration(certificate: Certificate) -> dict[str, str]:
    return {
        "Text": f"calibration (n = {wording.count(certificate.documents)})",
        "Mean experts": wording.experts(certificate.mean_experts),
        "KL from stock": f"{certificate.damage:.2g}",
    }


def _held_out(row: TableRow, budgets: pd.DataFrame) -> dict[str, str]:
    own = budgets[(budgets["strategy"] == row.strategy) & (budgets["dataset"] == row.dataset)]
    return {
        "Text": f"{DATASETS[row.dataset].label} (n = {wording.count(row.n)})",
        "Mean experts": wording.experts(own["mean_experts"].iloc[0]) if len(own) else "not counted",
        "KL from stock": wording.interval(row.value, row.ci_low, row.ci_high),
    }
