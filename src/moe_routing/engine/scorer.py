"""The scoring engine: log-likelihoods of requests, with the routing strategy that is in place.

Requests are packed without padding under a token budget, a context that several requests share is
computed once, logits and the last layer's experts are computed only where a token is scored, and a
processor's cores work on several packs at once. Requests for which that would not be exact
(:mod:`moe_routing.engine.packable`) take the model's own forward pass, in batches of one
length. The numbers are those of lm-evaluation-harness's ``HFLM``; they do not depend on budget,
order or cores, to rounding.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import takewhile, zip_longest
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from moe_routing.engine.adapters import find_routers
from moe_routing.engine.packable import packable
from moe_routing.engine.packing import Pack, Tree, build, plant
from moe_routing.engine.passes import Packed, Plain, Way
from moe_routing.engine.requests import Encoder, Request, TokenRequest, max_length
from moe_routing.engine.routed import routes_in_order
from moe_routing.engine.workers import divide_threads, map_in_order
from moe_routing.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moe_routing.data.items import Item
    from moe_routing.engine.recorder import Recorder, Sums

MIN_PACK = 1024
"""With fewer tokens for each worker, several forward passes at once gain nothing."""


@dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    Attributes:
        log_likelihood: summed over its tokens, nats.
        greedy: whether every token is the model's most likely one; None where not asked for.
        tokens: number of scored tokens.
        mean_experts: experts per token and layer, over all tokens read for this request, those of a
            shared context included; None without a recorder.
    """

    log_likelihood: float
    greedy: bool | None
    tokens: int
    mean_experts: float | None


