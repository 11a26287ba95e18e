"""Objects on a web server, and the one way in which requests are made."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import NoReturn
from urllib.parse import quote, urlsplit, urlunsplit

from ..errors import DistillError, UserError
from ..plugin_api.backend import Entry
from .retry import RetryPolicy, Transient
from .store import Fetched, RemoteStore

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504, 509})
"""Answers after which the same request may succeed."""
REDIRECTS = 5
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_UNSATISFIED = re.compile(r"bytes \*/(\d+)")


@dataclass(frozen=True)
class Response:
    """An answer with its whole body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the request was carried out."""
        return 200 <= self.status < 300

    def header(self, name: str) -> str:
        """A header's value, empty where there is none."""
        return self.headers.get(name) or ""


class Connections:
    """A pool of kept connections to one place; safe for many threads.

    Args:
        retry: Its time limits are used; repeating is left to the caller.
        size: Connections kept, and used at the same time, at most.
        redirects: Whether redirects are followed.
    """

    def __init__(self, retry: RetryPolicy, *, size: int, redirects: bool) -> None:
        import urllib3

        self._pool = urllib3.PoolManager(num_pools=8, maxsize=size, block=True)
        self._timeout = urllib3.Timeout(connect=retry.connect_seconds, read=retry.timeout_seconds)
        self._seconds = retry.timeout_seconds
        follow = REDIRECTS if redirects else 0
        self._retries = urllib3.Retry(
            total=None, connect=0, read=0, status=0, other=0, redirect=follow, raise_on_redirect=redirects,
            respect_retry_after_header=False,
        )  # fmt: skip
        self._redirects = redirects

    def request(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None) -> Response:
        """One request, one answer with a whole body. Raises Transient when there is none."""
        import urllib3

        try:
            answer = self._pool.request(
                method, url, body=body, headers={"Accept-Encoding": "identity", **headers}, timeout=self._timeout,
                retries=self._retries, redirect=self._redirects, decode_content=False,
            )  # fmt: skip
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None)
            raise Transient(self._why(reason if isinstance(reason, Exception) else error)) from None
        return Response(answer.status, answer.headers, answer.data)

    def _why(self, error: Exception) -> str:
        """A reason without the request's address, whose query may be a credential."""
        from urllib3 import exceptions as known

        reasons: list[tuple[type[Exception], str]] = [
            (known.NameResolutionError, "its name cannot be resolved"),
            (known.NewConnectionError, "the connection is refused"),
            (known.ConnectTimeoutError, "no connection is made in time"),
            (known.ReadTimeoutError, f"no answer for {self._seconds:g} s"),
            (known.SSLError, "the encrypted connection cannot be made (certificate?)"),
            (known.IncompleteRead, "the answer was cut short"),
            (known.ResponseError, "too many redirects"),
            (known.ProtocolError, "the connection broke off"),
        ]
        return next((text for kind, text in reasons if isinstance(error, kind)), type(error).__name__)


def retry_after(response: Response) -> float:
    """Seconds that the server asks to wait, 0 where it does not."""
    value = response.header("Retry-After").strip()
    if value.isdigit():
        return float(value)
    try:
        asked = parsedate_to_datetime(value) - parsedate_to_datetime(response.header("Date"))
    except (TypeError, ValueError):
        return 0.0
    return max(0.0, asked.total_seconds())


def check(response: Response, place: str, detail: str = "") -> Response:
    """The answer if the request was carried out.

    Args:
        response: The answer.
        place: What was asked for.
        detail: What the body says of it.

    Raises:
        Transient: Another attempt may succeed.
        FileNotFoundError: 404 or 410.
        PermissionError: 401 or 403.
        DistillError: The server refuses the request itself.
    """
    if response.ok:
        return response
    said = f"{response.status} {detail}".strip()
    if response.status in RETRIED:
        raise Transient(f"the server answers {said}", after_seconds=retry_after(response))
    if response.status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, f"it is not there ({said})", place)
    if response.status in (401, 403):
        raise PermissionError(errno.EACCES, f"access is refused ({said})", place)
    if response.status == 412:
        raise FileNotFoundError(errno.ENOENT, "it has changed while it was being read", place)
    raise DistillError(f"{place}: the server refuses the request ({said})")


def whole(response: Response, *, length: int | None = None) -> bytes:
    """The body, if it is as long as the server, or the caller, says. Raises Transient."""
    said = response.header("Content-Length")
    for expected in (int(said) if said.isdigit() else None, length):
        if expected is not None and expected != len(response.body):
            raise Transient(f"the answer was cut short: {len(response.body)} bytes instead of {expected}")
    return response.body


def version_of(response: Response) -> str:
    """The ETag without its quotes, else the time of the last change."""
    return response.header("ETag").removeprefix("W/").strip('"') or response.header("Last-Modified")


def ranged(response: Response, start: int, length: int) -> Fetched:
    """What a ranged read gave; a server that ignores ranges sends the whole object."""
    version = version_of(response)
    if response.status == 206:
        match = _CONTENT_RANGE.fullmatch(response.header("Content-Range").strip())
        if match is None or int(match[1]) != start:
            raise Transient("the answer is another range than the one asked for")
        total = int(match[3])
        return Fetched(whole(response, length=min(length, total - start)), start, total, version)
    body = whole(response)
    return Fetched(body, 0, len(body), version)


def beyond(response: Response, start: int) -> Fetched | None:
    """The empty result of a range that begins at or after the end; None where that is not what is wrong."""
    if response.status != 416:
        return None
    match = _UNSATISFIED.fullmatch(response.header("Content-Range").strip())
    total = int(match[1]) if match else start
    return Fetched(b"", min(start, total), total, version_of(response))


def without_secrets(url: str) -> str:
    """An address for messages: without name and password, and without the query, which may be a signature."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}{'?...' if parts.query else ''}"


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
        self._connections = Connections(retry, size=connections, redirects=True)

    def address(self, key: str) -> str:
        """The address of a key, which may be percent-encoded already and may have a query."""
        return f"{self._root}/{quote(key.lstrip('/'), safe='/%?&=+:@!$,;~')}" if key else self._root

    def _place(self, key: str) -> str:
        return without_secrets(self.address(key))

    def _request(self, method: str, key: str, headers: Mapping[str, str] | None = None) -> Response:
        place = self._place(key)
        answer = self._connections.request(method, self.address(key), {**self._headers, **(headers or {})})
        return answer if answer.status == 416 else check(answer, place)

    def read(self, key: str) -> bytes:
        """The whole file."""
        return self._retry.run(self._place(key), lambda: whole(self._request("GET", key)))

    def fetch(self, key: str, start: int, length: int, *, version: str = "") -> Fetched:
        """A part of a file. Raises as documented for :class:`RemoteStore`."""

        def attempt() -> Fetched:
            answer = self._request("GET", key, {"Range": f"bytes={start}-{start + length - 1}"})
            fetched = beyond(answer, start) or ranged(answer, start, length)
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
            return Entry(key, int(answer.header("Content-Length") or 0), version_of(answer))

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
