"""Calibration samples hold what the routers saw, on the text and on its shuffled windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from moe_routing.engine.adapters import find_routers
from moe_routing.evaluation.calibrate import sample_router_logits
from moe_routing.routing.sample import CalibrationSample

TEXT = Path(__file__).resolve().parents[1] / "data_files" / "calibration.txt"


def test_norms_are_those_of_the_pass_that_the_logits_are_from(nano, tmp_path):
    seen = {}

    def hook(_, inputs, output):
        hidden_TH = inputs[0].reshape(-1, inputs[0].shape[-1])
        seen.setdefault("logits", []).append(output[0].float())
        seen.setdefault("norm", []).append(hidden_TH.float().norm(dim=1))

    router = find_routers(nano.model)[3]
    handle = router.module.register_forward_hook(hook)
    sample = sample_router_logits(
        nano.model,
        nano.tokenizer,
        TEXT.read_text(encoding="utf-8").split("\n\n"),
        tokens=256,
        window=64,
        rng=np.random.default_rng(1),
    )
    handle.remove()
    sample.save(tmp_path / "sample.safetensors")
    sample = CalibrationSample.load(tmp_path / "sample.safetensors")
    for place, (logits_LTE, norm_LT) in enumerate(
        [(sample.logits_LTE, sample.input_norm_LT), (sample.permuted_LTE, sample.permuted_norm_LT)]
    ):
        assert torch.equal(logits_LTE[3], seen["logits"][place])
        assert torch.equal(norm_LT[3], seen["norm"][place])
    assert not torch.equal(sample.input_norm_LT, sample.permuted_norm_LT)
