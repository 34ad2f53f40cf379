"""The closed schema of a pretraining config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from moe_routing.errors import InputError
from moe_routing.schema import (
    MOST,
    ClosedModel,
    Commit,
    Count,
    Device,
    FilePath,
    HubId,
    Name,
    Positive,
    Sha256,
)


class _TextSource(ClosedModel):
    name: Name = Field(description="Short name, used in the names of the token files.")
    weight: Positive = Field(
        default=1.0, description="Relative weight of the source in the training windows."
    )
    max_documents: Count | None = Field(
        default=None,
        description="Maximum number of documents to read, from the start; null reads all.",
    )
    license: str = Field(description="Licence of the text, for the model card.")
    url: str = Field(description="Where the text comes from, for the model card.")


class LocalTextSource(_TextSource):
    """A text file (also .xz, .gz): one paragraph per line, an empty line between documents."""

    kind: Literal["local"]
    path: FilePath = Field(description="Path, relative to the repository.")
    sha256: Sha256 | None = Field(
        default=None, description="Expected SHA-256 hash of the file; null skips the check."
    )


class HubTextSource(_TextSource):
    """A data set on the Hugging Face Hub, streamed."""

    kind: Literal["hub"]
    dataset: HubId = Field(description="Hub id.")
    subset: str | None = Field(default=None, description="Configuration name of the data set.")
    split: Name = Field(default="train", description="Split.")
    column: str = Field(default="text", description="Column with the text of the document.")
    revision: Commit = Field(description="Commit hash on the Hub.")


TextSource = Annotated[LocalTextSource | HubTextSource, Field(discriminator="kind")]


class ModelShape(ClosedModel):
    """Architecture of the trained model, in the terms of transformers' OlmoeConfig."""

    vocab_size: int = Field(
        default=8192, ge=300, le=65536, description="Size of the BPE vocabulary."
    )
    hidden_size: Count = Field(default=128, description="Width of the residual stream.")
    intermediate_size: Count = Field(
        default=32, description="Intermediate (hidden) width of each expert."
    )
    num_hidden_layers: Count = Field(default=16, description="Number of layers.")
    num_attention_heads: Count = Field(default=4, description="Number of attention heads.")
    num_experts: Count = Field(default=64, description="Experts per layer.")
    num_experts_per_tok: Count = Field(default=8, description="Experts per token (top-k).")
    max_position_embeddings: Count = Field(default=256, description="Longest sequence.")
    initializer_range: Positive = Field(
        default=0.02, description="Standard deviation of the initial weights."
    )

    @model_validator(mode="after")
    def _fits(self) -> ModelShape:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; "
                f"allowed: at most num_experts = {self.num_experts}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}; "
                f"allowed: a divisor of hidden_size = {self.hidden_size}"
            )
        return self


class ContinueFrom(ClosedModel):
    """An earlier run with the same architecture, tokenizer and data, which this run continues."""

    weights: FilePath = Field(
        description="Weights exported by that run (safetensors), relative to the repository."
    )
    sha256: Sha256 = Field(description="Expected SHA-256 hash of the file.")
    steps: Count = Field(
        description="Steps done in that run; this run continues in the data after them."
    )
    sequences: Count | None = Field(
        default=None, description="Training windows read in that run; null: steps times batch_size."
    )


class BatchStage(ClosedModel):
    """A number of steps with their own batch size."""

    steps: Count = Field(description="Number of steps.")
    batch_size: Count = Field(description="Sequences per step.")


