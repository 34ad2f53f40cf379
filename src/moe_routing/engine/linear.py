"""Matrix products for inference on the CPU, by the faster of torch's two libraries.

MKL, torch's choice for single precision, does not use the 512-bit vectors of AMD's processors;
oneDNN, which torch also brings, does, and is no slower there with 256-bit vectors. Elsewhere
torch's choice stays. Which library computes depends on the processor alone, never on a timing, so
that a run gives the same bits again.

Shape letters: N rows, X inputs, Y outputs.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_PRODUCTS = 1 << 21
"""Multiplications from which on the saving exceeds what a call of oneDNN costs."""


def linear(rows_NX: Tensor, weight_YX: Tensor, bias_Y: Tensor | None = None) -> Tensor:
    """Return ``rows_NX @ weight_YX.T + bias_Y``, as ``F.linear`` does, to rounding.

    Where gradients or autocast are on it is ``F.linear``: the other library's operator, the one
    that torch's compiler uses, knows neither.

    Args:
        rows_NX: (..., X).
        weight_YX: (Y, X).
        bias_Y: (Y,), or None.
    """
    if (
        rows_NX.dtype == torch.float32
        and rows_NX.device.type == "cpu"
        and rows_NX.numel() * weight_YX.shape[0] >= MIN_PRODUCTS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and prefers_onednn()
    ):
        return by_onednn(rows_NX, weight_YX, bias_Y)
    return F.linear(rows_NX, weight_YX, bias_Y)


def by_onednn(rows_NX: Tensor, weight_YX: Tensor, bias_Y: Tensor | None) -> Tensor:
    """Return the product by oneDNN; see :func:`linear`."""
    return torch.ops.mkldnn._linear_pointwise(rows_NX, weight_YX, bias_Y, "none", [], "")


@functools.cache
def prefers_onednn() -> bool:
    """Say whether single-precision products are faster by oneDNN here."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return (
        str(capabilities.get("cpu_name")).startswith("AMD")
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
