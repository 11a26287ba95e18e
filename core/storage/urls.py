"""From an address to the store that it is in."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..errors import UserError
from .account import AwsSettings, AzureSettings, GcsSettings
from .folder import FolderStore
from .http import HttpStore, without_secrets
from .retry import RetryPolicy
from .s3 import S3Access, S3Store
from .store import RemoteStore

BUCKETS = {"s3": AwsSettings, "s3a": AwsSettings, "gs": GcsSettings, "az": AzureSettings}
SCHEMES = (*BUCKETS, "http", "https")


def is_remote(place: str) -> bool:
    """Return whether a text is the address of another place than this machine's files."""
    scheme, mark, _ = place.partition("://")
    return bool(mark) and scheme.lower() in SCHEMES


def split_url(url: str) -> tuple[str, str]:
    """Where an object is, and its key there: ``s3://bucket/tables/a.csv`` is ``(s3://bucket/tables, a.csv)``.

    A web address keeps its query in the key.
    """
    if not is_remote(url):
        path = local_path(url)
        return str(path.parent), path.name
    scheme, _, rest = url.partition("://")
    if scheme.lower() in ("http", "https"):
        path, question, query = rest.partition("?")
        parent, _, name = path.rpartition("/")
        return f"{scheme}://{parent or name}", (name if parent else "") + question + query
    parent, slash, name = rest.rpartition("/")
    return f"{scheme}://{parent if slash else rest}", name if slash else ""


def local_path(place: str) -> Path:
    """The path of a ``file:`` address or of a plain path."""
    if place.lower().startswith("file:"):
        return Path(unquote(urlsplit(place).path))
    return Path(os.path.expanduser(place))


def open_store(
    url: str, *, access: S3Access | None = None, retry: RetryPolicy | None = None, connections: int = 64
) -> RemoteStore:
    """The objects below an address.

    Args:
        url: ``s3://bucket/prefix`` (or ``gs://``, ``az://``), ``http(s)://host/folder``, ``file:///folder`` or a path.
        access: For S3: endpoint, region, credentials; absent: the usual AWS chain, as of the others theirs.
        retry: How failed requests are repeated.
        connections: Requests at the same time, at most.

    Raises:
        UserError: The address cannot be used, or a package is missing.
    """
    retry = retry or RetryPolicy()
    if not is_remote(url):
        if "://" in url and not url.startswith("file://"):
            remedy = "s3://bucket/prefix, gs://, az://, http(s)://host/folder, file:///folder and paths can"
            raise UserError(f"{without_secrets(url)}: such an address cannot be opened", remedy)
        return FolderStore(local_path(url))
    scheme, _, rest = url.partition("://")
    if scheme.lower().startswith("http"):
        return HttpStore(url, retry=retry, connections=connections)
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise UserError(f"{url} names no bucket", f"write {scheme}://bucket/prefix")
    if access is not None:
        return S3Store(bucket, prefix, access, retry)
    return BUCKETS[scheme.lower()]().open(bucket, prefix, retry=retry, connections=connections)
