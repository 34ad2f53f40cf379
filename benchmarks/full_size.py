"""OLMoE-1B-7B at full size with random weights: the engine against stock, and a projection.

    python benchmarks/full_size.py --device cuda --json full_size.json   # bfloat16, 65,536 tokens
    python benchmarks/full_size.py                                       # CPU, an eighth as wide

Nothing is downloaded. Router logits have unit variance and, because the experts' router vectors
differ in length, the heavy tails and uneven loads of a trained router. The first table describes
them. Then:

- scoring: tokens per second at k = 8, stock ``eager`` and ``grouped_mm`` against the engine, and
  the peak of memory above the weights for the given tokens in one forward pass.
- rates: the engine under static strategies, every position scored.
- projection: the time of the study of config/olmoe-1b-7b.yaml, 23 distinct strategies on three
  evaluation sets, at these rates, with its arithmetic. It covers scoring only, without loading.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from engine import Bench, scoring_table
from measure import interleave, options, prepare, sgemm_rate, show
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedModel

from moe_routing.config.study import StudyConfig, load_config
from moe_routing.engine.adapters import find_routers
from moe_routing.routing.rule import ModelRule
from moe_routing.routing.strategies import parse_strategy

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "config" / "olmoe-1b-7b.yaml"
OLMOE = ModelRule(8, "softmax")
STUDY_TOKENS = {"wikitext": 384_375, "hellaswag": 1_997_381, "lambada": 476_721}
"""Tokens of the whole evaluation sets by the embedded model's tokenizer, shared contexts once. The
larger vocabulary of OLMoE needs fewer, so projections from these are upper bounds."""
STATIC = (2, 4, 6, 8, 16, 32, 64)
ROUTER_SPREAD = 0.35
"""Standard deviation of the logarithm of the lengths of router vectors. Pooled logits then have a
kurtosis of 3 exp(4 * 0.35^2) = 4.9; in the real model it is between 3.7 and 6.0, by layer."""


class NoTokenizer:
    """Replaces a tokenizer where requests are tokens already."""

    bos_token_id = eos_token_id = 0

    def decode(self, _: int) -> str:
        """Return a name for the prefix token."""
        return "<0>"


def random_model(scale: int, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Return OLMoE-1B-7B's architecture with random weights, ``scale`` times narrower.

    Layers, experts and top-k stay; hidden size, expert size, heads and vocabulary shrink.
    """
    config = OlmoeConfig(
        hidden_size=2048 // scale,
        intermediate_size=1024 // scale,
        num_hidden_layers=16,
        num_attention_heads=max(1, 16 // scale),
        num_experts=64,
        num_experts_per_tok=8,
        vocab_size=50304 // scale,
        max_position_embeddings=4096,
        norm_topk_prob=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for router in find_routers(model):
        weight_EH = router.module.weight
        length_E1 = torch.randn(len(weight_EH), 1).mul(ROUTER_SPREAD).exp()
        length_E1 /= length_E1.square().mean().sqrt()
        # Inputs have unit mean square, so the logits have unit variance.
        random_EH = torch.randn(weight_EH.shape) * length_E1 / config.hidden_size**0.5
        weight_EH.data.copy_(random_EH)
    return model.eval().requires_grad_(False)


def router_logits(model: PreTrainedModel, ids_BS: torch.Tensor) -> list[torch.Tensor]:
    """Return the logits of the routers of a stock model, (tokens, experts) for each layer."""
    logits: list[torch.Tensor] = []
    handles = [
        router.module.register_forward_hook(lambda *args: logits.append(args[-1][0]))
        for router in find_routers(model)
    ]
    with torch.inference_mode():
        model.base_model(ids_BS, use_cache=False)
    for handle in handles:
        handle.remove()
    return logits


def router_table(bench: Bench) -> list[dict]:
    """Describe the router logits of one window: means over layers."""
    rows = []
    for logits_TE in (part.float() for part in router_logits(bench.model, bench.ids_BS[:1])):
        centred = logits_TE - logits_TE.mean()
        variance = centred.square().mean()
        load_E = logits_TE.topk(8).indices.flatten().bincount(minlength=logits_TE.shape[1])
        rows.append(
            {
                "standard deviation": variance.sqrt().item(),
                "kurtosis": (centred.pow(4).mean() / variance.square()).item(),
                "largest load / mean load": (load_E.max() / load_E.float().mean()).item(),
            }
        )
    return [{name: statistics.fmean(row[name] for row in rows) for name in rows[0]}]


def rates_table(bench: Bench, rounds: int) -> list[dict]:
    """Time the engine under static strategies, every position scored."""
    runs = {k: partial(bench.engine, None, f"regular_k{k}") for k in STATIC}
    seconds = interleave(runs, rounds, bench.device)
    tokens = bench.ids_BS.numel()
    return [
        {"experts": k, "tokens/s": tokens / statistics.median(times)}
        for k, times in seconds.items()
    ]


def distinct_strategies(study: StudyConfig) -> list[str]:
    """Return the compared strategies of a study whose routing no other one has."""
    return [name for name in study.strategies if name not in study.duplicates(OLMOE)]


def projection(strategies: Sequence[str], rates: Mapping[int, float]) -> list[dict]:
    """Project strategies on the whole evaluation sets from rates by number of experts.

    Each strategy takes the rate of the static one with as many experts, or the next more, as it
    may select at most: an upper bound for adaptive ones.
    """
    tokens = sum(STUDY_TOKENS.values())
    most = [parse_strategy(name).resolved(OLMOE).max_experts for name in strategies]
    steps = Counter(min((k for k in rates if k >= m), default=max(rates)) for m in most)
    minutes = {k: count * tokens / rates[k] / 60 for k, count in sorted(steps.items())}
    rows = [
        {
            "strategies": steps[k],
            "at rate of k": k,
            "minutes": minutes[k],
            "arithmetic": f"{steps[k]} x {tokens:,} tokens / {rates[k]:,.0f} tokens/s / 60",
        }
        for k in minutes
    ]
    cells = len(strategies) * len(STUDY_TOKENS)
    total = {"strategies": len(strategies), "at rate of k": "all", "minutes": sum(minutes.values())}
    return [*rows, {**total, "arithmetic": f"sum of the above: {cells} cells"}]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; defaults depend on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options(parser, rounds=3)
    parser.add_argument("--scale", type=int, help="times narrower (1 on a GPU, 8 on the CPU)")
    parser.add_argument(
        "--tokens", type=int, help="in one pass (65,536 on a GPU, 4,096 on the CPU)"
    )
    parser.add_argument("--window", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args(argv)
    cpu = arguments.device == "cpu"
    arguments.scale = arguments.scale or (8 if cpu else 1)
    arguments.tokens = arguments.tokens or (4096 if cpu else 65536)
    arguments.dtype = arguments.dtype or ("float32" if cpu else "bfloat16")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Make the model, time, print."""
    arguments = parse(argv)
    record = {"arguments": vars(arguments), "machine": prepare(arguments)}
    single = arguments.device == "cpu" and arguments.dtype == "float32"
    peak = sgemm_rate(arguments.threads) if single else None
    model = random_model(arguments.scale, getattr(torch, arguments.dtype), arguments.device)
    count = max(1, arguments.tokens // arguments.window)
    ids_BS = torch.randint(1, model.config.vocab_size, (count, arguments.window))
    bench = Bench(model, NoTokenizer(), ids_BS.to(arguments.device))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    record["weights_MB"] = weights / 2**20
    record["router"] = router_table(bench)
    record["scoring"] = scoring_table(bench, ("eager", "grouped_mm"), arguments.rounds, peak)
    record["rates"] = rates_table(bench, arguments.rounds)
    rates = {row["experts"]: row["tokens/s"] for row in record["rates"]}
    record["projection"] = projection(distinct_strategies(load_config(STUDY)), rates)
    show(record, arguments.json)


if __name__ == "__main__":
    main()
