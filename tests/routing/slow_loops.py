"""Transparent per-token versions of everything that is vectorised, and simulated samples."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from moe_routing.routing import procedures
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.levels import p_to_e
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.strategies import Strategy
from moe_routing.routing.toggles import Toggles
from moe_routing.routing.types import RouterInputs
from moe_routing.vocabulary import OwnWeighting

HIDDEN = 32
hc_critical = functools.cache(procedures.hc_critical)


def simulated_sample(experts: int, tokens: int, rng: np.random.Generator) -> CalibrationSample:
    """Two layers of logits; an eighth of each token's experts, at random, has signal."""
    logits = rng.standard_normal((2, tokens, experts), np.float32)
    top_k = max(1, experts // 8)
    logits[..., :top_k] += 3
    return sample_of(rng.permuted(logits, axis=-1), top_k=top_k, rng=rng)


def sample_of(
    logits_LTE: np.ndarray, top_k: int = 8, rng: np.random.Generator | None = None
) -> CalibrationSample:
    layers, tokens, experts = logits_LTE.shape
    rng = rng or np.random.default_rng(0)
    return CalibrationSample(
        torch.from_numpy(logits_LTE.astype(np.float32)),
        torch.from_numpy(rng.standard_normal(logits_LTE.shape).astype(np.float32)),
        torch.full((layers, tokens), math.sqrt(HIDDEN)),
        torch.full((layers, tokens), math.sqrt(HIDDEN)),
        torch.ones(layers, experts),
        hidden_size=HIDDEN,
        rule=ModelRule(top_k, "softmax"),
        fingerprint="simulated",
    )


def router_inputs(logits_TE: torch.Tensor, layer: int = 0) -> RouterInputs:
    """Logits with made-up router vectors and inputs, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    tokens, experts = logits_TE.shape
    hidden_TH = torch.randn(tokens, HIDDEN, generator=generator)
    return RouterInputs(
        layer, logits_TE, hidden_TH, torch.randn(experts, HIDDEN, generator=generator)
    )


def ordered(experts: int, *keys: list[float]) -> list[int]:
    """Experts by the first key downwards, ties by the next, at last by the lower index."""
    return sorted(range(experts), key=lambda e: (*(-key[e] for key in keys), e))


def count_bh(p: list[float], alpha: float) -> int:
    m = len(p)
    return max((i for i in range(1, m + 1) if p[i - 1] <= i / m * alpha), default=0)


def count_by(p: list[float], alpha: float) -> int:
    m, harmonic = len(p), sum(1 / j for j in range(1, len(p) + 1))
    return max((i for i in range(1, m + 1) if p[i - 1] <= i / m * alpha / harmonic), default=0)


def count_ebh(p: list[float], alpha: float) -> int:
    m = len(p)
    e = [float(p_to_e(math.log(value))) if value < 1 else 0.5 for value in p]
    return max((i for i in range(1, m + 1) if i * e[i - 1] >= m / alpha), default=0)


def count_threshold(p: list[float], alpha: float) -> int:
    return sum(value <= alpha for value in p)


def count_storey(p: list[float], alpha: float) -> int:
    m = len(p)
    proportion = (sum(value > 0.5 for value in p) + 1) / (0.5 * m)
    hits = [
        i for i in range(1, m + 1) if p[i - 1] <= 0.5 and proportion * p[i - 1] <= i * alpha / m
    ]
    return max(hits, default=0)


def count_hc(p: list[float], alpha: float) -> int:
    m = len(p)
    score = {
        i: (i / m - p[i - 1]) / math.sqrt(i / m * (1 - i / m) / m) for i in range(1, m // 2 + 1)
    }
    if not score or max(score.values()) <= hc_critical(m, alpha):
        return 0
    return next(i for i in score if score[i] == max(score.values()))


PROCEDURES = {
    "bh": count_bh,
    "by": count_by,
    "ebh": count_ebh,
    "threshold": count_threshold,
    "storey": count_storey,
    "hc": count_hc,
}


def slow_selection(
    strategy: Strategy, calibration: Calibration, inputs: RouterInputs
) -> list[tuple[list[int], int]]:
    """Return for each token the selected experts in order, and the number before floor and cap."""
    probabilities = inputs.logits_TE.float().softmax(-1)
    if strategy.family.name in PROCEDURES:
        return _tested(strategy, calibration, inputs)
    count = RIVALS[strategy.family.name](strategy, calibration, inputs.layer)
    chosen = []
    for logits, probability in zip(
        inputs.logits_TE.float().tolist(), probabilities.tolist(), strict=True
    ):
        order = ordered(len(logits), logits)
        unmasked = [e for e in order if logits[e] > -math.inf]
        rejected = count([probability[e] for e in order], len(unmasked))
        chosen.append((unmasked[: min(rejected, strategy.max_experts)], rejected))
    return chosen


def _tested(
    strategy: Strategy, calibration: Calibration, inputs: RouterInputs
) -> list[tuple[list[int], int]]:
    null = calibration.null(strategy.null)
    null = null.conditional() if strategy.conditional else null
    by_p = (-null.p_values(inputs)).tolist()
    statistics = null.statistic(inputs).tolist() if null.layer_monotone else by_p
    chosen = []
    for token, logits in enumerate(inputs.logits_TE.float().tolist()):
        order = ordered(len(logits), statistics[token], logits)
        rejected = PROCEDURES[strategy.family.name](
            [-by_p[token][e] for e in order], strategy.alpha
        )
        count = max(strategy.min_k, min(rejected, strategy.max_k))
        chosen.append(([e for e in order[:count] if logits[e] > -math.inf], rejected))
    return chosen


def _adaptive(strategy, calibration, layer):
    floor = (strategy.k + 1) // 2
    levels = torch.arange(1, strategy.k - floor + 1) / (strategy.k - floor + 1)
    thresholds = calibration.confidence_quantiles(levels)[layer].tolist()
    return lambda p, unmasked: min(strategy.k - sum(p[0] > t for t in thresholds), unmasked)


def _minp(strategy, calibration, layer):
    return lambda p, unmasked: max(1, sum(value > strategy.ratio * p[0] for value in p))


def _topp(strategy, calibration, layer):
    def count(p: list[float], unmasked: int) -> int:
        total, kept = 0.0, 0
        for value in p:
            if kept and (total >= strategy.mass or value == 0):
                break
            total, kept = total + value, kept + 1
        return kept

    return count


def _entropy(strategy, calibration, layer):
    def entropy(p: np.ndarray) -> np.ndarray:
        return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)

    floor = (strategy.max_k + 1) // 2
    bands = strategy.max_k - floor
    on_calibration = entropy(calibration.sample.logits_LTE[layer].softmax(-1).double().numpy())
    thresholds = np.quantile(on_calibration, np.arange(1, bands + 1) / (bands + 1))

    def count(p: list[float], unmasked: int) -> int:
        # A token at a threshold to the last digit would be a matter of rounding.
        return min(floor + int((entropy(np.array(p)) > thresholds + 1e-6).sum()), unmasked)

    return count


def _perlayer(strategy, calibration, layer):
    sample = calibration.sample
    mass = sample.logits_LTE.softmax(-1).sort(-1, descending=True).values.mean(1).tolist()
    counts = [1] * sample.num_layers
    cap = min(2 * strategy.mean_k, sample.num_experts)
    while sum(counts) < strategy.mean_k * sample.num_layers:
        open_layers = [n for n, k in enumerate(counts) if k < cap]
        best = max(open_layers, key=lambda n: (mass[n][counts[n]], -n))
        counts[best] += 1
    return lambda p, unmasked: min(counts[layer], unmasked)


def _dynskip(strategy, calibration, layer):
    ratios = []
    for logits in calibration.sample.logits_LTE[layer].tolist():
        top = sorted(logits, reverse=True)[: strategy.max_k]
        ratios += [math.exp(value - top[0]) for value in top[1:]]
    beta = float(np.quantile(ratios, strategy.proportion))
    return lambda p, unmasked: min(sum(v >= beta * p[0] for v in p[: strategy.max_k]), unmasked)


def _absolute(strategy, calibration, layer):
    return lambda p, unmasked: sum(value >= strategy.threshold for value in p[:unmasked])


RIVALS = {
    "absolute": _absolute,
    "adaptive": _adaptive,
    "minp": _minp,
    "topp": _topp,
    "entropy": _entropy,
    "perlayer": _perlayer,
    "dynskip": _dynskip,
}


STRATA = ((0, 8, 8), (8, 16, 4), (16, 32, 4), (32, 64, 4))
"""First rank, rank after the last, and how many are toggled: weights are powers of two."""
THIRDS = ((0, 8, 8), (8, 16, 3), (16, 32, 3), (32, 64, 2))
"""The same with weights of which sums are rounded."""


def simulated_toggles(
    logits_LTE: np.ndarray,
    kl_LTE: np.ndarray,
    rng: np.random.Generator,
    *,
    per_document: int = 2,
    strata: tuple[tuple[int, int, int], ...] = STRATA,
    weighting: OwnWeighting = "softmax",
) -> Toggles:
    """Toggle the model's own 8 experts of every token, and a sample of lower ranks in strata."""
    probability_LTE = torch.from_numpy(logits_LTE).float().softmax(-1)
    layers, tokens, experts = logits_LTE.shape
    order_LTE = np.argsort(-probability_LTE.numpy(), axis=-1, kind="stable")
    rank_weight_E, toggled_LTE = np.ones(experts), np.zeros(logits_LTE.shape, dtype=bool)
    for first, last, number in strata:
        width = min(last, experts) - first
        if width > 0:
            rank_weight_E[first:last] = max(width / number, 1)
            place_LTN = rng.random((layers, tokens, width)).argsort(-1).argsort(-1)
            toggled_LTE[..., first:last] = place_LTN < number
    layer_P, token_P, rank_P = map(torch.from_numpy, toggled_LTE.nonzero())
    expert_P = torch.from_numpy(order_LTE)[layer_P, token_P, rank_P]
    kl_P = torch.from_numpy(kl_LTE).double()[layer_P, token_P, expert_P]
    loss_change_P = kl_P * torch.from_numpy(rng.choice([-1.0, 1.0], kl_P.shape))
    weight_E = torch.from_numpy(rank_weight_E)
    return Toggles(
        document_P=token_P // per_document,
        position_P=token_P % per_document,
        layer_P=layer_P,
        expert_P=expert_P,
        rank_P=rank_P,
        logits_LTE=torch.from_numpy(logits_LTE).float(),
        hidden_LTH=torch.zeros(layers, tokens, 1),
        norm_LTE=torch.ones_like(probability_LTE),
        deviation_LTE=torch.ones_like(probability_LTE),
        kl_P=kl_P,
        loss_change_P=loss_change_P,
        compensated_kl_P=kl_P.clone(),
        compensated_loss_change_P=loss_change_P.clone(),
        sampling_weight_P=weight_E[rank_P],
        rank_weight_E=weight_E,
        noise_L=torch.zeros(layers, dtype=torch.float64),
        rule=ModelRule(8, weighting),
        fingerprint="all weights",
    )


def simulated_outputs(sample: CalibrationSample, rng: np.random.Generator) -> ExpertOutputs:
    """Made-up outputs of experts: small slopes, so that norms differ by a factor of about two."""
    layers, tokens, experts = sample.logits_LTE.shape

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.from_numpy(rng.standard_normal(shape, np.float32))

    return ExpertOutputs(
        mean_LEH=normal(layers, experts, HIDDEN),
        log_mean_norm_LE=normal(layers, experts),
        log_mean_deviation_LE=normal(layers, experts),
        slope_LEH=normal(layers, experts, HIDDEN, scale=0.1),
        offset_LE=normal(layers, experts),
        deviation_slope_LEH=normal(layers, experts, HIDDEN, scale=0.1),
        deviation_offset_LE=normal(layers, experts),
        r2_L=torch.ones(layers, dtype=torch.float64),
        deviation_r2_L=torch.ones(layers, dtype=torch.float64),
        explained_L=torch.ones(layers, dtype=torch.float64),
        sample_log_norm_LTE=normal(layers, tokens, experts),
        sample_log_deviation_LTE=normal(layers, tokens, experts),
        rule=sample.rule,
        fingerprint="all weights",
    )


def even_outputs(toggles: Toggles) -> ExpertOutputs:
    """Return outputs of the toggled tokens' experts that are all alike: 0 on average, of norm 1."""
    zeros_LTE = torch.zeros_like(toggles.weight_LTE)
    zeros_LE, zeros_L = zeros_LTE[:, 0], torch.zeros_like(toggles.noise_L)
    zeros_LEH = zeros_LE[..., None]
    own = {"L": zeros_L, "LE": zeros_LE, "LEH": zeros_LEH, "LTE": zeros_LTE}
    tensors = {name: own[name.rsplit("_", 1)[1]].clone() for name in ExpertOutputs.TENSORS}
    return ExpertOutputs(**tensors, rule=toggles.rule, fingerprint=toggles.fingerprint)
