"""Time the routing of one layer against the stock router's softmax and top-k.

Prints a Markdown table: median milliseconds of the stock router at the same cap, of ours (softmax,
select and weigh), and the median ratio over alternating pairs of runs. On the CPU, numpy sorts on
one thread whatever ``--threads`` says, while torch's top-k uses them all.

    python benchmarks/selection.py --tokens 8192 --experts 64 --cap 16
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import NULLS
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.strategies import Router, parse_strategy
from moe_routing.routing.types import RouterInputs

HIDDEN = 128
CALIBRATION_TOKENS = 8192


def simulated_sample(tokens: int, experts: int, rng: np.random.Generator) -> CalibrationSample:
    """Return normal logits with a larger first eighth, one layer."""
    logits_LTE = rng.standard_normal((1, tokens, experts), np.float32)
    native_k = max(1, experts // 8)
    logits_LTE[..., :native_k] += 2
    return CalibrationSample(
        torch.from_numpy(rng.permuted(logits_LTE, axis=-1)),
        torch.from_numpy(rng.standard_normal((1, tokens, experts), np.float32)),
        torch.full((1, tokens), HIDDEN**0.5),
        torch.ones(1, experts),
        hidden_size=HIDDEN,
        native_k=native_k,
        fingerprint="simulated",
    )


def stock(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return what the stock router computes after its linear layer."""
    return logits_TE.softmax(-1, dtype=torch.float32).topk(k, dim=-1)


def milliseconds(run: Callable[[], object], synchronise: Callable[[], None]) -> float:
    """Time one run."""
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return 1e3 * (time.perf_counter() - start)


def compare(
    baseline: Callable[[], object],
    ours: Callable[[], object],
    pairs: int,
    synchronise: Callable[[], None],
) -> tuple[float, float, float]:
    """Return median times of both and the median ratio; runs alternate and swap order."""
    for run in (baseline, ours):
        run()
    times = []
    for pair in range(pairs):
        if pair % 2:
            second = milliseconds(ours, synchronise)
            times.append((milliseconds(baseline, synchronise), second))
        else:
            first = milliseconds(baseline, synchronise)
            times.append((first, milliseconds(ours, synchronise)))
    ratio = statistics.median(b / a for a, b in times)
    return (*(statistics.median(column) for column in zip(*times, strict=True)), ratio)


def main(argv: list[str] | None = None) -> None:
    """Parse arguments, time, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--cap", type=int, default=16, help="most experts a token")
    parser.add_argument("--alpha", default="005", help="level as in ids: 005 is 0.05")
    parser.add_argument("--pairs", type=int, default=31, help="alternating pairs of runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(arguments.seed)
    sample = simulated_sample(CALIBRATION_TOKENS, arguments.experts, rng)
    calibration = Calibration(sample, {name: null.fit(sample) for name, null in NULLS.items()})
    logits_TE = simulated_sample(arguments.tokens, arguments.experts, rng).logits_LTE[0]
    logits_TE = logits_TE.to(arguments.device, getattr(torch, arguments.dtype))
    inputs = RouterInputs(
        0,
        logits_TE,
        torch.ones(arguments.tokens, HIDDEN, device=arguments.device),
        torch.ones(arguments.experts, HIDDEN, device=arguments.device),
    )
    synchronise = torch.cuda.synchronize if logits_TE.is_cuda else lambda: None

    cap, level = arguments.cap, f"k{arguments.cap}_a{arguments.alpha}"
    ids = [f"regular_k{cap}"]
    ids += [f"bh_{level}_{null.replace('_', '-')}" for null in NULLS]
    ids += [f"{family}_{level}_pooled" for family in ("by", "storey", "hc")]
    ids += [f"minp_k{cap}_t010", f"topp_k{cap}_p050", f"shuffle.bh_{level}"]
    print(f"| strategy | stock top-{cap}, ms | ours, ms | ratio |\n|---|---|---|---|")
    for strategy_id in ids:
        strategy = parse_strategy(strategy_id)
        select = strategy.selector(calibration, arguments.experts)
        router = Router(select, strategy.weighting_kind, sample.native_k)
        before, after, ratio = compare(
            lambda: stock(logits_TE, cap),
            lambda router=router: router(inputs),
            arguments.pairs,
            synchronise,
        )
        print(f"| {strategy.id} | {before:.2f} | {after:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
