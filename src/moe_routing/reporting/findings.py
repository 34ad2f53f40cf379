"""What may be said, chosen by the numbers: pure functions from tables to sentences.

Every sentence that states a result, in the report and in the article, is made here, so that no
text can disagree with the tables. "No difference could be shown" is a finding like the others. A
finding names the file that its numbers come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from moe_routing.figures.labels import dataset_label, family_label, metric_label
from moe_routing.reporting import wording as w
from moe_routing.statistics.verdict import Verdict

CHANCE = {"hellaswag": 0.25}
"""Accuracy of guessing, where a data set has one."""

STATIC = ("regular", "normalized", "uniform")
"""Families with the same number of experts for every token."""

FLOOR_DECIDES = 0.5
"""Above this share of decisions without any rejection, the floor is called the method."""

WEAK_MARGIN = 0.2
"""A margin above this share of what the baseline achieves beyond guessing is called wide."""


@dataclass(frozen=True)
class Finding:
    """A sentence and where its numbers stand.

    Attributes:
        text: one or more sentences of Markdown.
        source: file under the results folder.
        verdict: the outcome that chose the sentence, for tests and for emphasis.
    """

    text: str
    source: str
    verdict: str = ""

    def __str__(self) -> str:
        return self.text


PRIMARY = "statistics/primary.csv"
PAIRED = "statistics/paired.csv"
NONINFERIORITY = "statistics/noninferiority.csv"
MATCHED = "statistics/matched_compute.csv"
CELLS = "comparison/full_routing_results.csv"


def primary(table: pd.DataFrame, confidence: float) -> Finding:
    """State the primary contrast from ``statistics/primary.csv``."""
    if table.empty:
        return Finding("The primary contrast was not computed.", PRIMARY, "missing")
    row = main_row(table)
    outcome = Verdict(row["verdict"])
    return Finding(f"{_contrast(row, outcome)} {_numbers(row, confidence)}", PRIMARY, outcome)


def main_row(table: pd.DataFrame) -> pd.Series:
    """Return the row of the primary contrast on its data set's main metric."""
    return table[_true(table["main"])].iloc[0]


def _contrast(row: pd.Series, outcome: Verdict) -> str:
    """Return the sentence of a comparison with the baseline, without its numbers."""
    arm, baseline = f"`{row['strategy']}`", f"`{row['baseline']}`"
    where = dataset_label(row["dataset"])
    margin = row.get("margin", float("nan"))
    limit = f"{w.magnitude(margin, row['metric'])} or more" if pd.notna(margin) else ""
    better, worse = _directions(row["metric"])
    sentences = {
        Verdict.IDENTICAL: f"On {where}, {arm} and {baseline} had the same result on every item.",
        Verdict.BETTER: f"On {where}, {arm} {better} than {baseline}.",
        Verdict.WORSE: f"On {where}, {arm} {worse} than {baseline}{_beyond(row, limit)}.",
        Verdict.WORSE_WITHIN_MARGIN: f"On {where}, {arm} {worse} than {baseline}, but a loss of "
        f"{limit} is ruled out.",
        Verdict.NON_INFERIOR: f"On {where}, no difference between {arm} and {baseline} could be "
        f"shown, and a loss of {limit} is ruled out.",
        Verdict.INCONCLUSIVE: f"On {where}, no difference between {arm} and {baseline} could be "
        "shown" + (f", but neither is a loss of {limit} ruled out." if limit else "."),
    }
    return sentences[outcome]


def _beyond(row: pd.Series, limit: str) -> str:
    """Return what the interval says about a shown loss and the margin."""
    if not limit:
        return ""
    least = -row["high"] if w.is_share(row["metric"]) else row["low"]
    if least >= row["margin"]:
        return f", by {limit}"
    return f", and a loss of {limit} is not ruled out"


def _directions(metric: str) -> tuple[str, str]:
    if w.is_share(metric):
        return "was more accurate", "was less accurate"
    return "predicted better", "predicted worse"


def _numbers(row: pd.Series, confidence: float) -> str:
    """Return the sentence that holds the numbers of a comparison."""
    text = w.difference(row["difference"], row["low"], row["high"], row["metric"])
    noun = w.measure_words(row["metric"])
    parts = [f"Difference in {noun}: {text}, {w.percent(confidence, 0)} interval"]
    parts.append(w.p_value(row["p_adjusted"]))
    parts.append(f"n = {w.count(row['n_items'])} items")
    return f"{'; '.join(parts)}."


