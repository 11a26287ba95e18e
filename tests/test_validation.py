"""Grids that can be looked at, and validation: same prompts and seeds, the teacher's images made once."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distill.core.drawing.grid import GridRow, fit, labelled_grid, to_images, to_tensor
from distill.core.engine.tracking import Trackers
from distill.core.errors import UserError
from distill.core.evaluation.sampling import SamplingPlan, batch_size, describe_guidance, plural, sampling
from distill.core.evaluation.validation import ValidationPlan, Validator, slug
from distill.core.utils.prompt_library import read_library
from PIL import Image
from support.fake_family import FakeFamily, FakeNetworks, fake_sampler, image

# -- grids -----------------------------------------------------------------------------------------------------------


def coloured(width: int, height: int, colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


@pytest.mark.parametrize(("edge", "expected"), [(8, 128), (32, 128), (48, 144), (127, 254), (128, 128), (400, 400)])
def test_small_images_are_enlarged_by_whole_factors_and_pixels_stay_pixels(edge, expected):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (edge, edge, 3), dtype=np.uint8))
    enlarged = fit(noise)
    assert enlarged.size == (expected, expected)
    factor = expected // edge
    assert np.array_equal(np.asarray(enlarged)[::factor, ::factor], np.asarray(noise))


@pytest.mark.parametrize(("size", "expected"), [((1024, 1024), (512, 512)), ((1280, 768), (512, 307))])
def test_large_images_are_scaled_down_keeping_their_aspect(size, expected):
    assert fit(coloured(*size, (1, 2, 3))).size == expected


def test_every_image_is_in_the_grid_and_labels_are_drawn():
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    colours = [red, green, blue]
    rows = [GridRow(f"prompt {n}", [coloured(32, 32, colour) for colour in colours]) for n in range(2)]
    grid = np.asarray(labelled_grid(rows, ["teacher\n4 steps", "student", "teacher\n50 steps"], title="Step 5"))
    for colour in colours:
        assert (grid == colour).all(axis=2).sum() == 2 * 128 * 128
    left = [np.argwhere((grid == colour).all(axis=2))[:, 1].min() for colour in colours]
    assert left == sorted(left)
    first = np.argwhere((grid == red).all(axis=2))
    beside = grid[first[:, 0].min() : first[:, 0].max(), : first[:, 1].min()]
    above = grid[: first[:, 0].min(), first[:, 1].min() :]
    assert (beside < 100).any(), "no row label"
    assert (above < 100).any(), "no column label"


def test_mixed_aspects_and_absent_images_do_not_overlap():
    tall, wide = coloured(768, 1280, (200, 0, 0)), coloured(1280, 768, (0, 200, 0))
    rows = [GridRow("a", [tall, None]), GridRow("b", [wide, wide])]
    grid = np.asarray(labelled_grid(rows, ["x", "y"]))
    assert (grid == (200, 0, 0)).all(axis=2).sum() == pytest.approx(307 * 512, rel=0.01)
    assert (grid == (0, 200, 0)).all(axis=2).sum() == pytest.approx(2 * 512 * 307, rel=0.01)


def test_long_labels_are_cut_to_the_row():
    row = GridRow("word " * 400, [coloured(32, 32, (255, 0, 0))], "detail")
    grid = labelled_grid([row], ["a header of many words that has to be broken into lines"])
    assert grid.height < 300


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="'a' has 1 images for 2 columns"):
        labelled_grid([GridRow("a", [None])], ["x", "y"])


def test_images_and_tensors_convert_both_ways():
    images = (torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    assert torch.allclose(to_tensor(to_images(images)), images, atol=1e-6)


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_labels_name_steps_and_guidance():
    assert [plural(n, "step") for n in (1, 4)] == ["1 step", "4 steps"]
    assert [describe_guidance(g) for g in (0, 1, 5.0, 7.5)] == [
        "no guidance",
        "no guidance",
        "guidance 5",
        "guidance 7.5",
    ]


def test_batches_shrink_with_the_size_of_the_images():
    assert batch_size(32, 32) == batch_size(64, 64) == 64
    assert batch_size(256, 256) == 4
    assert batch_size(1024, 1024) == 1


@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_mode_gradients_and_generators_as_they_were(training):
    networks = FakeNetworks()
    with networks.use("student") as network:
        network.train(training)
    state = torch.random.get_rng_state()
    with sampling(networks, "student") as inside:
        assert not inside.training
        assert not torch.is_grad_enabled()
        torch.rand(7)
    assert network.training is training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), state)


# -- validation --------------------------------------------------------------------------------------------------------


def plan(**changes: object) -> ValidationPlan:
    values = {
        "prompts": ("a red fish", "two birds"),
        "resolutions": ((32, 32), (48, 32)),
        "student": SamplingPlan("student", "student", fake_sampler(), 4, 0.0),
        "teacher_few": SamplingPlan("teacher", "teacher", None, 4, 7.0),
        "teacher_full": SamplingPlan("teacher", "teacher", None, 50, 7.0),
        "negative_prompt": "blurry",
        "seed": 5,
        "num_images": 2,
        **changes,
    }
    return ValidationPlan(**values)  # type: ignore[arg-type]


def no_trackers() -> Trackers:
    return Trackers([])


def test_every_prompt_at_every_resolution_and_seed_by_all_three(tmp_path):
    family = FakeFamily()
    folder = Validator(family, plan(), tmp_path).run(250, FakeNetworks(), no_trackers())
    assert folder == tmp_path / "validation" / "step-000250"
    images = sorted(path.name for path in folder.glob("*.png"))
    assert len(images) == 2 * 2 * 2 + 1
    assert "grid.png" in images
    assert "00-a-red-fish-48x32-seed6.png" in images
    assert len(list((tmp_path / "validation" / "teacher").glob("*.png"))) == 2 * 8
    assert not list(tmp_path.rglob("*.partial"))
    made = {(call.role, call.steps): set() for call in family.calls}
    for call in family.calls:
        made[call.role, call.steps] |= {(seed, call.size) for seed in call.seeds}
        assert call.guidance == (7.0 if call.role == "teacher" else 0.0)
        assert call.negative == (call.role == "teacher"), "a negative prompt goes where there is guidance"
        assert call.scheduler == (None if call.role == "teacher" else "LCMScheduler")
    noise = {(seed, size) for seed in (5, 6) for size in ((32, 32), (48, 32))}
    assert made == {("teacher", 4): noise, ("teacher", 50): noise, ("student", 4): noise}


def test_an_image_shows_its_own_prompt_and_seed(tmp_path):
    folder = Validator(FakeFamily(), plan(), tmp_path).run(1, FakeNetworks(), no_trackers())
    code = sum(b"two birds") % 997
    expected = image(code, 6, 0.2 / 4, 48, 32)
    stored = to_tensor([Image.open(folder / "01-two-birds-48x32-seed6.png")])[0]
    assert torch.allclose(stored, expected, atol=1 / 255)


def test_teacher_images_are_made_once_and_not_again_after_a_resume(tmp_path):
    family = FakeFamily()
    validator = Validator(family, plan(), tmp_path)
    validator.run(1, FakeNetworks(), no_trackers())
    first = (tmp_path / "validation/step-000001/grid.png").read_bytes()
    family.calls.clear()
    validator.run(2, FakeNetworks(), no_trackers())
    resumed = FakeFamily()
    Validator(resumed, plan(), tmp_path).run(3, FakeNetworks(), no_trackers())
    assert {call.role for call in family.calls + resumed.calls} == {"student"}
    assert len(family.encoded) == 2, "prompts are encoded once"
    (tmp_path / "validation/step-000001").rename(tmp_path / "before")
    Validator(resumed, plan(), tmp_path).run(1, FakeNetworks(), no_trackers())
    assert (tmp_path / "validation/step-000001/grid.png").read_bytes() == first


@pytest.mark.parametrize("change", ["guidance", "model", "negative", "seed", "interrupted"])
def test_a_cached_image_of_another_teacher_is_not_reused(tmp_path, change):
    Validator(FakeFamily(), plan(), tmp_path).run(1, FakeNetworks(), no_trackers())
    family, changed = FakeFamily(), plan()
    if change == "guidance":
        changed = plan(teacher_full=SamplingPlan("teacher", "teacher", None, 50, 3.0))
    elif change == "model":
        family.print = "v2"
    elif change == "negative":
        changed = plan(negative_prompt="")
    elif change == "seed":
        changed = plan(seed=6)
    else:
        next((tmp_path / "validation/teacher").glob("*seed6*50steps*.png")).unlink()
    Validator(family, changed, tmp_path).run(2, FakeNetworks(), no_trackers())
    made = sum(len(call.seeds) for call in family.calls if call.role == "teacher")
    assert made == {"guidance": 8, "model": 16, "negative": 16, "seed": 8, "interrupted": 1}[change]


def test_the_grid_goes_to_the_trackers(tmp_path):
    seen = []
    tracker = SimpleNamespace(images=lambda name, images, step: seen.append((name, list(images), step)))
    trackers = Trackers([("t", tracker)])  # type: ignore[list-item]
    Validator(FakeFamily(), plan(), tmp_path).run(7, FakeNetworks(), trackers)
    assert seen == [("validation", ["grid"], 7)]


def settings(**changes: object) -> SimpleNamespace:
    values = {
        "validation_resolution": (),
        "validation_negative_prompt": "",
        "validation_seed": None,
        "num_validation_images": 1,
        "evaluation_teacher_guidance": None,
        "evaluation_teacher_steps": (4, 50),
        "seed": 42,
        **changes,
    }
    return SimpleNamespace(**values)


def from_run(run: SimpleNamespace, *, prompts: tuple[str, ...] = ("a",), sampler=None) -> ValidationPlan:
    sampler = sampler or fake_sampler(2)
    return ValidationPlan.from_run(run, FakeFamily(), sampler, prompts=prompts, fallback_resolution=(64, 64))  # type: ignore[arg-type]


def test_a_plan_takes_the_methods_steps_and_the_familys_guidance():
    made = from_run(settings())
    assert (made.student.steps, made.student.guidance) == (2, 0.0)
    assert (made.teacher_few.steps, made.teacher_few.guidance) == (2, 7.0)
    assert (made.teacher_full.steps, made.teacher_full.guidance) == (50, 7.0)
    assert made.resolutions == ((64, 64),)
    assert made.seed == 42
    chosen = from_run(settings(evaluation_teacher_guidance=3.0, validation_seed=7, validation_resolution=((8, 16),)))
    assert (chosen.teacher_full.guidance, chosen.seed, chosen.resolutions) == (3.0, 7, ((8, 16),))


def test_a_negative_prompt_without_guidance_is_said_once():
    run = settings(validation_negative_prompt="blurry")
    assert len(from_run(run).notices()) == 1
    assert from_run(run, sampler=fake_sampler(4, guidance=3.0)).notices() == []
    assert from_run(settings()).notices() == []


def test_no_prompt_at_all_is_an_error_that_names_the_key():
    with pytest.raises(UserError, match="validation_prompt"):
        from_run(settings(), prompts=())


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.json", '{"one": "a", "two": " b "}'), ("p.json", '["a", "b"]'), ("p.txt", "a\n\n  b\n")],
)
def test_prompt_libraries_of_all_formats_are_read(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_library(tmp_path / name) == ["a", "b"]
    assert read_library(None) == []


@pytest.mark.parametrize("content", ["{", "3", '{"a": 1}', None])
def test_a_prompt_library_of_another_format_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "p.json").write_text(content)
    with pytest.raises(UserError, match=r"p\.json") as caught:
        read_library(tmp_path / "p.json")
    assert "validation_prompt_library" in str(caught.value)
    assert "one prompt per line" in caught.value.remedy


def test_slugs_are_valid_file_names():
    assert slug("A Portrait of a woman, 4k!") == "a-portrait-of-a-woman-4k"
    assert slug("/../..") == "prompt"
    assert len(slug("long " * 50)) <= 40
