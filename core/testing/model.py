"""The small model that the suite checks a family on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..diffusion.sampler import Sampler
from ..engine.networks import Networks
from ..plugin_api.family import LoraSettings, MicroConditioning, ModelFamily, ModelSettings
from ..plugin_api.method import Role
from .checks import NotApplicable, Subject, failing

PROMPTS = ("a red fox", "two blue boats on a lake")


LORA = LoraSettings(rank=4, alpha=8.0)


Kind = Literal["lora", "full"]


@dataclass
class Model:
    """The family on its small model; parts that checks share are loaded once.

    Attributes:
        subject: The family.
    """

    subject: Subject

    @cached_property
    def source(self) -> str:
        """Folder of the model. Raises NotApplicable where the family offers none."""
        self._keep = tempfile.TemporaryDirectory(prefix="distill-check-")
        with failing("example()", "it is given an empty folder, and returns the folder of a small model"):
            found = self.subject.own_example(Path(self._keep.name) / "model")
        if found is None:
            raise NotApplicable(
                "it offers no small model to try: define `example(cls, folder)`, which writes a random tiny one into "
                "the folder and returns its path"
            )
        return str(found)

    def make(self, source: str | None = None, *, size: tuple[int, int] | None = None) -> ModelFamily:
        """Return a new instance of the family, of the model at `source`, for images of `size` (width, height)."""
        settings = ModelSettings(self.source if source is None else source, resolution=size or (self.edge, self.edge))
        return self.subject.cls(self.subject.cls.Config(), settings)

    @cached_property
    def family(self) -> ModelFamily:
        """The family."""
        with failing("check_source()", "example() must return a model of this family"):
            family = self.make()
            family.check_source()
        return family

    @property
    def edge(self) -> int:
        """Pixels along an edge of images: a multiple of the family's ``pixel_multiple``."""
        return max(32, self.subject.cls.pixel_multiple)

    @cached_property
    def embeds(self) -> dict[str, Tensor]:
        """Embeddings of the prompts."""
        with failing("encode_prompts()", "it takes a list of texts"):
            return dict(self.family.encode_prompts(PROMPTS))

    @cached_property
    def conditioned(self) -> dict[str, Tensor]:
        """Conditioning of the network for the prompts."""
        return self.conditioning(original=self.edge, crop=0)

    def conditioning(self, *, original: int, crop: int, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Return the conditioning for images of `original` pixels along an edge, cropped at (`crop`, `crop`); or for
        images that were (height, width) = `size` and are so.
        """
        sizes, crops, targets = ([(each, each)] * len(PROMPTS) for each in (original, crop, self.edge))
        if size is not None:
            sizes = targets = [size] * len(PROMPTS)
        embeds = self.embeds
        with failing("condition()", "it takes what encode_prompts() returned"):
            return dict(self.family.condition(embeds, MicroConditioning(sizes, crops, targets)))

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return (x_t, the network's time input) of two samples."""
        family, g = self.family, torch.Generator().manual_seed(0)
        edge = self.edge // family.scale_factor
        x_t = torch.randn(len(PROMPTS), family.latent_channels, edge, edge, generator=g)
        t = family.schedule.t_max * torch.tensor([0.3, 0.9], dtype=torch.float64)
        return x_t, family.schedule.network_time(t).float()

    @torch.no_grad()
    def predict(self, network: nn.Module, **settings: Any) -> Tensor:
        """Return the network's output."""
        with failing("predict()", "it takes x_t (B, C, h, w), time (B,) and what condition() returned"):
            return self.family.predict(network, *self.inputs(), self.conditioned, **settings)

    @contextmanager
    def student(self, kind: Kind) -> Iterator[nn.Module]:
        """Yield a student whose weights differ from its teacher's."""
        roles = [Role("teacher"), Role("student", trains=kind)]
        with failing(f"making a student ({kind})", "see student_network() and lora_targets of distill.ModelFamily"):
            networks = Networks(self.family, roles, lora=LORA if kind == "lora" else None, seed=0)
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in networks.parameters("student"):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=g))
        with networks.use("student") as network:
            yield network

    def sampler(self) -> Sampler:
        """Return a sampler of two steps, as a method would name it."""
        if self.family.schedule.clean_at_zero:
            flow = {"shift": 1.0, "use_dynamic_shifting": False}
            return Sampler("FlowMatchEulerDiscreteScheduler", flow, 2, 0.0, {"sigmas": [1.0, 0.6]})
        return Sampler("DDIMScheduler", {"timestep_spacing": "trailing"}, 2, 0.0)

    def images(self, network: nn.Module, *, family: ModelFamily | None = None) -> Tensor:
        """Return two images by the sampler."""
        family = family or self.family
        with failing("generate()", "it makes images (B, 3, H, W) in [0, 1]"), torch.no_grad():
            return family.generate(
                network, self.embeds, sampler=self.sampler(), seeds=SEEDS, width=self.edge, height=self.edge
            )


SEEDS = (3, 8)
"""Seeds of the images that a family generates."""
