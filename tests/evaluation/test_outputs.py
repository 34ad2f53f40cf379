"""Expert outputs say what an explicit loop over tokens and experts says."""

from __future__ import annotations

import copy
from pathlib import Path

import families
import numpy as np
import pytest
import torch

from moe_routing.engine.adapters import find_experts, find_routers, model_fingerprint
from moe_routing.engine.routed import routed
from moe_routing.errors import InputError
from moe_routing.evaluation.calibrate import sample_router_logits
from moe_routing.evaluation.outputs import fit_expert_outputs, held_out
from moe_routing.evaluation.ridge import ridge
from moe_routing.routing.outputs import ExpertOutputs

TEXT = Path(__file__).resolve().parents[1] / "data_files" / "calibration.txt"
DENSE_LAYER = {"num_hidden_layers": 3, "mlp_only_layers": [1]}


@pytest.fixture(scope="module")
def make(make_model, nano):
    """Return a maker of tiny random models that know the embedded model's tokens."""

    def make_one(family="Olmoe", **settings):
        settings = {"vocab_size": len(nano.tokenizer), "max_position_embeddings": 64, **settings}
        return make_model(family, **settings)

    return make_one


@pytest.fixture(scope="module")
def texts():
    return TEXT.read_text(encoding="utf-8").split("\n\n")


def fit(model, nano, texts, tokens=400, window=32, **settings):
    return fit_expert_outputs(
        model, nano.tokenizer, texts, tokens=tokens, window=window, **settings
    )


def router_inputs(model, nano, texts, tokens, window):
    """Return what each router reads on the tokens of the calibration sample, and its logits."""
    seen = [[] for _ in find_routers(model)]
    handles = [
        router.module.register_forward_hook(
            lambda _, inputs, __, layer=router.layer: seen[layer].append(inputs[0])
        )
        for router in find_routers(model)
    ]
    sample = sample_router_logits(
        model, nano.tokenizer, texts, tokens=tokens, window=window, rng=np.random.default_rng(0)
    )
    for handle in handles:
        handle.remove()
    return [torch.cat(parts)[:tokens] for parts in seen], sample


@pytest.mark.parametrize(
    ("family", "settings"),
    [("Olmoe", {}), ("Mixtral", {}), ("Qwen2Moe", {}), ("Qwen3Moe", DENSE_LAYER)],
)
def test_all_fields_are_those_of_a_loop_over_experts(make, nano, texts, family, settings):
    model = make(family, **settings)
    model.set_experts_implementation("eager")
    found = fit(model, nano, texts)
    inputs, sample = router_inputs(model, nano, texts, 400, 32)
    assert found.num_layers == len(inputs) == sample.num_layers
    for layer, (module, hidden_TH) in enumerate(zip(find_experts(model), inputs, strict=True)):
        own_TE = hidden_TH @ find_routers(model)[layer].module.weight.T
        torch.testing.assert_close(own_TE, sample.logits_LTE[layer], rtol=1e-4, atol=1e-4)
        mean_square = 0.0
        for expert in range(8):
            index_T1 = torch.full((400, 1), expert)
            out_TH = module(hidden_TH, index_T1, torch.ones(400, 1)).double()
            mean_H = out_TH.mean(0)
            mean_square += out_TH.square().sum(1).mean().item()
            torch.testing.assert_close(
                found.mean_LEH[layer, expert].double(), mean_H, rtol=1e-4, atol=1e-6
            )
            for name, rest_TH in (("", out_TH), ("deviation_", out_TH - mean_H)):
                norm_T = rest_TH.norm(dim=1).clamp(min=1.18e-38)  # the end of text is embedded as 0
                kind = "deviation" if name else "norm"
                log_mean = getattr(found, f"log_mean_{kind}_LE")[layer, expert].item()
                assert log_mean == pytest.approx(norm_T.mean().log().item(), abs=1e-5)
                slow = ridge(hidden_TH.double(), norm_T.log()[:, None])
                slope_H = getattr(found, f"{name}slope_LEH")[layer, expert]
                offset = getattr(found, f"{name}offset_LE")[layer, expert]
                slow_T = slow(hidden_TH.double())[:, 0]
                torch.testing.assert_close(
                    (hidden_TH @ slope_H + offset).double(), slow_T, rtol=1e-4, atol=5e-4
                )
                log_T = getattr(found, f"sample_log_{kind}_LTE")[layer, :, expert]
                torch.testing.assert_close(log_T.double(), slow_T, rtol=1e-4, atol=5e-4)
        own = found.mean_LEH[layer].double().square().sum().item()
        assert found.explained_L[layer].item() == pytest.approx(own / mean_square, rel=1e-4)


