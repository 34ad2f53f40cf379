"""The model card; all its numbers come from the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from moe_pretraining.card_training import additions_text, batch_text, optimizer_text
from moe_pretraining.schedule import sequences_before
from moe_pretraining.settings import PretrainConfig
from moe_routing.errors import InputError
from moe_routing.files import atomic_path

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, olmoe, routing]
---

# {name}

A small `OlmoeForCausalLM`, the architecture of OLMoE-1B-7B: {num_hidden_layers} layers,
{num_experts} experts per layer, top-{num_experts_per_tok}, softmax router, weights not
renormalised. It was trained by this repository, from random weights, to study routing where a large
model would be impractical. It is not intended as a language model for any other use.

    snakemake pretrain --cores all --configfile config/pretrain.yaml

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("resources/{name}")
tokenizer = AutoTokenizer.from_pretrained("resources/{name}")
```

## Architecture

{architecture}

Rotary positions, RMSNorm, SwiGLU experts, no shared expert, embeddings not tied. "Active" counts
the parameters used per token: {num_experts_per_tok} of {num_experts} experts, without the embedding
table.

## Training

{training}

{optimizer}, gradient norm clipped at {gradient_clip:g}; {warmup_steps} steps of warm-up, a constant
rate, and a 1 - sqrt decay to zero over the last {decay_percent:g} % of the steps. Added to the
loss: load balancing, {load_balancing:g} per layer, computed for each layer (over all layers
together it can be at its optimum while single layers collapse), and router z-loss, {z_loss:g} per
layer.{additions}

![Loss, expert load and speed over the tokens of training](training.png)

## Data

{data}

A document goes to training or to validation as a whole; {validation_percent:g} % of them are held
out. "Epochs" is the number of times that {this} saw the text. The tokenizer is a byte-level BPE of
{vocab_size} entries, trained on the first {tokenizer_megabytes:g} MB of each source; any UTF-8 text
survives encoding and decoding.

## Quality

On {tokens} tokens of held-out text, in windows of {sequence_length} tokens without earlier context;
intervals ({confidence:g} %) from resampling documents.

{validation}

{copying}
{benchmarks}
## Routing

For the same tokens, by layer. Load is the proportion of assignments that an expert gets, relative
to the mean; entropy is that of the router's softmax (at most {max_entropy:.2f} nats); the mass is
the summed probability of the {num_experts_per_tok} experts chosen.

{routing}

{dead_sentence}

### Fewer and more experts

Loss with a fixed number of experts for every token and unchanged softmax weights; the model was
trained with {num_experts_per_tok}.

{static}

{static_sentence}
{published_sentence}

### Without the router's choice

With {num_experts_per_tok} experts drawn at random for each token and layer, their weights rescaled
to the mass of the token's own top {num_experts_per_tok}, the loss is {random_loss:.3f} nats per
token. The difference from the router's choice is {random_difference}.

## Limits

- It was trained on {million_tokens:.3g} million tokens, where useful language models see trillions.
  Its output is not reliable and must not be used or presented as information.
- It knows only text like that listed above, in English, with the views of its authors and time.
  The text was not filtered for offensive content, and the model was not tuned to refuse anything.
- The longest context is {max_position_embeddings} tokens.
- Findings about routing in this model need not hold for larger models.

Measured with {packages}; commit {commit}.
"""


PUBLISHED = {"8": 16.76, "64": 52.48}
"""Perplexity of OLMoE-1B-7B-0924 by its number of experts, on 500 lines of WikiText-2 of at most
512 tokens: https://github.com/AliABULIEL/MOE-with-feature-selection at 2e951fd1."""