def compute(table: pd.DataFrame) -> Finding:
    """State how many experts the primary strategy used, from ``statistics/primary.csv``."""
    if table.empty:
        return Finding("Mean experts of the primary contrast are missing.", PRIMARY, "missing")
    row = main_row(table)
    own, stock = row["mean_experts"], row["baseline_mean_experts"]
    ratio = own / stock
    relation = (
        f"{w.percent(1 - ratio, 0)} fewer" if ratio < 1 else f"{w.percent(ratio - 1, 0)} more"
    )
    if abs(ratio - 1) < 0.005:
        relation = "the same number"
    text = (
        f"There `{row['strategy']}` used {w.experts(own)} experts a token on average, {relation} "
        f"than the {w.experts(stock)} of `{row['baseline']}`."
    )
    if relation == "the same number":
        text = text.replace(f"{relation} than the", "the same number as the")
    return Finding(text, PRIMARY, "fewer" if ratio < 1 else "more")


def matched(table: pd.DataFrame) -> Finding:
    """State the primary strategy against the static curve at its own compute."""
    if table.empty:
        return Finding("The comparison at matched compute is missing.", PRIMARY, "missing")
    row = main_row(table)
    if row["matched_status"] != "matched":
        text = (
            f"At matched compute nothing can be said of `{row['strategy']}`: its "
            f"{w.experts(row['mean_experts'])} experts lie {row['matched_status']} of static top-k."
        )
        return Finding(text, PRIMARY, "outside")
    outcome = Verdict(row["matched_verdict"])
    numbers = w.difference(
        row["matched_difference"], row["matched_low"], row["matched_high"], row["metric"]
    )
    subject = f"a static top-k of the same {w.experts(row['mean_experts'])} experts"
    better, worse = _directions(row["metric"])
    sentences = {
        Verdict.BETTER: f"it {better} than {subject} would",
        Verdict.WORSE: f"it {worse} than {subject} would",
        Verdict.IDENTICAL: f"it equals {subject} on every item",
        Verdict.INCONCLUSIVE: f"no difference from {subject} could be shown",
    }
    text = f"At matched compute, {sentences[outcome]} ({numbers})."
    return Finding(text, PRIMARY, outcome)


def against_baseline(
    paired: pd.DataFrame, families: dict[str, str], baseline: str
) -> list[Finding]:
    """Sum up every comparison with the baseline on main metrics, a sentence a data set.

    Args:
        paired: ``statistics/paired.csv``.
        families: family of each strategy.
        baseline: the strategy compared with.
    """
    if paired.empty:
        return [Finding("The paired comparisons were not computed.", PAIRED, "missing")]
    main = paired[_true(paired["main"])]
    return [
        _dataset_summary(rows, dataset, families, baseline)
        for dataset, rows in main.groupby("dataset", sort=False)
    ]


def _dataset_summary(
    rows: pd.DataFrame, dataset: str, families: dict[str, str], baseline: str
) -> Finding:
    groups = {
        outcome: list(rows.loc[rows["verdict"] == outcome, "strategy"]) for outcome in Verdict
    }
    clauses = [
        _clause(groups[Verdict.BETTER], "better"),
        _clause(groups[Verdict.WORSE] + groups[Verdict.WORSE_WITHIN_MARGIN], "worse"),
    ]
    shown = [clause for clause in clauses if clause]
    unshown = len(groups[Verdict.NON_INFERIOR]) + len(groups[Verdict.INCONCLUSIVE])
    text = f"On {dataset_label(dataset)}, of {w.plural(len(rows), 'other setting')}, "
    text += w.listed(shown) if shown else f"none could be shown to differ from `{baseline}`"
    if shown:
        text += f" than `{baseline}` after correction for multiplicity"
        text += f"; for {w.count(unshown)} no difference could be shown" if unshown else ""
    same = groups[Verdict.IDENTICAL]
    text += f"; {w.code(same)} gave the same results" if same else ""
    safe = groups[Verdict.NON_INFERIOR] + groups[Verdict.WORSE_WITHIN_MARGIN]
    text += f". A loss as large as the margin is ruled out for {w.plural(len(safe), 'setting')}"
    text += _of_family(safe, families) + "."
    if groups[Verdict.BETTER]:
        verdict = "some better"
    else:
        verdict = "some worse" if shown else "no difference shown"
    return Finding(text, PAIRED, verdict)


