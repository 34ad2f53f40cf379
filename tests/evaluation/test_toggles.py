"""Toggles say what whole forward passes with one expert toggled say."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moe_routing.engine.adapters import find_experts, find_routers, model_fingerprint
from moe_routing.engine.patching import patched_forward
from moe_routing.engine.requests import Encoder
from moe_routing.engine.routed import routed
from moe_routing.errors import InputError
from moe_routing.evaluation.outputs import fit_expert_outputs
from moe_routing.evaluation.toggles import Strata, choose_tokens, toggle_experts
from moe_routing.routing.toggles import Toggles

TEXT = Path(__file__).resolve().parents[1] / "data_files" / "calibration.txt"
FAMILIES = {
    "OLMoE": ("Olmoe", {"norm_topk_prob": False}),
    "Qwen2-MoE, with a shared expert": ("Qwen2Moe", {"norm_topk_prob": False}),
    "Qwen3-MoE, with a dense layer": (
        "Qwen3Moe",
        {
            "norm_topk_prob": True,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "num_key_value_heads": 1,
        },
    ),
    "Mixtral": ("Mixtral", {}),
    "FlexOlmo": ("FlexOlmo", {"norm_topk_prob": False}),
}


@pytest.fixture(scope="module")
def texts():
    return TEXT.read_text(encoding="utf-8").split("\n\n")[:6]


@pytest.fixture(scope="module")
def make(make_model, nano):
    """Return a maker of tiny random models that know the embedded model's tokens."""

    def make_one(family="Olmoe", **settings):
        settings = {"vocab_size": len(nano.tokenizer), "max_position_embeddings": 64, **settings}
        return make_model(family, **settings)

    return make_one


def outputs_of(model, nano):
    texts = [TEXT.read_text(encoding="utf-8")]
    return fit_expert_outputs(model, nano.tokenizer, texts, tokens=256, window=64)


def toggled(model, nano, texts, tokens=4, seed=0, outputs=None, **settings):
    outputs, rng = outputs or outputs_of(model, nano), np.random.default_rng(seed)
    return toggle_experts(model, nano.tokenizer, texts, outputs, tokens=tokens, rng=rng, **settings)


def documents_of(model, nano, texts):
    """Return the token ids of each document as the model reads it."""
    ids = [nano.tokenizer(text)["input_ids"] for text in texts]
    longest = model.config.max_position_embeddings
    return [
        torch.tensor([nano.tokenizer.bos_token_id, *document])[: longest + 1] for document in ids
    ]


def by_whole_passes(model, ids_S, position, layer, rank, mean_EH):
    """Toggle one expert by patching the router's output in a pass over the document's start.

    To compensate, the experts' output is changed: minus the expert's own, plus its mean.
    """
    router, seen = find_routers(model)[layer], {}

    def toggle(inner):
        def forward(hidden_TH):
            logits_TE, weight_TK, index_TK = inner(hidden_TH)
            probability_E = logits_TE[-1].softmax(-1)
            expert = int(sorted(range(len(probability_E)), key=lambda e: -probability_E[e])[rank])
            chosen = index_TK[-1].tolist()
            scale = weight_TK[-1].sum() / probability_E[chosen].sum()
            seen.update(expert=expert, weight=float(probability_E[expert] * scale))
            seen["removal"] = expert in chosen
            weight_TK = F.pad(weight_TK, (0, 1))
            index_TK = F.pad(index_TK, (0, 1))  # expert 0, with the weight 0
            if expert in chosen:
                weight_TK[-1, chosen.index(expert)] = 0.0
            else:
                index_TK[-1, -1] = expert
                weight_TK[-1, -1] = seen["weight"]
            module = find_experts(model)[layer]
            gate, up = (hidden_TH[-1] @ module.gate_up_proj[expert].T).chunk(2)
            seen["output"] = module.act_fn(gate) * up @ module.down_proj[expert].T
            seen["norm"] = float(seen["output"].norm())
            seen["deviation"] = float((seen["output"] - mean_EH[expert]).norm())
            return logits_TE, weight_TK, index_TK

        return forward

    def compensate(inner):
        def forward(*args):
            out_TH = inner(*args).clone()
            out_TH[-1] += seen["weight"] * (mean_EH[seen["expert"]] - seen["output"])
            return out_TH

        return forward

    def prediction():
        with torch.inference_mode():
            logits_V = model(ids_S[None, : position + 1], use_cache=False).logits[0, -1]
        return logits_V.double().log_softmax(-1)

    stock_V = prediction()
    with patched_forward(router.module, toggle):
        toggled_V = prediction()
    with patched_forward(find_experts(model)[layer], compensate):
        compensated_V = prediction() if seen["removal"] else toggled_V
    for name, other_V in (("", toggled_V), ("compensated_", compensated_V)):
        seen[f"{name}kl"] = float((stock_V.exp() * (stock_V - other_V)).sum())
        seen[f"{name}loss_change"] = float((stock_V - other_V)[ids_S[position + 1]])
    return seen


