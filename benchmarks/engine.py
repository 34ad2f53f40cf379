"""Time and memory of scoring: the engine against stock transformers.

    python benchmarks/engine.py                                      # embedded model, CPU
    python benchmarks/engine.py --threads 2 --json results/engine.json
    python benchmarks/engine.py --layers 16 --device cuda --dtype bfloat16 --tokens 65536

With --layers the model is OLMoE-1B-7B's architecture (16 layers) with random weights and router
logits of unit variance. Three tables:

- scoring: the same windows through stock ``model(...).logits`` and log-softmax under each experts
  implementation, and through the engine; every position scored (perplexity), or the last one only
  (short continuations). Ratios are medians over interleaved rounds.
- experts: the engine's time under strategies with few to many experts; the experts' share is what
  is left after subtracting a pass in which experts return zeros.
- memory: the peak of a process of its own for each way.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import interleave, machine, ratio, sgemm_rate, table, write
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_routing.evaluation.calibrate import sample_router_logits
from moe_routing.evaluation.requests import TokenRequest
from moe_routing.evaluation.scoring import Scorer
from moe_routing.models.patch import routed
from moe_routing.models.recorder import Recorder
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import fit_null
from moe_routing.routing.strategies import parse_strategy

ROOT = Path(__file__).resolve().parents[1]
STOCK = ("eager", "grouped_mm", "batched_mm")
STUDY_TOKENS = {"wikitext": 384_375, "hellaswag": 1_997_381, "lambada": 476_721}
"""Tokens of the whole evaluation sets by the embedded model's tokenizer, shared contexts once. The
larger vocabulary of OLMoE needs fewer, so that projections from these are upper bounds."""


class RandomText:
    """Stands in for the tokenizer of a model with random weights: any text is random tokens."""

    bos_token_id = eos_token_id = 0

    def __init__(self, vocabulary: int, rng: np.random.Generator) -> None:
        """Keep the vocabulary size and the source of randomness."""
        self._vocabulary, self._rng = vocabulary, rng

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        """Return a token a character."""
        return {"input_ids": self._rng.integers(1, self._vocabulary, len(text)).tolist()}

    def decode(self, _: int) -> str:
        """Return a name for the prefix token."""
        return "<0>"


@dataclass(frozen=True)
class Bench:
    """What is timed."""

    model: PreTrainedModel
    tokenizer: object
    ids_BS: torch.Tensor
    calibration: Calibration
    rounds: int
    device: str

    def stock(self, implementation: str) -> None:
        """Score every position as the model's users do."""
        self.model.set_experts_implementation(implementation)
        with torch.inference_mode():
            logits = self.model(input_ids=self.ids_BS, use_cache=False).logits
            log_probability = logits[:, :-1].log_softmax(-1)
            log_probability.gather(2, self.ids_BS[:, 1:, None]).sum().item()

    def engine(self, scored: int | None, strategy: str = "", experts: str = "ragged") -> None:
        """Score the last ``scored`` positions of each window, or all."""
        rows = self.ids_BS.tolist()
        requests = [TokenRequest(row[:-1], row[1:][-(scored or len(row)) :]) for row in rows]
        scorer = Scorer(self.model, self.tokenizer, token_budget=self.ids_BS.numel())
        self.model.set_experts_implementation(experts)
        groups = [[place] for place in range(len(rows))]
        score = partial(scorer.score_tokens, requests, groups, greedy=scored is not None)
        if not strategy:
            score()
            return
        with routed(
            self.model, strategy, calibration=self.calibration, experts_implementation=experts
        ):
            score()

    def ways(self) -> dict[str, Callable[[], object]]:
        """Return every way to score; stock baselines come twice where the GPU allows."""
        names = [name for name in STOCK if name != "batched_mm" or self.ids_BS.numel() <= 8192]
        ways = {f"stock {name}": partial(self.stock, name) for name in names}
        ways["engine, perplexity"] = partial(self.engine, None)
        ways["engine, short"] = partial(self.engine, 1)
        return ways

    def flops(self, scored: int) -> float:
        """Return useful operations of a pass: matrix products that top-k of the model needs."""
        config, tokens = self.model.config, self.ids_BS.numel()
        hidden, size = config.hidden_size, config.intermediate_size
        attention = 4 * hidden * hidden + hidden * self.ids_BS.shape[1]  # causal: half of 2 * S
        experts = 3 * hidden * size * config.num_experts_per_tok + hidden * config.num_experts
        layers = config.num_hidden_layers * (attention + experts)
        return 2.0 * (tokens * layers + scored * hidden * config.vocab_size)


