"""Buckets of S3 and whatever speaks its protocol: botocore finds the account, obstore asks.

Botocore also lists, and signs for keys that obstore cannot name: an empty part, ``.`` or ``..``, a control character.
One such key ends a listing of obstore's, and it gives folder markers (``a/``) as objects (``a``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..errors import DistillError, UserError
from ..plugin_api.backend import Entry
from .objects import ObjectStore
from .refusals import refusal
from .retry import RetryPolicy, Transient

if TYPE_CHECKING:
    from botocore.credentials import Credentials

T = TypeVar("T")
PAGE = 1000
INSTALL = "pip install 'distill-engine[s3]'"
_UNNAMEABLE = re.compile(r"[\x00-\x1f\x7f]|(^|/)\.{0,2}(/|$)")
FRESH = timedelta(minutes=15)
"""How long credentials are used before botocore is asked for them again."""


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


class S3Store(ObjectStore):
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
        super().__init__(f"s3://{bucket}", prefix, self._obstore, retry=retry, connections=access.connections)
        self._session, self._credentials, self._given_region, self._endpoint = find_access(access)
        self.note = "" if self._credentials else ", without credentials"

    def _obstore(self, **how: Any) -> Any:
        from obstore.store import S3Store

        suffix = ".cn" if self._region.startswith("cn-") else ""
        account = {"credential_provider": self._provide} if self._credentials else {"skip_signature": True}
        return S3Store(
            self.bucket, region=self._region, virtual_hosted_style_request=False, disable_bulk_delete=True,
            endpoint=self._endpoint or f"https://s3.{self._region}.amazonaws.com{suffix}", **account, **how,
        )  # fmt: skip

    def _provide(self) -> dict[str, Any]:
        assert self._credentials is not None
        frozen = self._credentials.get_frozen_credentials()
        return {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key, "token": frozen.token,
                "expires_at": datetime.now(UTC) + FRESH}  # fmt: skip

    @cached_property
    def _region(self) -> str:
        """The region; any of them answers with the name of the bucket's, even when it refuses."""
        if self._given_region or self._endpoint:
            return self._given_region or "us-east-1"
        from botocore.exceptions import ClientError

        def ask() -> Any:
            try:
                return self._boto("us-east-1").head_bucket(Bucket=self.bucket)
            except ClientError as error:
                return error.response

        headers = self._retry.run(self.url, lambda: self._listed(ask))["ResponseMetadata"]["HTTPHeaders"]
        return headers.get("x-amz-bucket-region", "us-east-1")

    def _boto(self, region: str) -> Any:
        from botocore import UNSIGNED
        from botocore.config import Config

        config = Config(
            signature_version="s3v4" if self._credentials else UNSIGNED, s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1}, connect_timeout=self._retry.connect_seconds,
            read_timeout=self._retry.timeout_seconds,
        )  # fmt: skip
        return self._session.create_client("s3", region_name=region, endpoint_url=self._endpoint, config=config)

    @cached_property
    def _client(self) -> Any:
        return self._boto(self._region)

    def _target(self, method: str, key: str) -> tuple[Any, str]:
        """Return the bucket and the path; of a key that obstore cannot name, a signed address of its own."""
        if not _UNNAMEABLE.search(path := self.prefix + key):
            return self._store, path
        from obstore.store import HTTPStore

        url = self._client.generate_presigned_url(f"{method}_object", Params={"Bucket": self.bucket, "Key": path})
        return HTTPStore(url, client_options=cast(Any, self.client_options), retry_config={"max_retries": 0}), ""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Objects whose keys begin with `prefix`, page by page, in the order of UTF-8; folder markers are left out."""
        query = {"Bucket": self.bucket, "MaxKeys": PAGE, "Prefix": self.prefix + prefix}
        tokens: set[str] = set()
        while True:
            page = self._retry.run(
                self.url, lambda query=query: self._listed(lambda: self._client.list_objects_v2(**query))
            )
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):
                    yield Entry(item["Key"].removeprefix(self.prefix), item["Size"], item.get("ETag", "").strip('"'))
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or token is None:
                return
            if token in tokens:
                raise DistillError(f"{self.url}: the server's listing goes round in circles")
            tokens.add(token)
            query = {**query, "ContinuationToken": token}

    def _listed(self, ask: Callable[[], T]) -> T:
        """Return the result of a request of botocore's, whose errors become ours."""
        from botocore import exceptions as known
        from botocore.parsers import ResponseParserError

        reasons: list[tuple[type[Exception], str]] = [
            (known.ReadTimeoutError, f"no answer for {self._retry.timeout_seconds:g} s"),
            (known.ConnectTimeoutError, "no connection is made in time"),
            (known.EndpointConnectionError, "the connection is refused"),
            (known.SSLError, "the encrypted connection cannot be made (certificate?)"),
            (ResponseParserError, "the answer is no whole listing"),
            (known.BotoCoreError, "the connection broke off"),
        ]
        try:
            return ask()
        except known.ClientError as error:
            status, code = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"].get("Code", "")
            raise refusal(self.url, status, code, bucket=self.bucket, note=self.note) from None
        except (known.BotoCoreError, ResponseParserError) as error:
            raise Transient(next(text for kind, text in reasons if isinstance(error, kind))) from None


def find_access(access: S3Access) -> tuple[Any, Credentials | None, str | None, str | None]:
    """Return botocore's session, credentials, region and endpoint: as given, else where AWS's own tools look.

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
    return session, credentials, region, endpoint


def account(profile: str | None = None) -> str:
    """Return where credentials are found on this machine, never what they are; no container or instance is asked."""
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
    """Return AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or ``endpoint_url`` of the profile."""
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return named or session.get_scoped_config().get("endpoint_url")
