"""A recommendation that is computed from the results, or none.

Shape letters: N items, C clusters, S arms, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_routing.statistics.bootstrap import RatioBootstrap, bootstrap_items
from moe_routing.statistics.matched import Bracket, bracket, chords_beside, interpolate
from moe_routing.wording import percent

Array = NDArray[np.float64]

RULE = (
    "Differences are nats per token against the baseline on the same documents, with simultaneous "
    "intervals over all arms (bootstrap of documents, maximal |t|). For efficiency: of the arms "
    "with fewer experts than the baseline whose upper limit is below the margin, the one with the "
    "fewest experts. For quality: of the arms whose upper limit is below 0, the one with the "
    "lowest loss. An adaptive arm is compared with static routing at its own mean experts, which "
    "mostly lie between two measured k. It loses if the lower limit of its difference from the "
    "straight line between them is above 0. That line lies above any curve that is convex in k, "
    "which favours the arm; so it beats static routing only if the upper limit of its difference "
    "from the least that a convex curve through the measured points can be there is below 0. An "
    "arm below the line but not below that bound is listed separately; it shows nothing. Where no "
    "arm qualifies, no recommendation is supported."
)


@dataclass(frozen=True)
class Arm:
    """A strategy that may be recommended.

    Attributes:
        strategy: its id.
        mean_experts: experts per token and layer.
        static_k: its k if it gives every token the same number, else None.
    """

    strategy: str
    mean_experts: float
    static_k: int | None


@dataclass(frozen=True)
class Difference:
    """A difference in nats per token, with its simultaneous interval."""

    value: float
    low: float
    high: float


def recommend(
    nats_NS: Array,
    tokens_N: NDArray,
    clusters_N: NDArray,
    arms: Sequence[Arm],
    baseline: str,
    *,
    margin: float,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> dict[str, object]:
    """Apply :data:`RULE`.

    Args:
        nats_NS: negative log-likelihood of each item under each arm, (items, arms).
        tokens_N: tokens of each item.
        clusters_N: document of each item.
        arms: the arms, the baseline among them.
        baseline: id of the arm that the others are compared with.
        margin: loss that counts as none, nats per token.
        confidence: level of the simultaneous intervals.
        resamples: bootstrap resamples.
        rng: source of randomness.

    Returns:
        ``rule``, the settings, ``differences`` by arm, ``efficiency`` and ``quality`` (an arm with
        its numbers, or None), ``beats_static_curve``, ``beats_line_only`` and
        ``loses_to_static_curve`` (arms), ``against_static_curve`` (the straight line) and
        ``against_convex_bound`` by arm, and ``statement``.
    """
    names = [arm.strategy for arm in arms]
    base = arms[names.index(baseline)]
    intervals = partial(
        simultaneous, tokens_N=tokens_N, clusters_N=clusters_N, confidence=confidence,
        resamples=resamples, rng=rng,
    )  # fmt: skip
    others = [index for index, arm in enumerate(arms) if arm is not base]
    found = intervals(nats_NS[:, others] - nats_NS[:, [names.index(baseline)]])
    differences = dict(zip([names[index] for index in others], found, strict=True))
    matched, bounded = _against_static(nats_NS, arms, intervals)
    by_name = dict(zip(names, arms, strict=True))
    efficiency, quality = (
        _described(by_name.get(name), differences, matched)
        for name in (_fewest(arms, differences, base, margin), _best(differences))
    )
    beats = [name for name, gap in bounded.items() if gap.high < 0]
    below_line = [name for name, gap in matched.items() if gap.high < 0]
    return {
        "rule": RULE,
        "baseline": asdict(base),
        "margin_nats": margin,
        "confidence": confidence,
        "n_documents": np.unique(clusters_N).size,
        "n_tokens": int(tokens_N.sum()),
        "efficiency": efficiency,
        "quality": quality,
        "beats_static_curve": beats,
        "beats_line_only": [name for name in below_line if name not in beats],
        "loses_to_static_curve": [name for name, gap in matched.items() if gap.low > 0],
        "differences": {name: asdict(value) for name, value in differences.items()},
        "against_static_curve": {name: asdict(value) for name, value in matched.items()},
        "against_convex_bound": {name: asdict(value) for name, value in bounded.items()},
        "statement": _statement(efficiency, quality, baseline, margin, confidence),
    }


def simultaneous(
    difference_NS: Array,
    tokens_N: NDArray,
    clusters_N: NDArray,
    *,
    confidence: float,
    resamples: int,
    rng: np.random.Generator,
) -> list[Difference]:
    """Return differences per token with intervals that hold for all arms at once.

    R_s -/+ q * se_s with q the quantile of max_s |R*_s - R_s| / se*_s over resampled documents
    (Efron & Tibshirani 1993, chapter 12.5, made simultaneous as by Westfall & Young 1993). An arm
    without any difference has the interval 0 to 0.
    """
    if difference_NS.shape[1] == 0:
        return []
    boot = bootstrap_items(difference_NS, tokens_N, clusters_N, resamples=resamples, rng=rng)
    reach_S = _max_t(boot, confidence) * boot.error_S
    limits = zip(boot.ratio_S, boot.ratio_S - reach_S, boot.ratio_S + reach_S, strict=True)
    return [Difference(*(float(value) for value in row)) for row in limits]


def _max_t(boot: RatioBootstrap, confidence: float) -> float:
    varies_S = boot.error_S > 0
    safe_BS = np.where(boot.error_BS > 0, boot.error_BS, np.inf)
    t_BS = np.abs(boot.ratio_BS - boot.ratio_S) / safe_BS
    return float(np.quantile((t_BS * varies_S).max(1), confidence))


def _against_static(
    nats_NS: Array, arms: Sequence[Arm], intervals: Callable[[Array], list[Difference]]
) -> tuple[dict[str, Difference], dict[str, Difference]]:
    """Return each adaptive arm's differences from static routing at its own mean experts.

    The first are from the straight line between the measured k on either side, the second from the
    lowest value of a convex curve there; see :func:`convex_bound`. The intervals are simultaneous.
    """
    static = {index: arm.static_k for index, arm in enumerate(arms) if arm.static_k is not None}
    curve = sorted(static, key=static.__getitem__)
    ks = [static[index] for index in curve]
    lines, bounds = {}, {}
    for index, arm in enumerate(arms):
        at = bracket(arm.mean_experts, ks) if arm.static_k is None and ks else None
        if at is None:
            continue
        lines[arm.strategy] = nats_NS[:, index] - interpolate(nats_NS[:, curve], at)
        least_N = convex_bound(nats_NS[:, curve], ks, at)
        if least_N is not None:
            bounds[arm.strategy] = nats_NS[:, index] - least_N
    if not lines:
        return {}, {}
    gap_NS = np.stack([*lines.values(), *bounds.values()], axis=1)
    found = intervals(gap_NS)
    return (
        dict(zip(lines, found, strict=False)),
        dict(zip(bounds, found[len(lines) :], strict=True)),
    )


def convex_bound(value_NK: Array, ks: Sequence[int], at: Bracket) -> Array | None:
    """Return the lowest values of a convex curve through measured points, (N,).

    Between two points such a curve is not below the line through the two points before them, nor
    below that through the two after them. Of these lines the one with the higher sum is taken, item
    by item. If the points are not convex, it may be above the straight line between the two; then
    that line is taken. On a measured point the result is the point.

    Args:
        value_NK: nats of each item at each k, (items, ks).
        ks: the measured k, ascending.
        at: where between them.

    Returns:
        None between two points without neighbours.

    >>> curve_NK = np.array([[8.0, 4.0, 2.0, 1.0]])
    >>> convex_bound(curve_NK, [1, 2, 3, 4], Bracket(1, 2, 0.5))
    array([2.5])
    """
    line_N = interpolate(value_NK, at)
    if at.low == at.high:
        return line_N
    beside = chords_beside(value_NK, ks, at)
    if not beside:
        return None
    return min(max(beside, key=np.sum), line_N, key=np.sum)


def _fewest(
    arms: Sequence[Arm], differences: dict[str, Difference], baseline: Arm, margin: float
) -> str:
    """Return the arm for efficiency by :data:`RULE`; an empty string without one."""
    good = [
        arm
        for arm in arms
        if arm.strategy in differences
        and arm.mean_experts < baseline.mean_experts
        and differences[arm.strategy].high < margin
    ]
    return min(good, key=lambda arm: arm.mean_experts).strategy if good else ""


def _best(differences: dict[str, Difference]) -> str:
    """Return the arm for quality by :data:`RULE`; an empty string without one."""
    better = [name for name, difference in differences.items() if difference.high < 0]
    return min(better, key=lambda name: differences[name].value, default="")


def _described(
    arm: Arm | None, differences: dict[str, Difference], matched: dict[str, Difference]
) -> dict[str, Any] | None:
    if arm is None:
        return None
    gap = matched.get(arm.strategy)
    return {
        **asdict(arm),
        "difference_nats": asdict(differences[arm.strategy]),
        "against_static_curve": asdict(gap) if gap else None,
    }


def _statement(
    efficiency: dict[str, Any] | None,
    quality: dict[str, Any] | None,
    baseline: str,
    margin: float,
    confidence: float,
) -> str:
    def numbers(arm: dict[str, Any]) -> str:
        gap = Difference(**arm["difference_nats"])
        return (
            f"`{arm['strategy']}`, {arm['mean_experts']:.2f} experts per token, {gap.value:+.3f} "
            f"nats per token against `{baseline}` (simultaneous {percent(confidence, 0)} interval "
            f"{gap.low:+.3f} to {gap.high:+.3f})"
        )

    first = (
        f"For efficiency: {numbers(efficiency)}; the margin is {margin:g}."
        if efficiency
        else f"No setting with fewer experts than `{baseline}` was shown to lose less than "
        f"{margin:g} nats per token."
    )
    second = (
        f"For quality: {numbers(quality)}."
        if quality
        else f"No setting was shown to beat `{baseline}`."
    )
    return f"{first} {second}"
