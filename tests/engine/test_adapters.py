"""A fingerprint of a model reads every bit of its weights."""

from __future__ import annotations

import pytest
import torch

from moe_routing.engine.adapters import model_fingerprint


@pytest.fixture
def model(make_model):
    model = make_model("Olmoe", num_experts=4, vocab_size=16)
    model.register_buffer("scale", torch.tensor(1.0))
    model.register_buffer("steps", torch.arange(3, dtype=torch.int64))
    model.register_buffer("mask", torch.tensor([True, False, True]))
    return model


def tensors(model):
    return {**dict(model.named_parameters()), **{n: getattr(model, n) for n in ("steps", "mask")}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_change_of_one_element_of_any_tensor_changes_it(model, dtype):
    model.to(dtype)
    before = model_fingerprint(model)
    assert before == model_fingerprint(model)
    seen = {before}
    for tensor in [*tensors(model).values(), model.scale]:
        flat, place = tensor.view(-1), tensor.numel() // 2
        kept = flat[place].clone()
        # The last bit of the element alone.
        words = flat.view(
            {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.itemsize]
        )
        words[place] ^= 1
        seen.add(model_fingerprint(model))
        flat[place] = kept
    assert len(seen) == len(tensors(model)) + 2
    assert model_fingerprint(model) == before


def test_order_shape_dtype_and_name_count(make_model):
    def of(change):
        model = make_model("Olmoe", vocab_size=16)
        change(model)
        return model_fingerprint(model)

    def swap(model):
        weight = model.lm_head.weight
        weight[[0, 1]] = weight[[1, 0]]

    def rename(model):
        model.model.layers = torch.nn.ModuleList(reversed(model.model.layers))

    changes = [
        lambda _: None,
        swap,
        rename,
        lambda model: model.double(),
        lambda model: setattr(model.lm_head.weight, "data", model.lm_head.weight.view(32, 16)),
        lambda model: model.register_buffer("kept", torch.zeros(2)),
    ]
    assert len({of(change) for change in changes}) == len(changes)
    assert of(lambda model: model.register_buffer("lost", torch.zeros(2), persistent=False)) == of(
        changes[0]
    )


def test_it_does_not_depend_on_where_a_tensor_lies(model):
    before = model_fingerprint(model)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            shifted = torch.empty(weight.numel() + 1)[1:].view(weight.shape).copy_(weight)
            turned = shifted.transpose(0, -1).contiguous().transpose(0, -1)
            for moved in (shifted, turned):
                module._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
                assert model_fingerprint(model) == before


def test_large_tensors_are_read_in_parts(model, monkeypatch):
    before = model_fingerprint(model)
    monkeypatch.setattr("moe_routing.engine.adapters.CHECKSUM_WORDS", 7)
    assert model_fingerprint(model) == before
