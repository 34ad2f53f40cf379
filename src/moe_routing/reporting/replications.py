"""What a study has in common with its replications on other models, in one table.

A replication is a smaller study of another model, run apart: its table is among the files that the
config names, and no run makes it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from moe_routing import wording
from moe_routing.analysis.outputs import ALL_LAYERS, BH_RULE, RULE
from moe_routing.analysis.tables import TableRow, groups_of, read_csv, rows_of, rows_with
from moe_routing.config.replications import REPLICATION_COLUMNS, read_run
from moe_routing.config.study import CALIBRATION
from moe_routing.files import atomic_path
from moe_routing.reporting.claims import Finding
from moe_routing.reporting.findings_needed import LEVELS, MIDDLE, RATES, SCORE_TABLE, SCORES
from moe_routing.reporting.names import short_words
from moe_routing.reporting.results import StudyResults
from moe_routing.statistics.rules import AS_IS, MIXTURE
from moe_routing.vocabulary import text_dataset

FILE = "replications.csv"
"""In the folder of a study: its own rows first, then those of its replications."""
TRAINING, RATE, KEPT, CONTRAST, LOSS = (
    "training", "false discovery rate", "kept by the score", "contrast", "loss over stock",
)  # fmt: skip
"""In the column ``quantity``."""
NATS = "nats_per_token"
"""The metric of the losses and contrasts that runs are compared by."""


def write_replications(study: StudyResults) -> pd.DataFrame:
    """Write the table of a study and its replications, and return it.

    Columns: ``run`` (name of the study), ``quantity``, ``setting``, ``budget`` (experts per token,
    of settings that have one), ``value``, ``low``, ``high``:

    - ``training``: ``tokens``, and ``validation_loss`` in nats per token, if ``training.csv`` lies
      beside the folder of the model;
    - ``false discovery rate``: that of BH on held-out calibration text, by level;
    - ``kept by the score``: experts that BH keeps at the middle level by the score of its null,
      relative to the router's probability, if the null tests another score;
    - ``contrast``: declared contrasts with a fixed number of experts, nats per token;
    - ``loss over stock``: of every setting with a budget, on the text set, nats per token.

    Raises:
        InputError: a file of the config's ``replications`` is no such table.
    """
    own = pd.DataFrame(_rows(study), columns=list(REPLICATION_COLUMNS[1:]))
    own.insert(0, "run", study.config.study)
    table = pd.concat([own, *map(_read, study.config.replications)], ignore_index=True)
    with atomic_path(study.folder / FILE) as temporary:
        table.to_csv(temporary, index=False, float_format="%.10g")
    return table


def _read(path: str) -> pd.DataFrame:
    read_run(path)
    return read_csv(Path(path))


def _rows(study: StudyResults) -> Iterator[tuple[str, str, float, float, float, float]]:
    none = float("nan")
    training = Path(study.config.model.path).parent / "training.csv"
    if training.is_file():
        log = read_csv(training)
        yield TRAINING, "tokens", none, float(log["tokens"].iloc[-1]), none, none
        losses = log["validation_loss"].dropna()
        if len(losses):
            yield TRAINING, "validation_loss", none, float(losses.iloc[-1]), none, none
    rates = study.table(RATES)
    if len(rates):
        own = rows_with(rates, procedure=BH_RULE, part=RULE, text=CALIBRATION, layer=ALL_LAYERS)
        for row in rows_of(own[own["alpha"].round(6).isin(LEVELS)]):
            yield RATE, f"{row.alpha:g}", none, row.fdr, row.low, row.high
    scores = study.table(SCORE_TABLE)
    if len(scores):
        at_middle = scores["alpha"].round(6) == MIDDLE
        chosen = scores["chosen"] & scores["ratio"].notna() & (scores["score"] != "probability")
        for row in rows_of(scores[at_middle & chosen]):
            yield KEPT, row.score, none, row.ratio, row.ratio_low, row.ratio_high
    for row in rows_of(study.statistics["primary"]):
        if row.metric == NATS and row.against.startswith(f"{MIXTURE}."):
            yield CONTRAST, row.strategy, none, row.difference, row.low, row.high
    budgets = study.budgets
    if len(budgets):
        text = budgets["dataset"] == text_dataset(budgets["dataset"].drop_duplicates())
        fitted = budgets["budget"].notna() & budgets["loss_over_stock"].notna()
        used = text & fitted & (budgets["scale"] == AS_IS) & (budgets["metric"] == NATS)
        for row in rows_of(budgets[used]):
            yield LOSS, row.strategy, row.budget, row.loss_over_stock, row.low, row.high


def shared(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of what every run has, losses at the middle budget that they share only."""
    runs = table["run"].nunique()
    counts = table.groupby(["quantity", "setting"])["run"].transform("size")
    table = table[(counts == runs) & (table["quantity"] != TRAINING)]
    budgets = sorted(table.loc[table["quantity"] == LOSS, "budget"].unique())
    middle = budgets[len(budgets) // 2] if budgets else None
    return table[(table["quantity"] != LOSS) | (table["budget"] == middle)]


def replications_table(study: StudyResults) -> pd.DataFrame:
    """Return the quantities that every run has, one column per run; empty without replications."""
    table = study.table(FILE)
    if table.empty or table["run"].nunique() < 2:
        return pd.DataFrame()
    lines = []
    for _, own in groups_of(shared(table), ["quantity", "setting"]):
        first, *_ = rows = list(rows_of(own))
        line = {"Quantity": _words(first, study)}
        lines.append(line | {_title(row.run, study): _value(row) for row in rows})
    return pd.DataFrame(lines)


def _title(run: str, study: StudyResults) -> str:
    return "This run" if run == study.config.study else wording.capital(run.replace("-", " "))


def _words(row: TableRow, study: StudyResults) -> str:
    if row.quantity == RATE:
        return f"False discovery rate of BH at {row.setting}, %"
    if row.quantity == KEPT:
        return f"Experts kept by {SCORES[row.setting]}, relative to the probability"
    name = wording.capital(short_words(row.setting, study.model.rule.weighting))
    if row.quantity == CONTRAST:
        return f"{name}: loss minus that of a fixed number of experts at its mean"
    return f"{name}: loss over stock at {row.budget:g} experts"


def _value(row: TableRow) -> str:
    written = wording.percentage if row.quantity == RATE else wording.interval
    return written(row.value, row.low, row.high)


def replications(study: StudyResults) -> Finding | None:
    """State which findings the replications share with this run; None without replications."""
    table = study.table(FILE)
    runs = [str(run) for run in table["run"].drop_duplicates()] if len(table) else []
    others = [run for run in runs if run != study.config.study]
    if not others:
        return None
    text = f"The same was measured on {wording.plural(len(others), 'other model')}"
    there = table[table["run"].isin(others)]
    tokens = rows_with(there, quantity=TRAINING, setting="tokens")
    if len(tokens) == len(others):
        millions = [f"{value / 1e6:.1f}" for value in tokens["value"]]
        text += f", trained on {wording.listed(millions)} million tokens"
    said = [f"{text}. This run does not recompute their numbers.", *_least(table, others, study)]
    gains = list(rows_of(rows_with(there, quantity=KEPT)))
    if gains:
        values = [wording.interval(row.value, row.low, row.high) for row in gains]
        said.append(
            f"By the score of its null, BH keeps {wording.listed(values)} times as many experts "
            "there as by the probability."
        )
    rates = list(rows_of(rows_with(there, quantity=RATE)))
    above = [row for row in rates if row.low > float(row.setting)]
    if above:
        names = [f"at {row.setting} in {_title(row.run, study).lower()}" for row in above]
        said.append(f"The false discovery rate of BH is above alpha {wording.listed(names)}.")
    elif rates:
        said.append("The false discovery rate of BH is not shown to be above alpha there.")
    return Finding(" ".join(said), FILE, "exceeded" if above else "kept" if rates else "not shown")


def _least(table: pd.DataFrame, others: list[str], study: StudyResults) -> Iterator[str]:
    """Yield a sentence about the rule of least loss, of those that every run has."""
    losses = rows_with(shared(table), quantity=LOSS)
    if losses["setting"].nunique() < 2:
        return
    least = losses.sort_values("value").drop_duplicates("run").set_index("run")["setting"]
    own = least[study.config.study]
    same = sum(least[run] == own for run in others)
    rule = short_words(str(own), study.model.rule.weighting)
    yield (
        f"Of {losses['setting'].nunique()} rules at {losses['budget'].iloc[0]:g} experts per "
        f"token, the one of least loss in this run ({rule}) is that of least loss in "
        f"{same or 'none'} of {wording.plural(len(others), 'other model')}."
    )
