from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_pretraining import corpus
from moe_pretraining.model import build_model
from moe_pretraining.settings import BatchStage, ContinueFrom, PretrainConfig
from moe_pretraining.train import Trainer
from moe_routing.errors import InputError

Train = Callable[..., Path]


@pytest.fixture
def train(config: PretrainConfig, tokenizer, tokens: Path, tmp_path: Path) -> Train:
    """Return a function that trains in a named folder, up to each of some steps in turn."""

    def run(name: str, *stops: int | None, **changes: object) -> Path:
        for stop in stops or (None,):
            trainer = Trainer(config.model_copy(update=changes), tokenizer, tokens, tmp_path / name)
            trainer.run(stop)
            trainer.save_weights(tmp_path / name / "weights.safetensors")
        return tmp_path / name

    return run


def weights(folder: Path) -> bytes:
    return (folder / "weights.safetensors").read_bytes()


def log(folder: Path) -> list[dict[str, str]]:
    with (folder / "training.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        del row["tokens_per_second"]
    return rows


def test_one_seed_gives_the_same_bytes_and_another_seed_other_ones(train: Train):
    first, again, other = train("first"), train("again"), train("other", seed=1)
    assert weights(first) == weights(again)
    assert log(first) == log(again)
    assert weights(first) != weights(other)
    rows = log(first)
    assert [int(row["step"]) for row in rows] == list(range(1, 25))
    assert [row["step"] for row in rows if row["validation_loss"]] == ["8", "16", "24"]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) - 0.5


def test_a_resumed_run_ends_with_the_bytes_of_an_unbroken_one(train: Train):
    whole = train("whole", validation_interval=24)
    broken = train("broken", 5, 17, None, validation_interval=24)
    assert weights(broken) == weights(whole)
    checkpoints = [load_file(run / "checkpoint.safetensors") for run in (whole, broken)]
    assert checkpoints[0].keys() == checkpoints[1].keys()
    assert all(torch.equal(checkpoints[0][k], checkpoints[1][k]) for k in checkpoints[0])
    strip = [{k: v for k, v in row.items() if k != "validation_loss"} for row in log(broken)]
    assert strip == [{k: v for k, v in r.items() if k != "validation_loss"} for r in log(whole)]


def test_a_run_killed_between_checkpoints_starts_at_the_last_one(
    train: Train, monkeypatch: pytest.MonkeyPatch
):
    whole = train("whole")
    step = Trainer._train_step

    def killed(self: Trainer, batch: np.ndarray) -> dict[str, float]:
        if self.step == 13:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train("killed")
    resumed = train("killed")
    assert weights(resumed) == weights(whole)
    assert log(resumed) == log(whole)


def test_a_torn_last_line_of_the_log_is_cut(train: Train):
    """Its step may read as an earlier one: "17" is torn to "1"."""
    whole, torn = train("whole"), train("torn", 16)
    for rest in ("1", "17,", ""):
        with (torn / "training.csv").open("a", newline="") as stream:
            stream.write(rest)
        assert log(train("torn", 16)) == log(whole)[:16]
    assert log(train("torn")) == log(whole)


def damaged(name: str) -> Callable[[Path], int]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damaged("checkpoint.safetensors"), "checkpoint.safetensors: not what was written"),
        (
            lambda folder: (folder / "training.csv").unlink(),
            "training.csv: not the log of this run: ",
        ),
        (
            lambda folder: (folder / "training.csv").write_bytes(b"\xff\xfe\n"),
            "training.csv: not the log of this run: ",
        ),
    ],
)
def test_a_damaged_run_is_not_gone_on_with(train: Train, damage: Callable, said: str):
    folder = train("run", 8)
    damage(folder)
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        train("run")
    assert "\n" not in str(caught.value)


