"""Sampling of images for people and for scores: many prompts and seeds through a family's pipeline, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..diffusion.guidance import guides
from ..engine.fp8_training import exact_products
from ..plugin_api.context import NetworksByRole
from ..utils.eagerly import eagerly

if TYPE_CHECKING:
    from ..diffusion.sampler import Sampler
    from ..plugin_api.batch import Conditioning
    from ..plugin_api.family import ModelFamily

BATCH_PIXELS = 2**18
"""Pixels of one batch: 64 images of 64 px, one of 512 px and above; keeps the autoencoder's peak memory flat."""
LARGEST_BATCH = 64


@dataclass(frozen=True)
class SamplingPlan:
    """The network, sampler, steps and guidance that images are made with.

    Attributes:
        name: For people: ``teacher``, ``student``, ``teacher, DPM++ 2M``.
        role: Role of the network.
        sampler: Its sampler, or None for the model's own scheduler.
        steps: Number of inference steps.
        guidance: Guidance scale; 0 and 1 both mean none.
        optional: Whether it is left out where the family's pipeline does not take the sampler.
    """

    name: str
    role: str
    sampler: Sampler | None
    steps: int
    guidance: float
    optional: bool = False

    @property
    def label(self) -> str:
        """The label of a column, on two lines."""
        return f"{self.name}\n{plural(self.steps, 'step')}, {describe_guidance(self.guidance)}"


def plural(count: int, noun: str) -> str:
    """Return ``1 step`` or ``4 steps``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def describe_guidance(guidance: float) -> str:
    """Return ``guidance 5``, or ``no guidance`` for 0 and 1."""
    return f"guidance {guidance:g}" if guides(guidance) else "no guidance"


@contextmanager
def sampling(networks: NetworksByRole, role: str) -> Iterator[nn.Module]:
    """Yield the role's network in eval mode and without gradients; restore its mode and the global generators after.

    Nothing is compiled or rounded to fp8: it is the network as its users will run it.
    """
    seeds = torch.random.fork_rng(devices=[])
    with networks.use(role) as network, torch.no_grad(), eagerly(), exact_products(), seeds:
        training = network.training
        network.eval()
        try:
            yield network
        finally:
            network.train(training)


def batch_size(width: int, height: int) -> int:
    """Return how many images of this size, in pixels, go through in one batch."""
    return max(1, min(LARGEST_BATCH, BATCH_PIXELS // (width * height)))


def make_images(
    family: ModelFamily,
    network: nn.Module,
    sampling_plan: SamplingPlan,
    embeds: Conditioning,
    which: Sequence[int],
    seeds: Sequence[int],
    *,
    width: int,
    height: int,
    negative: Conditioning | None = None,
) -> Iterator[Tensor]:
    """Yield batches of images, each (b, 3, H, W) in [0, 1] on the CPU, in the order of `seeds`.

    Args:
        family: Runs the pipeline.
        network: As :func:`sampling` yields it.
        sampling_plan: Sampler, steps and guidance.
        embeds: Embeddings of P prompts, P in front.
        which: N indices into the prompts.
        seeds: N seeds.
        width: Pixels.
        height: Pixels.
        negative: Embeddings of one negative prompt, 1 in front; has an effect with guidance only.
    """
    size = batch_size(width, height)
    for start in range(0, len(seeds), size):
        part = slice(start, start + size)
        chosen = torch.as_tensor(which[part])
        images = family.generate(
            network,
            {name: value[chosen] for name, value in embeds.items()},
            sampler=sampling_plan.sampler,
            seeds=seeds[part],
            width=width,
            height=height,
            num_inference_steps=sampling_plan.steps,
            guidance_scale=sampling_plan.guidance,
            negative_embeds=None if negative is None else repeat(negative, len(chosen)),
        )
        yield images.detach().float().cpu()


def repeat(embeds: Conditioning, count: int) -> Conditioning:
    """Repeat the embeddings of one prompt `count` times."""
    return {name: value.expand(count, *value.shape[1:]).contiguous() for name, value in embeds.items()}


def teacher_plan(family: ModelFamily, steps: int, guidance: float | None) -> SamplingPlan:
    """Plan the teacher with the model's own scheduler, at the given guidance or the family's usual one."""
    return SamplingPlan("teacher", "teacher", None, steps, family.usual_guidance if guidance is None else guidance)