def write_card(
    config: PretrainConfig,
    measured: dict,
    log: pd.DataFrame,
    corpus: dict[str, dict[str, float]],
    path: Path,
    cells: list[dict] | None = None,
) -> None:
    """Write the model card.

    Args:
        config: the config of the run.
        measured: what :func:`moe_pretraining.measure.measure_model` returned.
        log: the rows of ``training.csv``.
        corpus: bytes and tokens of each source, as :func:`tokenize_source` counted them.
        path: Markdown file to write.
        cells: results of a study of this model under its own routing, one per data set.

    Raises:
        InputError: a cell was scored with other weights.
    """
    training_tokens = int(log["tokens"].iloc[-1])
    random = measured["random_experts"]
    provenance = measured["provenance"]
    text = CARD.format(
        **config.model.model_dump(),
        name=config.name,
        architecture=_architecture(config, measured),
        training=_training(config, log),
        optimizer=optimizer_text(config),
        gradient_clip=config.gradient_clip,
        warmup_steps=config.warmup_steps,
        decay_percent=100 * config.decay_share,
        load_balancing=config.load_balancing_coefficient,
        z_loss=config.z_loss_coefficient,
        additions=additions_text(config),
        data=_data(config, corpus),
        this="this run" if config.continue_from else "training",
        validation_percent=100 * config.validation_share,
        tokenizer_megabytes=config.tokenizer_bytes / 1e6,
        tokens=f"{measured['validation']['all']['tokens']:,}",
        sequence_length=config.sequence_length,
        confidence=100 * measured["confidence"],
        validation=_validation(measured["validation"]),
        copying=_copying(measured["copying"]),
        benchmarks=(
            _benchmarks(cells, measured["weights_sha256"], config.sequence_length) if cells else ""
        ),
        max_entropy=np.log(config.model.num_experts),
        routing=_routing(measured["routing"]),
        dead_sentence=_dead_sentence(measured["routing"]),
        static=_static(measured["static_k"]),
        static_sentence=_static_sentence(measured["static_k"], config.model.num_experts_per_tok),
        published_sentence=_published_sentence(measured["static_k"]),
        random_loss=random["loss"],
        random_difference=_interval(random["difference"]),
        million_tokens=training_tokens / 1e6,
        packages=", ".join(f"{name} {version}" for name, version in provenance["packages"].items()),
        commit=provenance["commit"],
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _table(rows: list[dict[str, object]]) -> str:
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def _properties(values: dict[str, str]) -> str:
    return _table([{"": name, "value": value} for name, value in values.items()])


def _interval(value: dict[str, float]) -> str:
    return f"{value['estimate']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def _architecture(config: PretrainConfig, measured: dict) -> str:
    shape, parameters = config.model, measured["parameters"]
    return _properties(
        {
            "parameters": f"{parameters['total']:,}",
            "active parameters per token": f"{parameters['active']:,}",
            "layers": str(shape.num_hidden_layers),
            "hidden size": str(shape.hidden_size),
            "attention heads": str(shape.num_attention_heads),
            "experts per layer": str(shape.num_experts),
            "experts per token": str(shape.num_experts_per_tok),
            "inner size of an expert": str(shape.intermediate_size),
            "vocabulary": f"{shape.vocab_size:,}",
            "longest context": str(shape.max_position_embeddings),
            "weights": f"bfloat16 safetensors, {measured['weights_bytes']:,} bytes",
        }
    )


def _training(config: PretrainConfig, log: pd.DataFrame) -> str:
    steps = int(log["step"].iloc[-1])
    first = config.first_sequence * config.sequence_length
    seconds = (np.diff(log["tokens"], prepend=first) / log["tokens_per_second"]).sum()
    last = log.dropna(subset="validation_loss").iloc[-1]
    return _properties(
        {
            "steps": f"{steps:,}",
            "tokens": f"{int(log['tokens'].iloc[-1]):,}",
            "batch": batch_text(config),
            "peak learning rate": f"{config.learning_rate:g}",
            "device": config.device,
            "tokens per second (median)": f"{log['tokens_per_second'].median():,.0f}",
            "hours in this run's steps": f"{seconds / 3600:.1f}",
            "last validation loss, nats per token": f"{last['validation_loss']:.3f}",
            "seed": str(config.seed),
        }
    )


def _data(config: PretrainConfig, corpus: dict[str, dict[str, float]]) -> str:
    total = sum(source.weight for source in config.sources)
    sequences = sequences_before(config.steps, config) - config.first_sequence
    tokens = sequences * config.sequence_length
    rows = []
    for source in config.sources:
        counts, proportion = corpus[source.name], source.weight / total
        rows.append(
            {
                "source": source.name,
                "proportion of windows": f"{100 * proportion:.0f} %",
                "text, MB": f"{counts['bytes'] / 1e6:.1f}",
                "tokens, millions": f"{counts['tokens'] / 1e6:.1f}",
                "bytes per token": f"{counts['bytes_per_token']:.2f}",
                "epochs": f"{proportion * tokens / counts['tokens']:.2f}",
                "licence": source.license,
                "from": source.url,
            }
        )
    return _table(rows)


def _validation(validation: dict) -> str:
    parts = {**validation["sources"], "all": validation["all"]}
    return _table(
        [
            {
                "text": name,
                "documents": str(part["documents"]),
                "tokens": f"{part['tokens']:,}",
                "loss, nats per token": _interval(part["nats_per_token"]),
                "perplexity": f"{np.exp(part['nats_per_token']['estimate']):.1f}",
                "bits per byte": _interval(part["bits_per_byte"]),
            }
            for name, part in parts.items()
        ]
    )


def _copying(copying: dict[str, float]) -> str:
    first, second = copying["first"], copying["second"]
    return (
        f"When the same {copying['tokens']} tokens of these texts appear twice in a window, the "
        f"loss is {first:.3f} nats per token the first time and {second:.3f} the second time. The "
        "difference is what the model can copy from its context."
    )


def _benchmarks(cells: list[dict], weights_sha256: str, window: int) -> str:
    rows = []
    for cell in cells:
        if cell["provenance"]["weights_sha256"] != weights_sha256:
            raise InputError(
                f"cell '{cell['strategy']['id']}/{cell['dataset']}' was scored with other weights "
                "than the measured model's; run the study again"
            )
        rows += [
            {
                "data set": cell["dataset"],
                "items": f"{cell['n_items']:,}",
                "metric": metric["metric"].replace("_", " "),
                "value": _interval({"estimate": metric["value"], **metric}),
            }
            for metric in cell["metrics"]
            if metric["metric"] != "kl_from_baseline"  # of the baseline itself it is 0
        ]
    return f"""
By the definitions of EleutherAI's lm-evaluation-harness, without examples in the context (0-shot);
whole documents are read in windows of at most {window} tokens, the length of training:

{_table(rows)}
"""


def _routing(routing: dict) -> str:
    return _table(
        [
            {
                "layer": str(layer),
                "largest load / mean": f"{routing['max_mean_load'][layer]:.2f}",
                "experts never used": str(routing["dead_experts"][layer]),
                "entropy, nats": f"{routing['entropy'][layer]:.2f}",
                "largest probability": f"{routing['max_probability'][layer]:.3f}",
                "mass of the chosen": f"{routing['selected_mass'][layer]:.3f}",
            }
            for layer in range(len(routing["entropy"]))
        ]
    )


def _dead_sentence(routing: dict) -> str:
    dead, largest = sum(routing["dead_experts"]), max(routing["max_mean_load"])
    used = "Every expert of every layer was used" if dead == 0 else f"{dead} were never used"
    return f"{used}; the largest load of any layer is {largest:.2f} times the mean."


def _static(static: dict[str, float]) -> str:
    return _table(
        [
            {
                "experts": k,
                "loss, nats per token": f"{loss:.3f}",
                "perplexity": f"{np.exp(loss):.1f}",
            }
            for k, loss in static.items()
        ]
    )


def _static_sentence(static: dict[str, float], top_k: int) -> str:
    best, most = min(static, key=static.__getitem__), max(static, key=int)
    place = "the number it was trained with" if best == str(top_k) else f"not at {top_k}"
    gap = static[most] - static[best]
    return (
        f"The loss is lowest at {best} experts, {place}; with {most} it is {gap:.3f} nats per "
        "token higher."
    )


def _published_sentence(static: dict[str, float]) -> str:
    """Compare the loss with all experts to that of the large model, if both were measured."""
    if not set(PUBLISHED) <= set(static):
        return ""
    few, many = sorted(PUBLISHED, key=int)
    large = np.log(PUBLISHED[many] / PUBLISHED[few])
    small = static[many] - static[few]
    verdict = "it does not show that" if small < large / 2 else "it shows that too"
    return (
        f"From {few} to {many} experts OLMoE-1B-7B loses {large:.2f} nats per token (perplexity "
        f"{PUBLISHED[few]:g} to {PUBLISHED[many]:g} on lines of WikiText-2, as published), this "
        f"model {small:.3f}: {verdict}."
    )
