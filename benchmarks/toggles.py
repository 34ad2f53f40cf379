"""Time of toggling experts: branches in packed batches against whole forward passes.

    python benchmarks/toggles.py                              # a few minutes on one core
    python benchmarks/toggles.py --tokens 300 --rounds 1 --json toggles.json

Experts of calibration tokens are toggled in every layer, those of the model's own choice and some
of lower ranks, by ``toggle_experts``; the noise floor, the fingerprint and a second, compensated
branch of each removal are included. Some of these toggles are done again, each by a whole forward
pass of the document up to the token, with the router's output patched. The ratio is that of times
per toggle, the median over interleaved rounds. The largest difference in KL is relative, of toggles
above 1e-7 nats; a difference larger than rounding explains is a later layer in which two experts
are nearly tied.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from measure import interleave, options, prepare, ratio, show
from torch import Tensor
from transformers import PreTrainedModel

from moe_routing.config.study import ModelConfig
from moe_routing.engine.adapters import find_routers
from moe_routing.engine.loading import LoadedModel, load_model
from moe_routing.engine.patching import Forward, patched_forward
from moe_routing.engine.requests import Encoder
from moe_routing.evaluation.outputs import fit_expert_outputs
from moe_routing.evaluation.toggles import toggle_experts
from moe_routing.routing.outputs import ExpertOutputs
from moe_routing.routing.toggles import Toggles

ROOT = Path(__file__).resolve().parents[1]
OUTPUT_TOKENS, OUTPUT_WINDOW = 512, 128
"""Text of the mean outputs; how much it is does not change the times."""


def by_branches(
    loaded: LoadedModel, texts: Sequence[str], outputs: ExpertOutputs, tokens: int, seed: int
) -> Toggles:
    """Toggle as a study does."""
    rng = np.random.default_rng(seed)
    return toggle_experts(loaded.model, loaded.tokenizer, texts, outputs, tokens=tokens, rng=rng)


def by_whole_passes(
    loaded: LoadedModel, cases: Sequence[Case], stock: Sequence[Tensor]
) -> np.ndarray:
    """Return the KL of some toggles, each by a forward pass of its document up to the token."""
    routers = find_routers(loaded.model)
    kl = []
    for case, log_p_V in zip(cases, stock, strict=True):
        with patched_forward(routers[case.layer].module, partial(toggled, case.expert)):
            log_q_V = prediction(loaded.model, case.ids_S)
        kl.append(float(log_p_V.exp() @ (log_p_V - log_q_V)))
    return np.array(kl)


class Case(NamedTuple):
    """One toggle: a document up to the token, a layer, an expert."""

    ids_S: Tensor
    layer: int
    expert: int

    @classmethod
    def of(cls, toggles: Toggles, row: int, loaded: LoadedModel, texts: Sequence[str]) -> Case:
        """Return the toggle of one row."""
        encoder = Encoder(loaded.tokenizer, loaded.model.config.max_position_embeddings)
        window, *_ = encoder.rolling([texts[int(toggles.document_P[row])]])[0]
        ids_S = torch.tensor(window.input_ids[: int(toggles.position_P[row]) + 1])
        return cls(ids_S, int(toggles.layer_P[row]), int(toggles.expert_P[row]))


@torch.inference_mode()
def prediction(model: PreTrainedModel, ids_S: Tensor) -> Tensor:
    """Return the log-probabilities of the token after the last one, float64, (vocabulary,)."""
    ids_1S = ids_S[None].to(model.device)
    return model(ids_1S, use_cache=False, logits_to_keep=1).logits[0, -1].double().log_softmax(-1)


def toggled(expert: int, inner: Forward) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return a router's forward that toggles an expert of the last token."""
    route = cast("Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]", inner)

    def forward(hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE, weight_TK, index_TK = route(hidden_TH)
        weight_TK, index_TK = F.pad(weight_TK, (0, 1)), F.pad(index_TK, (0, 1))
        chosen_K, probability_E = index_TK[-1, :-1], logits_TE[-1].float().softmax(-1)
        if bool((chosen_K == expert).any()):
            weight_TK[-1, :-1] *= chosen_K != expert
        else:
            scale = weight_TK[-1].sum() / probability_E[chosen_K].sum()
            index_TK[-1, -1], weight_TK[-1, -1] = expert, probability_E[expert] * scale
        return logits_TE, weight_TK, index_TK

    return forward


def compare(loaded: LoadedModel, texts: Sequence[str], arguments: argparse.Namespace) -> list[dict]:
    """Time both, and compare their KL."""
    outputs = fit_expert_outputs(
        loaded.model, loaded.tokenizer, texts, tokens=OUTPUT_TOKENS, window=OUTPUT_WINDOW
    )
    toggles = by_branches(loaded, texts, outputs, arguments.tokens, arguments.seed)
    number = toggles.kl_P.numel()
    rng = np.random.default_rng(arguments.seed)
    rows = rng.choice(number, min(number, arguments.passes), replace=False).tolist()
    cases = [Case.of(toggles, row, loaded, texts) for row in rows]
    stock = [prediction(loaded.model, case.ids_S) for case in cases]
    kl_P = {"branches": toggles.kl_P[rows].numpy()}

    def slow() -> None:
        kl_P["whole passes"] = by_whole_passes(loaded, cases, stock)

    def fast() -> None:
        by_branches(loaded, texts, outputs, arguments.tokens, arguments.seed)

    times = interleave({"whole passes": slow, "branches": fast}, arguments.rounds, arguments.device)
    each = {"whole passes": len(rows), "branches": number}
    per_toggle = {name: [s / each[name] for s in seconds] for name, seconds in times.items()}
    expected = kl_P["whole passes"]
    large = expected > 1e-7
    return [
        {
            "implementation": name,
            "toggles": each[name],
            "seconds": statistics.median(times[name]),
            "toggles/s": 1 / statistics.median(per_toggle[name]),
            "tokens/s": arguments.tokens / number / statistics.median(per_toggle[name]),
            "times whole passes": ratio(per_toggle["whole passes"], per_toggle[name]),
            "largest difference, %": 100 * np.abs(kl_P[name] / expected - 1)[large].max(),
        }
        for name in times
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options(parser, rounds=3)
    parser.set_defaults(threads=1)
    parser.add_argument("--model", default=str(ROOT / "resources" / "olmoe-nano"))
    parser.add_argument(
        "--text",
        type=Path,
        default=ROOT / "tests" / "data_files" / "calibration.txt",
        help="documents, separated by empty lines",
    )
    parser.add_argument("--tokens", type=int, default=40, help="tokens to intervene on")
    parser.add_argument("--passes", type=int, default=40, help="toggles by whole passes")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Load, time, print."""
    arguments = parse(argv)
    record = {"arguments": vars(arguments), "machine": prepare(arguments)}
    config = ModelConfig(path=arguments.model, device=arguments.device)
    loaded = load_model(config, arguments.threads)
    texts = arguments.text.read_text(encoding="utf-8").split("\n\n")
    record["toggles"] = compare(loaded, texts, arguments)
    show(record, arguments.json)


if __name__ == "__main__":
    main()
