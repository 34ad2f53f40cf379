"""Fixtures of the evaluation: the harness around the double-precision model."""

from __future__ import annotations

import pytest


@pytest.fixture
def harness(double, tokenizer):
    """Return lm-evaluation-harness's own model around the double-precision one."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=double, tokenizer=tokenizer, batch_size=8)
