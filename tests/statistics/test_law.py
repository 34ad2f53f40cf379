"""The consequence law is found where it was planted, and not where it was not."""

from __future__ import annotations

import numpy as np
import pytest

from moe_routing.statistics.law import consequence_law, spearman

TOKENS, EACH = 400, 8


def planted(weight_slope, norm_slope, token_sd, own_sd, seed=0):
    """Removals with log KL linear in log weight and log norm, a token's part and noise."""
    rng = np.random.default_rng(seed)
    log_weight, log_norm, own = rng.normal(size=(3, TOKENS * EACH))
    token = np.repeat(np.arange(TOKENS), EACH)
    sensitivity = rng.normal(size=TOKENS)[token] * token_sd
    log_kl = np.log(2e-5) + weight_slope * log_weight + norm_slope * log_norm
    kl = np.exp(log_kl + sensitivity + own_sd * own)
    return np.exp(log_weight), np.exp(log_norm), kl, token


def test_planted_law_is_found():
    law = consequence_law(*planted(2, 2, token_sd=0.6, own_sd=0.6))
    assert law.weight_slope == pytest.approx(2, abs=0.05)
    assert law.norm_slope == pytest.approx(2, abs=0.05)
    assert law.constant == pytest.approx(2e-5, rel=0.1)
    assert law.r2 == pytest.approx(8 / (8 + 0.72), abs=0.02)
    assert law.law_r2 == pytest.approx(law.r2, abs=0.01)
    assert law.token_share == pytest.approx(0.5, abs=0.06)
    assert law.pairs == TOKENS * EACH


def test_another_law_is_not_taken_for_it():
    law = consequence_law(*planted(1, 0, token_sd=0.0, own_sd=0.5))
    assert law.weight_slope == pytest.approx(1, abs=0.05)
    assert law.norm_slope == pytest.approx(0, abs=0.05)
    assert law.law_r2 < 0 < law.r2
    assert law.token_share < 0.05


def test_token_share_agrees_with_a_loop_over_tokens():
    weight, norm, kl, token = planted(2, 2, token_sd=0.5, own_sd=0.8, seed=1)
    keep = np.random.default_rng(2).random(kl.size) < 0.7  # tokens of unequal size
    weight, norm, kl, token = (column[keep] for column in (weight, norm, kl, token))
    residual = np.log(kl) - 2 * np.log(weight * norm)
    groups = [residual[token == one] for one in np.unique(token)]
    n, k, mean = residual.size, len(groups), residual.mean()
    within = sum(((group - group.mean()) ** 2).sum() for group in groups) / (n - k)
    between = sum(group.size * (group.mean() - mean) ** 2 for group in groups) / (k - 1)
    size = (n - sum(group.size**2 for group in groups) / n) / (k - 1)
    variance = (between - within) / size
    law = consequence_law(weight, norm, kl, token)
    assert law.token_share == pytest.approx(variance / (variance + within), rel=1e-9)


def test_removals_without_effect_are_left_out():
    weight, norm, kl, token = planted(2, 2, token_sd=0.3, own_sd=0.3)
    kl[:100], norm[100:200] = 0, 0
    law = consequence_law(weight, norm, kl, token)
    assert law.pairs == TOKENS * EACH - 200
    assert np.isfinite(list(law.row().values())).all()
    with pytest.raises(ValueError, match="3 removals have an effect; allowed: at least 4"):
        consequence_law(weight[-3:], norm[-3:], kl[-3:], token[-3:])


def test_spearman_of_a_constant_is_not_a_number():
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert spearman([3, 1, 2], [30, 10, 20]) == pytest.approx(1)
