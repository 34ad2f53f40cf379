"""Diagnostics of a fitted null, by layer.

Shape letters: L layers, T tokens, E experts, n values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_routing.routing.nulls.base import SMALLEST_P, Null
from moe_routing.routing.sample import sample_inputs
from moe_routing.routing.scores import null_sample

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from moe_routing.routing.calibration import Calibration

SHAPE = (
    "centre", "scale", "skew", "excess_kurtosis", "upper_to_lower", "tail_upper_to_lower",
    "tail_upper_to_lower_permuted",
)  # fmt: skip
"""Columns that describe the statistic."""
TAIL = 2.0
"""Distance from the centre at which the tails begin, in units of the scale."""


def diagnose(null: Null, calibration: Calibration) -> pd.DataFrame:
    """Describe the null's statistic on calibration tokens, one row per layer.

    A statistic that is predicted from hidden states is not known on shuffled text, and one that
    needs the outputs of all experts is not known on the calibration sample: their columns are NaN.

    Columns:
        null, layer: id of the null, index of the layer.
        n: number of null draws behind each p-value (inf for a null with a formula).
        smallest_p: the smallest attainable p-value.
        centre, scale: median and normal-consistent MAD of the statistic.
        skew, excess_kurtosis: of the statistic, signal included.
        upper_to_lower: (q75 - q50) / (q50 - q25), the symmetry of the bulk; 1 if symmetric. It
            checks the assumption of ``within_token`` where there is little signal: the top quarter
            of the values is left out.
        tail_upper_to_lower: proportion above centre + 2 scales over proportion below centre - 2
            scales. Above 1 it shows signal or skewness; logits alone cannot tell them apart. NaN
            without a lower tail, as that of probabilities.
        tail_upper_to_lower_permuted: the same on shuffled text, where the context carries no
            signal. Above 1 it shows skewness, or signal of the token itself.

    Further columns of ``needed``, whose n and smallest_p are those of the layer and of the first
    rank:
        epsilon: effect below which an expert is not needed, in nats.
        score: the test statistic.
        needed_proportion: weighted proportion of toggled pairs that are needed.
        pairs: number of toggled pairs.
        resolution: the smallest attainable p-value of the last rank, whose pairs are sampled with
            the smallest chance.
    """
    import pandas as pd

    rows = [_row(null, calibration, layer) for layer in range(calibration.sample.num_layers)]
    return pd.DataFrame(rows)


def _row(null: Null, calibration: Calibration, layer: int) -> dict[str, object]:
    return {
        "null": null.id,
        "layer": layer,
        "n": null.num_draws,
        "smallest_p": max(1 / (null.num_draws + 1), SMALLEST_P),
        **_shape(null, calibration, layer),
        **null.diagnostics(layer),
    }


def _shape(null: Null, calibration: Calibration, layer: int) -> dict[str, float]:
    from scipy.stats import kurtosis, skew

    if null.score == "exact_norm":
        return dict.fromkeys(SHAPE, float("nan"))
    value_n = _flat(null.statistic(null_sample(null, calibration, layer)))
    permuted = float("nan")
    if null.score == "probability":
        shuffled = sample_inputs(calibration.sample, layer, permuted=True)
        permuted = _tail_ratio(_flat(null.statistic(shuffled)))
    q25, q50, q75 = np.quantile(value_n, [0.25, 0.5, 0.75])
    values = (
        q50,
        _scale(value_n),
        skew(value_n),
        kurtosis(value_n),
        _ratio(q75 - q50, q50 - q25),
        _tail_ratio(value_n),
        permuted,
    )
    return dict(zip(SHAPE, values, strict=True))


def _flat(value_TE: Tensor) -> np.ndarray:
    return value_TE.flatten().double().numpy()


def _scale(value_n: np.ndarray) -> float:
    from scipy.stats import median_abs_deviation

    # SciPy has no annotations; the type of ``scale`` is guessed from its default, a number.
    return float(
        median_abs_deviation(value_n, scale="normal")  # pyright: ignore[reportArgumentType]
    )


def _tail_ratio(value_n: np.ndarray) -> float:
    centre, distance = np.median(value_n), TAIL * _scale(value_n)
    return _ratio((value_n > centre + distance).mean(), (value_n < centre - distance).mean())


def _ratio(upper: float, lower: float) -> float:
    return float(upper / lower) if lower > 0 else float("nan")
