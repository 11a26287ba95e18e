"""The reusable loss terms: identities, limits, gradients and optima that are known."""

from __future__ import annotations

import math

import pytest
import torch
from distill.core.diffusion import FlowSchedule, Prediction
from distill.core.diffusion.consistency import boundary_scalings, consistency_function, trajectory_function
from distill.core.diffusion.prediction import PREDICTION_TYPES
from distill.core.diffusion.regression import distance, error_weight, truncated_snr
from distill.core.diffusion.weights import Weight, ever_positive, weight_at
from distill.core.testing.paths import PATHS, TABLE, ZERO_SNR
from pydantic import TypeAdapter, ValidationError

FLOW = FlowSchedule(shift=3.0)
X = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)


def said(schedule, kind, x_t, t, x_0, eps):
    """A prediction that says (x_0, eps) at x_t, in the parametrisation `kind`."""
    pair = Prediction(x_0, x_t, t, schedule, "sample")
    object.__setattr__(pair, "eps", eps)
    return Prediction(pair.as_type(kind), x_t, t, schedule, kind)


# -- consistency ------------------------------------------------------------------------------------------------------


def test_scalings_are_those_of_the_scheduler_that_samples():
    from diffusers import LCMScheduler

    t = torch.tensor([0, 19, 259, 999])
    for factor in (10.0, 1.0):
        scheduler = LCMScheduler(timestep_scaling=factor)
        ours = torch.stack(boundary_scalings(t, timestep_scaling_factor=factor))
        theirs = [scheduler.get_scalings_for_boundary_condition_discrete(float(time)) for time in t]
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64).T, rtol=1e-12, atol=0)


def test_boundary_scalings_keep_x_at_time_zero_and_use_the_network_far_from_it():
    c_skip, c_out = boundary_scalings(torch.arange(1000), timestep_scaling_factor=10.0)
    assert (c_skip[0], c_out[0]) == (1, 0), "exactly"
    torch.testing.assert_close(c_skip + c_out**2, torch.ones_like(c_skip))
    assert (c_skip.diff() < 0).all()
    assert c_skip[-1] < 1e-8


@pytest.mark.parametrize("path", PATHS)
def test_the_consistency_function_is_the_identity_at_time_zero_whatever_the_network_predicts(path):
    kind, schedule = PATHS[path]
    t = torch.zeros(4, dtype=torch.float64 if schedule.clean_at_zero else torch.int64)
    raw = torch.full_like(X, 7.0)
    found = consistency_function(Prediction(raw, X, t, schedule, kind), timestep_scaling_factor=10.0)
    assert torch.equal(found, X)


@pytest.mark.parametrize("path", PATHS)
def test_the_consistency_function_maps_a_straight_trajectory_to_its_end_up_to_the_skip(path):
    """A network that knows (x_0, eps) of the path says x_0 everywhere: f = x_0 on a flow, c_skip x + c_out x_0 else."""
    kind, schedule = PATHS[path]
    x_0, eps = X, X.flip(0).cos()
    times = schedule.grid(5).times
    for t in times[:-1] if schedule.zero_terminal_snr and kind == "epsilon" else times:
        t = t.expand(4)
        x_t = schedule.add_noise(x_0, eps, t)
        found = consistency_function(said(schedule, kind, x_t, t, x_0, eps), timestep_scaling_factor=10.0)
        c_skip = 0.0 if schedule.clean_at_zero else 0.25 / ((10 * t[0].item()) ** 2 + 0.25)
        torch.testing.assert_close(found, c_skip * x_t + math.sqrt(1 - c_skip) * x_0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_the_trajectory_function_follows_the_trajectory_and_is_the_identity_at_its_own_time(path):
    kind, schedule = PATHS[path]
    x_0, eps = X, X.flip(0).cos()
    times = schedule.grid(8).times
    t, s = times[6].expand(4), times[torch.tensor([0, 2, 5, 6])]
    x_t = schedule.add_noise(x_0, eps, t)
    prediction = said(schedule, kind, x_t, t, x_0, eps)
    found = trajectory_function(prediction, s)
    torch.testing.assert_close(found, schedule.add_noise(x_0, eps, s), rtol=1e-9, atol=1e-9)
    assert torch.equal(found[3], x_t[3]), "bitwise at s = t, whatever the network says"
    assert not torch.equal(found[2], x_t[2])


def test_at_the_boundary_no_gradient_reaches_the_network():
    raw = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([499, 499])
    prediction = Prediction(raw, X[:2], t, TABLE, "epsilon")
    trajectory_function(prediction, torch.tensor([499, 259])).sum().backward()
    assert raw.grad is not None
    assert (raw.grad[0] == 0).all()
    assert (raw.grad[1] != 0).all()


# -- regression -------------------------------------------------------------------------------------------------------


def test_distances_are_means_over_each_sample():
    output, target = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2) * torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
    assert distance(output, target, loss_type="l2", huber_c=1.0).tolist() == [1.0, 9.0]
    c = 0.5
    expected = [math.sqrt(d**2 + c**2) - c for d in (1.0, 3.0)]
    assert distance(output, target, loss_type="huber", huber_c=c).tolist() == pytest.approx(expected)


