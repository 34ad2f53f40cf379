"""A study of any choice of data sets is planned: no kind of set is asked for."""

from __future__ import annotations

import pytest
import yaml
from workflow_runs import snakemake


@pytest.mark.parametrize("names", [("hellaswag", "lambada"), ("hellaswag",)])
def test_a_study_without_running_text_is_planned(checkout, names):
    config = yaml.safe_load((checkout / "config/smoke.yaml").read_text())
    config["datasets"] = {name: config["datasets"][name] for name in names}
    del config["analysis"]["held_out"]["datasets"]  # all that the study has
    (checkout / "few.yaml").write_text(yaml.safe_dump(config))
    done = snakemake(checkout, "-n", "--configfile", "few.yaml")
    plan = done.stdout + done.stderr
    assert done.returncode == 0, plan
    jobs = {words[0] for line in plan.splitlines() if len(words := line.split()) == 2}
    assert {"baseline", "bh", "validity", "ablation", "render_article"} <= jobs
