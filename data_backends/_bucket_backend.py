"""What backends of buckets have in common, whoever keeps the bucket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, ClassVar

from ..core.errors import BadValue
from ..core.plugin_api.backend import DataBackend, Entry
from ..core.storage import RetryPolicy
from ..core.storage.account import BucketSettings
from ..core.storage.objects import ObjectStore
from ..core.storage.refusals import CredentialsRejected


class BucketBackend(DataBackend):
    """All objects below a prefix of a bucket, recursively; names that begin with a dot are skipped."""

    bucket_key: ClassVar[str]
    """The key that names the bucket; the prefix and the prompts are named by ``place_keys``."""
    connections_key: ClassVar[str]
    timeout_key: ClassVar[str]
    remedies: ClassVar[tuple[str, str, str]]
    """What mends an account that is not accepted, one that may not list the bucket, and a bucket that is not there."""

    Config: ClassVar[type[BucketSettings]]

    @property
    def _bucket(self) -> str:
        return getattr(self.config, self.bucket_key)

    @cached_property
    def store(self) -> ObjectStore:
        """The bucket, opened when it is first needed."""
        timeout = getattr(self.config, self.timeout_key)
        return self.config.open(
            self._bucket, getattr(self.config, self.place_keys[0]), connections=self.parallel_reads,
            retry=RetryPolicy(attempts=self.config.attempts, timeout_seconds=timeout),
        )  # fmt: skip

    @property
    def parallel_reads(self) -> int:
        """As many as connections: threads that read a bucket mostly wait."""
        return getattr(self.config, self.connections_key)

    @property
    def account(self) -> str:
        """Where the credentials come from."""
        return self.config.account()

    def check(self) -> None:
        """The names can be those of a bucket and an address."""
        if "/" in self._bucket:
            remedy = f"the bucket's name alone; the folder goes into {self.place_keys[0]}"
            raise BadValue(self.bucket_key, self._bucket, "is no name of a bucket", remedy)
        if not self.config.endpoint_is_address():
            key = self.config.endpoint_key
            raise BadValue(key, getattr(self.config, key), "is no address", "write it as https://host:9000")

    @property
    def location(self) -> str:
        """The address, without the account."""
        return self.store.url + (self.prompts_key or "")

    @property
    def prompts_key(self) -> str | None:
        """The key of the one object with prompts."""
        return getattr(self.config, self.place_keys[1])

    def list(self) -> Iterator[Entry]:
        """Every object, in sorted key order. Raises BadValue where the bucket cannot be listed."""
        with self._asked():
            for entry in self.store.list():
                if not any(part.startswith(".") for part in entry.key.split("/")):
                    yield entry

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Say by its key what is wrong with the place."""
        key, bucket = self.bucket_key, self._bucket
        rejected, refused, missing = self.remedies
        try:
            yield
        except CredentialsRejected as error:
            raise BadValue(key, bucket, error.reason, rejected) from error
        except PermissionError as error:
            raise BadValue(key, bucket, f"cannot be listed: {error.strerror}", refused) from error
        except FileNotFoundError as error:
            raise BadValue(key, bucket, f"is not there: {error.strerror}", missing) from error

    def entry(self, key: str) -> Entry:
        """Size and ETag of one object."""
        return self.store.stat(key)

    def open(self, key: str) -> BinaryIO:
        """The object, fetched as far as it is read."""
        return self.store.open(key)

    def exists(self, key: str) -> bool:
        """Tell if the object is there."""
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
