"""The pretrain target, run for real at a toy size."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from workflow_runs import ROOT, snakemake

TOY = {
    "name": "toy",
    "sources": [
        {
            "kind": "local",
            "name": "text",
            "path": "text.txt",
            "license": "CC0",
            "url": "https://example.org",
        }
    ],
    "model": {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32,
    },
    "threads": 1,
    "steps": 30,
    "batch_size": 4,
    "sequence_length": 16,
    "warmup_steps": 4,
    "validation_share": 0.1,
    "validation_interval": 10,
    "validation_batches": 2,
    "checkpoint_interval": 10,
    "card_tokens": 600,
}


def write_config(folder, **changes):
    (folder / "toy.yaml").write_text(yaml.safe_dump({**TOY, **changes}), encoding="utf-8")


def pretrain(folder, *arguments):
    return snakemake(
        folder, "pretrain", "--cores", "1", "--configfile", "toy.yaml", *arguments, timeout=120
    )


def test_pretrain_makes_a_model_with_its_card_and_then_has_nothing_to_do(checkout):
    numbers = "\n\n".join(f"{n} times {n} is {n * n}, and then some" for n in range(400))
    (checkout / "text.txt").write_text(numbers, encoding="utf-8")
    write_config(checkout)
    done = pretrain(checkout)
    assert done.returncode == 0, done.stderr[-4000:]
    run = checkout / "results" / "toy"
    names = {path.name for path in (run / "model").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert "# toy" in card
    assert (run / "model" / "training.png").stat().st_size > 10_000
    assert len((run / "training.csv").read_text().splitlines()) == 1 + TOY["steps"]
    assert (run / "benchmarks" / "train.tsv").is_file()
    assert "30/30" in (run / "logs" / "train.log").read_text(encoding="utf-8")
    assert "Nothing to be done" in pretrain(checkout).stderr


def test_bad_config_is_one_line_before_any_job(checkout):
    write_config(checkout, stepz=3)
    done = pretrain(checkout)
    assert done.returncode != 0
    assert "error: toy.yaml: stepz: unknown key; did you mean 'steps'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (checkout / "results").exists()


def test_shipped_config_is_linted_and_asks_for_its_files(checkout):
    shipped = ("--configfile", "config/pretrain.yaml")
    done = snakemake(checkout, "--lint", *shipped)
    assert done.returncode == 0, done.stdout + done.stderr
    written = yaml.safe_load((ROOT / "config" / "pretrain.yaml").read_text())
    files = [source["path"] for source in written["sources"]]
    for path in (*files, written["continue_from"]["weights"]):
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).touch()
    done = snakemake(checkout, "pretrain", "-n", *shipped)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = [line.split() for line in done.stdout.splitlines()]
    assert ["pretrain_tokens", "3"] in plan
    assert ["pretrain_train", "1"] in plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenizer", "--config", "no.yaml", "--out", "t"], "error: no.yaml: no such file"),
        (["fly"], "invalid choice: 'fly'"),
        (["export", "--config", "toy.yaml"], "the following arguments are required: --tokenizer"),
    ],
)
def test_script_by_hand_says_what_is_wrong(checkout, arguments, message):
    command = [sys.executable, "scripts/pretrain.py", *arguments]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
