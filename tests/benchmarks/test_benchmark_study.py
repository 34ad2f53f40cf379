"""Where a study's time went, from planted logs."""

from __future__ import annotations

import json
import os

import pytest

from moe_routing.errors import InputError
from moe_routing.usage import LINE, LOADING


@pytest.fixture
def plant(tmp_path):
    def plant(job, end, *loadings, **used):
        path = tmp_path / "logs" / f"{job}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [LOADING.format(cpu=seconds) for seconds in loadings]
        lines += ["regular_k4 on lambada: 100 items", LINE.format(**used)]
        path.write_text("\n".join(lines) + "\n")
        os.utime(path, (end, end))

    return plant


@pytest.fixture
def results(plant, tmp_path):
    plant("ablation", 1060, 0.4, 0.6, wall=30.0, cpu=25.0, start=4.0, peak=700)
    plant("evaluate/regular_k4", 1010, 0.5, wall=10.0, cpu=9.0, start=4.0, peak=800)
    plant("evaluate/regular_k8", 1030, 0.5, wall=20.0, cpu=15.0, start=4.0, peak=900)
    return tmp_path


def test_the_tables(script, results, tmp_path, capsys):
    path = tmp_path / "study.json"
    script("study").main(["--results", str(results), "--json", str(path)])
    record = json.loads(path.read_text())
    rules = {row["rule"]: row for row in record["rules"]}
    assert set(rules) == {"ablation", "evaluate", "all"}
    assert (rules["evaluate"]["jobs"], rules["all"]["jobs"]) == (2, 3)
    assert rules["evaluate"]["CPU seconds"] == 24
    assert rules["evaluate"]["wall seconds"] == 30
    assert rules["evaluate"]["start-up"] == 8
    assert (rules["evaluate"]["loading"], rules["ablation"]["loading"]) == (1, 1)
    assert rules["evaluate"]["peak MB"] == rules["all"]["peak MB"] == 900
    assert rules["all"]["CPU seconds"] == 49
    assert rules["evaluate"]["proportion of CPU"] == pytest.approx(24 / 49)
    (study,) = record["study"]
    assert study["wall minutes"] == pytest.approx(1)  # from 1000 to 1060
    assert study["CPU minutes"] == pytest.approx(49 / 60)
    assert study["proportion of start-up and loading"] == pytest.approx(14 / 49)
    assert study["largest peak MB"] == 900
    assert [row["job"] for row in record["jobs"][:2]] == ["ablation", "regular_k8"]
    assert "| ablation | 1 | 30 | 25 |" in capsys.readouterr().out


def test_what_is_not_a_finished_study_is_refused(script, tmp_path):
    study = script("study")
    with pytest.raises(InputError, match=r"logs: no \.log file"):
        study.main(["--results", str(tmp_path)])
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "ablation.log").write_text("error: alpha is 2\n")
    with pytest.raises(
        InputError, match=r"ablation\.log: its last line does not begin with 'usage:'"
    ):
        study.main(["--results", str(tmp_path)])
