"""Multiple-testing procedures: how many of a token's experts pass.

Every procedure takes the p-values of each token sorted upwards and returns how many it rejects;
rejected are the experts with the smallest p-values. A step-up procedure is a vector of levels. All
comparisons are made in float64: float32 p-values are exact there, and so are the decisions.

Shape letters: T tokens, E experts.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

STOREY_LAMBDA = 0.5
"""p-values above this estimate the share of true nulls."""


def bh_levels(experts: int, alpha: float) -> Tensor:
    """Return i * alpha / E (Benjamini & Hochberg 1995), float64, (experts,).

    FDR = alpha * m0/E for independent p-values, at most that under PRDS (Benjamini & Yekutieli
    2001). Centred logits sum to zero, so that PRDS cannot be assumed for them.
    """
    return torch.arange(1, experts + 1, dtype=torch.float64) / experts * alpha


def by_levels(experts: int, alpha: float) -> Tensor:
    """Return i * alpha / (E * H_E), H_E = 1 + ... + 1/E (Benjamini & Yekutieli 2001, thm. 1.3).

    FDR at most alpha * m0/E under any dependence.
    """
    harmonic = (1 / np.arange(1, experts + 1)).sum()
    return torch.arange(1, experts + 1, dtype=torch.float64) / experts / harmonic * alpha


def threshold_levels(experts: int, alpha: float) -> Tensor:
    """Return alpha for every i: each expert by itself, without regard to multiplicity."""
    return torch.full((experts,), alpha, dtype=torch.float64)


def p_to_e(log_p: np.ndarray) -> np.ndarray:
    """Return e-values (1 - p + p ln p) / (p ln(p)^2) of p-values given as ln p < 0.

    The mixture over kappa in (0, 1) of the calibrators kappa * p^(kappa - 1) (Vovk & Wang 2021,
    Annals of Statistics 49, section 2): no parameter to choose, and decreasing in p.
    """
    log_p = np.asarray(log_p, dtype=np.float64)
    # (1 - p + p ln p) = -expm1(l) + l e^l loses digits near p = 1, where the limit is 1/2.
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (-np.expm1(log_p) + log_p * np.exp(log_p)) / (np.exp(log_p) * log_p**2)
    return np.where(log_p > -1e-4, 0.5 - log_p / 6, value)


def ebh_levels(experts: int, alpha: float) -> Tensor:
    """Return the p-values whose e-value is E / (i * alpha) (e-BH: Wang & Ramdas 2022, 2009.02824).

    e-BH rejects the i experts with the largest e-values for the largest i with
    e_(i) >= E / (i * alpha); with e-values calibrated from p-values by :func:`p_to_e` that is a
    step-up procedure on p-values. FDR at most alpha * m0/E under any dependence.
    """
    target_E = experts / (np.arange(1, experts + 1) * alpha)
    low_E, high_E = np.full(experts, -700.0), np.zeros(experts)
    for _ in range(100):
        middle_E = (low_E + high_E) / 2
        passes_E = p_to_e(middle_E) >= target_E
        low_E, high_E = np.where(passes_E, middle_E, low_E), np.where(passes_E, high_E, middle_E)
    return torch.from_numpy(np.exp(low_E))


def last_passing(passes_TE: Tensor) -> Tensor:
    """Return the largest i (from 1) whose i-th column holds, 0 if none does; int64, (tokens,)."""
    if passes_TE.device.type != "cpu":
        return _last_passing_on_device(passes_TE)
    # On the hot path: a row's bits are a number, or several of 64 bits, whose length is sought.
    bits_TB = np.packbits(np.ascontiguousarray(passes_TE.numpy()), axis=1, bitorder="little")
    if missing := -bits_TB.shape[1] % 8:
        bits_TB = np.pad(bits_TB, ((0, 0), (0, missing)))
    last_T = np.zeros(len(bits_TB), dtype=np.int64)
    for place, word_T in enumerate(bits_TB.view("<u8").T):
        # Without the bit below the highest one, no rounding to float64 changes the length.
        length_T = np.frexp((word_T & ~(word_T >> np.uint64(1))).astype(np.float64))[1]
        last_T = np.where(length_T, length_T + 64 * place, last_T)
    return torch.from_numpy(last_T)


def last_reaching(value_TE: Tensor, critical_E: Tensor) -> Tensor:
    """Return ``last_passing(value_TE >= critical_E)``, on the CPU in half the time."""
    if value_TE.device.type == "cpu":
        return last_passing(torch.from_numpy(value_TE.numpy() >= critical_E.numpy()))
    return last_passing(value_TE >= critical_E)


def _last_passing_on_device(passes_TE: Tensor) -> Tensor:
    # Narrow integers: half the traffic is a third of the time.
    place_E = torch.arange(1, passes_TE.shape[1] + 1, dtype=torch.int16, device=passes_TE.device)
    return (passes_TE * place_E).amax(1).long()


def step_up(sorted_p_TE: Tensor, level_E: Tensor) -> Tensor:
    """Return the largest i with p_(i) <= level_i.

    Args:
        sorted_p_TE: p-values sorted upwards, (tokens, experts).
        level_E: float64 levels, (experts,).
    """
    return last_passing(sorted_p_TE.double() <= level_E)


def storey(sorted_p_TE: Tensor, alpha: float) -> Tensor:
    """Return rejections of the adaptive procedure of Storey, Taylor & Siegmund (2004, JRSS B 66).

    With W = #{p > lambda}, lambda = 1/2, the share of nulls is estimated by
    pi0 = (W + 1) / ((1 - lambda) * E), not cut at 1; the largest i with p_(i) <= lambda and
    pi0 * p_(i) <= i * alpha / E. FDR at most alpha for independent p-values (their theorem 3);
    no guarantee under dependence.
    """
    p_TE = sorted_p_TE.double()
    experts = p_TE.shape[1]
    above_T1 = (p_TE > STOREY_LAMBDA).sum(1, keepdim=True)
    nulls_T1 = (above_T1 + 1) / (1 - STOREY_LAMBDA)
    place_E = torch.arange(1, experts + 1, dtype=torch.float64, device=p_TE.device)
    return last_passing((nulls_T1 * p_TE <= place_E * alpha) & (p_TE <= STOREY_LAMBDA))


def higher_criticism(sorted_p_TE: Tensor, critical: float) -> Tensor:
    """Return the experts below the Higher Criticism threshold, if the token has any signal.

    HC_i = sqrt(E) * (i/E - p_(i)) / sqrt(i/E * (1 - i/E)) for i <= E/2 (Donoho & Jin 2008, PNAS
    105). Where the largest exceeds its critical value (:func:`hc_critical`), the i that attains it
    is returned (the smallest, should several), else 0. A test for the presence of signal and a
    good classifier of rare weak effects; it controls no false discovery rate.
    """
    experts = sorted_p_TE.shape[1]
    half = experts // 2
    if half == 0:
        return sorted_p_TE.new_zeros(sorted_p_TE.shape[0], dtype=torch.int64)
    place = torch.arange(1, half + 1, device=sorted_p_TE.device)
    share = place.double() / experts
    score = (share - sorted_p_TE[:, :half].double()) / (share * (1 - share) / experts).sqrt()
    largest = score.amax(1, keepdim=True)
    first_T = torch.where(score == largest, place, experts).amin(1)
    return torch.where(largest[:, 0] > critical, first_T, 0)


def hc_critical(experts: int, alpha: float) -> float:
    """Return the exact level-alpha critical value of max HC_i over i <= E/2.

    For independent uniform p-values; see :func:`hc_size`.
    """
    from scipy.optimize import brentq

    if experts < 2:
        return math.inf
    # At -sqrt(E) every token exceeds, at 1000 none of any number of experts worth routing.
    return brentq(lambda critical: hc_size(experts, critical) - alpha, -math.sqrt(experts), 1e3)


def hc_size(experts: int, critical: float) -> float:
    """Return the exact P(max HC_i > critical) for independent uniform p-values.

    HC_i exceeds h exactly where p_(i) < b_i, which is "at least i p-values are below b_i". The
    number of p-values below b_1 < b_2 < ... is a Markov chain with binomial steps (Noe 1972).
    """
    from scipy.stats import binom

    share = np.arange(1, experts // 2 + 1) / experts
    bounds = (share - critical * np.sqrt(share * (1 - share) / experts)).clip(max=1.0)
    before, after = np.mgrid[: experts + 1, : experts + 1]
    mass, reached = np.zeros(experts + 1), 0.0
    mass[0] = 1.0
    for place, bound in enumerate(bounds, start=1):
        if bound <= reached:
            continue
        step = (bound - reached) / (1 - reached)
        mass = mass @ binom.pmf(after - before, experts - before, step)
        mass[place:] = 0.0
        reached = bound
    return float(1 - mass.sum())
