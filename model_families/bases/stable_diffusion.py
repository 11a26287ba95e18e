"""Stable Diffusion before XL: a UNet conditioned on the last states (B, 77, D) of one CLIP text encoder.

References:
    Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, arXiv 2112.10752.
    Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed (zero terminal SNR), arXiv 2305.08891.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ...core.errors import UserError
from ...core.plugin_api.family import Capabilities
from ..calls.encoders import last_states
from ..comfyui.kohya import unet_place
from ..files.architecture import AUTOENCODER, UNET, Architecture, FilePart, KohyaFormat, ReadConfig, SingleFile
from ..files.checks import check_unet
from .clip import ClipFamily

if TYPE_CHECKING:
    from ...core.plugin_api.batch import Conditioning
    from ..files.source import TextEncoders


class StableDiffusion(ClipFamily):
    """The base of the first and the second generation; abstract. The unconditional is the encoded empty prompt."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        lora=True,
        full=True,
        guidance_embedding=True,
        second_time=True,
        features=True,
        pixels=True,
        quantised_base=True,
        quantised_text_encoders=1,
    )
    embed_keys: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    default_guidance: ClassVar[float] = 7.5

    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        tokenizer, encoder = text.pairs()[0]
        masked = bool(getattr(encoder.config, "use_attention_mask", False))
        chunks = self.config.max_prompt_chunks
        states = last_states(tokenizer, encoder, prompts, masked=masked, chunks=chunks)[0]
        return {"prompt_embeds": states.reshape(len(prompts), -1, states.shape[-1])}


def generation(
    title: str, *, linear: bool, text_prefixes: tuple[str, ...], base_repository: str, size: str, kohya: KohyaFormat
) -> Architecture:
    """Return the architecture of one generation.

    Args:
        title: Name with its article.
        linear: ``use_linear_projection`` of its UNets, which tells the generations apart.
        text_prefixes: Prefixes of the text encoder's tensor names in a single file.
        base_repository: Repository of the configs of a single file, unless a folder is named.
        size: Approximate size of such a file, in words.
        kohya: Its LoRAs in kohya's format.
    """
    name = title.partition(" ")[2]

    def check(model: str, config: ReadConfig) -> None:
        unet = config("unet/config.json")
        if bool(unet.get("use_linear_projection")) != linear:
            raise UserError(
                f"model {model!r} is not {title} (unet/config.json: use_linear_projection = "
                f"{unet.get('use_linear_projection')!r}, expected {linear!r})",
                "choose the model_family that fits",
            )
        check_unet(model, unet, config("vae/config.json"))

    return Architecture(
        title=title,
        pipeline="StableDiffusionPipeline",
        accepted=(
            "StableDiffusionPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionControlNetPipeline",
        ),
        denoiser="unet",
        denoiser_class="UNet2DConditionModel",
        tokenizers={"tokenizer": "CLIPTokenizer"},
        encoders={"text_encoder": "CLIPTextModel"},
        check=check,
        made_of=f"{title} has a tokenizer and a text encoder",
        arguments={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        single_file=SingleFile(
            parts={
                "unet": UNET,
                "vae": AUTOENCODER,
                "text_encoder": FilePart(f"the text encoder of {name}", text_prefixes),
            },
            base_repository=base_repository,
            size=size,
        ),
        kohya=kohya,
        original_path=unet_place,
    )
