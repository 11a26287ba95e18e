"""A bucket of S3, or of any server that speaks its protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field, model_validator

from ..core.plugin_api.backend import DataBackend
from ..core.plugin_api.hookspecs import hookimpl
from ..core.storage.account import AwsSettings
from ._bucket_backend import BucketBackend


class S3Backend(BucketBackend):
    """All objects below a prefix of a bucket, recursively; names that begin with a dot are skipped."""

    name = "s3"
    aliases = ("aws",)
    place_keys = ("aws_data_prefix", "aws_prompts_file")
    bucket_key = "aws_bucket_name"
    connections_key = "aws_max_pool_connections"
    timeout_key = "aws_timeout_seconds"
    packages: ClassVar[Mapping[str, str]] = {"botocore": "distill-engine[s3]"}
    remedies = (
        "correct aws_access_key_id and aws_secret_access_key, or the environment's AWS_... variables",
        "give an account that may list it (s3:ListBucket, s3:GetObject), or correct the bucket's name",
        "correct aws_bucket_name, aws_endpoint_url and aws_region_name",
    )

    class Config(AwsSettings):
        """The bucket, and the access to it."""

        aws_bucket_name: str = Field(min_length=1)
        """Name of the bucket."""
        aws_data_prefix: str = ""
        """The folder in the bucket, as `images/cats`; empty: all of it."""
        aws_prompts_file: str | None = None
        """For `prompts`: the one object with them, below aws_data_prefix (.txt, .json, .jsonl, .csv or .parquet);
        absent: all .txt objects."""
        aws_max_pool_connections: int = Field(default=32, ge=1, le=1024)
        """Requests at the same time, at most; also the threads that read headers and captions."""
        aws_timeout_seconds: float = Field(default=60.0, gt=0)
        """How long the server may be silent in the middle of a request, in seconds."""

        @model_validator(mode="after")
        def _whole_account(self) -> Self:
            if problem := self.account_problem():
                raise ValueError(problem)
            return self


@hookimpl
def register_data_backends() -> list[type[DataBackend]]:
    """Register the bucket."""
    return [S3Backend]
