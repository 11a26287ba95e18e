"""Nearest names, for messages about misspelt ones."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 100
"""Characters of a name that is compared at all: comparing takes time quadratic in them."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` was most likely meant to be, or None."""
    if len(name) > LONGEST:
        return None
    by_folded: dict[str, str] = {}
    for candidate in known:
        by_folded.setdefault(candidate.lower().replace("-", "_"), candidate)
    matches = get_close_matches(str(name).lower().replace("-", "_"), by_folded, n=1, cutoff=0.6)
    return by_folded[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'? `` to begin a remedy with, where a known name is near; else the empty text."""
    close = nearest(name, known)
    return f"did you mean {close!r}? " if close else ""
