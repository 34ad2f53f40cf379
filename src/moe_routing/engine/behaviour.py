"""What a router does, as one forward pass shows.

A router of transformers returns logits, the weights of the selected experts, and their ids. Its
class is built once more with a random number in every weight, bias and buffer, and run on random
tokens. The outputs are compared with the rules that this package knows:

    score     = softmax or sigmoid of the logits, or what the router returns in their place
    selection = the k largest of score + bias, all experts or those of the best groups alone
    weights   = factor * score, raw or renormalised to sum 1, times a factor of each expert

So a router is recognised by what it computes, whatever its class is called, and one that does
anything else is refused.

Shape letters: T tokens, K slots per token, E experts, G groups, H hidden size.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from types import SimpleNamespace
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_routing.engine.module_types import LinearRouter
from moe_routing.engine.patching import Forward
from moe_routing.errors import InputError
from moe_routing.routing.rule import ModelRule
from moe_routing.vocabulary import OwnWeighting

TOKENS = 96
"""Tokens of the forward pass: two different rules do not agree on all of them by chance."""
TOLERANCE = 1e-4
"""Relative difference of weights that are the same."""
ARGUMENT = "argument"
"""Place of a bias that the layer passes to its router with the hidden states."""
BIAS = "e_score_correction_bias"
"""Name that transformers gives to a bias of the selection alone."""
SCALE = "per_expert_scale"
"""Name that transformers gives to factors of the experts' weights."""
CONFIGURED = "top_k_experts"
"""Name of the experts per token in the config of a router that looks them up there."""

Score = Literal["softmax", "sigmoid", "given"]
"""``given``: the router returns probabilities in place of logits."""


class Grouping(NamedTuple):
    """Selection from the experts of the best groups alone.

    A group is as good as its largest score (``max``), or as the sum of its two largest (``top2``).
    """

    groups: int
    kept: int
    measure: Literal["max", "top2"]

    def mask(self, choice_TE: Tensor) -> Tensor:
        """Return what ranks the experts, minus infinity for those of the other groups."""
        choice_TGE = choice_TE.unflatten(1, (self.groups, -1))
        best_TGE = choice_TGE.topk(1 if self.measure == "max" else 2, -1).values
        group_TG = best_TGE.sum(-1).topk(self.kept, -1).indices
        kept_TG = torch.zeros(choice_TGE.shape[:2], dtype=torch.bool, device=choice_TE.device)
        kept_TG.scatter_(1, group_TG, value=True)
        return choice_TGE.masked_fill(~kept_TG[..., None], -math.inf).flatten(1)


