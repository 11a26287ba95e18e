"""Schedules and predictions against diffusers' schedulers and closed forms."""

import math

import pytest
import torch
from distill.core.diffusion import DDPMSchedule, FlowSchedule, Prediction, classifier_free_guidance, scale_from_paper
from distill.core.diffusion.prediction import PREDICTION_TYPES
from distill.core.errors import UserError

SDXL = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES = {
    "ddpm": DDPMSchedule.from_config(SDXL),
    "cosine": DDPMSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"}),
    "zero-snr": DDPMSchedule.from_config({**SDXL, "rescale_betas_zero_snr": True}),
    "flow": FlowSchedule(shift=3.0),
}


def times(schedule, n=7):
    t = torch.linspace(0.05, 0.9, n, dtype=torch.float64) * schedule.t_max
    return t.round() if isinstance(schedule, DDPMSchedule) else t


@pytest.mark.parametrize(
    "extra", [{}, {"rescale_betas_zero_snr": True}, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}]
)
def test_the_ddpm_table_equals_diffusers(extra):
    from diffusers import DDIMScheduler

    config = {**SDXL, **extra}
    theirs = DDIMScheduler(**config).alphas_cumprod.double()
    ours = DDPMSchedule.from_config(config)
    t = torch.arange(1000)
    torch.testing.assert_close(ours.alpha(t), theirs.sqrt(), rtol=3e-4, atol=5e-6)  # theirs is rounded to fp32
    torch.testing.assert_close(ours.sigma(t), (1 - theirs).sqrt(), rtol=3e-4, atol=5e-6)  # theirs is rounded to fp32


@pytest.mark.parametrize("name", SCHEDULES)
def test_derivatives_match_finite_differences(name):
    schedule = SCHEDULES[name]
    t, h = times(schedule) + (0.5 if isinstance(schedule, DDPMSchedule) else 0.0), 1e-4
    for value, derivative in [(schedule.alpha, schedule.alpha_dot), (schedule.sigma, schedule.sigma_dot)]:
        numeric = (value(t + h) - value(t - h)) / (2 * h)
        torch.testing.assert_close(derivative(t), numeric, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_of_log_snr_inverts_log_snr(name):
    schedule = SCHEDULES[name]
    t = times(schedule)
    torch.testing.assert_close(schedule.time_of_log_snr(schedule.log_snr(t)), t, rtol=1e-6, atol=1e-6)


def test_zero_terminal_snr_is_exactly_zero():
    assert SCHEDULES["zero-snr"].zero_terminal_snr
    assert SCHEDULES["zero-snr"].alpha(torch.tensor([999])).item() == 0.0
    assert not SCHEDULES["ddpm"].zero_terminal_snr


@pytest.mark.parametrize("name", ["ddpm", "cosine", "flow"])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_every_prediction_type_gives_back_x0_and_eps(name, kind):
    schedule = SCHEDULES[name]
    t = times(schedule)
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, len(t), 3, 2, 2, 2, generator=generator, dtype=torch.float64)  # 5-D latents
    x_t = schedule.add_noise(x_0, eps, t)
    alpha, sigma = schedule.coefficients(t, x_t)
    raw = {"epsilon": eps, "sample": x_0, "v_prediction": alpha * eps - sigma * x_0, "flow": eps - x_0}[kind]
    prediction = Prediction(raw, x_t, t, schedule, kind)
    torch.testing.assert_close(prediction.x0, x_0)
    torch.testing.assert_close(prediction.eps, eps)
    for other in PREDICTION_TYPES:
        again = Prediction(prediction.as_type(other), x_t, t, schedule, other)
        torch.testing.assert_close(again.x0, x_0)
    torch.testing.assert_close(prediction.ddim_step(t), x_t)


