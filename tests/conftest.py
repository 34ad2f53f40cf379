"""Fixtures that every test may use: the repository, the embedded model, small real data."""

from __future__ import annotations

import copy
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# Tests run in as many processes as there are cores. More threads in each would compete for these,
# and a thread that waits for another one would keep its core busy. Read when torch is imported:
# nothing above may import it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# An example has no deadline in seconds: how long it takes depends on what else the machine does.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]
DATA_FILES = ROOT / "tests" / "data_files"

# Each runs a whole study. Begun last, it would run while the other worker is idle.
LONGEST = [
    "test_hub_study.py", "test_smoke_study.py", "test_clusters.py", "test_damage.py",
    "test_from_anywhere.py", "test_render.py", "test_study.py",
]  # fmt: skip

# --doctest-modules would import these files a second time, all under the one name "conftest".
collect_ignore_glob = ["*conftest.py"]


def pytest_collection_modifyitems(items):
    """Put the longest files first, and leave the others in their order."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def nano():
    """The embedded model and its tokenizer, in float32."""
    from moe_routing.config.study import ModelConfig
    from moe_routing.engine.loading import load_model

    return load_model(ModelConfig(path=str(ROOT / "resources" / "olmoe-nano")), threads=1)


@pytest.fixture(scope="session")
def make_model():
    """Return a maker of tiny random models, from a family of transformers and config settings."""
    import torch
    import transformers

    def make(family, **settings):
        sizes = {
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16,
            "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 16, "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
            "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        config = getattr(transformers, f"{family}Config")(**sizes | settings)
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture
def model(nano):
    return nano.model


@pytest.fixture
def tokenizer(nano):
    return nano.tokenizer


@pytest.fixture(scope="session")
def calibration(nano, tmp_path_factory):
    """The embedded model calibrated on real text, with every null fitted."""
    from shared import shared_folder

    from moe_routing.routing.calibration import Calibration

    folder = shared_folder(
        tmp_path_factory, "calibration", lambda folder: write_calibration(folder, nano)
    )
    return Calibration.load(folder)


def write_calibration(folder, nano):
    """Write what a study's calibration jobs write."""
    from moe_routing.evaluation.calibrate import sample_router_logits
    from moe_routing.evaluation.outputs import fit_expert_outputs
    from moe_routing.evaluation.toggles import toggle_experts
    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.nulls import NULLS, fit_null

    texts = (DATA_FILES / "calibration.txt").read_text(encoding="utf-8").split("\n\n")
    sample = sample_router_logits(
        nano.model, nano.tokenizer, texts, tokens=4096, window=256, rng=np.random.default_rng(0)
    )
    outputs = fit_expert_outputs(nano.model, nano.tokenizer, texts, tokens=4096, window=256)
    toggles = toggle_experts(
        nano.model, nano.tokenizer, texts, outputs, tokens=112, rng=np.random.default_rng(0)
    )
    fitted = {name: fit_null(name, sample, toggles, outputs=outputs) for name in ("needed", *NULLS)}
    Calibration(sample, fitted, toggles, outputs).save(folder)


@pytest.fixture(scope="session")
def double(nano):
    """Return the embedded model in float64, with stock experts.

    Rounding does not change its routing. Top-k is discontinuous: in single precision, two correct
    computations sometimes route a token differently where two experts are nearly tied, and the
    likelihoods of its request then differ visibly.
    """
    import torch

    model = copy.deepcopy(nano.model).to(torch.float64)
    model.set_experts_implementation("eager")
    return model


@pytest.fixture(scope="session")
def rows():
    """Return a reader of the rows of a data set's excerpt."""

    def read(name):
        lines = (DATA_FILES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    return read


@pytest.fixture(scope="session")
def choice_requests(rows):
    """Return the requests of 6 HellaSwag items, four per context."""
    from moe_routing.engine.requests import Request

    return [
        Request(f"{row['activity_label']}: {row['ctx']}", f" {ending}")
        for row in rows("hellaswag")[:6]
        for ending in row["endings"]
    ]


@pytest.fixture(scope="session")
def word_requests(rows):
    """Return the requests of 6 LAMBADA items."""
    from moe_routing.engine.requests import Request

    texts = [row["text"] for row in rows("lambada")[:6]]
    return [Request(*split) for split in ((t[: t.rindex(" ")], t[t.rindex(" ") :]) for t in texts)]


@pytest.fixture(scope="session")
def documents(rows):
    """Return texts shorter and longer than the window of 256 tokens."""
    passages = [row["passage"] for row in rows("wikipedia")]
    return [passages[0], " ".join(passages[1:5]), "One.", " ".join(passages[5:12])]


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a script in this process, which need not start; return exit code, output and errors."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


@pytest.fixture(scope="session")
def ask():
    """Return a maker of the harness's requests."""
    from lm_eval.api.instance import Instance

    def make(kind, arguments):
        return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]

    return make
