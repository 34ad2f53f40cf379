"""The learning-rate schedule, and checks that a run may be resumed with a changed config."""

from __future__ import annotations

import json
import math
from pathlib import Path

from moe_pretraining.settings import PretrainConfig
from moe_routing.errors import InputError
from moe_routing.files import atomic_path
from moe_routing.schema import parse

STARTED_WITH = "started_with.json"
MAY_CHANGE = {
    "name", "sources", "device", "threads", "steps", "decay_share", "learning_rate",
    "warmup_steps", "validation_interval", "validation_batches", "checkpoint_interval",
    "repeat_steps", "batch_size", "batch_warmup", "recurrence_weight", "recurrence_start",
    "card_tokens", "max_weights_bytes",
}  # fmt: skip
"""Keys that do not affect the weights, or whose effect is compared step by step instead."""


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Return the learning rate at ``step``: warm-up, constant, then a 1 - sqrt decay to zero.

    Warmup-stable-decay (Hägele et al. 2024, 2405.18392): until the decay begins the run does not
    depend on ``steps``, so a run can be extended from a checkpoint in its constant phase.
    """
    since = step - config.first_step
    if since < config.warmup_steps:
        return config.learning_rate * (since + 1) / config.warmup_steps
    decay_steps = max(1, round(config.decay_share * (config.steps - config.first_step)))
    done = max(0.0, (step + decay_steps - config.steps) / decay_steps)
    return config.learning_rate * (1 - math.sqrt(done))


def batch_size(step: int, config: PretrainConfig) -> int:
    """Return the number of sequences in the batch of ``step``."""
    since = step - config.first_step
    for stage in config.batch_warmup:
        if since < stage.steps:
            return stage.batch_size
        since -= stage.steps
    return config.batch_size


def sequences_before(step: int, config: PretrainConfig) -> int:
    """Return the number of sequences read before ``step``: the position in the data's schedule."""
    since, total = step - config.first_step, config.first_sequence
    for stage in config.batch_warmup:
        done = min(since, stage.steps)
        total, since = total + done * stage.batch_size, since - done
    return total + since * config.batch_size


def recurrence_weight(step: int, config: PretrainConfig) -> float:
    """Return the weight of recurring words in the loss of ``step``."""
    return config.recurrence_weight if step >= config.recurrence_start else 1.0


def record_start(
    config: PretrainConfig, corpus: dict[str, str], folder: Path, steps_done: int
) -> None:
    """Write config and corpus beside the checkpoint, after checking that they match its steps.

    A run can be extended as long as its learning rate has not begun to decay. Its device and
    logging may change, but nothing else that affects the weights.

    Args:
        config: the config of the run.
        corpus: hash of each token file, by its name.
        folder: the folder of the checkpoint.
        steps_done: number of steps done at the checkpoint.

    Raises:
        InputError: this config and corpus would not have led to the checkpoint.
    """
    path = folder / STARTED_WITH
    if steps_done and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        _check_same_run(parse(PretrainConfig, before["config"], str(path)), config, steps_done)
        changed = [name for name in corpus if before["corpus"].get(name) != corpus[name]]
        if changed:
            raise InputError(
                f"the checkpoint's {steps_done} steps were done with other tokens in {changed[0]}; "
                "restore them, or give the run another name"
            )
    started_with = {"config": config.model_dump(mode="json"), "corpus": corpus}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(started_with, indent=1) + "\n", encoding="utf-8")


BY_STEP = {
    "learning rate": learning_rate,
    "batch size": batch_size,
    "recurrence weight": recurrence_weight,
}
"""Quantities that a config determines for each step."""


def _check_same_run(before: PretrainConfig, config: PretrainConfig, steps_done: int) -> None:
    """Raise InputError for the first key that would have changed the steps already done."""
    fixed = [key for key in type(config).model_fields if key not in MAY_CHANGE]
    pairs = [(key, getattr(before, key), getattr(config, key)) for key in fixed]
    pairs.append(("sources", _mixture(before), _mixture(config)))
    repeated, repeats = (min(steps_done, run.repeats_end) for run in (before, config))
    pairs.append(("steps with repeats", repeated, repeats))
    pairs += (
        (f"{name} of step {step}", of_step(step, before), of_step(step, config))
        for step in range(config.first_step, steps_done)
        for name, of_step in BY_STEP.items()
    )
    for key, old, new in pairs:
        if old != new:
            raise InputError(
                f"the checkpoint's {steps_done} steps were done with {key} = {old}, now it is "
                f"{new}; restore that, or give the run another name"
            )


def _mixture(config: PretrainConfig) -> list[tuple[str, float]]:
    return [(source.name, source.weight) for source in config.sources]
