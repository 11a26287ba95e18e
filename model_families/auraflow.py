r"""AuraFlow: a transformer over text and image, trained by flow matching, which reads prompts through one T5.

The network takes T5's states with those of the padding set to zero, (B, 256, 2048), and no mask. The unconditional is
the encoded empty prompt. Its time is t, from 0 at the data to 1.

References:
    Ryu et al., AuraFlow v0.1 (fal, 2024); no paper.
    Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv 2403.03206.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from ..core.plugin_api.family import ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from ..core.utils.full_precision import compute_type, input_type
from .bases.one_encoder import OneEncoderFamily
from .bases.transformer import LORA_TARGETS, check_latents, longer_t5
from .calls.encoders import masked_states
from .comfyui.kohya_auraflow import KOHYA
from .files.architecture import Architecture

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning
    from .files.source import TextEncoders

FEED_FORWARD = ("linear_1", "linear_2", "out_projection")


class AuraFlow(OneEncoderFamily):
    """AuraFlow, v0.1 to v0.3, and its fine-tunes."""

    name: ClassVar[str] = "auraflow"
    lora_targets: ClassVar[tuple[str, ...]] = (
        *(target for target in LORA_TARGETS if not target.startswith("ff")),
        *(f"{part}.{layer}" for part in ("ff", "ff_context") for layer in FEED_FORWARD),
    )
    ends = ("pos_embed", "norm_out", "proj_out")
    default_guidance: ClassVar[float] = 3.5
    upcasts_vae: ClassVar[bool] = True
    block_lists: ClassVar[Mapping[str, str]] = {
        "num_mmdit_layers": "joint_transformer_blocks",
        "num_single_dit_layers": "single_transformer_blocks",
    }
    text_first: ClassVar[bool] = True
    time_embedder = "time_step_proj"
    pipeline_tokens: ClassVar[int] = 256
    architecture: ClassVar[Architecture] = Architecture(
        title="an AuraFlow",
        pipeline="AuraFlowPipeline",
        accepted=("AuraFlowPipeline",),
        denoiser="transformer",
        denoiser_class="AuraFlowTransformer2DModel",
        tokenizers={"tokenizer": "AutoTokenizer"},
        encoders={"text_encoder": "UMT5EncoderModel"},
        check=check_latents,
        made_of="an AuraFlow has T5 (UMT5) as its text encoder",
        lora_encoders=(),
        kohya=KOHYA,
    )

    class Config(OneEncoderFamily.Config):
        """Settings of the family auraflow, under ``family_config``."""

        student_num_mmdit_layers: int | None = Field(default=None, ge=1)
        """Number of blocks of two streams that the student has (full training): evenly spaced ones of the teacher's."""
        student_num_single_dit_layers: int | None = Field(default=None, ge=1)
        """Number of blocks of one stream that the student has, likewise."""

    # -- text ---------------------------------------------------------------------------------------------------------

    def long_prompts_remedy(self, num_tokens: int) -> str:
        return longer_t5(self.num_tokens, num_tokens) or "shorten them"

    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        return masked_states(*text.pairs()[0], prompts, length=self.num_tokens)

    # -- network ------------------------------------------------------------------------------------------------------

    def input_weight(self, network: nn.Module) -> Tensor:
        return network.get_parameter("pos_embed.proj.weight")

    def call_network(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        dtype = self.weight_type(network)
        return network(
            x_t.to(input_type(dtype, x_t.device)),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            timestep=(time / 1000).to(compute_type(dtype, x_t.device)),
            return_dict=False,
        )[0]


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [AuraFlow]
