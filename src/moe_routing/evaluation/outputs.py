"""Measure the outputs of all experts on calibration text, and fit predictors of their norms.

Shape letters: L layers, T tokens, E experts, H hidden size, B windows, S tokens of a window, X any
shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_routing.engine.adapters import experts_of_routers, find_routers, model_fingerprint, watched
from moe_routing.engine.all_experts import DenseExperts
from moe_routing.engine.module_types import Experts
from moe_routing.engine.patching import sole_replacement
from moe_routing.errors import InputError
from moe_routing.evaluation.ridge import held_out_r2, ridge
from moe_routing.evaluation.windows import cut_windows, run_windows
from moe_routing.routing.outputs import ExpertOutputs

FOLDS = 5
"""One in so many blocks of tokens is held out to measure how well a predictor predicts."""
TINY = torch.finfo(torch.float32).tiny
"""The least norm, so that the log of a dead expert's is finite."""


@torch.no_grad()
def fit_expert_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    tokens: int,
    window: int,
    batch_size: int = 16,
) -> ExpertOutputs:
    """Run all experts of the stock model on the first ``tokens`` tokens of ``texts``.

    The tokens, and their order, are those of :func:`sample_router_logits`. The model runs once, in
    its own precision; its experts then run on the inputs of their routers, layer by layer, in
    float32 or better. The router inputs of all layers stay on the host meanwhile.

    The predictors are ridge regressions of the log norm of an expert's output on the standardised
    router input, with the hidden size as penalty and the constant not penalised. The proportion of
    variance that they explain is measured on every fifth window by predictors that are fitted on
    the others; with fewer than five windows, on the last fifth of the tokens.

    Args:
        model: the stock model.
        tokenizer: its tokenizer.
        texts: documents that are not evaluated on.
        tokens: number of tokens.
        window: tokens of a window.
        batch_size: windows of a forward pass.

    Raises:
        InputError: the texts hold too few tokens, an output is not finite, or the model is routed.
    """
    if routing := sole_replacement(model):
        raise InputError(f"expert outputs: the model is {routing}; allowed: the stock model")
    ids_BS = cut_windows(tokenizer, texts, tokens, window)
    modules = experts_of_routers(model, "expert outputs")
    inputs = _router_inputs(model, ids_BS, tokens, batch_size)
    layers = tqdm(modules, desc="expert outputs", unit="layer")
    found = [
        [value.cpu() for value in _fit_layer(layer, module, hidden_TH, window)]
        for layer, (module, hidden_TH) in enumerate(zip(layers, inputs, strict=True))
    ]
    columns = map(torch.stack, zip(*found, strict=True))
    return ExpertOutputs(
        **dict(zip(_Layer._fields, columns, strict=True)),
        rule=find_routers(model)[0].rule,
        fingerprint=model_fingerprint(model),
    )


def _router_inputs(
    model: PreTrainedModel, ids_BS: Tensor, tokens: int, batch_size: int
) -> list[Tensor]:
    """Return what the router of each layer reads, (tokens, hidden), on the host.

    Raises:
        InputError: experts read something else.
    """
    routers = find_routers(model)
    parts: list[list[Tensor]] = [[] for _ in routers]

    def see(layer: int, hidden_TH: Tensor, *_: Tensor | None) -> None:
        parts[layer].append(hidden_TH.cpu())

    def check(layer: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(parts[layer]) > 1:  # the first batch shows it
            return
        read_TH, given_TH = inputs[0].flatten(0, -2).cpu().float(), parts[layer][0].float()
        same = read_TH.shape == given_TH.shape and torch.allclose(
            read_TH, given_TH, rtol=0, atol=0, equal_nan=True
        )
        if not same:
            raise InputError(
                f"expert outputs: the experts of layer {layer} read something else than their "
                "router; allowed: models in which both read the same hidden states"
            )

    with ExitStack() as stack:
        stack.enter_context(watched(model, see))
        for router in routers:
            hook = partial(check, router.layer)
            stack.callback(router.experts.register_forward_pre_hook(hook).remove)
        run_windows(model, ids_BS, batch_size, "router inputs")
    return [torch.cat(part)[:tokens] for part in parts]


class _Layer(NamedTuple):
    """The fields of :class:`ExpertOutputs` in one layer."""

    mean_LEH: Tensor
    log_mean_norm_LE: Tensor
    log_mean_deviation_LE: Tensor
    slope_LEH: Tensor
    offset_LE: Tensor
    deviation_slope_LEH: Tensor
    deviation_offset_LE: Tensor
    r2_L: Tensor
    deviation_r2_L: Tensor
    explained_L: Tensor
    sample_log_norm_LTE: Tensor
    sample_log_deviation_LTE: Tensor


def _fit_layer(layer: int, module: Experts, hidden_TH: Tensor, window: int) -> _Layer:
    experts = DenseExperts.load(module)
    hidden_TH = experts.inputs(hidden_TH)
    mean_EH = experts.mean_output(hidden_TH)
    norm_TE, deviation_TE = (part.double() for part in experts.norms(hidden_TH, mean_EH))
    if not bool((norm_TE + deviation_TE).isfinite().all()):
        raise InputError(
            f"expert outputs: an output in layer {layer} is not finite; allowed: numbers (check "
            "the weights and the dtype)"
        )
    held_T = held_out(len(hidden_TH), window).to(hidden_TH.device)
    norm, deviation = (
        _predict(hidden_TH.double(), _log(part_TE), held_T) for part_TE in (norm_TE, deviation_TE)
    )
    return _Layer(
        mean_LEH=mean_EH.float(),
        log_mean_norm_LE=_log(norm_TE.mean(0)).float(),
        log_mean_deviation_LE=_log(deviation_TE.mean(0)).float(),
        slope_LEH=norm.slope_EH,
        offset_LE=norm.offset_E,
        deviation_slope_LEH=deviation.slope_EH,
        deviation_offset_LE=deviation.offset_E,
        r2_L=norm.r2,
        deviation_r2_L=deviation.r2,
        explained_L=mean_EH.double().square().sum()
        / norm_TE.square().mean(0).sum().clamp(min=TINY),
        sample_log_norm_LTE=norm.log_TE,
        sample_log_deviation_LTE=deviation.log_TE,
    )


def _log(norm_X: Tensor) -> Tensor:
    return norm_X.clamp(min=TINY).log()


def held_out(tokens: int, window: int) -> Tensor:
    """Return which tokens are held out: every fifth window, or the last fifth, bool, (tokens,)."""
    block = max(1, min(window, -(-tokens // FOLDS)))
    return torch.arange(tokens) // block % FOLDS == FOLDS - 1


class _Predicted(NamedTuple):
    """A predictor of one log norm in one layer, float32, and its predictions."""

    slope_EH: Tensor
    offset_E: Tensor
    r2: Tensor
    log_TE: Tensor


def _predict(hidden_TH: Tensor, log_TE: Tensor, held_T: Tensor) -> _Predicted:
    """Fit a predictor to all tokens, and measure it on those that are held out."""
    fitted = ridge(hidden_TH, log_TE)
    tested = ridge(hidden_TH[~held_T], log_TE[~held_T])
    return _Predicted(
        fitted.slope_EH.float(),
        fitted.offset_E.float(),
        held_out_r2(tested(hidden_TH[held_T]), log_TE[held_T]),
        fitted(hidden_TH).float(),
    )
