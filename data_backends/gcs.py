"""A bucket of Google Cloud Storage."""

from __future__ import annotations

from pydantic import Field

from ..core.plugin_api.backend import DataBackend
from ..core.plugin_api.hookspecs import hookimpl
from ..core.storage.account import GcsSettings
from ._bucket_backend import BucketBackend


class GcsBackend(BucketBackend):
    """All objects below a prefix of a bucket of Google, recursively; names that begin with a dot are skipped."""

    name = "gcs"
    aliases = ("gs",)
    place_keys = ("gcs_data_prefix", "gcs_prompts_file")
    bucket_key = "gcs_bucket_name"
    connections_key = "gcs_max_connections"
    timeout_key = "gcs_timeout_seconds"
    remedies = (
        "correct gcs_service_account_file, or run gcloud auth application-default login",
        "give an account that may list it (storage.objects.list, storage.objects.get), or correct the bucket's name",
        "correct gcs_bucket_name and gcs_endpoint_url",
    )

    class Config(GcsSettings):
        """Where the bucket is, and how it is reached."""

        gcs_bucket_name: str = Field(min_length=1)
        """Name of the bucket."""
        gcs_data_prefix: str = ""
        """The folder in the bucket, as `images/cats`; empty: all of it."""
        gcs_prompts_file: str | None = None
        """For `prompts`: the one object with them, below gcs_data_prefix (.txt, .json, .jsonl, .csv or .parquet);
        absent: all .txt objects."""
        gcs_max_connections: int = Field(default=32, ge=1, le=1024)
        """Requests at the same time, at most; also the threads that read headers and captions."""
        gcs_timeout_seconds: float = Field(default=60.0, gt=0)
        """How long the server may be silent in the middle of a request, in seconds."""


@hookimpl
def register_data_backends() -> list[type[DataBackend]]:
    """The bucket."""
    return [GcsBackend]