def _clause(strategies: list[str], word: str) -> str:
    if not strategies:
        return ""
    verb = "was" if len(strategies) == 1 else "were"
    names = f" ({w.code(strategies)})" if len(strategies) <= 4 else ""
    return f"{w.count(len(strategies))} {verb} {word}{names}"


def _of_family(strategies: list[str], families: dict[str, str]) -> str:
    bh = [name for name in strategies if families.get(name) == "bh"]
    if not strategies:
        return ""
    return f", {len(bh) or 'none'} of them BH"


def matched_summary(table: pd.DataFrame, families: dict[str, str]) -> list[Finding]:
    """Sum up the comparison at matched compute, over data sets and main metrics.

    One sentence for each family whose number of experts is not the same for every token.
    """
    if table.empty:
        return [Finding("The comparison at matched compute was not computed.", MATCHED, "missing")]
    main = table[_true(table["main"])].assign(family=lambda t: t["strategy"].map(families))
    return [
        _matched_family(rows, family_label(family))
        for family, rows in main.groupby("family", sort=False)
        if family not in STATIC
    ]


def _matched_family(rows: pd.DataFrame, label: str) -> Finding:
    inside = rows[rows["status"] == "matched"]
    if inside.empty:
        text = f"{label} never used a number of experts that static top-k covers on both sides."
        return Finding(text, MATCHED, "outside")
    outcomes = inside["verdict"].value_counts()
    better, worse = (int(outcomes.get(name, 0)) for name in (Verdict.BETTER, Verdict.WORSE))
    verdict = "mixed" if better and worse else "better" if better else "worse" if worse else "none"
    cells = w.plural(len(inside), "comparison")
    lead = {
        "mixed": f"{label} was better than static top-k of the same mean number of experts in "
        f"{better} and worse in {worse} of {cells}",
        "better": f"{label} was better than static top-k of the same mean number of experts in "
        f"{better} of {cells}",
        "worse": f"{label} was worse than static top-k of the same mean number of experts in "
        f"{worse} of {cells}",
        "none": f"{label} could in none of {cells} be told from static top-k of the same mean "
        "number of experts",
    }[verdict]
    rest = len(inside) - better - worse
    text = f"{lead}; in {rest} no difference could be shown" if rest and verdict != "none" else lead
    outside = len(rows) - len(inside)
    if outside:
        text += f" ({w.plural(outside, 'more cell')} had no static neighbour on both sides)"
    return Finding(f"{text}.", MATCHED, verdict)


def binding(cells: pd.DataFrame) -> Finding | None:
    """State how often BH rejected nothing, so that its floor decided; None without BH."""
    bh = cells[cells["family"] == "bh"]
    if bh.empty:
        return None
    empty = bh.groupby("strategy", sort=False)["share_empty"].mean()
    low, high = empty.min(), empty.max()
    nulls = w.listed([f"`{null}`" for null in bh["null"].drop_duplicates()])
    spread = w.percent(low) if high - low < 0.0005 else f"{w.percent(low)} to {w.percent(high)}"
    text = (
        f"Under the null {nulls}, BH kept no expert of its own in {spread} of decisions "
        f"(settings averaged over data sets), where the floor gave the token its one expert. "
    )
    many = list(empty.index[empty > FLOOR_DECIDES])
    if len(many) == len(empty):
        text += "In every setting the floor, not the test, decided most of the routing."
        return Finding(text, CELLS, "floor decides")
    if many:
        text += f"The floor decided most of the routing in {w.code(many)}."
        return Finding(text, CELLS, "floor decides in part")
    text += "In no setting did the floor decide most of the routing."
    return Finding(text, CELLS, "test decides")


