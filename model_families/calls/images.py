"""Image generation with the plain diffusers pipeline around a network."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...core.errors import UserError
from ..files.reading import quiet_libraries

if TYPE_CHECKING:
    from ...core.diffusion.sampler import Sampler
    from ..files.architecture import Architecture


def guidance_scale_embedding(w: Tensor, dim: int) -> Tensor:
    """Return the sinusoid of 1000 w that diffusers' pipelines feed to ``time_cond_proj`` (arXiv 2210.03142).

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


def build_pipeline(architecture: Architecture, network: nn.Module, scheduler: Any, *, scale_factor: int) -> Any:
    """Build the plain pipeline without text encoders and autoencoder: embeddings in, latents out."""
    with quiet_libraries():
        pipeline = architecture.shell(**{architecture.denoiser: network, "scheduler": scheduler})
    if isinstance(getattr(type(pipeline), "vae_scale_factor", None), property):  # it asks the absent autoencoder
        kind = type(pipeline)
        pipeline.__class__ = type(kind.__name__, (kind,), {"vae_scale_factor": scale_factor})
    else:
        pipeline.vae_scale_factor = scale_factor
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_arguments(
    sampler: Sampler | None,
    *,
    own: tuple[int, float],
    num_inference_steps: int | None,
    guidance_scale: float | None,
    guidance_embedding: bool,
) -> dict[str, Any]:
    """Return the pipeline call's steps, guidance and sampler arguments; `own` steps and guidance without a sampler."""
    default_steps = own[0] if sampler is None else sampler.num_inference_steps
    default_guidance = own[1] if sampler is None else sampler.guidance_scale
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
            f"this network takes the guidance scale as an input and was not trained at {guidance:g} (off): "
            f"its default {default_guidance:g} is used",
            stacklevel=3,
        )
        guidance = default_guidance
    return {"num_inference_steps": steps, "guidance_scale": guidance, **call}


def named_times(architecture: Architecture, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sampler's arguments of the call, its times by the name that the pipeline has for them.

    Raises UserError where the sampler names times on a flow and the pipeline takes none.
    """
    found, taken = dict(call), architecture.call_arguments()
    if "sigmas" not in found or "sigmas" in taken:
        return found
    if "timesteps" not in taken:
        raise UserError(
            f"{architecture.pipeline} takes neither sigmas nor timesteps, by which a few-step student on a flow is run",
            "use a method whose sampler needs no times of its own",
        )
    return {"timesteps": [1000 * sigma for sigma in found.pop("sigmas")], **found}


@torch.no_grad()
def sample_latents(
    pipeline: Any,
    prompts: Mapping[str, Any],
    *,
    noise: Tensor,
    generators: Sequence[torch.Generator],
    size: tuple[int, int],
    call: Mapping[str, Any],
) -> Tensor:
    """Return the latents, not decoded, that one call of the pipeline makes from `noise`.

    Args:
        pipeline: What :func:`build_pipeline` returned.
        prompts: Arguments of the pipeline's call that say what the images show; tensors (B, ...), or lists of B.
        noise: As the pipeline takes it, of the network's type, on its device.
        generators: B generators, for the noise that schedulers draw between steps.
        size: (width, height) in pixels.
        call: Steps, guidance and the call's other arguments.
    """

    def moved(value: Tensor) -> Tensor:
        # masks of whole numbers stay what they are: some pipelines count with them
        return value.to(noise.device, noise.dtype if value.is_floating_point() else None)

    return pipeline(
        **tree_map_only(Tensor, moved, dict(prompts)),
        latents=noise,
        generator=list(generators),
        width=size[0],
        height=size[1],
        output_type="latent",
        return_dict=False,
        **call,
    )[0]


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Keep the network in eval mode (no dropout) inside the block."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
