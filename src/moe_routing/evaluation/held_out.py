"""Interventions on text that nothing was fitted on: toggles, removals together, dead experts.

Each function writes files of :class:`HeldOutFiles` into a study's folder. Analyses read these
files, so they need no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd

from moe_routing.config.cells import data_file
from moe_routing.config.study import CALIBRATION, load_config
from moe_routing.data.items import read_items
from moe_routing.data.sources import CERTIFICATION_FILE
from moe_routing.data.subset import data_rng
from moe_routing.engine.adapters import find_routers
from moe_routing.engine.branches import Probe
from moe_routing.engine.dead import dead_experts
from moe_routing.engine.loading import LoadedModel
from moe_routing.engine.requests import Encoder, max_length
from moe_routing.engine.routed import routed
from moe_routing.errors import InputError
from moe_routing.evaluation.held_out_files import DEAD_PARTS, HeldOutFiles
from moe_routing.evaluation.study_model import load_study_model
from moe_routing.evaluation.together import (
    RULE,
    Set,
    kept_by_strategy,
    ordered_sets,
    remove_together,
)
from moe_routing.evaluation.toggles import (
    check_stock,
    choose_tokens,
    toggle_probes,
    toggle_routed,
)
from moe_routing.files import atomic_path, read_parquet
from moe_routing.routing.calibration import OUTPUTS_FILE, Calibration
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.vocabulary import NeededId

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moe_routing.config.study import StudyConfig
    from moe_routing.routing.strategies.testing import BH

NOISE_DOCUMENTS = 24
"""Documents whose tokens give the noise floor; the one that epsilon is checked against is that of
the calibration."""


@dataclass(frozen=True)
class Job:
    """What held-out interventions of a study start with.

    Attributes:
        config: the config.
        results: folder of the study.
        loaded: the stock model.
        outputs: outputs of its experts.
    """

    config: StudyConfig
    results: Path
    loaded: LoadedModel
    outputs: ExpertOutputs

    @classmethod
    def load(cls, results: Path) -> Job:
        """Read it.

        Raises:
            InputError: a file is missing or not the study's.
        """
        config = load_config(results / "config.yaml")
        outputs = ExpertOutputs.load(results / "calibration" / OUTPUTS_FILE)
        loaded = load_study_model(config.model, results, config.resources.threads)
        check_stock(loaded.model, outputs)
        return cls(config, results, loaded, outputs)

    @property
    def files(self) -> HeldOutFiles:
        """Where results are written."""
        return HeldOutFiles(self.results)

    @cached_property
    def calibration_texts(self) -> list[str]:
        """The documents that everything is fitted on."""
        return list(read_parquet(self.results / "data" / "calibration.parquet", "text")["text"])

    @cached_property
    def encoder(self) -> Encoder:
        """What makes token ids."""
        window = max_length(self.loaded.model.config, self.config.evaluation.window)
        return Encoder(self.loaded.tokenizer, window)

    @property
    def arm(self) -> BH:
        """The BH routing that is examined."""
        return self.config.bh_arm(find_routers(self.loaded.model)[0].top_k)

    def rng(self, what: str) -> np.random.Generator:
        """Return the source of randomness of a part."""
        return data_rng(self.config.seed, f"held_out/{what}")

    def texts(self, text: str) -> list[str]:
        """Return the documents of a text.

        Raises:
            InputError: no such text, no documents, or some of them are calibration documents.
        """
        allowed = self.config.held_out_texts
        if text not in allowed:
            raise InputError(f"text '{text}' is unknown; allowed: {', '.join(allowed)}")
        if text == CALIBRATION:
            path = self.results / "data" / CERTIFICATION_FILE
            documents = list(read_parquet(path, "text")["text"])
        else:
            path = self.results / data_file(text)
            documents = [item.context for item in read_items(path)]
        shared = set(documents) & set(self.calibration_texts)
        if shared:
            raise InputError(
                f"{path}: {len(shared)} of {len(documents)} documents are calibration documents, "
                f"such as {min(shared)[:40]!r}; allowed: documents that nothing is fitted on"
            )
        return documents

    def draw(self, texts: Sequence[str], key: str, what: str) -> list[Probe]:
        """Draw tokens of documents.

        Args:
            texts: the documents.
            key: the setting that says how many.
            what: the files that they are for, which seeds the draw.

        Raises:
            InputError: the documents have too few tokens.
        """
        return choose_tokens(
            self.encoder,
            texts,
            getattr(self.config.analysis.held_out, key),
            self.rng(what),
            source=f"text of held_out/{what}",
            asked=f"analysis.held_out.{key} is",
        )


def toggle_held_out(job: Job, text: str) -> pd.DataFrame:
    """Toggle and remove experts of the stock model on a text; return what is removed together.

    Writes the toggles, what the tokens are (:func:`describe_tokens`), and the experts that are
    removed together (:func:`~moe_routing.evaluation.together.remove_together`): those that the
    study's BH routing leaves out, and those that orders leave out. Removals are compensated, too,
    if one of the study's nulls is about that.

    Args:
        job: what the interventions start with.
        text: ``calibration``, for documents that nothing was fitted on, or an evaluation set, whose
            contexts are read.

    Raises:
        InputError: no such text, too few tokens in it, documents that something was fitted on, or
            a calibration of another model; see :func:`toggle_probes`.
    """
    arm = job.arm
    calibration = Calibration.for_strategies(job.results / "calibration", arm)
    key = "tokens" if text == CALIBRATION else "dataset_tokens"
    probes, model = job.draw(job.texts(text), key, f"toggles/{text}"), job.loaded.model
    nulls = [NeededId.parse(null) for null in (*job.config.calibration.nulls, arm.needs_null)]
    toggles = toggle_probes(
        model,
        probes,
        job.outputs,
        compensated=any(null is not None and null.dropped == "compensated" for null in nulls),
        noise_documents=NOISE_DOCUMENTS,
        rng=job.rng(f"{text}/ranks"),
    )
    kept = Set(RULE, kept_by_strategy(arm, calibration, toggles))
    sets = ordered_sets(toggles, job.outputs)
    together = remove_together(model, probes, toggles, kept, sets)
    tokens = describe_tokens(job.encoder, probes, job.calibration_texts)
    tokens = tokens.assign(loss=together.loss_T.numpy())
    toggles.save(job.files.toggles(text))
    for table, path in (
        (tokens, job.files.tokens(text)),
        (together.rows, job.files.together(text)),
    ):
        with atomic_path(path) as temporary:
            table.to_parquet(temporary, index=False)
    return together.rows


def toggle_routed_states(job: Job) -> None:
    """Remove experts that the study's BH routing keeps, in the states of the routed model.

    The documents are those of the text ``calibration``. See :func:`toggle_routed`.

    Raises:
        InputError: see :func:`toggle_held_out`.
    """
    arm = job.arm
    calibration = Calibration.for_strategies(job.results / "calibration", arm)
    probes = job.draw(job.texts(CALIBRATION), "dataset_tokens", "routed")
    with routed(job.loaded.model, arm, calibration=calibration):
        toggles = toggle_routed(
            job.loaded.model, probes, job.outputs, noise_documents=NOISE_DOCUMENTS
        )
    toggles.save(job.files.routed)


def toggle_dead(job: Job) -> pd.DataFrame:
    """Toggle experts of the model with dead experts, drawn at random in each layer; return them.

    On calibration text, to fit the null ``needed`` on that model, and on documents that nothing was
    fitted on, to test it. Removals are not compensated.

    Returns:
        ``layer`` and ``expert``, one row per dead expert.

    Raises:
        InputError: too few tokens, documents that something was fitted on, or a model whose weights
            are offloaded; see :func:`toggle_probes`.
    """
    model = job.loaded.model
    routers = find_routers(model)
    filled = job.config.analysis.of_model(routers[0].num_experts, routers[0].top_k)
    rng = job.rng("dead/experts")
    dead = [
        sorted(rng.permutation(router.num_experts)[: filled.held_out.dead_experts].tolist())
        for router in routers
    ]
    texts = dict(zip(DEAD_PARTS, (job.calibration_texts, job.texts(CALIBRATION)), strict=True))
    mean_LEH = job.outputs.mean_LEH.clone()
    for layer, experts in enumerate(dead):
        mean_LEH[layer, experts] = 0
    outputs = replace(job.outputs, mean_LEH=mean_LEH)
    for part, documents in texts.items():
        name = f"dead/{part}"
        probes = job.draw(documents, "dead_tokens", name)
        with dead_experts(model, dead):
            toggles = toggle_probes(
                model,
                probes,
                outputs,
                compensated=False,
                noise_documents=NOISE_DOCUMENTS,
                rng=job.rng(f"{name}/ranks"),
            )
        toggles.save(job.files.dead(part))
    rows = [(layer, expert) for layer, experts in enumerate(dead) for expert in experts]
    table = pd.DataFrame(rows, columns=["layer", "expert"])
    with atomic_path(job.files.dead_experts) as temporary:
        table.to_csv(temporary, index=False)
    return table


def describe_tokens(
    encoder: Encoder, probes: Sequence[Probe], calibration_texts: Sequence[str]
) -> pd.DataFrame:
    """Return what the probed tokens are, one row each, in the order of ``Toggles.token_P``.

    Columns: ``document`` (index), ``position`` (0: the prefix token), ``token_id``, ``token``
    (text, with the space before it), ``frequency`` (how often the id is read in calibration text,
    where every document has the prefix token before it) and ``word_start``: whether the token is
    the first of a word, after white space or at the start of the text.

    Args:
        encoder: makes token ids.
        probes: documents and tokens.
        calibration_texts: documents that everything is fitted on.
    """
    tokenizer = encoder.tokenizer
    windows = encoder.rolling(calibration_texts)
    frequency = Counter(token for text in windows for window in text for token in window.target_ids)
    frequency[encoder.prefix_token] += len(windows)
    rows = []
    for probe in probes:
        ids = probe.ids_S.tolist()
        for position in probe.positions:
            token, text = ids[position], _text(tokenizer, ids, position)
            word = text.strip()
            first = position == 1 or text[:1].isspace() or _ends_in_space(tokenizer, ids, position)
            starts = bool(word) and word[0].isalnum() and position > 0 and first
            rows.append((probe.document, position, token, text, frequency[token], starts))
    names = ["document", "position", "token_id", "token", "frequency", "word_start"]
    return pd.DataFrame(rows, columns=names)


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], position: int) -> str:
    """Return what a token adds to the text before it.

    Some tokenizers leave out the space before a token that is decoded alone.
    """
    alone = _decode(tokenizer, ids[position : position + 1])
    before = _decode(tokenizer, ids[max(0, position - 1) : position])
    both = _decode(tokenizer, ids[max(0, position - 1) : position + 1])
    return both.removeprefix(before) if both.startswith(before) else alone


def _ends_in_space(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], position: int) -> bool:
    """Return whether the token before ends in white space."""
    return _decode(tokenizer, ids[max(0, position - 1) : position])[-1:].isspace()


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return cast("str", tokenizer.decode(list(ids)))
