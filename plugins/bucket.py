"""Uploads a student into a bucket of S3, or of any server that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.errors import DistillError, OutOfReach, UserError
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.publisher import Publisher
from ..core.storage.account import AwsSettings

if TYPE_CHECKING:
    from ..core.storage.s3 import S3Store

MANIFEST = "manifest.json"
PROBE = ".distill-was-here"
ATTEMPTS_AT_START = 2


class Bucket(Publisher):
    """Uploads `student/` below a prefix of a bucket.

    `manifest.json` there is written first, with `"complete": false`, and again at the end, with `true` and every file's
    size and SHA-256, so that an interrupted upload is never taken for a complete one.
    """

    name: ClassVar[str] = "s3"
    aliases: ClassVar[tuple[str, ...]] = ("aws",)
    packages: ClassVar[Mapping[str, str]] = {"botocore": "distill-engine[s3]"}

    class Config(AwsSettings):
        """The bucket and how to reach it; the keys are those of a data file's bucket."""

        aws_bucket_name: str | None = None
        """Name of the bucket."""
        aws_prefix: str | None = None
        """The folder in the bucket, as `students/sdxl-lcm`; absent: the name of the run."""

    def problems(self) -> list[str]:
        """Return problems: no bucket, or one that is missing, does not answer or is read-only (tried by a write)."""
        bucket = self.config.aws_bucket_name
        if not bucket or "/" in bucket:
            said = "is missing" if not bucket else f"= {bucket!r} is no name of a bucket (the folder is aws_prefix)"
            return [f"publisher_config.s3.aws_bucket_name {said}"]
        if not self.config.endpoint_is_address():
            endpoint = self.config.aws_endpoint_url
            return [f"publisher_config.s3.aws_endpoint_url = {endpoint!r} is no address (as https://host:9000)"]
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
        store = self._store(attempts=self.config.aws_max_attempts)
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
        prefix = self.config.aws_prefix
        return (self.setting.run_name if prefix is None else prefix).strip("/")

    @property
    def _url(self) -> str:
        return f"s3://{self.config.aws_bucket_name}/{self._prefix}"

    def _store(self, *, attempts: int) -> S3Store:
        from ..core.storage import RetryPolicy
        from ..core.storage.s3 import S3Store

        assert self.config.aws_bucket_name is not None
        return S3Store(self.config.aws_bucket_name, self._prefix, self.config.access(), RetryPolicy(attempts=attempts))


def _reason(error: Exception) -> str:
    """Return the reason of an error, without the advice that is for runs."""
    if isinstance(error, OutOfReach):
        return error.reason
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return error.message if isinstance(error, UserError) else str(error)


def _about(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _manifest(files: Mapping[str, Any], *, complete: bool) -> bytes:
    return (json.dumps({"complete": complete, "files": files}, indent=2) + "\n").encode()


@hookimpl
def register_publishers() -> Sequence[type[Publisher]]:
    """Return the publisher of this file."""
    return [Bucket]
