"""A container of Azure's blob storage."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from ..core.plugin_api.backend import DataBackend
from ..core.plugin_api.hookspecs import hookimpl
from ..core.storage.account import AzureSettings
from ._bucket_backend import BucketBackend


class AzureBackend(BucketBackend):
    """All blobs below a prefix of a container of Azure, recursively; names that begin with a dot are skipped."""

    name = "azure"
    aliases = ("az",)
    place_keys = ("azure_data_prefix", "azure_prompts_file")
    bucket_key = "azure_container_name"
    connections_key = "azure_max_connections"
    timeout_key = "azure_timeout_seconds"
    remedies = (
        "correct azure_account_name and azure_account_key or azure_sas_token, or the environment's AZURE_... variables",
        "give an account that may list it (Storage Blob Data Reader), or correct the container's name",
        "correct azure_container_name, azure_account_name and azure_endpoint_url",
    )

    class Config(AzureSettings):
        """Where the container is, and how it is reached."""

        azure_container_name: str = Field(min_length=1)
        """Name of the container."""
        azure_data_prefix: str = ""
        """The folder in the container, as `images/cats`; empty: all of it."""
        azure_prompts_file: str | None = None
        """For `prompts`: the one blob with them, below azure_data_prefix (.txt, .json, .jsonl, .csv or .parquet);
        absent: all .txt blobs."""
        azure_max_connections: int = Field(default=32, ge=1, le=1024)
        """Requests at the same time, at most; also the threads that read headers and captions."""
        azure_timeout_seconds: float = Field(default=60.0, gt=0)
        """How long the server may be silent in the middle of a request, in seconds."""

        @model_validator(mode="after")
        def _whole_account(self) -> Self:
            if problem := self.account_problem():
                raise ValueError(problem)
            return self


@hookimpl
def register_data_backends() -> list[type[DataBackend]]:
    """The container."""
    return [AzureBackend]
