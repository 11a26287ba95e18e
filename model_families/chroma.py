r"""Chroma: a smaller FLUX.1 schnell, without CLIP and a guidance input, with a mask over the padding of T5's states.

Latents are packed as in :mod:`.flux`. All modulations come from one small network (``distilled_guidance_layer``), which
is given the time beside a number for each of them, (B, N, 64), and returns (B, N, D). A second time is added to the
output of its first layer; a LoRA adapts its other layers. The number of a block's modulations depends on the number of
all blocks, and so a student has as many as its teacher.

T5 reads prompts with their mask. The transformer's mask keeps one position of padding more. diffusers' pipeline hands
it on as numbers, which attention adds to its scores: padding is not hidden, its weights are 1/e of the others' (issue
12116 of diffusers). The teacher does the same here, since its students are used there, unless ``mask_padding`` is set.

References:
    Lodestone Rock, Chroma1 (2025); no paper.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.plugin_api.family import ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from ..core.utils.full_precision import compute_type, input_type
from .bases.one_encoder import OneEncoderFamily
from .bases.transformer import LORA_TARGETS, TransformerFamily, check_latents, longer_t5
from .calls.encoders import token_ids
from .calls.packing import PATCH, pack, patch_ids, text_ids, unpack
from .comfyui.kohya_chroma import KOHYA, NAMES
from .files.architecture import Architecture

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning
    from .files.source import TextEncoders


warnings.filterwarnings("ignore", message="`FluxPosEmbed` is deprecated")  # diffusers tells itself


class Chroma(OneEncoderFamily):
    """Chroma1 (Base, HD) and its fine-tunes."""

    name: ClassVar[str] = "chroma"
    packages: ClassVar[Mapping[str, str]] = {"sentencepiece": "sentencepiece>=0.2"}  # published tokenizers need it
    lora_targets: ClassVar[tuple[str, ...]] = (
        *(target for target in LORA_TARGETS if not target.startswith("norm1")),
        *("proj_mlp", "proj_out", "linear_1", "linear_2", "distilled_guidance_layer.out_proj"),
    )
    ends = ("x_embedder", "norm_out", "proj_out")
    block_lists: ClassVar[Mapping[str, str]] = {
        **TransformerFamily.block_lists,
        "num_single_layers": "single_transformer_blocks",
    }
    smaller_students: ClassVar[bool] = False
    text_first: ClassVar[bool] = True
    time_embedder = "distilled_guidance_layer.in_proj"
    architecture: ClassVar[Architecture] = Architecture(
        title="a Chroma",
        pipeline="ChromaPipeline",
        accepted=("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
        denoiser="transformer",
        denoiser_class="ChromaTransformer2DModel",
        tokenizers={"tokenizer": "T5TokenizerFast"},
        encoders={"text_encoder": "T5EncoderModel"},
        check=partial(check_latents, packed=PATCH),
        made_of="a Chroma has T5 as its text encoder",
        lora_encoders=(),
        kohya=KOHYA,
        original_path=NAMES.place,
    )

    class Config(OneEncoderFamily.Config):
        """Settings of the family chroma, under ``family_config``."""

        max_sequence_length: int | None = Field(default=None, ge=1, le=512)
        """Tokens of a prompt that T5 reads; the rest is cut off. Absent: 512, as in the pipeline."""
        mask_padding: bool = False
        """Hide the padding after a prompt from the transformer, as the model's own code and ComfyUI do. diffusers'
        pipeline does not, where a student is then told its prompts in another way than in training."""

    @property
    def default_steps(self) -> int:
        return 35

    @property
    def taken_channels(self) -> int:
        return super().taken_channels // PATCH

    # -- text ---------------------------------------------------------------------------------------------------------

    def long_prompts_remedy(self, num_tokens: int) -> str:
        return longer_t5(self.num_tokens, num_tokens) or "shorten them"

    def text_settings(self) -> Sequence[str]:
        return (*super().text_settings(), f"mask_padding={self.config.mask_padding}")

    @torch.no_grad()
    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        tokenizer, encoder = text.pairs()[0]
        tokens = token_ids(tokenizer, prompts, length=self.num_tokens).to(encoder.device)
        states = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        positions = torch.arange(self.num_tokens, device=states.device)
        mask = positions <= tokens.attention_mask.sum(dim=1, keepdim=True)  # one position of padding is kept
        return {"prompt_embeds": states, "prompt_attention_mask": mask.to(self._mask_type(states.dtype))}

    def _mask_type(self, states: torch.dtype) -> torch.dtype:
        return torch.bool if self.config.mask_padding else states

    # -- network ------------------------------------------------------------------------------------------------------

    def input_weight(self, network: nn.Module) -> Tensor:
        return network.get_parameter("x_embedder.weight")

    def call_network(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        dtype, (height, width) = self.weight_type(network), x_t.shape[-2:]
        states, inner = cond["prompt_embeds"].to(dtype), compute_type(dtype, x_t.device)
        packed = pack(x_t.to(input_type(dtype, x_t.device)))
        mask = cond["prompt_attention_mask"].to(self._mask_type(inner))
        mask = torch.cat([mask, mask.new_ones(packed.shape[:2])], dim=1)
        with masked_checkpoints(network, mask):
            output = network(
                hidden_states=packed,
                timestep=time.to(inner) / 1000,
                encoder_hidden_states=states,
                txt_ids=text_ids(states.shape[1], like=states),
                img_ids=patch_ids(height, width, like=states),
                attention_mask=mask,
                return_dict=False,
            )[0]
        return unpack(output, height, width)

    # -- images -------------------------------------------------------------------------------------------------------

    def to_network(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def from_network(self, latents: Tensor, *, size: tuple[int, int]) -> Tensor:
        return unpack(latents, size[1] // self.scale_factor, size[0] // self.scale_factor)


@contextmanager
def masked_checkpoints(transformer: Any, mask: Tensor) -> Iterator[None]:
    """Give the mask (B, L) to the blocks of one stream where they are recomputed; diffusers (0.42) forgets it there."""
    if not transformer.gradient_checkpointing:
        yield
        return
    own = transformer._gradient_checkpointing_func
    forgotten = 3  # inputs of such a block: states, modulations, positions
    transformer._gradient_checkpointing_func = lambda block, *inputs: own(
        block, *inputs, *([mask] if len(inputs) == forgotten else [])
    )
    try:
        yield
    finally:
        transformer._gradient_checkpointing_func = own


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [Chroma]
