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
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.diffusion.second_time import second_time_input
from ..core.plugin_api.family import Capabilities, ExportInfo, ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from ..core.utils.full_precision import input_type
from .bases.one_encoder import OneEncoderFamily
from .bases.transformer import check_flow
from .calls.encoders import as_chat, ragged, token_ids
from .calls.networks import check_guidance
from .comfyui.kohya_z_image import KOHYA, ORIGINAL
from .files.architecture import Architecture, ReadConfig
from .files.checks import check_channels

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning
    from .files.source import TextEncoders


def check_configs(name: str, config: ReadConfig) -> None:
    """Raise UserError unless the transformer takes the latents of the model's autoencoder, on a flow."""
    channels = config("transformer/config.json").get("in_channels", 16)
    check_channels(name, "transformer", channels, config("vae/config.json"))
    check_flow(name, config)


class ZImage(OneEncoderFamily):
    """Z-Image and Z-Image-Turbo, and their fine-tunes."""

    name: ClassVar[str] = "z-image"
    aliases: ClassVar[tuple[str, ...]] = ("z_image",)
    capabilities: ClassVar[Capabilities] = Capabilities(
        lora=True, full=True, second_time=True, features=True, pixels=True, quantised_base=True,
        quantised_text_encoders=1,
    )  # fmt: skip
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
        "adaLN_modulation.0",
    )
    ends = ("all_x_embedder.2-1", "all_final_layer.2-1")
    default_guidance: ClassVar[float] = 5.0
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
        check=check_configs,
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

    @torch.no_grad()
    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        tokenizer, encoder = text.pairs()[0]
        written = self.written(tokenizer, prompts)
        tokens = token_ids(tokenizer, written, length=self.num_tokens, padding_side="right").to(encoder.device)
        mask = tokens.attention_mask.bool()
        states = encoder(input_ids=tokens.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        return {"prompt_embeds": states * mask[..., None], "prompt_attention_mask": mask}

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
        transformer: Any = network
        dtype = self.weight_type(transformer)
        frames = x_t.to(input_type(dtype, x_t.device)).unsqueeze(2)
        prompts = ragged(cond["prompt_embeds"].to(dtype), cond["prompt_attention_mask"])
        with second_time_input(transformer, time, second_time):
            output = transformer(list(frames), (1000 - time) / 1000, prompts, return_dict=False)[0]
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
