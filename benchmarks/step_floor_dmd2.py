"""The floor of a DMD2-LoRA step with its adversarial term. Nothing of ours, no data, no logs, no clipping."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.functional import softplus

TURN = 5


class Stop(Exception):
    """The features are there: what comes after them is not computed."""


def make_head(width: int) -> nn.Module:
    """Return three halvings from 4 x 4 to 1 x 1, a window of 4 x 4 and a logit, as the method has them."""

    def layer(stride: int, *padding: int) -> list[nn.Module]:
        convolution = nn.Conv2d(width, width, 4, stride=stride)
        return [nn.ZeroPad2d(padding), convolution, nn.GroupNorm(width // 8, width), nn.SiLU()]

    halvings = [*layer(2, 1, 1, 1, 1), *layer(2, 1, 1, 1, 1), *layer(2, 1, 2, 1, 2)]
    return nn.Sequential(*halvings, *layer(1, 0, 3, 0, 3), nn.Conv2d(width, 1, 1))


class Dmd2Floor:
    """Takes steps of the fake score and the heads, every fifth one of the student too.

    Args:
        model: Folder of a pipeline.
        targets: Modules that are adapted.
        batch: Number of samples.
        edge: Edge of the latents.
        rank: Rank of both adapters.
        calls: Number of the student's calls in the simulation of each step.
    """

    def __init__(
        self, model: Path, targets: Sequence[str], *, batch: int, edge: int, rank: int, calls: Iterator[int]
    ) -> None:
        unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
        self.unet, self.calls, self.number = unet, calls, 0
        for name in ("student", "fake"):
            unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), adapter_name=name)
        self.layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
        self.student, self.fake = (
            [p.requires_grad_() for key, p in unet.named_parameters() if f".{name}." in key]
            for name in ("student", "fake")
        )
        self.head = make_head(unet.config.block_out_channels[-1])
        self.of_student, self.of_fake, self.of_head = (
            torch.optim.AdamW(each, 5e-5, fused=True) for each in (self.student, self.fake, self.head.parameters())
        )
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        self.noise, self.text = torch.randn(batch, 4, edge, edge), torch.randn(batch, 77, 256)
        self.t = torch.full((batch,), 499)
        self.added = {"text_embeds": torch.randn(batch, pooled), "time_ids": torch.full((batch, 6), 8.0 * edge)}
        self.middle: torch.Tensor | None = None
        self.stops = False
        unet.mid_block.register_forward_hook(self._stop)

    def _stop(self, module: nn.Module, args: object, output: torch.Tensor) -> None:
        if self.stops:
            self.middle = output
            raise Stop

    def call(self, adapter: str, *samples: torch.Tensor, middle: bool = False) -> torch.Tensor:
        """Return the output, or the middle block's, of one sample or of two in one batch."""
        for layer in self.layers:
            layer._disable_adapters = not adapter
            layer._active_adapter = [adapter or "student"]
        count, self.stops = len(samples), middle
        added = {name: torch.cat([value] * count) for name, value in self.added.items()}
        sizes = (torch.cat(each) for each in (samples, [self.t] * count, [self.text] * count))
        with suppress(Stop):
            return self.unet(*sizes, added_cond_kwargs=added).sample
        assert self.middle is not None
        return self.middle

    def simulated(self, turn: bool) -> torch.Tensor:
        """Return samples of the student, with a gradient through the last call where it is its turn."""
        x, last = self.noise, next(self.calls) - 1
        with torch.no_grad():
            for _ in range(last):
                x = 0.9 * self.call("student", x) + 0.1 * self.noise
        with torch.set_grad_enabled(turn):
            return self.call("student", x)

    def student_turn(self, x: torch.Tensor) -> None:
        """Step the student on its samples `x` (B, C, h, w)."""
        with torch.no_grad():
            fake, (cond, uncond) = self.call("fake", x), self.call("", x, x).chunk(2)
            gradient = fake - (uncond + 8 * (cond - uncond))
        loss = 0.5 * (x - (x - gradient).detach()).square().mean()
        loss = loss + 5e-3 * softplus(-self.head(self.call("fake", x, middle=True))).mean()
        loss.backward(inputs=self.student)
        self.of_student.step()
        self.of_student.zero_grad()

    def step(self) -> None:
        """Take one step."""
        self.number += 1
        turn = self.number % TURN == 0
        x = self.simulated(turn)
        if turn:
            self.student_turn(x)
        x = x.detach()
        real, fake = self.head(self.call("fake", self.noise, x, middle=True)).chunk(2)
        loss = (self.call("fake", x) - self.noise).square().mean()
        loss = loss + 1e-2 * (softplus(-real) + softplus(fake)).mean()
        loss.backward(inputs=[*self.fake, *self.head.parameters()])  # the heads' own loss is that part of it
        for optimizer in (self.of_fake, self.of_head):
            optimizer.step()
            optimizer.zero_grad()


def make_dmd2_floor(model: Path, targets: Sequence[str], *, calls: Iterator[int], **sizes: int) -> Callable[[], None]:
    """Return a function that takes one step; arguments as of :class:`Dmd2Floor`."""
    return Dmd2Floor(model, targets, calls=calls, **sizes).step
