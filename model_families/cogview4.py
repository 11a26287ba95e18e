"""CogView4: a transformer of two streams with one set of weights, trained by flow matching, which reads prompts through
a language model (GLM-4) and takes the sizes of the image.

Prompts are padded in front to a multiple of 16 tokens, and the padding is seen by both networks. The pipeline pads all
prompts of a call to the longest, so that images depend on their neighbours; here every prompt is padded as if it were
alone. Its states are cached with zeros behind them and a mask, and the attention leaves these out.

The network is told unshifted times (:mod:`.bases.unshifted_times`), in whole numbers: a second time, which needs times
between, is not offered.

References:
    Zheng et al., CogView3: Finer and Faster Text-to-Image Generation via Relay Diffusion, arXiv 2403.05121.
    Z.ai, CogView4 (2025, no paper).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.plugin_api.family import Capabilities, MicroConditioning, ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from ..core.utils.full_precision import input_type
from .bases.one_encoder import OneEncoderFamily
from .bases.transformer import check_latents
from .bases.unshifted_times import UnshiftedTimes
from .calls.encoders import shortened, states_padded_in_front
from .calls.masked_attention import with_masks
from .files.architecture import Architecture

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning
    from .files.source import TextEncoders

MULTIPLE = 16
"""Tokens that the length of a prompt is a multiple of."""
SIZES = ("original_size", "target_size", "crop_coords")
"""Inputs of the network, (B, 2) each: heights and widths, tops and lefts, in pixels."""


class CogView4(UnshiftedTimes, OneEncoderFamily):
    """CogView4 and its fine-tunes."""

    name: ClassVar[str] = "cogview4"
    capabilities: ClassVar[Capabilities] = Capabilities(
        lora=True, full=True, features=True, pixels=True, micro_conditioning=True, quantised_base=True,
        quantised_text_encoders=1,
    )  # fmt: skip
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear"),
    )
    ends = ("patch_embed.proj", "norm_out", "proj_out")
    default_guidance: ClassVar[float] = 5.0
    one_by_one = True
    time_embedder = "time_condition_embed.timestep_embedder"
    text_widths: ClassVar[Mapping[str, str]] = {"prompt_embeds": "text_embed_dim"}
    pipeline_tokens: ClassVar[int] = 1024
    architecture: ClassVar[Architecture] = Architecture(
        title="a CogView4",
        pipeline="CogView4Pipeline",
        accepted=("CogView4Pipeline",),
        denoiser="transformer",
        denoiser_class="CogView4Transformer2DModel",
        tokenizers={"tokenizer": "AutoTokenizer"},
        encoders={"text_encoder": "GlmModel"},
        check=partial(check_latents, usual=16),
        made_of="a CogView4 has GLM-4 as its text encoder",
        lora_encoders=(),
        half="bfloat16",
    )

    # -- text and sizes -----------------------------------------------------------------------------------------------

    @property
    def prompt_positions(self) -> int:  # type: ignore[override]
        return -(-self.num_tokens // MULTIPLE) * MULTIPLE

    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        return states_padded_in_front(*text.pairs()[0], prompts, length=self.num_tokens, multiple=MULTIPLE)

    def condition(self, embeds: Conditioning, micro: MicroConditioning) -> Conditioning:
        device, found = embeds["prompt_embeds"].device, (micro.original_size, micro.target_size, micro.crop_top_left)
        sizes = (torch.tensor(value, dtype=torch.float32, device=device) for value in found)
        return {**embeds, **dict(zip(SIZES, sizes, strict=True))}

    def empty_conditioning(self, network: nn.Module) -> Conditioning | None:
        embeds = super().empty_conditioning(network)
        return embeds and {**embeds, **{key: torch.empty(1, 2, device="meta") for key in SIZES}}

    # -- network ------------------------------------------------------------------------------------------------------

    def input_weight(self, network: nn.Module) -> Tensor:
        return network.get_parameter("patch_embed.proj.weight")

    def inner_width(self, network: nn.Module) -> int:
        transformer: Any = network
        return transformer.config.num_attention_heads * transformer.config.attention_head_dim

    def image_states(self, output: Any, grid: Sequence[int]) -> Tensor:
        return output[0]

    def call_network(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        dtype, num_positions = self.weight_type(network), x_t[0, 0].numel() // self.position_edge**2
        states, seen = shortened(cond["prompt_embeds"], cond["prompt_attention_mask"], num_positions)
        with_masks(network)
        return network(
            hidden_states=x_t.to(input_type(dtype, x_t.device)),
            encoder_hidden_states=states.to(dtype),
            timestep=self.told(time / 1000, num_positions=num_positions),
            **{key: cond[key] for key in SIZES},
            attention_mask=seen,
            return_dict=False,
        )[0]

    # -- images -------------------------------------------------------------------------------------------------------

    def pipeline_prompts(self, embeds: Conditioning, prefix: str = "") -> dict[str, Any]:
        return {f"{prefix}prompt_embeds": shortened(embeds["prompt_embeds"], embeds["prompt_attention_mask"], 0)[0]}


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [CogView4]
