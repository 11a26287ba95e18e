"""Objects on a web server, by urllib3.

Not by obstore, whose client of web servers refuses answers without a Content-Length, keeps ``Retry-After`` to itself,
drops the account of an address, and needs a client and a connection of its own for every address with a query.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import quote, urlsplit, urlunsplit

from ..errors import DistillError, UserError
from ..plugin_api.backend import Entry
from .refusals import refusal
from .retry import RetryPolicy, Transient
from .store import Fetched, RemoteStore

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

REDIRECTS = 5
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_UNSATISFIED = re.compile(r"bytes \*/(\d+)")


class HttpStore(RemoteStore):
    """Files of a web server below one address. It can only be read, and not be listed.

    Args:
        url: ``http(s)://host/folder``. Name and password in it are sent as basic authentication.
        retry: How failed requests are repeated.
        connections: Kept connections, and requests at the same time, at most.
    """

    def __init__(self, url: str, *, retry: RetryPolicy, connections: int = 64) -> None:
        import urllib3

        parts = urlsplit(url)
        user, at, host = parts.netloc.rpartition("@")
        self._root = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        self.url, self._retry = without_secrets(self._root), retry
        self._headers = dict(urllib3.make_headers(basic_auth=user)) if at else {}
        self._pool = urllib3.PoolManager(
            num_pools=8, maxsize=connections, block=True,
            timeout=urllib3.Timeout(connect=retry.connect_seconds, read=retry.timeout_seconds),
            retries=urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=REDIRECTS,
                                  respect_retry_after_header=False),
        )  # fmt: skip

    def address(self, key: str) -> str:
        """The address of a key, which may be percent-encoded already and may have a query."""
        return f"{self._root}/{quote(key.lstrip('/'), safe='/%?&=+:@!$,;~')}" if key else self._root

    def _place(self, key: str) -> str:
        return without_secrets(self.address(key))

    def _request(self, method: str, key: str, more: Mapping[str, str] | None = None) -> BaseHTTPResponse:
        """Return an answer with its whole body; one that is an error is raised, but for a range beyond the end."""
        import urllib3

        headers = {"Accept-Encoding": "identity", **self._headers, **(more or {})}
        try:
            answer = self._pool.request(method, self.address(key), headers=headers, decode_content=False)
        except urllib3.exceptions.LocationValueError:  # nothing that another attempt would mend
            raise FileNotFoundError(errno.ENOENT, "the address is none", self._place(key)) from None
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None)
            raise Transient(self._why(reason if isinstance(reason, Exception) else error)) from None
        if answer.status < 300 or answer.status == 416:
            return answer
        raise refusal(self._place(key), answer.status, after_seconds=retry_after(answer))

    def _why(self, error: Exception) -> str:
        """Return a reason without the request's address, whose query may be a credential."""
        from urllib3 import exceptions as known

        reasons: list[tuple[type[Exception], str]] = [
            (known.NameResolutionError, "its name cannot be resolved"),
            (known.NewConnectionError, "the connection is refused"),
            (known.ConnectTimeoutError, "no connection is made in time"),
            (known.ReadTimeoutError, f"no answer for {self._retry.timeout_seconds:g} s"),
            (known.SSLError, "the encrypted connection cannot be made (certificate?)"),
            (known.IncompleteRead, "the answer was cut short"),
            (known.ResponseError, "too many redirects"),
            (known.ProtocolError, "the connection broke off"),
        ]
        return next((text for kind, text in reasons if isinstance(error, kind)), type(error).__name__)

    def read(self, key: str) -> bytes:
        """The whole file."""
        return self._retry.run(self._place(key), lambda: self._request("GET", key).data)

    def fetch(self, key: str, start: int, length: int, *, version: str = "") -> Fetched:
        """A part of a file. Raises as documented for :class:`RemoteStore`."""

        def attempt() -> Fetched:
            fetched = ranged(self._request("GET", key, {"Range": f"bytes={start}-{start + length - 1}"}), start, length)
            if version and fetched.version != version:
                raise FileNotFoundError(errno.ENOENT, "it has changed while it was being read", self._place(key))
            return fetched

        return self._retry.run(self._place(key), attempt)

    def stat(self, key: str) -> Entry:
        """Size and version; by a read of one byte where the server does not answer HEAD."""

        def attempt() -> Entry:
            try:
                answer = self._request("HEAD", key)
            except (PermissionError, DistillError):
                found = self.fetch(key, 0, 1)
                return Entry(key, found.total, found.version)
            return Entry(key, int(answer.headers.get("Content-Length") or 0), version_of(answer))

        return self._retry.run(self._place(key), attempt)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Refused: a web server does not say what it has."""
        self._refuse("cannot be listed", "name the files in a table: type csv, jsonl or parquet")
        yield  # pyright: ignore[reportUnreachable]

    def write(self, key: str, data: bytes) -> None:
        """Refused."""
        self._refuse("is only read", "keep caches in a folder or a bucket")

    def delete(self, key: str) -> None:
        """Refused."""
        self._refuse("is only read", "keep caches in a folder or a bucket")

    def _refuse(self, problem: str, remedy: str) -> NoReturn:
        raise UserError(f"{self.url} {problem}", remedy)


def retry_after(answer: BaseHTTPResponse) -> float:
    """Return the seconds that the server asks to wait, 0 where it does not."""
    value = answer.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        asked = parsedate_to_datetime(value) - parsedate_to_datetime(answer.headers.get("Date", ""))
    except (TypeError, ValueError):
        return 0.0
    return max(0.0, asked.total_seconds())


def version_of(answer: BaseHTTPResponse) -> str:
    """Return the ETag without its quotes, else the time of the last change."""
    return answer.headers.get("ETag", "").removeprefix("W/").strip('"') or answer.headers.get("Last-Modified", "")


def ranged(answer: BaseHTTPResponse, start: int, length: int) -> Fetched:
    """Return what a ranged read gave; a server that ignores ranges sends the whole object, one asked beyond its end
    nothing.
    """
    version, said = version_of(answer), answer.headers.get("Content-Range", "").strip()
    if answer.status == 416:
        total = int(match[1]) if (match := _UNSATISFIED.fullmatch(said)) else start
        return Fetched(b"", min(start, total), total, version)
    if answer.status != 206:
        return Fetched(answer.data, 0, len(answer.data), version)
    match = _CONTENT_RANGE.fullmatch(said)
    if match is None or int(match[1]) != start:
        raise Transient("the answer is another range than the one asked for")
    total = int(match[3])
    if len(answer.data) != min(length, total - start):
        raise Transient(f"the answer was cut short: {len(answer.data)} bytes instead of {min(length, total - start)}")
    return Fetched(answer.data, start, total, version)


def without_secrets(url: str) -> str:
    """Return an address for messages: without name and password, and without the query, which may be a signature."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}{'?...' if parts.query else ''}"
