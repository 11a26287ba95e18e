"""Losses that are not finite: counted per role, read before the next step, never half a step in a checkpoint."""

import pytest
import torch
from distill.core.engine.health import HealthMonitor
from distill.core.errors import DistillError
from support.sdxl_setup import make_batch, make_loop, make_setup
from support.tiny_sdxl import write_tiny_sdxl


def note(monitor, role, step, good):
    monitor.record(role, step, torch.tensor(good), torch.tensor([not good, False]), ["a", "b"])


def test_a_good_role_does_not_hide_a_bad_one():
    monitor = HealthMonitor(3)
    for step in range(3):
        note(monitor, "student", step, False)
        note(monitor, "fake_score", step, True)
        if step < 2:
            monitor.check()
    with pytest.raises(DistillError, match="student.*3 times.*step 2(?s:.)*Samples involved: a$|Samples involved: a\n"):
        monitor.check()


def test_good_steps_start_the_count_again():
    monitor = HealthMonitor(2)
    for good in (False, True, False, True):
        note(monitor, "student", 0, good)
        monitor.check()
    assert monitor.total == 2


def test_the_run_stops_before_the_next_update(tmp_path):
    """Two bad steps, then a good batch: the weights that are saved are those of the last whole step."""
    family, method, networks, context = make_setup(write_tiny_sdxl(tmp_path / "tiny"))
    loop = make_loop(method, networks, context)
    loop.health = HealthMonitor(2)
    bad = make_batch(family)
    bad.latents[0] = float("nan")
    loop.step(0, [bad])
    loop.step(1, [bad])
    before = [p.clone() for p in networks.parameters("student")]
    with pytest.raises(DistillError):
        loop.step(2, [make_batch(family)])
    assert all(torch.equal(p, q) for p, q in zip(networks.parameters("student"), before, strict=True))


def test_the_norm_of_bf16_gradients_is_taken_in_fp32():
    from distill.core.engine.optimize import total_norm

    gradients = [torch.full((1000,), 0.1, dtype=torch.bfloat16) for _ in range(7)]
    exact = torch.cat(gradients).double().norm()
    assert total_norm(gradients).dtype == torch.float32
    assert total_norm(gradients).item() == pytest.approx(exact.item(), rel=1e-6)
