"""Kolors: SDXL's UNet, which reads prompts in Chinese and English through a language model (ChatGLM3).

The network takes the penultimate states of all 256 positions (B, 256, 4096), those of the padding in front of the
prompt included, which a layer of its own (``encoder_hid_proj``) narrows; the last state of the last token as pooled
embedding (B, 4096); and SDXL's six time ids. It has a table of betas of 1100 timesteps. Unlike SDXL's, the
unconditional is the encoded empty prompt.

The pipeline always reads 256 tokens, whatever ``max_sequence_length`` it is called with.

References:
    Kolors Team, Kolors: Effective Training of Diffusion Model for Photorealistic Text-to-Image Synthesis (2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..core.errors import UserError
from ..core.plugin_api.family import Capabilities, ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from .bases.time_ids import TimeIdsFamily
from .calls.encoders import token_ids
from .comfyui.kohya_kolors import KOHYA
from .files.architecture import Architecture, ReadConfig
from .files.checks import check_unet

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning
    from .files.source import TextEncoders

NUM_TOKENS = 256
"""Tokens that the pipeline reads, the two marks in front included."""


def check_configs(name: str, config: ReadConfig) -> None:
    """Raise UserError unless the configs are those of a Kolors' UNet and its own autoencoder."""
    unet = config("unet/config.json")
    for key, expected in (("addition_embed_type", "text_time"), ("encoder_hid_dim_type", "text_proj")):
        if unet.get(key) != expected:
            raise UserError(
                f"model {name!r} is not a Kolors (unet/config.json: {key} = {unet.get(key)!r}, expected {expected!r})",
                "choose the model_family that fits",
            )
    check_unet(name, unet, config("vae/config.json"))


class Kolors(TimeIdsFamily):
    """Kolors and its fine-tunes."""

    name: ClassVar[str] = "kolors"
    packages: ClassVar[Mapping[str, str]] = {"sentencepiece": "sentencepiece>=0.2"}
    capabilities: ClassVar[Capabilities] = Capabilities(
        lora=True, full=True, guidance_embedding=True, second_time=True, features=True, pixels=True,
        micro_conditioning=True, quantised_base=True, quantised_text_encoders=1,
    )  # fmt: skip
    pixel_multiple: ClassVar[int] = 8
    upcasts_vae: ClassVar[bool] = True
    prompt_positions: int | None = NUM_TOKENS
    architecture: ClassVar[Architecture] = Architecture(
        title="a Kolors",
        pipeline="KolorsPipeline",
        accepted=("KolorsPipeline", "KolorsImg2ImgPipeline", "KolorsPAGPipeline"),
        denoiser="unet",
        denoiser_class="UNet2DConditionModel",
        tokenizers={"tokenizer": "ChatGLMTokenizer"},
        encoders={"text_encoder": "ChatGLMModel"},
        check=check_configs,
        made_of="a Kolors has ChatGLM3 as its text encoder",
        lora_encoders=(),
        kohya=KOHYA,
    )

    class Config(TimeIdsFamily.Config):
        """Settings of the family kolors, under ``family_config``."""

    @property
    def longest_reader(self) -> tuple[str, int | None]:
        return "tokenizer", NUM_TOKENS

    @torch.no_grad()
    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        tokenizer, encoder = text.pairs()[0]
        tokens: Any = token_ids(tokenizer, prompts, length=NUM_TOKENS).to(encoder.device)
        states = encoder(**tokens, output_hidden_states=True, return_dict=True).hidden_states  # (T, B, D) each
        return {"prompt_embeds": states[-2].transpose(0, 1).contiguous(), "pooled_prompt_embeds": states[-1][-1]}


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [Kolors]
