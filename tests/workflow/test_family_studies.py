"""The smoke study of a tiny random model of every family whose experts can be toggled."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import yaml
from families import TOGGLED, make
from workflow_runs import ROOT, make_checkout, make_quarto, snakemake

SETTINGS = {"vocab_size": 8192, "max_position_embeddings": 256}
STRATEGIES = ["stock", "stock_k1", "uniform_k2", "bh_k2_a020", "bh_k4_a020", "topp_k4_p060"]


def write_checkpoint(name, folder):
    """Write a tiny checkpoint with the tokenizer of the embedded model; return its config."""
    model = make(name, **SETTINGS)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "resources" / "olmoe-nano" / file, folder)
    return model.config


def write_config(path, model):
    """Write the config of the smoke study for a model with 8 experts, 2 per token."""
    config = yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text(encoding="utf-8"))
    config["model"]["path"] = str(model)
    config["strategies"] = STRATEGIES
    config["controls"] = ["shuffle.bh_k4_a020"]
    config["levers"] = ["certified_k2_m005", "absolute_k2_b1_consequence_compensated"]
    config["budgets"] = ["topp_k4_b15", "bh_k4_b15"]
    config["analysis"]["bh"] |= {"max_k": [2, 4], "fewer_k": [1]}
    config["statistics"] |= {
        "primary": {"strategy": "bh_k4_a020", "dataset": "hellaswag"},
        "sequence": [{"strategy": "certified_k2_m005", "against": "mixture"}],
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGGLED)
def test_a_study_of_the_family(name, tmp_path):
    config = write_checkpoint(name, tmp_path / "model")
    checkout = make_checkout(tmp_path / "checkout")
    write_config(checkout / "config" / "family.yaml", tmp_path / "model")
    make_quarto(tmp_path / "bin")
    done = snakemake(checkout, "--cores", "2", "--configfile", "config/family.yaml")
    assert done.returncode == 0, done.stderr[-4000:]
    results = checkout / "results" / "smoke"
    cells = pd.read_csv(results / "comparison" / "full_routing_results.csv")
    assert set(cells["strategy"]) == set(STRATEGIES)
    assert cells.notna().all().all()
    described = json.loads((results / "model.json").read_text(encoding="utf-8"))
    assert described["num_layers"] + described["dense_layers"] == config.num_hidden_layers
