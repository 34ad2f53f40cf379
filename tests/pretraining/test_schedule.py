from __future__ import annotations

from pathlib import Path

import pytest

from moe_pretraining.schedule import (
    batch_size,
    learning_rate,
    record_start,
    sequences_before,
)
from moe_pretraining.settings import BatchStage, ContinueFrom, PretrainConfig
from moe_routing.errors import InputError

CORPUS = {"first.train.npy": "0" * 64}


def changed(config: PretrainConfig, **values: object) -> PretrainConfig:
    return config.model_copy(update=values)


def test_warm_up_constant_and_square_root_decay(config: PretrainConfig):
    run = changed(config, steps=100, warmup_steps=10, decay_share=0.25, learning_rate=0.008)
    rates = [learning_rate(step, run) for step in range(100)]
    assert rates[:2] == pytest.approx([0.0008, 0.0016])
    assert rates[9:76] == pytest.approx([0.008] * 67)
    assert rates[76] == pytest.approx(0.008 * (1 - 0.2))  # 1 of 25 steps: 1 - sqrt(1 / 25)
    assert rates[84] == pytest.approx(0.008 * (1 - 0.6))  # 9 of 25
    assert rates[91] == pytest.approx(0.008 * (1 - 0.8))  # 16 of 25
    assert 0 < rates[99] < 0.0002
    assert rates[75:] == sorted(rates[75:], reverse=True)


def test_a_continued_run_warms_up_and_decays_in_its_own_steps(config: PretrainConfig):
    run = changed(config, steps=100, warmup_steps=10, decay_share=0.25, learning_rate=0.008)
    before = ContinueFrom(weights="w.safetensors", sha256="0" * 64, steps=1000)
    continued = changed(run, steps=1100, continue_from=before)
    rates = [learning_rate(step, run) for step in range(100)]
    assert [learning_rate(step, continued) for step in range(1000, 1100)] == rates


def test_no_decay_and_decay_from_the_start(config: PretrainConfig):
    constant = changed(config, steps=100, warmup_steps=10, decay_share=0.0, learning_rate=1.0)
    assert [learning_rate(step, constant) for step in (10, 98, 99)] == [1.0] * 3
    falling = changed(constant, decay_share=1.0)
    assert learning_rate(25, falling) == pytest.approx(0.5)


def test_a_run_can_be_prolonged_before_its_decay(config: PretrainConfig, tmp_path: Path):
    record_start(changed(config, steps=100), CORPUS, tmp_path, steps_done=0)
    longer = changed(config, steps=200, name="other", checkpoint_interval=3, card_tokens=1)
    record_start(longer, CORPUS, tmp_path, steps_done=75)
    with pytest.raises(InputError, match=r"76 steps were .* learning rate of step 61 = 0\.0"):
        record_start(changed(config, steps=80), CORPUS, tmp_path, steps_done=76)


def test_batches_grow_stage_by_stage_from_the_first_step_of_the_run(config: PretrainConfig):
    stages = [BatchStage(steps=2, batch_size=1), BatchStage(steps=3, batch_size=2)]
    run = changed(config, batch_warmup=stages)
    sizes = [batch_size(step, run) for step in range(8)]
    assert sizes == [1, 1, 2, 2, 2, 4, 4, 4]
    assert [sequences_before(step, run) for step in range(9)] == [0, 1, 2, 4, 6, 8, 12, 16, 20]
    before = ContinueFrom(weights="w.safetensors", sha256="0" * 64, steps=10)
    continued = changed(run, steps=40, continue_from=before)
    assert [batch_size(step, continued) for step in range(10, 18)] == sizes
    assert [sequences_before(step, continued) for step in (10, 11, 13)] == [40, 41, 44]
    counted = before.model_copy(update={"sequences": 7})
    assert sequences_before(11, changed(continued, continue_from=counted)) == 8


def test_batches_can_be_changed_after_the_steps_done(config: PretrainConfig, tmp_path: Path):
    run = changed(config, steps=100, batch_warmup=[BatchStage(steps=8, batch_size=2)])
    record_start(run, CORPUS, tmp_path, steps_done=0)
    record_start(changed(run, batch_size=16), CORPUS, tmp_path, steps_done=8)
    longer = changed(run, batch_warmup=[BatchStage(steps=9, batch_size=2)])
    with pytest.raises(InputError, match=r"9 steps were .* batch size of step 8 = 16, now it is 2"):
        record_start(longer, CORPUS, tmp_path, steps_done=9)


def test_repeats_can_be_ended_after_the_steps_done(config: PretrainConfig, tmp_path: Path):
    run = changed(config, steps=100, repeat_share=0.5)
    record_start(run, CORPUS, tmp_path, steps_done=0)
    with pytest.raises(InputError, match=r"8 steps were .* steps with repeats = 8, now it is 7"):
        record_start(changed(run, repeat_steps=7), CORPUS, tmp_path, steps_done=8)
    record_start(changed(run, repeat_steps=8), CORPUS, tmp_path, steps_done=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed = 0, now it is 1"),
        ({"batch_size": 8}, "batch size of step 0 = 4, now it is 8"),
        ({"learning_rate": 0.1}, "learning rate of step 0"),
        ({"z_loss_coefficient": 0.5}, r"z_loss_coefficient = 0\.001, now it is 0\.5"),
        ({"optimizer": "muon"}, "optimizer = adamw, now it is muon"),
        ({"weight_decay": 0.5}, r"weight_decay = 0\.1, now it is 0\.5"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    config: PretrainConfig, tmp_path: Path, change: dict, message: str
):
    record_start(config, CORPUS, tmp_path, steps_done=0)
    with pytest.raises(InputError, match=f"8 steps were done with {message}"):
        record_start(changed(config, **change), CORPUS, tmp_path, steps_done=8)
    record_start(changed(config, **change), CORPUS, tmp_path, steps_done=0)  # a new start


def test_other_text_is_refused(config: PretrainConfig, tmp_path: Path):
    record_start(config, CORPUS, tmp_path, steps_done=0)
    heavier = [config.sources[0].model_copy(update={"weight": 9.0}), *config.sources[1:]]
    with pytest.raises(InputError, match=r"sources = .*'first', 3\.0.* now it is .*'first', 9\.0"):
        record_start(changed(config, sources=heavier), CORPUS, tmp_path, steps_done=8)
    with pytest.raises(InputError, match=r"other tokens in first\.train\.npy"):
        record_start(config, {"first.train.npy": "1" * 64}, tmp_path, steps_done=8)
