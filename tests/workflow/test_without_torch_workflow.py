"""A study is planned where torch is not installed, with a strategy of another package."""

from __future__ import annotations

import subprocess
import sys

import yaml
from offered_strategies import EVERY_OTHER, write_package
from without_torch import without_torch


def test_a_study_with_an_offered_strategy_is_planned_without_torch(checkout, tmp_path):
    site, offered = tmp_path / "site", tmp_path / "offered"
    site.mkdir()
    offered.mkdir()
    write_package(offered, EVERY_OTHER, everyother="toy_routing:EveryOther")
    config = yaml.safe_load((checkout / "config/smoke.yaml").read_text())
    config["strategies"].append("everyother_k4")
    (checkout / "more.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--configfile", "more.yaml"], cwd=checkout,
        env=without_torch(site, checkout / "src", offered), capture_output=True, text=True,
    )  # fmt: skip
    plan = done.stdout + done.stderr
    assert done.returncode == 0, plan[-3000:]
    jobs = {words[0] for line in plan.splitlines() if len(words := line.split()) == 2}
    assert {"evaluate", "render_article"} <= jobs
    assert "Scoring everyother_k4 on wikipedia" in plan
