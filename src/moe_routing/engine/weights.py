"""The files of a checkpoint: which are loaded, what they contain, and their hashes."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_routing.errors import InputError
from moe_routing.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of tensors that are weights. Other types are codes, meaningful only with their scales."""
NOT_READ = {
    "adapter_config.json": "an adapter",
    "shard-*-model-*-of-*.safetensors": "a distributed checkpoint",
}
"""What transformers would load in addition to, or in place of, the hashed weights."""
EXPERT = re.compile(r"(.*\d.*\.)(\d+)(\.\D*)")
"""Name of a tensor of one expert of a layer: layer, number of the expert, part."""
SETTINGS = ("*.json", "*.txt", "*.model")
"""Files of architecture and tokenizer."""


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers loads, by its order of preference.

    That is the file named by ``transformers_weights`` in ``config.json``, else
    ``model.safetensors``, else the shards of ``model.safetensors.index.json``. Other copies of the
    weights in the folder are not read.

    Raises:
        InputError: no such file, a shard is missing, or the folder holds an adapter or a
            distributed checkpoint.
    """
    for pattern, what in NOT_READ.items():
        for path in folder.glob(pattern):
            raise InputError(f"{path}: {what} is not read; allowed: {SINGLE}, or {INDEX}")
    named = read_json(folder / "config.json").get("transformers_weights")
    for path in (folder / str(named),) if named else (folder / SINGLE, folder / INDEX):
        if path.is_file():
            return _shards(path) if path.name.endswith(".index.json") else [path]
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: no .safetensors file; other weight formats are not read")
    raise InputError(f"{folder}: no {named or f'{SINGLE} or {INDEX}'}; no other file is loaded")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index}: no weight_map; allowed: tensors and their files") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(f"{index.parent / missing[0]}: missing; {index.name} names it")
    return [index.parent / name for name in names]


def check_weights(files: Iterable[Path], *, codes: bool = False) -> None:
    """Check the headers of weight files.

    Args:
        files: the files.
        codes: whether tensors may be codes, in a quantised checkpoint.

    Raises:
        InputError: a truncated file, a tensor that is not floating-point, or a tensor in two files,
            of which transformers would take either.
    """
    found: dict[str, Path] = {}
    for path in files:
        for name, dtype in _tensors(path):
            if not codes and dtype not in FLOATS:
                raise InputError(
                    f"{path}: tensor '{name}' is of type {dtype}; allowed: {', '.join(FLOATS)}"
                )
            if name in found:
                raise InputError(
                    f"{path}: tensor '{name}' is in {found[name].name} too; allowed: each once"
                )
            found[name] = path


def _tensors(path: Path) -> Iterator[tuple[str, str]]:
    """Yield name and type of each tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_slice(name).get_dtype()
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: truncated or not a safetensors file: {reason}") from error


def lacking_expert(folder: Path) -> str | None:
    """Return the first tensor that one expert lacks and another of its layer has, or None.

    transformers concatenates the experts of a layer and does not say which of them do not fit.
    """
    names = {name for path in weight_files(folder) for name, _ in _tensors(path)}
    numbers, parts = defaultdict(set), defaultdict(set)
    for match in filter(None, map(EXPERT.fullmatch, names)):
        layer, number, part = match.groups()
        numbers[layer].add(number)
        parts[layer].add(part)
    wanted = {layer + n + part for layer in parts for n in numbers[layer] for part in parts[layer]}
    return min(wanted - names, key=natural_order, default=None)


def natural_order(name: str) -> str:
    """Return a sorting key that puts layer 2 before layer 10."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(9), name)


def file_hashes(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of files by their path in a folder; files are read concurrently."""
    files = list(files)
    names = [path.relative_to(folder).as_posix() for path in files]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(_sha256, files), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def settings_files(folder: Path) -> list[Path]:
    """Return the files of architecture and tokenizer."""
    return sorted(path for pattern in SETTINGS for path in folder.glob(pattern))
