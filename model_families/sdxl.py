"""Stable Diffusion XL: a UNet with two CLIP text encoders and per-sample micro-conditioning.

The network sees the penultimate states of both encoders, concatenated (B, 77, 2048), the pooled embedding of the second
(B, 1280), and six time ids per sample: original height and width, top and left of the crop, target height and width.

References:
    Podell et al., SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis, arXiv 2307.01952.
    Meng et al., On Distillation of Guided Diffusion Models (guidance embedding), arXiv 2210.03142.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.diffusion.schedule import Schedule, from_scheduler_config
from ..core.errors import UserError
from ..core.family import Capabilities, ExportInfo, ExtraLora, MicroConditioning, ModelFamily, ModelSettings
from ..core.hookspecs import hookimpl
from ..core.second_time import differentiable_forward, load_second_time, sampled_by, telling
from . import _sdxl_export as exporting
from ._sdxl_encoders import decode, encode_pixels, encode_text
from ._sdxl_files import hash_files, quiet_libraries
from ._sdxl_lora import TEXT_PREFIXES, Lora, attach, fuse, lora_file, read_lora, student_folder
from ._sdxl_network import call_unet, copy_unet, unet_feature_channels, unet_features, unet_second_time
from ._sdxl_pictures import build_pipeline, build_scheduler, call_arguments, evaluating, sample_latents
from ._sdxl_source import Source, TextEncoders, empty_unet, open_source
from ._sdxl_vae import with_vae

if TYPE_CHECKING:
    from ..core.batch import Conditioning
    from ..core.method import Sampler

LCM_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
PROMPTS_AT_ONCE = 32
"""Prompts in one pass of the text encoders."""


class SDXL(ModelFamily):
    """Stable Diffusion XL and its fine-tunes."""

    name: ClassVar[str] = "sdxl"
    capabilities: ClassVar[Capabilities] = Capabilities(
        lora=True, full=True, guidance_embedding=True, second_time=True, features=True
    )
    lora_targets: ClassVar[tuple[str, ...]] = LCM_TARGETS
    pixel_multiple: ClassVar[int] = 8
    miniature: ClassVar[Path | None] = Path(__file__).parent / "assets" / "sdxl_miniature"

    class Config(ModelFamily.Config):
        """Settings of the SDXL family, under ``family_config``."""

        variant: str | None = None
        """Variant of the weights' files, as ``fp16`` of ``model.fp16.safetensors``; local folders need none."""
        vae_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
        """Type of the autoencoder. ``auto``: float32 when its config says force_upcast (SDXL's own overflows in
        float16), else the type of the other frozen weights."""
        vae_tiling: bool = False
        """Whether large pictures go through the autoencoder in tiles: less memory, faint seams."""
        prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
        """What the network predicts, for models whose scheduler config does not say so."""
        rescale_betas_zero_snr: bool | None = None
        """Whether the model was trained with zero terminal SNR, for models whose scheduler config does not say so."""
        latents_at_once: int = Field(default=4 * 128 * 128, ge=1)
        """Latent positions of the pictures that are generated in one call of the pipeline (the default is four pictures
        of 1024 x 1024 pixels); fewer need less memory."""
        decoded_pixels_at_once: int = Field(default=1024 * 1024, ge=1)
        """Pixels of the pictures that the autoencoder decodes in one go; fewer need less memory."""

    def __init__(self, config: Any, settings: ModelSettings) -> None:
        super().__init__(config, settings)
        self._text: TextEncoders | None = None
        self._vae: Any = None
        self._empty: Conditioning | None = None
        self._beside: tuple[ExtraLora, ...] = ()

    # -- identity ---------------------------------------------------------------------------------------------------

    @cached_property
    def _source(self) -> Source:
        return open_source(
            self.settings.source,
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
    def scheduler_config(self) -> dict[str, Any]:
        """The model's scheduler config, with what the user says of its noise over it."""
        own = self._source.config("scheduler/scheduler_config.json")
        said = {key: getattr(self.config, key) for key in ("prediction_type", "rescale_betas_zero_snr")}
        return {**own, **{key: value for key, value in said.items() if value is not None}}

    def check_source(self) -> None:
        self._source.check()
        for lora, _ in self.settings.teacher_lora:
            lora_file(lora)
        if self.prediction_type not in ("epsilon", "v_prediction", "sample", "flow"):
            raise UserError(
                f"model {self.settings.source!r} predicts {self.prediction_type!r} (scheduler_config.json)",
                "set family_config.prediction_type to epsilon, v_prediction or sample",
            )
        self._check_vae()

    def _check_vae(self) -> None:
        channels = self._source.config("unet/config.json").get("in_channels")
        if channels != self.latent_channels:
            raise UserError(
                f"vae {self.settings.vae!r} makes {self.latent_channels} channels, the model takes {channels}",
                "name an autoencoder that was made for SDXL",
            )
        self._vae_dtype()

    def fingerprint(self, part: Literal["text", "vae", "denoiser"]) -> str:
        source = self._vae_source if part == "vae" else self._source
        pieces = [source.digest(part)]
        dtype = self._vae_dtype() if part == "vae" else self._weight_dtype()
        pieces += [str(dtype)]
        loras = [] if part == "vae" else [*self.settings.teacher_lora]
        loras += [(extra.path, extra.weight) for extra in self._beside] if part == "text" else []
        pieces += [f"{hash_files([lora_file(lora)])}*{weight}" for lora, weight in loras]
        if part == "denoiser":
            pieces += sorted(f"{key}={value}" for key, value in self.scheduler_config.items() if key[0] != "_")
        return hashlib.sha256("\n".join(pieces).encode()).hexdigest()[:16]

    @property
    def prediction_type(self) -> str:
        return from_scheduler_config(self.scheduler_config)[1]

    @cached_property
    def schedule(self) -> Schedule:
        return from_scheduler_config(self.scheduler_config)[0]

    @property
    def latent_channels(self) -> int:
        return int(self._vae_config.get("latent_channels", 4))

    @property
    def scale_factor(self) -> int:
        return 2 ** (len(self._vae_config["block_out_channels"]) - 1)

    @cached_property
    def zeros_for_uncond(self) -> bool:
        """``force_zeros_for_empty_prompt`` of the pipeline."""
        return bool(self._source.config("model_index.json").get("force_zeros_for_empty_prompt", True))

    # -- encoders ---------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        text, at_once = self._text_encoders(), PROMPTS_AT_ONCE
        pieces = [encode_text(text, prompts[at : at + at_once]) for at in range(0, len(prompts), at_once)]
        return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}

    def _text_encoders(self) -> TextEncoders:
        if self._text is None:
            fused = self._loras(self.settings.teacher_lora)
            text = self._source.load_text(torch.float32 if fused else self._weight_dtype())
            encoders: dict[str, nn.Module] = dict(zip(TEXT_PREFIXES, text.encoders, strict=True))
            fuse(encoders, fused)
            extras = self._loras([(extra.path, extra.weight) for extra in self._beside])
            attach(encoders, {f"extra_{n}": lora for n, lora in enumerate(extras)})
            for encoder in text.encoders:
                encoder.to(self.settings.device, self._weight_dtype()).requires_grad_(False).eval()
            self._text = text
        return self._text

    def _loras(self, named: Sequence[tuple[str, float]]) -> list[Lora]:
        return [read_lora(name, weight, self._source.config("unet/config.json")) for name, weight in named]

    def condition(self, embeds: Conditioning, micro: MicroConditioning) -> Conditioning:
        sizes = zip(micro.original_size, micro.crop_top_left, micro.target_size, strict=True)
        ids = [[*original, *crop, *target] for original, crop, target in sizes]
        device = embeds["prompt_embeds"].device
        return {**embeds, "time_ids": torch.tensor(ids, dtype=torch.float32, device=device)}

    def uncond(self, cond: Conditioning) -> Conditioning:
        if self.zeros_for_uncond:
            zeros = {key: torch.zeros_like(cond[key]) for key in ("prompt_embeds", "pooled_prompt_embeds")}
            return {**cond, **zeros}
        if self._empty is None:
            loaded = self._text is not None
            self._empty = self.encode_prompts([""])
            self._text = self._text if loaded else None
        return {**cond, **{key: value.to(cond[key]).expand_as(cond[key]) for key, value in self._empty.items()}}

    def encode_images(self, pixels: Tensor, generator: Sequence[torch.Generator] | None = None) -> Tensor:
        return encode_pixels(self._autoencoder(), pixels, generator)

    def decode_latents(self, latents: Tensor) -> Tensor:
        at_once = max(1, self.config.decoded_pixels_at_once // (latents[0, 0].numel() * self.scale_factor**2))
        return torch.cat([decode(self._autoencoder(), piece) for piece in latents.split(at_once)])

    def _autoencoder(self) -> Any:
        if self._vae is None:
            vae: Any = self._vae_source.load_vae(self._vae_dtype())
            if self.config.vae_tiling:
                vae.enable_tiling()
            self._vae = vae.requires_grad_(False).eval().to(self.settings.device)
        return self._vae

    def _vae_dtype(self) -> torch.dtype:
        upcast = bool(self._vae_config.get("force_upcast", True))
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

    def _weight_dtype(self) -> torch.dtype:
        return getattr(torch, self.settings.weight_dtype)

    def release_encoders(self) -> None:
        self._text = None
        self._vae = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- network ----------------------------------------------------------------------------------------------------

    def load_network(self) -> nn.Module:
        loras = self._loras(self.settings.teacher_lora)
        dtype = torch.float32 if loras else self._weight_dtype()  # fused in float32, rounded once
        network: Any = self._source.load_unet(dtype)
        fuse({"unet": network}, loras)
        with quiet_libraries():
            network = network.to(self.settings.device, self._weight_dtype(), memory_format=torch.channels_last)
        return network.requires_grad_(False).eval()

    def empty_network(self) -> nn.Module:
        return empty_unet(self._source.config("unet/config.json"))

    def attach_adapter(self, network: nn.Module, path: str, adapter: str) -> None:
        attach({"unet": network}, {adapter: self._loras([(path, 1.0)])[0]})
        load_second_time(network, student_folder(path), name=adapter)

    def student_network(self, teacher: nn.Module, *, guidance_embedding: bool, second_time: bool = False) -> nn.Module:
        return copy_unet(teacher, guidance_embedding=guidance_embedding, second_time=second_time)

    def add_second_time(self, network: nn.Module, *, name: str = "student") -> nn.Module:
        return unet_second_time(network, name=name)

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
        with telling(network, time, second_time):
            return call_unet(network, x_t, time, cond, guidance=guidance)

    def forward_ad(self) -> AbstractContextManager[None]:
        return differentiable_forward()

    def features(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning) -> list[Tensor]:
        return unet_features(network, x_t, time, cond)

    def feature_channels(self, network: nn.Module) -> list[int]:
        return unet_feature_channels(network)

    # -- pictures and export ----------------------------------------------------------------------------------------

    def generate(
        self,
        network: nn.Module,
        embeds: Conditioning,
        *,
        sampler: Sampler | None,
        seeds: Sequence[int],
        width: int,
        height: int,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_embeds: Conditioning | None = None,
    ) -> Tensor:
        unet: Any = network
        embedded = unet.config.time_cond_proj_dim is not None
        call = call_arguments(
            sampler,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_embedding=embedded,
        )
        embeds = {key: embeds[key] for key in ("prompt_embeds", "pooled_prompt_embeds")}
        guided = call["guidance_scale"] > 1 and not embedded
        negative = (self.uncond(embeds) if negative_embeds is None else negative_embeds) if guided else None
        scheduler = self.scheduler(sampler)
        pipeline = build_pipeline(network, scheduler, scale_factor=self.scale_factor)
        at_once = max(1, self.config.latents_at_once * self.scale_factor**2 // (width * height))
        pictures = []
        with evaluating(network), sampled_by(network, scheduler):
            for at in range(0, len(seeds), at_once):
                chosen = slice(at, at + at_once)
                latents = sample_latents(
                    pipeline,
                    {key: value[chosen] for key, value in embeds.items()},
                    negative and {key: negative[key][chosen] for key in embeds},
                    seeds=seeds[chosen],
                    size=(width, height),
                    call=call,
                )
                pictures.append(self.decode_latents(latents).cpu())
        return torch.cat(pictures)

    def scheduler(self, sampler: Sampler | None) -> Any:
        """The diffusers scheduler of `sampler` over this model's noise process, or the model's own."""
        return build_scheduler(self.scheduler_config, sampler)

    def export(self, network: nn.Module, folder: Path, info: ExportInfo) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        scheduler = self.scheduler(info.sampler)
        if info.model_type == "lora":
            exporting.export_lora(network, folder, info)
        else:
            text, vae = self._text_encoders(), self._autoencoder()
            exporting.export_pipeline(network, folder, scheduler, text, vae, info=info, zeros=self.zeros_for_uncond)
        exporting.export_sampler(network, folder, scheduler, info)

    def load_student(self, folder: Path, *, extra_loras: Sequence[ExtraLora] = ()) -> nn.Module:
        loras = exporting.student_lora(folder)
        network = self.load_network() if loras else exporting.load_unet(folder, self._weight_dtype())
        network = network.to(self.settings.device).eval()
        self._put_beside(extra_loras)
        named = [*loras, *((extra.path, extra.weight) for extra in extra_loras)]
        names = [*("student" for _ in loras), *(f"extra_{n}" for n in range(len(extra_loras)))]
        attach({"unet": network}, dict(zip(names, self._loras(named), strict=True)))
        load_second_time(network, folder, name="student")
        return network.requires_grad_(False)

    def _put_beside(self, extra_loras: Sequence[ExtraLora]) -> None:
        """Text encoders of these LoRAs from now on; encoded prompts change only where a LoRA has such parts."""
        if tuple(extra_loras) != self._beside:
            self._beside = tuple(extra_loras)
            self._text = None
            self._empty = None

    def usage_snippet(self, info: ExportInfo) -> str:
        flow = self.prediction_type == "flow"
        return exporting.usage_snippet(self.settings, info, variant=self.config.variant, flow=flow)


@hookimpl
def register_families() -> list[type[ModelFamily]]:
    """The SDXL family."""
    return [SDXL]
