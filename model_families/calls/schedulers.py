"""The schedulers of diffusers that images are made with.

Where samplers begin and end, for T training timesteps and N steps (a method chooses by its :class:`Sampler`):

    DDIMScheduler, timestep_spacing="trailing"
        T - 1, T - 1 - T/N, ..., and a last step to the data; with set_alpha_to_one=False it ends at alpha_0 instead.
        Where N does not divide T, diffusers' steps end up to a timestep away from where the next begins, and the
        last one ends at alpha_0 where T/N has a fraction of one half or more.
    TCDScheduler, original_inference_steps=M; the call's eta is the paper's gamma (0 where it is not given)
        N points of the grid (i + 1) T/M - 1, from T - 1 down; the last step ends at t = 0 of the table, alpha_0.
    EulerDiscreteScheduler, timestep_spacing="trailing"
        the times of DDIM and exactly its steps, to the data; but it begins from sigma_T eps, not eps (sigma_T = 0.998),
        and with zero terminal SNR from alpha_T = 2^-12 instead of 0.
    LCMScheduler, the call's ``timesteps`` if named
        consistency functions with noise between them; ends at the data.
    FlowMapScheduler (:mod:`...core.diffusion.flow_map`)
        the times of DDIM for any N, each step ending where the next begins, the last at the data; on a flow shift(i/N).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...core.diffusion.schedule import Schedule, from_scheduler_config, is_flow, is_solver_of_flow
from ...core.diffusion.second_time import SCHEDULER
from ...core.errors import UserError
from ..files.reading import quiet_libraries

if TYPE_CHECKING:
    from ...core.diffusion.sampler import Sampler

NOISE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "shift",
)
"""Keys that belong to the model, not to its scheduler: kept when another scheduler class takes over."""
TABLE_KEYS = {"beta_start", "beta_end", "beta_schedule"}
"""Arguments by which a scheduler's class is known to have a table of betas."""
OWN_TIMES = {
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling"),
}
"""Keys of the model's own steps: they would move the times that a method names, or add noise between its steps."""
ENDS: Mapping[str, Any] = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True}
"""Defaults that override the model's: latents are never clipped, and the last step ends at the data."""


def build_scheduler(model_config: Mapping[str, Any], sampler: Sampler | None) -> Any:
    """Build the sampler's scheduler over the model's noise process; the model's own scheduler without a sampler."""
    with quiet_libraries():
        own = diffusers_scheduler(model_config)
        if sampler is None:
            return _for_unets(own)
        kind = _scheduler_class(sampler.scheduler)
        accepted = set(inspect.signature(kind.__init__).parameters) - {"self"}
        if unknown := set(sampler.config) - accepted:
            raise ValueError(f"{sampler.scheduler} takes no {', '.join(sorted(unknown))}; it has {sorted(accepted)}")
        given = (set(model_config) | set(NOISE_KEYS)) - set(ENDS) - OWN_TIMES
        if sampler.config.get("timestep_spacing") == "leading":
            given -= {"steps_offset"}  # part of the model's own spacing; others do not read it, and pipelines ask for 1
        base = {key: value for key, value in own.config.items() if key in accepted and key in given}
        base |= {key: value for key, value in ENDS.items() if key in accepted}
        if sampler.scheduler == SCHEDULER:
            base["prediction_type"] = from_scheduler_config(model_config)[1]  # flow schedulers have no such key
        scheduler = _for_unets(kind.from_config({**base, **sampler.config}))
        return _ignoring_mu(scheduler) if is_flow(model_config) else scheduler


