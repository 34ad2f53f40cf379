"""The model card's text about training, from the run's config."""

from __future__ import annotations

from moe_pretraining.corpus import COMMON_TOKENS
from moe_pretraining.settings import PretrainConfig

ADAMW = "AdamW (betas 0.9 and 0.95, weight decay {decay:g} on matrices)"
MUON = """\
Muon (momentum 0.95, five Newton-Schulz steps, weight decay {decay:g}, updates scaled to the root
mean square of AdamW's) for the matrices of attention and experts, each expert's gate, up and down
projection separately, and AdamW (betas 0.9 and 0.95, the same weight decay on matrices) for
embeddings, head, routers and norms"""


def optimizer_text(config: PretrainConfig) -> str:
    """Name the optimiser and its constants."""
    return {"adamw": ADAMW, "muon": MUON}[config.optimizer].format(decay=config.weight_decay)


def batch_text(config: PretrainConfig) -> str:
    """Describe the number of sequences per batch in each stage."""
    text = f"{config.batch_size} sequences of {config.sequence_length} tokens"
    if not config.batch_warmup:
        return text
    stages = ", ".join(f"{s.batch_size} for {s.steps:,} steps" for s in config.batch_warmup)
    return f"{stages}, then {text}"


def additions_text(config: PretrainConfig) -> str:
    """Describe what was done in addition to plain training, one paragraph each; may be empty."""
    return _repeats(config) + _recurrence(config) + _continued(config)


def _repeats(config: PretrainConfig) -> str:
    if not config.repeat_share:
        return ""
    steps = f" of the run's first {config.repeat_steps:,} steps" if config.repeat_steps else ""
    return f"""

{100 * config.repeat_share:g} % of the windows{steps} are a short text from the data, repeated to
the end. They teach attention to copy from the context, which plain text teaches only over far more
tokens. They lower the training loss, but not the validation loss."""


def _recurrence(config: PretrainConfig) -> str:
    if config.recurrence_weight == 1:
        return ""
    start = config.recurrence_start
    after = f" after the first {start:,} steps" if start > config.first_step else ""
    return f"""

In the training loss the first token of a word that has occurred in its window before has weight
{config.recurrence_weight:g}{after}, unless it is one of the {COMMON_TOKENS} most frequent tokens;
all others have 1. In a short run, this teaches the model to look for the next word in the text so
far, as the names in a story require. As a result the probability of such words is too high, and the
loss on plain text slightly higher than it could be; validation is not weighted."""


def _continued(config: PretrainConfig) -> str:
    before = config.continue_from
    if before is None:
        return ""
    tokens = config.first_sequence * config.sequence_length
    return f"""

The first {before.steps:,} steps ({tokens / 1e6:.3g} million tokens) were done before this run,
including a decay; the resulting weights have the SHA-256 hash `{before.sha256[:16]}...`. This run
continued from them with a new optimiser and a new warm-up, further on in the data. The schedule and
speed above, the figure, and the proportions of the sources below are those of this run.
`config/pretrain.yaml` explains how to get the earlier weights."""
