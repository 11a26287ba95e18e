"""What no message, log, page or tracker may show: passwords and tokens, known by their keys or inside of URLs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
"""What stands in the place of a secret."""
SHORTEST = 8
"""Characters of a secret that is looked for in texts: shorter ones are parts of ordinary words."""
_SECRET_KEY = re.compile(
    r"secret|password|passwd|passphrase|api_?key|access_?key|account_?key|private_?key|credential|authorization|cookie"
    r"|connection_?string|(^|[_-])(token|pwd|bearer)$|^headers?$"
)
_ANY_KEY = re.compile(r"[_-]key$")
"""Keys whose values are hidden where they stand, but not looked for in texts: some are words, as of an `image_key`."""
_NAMED_IN_QUERY = (
    r"[\w.%-]*(?:signature|secret|token|credential|password|passwd|pwd|api[_-]?key|access[_-]?key(?:[_-]?id)?)"
)
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s?#'\"<>]*@")
_QUERY = re.compile(rf"([?&;#](?:{_NAMED_IN_QUERY}|sig|key|auth)=)[^&\s'\"#;<>]+", re.IGNORECASE)
_HEADER = re.compile(r"\b(Bearer|Basic|Authorization: \w+) +[A-Za-z0-9+/=._~-]{8,}", re.IGNORECASE)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
_known: set[str] = set()
"""Secrets that configurations of this process hold."""
_written: dict[str, str] = {}
"""URL with secrets -> as it stands in a file, with ``{env:NAME}`` in their place."""


def is_secret(key: str) -> bool:
    """Return whether a key's name says that its value must not be shown."""
    name = key.rsplit(".", 1)[-1].lower()
    return bool(_SECRET_KEY.search(name) or _ANY_KEY.search(name))


def remember(key: str, value: str, written: str) -> None:
    """Hide what a key holds in all texts of this process from now on, if it is a secret.

    Args:
        key: Dotted.
        value: Its value.
        written: As it stands in the file, where ``{env:NAME}`` may stand for the value or a part of it.
    """
    if len(value) >= SHORTEST and _SECRET_KEY.search(key.rsplit(".", 1)[-1].lower()):
        _known.add(value)
    if value != written and in_urls(value) != value:
        _written[value] = written


def in_urls(text: str) -> str:
    """Return a text without the accounts and signatures of the URLs in it; ``{env:NAME}`` there is none."""
    if "://" not in text:
        return text
    return _QUERY.sub(_hidden, _USER.sub(_hidden, text))


def _hidden(match: re.Match[str]) -> str:
    found = match[0]
    end = "@" if found.endswith("@") else ""
    return found if "{env:" in found else f"{match[1]}{HIDDEN}{end}"


def redacted(text: str) -> str:
    """Return a text for people without any secret: of URLs, of headers, of this configuration, of the environment."""
    text = _TOKEN.sub(HIDDEN, _HEADER.sub(rf"\g<1> {HIDDEN}", in_urls(text)))
    for secret in sorted(_known | _of_environment(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _of_environment() -> set[str]:
    named = {name: value for name, value in os.environ.items() if _SECRET_KEY.search(name.lower())}
    folders = {"PWD", "OLDPWD"}  # of the shell, not a password's
    return {
        value
        for name, value in named.items()
        if len(value) >= SHORTEST and name not in folders and not os.path.exists(value)  # nor is a file of secrets one
    }


def without_secrets(value: Any) -> Any:
    """Return a JSON value without what keys call secret, on any level, and without the secrets of its URLs."""
    if isinstance(value, Mapping):
        return {key: without_secrets(inner) for key, inner in value.items() if inner is None or not _hides(key, inner)}
    if isinstance(value, list | tuple):
        return [without_secrets(inner) for inner in value]
    return _written.get(value) or in_urls(value) if isinstance(value, str) else value


def is_redacted(value: Any) -> bool:
    """Return whether a text is a URL whose secrets were taken out."""
    return isinstance(value, str) and "://" in value and (f"//{HIDDEN}@" in value or f"={HIDDEN}" in value)


def _hides(key: object, value: Any) -> bool:
    """Return whether a value is a secret; its name in the environment is none."""
    return is_secret(str(key)) and not (isinstance(value, str) and value.startswith("{env:"))