class Reading(NamedTuple):
    """What a router computes before experts are selected.

    Attributes:
        raw_TE: logits as the model's own router returns them.
        logits_TE: logits whose softmax is proportional to the router's scores.
        choice_TE: what ranks the experts, if that is not the score alone, float32.
        own_TK: the model's own selection, in that case.
        dtype: dtype of the weights that the router returns.
    """

    raw_TE: Tensor
    logits_TE: Tensor
    choice_TE: Tensor | None
    own_TK: Tensor | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Behaviour:
    """The rule of a router, and where its parts are.

    Attributes:
        rule: the routing rule.
        num_experts: number of experts.
        score: what the weights are made of.
        weight: name of the submodule that holds the weight, (experts, hidden); "" for the router.
        bias: where the bias of the selection is: a name, ``ARGUMENT``, or "" for none.
        grouping: groups of experts; None: selection from all of them.
        scale: name of the factors of the experts' weights, or "" for none.
        linear: whether the logits are nothing but a product with the weight, in any dtype.
        rounds: whether weights are rounded to the dtype of the logits; otherwise they are float32.
    """

    rule: ModelRule
    num_experts: int
    score: Score
    weight: str
    bias: str
    grouping: Grouping | None
    scale: str
    linear: bool
    rounds: bool

    def logits(self, raw_TE: Tensor) -> Tensor:
        """Return logits whose softmax is proportional to the scores of these raw logits.

        With renormalised weights, sigmoid scores are the softmax of their logarithms.
        """
        if self.score == "sigmoid":
            return F.logsigmoid(raw_TE.float())
        if self.score == "given":
            return raw_TE.float().clamp(min=torch.finfo(torch.float32).tiny).log()
        return raw_TE

    def scaled(self, module: nn.Module, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return weights times the factors of their experts.

        Args:
            module: the router.
            index_TK: experts, the number of experts in empty slots.
            weight_TK: their weights.
        """
        if not self.scale:
            return weight_TK
        scale_E = cast("Tensor", attrgetter(self.scale)(module)).to(weight_TK)
        return weight_TK * F.pad(scale_E, (0, 1))[index_TK]

    def read(self, module: nn.Module, own: Forward, hidden: Tensor, *args: Tensor) -> Reading:
        """Compute what a router computes before experts are selected.

        Args:
            module: the router.
            own: its own forward, which is run unless a product gives the same.
            hidden: its input, with any number of dimensions.
            *args: its further arguments.
        """
        if self.linear:
            weight_EH = cast("LinearRouter", module).weight
            logits_TE = F.linear(hidden.reshape(-1, hidden.shape[-1]), weight_EH)
            dtype = weight_EH.dtype if self.rounds else torch.float32
            return Reading(logits_TE, logits_TE, None, None, dtype)
        returned = cast("tuple[Tensor, Tensor, Tensor]", own(hidden, *args))
        raw_TE, weight_TK, own_TK = returned
        choice_TE = self.choice(module, raw_TE, *args)
        logits_TE = self.logits(raw_TE)
        return Reading(
            raw_TE, logits_TE, choice_TE, None if choice_TE is None else own_TK, weight_TK.dtype
        )

    def choice(self, module: nn.Module, raw_TE: Tensor, *args: Tensor) -> Tensor | None:
        """Return what ranks the experts, float32, where it is not the score alone."""
        bias = bias_of(module, self.bias, args)
        if bias is None and self.grouping is None:
            return None
        choice_TE = scores(self.score, raw_TE)
        if bias is not None:
            choice_TE = choice_TE + bias.to(choice_TE.device).float().flatten()
        return choice_TE if self.grouping is None else self.grouping.mask(choice_TE)


def scores(score: Score, raw_TE: Tensor) -> Tensor:
    """Return a router's scores, float32."""
    if score == "given":
        return raw_TE.float()
    return raw_TE.float().softmax(-1) if score == "softmax" else raw_TE.float().sigmoid()


def bias_of(module: nn.Module, place: str, args: tuple[Tensor, ...]) -> Tensor | None:
    """Return the bias of a router's selection; None if there is none."""
    if place == ARGUMENT:
        return args[0] if args else None
    return attrgetter(place)(module) if place else None


Plain = str | int | float | bool | None


Shapes = tuple[tuple[str, tuple[int, ...] | None], ...]
"""Names and shapes of tensors; None for one that is absent."""


@dataclass(frozen=True)
class Blueprint:
    """A module without the values of its tensors; equal for modules that compute the same way."""

    kind: type[nn.Module]
    settings: tuple[tuple[str, Plain], ...]
    parameters: Shapes
    buffers: Shapes
    children: tuple[tuple[str, Blueprint], ...]

    @classmethod
    def of(cls, module: nn.Module) -> Blueprint:
        """Return the blueprint of a module; attributes that are not plain values are left out."""
        settings = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and isinstance(value, Plain)
        }
        configured = getattr(getattr(module, "config", None), CONFIGURED, None)
        if configured is not None:
            settings[CONFIGURED] = configured
        return cls(
            type(module),
            tuple(sorted(settings.items())),
            _shapes(module._parameters),
            _shapes(module._buffers),
            tuple((n, cls.of(child)) for n, child in module._modules.items() if child is not None),
        )

    def build(self, generator: torch.Generator) -> nn.Module:
        """Return such a module with random tensors, float32, in eval mode on the CPU."""
        module = self.kind.__new__(self.kind)
        nn.Module.__init__(module)
        vars(module).update(dict(self.settings))
        if configured := vars(module).pop(CONFIGURED, None):
            vars(module)["config"] = SimpleNamespace(**{CONFIGURED: configured})
        for name, shape in self.parameters:
            tensor = _random(shape, generator)
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            module.register_parameter(name, parameter)
        for name, shape in self.buffers:
            module.register_buffer(name, _random(shape, generator))
        for name, child in self.children:
            module.add_module(name, child.build(generator))
        return module.eval()

    def matrices(self, path: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the place and shape of each matrix called ``weight``."""
        for name, shape in self.parameters:
            if name == "weight" and shape and len(shape) == 2:
                yield path, shape
        for name, child in self.children:
            yield from child.matrices(f"{path}.{name}".lstrip("."))

    def place(self, wanted: str, path: str = "") -> str:
        """Return the place of the first parameter or buffer of a name; "" if there is none."""
        own = (name for name, _ in (*self.parameters, *self.buffers) if name == wanted)
        inside = (child.place(wanted, f"{path}{name}.") for name, child in self.children)
        return next((f"{path}{name}" for name in own), next(filter(None, inside), ""))


def _shapes(tensors: Mapping[str, Tensor | None]) -> Shapes:
    return tuple((n, None if t is None else tuple(t.shape)) for n, t in tensors.items())


def _random(shape: tuple[int, ...] | None, generator: torch.Generator) -> Tensor | None:
    """Return random numbers: of a matrix, so that logits differ by about 1."""
    if shape is None:
        return None
    scale = 1.5 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.3
    return torch.randn(shape, generator=generator, device="cpu") * scale


class Seen(NamedTuple):
    """What a router returned for random tokens; the bias that it was given, and its factors."""

    raw_TE: Tensor
    weight_TK: Tensor
    own_TK: Tensor
    bias_E: Tensor | None
    scale_E: Tensor | None


@functools.lru_cache(maxsize=1024)
def observe(blueprint: Blueprint) -> Behaviour | str:
    """Return what a router does, or why it is none that this package knows.

    Raises:
        InputError: it selects no expert, or more than there are.
    """
    matrices = list(blueprint.matrices())
    if len(matrices) != 1:
        return (
            f"it has {len(matrices)} weight matrices; allowed: one, (experts, hidden size), not "
            "divided among processes"
        )
    ((weight, (experts, hidden)),) = matrices
    if not hidden:
        return "its weight is empty"
    settings = dict(blueprint.settings)
    name = "top_k" if "top_k" in settings else CONFIGURED
    top_k = settings.get(name)
    if not isinstance(top_k, int):
        return "it does not say how many experts it selects"
    if not 1 <= top_k <= experts:
        raise InputError(
            f"num_experts_per_tok is {top_k}; allowed: 1 to {experts}, the experts of a layer"
        )
    # Of one expert, a renormalised weight says nothing about its score; with fewer experts than
    # groups, groups say nothing about the selection.
    groups = [g.kept * experts // g.groups for g in _groupings(settings) if g is not None]
    settings[name] = max(top_k, min(2, experts), *groups)
    twin = replace(blueprint, settings=tuple(settings.items()))
    generator = torch.Generator("cpu").manual_seed(0)
    hidden_TH = torch.randn(TOKENS, hidden, generator=generator, device="cpu")
    module = twin.build(generator)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            seen = _run(module, hidden_TH, experts, blueprint)
            place = "" if seen.bias_E is None else blueprint.place(BIAS) or ARGUMENT
            rule = _rule(seen, place, settings)
        except Exception as error:  # whatever the code of a model raises
            return f"its router failed on random tokens: {_line(error)}"
        linear, rounds = _in_half_precision(module, hidden_TH, experts, blueprint)
    if isinstance(rule, str):
        return rule
    score, place, grouping, weighting, factor = rule
    scale = blueprint.place(SCALE)
    plain = score == "softmax" and not (weight or place or grouping or scale)
    return Behaviour(
        ModelRule(top_k, weighting, factor, biased=bool(place) or grouping is not None),
        experts,
        score,
        weight,
        place,
        grouping,
        scale,
        linear=plain and linear,
        rounds=rounds,
    )


def _run(module: nn.Module, hidden_TH: Tensor, experts: int, blueprint: Blueprint) -> Seen:
    """Run a router that was built by a blueprint.

    Raises:
        TypeError: it takes or returns something else than a router does.
    """
    args = ()
    further = list(inspect.signature(module.forward).parameters.values())[1:]
    if further and "bias" in further[0].name:
        args, further = (torch.linspace(-0.5, 0.5, experts, device="cpu"),), further[1:]
    required = [
        p.name for p in further if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if required:
        raise TypeError(f"it takes {' and '.join(required)} beside hidden states")
    try:
        output = module(hidden_TH, *args)
    except ValueError:  # it unpacks three dimensions
        output = module(hidden_TH[None], *args)
    if not isinstance(output, tuple) or len(output) != 3:
        count = len(output) if isinstance(output, tuple) else 1
        raise TypeError(f"it returns {count} values; allowed: logits, weights and experts")
    raw_TE, weight_TK, own_TK = output
    shapes = raw_TE.shape == (TOKENS, experts) and weight_TK.shape == own_TK.shape
    if not shapes or own_TK.is_floating_point():
        raise TypeError("it returns something else than logits, weights and experts")
    place = ARGUMENT if args else blueprint.place(BIAS)
    scale = blueprint.place(SCALE)
    scale_E = attrgetter(scale)(module) if scale else None
    return Seen(raw_TE, weight_TK, own_TK, bias_of(module, place, args), scale_E)


def _in_half_precision(
    module: nn.Module, hidden_TH: Tensor, experts: int, blueprint: Blueprint
) -> tuple[bool, bool]:
    """Return whether logits are a product in half precision too, and weights are rounded to it."""
    hidden_TH = hidden_TH.bfloat16()
    try:
        seen = _run(module.bfloat16(), hidden_TH, experts, blueprint)
        product_TE = F.linear(hidden_TH, cast("LinearRouter", module).weight)
    except (RuntimeError, AttributeError):  # it needs single precision, or its weight is elsewhere
        return False, False
    same = product_TE.dtype == seen.raw_TE.dtype and torch.equal(product_TE, seen.raw_TE)
    return same, seen.weight_TK.dtype == torch.bfloat16


Rule = tuple[Score, str, Grouping | None, OwnWeighting, float]
"""Score, place of the bias, grouping, weighting and factor."""


def _rule(seen: Seen, place: str, settings: Mapping[str, Plain]) -> Rule | str:
    """Return the rule that gives what was seen, or why there is none."""
    own_TK = seen.own_TK.sort(1).values
    own_weight_TK = seen.weight_TK
    if seen.scale_E is not None:
        own_weight_TK = own_weight_TK / seen.scale_E[seen.own_TK]
    for score, grouping, biased in itertools.product(
        get_args(Score), _groupings(settings), (True, False) if place else (False,)
    ):
        score_TE = scores(score, seen.raw_TE)
        if score == "given" and not _are_probabilities(score_TE):
            continue
        choice_TE = score_TE
        if biased and seen.bias_E is not None:
            choice_TE = score_TE + seen.bias_E.flatten()
        if grouping is not None:
            choice_TE = grouping.mask(choice_TE)
        index_TK = choice_TE.topk(own_TK.shape[1], 1).indices.sort(1).values
        if not torch.equal(index_TK, own_TK):
            continue
        raw_TK = score_TE.gather(1, seen.own_TK)
        weights: dict[OwnWeighting, Tensor] = {
            "softmax": raw_TK,
            "renormalised": raw_TK / raw_TK.sum(1, keepdim=True),
        }
        for weighting, weight_TK in weights.items():
            ratio_TK = own_weight_TK / weight_TK
            factor = float(ratio_TK.mean())
            if float((ratio_TK - factor).abs().max()) <= TOLERANCE * factor:
                if score == "sigmoid" and weighting == "softmax":
                    return "its weights are sigmoid scores that are not renormalised"
                found = place if biased else ""
                return score, found, grouping, weighting, float(f"{factor:.5g}")
    return (
        "its weights are not softmax or sigmoid scores of the logits, raw or renormalised, of the "
        "experts with the largest ones"
    )


def _are_probabilities(score_TE: Tensor) -> bool:
    sums_T = score_TE.sum(1)
    return bool((score_TE >= 0).all()) and torch.allclose(sums_T, torch.ones_like(sums_T))


def _groupings(settings: Mapping[str, Plain]) -> list[Grouping | None]:
    """Return how experts may be grouped."""
    groups, kept = settings.get("num_group"), settings.get("topk_group")
    if not isinstance(groups, int) or not isinstance(kept, int) or groups < 2:
        return [None]
    return [None, Grouping(groups, kept, "max"), Grouping(groups, kept, "top2")]


def _line(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 160)
