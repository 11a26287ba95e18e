r"""FLUX.2: a transformer over text and latents, trained by flow matching, that a language model tells the prompt.

Latents are patches of 2 x 2, (B, 128, h, w), normed by the autoencoder's running statistics. The network takes them as
(B, h w, 128), each with its row and column as an id, and inner states of the language model, three layers side by side:
(B, 512, 3 D), those of the padding too, which no mask hides.

*klein* (4B, 9B; Qwen3): guidance is two calls, against the encoded empty prompt. Its distilled models (``is_distilled``
in ``model_index.json``) are not guided at all. *dev* (32B; Mistral Small, a system prompt around each prompt) takes the
guidance scale as an input, and has no unconditional.

The grid of times is shifted by the resolution and by the number of steps N: mu is linear in N, between two lines in the
number of patches. The teacher's own scheduler does so for every image. A run has one schedule for students of any
number of steps, with the shift of its resolution and of ``shift_steps``.

References:
    Black Forest Labs, FLUX.2 (no paper).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.diffusion.second_time import second_time_input
from ..core.errors import UserError
from ..core.plugin_api.family import Capabilities, ExportInfo, ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from ..core.utils.full_precision import compute_type, input_type
from ._architecture import Architecture, ReadConfig
from ._autoencoders import patched
from ._encoders import as_chat, inner_states, token_ids
from ._networks import as_multiplied, check_guidance, told_scale
from ._one_encoder import OneEncoderFamily
from ._transformer import LORA_TARGETS, TransformerFamily, check_latents

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning
    from ._source import TextEncoders


def check_dev(name: str, config: ReadConfig) -> None:
    """Raise UserError unless it is a model on a flow, for its autoencoder, that takes the guidance scale."""
    check_latents(name, config)
    if not config("transformer/config.json").get("guidance_embeds", True):
        raise UserError(
            f"model {name!r} takes no guidance scale (transformer/config.json: guidance_embeds), and the pipeline of "
            "FLUX.2 dev guides in no other way",
            "name FLUX.2 dev, or a klein (model_family flux2)",
        )


class Flux2(OneEncoderFamily):
    """FLUX.2 klein, 4B and 9B, base and distilled, and their fine-tunes."""

    name: ClassVar[str] = "flux2"
    aliases: ClassVar[tuple[str, ...]] = ("flux2-klein",)
    capabilities: ClassVar[Capabilities] = Capabilities(
        lora=True, full=True, second_time=True, features=True, pixels=True, quantised_base=True,
        quantised_text_encoders=1,
    )  # fmt: skip
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
    time_embedder = "time_guidance_embed.timestep_embedder"
    text_layers: ClassVar[tuple[int, ...]] = (9, 18, 27)
    """Numbers, from 1, of the language model's layers whose states the network takes."""
    architecture: ClassVar[Architecture] = Architecture(
        title="a FLUX.2 klein",
        pipeline="Flux2KleinPipeline",
        accepted=("Flux2KleinPipeline", "Flux2KleinInpaintPipeline"),
        denoiser="transformer",
        denoiser_class="Flux2Transformer2DModel",
        tokenizers={"tokenizer": "AutoTokenizer"},
        encoders={"text_encoder": "Qwen3ForCausalLM"},
        check=check_latents,
        made_of="a FLUX.2 klein has Qwen3 as its text encoder (that of dev, with Mistral, is the family flux2-dev)",
        lora_encoders=(),
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


class Flux2Dev(Flux2):
    """FLUX.2 dev and its fine-tunes."""

    name: ClassVar[str] = "flux2-dev"
    aliases: ClassVar[tuple[str, ...]] = ()
    capabilities: ClassVar[Capabilities] = replace(Flux2.capabilities, guidance_embedding=True)
    text_layers: ClassVar[tuple[int, ...]] = (10, 20, 30)
    architecture: ClassVar[Architecture] = replace(
        Flux2.architecture,
        title="a FLUX.2 dev",
        pipeline="Flux2Pipeline",
        accepted=("Flux2Pipeline",),
        encoders={"text_encoder": "Mistral3ForConditionalGeneration"},
        check=check_dev,
        made_of="a FLUX.2 dev has Mistral as its text encoder (that of klein, with Qwen3, is the family flux2)",
    )

    class Config(Flux2.Config):
        """Settings of the family flux2-dev, under ``family_config``."""

        embedded_guidance: float = Field(default=4.0, ge=0, le=100)
        """Guidance scale that the network is told where none is asked for."""

    @property
    def guided_by_input(self) -> bool:
        return True

    @property
    def usual_guidance(self) -> float:
        return self.config.embedded_guidance

    # -- text ---------------------------------------------------------------------------------------------------------

    def text_settings(self) -> Sequence[str]:
        return (*super().text_settings(), str(conversations([""])))

    def written(self, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        texts = tokenizer.apply_chat_template(conversations(prompts), tokenize=False)
        return [text.removeprefix(tokenizer.bos_token or "") for text in texts]  # a tokenizer writes it itself

    def tokens(self, tokenizer: Any, prompts: Sequence[str]) -> Any:
        return tokenizer.apply_chat_template(
            conversations(prompts), add_generation_prompt=False, tokenize=True, return_dict=True, return_tensors="pt",
            padding="max_length", truncation=True, max_length=self.num_tokens,
        )  # fmt: skip

    # -- network ------------------------------------------------------------------------------------------------------

    def takes_guidance(self, network: nn.Module) -> bool:
        return True

    def student_network(
        self, teacher: nn.Module, *, guidance_embedding: bool, second_time: bool = False, smaller: bool = False
    ) -> nn.Module:
        return super().student_network(teacher, guidance_embedding=False, second_time=second_time, smaller=smaller)

    def guidance_input(self, guidance: Tensor | None, *, like: Tensor) -> Tensor | None:
        return told_scale(guidance, usual=self.config.embedded_guidance, like=like)

    # -- images -------------------------------------------------------------------------------------------------------

    def guidance_call(self, network: nn.Module, scale: float) -> dict[str, Any]:
        return {"guidance_scale": scale if scale > 1 else self.config.embedded_guidance}

    def snippet_call(self, info: ExportInfo) -> dict[str, Any]:
        return {**super().snippet_call(info), **self.guidance_call(None, info.sampler.guidance_scale)}

    def pipeline_arguments(self) -> Mapping[str, Any]:
        return {}

    def from_network(self, latents: Tensor, *, size: tuple[int, int]) -> Tensor:
        edges = size[1] // self.scale_factor, size[0] // self.scale_factor
        return latents.transpose(1, 2).unflatten(2, edges)


def conversations(prompts: Sequence[str]) -> list[Any]:
    """Return prompts as dev's pipeline hands them to the language model, after its system prompt."""
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    return format_input(list(prompts))


def position_ids(height: int, width: int, length: int, *, device: torch.device) -> Tensor:
    """Return (0, row, column, place) of each position, shape (height width length, 4)."""
    axes = (torch.arange(edge, device=device) for edge in (1, height, width, length))
    return torch.cartesian_prod(*axes)


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the families of this file."""
    return [Flux2, Flux2Dev]
