"""Lumina-Image 2.0: one stream of text and latents, trained by flow matching, whose prompts Gemma 2 reads.

The network takes latents (B, 16, h, w), Gemma's states (B, 256, 2304) and where they are padding. Its time is 1 - t,
0 at the noise, and its output is data minus noise, the negative of what most flows predict. In its blocks the states of
each prompt come first, without padding, and those of the image follow them.

The pipeline writes a system prompt before every prompt, and none before the unconditional, which is the empty text. Its
``cfg_normalization`` of the guided prediction is off in the engine's images and in the snippets of students.

References:
    Qin et al., Lumina-Image 2.0: A Unified and Efficient Image Generative Framework, arXiv 2503.21758.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from ..core.plugin_api.family import ExportInfo, ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from ..core.utils.full_precision import input_type
from .bases.one_encoder import OneEncoderFamily
from .bases.transformer import check_latents
from .calls.encoders import masked_states, turned
from .calls.networks import lengths_of
from .comfyui.kohya_lumina2 import KOHYA, NAMES
from .files.architecture import Architecture

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning
    from .files.source import TextEncoders

SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts."
)
"""The pipeline's own."""
UNNORMED: Mapping[str, Any] = {"cfg_normalization": False}  # guidance as everywhere


class Lumina2(OneEncoderFamily):
    """Lumina-Image 2.0 and its fine-tunes."""

    name: ClassVar[str] = "lumina2"
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "feed_forward.linear_1", "feed_forward.linear_2"),
        *("feed_forward.linear_3", "norm1.linear"),
    )
    ends = ("x_embedder", "norm_out")
    default_guidance: ClassVar[float] = 4.0
    block_lists: ClassVar[Mapping[str, str]] = {"num_layers": "layers"}
    time_embedder = "time_caption_embed.timestep_embedder"
    text_widths: ClassVar[Mapping[str, str]] = {"prompt_embeds": "cap_feat_dim"}
    pipeline_tokens: ClassVar[int] = 256
    architecture: ClassVar[Architecture] = Architecture(
        title="a Lumina-Image 2",
        pipeline="Lumina2Pipeline",
        accepted=("Lumina2Pipeline", "Lumina2Text2ImgPipeline"),
        denoiser="transformer",
        denoiser_class="Lumina2Transformer2DModel",
        tokenizers={"tokenizer": "AutoTokenizer"},
        encoders={"text_encoder": "Gemma2Model"},
        check=partial(check_latents, usual=16),
        made_of="a Lumina-Image 2 has Gemma 2 as its text encoder",
        lora_encoders=(),
        kohya=KOHYA,
        original_path=NAMES.place,
        half="bfloat16",
    )

    class Config(OneEncoderFamily.Config):
        """Settings of the family lumina2, under ``family_config``."""

        max_sequence_length: int | None = Field(default=None, ge=1, le=299)
        """Tokens that Gemma reads, the system prompt included (256 if absent); the network has positions for 299."""
        system_prompt: str = Field(default=SYSTEM_PROMPT, min_length=1)
        """What is written before every prompt, but not before the unconditional; fine-tunes may have their own."""

    @property
    def default_steps(self) -> int:
        return 30

    def shift_positions(self, size: tuple[int, int]) -> int:
        return self.latent_channels  # as the pipeline counts them

    # -- text ---------------------------------------------------------------------------------------------------------

    def text_settings(self) -> Sequence[str]:
        return (*super().text_settings(), f"system_prompt={self.config.system_prompt}")

    def written(self, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        return [f"{self.config.system_prompt} <Prompt Start> {prompt}" for prompt in prompts]

    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        return self._encode(text, [self.written(None, [prompt])[0] if prompt else "" for prompt in prompts])

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        return self.in_pieces(prompts, self._encode)

    def _encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        """Return the states of prompts as they are."""
        return masked_states(*text.pairs()[0], prompts, length=self.num_tokens, layer=-2, padding_side="right")

    # -- network ------------------------------------------------------------------------------------------------------

    def input_weight(self, network: nn.Module) -> Tensor:
        return network.get_parameter("x_embedder.weight")

    def inner_width(self, network: nn.Module) -> int:
        return len(self.input_weight(network))

    def image_first(self, output: Any, cond: Conditioning) -> Tensor:
        return turned(output, cond["prompt_attention_mask"])

    def call_network(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        dtype, mask = self.weight_type(network), cond["prompt_attention_mask"].bool()
        with lengths_of(mask):
            return -network(
                hidden_states=x_t.to(input_type(dtype, x_t.device)),
                timestep=1 - time / 1000,
                encoder_hidden_states=cond["prompt_embeds"].to(dtype),
                encoder_attention_mask=mask,
                return_dict=False,
            )[0]

    # -- images -------------------------------------------------------------------------------------------------------

    def guidance_call(self, network: nn.Module, scale: float) -> dict[str, Any]:
        return {"guidance_scale": scale, **UNNORMED}

    def snippet_call(self, info: ExportInfo) -> dict[str, Any]:
        own = {} if self.config.system_prompt == SYSTEM_PROMPT else {"system_prompt": self.config.system_prompt}
        normed = UNNORMED if info.sampler.guidance_scale > 1 else {}
        return {**super().snippet_call(info), **own, **normed}


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [Lumina2]
