"""A checkpoint that cannot be studied is refused in one line, before it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from moe_routing.config import ModelConfig
from moe_routing.errors import InputError
from moe_routing.models.loading import (
    check_device,
    checkpoint_folder,
    describe_checkpoint,
    load_model,
)

NANO = Path(__file__).resolve().parents[2] / "resources" / "olmoe-nano"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copy(tmp_path):
    """A copy of the embedded model that a test may damage."""
    return Path(shutil.copytree(NANO, tmp_path / "model"))


def error_of(function, *arguments):
    with pytest.raises(InputError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_description_of_the_embedded_model():
    description = describe_checkpoint(ModelConfig(path=str(NANO)))
    assert description["architecture"] == "OlmoeForCausalLM"
    assert (description["num_layers"], description["num_experts"]) == (16, 64)
    assert description["native_k"] == 8
    assert list(description["files"]) == ["model.safetensors"]


def test_one_changed_weight_changes_the_hash(copy):
    before = describe_checkpoint(ModelConfig(path=str(copy)))["weights_sha256"]
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert describe_checkpoint(ModelConfig(path=str(copy)))["weights_sha256"] != before


def test_no_such_folder():
    message = error_of(describe_checkpoint, ModelConfig(path="allenai/OLMoE-1B-7B-0924"))
    assert message == (
        "model.path: allenai/OLMoE-1B-7B-0924: no such folder; a hub id needs model.revision too"
    )


def test_missing_weights(copy):
    (copy / "model.safetensors").unlink()
    message = error_of(describe_checkpoint, ModelConfig(path=str(copy)))
    assert message == f"{copy}: no .safetensors file; other weight formats are not read"


def test_pickled_weights_are_not_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "other weight formats are not read" in error_of(load_model, ModelConfig(path=str(copy)))


def test_missing_shard(copy):
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    message = error_of(describe_checkpoint, ModelConfig(path=str(copy)))
    assert message.endswith("missing; model.safetensors.index.json names it")


@pytest.mark.parametrize("function", [describe_checkpoint, load_model])
def test_truncated_weights(copy, function):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = error_of(function, ModelConfig(path=str(copy)))
    assert message.startswith(f"{weights}: truncated or not a safetensors file")


def test_model_without_a_router(tmp_path):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16)).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained(NANO).save_pretrained(tmp_path)
    message = error_of(load_model, ModelConfig(path=str(tmp_path)))
    assert message.startswith("model class GPT2LMHeadModel has no supported router; allowed: Olmoe")


def test_no_gpu_where_one_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert error_of(check_device, "cuda") == (
        "model.device is 'cuda', but no GPU is visible; allowed here: cpu"
    )


def test_unknown_device():
    assert error_of(check_device, "gpu") == "model.device is 'gpu'; allowed: cpu, cuda, cuda:<n>"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hub cache on disk, laid out as huggingface_hub lays it out, and no network."""
    repository = tmp_path / "models--allenai--OLMoE-1B-7B-0924"
    snapshot = repository / "snapshots" / REVISION
    shutil.copytree(NANO, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return snapshot


def test_hub_model_loads_from_the_local_cache(hub_cache):
    config = ModelConfig(path="allenai/OLMoE-1B-7B-0924", revision=REVISION)
    assert checkpoint_folder(config) == hub_cache
    loaded = load_model(config, threads=1)
    assert loaded.provenance["revision"] == REVISION
    assert loaded.model.config.num_experts == 64


def test_another_revision_is_not_taken_instead(hub_cache):
    config = ModelConfig(path="allenai/OLMoE-1B-7B-0924", revision=REVISION[::-1])
    assert f"@{REVISION[::-1]}: not in the local hub cache" in error_of(checkpoint_folder, config)