def cap(cells: pd.DataFrame) -> Finding | None:
    """State whether max_k matters: mean experts across max_k at equal alpha and null."""
    bh = cells[cells["family"] == "bh"]
    groups = ["alpha", "null", "weighting"]
    table = bh.groupby([*groups, "k"])["mean_experts"].mean().reset_index()
    table = table[table.groupby(groups)["k"].transform("nunique") > 1]
    if table.empty:
        return None
    _, widest = max(table.groupby(groups), key=lambda item: len(item[1]))
    first, last = widest.sort_values("k").iloc[[0, -1]].itertuples(index=False)
    ratio = last.mean_experts / first.mean_experts
    text = (
        f"At alpha {first.alpha}, raising max_k from {first.k} to {last.k} moved the mean experts "
        f"a token from {w.experts(first.mean_experts)} to {w.experts(last.mean_experts)}"
    )
    inert = ratio < 1.05
    text += ": the cap is nearly inert." if inert else ": the cap shapes the routing."
    return Finding(text, CELLS, "inert" if inert else "binds")


def chance(cells: pd.DataFrame, baseline: str, margin: float) -> list[Finding]:
    """State for each accuracy set whether the baseline leaves anything to lose."""
    findings = []
    for row in cells[cells["strategy"] == baseline].itertuples():
        if not w.is_share(row.metric):
            continue
        guess = CHANCE.get(row.dataset, 0.0)
        value = w.estimate(row.value, row.ci_low, row.ci_high, row.metric)
        name = f"{dataset_label(row.dataset)} ({metric_label(row.metric)} {value} %)"
        if guess and row.ci_low <= guess:
            text = (
                f"On {name}, the stock model `{baseline}` cannot be told from guessing "
                f"({w.percent(guess, 0)}), so this set cannot show what routing costs."
            )
            findings.append(Finding(text, CELLS, "at chance"))
        elif margin > WEAK_MARGIN * (row.value - guess):
            text = (
                f"On {name}, the stock model `{baseline}` achieves only "
                f"{100 * (row.value - guess):.1f} percentage points"
                + (" above guessing" if guess else "")
                + f", so ruling out a loss of {w.magnitude(margin, row.metric)} says little."
            )
            findings.append(Finding(text, CELLS, "wide margin"))
    return findings


def weighting(paired: pd.DataFrame, native_k: int) -> Finding | None:
    """State what renormalised and uniform weights cost at the model's own k."""
    arms = {f"normalized_k{native_k}": "renormalised", f"uniform_k{native_k}": "uniform"}
    if paired.empty:
        return None
    rows = paired[paired["strategy"].isin(arms) & _true(paired["main"])]
    if rows.empty:
        return None
    clauses, outcomes = [], set()
    for strategy, group in rows.groupby("strategy", sort=False):
        worse = _names(group, Verdict.WORSE, Verdict.WORSE_WITHIN_MARGIN)
        better = _names(group, Verdict.BETTER)
        said = [f"worse on {w.listed(worse)}"] if worse else []
        said += [f"better on {w.listed(better)}"] if better else []
        outcomes |= {"worse"} if worse else set()
        outcomes |= {"better"} if better else set()
        verb = f"was {w.listed(said)}" if said else "could not be shown to differ"
        clauses.append(f"{arms[strategy]} weighting (`{strategy}`) {verb}")
    text = (
        f"With the same {native_k} experts, {w.listed(clauses)}, compared with raw softmax weights."
    )
    return Finding(text, PAIRED, "mixed" if len(outcomes) > 1 else "".join(outcomes) or "none")


def _names(rows: pd.DataFrame, *outcomes: Verdict) -> list[str]:
    return [dataset_label(name) for name in rows.loc[rows["verdict"].isin(outcomes), "dataset"]]


def fewest_static(
    noninferiority: pd.DataFrame, cells: pd.DataFrame, native_k: int
) -> list[Finding]:
    """State for each data set the fewest static experts that rule out a loss of the margin."""
    static = cells[cells["family"] == "regular"].set_index("strategy")["k"]
    static = static[~static.index.duplicated()]
    fewer = static[static < native_k]
    if noninferiority.empty or fewer.empty:
        return []
    rows = noninferiority[
        _true(noninferiority["main"]) & noninferiority["strategy"].isin(fewer.index)
    ].assign(k=lambda t: t["strategy"].map(static))
    findings = []
    for dataset, group in rows.groupby("dataset", sort=False):
        safe = group.loc[_true(group["noninferior"]), "k"]
        margin = w.magnitude(group["margin"].iloc[0], group["metric"].iloc[0])
        where = dataset_label(dataset)
        if safe.empty:
            text = f"On {where}, no static k below {native_k} rules out a loss of {margin}."
        else:
            text = (
                f"On {where}, static top-{safe.min()} already rules out a loss of {margin} "
                f"against top-{native_k}."
            )
        findings.append(Finding(text, NONINFERIORITY, "none" if safe.empty else "fewer suffice"))
    return findings


