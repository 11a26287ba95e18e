"""Images of a family and of its plain pipeline, computed in float64 from the same noise."""

from __future__ import annotations

from typing import Any

ROUNDING = 6e-8
"""How far images in [0, 1] may differ whose arithmetic is that of float64: a family's are rounded to float32."""


def in_float64(family: Any) -> Any:
    """The family, whose encoders, autoencoder and networks to come compute in float64."""
    load = family.load_network
    for encoder in family._text_encoders().encoders.values():
        encoder.double()
    family._autoencoder().double()
    family.load_network = lambda: load().double()
    return family


def draw_as_in_float32(monkeypatch: Any) -> None:
    """Have torch draw noise of float64 that is float32's: its generators give each type numbers of its own."""
    import torch

    draw = torch.randn

    def randn(*size: Any, dtype: Any = None, **further: Any) -> Any:
        return draw(*size, dtype=None if dtype == torch.float64 else dtype, **further).to(dtype)

    monkeypatch.setattr(torch, "randn", randn)
