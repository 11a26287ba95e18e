r"""Z-Image: one stream of text and latents, trained by flow matching, whose prompts a language model (Qwen3) reads.

The network takes latents and the states of each prompt without padding, (T_i, 2560); here they are padded, with a mask.
Its time is 1 - t, 0 at the noise, and its output is data minus noise, the negative of what all other flows predict.

The guided prediction is ``cond + g (cond - uncond)`` in the pipeline: its ``guidance_scale`` g is one less than the
scale of all other families. Here the scale is that of the others; model cards and samplers have the pipeline's.

References:
    Z-Image Team, Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion Transformer,
    arXiv 2511.22699.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.plugin_api.family import ExportInfo, ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from ..core.utils.full_precision import input_type
from .bases.one_encoder import OneEncoderFamily
from .bases.transformer import check_latents
from .calls.encoders import as_chat, masked_states, ragged
from .comfyui.kohya_z_image import KOHYA, ORIGINAL
from .files.architecture import MINIATURES, Architecture

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning
    from .files.source import TextEncoders


class ZImage(OneEncoderFamily):
    """Z-Image and Z-Image-Turbo, and their fine-tunes."""

    name: ClassVar[str] = "z-image"
    aliases: ClassVar[tuple[str, ...]] = ("z_image",)
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
        "adaLN_modulation.0",
    )
    ends = ("all_x_embedder.2-1", "all_final_layer.2-1")
    default_guidance: ClassVar[float] = 5.0
    miniature: ClassVar[Path | None] = MINIATURES / "z_image_miniature"
    block_lists: ClassVar[Mapping[str, str]] = {"n_layers": "layers"}
    time_embedder = "t_embedder"
    text_widths: ClassVar[Mapping[str, str]] = {"prompt_embeds": "cap_feat_dim"}
    architecture: ClassVar[Architecture] = Architecture(
        title="a Z-Image",
        pipeline="ZImagePipeline",
        accepted=("ZImagePipeline", "ZImageImg2ImgPipeline"),
        denoiser="transformer",
        denoiser_class="ZImageTransformer2DModel",
        tokenizers={"tokenizer": "AutoTokenizer"},
        encoders={"text_encoder": "Qwen3Model"},
        check=partial(check_latents, usual=16),
        made_of="a Z-Image has Qwen3 as its text encoder",
        lora_encoders=(),
        kohya=KOHYA,
        original_path=ORIGINAL.place,
    )

    class Config(OneEncoderFamily.Config):
        """Settings of the family z-image, under ``family_config``."""

        student_n_layers: int | None = Field(default=None, ge=1)
        """Number of blocks that the student has (full training): evenly spaced ones of the teacher's."""

    # -- text ---------------------------------------------------------------------------------------------------------

    def written(self, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        return as_chat(tokenizer, prompts, enable_thinking=True)

    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        tokenizer, encoder = text.pairs()[0]
        written = self.written(tokenizer, prompts)
        return masked_states(tokenizer, encoder, written, length=self.num_tokens, layer=-2, padding_side="right")

    def pipeline_prompts(self, embeds: Conditioning, prefix: str = "") -> dict[str, Any]:
        return {f"{prefix}prompt_embeds": ragged(embeds["prompt_embeds"], embeds["prompt_attention_mask"])}

    # -- network ------------------------------------------------------------------------------------------------------

    def input_weight(self, network: nn.Module) -> Tensor:
        return network.get_parameter(f"{self.ends[0]}.weight")

    def inner_width(self, network: nn.Module) -> int:
        transformer: Any = network
        return transformer.dim

    def image_states(self, output: Any, grid: Sequence[int]) -> Tensor:
        return output[:, : grid[0] * grid[1]]  # before the text's

    def call_network(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        dtype = self.weight_type(network)
        frames = x_t.to(input_type(dtype, x_t.device)).unsqueeze(2)
        prompts = ragged(cond["prompt_embeds"].to(dtype), cond["prompt_attention_mask"])
        output = network(list(frames), (1000 - time) / 1000, prompts, return_dict=False)[0]
        return -torch.stack(output).squeeze(2)

    # -- images -------------------------------------------------------------------------------------------------------

    def guidance_call(self, network: nn.Module, scale: float) -> dict[str, Any]:
        return {"guidance_scale": max(scale - 1, 0.0)}

    def snippet_call(self, info: ExportInfo) -> dict[str, Any]:
        return {**super().snippet_call(info), "guidance_scale": max(info.sampler.guidance_scale - 1, 0.0)}


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [ZImage]
