"""Building, loading and exporting the model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from moe_pretraining.settings import PretrainConfig
from moe_routing.engine.experts import EXPERTS_IMPLEMENTATION
from moe_routing.errors import InputError

if TYPE_CHECKING:
    from transformers import OlmoeForCausalLM, PreTrainedTokenizerBase


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> OlmoeForCausalLM:
    """Return a freshly initialised model with OLMoE's routing topology."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    architecture = OlmoeConfig(
        **config.model.model_dump(),
        norm_topk_prob=False,
        router_aux_loss_coef=config.load_balancing_coefficient,
        bos_token_id=cast("int", tokenizer.bos_token_id),
        eos_token_id=cast("int", tokenizer.eos_token_id),
        pad_token_id=cast("int", tokenizer.pad_token_id),
        use_cache=True,
    )
    # transformers draws from torch's global generator; the caller's state is restored.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = OlmoeForCausalLM(architecture)
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    return model


def load_weights(model: OlmoeForCausalLM, path: Path) -> None:
    """Copy parameters by name from a safetensors file into the model.

    Raises:
        InputError: the weights have other shapes.
    """
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path}: not the weights of this config: {reason}") from error


def export_model(
    config: PretrainConfig, weights: Path, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write a folder that ``from_pretrained`` loads: bfloat16 weights, config and tokenizer.

    Experts stay fused in tensors (experts, rows, columns), as in the model. One tensor per expert
    and matrix would add a header of several hundred kilobytes.

    Args:
        config: the config of the run.
        weights: parameters by name, safetensors, as :meth:`Trainer.save_weights` writes them.
        tokenizer: the run's tokenizer.
        folder: where to write.

    Raises:
        InputError: the weights have other shapes, or are larger than ``max_weights_bytes``.
    """
    model = build_model(config, tokenizer)
    load_weights(model, weights)
    model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType] (its decorator hides self)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        model.save_pretrained(partial, save_original_format=False)
        tokenizer.save_pretrained(partial)
        _check_size(Path(partial) / "model.safetensors", config.max_weights_bytes)
        for path in Path(partial).iterdir():
            path.chmod(0o644)
            path.replace(folder / path.name)


def _check_size(path: Path, limit: int | None) -> None:
    size = path.stat().st_size
    if limit is not None and size > limit:
        raise InputError(f"max_weights_bytes is {limit}, but the exported weights take {size}")
