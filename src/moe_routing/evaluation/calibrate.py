"""Sample router logits on calibration text.

Shape letters: L layers, T tokens, E experts, B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_routing.engine.adapters import find_routers, router_fingerprint
from moe_routing.engine.loading import unpack
from moe_routing.engine.offload import weight_of
from moe_routing.engine.patching import sole_replacement
from moe_routing.engine.upcast import upcast
from moe_routing.errors import InputError, check_type
from moe_routing.evaluation.budgets import fit_budget
from moe_routing.evaluation.certify import certify, check_documents
from moe_routing.evaluation.fitting import DOCUMENTS
from moe_routing.evaluation.outputs import fit_expert_outputs
from moe_routing.evaluation.scales import fit_scale
from moe_routing.evaluation.toggles import toggle_experts
from moe_routing.evaluation.watch import watch_routers
from moe_routing.evaluation.windows import calibration_window, cut_windows, run_windows
from moe_routing.routing.calibration import Calibration, budgets_of
from moe_routing.routing.nulls import fit_null
from moe_routing.routing.sample import CalibrationSample
from moe_routing.routing.strategies import Budgeted, Strategy, parse_strategy
from moe_routing.routing.strategies.certified import Certified
from moe_routing.routing.types import centred_norms
from moe_routing.schema import build
from moe_routing.vocabulary import NeededId

Value = TypeVar("Value")


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
    strategies: Sequence[Strategy | str] = (),
    nulls: Sequence[str] | None = None,
    tokens: int = 8192,
    toggled_tokens: int = 400,
    epsilon: float | None = None,
    margin: float | None = None,
    documents: int = 128,
    window: int | None = None,
    dtype: torch.dtype | str | None = None,
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
        strategies: strategies, or their ids, to prepare; without ``nulls``, only what they need is
            fitted.
        nulls: ids of the nulls to fit; None: ``needed``, or those of the strategies.
        tokens: tokens whose router logits are kept, and on which the outputs of experts are
            measured, if there is a margin, a strategy needs them or one of the nulls is ``needed``.
        toggled_tokens: tokens whose experts are toggled, in the same cases.
        epsilon: what the id ``needed`` stands for, in nats; see :func:`fit_null`.
        margin: largest expected KL from the model's own predictions, nats per token, to certify.
        documents: texts to certify on, the last ones, at most half of them; nothing else is fitted
            on these.
        window: most tokens of a context; None: the model's longest sequence, and no more than
            ``tokens``.
        dtype: precision of the forward passes that router logits and expert outputs are taken from:
            ``float32``, also for a model of half precision, or None for the model's own. Toggles
            are computed in float32 in any case, and certificates in the model's own precision.
        seed: seed of shuffled contexts and of what is toggled.

    Raises:
        InputError: an argument of a wrong type or size, an unknown dtype, a model without
            the output layer that toggles, certificates and scales need; see
            :func:`sample_router_logits`, :func:`fit_expert_outputs`, :func:`toggle_experts`,
            :func:`fit_null`, :func:`certify`, :func:`fit_budget` and :func:`fit_scale`.
    """
    check_type("the model", model, nn.Module)
    check_type("the tokenizer", tokenizer, PreTrainedTokenizerBase)
    texts = _listed(texts, "texts", str)
    strategies = _listed(strategies, "strategies", str, Strategy)
    nulls = None if nulls is None else _listed(nulls, "nulls", str)
    _check_number("tokens", tokens)
    _check_number("toggled_tokens", toggled_tokens)
    _check_number("documents", documents)
    _check_number("window", 1 if window is None else window)
    _check_number("seed", seed, least=0)
    unpack(model)
    passes = _precision(model, dtype)
    parsed = [parse_strategy(one) for one in strategies]
    if nulls is None:
        nulls = [] if parsed else ["needed"]
    names = dict.fromkeys([*nulls, *(one.needs_null for one in parsed if one.needs_null)])
    rule = find_routers(model)[0].rule
    certified = {one.id: one for one in parsed if isinstance(one, Certified)}
    if margin is not None:
        check_type("margin", margin, float, int)
        own = build(Certified, {"max_k": rule.top_k, "margin": margin}, "calibrate")
        certified.setdefault(own.id, own)
    apart = texts[len(texts) - min(documents, len(texts) // 2) :] if certified else []
    texts = texts[: len(texts) - len(apart)]
    for strategy in certified.values():  # before time is spent on the rest
        check_documents(len(apart), strategy.margin)
    toggled = certified or any(map(NeededId.parse, names)) or any(p.needs_toggles for p in parsed)
    if (toggled or any(p.needs_scale for p in parsed)) and model.get_output_embeddings() is None:
        raise InputError(
            f"{type(model).__name__} has no output layer; allowed: a model with one, such as "
            "AutoModelForCausalLM loads, or nulls and strategies that need no predictions"
        )
    longest = calibration_window(model, window or tokens)
    with passes():
        sample = sample_router_logits(
            model, tokenizer, texts, tokens=tokens, window=longest, rng=np.random.default_rng(seed)
        )
    toggles = outputs = None
    if toggled or any(one.needs_outputs for one in parsed):
        with passes():
            outputs = fit_expert_outputs(model, tokenizer, texts, tokens=tokens, window=longest)
    if toggled and outputs is not None:
        toggles = toggle_experts(
            model,
            tokenizer,
            texts,
            outputs,
            tokens=toggled_tokens,
            window=window,
            rng=np.random.default_rng(seed),
        )
    fitted = {name: fit_null(name, sample, toggles, epsilon, outputs) for name in names}
    calibration = Calibration(sample, fitted, toggles, outputs)
    certificates = {
        name: certify(model, tokenizer, apart, strategy, calibration, window=window)
        for name, strategy in certified.items()
    }
    budgets = {
        name: fit_budget(
            model,
            tokenizer,
            texts[:DOCUMENTS],
            cast("Budgeted", parse_strategy(name)),
            calibration,
            window=window,
        )
        for name in budgets_of(parsed)
    }
    calibration = replace(calibration, certificates=certificates, budgets=budgets)
    scales = {
        one.id: fit_scale(model, tokenizer, texts[:DOCUMENTS], one, calibration, window=window)
        for one in parsed
        if one.needs_scale and not (one.needs_budget and budgets[one.needs_budget].left_out)
    }
    return replace(calibration, scales=scales)


def _check_number(name: str, number: int, least: int = 1) -> None:
    check_type(name, number, int)
    if number < least:
        raise InputError(f"{name} is {number}; allowed: at least {least}")


def _listed(values: Iterable[Value], name: str, *allowed: type) -> list[Value]:
    """Return an argument that holds several values.

    Raises:
        InputError: it is a single text, no iterable, or holds a value of another type.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"{name} is a {type(values).__name__}; allowed: a list")
    values = list(values)
    for value in values:
        check_type(f"one of the {name}", value, *allowed)
    return values


def _precision(
    model: PreTrainedModel, dtype: torch.dtype | str | None
) -> Callable[[], AbstractContextManager[None]]:
    """Return the context for forward passes in a precision.

    Raises:
        InputError: it is neither float32 nor the model's own.
    """
    name = str(dtype or model.dtype).removeprefix("torch.")
    own = str(model.dtype).removeprefix("torch.")
    if name == own:
        return nullcontext
    if name != "float32":
        raise InputError(f"dtype is '{name}'; allowed: float32, or the model's own {own}")
    return partial(upcast, model)


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
