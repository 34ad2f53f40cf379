"""Fused kernels against the models' own, for every supported family."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

from moe_routing.engine import kernels

FAMILIES = {
    "olmoe": "OlmoeRMSNorm",
    "flex_olmo": "FlexOlmoRMSNorm",
    "mixtral": "MixtralRMSNorm",
    "qwen2_moe": "Qwen2MoeRMSNorm",
    "qwen3_moe": "Qwen3MoeRMSNorm",
}


def family_module(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def test_all_families_are_tested():
    assert sorted(FAMILIES.values()) == sorted(kernels.NORM_CLASSES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 50, 16), (1, 7, 3, 16)])
def test_norms(family, shape):
    norm = getattr(family_module(family), FAMILIES[family])(16).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    norm.weight.data = torch.randn(16, generator=generator)
    hidden = 3 * torch.randn(shape, generator=generator)
    hidden[0, 0] = 0.0
    before = hidden.clone()
    torch.testing.assert_close(kernels._norm_forward(norm)(hidden), norm(hidden))
    assert torch.equal(hidden, before)


def replaced(model):
    """Names of the classes whose forward is replaced."""
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def test_in_place_inside_restored_outside(model, monkeypatch):
    monkeypatch.setattr(kernels, "prefers_onednn", lambda: True)

    def fail():
        with kernels.fused_cpu_kernels(model):
            assert replaced(model) == {"OlmoeRMSNorm", "Linear"}
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert replaced(model) == set()


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_one_model_is_patched_and_its_family_as_before(make_model, family):
    name = FAMILIES[family].removesuffix("RMSNorm")
    fused, other = make_model(name), make_model(name)
    ids = torch.arange(20)[None]
    stock = other(ids).logits
    with kernels.fused_cpu_kernels(fused):
        assert FAMILIES[family] in replaced(fused)
        torch.testing.assert_close(fused(ids).logits, stock)
        assert torch.equal(other(ids).logits, stock)
    assert torch.equal(fused(ids).logits, stock)


def test_a_forward_of_somebody_else_s_stays(make_model):
    model = make_model("Olmoe")
    norm = model.model.norm
    norm.forward = lambda hidden: 2 * hidden
    with torch.inference_mode(), kernels.fused_cpu_kernels(model):
        assert torch.equal(norm(torch.ones(1, 3)), torch.full((1, 3), 2.0))
    assert norm(1) == 2


def test_half_precision_keeps_its_own(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    with kernels.fused_cpu_kernels(half):
        assert replaced(half) == set()
