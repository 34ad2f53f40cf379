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
from moe_routing.analysis.tables import TableRow, groups_of, read_csv, rows_of
from moe_routing.config.study import CALIBRATION
from moe_routing.errors import InputError
from moe_routing.files import atomic_path
from moe_routing.reporting.claims import Finding
from moe_routing.reporting.findings_needed import LEVELS, MIDDLE, RATES, SCORE_TABLE
from moe_routing.reporting.names import short_words
from moe_routing.reporting.results import StudyResults
from moe_routing.statistics.rules import AS_IS
from moe_routing.vocabulary import text_dataset

FILE = "replications.csv"
"""In the folder of a study: its own rows first, then those of its replications."""
TRAINING, RATE, KEPT, CONTRAST, LOSS = (
    "training", "false discovery rate", "kept by the score", "contrast", "loss over stock",
)  # fmt: skip
"""In the column ``quantity``."""
COLUMNS = ("run", "quantity", "setting", "budget", "value", "low", "high")


def write_replications(study: StudyResults) -> pd.DataFrame:
    """Write the table of a study and its replications, and return it.

    Columns: ``run`` (name of the study), ``quantity``, ``setting``, ``budget`` (experts per token,
    of settings that have one), ``value``, ``low``, ``high``:

    - ``training``: ``tokens``, and ``validation_loss`` in nats per token, if ``training.csv`` lies
      beside the folder of the model;
    - ``false discovery rate``: that of BH on held-out calibration text, by level;
    - ``kept by the score``: experts that BH keeps at the middle level by the score of its null,
      relative to the router's probability;
    - ``contrast``: the declared contrasts, in the unit of their metric;
    - ``loss over stock``: of every setting with a budget, on the text set, nats per token.

    Raises:
        InputError: a file of the config's ``replications`` is no such table.
    """
    own = pd.DataFrame(_rows(study), columns=list(COLUMNS[1:]))
    own.insert(0, "run", study.config.study)
    table = pd.concat([own, *map(_read, study.config.replications)], ignore_index=True)
    with atomic_path(study.folder / FILE) as temporary:
        table.to_csv(temporary, index=False, float_format="%.10g")
    return table


def _read(path: str) -> pd.DataFrame:
    table = read_csv(Path(path))
    if tuple(table) != COLUMNS or table.empty:
        raise InputError(
            f"{path}: columns {', '.join(map(str, table))}; allowed: {', '.join(COLUMNS)}, and "
            f"rows (a {FILE} of another study)"
        )
    return table


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
        own = rates[
            (rates["procedure"] == BH_RULE)
            & (rates["part"] == RULE)
            & (rates["text"] == CALIBRATION)
            & (rates["layer"].astype(str) == ALL_LAYERS)
            & rates["alpha"].round(6).isin(LEVELS)
        ]
        for row in rows_of(own):
            yield RATE, f"{row.alpha:g}", none, row.fdr, row.low, row.high
    scores = study.table(SCORE_TABLE)
    if len(scores):
        for row in rows_of(scores[scores["chosen"] & (scores["alpha"].round(6) == MIDDLE)]):
            yield KEPT, row.score, none, row.ratio, row.ratio_low, row.ratio_high
    for row in rows_of(study.statistics["primary"]):
        yield CONTRAST, row.strategy, none, row.difference, row.low, row.high
    budgets = study.budgets
    if len(budgets):
        text = budgets["dataset"] == text_dataset(budgets["dataset"].drop_duplicates())
        fitted = budgets["budget"].notna() & budgets["loss_over_stock"].notna()
        for row in rows_of(budgets[text & fitted & (budgets["scale"] == AS_IS)]):
            yield LOSS, row.strategy, row.budget, row.loss_over_stock, row.low, row.high


