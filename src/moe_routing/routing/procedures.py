"""Multiple-testing procedures: how many hypotheses are rejected for each token.

Every procedure takes each token's p-values in ascending order and returns the number of rejections;
the hypotheses with the smallest p-values are the rejected ones. A step-up procedure is defined by a
vector of levels. All comparisons are made in float64, which represents float32 p-values exactly.

Shape letters: T tokens, E experts, N ranks, B bytes; 1 a kept axis.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor

from moe_routing.routing import levels

STOREY_LAMBDA = 0.5
"""p-values above this estimate the proportion of true nulls."""


def bh_levels(experts: int, alpha: float) -> Tensor:
    """Return :func:`levels.bh_levels` as a tensor."""
    return torch.from_numpy(levels.bh_levels(experts, alpha))


def by_levels(experts: int, alpha: float) -> Tensor:
    """Return :func:`levels.by_levels` as a tensor."""
    return torch.from_numpy(levels.by_levels(experts, alpha))


def ebh_levels(experts: int, alpha: float) -> Tensor:
    """Return :func:`levels.ebh_levels` as a tensor."""
    return torch.from_numpy(levels.ebh_levels(experts, alpha))


def threshold_levels(experts: int, alpha: float) -> Tensor:
    """Return :func:`levels.threshold_levels` as a tensor."""
    return torch.from_numpy(levels.threshold_levels(experts, alpha))


def num_rejected(passes_TE: Tensor) -> Tensor:
    """Return the largest i (from 1) whose i-th column is true, 0 if none is; int64, (tokens,)."""
    if passes_TE.device.type != "cpu":
        return _num_rejected_on_device(passes_TE)
    # On the hot path. A row is packed into words of 64 bits; the answer is its bit length.
    bits_TB = np.packbits(np.ascontiguousarray(passes_TE.numpy()), axis=1, bitorder="little")
    if missing := -bits_TB.shape[1] % 8:
        bits_TB = np.pad(bits_TB, ((0, 0), (0, missing)))
    num_T = np.zeros(len(bits_TB), dtype=np.int64)
    for index, word_T in enumerate(bits_TB.view("<u8").T):
        # frexp gives the bit length. With the bit below the highest one cleared, rounding to
        # float64 cannot carry into the next power of two.
        length_T = np.frexp((word_T & ~(word_T >> np.uint64(1))).astype(np.float64))[1]
        num_T = np.where(length_T, length_T + 64 * index, num_T)
    return torch.from_numpy(num_T)


def num_rejected_at(statistic_TE: Tensor, critical_E: Tensor) -> Tensor:
    """Return ``num_rejected(statistic_TE >= critical_E)``, on the CPU in half the time."""
    if statistic_TE.device.type == "cpu":
        return num_rejected(torch.from_numpy(statistic_TE.numpy() >= critical_E.numpy()))
    return num_rejected(statistic_TE >= critical_E)


def _num_rejected_on_device(passes_TE: Tensor) -> Tensor:
    # int16 needs half the memory traffic of int32 and takes a third of the time.
    rank_E = torch.arange(1, passes_TE.shape[1] + 1, dtype=torch.int16, device=passes_TE.device)
    return (passes_TE * rank_E).amax(1).long()


def step_up(sorted_p_TE: Tensor, level_E: Tensor) -> Tensor:
    """Return the largest i with p_(i) <= level_i.

    Args:
        sorted_p_TE: p-values in ascending order, (tokens, experts).
        level_E: float64 levels, (experts,).
    """
    return num_rejected(sorted_p_TE.double() <= level_E)


def storey(sorted_p_TE: Tensor, alpha: float) -> Tensor:
    """Return rejections of the adaptive procedure of Storey, Taylor & Siegmund (2004, JRSS B 66).

    With W = #{p > lambda}, lambda = 1/2, the proportion of true nulls is estimated by
    pi0 = (W + 1) / ((1 - lambda) * E), not truncated at 1. Rejections: the largest i with
    p_(i) <= lambda and pi0 * p_(i) <= i * alpha / E. FDR at most alpha for independent p-values
    (their theorem 3); no guarantee under dependence.
    """
    p_TE = sorted_p_TE.double()
    experts = p_TE.shape[1]
    above_T1 = (p_TE > STOREY_LAMBDA).sum(1, keepdim=True)
    nulls_T1 = (above_T1 + 1) / (1 - STOREY_LAMBDA)
    rank_E = torch.arange(1, experts + 1, dtype=torch.float64, device=p_TE.device)
    return num_rejected((nulls_T1 * p_TE <= rank_E * alpha) & (p_TE <= STOREY_LAMBDA))


def higher_criticism(sorted_p_TE: Tensor, critical: float) -> Tensor:
    """Return the number of experts up to the Higher Criticism threshold, 0 without any signal.

    HC_i = sqrt(E) * (i/E - p_(i)) / sqrt(i/E * (1 - i/E)) for i <= E/2 (Donoho & Jin 2008, PNAS
    105). If the maximum exceeds its critical value (:func:`hc_critical`), the smallest i that
    attains it is returned, otherwise 0. A test for the presence of signal, and a good classifier of
    rare and weak effects; it does not control the false discovery rate.
    """
    experts = sorted_p_TE.shape[1]
    half = experts // 2
    if half == 0:
        return sorted_p_TE.new_zeros(sorted_p_TE.shape[0], dtype=torch.int64)
    rank_N = torch.arange(1, half + 1, device=sorted_p_TE.device)
    level_N = rank_N.double() / experts
    deviation_N = (level_N * (1 - level_N) / experts).sqrt()
    score_TN = (level_N - sorted_p_TE[:, :half].double()) / deviation_N
    largest_T1 = score_TN.amax(1, keepdim=True)
    first_T = torch.where(score_TN == largest_T1, rank_N, experts).amin(1)
    return torch.where(largest_T1[:, 0] > critical, first_T, 0)


def hc_critical(experts: int, alpha: float) -> float:
    """Return the exact level-alpha critical value of max HC_i over i <= E/2.

    For independent uniform p-values; see :func:`hc_size`.
    """
    from scipy.optimize import brentq

    if experts < 2:
        return math.inf
    # HC always exceeds -sqrt(E), and practically never 1000.
    low, high = -math.sqrt(experts), 1e3
    return cast("float", brentq(lambda critical: hc_size(experts, critical) - alpha, low, high))


def hc_size(experts: int, critical: float) -> float:
    """Return the exact P(max HC_i > critical) for independent uniform p-values.

    HC_i exceeds h exactly if p_(i) < b_i, that is, if at least i p-values are below b_i. The
    number of p-values below b_1 < b_2 < ... is a Markov chain with binomial steps (Noe 1972).
    """
    from scipy.stats import binom

    level_N = np.arange(1, experts // 2 + 1) / experts
    deviation_N = np.sqrt(level_N * (1 - level_N) / experts)
    bound_N = (level_N - critical * deviation_N).clip(max=1.0)
    before, after = np.mgrid[: experts + 1, : experts + 1]
    mass, reached = np.zeros(experts + 1), 0.0
    mass[0] = 1.0
    for rank, bound in enumerate(bound_N, start=1):
        if bound <= reached:
            continue
        step = (bound - reached) / (1 - reached)
        mass = mass @ binom.pmf(after - before, experts - before, step)
        mass[rank:] = 0.0
        reached = bound
    return float(1 - mass.sum())
