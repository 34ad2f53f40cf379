"""Tables of levers, of the consequence law and of certified strategies."""

from __future__ import annotations

import pandas as pd

from moe_routing.analysis.tables import TableRow, rows_of
from moe_routing.reporting import wording
from moe_routing.reporting.findings_consequence import LAW_FILE
from moe_routing.reporting.results import StudyResults
from moe_routing.routing.certificate import Certificate
from moe_routing.statistics.lever_kinds import CERTIFIED, OMITTED, SCALED, UNSCALED
from moe_routing.vocabulary import DATASETS, DIVERGENCE, METRICS, text_dataset


def levers_set(study: StudyResults) -> str:
    """Return the data set of the table of levers and its unit; empty without levers."""
    rows = _main_rows(study)
    if rows.empty:
        return ""
    first = rows.iloc[0]
    return f"{DATASETS[first['dataset']].label}, in {METRICS[first['metric']].unit}"


def _main_rows(study: StudyResults) -> pd.DataFrame:
    """Return the levers on the first perplexity set, or on the set that stands for it."""
    rows = study.lever_rows
    if rows.empty:
        return rows
    return rows[rows["dataset"] == text_dataset(rows["dataset"].drop_duplicates())]


def levers_table(study: StudyResults) -> pd.DataFrame:
    """Return the loss of every rule and budget: as is, and at fitted scale.

    The first row is the baseline, whose loss over itself changes with its scale.
    """
    rows = _main_rows(study)
    table = [_baseline(study, rows)]
    for kind in dict.fromkeys(rows["kind"]):
        own = rows[rows["kind"] == kind]
        by = "strategy" if kind.rule == CERTIFIED else "budget"
        for _, setting in own.groupby(by, sort=False):
            by_scale = setting.drop_duplicates("scale").set_index("scale")
            name = f" (`{setting['strategy'].iloc[0]}`)" if kind.rule == CERTIFIED else ""
            table.append(
                {
                    "Rule": f"{kind.words}{name}",
                    "Mean experts": wording.experts(setting["mean_experts"].iloc[0]),
                    "Loss as is": _loss(by_scale, UNSCALED),
                    "Loss at fitted scale": _loss(by_scale, SCALED),
                }
            )
    return pd.DataFrame([line for line in table if line])


def _baseline(study: StudyResults, rows: pd.DataFrame) -> dict[str, str]:
    """Return the row of the baseline under its fitted scale; nothing if it was not scored."""
    table = study.statistics["levers"]
    own = table[
        (table["dataset"] == rows["dataset"].iloc[0])
        & (table["scale"] == SCALED)
        & (table["reference"] == study.baseline)
    ]
    if own.empty:
        return {}
    row = next(iter(rows_of(own)))
    return {
        "Rule": f"`{study.baseline}`",
        "Mean experts": wording.experts(row.mean_experts),
        "Loss as is": "0",
        "Loss at fitted scale": f"{_interval(row)}, over `{study.baseline}`",
    }


def _loss(by_scale: pd.DataFrame, scale: str) -> str:
    if scale not in by_scale.index:
        return "not scored"
    return _interval(next(iter(rows_of(by_scale.loc[[scale]]))))


def _interval(row: TableRow) -> str:
    text = wording.difference(row.difference, row.low, row.high, row.metric)
    return text.replace(f" {METRICS[row.metric].unit}", "")


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
            "$c_l$": rows["constant"].map("{:.1e}".format),
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
        table += [{**first, **_held_out(row, study.lever_rows)} for row in rows_of(metrics)]
    return pd.DataFrame(table)


def _calibration(certificate: Certificate) -> dict[str, str]:
    return {
        "Text": f"calibration (n = {wording.count(certificate.documents)})",
        "Mean experts": wording.experts(certificate.mean_experts),
        "KL from stock": wording.divergence(certificate.damage),
    }


def _held_out(row: TableRow, levers: pd.DataFrame) -> dict[str, str]:
    own = levers[(levers["strategy"] == row.strategy) & (levers["dataset"] == row.dataset)]
    value, low, high = (wording.divergence(x) for x in (row.value, row.ci_low, row.ci_high))
    return {
        "Text": f"{DATASETS[row.dataset].label} (n = {wording.count(row.n)})",
        "Mean experts": wording.experts(own["mean_experts"].iloc[0]) if len(own) else "not counted",
        "KL from stock": f"{value} [{low}, {high}]",
    }