def test_two_hundred_steps_on_two_threads_are_the_same_bytes_broken_or_not(
    train: Train, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(corpus, "COMMON_TOKENS", 3)
    changes = {"steps": 200, "threads": 2, "recurrence_weight": 5.0, "validation_interval": 200}
    whole = train("whole", **changes)
    assert weights(train("broken", 77, 150, None, **changes)) == weights(whole)


def test_the_weight_of_words_that_recur_decides_the_weights(
    train: Train, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(corpus, "COMMON_TOKENS", 3)
    assert weights(train("weighted", recurrence_weight=5.0)) != weights(train("plain"))
    with pytest.raises(
        InputError, match=r"done with recurrence weight of step 0 = 5\.0, now it is 2\.0"
    ):
        train("weighted", recurrence_weight=2.0)


def test_that_weight_can_begin_at_a_step_and_be_decided_on_before_it(
    train: Train, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(corpus, "COMMON_TOKENS", 3)
    plain = train("plain")
    late = train("late", recurrence_weight=5.0, recurrence_start=12)
    losses = [[row["loss"] for row in log(run)] for run in (plain, late)]
    assert losses[0][:12] == losses[1][:12]
    assert all(a != b for a, b in zip(losses[0][12:], losses[1][12:], strict=True))
    train("decided", 8)
    decided = train("decided", recurrence_weight=5.0, recurrence_start=12)
    assert weights(decided) == weights(late)
    with pytest.raises(InputError, match=r"recurrence weight of step 12 = 5\.0, now it is 1\.0"):
        train("decided")


STAGES = [BatchStage(steps=7, batch_size=1), BatchStage(steps=6, batch_size=2)]


def test_muon_with_growing_batches_is_the_same_bytes_broken_or_not(train: Train):
    changes = {"optimizer": "muon", "batch_warmup": STAGES, "validation_interval": 24}
    whole = train("whole", **changes)
    assert weights(train("broken", 3, 7, 10, 19, None, **changes)) == weights(whole)
    assert weights(train("other", seed=1, **changes)) != weights(whole)
    assert weights(train("adamw", **{**changes, "optimizer": "adamw"})) != weights(whole)
    sequences = [int(row["tokens"]) / 16 for row in log(whole)]
    assert sequences == [*range(1, 8), *range(9, 20, 2), *range(23, 64, 4)]
    assert float(log(whole)[-1]["loss"]) < float(log(whole)[0]["loss"]) - 0.5


def test_two_hundred_steps_of_muon_are_the_same_bytes_broken_or_not(train: Train):
    stages = [BatchStage(steps=80, batch_size=1), BatchStage(steps=60, batch_size=2)]
    changes = {"optimizer": "muon", "batch_warmup": stages, "steps": 200}
    whole = train("whole", validation_interval=200, **changes)
    broken = train("broken", 77, 150, None, validation_interval=200, **changes)
    assert weights(broken) == weights(whole)


def test_only_words_that_recur_are_emphasised(
    config: PretrainConfig, tokenizer, tokens: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(corpus, "COMMON_TOKENS", 3)
    weighted = config.model_copy(update={"recurrence_weight": 5.0})
    trainer = Trainer(weighted, tokenizer, tokens, tmp_path / "weighted")
    batch = next(trainer.training.batches([0, 4]))
    emphasis_BL = trainer._emphasis(batch).view(batch.shape[0], -1).numpy()
    recurs_BL = corpus.recurring(batch, trainer._emphasised_V)[:, 1:]
    assert 0 < recurs_BL.mean() < 1
    assert (emphasis_BL == np.where(recurs_BL, 5.0, 1.0)).all()
    assert Trainer(config, tokenizer, tokens, tmp_path / "plain")._emphasis(batch) is None


def continuing(weights: Path, steps: int) -> ContinueFrom:
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return ContinueFrom(weights=str(weights), sha256=digest, steps=steps)


def test_a_run_goes_on_from_the_weights_and_the_text_of_another(
    train: Train, config: PretrainConfig, tokenizer, tokens: Path, tmp_path: Path
):
    first = train("first") / "weights.safetensors"
    changes = {"continue_from": continuing(first, 24), "steps": 40}
    whole = train("whole", validation_interval=40, **changes)
    assert [int(row["step"]) for row in log(whole)] == list(range(25, 41))
    assert int(log(whole)[0]["tokens"]) == 25 * 4 * 16
    assert float(log(whole)[0]["learning_rate"]) == config.learning_rate / config.warmup_steps
    trainer = Trainer(config, tokenizer, tokens, tmp_path / "first")
    batch = next(trainer.training.batches([96, 100]))
    assert float(log(whole)[0]["loss"]) == trainer._losses(batch)[0].item()
    assert weights(train("broken", 31, None, validation_interval=40, **changes)) == weights(whole)


def test_a_run_with_growing_batches_is_continued_where_its_text_ended(
    train: Train, config: PretrainConfig, tokenizer, tokens: Path, tmp_path: Path
):
    first = train("first", batch_warmup=STAGES) / "weights.safetensors"
    before = continuing(first, 24).model_copy(update={"sequences": 63})
    rows = log(train("second", continue_from=before, steps=40))
    assert int(rows[0]["tokens"]) == (63 + 4) * 16
    trainer = Trainer(config, tokenizer, tokens, tmp_path / "first-weights")
    trainer.model.load_state_dict(load_file(first))
    batch = next(trainer.training.batches([63, 67]))
    assert float(rows[0]["loss"]) == trainer._losses(batch)[0].item()


def test_weights_that_cannot_be_continued_are_named(train: Train, tmp_path: Path):
    before = continuing(train("first") / "weights.safetensors", 24)
    for change, message in (
        ({"sha256": "0" * 64}, r"^continue_from\.weights: .*: sha256 is .* asks for 0{64}$"),
        ({"weights": "gone.safetensors"}, r"^continue_from\.weights: gone.*: no such file$"),
    ):
        with pytest.raises(InputError, match=message):
            train("run", continue_from=before.model_copy(update=change), steps=40)
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    other = continuing(tmp_path / "other.safetensors", 24)
    with pytest.raises(InputError, match=r"other\.safetensors: not the weights of this config"):
        train("run", continue_from=other, steps=40)


def test_a_checkpoint_of_another_config_is_refused_untouched(train: Train):
    folder = train("run", 8)
    before = (folder / "checkpoint.safetensors").read_bytes()
    with pytest.raises(
        InputError, match="8 steps were done with batch size of step 0 = 4, now it is 2"
    ):
        train("run", batch_size=2)
    assert (folder / "checkpoint.safetensors").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_without_a_checkpoint(train: Train, tmp_path: Path):
    with pytest.raises(InputError, match=r"step \d+: the loss is (nan|inf); lower learning_rate"):
        train("run", learning_rate=1e30, warmup_steps=1)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_gpu_that_is_not_there_is_said(train: Train, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"^device is 'cuda', but no GPU is visible"):
        train("run", device="cuda")


def test_the_loss_is_the_models_own_and_trains_every_parameter(
    config: PretrainConfig, tokenizer, tokens: Path, tmp_path: Path
):
    trainer = Trainer(config, tokenizer, tokens, tmp_path)
    batch = next(trainer.training.batches([0, 4]))
    ids_BL = torch.from_numpy(batch)
    loss, _ = trainer._losses(batch)
    logits_BLV = trainer.model(ids_BL[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    silent = [n for n, p in trainer.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_building_a_model_leaves_the_global_generator_alone(config: PretrainConfig, tokenizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        before = torch.get_rng_state()
        first, again = build_model(config, tokenizer), build_model(config, tokenizer)
        assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
