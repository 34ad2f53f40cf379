from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moe_pretraining.schedule import sequences_before
from moe_pretraining.settings import PretrainConfig
from moe_routing.errors import InputError
from moe_routing.schema import load_yaml, parse

ROOT = Path(__file__).parents[2]
SOURCE = {"kind": "local", "name": "a", "path": "a.txt", "license": "CC0", "url": "here"}


def values(**changes: object) -> dict:
    return {"name": "run", "sources": [SOURCE], "steps": 10, **changes}


@pytest.mark.parametrize(
    "name", ["pretrain.yaml", "pretrain-next.yaml", "pretrain-replication.yaml"]
)
def test_shipped_config_lists_every_key_and_is_the_embedded_models_shape(name: str):
    path = ROOT / "config" / name
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = load_yaml(PretrainConfig, path)
    assert set(written) == set(PretrainConfig.model_fields)
    assert set(written["model"]) == set(type(config.model).model_fields)
    assert (config.model.num_hidden_layers, config.model.num_experts) == (16, 64)
    assert config.model.num_experts_per_tok == 8
    assert config.max_weights_bytes <= 32_000_000


def test_the_next_run_differs_from_the_last_in_no_shape_of_a_weight_and_not_in_its_text():
    last, following = (
        load_yaml(PretrainConfig, ROOT / "config" / name)
        for name in ("pretrain.yaml", "pretrain-next.yaml")
    )
    longer = {"max_position_embeddings": following.model.max_position_embeddings}
    assert last.model.model_copy(update=longer) == following.model
    unweighted = [
        [s.model_copy(update={"weight": 1.0}) for s in c.sources] for c in (last, following)
    ]
    assert unweighted[0] == unweighted[1]
    decay = round(following.decay_share * following.steps)
    assert following.recurrence_start == following.steps - decay
    assert sequences_before(following.steps, following) * following.sequence_length >= 150e6


def test_config_of_hub_text_trains_the_same_architecture_from_pinned_sources():
    hub = load_yaml(PretrainConfig, ROOT / "config" / "pretrain-hub.yaml")
    local = load_yaml(PretrainConfig, ROOT / "config" / "pretrain.yaml")
    assert hub.model == local.model
    assert hub.continue_from is None
    assert {source.kind for source in hub.sources} == {"hub"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 1}, "config: stepz: unknown key; did you mean 'steps'?"),
        (
            {"continue_from": {"weights": "w", "sha256": "0" * 64, "steps": 10}},
            "config: (top level): steps is 10; allowed: more than continue_from.steps = 10",
        ),
        ({"steps": 0}, "config: steps is 0; input should be greater than or equal to 1"),
        (
            {"batch_warmup": [{"steps": 5, "batch_size": 0}]},
            "config: batch_warmup.0.batch_size is 0; input should be greater than or equal to 1",
        ),
        ({"optimizer": "sgd"}, "config: optimizer is 'sgd'; "),
        ({"recurrence_start": -1}, "config: recurrence_start is -1; "),
        ({"sources": []}, "config: sources is []; list should have at least 1 item"),
        (
            {"sources": [SOURCE, SOURCE]},
            "config: sources: two sources are named 'a'; allowed: distinct names",
        ),
        (
            {"sources": [{**SOURCE, "kind": "ftp"}]},
            "config: sources.0 is",
        ),
        (
            {"sources": [{**SOURCE, "kind": "hub", "dataset": "d", "revision": "main"}]},
            "config: sources.0.hub",
        ),
        (
            {"sequence_length": 512},
            "config: (top level): sequence_length is 512; allowed: at most "
            "model.max_position_embeddings = 256",
        ),
        (
            {"model": {"num_experts": 4}},
            "config: model: num_experts_per_tok is 8; allowed: at most num_experts = 4",
        ),
        (
            {"model": {"hidden_size": 30}},
            "config: model: num_attention_heads is 4; allowed: a divisor of hidden_size = 30",
        ),
        ({"name": ".."}, "config: name is '..'; allowed: a letter or digit, then at most 63"),
        (
            {"sources": [{**SOURCE, "name": "../a"}]},
            "config: sources.0.local.name is '../a'; allowed: a letter or digit",
        ),
        (
            {"sources": [SOURCE, {**SOURCE, "name": "A"}]},
            "config: sources: two sources are named 'a'; allowed: distinct names",
        ),
        (
            {"sources": [{**SOURCE, "path": "{x}.txt"}]},
            "config: sources.0.local.path is '{x}.txt'; allowed: a path without control",
        ),
        (
            {"continue_from": {"weights": "w", "sha256": "0", "steps": 1}},
            "config: continue_from.sha256 is '0'; allowed: 64 hexadecimal digits",
        ),
        ({"device": "cuda;id"}, "config: device is 'cuda;id'; allowed: a torch device"),
        ({"validation_share": 1.0}, "config: validation_share is 1.0; input should be less than 1"),
    ],
)
def test_bad_config_is_one_line_naming_the_key(changes: dict, message: str):
    with pytest.raises(InputError) as error:
        parse(PretrainConfig, values(**changes), "config")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_unknown_source_is_named(config: PretrainConfig):
    with pytest.raises(InputError, match="source 'third' is unknown; allowed: first, second"):
        config.source("third")


def test_local_files_are_those_of_the_named_sources(config: PretrainConfig):
    paths = [source.path for source in config.sources]
    assert config.local_files() == paths
    assert config.local_files("second") == paths[1:]
