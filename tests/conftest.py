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
