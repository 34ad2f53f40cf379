"""The validity analysis: p-value calibration, and error rates of the procedures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from tqdm import tqdm

from moe_routing.analysis.captured import CAPTURE_FILE, Capture
from moe_routing.analysis.designs import DESIGNS, FIT_TIMES, samples, with_logits
from moe_routing.analysis.needed import Verification
from moe_routing.analysis.null_size import binding_rows, call_designs, call_nulls, examine
from moe_routing.analysis.optional import present
from moe_routing.analysis.simulation import simulate_procedures
from moe_routing.analysis.tables import write_csv
from moe_routing.config.analyses import ValidityAnalysis
from moe_routing.config.study import StudyConfig
from moe_routing.errors import InputError
from moe_routing.evaluation.held_out_files import HeldOutFiles
from moe_routing.routing.calibration import OUTPUTS_FILE, SAMPLE_FILE, TOGGLES_FILE
from moe_routing.routing.levels import min_draws
from moe_routing.routing.nulls import NULLS, Null, fit_null
from moe_routing.routing.nulls.needed import Needed
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.toggles import Toggles
from moe_routing.vocabulary import NeededId, hypothesis

MIN_K = 1
"""The floor of every BH arm."""
MARGINAL = ("pooled", "pooled_kde", "per_expert", "per_expert_kde")
"""Nulls that are the distribution of the logits themselves, so that the bound alpha * H_E holds on
the tokens that they were fitted on: exactly for empirical distributions, approximately for kernel
estimates."""
NOISE_PART = 4
"""Designs without a part in the verdict use the tokens of the others over this number."""
CURVE = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Levels of the curves of size against alpha, besides those of the config; each null is examined at
those that it has enough draws for."""


def write_validity(config: StudyConfig, results: Path) -> pd.DataFrame:
    """Examine every null and procedure, write ``validity/``, and return the verdicts.

    Files: ``designs.csv``, ``size.csv``, ``pvalue_histogram.csv`` and ``pvalue_qq.csv`` (by null,
    design and layer), ``binding.csv`` (real text: floor, cap, empty sets, and the bound of marginal
    nulls), ``simulation.csv`` (procedures), ``verdict_by_design.csv`` and ``verdict.csv``.

    Raises:
        InputError: no calibration sample, no capture of the same model, or too few tokens to fit
            a null that can reject at the level of the verdict.
    """
    sample = CalibrationSample.load(results / "calibration" / SAMPLE_FILE)
    top_k = sample.rule.top_k
    config = config.of_model(sample.num_experts, sample.rule)
    settings = config.analysis.validity
    folder = results / "validity"
    rng = np.random.default_rng(config.seed)
    write_csv(binding_table(config, sample, text_sample(results, sample)), folder / "binding.csv")
    sizes = design_sizes(config, sample, rng)
    write_csv(sizes, folder / "size.csv")
    write_csv(designs_table(present(settings.nulls)), folder / "designs.csv")
    simulation = simulate_procedures(
        rng,
        repeats=settings.repeats,
        experts=sample.num_experts,
        signals=present(settings.signals),
        effect=settings.effect,
        correlations=settings.correlation,
        alphas=settings.alpha,
    )
    write_csv(simulation, folder / "simulation.csv")
    designs = call_designs(
        sizes,
        level=settings.level,
        largest_size=settings.largest_size,
        confidence=config.statistics.confidence,
        breaks=lambda null, design: DESIGNS[design].breaks.get(null, ""),
        if_noise=lambda design: DESIGNS[design].if_noise,
    )
    write_csv(designs, folder / "verdict_by_design.csv")
    verdict = call_nulls(designs)
    verdict["hypothesis"] = [hypothesis(null) for null in verdict["null"]]
    write_csv(verdict, folder / "verdict.csv")
    for name, table in verification(config, results, sample, top_k, rng).tables().items():
        write_csv(table, folder / f"{name}.csv")
    return verdict


def verification(
    config: StudyConfig,
    results: Path,
    sample: CalibrationSample,
    top_k: int,
    rng: np.random.Generator,
) -> Verification:
    """Return what verifies the null of the study's BH arm, or ``needed`` if that is another null.

    Raises:
        InputError: no toggles, or no outputs of experts.
    """
    calibration, arm = results / "calibration", config.bh_arm(top_k)
    toggles = Toggles.load(calibration / TOGGLES_FILE)
    outputs = ExpertOutputs.load(calibration / OUTPUTS_FILE)
    null_id = arm.null if NeededId.parse(arm.null) else str(NeededId())
    null = fit_null(null_id, sample, toggles, config.calibration.epsilon, outputs)
    return Verification(
        sample,
        toggles,
        outputs,
        cast("Needed", null),
        arm.alpha,
        arm.max_k,
        HeldOutFiles(results),
        config.held_out_texts,
        config.statistics.confidence,
        config.analysis.resamples,
        rng,
    )


