"""Any text-to-image pipeline of diffusers whose denoiser takes latents, a time and embeddings, from a description.

What a family of its own knows of its pipeline stands in ``family_config.generic`` here: which arguments the network is
called with, in which unit it is told the time, what its output is, whether latents are packed. Before anything is
trained the description is compared with the pipeline itself: its own loop runs with a network that answers something
simple, and each of its calls and of its scheduler's steps must be those that the description gives
(:mod:`.described.generic_check`). Where they differ the message has the description that the pipeline's own calls
suggest.

A model that is loaded so trains as LoRA and in full with all methods but those that need features, pixels, a second
time or the guidance scale as an input; a family of its own (about 100 lines) can offer these.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.plugin_api.family import Capabilities, ExportInfo, ModelFamily, ModelSettings
from ..core.plugin_api.hookspecs import hookimpl
from ..core.settings.types import Names
from .bases.diffusers import DiffusersFamily
from .calls.networks import check_guidance
from .calls.packing import pack, patch_ids, text_ids, unpack
from .described.generic_check import FAILURES, check_description
from .described.generic_model import ANY, blocks_of, described_architecture, linear_layers

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning
    from .files.source import TextEncoders

Given = str | bool | int | float | list[float]


class Generic(DiffusersFamily):
    """A pipeline of diffusers that has no family here, from a description of its calls."""

    name: ClassVar[str] = "generic"
    capabilities: ClassVar[Capabilities] = Capabilities(lora=True, full=True, quantised_base=True)
    pixel_multiple: ClassVar[int] = 16
    architecture = ANY

    class Config(DiffusersFamily.Config):
        """Settings of the family generic, under ``family_config``."""

        denoiser: str | None = None
        """Component that is distilled. Absent: ``transformer`` or ``unet``, whichever the model has."""
        denoiser_call: dict[str, Given] = Field(default_factory=dict)
        """Argument of the network's call -> what it is given: ``latents``, ``time``, an embedding by its name in
        `embeddings`, ``image_ids`` (of FLUX.1's patches), ``text_ids`` or ``counted_text_ids`` (0, or 0, i, i for token
        i), ``latent_height``, ``latent_width``; a number or true or false as it is; a list with one number as a tensor
        (B,). Absent: the run ends with a proposal, read from the pipeline's own calls.
        """
        time_input: Literal["timesteps", "fraction", "reversed"] = "timesteps"
        """The network's unit of time: the scheduler's timesteps, 1000 at the noise; a fraction of 1000; or 1 minus
        that fraction.
        """
        output: Literal["as_is", "negated", "first_half"] = "as_is"
        """What of the network's output is the prediction: all of it; its negative; or the first half of its channels,
        where the second is a variance.
        """
        packing: Literal["none", "patches"] = "none"
        """Form of the latents in the network's call: (B, C, h, w), or patches of 2 x 2 as (B, h/2 w/2, 4 C)."""
        embeddings: Names = ("prompt_embeds",)
        """Arguments of the pipeline's call that stand for the prompt, in the order in which its ``encode_prompt``
        returns them; ``-`` for something that it returns and that is not passed on.
        """
        encode_call: dict[str, Given] = Field(default_factory=dict)
        """Further arguments of ``encode_prompt``, as max_sequence_length."""
        pipeline_call: dict[str, Given] = Field(default_factory=dict)
        """Further arguments of the pipeline's call, by which it does what the description says: a switch that turns a
        rescaling of the guided prediction off, for instance.
        """
        uncond: Literal["empty", "zeros"] = "empty"
        """The unconditional prompt: the encoded empty one, or zeros in place of the embeddings."""
        guidance_argument: str = "guidance_scale"
        """Argument of the pipeline's call that guides by two calls of the network."""
        guidance_offset: float = Field(default=0, ge=-10, le=10)
        """What is added to that argument to have the scale s of uncond + s (cond - uncond)."""
        guidance: float = Field(default=5.0, ge=0, le=100)
        """Scale s that the model's images are usually generated with; 1: none."""
        steps: int = Field(default=30, ge=1, le=1000)
        """Number of steps that the model's images are usually generated with."""
        lora_layers: Names = ()
        """Ends of the names of the layers that a LoRA adapts. Absent: every linear layer inside the blocks."""

    def __init__(self, config: Any, settings: ModelSettings) -> None:
        super().__init__(config, settings)
        self.architecture = described_architecture(settings, config)  # type: ignore[misc]  # of this model
        self.embed_keys = tuple(key for key in config.embeddings if key != "-")  # type: ignore[misc]
        self._checked = False

    @classmethod
    def sketch(cls, model: str) -> Mapping[str, str]:
        """Return the pieces of code of a family for the pipeline of `model`, read from its own calls without weights.

        Raises UserError where they cannot be read.
        """
        from .described.generic_sketch import sketch

        return sketch(cls, model)

    # -- what the description says ------------------------------------------------------------------------------------

    @property
    def position_edge(self) -> int:  # type: ignore[override]
        return 2 if self.config.packing == "patches" else int(self.denoiser_config.get("patch_size") or 1)

    @property
    def default_steps(self) -> int:
        return self.config.steps

    @property
    def usual_guidance(self) -> float:
        return self.config.guidance

    @cached_property
    def lora_targets(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.config.lora_layers or linear_layers(self.empty_network())

    @property
    def taken_channels(self) -> int:
        packed = 4 if self.config.packing == "patches" else 1
        return int(self.denoiser_config.get("in_channels", packed * self.latent_channels)) // packed

    # -- text ---------------------------------------------------------------------------------------------------------

    def text_settings(self) -> Sequence[str]:
        own = self.config.model_dump(exclude=set(DiffusersFamily.Config.model_fields))
        return [json.dumps(own, sort_keys=True)]  # all of it: what is cached was compared with the pipeline

    @torch.no_grad()
    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        pieces = [self._encoded(text, prompt) for prompt in prompts]
        if not self._checked:
            self._checked = True
            check_description(self, {key: pieces[0][key] for key in self.embed_keys})
        return {key: torch.cat([piece[key] for piece in pieces]) for key in self.embed_keys}

    def _encoded(self, text: TextEncoders, prompt: str) -> Conditioning:
        """Return what the pipeline's ``encode_prompt`` gives for one prompt, by the names of `embeddings`."""
        pipeline = self.architecture.shell(**text.tokenizers, **text.encoders, **self.pipeline_arguments())
        asked = inspect.signature(pipeline.encode_prompt).parameters
        call: dict[str, Any] = {"device": self.settings.device, "num_images_per_prompt": 1, **self.config.encode_call}
        call |= {"do_classifier_free_guidance": False}
        call |= {key: None for key, one in asked.items() if key.startswith("prompt_") and one.default is one.empty}
        try:
            found = pipeline.encode_prompt([prompt], **{key: value for key, value in call.items() if key in asked})
        except (*FAILURES, NameError) as error:  # the last where a package is missing that diffusers imports if it can
            raise UserError(
                f"family_config.generic: {self.architecture.pipeline}.encode_prompt cannot be called as it is "
                f"described: {type(error).__name__}: {error}",
                "name what it needs under `encode_call`; install a package that is not defined",
            ) from error
        found = found if isinstance(found, tuple) else (found,)
        named = {key: value for key, value in zip(self.config.embeddings, found, strict=False) if key != "-"}
        wrong = [key for key in self.embed_keys if not isinstance(named.get(key), Tensor)]
        if wrong:
            kinds = ", ".join(f"{tuple(one.shape)}" if isinstance(one, Tensor) else type(one).__name__ for one in found)
            raise UserError(
                f"family_config.generic.embeddings: {self.architecture.pipeline}.encode_prompt returns no tensor for "
                f"{', '.join(wrong)}",
                f"name what it returns in its order, '-' for what is no tensor: {kinds}",
            )
        return {key: named[key] for key in self.embed_keys}

    def uncond(self, cond: Conditioning) -> Conditioning:
        if self.config.uncond == "zeros":
            return {key: torch.zeros_like(value) for key, value in cond.items()}
        return super().uncond(cond)

    def pipeline_prompts(self, embeds: Conditioning, prefix: str = "") -> dict[str, Any]:
        given = super().pipeline_prompts(embeds, prefix)
        return {
            **({"negative_prompt": None} if prefix and "negative_prompt" in self.architecture.call_arguments() else {}),
            **given,
        }

    # -- network ------------------------------------------------------------------------------------------------------

    def input_weight(self, network: nn.Module) -> Tensor:
        return next(weight for weight in network.parameters() if weight.is_floating_point())

    def shard_units(self, network: nn.Module) -> list[str]:
        return blocks_of(network)

    def takes_guidance(self, network: nn.Module) -> bool:
        return False

    def student_network(
        self, teacher: nn.Module, *, guidance_embedding: bool, second_time: bool = False, smaller: bool = False
    ) -> nn.Module:
        return self.copy_network(teacher)

    def predict(
        self,
        network: nn.Module,
        x_t: Tensor,
        time: Tensor,
        cond: Conditioning,
        *,
        guidance: Tensor | None = None,
        second_time: Tensor | None = None,
    ) -> Tensor:
        check_guidance(guidance, taken=False)
        dtype = self.weight_type(network)
        call = {name: self._given(what, x_t, time, cond, dtype) for name, what in self.config.denoiser_call.items()}
        height, width = x_t.shape[-2:]
        output = network(**call, return_dict=False)[0]
        output = unpack(output, height, width) if self.config.packing == "patches" else output
        if self.config.output == "first_half":
            return output.chunk(2, dim=1)[0]
        return -output if self.config.output == "negated" else output

    def _given(self, what: Given, x_t: Tensor, time: Tensor, cond: Conditioning, dtype: torch.dtype) -> Any:
        """Return the value of an argument of the network's call."""
        if isinstance(what, list):
            return torch.full_like(time, what[0], dtype=dtype)
        if not isinstance(what, str):
            return what
        height, width = x_t.shape[-2:]
        if what in cond:
            return cond[what].to(dtype) if cond[what].is_floating_point() else cond[what]
        made = {
            "latents": lambda: self.to_network(x_t.to(dtype)),
            "time": lambda: self._time_input(time),
            "image_ids": lambda: patch_ids(height, width, like=x_t.to(dtype)),
            "text_ids": lambda: text_ids(cond[self.embed_keys[0]].shape[1], like=x_t.to(dtype)),
            "counted_text_ids": lambda: text_ids(cond[self.embed_keys[0]].shape[1], like=x_t.to(dtype), counted=True),
            "latent_height": lambda: height,
            "latent_width": lambda: width,
        }
        if what not in made:
            raise UserError(
                f"family_config.generic.denoiser_call: {what!r} is nothing that the network can be given",
                f"name one of {', '.join([*made, *self.embed_keys])}",
            )
        return made[what]()

    def _time_input(self, time: Tensor) -> Tensor:
        told = time if self.config.time_input == "timesteps" else time / 1000
        return 1 - told if self.config.time_input == "reversed" else told

    # -- images -------------------------------------------------------------------------------------------------------

    def guidance_call(self, network: nn.Module, scale: float) -> dict[str, Any]:
        asked = max(scale, 1.0) - self.config.guidance_offset
        return {**self.config.pipeline_call, self.config.guidance_argument: asked}

    def to_network(self, latents: Tensor) -> Tensor:
        return pack(latents) if self.config.packing == "patches" else latents

    def from_network(self, latents: Tensor, *, size: tuple[int, int]) -> Tensor:
        if self.config.packing == "none":
            return latents
        return unpack(latents, size[1] // self.scale_factor, size[0] // self.scale_factor)

    def snippet_call(self, info: ExportInfo) -> dict[str, Any]:
        return self.guidance_call(nn.Identity(), info.sampler.guidance_scale)


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [Generic]
