"""Downloads from the Hugging Face hub, which end at once where there is no network."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from ...core.errors import UnreachableError, UserError

ANSWERS_WITHIN = 5.0
"""Seconds in which the hub must take a connection; its own client would try again for half a minute."""


@functools.cache
def hub_answers() -> bool:
    """Return False where no connection to the hub can be made; asked once. Proxies are trusted to reach it."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    if getproxies().keys() & {"http", "https", "all"}:
        return True
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=ANSWERS_WITHIN).close()
    except OSError:
        return False
    return True


def hub_file(repository: str, name: str, *, revision: str | None = None) -> Path:
    """Return one file of a repository, downloaded or from the cache. Raises an error of the hub's client."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, name, revision=revision, local_files_only=not hub_answers()))


def hub_folder(repository: str, *, revision: str | None = None, **patterns: Any) -> Path:
    """Return the local folder with the files of a repository that match. Raises an error of the hub's client."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, revision=revision, local_files_only=not hub_answers(), **patterns))


def cached_file(repository: str, name: str, *, revision: str | None = None) -> Path | None:
    """Return one file of a repository from the cache; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def hub_names(repository: str, *, revision: str | None = None) -> list[str]:
    """Return the names of all files of a repository. Raises an error of the hub's client."""
    from huggingface_hub import HfApi

    return HfApi().list_repo_files(repository, revision=revision)


def hub_header(
    repository: str, name: str, *, revision: str | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the entries (name -> ``dtype`` and ``shape``) and the metadata of a safetensors file, without its weights.

    Raises an error of the hub's client.
    """
    from huggingface_hub import HfApi

    found = HfApi().parse_safetensors_file_metadata(repository, name, revision=revision)
    entries = {one: {"dtype": info.dtype, "shape": info.shape} for one, info in found.tensors.items()}
    return entries, found.metadata


@contextlib.contextmanager
def hub_errors(name: str, what: str) -> Iterator[None]:
    """Raise errors of the hub's client as a UserError about the model `name`, of which `what` was asked for."""
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, SafetensorsParsingError

    try:
        yield
    except SafetensorsParsingError as error:
        raise UserError(
            f"model {name!r}, {what}: {error}", "restore the file from the model's origin: it is no safetensors file"
        ) from error
    except (OSError, EntryNotFoundError, HFValidationError, *_broken_connections()) as error:
        kind = UserError if hub_answers() else UnreachableError
        raise kind(
            f"model {name!r} is no local folder or .safetensors file, and the hub did not give it "
            f"({what}: {type(error).__name__}: {str(error).strip().splitlines()[0]})",
            "check the spelling of the path or id; a gated model needs `hf auth login`; without a network, "
            "download the model elsewhere and name its folder",
        ) from error


def _broken_connections() -> tuple[type[Exception], ...]:
    """Return the errors of the network that the hub's client passes on as they are."""
    try:
        import httpx
    except ImportError:  # of clients before 1.0, whose errors are OSErrors
        return ()
    return (httpx.HTTPError,)