def binding_table(
    config: StudyConfig, sample: CalibrationSample, text: CalibrationSample
) -> pd.DataFrame:
    """Return what binds on evaluation text and, for marginal nulls, on calibration text."""
    parts = []
    for null_id in tqdm(present(config.analysis.validity.nulls), desc="binding", unit="null"):
        fitted = NULLS[null_id].fit(sample)
        parts.append(_binding(config, null_id, fitted, text).assign(text="evaluation"))
        if null_id in MARGINAL:
            parts.append(_binding(config, null_id, fitted, sample).assign(text="calibration"))
    return pd.concat(parts, ignore_index=True)


def design_sizes(
    config: StudyConfig, sample: CalibrationSample, rng: np.random.Generator
) -> pd.DataFrame:
    """Return the size of every null in every design, by level and layer.

    Only nulls whose H0 holds in a design are examined there, including those whose assumption it
    breaks. They are fitted on the first sample of the design and tested on the second, at the
    levels that they have enough draws for. Designs that take no part in verdicts have one part in
    ``NOISE_PART`` of the tokens.

    Raises:
        InputError: the level of the verdict is not among them.
    """
    settings = config.analysis.validity
    tables = []
    for design in tqdm(DESIGNS.values(), desc="designs", unit="design"):
        names = list(filter(design.holds_for, present(settings.nulls)))
        if not names:
            continue
        tokens = settings.tokens // NOISE_PART if design.if_noise else settings.tokens
        first, second = samples(design, sample, tokens, rng)
        for null_id in names:
            null = NULLS[null_id].fit(first)
            if not design.if_noise:
                _check_verdict(settings, null, sample, first.num_tokens)
            table = examine(null, second, settings.alpha, config.statistics.confidence)
            tables.append(table.assign(null=null_id, design=design.name))
    return _keys_first(pd.concat(tables, ignore_index=True))


def _check_verdict(
    settings: ValidityAnalysis, null: Null, sample: CalibrationSample, fitted: int
) -> None:
    level = settings.level / sample.num_experts
    if null.attains(level):
        return
    key, tokens = "analysis.validity.tokens", settings.tokens
    if fitted < FIT_TIMES * tokens:  # a design made of the sample itself ran out of it
        key, tokens = "calibration.tokens", sample.num_tokens
    raise InputError(
        f"{key} is {tokens}; allowed: more, since null '{null.id}' then has {null.num_draws:.0f} "
        f"draws and a verdict at level {settings.level:g} needs {min_draws(level)}"
    )


def designs_table(nulls: Sequence[str]) -> pd.DataFrame:
    """Return what each design is and whether it takes no part in verdicts (``if_noise``).

    With the nulls whose H0 holds in it, those whose definition it is, and the assumptions that it
    breaks.
    """
    rows = [
        {
            "design": design.name,
            "why": design.why,
            "if_noise": design.if_noise,
            "nulls": " ".join(filter(design.holds_for, nulls)),
            "own": " ".join(null for null in nulls if null in design.own),
            "breaks": "; ".join(
                f"{null}: {design.breaks[null]}" for null in design.breaks if null in nulls
            ),
        }
        for design in DESIGNS.values()
    ]
    return pd.DataFrame(rows)


def levels(config: StudyConfig) -> list[float]:
    """Return the levels that are examined, in order."""
    return sorted({*CURVE, *config.analysis.validity.alpha})


def text_sample(results: Path, sample: CalibrationSample) -> CalibrationSample:
    """Return the stock model's logits on evaluation text in the form that nulls read.

    Raises:
        InputError: the capture has another number of layers or experts than the sample.
    """
    path = results / "baseline" / CAPTURE_FILE
    capture = Capture.load(path)
    layers, _, experts = capture.logits_LTE.shape
    if (layers, experts) != (sample.num_layers, sample.num_experts):
        raise InputError(
            f"{path}: has {layers} layers and {experts} experts; allowed: those of the calibration "
            f"sample, {sample.num_layers} and {sample.num_experts}"
        )
    return with_logits(sample, capture.logits_LTE, capture.input_norm_LT)


def _binding(
    config: StudyConfig, null_id: str, null: Null, sample: CalibrationSample
) -> pd.DataFrame:
    max_k = present(config.analysis.validity.max_k)
    table = binding_rows(null, sample, levels(config), min_k=MIN_K, max_k=max_k)
    return table.assign(null=null_id, max_k=max_k)


def _keys_first(table: pd.DataFrame) -> pd.DataFrame:
    keys = ["null", "design", "layer"]
    return table[keys + [name for name in table if name not in keys]]
