"""Synthetic results folders whose true effects are known exactly.

Effects are planted to the digit, not drawn: with 3 pp of loss on 4,000 items exactly 120 more
items are lost than gained. A planted nothing is thus an observed difference of 0, among as many
discordant items as any other arm has.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from planted_items import with_gold

from moe_routing.config.study import Contrast, StatisticsConfig
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import parse_strategy
from moe_routing.statistics.intervals import metric_intervals

MAIN_METRIC = {
    "perplexity": "token_perplexity",
    "multiple_choice": "accuracy_norm",
    "last_word": "accuracy",
}
TASK_OF = {"wikitext": "perplexity", "hellaswag": "multiple_choice", "lambada": "last_word"}
ITEMS = {"wikitext": 120, "hellaswag": 4000, "lambada": 5000}
DISCORDANCE = 0.06
BASELINE = "regular_k8"
RULE = ModelRule(8, "softmax")


@dataclass(frozen=True)
class Arm:
    """A strategy and what it does to its base: gain in accuracy, loss in nats; its compute."""

    family: str
    k: int
    experts: float
    gain: float = 0.0
    nats: float = 0.0
    tokens_per_second: float = 1000.0
    base: str = BASELINE


LOSS, ZERO, GAIN = "bh_k4_a005", "bh_k8_a005", "bh_k16_a005"
RIVAL = "topp_k8_p050"
ARMS = {
    "regular_k2": Arm("regular", 2, 2.0, gain=-0.05, nats=0.30, tokens_per_second=2000),
    "regular_k4": Arm("regular", 4, 4.0, gain=-0.03, nats=0.10, tokens_per_second=1600),
    "regular_k6": Arm("regular", 6, 6.0, gain=-0.01, nats=0.04, tokens_per_second=1300),
    BASELINE: Arm("regular", 8, 8.0),
    "normalized_k2": Arm("normalized", 2, 2.0, gain=-0.06, nats=0.40, tokens_per_second=2000),
    "adaptive_k2": Arm("adaptive", 2, 1.5, gain=-0.06, nats=0.60, tokens_per_second=2100),
    LOSS: Arm("bh", 4, 3.0, gain=-0.03, nats=0.05, tokens_per_second=1700),
    ZERO: Arm("bh", 8, 5.0, tokens_per_second=1400),
    GAIN: Arm("bh", 16, 7.0, gain=0.03, nats=-0.05, tokens_per_second=900),
}
CONTROLS = {
    "regular_k1": Arm("regular", 1, 1.0, gain=-0.20, nats=0.80),
    f"shuffle.{ZERO}": Arm("shuffle", 8, 5.0, base=ZERO),
    f"randomid.{GAIN}": Arm("randomid", 16, 7.0, gain=-0.02, nats=0.03, base=GAIN),
    f"{ZERO}_mass-matched": Arm("bh", 8, 5.0, gain=0.03, nats=-0.05, base=ZERO),
    "normalized_k1": Arm("normalized", 1, 1.0, gain=-0.30, nats=1.00),
    RIVAL: Arm("topp", 8, 4.0, gain=-0.02, nats=0.05),
}
"""As good as its base: the shuffle. Worse: one expert, random experts, the rival. Better: the
weighting. At its own compute the rival is better, too."""
LEVERS = {
    "absolute_k8_b3": Arm("absolute", 8, 3.0, nats=0.06),
    "absolute_k8_b3_consequence": Arm("absolute", 8, 3.0, nats=0.02),
    f"{BASELINE}_scaled": Arm("regular", 8, 8.0, nats=-0.01),
    "absolute_k8_b3_scaled": Arm("absolute", 8, 3.0, nats=0.04, base=f"{BASELINE}_scaled"),
}
"""In nats: the score is worth 0.04, and scale 0.02 at three experts."""
NUMERICS = {"same": "token_budget = 128", "coarse": "dtype = float16"}
COARSE_NATS, COARSE_FLIPS = 0.02, 4
"""The coarse arm loses so many nats per token, and so many answers flip, half of them each way."""


def settings(
    strategy: str = LOSS, dataset: str = "hellaswag", **changes: object
) -> StatisticsConfig:
    """Return the statistics section of a config."""
    contrast = Contrast(strategy=strategy, dataset=dataset)
    usual = {"baseline": BASELINE, "resamples": 999, "margin_accuracy": 0.012}
    return StatisticsConfig(primary=contrast, **usual | changes)


def write_planted(
    folder: Path,
    arms: dict[str, Arm] | None = None,
    items: dict[str, int] | None = None,
    seed: int = 0,
) -> Path:
    """Write ``model.json``, ``cells/``, ``numerics/``, ``comparison/*.csv``; return the folder.

    Args:
        folder: what ``results/<study>`` would be.
        arms: strategies and their effects; the baseline must be among them.
        items: number of items of each data set.
        seed: seed of everything that is not planted.
    """
    arms = arms or ARMS
    rows, frames = [], {}
    for dataset, n in (items or ITEMS).items():
        rng = np.random.default_rng([seed, *dataset.encode()])
        base = _base_items(TASK_OF[dataset], n, rng)
        for strategy, arm in (arms | CONTROLS | LEVERS).items():
            frame = base
            if strategy != BASELINE:
                frame = _apply(arm, frames.get((arm.base, dataset), base), TASK_OF[dataset], rng)
            frame = with_gold(frame).assign(mean_experts=arm.experts)
            frames[strategy, dataset] = frame
            _write_items(frame, folder / "cells" / strategy / f"{dataset}.parquet")
            rows.append(_overview_row(strategy, arm, dataset, frame))
        _write_items(base, folder / "numerics" / "same" / f"{dataset}.parquet")
        _write_items(_coarse(base), folder / "numerics" / "coarse" / f"{dataset}.parquet")
    (folder / "comparison").mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    others = {"controls": CONTROLS, "levers": LEVERS}
    chosen = {name: table["strategy"].isin(ids) for name, ids in others.items()}
    compared = ~(chosen["controls"] | chosen["levers"])
    for name, part in (
        ("full_routing_results", table[compared]),
        *((name, table[is_one]) for name, is_one in chosen.items()),
    ):
        part.to_csv(folder / "comparison" / f"{name}.csv", index=False)
    describe_model(folder, RULE)
    return folder


def describe_model(folder: Path, rule: ModelRule) -> None:
    """Write ``model.json`` for a model with this rule."""
    (folder / "model.json").write_text(json.dumps(asdict(rule)))


def _write_items(frame: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with_gold(frame).to_parquet(path, index=False)


def _coarse(base: pd.DataFrame) -> pd.DataFrame:
    """Return the baseline with the planted noise."""
    frame = base.assign(log_likelihood=base["log_likelihood"] - COARSE_NATS * base["tokens"])
    for name in ("correct", "correct_norm"):
        if base[name].notna().all():
            correct = base[name].to_numpy(dtype=bool, copy=True)
            chosen = [np.flatnonzero(correct == was)[: COARSE_FLIPS // 2] for was in (True, False)]
            correct[np.concatenate(chosen)] ^= True
            frame[name] = correct
    return frame


def _base_items(task: str, n: int, rng: np.random.Generator) -> pd.DataFrame:
    is_text = task == "perplexity"
    tokens = rng.integers(50, 800, n) if is_text else rng.integers(1, 4, n)
    nats = tokens * rng.normal(3.0, 0.3, n) if is_text else rng.gamma(1.0, 3.0, n)
    correct = np.zeros(n, dtype=bool)
    correct[rng.permutation(n)[: n // 2]] = True
    right = [None] * n if is_text else correct
    return pd.DataFrame(
        {
            "id": [f"item-{i}" for i in range(n)],
            # Questions come in pairs from one source.
            "cluster": [f"source-{i // 2 if task == 'multiple_choice' else i}" for i in range(n)],
            "log_likelihood": -nats,
            "tokens": tokens,
            "words": np.maximum(tokens * 3 // 4, 1),
            "bytes": tokens * 4,
            "correct": right,
            "correct_norm": right if task == "multiple_choice" else [None] * n,
            "greedy": [None] * n if is_text else correct,
        }
    )


def _apply(arm: Arm, base: pd.DataFrame, task: str, rng: np.random.Generator) -> pd.DataFrame:
    frame, n = base.copy(), len(base)
    # Noise that the ratio of sums does not see, then the effect.
    unit = base["tokens"].to_numpy() if task == "perplexity" else np.ones(n)
    noise = rng.normal(0, 0.03, n) * unit
    noise -= unit * noise.sum() / unit.sum()
    frame["log_likelihood"] = base["log_likelihood"] - noise - arm.nats * unit
    for name in ("correct", "correct_norm") if task != "perplexity" else ():
        if base[name].notna().all():
            frame[name] = _flip(base[name].to_numpy(dtype=bool), arm.gain, rng)
    return frame


def _flip(correct: np.ndarray, gain: float, rng: np.random.Generator) -> np.ndarray:
    n, discordance = len(correct), max(DISCORDANCE, abs(gain))
    lost, gained = (round(n * (discordance + sign * gain) / 2) for sign in (-1, 1))
    flipped = correct.copy()
    flipped[rng.permutation(np.flatnonzero(correct))[:lost]] = False
    flipped[rng.permutation(np.flatnonzero(~correct))[:gained]] = True
    return flipped


def _overview_row(strategy: str, arm: Arm, dataset: str, frame: pd.DataFrame) -> dict:
    task = TASK_OF[dataset]
    rng = np.random.default_rng(0)
    estimates = metric_intervals(frame, task, confidence=0.95, resamples=200, rng=rng)
    main = next(e for e in estimates if e.metric == MAIN_METRIC[task])
    is_bh = arm.family == "bh"
    return {
        "strategy": strategy,
        "family": arm.family,
        "k": arm.k,
        "alpha": 0.05 if is_bh else "none",
        "null": "within_token" if is_bh else "none",
        "weighting": parse_strategy(strategy).resolved(RULE).weighting_kind,
        "dataset": dataset,
        "task": task,
        "n_items": len(frame),
        "metric": main.metric,
        "value": main.value,
        "ci_low": main.low,
        "ci_high": main.high,
        "mean_experts": arm.experts,
        "sd_experts": 1.0 if is_bh else 0.0,
        "floor_proportion": 0.01,
        "cap_proportion": 0.1,
        "empty_proportion": 0.0,
        "router_entropy": 3.0,
        "max_weight": 0.2,
        "tokens": int(frame["tokens"].sum()),
        "tokens_per_second": arm.tokens_per_second,
        "wall_seconds": frame["tokens"].sum() / arm.tokens_per_second,
    }
