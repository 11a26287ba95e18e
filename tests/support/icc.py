"""Small colour profiles (ICC 2.1) written by hand, and what they mean, computed without a colour library."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

WHITE = (0.9642, 1.0, 0.8249)
WIDE = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
"""XYZ (D50) of red, green and blue, near those of Display P3."""
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))


def rgb_profile(*, primaries=WIDE, gamma: float = 2.2, name: str = "wide test space") -> bytes:
    """A display's profile."""
    colours = {key: _xyz(*each) for key, each in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    curves = {key: _curve(gamma) for key in (b"rTRC", b"gTRC", b"bTRC")}
    return _profile(b"mntr", b"RGB ", b"XYZ ", {**_common(name), **colours, **curves})


def grey_profile(*, gamma: float = 1.0) -> bytes:
    """Grey of linear light, unless another gamma is given."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {**_common("grey test space"), b"kTRC": _curve(gamma)})


def cmyk_profile(corners: Mapping[tuple[int, int, int, int], tuple[int, int, int]]) -> bytes:
    """A printer's profile: Lab bytes (L 0-255, a and b around 128) of corners of CMYK, white where none is given."""
    nodes = [corners.get((c, m, y, k), (255, 128, 128)) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    straight = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    table = (
        b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + straight * 4 + bytes(np.ravel(nodes).tolist()) + straight * 3
    )
    return _profile(b"prtr", b"CMYK", b"Lab ", {**_common("cmyk test space"), b"A2B0": table})


def meant(colour, *, primaries=WIDE, gamma: float = 2.2) -> np.ndarray:
    """The 8-bit sRGB of an 8-bit colour (..., 3) in that space."""
    light = (np.asarray(colour) / 255.0) ** gamma @ np.array(primaries)
    return encoded(light @ np.linalg.inv(np.array(SRGB)))


def encoded(light) -> np.ndarray:
    """sRGB's curve, 8 bits."""
    light = np.clip(light, 0, 1)
    return np.rint(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)).astype(int)


def of_lab(lab) -> np.ndarray:
    """The 8-bit sRGB of Lab bytes."""
    lightness, a, b = lab[0] * 100 / 255, lab[1] - 128, lab[2] - 128
    f = np.array([(lightness + 16) / 116 + a / 500, (lightness + 16) / 116, (lightness + 16) / 116 - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * np.array(WHITE)
    return encoded(xyz @ np.linalg.inv(np.array(SRGB)))


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def _common(name: str) -> dict[bytes, bytes]:
    text = name.encode() + b"\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + b"\0" * 79
    return {b"desc": described, b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(*WHITE)}


def _profile(kind: bytes, colours: bytes, between: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    table, data, at = b"", b"", 128 + 4 + 12 * len(tags)
    for key, body in tags.items():
        padded = body + b"\0" * (-len(body) % 4)
        table += key + struct.pack(">II", at + len(data), len(padded))
        data += padded
    head = struct.pack(">I", at + len(data)) + bytes(4) + struct.pack(">I", 0x02100000) + kind + colours + between
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + b"".join(map(_fixed, WHITE))
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + data
