"""The figure of a training run."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from moe_routing.figures.style import WIDTH, use_style
from moe_routing.files import atomic_path

SMOOTHED_STEPS = 100
DRAWN_POINTS = 1000


def plot_training(log: pd.DataFrame, path: Path) -> None:
    """Draw losses, the largest expert load, and the speed, over the tokens seen.

    Args:
        log: the rows of ``training.csv``.
        path: PNG file to write.
    """
    use_style()
    log = log.assign(tokens=log["tokens"] / 1e6)
    names = ["loss", "max_load", "tokens_per_second"]
    means = log[names].rolling(SMOOTHED_STEPS, min_periods=1, center=True).mean()
    smooth = log[["tokens"]].join(means).iloc[:: max(1, len(log) // DRAWN_POINTS)]
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, sharex=True, figsize=(WIDTH, 5.5), height_ratios=[2, 1, 1], layout="constrained"
    )
    label = f"training (mean of {SMOOTHED_STEPS} steps)"
    sns.lineplot(smooth, x="tokens", y="loss", ax=top, label=label)
    validated = log.dropna(subset="validation_loss")
    sns.lineplot(validated, x="tokens", y="validation_loss", ax=top, label="validation", ls="--")
    top.set_ylabel("loss, nats per token")
    sns.lineplot(smooth, x="tokens", y="max_load", ax=middle)
    middle.set_ylabel("largest load\n/ mean load")
    sns.lineplot(smooth, x="tokens", y="tokens_per_second", ax=bottom)
    bottom.set(xlabel="training tokens, millions", ylabel="tokens per second", ylim=(0, None))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    plt.close(figure)