def scoring_table(bench: Bench, peak: float | None) -> list[dict]:
    """Time stock and engine."""
    seconds = interleave(bench.ways(), bench.rounds, bench.device)
    rows = []
    for name, times in seconds.items():
        scored = bench.ids_BS.shape[0] if name.endswith("short") else bench.ids_BS.numel()
        row = {
            "way": name,
            "tokens/s": bench.ids_BS.numel() / statistics.median(times),
            "times stock grouped_mm": ratio(seconds["stock grouped_mm"], times),
            "times stock eager": ratio(seconds["stock eager"], times),
        }
        if peak:
            row["share of sgemm rate"] = bench.flops(scored) / min(times) / peak
        rows.append(row)
    return rows


def experts_table(bench: Bench, strategies: list[str]) -> list[dict]:
    """Time the engine under strategies."""
    experts = {name: _mean_experts(bench, name) for name in strategies}
    adaptive = [m for name, m in experts.items() if not name.startswith("regular")]
    for mean in adaptive:
        name = f"regular_k{math.ceil(mean)}"
        experts.setdefault(name, float(math.ceil(mean)))
    runs = {name: partial(bench.engine, 1, name) for name in experts}
    # Without experts: what a pass costs however many are selected.
    runs["no experts"] = partial(bench.engine, 1, "regular_k1", "zeros")
    seconds = interleave(runs, bench.rounds, bench.device)
    rest = seconds.pop("no experts")
    shares = {
        name: [a - b for a, b in zip(times, rest, strict=True)] for name, times in seconds.items()
    }
    rows = []
    for name in sorted(experts, key=experts.get):
        static = seconds[f"regular_k{math.ceil(experts[name])}"]
        rows.append(
            {
                "strategy": name,
                "mean experts": experts[name],
                "tokens/s": bench.ids_BS.numel() / statistics.median(seconds[name]),
                "time / regular_k8": 1 / ratio(seconds["regular_k8"], seconds[name]),
                "experts' share / regular_k8": 1 / ratio(shares["regular_k8"], shares[name]),
                "time / static ceil(mean)": 1 / ratio(static, seconds[name]),
            }
        )
    return rows


def _mean_experts(bench: Bench, strategy: str) -> float:
    recorder = Recorder()
    with (
        routed(bench.model, strategy, calibration=bench.calibration, recorder=recorder),
        torch.inference_mode(),
    ):
        bench.model.base_model(bench.ids_BS, use_cache=False)
    return recorder.statistics().mean_experts()


