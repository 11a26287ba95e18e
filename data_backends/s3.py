"""A bucket of S3, or of any server that speaks its protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, ClassVar, Self

from pydantic import Field, model_validator

from ..core.errors import BadValue
from ..core.plugin_api.backend import DataBackend, Entry
from ..core.plugin_api.hookspecs import hookimpl
from ..core.storage import RetryPolicy, open_store
from ..core.storage.account import AwsSettings
from ..core.storage.refusals import CredentialsRejected
from ..core.storage.s3 import S3Store, account


class S3Backend(DataBackend):
    """All objects below a prefix of a bucket, recursively; names that begin with a dot are skipped."""

    name = "s3"
    aliases = ("aws",)
    place_keys = ("aws_data_prefix", "aws_prompts_file")
    packages: ClassVar[Mapping[str, str]] = {"botocore": "distill-engine[s3]"}

    class Config(AwsSettings):
        """Where the bucket is, and how it is reached."""

        aws_bucket_name: str = Field(min_length=1)
        """Name of the bucket."""
        aws_data_prefix: str = ""
        """The folder in the bucket, as `pictures/cats`; empty: all of it."""
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

    @cached_property
    def store(self) -> S3Store:
        """The bucket, opened when it is first needed."""
        config = self.config
        access = config.access(connections=config.aws_max_pool_connections)
        retry = RetryPolicy(attempts=config.aws_max_attempts, timeout_seconds=config.aws_timeout_seconds)
        store = open_store(f"s3://{config.aws_bucket_name}/{config.aws_data_prefix}", access=access, retry=retry)
        assert isinstance(store, S3Store)
        return store

    @property
    def parallel_reads(self) -> int:
        """As many as connections: threads that read a bucket mostly wait."""
        return self.config.aws_max_pool_connections

    @property
    def account(self) -> str:
        """Where the credentials come from."""
        if self.config.aws_access_key_id is not None:
            return "a key in the data file"
        return account(self.config.aws_profile)

    def check(self) -> None:
        """The names can be those of a bucket and an address."""
        bucket = self.config.aws_bucket_name
        if "/" in bucket:
            remedy = "the bucket's name alone; the folder goes into aws_data_prefix"
            raise BadValue("aws_bucket_name", bucket, "is no name of a bucket", remedy)
        if not self.config.endpoint_is_address():
            raise BadValue(
                "aws_endpoint_url", self.config.aws_endpoint_url, "is no address", "write it as https://host:9000"
            )

    @property
    def location(self) -> str:
        """The address, without the account."""
        return self.store.url + (self.config.aws_prompts_file or "")

    @property
    def prompts_key(self) -> str | None:
        """``aws_prompts_file``."""
        return self.config.aws_prompts_file

    def list(self) -> Iterator[Entry]:
        """Every object, in sorted key order. Raises BadValue where the bucket cannot be listed."""
        with self._asked():
            for entry in self.store.list():
                if not any(part.startswith(".") for part in entry.key.split("/")):
                    yield entry

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Say by its key what is wrong with the place."""
        bucket = self.config.aws_bucket_name
        try:
            yield
        except CredentialsRejected as error:
            remedy = "correct aws_access_key_id and aws_secret_access_key, or the environment's AWS_... variables"
            raise BadValue("aws_bucket_name", bucket, error.reason, remedy) from error
        except PermissionError as error:
            remedy = "give an account that may list it (s3:ListBucket, s3:GetObject), or correct the bucket's name"
            raise BadValue("aws_bucket_name", bucket, f"cannot be listed: {error.strerror}", remedy) from error
        except FileNotFoundError as error:
            remedy = "correct aws_bucket_name, aws_endpoint_url and aws_region_name"
            raise BadValue("aws_bucket_name", bucket, f"is not there: {error.strerror}", remedy) from error

    def entry(self, key: str) -> Entry:
        """Size and ETag of one object."""
        return self.store.stat(key)

    def open(self, key: str) -> BinaryIO:
        """The object, fetched as far as it is read."""
        return self.store.open(key)

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        return self.store.exists(key)

    def write(self, key: str, data: bytes) -> None:
        """Write the object whole or not at all."""
        self.store.write(key, data)

    def upload(self, key: str, path: Path) -> None:
        """Write a file as an object, in parts where it is large, without reading all of it at once."""
        self.store.upload(key, path)

    def delete(self, key: str) -> None:
        """Remove the object."""
        self.store.delete(key)


@hookimpl
def register_data_backends() -> list[type[DataBackend]]:
    """The bucket."""
    return [S3Backend]
