"""Matrix products for inference on the CPU, by the faster of torch's two libraries.

MKL, torch's default for single precision, does not use the 512-bit vectors of AMD processors.
oneDNN, which torch also ships, does, and is no slower there with 256-bit vectors. On other
processors torch's default stays. The choice depends on the processor alone, never on a timing, so
results are reproducible bit for bit.

Shape letters: N rows, X inputs, Y outputs.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_PRODUCTS = 1 << 21
"""Number of multiplications above which oneDNN saves more than its call overhead."""


def linear(rows_NX: Tensor, weight_YX: Tensor, bias_Y: Tensor | None = None) -> Tensor:
    """Return ``rows_NX @ weight_YX.T + bias_Y``, as ``F.linear`` does, to rounding.

    With gradients or autocast it is ``F.linear``: oneDNN's operator, which torch's compiler uses,
    supports neither.

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
    """Return whether single-precision products are faster by oneDNN on this processor."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return (
        str(capabilities.get("cpu_name")).startswith("AMD")
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
