"""The scoring engine: log-likelihoods of requests under the active routing strategy.

Requests are packed without padding under a token budget. A context that several requests share is
computed once, logits are computed at scored positions only, and on the CPU several packed batches
run concurrently. Requests for which packing would not be exact
(:mod:`moe_routing.engine.packable`) fall back to plain forward passes, in batches of equal length.
Results match those of lm-evaluation-harness's ``HFLM`` and do not depend on budget, order or number
of workers, up to rounding.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile, zip_longest
from typing import TYPE_CHECKING, NoReturn, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from moe_routing.engine.adapters import find_routers
from moe_routing.engine.context import ForwardContext, Sums, forward_context
from moe_routing.engine.packable import Packable, packable
from moe_routing.engine.packing import PackedBatch, PrefixGroup, build, group_by_prefix
from moe_routing.engine.passes import Packed, Plain, Runner, out_of_memory
from moe_routing.engine.requests import Encoder, Request, TokenRequest, max_length
from moe_routing.engine.routed import routes_in_order
from moe_routing.engine.workers import divide_threads, map_in_order
from moe_routing.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moe_routing.data.items import Item
    from moe_routing.engine.recorder import Recorder

MIN_WORKER_TOKENS = 1024
"""With fewer tokens per worker, concurrent batches gain nothing."""


@dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    Attributes:
        log_likelihood: summed over its tokens, nats.
        greedy: whether every token is the model's most likely one; None if not requested.
        tokens: number of scored tokens.
        mean_experts: mean experts per token and layer over all tokens read for this request,
            including those of a shared context; None without a recorder.
        states: final hidden states at the positions that predict its tokens, on the host,
            (tokens, hidden size); None unless requested.
    """

    log_likelihood: float
    greedy: bool | None
    tokens: int
    mean_experts: float | None
    states: Tensor | None = field(default=None, repr=False, compare=False)


