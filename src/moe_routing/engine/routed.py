"""Apply a routing strategy to a model temporarily.

Shape letters: T tokens, K slots per token, E experts, H hidden size.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_routing.engine.adapters import (
    RouterModule,
    experts_of_routers,
    find_experts,
    find_routers,
    model_fingerprint,
    router_fingerprint,
)
from moe_routing.engine.all_experts import DenseExperts
from moe_routing.engine.context import (
    ForwardContext,
    Sums,
    current_context,
    forward_context,
    is_in_context,
    pass_dropped_weights,
    take_dropped_weights,
)
from moe_routing.engine.experts import EXPERTS_IMPLEMENTATION
from moe_routing.engine.module_types import Experts
from moe_routing.engine.offload import weight_of
from moe_routing.engine.patching import Forward, itself, patched_forward, replacements
from moe_routing.engine.recorder import Recorder
from moe_routing.errors import InputError, WeightingWarning, check_type
from moe_routing.routing.calibration import Calibration
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.scores import ExpertScorer
from moe_routing.routing.strategies import Strategy, parse_strategy
from moe_routing.routing.types import RouterInputs, Selection, Selector
from moe_routing.routing.weighting import Router
from moe_routing.vocabulary import NeededId

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Function = TypeVar("Function", bound=Callable)


@contextmanager
def routed(
    model: PreTrainedModel,
    strategy: Strategy | str,
    *,
    calibration: Calibration | Path | str | None = None,
    recorder: Recorder | None = None,
    experts_implementation: str | None = EXPERTS_IMPLEMENTATION,
) -> Iterator[PreTrainedModel]:
    """Route ``model`` by ``strategy`` inside the context; restore it exactly on leaving.

    The model is routed in every thread that runs it. A copy made inside the context is a stock
    model. Accelerate's hooks load offloaded weights, as for the stock model.

    Args:
        model: a transformers model with supported routers.
        strategy: a strategy or its id, such as ``"bh_k16_a005"``.
        calibration: needed by strategies that test against a null, use thresholds, predict how
            large the outputs of experts are, or replace dropped ones; an object or a folder written
            by the calibrate step.
        recorder: collects routing statistics.
        experts_implementation: how experts are computed inside the context; None keeps the
            model's own setting.

    Warns:
        WeightingWarning: the strategy weights experts otherwise than the model.

    Raises:
        InputError: an argument of a wrong type; an unknown strategy; more experts than the model
            has; a calibration that is missing, lacks something, or belongs to another model; a
            compensated strategy with other weights than the model's; a model without a supported
            router, with router weights that cannot be read, or that is routed already; experts
            whose output cannot be changed, or an experts implementation that is unknown or cannot
            be chosen.

    Example::

        with routed(model, "stock_k4"):
            model.generate(**inputs)
    """
    check_type("the model", model, nn.Module)
    if recorder is not None:
        check_type("the recorder", recorder, Recorder)
    strategy = parse_strategy(strategy)
    routers = find_routers(model)
    calibration = _check(model, strategy, routers, calibration)
    fitted = strategy.fitted(calibration)
    # Layers that agree on the rule share a selector, which may be expensive to build.
    resolved = {router.rule: fitted.resolved(router.rule) for router in routers}
    _warn_of_weighting(strategy, routers[0].rule)
    # Errors name the strategy as given; static top-k has no errors, and may get its k here.
    static = strategy.family.static_weighting is not None
    scorer = ExpertScorer.of(strategy, calibration)
    compensated = strategy.dropped == "compensated"
    built = {
        (rule, experts): Router(
            (resolved[rule] if static else fitted).selector(calibration, experts),
            resolved[rule].weighting_kind,
            rule,
            scorer,
            compensated,
            strategy.output_scale(calibration),
        )
        for rule, experts in {(router.rule, router.num_experts) for router in routers}
    }
    if _is_foreign(strategy):
        built = {
            key: replace(router, select=distinct(router.select, strategy.id))
            for key, router in built.items()
        }
    exact = scorer is not None and scorer.score == "exact_norm"
    part = "compensated" if compensated else "exact-norm"
    experts = (
        experts_of_routers(model, f"strategy '{strategy.id}', part '{part}'")
        if compensated or exact
        else []
    )
    outputs = calibration.outputs if calibration else None
    mean_LEH = outputs.mean_LEH if outputs and compensated else None
    with ExitStack() as stack:
        if recorder is not None:
            record = partial(RecordedForward, recorder)
            stack.enter_context(patched_forward(_decoder(model), record))
        for router in routers:
            rule, layer = router.rule, router.layer
            mean_EH = None if mean_LEH is None else mean_LEH[layer]
            sizes = partial(_exact_sizes, experts[layer], mean_EH) if exact else None
            forward = partial(
                RouterForward,
                router,
                built[rule, router.num_experts],
                resolved[rule],
                recorder,
                sizes,
            )
            new = patched_forward(router.module, forward, f"routed by '{strategy.id}'")
            stack.enter_context(new)
            if mean_EH is not None:
                add_means = partial(CompensatedForward, mean_EH)
                stack.enter_context(patched_forward(experts[layer], add_means))
        if experts_implementation is not None:
            stack.enter_context(chosen_experts(model, experts_implementation))
        yield model


def _check(
    model: PreTrainedModel,
    strategy: Strategy,
    routers: list[RouterModule],
    calibration: Calibration | Path | str | None,
) -> Calibration | None:
    experts = min(router.num_experts for router in routers)
    most = max(strategy.resolved(router.rule).max_experts for router in routers)
    if most > experts:
        raise InputError(
            f"strategy '{strategy.id}' may select {most} experts; "
            f"allowed: at most the model's {experts}"
        )
    weight_of(routers[0].linear)  # raises if it cannot be read
    for router in routers if strategy.dropped == "compensated" else ():
        kind = strategy.resolved(router.rule).weighting_kind
        if kind not in ("model", router.rule.weighting):
            raise InputError(
                f"strategy '{strategy.id}' has {kind} weights; allowed with 'compensated': the "
                f"model's own, {router.rule.weighting}"
            )
    if not strategy.uses_calibration:
        return None
    if calibration is None:
        raise InputError(f"strategy '{strategy.id}' needs a calibration of this model; none given")
    check_type("the calibration", calibration, Calibration, str, Path)
    if not isinstance(calibration, Calibration):
        calibration = Calibration.for_strategies(calibration, strategy)
    if calibration.sample.fingerprint != router_fingerprint(model):
        raise InputError(
            f"strategy '{strategy.id}': the calibration was made on other router weights "
            f"({calibration.sample.num_layers} layers, {calibration.sample.num_experts} experts); "
            f"make one on this model ({len(routers)} layers, {experts} experts)"
        )
    if strategy.dropped == "compensated" and calibration.outputs is None:
        raise InputError(
            f"strategy '{strategy.id}' needs the mean outputs of the experts on calibration text; "
            "none given (allowed: a calibration with expert outputs)"
        )
    _check_weights(model, strategy, calibration)
    return calibration


def _check_weights(model: PreTrainedModel, strategy: Strategy, calibration: Calibration) -> None:
    """Check that what the strategy uses of a calibration belongs to this model's weights."""
    toggled = strategy.needs_toggles or NeededId.parse(strategy.needs_null or "")
    used = {
        "toggled experts": calibration.toggles if toggled else None,
        "computed expert outputs": calibration.outputs if strategy.needs_outputs else None,
        "certified a strategy": strategy.certificate_of(calibration),
    }
    present = {did: part.fingerprint for did, part in used.items() if part is not None}
    fingerprint = model_fingerprint(model) if present else None
    for did, found in present.items():
        if found != fingerprint:
            raise InputError(
                f"strategy '{strategy.id}': the calibration {did} of a model with other weights or "
                "of another dtype; make a calibration on this one"
            )


