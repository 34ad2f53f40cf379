"""What users of ``routed``, ``Recorder`` and ``calibrate`` do, and this package's jobs do not."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoModel

from moe_routing import Recorder, calibrate, routed
from moe_routing.engine.context import ForwardContext, forward_context
from moe_routing.engine.routed import distinct
from moe_routing.errors import InputError
from moe_routing.routing.types import RouterInputs, Selection


@pytest.fixture
def tiny(make_model):
    """A new random model of 2 layers with 8 experts, 2 of them per token."""
    return make_model("Olmoe")


IDS = torch.arange(3, 15).view(2, 6)
TEXTS = [" ".join(f"word{n} number{n * m}" for m in range(60)) for n in range(40)]


def test_a_recorder_while_gradients_flow(tiny):
    tiny.requires_grad_(True).train()
    recorder = Recorder()
    with routed(tiny, "regular_k2", recorder=recorder):
        for _ in range(2):
            tiny(input_ids=IDS, labels=IDS).loss.backward()
    assert recorder.statistics().tokens == 2 * IDS.numel()
    assert not any(isinstance(v, torch.Tensor) and v.requires_grad for v in recorder._sums.values())
    assert all(parameter.grad is not None for parameter in tiny.model.layers[0].mlp.parameters())


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.float32, torch.bool])
def test_a_mask_of_any_type(tiny, kind):
    mask_BS = torch.ones(IDS.shape, dtype=kind)
    mask_BS[0, :4] = 0
    recorder = Recorder()
    with (
        routed(tiny, "regular_k2", recorder=recorder),
        forward_context(ForwardContext(mask_T=mask_BS.flatten())),
        torch.inference_mode(),
    ):
        tiny(input_ids=IDS)
    assert recorder.statistics().tokens == IDS.numel() - 4


@pytest.mark.parametrize("strategy", ["regular_k2", "topp_k8_p050"])
def test_left_padding_is_not_counted(tiny, strategy):
    """The statistics of a padded batch are those of its texts one by one, and so is the output."""
    short, long = IDS[:1, :3], IDS[1:]
    padded_BS = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.int64), short], 1), long])
    mask_BS = torch.ones_like(padded_BS)
    mask_BS[0, :3] = 0
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    recorder, alone = Recorder(), Recorder()
    with routed(tiny, strategy, recorder=recorder):
        together = tiny.generate(input_ids=padded_BS, attention_mask=mask_BS, **options)
    outputs = []
    with routed(tiny, strategy, recorder=alone):
        for ids_BS in (short, long):
            mask = torch.ones_like(ids_BS)
            outputs.append(tiny.generate(input_ids=ids_BS, attention_mask=mask, **options))
    found, expected = recorder.statistics(), alone.statistics()
    assert found.tokens == expected.tokens == 3 + 6 + 2 * 3
    np.testing.assert_array_equal(found.count_histogram_LC, expected.count_histogram_LC)
    np.testing.assert_array_equal(found.load_LE, expected.load_LE)
    for row, output in zip(together, outputs, strict=True):
        assert torch.equal(row[6:], output[0, -4:])


def test_a_recorder_that_saw_nothing_is_one_line(tiny):
    recorder = Recorder()
    with routed(tiny, "regular_k2", recorder=recorder):
        pass
    with pytest.raises(InputError, match="the recorder saw no forward pass; allowed: one or more"):
        recorder.statistics()


def test_the_decoder_is_restored(tiny):
    with routed(tiny, "regular_k2", recorder=Recorder()):
        assert "forward" in vars(tiny.model)
    assert "forward" not in vars(tiny.model)


def test_a_model_without_a_head_is_routed(tiny):
    body = AutoModel.from_config(tiny.config).eval()
    body.load_state_dict(tiny.model.state_dict())
    recorder = Recorder()
    with routed(body, "regular_k1", recorder=recorder), torch.inference_mode():
        found = body(input_ids=IDS).last_hidden_state
    with routed(tiny, "regular_k1"), torch.inference_mode():
        expected = tiny.model(input_ids=IDS).last_hidden_state
    assert torch.equal(found, expected)
    assert recorder.statistics().tokens == IDS.numel()


def test_a_model_without_a_head_is_calibrated_as_far_as_it_goes(nano):
    body = nano.model.base_model
    settings = {"tokens": 512, "toggled_tokens": 8, "window": 128}
    found = calibrate(body, nano.tokenizer, TEXTS, nulls=["pooled"], **settings)
    assert found.sample.num_tokens == 512
    with pytest.raises(InputError, match="OlmoeModel has no output layer; allowed: a model with"):
        calibrate(body, nano.tokenizer, TEXTS, margin=0.5, documents=10, **settings)


def test_one_text_is_not_a_list_of_texts(nano):
    with pytest.raises(InputError, match="texts is a str; allowed: a list"):
        calibrate(nano.model, nano.tokenizer, TEXTS[0])


def test_the_window_is_the_users(nano):
    settings = {"nulls": ["pooled"], "tokens": 256}
    one, same, other = (
        calibrate(nano.model, nano.tokenizer, TEXTS, window=window, **settings).sample
        for window in (None, 256, 32)
    )
    assert torch.equal(one.logits_LTE, same.logits_LTE)  # no longer than the tokens asked for
    difference_T = (one.logits_LTE - other.logits_LTE).abs().amax((0, 2))
    assert difference_T[:32].max() < 1e-4
    assert difference_T[32:].max() > 1e-2


def test_a_model_of_half_precision_in_single_precision(nano):
    half = copy.deepcopy(nano.model).to(torch.bfloat16)
    wide = copy.deepcopy(half).to(torch.float32)
    settings = {"nulls": ["pooled"], "tokens": 256}
    expected, found, own = (
        calibrate(model, nano.tokenizer, TEXTS, dtype=dtype, **settings).sample.logits_LTE
        for model, dtype in ((wide, None), (half, "float32"), (half, torch.bfloat16))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (own - expected).abs().max() > 1e-3
    assert half.dtype == torch.bfloat16
    with pytest.raises(InputError, match="dtype is 'float16'; allowed: float32, or the model's"):
        calibrate(half, nano.tokenizer, TEXTS, dtype="float16", **settings)


def test_a_tokenizer_without_an_end_of_text_token(nano):
    tokenizer = copy.deepcopy(nano.tokenizer)
    usual = calibrate(nano.model, tokenizer, TEXTS, nulls=["pooled"], tokens=256).sample
    tokenizer.bos_token, tokenizer.eos_token = tokenizer.eos_token, None
    found = calibrate(nano.model, tokenizer, TEXTS, nulls=["pooled"], tokens=256).sample
    assert torch.equal(found.logits_LTE, usual.logits_LTE)
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="the tokenizer has neither a bos nor an eos token"):
        calibrate(nano.model, tokenizer, TEXTS, nulls=["pooled"], tokens=256)


def test_strategies_say_what_is_fitted(nano):
    settings = {"tokens": 1024, "toggled_tokens": 24, "window": 256, "documents": 10}
    found = calibrate(nano.model, nano.tokenizer, TEXTS, strategies=["adaptive_k8"], **settings)
    assert (found.nulls, found.outputs, found.toggles) == ({}, None, None)
    names = ["certified_k8_m050", "regular_k4_compensated_scaled"]
    found = calibrate(nano.model, nano.tokenizer, TEXTS, strategies=names, **settings)
    assert list(found.certificates) == ["certified_k8_m050"]
    assert list(found.scales) == ["regular_k4_compensated_scaled"]
    for name in names:
        with routed(nano.model, name, calibration=found):
            pass


@pytest.mark.parametrize(
    ("ids", "counts", "message"),
    [
        ([[0, 0], [1, 2]], [2, 2], "an expert twice for one token in layer 3"),
        ([[0, 1], [1, 5]], [2, 2], "an id that is no expert"),
        ([[-1, 1], [1, 2]], [2, 2], "an id that is no expert"),
        ([[0, 4], [1, 2]], [2, 2], "a count that is not that of its ids"),
    ],
)
def test_what_another_packages_strategy_selects_is_checked(ids, counts, message):
    index_TK, count_T = torch.tensor(ids), torch.tensor(counts)
    inputs = RouterInputs(3, torch.zeros(2, 4), torch.zeros(2, 1))
    select = distinct(lambda *_: Selection(index_TK, count_T, count_T), "other_k2")
    with pytest.raises(InputError, match=f"strategy 'other_k2' selected {message}"):
        select(inputs, torch.full((2, 4), 0.25))


def test_empty_slots_may_repeat():
    index_TK, count_T = torch.tensor([[2, 4, 4], [0, 1, 4]]), torch.tensor([1, 2])
    kept = Selection(index_TK, count_T, count_T)
    inputs = RouterInputs(0, torch.zeros(2, 4), torch.zeros(2, 1))
    assert distinct(lambda *_: kept, "other")(inputs, torch.full((2, 4), 0.25)) is kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a model", "stock"), "the model is a str; allowed: Module"),
        ((None, "stock"), "the model is a NoneType; allowed: Module"),
        ((..., 4), "a strategy is a int; allowed: str"),
        ((..., ["stock"]), "a strategy is a list; allowed: str"),
        ((..., None), "a strategy is a NoneType; allowed: str"),
    ],
)
def test_wrong_arguments_of_routed_are_named(tiny, arguments, message):
    model, strategy = arguments
    with pytest.raises(InputError, match=message):
        routed(tiny if model is ... else model, strategy).__enter__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recorder": Recorder}, "the recorder is a type; allowed: Recorder"),
        ({"recorder": []}, "the recorder is a list; allowed: Recorder"),
        ({"calibration": 5}, "the calibration is a int; allowed: Calibration or str or Path"),
        ({"calibration": {}}, "the calibration is a dict; allowed: Calibration or str or Path"),
        ({"experts_implementation": 7}, "experts_implementation"),
    ],
)
def test_wrong_options_of_routed_are_named(tiny, options, message):
    state = [dict(vars(module)) for module in tiny.modules()]
    with pytest.raises(InputError, match=message) as caught:
        routed(tiny, "adaptive_k2" if "calibration" in options else "stock", **options).__enter__()
    assert "\n" not in str(caught.value)
    assert [dict(vars(module)) for module in tiny.modules()] == state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": 5}, "texts is a int; allowed: a list"),
        ({"texts": ["a", 5]}, "one of the texts is a int; allowed: str"),
        ({"strategies": "stock_k4"}, "strategies is a str; allowed: a list"),
        ({"strategies": [4]}, "one of the strategies is a int; allowed: str or Strategy"),
        ({"nulls": "pooled"}, "nulls is a str; allowed: a list"),
        ({"nulls": [None]}, "one of the nulls is a NoneType; allowed: str"),
        ({"tokens": "512"}, "tokens is a str; allowed: int"),
        ({"tokens": True}, "tokens is a bool; allowed: int"),
        ({"tokens": 0}, "tokens is 0; allowed: at least 1"),
        ({"toggled_tokens": 1.5}, "toggled_tokens is a float; allowed: int"),
        ({"documents": -1}, "documents is -1; allowed: at least 1"),
        ({"window": 0}, "window is 0; allowed: at least 1"),
        ({"margin": "0.01"}, "margin"),
        ({"margin": 0.0}, "margin"),
        ({"model": "a model"}, "the model is a str; allowed: Module"),
        ({"tokenizer": None}, "the tokenizer is a NoneType"),
        ({"seed": "a"}, "seed is a str; allowed: int"),
    ],
)
def test_wrong_arguments_of_calibrate_are_named(nano, options, message):
    given = {"model": nano.model, "tokenizer": nano.tokenizer, "texts": TEXTS} | options
    with pytest.raises(InputError, match=message) as caught:
        calibrate(**given)
    assert "\n" not in str(caught.value)


def fail(*_):
    raise KeyError("of a user's hook")


@pytest.mark.parametrize("strategy", ["regular_k1", "regular_k1_compensated"])
def test_a_hook_that_raises_leaves_no_trace(nano, strategy, calibration):
    """Between the router of a layer and its experts: nothing of that pass is kept."""
    model, recorder = nano.model, Recorder()
    state = [dict(vars(module)) for module in model.modules()]
    ids = IDS + 100
    with torch.inference_mode(), routed(model, strategy, calibration=calibration):
        expected = model(input_ids=ids).logits
    experts = model.model.layers[1].mlp.experts
    with (
        torch.inference_mode(),
        routed(model, strategy, calibration=calibration, recorder=recorder),
    ):
        with experts.register_forward_pre_hook(fail), pytest.raises(KeyError, match="user's hook"):
            model(input_ids=ids[:1])
        assert torch.equal(model(input_ids=ids).logits, expected)
    seen = recorder.statistics()
    assert (seen.tokens, seen.forwards) == (ids.numel(), 1)
    assert seen.load_LE.sum(1).tolist() == [ids.numel()] * 16
    with experts.register_forward_pre_hook(fail), pytest.raises(KeyError, match="user's hook"):
        raised_inside(model, strategy, calibration, ids)
    after = [dict(vars(module)) for module in model.modules()]
    assert [m.pop("_forward_pre_hooks") for m in after] == [
        m.pop("_forward_pre_hooks") for m in state
    ]
    assert after == state


def raised_inside(model, strategy, calibration, ids):
    with routed(model, strategy, calibration=calibration):
        model(input_ids=ids)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301
    "torch.save": lambda model: saved_and_loaded(model),
}


def saved_and_loaded(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("strategy", ["regular_k1", "regular_k1_compensated"])
def test_copies_made_inside_are_stock_models_of_their_own(nano, calibration, duplicate, strategy):
    model, ids = nano.model, IDS + 100
    with torch.inference_mode():
        stock = model(input_ids=ids).logits
        with routed(model, strategy, calibration=calibration, recorder=(recorder := Recorder())):
            twin = duplicate(model)
            assert torch.equal(twin(input_ids=ids).logits, stock)
            inside = model(input_ids=ids).logits
        assert recorder.statistics().forwards == 1
        assert torch.equal(twin(input_ids=ids).logits, stock)
        with routed(twin, strategy, calibration=calibration):
            assert torch.equal(twin(input_ids=ids).logits, inside)
    assert twin.model.layers[0].mlp.gate.weight.data_ptr() != (
        model.model.layers[0].mlp.gate.weight.data_ptr()
    )
    assert {id(m.config) for m in twin.modules() if hasattr(m, "config")} == {id(twin.config)}


def test_a_shallow_copy_shares_the_layers_and_their_routing(tiny):
    with torch.inference_mode():
        stock = tiny(input_ids=IDS).logits
        with routed(tiny, "regular_k1", recorder=(recorder := Recorder())):
            twin = copy.copy(tiny)
            assert torch.equal(twin(input_ids=IDS).logits, tiny(input_ids=IDS).logits)
            assert not torch.equal(twin(input_ids=IDS).logits, stock)
        assert torch.equal(twin(input_ids=IDS).logits, stock)
    assert recorder.statistics().forwards == 3
