"""A model in diffusers layout: its configs, its text encoders, its autoencoder, its noise."""

from __future__ import annotations

import gc
import hashlib
import inspect
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...core.diffusion.schedule import Schedule, from_scheduler_config
from ...core.errors import DistillError, UserError
from ...core.plugin_api.family import ExtraLora, MicroConditioning, ModelFamily, ModelSettings
from ...core.plugin_api.precision import BASE, text_encoder
from ...core.utils.memory import is_out_of_memory
from ...core.utils.progress import working
from ..calls.autoencoders import kind_named
from ..calls.encoders import decode, encode_by_pieces
from ..calls.pixels import OtherDecoder, decoded, decoding_bytes
from ..calls.schedulers import check_table, linear_mu, noise_defaults, with_fixed_shift
from ..files.file_signs import agreed
from ..files.finite import check_empty_prompt, check_network
from ..files.open_source import open_source
from ..files.reading import drop_harmless, hash_files
from ..files.source import Source, TextEncoders
from ..files.tokenizers import PromptTokens
from ..files.vae import with_vae
from ..loras.lora import attach
from ..loras.lora_files import lora_file
from ..loras.loras import Loras

if TYPE_CHECKING:
    from ...core.plugin_api.batch import Conditioning
    from ..files.architecture import Architecture

    Encode = Callable[[TextEncoders, Sequence[str]], Conditioning]

logger = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 32
"""Number of prompts in one pass of the text encoders."""


