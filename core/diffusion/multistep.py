r"""The stochastic few-step sampler: denoise, renoise to the next time, denoise.

    x_0 = D(x_t1, t1),   x_t2 = alpha_t2 x_0 + sigma_t2 eps,   x_0 = D(x_t2, t2),   ...          t1 > t2 > ...

A one-step student uses a timestep other than T: where alpha_T is small (0.068 for SDXL) the x_0 of an epsilon network
at T is its output times 14.6, and the network need not learn from its timestep that its input is pure noise.

References:
    Song et al., Consistency Models (algorithm 1), arXiv 2303.01469.
    Yin et al., Improved Distribution Matching Distillation (a student of one step at 399), arXiv 2405.14867.
"""

from __future__ import annotations

from ..errors import UserError
from . import Schedule
from .sampler import Sampler

ONE_STEP_SHARE = 0.4
"""Timestep of a one-step student, as a share of the training timesteps of a table of betas."""


def one_step_timestep(schedule: Schedule, asked: int | None, *, key: str) -> float:
    """Return the time, in the schedule's units, at which a one-step student is called (arXiv 2405.14867).

    Args:
        schedule: The model's noise schedule.
        asked: One of the model's training timesteps; None means 399 of 1000, or pure noise on a flow.
        key: The configuration key of `asked`, for the error.

    Raises:
        UserError: There is no such timestep.
    """
    total = schedule.num_train_timesteps
    if asked is not None and asked >= total:
        raise UserError(
            f"{key} = {asked}, but the model has {total} training timesteps",
            f"choose 1 to {total - 1}, or leave it out",
        )
    if schedule.clean_at_zero:
        return schedule.t_max if asked is None else asked / total
    return round(ONE_STEP_SHARE * total) - 1 if asked is None else asked


def multistep_sampler(schedule: Schedule, times: list[float], guidance_scale: float) -> Sampler:
    """Return diffusers' LCMScheduler (FlowMatchLCMScheduler on a flow) at falling `times` in the schedule's units."""
    if schedule.clean_at_zero:
        # the times are shifted already: the scheduler must not do it again
        config = {"shift": 1.0, "use_dynamic_shifting": False}
        return Sampler("FlowMatchLCMScheduler", config, len(times), guidance_scale, {"sigmas": times})
    # every timestep may be asked for by name
    config = {"original_inference_steps": schedule.num_train_timesteps}
    call = {"timesteps": [int(time) for time in times]}
    return Sampler("LCMScheduler", config, len(times), guidance_scale, call)
