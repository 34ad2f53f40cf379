"""Quantised checkpoints are routed as the model that their values make, or refused in one line.

Two formats need no library on the CPU, where transformers gives weights back their values. Tests of
other formats are left out where their library is not installed.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from families import make
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from moe_routing import Recorder, calibrate, routed
from moe_routing.config.study import ModelConfig
from moe_routing.engine import linear as linear_module
from moe_routing.engine.adapters import find_experts, find_routers, model_fingerprint
from moe_routing.engine.experts import supports_dropless
from moe_routing.engine.kernels import fused_cpu_kernels
from moe_routing.engine.loading import describe_checkpoint, load_model
from moe_routing.engine.requests import TokenRequest
from moe_routing.engine.scorer import Scorer
from moe_routing.engine.upcast import upcast
from moe_routing.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, on what they lack here
NANO = Path(__file__).resolve().parents[2] / "resources" / "olmoe-nano"
SIZES = {"vocab_size": 8192, "hidden_size": 64, "intermediate_size": 64,
         "moe_intermediate_size": 64}  # fmt: skip
IDS = torch.arange(3, 63).view(4, 15)
TEXTS = [" ".join(f"word{n} number{n * m}" for m in range(60)) for n in range(40)]
CODES = torch.float8_e4m3fn
NOT_CODED = ("embed_tokens", "lm_head", "norm", "gate.weight", "router")


def save(model, folder):
    """Save a checkpoint as on the hub, expert by expert."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder)
    return folder


def rewrite(folder, code, **quantization_config):
    """Replace tensors by codes, and say in the config how they were made."""
    path, config = folder / "model.safetensors", folder / "config.json"
    tensors = {}
    for name, tensor in load_file(path).items():
        left = tensor.ndim < 2 or any(word in name for word in NOT_CODED)
        tensors |= {name: tensor} if left else code(name, tensor)
    save_file(tensors, path, {"format": "pt"})
    values = json.loads(config.read_text()) | {"quantization_config": quantization_config}
    config.write_text(json.dumps(values))


def with_values(model, values):
    """Give the original model the values that the codes stand for, tensor by tensor."""
    folder = values.pop("folder")
    path = folder / "model.safetensors"
    save_file(load_file(path) | values, path, {"format": "pt"})
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


def fp8(folder):
    """As DeepSeek-V3 and Qwen3's FP8 checkpoints: 8-bit floats, a scale for each block of 32."""
    model, values = make("qwen3_moe", **SIZES), {"folder": folder / "values"}
    save(model, folder / "values")

    def code(name, weight_YX):
        blocks = weight_YX.unflatten(1, (-1, 32)).unflatten(0, (-1, 32))
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(CODES)
        values[name] = (codes.float() * scale[:, None, :, None]).reshape(weight_YX.shape)
        return {name: codes.reshape(weight_YX.shape), f"{name}_scale_inv": scale}

    rewrite(
        save(model, folder / "codes"), code, quant_method="fp8", activation_scheme="dynamic",
        weight_block_size=[32, 32], modules_to_not_convert=["lm_head", "gate"],
    )  # fmt: skip
    return with_values(model, values)


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4(folder):
    """As gpt-oss: experts in 4-bit floats, a power of 2 for every 32 of them."""
    model, values = make("gpt_oss", **SIZES), {"folder": folder / "values"}
    save(model, folder / "values")
    generator = torch.Generator().manual_seed(0)

    def code(name, weight):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: weight}
        experts, inner, outer = weight.shape
        shape = (experts, outer, inner // 32)
        blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 125, shape, dtype=torch.uint8, generator=generator)
        numbers = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], -1).flatten(3)
        numbers = numbers * 2.0 ** (scales.float()[..., None] - 127)
        values[name] = numbers.flatten(2).transpose(1, 2).contiguous()
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    rewrite(
        save(model, folder / "codes"), code, quant_method="mxfp4",
        modules_to_not_convert=["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                "model.embed_tokens", "lm_head"],
    )  # fmt: skip
    return with_values(model, values)


def packed_int4(folder):
    """As llm-compressor writes: 4-bit integers, eight in a word, a scale for every 32."""
    pytest.importorskip("compressed_tensors")
    model, values = make("qwen3_moe", **SIZES), {"folder": folder / "values"}
    save(model, folder / "values")
    shifts = torch.arange(0, 32, 4)

    def code(name, weight_YX):
        groups = weight_YX.unflatten(1, (-1, 32))
        scale = groups.abs().amax(2) / 7
        numbers = (groups / scale[..., None]).round().clamp(-8, 7)
        values[name] = (numbers * scale[..., None]).flatten(1)
        words = ((numbers.flatten(1).long() + 8).unflatten(1, (-1, 8)) << shifts).sum(2)
        base = name.removesuffix("weight")
        return {
            f"{base}weight_packed": words.to(torch.int32),
            f"{base}weight_scale": scale,
            f"{base}weight_shape": torch.tensor(weight_YX.shape),
        }

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
               "group_size": 32}  # fmt: skip
    rewrite(
        save(model, folder / "codes"), code, quant_method="compressed-tensors",
        format="pack-quantized", quantization_status="compressed",
        ignore=["lm_head", "re:.*mlp.gate$"],
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
    )  # fmt: skip
    return with_values(model, values)


FORMATS = {"fp8": fp8, "mxfp4": mxfp4, "packed int4": packed_int4}


@pytest.fixture(scope="module", params=FORMATS)
def checkpoint(request, tmp_path_factory):
    """A model of the values, and the folder of its codes."""
    folder = tmp_path_factory.mktemp("quantised")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FORMATS[request.param](folder)
    return model, folder / "codes"


