"""Vectorised integer hashing and random-access permutations, which make the order of the data a pure function."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

UInt64s: TypeAlias = NDArray[np.uint64]
Int64s: TypeAlias = NDArray[np.int64]
Integers: TypeAlias = NDArray[np.integer]

SMALL = 4096
"""Up to this many elements a permutation is made by sorting; above, it is computed for the requested indices alone."""
ROUNDS = 6
LOOKUP_ROWS = 1 << 18
"""Keys that are looked up at a time, to bound memory."""


def mix(values: UInt64s) -> UInt64s:
    """Apply the finaliser of SplitMix64: every bit of the result depends on every bit of the input."""
    x = values + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def combine(identity: UInt64s, columns: list[Int64s]) -> UInt64s:
    """Return 128-bit keys, shape (n, 2), that depend on `identity`, shape (n, 2), and on every integer column, shape
    (n,).
    """
    low, high = identity[:, 0], identity[:, 1]
    for column in columns:
        value = column.astype(np.uint64)
        low = mix(low ^ mix(value))
        high = mix(high ^ mix(value + np.uint64(0x632BE59BD9B4E019)))
    return np.stack([low, high], axis=1)


def fractions(values: UInt64s, salt: int) -> NDArray[np.float64]:
    """Return one number in [0, 1) for each value, independent for different salts."""
    salted = mix(values ^ mix(np.full_like(values, salt)))
    return (salted >> np.uint64(11)).astype(np.float64) * 2.0**-53


def count_different(values: NDArray[Any]) -> int:
    """Count the distinct numbers among `values`, shape (n,), with the memory of one copy."""
    ordered = np.sort(values)
    return int(np.count_nonzero(ordered[1:] != ordered[:-1])) + bool(len(ordered))


class Lookup:
    """An index of 128-bit keys with 24 bytes of memory each; of equal keys the first is found.

    Args:
        keys: Shape (n, 2).
    """

    def __init__(self, keys: UInt64s) -> None:
        order = np.argsort(keys[:, 0], kind="stable")
        self._order = order.astype(np.uint32) if len(keys) < 2**32 else order
        self._low, self._high = keys[order, 0], keys[order, 1]

    def find(self, wanted: UInt64s) -> Int64s:
        """Return the positions of `wanted`, shape (m, 2), among the keys, shape (m,); -1 for keys that are absent."""
        positions = np.full(len(wanted), -1, np.int64)
        for start in range(0, len(wanted), LOOKUP_ROWS):
            self._find(wanted[start : start + LOOKUP_ROWS], positions[start : start + LOOKUP_ROWS])
        return positions

    def _find(self, wanted: UInt64s, positions: Int64s) -> None:
        rows = np.argsort(wanted[:, 0])  # neighbours are found near each other, which the processor's caches like
        at = np.searchsorted(self._low, wanted[rows, 0])
        while len(rows):
            near = at < len(self._low)
            rows, at = rows[near], at[near]
            near = self._low[at] == wanted[rows, 0]
            rows, at = rows[near], at[near]
            hit = self._high[at] == wanted[rows, 1]
            positions[rows[hit]] = self._order[at[hit]]
            rows, at = rows[~hit], at[~hit] + 1  # another key with the same first half, once in an age


@lru_cache(maxsize=512)
def _sorted_permutation(size: int, key: int) -> Int64s:
    draws = mix(np.arange(size, dtype=np.uint64) ^ mix(np.array([key], dtype=np.uint64)))
    return np.argsort(draws, kind="stable")


def _feistel(values: UInt64s, half: int, keys: UInt64s) -> UInt64s:
    """Apply a keyed bijection of 2 * half bits."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & mask)
    return (left << shift) | right


def permute(indices: Int64s, size: int, key: int) -> Int64s:
    """Map `indices` through a random permutation of {0, ..., size - 1} without building the permutation.

    A Feistel network over the next even number of bits, applied until the result falls inside the range.
    The memory used does not depend on `size`.
    """
    if size <= SMALL:
        return _sorted_permutation(size, key)[indices]
    half = ((size - 1).bit_length() + 1) // 2
    keys = mix(np.arange(ROUNDS, dtype=np.uint64) ^ mix(np.array([key], dtype=np.uint64)))
    values = _feistel(indices.astype(np.uint64), half, keys)
    outside = values >= size
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= size
    return values.astype(np.int64)


def digest(text: str) -> bytes:
    """Return the 128-bit hash of a text."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
