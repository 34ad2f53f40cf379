"""Fixtures that every test may use: the repository, the embedded model, small real data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA_FILES = ROOT / "tests" / "data_files"

# --doctest-modules would import these files a second time, all under the one name "conftest".
collect_ignore_glob = ["*conftest.py"]


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
def calibration(nano):
    """The embedded model calibrated on real text, with every null fitted."""
    from moe_routing.evaluation.calibrate import sample_router_logits
    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.nulls import NULLS

    texts = (DATA_FILES / "calibration.txt").read_text(encoding="utf-8").split("\n\n")
    sample = sample_router_logits(
        nano.model, nano.tokenizer, texts, tokens=4096, window=256, rng=np.random.default_rng(0)
    )
    return Calibration(sample, {name: null.fit(sample) for name, null in NULLS.items()})