def loaded_from(folder, **settings):
    return load_model(ModelConfig(path=str(folder), **settings), threads=1).model


@torch.inference_mode()
def logits_of(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("strategy", ["stock", "stock_k3", "topp_k4_p06", "absolute_k2_t03"])
def test_a_quantised_checkpoint_is_routed_as_its_values(checkpoint, strategy):
    model, folder = checkpoint
    described = describe_checkpoint(ModelConfig(path=str(folder)))
    assert (described["num_layers"], described["num_experts"]) == (3, 8)
    found = loaded_from(folder)
    torch.testing.assert_close(logits_of(found), logits_of(model), rtol=1e-3, atol=1e-3)
    with routed(model, strategy, recorder=(recorder := Recorder())):
        expected = logits_of(model)
    for implementation in ("dropless", None):
        ours = Recorder()
        with routed(found, strategy, recorder=ours, experts_implementation=implementation):
            torch.testing.assert_close(logits_of(found), expected, rtol=1e-3, atol=1e-3)
        assert ours.statistics().mean_experts() == recorder.statistics().mean_experts()


def test_a_quantised_checkpoint_is_calibrated_and_scored(checkpoint, tokenizer):
    """By who loads it with transformers: some weights are unpacked in the first pass only."""
    model, folder = checkpoint
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    fitted = calibrate(found, tokenizer, TEXTS, tokens=256, window=64, strategies=["topp_k4_b1"])
    with routed(found, "topp_k4_b1", calibration=fitted, recorder=(recorder := Recorder())):
        logits_of(found)
    assert recorder.statistics().mean_experts() >= 1
    requests = [TokenRequest(list(range(3, 43)), [60, 61]), TokenRequest([9, 8, 7], [6])]
    ours, theirs = (
        Scorer(one, tokenizer, progress=False).score_tokens(requests, [[0], [1]])
        for one in (found, model)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-3)


def test_weights_in_another_dtype_are_run_or_refused_in_one_line(tmp_path):
    """The scales are float32, so are the values, and the model is asked for in bfloat16.

    Releases of transformers before 5.24 cannot run that.
    """
    model = fp8(tmp_path)
    try:
        found = loaded_from(tmp_path / "codes", dtype="bfloat16")
    except InputError as error:
        assert "its quantised weights cannot be run here" in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        close = logits_of(found).float() - logits_of(model)
        assert close.abs().median() < 0.05 * logits_of(model).std()


# Weights that are quantised when they are loaded.


@pytest.fixture
def integers(tmp_path):
    """A model whose linear layers hold 8-bit integers, as subclasses of tensors."""
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    folder = save(make("mixtral", **SIZES), tmp_path / "plain")
    kind = quantization.Int8WeightOnlyConfig(version=2)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=TorchAoConfig(kind), dtype=torch.float32
    ).eval()


def test_tensors_of_a_library_are_hashed_by_codes_and_scales(integers, tokenizer):
    before = model_fingerprint(integers)
    assert model_fingerprint(integers) == before
    weight = integers.model.layers[1].self_attn.q_proj.weight
    for part in (weight.qdata, weight.scale):
        kept = part.flatten()[0].clone()
        part.view(-1)[0] += 1
        assert model_fingerprint(integers) != before
        part.view(-1)[0] = kept
    assert model_fingerprint(integers) == before
    found = calibrate(
        integers, tokenizer, TEXTS, tokens=256, toggled_tokens=16, window=64, documents=20,
        strategies=["certified_k2_m050"],
    )  # fmt: skip
    with routed(integers, "certified_k2_m050", calibration=found):
        assert logits_of(integers).isfinite().all()


def test_faster_kernels_leave_tensors_of_a_library_alone(integers, monkeypatch):
    monkeypatch.setattr("moe_routing.engine.kernels.prefers_onednn", lambda: True)
    monkeypatch.setattr(linear_module, "prefers_onednn", lambda: True)
    monkeypatch.setattr(linear_module, "MIN_PRODUCTS", 1)
    expected = logits_of(integers)
    with fused_cpu_kernels(integers):
        torch.testing.assert_close(logits_of(integers), expected, rtol=1e-4, atol=1e-4)


class Coded(torch.Tensor):
    """A stand-in for a tensor of a library: it says the dtype of its values."""


def test_experts_that_a_library_quantised_are_not_computed_one_by_one(make_model):
    model, ids = make_model("Mixtral"), torch.arange(20)[None]
    assert len(find_experts(model)) == len(find_routers(model)) == 2
    for router in find_routers(model):
        weight = router.experts.down_proj.data.as_subclass(Coded)
        router.experts.down_proj = nn.Parameter(weight, requires_grad=False)
        assert not supports_dropless(router.experts)
    assert find_experts(model) == []
    with pytest.raises(InputError, match="experts without quantised weights, without an adapter"):
        routed(model, "stock_k2_exact-norm").__enter__()
    with routed(model, "topp_k4_p06"), torch.inference_mode():
        assert model(ids).logits.isfinite().all()


def test_codes_of_eight_bits_are_not_taken_for_weights():
    """Raised to single precision without their scales, they would be other weights."""
    layer = nn.Linear(4, 4, bias=False).requires_grad_(False)
    layer.weight = nn.Parameter(layer.weight.to(CODES), requires_grad=False)
    seen = []
    layer.forward = lambda rows: seen.append(layer.weight.dtype) or rows
    with upcast(layer):
        layer(torch.ones(1, 4))
    assert seen == [CODES]