def ranks(friedman: pd.DataFrame) -> Finding | None:
    """State Friedman's test over data sets; None where it was not made."""
    if friedman.empty:
        return None
    row = friedman.iloc[0]
    different = row["p_iman_davenport"] <= 0.05
    said = "differ" if different else "could not be shown to differ"
    beyond = friedman.loc[_true(friedman["beyond_critical_difference"]), "strategy"]
    text = (
        f"Over {w.count(row['n_datasets'])} data sets, average ranks of "
        f"{w.count(row['n_strategies'])} strategies {said} (Iman-Davenport "
        f"{w.p_value(row['p_iman_davenport'])}); "
    )
    if different and len(beyond):
        text += f"{w.plural(len(beyond), 'strategy').replace('strategys', 'strategies')} "
        text += "lie beyond the critical difference from the baseline."
    else:
        text += "none lies beyond the critical difference from the baseline."
    if row["n_datasets"] <= 3:
        text += " With so few data sets this test has little power."
    return Finding(text, "statistics/friedman.csv", "different" if different else "not shown")


def pareto(table: pd.DataFrame, baseline: str) -> list[Finding]:
    """State for each data set which strategies no other one beats in both cost and quality."""
    if table.empty:
        return []
    findings = []
    for dataset, rows in table.groupby("dataset", sort=False):
        on_front = rows[_true(rows["on_front"])]
        sure = list(on_front.loc[on_front["front_share"] >= 0.9, "strategy"])
        text = (
            f"On {dataset_label(dataset)}, {w.plural(len(on_front), 'setting')} "
            f"{'is' if len(on_front) == 1 else 'are'} on the Pareto front of mean experts and "
            f"quality; in at least nine of ten resamples: {w.code(sure)}. "
        )
        inside = baseline in set(on_front["strategy"])
        text += f"`{baseline}` {'is' if inside else 'is not'} on it."
        verdict = "baseline on front" if inside else "baseline beaten"
        findings.append(Finding(text, "statistics/pareto.csv", verdict))
    return findings


def speed(cells: pd.DataFrame, baseline: str) -> Finding | None:
    """State measured speed against the baseline, summed over data sets; None without a baseline."""
    totals = cells.groupby("strategy", sort=False)[["tokens", "wall_seconds"]].sum()
    if baseline not in totals.index or len(totals) < 2:
        return None
    rate = totals["tokens"] / totals["wall_seconds"]
    ratio = (rate / rate[baseline]).drop(baseline)
    text = (
        f"Measured once on one machine, without repetition and so without an interval: the fastest "
        f"setting was `{ratio.idxmax()}` at {ratio.max():.2f} times the tokens a second of "
        f"`{baseline}`, the slowest `{ratio.idxmin()}` at {ratio.min():.2f} times."
    )
    return Finding(text, CELLS, "faster" if ratio.max() > 1 else "not faster")


def detectable(primary_table: pd.DataFrame) -> Finding | None:
    """State the smallest difference the primary contrast would probably have found."""
    if primary_table.empty:
        return None
    row = main_row(primary_table)
    if pd.isna(row["minimum_detectable_difference"]):
        return None
    size = row["minimum_detectable_difference"]
    margin = row["margin"]
    text = (
        f"With {w.count(row['n_items'])} items, the primary contrast would find a difference of "
        f"{w.magnitude(size, row['metric'])} in 80 % of runs"
    )
    if pd.isna(margin):
        return Finding(f"{text}.", PRIMARY, "no margin")
    small = size > margin
    text += (
        f", which is more than the margin of {w.magnitude(margin, row['metric'])}: the sample is "
        "too small to settle differences of that size."
        if small
        else f", no more than the margin of {w.magnitude(margin, row['metric'])}."
    )
    return Finding(text, PRIMARY, "too small" if small else "large enough")


def _true(column: pd.Series) -> pd.Series:
    """Read truth values that a CSV may hold as words."""
    return column.astype(str).str.lower() == "true"
