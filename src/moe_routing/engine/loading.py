"""Load the model under study; errors are one line."""

from __future__ import annotations

import ctypes
import hashlib
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moe_routing.engine.weights import (
    check_weights,
    file_hashes,
    lacking_expert,
    natural_order,
    settings_files,
    weight_files,
)
from moe_routing.errors import InputError
from moe_routing.files import read_json
from moe_routing.hub import snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moe_routing.config.study import ModelConfig
    from moe_routing.routing.rule import ModelRule


MOST_LAYERS = 10_000
"""Layers are built one by one, also without values: a slip of the pen would never end."""


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and where they came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    provenance: dict[str, str]

    @property
    def rule(self) -> ModelRule:
        """The model's own routing rule, that of its first router."""
        from moe_routing.engine.adapters import find_routers

        return find_routers(self.model)[0].rule


@dataclass(frozen=True)
class Outline:
    """A checkpoint that was checked against its own config; its weights are not in memory.

    Attributes:
        folder: its folder.
        model: the model on torch's meta device: modules, names and shapes.
    """

    folder: Path
    model: PreTrainedModel


def describe_checkpoint(config: ModelConfig) -> dict[str, object]:
    """Check a checkpoint without keeping its weights in memory, and describe it.

    Raises:
        InputError: see :func:`outline_checkpoint`.
    """
    return describe(config, outline_checkpoint(config))


def outline_checkpoint(config: ModelConfig) -> Outline:
    """Check that a checkpoint is complete, fits its own config, and has routers and a tokenizer.

    A hub id is downloaded first (into the hub's own cache), so later jobs need no network. The
    weights are then loaded as in any job, but onto the meta device, which drops each tensor once it
    is matched.

    Raises:
        InputError: no such folder; no or truncated safetensors; weights of another model or with
            tensors missing; quantised weights; an invalid config; no supported router.
    """
    model = skeleton(config_file(config))
    folder = checkpoint_folder(config, download=True)
    _check_files(folder)
    _load_tokenizer(folder)
    if not _is_quantised(folder):  # only loading shows whether quantised weights fit
        model = _load_weights(folder, config, "meta")
        model.tie_weights()  # a tensor that a file holds under two names is one tensor
    return Outline(folder, model)


def config_file(config: ModelConfig) -> Path:
    """Return the ``config.json`` of a model; of a hub id it alone is downloaded, a few kilobytes.

    Raises:
        InputError: see :func:`checkpoint_folder`.
    """
    return checkpoint_folder(config, download=True, files=("config.json",)) / "config.json"


