"""The settings by which a bucket of S3 is reached: the same keys wherever one is named."""

from __future__ import annotations

from pydantic import Field

from ..settings.secrets import Secret
from ..settings.types import Settings
from .s3 import S3Access


class AwsSettings(Settings):
    """Where a server of the S3 protocol is, and who asks."""

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
        """What a key, a secret or a token lacks; empty where nothing does."""
        if (self.aws_access_key_id is None) != (self.aws_secret_access_key is None):
            missing = "aws_access_key_id" if self.aws_access_key_id is None else "aws_secret_access_key"
            return f"{missing} is required: a key and its secret are given together, or neither is"
        if self.aws_session_token is not None and self.aws_access_key_id is None:
            return "aws_access_key_id is required beside a session token"
        return ""

    def endpoint_is_address(self) -> bool:
        """Whether `aws_endpoint_url` is absent, or can be one."""
        return self.aws_endpoint_url is None or self.aws_endpoint_url.startswith(("http://", "https://"))

    def access(self, *, connections: int = S3Access.connections) -> S3Access:
        """The same for a store, which keeps at most so many connections."""
        secrets = [self.aws_access_key_id, self.aws_secret_access_key, self.aws_session_token]
        key_id, secret, token = [None if each is None else each.get_secret_value() for each in secrets]
        return S3Access(
            self.aws_region_name, self.aws_endpoint_url, key_id, secret, token, self.aws_profile, connections
        )
