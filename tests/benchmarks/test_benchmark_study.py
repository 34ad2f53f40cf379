"""Where a study's time went, from planted files."""

from __future__ import annotations

import json
import os

import pytest

from moe_routing.errors import InputError

HEADER = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"


@pytest.fixture
def plant(tmp_path):
    def plant(job, wall, cpu, rss, end):
        path = tmp_path / "benchmarks" / f"{job}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEADER + f"{wall}\t0:00:00\t{rss}\t1\t1\t1\t0\t0\t90\t{cpu}\n")
        os.utime(path, (end, end))

    return plant


@pytest.fixture
def results(plant, tmp_path):
    plant("audit", 30.0, 25.0, 700.0, end=1060)
    plant("evaluate/regular_k4", 10.0, 9.0, 800.0, end=1010)
    plant("evaluate/regular_k8", 20.0, 15.0, 900.5, end=1030)
    plant("fit", 0.5, "NA", "-", end=1000.5)
    for strategy, seconds in (("regular_k4", (3.0, 4.0)), ("regular_k8", (5.0, 6.0))):
        for dataset, value in zip(("hellaswag", "lambada"), seconds, strict=True):
            path = tmp_path / "cells" / strategy / f"{dataset}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            timings = {"wall_seconds": value, "tokens_per_second": 1e4}
            if strategy == "regular_k4":
                timings["divergence_seconds"] = 0.5
            path.write_text(json.dumps({"timings": timings}))
    return tmp_path


def test_the_tables(script, results, tmp_path, capsys):
    path = tmp_path / "study.json"
    script("study").main(["--results", str(results), "--json", str(path)])
    record = json.loads(path.read_text())
    rules = {row["rule"]: row for row in record["rules"]}
    assert set(rules) == {"audit", "evaluate", "fit", "all"}
    assert (rules["evaluate"]["jobs"], rules["all"]["jobs"]) == (2, 4)
    assert rules["evaluate"]["CPU seconds"] == 24
    assert rules["evaluate"]["wall seconds"] == 30
    assert rules["evaluate"]["peak MB"] == 900.5
    assert rules["all"]["CPU seconds"] == 49
    assert rules["all"]["peak MB"] == 900.5
    assert rules["evaluate"]["share of wall"] == pytest.approx(30 / 60.5)
    (scoring,) = record["scoring"]
    assert (scoring["jobs"], scoring["cells"]) == (2, 4)
    assert scoring["scoring seconds"] == 19
    assert scoring["its share"] == pytest.approx(11 / 30)
    (study,) = record["study"]
    assert study["wall minutes"] == pytest.approx(1)  # from 1000 to 1060
    assert study["jobs at a time"] == pytest.approx(60.5 / 60)
    assert [row["job"] for row in record["jobs"][:2]] == ["audit", "regular_k8"]
    assert "| evaluate | 2 | 30 | 24 |" in capsys.readouterr().out


def test_a_study_without_scoring_jobs(script, plant, tmp_path, capsys):
    plant("audit", 30.0, 25.0, 700.0, end=1060)
    script("study").main(["--results", str(tmp_path)])
    assert "| audit | 1 | 30 | 25 |" in capsys.readouterr().out


def test_what_is_not_a_study_is_refused(script, plant, tmp_path):
    study = script("study")
    with pytest.raises(InputError, match=r"benchmarks: no .tsv file"):
        study.main(["--results", str(tmp_path)])
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "audit.tsv").write_text("seconds\n3\n")
    with pytest.raises(InputError, match=r"audit.tsv: column 's' is missing"):
        study.main(["--results", str(tmp_path)])
