"""Options that subcommands share, and what they stand for."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_routing.errors import InputError
from moe_routing.hub import current_revision

if TYPE_CHECKING:
    from moe_routing.config.study import ModelConfig
    from moe_routing.engine.loading import LoadedModel

Subparsers = Any
"""What ``add_subparsers`` returns; argparse keeps its class private."""


def add_command(
    subparsers: Subparsers, name: str, title: str, examples: str
) -> argparse.ArgumentParser:
    """Add a subcommand whose help ends with examples."""
    return subparsers.add_parser(
        name,
        help=title,
        description=f"{title[0].upper()}{title[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the model: a folder or a Hub id, and how it is loaded."""
    parser.add_argument(
        "model",
        nargs="?" if optional else None,
        metavar="MODEL",
        help="folder with a Hugging Face checkpoint, or a Hub id",
    )
    parser.add_argument(
        "--revision", help="commit on the Hub (default: the present one of the main branch)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument("--device", help="torch device (default: cuda if there is a GPU, else cpu)")
    parser.add_argument(
        "--device-map", metavar="MAP", help="map of accelerate, such as auto, for several GPUs"
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add how much text a calibration reads."""
    sizes = parser.add_argument_group("size of a calibration")
    for option, default, what in (
        ("--tokens", 8192, "tokens whose router logits are sampled"),
        ("--toggled-tokens", 400, "tokens whose experts are switched off and on, one at a time"),
        ("--documents", 128, "documents that strategies are certified on, at most half of them"),
    ):
        sizes.add_argument(
            option, type=positive, default=default, metavar="N", help=f"{what} ({default})"
        )
    sizes.add_argument(
        "--window", type=positive, metavar="N", help="longest context (the model's own)"
    )


def positive(text: str) -> int:
    """Return a positive integer of the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}'; allowed: integers from 1 on")
    return int(text)


def model_config(arguments: argparse.Namespace) -> ModelConfig:
    """Return the model that the command line names; a Hub id gets the commit it stands for.

    Raises:
        InputError: no such folder or repository, or a value that no model has.
    """
    return parsed_model(model_values(arguments))


def model_values(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the section ``model`` of a config.

    Raises:
        InputError: no such folder or repository.
    """
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    path, revision = arguments.model, arguments.revision
    if Path(path).is_dir():
        if revision is not None:
            raise InputError(f"--revision is '{revision}', and {path} is a folder; allowed: none")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise InputError(f"MODEL is '{path}': no such folder")
    elif revision is None:
        revision = current_revision(f"MODEL is '{path}': no such folder; as a Hub id", path)
    return {
        "path": path,
        "revision": revision,
        "dtype": arguments.dtype or ("float32" if device == "cpu" else "bfloat16"),
        "device": device,
        "device_map": arguments.device_map,
    }


def parsed_model(values: dict[str, object]) -> ModelConfig:
    """Return a section ``model``, checked.

    Raises:
        InputError: a value is not allowed, or its device is missing.
    """
    from moe_routing.config.study import ModelConfig
    from moe_routing.engine.loading import check_device
    from moe_routing.schema import parse

    config = parse(ModelConfig, values, "command line: model")
    check_device(config.device, "--device")
    return config


def loaded_model(config: ModelConfig) -> LoadedModel:
    """Load a model, downloaded first if need be, with the hash of its weights.

    Raises:
        InputError: see :func:`moe_routing.engine.loading.load_model`.
    """
    from moe_routing.engine.loading import checkpoint_folder, load_model
    from moe_routing.engine.weights import file_hashes, weight_files

    folder = checkpoint_folder(config, download=True)
    loaded = load_model(config)
    weights = "".join(file_hashes(folder, weight_files(folder)).values())
    sha256 = hashlib.sha256(weights.encode()).hexdigest()
    return replace(loaded, provenance={**loaded.provenance, "weights_sha256": sha256})


def read_texts(path: Path) -> list[str]:
    """Return the documents of a text file.

    Raises:
        InputError: see :func:`moe_routing.data.rows.read_rows` and
            :func:`moe_routing.data.documents.read_documents`.
    """
    from moe_routing.data.documents import read_documents
    from moe_routing.data.rows import read_rows

    return read_documents(read_rows(path))
