"""The article's passages about question and methods that depend on the parts of a study.

Pure functions from a study to Markdown. The text claims nothing of parts that the study lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pandas as pd

from moe_routing import wording
from moe_routing.reporting.results import StudyResults
from moe_routing.reporting.tables import epsilon_of
from moe_routing.vocabulary import DATASETS, TASKS, NeededId

ROUTING = "baseline/baseline_routing_stats.csv"


def has_bh(study: StudyResults) -> bool:
    """Return whether Benjamini-Hochberg routing was scored."""
    return "bh" in study.family_of.values()


def nulls(study: StudyResults) -> list[str]:
    """Return the nulls that compared strategies take their p-values from, in order."""
    column = study.cells["null"].drop_duplicates()
    return [str(name) for name in column if pd.notna(name) and name != "none"]


def needed(names: Iterable[str]) -> list[str]:
    """Return the nulls that are calibrated by toggling experts, in order."""
    return [name for name in names if NeededId.parse(name)]


def window(study: StudyResults) -> int | None:
    """Return the number of tokens in a window; None if it was not recorded.

    The baseline analysis uses the same windows as the cells.
    """
    if study.config.evaluation.window:
        return study.config.evaluation.window
    table = study.table(ROUTING)
    return None if table.empty else int(table["window"].iloc[0])


def _asked(study: StudyResults) -> str:
    top_k = study.model.top_k
    if not has_bh(study):
        return (
            f"Does every token need all {top_k} experts that the model uses, or do other choices "
            "of experts and weights do as well?"
        )
    return (
        f"How many of its {top_k} experts does a token need? And is a number chosen for each token "
        "by a statistical test (Benjamini-Hochberg, BH) better than a fixed one?"
    )


def _rule(study: StudyResults) -> str:
    if has_bh(study):
        return "The rule studied here, BH routing, takes"
    return "One such rule, BH routing, which is not among the strategies compared here, takes"


def _same_source(study: StudyResults) -> str:
    """Return which evaluation sets have other documents of the calibration's own source."""
    own = study.config.calibration.source
    sets = [
        DATASETS[name].label
        for name, dataset in study.config.datasets.items()
        if dataset.source == own
    ]
    return f", but of the same source as those of {wording.listed(sets)}" if sets else ""


def _nulls(study: StudyResults) -> str:
    text = (
        f"calibrated on {wording.count(study.config.calibration.tokens)} tokens. Their documents "
        f"are in no evaluation set{_same_source(study)}."
    )
    if needed(study.config.calibration.nulls):
        toggled = wording.count(study.config.calibration.toggled_tokens)
        text += f" Experts were toggled for {toggled} tokens of this text."
    if nulls(study):
        return f"Strategies take p-values from {wording.code(nulls(study))}, {text}"
    start = "No compared strategy takes p-values."
    table = study.table("bh/bh_routing_results.csv")
    if table.empty:
        return start
    tested = [name for name in table["null"].drop_duplicates() if isinstance(name, str)]
    return (
        f"{start} The analysis of BH on text (@sec-bh) takes them from {wording.code(tested)}, "
        f"{text}"
    )


def _epsilon(study: StudyResults) -> str:
    """Return the epsilon in force of nulls whose id names none."""
    value = epsilon_of(study, str(NeededId()))
    if value is None:
        return "$\\varepsilon$ is a parameter of the null."
    text = f"Unless a null names another, $\\varepsilon$ is {wording.scientific(value)} nats"
    if study.config.calibration.epsilon:
        return f"{text}."
    layers, experts = study.model.layers, study.model.experts
    return (
        f"{text}: {value * layers * experts:.2g} nats shared out over the {experts} experts of "
        f"each of the {layers} layers."
    )


def _scoring(study: StudyResults) -> str:
    size = window(study)
    windows = "windows of the model's context, side by side"
    if size:
        windows = f"windows of {wording.count(size)} tokens at a stride of {wording.count(size)}"
    tasks = set(study.cells["task"])
    texts = [task.scoring.format(windows=windows) for task in TASKS.values() if task.name in tasks]
    return " ".join(["All items are scored zero-shot.", *texts])


def _divergence(study: StudyResults) -> str:
    if study.divergence.empty:
        return ""
    return (
        "For the same reason, we measure the Kullback-Leibler divergence of a strategy's "
        "next-token predictions from the baseline's."
    )


def _bh_in_depth(study: StudyResults) -> str:
    if study.table("bh/bh_routing_results.csv").empty:
        return "BH was not run over a grid of max_k, alpha and null in this run."
    return (
        "In addition to the cells, BH was run on text over a grid of max_k, alpha and null "
        "(@fig-bh-quality, @fig-bh-saturation)."
    )


def _examined(study: StudyResults) -> str:
    if study.table("validity/verdict.csv").empty:
        return "A null can be tested in designs in which its hypothesis is true."
    return (
        "Each null that is about the logits alone was tested in simulated designs. In some its "
        "hypothesis is true for every expert; others violate its assumptions. Each null has at "
        "least two besides the one that is its definition. No expert deserves to be selected in "
        "them, so every selection is false. BH may then select something for at most a proportion "
        "alpha of the tokens. To keep this size is weak control: it says nothing about the false "
        "discovery rate where some experts are signals. Designs that reshuffle the real logits "
        "show what BH would select if all of them were noise. They take no part in the verdict. "
        "The router's decisions are in the upper tail of a real layer. A null that is monotone in "
        "a layer's logits and has power on real text must therefore fail there (@fig-size, "
        f"@tbl-size).{_designs(study)}\n\n"
        "@fig-bound shows how often marginal nulls select anything on real text, and @fig-binding "
        "whether the test, the floor or the cap decides there."
    )


def _designs(study: StudyResults) -> str:
    """Return what each design that was used simulates, as a list."""
    table = study.table("validity/designs.csv")
    if table.empty:
        return ""
    used = table[table["nulls"].notna()]
    lines = [
        f"- *{wording.as_words(name)}*: {why}."
        for name, why in zip(used["design"], used["why"], strict=True)
    ]
    return "\n\n" + "\n".join(lines)


def _verified(study: StudyResults) -> str:
    rates = study.table("validity/false_discoveries.csv")
    if rates.empty:
        return "The false discovery rate can be measured on documents that nothing was fitted on."
    levels = wording.listed([f"{alpha:g}" for alpha in sorted(rates["alpha"].unique())])
    chance = study.model.layers * (1 - study.config.statistics.confidence) / 2
    return (
        "On documents that nothing was fitted on, and on the contexts of evaluation sets, experts "
        "were toggled as in the calibration. Lower ranks are sampled, and a pair counts with its "
        "sampling weight. So the false discovery rate is measured, not assumed (@fig-rates, "
        "@fig-rates-level, @tbl-rates). It is that of the rule, and of the routed set with its "
        f"floor and cap, at alpha {levels}. Intervals are studentised bootstraps of whole "
        "documents. Where nothing false is selected at all, the upper limit is Wilson's for as "
        "many tokens as documents. We say that a rate is above alpha if the lower end of its "
        "interval is. Layers are judged one by one, without correction for multiplicity: "
        f"of {study.model.layers} layers that keep alpha exactly, {chance:.1f} are expected above "
        "it by chance."
    )


PROSE: dict[str, Callable[[StudyResults], str]] = {
    "asked": _asked,
    "rule": _rule,
    "nulls": _nulls,
    "epsilon": _epsilon,
    "scoring": _scoring,
    "divergence": _divergence,
    "bh_in_depth": _bh_in_depth,
    "examined": _examined,
    "verified": _verified,
}
"""By name; in a page: ``a.text("asked")``."""