def test_half_precision_is_converted_in_fp32():
    schedule = SCHEDULES["ddpm"]
    x = torch.randn(2, 4, 4, 4).half()
    prediction = Prediction(x, x, torch.tensor([999, 19]), schedule, "epsilon")
    assert prediction.x0.dtype == prediction.eps.dtype == torch.float32


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddim_step_equals_diffusers_ddim_step(kind):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        **SDXL, prediction_type=kind, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
    )
    theirs.set_timesteps(50)
    schedule = SCHEDULES["ddpm"]
    x_t, raw = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64)
    for t in (999, 499, 39):
        ours = Prediction(raw, x_t, torch.tensor([t]), schedule, kind).ddim_step(torch.tensor([t - 20]))
        expected = theirs.step(raw, t, x_t).prev_sample
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_ddim_step_equals_diffusers_euler_step_on_a_flow():
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(8)
    schedule = FlowSchedule(shift=3.0)
    x, v = torch.randn(2, 1, 4, 4, 4)
    sigma, following = theirs.sigmas[2:4].double()
    ours = Prediction(v, x, sigma[None], schedule, "flow").ddim_step(following[None])
    expected = theirs.step(v, theirs.timesteps[2], x).prev_sample
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_the_ddpm_grid_is_that_of_the_lcm_paper():
    grid = SCHEDULES["ddpm"].grid(50)
    assert grid.times[:2].tolist() == [19, 39]
    assert grid.previous[:2].tolist() == [0, 19]
    assert grid.times[-1] == 999
    with pytest.raises(UserError, match="1001"):
        SCHEDULES["ddpm"].grid(1001)


def test_flow_grid_is_shifted_once_and_ends_clean():
    grid = FlowSchedule(shift=3.0).grid(4)
    assert grid.previous[0] == 0
    assert grid.times[-1] == 1
    torch.testing.assert_close(grid.times[0].item(), 3 * 0.25 / (1 + 2 * 0.25))
    assert torch.equal(grid.times[:-1], grid.previous[1:])


def test_guidance_conventions_agree():
    schedule, t = SCHEDULES["ddpm"], torch.tensor([499, 19])
    x_t, c, u = torch.randn(3, 2, 4, 4, 4, dtype=torch.float64)
    cond, uncond = (Prediction(raw, x_t, t, schedule, "epsilon") for raw in (c, u))
    w = torch.tensor([2.0, 6.5], dtype=torch.float64)
    ours = classifier_free_guidance(cond, uncond, scale_from_paper(w))
    paper = cond.x0 + w.reshape(2, 1, 1, 1) * (cond.x0 - uncond.x0)
    torch.testing.assert_close(ours.x0, paper)
    # guided x0 and eps still make up x_t
    torch.testing.assert_close(ours.ddim_step(t), x_t)
    same = classifier_free_guidance(cond, uncond, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(same.eps, c)


def test_perfect_denoiser_integrates_to_the_exact_flow_map():
    """Many DDIM steps of the closed-form Gaussian denoiser approach the exact ODE map of reference lcm.md."""
    m, q = 0.7, 0.4
    for name in ("ddpm", "flow"):
        schedule = SCHEDULES[name]
        grid = schedule.grid(1000)
        u = grid.times[0]
        x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

        def variance(t, schedule=schedule):
            return schedule.alpha(t) ** 2 * q**2 + schedule.sigma(t) ** 2

        top = grid.times[-1]
        if name == "flow":
            top = grid.times[-2]
        exact = schedule.alpha(u) * m + (variance(u) / variance(top)).sqrt() * (x - schedule.alpha(top) * m)
        state = x
        start = len(grid) - (2 if name == "flow" else 1)
        for j in range(start, 0, -1):
            t = grid.times[j].expand(len(x))
            a = schedule.alpha(t)[:, None]
            denoised = m + a * q**2 * (state - a * m) / variance(t)[:, None]
            state = Prediction(denoised, state, t, schedule, "sample").ddim_step(grid.previous[j].expand(len(x)))
        assert (state - exact).abs().max() < 0.01 * exact.std()
        assert math.isfinite(state.sum())
