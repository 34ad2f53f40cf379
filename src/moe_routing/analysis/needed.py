"""Whether the null ``needed`` keeps its promise: on held-out text, and where experts are dead.

Shape letters: L layers, T tokens, E experts, P toggled pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_routing.analysis.held_out import (
    Judged,
    LevelsOf,
    count_parts,
    document_limits,
    estimate,
    fewest_selected,
    rejections,
    with_mean,
)
from moe_routing.analysis.outputs import ALL_LAYERS, BH_RULE, BLOCK_EXACT, BY_RULE
from moe_routing.analysis.tables import read_csv
from moe_routing.config.study import CALIBRATION
from moe_routing.evaluation.held_out_files import HeldOutFiles
from moe_routing.routing.nulls.needed import FREE_SCORES, Needed, not_needed, statistics
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.procedures import bh_levels, by_levels
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.toggles import Toggles
from moe_routing.statistics.bootstrap import bootstrap_items, studentised_interval
from moe_routing.statistics.proportions import clustered_wilson, wilson_interval
from moe_routing.vocabulary import ExpertScore

LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
"""The levels that the false discovery rate is measured at."""
CALIBRATIONS = 20
"""Calibrations with resampled documents."""
FEWEST_SLOTS = 10
"""Experts with fewer selected and toggled slots are left out of those that are compared."""
WORST = 20
"""Rows of the table of worst experts."""


@dataclass(frozen=True)
class Procedure:
    """A step-up procedure and the p-values that it is applied to.

    Attributes:
        name: in tables.
        levels: its levels.
        null: which p-values of a fitted null it uses.
    """

    name: str
    levels: LevelsOf
    null: Callable[[Needed], Needed] = lambda null: null

    def counts(self, null: Needed, tested: Judged, max_k: int) -> dict[float, Tensor]:
        """Return the selected experts by level, (layers, tokens).

        Levels are left out at which the resolution of the p-values allows no selection of at most
        ``max_k`` experts.
        """
        used = self.null(null)
        p_LTN = tested.p_values(used)
        experts = p_LTN.shape[2]
        of_level = {alpha: self.levels(experts, alpha) for alpha in LEVELS}
        return {
            alpha: rejections(p_LTN, level_E)
            for alpha, level_E in of_level.items()
            if fewest_selected(used, level_E) <= max_k
        }

    def fewest(self, null: Needed, alpha: float) -> int:
        """Return the smallest number of experts that the resolution allows it to select."""
        experts = null.rank_weight_E.shape[0]
        return fewest_selected(self.null(null), self.levels(experts, alpha))


PROCEDURES = (
    Procedure(BH_RULE, bh_levels),
    Procedure(BY_RULE, by_levels),
    Procedure(BLOCK_EXACT, bh_levels, lambda null: null.block_exact()),
)


@dataclass(frozen=True)
class Verification:
    """A fitted null ``needed`` and what it is verified with.

    Attributes:
        sample: the calibration sample.
        toggles: toggled experts that the null is fitted on.
        outputs: outputs of the model's experts.
        null: the null.
        alpha: level of the study's BH arm.
        max_k: its cap.
        files: the held-out interventions.
        texts: their texts, calibration text first.
        confidence: level of the intervals.
        resamples: number of bootstrap resamples.
        rng: source of randomness.
    """

    sample: CalibrationSample
    toggles: Toggles
    outputs: ExpertOutputs
    null: Needed
    alpha: float
    max_k: int
    files: HeldOutFiles
    texts: Sequence[str]
    confidence: float
    resamples: int
    rng: np.random.Generator

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return all tables, by file name without suffix."""
        held_out = {text: Toggles.load(self.files.toggles(text)) for text in self.texts}
        tested = {
            text: Judged.of(self.null, toggles, self.outputs) for text, toggles in held_out.items()
        }
        own = tested[CALIBRATION]
        return {
            "false_discoveries": self.false_discoveries(tested),
            "resampled": self.resampled(own),
            "worst_experts": self.worst_experts(own),
            "dead_layers": self.dead_layers(own),
            "dead_experts": self.dead_experts(),
            "scores": self.scores(own),
        }

    def false_discoveries(self, tested: dict[str, Judged]) -> pd.DataFrame:
        """Return the rate by text, procedure, part, level and layer.

        Columns: those of :func:`moe_routing.analysis.held_out.held_out_fdr`, and ``fewest``, the
        smallest number of experts that the resolution of the p-values allows. Levels at which that
        is above the cap of the BH arm are left out.
        """
        parts = [self._estimates(self.null, own).assign(text=text) for text, own in tested.items()]
        return _first(pd.concat(parts, ignore_index=True), "text", "procedure", "part", "alpha")

    def _estimates(self, null: Needed, tested: Judged) -> pd.DataFrame:
        """Return rates of every procedure; all share the resampled documents."""
        parts = []
        for procedure in PROCEDURES:
            counts = count_parts(procedure.counts(null, tested, self.max_k), self.max_k)
            for key, *counted in counts:
                fewest = procedure.fewest(null, key["alpha"])
                parts.append(({**key, "procedure": procedure.name, "fewest": fewest}, *counted))
        return estimate(tested, parts, **self._interval)

    @property
    def _interval(self) -> dict[str, Any]:
        return {"confidence": self.confidence, "resamples": self.resamples, "rng": self.rng}

    def resampled(self, judged: Judged) -> pd.DataFrame:
        """Return the rate of BH in calibrations whose documents are resampled.

        As many documents of the calibration as there are, drawn with replacement: the pairs of a
        document that is drawn m times count m times. The score and its predictors are kept.
        Columns: ``calibration``, ``alpha``, ``layer``, ``fdr``, ``mean_rejected``.
        """
        fit, null = self.toggles, self.null
        statistic_LTE = statistics(fit, self.outputs, null.name, null.score)
        null_P = not_needed(fit, null.name, null.epsilon)
        tables = []
        for number, toggles in enumerate(self._redrawn()):
            redrawn = self._judged(toggles, statistic_LTE, null_P)
            for alpha, count_LT in PROCEDURES[0].counts(redrawn, judged, self.max_k).items():
                table = pd.DataFrame({"layer": _layers(len(count_LT))})
                table["fdr"] = with_mean(judged.proportion(count_LT)).mean(0)
                table["mean_rejected"] = with_mean(count_LT).mean(0)
                tables.append(table.assign(calibration=number, alpha=alpha))
        return _first(pd.concat(tables, ignore_index=True), "calibration", "alpha")

    def scores(self, own: Judged) -> pd.DataFrame:
        """Return what BH keeps on held-out calibration text, by the score that it tests.

        The null of each score that is free is fitted on the same pairs.

        Columns: ``score``, ``chosen`` (whether the study's null tests it), ``alpha``, those of
        :func:`moe_routing.analysis.held_out.held_out_fdr` for the rule over all layers, and
        ``ratio`` with ``ratio_low`` and ``ratio_high``: experts kept, relative to those kept with
        the probability (studentised bootstrap over documents).
        """
        fit, name = self.toggles, self.null.name
        null_P = not_needed(fit, name, self.null.epsilon)
        tables, base_T = [], {}
        for score in FREE_SCORES:
            null = self._judged(fit, statistics(fit, self.outputs, name, score), null_P, score)
            tested = Judged.of(null, own.toggles, self.outputs)
            counts = PROCEDURES[0].counts(null, tested, self.max_k)
            table = estimate(tested, count_parts(counts, None), **self._interval)
            table = table[table["layer"] == ALL_LAYERS].set_index("alpha")
            for alpha, count_LT in counts.items():
                kept_T = with_mean(count_LT)[:, -1]
                ratio = self._ratio(kept_T, base_T.setdefault(alpha, kept_T), tested.document_T)
                table.loc[alpha, ["ratio", "ratio_low", "ratio_high"]] = ratio
            table = table.reset_index().drop(columns=["part", "cap_proportion"])
            tables.append(table.assign(score=score, chosen=score == self.null.score))
        return _first(pd.concat(tables, ignore_index=True), "score", "chosen", "alpha")

    def _ratio(
        self,
        value_T: NDArray[np.float64],
        base_T: NDArray[np.float64],
        document_T: NDArray[np.int64],
    ) -> tuple[float, float, float]:
        """Return the ratio of two sums over tokens, and its limits; NaN if the second is 0."""
        if not base_T.any():
            return np.nan, np.nan, np.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            boot = bootstrap_items(
                value_T[:, None], base_T, document_T, resamples=self.resamples, rng=self.rng
            )
        low_1, high_1 = studentised_interval(boot, self.confidence)
        return float(boot.ratio_S[0]), float(low_1[0]), float(high_1[0])

    def _redrawn(self) -> Iterator[Toggles]:
        """Yield the toggles of the calibration with the weights of resampled documents."""
        fit = self.toggles
        document_P = fit.document_P.unique(return_inverse=True)[1]
        documents = int(document_P.max()) + 1
        for _ in range(CALIBRATIONS):
            drawn = self.rng.multinomial(documents, np.full(documents, 1 / documents))
            weight_P = fit.sampling_weight_P * torch.from_numpy(drawn)[document_P]
            yield replace(fit, sampling_weight_P=weight_P)

    def _judged(
        self,
        toggles: Toggles,
        statistic_LTE: Tensor,
        null_P: Tensor,
        score: ExpertScore | None = None,
    ) -> Needed:
        """Fit the null on pairs that are already judged, perhaps by another score."""
        return Needed.of_pairs(
            toggles,
            statistic_LTE,
            null_P,
            name=self.null.name,
            epsilon=self.null.epsilon,
            score=score or self.null.score,
        )

    def worst_experts(self, tested: Judged) -> pd.DataFrame:
        """Return the experts whose selected slots are least needed, at the BH arm.

        A slot is a token that the expert is selected for, floor and cap included. The proportion of
        slots that are not needed is estimated on the toggled ones, with their sampling weights;
        Wilson's limits are at the effective number of slots (Kish). ``joint_low`` and
        ``joint_high`` are simultaneous (Bonferroni) over the ``n_experts`` with at least
        ``FEWEST_SLOTS`` toggled slots. The ``WORST`` with the largest ``joint_low`` are returned.

        Columns: ``layer``, ``expert``, ``slots``, ``toggled``, ``not_needed``, ``low``, ``high``,
        ``joint_low``, ``joint_high``, ``alpha``, ``max_k``, ``n_experts``, ``n_documents``.
        """
        p_LTN = tested.p_values(self.null)
        count_LT = rejections(p_LTN, bh_levels(p_LTN.shape[2], self.alpha)).clamp(1, self.max_k)
        toggles, selected_P = tested.toggles, tested.selected(count_LT)
        pairs = pd.DataFrame(
            {
                "layer": toggles.layer_P[selected_P],
                "expert": toggles.expert_P[selected_P],
                "weight": toggles.sampling_weight_P[selected_P],
                "false": tested.false_P[selected_P],
            }
        )
        pairs["square"] = pairs["weight"] ** 2
        sums = pairs.groupby(["layer", "expert"]).sum().reset_index()
        sums["toggled"] = pairs.groupby(["layer", "expert"]).size().to_numpy()
        slots_LE = (tested.rank_LTE < count_LT[..., None]).sum(1).numpy()
        sums["slots"] = slots_LE[sums["layer"], sums["expert"]]
        used = sums[sums["toggled"] >= FEWEST_SLOTS].reset_index(drop=True)
        used["not_needed"] = used["false"] / used["weight"]
        effective = used["weight"] ** 2 / used["square"]
        joint = 1 - (1 - self.confidence) / max(1, len(used))
        for prefix, level in (("", self.confidence), ("joint_", joint)):
            limits = [
                wilson_interval(share * n, n, level)
                for share, n in zip(used["not_needed"], effective, strict=True)
            ]
            used[[f"{prefix}low", f"{prefix}high"]] = np.array(limits).reshape(-1, 2)
        worst = used.sort_values(["joint_low", "not_needed"], ascending=False).head(WORST)
        documents = np.unique(tested.document_T).size
        return worst.drop(columns=["weight", "false", "square"]).assign(
            alpha=self.alpha, max_k=self.max_k, n_experts=len(used), n_documents=documents
        )

    def dead_layers(self, tested: Judged) -> pd.DataFrame:
        """Return how often anything is selected in a layer all of whose experts are dead.

        Without its experts a layer changes nothing, so H0 holds for every pair; and its router
        reads what it reads in the stock model, because the layers below are those of stock. So the
        null of the model without the experts of a layer has that layer's statistics of the
        calibration tokens as its draws, and the held-out tokens' statistics are tested. Every
        selection is false: the proportion of tokens with one is the false discovery rate.

        Columns: ``score`` (the probability, and the score of the study's null with its predictors
        of the living experts, which do not know), ``procedure`` (BH and BY), ``alpha``, ``layer``
        (``all``: mean over layers, each dead in a model of its own), ``any_proportion`` with
        ``low`` and ``high`` (Wilson, at the design effect of documents; over all layers the
        studentised bootstrap over documents), ``spread_low`` and ``spread_high`` (the smallest and
        largest of BH over calibrations with resampled documents), ``mean_rejected``, ``n_tokens``,
        ``n_documents``.
        """
        tables = []
        for score in dict.fromkeys(("probability", self.null.score)):
            name = self.null.name
            fitted_LTE = statistics(self.toggles, self.outputs, name, score)
            test_LTE = statistics(tested.toggles, self.outputs, name, score)
            all_P = torch.ones_like(self.toggles.layer_P, dtype=torch.bool)
            null = self._judged(self.toggles, fitted_LTE, all_P, score)
            own = Judged.by(test_LTE, tested.toggles, tested.false_P)
            for procedure in PROCEDURES[:2]:
                spread = self._spread(own, fitted_LTE, score) if procedure.name == BH_RULE else {}
                for alpha, count_LT in procedure.counts(null, own, 1).items():
                    table = self._any(count_LT, own).assign(score=score, alpha=alpha)
                    table[["spread_low", "spread_high"]] = spread.get(alpha, np.nan)
                    tables.append(table.assign(procedure=procedure.name))
        return _first(pd.concat(tables, ignore_index=True), "score", "procedure", "alpha")

    def _spread(
        self, own: Judged, fitted_LTE: Tensor, score: ExpertScore
    ) -> dict[float, NDArray[np.float64]]:
        """Return by level the smallest and largest proportion of tokens with any, (series, 2)."""
        all_P = torch.ones_like(self.toggles.layer_P, dtype=torch.bool)
        found: dict[float, list[NDArray[np.float64]]] = {alpha: [] for alpha in LEVELS}
        for toggles in self._redrawn():
            null = self._judged(toggles, fitted_LTE, all_P, score)
            for alpha, count_LT in PROCEDURES[0].counts(null, own, 1).items():
                found[alpha].append(with_mean(count_LT > 0).mean(0))
        return {
            alpha: np.stack([np.min(values, 0), np.max(values, 0)], axis=1)
            for alpha, values in found.items()
            if values
        }

    def _any(self, count_LT: Tensor, tested: Judged) -> pd.DataFrame:
        any_TS = with_mean((count_LT > 0).double())
        _, low_1, high_1 = document_limits(any_TS[:, -1:], tested.document_T, **self._interval)
        limits = [
            clustered_wilson(any_T, tested.document_T, self.confidence) for any_T in any_TS.T[:-1]
        ]
        table = pd.DataFrame({"layer": _layers(len(count_LT)), "any_proportion": any_TS.mean(0)})
        table[["low", "high"]] = np.array([*limits, (low_1[0], high_1[0])])
        table["mean_rejected"] = with_mean(count_LT).mean(0)
        documents = np.unique(tested.document_T).size
        return table.assign(n_tokens=len(any_TS), n_documents=documents)

    def dead_experts(self) -> pd.DataFrame:
        """Return the rate in the model with some dead experts, and how many kept slots are theirs.

        The null is fitted on interventions in that model, with the predictors of the living
        experts. Columns: those of :func:`moe_routing.analysis.held_out.held_out_fdr`; ``score``;
        ``dead_slots``, the proportion of kept slots that are dead, with ``dead_slots_low`` and
        ``dead_slots_high`` (tokens that keep none count as none dead: it is at most the rate);
        and ``dead``, the proportion of the layer's experts that are.
        """
        fit, test = (Toggles.load(self.files.dead(part)) for part in (CALIBRATION, "held_out"))
        null = Needed.fit(self.sample, fit, self.null.name, self.null.epsilon, self.outputs)
        tested = Judged.of(null, test, self.outputs)
        table = self._estimates(null, tested)
        dead_LE = _dead(read_csv(self.files.dead_experts), test)
        dead_LTN = dead_LE[:, None].expand_as(tested.order_LTN).gather(2, tested.order_LTN)
        dead_LTN = torch.nn.functional.pad(dead_LTN.cumsum(2), (1, 0))
        slots = []
        for procedure in PROCEDURES:
            counts = count_parts(procedure.counts(null, tested, self.max_k), self.max_k)
            for *_, selected_LT in counts:
                dead_LT = dead_LTN.gather(2, selected_LT[..., None])[..., 0]
                slots.append(with_mean(dead_LT / selected_LT.clamp(min=1)))
        limits = document_limits(np.concatenate(slots, axis=1), tested.document_T, **self._interval)
        for name, value_S in zip(("", "_low", "_high"), limits, strict=True):
            table[f"dead_slots{name}"] = value_S
        table["dead"] = float(dead_LE.double().mean())
        table["score"] = null.score
        return _first(table, "procedure", "part", "alpha")


def _dead(experts: pd.DataFrame, toggles: Toggles) -> Tensor:
    dead_LE = torch.zeros(toggles.num_layers, toggles.num_experts, dtype=torch.int64)
    dead_LE[experts["layer"].tolist(), experts["expert"].tolist()] = 1
    return dead_LE


def _layers(count: int) -> list[str]:
    return [*map(str, range(count)), ALL_LAYERS]


def _first(table: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """Return a table with its keys, then the layer, in front."""
    front = [*keys, "layer"]
    return table[front + [name for name in table if name not in front]]
