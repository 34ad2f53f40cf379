"""A study beside smaller studies of other models, whose tables are planted."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pandas as pd
import pytest
from test_findings_needed import rates

from moe_routing.config.replications import check_replications
from moe_routing.errors import InputError
from moe_routing.reporting.article_tables import ARTICLE_TABLES
from moe_routing.reporting.plan import findings_on
from moe_routing.reporting.replications import replications_table, write_replications
from moe_routing.reporting.results import StudyResults


@pytest.fixture
def own(at_budgets, tmp_path):
    """The study, with rates and a gain of the score, and no replications yet."""
    folder = shutil.copytree(at_budgets.folder, tmp_path / "study")
    (folder / "validity").mkdir(exist_ok=True)
    rates([0.9, 1.0], 1.0).to_csv(folder / "validity" / "false_discoveries.csv", index=False)
    scores = pd.DataFrame(
        {"score": ["probability", "norm"], "chosen": [False, True], "alpha": 0.05,
         "ratio": [1.0, 1.4], "ratio_low": [1.0, 1.3], "ratio_high": [1.0, 1.5],
         "fdr": 0.05, "low": 0.04, "high": 0.06, "mean_rejected": [4.0, 5.6]}
    )  # fmt: skip
    scores.to_csv(folder / "validity" / "scores.csv", index=False)
    return StudyResults.load(folder)


def beside(study, tmp_path, **changes):
    """Return the study with two replications: copies of its own table, the second changed.

    ``changes``: by quantity, what is added to value and limits.
    """
    table = write_replications(study)
    for number in (1, 2):
        other = table.assign(run=f"replication-{number}")
        training = {"run": f"replication-{number}", "quantity": "training", "setting": "tokens"}
        other = pd.concat([pd.DataFrame([training | {"value": 2e6}]), other])[list(table)]
        for name, change in changes.items() if number == 2 else ():
            here = other["quantity"] == name.replace("_", " ")
            other.loc[here, ["value", "low", "high"]] += change
        other.to_csv(tmp_path / f"{number}.csv", index=False)
    paths = [str(tmp_path / f"{number}.csv") for number in (1, 2)]
    config = study.config.model_copy(update={"replications": paths})
    made = replace(study, config=config)
    write_replications(made)
    return made


def test_what_models_share_is_said_and_shown(own, tmp_path):
    study = beside(own, tmp_path)
    (said,) = findings_on(study, ["replications"])
    assert said.verdict == "kept"
    assert said.text.startswith(
        "The same was measured on 2 other models, trained on 2.0 and 2.0 million tokens. This run "
        "does not recompute their numbers. Of "
    )
    assert ") is that of least loss in 2 of 2 other models. By the score" in said.text
    assert "BH keeps 1.40 [1.30, 1.50] and 1.40 [1.30, 1.50] times as many" in said.text
    assert said.text.endswith(
        "The false discovery rate of BH is not shown to be above alpha there."
    )
    table = replications_table(study)
    assert list(table) == ["Quantity", "This run", "Replication 1", "Replication 2"]
    assert table["Quantity"].iloc[0] == "False discovery rate of BH at 0.01, %"
    assert (table["This run"] == table["Replication 2"]).all()
    assert (table["Quantity"].str.endswith(": loss over stock at 3 experts")).sum() > 2
    assert table.notna().all(axis=None)
    assert ARTICLE_TABLES["tbl-replications"].ready(study)


def test_what_differs_is_said(own, tmp_path):
    study = beside(own, tmp_path, false_discovery_rate=0.1, kept_by_the_score=-0.5)
    (said,) = findings_on(study, ["replications"])
    assert said.verdict == "exceeded"
    assert said.text.endswith(
        "The false discovery rate of BH is above alpha at 0.01 in replication 2, at 0.05 in "
        "replication 2 and at 0.1 in replication 2."
    )
    assert " and 0.90 [0.80, 1.00] times as many" in said.text


def test_another_order_of_rules_is_said(own, tmp_path):
    study = beside(own, tmp_path)
    change(
        tmp_path / "2.csv", lambda rows: rows["value"] + 10 * (rows["value"] == rows["value"].min())
    )
    write_replications(study)
    (said,) = findings_on(study, ["replications"])
    assert ") is that of least loss in 1 of 2 other models." in said.text


def change(path, value):
    """Change the losses at 3 experts in a table of a replication; None leaves out the best rule."""
    table = pd.read_csv(path)
    here = (table["quantity"] == "loss over stock") & (table["budget"] == 3)
    if value is None:
        table = table.drop(table[here]["value"].idxmin())
    else:
        table.loc[here, "value"] = value(table[here])
    table.to_csv(path, index=False)


def test_rules_that_some_run_lacks_are_not_compared(own, tmp_path):
    study = beside(own, tmp_path)
    rules = len(replications_table(study))
    before = findings_on(study, ["replications"])[0].text
    change(tmp_path / "2.csv", None)
    write_replications(study)
    assert len(replications_table(study)) == rules - 1
    after = findings_on(study, ["replications"])[0].text
    assert ") is that of least loss in 2 of 2 other models." in after
    assert after != before


def test_without_replications_nothing_is_said(own):
    write_replications(own)
    assert findings_on(own, ["replications"]) == []
    assert not ARTICLE_TABLES["tbl-replications"].ready(own)


@pytest.mark.parametrize(
    "content", ["a,b\n1,2\n", "run,quantity,setting,budget,value,low,high\n", ""]
)
def test_another_table_is_refused(own, tmp_path, content):
    path = tmp_path / "other.csv"
    path.write_text(content)
    config = own.config.model_copy(update={"replications": [str(path)]})
    with pytest.raises(InputError, match=r"other.csv: columns .*; allowed: columns run, "):
        write_replications(replace(own, config=config))
    assert not (own.folder / "replications.csv").exists()


def test_tables_of_one_study_twice_are_refused(own, tmp_path):
    beside(own, tmp_path)
    first, second = str(tmp_path / "1.csv"), str(tmp_path / "2.csv")
    check_replications([first, second], "mine", "config.yaml")
    with pytest.raises(InputError, match=r"^config.yaml: replications has .*, a table of 'repl"):
        check_replications([first, first], "mine", "config.yaml")
    with pytest.raises(InputError, match="and none of 'replication-2' itself"):
        check_replications([second], "replication-2", "config.yaml")
    with pytest.raises(InputError, match=r"none.csv: no such file"):
        check_replications([str(tmp_path / "none.csv")], "mine", "config.yaml")
