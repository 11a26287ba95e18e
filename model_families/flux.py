r"""FLUX.1: a transformer over text and packed latents, trained by flow matching.

Latents (B, 16, h, w) are packed into patches of 2 x 2, (B, h/2 w/2, 64), each with its row and column as an id. They
have four axes everywhere but inside the calls of the network and of the pipeline. The network takes T5's states
(B, 512, 4096) and CLIP's pooled ones (B, 768).

*dev* takes the guidance scale as an input: its guided prediction is one call, and there is none without guidance. Where
a method or an image asks for no scale, it is fed ``embedded_guidance``. *schnell* takes none: guidance is then
the usual one of two calls (``true_cfg_scale``), against the encoded empty prompt.

The grid of times is shifted by the resolution: m = exp(mu), mu linear in the number of patches. The teacher's own
scheduler does so for every image; the schedule of a run, and its students' sampler, have the shift of the run's
resolution.

References:
    Black Forest Labs, FLUX.1 (no paper).
    Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (shift), arXiv 2403.03206.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from ..core.diffusion.second_time import second_time_input
from ..core.plugin_api.family import Capabilities, ExportInfo, ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from ..core.utils.full_precision import compute_type, input_type
from .bases.transformer import LORA_TARGETS, TransformerFamily, check_latents, longer_t5
from .calls.encoders import last_states
from .calls.networks import check_guidance, told_scale
from .calls.packing import PATCH, pack, patch_ids, unpack
from .comfyui.kohya_flux import KOHYA, flux_place
from .files.architecture import Architecture

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning
    from .files.source import TextEncoders

PIPELINE_TOKENS = 512
"""``max_sequence_length`` of a plain call."""
GUIDANCE_EMBEDDER = "time_text_embed.guidance_embedder"


class Flux(TransformerFamily):
    """FLUX.1 dev and schnell, and their fine-tunes."""

    name: ClassVar[str] = "flux"
    capabilities: ClassVar[Capabilities] = Capabilities(
        lora=True,
        full=True,
        guidance_embedding=True,
        second_time=True,
        features=True,
        pixels=True,
        quantised_base=True,
        quantised_text_encoders=2,
    )
    lora_targets: ClassVar[tuple[str, ...]] = (*LORA_TARGETS, "proj_mlp", "proj_out", "norm.linear")
    ends = ("x_embedder", "norm_out", "proj_out")
    default_guidance: ClassVar[float] = 3.5
    block_lists: ClassVar[Mapping[str, str]] = {
        **TransformerFamily.block_lists,
        "num_single_layers": "single_transformer_blocks",
    }
    architecture: ClassVar[Architecture] = Architecture(
        title="a FLUX.1",
        pipeline="FluxPipeline",
        accepted=("FluxPipeline", "FluxImg2ImgPipeline"),
        siblings={"Flux2KleinPipeline": "flux2", "Flux2Pipeline": "flux2-dev", "ChromaPipeline": "chroma"},
        denoiser="transformer",
        denoiser_class="FluxTransformer2DModel",
        tokenizers={"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"},
        encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
        check=partial(check_latents, packed=PATCH),
        made_of="a FLUX.1 has CLIP and T5 as text encoders",
        kohya=KOHYA,
        original_path=flux_place,
    )

    class Config(TransformerFamily.Config):
        """Settings of the family flux, under ``family_config``."""

        student_num_single_layers: int | None = Field(default=None, ge=1)
        """Number of blocks of one stream that the student has (full training): evenly spaced ones of the teacher's."""
        embedded_guidance: float = Field(default=3.5, ge=0, le=100)
        """Guidance scale that a network which takes it as an input (dev) is fed where none is asked for."""
        max_sequence_length: int = Field(default=PIPELINE_TOKENS, ge=1, le=512)
        """Tokens of a prompt that T5 reads; the rest is cut off. Schnell was trained with 256."""

    @property
    def guided_by_input(self) -> bool:
        return bool(self.denoiser_config.get("guidance_embeds", False))

    @property
    def usual_guidance(self) -> float:
        return self.config.embedded_guidance if self.guided_by_input else 1.0

    @property
    def default_steps(self) -> int:
        return 28 if self.guided_by_input else 4

    @property
    def taken_channels(self) -> int:
        return super().taken_channels // PATCH

    # -- text ---------------------------------------------------------------------------------------------------------

    @property
    def longest_reader(self) -> tuple[str, int | None]:
        return "tokenizer_2", self.config.max_sequence_length

    def long_prompts_remedy(self, num_tokens: int) -> str:
        return longer_t5(self.config.max_sequence_length, num_tokens) or super().long_prompts_remedy(num_tokens)

    @property
    def prompt_positions(self) -> int:
        return self.config.max_sequence_length

    def text_settings(self) -> Sequence[str]:
        return (f"max_sequence_length={self.config.max_sequence_length}",)

    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        clip, t5 = text.pairs()
        return {
            "prompt_embeds": last_states(*t5, prompts, length=self.config.max_sequence_length)[0],
            "pooled_prompt_embeds": last_states(*clip, prompts).pooler_output,
        }

    # -- network ------------------------------------------------------------------------------------------------------

    def input_weight(self, network: nn.Module) -> Tensor:
        transformer: Any = network
        return transformer.x_embedder.weight

    def takes_guidance(self, network: nn.Module) -> bool:
        transformer: Any = network
        return bool(transformer.config.guidance_embeds)

    def student_network(
        self, teacher: nn.Module, *, guidance_embedding: bool, second_time: bool = False, smaller: bool = False
    ) -> nn.Module:
        if guidance_embedding and not self.takes_guidance(teacher):
            student = self.copy_network(teacher, smaller=smaller, guidance_embeds=True)
            # a sinusoid of its own through the time's first layer; the second is zero
            first = student.time_text_embed.timestep_embedder.linear_1.state_dict()
            student.get_submodule(GUIDANCE_EMBEDDER).linear_1.load_state_dict(first)
        else:
            student = self.copy_network(teacher, smaller=smaller)
        if second_time:
            self.add_second_time(student)
        return student

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
        transformer: Any = network
        dtype = self.weight_type(transformer)
        states, (height, width) = cond["prompt_embeds"].to(dtype), x_t.shape[-2:]
        # rounded as in a pipeline of that type, also for a student whose own weights are fp32
        told = time.to(compute_type(dtype, x_t.device)) / 1000
        with second_time_input(transformer, time, second_time):
            packed = transformer(
                hidden_states=pack(x_t.to(input_type(dtype, x_t.device))),
                timestep=told,
                guidance=self._guidance_input(transformer, guidance, like=time),
                pooled_projections=cond["pooled_prompt_embeds"].to(dtype),
                encoder_hidden_states=states,
                txt_ids=states.new_zeros(states.shape[1], 3),
                img_ids=patch_ids(height, width, like=states),
                return_dict=False,
            )[0]
        return unpack(packed, height, width)

    def _guidance_input(self, network: nn.Module, guidance: Tensor | None, *, like: Tensor) -> Tensor | None:
        """Return the network's guidance input (B,), a scale, from the paper's w; None where it takes none."""
        if not self.takes_guidance(network):
            check_guidance(guidance, taken=False)
            return None
        return told_scale(guidance, usual=self.config.embedded_guidance, like=like)

    # -- images -----------------------------------------------------------------------------------------------------

    def guidance_call(self, network: nn.Module, scale: float) -> dict[str, Any]:
        if self.takes_guidance(network):
            return {"guidance_scale": scale if scale > 1 else self.config.embedded_guidance}
        return {"true_cfg_scale": scale} if scale > 1 else {}

    def to_network(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def from_network(self, latents: Tensor, *, size: tuple[int, int]) -> Tensor:
        return unpack(latents, size[1] // self.scale_factor, size[0] // self.scale_factor)

    def snippet_call(self, info: ExportInfo) -> dict[str, Any]:
        scale, length = info.sampler.guidance_scale, self.config.max_sequence_length
        told = self.guided_by_input or (scale > 1 and info.model_type == "full")
        call: dict[str, Any] = {}
        if told:
            call["guidance_scale"] = scale if scale > 1 else self.config.embedded_guidance
        elif scale > 1:
            call |= {"negative_prompt": "", "true_cfg_scale": scale}
        return call if length == PIPELINE_TOKENS else {**call, "max_sequence_length": length}


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [Flux]
