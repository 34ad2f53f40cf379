"""What is loaded is what is counted and hashed; what cannot be studied is refused in one line."""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_routing.config.study import ModelConfig
from moe_routing.engine.loading import (
    check_device,
    checkpoint_folder,
    count_driver_gpus,
    describe_checkpoint,
    load_model,
)
from moe_routing.errors import InputError

NANO = Path(__file__).resolve().parents[2] / "resources" / "olmoe-nano"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copy(tmp_path):
    """A copy of the embedded model that a test may damage."""
    return Path(shutil.copytree(NANO, tmp_path / "model"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small checkpoint, its experts in files one by one, as on the hub."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(saved, tmp_path):
    """A copy of the small checkpoint that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def save_tiny(folder, seed=0, **options):
    from transformers import OlmoeConfig, OlmoeForCausalLM

    tied = options.pop("tied", False)
    torch.manual_seed(seed)
    config = OlmoeConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=32,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(folder, **options)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder)
    return folder


def configure(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder, change):
    """Apply a function to the dictionary of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def described(folder):
    return describe_checkpoint(ModelConfig(path=str(folder)))


def loaded(folder):
    return load_model(ModelConfig(path=str(folder)), threads=1).model


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
    assert description["top_k"] == 8
    assert list(description["files"]) == ["model.safetensors"]


def test_one_changed_weight_changes_the_hash(copy):
    before = describe_checkpoint(ModelConfig(path=str(copy)))["weights_sha256"]
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert describe_checkpoint(ModelConfig(path=str(copy)))["weights_sha256"] != before


def index_of(folder, shard):
    names = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def copy_as(name):
    return lambda folder: shutil.copy(folder / "model.safetensors", folder / name)


@pytest.mark.parametrize(
    "add",
    [
        copy_as("consolidated.safetensors"),
        copy_as("model.fp16.safetensors"),
        lambda folder: save_file({"step": torch.ones(9)}, folder / "optimizer.safetensors"),
        lambda folder: index_of(folder, "model-00001-of-00001.safetensors"),
    ],
    ids=["consolidated", "variant", "optimizer", "index without shards"],
)
def test_files_that_are_not_loaded_are_neither_counted_nor_hashed(saved, tiny, add):
    add(tiny)
    before, after = described(saved), described(tiny)
    for key in ("parameters", "weights_sha256", "files"):
        assert after[key] == before[key]
    assert after["parameters"] == sum(p.numel() for p in loaded(tiny).parameters())


def test_of_two_copies_the_one_that_is_loaded_is_hashed(tiny, tmp_path):
    """A single file goes before shards, whatever the index says."""
    shards = save_tiny(tmp_path / "shards", seed=1, max_shard_size="10KB")
    files = sorted(path.name for path in shards.glob("*.safetensors"))
    assert len(files) > 1
    assert list(described(shards)["files"]) == files
    for path in shards.glob("model*"):
        shutil.copy(path, tiny)
    assert list(described(tiny)["files"]) == ["model.safetensors"]
    first, second = loaded(tiny).state_dict(), load_file(tiny / "model.safetensors")
    assert torch.equal(first["lm_head.weight"], second["lm_head.weight"])
    # Unless config.json names another.
    shutil.copy(shards / "model.safetensors.index.json", tiny / "other.safetensors.index.json")
    configure(tiny, transformers_weights="other.safetensors.index.json")
    assert described(tiny)["weights_sha256"] == described(shards)["weights_sha256"]
    theirs = loaded(shards).state_dict()["lm_head.weight"]
    assert torch.equal(loaded(tiny).state_dict()["lm_head.weight"], theirs)


def test_weights_of_any_layout_are_whole(saved, tmp_path):
    fused = save_tiny(tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(fused / "model.safetensors")
    single = load_file(saved / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in single
    assert described(fused)["parameters"] == described(saved)["parameters"]
    ours, theirs = loaded(saved).state_dict(), loaded(fused).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


FAMILIES = ["flex_olmo", "mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_every_supported_family_are_whole(tmp_path, family, tied):
    """As they are on the hub: an expert at a time, under the family's own names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    experts = "num_local_experts" if family == "mixtral" else "num_experts"
    config = AutoConfig.for_model(
        family, hidden_size=16, intermediate_size=8, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, vocab_size=32, pad_token_id=0,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied, **{experts: 4},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, tmp_path)
    assert any(".experts.3." in name for name in load_file(tmp_path / "model.safetensors"))
    found, weights = described(tmp_path), loaded(tmp_path).state_dict()
    assert (found["num_layers"], found["num_experts"], found["top_k"]) == (2, 4, 2)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("both", [False, True], ids=["once", "under both names"])
def test_tied_embeddings_count_once(tmp_path, both):
    folder = save_tiny(tmp_path, tied=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    if both:
        rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0}))
    model = loaded(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert described(folder)["parameters"] == sum(p.numel() for p in model.parameters())


def test_buffers_of_old_checkpoints_may_be_left_over(tiny):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tiny, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert described(tiny)["parameters"] == sum(p.numel() for p in loaded(tiny).parameters())


def without(*names):
    return lambda folder: rewrite(folder, lambda t: [t.pop(name) for name in names])


def with_config(**values):
    return lambda folder: configure(folder, **values)


def in_codes(dtype):
    name = "model.layers.1.mlp.gate.weight"
    return lambda folder: rewrite(folder, lambda t: t.update({name: t[name].to(dtype)}))


def in_two_shards(folder):
    copy_as("model-00001-of-00001.safetensors")(folder)
    copy_as("again.safetensors")(folder)
    (folder / "model.safetensors").unlink()
    files = {"a": "model-00001-of-00001.safetensors", "b": "again.safetensors"}
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


UNFIT = "model.path: {0}: the weights do not fit config.json: "
MOE = "model.layers.1.mlp."


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (with_config(num_hidden_layers=3),
         UNFIT + "missing tensors: 11 (first model.layers.2.input_layernorm.weight)"),
        (with_config(num_hidden_layers=1),
         UNFIT + "unexpected tensors: 11 (first model.layers.1.input_layernorm.weight)"),
        (with_config(num_experts=5),
         UNFIT + "tensors of another shape: 6 (first model.layers.0.mlp.experts.down_proj: "
         "(4, 16, 8) in place of (5, 16, 8))"),
        (with_config(model_type="mixtral"),
         UNFIT + "missing tensors: 4 (first model.layers.0.mlp.experts.down_proj); unexpected "
         "tensors: 28 (first model.layers.0.mlp.experts.0.down_proj.weight)"),
        (without("lm_head.weight"), UNFIT + "missing tensors: 1 (first lm_head.weight)"),
        (without(f"{MOE}gate.weight"), UNFIT + f"missing tensors: 1 (first {MOE}gate.weight)"),
        (without(f"{MOE}experts.2.up_proj.weight"),
         f"model.path: {{0}}: cannot be loaded: tensor '{MOE}experts.2.up_proj.weight' is missing"),
        (in_codes(torch.int8),
         f"{{0}}/model.safetensors: tensor '{MOE}gate.weight' is of type I8; allowed: F64, F32, F"),
        (in_codes(torch.float8_e4m3fn), f"'{MOE}gate.weight' is of type F8_E4M3; allowed: F64, F"),
        (with_config(num_experts_per_tok=0),
         "{0}/config.json: num_experts_per_tok is 0; allowed: 1 to 4, the experts of a layer"),
        (with_config(num_experts_per_tok=5), "num_experts_per_tok is 5; allowed: 1 to 4, the exp"),
        (with_config(num_experts_per_tok="2"), "{0}/config.json: transformers cannot use it: "),
        (with_config(max_position_embeddings=0),
         "{0}/config.json: max_position_embeddings is 0; allowed: at least 1"),
        (with_config(hidden_size=0), ": cannot be loaded: ZeroDivisionError"),
        (with_config(model_type="nosuch"), "{0}/config.json: transformers cannot use it: Value"),
        (with_config(transformers_weights="mine.safetensors"),
         "{0}: no mine.safetensors; no other file is loaded"),
        (lambda folder: (folder / "config.json").write_text("[1]"),
         "{0}/config.json: is a list; allowed: a JSON object"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"),
         "{0}/adapter_config.json: an adapter is not read; allowed: model.safetensors, or "),
        (copy_as("shard-00000-model-00001-of-00001.safetensors"),
         "{0}/shard-00000-model-00001-of-00001.safetensors: a distributed checkpoint is not read"),
        (in_two_shards, "model-00001-of-00001.safetensors: tensor 'lm_head.weight' is in again.sa"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "weights.safetensors"),
         "{0}: no model.safetensors or model.safetensors.index.json; no other file is loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"),
         "{0}: no tokenizer that can be loaded: "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", [describe_checkpoint, load_model])
def test_incomplete_or_foreign_checkpoints_are_refused(tiny, capfd, spoil, expected, function):
    spoil(tiny)
    assert expected.format(tiny) in error_of(function, ModelConfig(path=str(tiny)))
    assert capfd.readouterr().err == ""  # no report of transformers besides


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
    (copy / "model.safetensors").rename(copy / "model-00002-of-00002.safetensors")
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
    for function in (describe_checkpoint, load_model):
        message = error_of(function, ModelConfig(path=str(tmp_path)))
        assert message == (
            f"{tmp_path / 'config.json'}: model class GPT2LMHeadModel has no supported router "
            "(model type 'gpt2'): none of its layers has a module 'experts'; allowed: the families "
            "of docs/families.md"
        )


def test_no_gpu_where_one_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert error_of(check_device, "cuda", "model.device", lambda: 0) == (
        "model.device is 'cuda', but no GPU is visible; allowed here: cpu"
    )


@pytest.mark.parametrize(
    ("built", "reason"),
    [(None, "is a build for CPUs"), ("13.0", "may need a newer driver for CUDA 13.0")],
)
def test_a_gpu_that_only_the_driver_sees(monkeypatch, built, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    assert error_of(check_device, "cuda", "model.device", lambda: 1) == (
        f"model.device is 'cuda' and the driver shows a GPU, but torch {torch.__version__} "
        f"(torch.version.cuda is {built}) {reason}; allowed here: cpu"
    )


@pytest.mark.parametrize(("status", "gpus"), [(0, 2), (100, 0)])
def test_the_driver_is_asked_for_its_gpus(monkeypatch, status, gpus):
    class Driver:
        def __init__(self, library):
            assert library == "libcuda.so.1"

        def cuInit(self, flags):
            return status

        def cuDeviceGetCount(self, count):
            count._obj.value = 2
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    assert count_driver_gpus() == gpus


def test_without_a_driver_there_are_no_gpus(monkeypatch):
    def missing(library):
        raise OSError(library)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert count_driver_gpus() == 0


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
    assert f"@{REVISION[::-1]}: missing or incomplete in the local Hub cache" in error_of(
        checkpoint_folder, config
    )
