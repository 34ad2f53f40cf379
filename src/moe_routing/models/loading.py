"""Load the model under study, or say in one line why not."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_routing.errors import InputError
from moe_routing.usage import loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moe_routing.config import ModelConfig


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and where they came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    provenance: dict[str, str]


def describe_checkpoint(config: ModelConfig) -> dict[str, object]:
    """Check a checkpoint without loading it, and return what it is.

    A hub id is downloaded first (into the hub's own cache), so that later jobs need no network.

    Returns:
        ``path``, ``revision``, ``architecture``, ``num_layers``, ``num_experts``, ``native_k``,
        ``parameters``, ``weights_sha256`` (one hash over the files' hashes) and ``files`` (name to
        hash).

    Raises:
        InputError: no such folder, no or truncated safetensors, or no config.
    """
    folder = checkpoint_folder(config, download=True)
    architecture = _read_json(folder / "config.json")
    files = {path.name: _check_weights(path) for path in _weight_files(folder)}
    digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()
    experts = architecture.get("num_experts", architecture.get("num_local_experts"))
    return {
        "path": config.path,
        "revision": config.revision,
        "architecture": (architecture.get("architectures") or ["unknown"])[0],
        "num_layers": architecture.get("num_hidden_layers"),
        "num_experts": experts,
        "native_k": architecture.get("num_experts_per_tok"),
        "parameters": sum(_count_parameters(path) for path in _weight_files(folder)),
        "weights_sha256": digest,
        "files": files,
    }


def checkpoint_folder(config: ModelConfig, *, download: bool = False) -> Path:
    """Return the local folder of a checkpoint; a hub id is looked up in the hub's cache.

    Raises:
        InputError: the folder does not exist, or the hub id is neither cached nor reachable.
    """
    if config.revision is None:
        folder = Path(config.path)
        if not folder.is_dir():
            raise InputError(
                f"model.path: {config.path}: no such folder; a hub id needs model.revision too"
            )
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                config.path,
                revision=config.revision,
                local_files_only=not download or bool(os.environ.get("HF_HUB_OFFLINE")),
                allow_patterns=["*.json", "*.safetensors", "*.txt"],
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"model.path: {config.path}@{config.revision}: not in the local hub cache and not "
            f"downloadable: {reason}"
        ) from error


@loading()
def load_model(config: ModelConfig, threads: int | None = None) -> LoadedModel:
    """Load model and tokenizer for inference.

    Weights are safetensors only and code of the checkpoint is never run.

    Raises:
        InputError: see :func:`checkpoint_folder`; a device that is not there; a model without a
            supported router; weights that do not fit the architecture.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    from moe_routing.models.adapters import find_routers, router_fingerprint

    if threads:
        torch.set_num_threads(threads)
    logging.disable_progress_bar()
    check_device(config.device)
    folder = checkpoint_folder(config)
    for path in _weight_files(folder):
        _open_weights(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            device_map=config.device_map,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model.path: {config.path}: cannot be loaded: {reason}") from error
    find_routers(model)
    if config.device_map is None:
        model.to(config.device)
    from moe_routing.models.experts import EXPERTS_IMPLEMENTATION  # noqa: F401 (registers it)

    model.set_experts_implementation(config.experts_implementation)
    provenance = {
        "path": config.path,
        "revision": config.revision or "",
        "dtype": config.dtype,
        "device": device_name(config.device),
        "experts_implementation": config.experts_implementation,
        "router_fingerprint": router_fingerprint(model),
    }
    return LoadedModel(model.eval(), tokenizer, provenance)


def check_device(device: str, key: str = "model.device") -> None:
    """Raise InputError if a device is asked for, under a config key, that is not there."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"{key} is '{device}'; allowed: cpu, cuda, cuda:<n>") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{key} is '{device}', but no GPU is visible; allowed here: cpu")


def device_name(device: str) -> str:
    """Return the device's product name, or the processor kind for the CPU."""
    import platform

    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index)["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise InputError(f"{folder / missing[0]}: missing; {index.name} names it")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: no .safetensors file; other weight formats are not read")
    return files


def _open_weights(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: truncated or not a safetensors file: {reason}") from error


def _count_parameters(path: Path) -> int:
    """Return the number of weights in a file, from its header."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _check_weights(path: Path) -> str:
    """Open a weight file and return its sha256."""
    _open_weights(path)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: missing or not valid JSON: {error}") from error