def skeleton(path: Path) -> PreTrainedModel:
    """Return the model of a ``config.json`` on the meta device, without values.

    Raises:
        InputError: an invalid config, or one of a model without supported routers.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    read_json(path)
    with _refusing(f"{path}: transformers cannot use it"):
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise InputError(f"{path}: num_hidden_layers is {layers}; allowed: at most {MOST_LAYERS}")
    with _refusing(f"{path}: cannot be loaded"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    _check_model(model, path)
    return model


def describe(config: ModelConfig, outline: Outline) -> dict[str, object]:
    """Describe a checkpoint.

    Returns:
        ``path``, ``revision``, ``architecture``, ``num_layers`` (with experts), ``dense_layers``
        (without), ``num_experts`` (of the layer with most), ``experts_by_layer``, the fields of
        :class:`moe_routing.routing.rule.ModelRule`, ``parameters``,
        ``weights_sha256`` (one hash over the hashes of the weights), ``files`` (name to hash of the
        loaded files) and ``settings`` (the same for config and tokenizer).
    """
    from moe_routing.engine.adapters import find_routers

    model, routers = outline.model, find_routers(outline.model)
    experts = [router.num_experts for router in routers]
    files = file_hashes(outline.folder, weight_files(outline.folder))
    return {
        "path": config.path,
        "revision": config.revision,
        "architecture": type(model).__name__,
        "num_layers": len(routers),
        "dense_layers": model.config.get_text_config().num_hidden_layers - len(routers),
        "num_experts": max(experts),
        "experts_by_layer": experts,
        **asdict(routers[0].rule),
        "parameters": model.num_parameters(),
        "weights_sha256": hashlib.sha256("".join(files.values()).encode()).hexdigest(),
        "files": files,
        "settings": file_hashes(outline.folder, settings_files(outline.folder)),
    }


def checkpoint_folder(
    config: ModelConfig,
    *,
    download: bool = False,
    files: tuple[str, ...] = ("*.json", "*.safetensors", "*.txt"),
) -> Path:
    """Return the local folder of a checkpoint; a hub id is looked up in the hub's cache.

    Args:
        config: the model.
        download: whether to download what is missing there.
        files: patterns of the files that are needed.

    Raises:
        InputError: the folder does not exist; see also :func:`moe_routing.hub.snapshot`.
    """
    if config.revision is None:
        folder = Path(config.path)
        if not folder.is_dir():
            raise InputError(
                f"model.path: {config.path}: no such folder; a hub id needs model.revision too"
            )
        return folder
    return snapshot(
        f"model.path: {config.path}@{config.revision}",
        config.path,
        config.revision,
        list(files),
        kind="model",
        cached_only=not download,
    )


def load_model(config: ModelConfig, threads: int | None = None) -> LoadedModel:
    """Load model and tokenizer for inference.

    Only safetensors are loaded; code in the checkpoint is never run.

    Raises:
        InputError: see :func:`checkpoint_folder`; an unavailable device; a model without a
            supported router; weights that do not fit the architecture, or that cannot be run.
    """
    import torch

    from moe_routing.engine.adapters import find_experts, find_routers, router_fingerprint

    if threads:
        torch.set_num_threads(threads)
    check_device(config.device)
    folder = checkpoint_folder(config)
    _check_files(folder)
    tokenizer = _load_tokenizer(folder)
    model = _load_weights(folder, config, config.device_map)
    if config.device_map is None:
        with _refusing(f"model.path: {config.path}: cannot be moved to {config.device}"):
            model.to(config.device)  # pyright: ignore[reportArgumentType] (decorated: self is bound)
    if _is_quantised(folder):
        first_pass(model)
    from moe_routing.engine.experts import EXPERTS_IMPLEMENTATION

    # Quantised experts are of classes that know nothing of ours; they keep their own.
    if config.experts_implementation != EXPERTS_IMPLEMENTATION or len(find_experts(model)) == len(
        find_routers(model)
    ):
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


def unpack(model: PreTrainedModel) -> None:
    """Run a quantised model once: some libraries unpack weights in its first pass.

    Raises:
        InputError: see :func:`first_pass`.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        first_pass(model)


def first_pass(model: PreTrainedModel) -> None:
    """Run two tokens through a quantised model.

    Raises:
        InputError: its weights cannot be run, because of the device or the dtype, say.
    """
    import torch

    from moe_routing.engine.offload import input_device

    ids_1S = torch.zeros(1, 2, dtype=torch.int64, device=input_device(model))
    what = f"{type(model).__name__}: its quantised weights cannot be run here, in this dtype"
    with torch.no_grad(), _refusing(what):
        model(ids_1S)


def check_device(
    device: str, key: str = "model.device", driver_gpus: Callable[[], int] | None = None
) -> None:
    """Check that the device of a config key is available.

    Args:
        device: torch device.
        key: the config key.
        driver_gpus: returns how many GPUs the driver shows; by default :func:`count_driver_gpus`.

    Raises:
        InputError: it is not; if the driver shows a GPU, why torch has none.
    """
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"{key} is '{device}'; allowed: cpu, cuda, cuda:<n>") from error
    if kind == "cuda" and not torch.cuda.is_available():
        if not (driver_gpus or count_driver_gpus)():
            raise InputError(f"{key} is '{device}', but no GPU is visible; allowed here: cpu")
        # As when conda has solved the environment on a machine without a GPU.
        built = torch.version.cuda
        reason = f"may need a newer driver for CUDA {built}" if built else "is a build for CPUs"
        raise InputError(
            f"{key} is '{device}' and the driver shows a GPU, but torch {torch.__version__} "
            f"(torch.version.cuda is {built}) {reason}; allowed here: cpu"
        )


