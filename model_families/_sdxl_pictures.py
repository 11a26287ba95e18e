"""Pictures by the plain diffusers pipeline around a UNet.

Where samplers begin and end, for T training timesteps and N steps (a method chooses by its :class:`Sampler`):

    DDIMScheduler, timestep_spacing="trailing"
        T - 1, T - 1 - T/N, ..., and a last jump to the data; with set_alpha_to_one=False it ends at alpha_0 instead.
        Where N does not divide T, diffusers' jumps end up to a timestep away from where the next begins, and the
        last one ends at alpha_0 where T/N has a fraction of one half or more.
    TCDScheduler, original_inference_steps=M; the call's eta is the paper's gamma (0 where it is not given)
        N points of the grid (i + 1) T/M - 1, from T - 1 down; the last jump ends at t = 0 of the table, alpha_0.
    EulerDiscreteScheduler, timestep_spacing="trailing"
        the times of DDIM and exactly its jumps, to the data; but it begins from sigma_T eps, not eps (sigma_T = 0.998),
        and with zero terminal SNR from alpha_T = 2^-12 instead of 0.
    LCMScheduler, the call's ``timesteps`` if named
        consistency functions with noise between them; ends at the data.
    FlowMapScheduler (:mod:`..core.flow_map`)
        the times of DDIM for any N, each jump ending where the next begins, the last at the data; on a flow shift(i/N).
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.diffusion.schedule import from_scheduler_config
from ..core.second_time import SCHEDULER
from ._sdxl_files import quiet_libraries

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

    from ..core.batch import Conditioning
    from ..core.method import Sampler

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
"""What belongs to the model, not to its scheduler: kept when another scheduler class takes over."""
ENDS: Mapping[str, Any] = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True}
"""Latents are never clipped, and a last jump ends at the data, unless the sampler says otherwise: never the model's."""
DEFAULT_STEPS, DEFAULT_GUIDANCE = 50, 5.0
"""Those of ``StableDiffusionXLPipeline``, for the model's own scheduler."""


def guidance_scale_embedding(w: Tensor, dim: int) -> Tensor:
    """The sinusoid of 1000 w that diffusers' pipelines feed to ``time_cond_proj``.

    Args:
        w: Guidance scale minus one, shape (B,).
        dim: Width of the embedding; even.

    Returns:
        Shape (B, dim), of w's type in at least float32: sines, then cosines, of frequencies 10000^(-k / (dim/2 - 1)).
    """
    half, dtype = dim // 2, torch.promote_types(w.dtype, torch.float32)
    frequency = torch.exp(torch.arange(half, dtype=dtype, device=w.device) * -(math.log(10000.0) / (half - 1)))
    angle = w.to(dtype)[:, None] * 1000.0 * frequency[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def build_scheduler(model_config: Mapping[str, Any], sampler: Sampler | None) -> Any:
    """The sampler's scheduler over the model's noise process; the model's own scheduler without a sampler."""
    with quiet_libraries():
        import diffusers

        own = getattr(diffusers, model_config["_class_name"]).from_config(dict(model_config))
        if sampler is None:
            return _for_sdxl(own)
        kind = _scheduler_class(sampler.scheduler)
        accepted = set(inspect.signature(kind.__init__).parameters) - {"self"}
        if unknown := set(sampler.config) - accepted:
            raise ValueError(f"{sampler.scheduler} takes no {', '.join(sorted(unknown))}; it has {sorted(accepted)}")
        given = (set(model_config) | set(NOISE_KEYS)) - set(ENDS)
        if "timestep_spacing" in sampler.config:
            given -= {"steps_offset"}  # part of the model's own spacing
        base = {key: value for key, value in own.config.items() if key in accepted and key in given}
        base |= {key: value for key, value in ENDS.items() if key in accepted}
        if sampler.scheduler == SCHEDULER:
            base["prediction_type"] = from_scheduler_config(model_config)[1]  # flow schedulers have no such key
        return _for_sdxl(kind.from_config({**base, **sampler.config}))


def _scheduler_class(name: str) -> Any:
    import diffusers

    if name == SCHEDULER:
        from ..core.flow_map import FlowMapScheduler

        return FlowMapScheduler
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no scheduler {name!r}")
    return kind


def _for_sdxl(scheduler: Any) -> Any:
    """Flow schedulers lack two attributes that the SDXL pipeline asks for; their values are the neutral ones."""
    if not hasattr(scheduler, "init_noise_sigma"):
        scheduler.init_noise_sigma = 1.0
    if not hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input = lambda sample, timestep=None: sample
    return scheduler


def build_pipeline(network: nn.Module, scheduler: Any, *, scale_factor: int) -> StableDiffusionXLPipeline:
    """The plain pipeline without text encoders and autoencoder: embeddings in, latents out."""
    with quiet_libraries():
        from diffusers import StableDiffusionXLPipeline

        absent: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        unet: Any = network
        pipeline = StableDiffusionXLPipeline(unet=unet, scheduler=scheduler, add_watermarker=False, **absent)
    pipeline.vae_scale_factor = scale_factor
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_arguments(
    sampler: Sampler | None,
    *,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    guidance_embedding: bool,
) -> dict[str, Any]:
    """Steps, guidance and the sampler's own arguments of the pipeline call."""
    default_steps = DEFAULT_STEPS if sampler is None else sampler.num_inference_steps
    default_guidance = DEFAULT_GUIDANCE if sampler is None else sampler.guidance_scale
    call = {} if sampler is None else dict(sampler.call)
    steps = default_steps if num_inference_steps is None else num_inference_steps
    fixed = {"sigmas", "timesteps"} & set(call)
    if fixed and steps != default_steps:
        raise ValueError(
            f"the sampler's {fixed.pop()} are for {default_steps} steps: ask the method for one of {steps}"
        )
    guidance = default_guidance if guidance_scale is None else guidance_scale
    if guidance_embedding and guidance <= 1 < default_guidance:
        warnings.warn(
            f"this student takes the guidance scale as an input and was not trained at {guidance:g} (off): "
            f"its default {default_guidance:g} is used",
            stacklevel=3,
        )
        guidance = default_guidance
    return {"num_inference_steps": steps, "guidance_scale": guidance, **call}


@torch.no_grad()
def sample_latents(
    pipeline: StableDiffusionXLPipeline,
    embeds: Conditioning,
    negative: Conditioning | None,
    *,
    seeds: Sequence[int],
    size: tuple[int, int],
    call: Mapping[str, Any],
) -> Tensor:
    """Scaled latents (B, C, h, w) by one call of the pipeline, each from the noise of its own CPU generator.

    Args:
        pipeline: What :func:`build_pipeline` returned.
        embeds: ``prompt_embeds`` (B, T, D) and ``pooled_prompt_embeds`` (B, P).
        negative: The same of the negative prompts, or None without guidance.
        seeds: B seeds.
        size: (width, height) in pixels.
        call: What :func:`call_arguments` returned.
    """
    unet: Any = pipeline.unet
    width, height = size
    device, dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    factor = pipeline.vae_scale_factor
    shape = (1, unet.config.in_channels, height // factor, width // factor)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    prompts = {key: value.to(device, dtype) for key, value in embeds.items()}
    prompts |= {f"negative_{key}": value.to(device, dtype) for key, value in (negative or {}).items()}
    return pipeline(
        **prompts,
        latents=noise.to(device, dtype),
        generator=generators,
        width=width,
        height=height,
        output_type="latent",
        return_dict=False,
        **call,
    )[0]


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout) for as long as it lasts."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
