"""Stages: where a step lies, what happens when one begins and that it happens once, the learning rate of each."""

from __future__ import annotations

import math

import pytest
import torch
from distill.core.diffusion import FlowSchedule
from distill.core.engine.health import HealthMonitor
from distill.core.engine.loop import Loop, stage_starts
from distill.core.engine.lr import lr_lambda, staged
from distill.core.engine.networks import Networks
from distill.core.engine.optimize import RoleOptimizer
from distill.core.errors import UserError
from distill.core.plugin_api.context import Context, Runtime
from distill.core.plugin_api.method import Role, Update
from distill.core.plugin_api.stage import Stage, stage_of
from distill.core.testing.gaussian import GaussianFamily, gaussian_batch
from support.recipes import PLUGIN
from support.small_run import execute, losses, write_run

THREE = [Stage("a", 2), Stage("b", 3, copy={"frozen": "student"}, reset=("student",)), Stage("c", 1)]
SCHEDULE = FlowSchedule(shift=1.0, num_train_timesteps=4)


def test_every_step_lies_in_one_stage_and_later_ones_in_the_last():
    found = [stage_of(THREE, step) for step in range(8)]
    assert [(stage.index, stage.name, stage.step) for stage in found] == [
        (0, "a", 0), (0, "a", 1), (1, "b", 0), (1, "b", 1), (1, "b", 2), (2, "c", 0), (2, "c", 1), (2, "c", 2)
    ]  # fmt: skip
    assert [stage.num_steps for stage in found[:6]] == [2, 2, 3, 3, 3, 1]
    assert stage_of([], 5).step == 5, "without stages the run is one"


def test_the_first_stage_copies_and_resets_nothing():
    assert {start: stage.name for start, stage in stage_starts(THREE).items()} == {2: "b", 5: "c"}


def test_the_learning_rate_begins_anew_where_a_stage_says_so():
    stages = [Stage("a", 4), Stage("b", 6), Stage("c", 5, restart_learning_rate=True)]
    make = lambda length: lr_lambda("cosine", 2, length)  # noqa: E731
    found = [staged(make, stages)(step) for step in range(15)]
    whole, last = make(10), make(5)
    assert found == [*(whole(step) for step in range(10)), *(last(step) for step in range(5))]
    assert found[0] == found[10] == 0.0, "warm-up too"
    assert staged(make, [Stage("all", 15)])(9) == make(15)(9)
    assert staged(make, stages)(40) == last(30), "a resumed run may be longer"


class Following:
    """The student learns a number that is one higher in each stage; a frozen role keeps what it was in the last."""

    name = "following"

    def updates(self, context, batch, step):
        t = SCHEDULE.grid(4).times[2:3].expand(len(batch))
        losses = (context.predict("student", batch.latents, t, batch.cond).x0 - context.stage.index).square().mean(1)
        yield Update("student", losses.mean())


def make_loop(*, ema=None):
    grid = SCHEDULE.grid(4)
    family = GaussianFamily(SCHEDULE, "flow", torch.cat([grid.previous[:1], grid.times]))
    roles = [Role("teacher"), Role("student", trains="full"), Role("frozen", copy_of="student")]
    networks = Networks(family, roles, lora=None, seed=0, parameter_dtype=torch.float64, ema_decay=ema)
    context = Context(Runtime(family, networks, seed=0, device=torch.device("cpu"), stages=THREE))
    parameters = networks.parameters("student")
    optimizer = RoleOptimizer(
        torch.optim.Adam(parameters, lr=0.1), parameters, learning_rate=0.1, schedule=lambda _: 1.0, max_grad_norm=0
    )
    loop = Loop(Following(), context, networks, {"student": optimizer}, health=HealthMonitor(1), stages=THREE)  # type: ignore[arg-type]
    return loop, networks, optimizer


def copies(networks, role):
    return [p.detach().clone() for p in networks.named_parameters(role).values()]


def same(ours, theirs):
    return all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("ema", [None, 0.5])
def test_what_a_stage_asks_for_happens_before_its_first_step_and_only_then(ema):
    loop, networks, optimizer = make_loop(ema=ema)
    teacher = copies(networks, "frozen")
    for step in range(6):
        student, frozen = copies(networks, "student"), copies(networks, "frozen")
        wanted = [p.clone() for p in networks.average.averages] if networks.average else student
        loop.step(step, [gaussian_batch(step, 8, mean=0.6)])
        now = copies(networks, "frozen")
        assert same(now, wanted if step == 2 else frozen), step
        taken = {int(state["step"]) for state in optimizer.optimizer.state.values()}
        assert taken == {step + 1 if step < 2 else step - 1}, "moments begin anew at step 2 and go on at step 5"
        if step < 2:
            assert same(now, teacher), "a copy starts as the teacher"


def test_a_loop_that_starts_inside_a_stage_does_not_begin_it_again():
    loop, networks, _ = make_loop()
    before = copies(networks, "frozen")
    for parameter in networks.parameters("student"):
        parameter.data += 1
    loop.step(3, [gaussian_batch(3, 8, mean=0.6)])
    assert same(copies(networks, "frozen"), before)


def test_the_context_gives_the_method_its_stage():
    loop, *_ = make_loop()
    t = SCHEDULE.grid(4).times[2:3].expand(8)
    for step, index in enumerate([0, 0, 1, 1, 1, 2]):
        batch = gaussian_batch(step, 8, mean=0.6)
        x_0 = loop.context.predict("student", batch.latents, t, batch.cond).x0
        loss = loop.step(step, [batch]).metrics["loss"]
        torch.testing.assert_close(loss, (x_0 - index).square().mean().detach())


SHORT = {
    "distillation_method": "halves",
    "distillation_config": {},
    "plugins": [str(PLUGIN)],
    "validation_step_interval": 0,
    "checkpoint_step_interval": 1,
    "gradient_accumulation_steps": 1,
}


def test_a_run_with_other_stage_boundaries_is_not_resumed(tmp_path):
    """Two halves of 4 begin at 2; of 6, at 3: what was trained in the second is not the other's."""
    execute(write_run(tmp_path, max_train_steps=4, **SHORT))
    with pytest.raises(UserError, match=r"stages began at steps \[2\], this run's at \[3\]"):
        execute(write_run(tmp_path, max_train_steps=6, **SHORT))
    rows = losses(tmp_path / "out")
    assert len(rows) == 4, "nothing was lost"
    assert all(math.isfinite(loss) for _, loss, _ in rows)