def _exact_sizes(experts: Experts, mean_EH: Tensor | None, hidden_TH: Tensor) -> Tensor:
    """Return |o|, or |o - mean|, of the outputs o of all experts, (tokens, experts).

    The weights are converted anew each time, so that no second copy of all layers is held.
    """
    if mean_EH is None:
        no_mean_EH = hidden_TH.new_zeros(experts.num_experts, hidden_TH.shape[1])
        return DenseExperts.load(experts).norms(hidden_TH.detach(), no_mean_EH)[0].float()
    return DenseExperts.load(experts).norms(hidden_TH.detach(), mean_EH)[1].float()


def _is_foreign(strategy: Strategy) -> bool:
    """Return whether a strategy, or the one that it is a control of, is of another package."""
    rules = (strategy, getattr(strategy, "base", strategy))
    return any(not type(rule).__module__.startswith("moe_routing.") for rule in rules)


def distinct(select: Selector, strategy_id: str) -> Selector:
    """Return a selector that checks what another one selects.

    Raises:
        InputError: when called, for ids that are no experts or repeated, or wrong counts.
    """

    def checked(inputs: RouterInputs, probability_TE: Tensor) -> Selection:
        selection, experts = select(inputs, probability_TE), probability_TE.shape[1]
        id_TK = selection.index_TK.sort(1).values
        real_TK = id_TK < experts
        wrong = {
            "an id that is no expert": ((id_TK < 0) | (id_TK > experts)).any(),
            "an expert twice for one token": (real_TK & (id_TK == id_TK.roll(1, 1)))[:, 1:].any(),
            "a count that is not that of its ids": (real_TK.sum(1) != selection.count_T).any(),
        }
        for what, found in wrong.items():
            if bool(found):
                raise InputError(
                    f"strategy '{strategy_id}' selected {what} in layer {inputs.layer}; allowed: "
                    f"distinct ids from 0 to {experts - 1}, {experts} in empty slots, and their "
                    "count"
                )
        return selection

    return checked


