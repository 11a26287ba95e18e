"""Bucket, scaling and crop from the size of an image: pure functions over whole columns.

An image of (w, h) is scaled to (resized_w, resized_h), which covers its bucket, and the bucket is cut out of it at
(left, top). Without cropping the bucket has the image's own aspect ratio, and what is cut off is the few pixels that
alignment costs, evenly on both sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from ..hashing import Int64s, Integers, UInt64s, fractions

if TYPE_CHECKING:
    from ...settings.dataset_settings import DatasetSettings

MEGAPIXEL = 1e6
ASPECTS = np.array([1 / 2, 9 / 16, 2 / 3, 3 / 4, 4 / 5, 1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2])
"""Width / height of the buckets that ``crop_aspect`` `closest` and `random` choose from."""

LARGEST_BUCKET = 8
"""Buckets of more pixels than so many square ones are not used: an image of 60,000x1 must not fill the memory."""
REASONS = (
    "",
    "smaller than minimum_image_size",
    "narrower than minimum_aspect_ratio",
    "wider than maximum_aspect_ratio",
    "would be scaled up beyond max_upscale_threshold",
    "too long and narrow for the resolution",
)
"""Why a filter leaves an image out, by the code that :meth:`Geometry.filter` returns."""


@dataclass(frozen=True)
class Plan:
    """The bucket, scaling and crop of each image, in pixels; columns of shape (n,)."""

    bucket_w: Int64s
    bucket_h: Int64s
    resized_w: Int64s
    resized_h: Int64s
    left: Int64s
    top: Int64s

    def columns(self) -> list[Int64s]:
        """Return all columns that decide the pixels."""
        return [self.bucket_w, self.bucket_h, self.resized_w, self.resized_h, self.left, self.top]


class Geometry:
    """The scaling, bucketing and cropping of one dataset.

    Args:
        settings: The dataset's settings.
        multiple: Edges must be multiples of this for the model, whatever the alignment.
    """

    def __init__(self, settings: DatasetSettings, *, multiple: int) -> None:
        self.settings = settings
        self.alignment = math.lcm(settings.aspect_bucket_alignment, multiple)
        if settings.square_edge < self.alignment:
            raise UserError(
                f"data.{settings.id}.resolution = {settings.resolution:g} ({settings.resolution_type}) is an image of "
                f"{settings.square_edge:.0f} px, below the alignment of {self.alignment} px",
                f"raise resolution, or lower aspect_bucket_alignment (the model needs multiples of {multiple})",
            )

    def _aspects(self, width: Int64s, height: Int64s, draw: UInt64s) -> NDArray[np.float64]:
        settings = self.settings
        own = width / height
        if not settings.crop or settings.crop_aspect == "preserve":
            decimals = settings.aspect_bucket_rounding
            return np.maximum(np.round(own, decimals), 10.0**-decimals)
        if settings.crop_aspect == "square":
            return np.ones_like(own)
        if settings.crop_aspect == "closest":
            return ASPECTS[np.abs(np.log(own)[:, None] - np.log(ASPECTS)).argmin(axis=1)]
        return ASPECTS[(fractions(draw, 1) * len(ASPECTS)).astype(np.int64)]

    def _buckets(self, aspect: NDArray[np.float64]) -> tuple[Int64s, Int64s]:
        edge, area = self.settings.edge_and_area(self.settings.resolution)
        if edge is not None:
            width, height = edge * np.maximum(aspect, 1), edge * np.maximum(1 / aspect, 1)
        else:
            pixels = (area or 0.0) * MEGAPIXEL
            width, height = np.sqrt(pixels * aspect), np.sqrt(pixels / aspect)
        return self._align(width), self._align(height)

    def _align(self, edge: NDArray[np.float64]) -> Int64s:
        return np.maximum(np.rint(edge / self.alignment), 1).astype(np.int64) * self.alignment

    def _relative_size(self, width: Int64s, height: Int64s, size: float) -> NDArray[np.float64]:
        """Divide the edge of the image by the edge that `size` (in the dataset's unit) stands for."""
        edge, area = self.settings.edge_and_area(size)
        if edge is not None:
            return np.minimum(width, height) / edge
        return np.sqrt(width * height / ((area or 0.0) * MEGAPIXEL))

    def _scale(self, width: Int64s, height: Int64s, cover: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the scale before cropping: to the bucket, or, with a maximum size, only as far down as needed."""
        settings = self.settings
        if not settings.crop or settings.maximum_image_size is None:
            return cover
        target = settings.target_downsample_size or settings.maximum_image_size
        above = self._relative_size(width, height, settings.maximum_image_size) > 1
        down = np.where(above, 1 / self._relative_size(width, height, target), 1.0)
        return np.maximum(np.minimum(down, 1.0), cover)

    def _offsets(self, slack: Int64s, draw: UInt64s, salt: int) -> Int64s:
        style = self.settings.crop_style if self.settings.crop else "center"
        if style == "random":
            return (fractions(draw, salt) * (slack + 1)).astype(np.int64)
        return slack // 2 if style == "center" else np.zeros_like(slack)

    def plan(self, width: Integers, height: Integers, draw: UInt64s) -> Plan:
        """Plan images of these sizes, columns of shape (n,); `draw` decides all random choices for good."""
        width, height = width.astype(np.int64), height.astype(np.int64)
        bucket_w, bucket_h = self._buckets(self._aspects(width, height, draw))
        scale = self._scale(width, height, np.maximum(bucket_w / width, bucket_h / height))
        resized_w = np.maximum(np.rint(width * scale).astype(np.int64), bucket_w)
        resized_h = np.maximum(np.rint(height * scale).astype(np.int64), bucket_h)
        left = self._offsets(resized_w - bucket_w, draw, 2)
        top = self._offsets(resized_h - bucket_h, draw, 3)
        return Plan(bucket_w, bucket_h, resized_w, resized_h, left, top)

    def square(self) -> int:
        """Return the edge in pixels of the bucket of square images."""
        one = np.ones(1, np.int64)
        return int(self.plan(one, one, np.zeros(1, np.uint64)).bucket_w[0])

    def filter(self, width: Integers, height: Integers, plan: Plan) -> NDArray[np.int8]:
        """Return 0 for images to keep, else the position in :data:`REASONS` of the reason; shape (n,)."""
        settings, aspect = self.settings, width / height
        width, height = width.astype(np.int64), height.astype(np.int64)
        codes = np.zeros(len(width), dtype=np.int8)
        codes[plan.bucket_w * plan.bucket_h > LARGEST_BUCKET * self.square() ** 2] = 5
        if settings.max_upscale_threshold is not None:
            growth = np.maximum(plan.bucket_w / width, plan.bucket_h / height) - 1
            codes[growth > settings.max_upscale_threshold + 1e-9] = 4
        if settings.maximum_aspect_ratio is not None:
            codes[aspect > settings.maximum_aspect_ratio] = 3
        if settings.minimum_aspect_ratio is not None:
            codes[aspect < settings.minimum_aspect_ratio] = 2
        if settings.minimum_image_size:
            codes[self._relative_size(width, height, settings.minimum_image_size) < 1] = 1
        return codes


def flipped_left(plan: Plan) -> Int64s:
    """Return the left edge of the crop in the mirrored image, in pixels of the *resized* image."""
    return plan.resized_w - plan.bucket_w - plan.left
