"""Pretraining of a small OLMoE: resumable, and bitwise reproducible for a given seed on a CPU.

Shape letters: B sequences, L tokens of a sequence (and the one after them), T tokens, V vocabulary,
H hidden size.
"""

from __future__ import annotations

import csv
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from moe_pretraining.corpus import (
    PackedCorpus,
    check_file,
    corpus_hashes,
    recurring,
    uncommon_word_starts,
)
from moe_pretraining.loss import RouterLosses, linear_cross_entropy, router_losses
from moe_pretraining.model import build_model, load_weights
from moe_pretraining.optimizer import build_optimizers
from moe_pretraining.schedule import (
    learning_rate,
    record_start,
    recurrence_weight,
    sequences_before,
)
from moe_pretraining.settings import PretrainConfig
from moe_routing.engine.loading import check_device
from moe_routing.errors import InputError
from moe_routing.files import atomic_path, reading

if TYPE_CHECKING:
    from transformers import OlmoeForCausalLM, PreTrainedTokenizerBase

COLUMNS: tuple[str, ...] = (
    "step", "tokens", "learning_rate", "loss", "load_balancing", "z_loss", "gradient_norm",
    "max_load", "tokens_per_second", "validation_loss",
)  # fmt: skip


class Trainer:
    """One training run in its own folder.

    The folder holds ``checkpoint.safetensors``, ``training.csv`` and ``started_with.json``. A run
    that was stopped at any time continues from its last checkpoint. On a CPU the result is then
    bitwise that of an uninterrupted run: training uses no random draws, and the order of the text
    depends only on seed and step.
    """

    def __init__(
        self,
        config: PretrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        corpus_folder: Path,
        folder: Path,
    ) -> None:
        """Build the model and optimiser, and load the checkpoint in ``folder`` if there is one.

        Args:
            config: the config of the run.
            tokenizer: the run's tokenizer, for the ids of special tokens.
            corpus_folder: token files, as :func:`tokenize_source` writes them.
            folder: the run's own folder.

        Raises:
            InputError: a source is too small, the device is not available, or the checkpoint
                belongs to another config.
        """
        check_device(config.device, key="device")
        self.config, self.folder = config, folder
        self.device = torch.device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        length = config.sequence_length
        self.training, self.validation = (
            PackedCorpus.open(corpus_folder, config.sources, split, length, config.seed)
            for split in ("train", "validation")
        )
        self.training = replace(
            self.training,
            repeats=config.repeat_share,
            repeats_end=sequences_before(config.repeats_end, config),
        )
        self._emphasised_V = None
        if config.recurrence_weight != 1:  # reads all tokens
            self._emphasised_V = uncommon_word_starts(self.training.tokens, tokenizer)
        self.model = build_model(config, tokenizer)
        self.model.to(self.device)  # pyright: ignore[reportArgumentType] (its decorator hides self)
        self.optimizers = build_optimizers(self.model, config)
        self._optimizer_of = {
            parameter: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self.step = 0
        self._load_checkpoint(corpus_hashes(corpus_folder, config.sources))

    def run(self, steps: int | None = None) -> OlmoeForCausalLM:
        """Train up to ``steps`` (default: the configured number), saving at intervals.

        Raises:
            InputError: the loss is not finite.
        """
        last = min(steps or self.config.steps, self.config.steps)
        steps_to_do = range(self.step, last + 1)
        batches = self.training.batches([sequences_before(n, self.config) for n in steps_to_do])
        self.model.train()
        bar = {"unit": "step", "desc": "pretrain", "mininterval": 2.0}
        with tqdm(total=last, initial=self.step, **bar) as progress:
            for batch in batches:
                started = time.perf_counter()
                row = self._train_step(batch)
                if not math.isfinite(row["loss"]):
                    raise InputError(
                        f"step {self.step}: the loss is {row['loss']}; lower learning_rate"
                    )
                row["tokens_per_second"] = batch[:, 1:].size / (time.perf_counter() - started)
                self.step += 1
                if self.step % self.config.validation_interval == 0 or self.step == last:
                    row["validation_loss"] = self.validation_loss()
                self._log(row)
                progress.set_postfix(
                    loss=f"{row['loss']:.3f}", load=f"{row['max_load']:.1f}", refresh=False
                )
                progress.update()
                if self.step % self.config.checkpoint_interval == 0 or self.step == last:
                    self._save_checkpoint()
        return self.model

    def _train_step(self, ids_BL: np.ndarray) -> dict[str, float]:
        rate = learning_rate(self.step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss, router = self._losses(ids_BL, self._emphasis(ids_BL))
        total = (
            loss
            + self.config.load_balancing_coefficient * router.load_balancing
            + self.config.z_loss_coefficient * router.z_loss
        )
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()
        return {
            "step": self.step + 1,
            "tokens": sequences_before(self.step + 1, self.config) * self.config.sequence_length,
            "learning_rate": rate,
            "loss": loss.item(),
            "load_balancing": router.load_balancing.item(),
            "z_loss": router.z_loss.item(),
            "gradient_norm": norm.item(),
            "max_load": router.max_load.item(),
        }

    def _emphasis(self, ids_BL: np.ndarray) -> Tensor | None:
        """Return the weight of each target in the loss; None if all are equal."""
        weight = recurrence_weight(self.step, self.config)
        if weight == 1 or self._emphasised_V is None:
            return None
        recurs_BL = recurring(ids_BL, self._emphasised_V)[:, 1:]
        emphasis_T = np.where(recurs_BL, weight, 1.0).astype(np.float32).ravel()
        return torch.from_numpy(emphasis_T).to(self.device)

    def _losses(
        self, batch: np.ndarray, emphasis_T: Tensor | None = None
    ) -> tuple[Tensor, RouterLosses]:
        ids_BL = torch.from_numpy(batch).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            output = self.model.model(ids_BL[:, :-1], use_cache=False, output_router_logits=True)
        hidden_TH = output.last_hidden_state.flatten(0, 1)
        weight_VH = self.model.lm_head.weight.to(hidden_TH.dtype)
        loss = linear_cross_entropy(hidden_TH, weight_VH, ids_BL[:, 1:].flatten(), emphasis_T)
        return loss, router_losses(output.router_logits, self.config.model.num_experts_per_tok)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return the loss in nats per token on the first batches of the validation windows."""
        self.model.eval()
        losses = [
            self._losses(batch)[0].item()
            for batch in self.validation.batches(
                [n * self.config.batch_size for n in range(self.config.validation_batches + 1)]
            )
        ]
        self.model.train()
        return sum(losses) / len(losses)

    def _log(self, row: dict[str, float]) -> None:
        path = self.folder / "training.csv"
        with path.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            if stream.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    def _state(self) -> dict[str, Tensor]:
        state = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self._optimizer_of[parameter].state[parameter].items():
                state[f"{key}.{name}"] = value
        return state

    def _save_checkpoint(self) -> None:
        with atomic_path(self.folder / "checkpoint.safetensors") as temporary:
            save_file(self._state(), temporary, {"step": json.dumps(self.step)})

    def save_weights(self, path: Path) -> None:
        """Write the parameters by name as safetensors, in the precision of training."""
        with atomic_path(path) as temporary:
            save_file(dict(self.model.state_dict()), temporary, {"step": json.dumps(self.step)})

    def _load_checkpoint(self, corpus: dict[str, str]) -> None:
        path = self.folder / "checkpoint.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            (self.folder / "training.csv").unlink(missing_ok=True)
            self._start()
            record_start(self.config, corpus, self.folder, steps_done=0)
            return
        with reading(path, "a checkpoint of this run"):
            with safe_open(path, "pt") as checkpoint:
                self.step = json.loads((checkpoint.metadata() or {})["step"])
            record_start(self.config, corpus, self.folder, self.step)
            self._restore(load_file(path))
        self._cut_log()

    def _start(self) -> None:
        """Load the weights and the position in the data of the run that this one continues."""
        before = self.config.continue_from
        if before is None:
            return
        path = Path(before.weights)
        check_file(path, before.sha256, "continue_from.weights")
        load_weights(self.model, path)
        self.step = before.steps

    def _restore(self, state: dict[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for key_and_name, value in state.items():
            key, name = key_and_name.split(".", 1)
            parameter = parameters[name]
            if key == "model":
                with torch.no_grad():
                    parameter.copy_(value)
            else:
                self._optimizer_of[parameter].state[parameter][key] = value.to(self.device)

    def _cut_log(self) -> None:
        """Drop the log rows after the checkpoint; they will be written again.

        The last one may be torn, if the run was killed while it was written.
        """
        path = self.folder / "training.csv"
        try:
            with path.open(newline="", encoding="utf-8") as stream:
                whole = (line for line in stream if line.endswith("\n"))
                rows = [row for row in csv.DictReader(whole) if int(row["step"]) <= self.step]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: not the log of this run: {error}") from error
        with atomic_path(path) as temporary, temporary.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