class PretrainConfig(ClosedModel):
    """All settings of a pretraining run."""

    name: Name = Field(description="Name of the run and of its folder under results/.")
    sources: list[TextSource] = Field(min_length=1, description="Text to train on.")
    model: ModelShape = Field(default_factory=ModelShape, description="Architecture.")
    tokenizer_bytes: Count = Field(
        default=20_000_000,
        description="Bytes of text from each source that the tokenizer is trained on.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=MOST,
        description="Seed for initialisation, the validation split and the order of the data.",
    )
    device: Device = Field(default="cpu", description="torch device, such as cpu or cuda.")
    threads: Count | None = Field(
        default=None, description="CPU threads; null uses torch's default."
    )
    continue_from: ContinueFrom | None = Field(
        default=None,
        description="Earlier run whose weights to start from; null starts from random weights.",
    )
    steps: Count = Field(description="Optimiser steps, including those of an earlier run.")
    batch_size: Count = Field(default=16, description="Sequences per step.")
    batch_warmup: list[BatchStage] = Field(
        default=[],
        description="Consecutive stages with other batch sizes at the start of this run; "
        "batch_size applies after them.",
    )
    sequence_length: Count = Field(default=256, description="Tokens per sequence.")
    repeat_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Proportion of the training windows that repeat their first tokens to the end.",
    )
    repeat_steps: Count | None = Field(
        default=None,
        description="Number of steps, at the start of this run, that include such windows; "
        "null: all.",
    )
    recurrence_weight: Positive = Field(
        default=1.0,
        description="Weight, in the training loss, of the first token of an uncommon word that has "
        "occurred in its window before; all other tokens have weight 1.",
    )
    recurrence_start: int = Field(
        default=0,
        ge=0,
        le=MOST,
        description="Step from which this weight applies, such as the first step of the decay.",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="adamw for all parameters, or muon for the matrices of attention and "
        "experts and adamw for the rest.",
    )
    learning_rate: Positive = Field(default=4e-3, description="Peak learning rate.")
    warmup_steps: Count = Field(default=100, description="Steps of linear warm-up.")
    decay_share: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Proportion of this run's steps in which the learning rate decays.",
    )
    weight_decay: float = Field(
        default=0.1, ge=0, le=1e6, description="Weight decay, applied to matrices only."
    )
    gradient_clip: Positive = Field(
        default=1.0, description="Gradient norm at which gradients are clipped."
    )
    load_balancing_coefficient: float = Field(
        default=0.01, ge=0, le=1e6, description="Weight of the load-balancing loss."
    )
    z_loss_coefficient: float = Field(
        default=0.001, ge=0, le=1e6, description="Weight of the router z-loss."
    )
    validation_share: float = Field(
        default=0.005, gt=0, lt=1, description="Proportion of documents held out for validation."
    )
    validation_interval: Count = Field(default=250, description="Steps between validations.")
    validation_batches: Count = Field(default=8, description="Number of batches per validation.")
    checkpoint_interval: Count = Field(default=250, description="Steps between checkpoints.")
    card_tokens: Count = Field(
        default=100_000,
        description="Validation tokens used for the measurements in the model card.",
    )
    max_weights_bytes: Count | None = Field(
        default=None, description="Largest size of the exported weights; null sets no limit."
    )

    @field_validator("sources")
    @classmethod
    def _distinct(cls, value: list[TextSource]) -> list[TextSource]:
        names = [source.name.lower() for source in value]  # some file systems ignore case
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise ValueError(f"two sources are named '{duplicates[0]}'; allowed: distinct names")
        return value

    @model_validator(mode="after")
    def _window_fits(self) -> PretrainConfig:
        if self.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"sequence_length is {self.sequence_length}; allowed: at most "
                f"model.max_position_embeddings = {self.model.max_position_embeddings}"
            )
        return self

    @model_validator(mode="after")
    def _goes_on(self) -> PretrainConfig:
        if self.steps <= self.first_step:
            raise ValueError(
                f"steps is {self.steps}; allowed: more than continue_from.steps = {self.first_step}"
            )
        return self

    @property
    def first_step(self) -> int:
        """Number of steps done before this run."""
        return self.continue_from.steps if self.continue_from else 0

    @property
    def first_sequence(self) -> int:
        """Number of training windows read before this run."""
        before = self.continue_from
        return (before.sequences or before.steps * self.batch_size) if before else 0

    @property
    def repeats_end(self) -> int:
        """Step after which no training window repeats its beginning."""
        own = self.steps if self.repeat_steps is None else self.repeat_steps
        return min(self.steps, self.first_step + own)

    def source(self, name: str) -> TextSource:
        """Return the source with this name.

        Raises:
            InputError: there is none.
        """
        for source in self.sources:
            if source.name == name:
                return source
        names = ", ".join(source.name for source in self.sources)
        raise InputError(f"source '{name}' is unknown; allowed: {names}")

    def local_files(self, *names: str) -> list[str]:
        """Return the files of the named sources (default: all); a Hub source has none."""
        chosen = [self.source(name) for name in names] or self.sources
        return [source.path for source in chosen if source.kind == "local"]
