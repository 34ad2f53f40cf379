"""The workflow as text and as a plan: clean, and bad config stops it before any job."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from workflow_runs import snakemake

from moe_routing.config.cells import SAMPLE, Cell, cell_files, cells_of, uses_calibration
from moe_routing.config.study import load_config
from moe_routing.evaluation.pieces import null_piece
from moe_routing.workflow import null_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check"),
        ("ruff", "format", "--check"),
        ("snakefmt", "--check", "Snakefile", "workflow"),
    ],
)
def test_linter_is_content(command):
    program = str(Path(sys.executable).with_name(command[0]))
    done = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_linter_of_snakemake_is_content():
    done = snakemake(ROOT, "--lint")
    assert done.returncode == 0, done.stdout + done.stderr


def test_real_study_is_planned_with_gpus(checkout):
    done = snakemake(checkout, "-n", "--configfile", "config/olmoe-1b-7b.yaml")
    plan = done.stdout + done.stderr
    assert done.returncode == 0, plan
    lines = plan.splitlines()
    study = load_config(ROOT / "config/olmoe-1b-7b.yaml")
    scoring = [line for line in lines if "Scoring" in line and "gpu=1" in line]
    assert len(scoring) == len(cells_of(study)) > 3 * 46
    certified = [line for line in lines if "Certifying certified_k8_m001 on 32 documents" in line]
    assert len(certified) == 1


def test_nulls_on_toggled_experts_depend_on_their_files_and_the_epsilon():
    study = load_config(ROOT / "config/smoke.yaml")
    calibration = study.calibration.model_copy(update={"epsilon": 3e-5})
    study = study.model_copy(update={"calibration": calibration})
    toggles, outputs = (
        f"r/calibration/{name}.safetensors" for name in ("toggles", "expert_outputs")
    )
    pieces = {name: null_piece(study, name) for name in ("pooled", "needed_e1e4", "needed_loss")}
    epsilons = {name: json.loads(piece.settings)["epsilon"] for name, piece in pieces.items()}
    assert epsilons == {"pooled": None, "needed_e1e4": None, "needed_loss": 3e-5}
    assert pieces["pooled"].files == (SAMPLE,)
    files = (SAMPLE, *(name.removeprefix("r/") for name in (toggles, outputs)))
    assert pieces["needed_e1e4"].files == pieces["needed_loss"].files == files
    pooled, needed = (f"r/calibration/nulls/{name}.safetensors" for name in ("pooled", "needed"))
    assert null_files(["pooled"], "r") == [pooled]
    assert null_files(["pooled", "needed"], "r") == [pooled, needed, toggles, outputs]


OTHERS = ("controls", "levers", "budgets", "numerics")


def test_study_without_controls_is_planned_without_their_jobs(checkout):
    config = yaml.safe_load((checkout / "config/smoke.yaml").read_text())
    plain = {key: value for key, value in config.items() if key not in OTHERS}
    plain["statistics"] = {"primary": {"strategy": "bh_k8_a005", "dataset": "hellaswag"}}
    (checkout / "plain.yaml").write_text(yaml.safe_dump(plain))
    done = snakemake(checkout, "-n", "--configfile", "plain.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    plan = done.stdout + done.stderr
    assert plan.count("Scoring") == 7 * 3
    assert "Scoring bfloat16" not in plan
    assert "Certifying" not in plan
    assert "Fitting the" not in plan


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("sede", 3, "sede: unknown key; did you mean 'seed'?"),
        ("strategies", ["regular_k8", "bh_k8_a150"], "alpha is 1.5; input should be less than 1"),
    ],
)
def test_bad_config_is_one_line_before_any_job(checkout, key, value, expected):
    config = yaml.safe_load((checkout / "config/smoke.yaml").read_text())
    (checkout / "bad.yaml").write_text(yaml.safe_dump({**config, key: value}))
    done = snakemake(checkout, "--cores", "1", "--configfile", "bad.yaml")
    assert done.returncode != 0
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (checkout / "results").exists()


EVIL = {"kind": "archive", "package": "./evil", "version": "1.0", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"study": ".."},
            "error: hostile.yaml: study is '..'; allowed: a letter or digit",
        ),
        (
            {"datasets": {"lambada": {"source": {**EVIL, "member": "a.jsonl"}}}},
            "error: hostile.yaml: datasets.lambada.source.archive.package is './evil'",
        ),
        ({"__use_yte__": True}, "hostile.yaml: __use_yte__ makes it a template, whose code Snake"),
    ],
)
def test_a_hostile_config_is_refused_by_a_dry_run(checkout, changes, expected):
    config = yaml.safe_load((checkout / "config/smoke.yaml").read_text())
    (checkout / "hostile.yaml").write_text(yaml.safe_dump({**config, **changes}))
    before = {path for path in checkout.rglob("*") if ".snakemake" not in path.parts}
    done = snakemake(checkout, "-n", "--configfile", "hostile.yaml")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in done.stderr
    after = {path for path in checkout.rglob("*") if ".snakemake" not in path.parts}
    assert {path for path in after - before if "__pycache__" not in path.parts} == set()


def test_every_value_in_a_shell_command_is_quoted():
    for path in (ROOT / "workflow" / "rules").glob("*.smk"):
        for command in re.findall(r"""\n *shell:\n((?: *["'].*["']\n)+)""", path.read_text()):
            values = re.findall(r"(?<!\{)\{([^{}]+)\}", command)
            assert values, path.name
            assert [value for value in values if not value.endswith(":q")] == [], path.name


def asking_for_too_much(folder):
    config = yaml.safe_load((folder / "config/smoke.yaml").read_text())
    config["analysis"]["bh"]["max_k"] = [8, 128]
    (folder / "asking.yaml").write_text(yaml.safe_dump(config))
    return "analysis.bh.max_k has 128; allowed: at most the model's 64 experts"


def test_a_study_that_asks_too_much_of_its_model_ends_with_its_first_job(checkout):
    expected = asking_for_too_much(checkout)
    done = snakemake(checkout, "--cores", "1", "--configfile", "asking.yaml")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: asking.yaml: {expected}"]
    assert not (checkout / "results/smoke/model.json").exists()
    assert not (checkout / "results/smoke/data").exists()


def test_a_study_that_asks_too_much_of_a_known_model_is_not_even_planned(smoke_run):
    expected = asking_for_too_much(smoke_run[0])
    done = snakemake(smoke_run[0], "-n", "--configfile", "asking.yaml")
    assert done.returncode != 0
    assert f"error: asking.yaml: {expected}" in done.stderr
    assert "Traceback" not in done.stderr


def test_too_few_toggled_tokens_for_a_known_model_are_not_even_planned(smoke_run):
    few = ("--config", "calibration={toggled_tokens: 19}")
    done = snakemake(smoke_run[0], "--cores", "1", "--configfile", "config/smoke.yaml", *few)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: config/smoke.yaml and --config: calibration.toggled_tokens is 19; allowed: at "
        "least 20, for strategy 'bh_k8_a005' with the model's 64 experts"
    ]
    assert "Traceback" not in done.stderr


def test_every_rule_says_what_it_does_and_what_it_needs():
    for path in (ROOT / "workflow" / "rules").glob("*.smk"):
        text = path.read_text()
        rules = re.split(r"\n *rule[ :]", text)[1:]
        for rule in rules:
            name = rule.split(":")[0]
            assert "message:" in rule, f"{path.name}: {name}"
            if "shell:" in rule:
                for directive in ("log:", "conda:"):
                    assert directive in rule, f"{path.name}: {name}: {directive}"
                assert "localrule: True" in rule or "resources:" in rule, f"{path.name}: {name}"


def test_static_strategies_do_not_wait_for_the_calibration():
    study = load_config(ROOT / "config/smoke.yaml")
    for name, calibrated in (("stock", False), ("uniform_k4", False), ("adaptive_k8", True)):
        cell = Cell("cells", name, "lambada")
        assert uses_calibration(study, cell) == calibrated
        expected = ["model.json", "data/lambada.parquet"]
        expected += ["calibration/router_logits.safetensors"] * calibrated
        assert cell_files(study, cell) == expected
