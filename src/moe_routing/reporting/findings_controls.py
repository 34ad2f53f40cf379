"""Findings from the controls, the numerics arms and the divergence.

A control changes one part of a strategy, its base, and keeps the rest; a difference between the two
is due to that part. A rival is another rule, compared with the baseline here and with static top-k
at matched compute. Pure functions from tables to sentences, as in
:mod:`moe_routing.reporting.findings`.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from moe_routing import wording
from moe_routing.analysis.tables import groups_of, rows_of, truth_values
from moe_routing.reporting.claims import Finding, claims
from moe_routing.reporting.findings import NAMED, main_measure_rows, set_names
from moe_routing.reporting.findings_budgets import by_set
from moe_routing.reporting.names import in_words
from moe_routing.reporting.pages import CONTROLS_FILE, METRICS_FILE, NUMERICS_FILE, PAIRED_FILE
from moe_routing.routing.strategies import Strategy, control_kinds
from moe_routing.statistics.rules import MIXTURE
from moe_routing.statistics.verdict import LOSSES, SHOWN, Verdict
from moe_routing.vocabulary import DATASETS, METRICS, RAW_WEIGHTING, ControlKind

SETTINGS = {
    "experts_implementation": "the implementation of the experts",
    "dtype": "the number format",
    "token_budget": "the number of tokens in a forward pass",
}
"""What a numerics arm can change (:class:`moe_routing.config.study.NumericsArm`), in words."""

COUNTS_DIFFER = 0.05
"""Mean experts of control and base are stated if they differ by more than this proportion."""


def controls(
    table: pd.DataFrame, main: dict[str, str], strategies: Mapping[str, Strategy]
) -> list[Finding]:
    """State for each kind of control and base, and each rival, where it was worse or better.

    Args:
        table: ``statistics/controls.csv``; differences are control minus base.
        main: main measure of each data set; rows of other measures are told where they show the
            opposite.
        strategies: every strategy by id, bases included.
    """
    if table.empty:
        return []
    rows = table[~_has_rescaled_twin(table, strategies)]
    return [
        _control(kind, group, main, strategies[group["base"].iloc[0]])
        for kind in control_kinds().values()
        if kind.done
        for _, group in rows[rows["kind"] == kind.name].groupby(
            "strategy" if kind.on_curves else "base", sort=False
        )
    ]


def in_short(
    table: pd.DataFrame, main: dict[str, str], base: str, own_weighting: str
) -> list[Finding]:
    """State for each control of a strategy on which data sets it was better, worse or neither.

    Controls that do the same are told together. The static mixture is left out: it is a fixed
    number of experts, with which strategies are compared elsewhere.

    Args:
        table: ``statistics/controls.csv``.
        main: main measure of each data set.
        base: the strategy.
        own_weighting: the model's own weighting.
    """
    if table.empty:
        return []
    kinds = control_kinds()
    rows = main_measure_rows(table, main)
    named = [name for name, kind in kinds.items() if kind.short and name != MIXTURE]
    rows = rows[(rows["base"] == base) & rows["kind"].isin(named)]
    groups: dict[str, list[str]] = {}
    for kind, own in groups_of(rows, "kind"):
        groups.setdefault(by_set(own), []).append(kinds[kind].short)
    if not groups:
        return []
    parts = [
        f"a control with {wording.listed(names, 'or')} was {done}."
        for done, names in groups.items()
    ]
    lead = f"Compared with {in_words(base, own_weighting)} (`{base}`), {parts[0]}"
    text = " ".join([lead, *map(wording.capital, parts[1:])])
    return [Finding(text, CONTROLS_FILE, "", claims(rows, CONTROLS_FILE, "base"))]


def _has_rescaled_twin(rows: pd.DataFrame, strategies: Mapping[str, Strategy]) -> pd.Series:
    """Mark controls of bases with raw softmax weights that have a twin with rescaled weights.

    This concerns kinds whose outcome means something else under raw weights, such as random
    experts, which mix the choice of experts with lost output. The sentences are about the twin; the
    marked control is in the table alone.
    """
    kinds = [kind.name for kind in control_kinds().values() if kind.raw_meanings]
    mixed = rows["kind"].isin(kinds)
    keys = {
        index: (kind, _rule(strategies[base]), strategies[base].weighting_kind == RAW_WEIGHTING)
        for index, kind, base in rows.loc[mixed, ["kind", "base"]].itertuples()
    }
    rescaled = {(kind, rule) for kind, rule, raw in keys.values() if not raw}
    paired = [index for index, (*key, raw) in keys.items() if raw and tuple(key) in rescaled]
    return pd.Series(rows.index.isin(paired), index=rows.index)


def _rule(strategy: Strategy) -> tuple:
    """Return the family and parameters of a strategy without its weighting."""
    values = strategy.model_dump(exclude={"weighting"})
    return strategy.family.name, tuple(sorted(values.items()))


def _control(
    kind: ControlKind, table: pd.DataFrame, main: dict[str, str], base_strategy: Strategy
) -> Finding:
    rows = main_measure_rows(table, main)
    shown = set(rows["verdict"])
    worse, better = bool(shown & set(LOSSES)), Verdict.BETTER in shown
    control, base = (f"`{rows[name].iloc[0]}`" for name in ("strategy", "base"))
    text = kind.done.format(control=control, base=base)
    text += f"{_counts(rows)}, quality was {by_set(rows, apart=True)}."
    if non_inferior := set_names(rows, (Verdict.NON_INFERIOR,)):
        text += f" On {wording.listed(non_inferior)}, a loss of the margin is ruled out."
    opposite = _opposite(table.drop(rows.index), worse=worse, better=better)
    if len(opposite):
        text += f" Other metrics disagree: {wording.listed(_by_metric(opposite))}."
    mixed = (worse and better) or len(opposite)
    outcome = "mixed" if mixed else "worse" if worse else "better" if better else "none"
    meanings = {"mixed": "there is no general answer", **kind.meanings}
    if base_strategy.weighting_kind == RAW_WEIGHTING:
        meanings |= kind.raw_meanings
    found = claims(pd.concat([rows, opposite]), CONTROLS_FILE, "base")
    sets = set_names(rows, {"worse": LOSSES, "better": (Verdict.BETTER,)}.get(outcome, ()))
    where = f"on {wording.listed(sets)}, " if 0 < len(sets) < len(rows) else ""
    text += f" {wording.capital(where + meanings[outcome])}."
    return Finding(text, CONTROLS_FILE, outcome, found)


def _opposite(others: pd.DataFrame, *, worse: bool, better: bool) -> pd.DataFrame:
    """Return the rows of other metrics that show what the main ones do not."""
    wanted = [*(() if worse else LOSSES), *(() if better else (Verdict.BETTER,))]
    return others[others["verdict"].isin(wanted)]


def _by_metric(rows: pd.DataFrame) -> list[str]:
    return [
        f"{'better' if row.verdict == Verdict.BETTER else 'worse'} by "
        f"{wording.measure_words(row.metric)} on {DATASETS[row.dataset].label}"
        for row in rows_of(rows)
    ]


def _counts(rows: pd.DataFrame) -> str:
    """Return the mean experts of control and base if they are not nearly the same."""
    own, base = rows["control_mean_experts"].mean(), rows["base_mean_experts"].mean()
    if abs(own - base) <= COUNTS_DIFFER * base:
        return ""
    return f" ({wording.experts(own)} experts per token instead of {wording.experts(base)})"


def static_curve(
    curve: pd.DataFrame, table: pd.DataFrame, main: dict[str, str], top_k: int
) -> list[Finding]:
    """State for each data set what fewer and more static experts than the model's top k do.

    Args:
        curve: cells of static top-k, for their k.
        table: ``statistics/controls.csv``; only rows of kind static are used.
        main: main measure of each data set; rows of other measures are ignored.
        top_k: experts per token that the model was trained with.
    """
    if table.empty or curve.empty:
        return []
    experts = curve.drop_duplicates("strategy").set_index("strategy")["k"]
    rows = table[table["kind"] == "static"]
    rows = main_measure_rows(rows, main).assign(k=lambda t: t["strategy"].map(experts))
    rows = rows.dropna(subset=["k"])
    findings = []
    for dataset, group in groups_of(rows, "dataset"):
        sides = {"fewer": group[group["k"] < top_k], "more": group[group["k"] > top_k]}
        clauses = [_static_side(word, side) for word, side in sides.items() if len(side)]
        if not clauses:
            continue
        noun = wording.measure_words(main[dataset])
        base = group["base"].iloc[0]
        text = (
            f"On {DATASETS[dataset].label}, additional k were compared with `{base}` by {noun}. "
            f"{'. '.join(map(wording.capital, clauses))}."
        )
        shown = set(sides["more"]["verdict"])
        outcome = (
            "worse" if shown & set(LOSSES) else "better" if Verdict.BETTER in shown else "none"
        )
        found = claims(group, CONTROLS_FILE, "base")
        findings.append(Finding(text, CONTROLS_FILE, f"more {outcome}", found))
    return findings


def _static_side(word: str, rows: pd.DataFrame) -> str:
    """Return at which k static experts on one side of top k were worse, better or neither."""
    groups = {
        "worse": rows["verdict"].isin(LOSSES),
        "better": rows["verdict"] == Verdict.BETTER,
        "not shown to differ": ~rows["verdict"].isin(SHOWN),
    }
    parts = [
        f"{outcome} at k = {wording.listed([str(int(k)) for k in sorted(rows.loc[chosen, 'k'])])}"
        for outcome, chosen in groups.items()
        if chosen.any()
    ]
    return f"{word} static experts were {wording.listed(parts)}"


def noise_floor_by_dataset(table: pd.DataFrame, main: dict[str, str]) -> pd.Series:
    """Return for each data set the largest difference between two runs of the baseline."""
    if table.empty:
        return pd.Series(dtype=float)
    rows = main_measure_rows(table, main)
    return rows["difference"].abs().groupby(rows["dataset"], sort=False).max()


def numerics(table: pd.DataFrame, main: dict[str, str]) -> list[Finding]:
    """State how far the results of the baseline change when only its numerics change."""
    if table.empty:
        return []
    rows = main_measure_rows(table, main)
    changed = [changed_words(name) for name in rows["changed"].drop_duplicates()]
    lead = f"The baseline was scored again, changing only {wording.listed(changed, 'or')}"
    if (rows["largest_item_difference"] == 0).all() and (rows["flips"].fillna(0) == 0).all():
        text = f"{lead}. Every result stayed the same: no numerical noise was observed."
        return [Finding(text, NUMERICS_FILE, "none")]
    parts = [
        f"{DATASETS[dataset].label} by up to "
        f"{wording.small_difference(own['difference'].abs().max(), main[dataset])}{_flips(own)}"
        for dataset, own in groups_of(rows, "dataset")
    ]
    text = f"{lead}. This changed {wording.listed(parts)}. A smaller difference is not a finding."
    return [Finding(text, NUMERICS_FILE, "some")]


def changed_words(change: str) -> str:
    """Return the setting that a numerics arm changes in words, with its new value.

    >>> changed_words("token_budget = 1024")
    'the number of tokens in a forward pass (1,024)'
    """
    key, value = change.split(" = ")
    value = wording.count(int(value)) if value.isdecimal() else value
    return f"{SETTINGS[key]} ({value})"


def _flips(own: pd.DataFrame) -> str:
    """Return how many items at most flipped, for measures of right and wrong items."""
    if not METRICS[own["metric"].iloc[0]].is_proportion:
        return ""
    return f" ({wording.plural(int(own['flips'].max()), 'item')} flipped)"


def beyond_noise_floor(
    table: pd.DataFrame, paired: pd.DataFrame, main: dict[str, str]
) -> list[Finding]:
    """State which of the differences shown are within the numerical noise floor."""
    limits = noise_floor_by_dataset(table, main)
    if limits.empty or paired.empty:
        return []
    rows = paired[truth_values(paired["main"]) & paired["verdict"].isin(SHOWN)]
    rows = rows[rows["dataset"].isin(limits.index)]
    if rows.empty:
        return []
    within = rows[rows["difference"].abs() <= rows["dataset"].map(limits)]
    total = wording.plural(len(rows), "difference")
    if within.empty:
        text = f"All {total} shown against the baseline exceed the numerical noise floor."
        if len(rows) == 1:
            text = (
                "The one difference shown against the baseline exceeds the numerical noise floor."
            )
        return [Finding(text, PAIRED_FILE, "beyond")]
    names = [f"`{row.strategy}` on {DATASETS[row.dataset].label}" for row in rows_of(within)]
    which = f" ({wording.listed(names)})" if len(names) <= NAMED else ""
    text = (
        f"Of {total} shown against the baseline, {len(names)}{which} "
        f"{'does' if len(names) == 1 else 'do'} not exceed the numerical noise floor and "
        "must not be read as "
        f"{'an effect' if len(names) == 1 else 'effects'} of routing."
    )
    return [Finding(text, PAIRED_FILE, "within")]


def divergence(values: pd.Series, baseline: str) -> Finding | None:
    """State on each data set how far predictions diverge from the baseline's.

    Data sets are not averaged, because their texts differ. The estimates come from few items, so
    the smallest and the largest are a range without names, not a ranking;
    :func:`moe_routing.reporting.tables.divergence_table` has their intervals and numbers of items.

    Args:
        values: KL divergence by strategy and data set.
        baseline: the strategy to leave out.
    """
    values = values.drop(baseline, level="strategy", errors="ignore")
    if values.empty:
        return None
    parts = [
        _range(own, DATASETS[str(dataset)].label)
        for dataset, own in values.groupby(level="dataset", sort=False)
    ]
    text = (
        "KL from the baseline's next-token predictions, in nats per token, is given from the "
        f"nearest to the farthest setting. It is {wording.listed(parts)}."
    )
    return Finding(text, METRICS_FILE, "range")


def _range(values: pd.Series, where: str) -> str:
    """Return the smallest and the largest divergence on one data set."""
    ends = dict.fromkeys(f"{value:.2g}" for value in (values.min(), values.max()))
    return f"{' to '.join(ends)} on {where}"
