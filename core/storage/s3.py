"""Buckets of S3 and whatever speaks its protocol.

Requests are signed by botocore, which also finds credentials the usual way, and sent over kept connections of urllib3.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import md5
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..errors import DistillError, OutOfReach, UserError
from ..plugin_api.backend import Entry
from ..utils.threads import threads
from . import s3_xml as xml
from .http import Connections, Response, beyond, check, ranged, version_of, whole
from .retry import RetryPolicy, Transient
from .store import Fetched, RemoteStore

if TYPE_CHECKING:
    from botocore.credentials import Credentials

PART_BYTES = 1 << 24
"""Objects above this are written, and read, in parts of this size, several at once."""
MAX_PARTS = 10_000
PARTS_AT_ONCE = 4
PAGE = 1000
REJECTED = frozenset(
    {
        "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
        "RequestTimeTooSkewed", "AuthorizationHeaderMalformed", "InvalidSecurity", "NotSignedUp",
    }
)  # fmt: skip
"""Codes of answers that are about the account rather than about the object."""
SLOW = frozenset({"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "OperationAborted"})
INSTALL = "pip install 'distill-engine[s3]'"


@dataclass(frozen=True)
class S3Access:
    """How a bucket is reached.

    Attributes:
        region: Region name; absent: that of the profile or the environment, else the bucket is asked.
        endpoint: Address of a compatible server; absent: that of the profile or the environment, else AWS.
        key_id: Access key; absent: the usual chain (environment, shared files, container, instance).
        secret: Its secret.
        token: Session token of temporary credentials.
        profile: Profile of the shared files.
        connections: Connections kept, and requests at the same time, at most.
    """

    region: str | None = None
    endpoint: str | None = None
    key_id: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    profile: str | None = None
    connections: int = 64


class CredentialsRejected(OutOfReach):
    """The account is not accepted, or no longer."""


class S3Store(RemoteStore):
    """The objects of a bucket below a prefix.

    Args:
        bucket: Its name.
        prefix: Of all keys; a folder, with or without the slash at its end.
        access: How it is reached.
        retry: How failed requests are repeated.

    Raises:
        UserError: The package is missing, or the profile does not exist.
    """

    def __init__(self, bucket: str, prefix: str, access: S3Access, retry: RetryPolicy) -> None:
        self.bucket, self.prefix = bucket, f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.url = f"s3://{bucket}/{self.prefix}"
        self._retry, self._access = retry, access
        self._credentials, region, endpoint = find_access(access)
        self._anonymous = self._credentials is None
        self._connections = Connections(retry, size=access.connections, redirects=False)
        self._region, self._endpoint = region or "us-east-1", endpoint
        self._ask_region = region is None and endpoint is None
        self._etag_is_md5 = True
        self._lock = threading.Lock()

    # -- requests -----------------------------------------------------------------------------------------------------

    def _address(self, key: str | None, query: Mapping[str, str]) -> str:
        if self._ask_region:
            self._find_region()
        suffix = "amazonaws.com.cn" if self._region.startswith("cn-") else "amazonaws.com"
        root = (self._endpoint or f"https://s3.{self._region}.{suffix}").rstrip("/")
        path = "" if key is None else f"/{quote(key, safe='/~')}"
        asked = "&".join(f"{name}={quote(value, safe='~')}" for name, value in sorted(query.items()))
        return f"{root}/{self.bucket}{path}{'?' + asked if asked else ''}"

    def _find_region(self) -> None:
        """Ask where the bucket is: any region answers with its name, even when it refuses."""
        with self._lock:
            if self._ask_region:
                url = f"https://s3.{self._region}.amazonaws.com/{self.bucket}"
                answer = self._retry.run(self.url, lambda: self._connections.request("HEAD", url, {}))
                self._region = answer.header("x-amz-bucket-region") or self._region
                self._ask_region = False

    def _send(
        self, method: str, key: str | None, *, query: Mapping[str, str], headers: Mapping[str, str], body: bytes | None
    ) -> Response:
        url = self._address(key, query)
        if self._credentials is None:
            return self._connections.request(method, url, headers, body)
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest

        request = AWSRequest(method, url, headers=dict(headers), data=body if body is not None else b"")
        frozen = self._credentials.get_frozen_credentials()
        S3SigV4Auth(frozen, "s3", self._region).add_auth(request)
        return self._connections.request(method, url, dict(request.headers.items()), body)

    def _once(
        self,
        method: str,
        key: str | None,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Response:
        """One signed request; an answer that is an error is raised, but for a range beyond the end."""
        answer = self._send(method, key, query=query or {}, headers=headers or {}, body=body)
        if answer.ok or answer.status == 416:
            return answer
        return self._refused(answer, self._place(key))

    def _refused(self, answer: Response, place: str) -> Response:
        code = xml.error_code(answer.body)
        if code in SLOW:
            raise Transient(f"the server answers {answer.status} {code}")
        if code in REJECTED:
            raise CredentialsRejected(place, f"the server does not accept the credentials ({answer.status} {code})")
        if code == "NoSuchBucket":
            raise FileNotFoundError(errno.ENOENT, f"the bucket {self.bucket!r} does not exist", place)
        if answer.status in (301, 307):
            where = answer.header("x-amz-bucket-region") or "another one"
            raise UserError(f"{self.url}: the bucket is not in the region {self._region!r} but in {where}",
                            "name its region: aws_region_name")  # fmt: skip
        note = ", without credentials" if self._anonymous else ""
        return check(answer, place, f"{code}{note}".lstrip(", "))

    def _place(self, key: str | None) -> str:
        return self.url if key is None else f"s3://{self.bucket}/{key}"

    # -- reading ------------------------------------------------------------------------------------------------------

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Objects whose keys begin with `prefix`, page by page, in the order of UTF-8; folder markers are left out."""
        query = {"list-type": "2", "encoding-type": "url", "max-keys": str(PAGE), "prefix": self.prefix + prefix}
        tokens: set[str] = set()
        while True:
            page = self._retry.run(self.url, lambda query=query: xml.page(whole(self._once("GET", None, query=query))))
            for key, size, etag in page.objects:
                if not key.endswith("/"):
                    yield Entry(key.removeprefix(self.prefix), size, etag)
            if page.token is None:
                return
            if page.token in tokens:
                raise DistillError(f"{self.url}: the server's listing goes round in circles")
            tokens.add(page.token)
            query = {**query, "continuation-token": page.token}

    def read(self, key: str) -> bytes:
        """The whole object; its length, and its MD5 where the server says it, are checked."""
        seen: set[str] = set()

        def attempt() -> bytes:
            answer = self._once("GET", self.prefix + key)
            body = whole(answer)
            if self._etag_is_md5 and not _is_md5(answer, body, seen):
                # the same bytes twice, of the right length: the server's tags are something else
                whole(answer, length=int(self._once("HEAD", self.prefix + key).header("Content-Length")))
                self._etag_is_md5 = False
            return body

        return self._retry.run(self._place(self.prefix + key), attempt)

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
        headers = {"Range": f"bytes={start}-{start + length - 1}"}
        if version:
            headers["If-Match"] = f'"{version}"'

        def attempt() -> Fetched:
            answer = self._once("GET", self.prefix + key, headers=headers)
            return beyond(answer, start) or ranged(answer, start, length)

        return self._retry.run(self._place(self.prefix + key), attempt)

    def stat(self, key: str) -> Entry:
        """Size and ETag."""
        place = self._place(self.prefix + key)
        answer = self._retry.run(place, lambda: self._once("HEAD", self.prefix + key))
        return Entry(key, int(answer.header("Content-Length")), version_of(answer))

    # -- writing ------------------------------------------------------------------------------------------------------

    def upload(self, key: str, path: Path) -> None:
        """Write a file as an object; of a large one only some parts are in memory at a time."""
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return self.write(key, b"")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                return self.write(key, view)

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Write the object whole or not at all, in parallel parts where it is large."""
        place = self._place(self.prefix + key)
        if len(data) <= PART_BYTES:
            self._retry.run(place, lambda: self._once("PUT", self.prefix + key, body=bytes(data)))
        else:
            self._write_parts(place, self.prefix + key, memoryview(data))

    def _write_parts(self, place: str, key: str, data: memoryview) -> None:
        size = max(PART_BYTES, -(-len(data) // MAX_PARTS))
        begun = self._retry.run(place, lambda: self._once("POST", key, query={"uploads": ""}))
        upload = xml.text(begun.body, "UploadId")

        def send(number: int) -> str:
            query = {"partNumber": str(number + 1), "uploadId": upload}
            part = bytes(data[number * size : (number + 1) * size])
            return self._retry.run(place, lambda: self._once("PUT", key, query=query, body=part)).header("ETag")

        try:
            etags = _together(send, range(-(-len(data) // size)))
            self._retry.run(place, lambda: self._complete(place, key, upload, etags))
        except BaseException:
            with suppress(DistillError, OSError, Transient):  # the first error is the one to report
                self._once("DELETE", key, query={"uploadId": upload})
            raise

    def _complete(self, place: str, key: str, upload: str, etags: Sequence[str]) -> None:
        """Put the parts together; an error may come with status 200, and an answer that was lost may have been yes."""
        try:
            answer = self._once("POST", key, query={"uploadId": upload}, body=xml.completion(etags))
        except FileNotFoundError:
            if self._once("HEAD", key).ok:
                return
            raise
        code = xml.error_code(answer.body)
        if code:
            raise Transient(f"the parts were not put together ({code})")

    def delete(self, key: str) -> None:
        """Remove an object."""
        with suppress(FileNotFoundError):
            self._retry.run(self._place(self.prefix + key), lambda: self._once("DELETE", self.prefix + key))


def _is_md5(answer: Response, body: bytes, seen: set[str]) -> bool:
    """Whether the ETag agrees with the bytes: one of 32 digits is their MD5, unless the object is encrypted.

    Raises Transient when it does not for the first time, and False when the same bytes (`seen`) have come again.
    """
    etag = version_of(answer)
    if len(etag) != 32 or answer.header("x-amz-server-side-encryption") not in ("", "AES256"):
        return True
    digest = md5(body, usedforsecurity=False).hexdigest()
    if digest == etag.lower():
        return True
    if digest in seen:
        return False
    seen.add(digest)
    raise Transient("the bytes that arrived are not those that were stored (MD5)")


def _together(function: Any, items: Sequence[Any]) -> list[Any]:
    """Results of a few calls at once, in order; the first failure ends the rest."""
    if not items:
        return []
    with threads(min(PARTS_AT_ONCE, len(items))) as pool:
        return list(pool.map(function, items))


def find_access(access: S3Access) -> tuple[Credentials | None, str | None, str | None]:
    """Credentials, region and endpoint: as given, else where AWS's own tools look for them.

    Raises:
        UserError: The package is missing, or there is no such profile.
    """
    try:
        import botocore.session
        from botocore import exceptions
    except ImportError as error:
        raise UserError("S3 needs the package botocore, which is not installed", INSTALL) from error

    session = botocore.session.Session(profile=access.profile)
    try:
        if access.key_id is not None:
            session.set_credentials(access.key_id, access.secret or "", access.token)
        credentials = session.get_credentials()
        region = access.region or session.get_config_variable("region")
        endpoint = access.endpoint or _configured_endpoint(session)
    except exceptions.ProfileNotFound as error:
        raise UserError(f"aws_profile = {access.profile!r}: there is no such profile", "see ~/.aws/config") from error
    except exceptions.BotoCoreError as error:
        raise UserError(
            f"the AWS settings of this machine cannot be read: {type(error).__name__}",
            "correct ~/.aws/config, or give aws_access_key_id and aws_secret_access_key",
        ) from error
    return credentials, region, endpoint


def account(profile: str | None = None) -> str:
    """Where credentials are found on this machine, never what they are; containers and instances are not asked."""
    try:
        import botocore.session
        from botocore import exceptions
    except ImportError:
        return f"not known without botocore ({INSTALL})"

    session = botocore.session.Session(profile=profile)
    try:
        resolver = session.get_component("credential_provider")
        for asked in ("container-role", "iam-role"):
            resolver.remove(asked)
        found = resolver.load_credentials()
    except exceptions.ProfileNotFound:
        return f"there is no profile {profile!r}"
    except exceptions.BotoCoreError as error:
        return f"cannot be read: {type(error).__name__}"
    if found is None:
        return "none in the environment or the shared files (a container's or an instance's are asked for when needed)"
    return f"found ({found.method})"


def _configured_endpoint(session: Any) -> str | None:
    """AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or ``endpoint_url`` of the profile."""
    import os

    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return named or session.get_scoped_config().get("endpoint_url")
