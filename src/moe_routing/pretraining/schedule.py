"""The learning rate, and whether a run may be taken up again under a changed config."""

from __future__ import annotations

import json
import math
from pathlib import Path

from moe_routing.errors import InputError
from moe_routing.files import atomic_path
from moe_routing.pretraining.config import PretrainConfig
from moe_routing.schema import parse

STARTED_WITH = "config.json"
MAY_CHANGE = {
    "name", "sources", "device", "threads", "steps", "decay_share", "learning_rate",
    "warmup_steps", "validation_interval", "validation_batches", "checkpoint_interval",
    "card_tokens", "max_weights_bytes",
}  # fmt: skip
"""Keys that do not decide the weights, or are compared by what they come to."""


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Return the rate at ``step``: warm-up, constant, and a 1 - sqrt decay to zero.

    Warmup-stable-decay (Hägele et al. 2024, 2405.18392): until the decay begins the run does not
    depend on ``steps``, so a run can be prolonged from a checkpoint of its constant phase.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_steps = max(1, round(config.decay_share * config.steps))
    done = max(0.0, (step + decay_steps - config.steps) / decay_steps)
    return config.learning_rate * (1 - math.sqrt(done))


def record_config(config: PretrainConfig, folder: Path, steps_done: int) -> None:
    """Write the config beside the checkpoint, unless the steps done came from another one.

    A run can be prolonged while its learning rate has not begun to decay, moved to another device
    and logged otherwise; whatever else decides the weights must be what it was.

    Raises:
        InputError: the checkpoint belongs to a run that this config would not have begun with.
    """
    path = folder / STARTED_WITH
    if steps_done and path.is_file():
        before = parse(PretrainConfig, json.loads(path.read_text(encoding="utf-8")), str(path))
        _check_same_run(before, config, folder, steps_done)
    with atomic_path(path) as temporary:
        temporary.write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _check_same_run(
    before: PretrainConfig, config: PretrainConfig, folder: Path, steps_done: int
) -> None:
    """Raise InputError for the first key under which the steps done would have differed."""
    fixed = [key for key in type(config).model_fields if key not in MAY_CHANGE]
    pairs = [(key, getattr(before, key), getattr(config, key)) for key in fixed]
    pairs.append(("sources", _mixture(before), _mixture(config)))
    for step in range(steps_done):
        rates = learning_rate(step, before), learning_rate(step, config)
        if rates[0] != rates[1]:
            pairs.append((f"the learning rate of step {step}", *rates))
            break
    for key, old, new in pairs:
        if old != new:
            raise InputError(
                f"{folder}: {steps_done} steps were done with {key} = {old}, the config has {new}; "
                "restore it, or remove the folder to start again"
            )


def _mixture(config: PretrainConfig) -> list[tuple]:
    """Return what decides the text of each source; where it lies and its licence do not."""
    return [
        (source.name, source.weight, source.max_documents, getattr(source, "revision", None))
        for source in config.sources
    ]