def noise_defaults(model: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the noise that a model's scheduler config leaves to the defaults of its class.

    Args:
        model: The model, for messages.
        config: Its ``scheduler_config.json``.

    Raises:
        UserError: The class is none of diffusers', or its noise is neither a table of betas nor a flow.
    """
    name = str(config.get("_class_name"))
    kind = _class_of(name)
    if kind is None:
        raise UserError(
            f"model {model!r} has the scheduler {name}, which this version of diffusers lacks "
            "(scheduler/scheduler_config.json: _class_name)",
            "name a scheduler of diffusers that the model was trained for, as EulerDiscreteScheduler",
        )
    if needed := getattr(kind, "_backends", None):  # diffusers' stand-in where a package is missing
        raise UserError(
            f"model {model!r} has the scheduler {name}, which needs {', '.join(needed)}",
            "install what is missing with pip",
        )
    defaults = {key: one.default for key, one in inspect.signature(kind.__init__).parameters.items()}
    if not is_flow(config) and not defaults.keys() >= TABLE_KEYS:
        raise UserError(
            f"model {model!r} has the scheduler {name}, whose noise is neither a table of betas (DDPM) nor a flow "
            "(scheduler/scheduler_config.json: _class_name)",
            "name a model that was trained on one of these; EDM's (Playground v2.5, CosXL) and consistency models "
            "cannot be distilled by this family",
        )
    half = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if half and not is_flow(config):
        raise UserError(
            f"model {model!r} is trained on a flow, but its scheduler {name} has a table of betas "
            "(scheduler/scheduler_config.json: use_flow_sigmas, prediction_type)",
            "set _class_name to FlowMatchEulerDiscreteScheduler, and shift to the model's (flow_shift)",
        )
    return {key: value for key, value in defaults.items() if key in NOISE_KEYS}


def check_table(model: str, config: Mapping[str, Any], schedule: Schedule) -> None:
    """Raise UserError unless diffusers' own table of this scheduler config is that of `schedule`."""
    table = getattr(getattr(diffusers_scheduler(config), "alphas_cumprod", None), "double", lambda: None)()
    if table is None or is_flow(config):
        return
    ours = schedule.alpha(torch.arange(len(table))) ** 2
    if not torch.allclose(ours, table, rtol=1e-3, atol=1e-6):
        raise UserError(
            f"model {model!r}: the noise of its scheduler {config['_class_name']} is not the table of betas that its "
            "config names (scheduler/scheduler_config.json)",
            "name a scheduler of diffusers with a plain table of betas that the model was trained for, as "
            "EulerDiscreteScheduler",
        )


def diffusers_scheduler(config: Mapping[str, Any]) -> Any:
    """Return the scheduler that a config describes, as diffusers makes it."""
    import diffusers

    with quiet_libraries():
        return getattr(diffusers, config["_class_name"]).from_config(dict(config))


def _class_of(name: str) -> Any:
    import diffusers

    kind = getattr(diffusers, name, None)
    scheduler = isinstance(kind, type) and (issubclass(kind, diffusers.SchedulerMixin) or hasattr(kind, "_backends"))
    return kind if scheduler else None


def _scheduler_class(name: str) -> Any:
    import diffusers

    if name == SCHEDULER:
        from ...core.diffusion.flow_map import FlowMapScheduler

        return FlowMapScheduler
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no scheduler {name!r}")
    return kind


def _for_unets(scheduler: Any) -> Any:
    """Give a flow scheduler two attributes that pipelines with a UNet ask for, with neutral values."""
    if not hasattr(scheduler, "init_noise_sigma"):
        scheduler.init_noise_sigma = 1.0
    if not hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input = lambda sample, timestep=None: sample
    return scheduler


def _ignoring_mu(scheduler: Any) -> Any:
    """Let ``set_timesteps`` take and ignore the shift mu that pipelines of flows give to every scheduler: a sampler has
    the shift of its run.
    """
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def called(*args: Any, mu: float | None = None, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)

    scheduler.set_timesteps = called
    return scheduler


def linear_mu(config: Mapping[str, Any], num_positions: int) -> float:
    """Return the mu of images of `num_positions`, as most pipelines of flows do.

    It is linear in the number of positions that the transformer sees: base_shift at base_image_seq_len, max_shift at
    max_image_seq_len (arXiv 2403.03206).
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (top - base) * (num_positions - low) / (high - low)


def with_fixed_shift(config: Mapping[str, Any], *, mu: float) -> dict[str, Any]:
    """Return a scheduler config whose shift is fixed to that of `mu`.

    Pipelines shift s to m s / (1 + (m - 1) s) with m = exp(mu), or mu itself (``time_shift_type`` linear). Configs
    without ``use_dynamic_shifting`` keep theirs. ``shift_terminal``, to which a pipeline stretches the last of its own
    times, is left out: it would move those that a method names. Solvers that are set to a flow become the flow that
    they solve.
    """
    if is_solver_of_flow(config):
        kept = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": config.get("flow_shift", 1.0)}
        return {**kept, "num_train_timesteps": config.get("num_train_timesteps", 1000)}
    config = {key: value for key, value in config.items() if key != "shift_terminal"}
    if not config.get("use_dynamic_shifting"):
        return dict(config)
    shift = mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)
    return {**config, "use_dynamic_shifting": False, "shift": shift}
