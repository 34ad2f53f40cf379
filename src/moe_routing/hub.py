"""Files from the Hugging Face Hub at a pinned commit, with one-line errors.

``huggingface_hub`` decides whether the network may be used: it reads ``HF_HUB_OFFLINE`` ("0" allows
it) when it is imported. No other code reads that variable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from moe_routing.errors import InputError

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def snapshot(
    where: str,
    repository: str,
    revision: str,
    patterns: Sequence[str],
    *,
    kind: Literal["model", "dataset"],
    cached_only: bool = False,
) -> Path:
    """Return the folder of a commit in the Hub's cache, with the files that match ``patterns``.

    Missing files are downloaded. After an interruption, complete files are not downloaded again.

    Args:
        where: start of error messages, such as a config key and its value.
        repository: Hub id.
        revision: commit hash.
        patterns: shell-style patterns of file names.
        kind: type of the repository.
        cached_only: never use the network, even if ``HF_HUB_OFFLINE`` allows it.

    Raises:
        InputError: the Hub cannot be reached and the cache lacks a file; there is no such
            repository or commit; or access is restricted.
    """
    from huggingface_hub import snapshot_download

    with explained(where):
        return Path(
            snapshot_download(
                repository,
                repo_type=kind,
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=cached_only,
            )
        )


def current_revision(where: str, repository: str) -> str:
    """Return the commit that a model's main branch is at; offline, that of the Hub's cache.

    Raises:
        InputError: see :func:`snapshot`.
    """
    from huggingface_hub import hf_hub_download

    with explained(where):  # the smallest file that every model has
        path = Path(hf_hub_download(repository, "config.json"))
    return path.parent.name  # a folder of the cache is named by its commit


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn errors of the Hub's client into one-line errors that begin with ``where``.

    Raises:
        InputError: in place of the client's error.
    """
    # From huggingface_hub, which decides which HTTP client it uses.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        yield
    # Refusals, offline mode, a file missing from the cache and a full disk are OSErrors. A broken
    # connection is an HTTPError, an invalid name a ValueError, a failure of Xet a RuntimeError.
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        raise InputError(f"{where}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return in one line why the Hub, or its cache, did not provide the files."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"access is restricted: accept the terms on its Hub page, then {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository on {constants.ENDPOINT}; for a private one, {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no such commit on {constants.ENDPOINT}"
    is_missing = isinstance(error, errors.LocalEntryNotFoundError)
    cause = error.__cause__ if is_missing else error
    if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
        forbidden = ", and HF_HUB_OFFLINE forbids downloading it" if cause else ""
        return (
            f"missing or incomplete in the local Hub cache {constants.HF_HUB_CACHE}{forbidden}; "
            "download it where there is a network, or set HF_HOME to where it was downloaded"
        )
    line = next((line for line in str(cause).splitlines() if line.strip()), "no message")
    return f"cannot be fetched from {constants.ENDPOINT}: {type(cause).__name__}: {line.strip()}"