def _warn_of_weighting(strategy: Strategy, rule: ModelRule) -> None:
    kind = strategy.resolved(rule).weighting_kind
    if kind not in ("model", rule.weighting):
        warnings.warn(
            f"strategy '{strategy.id}' has {kind} weights, and the model was trained with "
            f"{rule.weighting} ones: a difference from the model is not due to selection alone",
            WeightingWarning,
            stacklevel=4,  # the caller of routed, past contextlib
        )


class _Setting:
    """The config of experts inside the context: the model's own with another implementation.

    Other models may share that config, so it is not changed. A copy gets the config itself.
    """

    def __init__(self, config: PreTrainedConfig, implementation: str) -> None:
        self._config, self._experts_implementation = config, implementation

    def __getattr__(self, name: str) -> object:
        return getattr(self._config, name)

    def __reduce__(self) -> tuple[Callable, tuple[PreTrainedConfig]]:
        return itself, (self._config,)


@contextmanager
def chosen_experts(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Choose the experts implementation; the exclusive patch of the routers guards it.

    Experts that :mod:`moe_routing.engine.experts` cannot compute, such as quantised ones, keep
    their own.
    """
    try:
        implementation = model.get_correct_experts_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise InputError(str(error)) from error
    experts = find_experts(model)
    if not experts and implementation != EXPERTS_IMPLEMENTATION:
        raise InputError(
            f"{type(model).__name__} has no experts whose implementation can be chosen; allowed: "
            f"experts_implementation='{EXPERTS_IMPLEMENTATION}' or None"
        )
    configs = [module.config for module in experts]
    for module, config in zip(experts, configs, strict=True):
        module.config = cast("PreTrainedConfig", _Setting(config, implementation))
    try:
        yield
    finally:
        for module, config in zip(experts, configs, strict=True):
            module.config = config


def _skips_padded_slots(experts: nn.Module) -> bool:
    """Return whether experts skip the sentinel id E, as only ours do for every family.

    Others index out of range, or leave uninitialised rows.
    """
    config = getattr(experts, "config", None)
    return getattr(config, "_experts_implementation", None) == EXPERTS_IMPLEMENTATION


def _untraced(function: Function) -> Function:
    """Leave a function out of torch.compile's graphs; torch's own decorator loses its type."""
    return cast("Function", torch.compiler.disable(function))


@dataclass(frozen=True, eq=False)
class RouterForward:
    """The forward of a router under a strategy: hidden states to (logits, weights, expert ids).

    ``strategy`` is resolved: it leaves nothing to the model. ``sizes`` returns the exact norms of
    all experts' outputs, (tokens, experts), for the strategies that rank by them. ``below`` is the
    router's present forward.
    """

    router: RouterModule
    route: Router
    strategy: Strategy
    recorder: Recorder | None
    sizes: Callable[[Tensor], Tensor] | None
    below: Forward

    @_untraced  # sizes depend on the routing, and numpy sorts
    def __call__(self, hidden_states: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens."""
        router, strategy = self.router, self.strategy
        read = router.behaviour.read(router.module, self.below, hidden_states, *args)
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        context = current_context()
        mask_T = context.mask_T
        log_size_TE = None if self.sizes is None else self.sizes(hidden_TH).log()
        inputs = RouterInputs(
            router.layer,
            read.logits_TE,
            hidden_TH,
            router.linear.weight,
            mask_T,
            score_TE=read.choice_TE,
            log_size_TE=log_size_TE,
            own_TK=read.own_TK,
            key_T=context.key_T,
        )
        routing = self.route(inputs)
        index_TK, weight_TK = routing.selection.index_TK, routing.weight_TK
        dropped_TE = routing.dropped_weight_TE
        if self.recorder is not None:
            self.recorder.add(router.layer, routing, strategy.min_experts, strategy.max_experts)
        if mask_T is not None:
            padding_T1 = ~mask_T.to(index_TK.device)[:, None]
            index_TK = index_TK.masked_fill(padding_T1, router.num_experts)
            weight_TK = weight_TK.masked_fill(padding_T1, 0.0)
            if dropped_TE is not None:
                dropped_TE = dropped_TE.masked_fill(padding_T1, 0.0)
        if dropped_TE is not None:
            pass_dropped_weights(dropped_TE)
        weight_TK = router.behaviour.scaled(router.module, index_TK, weight_TK)
        if not _skips_padded_slots(router.experts):
            # A padded slot repeats the token's first expert; without any, it is expert 0.
            first_T1 = index_TK[:, :1].where(index_TK[:, :1] < router.num_experts, 0)
            index_TK = index_TK.where(index_TK < router.num_experts, first_T1)
        return read.raw_TE, weight_TK.to(read.dtype), index_TK


def _decoder(model: PreTrainedModel) -> nn.Module:
    """Return the part of a model that holds the layers, whatever head or adapter is around it."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


class RecordedForward:
    """The forward of a decoder that tells routers and recorders which tokens are padding.

    It reads the attention mask, (batch, tokens so far), unless the state of the pass is set. A pass
    that ends with an exception, of a hook, say, is not recorded.
    """

    def __init__(self, recorder: Recorder, below: Forward) -> None:
        """Keep the recorder and the forward to call."""
        self._recorder, self._below = recorder, below

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the decoder."""
        if is_in_context():
            return self._below(*args, **kwargs)
        sums: Sums = {}
        with forward_context(ForwardContext(mask_T=_real_tokens(args, kwargs), sums=sums)):
            output = self._below(*args, **kwargs)
        self._recorder.merge(sums)
        return output


def _real_tokens(args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor | None:
    """Return which tokens of a decoder's pass are real, (batch * tokens,); None if it is not said.

    With a cache the mask covers earlier tokens too.
    """
    mask_BS = kwargs.get("attention_mask")
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    read = next((one for one in given if isinstance(one, Tensor)), None)
    if read is None or not isinstance(mask_BS, Tensor) or mask_BS.ndim != 2:
        return None
    return mask_BS[:, -read.shape[1] :].flatten()


class CompensatedForward:
    """The forward of an experts module with the mean outputs of dropped experts added.

    The weights of the dropped experts come from the router of the same layer, which runs before in
    the same thread.
    """

    def __init__(self, mean_EH: Tensor, below: Forward) -> None:
        """Keep the mean outputs, float32, (experts, hidden), and the forward to add them to."""
        self._below = below
        self._mean_on = functools.cache(mean_EH.to)

    @_untraced
    def __call__(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Compute the selected experts, then add one dense product."""
        output = cast("Tensor", self._below(hidden_states, *args, **kwargs))
        dropped_TE = take_dropped_weights()
        if dropped_TE is None:
            return output
        mean_EH = self._mean_on(output.device, output.dtype)
        # Products are summed in float32 also where the operands are in half precision.
        dropped_TE = dropped_TE.to(output.device, output.dtype)
        return torch.addmm(output.flatten(0, -2), dropped_TE, mean_EH).view_as(output)


def routes_in_order(model: nn.Module) -> bool:
    """Return whether the active strategy requires forward passes one after another."""
    computes = (new.compute for module in model.modules() for new in replacements(module))
    return any(isinstance(c, RouterForward) and c.strategy.in_order for c in computes)
