"""Time the routing of one layer after another against the stock router's softmax and top-k.

Prints a Markdown table: what BH compares (the logit or another statistic with critical values, or
p-values), median milliseconds a layer of the stock router at the model's own k and of ours
(softmax, select and weigh), the median and quartiles of the ratio over alternating pairs of runs,
the ratio of the fastest runs, which other load on the machine disturbs least, and the median ratio
of selection alone to ``torch.topk`` alone, both given the softmax. On the CPU times
are processor time, so that what else the machine does counts less; numpy sorts on one thread
whatever ``--threads`` says, while torch's top-k uses them all.

    python benchmarks/selection.py --layers 16 --tokens 8192 --experts 64 --cap 8
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import NULLS, Null
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.strategies import Router, Strategy, parse_strategy
from moe_routing.routing.strategies.testing import StepUp
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


def milliseconds(run: Callable[[], object], synchronise: Callable[[], None] | None) -> float:
    """Time one run: processor time, or wall-clock time where the work is on an accelerator."""
    if synchronise is None:
        start = time.process_time()
        run()
        return 1e3 * (time.process_time() - start)
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return 1e3 * (time.perf_counter() - start)


def compare(
    baseline: Callable[[int], object],
    ours: Callable[[int], object],
    layers: int,
    rounds: int,
    synchronise: Callable[[], None] | None,
) -> tuple[float, float, list[float], float]:
    """Return median times of both, quartiles of the ratio, and the ratio of the smallest times.

    Runs are short, one layer each, alternate, and swap order.
    """
    times = []
    for pair in range(-1, rounds * layers):
        both = [(0, functools.partial(baseline, pair % layers))]
        both.append((1, functools.partial(ours, pair % layers)))
        taken = {
            place: milliseconds(run, synchronise)
            for place, run in (both if pair % 2 else both[::-1])
        }
        times.append((taken[0], taken[1]))
    times = times[1:]  # the first pair warms up
    ratios = statistics.quantiles([after / before for before, after in times], n=4)
    before, after = zip(*times, strict=True)
    medians = statistics.median(before), statistics.median(after)
    return (*medians, ratios, min(after) / min(before))


def compared(strategy: Strategy, null: Null | None, inputs: RouterInputs) -> str:
    """Return what a procedure compares under a null."""
    if null is None:
        return ""
    if not (null.layer_monotone and isinstance(getattr(strategy, "base", strategy), StepUp)):
        return "p-value"
    return "logit" if torch.equal(null.statistic(inputs), inputs.logits_TE.float()) else "statistic"


def main(argv: list[str] | None = None) -> None:
    """Parse arguments, time, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--cap", type=int, default=8, help="most experts a token")
    parser.add_argument("--alpha", default="005", help="level as in ids: 005 is 0.05")
    parser.add_argument("--rounds", type=int, default=8, help="alternating pairs a layer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("strategies", nargs="*", help="ids; default: BH under every null, rivals")
    arguments = parser.parse_args(argv)

    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(arguments.seed)
    sample = simulated_sample(CALIBRATION_TOKENS, arguments.experts, rng)
    fitted = Calibration(sample, {name: null.fit(sample) for name, null in NULLS.items()})
    layers = [simulated_inputs(arguments, rng) for _ in range(arguments.layers)]
    synchronise = torch.cuda.synchronize if layers[0].logits_TE.is_cuda else None

    probabilities = [inputs.logits_TE.float().softmax(-1) for inputs in layers]
    k = sample.native_k
    print(
        f"| strategy | compares | stock top-{k}, ms | ours, ms | ratio | quartiles | fastest "
        "| alone |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for strategy_id in arguments.strategies or default_ids(arguments.cap, arguments.alpha):
        strategy = parse_strategy(strategy_id)
        select = strategy.selector(fitted, arguments.experts)
        router = Router(select, strategy.weighting_kind, k)
        null = strategy.needs_null and fitted.null(strategy.needs_null).to(arguments.device)
        before, after, (low, ratio, high), fastest = compare(
            lambda layer: stock(layers[layer].logits_TE, k),
            lambda layer, router=router: router(layers[layer]),
            len(layers),
            arguments.rounds,
            synchronise,
        )
        *_, (_, alone, _), _ = compare(
            lambda layer: probabilities[layer].topk(k, dim=-1),
            lambda layer, select=select: select(layers[layer], probabilities[layer]),
            len(layers),
            arguments.rounds,
            synchronise,
        )
        cells = [strategy.id, compared(strategy, null, layers[0]), f"{before:.2f}", f"{after:.2f}"]
        cells += [f"{ratio:.2f}", f"{low:.2f} to {high:.2f}", f"{fastest:.2f}", f"{alone:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def simulated_inputs(arguments: argparse.Namespace, rng: np.random.Generator) -> RouterInputs:
    """Return fresh logits of the calibration's law; every layer shares its nulls."""
    logits_TE = simulated_sample(arguments.tokens, arguments.experts, rng).logits_LTE[0]
    return RouterInputs(
        0,
        logits_TE.to(arguments.device, getattr(torch, arguments.dtype)),
        torch.ones(arguments.tokens, HIDDEN, device=arguments.device),
        torch.ones(arguments.experts, HIDDEN, device=arguments.device),
    )


def default_ids(cap: int, alpha: str) -> list[str]:
    """Return BH under every null, other procedures, rivals and a control."""
    level = f"k{cap}_a{alpha}"
    ids = [f"regular_k{cap}"]
    ids += [f"bh_{level}_{null.replace('_', '-')}" for null in NULLS]
    ids += [f"{family}_{level}_pooled" for family in ("by", "storey", "hc")]
    return [*ids, f"minp_k{cap}_t010", f"topp_k{cap}_p050", f"shuffle.bh_{level}"]


if __name__ == "__main__":
    main()