def check(model, nano, texts, found, rows, outputs):
    """Compare rows of toggles with the slow twin."""
    documents = documents_of(model, nano, texts)
    for row in rows:
        at = {
            name: getattr(found, f"{name}_P")[row].item()
            for name in ("document", "position", "layer", "rank", "expert")
        }
        layer, token = at["layer"], found.token_P[row]
        ids_S, mean_EH = documents[at["document"]], outputs.mean_LEH[layer]
        slow = by_whole_passes(model, ids_S, at["position"], layer, at["rank"], mean_EH)
        assert slow["expert"] == at["expert"], at
        assert found.weight_P[row].item() == pytest.approx(slow["weight"], rel=1e-4), at
        assert found.norm_P[row].item() == pytest.approx(slow["norm"], rel=1e-4), at
        deviation = found.deviation_LTE[layer, token, at["expert"]].item()
        assert deviation == pytest.approx(slow["deviation"], rel=1e-4), at
        for name in ("", "compensated_"):
            kl, change = (getattr(found, f"{name}{x}_P")[row].item() for x in ("kl", "loss_change"))
            assert kl == pytest.approx(slow[f"{name}kl"], rel=0.01, abs=1e-7), at
            assert change == pytest.approx(slow[f"{name}loss_change"], rel=0.01, abs=1e-5), at


@pytest.mark.parametrize("name", FAMILIES)
def test_effects_are_those_of_whole_passes(make, nano, texts, name):
    family, settings = FAMILIES[name]
    model = make(family, **settings)
    outputs = outputs_of(model, nano)
    found = toggled(model, nano, texts, outputs=outputs)
    layers = len(find_routers(model))
    assert found.num_layers == layers
    assert found.kl_P.numel() == 4 * layers * (2 + 2 + 3)
    assert found.kl_P.max() > 1e-3
    model.set_experts_implementation("eager")
    check(model, nano, texts, found, range(found.kl_P.numel()), outputs)


def test_effects_on_the_embedded_model_are_those_of_whole_passes(nano, texts):
    outputs = outputs_of(nano.model, nano)
    found = toggled(nano.model, nano, texts, tokens=3, outputs=outputs)
    rows = np.random.default_rng(1).choice(found.kl_P.numel(), 40, replace=False)
    check(nano.model, nano, texts, found, rows.tolist(), outputs)


def test_substitutes_lower_most_effects_of_late_layers(calibration):
    found = calibration.toggles
    removed_P, late_P = found.rank_P < 8, found.layer_P >= 12
    for name in ("kl", "loss_change"):
        plain_P, compensated_P = (getattr(found, f"{x}{name}_P") for x in ("", "compensated_"))
        assert torch.equal(plain_P[~removed_P], compensated_P[~removed_P])
        assert (plain_P != compensated_P)[removed_P].double().mean() > 0.99
    lower_P = found.compensated_kl_P < found.kl_P
    assert lower_P[removed_P & late_P].double().mean() > 0.7


def test_single_precision_gives_the_labels_of_double_precision(nano, double, texts):
    single, exact = (toggled(model, nano, texts, tokens=6) for model in (nano.model, double))
    assert torch.equal(single.expert_P, exact.expert_P)
    for epsilon in (1e-5, 1e-4, 1e-3):
        assert torch.equal(single.kl_P < epsilon, exact.kl_P < epsilon)
        assert 0.01 < (exact.kl_P < epsilon).double().mean() < 1
    assert torch.allclose(single.kl_P, exact.kl_P, rtol=0.01, atol=1e-7)