def replications_table(study: StudyResults) -> pd.DataFrame:
    """Return the quantities that every run has, one column per run."""
    table = study.table(FILE)
    runs = table["run"].drop_duplicates()
    rows = []
    for (quantity, setting), own in groups_of(table, ["quantity", "setting"]):
        shown = quantity != LOSS or own["budget"].iloc[0] == middle(table)
        if quantity == TRAINING or not shown or len(own) < len(runs):
            continue
        line = {"Quantity": _words(str(quantity), str(setting), study)}
        line |= {_title(row.run, study): _value(row) for row in rows_of(own)}
        rows.append(line)
    return pd.DataFrame(rows)


def middle(table: pd.DataFrame) -> float:
    """Return the middle budget of the settings that are compared; 0 without any."""
    budgets = sorted(table["budget"].dropna().unique())
    return float(budgets[len(budgets) // 2]) if budgets else 0.0


def _title(run: str, study: StudyResults) -> str:
    return "This run" if run == study.config.study else wording.capital(run.replace("-", " "))


def _words(quantity: str, setting: str, study: StudyResults) -> str:
    weighting = study.model.rule.weighting
    if quantity == RATE:
        return f"False discovery rate of BH at {setting}"
    if quantity == KEPT:
        return "Experts kept by the score, relative to the probability"
    name = short_words(setting, weighting)
    if quantity == CONTRAST:
        return f"{name}, against a fixed number of experts at its mean, nats per token"
    return f"Loss over stock: {name}"


def _value(row: TableRow) -> str:
    written = wording.percentage if row.quantity == RATE else wording.interval
    return written(row.value, row.low, row.high)


def replications(study: StudyResults) -> Finding | None:
    """State which findings the replications share with this run; None without replications."""
    table = study.table(FILE)
    others = [str(run) for run in table["run"].drop_duplicates()] if len(table) else []
    others = [run for run in others if run != study.config.study]
    if not others:
        return None
    own, budget = _of(table, run=study.config.study), middle(table)
    by_run = {run: _of(table, run=run) for run in others}
    text = f"The same was measured on {wording.plural(len(others), 'other model')} of this shape"
    tokens = [_of(rows, quantity=TRAINING, setting="tokens") for rows in by_run.values()]
    if all(len(rows) for rows in tokens):
        millions = [f"{rows['value'].iloc[0] / 1e6:.1f}" for rows in tokens]
        text += f", trained on {wording.listed(millions)} million tokens"
    text += ", whose numbers this run does not recompute."
    least = {run: _least(rows, budget) for run, rows in {"": own, **by_run}.items()}
    same = [run for run in others if least[run] == least[""]]
    rule = short_words(least[""], study.model.rule.weighting) if least[""] else ""
    if rule:
        text += (
            f" At {budget:g} experts per token, {rule} loses least in this run, and in "
            f"{len(same) or 'none'} of {wording.plural(len(others), 'other')}."
        )
    gains = [row for rows in by_run.values() for row in rows_of(_of(rows, quantity=KEPT))]
    gained = [row for row in gains if row.low > 1]
    if gains:
        values = [wording.interval(row.value, row.low, row.high) for row in gains]
        text += (
            f" By the score of its null, BH keeps {wording.listed(values)} times as many experts "
            "as by the probability."
        )
    above = [
        f"{_title(run, study)} at {row.setting}"
        for run, rows in by_run.items()
        for row in rows_of(_of(rows, quantity=RATE))
        if row.low > float(row.setting)
    ]
    text += (
        f" Its false discovery rate is above alpha: {wording.listed(above)}."
        if above
        else " Its false discovery rate is not shown to be above alpha in any of them."
    )
    all_same = len(same) == len(others) and len(gained) == len(others) and not above
    return Finding(text, FILE, "same" if all_same else "differ")


def _of(table: pd.DataFrame, **values: str) -> pd.DataFrame:
    for name, value in values.items():
        table = table[table[name] == value]
    return table


def _least(rows: pd.DataFrame, budget: float) -> str:
    """Return the setting of least loss at a budget; empty without one."""
    own = _of(rows, quantity=LOSS)
    own = own[own["budget"] == budget]
    return str(own.sort_values("value")["setting"].iloc[0]) if len(own) else ""