def count_driver_gpus() -> int:
    """Return how many GPUs NVIDIA's driver shows to this process, without torch's help."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):  # no driver
        return 0
    return 0 if failed else count.value


def device_name(device: str) -> str:
    """Return the device's product name, or the processor kind for the CPU."""
    import platform

    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"


def _check_files(folder: Path) -> None:
    """Check the files of a checkpoint without loading it.

    Raises:
        InputError: see :func:`weight_files` and :func:`check_weights`.
    """
    check_weights(weight_files(folder), codes=_is_quantised(folder))


def _is_quantised(folder: Path) -> bool:
    return read_json(folder / "config.json").get("quantization_config") is not None


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoConfig, AutoTokenizer

    with _refusing(f"{folder / 'config.json'}: transformers cannot use it"):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with _refusing(f"{folder}: no tokenizer that can be loaded"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _load_weights(folder: Path, config: ModelConfig, device_map: str | None) -> PreTrainedModel:
    """Load a model with exactly its weights: none missing, left over, filled in or reshaped."""
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    with _refusing(f"model.path: {config.path}: cannot be loaded", folder):
        # transformers fills missing or misshapen tensors with random numbers, and reports them.
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    # With the loading report it is a pair, which transformers does not declare.
    model, found = cast("tuple[PreTrainedModel, dict[str, set]]", loaded)
    _check_complete(found, config.path)
    _check_model(model, folder / "config.json")
    return model


@contextmanager
def _refusing(what: str, folder: Path | None = None) -> Iterator[None]:
    """Turn any exception of transformers about a checkpoint into an InputError of one line."""
    from transformers import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its report on the weights is a table
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {textwrap.shorten(str(error), 240)}"
        if folder and "conversion of the weights" in reason and (name := lacking_expert(folder)):
            reason = f"tensor '{name}' is missing"
        raise InputError(f"{what}: {reason}") from error
    finally:
        logging.set_verbosity(level)


def _check_complete(found: dict[str, set], path: str) -> None:
    """Check transformers' loading report, which omits what may be absent or left over.

    Raises:
        InputError: a tensor is missing, unexpected, or of another shape.
    """
    kinds = {
        "missing tensors": dict.fromkeys(found["missing_keys"], ""),
        "unexpected tensors": dict.fromkeys(found["unexpected_keys"], ""),
        "tensors of another shape": {
            name: f": {tuple(has)} in place of {tuple(wanted)}"
            for name, has, wanted in found["mismatched_keys"]
        },
    }
    said = [
        f"{kind}: {len(notes)} (first {(first := min(notes, key=natural_order))}{notes[first]})"
        for kind, notes in kinds.items()
        if notes
    ]
    if said:
        raise InputError(
            f"model.path: {path}: the weights do not fit config.json: {'; '.join(said)}"
        )


def _check_model(model: PreTrainedModel, path: Path) -> None:
    """Check what tensor shapes do not determine.

    Raises:
        InputError: no supported router, router weights in codes, or an invalid number in
            config.json.
    """
    from moe_routing.engine.adapters import find_routers

    try:
        routers = find_routers(model)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    for router in routers:
        dtype = router.linear.weight.dtype
        if not dtype.is_floating_point or dtype.itemsize == 1:
            raise InputError(
                f"{path}: quantization_config: the router of layer {router.layer} is in {dtype}; "
                "allowed: routers that are not quantised"
            )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and longest < 1:
        raise InputError(f"{path}: max_position_embeddings is {longest}; allowed: at least 1")
