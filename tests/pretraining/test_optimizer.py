from __future__ import annotations

import pytest
import torch

from moe_pretraining.model import build_model
from moe_pretraining.optimizer import Muon, build_optimizers, orthogonalize
from moe_pretraining.settings import PretrainConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def matrices(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slowly_orthogonalized(matrix_MN: torch.Tensor) -> torch.Tensor:
    """The same polynomial, applied to singular values in double precision."""
    a, b, c = COEFFICIENTS
    u_MR, s_R, v_RN = torch.linalg.svd(matrix_MN.double(), full_matrices=False)
    s_R = s_R / s_R.norm()
    for _ in range(5):
        s_R = a * s_R + b * s_R**3 + c * s_R**5
    return u_MR @ torch.diag(s_R) @ v_RN


def updated(values: torch.Tensor, gradients: list[torch.Tensor], **options: object) -> torch.Tensor:
    parameter = torch.nn.Parameter(values.clone())
    optimizer = Muon([{"params": [parameter], **options}], lr=0.02, weight_decay=0.1)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(6, 8, 32), (6, 32, 8), (3, 16, 16), (1, 1, 5)])
def test_each_matrix_of_a_stack_is_orthogonalized_by_itself(shape: tuple[int, ...]):
    stack_BMN = matrices(*shape)
    expected = torch.stack([slowly_orthogonalized(matrix) for matrix in stack_BMN])
    torch.testing.assert_close(orthogonalize(stack_BMN).double(), expected, rtol=1e-3, atol=1e-4)
    scaled = orthogonalize(stack_BMN * 1e-3)
    torch.testing.assert_close(scaled, orthogonalize(stack_BMN), rtol=1e-3, atol=1e-4)


def test_singular_values_end_near_one_and_no_gradient_gives_no_update():
    values_BR = torch.linalg.svdvals(orthogonalize(matrices(8, 32, 128)))
    assert values_BR.min() > 0.6
    assert values_BR.max() < 1.3
    assert (orthogonalize(torch.zeros(2, 4, 8)) == 0).all()


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_of_a_single_matrix_muon_does_what_torchs_muon_does(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's iterates in that
    values, gradients = matrices(*shape), [matrices(*shape, seed=n) for n in (1, 2, 3)]
    parameter = torch.nn.Parameter(values.clone())
    reference = torch.optim.Muon(
        [parameter], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for gradient in gradients:
        parameter.grad = gradient
        reference.step()
    torch.testing.assert_close(updated(values, gradients), parameter.detach())


def test_a_stack_of_experts_is_updated_as_its_matrices_would_be():
    values, gradients = matrices(4, 8, 16), [matrices(4, 8, 16, seed=n) for n in (1, 2)]
    alone = [updated(values[e], [g[e] for g in gradients]) for e in range(4)]
    torch.testing.assert_close(updated(values, gradients), torch.stack(alone))


def test_gate_and_up_are_two_matrices():
    values, gradients = matrices(4, 8, 16), [matrices(4, 8, 16, seed=n) for n in (1, 2)]
    together = updated(values, gradients, matrices_of_rows=2)
    for half in (slice(0, 4), slice(4, 8)):
        alone = updated(values[:, half], [g[:, half] for g in gradients])
        torch.testing.assert_close(together[:, half], alone)
    assert not torch.allclose(together, updated(values, gradients), atol=1e-3)


def test_the_update_has_the_root_mean_square_of_adamws():
    for shape in ((64, 8, 32), (64, 32, 8), (16, 16)):
        change = updated(torch.zeros(shape), [matrices(*shape)])
        assert change.square().mean().sqrt() == pytest.approx(0.02 * 0.2, rel=0.2)


def test_every_parameter_has_one_optimizer(config: PretrainConfig, tokenizer):
    model = build_model(config, tokenizer)
    named = dict(model.named_parameters())
    muon, adamw = build_optimizers(model, config.model_copy(update={"optimizer": "muon"}))
    names = {
        (optimizer, group.get("matrices_of_rows"), group["weight_decay"] > 0): {
            name for name, p in named.items() for q in group["params"] if p is q
        }
        for optimizer in (muon, adamw)
        for group in optimizer.param_groups
    }
    experts = {n for n in named if ".experts." in n}
    pairs = {n for n in experts if "gate_up" in n}
    attention = {n for n in named if "_proj.weight" in n}
    norms = {n for n in named if "norm" in n}
    assert len(pairs) == 2
    assert len(attention) == 8
    assert names == {
        (muon, 1, True): attention | experts - pairs,
        (muon, 2, True): pairs,
        (adamw, None, True): set(named) - attention - experts - norms,
        (adamw, None, False): norms,
    }
    (only,) = build_optimizers(model, config)
    assert sum(len(group["params"]) for group in only.param_groups) == len(named)


def test_the_first_half_of_the_fused_rows_is_the_gate(config: PretrainConfig, tokenizer):
    experts = build_model(config, tokenizer).model.layers[0].mlp.experts
    half = config.model.intermediate_size
    assert experts.gate_up_proj.shape[1] == 2 * half
    hidden_TH = matrices(3, config.model.hidden_size)
    index_TK, weight_TK = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    gate_IH, up_IH = experts.gate_up_proj[0].split(half)
    inner_TI = torch.nn.functional.silu(hidden_TH @ gate_IH.T) * (hidden_TH @ up_IH.T)
    expected_TH = inner_TI @ experts.down_proj[0].T
    torch.testing.assert_close(experts(hidden_TH, index_TK, weight_TK), expected_TH)
