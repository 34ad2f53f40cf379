"""``moe-routing`` calibrate, inspect and new-study; help."""

from __future__ import annotations

import re
import shlex

import families
import pytest
from commands_shared import FILES, MODEL
from documents import text

from moe_routing.commands.main import make_parser
from moe_routing.commands.new_study import strategies_for
from moe_routing.config.study import load_config
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import parse_strategy

TEXT = FILES / "calibration.txt"
SMALL = ("--tokens", 1024, "--toggled-tokens", 24, "--documents", 10, "--window", 256)


def test_a_calibration_is_saved_and_used(command, tmp_path):
    folder = tmp_path / "calibrated"
    code, out, err = command(
        "calibrate", MODEL, "--text", TEXT, "--margin", 0.05, "--strategies", "adaptive_k8",
        *SMALL, "--out", folder,
    )  # fmt: skip
    assert code == 0, err
    assert "certified_k8_m005: " in out
    certified = parse_strategy("certified_k8_m005")
    assert Calibration.for_strategies(folder, certified).certificates[certified.id].margin == 0.05
    code, out, err = command(
        "compare", MODEL, "--strategies", "certified_k8_m005", "adaptive_k8", "--calibration",
        folder, "--tasks", f"wikipedia={FILES / 'wikipedia.jsonl'}", "--limit", 2, "--turns", 0,
        "--kl-items", 2,
    )  # fmt: skip
    assert code == 0, err
    assert "| certified_k8_m005 |" in out
    assert "certified: at most 0.05 on new ones" in out


def test_a_margin_that_is_no_margin(refused, tmp_path):
    line = refused("calibrate", MODEL, "--text", TEXT, "--margin", 0, "--out", tmp_path)
    assert line == "error: --margin is 0; allowed: above 0 and below 10 nats"


def test_the_model_is_described_without_its_weights(command, monkeypatch):
    monkeypatch.setattr("moe_routing.engine.loading.load_model", None)
    code, out, err = command("inspect", MODEL)
    assert code == 0, err
    said = dict(line.split(":", 1) for line in out.splitlines())
    said = {name: value.strip() for name, value in said.items()}
    assert said["family"] == "olmoe (OlmoeForCausalLM)"
    assert said["layers"] == "16, of which 16 route and 0 are dense"
    assert (said["experts per layer"], said["experts per token"]) == ("64", "8")
    assert said["weighting"] == "softmax"
    assert said["attention window"] == "none"


def test_a_model_without_a_router_is_one_line(refused, tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 16}'
    )
    assert "GPT2LMHeadModel has no supported router" in refused("inspect", tmp_path)


def test_a_new_study_is_a_valid_config(command, tmp_path):
    file = tmp_path / "mine.yaml"
    tasks = [f"{name}={FILES / name}.jsonl" for name in ("wikipedia", "hellaswag")]
    code, out, err = command(
        "new-study", MODEL, "--tasks", *tasks, "--limit", 8, "--text", TEXT, "--out", file
    )
    assert code == 0, err
    assert f"snakemake --cores all --configfile {file}" in out
    study = load_config(file)
    assert study.model.path == MODEL
    assert study.strategies[:2] == ["stock", "bh_k8_a005"]
    assert study.statistics.primary.strategy == "bh_k8_a005"
    assert {name: one.items for name, one in study.datasets.items()} == {
        "wikipedia": 8,
        "hellaswag": 8,
    }


def test_a_study_is_not_overwritten(refused, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("study: mine\n")
    assert refused("new-study", MODEL, "--out", file).startswith(f"error: {file}: exists already")


@pytest.mark.parametrize(
    ("top_k", "weighting", "experts", "expected"),
    [
        (8, "softmax", 64, ["regular_k2", "regular_k4", "regular_k6", "regular_k8", "regular_k16"]),
        (2, "renormalised", 8, ["normalized_k1", "normalized_k2", "normalized_k4"]),
        (1, "softmax", 1, ["regular_k1"]),
    ],
)
def test_the_static_curve_is_that_of_the_model(top_k, weighting, experts, expected):
    found = strategies_for(ModelRule(top_k, weighting), experts)
    assert found == ["stock", f"bh_k{top_k}_a005", *expected, f"certified_k{top_k}_m001"]
    assert [parse_strategy(name).id for name in found] == found


@pytest.mark.parametrize("name", ["compare", "calibrate", "inspect", "new-study"])
def test_help_has_examples(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0
    assert f"examples:\n  moe-routing {name} " in out


@pytest.mark.parametrize("file", ["README.md", "docs/command-line.md"])
def test_documented_command_lines_parse(file):
    lines = re.sub(r"\\\n\s*", "", text(file)).splitlines()
    documented = [line.strip() for line in lines if line.startswith("    moe-routing ")]
    assert documented
    for line in documented:
        arguments = make_parser().parse_args(shlex.split(line)[1:])
        for name in getattr(arguments, "strategies", []):
            assert parse_strategy(name).id == name


def test_layers_without_experts_are_counted(command, make_model, tmp_path):
    make_model("Qwen2Moe", mlp_only_layers=[0]).config.save_pretrained(tmp_path)
    code, out, err = command("inspect", tmp_path)
    assert code == 0, err
    assert "2, of which 1 route and 1 are dense" in out
    assert "experts per layer:          8\n" in out


def test_what_does_not_work_is_said(command, tmp_path):
    families.make("gemma4_text").config.save_pretrained(tmp_path)
    code, out, err = command("inspect", tmp_path)
    assert code == 0, err
    assert "compensated, exact-norm:    no: the router of layer 0 multiplies the weight of" in out
