"""Efficiency: how long a fixed text takes under each strategy, and the experts that a batch needs.

Shape letters: B rows of text, S tokens of a row, D documents, L layers, E experts, R repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from moe_routing.config.cells import TIMING_FILE, UNIQUE_FILE, data_file, measured
from moe_routing.config.study import StudyConfig, load_config
from moe_routing.data.items import read_items
from moe_routing.data.subset import data_rng
from moe_routing.engine.offload import input_device
from moe_routing.engine.recorder import Recorder
from moe_routing.engine.requests import Encoder, max_length
from moe_routing.engine.routed import routed
from moe_routing.errors import InputError
from moe_routing.evaluation.cells import load_calibration
from moe_routing.evaluation.study_model import load_study_model
from moe_routing.files import atomic_path
from moe_routing.routing.budget import left_out
from moe_routing.routing.strategies import Strategy
from moe_routing.routing.types import Routing
from moe_routing.vocabulary import text_dataset

if TYPE_CHECKING:
    from moe_routing.engine.loading import LoadedModel
    from moe_routing.routing.calibration import Calibration

CONTEXT = 16
"""Tokens of each document that are read for batches; each after the first may be in a batch."""


@dataclass(frozen=True)
class EfficiencyText:
    """The text that every strategy reads.

    Attributes:
        timed_BS: token ids of the timed passes.
        documents_DS: the first ``CONTEXT`` tokens of as many documents as the largest batch has.
    """

    timed_BS: Tensor
    documents_DS: Tensor

    @classmethod
    def of(cls, config: StudyConfig, results: Path, encoder: Encoder) -> EfficiencyText:
        """Read it from the study's set of running text.

        Raises:
            InputError: the set has too few tokens, or no document of ``CONTEXT`` tokens.
        """
        settings, name = config.analysis.efficiency, text_dataset(config.datasets)
        items = read_items(results / data_file(name))
        texts = [item.text for item in items]
        documents = [windows[0].input_ids for windows in encoder.rolling(texts)]
        ids = [token for document in documents for token in document]
        length = min(encoder.max_length, settings.tokens)
        rows = settings.tokens // length
        if len(ids) < rows * length:
            raise InputError(
                f"analysis.efficiency.tokens is {settings.tokens}; allowed: at most the {len(ids)} "
                f"tokens of {name}"
            )
        context = min(CONTEXT, encoder.max_length)
        long = [document[:context] for document in documents if len(document) >= context]
        if not long:
            raise InputError(f"{name} has no document of {context} tokens; allowed: at least one")
        return cls(
            torch.tensor(ids[: rows * length]).view(rows, length),
            torch.tensor(long[: max(settings.batch_sizes)]),
        )


def measure_efficiency(results: Path) -> None:
    """Write ``efficiency/timing.csv`` and ``efficiency/unique_experts.csv`` of a study.

    Strategies of the same routing are measured once, and have the same rows of times. Those whose
    budget cannot be kept have none.

    Raises:
        InputError: too little text, or a calibration file that is missing or of another model.
    """
    config = load_config(results / "config.yaml")
    loaded = load_study_model(config.model, results, config.resources.threads)
    encoder = Encoder(loaded.tokenizer, max_length(loaded.model.config, config.evaluation.window))
    text = EfficiencyText.of(config, results, encoder)
    names = measured(config)
    absent = left_out(results / "calibration", [config.parsed[name] for name in names])
    names = [name for name in names if name not in absent]
    calibration = load_calibration(results, *(config.parsed[name] for name in names))
    same = config.duplicates(loaded.rule)
    distinct = {name: config.parsed[name] for name in names if same.get(name, name) == name}
    passes = _Passes(loaded, config.model.experts_implementation, calibration)
    used_LDE = {
        name: passes.used_experts(strategy, text.documents_DS)
        for name, strategy in tqdm(distinct.items(), desc="experts", unit="strategy")
    }
    settings = config.analysis.efficiency
    rng = data_rng(config.seed, "efficiency")
    seconds_R = interleaved(
        {
            name: lambda strategy=strategy: passes.seconds(strategy, text.timed_BS)
            for name, strategy in distinct.items()
        },
        settings.repeats,
        rng,
    )
    timing = [
        (name, repeat, seconds, text.timed_BS.numel())
        for name in names
        for repeat, seconds in enumerate(seconds_R[same.get(name, name)])
    ]
    nearest = one_per_family(distinct, used_LDE, loaded.rule.top_k / 2)
    unique = pd.concat(
        [unique_table(name, used_LDE[name], settings.batch_sizes) for name in nearest]
    )
    tables = {
        TIMING_FILE: pd.DataFrame(timing, columns=["strategy", "repeat", "seconds", "tokens"]),
        UNIQUE_FILE: unique,
    }
    for file, table in tables.items():
        with atomic_path(results / file) as temporary:
            table.to_csv(temporary, index=False)


def interleaved(
    runs: dict[str, Callable[[], float]], repeats: int, rng: np.random.Generator
) -> dict[str, list[float]]:
    """Return what each run gave, by repeat: all once, in random order, then all again.

    So what else the machine does at some time does not fall on one of them alone.
    """
    names, found = list(runs), {name: [0.0] * repeats for name in runs}
    orders = [(repeat, rng.permutation(len(names))) for repeat in range(repeats)]
    with tqdm(total=repeats * len(names), desc="timing", unit="pass", disable=None) as bar:
        for repeat, order in orders:
            for index in order:
                found[names[index]][repeat] = runs[names[index]]()
                bar.update()
    return found


def one_per_family(
    strategies: dict[str, Strategy], used_LDE: dict[str, NDArray], experts: float
) -> list[str]:
    """Return for each kind of rule the strategy whose mean experts are nearest to a number.

    A kind is a family with its score and what stands in for dropped experts. Other weights than the
    family's make no kind.

    Args:
        strategies: the strategies, by id.
        used_LDE: see :func:`expected_unique`, by id.
        experts: mean experts per token and layer.
    """
    best: dict[tuple, str] = {}

    def distance(name: str) -> float:
        return abs(used_LDE[name].sum(2).mean() - experts)

    for name, strategy in strategies.items():
        weighting = type(strategy).model_fields.get("weighting")
        if weighting is not None and getattr(strategy, "weighting", None) != weighting.default:
            continue
        kind = (strategy.family.name, getattr(strategy, "score", None), strategy.dropped)
        if kind not in best or distance(name) < distance(best[kind]):
            best[kind] = name
    return list(best.values())


def unique_table(name: str, used_LDE: NDArray, batch_sizes: Sequence[int]) -> pd.DataFrame:
    """Return the rows of a strategy: ``unique_experts`` by batch size and layer.

    ``mean_experts`` are those of one token in the layer; ``documents`` is how many were read. Batch
    sizes above that are left out.
    """
    documents = used_LDE.shape[1]
    mean_L = used_LDE.sum(2).mean(1)
    tables = []
    for size in (size for size in batch_sizes if size <= documents):
        unique_L = expected_unique(used_LDE, size)
        columns = {
            "layer": np.arange(len(unique_L)),
            "unique_experts": unique_L,
            "mean_experts": mean_L,
        }
        tables.append(pd.DataFrame({"strategy": name, "batch_size": size, **columns}))
    return pd.concat(tables).assign(documents=documents)


def expected_unique(used_LDE: NDArray, size: int) -> NDArray:
    """Return the expected distinct experts of a random batch, by layer.

    A batch has one token each of ``size`` different documents, as in decoding, all such batches
    being equally likely. Its expert e is unused with probability (product of 1 - used over the
    documents), whose mean over sets of documents is an elementary symmetric polynomial over a
    binomial coefficient. This is the measure of OEA (arXiv 2511.02237), without sampling error.

    Args:
        used_LDE: proportion of a document's tokens that select the expert, (layers, documents,
            experts).
        size: tokens of a batch, at most the number of documents.

    >>> float(expected_unique(np.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]), 2)[0])
    1.6666666666666667
    """
    layers, documents, experts = used_LDE.shape
    # sums[s]: sum over all sets of s documents so far of the product of their proportions unused
    sums = np.zeros((size + 1, layers, experts))
    sums[0] = 1.0
    for document in range(documents):
        sums[1:] += sums[:-1] * (1 - used_LDE[:, document])
    return (1 - sums[size] / comb(documents, size)).sum(1)


class SelectionRecorder(Recorder):
    """Keeps which experts each token of the last forward pass selected, by layer."""

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        self.used_TE: dict[int, Tensor] = {}

    def add(self, layer: int, routing: Routing, floor: int, cap: int) -> None:
        """Keep the selection of one layer; nothing is summed."""
        del floor, cap
        index_TK, experts = routing.selection.index_TK, routing.probability_TE.shape[1]
        used_TE = torch.zeros(len(index_TK), experts + 1, device=index_TK.device)
        # The id after the last marks padded slots.
        self.used_TE[layer] = used_TE.scatter_(1, index_TK, 1.0)[:, :experts].cpu()


@dataclass(frozen=True)
class _Passes:
    """Forward passes of a model under strategies, without its head, which no strategy changes."""

    loaded: LoadedModel
    experts_implementation: str
    calibration: Calibration | None

    def used_experts(self, strategy: Strategy, documents_DS: Tensor) -> NDArray:
        """Return the proportion of each document's tokens that select an expert, (L, D, E)."""
        recorder = SelectionRecorder()
        with self._reader(strategy, recorder) as read:
            read(documents_DS)
        shape = (*documents_DS.shape, -1)
        used_LDSE = torch.stack([used.view(shape) for _, used in sorted(recorder.used_TE.items())])
        # The first token is the same for every document.
        return used_LDSE[:, :, 1:].double().mean(2).numpy()

    def seconds(self, strategy: Strategy, timed_BS: Tensor) -> float:
        """Return the wall-clock time of one pass over a text."""
        with self._reader(strategy) as read:
            if self.loaded.model.device.type != "cpu":
                read(timed_BS[:1])  # copies what the strategy needs to the device
            started = time.perf_counter()
            read(timed_BS)
            return time.perf_counter() - started

    @contextmanager
    def _reader(
        self, strategy: Strategy, recorder: Recorder | None = None
    ) -> Iterator[Callable[[Tensor], None]]:
        """Yield a function that reads token ids under the strategy, and returns when it is done."""
        model = self.loaded.model
        device = input_device(model)

        def read(ids_BS: Tensor) -> None:
            with torch.inference_mode():
                model.base_model(ids_BS.to(device), use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        with routed(
            model,
            strategy,
            calibration=self.calibration,
            recorder=recorder,
            experts_implementation=self.experts_implementation,
        ):
            yield read
