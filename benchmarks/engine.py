"""Time and memory of scoring: the engine against stock transformers, on the embedded model.

    python benchmarks/engine.py                              # some minutes on two cores
    python benchmarks/engine.py --json engine.json --allocator default

Five tables:

- agreement: the largest difference of a window's log-likelihood between stock and engine.
- scoring: the same windows through stock ``model(...).logits`` and log-softmax under each experts
  implementation, and through the engine under ``regular_k8`` (or the model's own k); every position
  scored (perplexity), or the last one only (short continuations). ``batched_mm`` copies each pair's
  weights, so it gets fewer windows. Ratios are medians over interleaved rounds, by token. Memory is
  the peak of one pass.
- experts: the engine's time under strategies with few to many experts. The time of the experts
  alone is the difference from a pass in which experts return zeros. Scores and compensation are
  timed at the pairs of ``regular_k4``: see ``time / static ceil(mean)``.
- stock: the same strategies with every position scored, by the engine and by the stock
  implementations, which get padded slots as a valid expert with weight 0.
- line: time against mean experts, a least-squares line through the static strategies.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import interleave, options, peak_megabytes, prepare, ratio, sgemm_rate, show
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_routing.engine.recorder import Recorder
from moe_routing.engine.requests import TokenRequest
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Scorer
from moe_routing.evaluation.calibrate import calibrate
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.strategies import parse_strategy

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = (
    *(f"regular_k{k}" for k in (1, 2, 4, 8, 16, 32, 64)),
    "bh_k16_a005",
    "bh_k16_a005_unselected",
    "regular_k4_norm",
    "regular_k4_compensated",
    "regular_k4_consequence_compensated",
)
BATCHED_WINDOWS = 2


@dataclass(frozen=True)
class Bench:
    """What is timed: the windows ``ids_BS`` through a model."""

    model: PreTrainedModel
    tokenizer: object
    ids_BS: torch.Tensor
    calibration: Calibration | None = None

    @property
    def device(self) -> str:
        """Where the model is."""
        return str(self.model.device)

    def windows(self, name: str) -> int:
        """Return the number of windows that an implementation scores."""
        count = self.ids_BS.shape[0]
        return min(BATCHED_WINDOWS, count) if name.endswith("batched_mm") else count

    def stock(self, implementation: str, strategy: str = "") -> torch.Tensor:
        """Score every position by the stock forward pass; float64, (windows, window - 1)."""
        ids_BS = self.ids_BS[: self.windows(implementation)]
        with self._routed(strategy, implementation), torch.inference_mode():
            logits = self.model(input_ids=ids_BS, use_cache=False).logits
            log_probability = logits[:, :-1].log_softmax(-1)
            return log_probability.gather(2, ids_BS[:, 1:, None])[..., 0].double()

    def engine(
        self, scored: int | None, strategy: str = "", experts: str = "dropless"
    ) -> torch.Tensor:
        """Score the last ``scored`` positions of each window, or all; float64, (windows,)."""
        rows = self.ids_BS.tolist()
        requests = [TokenRequest(row[:-1], row[1:][-(scored or len(row)) :]) for row in rows]
        scorer = Scorer(
            self.model, self.tokenizer, token_budget=self.ids_BS.numel(), progress=False
        )
        groups = [[index] for index in range(len(rows))]
        with self._routed(strategy, experts):
            scores = scorer.score_tokens(requests, groups, greedy=scored is not None)
        return torch.tensor([score.log_likelihood for score in scores], dtype=torch.float64)

    def _routed(self, strategy: str, experts: str) -> AbstractContextManager:
        """Return the context of a strategy; the model's own router if none is named."""
        if not strategy:
            self.model.set_experts_implementation(experts)
            return nullcontext()
        return routed(
            self.model, strategy, calibration=self.calibration, experts_implementation=experts
        )

    def implementations(self, stock: Sequence[str]) -> dict[str, Callable[[], object]]:
        """Return functions that score the windows, by name."""
        runs = {f"stock {name}": partial(self.stock, name) for name in stock}
        native = f"regular_k{self.model.config.num_experts_per_tok}"
        runs["engine, perplexity"] = partial(self.engine, None, native)
        runs["engine, short"] = partial(self.engine, 1, native)
        return runs

    def flops(self, scored: int) -> float:
        """Return the useful operations of a pass: matrix products at the model's own top-k."""
        config, tokens = self.model.config, self.ids_BS.numel()
        hidden, size = config.hidden_size, config.intermediate_size
        attention = 4 * hidden * hidden + hidden * self.ids_BS.shape[1]  # causal: half of 2 * S
        experts = 3 * hidden * size * config.num_experts_per_tok + hidden * config.num_experts
        layers = config.num_hidden_layers * (attention + experts)
        return 2.0 * (tokens * layers + scored * hidden * config.vocab_size)