def test_huber_is_a_square_for_small_and_a_distance_for_large_errors():
    c = 1e-3
    d = torch.tensor([[1e-6], [1e3]], dtype=torch.float64, requires_grad=True)
    small, large = distance(d, torch.zeros_like(d), loss_type="huber", huber_c=c)
    assert small.item() == pytest.approx(1e-12 / (2 * c), rel=1e-3)
    assert large.item() == pytest.approx(1e3 - c, rel=1e-9)
    (slope,) = torch.autograd.grad(large, d)
    assert slope[1].item() == pytest.approx(1.0, rel=1e-9), "an outlier pulls no harder than any other"


@pytest.mark.parametrize("schedule", [TABLE, FLOW], ids=["table", "flow"])
def test_weights_turn_the_error_of_x0_into_that_of_every_other_prediction(schedule):
    """x_0^ and eps^ of one prediction err along one line: each error is a multiple of x_0's."""
    t = schedule.grid(6).times[torch.tensor([0, 2, 4, 5])]
    x_0, eps = X, X.flip(0).cos()
    x_t = schedule.add_noise(x_0, eps, t)
    truth, guess = (Prediction(x, x_t, t, schedule, "sample") for x in (x_0, x_0 + X.sin()))
    square = {kind: (guess.as_type(kind) - truth.as_type(kind)).square().mean(1) for kind in PREDICTION_TYPES}

    def weighted(kind, prediction_type="epsilon"):
        return error_weight(schedule, t, kind=kind, prediction_type=prediction_type) * square["sample"]

    def equal(ours, theirs):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)

    equal(weighted("truncated_snr"), torch.maximum(square["sample"], square["epsilon"]))
    for kind, error in square.items():
        equal(weighted("trained_space", kind), error)
    equal(weighted("v_error"), square["flow" if schedule.clean_at_zero else "v_prediction"])
    if not schedule.clean_at_zero:  # alpha^2 + sigma^2 = 1
        equal(weighted("snr_plus_one"), square["v_prediction"])
    assert torch.equal(
        error_weight(schedule, t, kind="truncated_snr", prediction_type="epsilon"), truncated_snr(schedule.log_snr(t))
    )


def test_snr_plus_one_is_not_the_error_of_the_velocity_on_a_flow():
    """At t = 0.5 the velocity's weight is 4 and SNR + 1 is 2; at 0.1, 100 and 82."""
    t = torch.tensor([0.5, 0.1, 1.0], dtype=torch.float64)
    found = {
        kind: error_weight(FLOW, t, kind=kind, prediction_type="flow").tolist()
        for kind in ("v_error", "trained_space", "snr_plus_one")
    }
    assert found["v_error"] == found["trained_space"] == pytest.approx([4, 100, 1])
    assert found["snr_plus_one"] == pytest.approx([2, 82, 1])


def test_weights_of_the_four_steps_of_sdxl_in_eps():
    """max(SNR, 1) on x_0 weighs an eps network's errors 214 : 16.7 : 2.6 : 1; the space it is trained in, alike."""
    t = torch.tensor([999, 749, 499, 249])

    def of_eps(kind):
        of_x0 = error_weight(TABLE, t, kind=kind, prediction_type="epsilon")
        return (of_x0 / error_weight(TABLE, t, kind="trained_space", prediction_type="epsilon")).tolist()

    assert of_eps("truncated_snr") == pytest.approx([214, 16.7, 2.6, 1], rel=0.02)
    assert of_eps("trained_space") == pytest.approx([1, 1, 1, 1])


# -- weights ----------------------------------------------------------------------------------------------------------

ADAPTER = TypeAdapter(Weight)


def test_weights_are_linear_between_the_steps_named_and_constant_beyond():
    weight = ADAPTER.validate_python({"100": 0, "200": "0.5", 300: 0.1})
    steps = [0, 100, 150, 200, 250, 300, 10_000]
    assert [weight_at(weight, step) for step in steps] == pytest.approx([0, 0, 0.25, 0.5, 0.3, 0.1, 0.1])
    assert weight_at(ADAPTER.validate_python(2), 7) == 2.0
    assert weight_at(ADAPTER.validate_python({"5": 3.0}), 0) == 3.0


def test_the_order_of_a_weights_steps_does_not_matter():
    assert [weight_at({10: 1.0, 0: 0.0}, step) for step in range(11)] == pytest.approx([s / 10 for s in range(11)])


def test_a_weight_survives_json():
    weight = ADAPTER.validate_python({0: 0.0, 500: 0.25})
    assert ADAPTER.validate_json(ADAPTER.dump_json(weight)) == weight


@pytest.mark.parametrize(
    "wrong", [-0.1, {"0": -1}, {}, {"-3": 1}, {"x": 1}, {"1.5": 1}, float("nan"), float("inf"), "much", None]
)
def test_wrong_weights_are_refused(wrong):
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(wrong)


def test_a_term_is_used_if_its_weight_is_ever_positive():
    assert [ever_positive(weight) for weight in (0.0, 1e-9, {0: 0.0}, {0: 0.0, 9: 1.0})] == [False, True, False, True]


def test_zero_terminal_snr_has_a_consistency_function_in_v_and_x0():
    t = torch.full((4,), 999)
    for kind in ("v_prediction", "sample"):
        found = consistency_function(Prediction(X.cos(), X, t, ZERO_SNR, kind), timestep_scaling_factor=10.0)
        assert found.isfinite().all()
