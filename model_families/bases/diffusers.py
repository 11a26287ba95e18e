"""The base of families made of diffusers' models: networks, images, students on disk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.diffusion.sampler import Sampler
from ...core.diffusion.second_time import differentiable_forward, load_second_time, sampled_by
from ...core.plugin_api.family import ExportInfo, ExtraLora
from ...core.plugin_api.precision import BASE
from ...core.plugin_api.quantizer import replace_module
from ...core.utils.files import whole_folder
from ...core.utils.full_precision import compute_in_fp32
from ...core.utils.progress import working
from ..calls.images import build_pipeline, call_arguments, evaluating, named_times, sample_latents
from ..calls.schedulers import build_scheduler
from ..files.empty import empty_network, filled_denoiser
from ..files.reading import quiet_libraries
from ..files.source import FolderSource
from ..loras.fusing import fused_weights
from ..loras.lora import attach
from ..loras.lora_files import student_folder
from ..loras.lora_tools import LoraFiles, stored_precision
from . import export as exporting
from .encoder_memory import EncoderMemory
from .usage import usage_snippet

if TYPE_CHECKING:
    from ...core.plugin_api.batch import Conditioning
    from ..files.source import Source


class DiffusersFamily(EncoderMemory, LoraFiles):
    """A model in diffusers layout with a plain text-to-image pipeline; subclasses define what differs."""

    ends: ClassVar[tuple[str, ...]] = ()
    """The network's first module and its last ones, which compute in fp32 in runs of half precision. The
    :meth:`predict` of a family that names them takes the types of the network's inputs from :meth:`weight_type` and
    :func:`.full_precision.input_type`."""
    one_by_one: ClassVar[bool] = False
    """Whether the pipeline makes another image of a prompt beside longer ones, so that each has a call of its own."""

    # -- for families to define ---------------------------------------------------------------------------------------

    @property
    def default_steps(self) -> int:
        """Default number of steps of the pipeline's call."""
        return 50

    @abstractmethod
    def input_weight(self, network: nn.Module) -> Tensor:
        """Return the weight of the network's input layer, which is on the network's device and is not quantised."""

    @abstractmethod
    def takes_guidance(self, network: nn.Module) -> bool:
        """Return True if the network takes the guidance scale as an input."""

    def pipeline_arguments(self) -> Mapping[str, Any]:
        """Return arguments of the exported pipeline's constructor, read from the model."""
        return {}

    def guidance_call(self, network: nn.Module, scale: float) -> dict[str, Any]:
        """Return arguments of the pipeline's call that guide `network` by `scale` (0 and 1: off)."""
        return {"guidance_scale": scale}

    def sampler_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return a sampler's arguments of the pipeline's call, its steps among them, as this pipeline takes them."""
        return named_times(self.architecture, call)

    def completed_call(self, call: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for images of `size`, with those that follow from the others."""
        return dict(call)

    def pipeline_prompts(self, embeds: Conditioning, prefix: str = "") -> dict[str, Any]:
        """Return the arguments of the pipeline's call for encoded prompts: tensors (B, ...), or lists of B tensors.

        Args:
            embeds: The :attr:`embed_keys` of what :meth:`encode_prompts` returned.
            prefix: What their names begin with: ``negative_`` for the unconditional.
        """
        return {f"{prefix}{key}": value for key, value in embeds.items()}

    def to_network(self, latents: Tensor) -> Tensor:
        """Return latents (B, C, h, w) in the form in which the pipeline gives them to the network."""
        return latents

    def from_network(self, latents: Tensor, *, size: tuple[int, int]) -> Tensor:
        """Return latents (B, C, h, w) from the network's form; the inverse of :meth:`to_network`.

        Args:
            latents: As the pipeline returns them.
            size: (width, height) of the images in pixels.
        """
        return latents

    def pipeline_around(self, network: nn.Module, scheduler: Any) -> Any:
        """Return the plain pipeline without text encoders and autoencoder: embeddings in, latents out."""
        return build_pipeline(self.architecture, network, scheduler, scale_factor=self.scale_factor)

    # -- network ----------------------------------------------------------------------------------------------------

    def load_network(self) -> nn.Module:
        with working("loading the teacher"):
            network: Any = self._source.load_denoiser(self._weight_dtype())
            ends = self._fuse_loras(network, self._wide_ends(network, self._source))
            with quiet_libraries():
                network = self.on_device(network, ends=ends)
        return network.requires_grad_(False).eval()

    def _fuse_loras(self, network: nn.Module, ends: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fuse the teacher's LoRAs into `network`, each weight in float32 and rounded once; return its ends so fused.

        Args:
            network: In host memory, in the type of the frozen weights.
            ends: Its ends in fp32, as :meth:`_wide_ends` returns them.
        """
        own = dict(network.named_parameters())
        same = {name: ends.get(name, weight.data) for name, weight in own.items()}
        for name, value in self._fused_weights(same if not self._half else None):
            own[name].data.copy_(value)
            ends = {**ends, name: value} if name in ends else ends
        return dict(ends)

    def _fused_weights(self, wide: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that the teacher's LoRAs change, in fp32; `wide` are the model's own, else its files'."""

        def read(names: Sequence[str]) -> Iterable[tuple[str, Tensor]]:
            return self._source.wide_weights(names) if wide is None else ((name, wide[name]) for name in names)

        part, loras = self.architecture.denoiser, self.loras.teacher()
        return fused_weights(self.architecture, part, self.empty_network(), loras, read=read)

    def on_device(self, network: nn.Module, *, ends: Mapping[str, Tensor]) -> nn.Module:
        """Move `network` to the device, in the type of the frozen weights, quantised where the run asks for it.

        Args:
            network: In host memory.
            ends: Weights of its :attr:`ends`, which stay fp32 and are not quantised; none in a run without half
                precision.
        """
        network = network.to(self._weight_dtype()).requires_grad_(False)
        network.load_state_dict(ends, strict=False, assign=True)
        network = self.laid_out(network)
        self.check_weights(self.architecture.denoiser, network)
        first = self.input_weight(network)
        kept = [name.removesuffix(".weight") for name, weight in network.named_parameters() if weight is first]
        # taken out meanwhile: a name to keep is that of every layer inside that ends with it
        held = {end: network.get_submodule(end) for end in self._ends_of(network)} if ends else {}
        for end in held:
            replace_module(network, end, nn.Identity())
        network = self.settings.precision.place(network, BASE, device=self.settings.device, keep=kept)
        for end, module in held.items():
            replace_module(network, end, module.to(self.settings.device))
        return self.with_wide_ends(network)

    def _ends_of(self, network: nn.Module) -> list[str]:
        there = dict(network.named_modules())
        return [end for end in self.ends if end in there]

    @property
    def _half(self) -> bool:
        return self._weight_dtype() != torch.float32

    def _wide_ends(self, network: nn.Module, source: Source) -> dict[str, Tensor]:
        """Return the weights of the ends of `network` in fp32, from its files unless it is fp32 itself; none in a run
        without half precision.
        """
        if not self._half:
            return {}
        state = network.state_dict()
        names = [name for name in state if name.startswith(tuple(f"{end}." for end in self.ends))]
        if any(state[name].dtype != torch.float32 for name in names):
            return dict(source.wide_weights(names))
        return {name: state[name].clone() for name in names}

    def with_wide_ends(self, network: nn.Module) -> nn.Module:
        """Make the :attr:`ends` of `network` compute in fp32 in a run of half precision; return the network."""
        if self._half and self.ends:
            first, *last = self._ends_of(network)
            compute_in_fp32(network, first=first, last=last)
            # diffusers' pipelines and loaders pass them over when they ask for the network's type
            network._keep_in_fp32_modules = list(self.ends)  # type: ignore[assignment]
        return network

    def weight_type(self, network: nn.Module) -> torch.dtype:
        """Return the type of the network's weights, its :attr:`ends` aside."""
        ends = tuple(f"{end}." for end in self.ends)
        inner = (weight for name, weight in network.named_parameters() if not name.startswith(ends))
        return next(weight.dtype for weight in inner if weight.is_floating_point())

    def copy_network(self, teacher: Any) -> Any:
        """Return a trainable fp32 copy of `teacher`, its weights read from the files."""
        state, device = self.wide_state(), self.settings.device
        student = filled_denoiser(self.architecture, dict(teacher.config), state, device=device)
        return self.with_wide_ends(student.requires_grad_(True).eval())

    def wide_state(self, names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
        """Return the denoiser's weights in fp32 as the files have them, the teacher's LoRAs fused, on the device.

        They are read one by one, whatever the type of the teacher in memory.

        Args:
            names: Names of the result -> the denoiser's own; None: all, by their own names.
        """
        device = self.settings.device
        wanted = None if names is None else set(names.values())
        found = chain(self._source.wide_weights(wanted), self._fused_weights())  # the latter in the former's place
        own = {name: value.to(device) for name, value in found if wanted is None or name in wanted}
        return own if names is None else {new: own[old] for new, old in names.items()}

    def laid_out(self, network: nn.Module) -> nn.Module:
        """Return `network` with its weights in the memory layout that is fastest for its kernels."""
        return network

    def empty_network(self) -> nn.Module:
        return empty_network(self.architecture, self.architecture.denoiser, self.denoiser_config)

    def attach_adapter(self, network: nn.Module, path: str, adapter: str) -> None:
        attach(self.architecture, {self.architecture.denoiser: network}, {adapter: self.loras.plain(path)})
        load_second_time(network, student_folder(path), name=adapter)

    def forward_ad(self) -> AbstractContextManager[None]:
        return differentiable_forward()

    # -- images and export ----------------------------------------------------------------------------------------

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
        embedded = self.takes_guidance(network)
        call = call_arguments(
            sampler,
            own=(self.default_steps, self.usual_guidance),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_embedding=embedded,
        )
        scale = call.pop("guidance_scale")
        call = {**self.sampler_call(call), **self.guidance_call(network, scale)}
        call = self.completed_call(call, (width, height))
        embeds = {key: embeds[key] for key in self.embed_keys}
        negative = None
        if scale > 1 and not embedded:
            negative = self.uncond(embeds) if negative_embeds is None else negative_embeds
        scheduler = self.scheduler(sampler)
        pipeline = self.pipeline_around(network, scheduler)
        edge = min(self.scale_factor, 8)  # a latent of more pixels is several
        fitting = max(1, self.config.latents_at_once * edge**2 // (width * height))
        at_once = 1 if self.one_by_one else fitting
        images = []
        with evaluating(network), sampled_by(network, scheduler):
            for at in range(0, len(seeds), at_once):
                chosen = slice(at, at + at_once)
                latents = self._sample(
                    pipeline,
                    {key: value[chosen] for key, value in embeds.items()},
                    negative and {key: negative[key][chosen] for key in embeds},
                    seeds=seeds[chosen],
                    size=(width, height),
                    call=call,
                )
                images.append(self.decode_latents(latents).cpu())
        return torch.cat(images)

    def _sample(
        self,
        pipeline: Any,
        embeds: Conditioning,
        negative: Conditioning | None,
        *,
        seeds: Sequence[int],
        size: tuple[int, int],
        call: Mapping[str, Any],
    ) -> Tensor:
        """Return scaled latents (B, C, h, w) from one call of the pipeline, each with its own CPU generator's noise."""
        network = getattr(pipeline, self.architecture.denoiser)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        shape = (1, self.latent_channels, size[1] // self.scale_factor, size[0] // self.scale_factor)
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        latents = sample_latents(
            pipeline,
            {**self.pipeline_prompts(embeds), **(self.pipeline_prompts(negative, "negative_") if negative else {})},
            noise=self.to_network(noise.to(self.input_weight(network).device, self.weight_type(network))),
            generators=generators,
            size=size,
            call=call,
        )
        return self.from_network(latents, size=size)

    def scheduler(self, sampler: Sampler | None) -> Any:
        """Return the diffusers scheduler of `sampler` over this model's noise process, or the model's own."""
        return build_scheduler(self.scheduler_config if sampler is None else self.noise_config, sampler)

    def export(self, network: nn.Module, folder: Path, info: ExportInfo) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        scheduler = self.scheduler(info.sampler)
        if info.model_type == "lora":
            exporting.export_lora(self.architecture, network, folder, info)
        else:
            self._export_pipeline(network, folder, scheduler, self._autoencoder(), info)
        exporting.export_sampler(self.architecture, network, folder, scheduler, info)

    def _export_pipeline(self, network: Any, folder: Path, scheduler: Any, vae: Any, info: ExportInfo) -> None:
        text = self._text_encoders()
        exporting.export_pipeline(
            self.architecture, network, folder, scheduler, text, vae, info=info, arguments=self.pipeline_arguments()
        )
        exporting.file_encoders(folder, text, self._source.config)

    def export_fused(self, folder: Path) -> None:
        with working("fusing the denoiser"):
            network: Any = self._source.load_denoiser(self._weight_dtype())
            self._fuse_loras(network, {})
        info = ExportInfo(Sampler("", {}, self.default_steps, self.usual_guidance), "full")
        vae = self._autoencoder()
        with quiet_libraries():
            vae.to(getattr(torch, stored_precision(self._vae_source, "vae")))
        with whole_folder(folder) as partial, working(f"writing {folder.name}/"):
            self._export_pipeline(network, partial, self.scheduler(None), vae, info)

    def load_student(self, folder: Path, *, extra_loras: Sequence[ExtraLora] = ()) -> nn.Module:
        loras = exporting.student_lora(self.architecture, folder)
        named = [*loras, *((extra.path, extra.weight) for extra in extra_loras)]
        names = [*("student" for _ in loras), *(f"extra_{n}" for n in range(len(extra_loras)))]
        adapters = {
            adapter: self.loras.plain(path, weight) for adapter, (path, weight) in zip(names, named, strict=True)
        }
        network = self.load_network() if loras else self._exported(folder)
        self._put_beside(extra_loras)
        attach(self.architecture, {self.architecture.denoiser: network}, adapters)
        if loras:
            exporting.refill(self.architecture, network, folder, adapter="student")
        load_second_time(network, folder, name="student")
        return network.requires_grad_(False)

    def _exported(self, folder: Path) -> nn.Module:
        """Load the denoiser of a fully trained student. Raises UserError where its weights are not complete."""
        source = FolderSource(str(folder), self.architecture)
        network = source.load_denoiser(self._weight_dtype())
        network.load_state_dict(self._wide_ends(network, source), strict=False, assign=True)
        return self.with_wide_ends(network.to(self.settings.device).eval())

    def _put_beside(self, extra_loras: Sequence[ExtraLora]) -> None:
        """Use these LoRAs' text-encoder parts from now on; encoded prompts change only where a LoRA has such parts."""
        if tuple(extra_loras) != self._beside:
            self._beside = tuple(extra_loras)
            self._text = None
            self._empty = None

    @property
    def flow_needs_help(self) -> bool:
        """True if the pipeline asks its scheduler for attributes that flow schedulers lack."""
        return False

    def usage_snippet(self, info: ExportInfo) -> str:
        sampler = info.sampler
        call = {"num_inference_steps": sampler.num_inference_steps, **self.snippet_call(info)}
        call |= self.sampler_call(sampler.call)
        return usage_snippet(
            self.architecture,
            self.settings,
            info,
            variant=self._source.variant_to_load(),
            absent=[part for part in self.architecture.optional if part in self.left_out or not self._source.has(part)],
            neutral=self.flow_needs_help,
            by_hand=[lora for lora, _ in self.settings.teacher_lora if not self.loras.read_by_diffusers(lora)],
            call=call,
        )

    def snippet_call(self, info: ExportInfo) -> dict[str, Any]:
        """Return arguments of a plain call that make the engine's images: guidance, and other non-default values."""
        return {"guidance_scale": info.sampler.guidance_scale}
