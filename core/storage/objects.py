"""Buckets of S3, Google Cloud Storage and Azure, by obstore.

Its own retries serve uploads in parts and listings only. Everything else is repeated by :class:`RetryPolicy`, since
eleven retries of obstore end after 4 to 13 seconds, do not know bodies that are cut short with their headers in order,
and no S3 ``400 RequestTimeout``.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from hashlib import md5
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import OutOfReach
from ..plugin_api.backend import Entry
from ..utils.threads import threads
from .refusals import failure, refusal, status_of
from .retry import RetryPolicy, Transient
from .store import Fetched, RemoteStore

if TYPE_CHECKING:
    from obstore import GetResult, ObjectMeta

T = TypeVar("T")
PART_BYTES = 1 << 24
"""Objects above this are written, and read, in parts of this size, several at once."""
MAX_PARTS = 10_000
PARTS_AT_ONCE = 4
GROWTH = 8
"""Of obstore's waits, each drawn between the first one and so many times the last: of 12 attempts, 95 in 100 ride out
an outage of two minutes."""
_NOT_PARTIAL = "non-partial|Range request not supported"
_BEYOND = "Wanted range starting at"
_MD5 = re.compile("[0-9a-f]{32}")


class ObjectStore(RemoteStore):
    """The objects of a bucket below a prefix.

    Args:
        root: Address of the bucket, as ``gs://bucket``.
        prefix: Of all keys; a folder, with or without the slash at its end.
        make: Opens the bucket in obstore, given ``client_options`` and ``retry_config``.
        retry: How failed requests are repeated.
        connections: Requests at the same time, at most.
    """

    note = ""
    """About the account, for messages."""

    def __init__(
        self, root: str, prefix: str, make: Callable[..., Any], *, retry: RetryPolicy, connections: int = 64
    ) -> None:
        self.root, self.prefix = root, f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.url, self.bucket = f"{root}/{self.prefix}", root.partition("://")[2]
        self._make, self._retry, self._connections = make, retry, connections
        self._slots, self._etag_is_md5 = threading.BoundedSemaphore(connections), True

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def client_options(self) -> Mapping[str, Any]:
        """Timeouts and connections, for obstore."""
        return {
            "allow_http": True,
            "timeout": timedelta(days=1),
            "read_timeout": timedelta(seconds=self._retry.timeout_seconds),
            "connect_timeout": timedelta(seconds=self._retry.connect_seconds),
            "pool_max_idle_per_host": str(self._connections),
        }

    def _open(self, retries: int) -> Any:
        waits = {
            "init_backoff": timedelta(seconds=self._retry.base_seconds),
            "max_backoff": timedelta(seconds=self._retry.max_seconds),
            "base": GROWTH,
        }
        retry = {"max_retries": retries, "backoff": waits, "retry_timeout": timedelta(hours=1)}
        return self._make(client_options=self.client_options, retry_config=retry)

    @cached_property
    def _store(self) -> Any:
        return self._open(0)

    @cached_property
    def _patient(self) -> Any:
        return self._open(self._retry.attempts - 1)

    def _target(self, method: str, key: str) -> tuple[Any, str]:
        """Return the store of obstore for a request, and the path there."""
        return self._store, self.prefix + key

    def _place(self, key: str) -> str:
        return f"{self.root}/{self.prefix}{key}"

    def _once(self, place: str, action: Callable[[], T]) -> T:
        """Return the result of an action on obstore, whose errors become ours."""
        from obstore.exceptions import BaseError

        try:
            with self._slots:
                return action()
        except (BaseError, FileNotFoundError, ValueError) as error:
            seconds = self._retry.timeout_seconds
            raise failure(error, place, bucket=self.bucket, note=self.note, seconds=seconds) from None

    def _request(self, method: str, key: str, action: Callable[[Any, str], T]) -> T:
        """Return the result of one kind of request, repeated as the policy says."""
        place = self._place(key)
        return self._retry.run(place, lambda: self._once(place, lambda: action(*self._target(method, key))))

    def _patiently(self, place: str, action: Callable[[], T]) -> T:
        """Return the result of an action that obstore itself repeats."""
        try:
            return self._once(place, action)
        except Transient as error:
            raise OutOfReach(place, f"{error.reason} (tried {self._retry.attempts} times)") from error

    # -- reading ------------------------------------------------------------------------------------------------------

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Objects whose keys begin with `prefix`, page by page; obstore itself lists whole folders only."""
        folder = (self.prefix + prefix).rpartition("/")[0]
        pages = self._patiently(self.url, lambda: self._patient.list(folder or None, chunk_size=1000))
        while page := self._patiently(self.url, lambda: next(pages, None)):
            for meta in page:
                if (key := meta["path"].removeprefix(self.prefix)).startswith(prefix):
                    yield Entry(key, meta["size"], version_of(meta))

    def read(self, key: str) -> bytes:
        """The whole object; its length, and its MD5 where the server says it, are checked."""
        seen: set[str] = set()
        return self._request("get", key, lambda store, path: self._whole(key, store.get(path), seen))

    def _whole(self, key: str, answer: GetResult, seen: set[str]) -> bytes:
        fetched = received(answer)
        if self._etag_is_md5 and not _is_md5(fetched, seen):
            # the same bytes twice, of the right length: the server's tags are something else
            if self.stat(key).size != len(fetched.data):
                raise Transient("the answer was cut short")
            self._etag_is_md5 = False
        return fetched.data

    def fetch(self, key: str, start: int, length: int, *, version: str = "") -> Fetched:
        """A part of an object, in parallel pieces where it is large."""
        if length <= PART_BYTES:
            return self._fetch(key, start, length, version)
        first = self._fetch(key, start, PART_BYTES, version)
        end = min(start + length, first.total)
        have = first.start + len(first.data)
        pieces = [(at, min(PART_BYTES, end - at)) for at in range(have, end, PART_BYTES)]
        rest = _together(lambda piece: self._fetch(key, piece[0], piece[1], first.version).data, pieces)
        return Fetched(b"".join([first.data, *rest]), first.start, first.total, first.version)

    def _fetch(self, key: str, start: int, length: int, version: str) -> Fetched:
        same = {"if_match": f'"{version}"'} if version else {}
        found = self._request("get", key, lambda store, path: _part(store, path, (start, start + length), same))
        if found is None:  # it begins at or after the end
            entry = self.stat(key)
            found = Fetched(b"", min(start, entry.size), entry.size, entry.version)
        if version and found.version != version:  # not every server knows If-Match
            raise refusal(self._place(key), 412)
        return found

    def stat(self, key: str) -> Entry:
        """Size and ETag."""
        meta = self._request("head", key, lambda store, path: store.head(path))
        return Entry(key, meta["size"], version_of(meta))

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, key: str, data: bytes) -> None:
        """Write the object whole or not at all, in parallel parts where it is large."""
        if len(data) > PART_BYTES:
            self._write_parts(key, data, len(data))
        else:
            self._request("put", key, lambda store, path: store.put(path, data, use_multipart=False))

    def upload(self, key: str, path: Path) -> None:
        """Write a file as an object; of a large one only some parts are in memory at a time."""
        size = path.stat().st_size
        return self._write_parts(key, path, size) if size > PART_BYTES else self.write(key, path.read_bytes())

    def _write_parts(self, key: str, source: bytes | Path, size: int) -> None:
        parts = {"chunk_size": max(PART_BYTES, -(-size // MAX_PARTS)), "max_concurrency": PARTS_AT_ONCE}
        try:
            self._patiently(self._place(key), lambda: self._patient.put(self.prefix + key, source, **parts))
        except FileNotFoundError:  # no such upload: the answer to the end of it was lost, and it was yes
            if self.stat(key).size != size:
                raise

    def delete(self, key: str) -> None:
        """Remove an object."""
        with suppress(FileNotFoundError):
            self._request("delete", key, lambda store, path: store.delete(path))


def version_of(meta: ObjectMeta) -> str:
    """Return the ETag without its quotes."""
    return (meta["e_tag"] or "").removeprefix("W/").strip('"')


def received(answer: GetResult) -> Fetched:
    """Return what an answer holds. Raises Transient where its body is shorter than its headers say."""
    (start, end), data = answer.range, answer.bytes().to_bytes()
    if len(data) != end - start:
        raise Transient(f"the answer was cut short: {len(data)} bytes instead of {end - start}")
    return Fetched(data, start, answer.meta["size"], version_of(answer.meta))


def _part(store: Any, path: str, span: tuple[int, int], same: Mapping[str, str]) -> Fetched | None:
    """Return a range; the whole object from a server that ignores ranges; None where it begins behind the end."""
    from obstore.exceptions import BaseError

    try:
        return received(store.get(path, options={"range": span, **same}))
    except BaseError as error:
        if status_of(error) == 416 or _BEYOND in str(error):
            return None
        if not re.search(_NOT_PARTIAL, str(error)):
            raise
    return received(store.get(path, options=same))


def _is_md5(fetched: Fetched, seen: set[str]) -> bool:
    """Tell if the ETag agrees with the bytes: one of 32 digits is their MD5, unless the object is encrypted.

    Raises Transient when it does not for the first time, and returns False when the same bytes (`seen`) come again.
    """
    etag = fetched.version.lower()
    digest = md5(fetched.data, usedforsecurity=False).hexdigest() if _MD5.fullmatch(etag) else etag
    if digest == etag:
        return True
    if digest in seen:
        return False
    seen.add(digest)
    raise Transient("the bytes that arrived are not those that were stored (MD5)")


def _together(function: Any, items: Sequence[Any]) -> list[Any]:
    """Return the results of a few calls at once, in order; the first failure ends the rest."""
    if not items:
        return []
    with threads(min(PARTS_AT_ONCE, len(items))) as pool:
        return [*pool.map(function, items)]
