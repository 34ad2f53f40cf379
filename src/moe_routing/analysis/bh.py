"""The BH analysis: max_k x alpha x null beside top-k, on evaluation text and in generation.

Perplexity, experts per token, binding proportions and batch unions come from a real scoring run of
every arm, because a selection changes the input of later layers. Only the saturation curve is
computed from counts: those of the run at the largest max_k, cut at every smaller cap, as if the cap
changed nothing else. The results of the real runs are given beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from moe_routing.analysis.arms import arms_of, bh_arms, check_arms
from moe_routing.analysis.counts import (
    QUANTILES,
    capped_means,
    histogram_quantiles,
    reduction_percent,
    saturation_point,
)
from moe_routing.analysis.optional import present
from moe_routing.analysis.recommend import Arm, recommend
from moe_routing.analysis.tables import markdown, write_csv, write_json
from moe_routing.analysis.telemetry import DecodingRecorder, SwitchedRecorder, UnionRecorder
from moe_routing.analysis.text import first_items, read_text
from moe_routing.config.study import StudyConfig
from moe_routing.data.items import Item
from moe_routing.engine.loading import LoadedModel
from moe_routing.engine.offload import input_device
from moe_routing.engine.packable import Packable, packable
from moe_routing.engine.recorder import RoutingStatistics
from moe_routing.engine.requests import own_tokens
from moe_routing.engine.routed import routed
from moe_routing.engine.scorer import Scorer
from moe_routing.evaluation.study_model import load_study_model
from moe_routing.files import atomic_path
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.scores import null_sample
from moe_routing.routing.strategies import Strategy
from moe_routing.routing.strategies.testing import BH
from moe_routing.routing.strategies.topk import Regular
from moe_routing.statistics.bootstrap import bootstrap_items, studentised_interval
from moe_routing.vocabulary import text_dataset

TOP_K = "topk"

EXAMPLE_TOKENS = 512
"""Tokens whose p-values are written for the notebook."""


@dataclass(frozen=True)
class ArmRun:
    """What was measured of one strategy.

    Attributes:
        strategy: the strategy.
        items: one row per document: ``cluster``, ``nats``, ``tokens``, ``experts`` (summed over
            tokens, averaged over layers).
        statistics: routing on evaluation text.
        distinct: distinct experts of a batch.
        generation: routing of the decoding steps.
        text: what was generated.
        window: most tokens of a document that the model read at once.
    """

    strategy: Strategy
    items: pd.DataFrame
    statistics: RoutingStatistics
    distinct: float
    generation: RoutingStatistics
    text: str
    window: int


def write_bh(config: StudyConfig, results: Path) -> pd.DataFrame:
    """Run every arm, write the tables of ``bh/`` and return ``bh_routing_results``.

    Files: ``bh_routing_results.csv``, ``bh_pivot.csv`` and ``.md``, ``bh_counts.csv``,
    ``binding_by_layer.csv``, ``bh_saturation.csv``, ``bh_static_curve.csv``,
    ``bh_generation.json``, ``recommendation.json`` and ``bh_p_values.parquet``.

    Raises:
        InputError: no perplexity set, a null that was not fitted or on too few tokens for a level,
            or more experts than there are, all before any text is scored; or router logits or
            likelihoods that are not finite.
    """
    folder = results / "bh"
    nulls = config.analysis.bh.nulls or config.calibration.nulls
    calibration = Calibration.load(results / "calibration", tuple(nulls))
    loaded = load_study_model(config.model, results, config.resources.threads)
    rule = loaded.rule
    config = config.of_model(calibration.sample.num_experts, rule)
    items = first_items(read_text(config, results), loaded.tokenizer, config.analysis.bh.tokens)
    arms = arms_of(config, nulls, rule)
    check_arms(loaded, most_demanding(arms), calibration)
    exact = packable(loaded.model)
    runs = {
        strategy.id: run_arm(loaded, strategy, items, calibration, config, exact)
        for strategy in tqdm(arms, desc="arms", unit="arm")
    }
    table = results_table(runs, config, nulls)
    write_csv(table, folder / "bh_routing_results.csv")
    _write_pivot(table, folder)
    write_csv(counts_table(runs, nulls), folder / "bh_counts.csv")
    write_csv(binding_table(runs, nulls), folder / "binding_by_layer.csv")
    write_csv(saturation_table(runs, nulls), folder / "bh_saturation.csv")
    write_csv(_static_rows(runs, config), folder / "bh_static_curve.csv")
    generations = {name: run.text for name, run in runs.items()}
    write_json(
        {"prompt": config.analysis.bh.prompt, "generated": generations},
        folder / "bh_generation.json",
    )
    advice = {"dataset": text_dataset(config.datasets), **_advice(runs, config)}
    write_json(advice, folder / "recommendation.json")
    with atomic_path(folder / "bh_p_values.parquet") as temporary:
        example_p_values(calibration, nulls[0]).to_parquet(temporary, index=False)
    return table


def most_demanding(arms: Sequence[Strategy]) -> list[Strategy]:
    """Return the static arms, and of each null the arm with the smallest level and the largest cap.

    If these can be built, so can the others, and building all takes as long as running some.
    """
    chosen: dict[str, Strategy] = {}
    for arm in arms:
        key = arm.needs_null if isinstance(arm, BH) else arm.id
        kept = chosen.setdefault(key, arm)
        if isinstance(arm, BH) and isinstance(kept, BH):
            chosen[key] = min(kept, arm, key=lambda one: (one.alpha, -one.max_k))
    return list(chosen.values())


def example_p_values(calibration: Calibration, null: str) -> pd.DataFrame:
    """Return the p-values of the first calibration tokens in the first layer, a column per expert.

    With them a reader of a finished study can run the procedure without torch.
    """
    fitted = calibration.null(null)
    inputs = null_sample(fitted, calibration, 0).rows(slice(EXAMPLE_TOKENS))
    p_TE = fitted.p_values(inputs).numpy()
    return pd.DataFrame(p_TE, columns=[f"expert_{expert}" for expert in range(p_TE.shape[1])])


def run_arm(
    loaded: LoadedModel,
    strategy: Strategy,
    items: Sequence[Item],
    calibration: Calibration,
    config: StudyConfig,
    exact: Packable | None = None,
) -> ArmRun:
    """Score the passages, and generate from the prompt, under one strategy.

    For ``exact`` see :class:`moe_routing.engine.scorer.Scorer`.

    Raises:
        InputError: router logits or a log-likelihood that are not finite.
    """
    recorder, decoding = UnionRecorder(config.analysis.bh.union), DecodingRecorder()
    switch = SwitchedRecorder(recorder)
    scorer = Scorer(
        loaded.model,
        loaded.tokenizer,
        token_budget=config.evaluation.token_budget,
        window=config.evaluation.window,
        recorder=recorder,
        progress=False,
        exact=exact,
    )
    label = f"{strategy.id} on {text_dataset(config.datasets)}"
    with routed(
        loaded.model,
        strategy,
        calibration=calibration,
        recorder=switch,
        experts_implementation=config.model.experts_implementation,
    ):
        groups = scorer.score_items(items, "perplexity", label=label)
        statistics = recorder.statistics()
        statistics.check_finite(label)
        switch.recorder = decoding
        text = _generate(loaded, config.analysis.bh.prompt, config.analysis.bh.new_tokens)
    scores = [group[0] for group in groups]
    rows = pd.DataFrame(
        {
            "cluster": [item.cluster for item in items],
            "nats": [-score.log_likelihood for score in scores],
            "tokens": [score.tokens for score in scores],
            "experts": [present(score.mean_experts) * score.tokens for score in scores],
        }
    )
    generation = decoding.statistics()
    generation.check_finite(f"{strategy.id} on analysis.bh.prompt")
    return ArmRun(
        strategy,
        rows,
        statistics,
        recorder.mean_distinct(),
        generation,
        text,
        scorer.encoder.max_length,
    )


@torch.inference_mode()
def _generate(loaded: LoadedModel, prompt: str, new_tokens: int) -> str:
    """Generate greedily, past any end-of-text token, so that arms stay comparable."""
    prompt_1S = torch.tensor([own_tokens(loaded.tokenizer, prompt)])
    prompt_1S = prompt_1S.to(input_device(loaded.model))
    # One token more: the last one is not read, so it is not routed.
    generate = cast("Callable[..., torch.Tensor]", loaded.model.generate)
    output = generate(
        prompt_1S,
        attention_mask=torch.ones_like(prompt_1S),
        do_sample=False,
        min_new_tokens=new_tokens + 1,
        max_new_tokens=new_tokens + 1,
        pad_token_id=loaded.tokenizer.eos_token_id,
    )
    start = prompt_1S.shape[1]
    return str(loaded.tokenizer.decode(output[0, start : start + new_tokens]))


def results_table(
    runs: dict[str, ArmRun], config: StudyConfig, nulls: Sequence[str]
) -> pd.DataFrame:
    """Return for each null its BH arms and top-k at the same max_k, one row per arm."""
    rng = np.random.default_rng(config.seed)
    measured = {name: measure(run, runs, config, rng) for name, run in runs.items()}
    static = {_static_k(run): name for name, run in runs.items()}
    rows = []
    for null in nulls:
        for arm in bh_arms(config, null):
            keys = {"kind": "bh", "max_k": arm.max_k, "alpha": arm.alpha}
            rows.append({"strategy": arm.id, "null": null, **keys, **measured[arm.id]})
        for k in present(config.analysis.bh.max_k):
            name = static[k]
            keys = {"kind": TOP_K, "max_k": k, "alpha": np.nan}
            rows.append({"strategy": name, "null": null, **keys, **measured[name]})
    return pd.DataFrame(rows)


def measure(
    run: ArmRun, runs: dict[str, ArmRun], config: StudyConfig, rng: np.random.Generator
) -> dict[str, object]:
    """Return the columns of one arm; the last ones name the protocol.

    Those that begin with ``generation_`` are about the decoding steps after the prompt, the others
    about the evaluation text. Binding proportions are of decisions (a token in a layer):
    ``floor_proportion`` of those that the rule left below the floor, ``cap_proportion`` of those
    that it wanted above the cap, ``empty_proportion`` of those for which it chose no expert.
    """
    statistics, items = run.statistics, run.items
    baseline = runs[config.statistics.baseline].items
    mean = statistics.mean_experts()
    generation = {"mean_experts": run.generation.mean_experts(), **_spread(run.generation)}
    generation |= _binding(run.generation)
    sums = np.stack([items["nats"], items["nats"] - baseline["nats"], items["experts"]], axis=1)
    boot = bootstrap_items(
        sums,
        items["tokens"],
        items["cluster"].to_numpy(),
        resamples=config.analysis.resamples,
        rng=rng,
    )
    low_S, high_S = studentised_interval(boot, config.statistics.confidence)
    return {
        "mean_experts": mean,
        "mean_experts_low": low_S[2],
        "mean_experts_high": high_S[2],
        **_spread(statistics),
        "reduction_pct": reduction_percent(mean, run.strategy.max_experts),
        "token_perplexity": np.exp(boot.ratio_S[0]),
        "token_perplexity_low": np.exp(low_S[0]),
        "token_perplexity_high": np.exp(high_S[0]),
        "nats_vs_baseline": boot.ratio_S[1],
        "nats_vs_baseline_low": low_S[1],
        "nats_vs_baseline_high": high_S[1],
        **_binding(statistics),
        "unique_experts": run.distinct,
        "batch_tokens": config.analysis.bh.union,
        **{f"generation_{name}": value for name, value in generation.items()},
        "generation_tokens": run.generation.tokens,
        "n_tokens": int(items["tokens"].sum()),
        "n_documents": len(items),
        "dataset": text_dataset(config.datasets),
        "window": run.window,
    }


def _spread(statistics: RoutingStatistics) -> dict[str, float]:
    """Return standard deviation and quantiles of the experts of a decision."""
    quantiles = histogram_quantiles(statistics.count_histogram_LC.sum(0), QUANTILES)
    names = ("q05", "q25", "median", "q75", "q95")
    return {"sd_experts": statistics.sd_experts(), **dict(zip(names, quantiles, strict=True))}


def _binding(statistics: RoutingStatistics) -> dict[str, float]:
    """Return how often floor, cap and an empty choice decide, averaged over layers."""
    proportions = _binding_by_layer(statistics)
    return {name: proportion_L.mean() for name, proportion_L in proportions.items()}


def _binding_by_layer(statistics: RoutingStatistics) -> dict[str, np.ndarray]:
    return {
        "floor_proportion": statistics.floor_binds_L,
        "cap_proportion": statistics.cap_binds_L,
        "empty_proportion": statistics.empty_L,
    }


def _write_pivot(table: pd.DataFrame, folder: Path) -> None:
    """Write mean experts and perplexity by alpha (rows) and max_k (columns), a block per null."""
    bh = table[table["kind"] == "bh"]
    values = ["mean_experts", "token_perplexity"]
    long = bh.melt(["null", "alpha", "max_k"], values, var_name="quantity")
    pivot = long.pivot_table(
        index=["null", "quantity", "alpha"], columns="max_k", values="value", sort=False
    ).reset_index()
    pivot.columns = [name if isinstance(name, str) else f"max_k_{name}" for name in pivot.columns]
    write_csv(pivot, folder / "bh_pivot.csv")
    with atomic_path(folder / "bh_pivot.md") as temporary:
        temporary.write_text(f"{markdown(pivot)}\n", encoding="utf-8")


def counts_table(runs: dict[str, ArmRun], nulls: Sequence[str]) -> pd.DataFrame:
    """Return the proportion of the tokens of a layer with each number of experts, BH arms only."""
    tables = []
    for arm, run in _bh_runs(runs, nulls):
        histogram_LC = run.statistics.count_histogram_LC
        layer, experts = np.nonzero(histogram_LC)
        proportion = histogram_LC[layer, experts] / run.statistics.tokens
        values = {"layer": layer, "experts": experts, "proportion": proportion}
        tables.append(pd.DataFrame({**_keys(arm), **values}))
    return pd.concat(tables, ignore_index=True)


def binding_table(runs: dict[str, ArmRun], nulls: Sequence[str]) -> pd.DataFrame:
    """Return how often floor, cap and an empty choice decide in each layer, BH arms only.

    ``text`` is ``evaluation`` or ``generation``; the proportions are of its ``n_tokens`` tokens.
    See :func:`measure`.
    """
    tables = []
    for arm, run in _bh_runs(runs, nulls):
        for text, seen in (("evaluation", run.statistics), ("generation", run.generation)):
            mean_L = seen.mean_experts_L()
            values = {"text": text, "layer": np.arange(mean_L.size), "mean_experts": mean_L}
            values |= _binding_by_layer(seen) | {"n_tokens": seen.tokens}
            tables.append(pd.DataFrame({**_keys(arm), **values}))
    return pd.concat(tables, ignore_index=True)


def saturation_table(runs: dict[str, ArmRun], nulls: Sequence[str]) -> pd.DataFrame:
    """Return mean experts under every cap, from the counts of the run at the largest max_k.

    ``saturation_point``: see :func:`moe_routing.analysis.counts.saturation_point`; ``_least`` and
    ``_most`` are the smallest and the largest of single layers. ``measured`` is the mean of the
    real run with that max_k, where there is one.
    """
    bh = list(_bh_runs(runs, nulls))
    largest = max(arm.max_k for arm, _ in bh)
    tables = []
    for arm, run in bh:
        if arm.max_k != largest:
            continue
        histogram_LC = run.statistics.count_histogram_LC[:, : largest + 1]
        by_layer = [saturation_point(histogram_C) for histogram_C in histogram_LC]
        same = [(a, r) for a, r in bh if (a.null, a.alpha) == (arm.null, arm.alpha)]
        measured = {a.max_k: r.statistics.mean_experts() for a, r in same}
        caps = np.arange(1, largest + 1)
        tables.append(
            pd.DataFrame(
                {
                    "null": arm.null,
                    "alpha": arm.alpha,
                    "max_k": caps,
                    "mean_experts": capped_means(histogram_LC.sum(0)),
                    "measured": [measured.get(cap, np.nan) for cap in caps.tolist()],
                    "saturation_point": saturation_point(histogram_LC.sum(0)),
                    "saturation_least": min(by_layer),
                    "saturation_most": max(by_layer),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def _keys(arm: BH) -> dict[str, object]:
    return {"null": arm.null, "max_k": arm.max_k, "alpha": arm.alpha}


def _bh_runs(runs: dict[str, ArmRun], nulls: Sequence[str]) -> Iterator[tuple[BH, ArmRun]]:
    for run in runs.values():
        if isinstance(run.strategy, BH) and run.strategy.null in nulls:
            yield run.strategy, run


def _static_k(run: ArmRun) -> int | None:
    return run.strategy.k if isinstance(run.strategy, Regular) else None


def _static_rows(runs: dict[str, ArmRun], config: StudyConfig) -> pd.DataFrame:
    """Return every static arm, including those below the smallest max_k."""
    rng = np.random.default_rng(config.seed)
    rows = [
        {"strategy": name, "k": _static_k(run), **measure(run, runs, config, rng)}
        for name, run in runs.items()
        if _static_k(run) is not None
    ]
    return pd.DataFrame(rows).sort_values("k")


def _advice(runs: dict[str, ArmRun], config: StudyConfig) -> dict[str, object]:
    first = next(iter(runs.values())).items
    arms = [Arm(name, run.statistics.mean_experts(), _static_k(run)) for name, run in runs.items()]
    return recommend(
        np.stack([run.items["nats"].to_numpy() for run in runs.values()], axis=1),
        first["tokens"].to_numpy(),
        first["cluster"].to_numpy(),
        arms,
        config.statistics.baseline,
        margin=config.statistics.margin_nats,
        confidence=config.statistics.confidence,
        resamples=config.analysis.resamples,
        rng=np.random.default_rng(config.seed),
    )
