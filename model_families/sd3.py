"""Stable Diffusion 3 and 3.5: a transformer over text and image, trained by flow matching, with three text encoders.

The network takes the penultimate states of two CLIP encoders, side by side and padded with zeros to the width of T5's,
followed by T5's states: (B, 77 + 256, 4096); and the projections of both CLIP encoders (B, 2048). T5 may be left out:
its states are zeros then, as in the pipeline. The unconditional is the encoded empty prompt.

References:
    Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv 2403.03206.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.plugin_api.family import Capabilities, ExportInfo, ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from ..core.utils.full_precision import input_type
from .bases.clip import CLIP_POSITIONS
from .bases.transformer import TransformerFamily, check_latents, longer_t5
from .calls.encoders import last_states, penultimate
from .comfyui.kohya_sd3 import KOHYA, NAMES
from .files.architecture import MINIATURES, Architecture

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning
    from .files.source import TextEncoders

CLIPS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
T5 = ("tokenizer_3", "text_encoder_3")
PIPELINE_TOKENS = 256
"""``max_sequence_length`` of a plain call."""


class SD3(TransformerFamily):
    """Stable Diffusion 3 and 3.5, medium and large, and their fine-tunes."""

    name: ClassVar[str] = "sd3"
    capabilities: ClassVar[Capabilities] = Capabilities(
        lora=True,
        full=True,
        second_time=True,
        features=True,
        pixels=True,
        quantised_base=True,
        quantised_text_encoders=3,
    )
    ends = ("pos_embed", "norm_out", "proj_out")
    default_guidance: ClassVar[float] = 7.0
    miniature: ClassVar[Path | None] = MINIATURES / "sd3_miniature"
    architecture: ClassVar[Architecture] = Architecture(
        title="a Stable Diffusion 3",
        pipeline="StableDiffusion3Pipeline",
        accepted=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
        denoiser="transformer",
        denoiser_class="SD3Transformer2DModel",
        tokenizers={"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer", "tokenizer_3": "T5TokenizerFast"},
        encoders={
            "text_encoder": "CLIPTextModelWithProjection",
            "text_encoder_2": "CLIPTextModelWithProjection",
            "text_encoder_3": "T5EncoderModel",
        },
        check=check_latents,
        made_of="a Stable Diffusion 3 has two CLIP text encoders, with or without T5 as a third",
        optional=T5,
        lora_encoders=("text_encoder", "text_encoder_2"),
        kohya=KOHYA,
        original_path=NAMES.place,
        swapped=NAMES.swapped,
    )

    class Config(TransformerFamily.Config):
        """Settings of the family sd3, under ``family_config``."""

        t5: bool = True
        """Whether T5 reads the prompts, where the model has it; without, the text encoders take 9.5 GB less memory in
        half precision, and long prompts are understood less well."""
        max_sequence_length: int = Field(default=PIPELINE_TOKENS, ge=1, le=512)
        """Tokens of a prompt that T5 reads; the rest is cut off. Fewer make smaller caches and faster steps."""

    @property
    def default_steps(self) -> int:
        return 28

    # -- text ---------------------------------------------------------------------------------------------------------

    @property
    def left_out(self) -> Sequence[str]:
        return () if self.config.t5 else T5

    @property
    def longest_reader(self) -> tuple[str, int | None]:
        tokenizer, length = T5[0], self.config.max_sequence_length
        return (tokenizer, length) if self.config.t5 and self._source.has(tokenizer) else super().longest_reader

    def long_prompts_remedy(self, num_tokens: int) -> str:
        return longer_t5(self.config.max_sequence_length, num_tokens) or super().long_prompts_remedy(num_tokens)

    @property
    def prompt_positions(self) -> int:
        return CLIP_POSITIONS + self.config.max_sequence_length

    def text_settings(self) -> Sequence[str]:
        return (f"t5={self.config.t5}", f"max_sequence_length={self.config.max_sequence_length}")

    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        tokenizers, encoders = text.tokenizers, text.encoders
        length = tokenizers["tokenizer"].model_max_length
        clip = [penultimate(tokenizers[t], encoders[e], prompts, length=length) for t, e in CLIPS]
        states = torch.cat([states for states, _ in clip], dim=-1)
        t5 = self._t5(text, prompts, like=states)
        states = nn.functional.pad(states, (0, t5.shape[-1] - states.shape[-1]))
        pooled = torch.cat([projection for _, projection in clip], dim=-1)
        return {"prompt_embeds": torch.cat([states, t5], dim=-2), "pooled_prompt_embeds": pooled}

    def _t5(self, text: TextEncoders, prompts: Sequence[str], *, like: Tensor) -> Tensor:
        """Return T5's states (B, T, D), or zeros where there is no T5."""
        tokenizer, encoder = T5
        length = self.config.max_sequence_length
        if encoder in text.encoders:
            return last_states(text.tokenizers[tokenizer], text.encoders[encoder], prompts, length=length)[0]
        return like.new_zeros(len(prompts), length, self.denoiser_config["joint_attention_dim"])

    # -- network ------------------------------------------------------------------------------------------------------

    def input_weight(self, network: nn.Module) -> Tensor:
        transformer: Any = network
        return transformer.pos_embed.proj.weight

    def call_network(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        dtype = self.weight_type(network)
        return network(
            hidden_states=x_t.to(input_type(dtype, x_t.device)),
            timestep=time,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            pooled_projections=cond["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]

    def snippet_call(self, info: ExportInfo) -> dict[str, Any]:
        call, length = super().snippet_call(info), self.config.max_sequence_length
        return call if length == PIPELINE_TOKENS else {**call, "max_sequence_length": length}


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [SD3]
