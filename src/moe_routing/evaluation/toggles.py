"""Calibration by intervention: toggle experts of calibration tokens, and measure what changes.

Shape letters: L layers, P probed tokens, A toggles of a token in a layer, R ranks of a stratum, E
experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_routing.engine.adapters import experts_of_routers, find_routers, model_fingerprint
from moe_routing.engine.all_experts import DenseExperts
from moe_routing.engine.branches import Probe, batches
from moe_routing.engine.patching import sole_replacement
from moe_routing.engine.requests import Encoder, max_length
from moe_routing.engine.toggling import Effects, Substitutes, Toggler, toggling
from moe_routing.errors import InputError
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.toggles import Toggles

NOISE_DOCUMENTS = 100
"""Documents whose tokens give the noise floor: a toggle of weight zero per token and layer."""
NOISE_QUANTILE = 0.99
DRAWS = (3, 3, 2)
"""Lower ranks that are added per token and layer, by stratum."""


@dataclass(frozen=True)
class Strata:
    """Ranks below the model's own choice that are toggled at random, some per token and layer.

    Attributes:
        top_k: experts per token of the model; all of these are toggled.
        bounds: first rank of each stratum, and the number of experts.
        draws: ranks drawn from each stratum.
    """

    top_k: int
    bounds: tuple[int, ...]
    draws: tuple[int, ...]

    @classmethod
    def of(cls, experts: int, top_k: int, draws: Sequence[int]) -> Strata:
        """Let strata double: ranks k to 2k, 2k to 4k, and so on; the last one holds the rest.

        A rest smaller than the stratum before it joins that. So sampling weights never fall with
        the rank.

        Args:
            experts: experts per layer.
            top_k: experts per token of the model.
            draws: most ranks to draw from each stratum.

        Raises:
            InputError: draws that are not positive, or that rise.
        """
        if not draws or min(draws) < 1 or list(draws) != sorted(draws, reverse=True):
            raise InputError(
                f"draws is {tuple(draws)}; allowed: one positive number per stratum, none larger "
                "than the one before it"
            )
        doubled = [top_k << stratum for stratum in range(len(draws))]
        # A stratum is kept if it and what is left after it are as large as the one before.
        bounds = [top_k, *(bound for bound in doubled[1:] if experts - bound >= bound // 2)]
        bounds = [*bounds, experts] if experts > top_k else [experts]
        sizes = np.diff(bounds)
        return cls(top_k, tuple(bounds), tuple(map(min, draws, sizes.tolist())))

    @property
    def toggles(self) -> int:
        """Toggles of a token in a layer."""
        return self.top_k + sum(self.draws)

    def weight_E(self) -> Tensor:
        """Return the inverse chance that a rank is toggled, float64, (experts,)."""
        weights = [size / draw for size, draw in zip(np.diff(self.bounds), self.draws, strict=True)]
        repeats = [self.top_k, *np.diff(self.bounds)]
        return torch.from_numpy(np.repeat([1.0, *weights], repeats))

    def draw(self, tokens: int, layers: int, rng: np.random.Generator) -> Tensor:
        """Draw ranks without replacement within each stratum: int64, (L, P, A), rising in A."""
        rank_LPA = [np.broadcast_to(np.arange(self.top_k), (layers, tokens, self.top_k))]
        for first, last, draws in zip(self.bounds, self.bounds[1:], self.draws, strict=False):
            rank_R = np.arange(first, last)
            rank_LPR = rng.permuted(np.broadcast_to(rank_R, (layers, tokens, rank_R.size)), axis=2)
            rank_LPA.append(np.sort(rank_LPR[..., :draws], axis=2))
        return torch.from_numpy(np.concatenate(rank_LPA, axis=2))


def toggle_experts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    outputs: ExpertOutputs,
    *,
    tokens: int,
    window: int | None = None,
    draws: Sequence[int] = DRAWS,
    rng: np.random.Generator,
) -> Toggles:
    """Toggle experts of ``tokens`` tokens of ``texts`` in every layer of the stock model.

    Every text is a document of its own, read after the tokenizer's prefix token (position 0) as for
    perplexity, and cut at the window. Tokens are spread evenly over the documents, and uniformly
    over the positions of a document that have a next token. See :func:`toggle_probes`.

    Args:
        model: the stock model.
        tokenizer: its tokenizer.
        texts: documents that are not evaluated on.
        outputs: outputs of the experts of the same model.
        tokens: number of tokens to intervene on.
        window: most tokens of a document that are read; None: the model's longest sequence.
        draws: lower ranks per token and layer, by stratum; see :meth:`Strata.of`.
        rng: draws documents, positions and ranks.

    Raises:
        InputError: too few tokens in the texts, a text without a token, an effect that is not
            finite, outputs of another model, a model that is routed, or experts that cannot be
            computed one by one.
    """
    check_stock(model, outputs)
    encoder = Encoder(tokenizer, max_length(model.config, window))
    probes = choose_tokens(encoder, texts, tokens, rng)
    return toggle_probes(model, probes, outputs, draws=draws, rng=rng)


def check_stock(model: PreTrainedModel, outputs: ExpertOutputs) -> None:
    """Check that a model is not routed, and that expert outputs are its own.

    Raises:
        InputError: it is, or they are not.
    """
    if routing := sole_replacement(model):
        raise InputError(f"toggles: the model is {routing}; allowed: the stock model")
    if outputs.fingerprint != model_fingerprint(model):
        raise InputError(
            "toggles: the expert outputs are those of a model with other weights or of another "
            "dtype; allowed: those of this one"
        )


def toggle_probes(
    model: PreTrainedModel,
    probes: Sequence[Probe],
    outputs: ExpertOutputs,
    *,
    draws: Sequence[int] = DRAWS,
    compensated: bool = True,
    noise_documents: int = NOISE_DOCUMENTS,
    rng: np.random.Generator,
) -> Toggles:
    """Toggle experts of chosen tokens in every layer of the stock model.

    In each layer all experts of the model's own choice are removed, one at a time, and experts of a
    random sample of lower ranks are added, as :mod:`moe_routing.engine.toggling` says. Removals may
    be made twice: with nothing in the expert's place, and with its mean output.

    Everything is computed in float32 or better. A model of lower precision needs memory for the
    float32 weights of one module at a time, in practice the experts of one layer: 1.6 GB for
    OLMoE-1B-7B.

    The noise floor is the 99th percentile by layer of the KL of toggles of weight zero: the most
    probable expert that was not selected is added with the weight 0, in batches of their own, so in
    another row and batch shape than the predictions they are compared with.

    Args:
        model: the stock model, perhaps with dead experts.
        probes: documents and tokens.
        outputs: mean outputs of the experts.
        draws: lower ranks per token and layer, by stratum; see :meth:`Strata.of`.
        compensated: whether removals are made twice; if not, their effects with a substitute are
            NaN.
        noise_documents: documents whose tokens give the noise floor.
        rng: draws ranks.

    Raises:
        InputError: an effect that is not finite, a model that is routed, or experts that cannot be
            computed one by one.
    """
    routers = find_routers(model)
    strata = Strata.of(routers[0].num_experts, routers[0].top_k, draws)
    tokens = sum(len(probe.positions) for probe in probes)
    rank_LPA = strata.draw(tokens, len(routers), rng)
    # The first ranks are those of the model's own choice.
    again_LPA = rank_LPA[..., : strata.top_k if compensated else 0]
    substitutes = Substitutes(outputs.mean_LEH, strata.top_k) if compensated else None
    with toggling(model, _longest(probes), "toggles") as toggle:
        every_LPA = torch.cat([rank_LPA, again_LPA], -1)
        effects = _run(toggle, probes, every_LPA, substitutes=substitutes)
        noise_L = _noise(toggle, probes[:noise_documents], strata, effects)
    columns = _columns(probes, rank_LPA, effects, strata.top_k)
    columns["sampling_weight_P"] = strata.weight_E()[columns["rank_P"]]
    return _toggles(model, columns, outputs, effects, strata.weight_E(), noise_L)


def toggle_routed(
    model: PreTrainedModel,
    probes: Sequence[Probe],
    outputs: ExpertOutputs,
    *,
    noise_documents: int = NOISE_DOCUMENTS,
) -> Toggles:
    """Remove experts of chosen tokens, one at a time, in every layer of a routed model.

    All states are those of the routed model: its documents' tokens, and its branches. What a
    removal changes is the prediction of the routed model.

    Args:
        model: the model, inside the context of :func:`~moe_routing.engine.routed.routed`.
        probes: documents and tokens.
        outputs: mean outputs of the experts of the stock model.
        noise_documents: documents whose tokens give the noise floor.

    Returns:
        One pair for each expert that the routing keeps, of at most as many per token as the model
        was trained with. Ranks are among these experts, by probability. Logits, router inputs and
        norms are those in the routed model's states. Nothing is sampled, so that sampling weights
        are 1, and compensated effects are NaN. ``rule`` is the stock model's.

    Raises:
        InputError: see :func:`toggle_probes`.
    """
    routers = find_routers(model)
    experts, top_k = routers[0].num_experts, routers[0].top_k
    strata = Strata(top_k, (top_k, experts)[: 1 + (experts > top_k)], (1,))
    tokens = sum(len(probe.positions) for probe in probes)
    rank_LPA = torch.arange(top_k).expand(len(routers), tokens, -1)
    with toggling(model, _longest(probes), "toggles", of_routed=True) as toggle:
        effects = _run(toggle, probes, rank_LPA)
        noise_L = _noise(toggle, probes[:noise_documents], strata, effects)
    columns = _columns(probes, rank_LPA, effects, top_k)
    kept_P = effects.own_LPE.gather(2, effects.expert_LPA).flatten()
    columns = {name: value[kept_P] for name, value in columns.items()}
    columns["sampling_weight_P"] = torch.ones(int(kept_P.sum()), dtype=torch.float64)
    one_E = torch.ones(experts, dtype=torch.float64)
    return _toggles(model, columns, outputs, effects, one_E, noise_L)


def _longest(probes: Sequence[Probe]) -> int:
    return max(probe.ids_S.numel() - 1 for probe in probes)


def _noise(toggle: Toggler, probes: Sequence[Probe], strata: Strata, effects: Effects) -> Tensor:
    """Return the noise floor of each layer."""
    # The most probable expert that was not selected; of a dense model, one that stays.
    quiet = min(strata.top_k, strata.bounds[-1] - 1)
    tokens = sum(len(probe.positions) for probe in probes)
    rank_LP1 = torch.full((effects.kl_LPA.shape[0], tokens, 1), quiet)
    noise = _run(toggle, probes, rank_LP1, stock_PH=effects.stock_PH)
    return noise.kl_LPA[..., 0].quantile(NOISE_QUANTILE, dim=1)


def _toggles(
    model: PreTrainedModel,
    columns: dict[str, Tensor],
    outputs: ExpertOutputs,
    effects: Effects,
    rank_weight_E: Tensor,
    noise_L: Tensor,
) -> Toggles:
    norm_LTE, deviation_LTE = _norms(model, effects.hidden_LPH, outputs.mean_LEH)
    return Toggles(
        **columns,
        logits_LTE=effects.logits_LPE,
        hidden_LTH=effects.hidden_LPH,
        norm_LTE=norm_LTE,
        deviation_LTE=deviation_LTE,
        rank_weight_E=rank_weight_E,
        noise_L=noise_L,
        rule=find_routers(model)[0].rule,
        fingerprint=model_fingerprint(model),
        choice_LTE=effects.choice_LPE,
    )


def _norms(model: PreTrainedModel, hidden_LTH: Tensor, mean_LEH: Tensor) -> tuple[Tensor, Tensor]:
    """Return |o| and |o - mean| of every expert's output o, float32, (layers, tokens, experts)."""
    norms = []
    for module, hidden_TH, mean_EH in zip(
        experts_of_routers(model, "toggled experts"), hidden_LTH, mean_LEH, strict=True
    ):
        norms.append([x.float().cpu() for x in DenseExperts.load(module).norms(hidden_TH, mean_EH)])
    norm_LTE, deviation_LTE = map(torch.stack, zip(*norms, strict=True))
    return norm_LTE, deviation_LTE


