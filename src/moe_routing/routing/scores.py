"""Scores: what ranks experts, and is tested or compared with a threshold, apart from the weights.

Toggling an expert changes the layer's output by its weight times its output, and the prediction by
about the square of that. The router's weight is known; how large the output is, is predicted from
the router's input (:class:`moe_routing.routing.outputs.ExpertOutputs`). All scores are on the log
scale, in float32. With the weight g that the model gives, or would give, an expert:

============== =====================================================================================
probability    log g
mean_norm      log g + log of the expert's mean output norm
norm           log g + log of its norm, predicted for the token
exact_norm     log g + log of its norm for the token: every expert has to be computed
consequence    log c + 2 (log g + log of its predicted norm), the predicted change of the prediction
               in nats (KL); c is one constant per layer, from toggled experts
============== =====================================================================================

Where a dropped expert is replaced by its mean output, the norm is that of what is then missing: the
output minus the mean output.

Shape letters: L layers, T tokens, E experts, H hidden size, P pairs of a token and an expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_routing.errors import InputError
from moe_routing.routing.ordering import top_experts
from moe_routing.routing.sample import sample_inputs
from moe_routing.routing.toggles import Toggles
from moe_routing.vocabulary import Candidates, ExpertScore

if TYPE_CHECKING:
    from moe_routing.routing.calibration import Calibration
    from moe_routing.routing.nulls.base import Null
    from moe_routing.routing.outputs import ExpertOutputs
    from moe_routing.routing.rule import ModelRule
    from moe_routing.routing.strategies.base import Strategy
    from moe_routing.routing.types import RouterInputs


@dataclass(frozen=True)
class ExpertScorer:
    """Scores the experts of a layer.

    Attributes:
        score: which score.
        candidates: which experts may be selected; the others are masked.
        compensated: whether a dropped expert is replaced by its mean output.
        offset_LE: log of the mean norm, or the constant of its predictor, float32, (layers,
            experts); None if nothing is predicted.
        slope_LEH: the predictor's slope, float32; None if the norm is not predicted by token.
        log_constant_L: log c, float32, (layers,); None for other scores than ``consequence``.
    """

    score: ExpertScore
    candidates: Candidates = "all"
    compensated: bool = False
    offset_LE: Tensor | None = None
    slope_LEH: Tensor | None = None
    log_constant_L: Tensor | None = None

    @classmethod
    def of(cls, strategy: Strategy, calibration: Calibration | None) -> Self | None:
        """Return the scorer of a strategy; None if all experts are ranked by their logits.

        Raises:
            InputError: the calibration lacks what the score is made of.
        """
        score, candidates = strategy.score_of(calibration), strategy.candidates
        if score == "probability" and candidates == "all":
            return None
        outputs = calibration.outputs if calibration else None
        toggles = calibration.toggles if calibration else None
        label = f"strategy '{strategy.id}'"
        compensated = strategy.dropped == "compensated"
        return cls.build(
            score, outputs, toggles, label, candidates=candidates, compensated=compensated
        )

    @classmethod
    def build(
        cls,
        score: ExpertScore,
        outputs: ExpertOutputs | None,
        toggles: Toggles | None,
        label: str,
        *,
        candidates: Candidates = "all",
        compensated: bool = False,
    ) -> Self:
        """Return the scorer of a score.

        Args:
            score: which score.
            outputs: outputs of the model's experts on calibration text, for all scores but
                ``probability`` and ``exact_norm``.
            toggles: toggled experts of the model, for ``consequence``.
            label: who asks, for errors.
            candidates: which experts may be selected.
            compensated: whether a dropped expert is replaced by its mean output.

        Raises:
            InputError: outputs or toggles are missing, or fit no constant.
        """
        made = cls(score, candidates, compensated)
        if score in ("probability", "exact_norm"):
            return made
        word = score.replace("_", "-")
        if outputs is None:
            raise InputError(
                f"{label}: score '{word}' needs the outputs of the experts on calibration text; "
                "none given (allowed: a calibration with expert outputs)"
            )
        if score == "mean_norm":
            mean_LE = outputs.log_mean_deviation_LE if compensated else outputs.log_mean_norm_LE
            return replace(made, offset_LE=mean_LE)
        made = replace(
            made,
            offset_LE=outputs.deviation_offset_LE if compensated else outputs.offset_LE,
            slope_LEH=outputs.deviation_slope_LEH if compensated else outputs.slope_LEH,
        )
        if score == "norm":
            return made
        if toggles is None:
            raise InputError(
                f"{label}: score '{word}' needs toggled experts; none given (allowed: a "
                "calibration with toggles)"
            )
        constant_L = toggles.consequence_constants[int(compensated)]
        return replace(made, log_constant_L=constant_L.log().float())

    def to(self, device: torch.device | str) -> Self:
        """Return the scorer with its tables on a device, itself if they are there."""
        moved = {
            name: there
            for name in ("offset_LE", "slope_LEH", "log_constant_L")
            if (table := getattr(self, name)) is not None
            and (there := table.to(device)) is not table
        }
        return replace(self, **moved) if moved else self

    def __call__(self, inputs: RouterInputs) -> RouterInputs:
        """Return the inputs with scores, and with experts that are no candidates masked.

        Args:
            inputs: of one layer, with the model's rule.

        Raises:
            InputError: the exact norms are asked for and not known.
        """
        if self.candidates == "own":
            # The probabilities stay those of all experts.
            probability_TE = inputs.softmax_TE
            own_TK = inputs.own_TK
            if own_TK is None:
                own_TK = top_experts(probability_TE, cast("ModelRule", inputs.rule).top_k)
            own_TE = _only(inputs.logits_TE, own_TK)
            inputs = replace(inputs, logits_TE=own_TE, probability_TE=probability_TE, own_TK=own_TK)
        if self.score == "probability":
            return replace(inputs, score_TE=inputs.logits_TE)
        score_TE = self._log_score(inputs.layer, _log_weight(inputs), self._log_size(inputs))
        return replace(inputs, score_TE=score_TE)

    def _log_score(self, layer: int, log_weight_TE: Tensor, log_size_TE: Tensor) -> Tensor:
        """Return the scores; ``log_size_TE`` may be one row for all tokens."""
        score_TE = log_weight_TE + log_size_TE
        if self.log_constant_L is None:
            return score_TE
        return score_TE.mul_(2.0).add_(self.log_constant_L[layer])

    def of_sample(self, calibration: Calibration, layer: int) -> RouterInputs:
        """Return the calibration sample's router inputs of a layer, scored.

        Raises:
            InputError: the exact norms are asked for, which a sample does not have.
        """
        inputs, outputs = sample_inputs(calibration.sample, layer), calibration.outputs
        if self.slope_LEH is not None and outputs is not None:
            log_size_LTE = (
                outputs.sample_log_deviation_LTE
                if self.compensated
                else outputs.sample_log_norm_LTE
            )
            inputs = replace(inputs, log_size_TE=log_size_LTE[layer])
        return self(inputs)

    def of_toggles(self, toggles: Toggles, layer: int) -> Tensor:
        """Return the scores of all experts of the toggled tokens in a layer, (tokens, experts)."""
        log_weight_TE = toggles.weight_LTE[layer].log()
        if self.score == "probability":
            return log_weight_TE
        if self.score == "exact_norm":
            norm_LTE = toggles.deviation_LTE if self.compensated else toggles.norm_LTE
            log_size_TE = norm_LTE[layer].log()
        else:
            log_size_TE = self._predicted(layer, toggles.hidden_LTH[layer])
        return self._log_score(layer, log_weight_TE, log_size_TE)

    def _log_size(self, inputs: RouterInputs) -> Tensor:
        if inputs.log_size_TE is not None:
            return inputs.log_size_TE
        if self.score == "exact_norm":
            raise InputError(
                "score 'exact-norm' needs the outputs of all experts, which are computed only "
                "while the model runs; allowed where they are not: another score"
            )
        return self._predicted(inputs.layer, cast("Tensor", inputs.hidden_TH).detach())

    def _predicted(self, layer: int, hidden_TH: Tensor) -> Tensor:
        offset_E = cast("Tensor", self.offset_LE)[layer]
        if self.slope_LEH is None:
            return offset_E
        return F.linear(hidden_TH.float(), self.slope_LEH[layer], offset_E)


def scored_sample(strategy: Strategy, calibration: Calibration) -> list[RouterInputs]:
    """Return the calibration sample's router inputs by layer, as a strategy's selector sees them.

    Raises:
        InputError: the calibration lacks what the score is made of.
    """
    scorer, layers = ExpertScorer.of(strategy, calibration), range(calibration.sample.num_layers)
    if scorer is None:
        return [sample_inputs(calibration.sample, layer) for layer in layers]
    return [scorer.of_sample(calibration, layer) for layer in layers]


def null_sample(null: Null, calibration: Calibration, layer: int) -> RouterInputs:
    """Return the calibration sample's router inputs of a layer, scored as a null tests them.

    Raises:
        InputError: the calibration lacks what the score is made of.
    """
    if null.score == "probability":
        return sample_inputs(calibration.sample, layer)
    scorer = ExpertScorer.build(
        null.score,
        calibration.outputs,
        calibration.toggles,
        f"null '{null.id}'",
        compensated=null.compensated,
    )
    return scorer.of_sample(calibration, layer)


def _log_weight(inputs: RouterInputs) -> Tensor:
    """Return the log of the weight that the model gives, or would give, every expert, float32.

    Logits differ from the logs of probabilities by one number per token, which that of the largest
    gives: this is faster than the log of every probability, and does not underflow.
    """
    logits_TE, probability_TE = inputs.logits_TE.detach().float(), inputs.softmax_TE.detach()
    shift_T1 = probability_TE.amax(1, keepdim=True).log_() - logits_TE.amax(1, keepdim=True)
    scale_T1 = inputs.rule.scale(probability_TE, inputs.own_TK) if inputs.rule else None
    if scale_T1 is not None:
        shift_T1 += scale_T1.log_()
    return logits_TE + shift_T1


def _only(logits_TE: Tensor, own_TK: Tensor) -> Tensor:
    """Return the logits of some experts of each token, -inf for all others."""
    masked_TE = torch.full_like(logits_TE, -math.inf)
    return masked_TE.scatter_(1, own_TK, logits_TE.gather(1, own_TK))
