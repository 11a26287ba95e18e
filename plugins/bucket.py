"""Uploads a student into a bucket: of S3 or any server that speaks its protocol, of Google or of Azure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.errors import DistillError, OutOfReach, UserError
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.publisher import Publisher
from ..core.storage.account import AwsSettings, AzureSettings, BucketSettings, GcsSettings
from ..core.utils.files import sha256

if TYPE_CHECKING:
    from ..core.storage.objects import ObjectStore

MANIFEST = "manifest.json"
PROBE = ".distill-was-here"
ATTEMPTS_AT_START = 2


class BucketPublisher(Publisher):
    """Uploads `student/` below a prefix of a bucket.

    `manifest.json` there is written first, with `"complete": false`, and again at the end, with `true` and every file's
    size and SHA-256, so that an interrupted upload is never taken for a complete one.
    """

    bucket_key: ClassVar[str]
    prefix_key: ClassVar[str]

    Config: ClassVar[type[BucketSettings]]

    @property
    def _bucket(self) -> str | None:
        return getattr(self.config, self.bucket_key)

    def problems(self) -> list[str]:
        """Return problems: no bucket, or one that is missing, does not answer or is read-only (tried by a write)."""
        bucket, keys = self._bucket, f"publisher_config.{self.name}"
        if not bucket or "/" in bucket:
            wrong = f"= {bucket!r} is no name of a bucket (the folder is {self.prefix_key})"
            return [f"{keys}.{self.bucket_key} {wrong if bucket else 'is missing'}"]
        if not self.config.endpoint_is_address():
            key = self.config.endpoint_key
            return [f"{keys}.{key} = {getattr(self.config, key)!r} is no address (as https://host:9000)"]
        if problem := self.config.account_problem():  # a written configuration keeps no secrets: no ground to refuse it
            return [problem]
        try:
            store = self._store(attempts=ATTEMPTS_AT_START)
            store.write(PROBE, b"")
            with suppress(PermissionError):  # who may write but not delete can publish
                store.delete(PROBE)
        except (DistillError, OSError) as error:
            return [f"{self._url} cannot be written: {_reason(error)}"]
        return []

    def publish(self, student: Path) -> str:
        """Upload every file, the manifest last; return the address."""
        files = sorted(path for path in student.rglob("*") if path.is_file())
        if not files:
            raise UserError(f"{student} holds no file", "give the folder student/ of a finished run")
        store = self._store(attempts=self.config.attempts)
        try:
            store.write(MANIFEST, _manifest({}, complete=False))
            for path in files:
                store.upload(path.relative_to(student).as_posix(), path)
            about = {path.relative_to(student).as_posix(): _about(path) for path in files}
            store.write(MANIFEST, _manifest(about, complete=True))
        except (OutOfReach, OSError) as error:
            raise DistillError(f"{self._url}: {_reason(error)}; what is there is marked as incomplete") from error
        return self._url

    @cached_property
    def _prefix(self) -> str:
        prefix = getattr(self.config, self.prefix_key)
        return (self.setting.run_name if prefix is None else prefix).strip("/")

    @property
    def _url(self) -> str:
        return f"{self.config.scheme}://{self._bucket}/{self._prefix}"

    def _store(self, *, attempts: int) -> ObjectStore:
        from ..core.storage import RetryPolicy

        assert self._bucket is not None
        return self.config.open(self._bucket, self._prefix, retry=RetryPolicy(attempts=attempts))


class Bucket(BucketPublisher):
    """Uploads `student/` below a prefix of a bucket of S3, of AWS or any compatible server.

    `manifest.json` there says at the end that the upload is complete.
    """

    name: ClassVar[str] = "s3"
    aliases: ClassVar[tuple[str, ...]] = ("aws",)
    packages: ClassVar[Mapping[str, str]] = {"botocore": "distill-engine[s3]"}
    bucket_key: ClassVar[str] = "aws_bucket_name"
    prefix_key: ClassVar[str] = "aws_prefix"

    class Config(AwsSettings):
        """Where the bucket is, and how it is reached; the keys are those of a data file's bucket."""

        aws_bucket_name: str | None = None
        """Name of the bucket."""
        aws_prefix: str | None = None
        """The folder in the bucket, as `students/sdxl-lcm`; absent: the name of the run."""


class GcsBucket(BucketPublisher):
    """Uploads `student/` below a prefix of a bucket of Google Cloud Storage.

    `manifest.json` there says at the end that the upload is complete.
    """

    name: ClassVar[str] = "gcs"
    aliases: ClassVar[tuple[str, ...]] = ("gs",)
    bucket_key: ClassVar[str] = "gcs_bucket_name"
    prefix_key: ClassVar[str] = "gcs_prefix"

    class Config(GcsSettings):
        """Where the bucket is, and how it is reached; the keys are those of a data file's bucket."""

        gcs_bucket_name: str | None = None
        """Name of the bucket."""
        gcs_prefix: str | None = None
        """The folder in the bucket, as `students/sdxl-lcm`; absent: the name of the run."""


class AzureContainer(BucketPublisher):
    """Uploads `student/` below a prefix of a container of Azure.

    `manifest.json` there says at the end that the upload is complete.
    """

    name: ClassVar[str] = "azure"
    aliases: ClassVar[tuple[str, ...]] = ("az",)
    bucket_key: ClassVar[str] = "azure_container_name"
    prefix_key: ClassVar[str] = "azure_prefix"

    class Config(AzureSettings):
        """Where the container is, and how it is reached; the keys are those of a data file's container."""

        azure_container_name: str | None = None
        """Name of the container."""
        azure_prefix: str | None = None
        """The folder in the container, as `students/sdxl-lcm`; absent: the name of the run."""


def _reason(error: Exception) -> str:
    """Return the reason of an error, without the advice that is for runs."""
    if isinstance(error, OutOfReach):
        return error.reason
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return error.message if isinstance(error, UserError) else str(error)


def _about(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _manifest(files: Mapping[str, Any], *, complete: bool) -> bytes:
    return (json.dumps({"complete": complete, "files": files}, indent=2) + "\n").encode()


@hookimpl
def register_publishers() -> Sequence[type[Publisher]]:
    """Return the publishers of this file: the buckets of three providers."""
    return [Bucket, GcsBucket, AzureContainer]
