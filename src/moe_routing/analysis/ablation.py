"""Expert ablation on held-out text: what discoveries are worth, and what is left out.

One set of toggled experts (:class:`moe_routing.routing.toggles.Toggles`) of documents that nothing
was fitted on serves every null and level: what BH selects on the same router logits and states says
which of the toggles are discoveries. So all nulls are compared on the same model, tokens and
interventions. No model runs here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_routing.analysis.discoveries import (
    Criterion,
    SelectedByRule,
    false_discoveries,
    false_kept,
    left_out,
    own_choice,
    selected,
)
from moe_routing.analysis.needs import class_contrasts, needed_experts, presence
from moe_routing.analysis.outputs import ROUTED, STOCK
from moe_routing.analysis.pairs import ToggledPairs
from moe_routing.analysis.tables import write_csv
from moe_routing.analysis.together import headroom, joint_removals
from moe_routing.config.study import CALIBRATION, StudyConfig
from moe_routing.errors import InputError
from moe_routing.evaluation.held_out_files import HeldOutFiles
from moe_routing.routing.calibration import SAMPLE_FILE, Calibration
from moe_routing.routing.nulls.needed import Needed, default_epsilon
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.strategies.testing import BH
from moe_routing.routing.toggles import Toggles


def write_ablation(config: StudyConfig, results: Path) -> pd.DataFrame:
    """Write the tables of ``ablation/`` and return that of the false discoveries.

    ``ablation.csv``: :func:`false_discoveries` of every null and level. ``left_out.csv``:
    :func:`left_out` of the same rules and of the study's BH arm, with its floor and cap
    (``bounded``). ``states.csv``: :func:`false_kept` of that arm in the states of the stock model
    and in its own. All three are about held-out calibration text. By ``text``:
    ``needed_experts.csv``, ``class_contrasts.csv`` and ``presence.csv``
    (:mod:`moe_routing.analysis.needs`), ``joint_removals.csv`` and ``headroom.csv``
    (:mod:`moe_routing.analysis.together`).

    Raises:
        InputError: a missing or damaged file, or a null that was fitted on too few tokens for a
            level.
    """
    nulls = config.analysis.ablation.nulls or config.calibration.nulls
    folder = results / "calibration"
    arm = config.bh_arm(CalibrationSample.load(folder / SAMPLE_FILE).top_k)
    calibration = Calibration.load(folder, list(dict.fromkeys([*nulls, arm.needs_null])))
    judge = _Judge.of(config, calibration)
    # A cap would leave out discoveries.
    most = calibration.sample.num_experts
    rules = [
        BH.against(null, max_k=most, alpha=alpha)
        for null in nulls
        for alpha in config.analysis.ablation.alpha
    ]
    files = HeldOutFiles(results)
    main, routed = Toggles.load(files.toggles(CALIBRATION)), Toggles.load(files.routed)
    tables = judge.rules(rules, arm, main)
    tables["states"] = judge.states(arm, {STOCK: main, ROUTED: routed})
    parts = [judge.text(files, text) for text in config.held_out_texts]
    tables |= {name: pd.concat([part[name] for part in parts]) for name in parts[0]}
    for name, table in tables.items():
        write_csv(table, results / "ablation" / f"{name}.csv")
    return tables["ablation"]


@dataclass(frozen=True)
class _Judge:
    """The thresholds of a study, and how its intervals are made.

    Attributes:
        calibration: with the nulls.
        epsilons: thresholds of KL: the study's own, then those of the other nulls ``needed``.
        losses: thresholds of the change of the loss, that of the text first.
        confidence: level of the intervals.
        settings: the level, the number of resamples and the source of randomness, for functions
            that resample.
    """

    calibration: Calibration
    epsilons: list[float]
    losses: list[float]
    confidence: float
    settings: dict[str, Any]

    @classmethod
    def of(cls, config: StudyConfig, calibration: Calibration) -> _Judge:
        wanted, sample = config.analysis.ablation, calibration.sample
        own = config.calibration.epsilon
        own = own or default_epsilon(sample.num_layers, sample.num_experts)
        nulls = calibration.nulls.values()
        others = {null.epsilon for null in nulls if isinstance(null, Needed)} - {own}
        confidence = config.statistics.confidence
        return cls(
            calibration,
            [own, *sorted(others)],
            list(dict.fromkeys([wanted.primary_epsilon, *wanted.epsilon])),
            confidence,
            {
                "confidence": confidence,
                "resamples": config.analysis.resamples,
                "rng": np.random.default_rng(config.seed),
            },
        )

    @property
    def criteria(self) -> list[Criterion]:
        """When a discovery is false."""
        of_kl = (Criterion("kl", epsilon) for epsilon in self.epsilons)
        return [*of_kl, *(Criterion("loss", epsilon) for epsilon in self.losses)]

    def primary(self, null_id: str) -> dict[str, float]:
        """Return the thresholds that the text speaks of: a null ``needed`` has its own for KL."""
        null = self.calibration.null(null_id)
        epsilon = null.epsilon if isinstance(null, Needed) else self.epsilons[0]
        return {"kl": epsilon, "loss": self.losses[0]}

    def rules(self, rules: list[BH], arm: BH, toggles: Toggles) -> dict[str, pd.DataFrame]:
        """Return the false discoveries of rules and the model's own choice, and what they miss."""
        flags = {null.compensated for null in self.calibration.nulls.values()} | {False}
        pairs = {flag: ToggledPairs.of(toggles, compensated=flag) for flag in flags}
        own = own_choice(pairs[False], {"kl": self.epsilons[0], "loss": self.losses[0]})
        tables = [false_discoveries(pairs[False], own, self.criteria, **self.settings)]
        missed = []
        for rule, bounded in [*((rule, False) for rule in rules), (arm, True)]:
            null = rule.needs_null
            chosen_LTE = selected(rule, self.calibration, toggles, bounded=bounded)
            found = SelectedByRule(null, rule.alpha, chosen_LTE, self.primary(null))
            own_pairs = pairs[self.calibration.null(null).compensated]
            named = {"strategy": rule.id, "null": null, "alpha": rule.alpha, "bounded": bounded}
            lost = left_out(own_pairs, found, self.epsilons, confidence=self.confidence)
            missed.append(_named(lost, named))
            if not bounded:
                tables.append(false_discoveries(own_pairs, found, self.criteria, **self.settings))
        return {"ablation": pd.concat(tables), "left_out": pd.concat(missed)}

    def states(self, arm: BH, toggles: dict[str, Toggles]) -> pd.DataFrame:
        """Return the false discovery rate of an arm in states of different models.

        Nothing takes the place of a removed expert, also if the arm is compensated. In the states
        of the routed model the experts that the arm keeps are removed, at most as many as the model
        has by itself; the others are not judged.
        """
        epsilon, parts = self.primary(arm.needs_null)["kl"], []
        for states, one in toggles.items():
            pairs = ToggledPairs.of(one)
            kept_LTE = selected(arm, self.calibration, one, bounded=True)
            if states == ROUTED:
                kept_LTE &= pairs.own_LTE
            table = false_kept(pairs, kept_LTE, epsilon, **self.settings)
            named = {"strategy": arm.id, "alpha": arm.alpha, "states": states, "epsilon": epsilon}
            parts.append(_named(table, named))
        return pd.concat(parts)

    def text(self, files: HeldOutFiles, text: str) -> dict[str, pd.DataFrame]:
        """Return the tables of a text.

        Raises:
            InputError: the files are not about the same tokens.
        """
        pairs = ToggledPairs.of(Toggles.load(files.toggles(text)))
        tokens = pd.read_parquet(files.tokens(text))
        together = pd.read_parquet(files.together(text))
        document_T = tokens["document"].to_numpy()
        if not np.array_equal(document_T, pairs.document_T) or together["token"].max() >= len(
            tokens
        ):
            raise InputError(
                f"{files.tokens(text)}: other tokens than in {files.toggles(text)} or "
                f"{files.together(text)}; allowed: files of the same run"
            )
        tables = {
            "needed_experts": needed_experts(pairs, tokens, self.epsilons, **self.settings),
            "class_contrasts": class_contrasts(pairs, tokens, self.epsilons, **self.settings),
            "presence": presence(pairs, self.epsilons, confidence=self.confidence),
            "joint_removals": joint_removals(together, document_T, **self.settings),
            "headroom": headroom(together, document_T, **self.settings),
        }
        return {name: _named(table, {"text": text}) for name, table in tables.items()}


def _named(table: pd.DataFrame, columns: dict[str, Any]) -> pd.DataFrame:
    """Return a table with the same values in new first columns."""
    rest = table.columns
    return table.assign(**columns)[[*columns, *rest]]