def agreement(bench: Bench, strategies: Sequence[str]) -> list[dict]:
    """Compare stock and engine on every window, in nats; the model's own router first."""
    rows = []
    for strategy in ("", *strategies):
        stock = bench.stock("grouped_mm", strategy)
        whole = (bench.engine(None, strategy) - stock.sum(1).cpu()).abs().max()
        last = (bench.engine(1, strategy) - stock[:, -1].cpu()).abs().max()
        eager = (bench.stock("eager", strategy) - stock).sum(1).abs().max()
        rows.append(
            {
                "strategy": strategy or "stock router",
                "nats of a window": -stock.sum(1).mean().item(),
                "engine, every position": whole.item(),
                "engine, last position": last.item(),
                "stock eager": eager.item(),
            }
        )
    return rows


def scoring_table(
    bench: Bench, stock: Sequence[str], rounds: int, peak: float | None = None
) -> list[dict]:
    """Time stock and engine.

    Args:
        bench: model and windows.
        stock: experts implementations of transformers; ``grouped_mm`` and ``eager`` among them.
        rounds: number of runs of each implementation.
        peak: operations per second of a large matrix product, to compare with.
    """
    runs = bench.implementations(stock)
    window = bench.ids_BS.shape[1]
    seconds = {
        name: [value / (bench.windows(name) * window) for value in times]
        for name, times in interleave(runs, rounds, bench.device).items()
    }
    rows = []
    for name, times in seconds.items():
        row = {
            "implementation": name,
            "tokens/s": 1 / statistics.median(times),
            "times stock grouped_mm": ratio(seconds["stock grouped_mm"], times),
            "times stock eager": ratio(seconds["stock eager"], times),
            "tokens": bench.windows(name) * window,
            "peak above loading, MB": peak_megabytes(runs[name], bench.device),
        }
        if peak:
            scored = bench.ids_BS.shape[0] if name.endswith("short") else bench.ids_BS.numel()
            useful = bench.flops(scored) / bench.ids_BS.numel()
            row["proportion of sgemm rate"] = useful / statistics.median(times) / peak
        rows.append(row)
    return rows


def experts_table(bench: Bench, strategies: Sequence[str], rounds: int) -> list[dict]:
    """Time the engine under strategies, ``regular_k8`` among them; requests of one token."""
    experts = {name: _mean_experts(bench, name) for name in strategies}
    for mean in list(experts.values()):
        experts.setdefault(f"regular_k{math.ceil(mean)}", float(math.ceil(mean)))
    runs = {name: partial(bench.engine, 1, name) for name in experts}
    # Without experts: the fixed cost of a pass.
    ALL_EXPERTS_FUNCTIONS.register("zeros", lambda _, hidden, *__: torch.zeros_like(hidden))
    runs["no experts"] = partial(bench.engine, 1, "regular_k1", "zeros")
    seconds = interleave(runs, rounds, bench.device)
    rest = seconds.pop("no experts")
    above = {
        name: [a - b for a, b in zip(times, rest, strict=True)] for name, times in seconds.items()
    }
    rows = []
    for name in sorted(experts, key=experts.get):
        static = seconds[f"regular_k{math.ceil(experts[name])}"]
        rows.append(
            {
                "strategy": name,
                "mean experts": experts[name],
                "seconds": statistics.median(seconds[name]),
                "tokens/s": bench.ids_BS.numel() / statistics.median(seconds[name]),
                "time / regular_k8": 1 / ratio(seconds["regular_k8"], seconds[name]),
                "experts alone / regular_k8": 1 / ratio(above["regular_k8"], above[name]),
                "time / static ceil(mean)": 1 / ratio(static, seconds[name]),
            }
        )
    return rows


