r"""FLUX.2 dev: the 32B of :mod:`.flux2`, which takes the guidance scale as an input.

Mistral Small reads each prompt after a system prompt, in a conversation, and the network takes states of three of its
layers, (B, 512, 15360). The guided prediction is one call, and there is none without guidance: where a method or an
image asks for no scale, the network is told ``embedded_guidance``. The pipeline has no unconditional.

Prompts are tokenised by the tokenizer alone, as its processor does: that one reads images too, and needs torchvision.

References:
    Black Forest Labs, FLUX.2 (no paper).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.plugin_api.family import Capabilities, ExportInfo, ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from .bases.transformer import check_latents
from .calls.networks import told_scale
from .files.architecture import Architecture, ReadConfig
from .flux2 import Flux2


def check_configs(name: str, config: ReadConfig) -> None:
    """Raise UserError unless it is a model on a flow, for its autoencoder, that takes the guidance scale."""
    check_latents(name, config)
    if not config("transformer/config.json").get("guidance_embeds", True):
        raise UserError(
            f"model {name!r} takes no guidance scale (transformer/config.json: guidance_embeds), and the pipeline of "
            "FLUX.2 dev guides in no other way",
            "name FLUX.2 dev, or a klein (model_family flux2)",
        )


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
        siblings={"Flux2KleinPipeline": "flux2", "FluxPipeline": "flux"},
        encoders={"text_encoder": "Mistral3ForConditionalGeneration"},
        check=check_configs,
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
        return {"guidance_scale": self._input_scale(scale)}

    def snippet_call(self, info: ExportInfo) -> dict[str, Any]:
        return {**super().snippet_call(info), "guidance_scale": self._input_scale(info.sampler.guidance_scale)}

    def _input_scale(self, scale: float) -> float:
        return scale if scale > 1 else self.config.embedded_guidance

    def pipeline_arguments(self) -> Mapping[str, Any]:
        return {}

    def from_network(self, latents: Tensor, *, size: tuple[int, int]) -> Tensor:
        edges = size[1] // self.scale_factor, size[0] // self.scale_factor
        return latents.transpose(1, 2).unflatten(2, edges)


def conversations(prompts: Sequence[str]) -> list[Any]:
    """Return prompts as dev's pipeline hands them to the language model, after its system prompt."""
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    return format_input(list(prompts))


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [Flux2Dev]
