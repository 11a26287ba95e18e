"""PixArt-Sigma: a transformer of 0.6 billion parameters with cross-attention to T5's states, on a table of betas.

The network takes latents (B, 4, h, w) and T5's states (B, 300, 4096), with a mask of their padding. It predicts eps and
a variance, 8 channels of which :meth:`PixArtSigma.predict` returns the first four, as the pipeline does. All blocks
read the time from one modulation, ``adaln_single``. There are no sizes among the inputs.

Prompts are in small letters without spaces around them, as the pipeline writes them where it does not clean them
(``clean_caption``, which needs two further packages). Its ``use_resolution_binning`` makes another size than is asked
for and resizes the image; both are off in the engine's images and in the snippets of students. Neither the network nor
the pipeline of diffusers takes LoRAs: :mod:`.loras.lora_loading` adds it, and snippets load a student through peft.

References:
    Chen et al., PixArt-Sigma: Weak-to-Strong Training of Diffusion Transformer for 4K Text-to-Image Generation,
    arXiv 2403.04692.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..core.errors import UserError
from ..core.plugin_api.family import ExportInfo, ModelFamily
from ..core.plugin_api.hookspecs import hookimpl
from ..core.utils.full_precision import input_type
from .bases.one_encoder import OneEncoderFamily
from .calls.encoders import masked_states
from .comfyui.kohya_pixart import KOHYA
from .files.architecture import Architecture, ReadConfig
from .files.checks import check_channels
from .files.empty import fill_tables

if TYPE_CHECKING:
    from ..core.plugin_api.batch import Conditioning
    from .files.source import TextEncoders

PLAIN: Mapping[str, Any] = {"clean_caption": False, "use_resolution_binning": False}
"""Makes the pipeline take prompts and sizes as they are."""


def check_configs(name: str, config: ReadConfig) -> None:
    """Raise UserError unless the transformer takes the latents of the model's autoencoder, and no sizes."""
    transformer = config("transformer/config.json")
    check_channels(name, "transformer", transformer.get("in_channels", 4), config("vae/config.json"))
    sizes = transformer.get("use_additional_conditions")
    if sizes or (sizes is None and transformer.get("sample_size", 128) == 128):
        raise UserError(
            f"model {name!r} takes sizes as an input, as PixArt-alpha does (transformer/config.json: "
            "use_additional_conditions), which PixArtSigmaPipeline never gives",
            "name a PixArt-Sigma, as PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        )


class PixArtSigma(OneEncoderFamily):
    """PixArt-Sigma of all resolutions, and its fine-tunes."""

    name: ClassVar[str] = "pixart-sigma"
    packages: ClassVar[Mapping[str, str]] = {"sentencepiece": "sentencepiece>=0.2"}  # published tokenizers need it
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "adaln_single.linear"),
    )
    ends = ("pos_embed", "norm_out", "proj_out")
    default_guidance: ClassVar[float] = 4.5
    time_embedder = "adaln_single.emb.timestep_embedder"
    text_widths: ClassVar[Mapping[str, str]] = {"prompt_embeds": "caption_channels"}
    pipeline_tokens: ClassVar[int] = 300
    upcasts_vae: ClassVar[bool] = True  # the pipeline does not, but it has SDXL's, which overflows in float16
    architecture: ClassVar[Architecture] = Architecture(
        title="a PixArt-Sigma",
        pipeline="PixArtSigmaPipeline",
        accepted=("PixArtSigmaPipeline",),
        denoiser="transformer",
        denoiser_class="PixArtTransformer2DModel",
        denoiser_aliases=("Transformer2DModel",),
        tokenizers={"tokenizer": "T5TokenizerFast"},
        encoders={"text_encoder": "T5EncoderModel"},
        check=check_configs,
        made_of="a PixArt-Sigma has T5 as its text encoder",
        lora_encoders=(),
        kohya=KOHYA,
    )

    @property
    def default_steps(self) -> int:
        return 20

    # -- text ---------------------------------------------------------------------------------------------------------

    def written(self, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        return [prompt.lower().strip() for prompt in prompts]

    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        tokenizer, encoder = text.pairs()[0]
        return masked_states(tokenizer, encoder, self.written(tokenizer, prompts), length=self.num_tokens)

    # -- network ------------------------------------------------------------------------------------------------------

    def on_device(self, network: nn.Module, *, ends: Mapping[str, Tensor]) -> nn.Module:
        placed: Any = super().on_device(network, ends=ends)
        # its table of positions computes in fp32 with the layer around it, and was rounded with the weights
        placed.pos_embed.pos_embed = placed.pos_embed.pos_embed.to("meta")
        fill_tables(placed, self.architecture, placed.config, device=self.settings.device)
        return placed

    def input_weight(self, network: nn.Module) -> Tensor:
        return network.get_parameter("pos_embed.proj.weight")

    def call_network(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        dtype = self.weight_type(network)
        output = network(
            x_t.to(input_type(dtype, x_t.device)),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            timestep=time,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=cond["prompt_attention_mask"],
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]

    # -- images -------------------------------------------------------------------------------------------------------

    def guidance_call(self, network: nn.Module, scale: float) -> dict[str, Any]:
        return {"guidance_scale": scale, "negative_prompt": None, **PLAIN}

    def snippet_call(self, info: ExportInfo) -> dict[str, Any]:
        return {**super().snippet_call(info), **PLAIN}


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """Return the family of this file."""
    return [PixArtSigma]
