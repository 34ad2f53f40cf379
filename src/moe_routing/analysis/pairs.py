"""Toggled pairs of a token and an expert, as arrays, with the decisions that they belong to.

Shape letters: L layers, T tokens, E experts, P toggled pairs, C any columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_routing.errors import InputError
from moe_routing.routing.toggles import Toggles

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class ToggledPairs:
    """Toggled pairs of some text.

    Attributes:
        layer_P: layer.
        token_P: index of the token.
        expert_P: expert.
        own_P: whether the model chose the expert, so that toggling removed it; the others were
            added.
        weight_P: inverse of the chance that the pair was drawn; 1 for removals.
        kl_P: KL(stock || toggled), nats.
        gain_P: by how much the expert's presence lowers the loss of the realised next token, nats:
            the change when it is removed, minus the change when it is added.
        document_T: document of each token.
        own_LTE: the model's own choice, all of which was toggled.
    """

    layer_P: Index
    token_P: Index
    expert_P: Index
    own_P: Mask
    weight_P: Array
    kl_P: Array
    gain_P: Array
    document_T: Index
    own_LTE: Mask

    @classmethod
    def of(cls, toggles: Toggles, *, compensated: bool = False) -> ToggledPairs:
        """Return the pairs of a file of toggles.

        Args:
            toggles: the file.
            compensated: whether a removed expert's mean output takes its place.

        Raises:
            InputError: an effect is not a number, or was not measured.
        """
        layer_P, token_P, expert_P = (
            index_P.numpy() for index_P in (toggles.layer_P, toggles.token_P, toggles.expert_P)
        )
        own_P = (toggles.rank_P < toggles.rule.top_k).numpy()
        kl_P = toggles.compensated_kl_P if compensated else toggles.kl_P
        change_P = toggles.compensated_loss_change_P if compensated else toggles.loss_change_P
        if not bool((kl_P.isfinite() & change_P.isfinite()).all()):
            what = "compensated effects" if compensated else "effects"
            raise InputError(f"toggles: {what} of removed experts are not all numbers")
        document_T = np.zeros(toggles.logits_LTE.shape[1], dtype=np.int64)
        document_T[token_P] = toggles.document_P.numpy()
        own_LTE = np.zeros(tuple(toggles.logits_LTE.shape), dtype=bool)
        own_LTE[layer_P[own_P], token_P[own_P], expert_P[own_P]] = True
        return cls(
            layer_P, token_P, expert_P, own_P,
            weight_P=toggles.sampling_weight_P.numpy(),
            kl_P=kl_P.numpy(),
            gain_P=np.where(own_P, change_P.numpy(), -change_P.numpy()),
            document_T=document_T,
            own_LTE=own_LTE,
        )  # fmt: skip

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.own_LTE.shape[0]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.own_LTE.shape[1]

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(np.unique(self.document_T))

    def at(self, value_LTE: NDArray) -> NDArray:
        """Return the values of the toggled pairs, (pairs,)."""
        return value_LTE[self.layer_P, self.token_P, self.expert_P]

    def sums(self, value_PC: NDArray) -> Array:
        """Sum values of pairs by decision (a token in a layer), (tokens, layers, columns).

        Args:
            value_PC: values, (pairs, columns) or (pairs,) for one column.
        """
        value_PC = value_PC.reshape(len(self.token_P), -1)
        cell_P, cells = self.token_P * self.layers + self.layer_P, self.tokens * self.layers
        columns = [np.bincount(cell_P, value_P, minlength=cells) for value_P in value_PC.T]
        return np.stack(columns, axis=-1, dtype=float).reshape(self.tokens, self.layers, -1)


def with_all_layers(value_TLC: NDArray, *, mean: bool) -> Array:
    """Return values with one more layer, which is the mean or the sum of the others."""
    every_T1C = value_TLC.mean(1, keepdims=True) if mean else value_TLC.sum(1, keepdims=True)
    return np.concatenate([value_TLC, every_T1C], axis=1)
