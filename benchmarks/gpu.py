"""What to run first on a new GPU: is it right there, how fast, and what would the study take?

    python benchmarks/gpu.py --device cuda --json gpu.json   # at OLMoE-1B-7B's size
    python benchmarks/gpu.py                                 # a CPU: too small to time anything

Nothing is downloaded: the embedded model and random weights serve. It needs this checkout, torch,
transformers, safetensors, pydantic, pyarrow and scipy, but no results of a study, and is made to
end within six minutes. It prints one table, a row per measurement. Rows with a limit are checks,
and the exit code is 1 if one fails:

- correctness, on the embedded model in float32: transformers' ``eager`` experts against ours; the
  strategy ``stock`` against the model as it is, bit for bit; BH by critical values, on this device,
  against BH by p-values and against the CPU, on the same router logits.
- speed at full size in bfloat16: scoring by the engine against stock ``grouped_mm`` (and
  ``sonicmoe`` where it can be loaded), memory above the weights, toggled experts.
- projections: scoring the study of config/olmoe-1b-7b.yaml, its toggles, and training the embedded
  model on 300 M tokens, at these rates.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from engine import Bench, scoring_table
from full_size import (
    STUDY,
    NoTokenizer,
    distinct_strategies,
    projection,
    random_model,
    rates_table,
    router_logits,
)
from measure import interleave, options, prepare, show
from toggles import OUTPUT_TOKENS, OUTPUT_WINDOW, by_branches
from torch import Tensor
from transformers.integrations.sonicmoe import is_sonicmoe_loadable

from moe_routing.config.study import ModelConfig, load_config
from moe_routing.engine.adapters import find_routers
from moe_routing.engine.loading import LoadedModel, load_model
from moe_routing.engine.routed import routed
from moe_routing.evaluation.calibrate import calibrate
from moe_routing.evaluation.outputs import fit_expert_outputs
from moe_routing.routing.ranking import Ranker
from moe_routing.routing.strategies import parse_strategy
from moe_routing.routing.strategies.testing import MultipleTesting, StepUp
from moe_routing.routing.types import RouterInputs

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "resources" / "olmoe-nano"
TEXT = ROOT / "tests" / "data_files" / "calibration.txt"
BH_ID = "bh_k8_a005_probability"
TRAINING_TOKENS = 300_000_000
AGREEMENT = 1e-3
"""Nats per window within which two float32 implementations agree."""


class Row(NamedTuple):
    """One measurement; ``at most`` is the limit of a check."""

    what: str
    value: float
    unit: str
    at_most: float | None = None

    def shown(self) -> dict[str, object]:
        """Return the row of the table."""
        limit = {"at most": self.at_most, "passed": self.passed} if self.at_most is not None else {}
        return {"what": self.what, "value": self.value, "unit": self.unit, **limit}

    @property
    def passed(self) -> bool:
        """Whether the limit is kept; NaN is a failure."""
        return self.at_most is None or self.value <= self.at_most


def correctness(device: str, windows: int, window: int) -> list[Row]:
    """Compare, in float32 on the embedded model, what must agree on this device."""
    loaded = load_model(ModelConfig(path=str(NANO), device=device))
    model = loaded.model
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(2, model.config.vocab_size, (windows, window), generator=generator)
    bench = Bench(model, loaded.tokenizer, ids_BS.to(device))
    eager_B = bench.stock("eager").sum(1).cpu()
    largest = (bench.engine(None) - eager_B).abs().max().item()
    model.set_experts_implementation("grouped_mm")
    stock = logits_of(bench)
    with routed(model, "stock", experts_implementation=None):
        different = (logits_of(bench) != stock).sum().item()
    not_by_p_value = not_on_cpu = tokens = 0
    calibration = calibrate(
        model, loaded.tokenizer, texts(), strategies=[BH_ID], tokens=2048, toggled_tokens=32
    )
    strategy, experts = parse_strategy(BH_ID), model.config.num_experts
    by_critical_value = StepUp.ranker(strategy, calibration, experts)
    by_p_value = MultipleTesting.ranker(strategy, calibration, experts)
    routers = find_routers(model)
    for router, logits_TE in zip(routers, router_logits(model, bench.ids_BS), strict=True):
        inputs = RouterInputs(router.layer, logits_TE, rule=router.rule)
        fast = selected(by_critical_value, inputs)
        not_by_p_value += other(fast, selected(by_p_value, inputs))
        there = replace(inputs, logits_TE=logits_TE.cpu())
        not_on_cpu += other(fast, selected(by_critical_value, there))
        tokens += len(fast)
    what = f"of {tokens:,} tokens"
    return [
        Row("our experts against eager, largest difference", largest, "nats/window", AGREEMENT),
        Row("'stock' against the model as it is, other logits", different, "logits", 0),
        Row("BH by critical values against p-values, other experts", not_by_p_value, what, 0),
        Row("BH here against on the CPU, other experts", not_on_cpu, what, 0),
    ]


def texts() -> list[str]:
    """Return documents for calibration."""
    return TEXT.read_text(encoding="utf-8").split("\n\n")


def logits_of(bench: Bench) -> Tensor:
    """Return the logits of all windows."""
    with torch.inference_mode():
        return bench.model(input_ids=bench.ids_BS, use_cache=False).logits


def selected(rank: Ranker, inputs: RouterInputs) -> Tensor:
    """Return which experts BH selects, bool, (tokens, experts), on the CPU."""
    ranking = rank(inputs, inputs.softmax_TE)
    place_TK = torch.arange(ranking.order_TK.shape[1], device=ranking.order_TK.device)
    kept_TK = place_TK < ranking.count_T[:, None]
    chosen_TE = torch.zeros_like(inputs.logits_TE, dtype=torch.bool)
    return chosen_TE.scatter(1, ranking.order_TK, kept_TK).cpu()


def other(one_TE: Tensor, two_TE: Tensor) -> int:
    """Return how many tokens have other experts in two selections."""
    return int((one_TE != two_TE).any(1).sum())


def speed(arguments: argparse.Namespace) -> list[Row]:
    """Time scoring and toggling at the full size, and project the study."""
    model = random_model(arguments.scale, getattr(torch, arguments.dtype), arguments.device)
    count = max(1, arguments.tokens // arguments.window)
    ids_BS = torch.randint(1, model.config.vocab_size, (count, arguments.window))
    bench = Bench(model, NoTokenizer(), ids_BS.to(arguments.device))
    stock = ["eager", "grouped_mm", *(["sonicmoe"] if is_sonicmoe_loadable() else [])]
    rows = []
    for row in scoring_table(bench, stock, arguments.rounds):
        name = row["implementation"]
        rows.append(Row(f"{name}: scoring", row["tokens/s"], "tokens/s"))
        rows.append(
            Row(f"{name}: against stock grouped_mm", row["times stock grouped_mm"], "times")
        )
        if (memory := row["peak above loading, MB"]) is not None:
            rows.append(Row(f"{name}: memory above the weights", memory / 1024, "GiB"))
    study = load_config(STUDY)
    rates = {row["experts"]: row["tokens/s"] for row in rates_table(bench, arguments.rounds)}
    minutes = projection(distinct_strategies(study), rates)[-1]["minutes"]
    rows.append(Row("scoring the 69 cells of the full study, projected", minutes, "minutes"))
    if arguments.toggled_tokens:
        per_token = toggling(bench, arguments)
        asked = study.calibration.toggled_tokens
        rows.append(Row("toggling experts", 1 / per_token, "tokens/s"))
        rows.append(
            Row(f"its {asked:,} toggled tokens, projected", per_token * asked / 60, "minutes")
        )
    return rows


class Bytes(NoTokenizer):
    """Makes tokens of bytes, so that a vocabulary of any size will do."""

    def __call__(self, text: str | list[str], **_: object) -> dict[str, list]:
        """Encode one text or several."""
        one = isinstance(text, str)
        ids = [list(each.encode()) for each in ([text] if one else text)]
        return {"input_ids": ids[0] if one else ids}


def toggling(bench: Bench, arguments: argparse.Namespace) -> float:
    """Return the seconds per toggled token, all layers and ranks of a study."""
    tokenizer = Bytes()
    loaded = LoadedModel(bench.model, tokenizer, {})
    outputs = fit_expert_outputs(
        bench.model, tokenizer, texts(), tokens=OUTPUT_TOKENS, window=OUTPUT_WINDOW
    )
    run = partial(by_branches, loaded, texts(), outputs, arguments.toggled_tokens, 0)
    (seconds,) = interleave({"toggles": run}, 1, arguments.device)["toggles"]
    return seconds / arguments.toggled_tokens


def training(arguments: argparse.Namespace) -> list[Row]:
    """Time training steps of the embedded model, in float32, and project a run."""
    model = load_model(ModelConfig(path=str(NANO), device=arguments.device)).model.train()
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    length = model.config.max_position_embeddings
    sequences = max(1, arguments.training_batch // length)
    ids_BS = torch.randint(2, model.config.vocab_size, (sequences, length))
    ids_BS = ids_BS.to(arguments.device)

    def step() -> None:
        model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = interleave({"step": step}, arguments.rounds, arguments.device)["step"]
    rate = ids_BS.numel() / statistics.median(seconds)
    return [
        Row(f"training the embedded model, {ids_BS.numel():,} tokens per step", rate, "tokens/s"),
        Row("300 M tokens of it, projected", TRAINING_TOKENS / rate / 60, "minutes"),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; defaults depend on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options(parser, rounds=3)
    parser.set_defaults(threads=1)
    sizes = {  # on the CPU, on a GPU
        "scale": (32, 1, "times narrower than OLMoE-1B-7B"),
        "tokens": (512, 65536, "tokens of one scoring pass"),
        "window": (256, 1024, "tokens of a sequence"),
        "toggled-tokens": (2, 64, "tokens whose experts are toggled; 0: none"),
        "training-batch": (512, 32768, "tokens of a training step"),
    }
    for name, (small, large, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, help=f"{text} ({small}; on a GPU {large})")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args(argv)
    gpu = arguments.device != "cpu"
    for name, both in sizes.items():
        key = name.replace("-", "_")
        if getattr(arguments, key) is None:
            setattr(arguments, key, both[gpu])
    arguments.dtype = arguments.dtype or ("bfloat16" if gpu else "float32")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, print; return the exit code."""
    arguments = parse(argv)
    record = {"arguments": vars(arguments), "machine": prepare(arguments)}
    rows = correctness(arguments.device, 4, 128) + speed(arguments) + training(arguments)
    record["check"] = [row.shown() for row in rows]
    show(record, arguments.json)
    failed = [row.what for row in rows if not row.passed]
    for what in failed:
        print(f"gpu.py: failed: {what}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
