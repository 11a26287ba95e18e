"""Uploads a student into a bucket of S3, or of any server that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ..core.config.secrets import Secret
from ..core.errors import DistillError, OutOfReach, UserError
from ..core.hookspecs import hookimpl
from ..core.publisher import Publisher

if TYPE_CHECKING:
    from ..core.remote.s3 import S3Access, S3Store

MANIFEST = "manifest.json"
PROBE = ".distill-was-here"
ATTEMPTS_AT_START = 2


class Bucket(Publisher):
    """Uploads `student/` below a prefix of a bucket.

    `manifest.json` there is written first, with `"complete": false`, and again at the end, with `true` and every file's
    size and SHA-256: an upload that was cut off is never taken for a whole one.
    """

    name: ClassVar[str] = "s3"
    aliases: ClassVar[tuple[str, ...]] = ("aws",)
    packages: ClassVar[Mapping[str, str]] = {"botocore": "distill-engine[s3]"}

    class Config(BaseModel):
        """Where the bucket is, and how it is reached; the keys are those of a data file's bucket."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        aws_bucket_name: str | None = None
        """Name of the bucket."""
        aws_prefix: str | None = None
        """The folder in the bucket, as `students/sdxl-lcm`; absent: the name of the run."""
        aws_region_name: str | None = None
        """Region; absent: that of the environment or the profile, else the bucket is asked for it."""
        aws_endpoint_url: str | None = None
        """Address of a compatible server, as `https://host:9000`; absent: that of the environment, else AWS."""
        aws_access_key_id: Secret | None = None
        """Access key; absent: the usual AWS chain (environment, shared files, container, instance). `{env:NAME}` keeps
        it out of the file."""
        aws_secret_access_key: Secret | None = None
        """The access key's secret."""
        aws_session_token: Secret | None = None
        """Session token, for temporary credentials."""
        aws_profile: str | None = None
        """Profile of the shared AWS files; absent: the default one."""
        aws_max_attempts: int = Field(default=12, ge=1, le=100)
        """How often a request is tried; 12 ride out an outage of one to two minutes."""

    def problems(self) -> list[str]:
        """No bucket; one that is not there, does not answer or may not be written: an empty object is tried."""
        bucket = self.config.aws_bucket_name
        if not bucket or "/" in bucket:
            said = "is missing" if not bucket else f"= {bucket!r} is no name of a bucket (the folder is aws_prefix)"
            return [f"publisher_config.s3.aws_bucket_name {said}"]
        endpoint = self.config.aws_endpoint_url
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            return [f"publisher_config.s3.aws_endpoint_url = {endpoint!r} is no address (as https://host:9000)"]
        if (self.config.aws_access_key_id is None) != (self.config.aws_secret_access_key is None):
            return ["aws_access_key_id and aws_secret_access_key are given together, or neither is"]
        try:
            store = self._store(attempts=ATTEMPTS_AT_START)
            store.write(PROBE, b"")
            with suppress(PermissionError):  # who may write but not delete can publish
                store.delete(PROBE)
        except (DistillError, OSError) as error:
            return [f"{self._url} cannot be written: {_reason(error)}"]
        return []

    def publish(self, student: Path) -> str:
        """Upload every file, and the manifest last; returns the address."""
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
        from ..core.remote import RetryPolicy
        from ..core.remote.s3 import S3Store

        assert self.config.aws_bucket_name is not None
        return S3Store(self.config.aws_bucket_name, self._prefix, self._access, RetryPolicy(attempts=attempts))

    @cached_property
    def _access(self) -> S3Access:
        from ..core.remote.s3 import S3Access

        config = self.config
        access = S3Access(config.aws_region_name, config.aws_endpoint_url, profile=config.aws_profile)
        if config.aws_access_key_id is None:
            return access
        token = config.aws_session_token
        return replace(
            access,
            key_id=config.aws_access_key_id.get_secret_value(),
            secret=config.aws_secret_access_key.get_secret_value(),
            token=None if token is None else token.get_secret_value(),
        )


def _reason(error: Exception) -> str:
    """What went wrong, without the advice that is for runs."""
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
    """The bucket."""
    return [Bucket]
