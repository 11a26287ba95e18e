"""The tutorials' method on data known in closed form: its few steps compose the many of the guided teacher."""

from __future__ import annotations

import pytest
import torch
from distill.core.diffusion import Prediction
from distill.core.diffusion.solvers import step_to, trailing_timesteps
from distill.core.registry.registry import Registry
from distill.core.testing.gaussian import affine_of, gaussian_batch
from distill.core.testing.paths import PATHS, train
from distill.core.utils.seeds import RngStreams
from support.closed_form import GuidedFamily
from support.pages import ROOT

MEAN, SCALE, STEPS, TEACHER_STEPS = 0.6, 2.0, 2, 4


def sample(predict, schedule, num_steps):
    """`num_steps` steps of the walk from 512 noises; `predict` makes a Prediction of (x, t)."""
    timesteps, x = (
        trailing_timesteps(schedule, num_steps),
        RngStreams(1, 0, tuple(range(512))).randn("start", (1,)).double(),
    )
    for j, t in enumerate(timesteps.times):
        x = step_to(predict(x, t.expand(len(x))), timesteps.at(torch.full((len(x),), j + 1)))
    return x


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("path", PATHS)
def test_two_steps_of_the_student_are_eight_of_the_teacher(path):
    """Eps, v, x0 and flow alike; with one large step of the teacher as its target it would have the teacher's two."""
    kind, schedule = PATHS[path]
    leap = Registry.load([ROOT / "examples/distill-research/distill_research/leap.py"], installed=False)
    method = leap.get("method", "leap")
    config = method.Config(num_inference_steps=STEPS, teacher_steps=TEACHER_STEPS, guidance_scale=SCALE)
    family = GuidedFamily(schedule, kind, trailing_timesteps(schedule, STEPS * TEACHER_STEPS).times)
    _, _, context = train(
        method, config, family, lambda step: gaussian_batch(step, 32, mean=MEAN), num_steps=150, lr=5e-2
    )

    def teacher(x, t):
        a, b = affine_of("sample", schedule, t)
        return Prediction(a[:, None] * x + b[:, None] * SCALE * MEAN, x, t, schedule, "sample")

    def student(x, t):
        with torch.no_grad():
            return context.predict("student", x, t, {"mean": torch.full_like(x, MEAN)})

    right, wrong = sample(teacher, schedule, STEPS * TEACHER_STEPS), sample(teacher, schedule, STEPS)
    error = rms(sample(student, schedule, STEPS) - right)
    assert error <= 0.01 * rms(wrong - right)
