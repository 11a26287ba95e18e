"""The settings by which a bucket is reached, of S3, Google or Azure: the same keys wherever one is named."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import Any, ClassVar, cast

from pydantic import Field

from ..settings.secrets import Secret
from ..settings.types import LocalPath, Settings
from . import s3
from .objects import ObjectStore
from .retry import RetryPolicy
from .s3 import S3Access, S3Store

CONNECTIONS = S3Access.connections


class BucketSettings(Settings):
    """What the settings of all three offer."""

    scheme: ClassVar[str]
    """Of the bucket's address."""
    endpoint_key: ClassVar[str]
    """The key that names another server."""
    attempts_key: ClassVar[str]

    @property
    def attempts(self) -> int:
        """How often a request is tried."""
        return getattr(self, self.attempts_key)

    @abstractmethod
    def open(self, bucket: str, prefix: str, *, retry: RetryPolicy, connections: int = CONNECTIONS) -> ObjectStore:
        """Return the objects of a bucket below a prefix."""

    @abstractmethod
    def account(self) -> str:
        """Return where the credentials come from, in words and without them."""

    def account_problem(self) -> str:
        """Return what the account lacks; empty where it lacks nothing."""
        return ""

    def endpoint_is_address(self) -> bool:
        """Tell if the other server is absent, or can be one."""
        endpoint = getattr(self, self.endpoint_key)
        return endpoint is None or endpoint.startswith(("http://", "https://"))


class AwsSettings(BucketSettings):
    """Where a server of the S3 protocol is, and who asks."""

    scheme: ClassVar[str] = "s3"
    endpoint_key: ClassVar[str] = "aws_endpoint_url"
    attempts_key: ClassVar[str] = "aws_max_attempts"

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

    def account_problem(self) -> str:
        """Return what a key, a secret or a token lacks; empty where nothing does."""
        if (self.aws_access_key_id is None) != (self.aws_secret_access_key is None):
            missing = "aws_access_key_id" if self.aws_access_key_id is None else "aws_secret_access_key"
            return f"{missing} is required: a key and its secret are given together, or neither is"
        if self.aws_session_token is not None and self.aws_access_key_id is None:
            return "aws_access_key_id is required beside a session token"
        return ""

    def account(self) -> str:
        """Return where the credentials come from, in words and without them."""
        return "a key in the data file" if self.aws_access_key_id is not None else s3.account(self.aws_profile)

    def open(self, bucket: str, prefix: str, *, retry: RetryPolicy, connections: int = CONNECTIONS) -> ObjectStore:
        """Return the objects of a bucket below a prefix."""
        secrets = [self.aws_access_key_id, self.aws_secret_access_key, self.aws_session_token]
        key_id, secret, token = [None if each is None else each.get_secret_value() for each in secrets]
        access = S3Access(
            self.aws_region_name, self.aws_endpoint_url, key_id, secret, token, self.aws_profile, connections
        )
        return S3Store(bucket, prefix, access, retry)


class GcsSettings(BucketSettings):
    """Whose account asks Google Cloud Storage."""

    scheme: ClassVar[str] = "gs"
    endpoint_key: ClassVar[str] = "gcs_endpoint_url"
    attempts_key: ClassVar[str] = "gcs_max_attempts"

    gcs_service_account_file: LocalPath | None = None
    """JSON file of a service account; absent: Google's application default credentials
    (`GOOGLE_APPLICATION_CREDENTIALS`, `gcloud auth application-default login`, the machine's own account)."""
    gcs_anonymous: bool = False
    """Read a public bucket without an account."""
    gcs_endpoint_url: str | None = None
    """Address of another server of the same protocol, as `http://host:4443`; absent: Google."""
    gcs_max_attempts: int = Field(default=12, ge=1, le=100)
    """How often a request is tried; 12 ride out an outage of one to two minutes."""

    def account(self) -> str:
        """Return where the credentials come from, in words and without them."""
        if self.gcs_anonymous:
            return "none: the bucket is public"
        named = self.gcs_service_account_file or os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
        return f"the service account in {named}" if named else "Google's application default credentials"

    def open(self, bucket: str, prefix: str, *, retry: RetryPolicy, connections: int = CONNECTIONS) -> ObjectStore:
        """Return the objects of a bucket below a prefix."""
        file = self.gcs_service_account_file
        given = _given(
            service_account=str(file) if file else None, base_url=self.gcs_endpoint_url,
            skip_signature=self.gcs_anonymous or None,
        )  # fmt: skip

        def make(**how: Any) -> Any:
            from obstore.store import GCSStore

            return GCSStore(bucket, config=cast(Any, given), **how)

        return ObjectStore(f"gs://{bucket}", prefix, make, retry=retry, connections=connections)


class AzureSettings(BucketSettings):
    """Which storage account of Azure, and who asks."""

    scheme: ClassVar[str] = "az"
    endpoint_key: ClassVar[str] = "azure_endpoint_url"
    attempts_key: ClassVar[str] = "azure_max_attempts"

    azure_account_name: str | None = None
    """Name of the storage account; absent: `AZURE_STORAGE_ACCOUNT_NAME`."""
    azure_account_key: Secret | None = None
    """The account's key; absent, as is the signature: `AZURE_STORAGE_ACCOUNT_KEY`, `AZURE_STORAGE_SAS_TOKEN`, an
    application's (`AZURE_CLIENT_ID`, ...) or the machine's own identity. `{env:NAME}` keeps it out of the file."""
    azure_sas_token: Secret | None = None
    """A shared access signature, instead of the key."""
    azure_anonymous: bool = False
    """Read a public container without an account's key."""
    azure_endpoint_url: str | None = None
    """Address of another server of the same protocol, as `http://host:10000/account`; absent: Azure."""
    azure_max_attempts: int = Field(default=12, ge=1, le=100)
    """How often a request is tried; 12 ride out an outage of one to two minutes."""

    def account_problem(self) -> str:
        """Return what the account lacks; empty where it lacks nothing."""
        named = self.azure_account_name or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
        return "" if named else "azure_account_name is required, here or as AZURE_STORAGE_ACCOUNT_NAME"

    def account(self) -> str:
        """Return where the credentials come from, in words and without them."""
        if self.azure_anonymous:
            return "none: the container is public"
        given = self.azure_account_key is not None or self.azure_sas_token is not None
        return (
            "a key in the data file" if given else "Azure's variables in the environment, else the machine's identity"
        )

    def open(self, bucket: str, prefix: str, *, retry: RetryPolicy, connections: int = CONNECTIONS) -> ObjectStore:
        """Return the objects of a container below a prefix."""
        secrets = [self.azure_account_key, self.azure_sas_token]
        key, signature = [None if each is None else each.get_secret_value() for each in secrets]
        given = _given(
            account_name=self.azure_account_name, account_key=key, sas_key=signature, endpoint=self.azure_endpoint_url,
            skip_signature=self.azure_anonymous or None,
        )  # fmt: skip

        def make(**how: Any) -> Any:
            from obstore.store import AzureStore

            return AzureStore(bucket, config=cast(Any, given), **how)

        return ObjectStore(f"az://{bucket}", prefix, make, retry=retry, connections=connections)


def _given(**values: Any) -> dict[str, Any]:
    """Return the values that are given; obstore reads the others from the environment."""
    return {name: value for name, value in values.items() if value is not None}