def test_double_precision_agrees_to_its_own_rounding(make, nano, texts):
    single = make()
    double = copy.deepcopy(single).double()
    double.set_experts_implementation("eager")  # the stock one has no grouped product in float64
    coarse, fine = toggled(single, nano, texts), toggled(double, nano, texts)
    assert torch.equal(coarse.expert_P, fine.expert_P)
    assert torch.allclose(coarse.kl_P, fine.kl_P, rtol=1e-3, atol=1e-9)
    assert fine.noise_L.max() < 1e-12


def test_a_half_precision_model_is_computed_in_single_precision(make, nano, texts):
    half = make().bfloat16()
    weights = dict(half.named_parameters())
    wide, narrow = toggled(copy.deepcopy(half).float(), nano, texts), toggled(half, nano, texts)
    assert torch.equal(wide.expert_P, narrow.expert_P)
    assert torch.allclose(wide.kl_P, narrow.kl_P, rtol=1e-3, atol=1e-9)
    assert narrow.noise_L.max() < 1e-9
    assert all(weights[name] is weight for name, weight in half.named_parameters())


def test_rounding_alone_changes_next_to_nothing(nano, texts):
    found = toggled(nano.model, nano, texts)
    assert found.noise_L.shape == (16,)
    assert found.noise_L.min() >= 0
    assert found.noise_L.max() < 1e-9


def test_the_same_seed_gives_the_same_bytes(make, nano, texts, tmp_path):
    model = make()
    files = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        toggled(model, nano, texts, seed=seed).save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1] != files[2]


def test_toggles_are_saved_and_loaded(make, nano, texts, tmp_path):
    model = make()
    found = toggled(model, nano, texts)
    found.save(tmp_path / "toggles.safetensors")
    again = Toggles.load(tmp_path / "toggles.safetensors")
    for name in Toggles.TENSORS:
        assert torch.equal(getattr(found, name), getattr(again, name)), name
    assert again.norm_P[7] == found.norm_LTE[found.layer_P[7], found.token_P[7], found.expert_P[7]]
    assert (again.rule.top_k, again.fingerprint) == (2, model_fingerprint(model))


def test_pairs_are_ordered_and_weighted_by_the_chance_of_their_rank(nano, texts):
    found = toggled(nano.model, nano, texts, tokens=9)
    keys = [found.layer_P, found.document_P, found.position_P, found.rank_P]
    rows = list(zip(*(key.tolist() for key in keys), strict=True))
    assert rows == sorted(rows)
    assert len(set(rows)) == len(rows) == 9 * 16 * 16
    weight_LPA = found.sampling_weight_P.view(16, 9, 16)
    # Inverse chances of the pairs of a token in a layer add up to its experts.
    assert torch.equal(weight_LPA.sum(-1), torch.full((16, 9), 64.0, dtype=torch.float64))
    assert torch.equal(found.sampling_weight_P, found.rank_weight_E[found.rank_P])
    assert torch.equal(found.rank_P.view(16, 9, 16)[..., :8], torch.arange(8).expand(16, 9, 8))


def test_strata_double():
    assert Strata.of(64, 8, (3, 3, 2)) == Strata(8, (8, 16, 32, 64), (3, 3, 2))
    assert Strata.of(128, 8, (3, 3, 2)) == Strata(8, (8, 16, 32, 128), (3, 3, 2))
    assert Strata.of(20, 8, (3, 3, 2)) == Strata(8, (8, 20), (3,))
    assert Strata.of(8, 2, (3, 3, 2)) == Strata(2, (2, 4, 8), (2, 3))
    assert Strata.of(4, 4, (3, 3, 2)) == Strata(4, (4,), ())
    assert Strata.of(64, 8, (3, 3, 2)).weight_E().unique().tolist() == [1, 8 / 3, 16 / 3, 16]


@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.lists(st.integers(1, 9), min_size=1, max_size=5).map(lambda d: sorted(d, reverse=True)),
)
def test_every_rank_is_in_one_stratum_and_weights_never_fall(experts, top_k, draws):
    strata = Strata.of(max(experts, top_k), top_k, draws)
    weight_E = strata.weight_E()
    assert weight_E.numel() == max(experts, top_k)
    assert (weight_E.diff() >= 0).all()
    rank_A = strata.draw(1, 1, np.random.default_rng(0))[0, 0]
    assert rank_A.unique().numel() == rank_A.numel() == strata.toggles
    assert weight_E[rank_A].sum().item() == pytest.approx(weight_E.numel())


