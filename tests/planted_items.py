"""What planted items have besides their log-likelihoods and answers."""

from __future__ import annotations

import numpy as np
import pandas as pd

GOLD_BYTES = 20


def with_gold(items: pd.DataFrame) -> pd.DataFrame:
    """Return items with the columns of the right continuation, which follow its likelihood."""
    if items["correct"].isna().all():  # documents
        empty = dict.fromkeys(("gold_bytes", "gold_bits_per_byte", "gold_margin"))
        return items.assign(**empty, log_likelihoods=items["log_likelihood"].map(lambda x: [x]))
    bits = -items["log_likelihood"] / np.log(2)
    return items.assign(
        gold_bytes=GOLD_BYTES,
        gold_bits_per_byte=bits / GOLD_BYTES,
        gold_margin=items["log_likelihood"] + 3.0,
        log_likelihoods=items["log_likelihood"].map(lambda x: [x, -3.0]),
    )
