"""Sample router logits on calibration text.

Shape letters: L layers, T tokens, E experts, B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_routing.engine.adapters import find_routers, router_fingerprint
from moe_routing.engine.offload import weight_of
from moe_routing.engine.patching import sole_replacement
from moe_routing.errors import InputError
from moe_routing.evaluation.certify import certify, check_documents
from moe_routing.evaluation.outputs import fit_expert_outputs
from moe_routing.evaluation.toggles import toggle_experts
from moe_routing.evaluation.watch import watch_routers
from moe_routing.evaluation.windows import calibration_window, cut_windows, run_windows
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.nulls import fit_null
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.strategies.certified import Certified
from moe_routing.routing.types import centred_norms
from moe_routing.vocabulary import NeededId


def sample_router_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    tokens: int,
    window: int,
    rng: np.random.Generator,
    batch_size: int = 16,
) -> CalibrationSample:
    """Run the stock model on ``texts`` and keep the router logits of the first ``tokens`` tokens.

    Texts are joined by the end-of-text token and cut into windows. The same windows with their
    tokens shuffled (``rng``) give each token in a mismatched context.

    Raises:
        InputError: the texts hold fewer than ``tokens`` tokens, a logit is not finite, or the model
            is routed and not stock.
    """
    if routing := sole_replacement(model):
        raise InputError(f"calibration: the model is {routing}; allowed: the stock model")
    ids_BS = cut_windows(tokenizer, texts, tokens, window)
    shuffled_BS = torch.from_numpy(rng.permuted(ids_BS.numpy(), axis=1))
    routers = find_routers(model)
    experts = [router.num_experts for router in routers]
    if len(set(experts)) > 1:
        raise InputError(
            f"calibration: the model's layers have {min(experts)} to {max(experts)} experts; "
            "allowed: the same number in each (strategies without a calibration still route it)"
        )
    logits_LTE, norm_LT, choice_LTE = _collect(model, ids_BS, tokens, batch_size, "calibrate")
    permuted_LTE, permuted_norm_LT, _ = _collect(
        model, shuffled_BS, tokens, batch_size, "mismatched context"
    )
    weights = [weight_of(router.linear).float().cpu() for router in routers]
    return CalibrationSample(
        logits_LTE=logits_LTE,
        permuted_LTE=permuted_LTE,
        input_norm_LT=norm_LT,
        permuted_norm_LT=permuted_norm_LT,
        centred_norm_LE=torch.stack([centred_norms(weight_EH) for weight_EH in weights]),
        hidden_size=weights[0].shape[1],
        rule=routers[0].rule,
        fingerprint=router_fingerprint(model),
        choice_LTE=choice_LTE,
    )


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    nulls: tuple[str, ...] = ("needed",),
    tokens: int = 8192,
    toggled_tokens: int = 400,
    epsilon: float | None = None,
    margin: float | None = None,
    documents: int = 128,
    seed: int = 0,
) -> Calibration:
    """Calibrate a model on your own text, for :func:`moe_routing.routed`.

    With a ``margin`` it also certifies routing: the fewest experts for which a new document's
    predictions are expected to be at most so far from the model's own. The strategy is
    ``certified_k8_m001`` on a model with 8 experts per token and a margin of 0.01.

    Args:
        model: a transformers model with supported routers.
        tokenizer: its tokenizer.
        texts: documents that are not evaluated on; at least ``tokens`` tokens.
        nulls: ids of the nulls to fit.
        tokens: tokens whose router logits are kept, and on which the outputs of experts are
            measured, if there is a margin or one of the nulls is ``needed``.
        toggled_tokens: tokens whose experts are toggled, in the same cases.
        epsilon: what the id ``needed`` stands for, in nats; see :func:`fit_null`.
        margin: largest expected KL from the model's own predictions, nats per token, to certify.
        documents: texts to certify on, the last ones, at most half of them; nothing else is fitted
            on these.
        seed: seed of shuffled contexts and of what is toggled.

    Raises:
        InputError: see :func:`sample_router_logits`, :func:`fit_expert_outputs`,
            :func:`toggle_experts`, :func:`fit_null` and :func:`certify`.
    """
    texts, window = list(texts), calibration_window(model, None)
    apart = texts[len(texts) - min(documents, len(texts) // 2) :] if margin is not None else []
    texts = texts[: len(texts) - len(apart)]
    if margin is not None:  # before time is spent on the rest
        check_documents(len(apart), margin)
    sample = sample_router_logits(
        model, tokenizer, texts, tokens=tokens, window=window, rng=np.random.default_rng(seed)
    )
    toggles = outputs = None
    if margin is not None or any(NeededId.parse(name) for name in nulls):
        outputs = fit_expert_outputs(model, tokenizer, texts, tokens=tokens, window=window)
        toggles = toggle_experts(
            model,
            tokenizer,
            texts,
            outputs,
            tokens=toggled_tokens,
            rng=np.random.default_rng(seed),
        )
    fitted = {name: fit_null(name, sample, toggles, epsilon, outputs) for name in nulls}
    calibration = Calibration(sample, fitted, toggles, outputs)
    if margin is None:
        return calibration
    strategy = Certified(max_k=sample.top_k, margin=margin)
    certificate = certify(model, tokenizer, apart, strategy, calibration)
    return replace(calibration, certificates={strategy.id: certificate})


def _collect(
    model: PreTrainedModel, ids_BS: Tensor, tokens: int, batch_size: int, label: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return float32 logits, (layers, tokens, experts), input norms, (layers, tokens), and choices.

    Choices are what ranks the experts, (layers, tokens, experts), if that is not the logit.
    """
    with watch_routers(model) as watch:
        run_windows(model, ids_BS, batch_size, label)
    logits_LTE = watch.logits_LTE("calibration")
    choice_LTE = watch.choice_LTE()
    choice_LTE = None if choice_LTE is None else choice_LTE[:, :tokens].contiguous()
    norm_LT = watch.norm_LT()[:, :tokens].contiguous()
    return logits_LTE[:, :tokens].contiguous(), norm_LT, choice_LTE