def choose_tokens(
    encoder: Encoder,
    texts: Sequence[str],
    tokens: int,
    rng: np.random.Generator,
    *,
    source: str = "calibration text",
    asked: str = "toggles need",
) -> list[Probe]:
    """Draw tokens, as many of each text as of any other if they are long enough.

    Texts are read in their first window, after the prefix token.

    Args:
        encoder: makes token ids.
        texts: documents.
        tokens: how many to draw.
        rng: draws documents and positions.
        source: what the texts are, for errors.
        asked: who asks for tokens, for errors.

    Returns:
        In the order of the texts, those with a token; positions rise.

    Raises:
        InputError: the texts have fewer tokens, or one of them none.
    """
    order = [int(index) for index in rng.permutation(len(texts))[:tokens]]
    windows = encoder.rolling([texts[index] for index in order])
    documents = [[*first.input_ids, first.target_ids[-1]] for first, *_ in windows]
    lengths = np.array([len(ids) - 1 for ids in documents], dtype=np.int64)
    if lengths.sum() < tokens:
        raise InputError(
            f"{source} has {lengths.sum()} tokens in {len(texts)} documents of at most "
            f"{encoder.max_length} tokens each; {asked} {tokens}"
        )
    counts = np.zeros_like(lengths)
    while left := tokens - counts.sum():
        counts[np.flatnonzero(counts < lengths)[:left]] += 1
    probes = []
    drawn = zip(order, documents, lengths, counts, strict=True)
    for index, ids, length, count in sorted(drawn, key=lambda document: document[0]):
        positions = sorted(rng.choice(length, count, replace=False).tolist())
        probes.append(Probe(index, torch.tensor(ids), tuple(positions)))
    return probes