class Scorer:
    """Scores requests with a model as it is; to score under a strategy, call it in ``routed``."""

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
        exact: Packable | None = None,
    ) -> None:
        """Keep model and settings.

        Args:
            model: a causal language model of transformers, in eval mode.
            tokenizer: its tokenizer.
            token_budget: most tokens of a forward pass; halved when memory runs out.
            window: most input tokens of a request; None takes the model's limit.
            recorder: the recorder of the routing context; it counts a shared context once.
            share_prefixes: compute a context that several requests share once.
            padded_attention: see :mod:`moe_routing.engine.attention`; None decides by device.
            workers: number of concurrent batches, which share torch's threads. None decides by
                device, threads and tokens, and takes one under a strategy whose random draws
                follow the order of forward passes. With more than one, hooks on the model are
                called from several threads.
            progress: show a progress bar; None shows it on a terminal.
            exact: what another scorer's :attr:`packable` found of this model; None compares the
                engine with the model's own pass when it is first needed.

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
        self._warned = False
        self._progress = progress
        self._exact = exact

    def score(
        self,
        requests: Sequence[Request],
        label: str = "score",
        keep_states: Collection[int] = (),
    ) -> list[Score]:
        """Score requests; the result is in their order.

        Args:
            requests: the requests.
            label: name of the progress bar.
            keep_states: indices of requests whose scores shall have their ``states``.

        Raises:
            InputError: a continuation has no token or does not fit into the window.
        """
        groups: dict[object, list[int]] = {}
        for index, request in enumerate(requests):
            shared = self._share_prefixes and request.context != ""
            groups.setdefault(request.context if shared else index, []).append(index)
        return self.score_tokens(
            self.encoder.requests(requests),
            list(groups.values()),
            label=label,
            keep_states=keep_states,
        )

    def score_rolling(
        self,
        texts: Sequence[str],
        label: str = "score",
        keep_states: Collection[int] = (),
    ) -> list[Score]:
        """Score whole texts, window by window; ``greedy`` is None.

        Args:
            texts: the texts.
            label: name of the progress bar.
            keep_states: indices of texts whose scores shall have their ``states``.

        Raises:
            InputError: a text has no token.
        """
        windows = self.encoder.rolling(texts)
        flat = [window for group in windows for window in group]
        groups = [[index] for index in range(len(flat))]
        texts_of = [text for text, group in enumerate(windows) for _ in group]
        kept = {index for index, text in enumerate(texts_of) if text in keep_states}
        scores = iter(self.score_tokens(flat, groups, greedy=False, label=label, keep_states=kept))
        return [
            _combine([(next(scores), len(window.input_ids)) for window in group])
            for group in windows
        ]

    def score_items(
        self,
        items: Sequence[Item],
        task: str,
        label: str = "score",
        keep_states: Collection[str] = (),
    ) -> list[list[Score]]:
        """Score every continuation of evaluation items, in order.

        Args:
            items: the items.
            task: ``perplexity`` scores whole documents in windows; other tasks score continuations.
            label: name of the progress bar.
            keep_states: ids of items whose document or right continuation shall have its
                ``states``.

        Raises:
            InputError: an item has an empty text, or one that does not fit into the window.
        """
        if task == "perplexity":
            documents = [item.continuations[0] for item in items]
            kept = {index for index, item in enumerate(items) if item.id in keep_states}
            return [[score] for score in self.score_rolling(documents, label, kept)]
        pairs = [(item, index) for item in items for index in range(len(item.continuations))]
        requests = [Request(item.context, item.continuations[index]) for item, index in pairs]
        right = {
            place
            for place, (item, index) in enumerate(pairs)
            if item.id in keep_states and index == item.right
        }
        scores = iter(self.score(requests, label, right))
        return [[next(scores) for _ in item.continuations] for item in items]

    def score_tokens(
        self,
        requests: Sequence[TokenRequest],
        groups: Sequence[Sequence[int]],
        *,
        greedy: bool = True,
        label: str = "score",
        keep_states: Collection[int] = (),
    ) -> list[Score]:
        """Score token requests.

        Args:
            requests: the requests.
            groups: indices of requests that may share their first tokens.
            greedy: whether to report if every target is the most likely token.
            label: name of the progress bar.
            keep_states: indices of requests whose scores shall have their ``states``.
        """
        scores = cast("list[Score]", [None] * len(requests))  # filled in batch by batch

        def check(batch: PackedBatch) -> None:
            for index in batch.members:
                if not math.isfinite(scores[index].log_likelihood):
                    self._refuse(scores[index], index, requests[index], label)

        work = partial(self._score_batch, greedy=greedy, scores=scores, keep_states=keep_states)
        self._each_batch(requests, groups, work, label, check)
        return scores

    def final_states(self, requests: Sequence[TokenRequest], label: str = "read") -> list[Tensor]:
        """Return each request's final hidden states at the positions that predict its targets.

        Returns:
            On the host, (targets, hidden size) each, in the order of the requests.
        """
        states = cast("list[Tensor]", [None] * len(requests))  # filled in batch by batch

        def keep(batch: PackedBatch, _: ForwardContext, runner: Runner) -> None:
            parts = runner.states(batch).cpu().split(batch.targets.tolist())
            for member, part in zip(batch.members, parts, strict=True):
                states[member] = part

        self._each_batch(requests, [[index] for index in range(len(requests))], keep, label)
        return states

    def _refuse(self, score: Score, index: int, request: TokenRequest, label: str) -> NoReturn:
        """Raise an error that names a request without a likelihood, or the router at fault."""
        if self._recorder is not None:
            self._recorder.statistics().check_finite(label)
        text = self.encoder.tokenizer.decode(request.target_ids[:20])
        raise InputError(
            f"{label}: the log-likelihood of request {index + 1} (continuation {text[:40]!r}) is "
            f"{score.log_likelihood}; allowed: finite numbers (check the weights and the dtype)"
        )

    def _each_batch(
        self,
        requests: Sequence[TokenRequest],
        groups: Sequence[Sequence[int]],
        work: Callable[..., None],
        label: str,
        check: Callable[[PackedBatch], None] = lambda _: None,
    ) -> None:
        """Pack the requests and do the work on every batch, with a progress bar.

        Args:
            requests: the requests.
            groups: indices of requests that may share their first tokens.
            work: takes a batch, its forward context and, by keyword, the runner of the model.
            label: name of the progress bar.
            check: looks at a batch that is done.

        Raises:
            InputError: the model is in training mode, or being scored already.
        """
        if self.model.training:
            raise InputError("the model is in training mode; call model.eval() before scoring")
        parts = self._group(requests, groups)
        disable = None if self._progress is None else not self._progress
        bar = tqdm(
            total=sum(group.size for groups, _ in parts for group in groups), desc=label,
            unit="tok", unit_scale=True, disable=disable,
        )  # fmt: skip
        with bar:
            for prefix_groups, runner in parts:
                batches = self._run(requests, prefix_groups, partial(work, runner=runner), runner)
                with runner.prepared(), closing(batches):
                    for batch in batches:
                        check(batch)
                        bar.update(batch.ids_T.size)

    @property
    def packable(self) -> Packable:
        """Up to what length the packed engine is exact for the model; compared once."""
        if self._exact is None:
            self._exact = packable(self.model)
        return self._exact

    def _group(
        self, requests: Sequence[TokenRequest], groups: Sequence[Sequence[int]]
    ) -> list[tuple[list[PrefixGroup], Runner]]:
        """Return the prefix groups to pack, and those for plain passes, if there are any."""
        longest, reason = self.packable
        long = {index for index, r in enumerate(requests) if len(r.input_ids) > longest}
        short = [[index for index in group if index not in long] for group in groups]
        packed = group_by_prefix(requests, [group for group in short if group])
        plain = group_by_prefix(requests, [[index] for index in sorted(long)])
        if plain and not self._warned:
            message = (
                f"{len(long):,} of {len(requests):,} requests fall back to plain forward passes, "
                f"slower than packed ones: {reason}"
            )
            tqdm.write(message, file=sys.stderr)
            self._warned = True
        return [part for part in ((packed, self._packed), (plain, self._plain)) if part[0]]

    def _run(
        self,
        requests: Sequence[TokenRequest],
        groups: Sequence[PrefixGroup],
        work: Callable[[PackedBatch, ForwardContext], None],
        runner: Runner,
    ) -> Generator[PackedBatch, None, None]:
        """Work on batches, concurrently if that pays, and yield each when it is done."""
        workers = self._num_workers(groups) if runner.concurrent else 1
        while groups:
            batches = runner.divide(groups, requests, self.token_budget, workers)
            failed: list[list[PrefixGroup]] = []
            run = partial(self._run_or_oom, requests=requests, work=work, concurrent=workers > 1)
            # No further batch is started once memory has run out.
            started = takewhile(lambda _, failed=failed: not failed, batches)
            for part, done in zip_longest(batches, map_in_order(run, started, workers)):
                if done is None:
                    failed.append(part)
                    continue
                batch, sums = done
                if self._recorder is not None and sums is not None:
                    self._recorder.merge(sums)
                yield batch
            if failed:
                workers = self._reduce_batch(workers, len(failed[0]))
            groups = [group for part in failed for group in part]

    def _num_workers(self, groups: Sequence[PrefixGroup]) -> int:
        """Return the number of concurrent batches."""
        if self._workers is not None:
            return self._workers
        if self.model.device.type != "cpu" or routes_in_order(self.model):
            return 1
        tokens = sum(group.size for group in groups)
        return max(1, min(divide_threads(torch.get_num_threads()), tokens // MIN_WORKER_TOKENS))

    @torch.inference_mode()
    def _run_or_oom(
        self,
        groups: Sequence[PrefixGroup],
        requests: Sequence[TokenRequest],
        work: Callable[[PackedBatch, ForwardContext], None],
        concurrent: bool,
    ) -> tuple[PackedBatch, Sums | None] | None:
        """Work on a batch; return it and what was recorded, or None if memory ran out."""
        batch = build(requests, groups)
        sums = None if self._recorder is None else {}
        key_T = torch.from_numpy(batch.key_T)
        context = ForwardContext(concurrent=concurrent, sums=sums, key_T=key_T)
        try:
            with forward_context(context):
                work(batch, context)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None
        return batch, sums

    def _reduce_batch(self, workers: int, groups: int) -> int:
        """Drop to one worker, or halve the budget if there is one; return the number of workers."""
        if workers > 1:
            message = "out of memory: one forward pass at a time from here on"
        elif groups == 1:
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

    def _score_batch(
        self,
        batch: PackedBatch,
        context: ForwardContext,
        runner: Runner,
        greedy: bool,
        scores: list[Score],
        keep_states: Collection[int],
    ) -> None:
        states: dict[int, Tensor] = {}
        states_NH = None
        if any(member in keep_states for member in batch.members):
            states_NH = runner.states(batch)
            parts = zip(batch.members, states_NH.split(batch.targets.tolist()), strict=True)
            states = {member: part.cpu() for member, part in parts if member in keep_states}
        likelihood_N, greedy_N = runner.likelihoods(batch, greedy, states_NH)
        totals = np.add.reduceat(likelihood_N.double().cpu().numpy(), batch.first_target)
        greedies = [None] * len(totals)
        if greedy_N is not None:
            greedies = np.logical_and.reduceat(greedy_N.cpu().numpy(), batch.first_target).tolist()
        rows = zip(
            batch.members,
            totals,
            greedies,
            batch.targets,
            self._experts(batch, context),
            strict=True,
        )
        for member, total, best, count, experts in rows:
            kept = states.get(member)
            scores[member] = Score(float(total), best, int(count), experts, kept)

    def _experts(self, batch: PackedBatch, context: ForwardContext) -> list[float | None]:
        """Return each request's mean experts, from the counts of its forward pass."""
        if self._recorder is None or context.counts_T is None:
            return [None] * len(batch.members)
        counts_T = context.counts_T.double().cpu().numpy()
        before = np.concatenate([[0.0], np.cumsum(counts_T)])
        prefix_start, prefix_end, start, end = batch.paths.T
        total = before[prefix_end] - before[prefix_start] + before[end] - before[start]
        read = prefix_end - prefix_start + end - start
        return (total / (read * self._routers)).tolist()


def _combine(parts: Sequence[tuple[Score, int]]) -> Score:
    """Join the scores of a text's windows; each comes with the number of tokens it read."""
    read = sum(size for _, size in parts)
    experts = [s.mean_experts * size for s, size in parts if s.mean_experts is not None]
    states = [score.states for score, _ in parts if score.states is not None]
    return Score(
        log_likelihood=sum(score.log_likelihood for score, _ in parts),
        greedy=None,
        tokens=sum(score.tokens for score, _ in parts),
        mean_experts=sum(experts) / read if experts else None,
        states=torch.cat(states) if states else None,
    )