def test_lower_ranks_are_drawn_uniformly_within_a_stratum():
    strata = Strata.of(64, 8, (3, 3, 2))
    rank_LPA = strata.draw(4000, 2, np.random.default_rng(0))
    count_E = torch.bincount(rank_LPA.flatten(), minlength=64) / 8000
    assert torch.equal(count_E[:8], torch.ones(8))
    assert (count_E * strata.weight_E() - 1).abs().max() < 0.2


@pytest.mark.parametrize("draws", [(), (0,), (2, 3)])
def test_draws_that_rise_are_refused(draws):
    with pytest.raises(InputError, match=r"draws is .*; allowed: one positive number per stratum"):
        Strata.of(64, 8, draws)


def test_tokens_are_spread_over_documents(nano, texts):
    encoder = Encoder(nano.tokenizer, 32)
    few = choose_tokens(encoder, texts, 4, np.random.default_rng(0))
    assert [len(probe.positions) for probe in few] == [1] * 4
    many = choose_tokens(encoder, [*texts, "One."], 40, np.random.default_rng(0))
    assert [probe.document for probe in many] == list(range(7))
    counts = [len(probe.positions) for probe in many]
    assert sum(counts) == 40
    assert counts[-1] == many[-1].ids_S.numel() - 1 < 6
    assert max(counts[:-1]) - min(counts[:-1]) <= 1
    drawn = [
        position
        for seed in range(60)
        for probe in choose_tokens(encoder, texts, 60, np.random.default_rng(seed))
        for position in probe.positions
    ]
    count_S = np.bincount(drawn)
    assert count_S.size == 32  # the first and the last position, too
    assert count_S.min() > 0.7 * count_S.mean()


def test_too_few_tokens_are_one_line(make, nano):
    with pytest.raises(
        InputError, match=r"calibration text has \d+ tokens in 1 documents of at"
    ) as caught:
        toggled(make(), nano, ["A short note."], tokens=50)
    assert "\n" not in str(caught.value)


def test_windows_and_ropes_that_are_exact_are_toggled(make, nano, texts):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    # Every pass within the longest sequence is exact, and windows are never longer.
    assert toggled(make(rope_parameters=rope), nano, texts).kl_P.numel()
    assert toggled(make("Mixtral", sliding_window=24), nano, texts).kl_P.numel()


def test_a_routed_model_is_refused(make, nano, texts):
    model = make()
    outputs = outputs_of(model, nano)
    with (
        routed(model, "regular_k2"),
        pytest.raises(InputError, match="toggles: the model is routed by 'regular_k2'; allowed"),
    ):
        toggled(model, nano, texts, outputs=outputs)


def test_outputs_of_other_weights_are_refused(make, nano, texts):
    model = make()
    with pytest.raises(InputError, match="toggles: the expert outputs are those of a model with o"):
        toggled(copy.deepcopy(model).double(), nano, texts, outputs=outputs_of(model, nano))


def test_numbers_that_are_not_finite_are_one_line(make, nano, texts):
    broken = copy.deepcopy(make())
    outputs = outputs_of(broken, nano)
    with torch.no_grad():
        find_experts(broken)[1].down_proj[:] = torch.inf
    outputs = replace(outputs, fingerprint=model_fingerprint(broken))
    with pytest.raises(
        InputError, match=r"toggles: a loss at position \d+ of document \d is not finite"
    ) as caught:
        toggled(broken, nano, texts, outputs=outputs)
    assert "\n" not in str(caught.value)
    assert all("forward" not in vars(module) for module in broken.modules())


def test_a_window_cuts_documents(make, nano, texts):
    found = toggled(make(), nano, texts, tokens=60, window=16)
    assert found.position_P.max() < 16


def test_a_dead_expert_has_no_effect(make, nano, texts):
    model = make()
    with torch.no_grad():
        find_experts(model)[0].down_proj[3] = 0
    found = toggled(model, nano, texts, tokens=20)
    dead = (found.layer_P == 0) & (found.expert_P == 3)
    assert dead.any()
    assert found.norm_P[dead].abs().max() == 0
    assert found.kl_P[dead].max() < 1e-9
    assert found.compensated_kl_P[dead].max() < 1e-9
    assert found.kl_P[~dead].median() > 1e-5