def _columns(
    probes: Sequence[Probe], rank_LPA: Tensor, effects: Effects, top_k: int
) -> dict[str, Tensor]:
    """Return the place and the effect of every pair, by their names in :class:`Toggles`."""
    toggles = rank_LPA.shape[2]
    layer_LPA = torch.arange(rank_LPA.shape[0])[:, None, None].expand_as(rank_LPA)
    places = [(p.document, position) for p in probes for position in p.positions]
    document_LPA, position_LPA = (
        torch.tensor(place_P)[:, None].expand_as(rank_LPA) for place_P in zip(*places, strict=True)
    )
    columns = {
        "document_P": document_LPA,
        "position_P": position_LPA,
        "layer_P": layer_LPA,
        "expert_P": effects.expert_LPA[..., :toggles],
        "rank_P": rank_LPA,
    }
    for name, effect_LPA in (("kl", effects.kl_LPA), ("loss_change", effects.change_LPA)):
        plain_LPA, again_LPC = effect_LPA.tensor_split([toggles], -1)
        columns[f"{name}_P"] = plain_LPA
        # The first toggles are the removals; an added expert has no substitute.
        if not again_LPC.shape[-1]:
            again_LPC = torch.full_like(plain_LPA[..., :top_k], torch.nan)
        columns[f"compensated_{name}_P"] = torch.cat([again_LPC, plain_LPA[..., top_k:]], -1)
    return {name: value.flatten() for name, value in columns.items()}


def _run(
    toggle: Toggler,
    probes: Sequence[Probe],
    rank_LPA: Tensor,
    *,
    stock_PH: Tensor | None = None,
    substitutes: Substitutes | None = None,
) -> Effects:
    """Toggle experts of given ranks in batches; with ``stock_PH``, with the weight zero."""
    parts, first = [], 0
    layers, tokens, toggles = rank_LPA.shape
    label = "toggle experts" if stock_PH is None else "noise floor"
    with tqdm(total=tokens, desc=label, unit="token") as bar:
        for batch in batches(probes, layers * toggles):
            last = first + sum(len(probe.positions) for probe in batch)
            ranks = dict(enumerate(rank_LPA[:, first:last]))
            stock = None if stock_PH is None else stock_PH[first:last]
            parts.append(
                toggle(
                    batch,
                    ranks,
                    weightless=stock is not None,
                    stock_PH=stock,
                    substitutes=substitutes,
                )
            )
            bar.update(last - first)
            first = last
    return Effects.concatenated(parts)
