"""Every job loads the model that model.json describes, and a study asks it for what it has."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_routing.config.study import StudyConfig
from moe_routing.errors import InputError
from moe_routing.evaluation.study_model import load_study_model, write_model
from moe_routing.workflow import check_known_model

TOKENIZER = Path(__file__).resolve().parents[2] / "resources" / "olmoe-nano"


@pytest.fixture
def folder(tmp_path):
    """A random Mixtral of 8 experts, top-2."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, vocab_size=64,
        max_position_embeddings=256, sliding_window=None, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def study(folder):
    return study_of(folder)


def study_of(folder, **changes):
    source = {"kind": "local", "path": "unused"}
    values = {
        "study": "small",
        "model": {"path": str(folder)},
        "calibration": {"source": source},
        "datasets": {"lambada": {"source": source}},
        "strategies": ["normalized_k2"],
        "statistics": {
            "baseline": "normalized_k2",
            "primary": {"strategy": "normalized_k2", "dataset": "lambada"},
        },
    }
    return StudyConfig.model_validate(values | changes)


def error_of(function, *arguments):
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_hash_of_a_result_is_that_of_what_was_loaded(folder, study, tmp_path):
    write_model(study, tmp_path, "mine.yaml")
    described = json.loads((tmp_path / "model.json").read_text())
    assert (described["num_experts"], described["top_k"], described["window"]) == (8, 2, 256)
    assert set(described["settings"]) >= {"config.json", "tokenizer.json", "tokenizer_config.json"}
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert described["files"] == {"model.safetensors": weights}
    half = study.model.model_copy(update={"dtype": "bfloat16"})
    for config in (study.model, half):
        provenance = load_study_model(config, tmp_path).provenance
        assert provenance["dtype"] == config.dtype
        assert provenance["weights_sha256"] == hashlib.sha256(weights.encode()).hexdigest()


def test_replaced_weights_are_refused_though_size_and_time_are_the_same(folder, study, tmp_path):
    write_model(study, tmp_path, "mine.yaml")
    path, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    before = path.stat()
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    message = error_of(load_study_model, study.model, tmp_path)
    assert message.startswith(f"{path}: is not the file that {tmp_path / 'model.json'} describes")


def test_another_config_or_tokenizer_is_refused(folder, study, tmp_path):
    write_model(study, tmp_path, "mine.yaml")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 3}))
    message = error_of(load_study_model, study.model, tmp_path)
    assert message.startswith(f"{folder / 'config.json'}: is not the file that ")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    message = error_of(load_study_model, study.model, tmp_path)
    assert message.startswith(f"{folder / 'generation_config.json'}: missing; ")


def test_weights_that_now_come_from_other_files_are_refused(folder, study, tmp_path):
    write_model(study, tmp_path, "mine.yaml")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors")
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is not the file that" in error_of(load_study_model, study.model, tmp_path)


def test_a_description_that_says_too_little(folder, study, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"weights_sha256": "0" * 64}))
    message = error_of(load_study_model, study.model, tmp_path)
    assert message == f"{tmp_path / 'model.json'}: key 'files' is missing; remove the file and " \
        "run again"  # fmt: skip


BAD = [
    ({"analysis": {"bh": {"max_k": [4, 16]}}},
     "mine.yaml: analysis.bh.max_k has 16; allowed: at most the model's 8 experts"),
    ({"evaluation": {"window": 512}},
     "mine.yaml: evaluation.window is 512; allowed: at most the model's 256"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), BAD)
def test_a_study_that_asks_too_much_is_refused_when_its_model_is_described(
    folder, tmp_path, changes, said
):
    assert error_of(write_model, study_of(folder, **changes), tmp_path, "mine.yaml") == said
    assert not (tmp_path / "model.json").exists()


@pytest.mark.parametrize(
    ("key", "null"), [("toggled_tokens", "needed"), ("tokens", "within_token")]
)
def test_too_few_tokens_are_refused_when_the_model_is_described(folder, tmp_path, key, null):
    source = {"kind": "local", "path": "unused"}
    study = study_of(folder, calibration={"source": source, "nulls": [null], key: 80})
    assert error_of(write_model, study, tmp_path, "mine.yaml") == (
        f"mine.yaml: calibration.{key} is 80; allowed: at least 100, for analysis.bh.alpha 0.01 of "
        f"null '{null}' with the model's 8 experts"
    )


@pytest.mark.parametrize(("changes", "said"), BAD)
def test_a_second_run_that_asks_too_much_is_refused_before_any_job(
    folder, study, tmp_path, changes, said
):
    """The job that describes the model is done, and not done again for these settings."""
    asking = study_of(folder, **changes)
    check_known_model(asking, tmp_path, "mine.yaml")  # nothing is known yet
    write_model(study, tmp_path, "mine.yaml")
    check_known_model(study, tmp_path, "mine.yaml")
    assert error_of(check_known_model, asking, tmp_path, "mine.yaml") == said


def test_what_is_known_of_another_model_is_not_held_against_a_study(folder, study, tmp_path):
    write_model(study, tmp_path, "mine.yaml")
    asking = study_of(folder, **BAD[0][0])
    other = asking.model_copy(update={"model": asking.model.model_copy(update={"path": "other"})})
    check_known_model(other, tmp_path, "mine.yaml")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 64}))
    check_known_model(asking, tmp_path, "mine.yaml")
