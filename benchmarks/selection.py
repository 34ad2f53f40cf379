"""Time the routing of one layer after another against the stock router's softmax and top-k.

Prints a Markdown table of operating points: a strategy's cap and alpha, how many experts it selects
on average, and what it compares (the logit or another statistic with critical values, or p-values).
Then median milliseconds per layer of the stock router at the model's own k and of ours (softmax,
select and weigh); the median and quartiles of the ratio over interleaved pairs of runs, and the
ratio of the fastest runs, which are the least affected by background load; the median ratio of
selection alone to ``torch.topk`` alone, both given the softmax. A strategy that selects more than
the model's own k cannot be as fast as that top-k: ``like k`` is the k nearest to its mean number of
experts, and ``like ratio`` the median ratio to the stock router with that k.

On the CPU times are processor time, which background load affects less; numpy sorts on one thread
whatever ``--threads`` is, while torch's top-k uses all of them.

    python benchmarks/selection.py --layers 16 --tokens 8192 --experts 64
    python benchmarks/selection.py --cap 8 --cap 64 --alpha 010 --json selection.json
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from measure import options, prepare, show
from torch import Tensor
from tqdm import tqdm

from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import NULLS, Null, fit_null
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.scores import ExpertScorer
from moe_routing.routing.strategies import Strategy, parse_strategy
from moe_routing.routing.strategies.testing import StepUp
from moe_routing.routing.toggles import Toggles
from moe_routing.routing.types import RouterInputs
from moe_routing.routing.weighting import Router

HIDDEN = 128
CALIBRATION_TOKENS = 8192
TOGGLED_TOKENS = 500
EPSILON = 3e-3
"""Of the null ``needed``: about 4 in 64 effects of :func:`simulated_toggles` are larger."""
CAPS = (8, 16, 64)


def simulated_sample(tokens: int, experts: int, rng: np.random.Generator) -> CalibrationSample:
    """Return normal logits with a larger first eighth, one layer."""
    logits_LTE = rng.standard_normal((1, tokens, experts), np.float32)
    top_k = max(1, experts // 8)
    logits_LTE[..., :top_k] += 2
    return CalibrationSample(
        torch.from_numpy(rng.permuted(logits_LTE, axis=-1)),
        torch.from_numpy(rng.standard_normal((1, tokens, experts), np.float32)),
        torch.full((1, tokens), HIDDEN**0.5),
        torch.full((1, tokens), HIDDEN**0.5),
        torch.ones(1, experts),
        hidden_size=HIDDEN,
        rule=ModelRule(top_k, "softmax"),
        fingerprint="simulated",
    )


def simulated_toggles(sample: CalibrationSample, tokens: int) -> Toggles:
    """Toggle every expert of the first tokens, with an effect that is the squared probability."""
    probability_TE = sample.logits_LTE[0, :tokens].softmax(-1)
    sorted_TE, expert_TE = probability_TE.sort(dim=1, descending=True)
    token_P = torch.arange(tokens).repeat_interleave(sample.num_experts)
    nothing_P, effect_P = torch.zeros_like(token_P), sorted_TE.flatten().double() ** 2
    return Toggles(
        document_P=token_P,
        position_P=nothing_P,
        layer_P=nothing_P,
        expert_P=expert_TE.flatten(),
        rank_P=torch.arange(sample.num_experts).repeat(tokens),
        logits_LTE=sample.logits_LTE[:, :tokens],
        hidden_LTH=torch.zeros(1, tokens, 1),
        norm_LTE=torch.ones_like(probability_TE)[None],
        deviation_LTE=torch.ones_like(probability_TE)[None],
        kl_P=effect_P,
        loss_change_P=effect_P,
        compensated_kl_P=effect_P,
        compensated_loss_change_P=effect_P,
        sampling_weight_P=torch.ones_like(effect_P),
        rank_weight_E=torch.ones(sample.num_experts, dtype=torch.float64),
        noise_L=torch.zeros(1, dtype=torch.float64),
        rule=sample.rule,
        fingerprint=sample.fingerprint,
    )


def simulated_outputs(sample: CalibrationSample, rng: np.random.Generator) -> ExpertOutputs:
    """Return outputs of experts whose norms depend on the router's input; their time is real."""
    experts, nothing_L = sample.num_experts, torch.zeros(1, dtype=torch.float64)
    normal_LEH = torch.from_numpy(rng.standard_normal((1, experts, HIDDEN), np.float32))
    normal_LE = normal_LEH[:, :, 0].clone()
    return ExpertOutputs(
        mean_LEH=normal_LEH,
        log_mean_norm_LE=normal_LE,
        log_mean_deviation_LE=normal_LE,
        slope_LEH=normal_LEH / HIDDEN,
        offset_LE=normal_LE,
        deviation_slope_LEH=normal_LEH / HIDDEN,
        deviation_offset_LE=normal_LE,
        r2_L=nothing_L,
        deviation_r2_L=nothing_L,
        explained_L=nothing_L,
        sample_log_norm_LTE=torch.zeros_like(sample.logits_LTE),
        sample_log_deviation_LTE=torch.zeros_like(sample.logits_LTE),
        rule=sample.rule,
        fingerprint=sample.fingerprint,
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

    Runs are short, one layer each, and interleaved; the order of a pair alternates.
    """
    times = []
    for pair in range(-1, rounds * layers):
        both = [(0, functools.partial(baseline, pair % layers))]
        both.append((1, functools.partial(ours, pair % layers)))
        taken = {
            side: milliseconds(run, synchronise) for side, run in (both if pair % 2 else both[::-1])
        }
        times.append((taken[0], taken[1]))
    times = times[1:]  # the first pair warms up
    ratios = statistics.quantiles([after / before for before, after in times], n=4)
    before, after = zip(*times, strict=True)
    medians = statistics.median(before), statistics.median(after)
    return (*medians, ratios, min(after) / min(before))


def compared(strategy: Strategy, null: Null | None, inputs: RouterInputs) -> str:
    """Return what a procedure compares under a null: logits, statistics or p-values."""
    if null is None:
        return ""
    if not (null.layer_monotone and isinstance(getattr(strategy, "base", strategy), StepUp)):
        return "p-value"
    return "logit" if torch.equal(null.statistic(inputs), inputs.logits_TE.float()) else "statistic"


@dataclass(frozen=True)
class Bench:
    """Fitted nulls, and the inputs and softmax of each layer."""

    calibration: Calibration
    layers: list[RouterInputs]
    probabilities: list[Tensor]
    rounds: int

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Bench:
        """Simulate and fit."""
        rng = np.random.default_rng(arguments.seed)
        sample = simulated_sample(CALIBRATION_TOKENS, arguments.experts, rng)
        nulls = {name: null.fit(sample) for name, null in NULLS.items()}
        toggles = simulated_toggles(sample, TOGGLED_TOKENS)
        nulls["needed"] = fit_null("needed", sample, toggles, EPSILON)
        layers = [simulated_inputs(arguments, rng) for _ in range(arguments.layers)]
        softmax = [inputs.logits_TE.float().softmax(-1) for inputs in layers]
        calibration = Calibration(sample, nulls, toggles, simulated_outputs(sample, rng))
        return cls(calibration, layers, softmax, arguments.rounds)

    def compare(
        self, baseline: Callable[[int], object], ours: Callable[[int], object]
    ) -> tuple[float, float, list[float], float]:
        """Compare two functions of a layer; see :func:`compare`."""
        on_gpu = self.layers[0].logits_TE.is_cuda
        wait = torch.cuda.synchronize if on_gpu else None
        return compare(baseline, ours, len(self.layers), self.rounds, wait)

    def row(self, strategy: Strategy) -> dict[str, object]:
        """Time one strategy."""
        sample, layers = self.calibration.sample, self.layers
        base, k = getattr(strategy, "base", strategy), sample.top_k
        select = strategy.selector(self.calibration, sample.num_experts)
        scorer = ExpertScorer.of(strategy, self.calibration)
        router = Router(
            select, strategy.weighting_kind, sample.rule, scorer, strategy.dropped == "compensated"
        )
        device = layers[0].logits_TE.device
        null = strategy.needs_null and self.calibration.null(strategy.needs_null).to(device)
        mean = float(router(layers[0]).selection.count_T.double().mean())
        like = max(1, round(mean))

        def against(other: int) -> tuple[float, float, list[float], float]:
            return self.compare(
                lambda layer: stock(layers[layer].logits_TE, other),
                lambda layer: router(layers[layer]),
            )

        before, after, (low, ratio, high), fastest = against(k)
        *_, (_, alone, _), _ = self.compare(
            lambda layer: self.probabilities[layer].topk(k, dim=-1),
            lambda layer: select(layers[layer], self.probabilities[layer]),
        )
        return {
            "strategy": strategy.id,
            "compares": compared(strategy, null, layers[0]),
            "cap": strategy.max_experts,
            "alpha": getattr(base, "alpha", None),
            "mean experts": mean,
            f"stock top-{k}, ms": before,
            "ours, ms": after,
            "ratio": ratio,
            "quartiles": f"{low:.2f} to {high:.2f}",
            "fastest": fastest,
            "alone": alone,
            "like k": like,
            "like ratio": ratio if like == k else against(like)[2][1],
        }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options(parser, rounds=8)
    parser.set_defaults(threads=1)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument(
        "--cap",
        type=int,
        action="append",
        help=f"most experts per token, repeatable (default: {', '.join(map(str, CAPS))}); rivals "
        "and nulls that need p-values are timed at the first only",
    )
    parser.add_argument("--alpha", default="005", help="level as in ids: 005 is 0.05")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("strategies", nargs="*", help="ids; default: BH under every null, rivals")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Parse arguments, time, print."""
    arguments = parse(argv)
    record = {"arguments": vars(arguments), "machine": prepare(arguments)}
    bench = Bench.of(arguments)
    ids = arguments.strategies or default_ids(arguments.cap or CAPS, arguments.alpha)
    bar = tqdm(ids, desc="selection", unit="strategy")
    record["selection"] = [bench.row(parse_strategy(name)) for name in bar]
    show(record, arguments.json)


def simulated_inputs(arguments: argparse.Namespace, rng: np.random.Generator) -> RouterInputs:
    """Return new logits from the distribution of the calibration sample."""
    logits_TE = simulated_sample(arguments.tokens, arguments.experts, rng).logits_LTE[0]
    return RouterInputs(
        0,
        logits_TE.to(arguments.device, getattr(torch, arguments.dtype)),
        torch.ones(arguments.tokens, HIDDEN, device=arguments.device),
        torch.from_numpy(rng.standard_normal((arguments.experts, HIDDEN), np.float32)).to(
            arguments.device
        ),
    )


def default_ids(caps: Sequence[int], alpha: str) -> list[str]:
    """Return static k by scores, BH under every null, procedures, rivals, a control at one cap.

    At the other caps, BH under the layer-monotone nulls, which need no p-values.
    """
    first, *others = caps
    words = ("", "_norm", "_consequence", "_compensated", "_norm_compensated")
    ids = [f"regular_k{first}{word}" for word in words]
    ids += bh_ids(first, alpha, ["needed", *NULLS])
    ids += [f"{family}_k{first}_a{alpha}_pooled" for family in ("by", "storey", "hc")]
    ids += [f"minp_k{first}_t010", f"topp_k{first}_p050", f"shuffle.bh_k{first}_a{alpha}"]
    monotone = [name for name, null in NULLS.items() if null.layer_monotone]
    for cap in others:
        ids += [f"regular_k{cap}", *bh_ids(cap, alpha, ["needed", *monotone])]
    return ids


def bh_ids(cap: int, alpha: str, nulls: Sequence[str]) -> list[str]:
    """Return the ids of BH under nulls."""
    return [f"bh_k{cap}_a{alpha}_{null.replace('_', '-')}" for null in nulls]


if __name__ == "__main__":
    main()
