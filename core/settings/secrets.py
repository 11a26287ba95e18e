"""Values that are never shown: found by the names of their keys or by their type, written as ``{env:NAME}`` at most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, SecretStr

from ..utils import redaction
from ..utils.redaction import HIDDEN, in_urls, is_secret


def shown(key: str, value: object) -> object:
    """Return a value as a message may show it."""
    if value is not None and is_secret(key):
        return HIDDEN
    if isinstance(value, Mapping):
        return {name: shown(str(name), inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [shown(key, inner) for inner in value]
    return in_urls(value) if isinstance(value, str) else value


class FromEnvironment(str):
    """A text that was filled in from the environment.

    Attributes:
        written: As it stands in the file, with ``{env:NAME}``.
    """

    written: str

    @classmethod
    def fill(cls, text: str, written: str) -> FromEnvironment:
        """Return `text`, which stands in the file as `written`."""
        filled = cls(text)
        filled.written = written
        return filled


class NamedSecret(SecretStr):
    """A secret that came from the environment, and may be written down by its name there."""

    written: str = ""


def _remember(value: Any) -> Any:
    if not isinstance(value, FromEnvironment):
        return value
    secret = NamedSecret(str(value))
    secret.written = value.written
    return secret


Secret = Annotated[SecretStr, BeforeValidator(_remember)]
"""A value that is never shown; one that came through ``{env:NAME}`` is written down as that."""


def without_secrets(model: BaseModel) -> dict[str, Any]:
    """Dump a model to JSON values; of secrets only the names of their environment variables are kept."""
    values = model.model_dump(mode="json")
    result = {}
    for name, value in values.items():
        held = getattr(model, name, None)
        if isinstance(held, NamedSecret):
            result[name] = held.written
        elif not isinstance(held, SecretStr):
            result[name] = value
    return redaction.without_secrets(result)
