"""Learning-rate schedules: diffusers' values under diffusers' names."""

import pytest
import torch
from distill.core.engine.lr import SHAPES, lr_lambda, staged
from distill.core.plugin_api.stage import Stage

WARMUP, TOTAL = 5, 40


def reference(name: str, steps: int) -> list[float]:
    from diffusers.optimization import get_scheduler

    extra = {"cosine_with_restarts": {"num_cycles": 3}, "polynomial": {"power": 2.0}}.get(name, {})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=WARMUP, num_training_steps=TOTAL, **extra)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"sine"}))
def test_values_are_those_of_diffusers(name: str) -> None:
    factor = lr_lambda(name, WARMUP, TOTAL, num_cycles=3, power=2.0, end_factor=1e-7 if name == "polynomial" else 0)
    assert [factor(step) for step in range(TOTAL)] == pytest.approx(reference(name, TOTAL), abs=1e-12)


def test_sine_swings_between_full_and_end() -> None:
    factor = lr_lambda("sine", WARMUP, WARMUP + 40, num_cycles=2, end_factor=0.1)
    assert [factor(WARMUP + n) for n in (0, 10, 20, 30, 40)] == pytest.approx([1, 0.1, 1, 0.1, 1])


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_schedule_warms_up_and_stays_in_range(name: str) -> None:
    factor = lr_lambda(name, WARMUP, TOTAL, end_factor=0.2)
    values = [factor(step) for step in range(TOTAL + 10)]  # a resumed run may be longer than was planned
    after = values if name == "constant" else values[WARMUP:]
    assert all(0.2 - 1e-12 <= value <= 1 for value in after)
    assert values[0] == (1.0 if name == "constant" else 0.0)
    assert values[WARMUP] == 1.0
    assert lr_lambda(name, 0, TOTAL)(0) == 1.0


def test_steps_are_optimizer_steps_and_need_no_state() -> None:
    factor = lr_lambda("cosine", WARMUP, TOTAL)
    assert factor(30) == lr_lambda("cosine", WARMUP, TOTAL)(30) == factor(30)


def test_wrong_names_and_missing_totals_are_refused() -> None:
    with pytest.raises(ValueError, match="cosine_with_restarts"):
        lr_lambda("cosin", 0, 10)
    with pytest.raises(ValueError, match="total number of steps"):
        lr_lambda("linear", 0, None)
    assert lr_lambda("constant_with_warmup", 2, None)(1) == 0.5


def test_stages_that_restart_have_warm_up_and_decay_of_their_own_length() -> None:
    stages = [Stage("a", 10), Stage("b", 30, restart_learning_rate=True), Stage("c", 4, restart_learning_rate=True)]
    factor = staged(lambda length: lr_lambda("linear", 2, length), stages)
    expected = [value for length in (10, 30, 4) for value in map(lr_lambda("linear", 2, length), range(length))]
    assert [factor(step) for step in range(44)] == expected
    assert [factor(start) for start in (0, 10, 40)] == [0.0] * 3
    assert factor(44) == 0.0, "past the end the last schedule stays at its end"


def test_stages_that_do_not_restart_share_one_schedule() -> None:
    whole = lr_lambda("cosine", WARMUP, TOTAL)
    for lengths in ((TOTAL,), (7, TOTAL - 7), (1, 2, TOTAL - 3)):
        factor = staged(lambda length: lr_lambda("cosine", WARMUP, length), [Stage("s", n) for n in lengths])
        assert [factor(step) for step in range(TOTAL + 5)] == [whole(step) for step in range(TOTAL + 5)]
    mixed = [Stage("a", 10), Stage("b", 5), Stage("c", 25, restart_learning_rate=True)]
    factor = staged(lambda length: lr_lambda("cosine", WARMUP, length), mixed)
    joint, last = lr_lambda("cosine", WARMUP, 15), lr_lambda("cosine", WARMUP, 25)
    assert [factor(step) for step in range(TOTAL)] == [*map(joint, range(15)), *map(last, range(25))]