def stock_table(
    bench: Bench, strategies: Sequence[str], stock: Sequence[str], rounds: int
) -> list[dict]:
    """Measure time and memory of engine and stock under strategies; every position scored."""
    rows = []
    for strategy in strategies:
        runs = {"engine": partial(bench.engine, None, strategy)}
        runs |= {f"stock {name}": partial(bench.stock, name, strategy) for name in stock}
        seconds = interleave(runs, rounds, bench.device)
        row: dict[str, object] = {"strategy": strategy}
        for name, times in seconds.items():
            tokens = bench.windows(name) * bench.ids_BS.shape[1]
            row[f"{name}, tokens/s"] = tokens / statistics.median(times)
            row[f"{name}, peak MB"] = peak_megabytes(runs[name], bench.device)
        rows.append(row)
    return rows


def line(rows: Sequence[dict]) -> list[dict]:
    """Fit seconds as a line in mean experts to the static strategies of at most 16 experts."""
    static = [r for r in rows if r["strategy"].startswith("regular") and r["mean experts"] <= 16]
    x, y = ([row[name] for row in static] for name in ("mean experts", "seconds"))
    slope, start = np.polyfit(x, y, 1)
    return [{"seconds per expert": slope, "seconds without": start, "strategies": len(static)}]


def _mean_experts(bench: Bench, strategy: str) -> float:
    if strategy.startswith("regular"):
        return float(parse_strategy(strategy).max_experts)
    recorder = Recorder()
    with (
        routed(bench.model, strategy, calibration=bench.calibration, recorder=recorder),
        torch.inference_mode(),
    ):
        bench.model.base_model(bench.ids_BS, use_cache=False)
    return recorder.statistics().mean_experts()


def load(arguments: argparse.Namespace) -> Bench:
    """Load the model, calibrate it, and cut the text into windows."""
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    model.to(arguments.device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.text.read_text(encoding="utf-8")
    strategies = [parse_strategy(name) for name in arguments.strategies]
    nulls = [strategy.needs_null for strategy in strategies]
    if any(strategy.needs_outputs for strategy in strategies):
        nulls.append("needed")  # expert outputs are fitted for it
    calibration = calibrate(
        model,
        tokenizer,
        [text],
        nulls=tuple(dict.fromkeys(null for null in nulls if null)),
        tokens=arguments.calibration_tokens,
    )
    window = min(arguments.window, model.config.max_position_embeddings)
    ids = tokenizer(text, verbose=False)["input_ids"]
    count = arguments.tokens // window
    ids = (ids * (1 + count * window // len(ids)))[: count * window]
    ids_BS = torch.tensor(ids, device=arguments.device).view(count, window)
    return Bench(model, tokenizer, ids_BS, calibration)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options(parser, rounds=7)
    parser.add_argument("--model", default=str(ROOT / "resources" / "olmoe-nano"))
    parser.add_argument(
        "--text", type=Path, default=ROOT / "tests" / "data_files" / "calibration.txt"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, default=4096, help="in one forward pass")
    parser.add_argument("--window", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument(
        "--strategies",
        type=lambda text: list(dict.fromkeys([*text.split(","), "regular_k8"])),
        default=",".join(STRATEGIES),
        help="comma-separated ids for the table of experts; regular_k8 is always added",
    )
    parser.add_argument(
        "--stock-rounds", type=int, default=2, help="rounds of the table of stock by strategy"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Load, time, print."""
    arguments = parse(argv)
    record = {"arguments": vars(arguments), "machine": prepare(arguments)}
    single = arguments.device == "cpu" and arguments.dtype == "float32"
    record["sgemm_flops"] = sgemm_rate(arguments.threads) if single else None
    bench = load(arguments)
    stock = ("eager", "grouped_mm", "batched_mm")
    record["agreement"] = agreement(bench, arguments.strategies)
    record["scoring"] = scoring_table(bench, stock, arguments.rounds, record["sgemm_flops"])
    record["experts"] = experts_table(bench, arguments.strategies, arguments.rounds)
    record["stock"] = stock_table(bench, arguments.strategies, stock, arguments.stock_rounds)
    record["line"] = line(record["experts"])
    show(record, arguments.json)


if __name__ == "__main__":
    main()
