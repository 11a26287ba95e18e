r"""FLUX.2 klein: a transformer over text and latents, trained by flow matching, that a language model tells the prompt.

Latents are patches of 2 x 2, (B, 128, h, w), normed by the autoencoder's running statistics. The network takes them as
(B, h w, 128), each with its row and column as an id, and inner states of the language model, three layers side by side:
(B, 512, 3 D), those of the padding too, which no mask hides.

Guidance is two calls, against the encoded empty prompt. Distilled models (``is_distilled`` in ``model_index.json``) are
not guided at all. FLUX.2 dev is :mod:`.flux2_dev`.

The grid of times is shifted by the resolution and by the number of steps N: mu is linear in N, between two lines in the
number of patches. The teacher's own scheduler does so for every image. A run has one schedule for students of any
number of steps, with the shift of its resolution and of ``shift_steps``.

References:
    Black Forest Labs, FLUX.2 (no paper).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.diffusion.second_time import second_time_input
from ..core.plugin_api.family import ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from ..core.utils.full_precision import compute_type, input_type
from .bases.one_encoder import OneEncoderFamily
from .bases.transformer import LORA_TARGETS, TransformerFamily, check_latents
from .calls.autoencoders import patched
from .calls.encoders import as_chat, inner_states, token_ids
from .calls.networks import as_multiplied, check_guidance
from .comfyui.kohya_flux2 import KOHYA, NAMES
from .files.architecture import Architecture

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning
    from .files.source import TextEncoders


class Flux2(OneEncoderFamily):
    """FLUX.2 klein, 4B and 9B, base and distilled, and their fine-tunes."""

    name: ClassVar[str] = "flux2"
    aliases: ClassVar[tuple[str, ...]] = ("flux2-klein",)
    lora_targets: ClassVar[tuple[str, ...]] = (
        *LORA_TARGETS[:8],
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        *("attn.to_qkv_mlp_proj", "attn.to_out", "double_stream_modulation_img.linear"),
        *("double_stream_modulation_txt.linear", "single_stream_modulation.linear"),
    )
    ends = ("x_embedder", "norm_out", "proj_out")
    default_guidance: ClassVar[float] = 4.0
    position_edge: ClassVar[int] = 1
    embed_keys: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    block_lists: ClassVar[Mapping[str, str]] = {
        **TransformerFamily.block_lists,
        "num_single_layers": "single_transformer_blocks",
    }
    text_first: ClassVar[bool] = True
    time_embedder = "time_guidance_embed.timestep_embedder"
    text_layers: ClassVar[tuple[int, ...]] = (9, 18, 27)
    """Numbers, from 1, of the language model's layers whose states the network takes."""
    architecture: ClassVar[Architecture] = Architecture(
        title="a FLUX.2 klein",
        pipeline="Flux2KleinPipeline",
        accepted=("Flux2KleinPipeline", "Flux2KleinInpaintPipeline"),
        siblings={"Flux2Pipeline": "flux2-dev", "FluxPipeline": "flux"},
        denoiser="transformer",
        denoiser_class="Flux2Transformer2DModel",
        tokenizers={"tokenizer": "AutoTokenizer"},
        encoders={"text_encoder": "Qwen3ForCausalLM"},
        check=check_latents,
        made_of="a FLUX.2 klein has Qwen3 as its text encoder (that of dev, with Mistral, is the family flux2-dev)",
        lora_encoders=(),
        kohya=KOHYA,
        original_path=NAMES.place,
        swapped=NAMES.swapped,
        autoencoder="AutoencoderKLFlux2",
    )

    class Config(OneEncoderFamily.Config):
        """Settings of FLUX.2, under ``family_config``."""

        student_num_single_layers: int | None = Field(default=None, ge=1)
        """Number of blocks of one stream that the student has (full training): evenly spaced ones of the teacher's."""
        shift_steps: int | None = Field(default=None, ge=1, le=1000)
        """Number of steps whose shift the run's schedule and its students' sampler have. Absent: as many as images of
        the teacher are usually made with."""

    @property
    def _distilled(self) -> bool:
        return bool(self._source.config("model_index.json").get("is_distilled", False))

    @property
    def usual_guidance(self) -> float:
        return 1.0 if self._distilled else self.default_guidance

    @property
    def default_steps(self) -> int:
        return 4 if self._distilled else 50

    def shift_of(self, num_positions: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(num_positions, self.config.shift_steps or self.default_steps)

    # -- text ---------------------------------------------------------------------------------------------------------

    def written(self, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        return as_chat(tokenizer, prompts, enable_thinking=False)

    def tokens(self, tokenizer: Any, prompts: Sequence[str]) -> Any:
        """Return the tokens (B, T) of prompts in their template, with their attention mask."""
        return token_ids(tokenizer, self.written(tokenizer, prompts), length=self.num_tokens)

    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        tokenizer, encoder = text.pairs()[0]
        return {"prompt_embeds": inner_states(encoder, self.tokens(tokenizer, prompts), layers=self.text_layers)}

    # -- network ------------------------------------------------------------------------------------------------------

    def input_weight(self, network: nn.Module) -> Tensor:
        return network.get_parameter("x_embedder.weight")

    def guidance_input(self, guidance: Tensor | None, *, like: Tensor) -> Tensor | None:
        """Return the scale (B,) that the network is told, from the paper's w; None where it is told none."""
        check_guidance(guidance, taken=False)
        return None

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
        dtype, (height, width) = self.weight_type(transformer), x_t.shape[-2:]
        inner, given = compute_type(dtype, x_t.device), input_type(dtype, x_t.device)
        states, scale = cond["prompt_embeds"].to(dtype), self.guidance_input(guidance, like=time)
        with second_time_input(transformer, time, second_time):
            output = transformer(
                hidden_states=x_t.to(given).flatten(2).transpose(1, 2),
                timestep=as_multiplied(time.to(inner) / 1000, given),
                guidance=None if scale is None else as_multiplied(scale.to(inner), given),
                encoder_hidden_states=states,
                txt_ids=position_ids(1, 1, states.shape[1], device=x_t.device),
                img_ids=position_ids(height, width, 1, device=x_t.device),
                return_dict=False,
            )[0]
        return output.transpose(1, 2).unflatten(2, (height, width))

    # -- images -------------------------------------------------------------------------------------------------------

    def pipeline_arguments(self) -> Mapping[str, Any]:
        return {"is_distilled": self._distilled}

    def pipeline_around(self, network: nn.Module, scheduler: Any) -> Any:
        pipeline = super().pipeline_around(network, scheduler)
        pipeline.register_to_config(**self.pipeline_arguments())
        pipeline.vae_scale_factor = self.scale_factor // 2  # it counts latents, not patches of them
        # it takes the norm off latents that it does not decode: none here, since they stay as the network knows them
        none = {"running_mean": torch.zeros(self.latent_channels), "running_var": torch.ones(self.latent_channels)}
        pipeline.vae = SimpleNamespace(bn=SimpleNamespace(**none), config=SimpleNamespace(batch_norm_eps=0.0))
        return pipeline

    def from_network(self, latents: Tensor, *, size: tuple[int, int]) -> Tensor:
        return patched(latents)


def position_ids(height: int, width: int, length: int, *, device: torch.device) -> Tensor:
    """Return (0, row, column, place) of each position, shape (height width length, 4)."""
    axes = (torch.arange(edge, device=device) for edge in (1, height, width, length))
    return torch.cartesian_prod(*axes)


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [Flux2]
