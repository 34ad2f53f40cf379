"""Safetensors files of tensors and settings, written so that equal contents are equal bytes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_routing.files import atomic_path, reading
from moe_routing.routing.rule import ModelRule

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SETTINGS = "settings"
"""The one entry of metadata: the format writes several in random order."""


def write_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], settings: Mapping[str, object]
) -> None:
    """Write tensors and settings, which are JSON values.

    Raises:
        InputError: the disk is full or the folder cannot be written.
    """
    held = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_tensors(path, held, {SETTINGS: json.dumps(settings)})


def save_tensors(
    path: Path | str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        InputError: see :func:`write_tensors`.
    """
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # of a full disk, for one
            raise OSError(str(error)) from error


def read_tensors(path: Path | str, partial: Collection[str] = ()) -> tuple[dict[str, Tensor], dict]:
    """Read the tensors and settings of a file that :func:`write_tensors` has written.

    To be called in :func:`moe_routing.files.reading`, with which the caller says what the file is.

    Args:
        path: the file.
        partial: tensors that may have NaN.
    """
    with safe_open(path, "pt") as file:
        settings = json.loads((file.metadata() or {})[SETTINGS])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if name not in partial and tensor.isnan().any():
            raise ValueError(f"tensor '{name}' has NaN")
    return tensors, settings


class TensorFile:
    """A frozen dataclass with its file: some fields are tensors, one is the model's ``rule``.

    Attributes:
        TENSORS: the fields that are tensors.
        PARTIAL: those of them that may have NaN where something was not measured.
        OPTIONAL: the fields that are tensors or None.
        WHAT: what the file is, for errors.
    """

    TENSORS: ClassVar[tuple[str, ...]]
    PARTIAL: ClassVar[tuple[str, ...]] = ()
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    WHAT: ClassVar[str]

    def save(self, path: Path | str) -> None:
        """Write a safetensors file.

        Raises:
            InputError: see :func:`write_tensors`.
        """
        names = [field.name for field in fields(cast("DataclassInstance", self))]
        held = (*self.TENSORS, *self.OPTIONAL)
        settings = {name: getattr(self, name) for name in names if name not in held}
        tensors = {name: value for name in held if (value := getattr(self, name)) is not None}
        write_tensors(path, tensors, settings | {"rule": asdict(settings["rule"])})

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a file written by :meth:`save`.

        Raises:
            InputError: the file is missing or not such a file.
        """
        with reading(path, cls.WHAT):
            tensors, settings = read_tensors(path, cls.PARTIAL)
            values = {name: tensors[name] for name in cls.TENSORS} | settings
            values |= {name: tensors.get(name) for name in cls.OPTIONAL}
            return cls(**values | {"rule": ModelRule(**settings["rule"])})
