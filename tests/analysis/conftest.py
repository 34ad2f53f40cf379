"""A tiny random model, and a calibration of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

TEXTS = [
    "The river rises in the hills north of the town and flows into the sea near the harbour.",
    "A short note.",
    "In 1921 the company built a second factory, which made bicycles until it closed in 1958. "
    "The building now houses a museum of local history and a library for children.",
]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def texts():
    return TEXTS


@pytest.fixture(scope="session")
def tiny(nano):
    """Three layers, 8 experts, top-3, random weights with routers that have preferences."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from moe_routing.engine.adapters import find_routers

    generator = torch.Generator().manual_seed(0)
    config = OlmoeConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False,
        vocab_size=len(nano.tokenizer), max_position_embeddings=128, pad_token_id=None,
        eos_token_id=nano.tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = OlmoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.6 if "experts" in name else 0.15
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        for router in find_routers(model):
            router.module.weight.mul_(4)
    model.set_experts_implementation("eager")
    return model


@pytest.fixture(scope="session")
def tiny_calibration(tiny, nano):
    from moe_routing.evaluation.calibrate import calibrate

    text = (" ".join(TEXTS) + " ") * 20
    nulls = ("needed", "within_token", "pooled")
    return calibrate(tiny, nano.tokenizer, [text], nulls=nulls, tokens=512, toggled_tokens=100)
