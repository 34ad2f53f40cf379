"""Files of the Hugging Face hub at a pinned commit, or one line that says why not.

Whether the network may be used is for ``huggingface_hub`` to say, which reads ``HF_HUB_OFFLINE``
("0" means that it may) when it is imported. No other code reads that variable.
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
    """Return the folder of a commit in the hub's cache, with the files that match ``patterns``.

    What the cache lacks is downloaded. After an interruption, complete files are not downloaded
    again.

    Args:
        where: what an error begins with, such as a config key and its value.
        repository: hub id.
        revision: commit hash.
        patterns: of file names, as in a shell.
        kind: of the repository.
        cached_only: never use a network, whatever the hub's own switch says.

    Raises:
        InputError: the hub cannot be reached and the cache lacks a file; no such repository or
            commit; or access is restricted.
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


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn what a client of the hub raises into one line that begins with ``where``.

    Raises:
        InputError: in place of it.
    """
    # From huggingface_hub, which decides which HTTP client it uses.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        yield
    # Refusals, offline mode, a file that is not in the cache and a full disk are OSErrors; a broken
    # connection is an HTTPError, an impossible name a ValueError, Xet's own failure a RuntimeError.
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        raise InputError(f"{where}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return in one line why the hub, or its cache, did not give what was asked for."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"access is restricted: accept the terms on its page of the hub, then {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository on {constants.ENDPOINT}; for a private one, {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no such commit on {constants.ENDPOINT}"
    is_missing = isinstance(error, errors.LocalEntryNotFoundError)
    cause = error.__cause__ if is_missing else error
    if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
        forbidden = " and HF_HUB_OFFLINE forbids downloading it" if cause else ""
        return (
            f"not in the local hub cache {constants.HF_HUB_CACHE}, or not all of it{forbidden}; "
            "fetch it where there is a network, or set HF_HOME to where it was fetched"
        )
    line = next((line for line in str(cause).splitlines() if line.strip()), "no message")
    return f"cannot be fetched from {constants.ENDPOINT}: {type(cause).__name__}: {line.strip()}"
