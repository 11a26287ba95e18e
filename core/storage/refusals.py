"""From a server's answer, or the lack of one, to what is raised: gone, refused, or worth another attempt."""

from __future__ import annotations

import errno
import re

from ..errors import DistillError, OutOfReach, UserError
from .retry import Transient

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504, 509})
"""Answers after which the same request may succeed."""
REJECTED = frozenset(
    {
        "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
        "RequestTimeTooSkewed", "AuthorizationHeaderMalformed", "InvalidSecurity", "NotSignedUp",
        "AuthenticationFailed", "InvalidAuthenticationInfo",
    }
)  # fmt: skip
"""Codes of answers that are about the account rather than about the object."""
SLOW = frozenset({"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "OperationAborted"})
NO_BUCKET = frozenset({"NoSuchBucket", "ContainerNotFound"})
UNREACHED = {
    "dns error": "its name cannot be resolved",
    "ConnectionRefused": "the connection is refused",
    "peer certificate|tls handshake|InvalidContentType": "the encrypted connection cannot be made (certificate?)",
    r"kind: Connect\b.*TimedOut": "no connection is made in time",
    r"kind: Timeout|TimedOut": "no answer for {seconds:g} s",
    "body error": "the answer was cut short",
    "HttpError": "the connection broke off",
}
"""What obstore says of a request without an answer, the first that fits, and what is said of it here."""
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]*)</Code>")


class CredentialsRejected(OutOfReach):
    """The account is not accepted, or no longer."""


def refusal(
    place: str, status: int, code: str = "", *, bucket: str = "", note: str = "", after_seconds: float = 0.0
) -> Exception:
    """Return what to raise for an answer that is an error.

    Args:
        place: What was asked for.
        status: The HTTP status.
        code: The server's own word for it.
        bucket: The bucket's name.
        note: About the account.
        after_seconds: What the server asked to wait.
    """
    said = " ".join(filter(None, [str(status), code]))
    if status in RETRIED or code in SLOW:
        return Transient(f"the server answers {said}", after_seconds=after_seconds)
    if code in REJECTED:
        return CredentialsRejected(place, f"the server does not accept the credentials ({said})")
    if code in NO_BUCKET:
        return FileNotFoundError(errno.ENOENT, f"the bucket {bucket!r} does not exist", place)
    if status in (404, 410):
        return FileNotFoundError(errno.ENOENT, f"it is not there ({said}{note})", place)
    if status in (401, 403):
        return PermissionError(errno.EACCES, f"access is refused ({said}{note})", place)
    if status == 412:
        return FileNotFoundError(errno.ENOENT, "it has changed while it was being read", place)
    return DistillError(f"{place}: the server refuses the request ({said}{note})")


def status_of(error: Exception) -> int:
    """Return the HTTP status in an error of obstore, 0 where there was no answer."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else 0


def failure(error: Exception, place: str, *, bucket: str, note: str, seconds: float) -> Exception:
    """Return what to raise for an error of obstore, whose text may hold addresses and is never shown.

    Args:
        error: What obstore raised.
        place: What was asked for.
        bucket: The bucket's name.
        note: About the account.
        seconds: How long the server may be silent.
    """
    text = str(error)
    if isinstance(error, ValueError):
        reason = "its name has an empty part, . or .., or a control character, which cannot be asked for"
        return FileNotFoundError(errno.ENOENT, reason, place)
    if re.search(r"[Cc]redential|[Tt]oken ?[Rr]equest", text.partition("status code")[0]):
        return CredentialsRejected(place, "no credentials are found, or they cannot be renewed")
    if status := status_of(error) or (404 if isinstance(error, FileNotFoundError) else 0):
        code = _CODE.search(text)
        return refusal(place, status, code[1] if code else "", bucket=bucket, note=note)
    if "redirect without LOCATION" in text:
        return UserError(f"{place}: the bucket is in another region", "name its region: aws_region_name")
    for pattern, reason in UNREACHED.items():
        if re.search(pattern, text, re.DOTALL):
            return Transient(reason.format(seconds=seconds))
    if "invalid path" in text:
        return DistillError(f"{place} cannot be listed: it has a name with an empty part or a control character")
    return DistillError(f"{place}: {type(error).__name__}: {text.splitlines()[0].partition('http')[0]}")
