"""A checkpoint in the layout of the real one is the same model."""

from __future__ import annotations

import torch
from hub_files import N_SHARDS, checkpoint

from moe_routing.config.study import ModelConfig
from moe_routing.engine.loading import describe_checkpoint, load_model


def test_experts_apart_in_shards_are_the_experts_of_one_file(nano, tmp_path):
    for name, content in checkpoint(nano.model.config.num_hidden_layers).items():
        (tmp_path / name).write_bytes(content)
    config = ModelConfig(path=str(tmp_path))
    described = describe_checkpoint(config)
    assert len(described["files"]) == N_SHARDS
    assert described["parameters"] == sum(p.numel() for p in nano.model.parameters())
    own, loaded = nano.model.state_dict(), load_model(config).model.state_dict()
    assert list(own) == list(loaded)
    assert all(torch.equal(own[name], loaded[name]) for name in own)