class DiffusersModel(PromptTokens):
    """The part of a family that handles files, text encoders, autoencoder and noise; abstract."""

    architecture: ClassVar[Architecture]
    embed_keys: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")
    """Keys of the result of :meth:`encode_prompts`: arguments of the pipeline."""
    position_edge: ClassVar[int] = 1
    """Latents along an edge of one position of the network (a transformer's patch)."""
    native_edge: ClassVar[int] = 1024
    """Pixels along an edge of the images that the models of the family are made for."""
    upcasts_vae: ClassVar[bool] = False
    """Whether the pipeline obeys ``force_upcast`` of the autoencoder."""

    overflow_remedies: ClassVar[Mapping[Literal["text", "vae"], str]] = {
        **ModelFamily.overflow_remedies,
        "vae": "set family_config.vae_dtype to float32 or bfloat16, or name another autoencoder "
        "(pretrained_vae_model_name_or_path)",
    }

    class Config(ModelFamily.Config):
        """Settings of every family of diffusers' models, under ``family_config``."""

        variant: str | None = None
        """Variant of the weights' files, as ``fp16`` of ``model.fp16.safetensors``; local folders need none."""
        vae_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
        """Type of the autoencoder. ``auto``: float32 when its config says force_upcast and the pipeline obeys it
        (SDXL's own overflows in float16), else the type of the other frozen weights.
        """
        text_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
        """Type of the text encoders and of the embeddings that are cached; ``auto``: that of the other frozen weights.
        In bfloat16 embeddings are about 1% off; float32 makes caches twice as large (SDXL: 636 kB for 318 kB a
        caption), and encoders take twice the memory.
        """
        vae_tiling: bool = False
        """Whether large images go through the autoencoder in tiles: less memory, faint seams."""
        latents_at_once: int = Field(default=4 * 128 * 128, ge=1)
        """Latent positions of the images that are generated in one call of the pipeline (the default is four images
        of 1024 x 1024 pixels); fewer need less memory."""
        encoded_pixels_at_once: int = Field(default=1024 * 1024, ge=1)
        """Pixels of the images that the autoencoder encodes in one go, at least one image; fewer need less memory."""
        decoded_pixels_at_once: int = Field(default=1024 * 1024, ge=1)
        """Pixels of the images that the autoencoder decodes in one go; fewer need less memory."""

    def __init__(self, config: Any, settings: ModelSettings) -> None:
        super().__init__(config, settings)
        drop_harmless()
        self._text: TextEncoders | None = None
        self._vae: Any = None
        self._pixel_decoder: Any = None
        self._empty: Conditioning | None = None
        self._beside: tuple[ExtraLora, ...] = ()

    # -- for families to define ---------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, text: TextEncoders, prompts: Sequence[str]) -> Conditioning:
        """Return what :meth:`encode_prompts` returns for up to 32 prompts, on any device."""

    def scheduler_overrides(self) -> Mapping[str, Any]:
        """Return the user's settings of the noise, which override the model's scheduler config."""
        return {}

    @property
    def left_out(self) -> Collection[str]:
        """Text encoders and tokenizers that the user leaves out, of those that the model may lack."""
        return ()

    def text_settings(self) -> Sequence[str]:
        """Return the settings that decide the encoding of prompts, for the fingerprint."""
        return ()

    # -- identity ---------------------------------------------------------------------------------------------------

    @cached_property
    def _source(self) -> Source:
        return open_source(
            self.settings.source,
            self.architecture,
            revision=self.settings.revision,
            variant=self.config.variant,
            config_source=self.settings.config_source,
        )

    @cached_property
    def _vae_source(self) -> Source:
        if self.settings.vae is None:
            return self._source
        return with_vae(self.settings.vae, self._source)

    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        return self._vae_source.config("vae/config.json")

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        """The denoiser's ``config.json``."""
        return self._source.config(f"{self.architecture.denoiser}/config.json")

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The model's scheduler config, with what its class adds, what the weights' file says and what the user set.

        Raises:
            UserError: The scheduler is of no kind that has a schedule here, or the file contradicts itself.
        """
        written, chosen = self._source.config("scheduler/scheduler_config.json"), self.scheduler_overrides()
        said = agreed(self.settings.source, self._source.signs(), written, chosen)
        return {**noise_defaults(self.settings.source, written), **written, **said, **chosen}

    def _say_signs(self) -> None:
        """Say what the weights' file changes of the scheduler config beside it."""
        for sign in self._source.signs():
            if self._source.config("scheduler/scheduler_config.json").get(sign.key) != sign.value:
                logger.info("%s = %s, as the file says (%s)", sign.key, self.scheduler_config[sign.key], sign.origin)

    @cached_property
    def noise_config(self) -> dict[str, Any]:
        """The scheduler config of the run: a shift that depends on the resolution is fixed to the run's resolution."""
        width, height = self.settings.resolution or (self.native_edge, self.native_edge)
        return with_fixed_shift(self.scheduler_config, mu=self.shift_of(self.shift_positions((width, height))))

    def shift_positions(self, size: tuple[int, int]) -> int:
        """Return the number of positions by which the pipeline shifts the times of images of `size`, (width, height) in
        pixels, where its scheduler's shift depends on it.
        """
        edge = self.scale_factor * self.position_edge
        return (size[0] // edge) * (size[1] // edge)

    def shift_of(self, num_positions: int) -> float:
        """Return the mu by which the pipeline shifts the times of images of `num_positions`."""
        return linear_mu(self.scheduler_config, num_positions)

    def check_source(self) -> None:
        elsewhere = {*self.left_out, *(["vae"] if self.settings.vae is not None else [])}
        self._source.check(without=elsewhere)
        self._check_vae()
        self._source.check_weights([part for part in self.architecture.networks if part not in elsewhere])
        if self.settings.vae is not None:
            self._vae_source.check_weights(["vae"])
        self.loras.check()
        check_table(self.settings.source, self.scheduler_config, from_scheduler_config(self.scheduler_config)[0])
        self._say_signs()
        self._say_resolution()

    def _say_resolution(self) -> None:
        """Say where the run's images are far from those that the weights' file says it was made for."""
        stated, own = self._source.resolution(), self.settings.resolution
        if stated is None or own is None or 0.5 <= math.prod(own) / math.prod(stated) <= 2:
            return
        logger.warning(
            "model %s says that it was made for images of %d x %d (modelspec.resolution), this run trains at %d x %d",
            self.settings.source, *stated, *own,
        )  # fmt: skip

    @property
    def taken_channels(self) -> int:
        """Number of channels of the latents that the denoiser takes: its config's, or else its class's own."""
        if "in_channels" in self.denoiser_config:
            return int(self.denoiser_config["in_channels"])
        return int(inspect.signature(self.architecture.network_class().__init__).parameters["in_channels"].default)

    def _check_vae(self) -> None:
        if self.taken_channels != self.latent_channels:
            raise UserError(
                f"vae {self.settings.vae or self.settings.source!r} makes {self.latent_channels} channels, the model "
                f"takes {self.taken_channels}",
                f"name an autoencoder that was made for {self.architecture.name}",
            )
        self._vae_dtype()
        if self._other_decoder is not None:
            self._other_decoder.check(channels=self.latent_channels, factor=self.scale_factor)

    def fingerprint(self, part: Literal["text", "vae", "denoiser"]) -> str:
        source = self._vae_source if part == "vae" else self._source
        pieces = [source.digest(part)]
        dtypes = {"vae": self._vae_dtype, "text": self._text_dtype, "denoiser": self._weight_dtype}
        pieces += [str(dtypes[part]())]
        loras = [] if part == "vae" else [*self.settings.teacher_lora]
        loras += [(extra.path, extra.weight) for extra in self._beside] if part == "text" else []
        pieces += [f"{hash_files([lora_file(lora)])}*{weight}" for lora, weight in loras]
        pieces += self.text_settings() if part == "text" else []
        pieces += self._quantised(part)
        if part == "denoiser":
            pieces += sorted(f"{key}={value}" for key, value in self.scheduler_config.items() if key[0] != "_")
        return hashlib.sha256("\n".join(pieces).encode()).hexdigest()[:16]

    def _quantised(self, part: str) -> list[str]:
        encoders = [text_encoder(number) for number in range(1, len(self.architecture.encoders) + 1)]
        networks = {"text": encoders, "denoiser": [BASE]}.get(part, [])
        return [self.settings.precision.identity(one) for one in networks if self.settings.precision.quantises(one)]

    @cached_property
    def prediction_type(self) -> str:  # asked for at every step, and a table of noise is made for it
        return from_scheduler_config(self.scheduler_config)[1]

    @cached_property
    def schedule(self) -> Schedule:
        return from_scheduler_config(self.noise_config)[0]

    @property
    def latent_channels(self) -> int:
        return kind_named(self.architecture.autoencoder).channels(self._vae_config)

    @property
    def scale_factor(self) -> int:
        return kind_named(self.architecture.autoencoder).factor(self._vae_config)

    # -- encoders ---------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return self.in_pieces(prompts, self.encode)

    def in_pieces(self, prompts: Sequence[str], encode: Encode) -> Conditioning:
        """Return what `encode` makes of all prompts, 32 at a time, on the CPU."""
        text, at_once = self._text_encoders(), PROMPTS_AT_ONCE
        pieces = [encode(text, prompts[at : at + at_once]) for at in range(0, len(prompts), at_once)]
        return {key: torch.cat([piece[key] for piece in pieces]).cpu() for key in pieces[0]}

    def _text_encoders(self) -> TextEncoders:
        if self._text is None:
            with working("loading the text encoders"):
                self._text = self._load_text()
        return self._text

    def _load_text(self) -> TextEncoders:
        fused = self.loras.of_encoders()
        text = self._source.load_text(torch.float32 if fused else self._text_dtype(), without=self.left_out)
        own = {name: text.encoders[name] for name in self.architecture.lora_encoders}
        self.loras.fuse(own, fused)
        for number, name in enumerate(self.architecture.encoders, 1):
            if name in text.encoders:
                self._place_encoder(text.encoders[name], number)
        extras = [self.loras.plain(extra.path, extra.weight) for extra in self._beside]
        attach(self.architecture, own, {f"extra_{n}": lora for n, lora in enumerate(extras)})
        for encoder in text.encoders.values():
            self._finalize(encoder.requires_grad_(False).eval())
        return text

    def _place_encoder(self, encoder: Any, number: int) -> None:
        encoder.to(self._text_dtype()).requires_grad_(False)
        self.check_weights(f"text encoder {number}", encoder)
        wide = encoder._keep_in_fp32_modules or ()  # their type decides that of what comes before them
        self.settings.precision.place(encoder, text_encoder(number), device=self.settings.device, keep=tuple(wide))

    def check_weights(self, part: str, network: nn.Module) -> None:
        """Raise UserError if the weights of a component are not finite; it costs one pass over them in memory."""
        name = self.settings.vae or self.settings.source if part == "vae" else self.settings.source
        check_network(name, part, network, loras=bool(self.settings.teacher_lora) and part != "vae")

    def _finalize(self, encoder: Any) -> None:
        """Move the LoRAs attached to `encoder` to the type and device of its other weights."""
        for name, weight in encoder.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.to(self.settings.device, self._text_dtype())

    @cached_property
    def loras(self) -> Loras:
        """The LoRAs that the run names, compared with this model."""
        return Loras(self.architecture, self._source, self.settings, self.left_out)

    def condition(self, embeds: Conditioning, micro: MicroConditioning) -> Conditioning:
        return dict(embeds)

    def uncond(self, cond: Conditioning) -> Conditioning:
        """Return the encoded empty prompt."""
        if self._empty is None:
            loaded = self._text is not None
            self._empty = self.encode_negative([""])
            check_empty_prompt(self._empty, self.overflow_remedies["text"])
            self._text = self._text if loaded else None
        return {**cond, **{key: value.to(cond[key]).expand_as(cond[key]) for key, value in self._empty.items()}}

    def encode_images(self, pixels: Tensor, generator: Sequence[torch.Generator] | None = None) -> Tensor:
        at_once, vae = max(1, self.config.encoded_pixels_at_once // pixels[0, 0].numel()), self._autoencoder()
        try:
            return encode_by_pieces(vae, pixels, generator, at_once=at_once)
        except (RuntimeError, MemoryError) as error:
            if self.config.vae_tiling or not is_out_of_memory(error):
                raise
            height, width = pixels.shape[-2:]
            raise DistillError(
                f"out of memory: the autoencoder has no room for one image of {width}x{height}\n"
                f"  What is cached stays. Set family_config.{self.name}.vae_tiling=true (tiles, with faint seams), or "
                "a lower resolution."
            ) from error

    def decode_latents(self, latents: Tensor) -> Tensor:
        at_once = max(1, self.config.decoded_pixels_at_once // (latents[0, 0].numel() * self.scale_factor**2))
        return torch.cat([decode(self._autoencoder(), piece) for piece in latents.split(at_once)])

    def decode_pixels(self, latents: Tensor) -> Tensor:
        self.load_pixel_decoder()
        return decoded(self._pixel_decoder, latents)

    @cached_property
    def _other_decoder(self) -> OtherDecoder | None:
        name = self.settings.pixel_decoder
        return None if name is None else OtherDecoder(name, self.architecture)

    def load_pixel_decoder(self) -> None:
        if self._pixel_decoder is None:
            other = self._other_decoder
            self._pixel_decoder = self._autoencoder() if other is None else other.load(self.settings.device)

    def decoding_bytes(self, num_pixels: int) -> int:
        other, item = self._other_decoder, self._vae_dtype().itemsize
        return decoding_bytes(other.config if other else self._vae_config, num_pixels, item=4 if other else item)

    def _autoencoder(self) -> Any:
        if self._vae is None:
            with working("loading the autoencoder"):
                vae: Any = self._vae_source.load_vae(self._vae_dtype())
                if self.config.vae_tiling:
                    vae.enable_tiling()
                vae = vae.requires_grad_(False).eval().to(self.settings.device)
                self.check_weights("vae", vae)
                self._vae = vae
        return self._vae

    def _vae_dtype(self) -> torch.dtype:
        upcast = self.upcasts_vae and bool(self._vae_config.get("force_upcast", True))
        asked = self.config.vae_dtype
        if asked == "float16" and upcast:
            raise UserError(
                "family_config.vae_dtype = 'float16', but this autoencoder overflows in float16 (force_upcast)",
                "use float32 or bfloat16, or an autoencoder that was fixed for float16 "
                "(pretrained_vae_model_name_or_path: madebyollin/sdxl-vae-fp16-fix)",
            )
        if asked != "auto":
            return getattr(torch, asked)
        return torch.float32 if upcast else self._weight_dtype()

    def _text_dtype(self) -> torch.dtype:
        asked = self.config.text_dtype
        return self._weight_dtype() if asked == "auto" else getattr(torch, asked)

    def _weight_dtype(self) -> torch.dtype:
        return getattr(torch, self.settings.weight_dtype)

    def release_encoders(self) -> None:
        self._text = None
        self._vae = self._pixel_decoder if self._other_decoder is None else None  # training goes on with it
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
