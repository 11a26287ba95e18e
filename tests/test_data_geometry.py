"""Buckets, scaling, crops and filters."""

import time

import numpy as np
import pytest
from distill.core.data.samples.geometry import Geometry, flipped_left
from distill.core.errors import UserError
from support.data_helpers import entry

SIZES = np.array([[1024, 1024], [1500, 1000], [1000, 1500], [640, 480], [4000, 1000], [333, 777], [8, 8], [1, 5000]])


def geometry(tmp_path, multiple=8, **settings) -> Geometry:
    return Geometry(
        entry(tmp_path / "set", **{"resolution": 512, "aspect_bucket_alignment": 64, **settings}), multiple=multiple
    )


def rng(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, count).astype(np.uint64)


def plan(geometry: Geometry, sizes=SIZES):
    return geometry.plan(sizes[:, 0], sizes[:, 1], rng(len(sizes)))


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("style", ["center", "random", "corner"])
@pytest.mark.parametrize("aspect", ["square", "preserve", "closest", "random"])
@pytest.mark.parametrize("kind", ["pixel", "area", "pixel_area"])
def test_every_crop_lies_inside_an_aligned_bucket(tmp_path, crop, style, aspect, kind):
    resolution = 0.25 if kind == "area" else 512
    made = plan(
        geometry(tmp_path, crop=crop, crop_style=style, crop_aspect=aspect, resolution=resolution, resolution_type=kind)
    )
    assert (made.bucket_w % 64 == 0).all()
    assert (made.bucket_h % 64 == 0).all()
    assert (made.left >= 0).all()
    assert (made.top >= 0).all()
    assert (made.left + made.bucket_w <= made.resized_w).all()
    assert (made.top + made.bucket_h <= made.resized_h).all()
    scale_w, scale_h = made.resized_w / SIZES[:, 0], made.resized_h / SIZES[:, 1]
    assert np.abs(np.log(scale_w / scale_h))[:6].max() < 0.01  # never stretched


def test_resolution_types_mean_what_they_say(tmp_path):
    wide = np.array([[2000, 1000]])
    pixel = plan(geometry(tmp_path, resolution=512, resolution_type="pixel"), wide)
    assert (pixel.bucket_w[0], pixel.bucket_h[0]) == (1024, 512)  # the shorter edge
    for resolution, kind in ((512, "pixel_area"), (0.262144, "area")):
        area = plan(geometry(tmp_path, resolution=resolution, resolution_type=kind), wide)
        assert (area.bucket_w[0], area.bucket_h[0]) == (704, 384)  # 512 sqrt(2), 512 / sqrt(2), aligned
    one = plan(geometry(tmp_path, resolution=1.0, resolution_type="area"), np.array([[3000, 3000], [4000, 3000]]))
    assert one.bucket_w.tolist() == [1024, 1152]
    assert one.bucket_h.tolist() == [1024, 896]  # buckets of SDXL


def test_bucket_edges_are_multiples_of_alignment_and_model(tmp_path):
    assert geometry(tmp_path, multiple=16, aspect_bucket_alignment=24).alignment == 48
    with pytest.raises(UserError, match=r"set\.resolution = 32 .*alignment of 64"):
        geometry(tmp_path, resolution=32)


def test_without_cropping_only_alignment_costs_pixels_evenly(tmp_path):
    made = plan(geometry(tmp_path, crop=False, crop_style="random"), SIZES[:6])
    slack_w, slack_h = made.resized_w - made.bucket_w, made.resized_h - made.bucket_h
    assert (np.minimum(slack_w, slack_h) == 0).all()
    assert np.array_equal(made.left, slack_w // 2)
    assert np.array_equal(made.top, slack_h // 2)


def test_maximum_size_leaves_room_for_the_crop(tmp_path):
    size = np.array([[4000, 4000], [600, 600], [300, 300]])
    made = plan(
        geometry(tmp_path, crop=True, resolution_type="pixel", maximum_image_size=1024, target_downsample_size=768),
        size,
    )
    assert made.resized_w.tolist() == [768, 600, 512]  # scaled down to the target; as it is; scaled up to cover
    cover = plan(geometry(tmp_path, crop=True, resolution_type="pixel"), size)
    assert cover.resized_w.tolist() == [512, 512, 512]
    same = plan(geometry(tmp_path, crop=True, resolution_type="pixel", maximum_image_size=1024), size)
    assert same.resized_w.tolist() == [1024, 600, 512]


def test_filters_name_their_reason(tmp_path):
    size = np.array([[1024, 1024], [700, 700], [400, 400], [2000, 500], [500, 2000]])

    def codes(**settings):
        made = geometry(tmp_path, **settings)
        return made.filter(size[:, 0], size[:, 1], plan(made, size)).tolist()

    assert codes(minimum_image_size=600) == [0, 0, 1, 0, 0]  # pixel_area
    assert codes(minimum_image_size=600, resolution_type="pixel") == [0, 0, 1, 1, 1]
    assert codes(minimum_image_size=0.5, resolution_type="pixel") == [0, 1, 1, 0, 0]  # below 8: megapixels
    assert codes(minimum_image_size=0.5, resolution=0.25, resolution_type="area") == [0, 1, 1, 0, 0]
    assert codes(minimum_aspect_ratio=0.5) == [0, 0, 0, 0, 2]
    assert codes(maximum_aspect_ratio=2.0) == [0, 0, 0, 3, 0]
    assert codes(max_upscale_threshold=0.2)[:3] == [0, 0, 4]


def test_random_crops_are_fixed_and_cover_the_range(tmp_path):
    made = geometry(tmp_path, crop=True, crop_style="random", resolution_type="pixel")
    width, height = np.full(4000, 1024), np.full(4000, 512)
    first, again = (made.plan(width, height, rng(4000)) for _ in range(2))
    assert np.array_equal(first.left, again.left)
    assert first.left.min() == 0
    assert first.left.max() == 512
    assert abs(first.left.mean() - 256) < 15
    corner = geometry(tmp_path, crop=True, crop_style="corner", resolution_type="pixel").plan(width, height, rng(4000))
    assert not corner.left.any()
    assert (flipped_left(corner) == 512).all()


def test_millions_of_rows_take_a_second(tmp_path):
    count = 1_000_000
    width, height = (np.random.default_rng(seed).integers(300, 4000, count).astype(np.int32) for seed in (1, 2))
    made, start = geometry(tmp_path), time.process_time()
    made.plan(width, height, rng(count))
    assert time.process_time() - start < 2
