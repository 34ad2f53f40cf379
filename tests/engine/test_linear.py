"""Products by oneDNN against torch's own, and when which of them is used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_routing.engine import linear as products
from moe_routing.engine.kernels import fused_cpu_kernels
from moe_routing.engine.linear import MIN_PRODUCTS, linear, prefers_onednn

ROWS = MIN_PRODUCTS // (128 * 64)


def operands(rows=ROWS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, 128), (64, 128), (64,)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.fixture
def calls(monkeypatch):
    """Prefer oneDNN whatever the processor; its products are listed, and made by torch."""
    rows = []

    def spy(rows_NX, weight_YX, bias_Y):
        rows.append(len(rows_NX))
        return F.linear(rows_NX, weight_YX, bias_Y)

    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "by_onednn", spy)
    return rows


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_agrees_with_torch(monkeypatch, with_bias, transposed):
    monkeypatch.setattr(products, "prefers_onednn", torch.backends.mkldnn.is_available)
    rows_NX, weight_YX, bias_Y = operands()
    if transposed:
        weight_YX = weight_YX.t().contiguous().t()
    bias_Y = bias_Y if with_bias else None
    with torch.inference_mode():
        result = linear(rows_NX, weight_YX, bias_Y)
        batch = linear(rows_NX.view(2, -1, 128), weight_YX, bias_Y)
    exact = F.linear(
        *(None if part is None else part.double() for part in (rows_NX, weight_YX, bias_Y))
    )
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=5e-5)
    assert torch.equal(batch.view_as(result), result)


def test_used_for_large_products_only(calls):
    with torch.inference_mode():
        linear(*operands())
        linear(*operands(ROWS - 1))
    assert calls == [ROWS]


def test_not_used_in_other_precisions(calls):
    with torch.inference_mode():
        for dtype in (torch.float64, torch.bfloat16):
            assert linear(*operands(dtype=dtype)).dtype == dtype
    assert calls == []


def test_not_used_under_autocast(calls):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert linear(*operands()).dtype == torch.bfloat16
    assert calls == []


def test_gradients_are_those_of_torch(calls):
    weight_YX = operands()[1].requires_grad_()
    linear(operands()[0], weight_YX).sum().backward()
    torch.testing.assert_close(weight_YX.grad[0], operands()[0].sum(0))
    assert calls == []


@pytest.mark.parametrize(("name", "preferred"), [("AMD EPYC", True), ("Intel Xeon", False)])
def test_the_processor_decides(monkeypatch, name, preferred):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    prefers_onednn.cache_clear()
    try:
        assert prefers_onednn() is (preferred and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    finally:
        prefers_onednn.cache_clear()


@pytest.mark.parametrize("preferred", [True, False])
def test_linear_layers_of_a_model(monkeypatch, model, preferred):
    monkeypatch.setattr("moe_routing.engine.kernels.prefers_onednn", lambda: preferred)
    layer = model.model.layers[0].self_attn.q_proj
    hidden = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), fused_cpu_kernels(model):
        assert ("forward" in vars(layer)) is preferred
        assert torch.equal(layer(hidden), F.linear(hidden, layer.weight, layer.bias))
    assert "forward" not in vars(layer)