def test_norms_of_the_embedded_model_are_predictable(calibration):
    found = calibration.outputs
    assert found.r2_L.min() > 0.3
    assert found.r2_L[0] > 0.7
    assert found.deviation_r2_L.min() > 0.2
    assert 0.05 < found.explained_L.min() < found.explained_L.max() < 0.6
    assert found.sample_log_norm_LTE.shape == calibration.sample.logits_LTE.shape
    assert (found.log_mean_deviation_LE < found.log_mean_norm_LE).float().mean() > 0.8


def test_what_is_held_out():
    assert held_out(20, 2).nonzero()[:, 0].tolist() == [8, 9, 18, 19]
    assert held_out(12, 100).nonzero()[:, 0].tolist() == []
    assert held_out(1000, 400).nonzero()[:, 0].tolist() == list(range(800, 1000))
    assert not held_out(3, 64).any()


def test_noise_is_not_predicted_on_text_that_is_held_out(make, nano, texts):
    """Half as many tokens as numbers of a hidden state: a fit without holding out looks perfect."""
    found = fit(make(hidden_size=256, head_dim=128), nano, texts, tokens=128, window=16)
    assert found.r2_L.max() < 0.9
    assert found.r2_L.isfinite().all()


def test_a_dead_expert_has_a_finite_log(make, nano, texts):
    model = make()
    with torch.no_grad():
        find_experts(model)[0].down_proj[3] = 0
        find_experts(model)[1].down_proj[:] = 0
    found = fit(model, nano, texts)
    for name in ExpertOutputs.TENSORS:
        assert getattr(found, name).isfinite().all(), name
    assert found.log_mean_norm_LE[0, 3].item() == pytest.approx(-87.3365, abs=1e-3)
    assert (found.sample_log_norm_LTE[0, :, 3] < -87).all()
    assert found.explained_L[1] == found.r2_L[1] == 0


def test_the_same_text_gives_the_same_bytes(make, nano, texts, tmp_path):
    model, files = make(), []
    for name, kept in (("one", texts), ("two", texts), ("three", texts[1:])):
        fit(model, nano, kept).save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1] != files[2]


def test_outputs_are_saved_and_loaded(make, nano, texts, tmp_path):
    model = make()
    found = fit(model, nano, texts)
    found.save(tmp_path / "outputs")
    again = ExpertOutputs.load(tmp_path / "outputs")
    for name in ExpertOutputs.TENSORS:
        assert torch.equal(getattr(found, name), getattr(again, name)), name
    assert again.mean_LEH.dtype == again.sample_log_norm_LTE.dtype == torch.float32
    assert again.r2_L.dtype == again.explained_L.dtype == torch.float64
    assert (again.rule, again.fingerprint) == (found.rule, model_fingerprint(model))
    (tmp_path / "other").write_bytes(b"text")
    with pytest.raises(InputError, match="other: not a file of expert outputs: ") as caught:
        ExpertOutputs.load(tmp_path / "other")
    assert "\n" not in str(caught.value)


def test_half_precision_experts_run_in_single_precision(make, nano, texts):
    model = make().bfloat16()
    found = fit(model, nano, texts, tokens=64)
    inputs, _ = router_inputs(model, nano, texts, 64, 32)
    module = find_experts(copy.deepcopy(model).float())[1]
    out_TH = module(inputs[1].float(), torch.full((64, 1), 5), torch.ones(64, 1))
    torch.testing.assert_close(found.mean_LEH[1, 5], out_TH.mean(0), rtol=1e-4, atol=1e-6)
    assert find_experts(model)[1].down_proj.dtype == torch.bfloat16


def test_what_cannot_be_measured_is_one_line(make, nano, texts):
    model = copy.deepcopy(make())
    with (
        routed(model, "regular_k2"),
        pytest.raises(InputError, match="expert outputs: the model is routed by 'regular_k2'; all"),
    ):
        fit(model, nano, texts)
    with pytest.raises(InputError, match=r"has \d+ tokens; calibration.tokens = 400 needs 416"):
        fit(model, nano, ["A short note."])
    with torch.no_grad():
        find_experts(model)[1].down_proj[2, 3] = torch.inf
    with pytest.raises(InputError, match="an output in layer 1 is not finite") as caught:
        fit(model, nano, texts)
    find_experts(model)[0].down_proj.data[:, 3] = torch.nan
    with pytest.raises(InputError, match="an output in layer 0 is not finite"):
        fit(model, nano, texts)
    assert "\n" not in str(caught.value)


def test_experts_that_read_something_else_than_their_router_are_refused(nano, texts):
    model = families.make(
        "nemotron_h", moe_latent_size=16, vocab_size=len(nano.tokenizer), max_position_embeddings=64
    )
    with pytest.raises(InputError, match="experts of layer 0 read something else than their rout"):
        fit(model, nano, texts)
    assert not any(experts._forward_pre_hooks for experts in find_experts(model))
