r"""Qwen-Image 2.1: one stream of text and latents, whose text does not know the time, trained by flow matching.

The autoencoder compresses 16 times and has a channel of opacity; latents (B, 64, h, w) are the network's positions,
(B, h w, 64). The network takes the states of Qwen3-VL before its last norm, without the system's words, (B, T, 4096).
Attention is causal but inside the image, which comes last, and text is modulated as at the time 0.

The position of the image on the first axis is the number of tokens of its prompt, the padding in a batch included, so
that a pipeline makes another image of a prompt beside a longer one. Here each sample is what it is alone: the network
is called for one at a time, and images are made one at a time.

The unconditional is the pipeline's negative prompt of one space; the model is meant to be used without guidance.

References:
    Qwen Team, Qwen-Image Technical Report, arXiv 2508.02324 (the first generation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.plugin_api.family import Capabilities, ExportInfo, ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from .bases.one_by_one import OneByOneFamily
from .bases.qwen import CONVERSATION, QwenFamily, WithoutPrompts
from .bases.transformer import check_latents
from .calls.encoders import ragged
from .calls.networks import outputs_inside
from .comfyui.kohya_qwen_image import KOHYA_21, ORIGINAL_21
from .files.architecture import Architecture

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning

COMPREHEND = "Comprehend and analyze the provided prompt."
USER = "<|im_start|>user"
SLOT = 4
"""Positions of the image for which the pipeline's mask of a sequence has one place."""


class QwenImage2(OneByOneFamily, QwenFamily):
    """Qwen-Image 2.1 and its fine-tunes for text to image."""

    name: ClassVar[str] = "qwen-image-2"
    aliases: ClassVar[tuple[str, ...]] = ("qwen_image_2", "qwen-image-2-1")
    capabilities: ClassVar[Capabilities] = Capabilities(
        lora=True, full=True, second_time=True, features=True, quantised_base=True, quantised_text_encoders=1
    )
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"),
        "modulation.1",
    )
    ends = ("img_in", "norm_out", "proj_out")
    default_guidance: ClassVar[float] = 1.0
    pixel_multiple: ClassVar[int] = 32
    position_edge: ClassVar[int] = 1
    text_widths: ClassVar[Mapping[str, str]] = {"prompt_embeds": "context_in_dim"}
    template: ClassVar[str] = CONVERSATION.format(COMPREHEND)
    architecture: ClassVar[Architecture] = Architecture(
        title="a Qwen-Image 2.1",
        pipeline="QwenImage21Pipeline",
        accepted=("QwenImage21Pipeline",),
        denoiser="transformer",
        denoiser_class="QwenImage21Transformer2DModel",
        tokenizers={"processor": "Qwen3VLProcessor"},
        encoders={"text_encoder": "Qwen3VLForConditionalGeneration"},
        check=partial(check_latents, usual=64),
        made_of="a Qwen-Image 2.1 has Qwen3-VL as its text encoder",
        lora_encoders=(),
        kohya=KOHYA_21,
        original_path=ORIGINAL_21.place,
        autoencoder="AutoencoderKLQwenImage21",
        stand_ins={"processor": WithoutPrompts()},
    )

    @property
    def default_steps(self) -> int:
        return 40

    # -- text ---------------------------------------------------------------------------------------------------------

    def dropped(self, tokenizer: Any) -> int:
        return len(getattr(tokenizer, "tokenizer", tokenizer)(self.template.partition(USER)[0]).input_ids)

    def written(self, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        return super().written(tokenizer, [prompt or " " for prompt in prompts])

    def tokens(self, tokenizer: Any, texts: Sequence[str], *, length: int) -> Any:
        # at the right, where the pipeline pads a batch at the left: positions are those of the prompt alone
        cut = {"padding": True, "padding_side": "right", "truncation": True, "max_length": length}
        return tokenizer.tokenizer(list(texts), return_tensors="pt", **cut)

    def states(self, encoder: Any, tokens: Any) -> Tensor:
        def call() -> None:
            encoder.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)

        last = encoder.model.language_model.layers[-1]
        return outputs_inside([last], call, pick=lambda out: out[0] if isinstance(out, tuple) else out, stop=True)[0]

    def pipeline_prompts(self, embeds: Conditioning, prefix: str = "") -> dict[str, Any]:
        (states,) = ragged(embeds["prompt_embeds"], embeds["prompt_embeds_mask"])  # one by one
        mask = torch.ones(1, len(states), dtype=torch.bool, device=states.device)
        return {f"{prefix}prompt_embeds": states[None], f"{prefix}prompt_embeds_mask": mask}

    # -- network ------------------------------------------------------------------------------------------------------

    def input_weight(self, network: nn.Module) -> Tensor:
        return network.get_parameter("img_in.weight")

    def untimed_rows(self, network: nn.Module) -> int:
        transformer: Any = network
        return int(transformer.config.causal_condition)

    def predict_one(self, network: Any, x_t: Tensor, told: Tensor, cond: Conditioning) -> Tensor:
        (states,) = ragged(cond["prompt_embeds"], cond["prompt_embeds_mask"])
        latents, (height, width) = self.to_network(x_t), x_t.shape[-2:]
        text, image = len(states), height * width
        # on the meta device the mask is a real one, on whose values shapes depend
        device = "cpu" if x_t.is_meta else x_t.device
        output = network(
            hidden_states=latents,
            timestep=told / 1000,
            encoder_hidden_states=states[None],
            img_mask=torch.arange(text + image // SLOT, device=device)[None] >= text,
            img_shapes=[[(1, height, width)]],
            return_dict=False,
        )[0]
        return output[:, -image:].transpose(1, 2).unflatten(2, (height, width))

    def image_states(self, output: Any, grid: Sequence[int]) -> Tensor:
        return output[:, -grid[0] * grid[1] :]  # after the text's

    # -- images -------------------------------------------------------------------------------------------------------

    def to_network(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def from_network(self, latents: Tensor, *, size: tuple[int, int]) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, (size[1] // self.scale_factor, size[0] // self.scale_factor))

    def snippet_call(self, info: ExportInfo) -> dict[str, Any]:
        call = super().snippet_call(info)
        call.pop("max_sequence_length", None)  # which this pipeline does not know
        return call


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [QwenImage2]