def memory_table(arguments: argparse.Namespace, names: list[str]) -> list[dict]:
    """Measure each way in a process of its own."""
    rows = []
    for name in ["load only", *names]:
        command = [sys.executable, __file__, *arguments.given, "--only", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        rows.append({"way": name, "peak MB": float(output.stdout.splitlines()[-1])})
    for row in rows:
        row["above loading, MB"] = row["peak MB"] - rows[0]["peak MB"]
    return rows


def peak_megabytes(device: str) -> float:
    """Return the most memory that this process has used."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def projection(rows: list[dict]) -> list[dict]:
    """Project 23 strategies on the three whole evaluation sets from the measured rates.

    Each strategy takes the rate of the static one with as many experts or the next more, by the
    most that it may select: an upper bound for adaptive ones.
    """
    from moe_routing.config import load_config

    rates = {round(row["mean experts"]): row["tokens/s"] for row in rows}
    tokens = sum(STUDY_TOKENS.values())
    minutes, slowest = 0.0, {}
    for name in load_config(ROOT / "config" / "olmoe-1b-7b.yaml").strategies:
        most = parse_strategy(name).max_experts
        measured = min((k for k in rates if k >= most), default=max(rates))
        minutes += tokens / rates[measured] / 60
        slowest[measured] = slowest.get(measured, 0) + 1
    arithmetic = " + ".join(
        f"{n} strategies x {tokens:,} tokens / {rates[k]:,.0f} tokens/s" for k, n in slowest.items()
    )
    return [{"cells": 3 * sum(slowest.values()), "minutes": minutes, "arithmetic": arithmetic}]


def load(arguments: argparse.Namespace) -> Bench:
    """Load or make the model, and calibrate it."""
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    if arguments.layers:
        model = _random_model(arguments.layers, dtype, arguments.device)
        rng = np.random.default_rng(0)
        tokenizer, text = RandomText(model.config.vocab_size, rng), "x" * 200_000
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
        model.to(arguments.device)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        text = Path(arguments.text).read_text(encoding="utf-8")
    model.eval().requires_grad_(False)
    ALL_EXPERTS_FUNCTIONS.register("zeros", lambda _, hidden, *__: torch.zeros_like(hidden))
    window = min(arguments.window, model.config.max_position_embeddings)
    sample = sample_router_logits(
        model,
        tokenizer,
        [text],
        tokens=arguments.calibration_tokens,
        window=window,
        rng=np.random.default_rng(0),
    )
    ids = tokenizer(text, verbose=False)["input_ids"]
    count = arguments.tokens // window
    ids = (ids * (1 + count * window // len(ids)))[: count * window]
    ids_BS = torch.tensor(ids, device=arguments.device).view(count, window)
    nulls = {null: fit_null(null, sample) for null in ("within_token", "pooled")}
    calibration = Calibration(sample, nulls)
    return Bench(model, tokenizer, ids_BS, calibration, arguments.rounds, arguments.device)


def _random_model(layers: int, dtype: torch.dtype, device: str) -> PreTrainedModel:
    config = OlmoeConfig(
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        vocab_size=50304,
        max_position_embeddings=4096,
        norm_topk_prob=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for layer in model.model.layers:
        # Its input has unit mean square, so that the logits have unit variance.
        torch.nn.init.normal_(layer.mlp.gate.weight, std=config.hidden_size**-0.5)
    return model


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "resources" / "olmoe-nano"))
    parser.add_argument("--layers", type=int, help="make OLMoE-1B-7B with so many layers instead")
    parser.add_argument("--text", default=str(ROOT / "tests" / "data_files" / "calibration.txt"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096, help="in one forward pass")
    parser.add_argument("--window", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument(
        "--strategies",
        default="regular_k1,regular_k2,regular_k4,regular_k8,regular_k16,regular_k32,regular_k64,"
        "bh_k16_a005",
        help="comma-separated ids for the table of experts; regular_k8 is among them always",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the table of memory")
    parser.add_argument("--json", type=Path, help="write everything here too")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.given = list(sys.argv[1:] if argv is None else argv)
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Load, time, print."""
    arguments = parse(argv)
    about = machine(arguments.device, arguments.threads)
    bench = load(arguments)
    if arguments.only:
        if arguments.only != "load only":
            bench.ways()[arguments.only]()
        print(peak_megabytes(arguments.device))
        return
    single = arguments.device == "cpu" and arguments.dtype == "float32"
    peak = sgemm_rate(arguments.threads) if single else None
    strategies = list(dict.fromkeys([*arguments.strategies.split(","), "regular_k8"]))
    record = {"machine": about, "arguments": vars(arguments) | {"json": str(arguments.json)}}
    record["sgemm_flops"] = peak
    record["scoring"] = scoring_table(bench, peak)
    print(table(record["scoring"]), end="\n\n", flush=True)
    record["experts"] = experts_table(bench, strategies)
    print(table(record["experts"]), end="\n\n", flush=True)
    if arguments.layers:
        record["projection"] = projection(record["experts"])
        print(table(record["projection"]), end="\n\n")
    if not arguments.no_memory:
        record["memory"] = memory_table(arguments, list(bench.ways()))
        print(table(record["memory"]), end="\n\n")
    print(f"{about}")
    write(arguments.json, record)


if __name__ == "__main__":
    main()