class Scorer:
    """Scores requests with a model as it is: put a strategy in place around the calls."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        token_budget: int = 8192,
        window: int | None = None,
        recorder: Recorder | None = None,
        share_prefixes: bool = True,
        padded_attention: bool | None = None,
        workers: int | None = None,
        progress: bool | None = None,
    ) -> None:
        """Keep model and settings.

        Args:
            model: a causal language model of transformers, in eval mode.
            tokenizer: its tokenizer.
            token_budget: most tokens of a forward pass; halved when memory runs out.
            window: most input tokens of a request; None takes the model's limit.
            recorder: the one that the routing context writes to; it sees a shared context once.
            share_prefixes: compute a context that several requests share once.
            padded_attention: see :mod:`moe_routing.engine.attention`; None decides by device.
            workers: forward passes at once, which share torch's threads; None decides by device,
                threads and tokens, and takes one under a strategy whose draws go by forward pass.
                With more than one, hooks on the model are called from several threads.
            progress: show a progress bar; None shows it on a terminal.

        Raises:
            InputError: less than one worker, a window longer than the model allows, or a tokenizer
                with neither a bos nor an eos token.
        """
        self.model = model
        self.encoder = Encoder(tokenizer, max_length(model.config, window))
        self.token_budget = token_budget
        self._recorder = recorder
        self._routers = 0 if recorder is None else len(find_routers(model))
        self._share_prefixes = share_prefixes
        if workers is not None and workers < 1:
            raise InputError(f"workers is {workers}; allowed: at least 1")
        self._workers = workers
        self._packed, self._plain = Packed(model, padded_attention), Plain(model)
        self._told = False
        self._progress = progress

    def score(self, requests: Sequence[Request], label: str = "score") -> list[Score]:
        """Score requests; the result is in their order.

        Raises:
            InputError: a continuation has no token or does not fit into the window.
        """
        groups: dict[object, list[int]] = {}
        for place, request in enumerate(requests):
            shared = self._share_prefixes and request.context != ""
            groups.setdefault(request.context if shared else place, []).append(place)
        return self.score_tokens(
            self.encoder.requests(requests), list(groups.values()), label=label
        )

    def score_rolling(self, texts: Sequence[str], label: str = "score") -> list[Score]:
        """Score whole texts, window by window; ``greedy`` is None.

        Raises:
            InputError: a text has no token.
        """
        windows = self.encoder.rolling(texts)
        flat = [window for group in windows for window in group]
        groups = [[place] for place in range(len(flat))]
        scores = iter(self.score_tokens(flat, groups, greedy=False, label=label))
        return [
            _combine([(next(scores), len(window.input_ids)) for window in group])
            for group in windows
        ]

    def score_items(
        self, items: Sequence[Item], task: str, label: str = "score"
    ) -> list[list[Score]]:
        """Score every continuation of evaluation items, in order.

        Args:
            items: the items.
            task: ``perplexity`` scores whole documents in windows, any other continuations.
            label: name of the progress bar.

        Raises:
            InputError: an item has an empty text, or one that does not fit into the window.
        """
        if task == "perplexity":
            return [[s] for s in self.score_rolling([i.continuations[0] for i in items], label)]
        requests = [
            Request(item.context, continuation)
            for item in items
            for continuation in item.continuations
        ]
        scores = iter(self.score(requests, label))
        return [[next(scores) for _ in item.continuations] for item in items]

    def score_tokens(
        self,
        requests: Sequence[TokenRequest],
        groups: Sequence[Sequence[int]],
        *,
        greedy: bool = True,
        label: str = "score",
    ) -> list[Score]:
        """Score token requests.

        Args:
            requests: the requests.
            groups: places of requests that may share their first tokens.
            greedy: whether to tell if each target is the most likely token.
            label: name of the progress bar.
        """
        scores: list[Score | None] = [None] * len(requests)

        def check(pack: Pack) -> None:
            for place in pack.members:
                if not math.isfinite(scores[place].log_likelihood):
                    self._refuse(scores[place], place, requests[place], label)

        work = partial(self._score_pack, greedy=greedy, scores=scores)
        self._each_pack(requests, groups, work, label, check)
        return scores

    def final_states(self, requests: Sequence[TokenRequest], label: str = "read") -> list[Tensor]:
        """Return each request's final hidden states, those that predict its targets.

        Returns:
            On the host, (targets, hidden size) each, in the order of the requests.
        """
        states: list[Tensor | None] = [None] * len(requests)

        def keep(pack: Pack, way: Way) -> None:
            parts = way.states(pack).cpu().split(pack.targets.tolist())
            for member, part in zip(pack.members, parts, strict=True):
                states[member] = part

        self._each_pack(requests, [[place] for place in range(len(requests))], keep, label)
        return states

    def _refuse(self, score: Score, place: int, request: TokenRequest, label: str) -> NoReturn:
        """Name a request that has no likelihood, or the router that is the reason."""
        if self._recorder is not None:
            self._recorder.statistics().check_finite(label)
        text = self.encoder.tokenizer.decode(request.target_ids[:20])
        raise InputError(
            f"{label}: the log-likelihood of request {place + 1} (continuation {text[:40]!r}) is "
            f"{score.log_likelihood}; allowed: finite numbers (check the weights and the dtype)"
        )

    def _each_pack(
        self,
        requests: Sequence[TokenRequest],
        groups: Sequence[Sequence[int]],
        work: Callable[[Pack, Way], None],
        label: str,
        check: Callable[[Pack], None] = lambda _: None,
    ) -> None:
        """Pack the requests and do the work on every pack, with a progress bar.

        Args:
            requests: the requests.
            groups: places of requests that may share their first tokens.
            work: takes a pack and the way to run the model on it.
            label: name of the progress bar.
            check: looks at a pack that is done.

        Raises:
            InputError: the model is in training mode, or being scored already.
        """
        if self.model.training:
            raise InputError("the model is in training mode; call model.eval() before scoring")
        parts = self._plant(requests, groups)
        disable = None if self._progress is None else not self._progress
        bar = tqdm(
            total=sum(tree.size for trees, _ in parts for tree in trees), desc=label, unit="tok",
            unit_scale=True, disable=disable,
        )  # fmt: skip
        with bar:
            for trees, way in parts:
                packs = self._packs(requests, trees, partial(work, way=way), way)
                with way.prepared(), closing(packs):
                    for pack in packs:
                        check(pack)
                        bar.update(pack.ids_T.size)

    def _plant(
        self, requests: Sequence[TokenRequest], groups: Sequence[Sequence[int]]
    ) -> list[tuple[list[Tree], Way]]:
        """Return the trees to pack, and those that take plain passes, if there are any."""
        longest, reason = packable(self.model)
        long = {place for place, r in enumerate(requests) if len(r.input_ids) > longest}
        short = [[place for place in group if place not in long] for group in groups]
        packed = plant(requests, [group for group in short if group])
        plain = plant(requests, [[place] for place in sorted(long)])
        if plain and not self._told:
            message = (
                f"{len(long):,} of {len(requests):,} requests take plain forward passes, slower "
                f"than packed ones: {reason}"
            )
            tqdm.write(message, file=sys.stderr)
            self._told = True
        return [part for part in ((packed, self._packed), (plain, self._plain)) if part[0]]

    def _packs(
        self,
        requests: Sequence[TokenRequest],
        trees: Sequence[Tree],
        work: Callable[[Pack], None],
        way: Way,
    ) -> Iterator[Pack]:
        """Work on packs, several at once if that pays, and yield each when it is done."""
        attempt = partial(self._attempt, requests=requests, work=work)
        workers = self._crew(trees) if way.at_once else 1
        while trees:
            groups = way.divide(trees, requests, self.token_budget, workers)
            failed: list[list[Tree]] = []
            # No further pack is begun once memory has run out.
            begun = takewhile(lambda _, failed=failed: not failed, groups)
            for group, done in zip_longest(groups, map_in_order(attempt, begun, workers)):
                if done is None:
                    failed.append(group)
                    continue
                pack, sums = done
                if self._recorder is not None:
                    self._recorder.merge(sums)
                yield pack
            if failed:
                workers = self._back_off(workers, len(failed[0]))
            trees = [tree for group in failed for tree in group]

    def _crew(self, trees: Sequence[Tree]) -> int:
        """Return how many packs to work on at once."""
        if self._workers is not None:
            return self._workers
        if self.model.device.type != "cpu" or routes_in_order(self.model):
            return 1
        tokens = sum(tree.size for tree in trees)
        return max(1, min(divide_threads(torch.get_num_threads()), tokens // MIN_PACK))

    @torch.inference_mode()
    def _attempt(
        self, trees: Sequence[Tree], requests: Sequence[TokenRequest], work: Callable[[Pack], None]
    ) -> tuple[Pack, Sums | None] | None:
        """Work on a pack; return it and what was recorded, or None if memory ran out."""
        pack = build(requests, trees)
        try:
            with nullcontext() if self._recorder is None else self._recorder.apart() as sums:
                work(pack)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            return None
        return pack, sums

    def _back_off(self, workers: int, trees: int) -> int:
        """Give up working on several packs at once, then halve the budget; return the workers."""
        if workers > 1:
            message = "out of memory: one forward pass at a time from here on"
        elif trees == 1:
            raise InputError(
                f"out of memory on {self.model.device} with a single request; use a smaller "
                "evaluation.window or a larger device"
            )
        else:
            self.token_budget //= 2
            message = f"out of memory: evaluation.token_budget is now {self.token_budget}"
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        tqdm.write(message, file=sys.stderr)
        return 1

    def _score_pack(self, pack: Pack, way: Way, greedy: bool, scores: list[Score | None]) -> None:
        likelihood_N, greedy_N = way.likelihoods(pack, greedy)
        totals = np.add.reduceat(likelihood_N.double().cpu().numpy(), pack.first_target)
        greedies = [None] * len(totals)
        if greedy_N is not None:
            greedies = np.logical_and.reduceat(greedy_N.cpu().numpy(), pack.first_target).tolist()
        rows = zip(pack.members, totals, greedies, pack.targets, self._experts(pack), strict=True)
        for member, total, best, count, experts in rows:
            scores[member] = Score(float(total), best, int(count), experts)

    def _experts(self, pack: Pack) -> list[float | None]:
        """Return each request's mean experts, from the recorder's counts of the last forward."""
        if self._recorder is None:
            return [None] * len(pack.members)
        counts_T = self._recorder.counts_T.double().cpu().numpy()
        before = np.concatenate([[0.0], np.cumsum(counts_T)])
        trunk_start, trunk_end, branch_start, branch_end = pack.paths.T
        total = before[trunk_end] - before[trunk_start] + before[branch_end] - before[branch_start]
        read = trunk_end - trunk_start + branch_end - branch_start
        return (total / (read * self._routers)).tolist()


def _out_of_memory(error: RuntimeError) -> bool:
    """Tell whether memory ran out; on the CPU torch says so in words only."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _combine(parts: Sequence[tuple[Score, int]]) -> Score:
    """Join the windows of a text; each comes with the number of tokens it read."""
    experts = None
    if parts[0][0].mean_experts is not None:
        read = sum(size for _, size in parts)
        experts = sum(score.mean_experts * size for score, size in parts) / read
    return Score(
        log_likelihood=sum(score.log_likelihood for score, _ in parts),
        greedy=None,
        tokens=sum(score.tokens for score, _ in parts),
        mean_experts=experts,
    )
