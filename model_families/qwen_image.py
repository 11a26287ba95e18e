r"""Qwen-Image: a transformer of two streams over text and packed latents, trained by flow matching.

Latents (B, 16, h, w) are packed into patches of 2 x 2, (B, h/2 w/2, 64), for the network and the pipeline; the
autoencoder is one of videos, whose time axis has one frame. The network takes the last states of Qwen2.5-VL without the
system's words, padded, (B, T, 3584), and where they are padding.

The pipeline's guidance (``true_cfg_scale``) keeps the length of the conditional prediction in every patch,

    v = u |v_c| / |u|,  u = v_u + g (v_c - v_u),

which cannot be switched off: the guided teacher of every method is the same.

References:
    Qwen Team, Qwen-Image Technical Report, arXiv 2508.02324.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from ..core.diffusion.prediction import Prediction, classifier_free_guidance
from ..core.diffusion.second_time import second_time_input
from ..core.plugin_api.family import Capabilities, ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from ..core.utils.full_precision import compute_type, input_type
from .bases.qwen import CONVERSATION, QwenFamily
from .bases.transformer import LORA_TARGETS, check_latents
from .calls.networks import check_guidance
from .comfyui.kohya_qwen_image import KOHYA
from .files.architecture import Architecture
from .flux import PATCH, pack, unpack

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning

DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
DROPPED = 34
"""Tokens of the system's words and their marks, as the pipeline counts them."""


class QwenImage(QwenFamily):
    """Qwen-Image and its fine-tunes for text to image."""

    name: ClassVar[str] = "qwen-image"
    aliases: ClassVar[tuple[str, ...]] = ("qwen_image",)
    capabilities: ClassVar[Capabilities] = Capabilities(
        lora=True, full=True, second_time=True, features=True, quantised_base=True, quantised_text_encoders=1
    )
    lora_targets: ClassVar[tuple[str, ...]] = (
        *(target for target in LORA_TARGETS if target.startswith(("to_", "add_"))),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1", "txt_mod.1"),
    )
    ends = ("img_in", "norm_out", "proj_out")
    default_guidance: ClassVar[float] = 4.0
    template: ClassVar[str] = CONVERSATION.format(DESCRIBE)
    architecture: ClassVar[Architecture] = Architecture(
        title="a Qwen-Image",
        pipeline="QwenImagePipeline",
        accepted=("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
        denoiser="transformer",
        denoiser_class="QwenImageTransformer2DModel",
        tokenizers={"tokenizer": "AutoTokenizer"},
        encoders={"text_encoder": "Qwen2_5_VLForConditionalGeneration"},
        check=partial(check_latents, packed=PATCH, usual=64),
        made_of="a Qwen-Image has Qwen2.5-VL as its text encoder",
        lora_encoders=(),
        kohya=KOHYA,
        autoencoder="AutoencoderKLQwenImage",
    )

    class Config(QwenFamily.Config):
        """Settings of the family qwen-image, under ``family_config``."""

        max_sequence_length: int | None = Field(default=None, ge=1, le=1024)
        """Tokens of a prompt that the text encoder reads, the end of its template included; the rest is cut off.
        Absent: 512, as many as the pipeline reads. Fewer make smaller caches (7 kB a token) and faster steps.
        """

    @property
    def taken_channels(self) -> int:
        return super().taken_channels // PATCH

    # -- text ---------------------------------------------------------------------------------------------------------

    def dropped(self, tokenizer: Any) -> int:
        return DROPPED

    def states(self, encoder: Any, tokens: Any) -> Tensor:
        # not of the whole: its head would make 152,000 numbers of each state
        return encoder.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state

    def pipeline_prompts(self, embeds: Conditioning, prefix: str = "") -> dict[str, Any]:
        given = super().pipeline_prompts(embeds, prefix)
        return given if prefix else {**given, "max_sequence_length": self.num_tokens}

    # -- network ------------------------------------------------------------------------------------------------------

    def input_weight(self, network: nn.Module) -> Tensor:
        return network.get_parameter("img_in.weight")

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
        dtype, (height, width) = self.weight_type(transformer), x_t.shape[-2:]
        # rounded as in a pipeline of that type, also for a student whose own weights are fp32
        told = time.to(compute_type(dtype, x_t.device)) / 1000
        with second_time_input(transformer, time, second_time):
            packed = transformer(
                hidden_states=pack(x_t.to(input_type(dtype, x_t.device))),
                timestep=told,
                encoder_hidden_states=cond["prompt_embeds"].to(dtype),
                encoder_hidden_states_mask=cond["prompt_embeds_mask"].bool(),
                img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
                return_dict=False,
            )[0]
        return unpack(packed, height, width)

    def with_guidance(self, cond: Prediction, uncond: Prediction, scale: Tensor) -> Prediction:
        guided, (height, width) = classifier_free_guidance(cond, uncond, scale), cond.x_t.shape[-2:]
        velocity, kept = (pack(each.as_type("flow")) for each in (guided, cond))
        velocity = velocity * (kept.norm(dim=-1, keepdim=True) / velocity.norm(dim=-1, keepdim=True))
        return Prediction(unpack(velocity, height, width), cond.x_t, cond.t, cond.schedule, "flow")

    # -- images -------------------------------------------------------------------------------------------------------

    def to_network(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def from_network(self, latents: Tensor, *, size: tuple[int, int]) -> Tensor:
        return unpack(latents, size[1] // self.scale_factor, size[0] // self.scale_factor)


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [QwenImage]
