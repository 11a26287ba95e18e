"""What a step makes host and device do, counted on the miniature: no time is measured, and each number is exact.

A change that merges calls of networks, or takes a read away, changes the numbers here and nothing else.
"""

from __future__ import annotations

import pytest
import torch
from distill import hookimpl
from distill.core.config.load import load_configuration
from distill.core.registry.registry import Registry
from distill.core.runs.run import run
from distill.core.testing.step_counts import CountedCall, StepCounter, StepCounts
from distill.core.utils.spans import FORWARD, span
from support.small_run import write_run
from torch import nn

BATCH, LOGS_EVERY, TURN = 3, 4, 5
CONFIGS = {
    "lcm": {"w_min": 2.0, "w_max": 4.0},
    "dmd2": {"gan_weight": 5e-3, "heads": "strided", "head_levels": "middle", "fake_updates_per_student_update": TURN},
    "pcm": {"adversarial_weight": 0.1},
}
READ_LATER, OWN_FLAG = "core/engine/health.py _read", "core/engine/optimize.py _step_if"
"""Flags of the step before, copied to the host meanwhile; and the flag that the host reads on the CPU alone."""
OF_A_LOG = {"core/engine/metrics.py flush": 1, "core/engine/time_bins.py flush": 1}
ON_THE_HOST = {"core/utils/seeds.py shared_integer": 1, "distill_methods/dmd2.py _times": 1}
"""Reads of tensors that are made on the host, on every device."""


class Counting:
    """A plugin that takes the counts of each step; what is logged after a step counts for the next one."""

    def __init__(self) -> None:
        self.counter, self.steps = StepCounter(), list[StepCounts]()

    @hookimpl
    def on_run_start(self, state):
        self.counter.watch(state.networks)
        self.counter.take()

    @hookimpl
    def on_step_end(self):
        self.steps.append(self.counter.take())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("counted")


@pytest.fixture(scope="module", params=CONFIGS)
def counted(request, folder):
    """A method, and the counts of its steps; the last one comes after a log, and updates dmd2's student."""
    method = request.param
    file = write_run(
        folder, output=method, distillation_method=method, distillation_config={method: CONFIGS[method]},
        train_batch_size=BATCH, gradient_accumulation_steps=1, max_train_steps=TURN, log_step_interval=LOGS_EVERY,
        validation_step_interval=0, checkpoint_step_interval=0, report_to="none",
    )  # fmt: skip
    plugin, registry = Counting(), Registry.load((), installed=False)
    registry.add(plugin, source="test", name="counting")
    configuration = load_configuration(registry, config_file=file)
    with plugin.counter.counting():
        run(configuration, registry)
    return method, plugin.steps


def dmd2_step(calls: int, *, turn: bool) -> dict[str, list[int]]:
    """The calls of a dmd2 step with so many calls of the student in its simulation."""
    before = {"forward student": [BATCH] * (calls - turn)} if calls > turn else {}
    own = {"features fake_score +": [2 * BATCH], "forward fake_score +": [BATCH]}
    if not turn:
        return {**before, **own}
    judged = {"forward fake_score": [BATCH], "forward teacher": [2 * BATCH]}
    of_student = {"forward student +": [BATCH], "features fake_score +": [BATCH, 2 * BATCH]}
    return {**before, **judged, **own, **of_student}


def test_networks_are_called_as_often_as_the_method_says(counted):
    method, steps = counted
    consistency = {"forward teacher": [2 * BATCH], "forward student": [BATCH], "forward student +": [BATCH]}
    adversarial = {"features teacher +": [BATCH], "features teacher": [BATCH]}
    expected = {
        "lcm": [consistency] * TURN,
        "pcm": [consistency | adversarial] * TURN,
        "dmd2": [dmd2_step(calls, turn=n == TURN - 1) for n, calls in enumerate([1, 4, 3, 4, 1])],
    }
    assert [each.rows() for each in steps] == expected[method]


def test_the_host_reads_nothing_of_a_step_but_to_log(counted):
    """What it reads later is there by then, and on a GPU the optimizer's kernel itself reads the flag."""
    method, steps = counted
    roles = {"lcm": 1, "dmd2": 2, "pcm": 2}[method]
    on_the_host = ON_THE_HOST if method == "dmd2" else {}
    third, after_log = steps[2], steps[LOGS_EVERY]
    assert third.reads == {READ_LATER: roles, OWN_FLAG: roles} | on_the_host
    bins = {} if method == "dmd2" else OF_A_LOG  # its student was not updated since the last log
    logged = {"core/engine/metrics.py flush": 1} | bins
    turn = method == "dmd2"
    assert after_log.reads == {READ_LATER: roles, OWN_FLAG: roles + turn} | on_the_host | logged


def test_copies_of_a_step_are_of_numbers_for_a_sample(counted):
    """Bytes that change their type under ``mixed_precision=no``: times and scales, and what dmd2 weighs in float64.

    Latents of the batch are 12,288 bytes in float32; dmd2 subtracts denoised samples that are close to each other.
    """
    method, steps = counted
    assert sum(steps[2].casts.values()) == {"lcm": 948, "dmd2": 62_680, "pcm": 1698}[method]
    assert steps[2].copied_bytes <= 69_120


def test_the_counter_counts_what_it_says():
    counter, network = StepCounter(), nn.Linear(4, 4)
    network.config = {}
    counter.watch({"student": network, "teacher": network})
    x = torch.ones(3, 4)
    with counter.counting():
        with torch.no_grad(), span(FORWARD, "teacher"):
            network(x)
        with span(FORWARD, "student"):
            loss = network(x).double().sum()
        loss.backward()
        assert loss.item() > -1e9
        x.tolist()
        x.clone().copy_(x)
    counts = counter.take()
    assert counts.calls == [CountedCall("forward teacher", 3, False), CountedCall("forward student", 3, True)]
    asked = "tests/test_step_counts.py test_the_counter_counts_what_it_says"
    assert counts.reads == {asked: 2}
    assert counts.casts == {"float32 -> float64": 3 * 4 * 8, "float64 -> float32": 3 * 4 * 4}
    assert counts.copied_bytes == 3 * 4 * 4
    assert counter.take().calls == []
