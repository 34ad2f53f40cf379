"""Findings about procedures on simulated data, and about the specialisation of experts.

Pure functions from the tables of two analyses to sentences, as in
:mod:`moe_routing.reporting.findings`.
"""

from __future__ import annotations

import pandas as pd
from scipy import stats

from moe_routing import wording
from moe_routing.analysis.outputs import SUM_TO_ZERO
from moe_routing.analysis.tables import groups_of, largest
from moe_routing.reporting.claims import Finding
from moe_routing.routing.strategies import family_entry
from moe_routing.vocabulary import DATASETS

SIMULATION = "validity/simulation.csv"
DOMAINS = "baseline/domain_specialisation.csv"
COACTIVATION = "baseline/coactivation.csv"
VOCABULARY = "baseline/vocabulary_specialisation.csv"

FEWEST_TOKENS = 100
"""Experts with fewer tokens are left out: their proportions are too noisy."""

SPECIAL = 2.0
"""Lift of a domain from which an expert is called specialised: use relative to the mean domain."""

TOGETHER = 0.5
"""A pair of experts is said to work together above this proportion of the first one's tokens."""


def procedures(simulation: pd.DataFrame, confidence: float) -> list[Finding]:
    """State which procedures kept the false discovery rate at alpha, one sentence per dependence.

    A procedure is above alpha if its rate is above alpha in any setting, tested one-sided with a
    Bonferroni correction over all settings (normal limits), to allow for Monte Carlo error.

    Args:
        simulation: ``validity/simulation.csv``.
        confidence: level of all statements together.
    """
    if simulation.empty:
        return []
    z = stats.norm.ppf(1 - (1 - confidence) / len(simulation))
    excess = simulation["fdr"] - simulation["alpha"]
    table = simulation.assign(excess=excess, above=excess > z * simulation["fdr_se"])
    return [_kept(rows, str(name)) for name, rows in groups_of(table, "dependence")]


def _kept(rows: pd.DataFrame, dependence: str) -> Finding:
    above = rows.groupby("procedure", sort=False)["above"].any()
    kept, broke = list(above.index[~above]), list(above.index[above])
    text = (
        f"We simulated {_dependence(dependence, rows['correlation'].iloc[0])}, with "
        f"{wording.count(rows['repeats'].iloc[0])} tokens per setting."
    )
    if broke:
        worst = largest(rows[rows["above"]], "excess")
        which = f" ({_labels([worst['procedure']])})" if len(broke) > 1 else ""
        text += (
            f" The false discovery rate of {_labels(broke)} was above alpha, at worst "
            f"{wording.percent(worst['fdr'])} at {worst['alpha']:g}{which}."
        )
    if kept:
        subject = "That" if broke else "The false discovery rate"
        text += f" {subject} of {_labels(kept)} was not shown to be above alpha anywhere."
    else:
        text += " No procedure kept it at alpha."
    verdict = "none kept" if not kept else "some kept" if broke else "all kept"
    return Finding(text, SIMULATION, verdict)


def _labels(procedures: list[str]) -> str:
    """Return procedures by the names that the figure has."""
    return wording.listed([family_entry(name).label for name in procedures])


def _dependence(dependence: str, correlation: float) -> str:
    if dependence == SUM_TO_ZERO:
        return "p-values of statistics whose noise sums to zero in every token"
    if correlation == 0:
        return "independent p-values"
    return f"p-values of statistics that are all correlated by {correlation:g}"


def domains(table: pd.DataFrame) -> Finding | None:
    """State the largest lift of a domain, and how many experts have a large one; None without.

    Args:
        table: ``baseline/domain_specialisation.csv``.
    """
    names = table["domain"].unique() if len(table) else []
    if len(names) < 2:  # with one domain every lift is 1
        return None
    tokens = (table["proportion"] * table["n_tokens"]).groupby([table["layer"], table["expert"]])
    used = table[tokens.transform("sum") >= FEWEST_TOKENS]
    if used.empty:
        return None
    best = largest(used, "lift")
    lifts = used.groupby(["layer", "expert"])["lift"].max()
    special = int((lifts >= SPECIAL).sum())
    text = (
        f"Of {wording.plural(len(lifts), 'expert')} with at least {FEWEST_TOKENS} tokens in a "
        f"layer, {wording.count(special) if special else 'none'} "
        f"{'was' if special == 1 else 'were'} used by one of {len(names)} domains at least "
        f"{SPECIAL:g} times as much as by domains on average. The largest lift is "
        f"{best['lift']:.2f} ({DATASETS[best['domain']].label}, layer {best['layer']}); "
        f"{len(names)} is the most possible."
    )
    return Finding(text, DOMAINS, "specialised" if special else "not specialised")


def coactivation(table: pd.DataFrame) -> Finding | None:
    """State how often two experts are chosen together, and for which pair most; None without.

    Args:
        table: ``baseline/coactivation.csv``.
    """
    used = table[table["tokens_a"] >= FEWEST_TOKENS] if len(table) else table
    if used.empty:
        return None
    best = largest(used, "proportion")
    often = int((used["proportion"] > TOGETHER).sum())
    text = (
        f"In {wording.count(often) if often else 'none'} of {wording.count(len(used))} ordered "
        f"pairs of a layer's experts, the second got more than {wording.percent(TOGETHER, 0)} of "
        f"the first one's tokens. The maximum is {wording.percent(best['proportion'])} (layer "
        f"{best['layer']:g}), {best['lift']:.1f} times the second one's proportion of all tokens."
    )
    return Finding(text, COACTIVATION, "together" if often else "apart")


def vocabulary(table: pd.DataFrame) -> Finding | None:
    """State whether frequent input tokens are routed consistently; None without.

    Args:
        table: ``baseline/vocabulary_specialisation.csv``.
    """
    rows = table[table["role"] == "input"].dropna() if len(table) else table
    if rows.empty:
        return None
    layers = int((rows["mean_frequent"] > rows["shuffled_frequent"]).sum())
    everywhere = layers == len(rows)
    text = (
        "On average over layers and frequent token ids, "
        f"{wording.percent(rows['mean_frequent'].mean())} of an id's tokens have the same "
        f"first-choice expert, against {wording.percent(rows['shuffled_frequent'].mean())} after "
        "ids were shuffled. It is higher in "
        + ("every layer." if everywhere else f"{layers or 'none'} of {len(rows)} layers.")
    )
    return Finding(text, VOCABULARY, "more" if everywhere else "not everywhere")
