"""Checks that a family's `predict` agrees with its pipeline: the same image from the same noise, step by step and by
`generate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..diffusion.solvers import deterministic_sampler, step_to, trailing_timesteps
from ..engine.networks import Networks
from ..plugin_api.batch import Conditioning
from ..plugin_api.context import Context, Runtime
from ..plugin_api.method import Role
from .checks import NotApplicable, expect, failing
from .model import SEEDS

if TYPE_CHECKING:
    from .model import Model

NUM_STEPS = 2
GUIDED, UNGUIDED = 3.0, 1.0
TOLERANCE = 1e-4
"""Tolerance of pixels in [0, 1], between two computations in float32."""


def loop_is_generate(model: Model, guidance: float) -> None:
    """Check that two deterministic steps with the family's own prediction make the pipeline's image, a wide one."""
    width, height = 2 * model.edge, model.edge
    family = model.make(size=(width, height))
    if guidance == UNGUIDED and family.guided_by_input:
        raise NotApplicable("its network takes the guidance as an input, and is never without")
    shape = (1, family.latent_channels, height // family.scale_factor, width // family.scale_factor)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    networks = Networks(family, [Role("teacher")], lora=None, seed=0)
    sampler = deterministic_sampler(family.schedule, NUM_STEPS, guidance)
    making = failing("generate()", "it makes images (B, 3, H, W) in [0, 1]")
    with networks.use("teacher") as network, _inputs(network) as seen, torch.no_grad(), making:
        theirs = family.generate(network, model.embeds, sampler=sampler, seeds=SEEDS, width=width, height=height)
    # of the first sample alone where images are made one by one
    if not any(_same_numbers(each, part) for each in seen for part in (noise, noise[:1])):
        raise NotApplicable(
            "generate() draws its noise otherwise than torch.randn((1, C, h, w), generator=...) for each seed, so that "
            "its images cannot be compared with steps along predict()"
        )
    context = Context(Runtime(family, networks, seed=0, device=torch.device("cpu")))
    with failing("predict()", "it takes x_t (B, C, h, w), time (B,) and what condition() returned"), torch.no_grad():
        cond = model.conditioning(original=height, crop=0, size=(height, width))
        ours = family.decode_latents(_sampling_loop(context, noise, cond, guidance))
    distance = float((ours - theirs).abs().max())
    how = "without guidance" if guidance == UNGUIDED else f"with guidance {guidance:g}"
    remedy = (
        "predict() must call the network as the pipeline's loop does: the prompt, the time and its direction, the sign "
        "of the output, rows before columns, and what is put around the prompt in encode_prompts()"
        if guidance == UNGUIDED
        else "the pipeline must guide by uncond + g (cond - uncond), with the unconditional of uncond(): switch off "
        "what it does besides (in guidance_call() of DiffusersFamily)"
    )
    expect(distance <= TOLERANCE, f"{NUM_STEPS} steps along predict() {how} end {distance:.2g} away from the image "
           "of generate() from the same noise (pixels in [0, 1])", remedy)  # fmt: skip


def _sampling_loop(context: Context, x: Tensor, cond: Conditioning, guidance: float) -> Tensor:
    timesteps, size = trailing_timesteps(context.schedule, NUM_STEPS), len(x)
    scale = torch.full((size,), guidance, dtype=torch.float64)
    for step in range(NUM_STEPS):
        t = timesteps.times[step].expand(size)
        x = step_to(context.predict_guided(x, t, cond, scale), timesteps.at(torch.full((size,), step + 1))).float()
    return x


@contextmanager
def _inputs(network: nn.Module) -> Iterator[list[Tensor]]:
    """Yield the floating-point tensors of the network's first call inside the block."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen:
            values = [*args, *kwargs.values()]
            seen.extend(each for each in values if isinstance(each, Tensor) and each.is_floating_point())

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _same_numbers(found: Tensor, noise: Tensor) -> bool:
    """Return True if `found` holds the numbers of `noise`, in any order and repeated or not (packed, doubled)."""
    wanted, there = noise.unique(), found.float().unique()
    return found.numel() % noise.numel() == 0 and len(there) == len(wanted) and torch.allclose(there, wanted)
