r"""Sana: a transformer with linear attention over the latents of a deep autoencoder, trained by flow matching.

The autoencoder compresses 32 times, and the network's positions are single latents: 1,024 of them at 1024 pixels, (B,
32, 32, 32). The network takes the states of Gemma 2, padded, (B, 300, 2304), and where they are padding: the first,
and the last 299, for before the prompt stands an instruction of 200 tokens, to enhance it ("complex human
instruction"). None stands before the negative prompt, which the unconditional is, empty.

Prompts are written in lower case. Published models name a DPM-Solver that is set to a flow, which makes the teacher's
images; students have the flow that it solves.

References:
    Xie et al., SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers, arXiv 2410.10629.
    Xie et al., SANA 1.5: Efficient Scaling of Training-Time and Inference-Time Compute, arXiv 2501.18427.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..core.diffusion.schedule import is_solver_of_flow
from ..core.errors import UserError
from ..core.plugin_api.family import ExportInfo, ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from ..core.utils.full_precision import input_type
from .bases.instruction import instructed, instruction
from .bases.one_encoder import OneEncoderFamily
from .bases.transformer import check_flow
from .files.architecture import Architecture, ReadConfig
from .files.checks import check_channels

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning
    from .files.source import TextEncoders


def check_configs(name: str, config: ReadConfig) -> None:
    """Raise UserError unless the transformer takes the latents of the model's autoencoder, on a flow, and no scale."""
    transformer = config("transformer/config.json")
    check_channels(name, "transformer", transformer.get("in_channels", 32), config("vae/config.json"))
    if not is_solver_of_flow(config("scheduler/scheduler_config.json")):
        check_flow(name, config)
    if transformer.get("guidance_embeds"):
        raise UserError(
            f"model {name!r} takes the guidance scale as an input (transformer/config.json: guidance_embeds), as Sana "
            "Sprint does: it is a student of few steps already, in other noise, and cannot teach",
            "name the model that it was made from, as Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        )


class Sana(OneEncoderFamily):
    """Sana and Sana 1.5, and their fine-tunes."""

    name: ClassVar[str] = "sana"
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "ff.conv_inverted", "ff.conv_point", "time_embed.linear"),
    )
    ends = ("patch_embed", "norm_out", "proj_out")
    default_guidance: ClassVar[float] = 4.5
    pixel_multiple: ClassVar[int] = 32
    position_edge: ClassVar[int] = 1
    pipeline_tokens: ClassVar[int] = 300
    time_embedder = "time_embed.emb.timestep_embedder"
    text_widths: ClassVar[Mapping[str, str]] = {"prompt_embeds": "caption_channels"}
    architecture: ClassVar[Architecture] = Architecture(
        title="a Sana",
        pipeline="SanaPipeline",
        accepted=("SanaPipeline", "SanaPAGPipeline"),
        denoiser="transformer",
        denoiser_class="SanaTransformer2DModel",
        tokenizers={"tokenizer": "AutoTokenizer"},
        encoders={"text_encoder": "Gemma2Model"},
        check=check_configs,
        made_of="a Sana has Gemma 2 as its text encoder",
        lora_encoders=(),
        autoencoder="AutoencoderDC",
    )

    @property
    def default_steps(self) -> int:
        return 20

    # -- text ---------------------------------------------------------------------------------------------------------

    @property
    def max_prompt_tokens(self) -> int | None:
        return self.num_tokens - 2  # of those that are kept two are before it

    def text_settings(self) -> Sequence[str]:
        return (*super().text_settings(), hashlib.sha256(instruction().encode()).hexdigest())

    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        return instructed(text, prompts, before=instruction(), count=self.num_tokens)

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        return self.in_pieces(prompts, partial(instructed, before="", count=self.num_tokens))

    def pipeline_prompts(self, embeds: Conditioning, prefix: str = "") -> dict[str, Any]:
        given = super().pipeline_prompts(embeds, prefix)
        return {**given, "negative_prompt": None} if prefix else given  # by default it is empty

    # -- network ------------------------------------------------------------------------------------------------------

    def input_weight(self, network: nn.Module) -> Tensor:
        return network.get_parameter("patch_embed.proj.weight")

    def inner_width(self, network: nn.Module) -> int:
        transformer: Any = network
        return transformer.config.num_attention_heads * transformer.config.attention_head_dim

    def image_states(self, output: Any, grid: Sequence[int]) -> Tensor:
        return output

    def call_network(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        dtype = self.weight_type(network)
        output = network(
            x_t.to(input_type(dtype, x_t.device)),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_attention_mask=cond["prompt_attention_mask"],
            timestep=time * network.config.timestep_scale,
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]  # some have a variance as well, which no pipeline uses

    # -- images -------------------------------------------------------------------------------------------------------

    def guidance_call(self, network: nn.Module, scale: float) -> dict[str, Any]:
        return {"guidance_scale": scale, "use_resolution_binning": False}

    def snippet_call(self, info: ExportInfo) -> dict[str, Any]:
        return {**super().snippet_call(info), "use_resolution_binning": False}


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [Sana]
