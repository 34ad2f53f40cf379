"""Calibration text in windows.

Shape letters: B windows, S tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_routing.engine.offload import input_device
from moe_routing.engine.requests import NO_PREFIX
from moe_routing.errors import InputError


def calibration_window(model: PreTrainedModel, window: int | None) -> int:
    """Return the configured window, at most the model's longest sequence."""
    longest = model.config.max_position_embeddings
    return min(window or longest, longest)


def cut_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], tokens: int, window: int
) -> Tensor:
    """Join texts by the end-of-text token, and cut them into whole windows.

    A tokenizer without such a token gives its beginning-of-sequence token.

    Returns:
        Token ids, int64, (windows, ``window``), at least ``tokens`` in all.

    Raises:
        InputError: the texts hold too few tokens, or the tokenizer has neither token.
    """
    ids: list[int] = []
    between = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if between is None:
        raise InputError(NO_PREFIX)
    needed = -(-tokens // window) * window
    for text in texts:
        ids += [between, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        if len(ids) >= needed:
            return torch.tensor(ids[:needed]).view(-1, window)
    raise InputError(
        f"calibration text has {len(ids)} tokens; calibration.tokens = {tokens} needs {needed} "
        f"(whole windows of {window})"
    )


@torch.inference_mode()
def run_windows(model: PreTrainedModel, ids_BS: Tensor, batch_size: int, label: str) -> None:
    """Run a model on windows, for those who watch it."""
    for batch_BS in tqdm(ids_BS.split(batch_size), desc=label, unit="batch"):
        model.base_model(batch_BS.to(input_device(model)), use_cache=False)
