"""The range that a method draws its teacher's guidance scale from, and the scale that a student is sampled with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

GuidanceConvention = Literal["scale", "paper"]
_END = "{} end of the range that the teacher's guidance is drawn from, in the units of guidance_convention."
LowestGuidance = Annotated[float, Field(ge=0, le=100, description=_END.format("Lower"))]
HighestGuidance = Annotated[float, Field(ge=0, le=100, description=_END.format("Upper"))]


class GuidanceRange(BaseModel):
    """Settings of the teacher's guidance; methods derive their own from it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    w_min: LowestGuidance
    w_max: HighestGuidance
    guidance_convention: GuidanceConvention = "scale"
    """scale: w is the guidance scale that pipelines take, uncond + w (cond - uncond); paper: one less."""

    @model_validator(mode="after")
    def _ordered(self) -> GuidanceRange:
        if self.w_min > self.w_max:
            raise ValueError(f"w_min = {self.w_min} is above w_max = {self.w_max}: lower w_min or raise w_max")
        return self

    @property
    def scales(self) -> tuple[float, float]:
        """The range as guidance scales g of uncond + g (cond - uncond)."""
        offset = 1.0 if self.guidance_convention == "paper" else 0.0
        return self.w_min + offset, self.w_max + offset

    def notice(self, method: str) -> str:
        """Return the line that says what the teacher of `method` is guided by, in both conventions."""
        low, high = self.scales
        return (
            f"{method}: the teacher's guidance scale is drawn from {low:g} to {high:g} "
            f"(the LCM paper's w: {low - 1:g} to {high - 1:g})"
        )

    @property
    def guided(self) -> bool:
        """True if there is a scale other than 1, at which the prompt is followed without guidance."""
        return self.scales != (1.0, 1.0)

    @property
    def is_range(self) -> bool:
        """True if there is more than one scale, so that a student needs to know which."""
        return self.w_min < self.w_max

    def takes_guidance(self, model_type: str) -> bool:
        """Return True if a student of this type takes w as an input: one scale needs none, and a LoRA has none."""
        return model_type == "full" and self.is_range


def embedded_scale(asked: float | None, scales: tuple[float, float]) -> float:
    """Return the guidance scale for a student that takes it as an input: as asked inside its range, else the middle.

    0 and 1 mean off to pipelines, which would feed such a student a w that it was not trained with.

    Args:
        asked: Guidance scale g that the user asks for, or None.
        scales: Smallest and largest g of training.
    """
    low, high = scales
    if asked is not None and asked > 1 and low <= asked <= high:
        return asked
    return max((low + high) / 2, 1.0)


def guides(guidance: float) -> bool:
    """Return True if this guidance scale has an effect: it is neither 0 nor 1."""
    return guidance not in (0, 1)
