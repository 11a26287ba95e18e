"""The contract of a model family: a teacher architecture and how to use it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from .family_parts import Guided, InnerActivations, MemoryEstimates, PixelDecoding
from .lora_tools import ExtraLora, LoraTools
from .precision import Precision, Precisions

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..diffusion.sampler import Sampler
    from ..diffusion.schedule import Schedule
    from .batch import Conditioning


@dataclass(frozen=True)
class Capabilities:
    """The abilities of a family; compared with a method's requirements before weights load."""

    lora: bool = True
    """Whether its network takes adapters."""
    full: bool = True
    """Whether :meth:`ModelFamily.student_network` makes a copy to train whole."""
    guidance_embedding: bool = False
    """Whether a student can take the guidance scale as an input, and the pipeline tells it."""
    second_time: bool = False
    """Whether :meth:`ModelFamily.predict` feeds the network a second time (:meth:`ModelFamily.add_second_time`)."""
    features: bool = False
    """Whether :meth:`ModelFamily.features` gives activations from inside the network, for discriminators."""
    pixels: bool = False
    """Whether :meth:`ModelFamily.decode_pixels` makes images with a gradient."""
    micro_conditioning: bool = False
    """Whether :meth:`ModelFamily.condition` tells the network the sizes and crops of images."""
    quantised_base: bool = False
    """Whether :meth:`ModelFamily.load_network` quantises as ``precision`` in its settings says."""
    quantised_text_encoders: int = 0
    """Number of text encoders that it can quantise, counted from the first."""


@dataclass(frozen=True)
class ModelSettings:
    """Which model to load, and how to hold it in memory.

    Attributes:
        source: Hub id, local folder in diffusers layout, or a single ``.safetensors`` file.
        vae: Another autoencoder (hub id or folder), or None for the model's own.
        pixel_decoder: A (tiny) autoencoder, hub id or folder, that decodes with a gradient; None for the model's.
        teacher_lora: The user's own LoRAs, (path or hub id, weight), fused into the teacher before distillation.
        partial_loras: Those of teacher_lora that are applied as far as they fit; of the others all must fit.
        init_lora: A LoRA that the student starts from, which is compared with the model before weights load.
        weight_dtype: Type of the frozen weights.
        device: Device of the networks.
        revision: Revision of a hub model.
        config_source: Local folder with configs and tokenizers for a single-file model where there is no hub.
        resolution: (width, height) in pixels of the run's images, for schedules that depend on it; None where the
            run names none.
        precision: Quantizes networks as they load.
    """

    source: str
    vae: str | None = None
    pixel_decoder: str | None = None
    teacher_lora: tuple[tuple[str, float], ...] = ()
    partial_loras: tuple[str, ...] = ()
    init_lora: str | None = None
    weight_dtype: Precision = "float32"
    device: str = "cpu"
    revision: str | None = None
    config_source: str | None = None
    resolution: tuple[int, int] | None = None
    precision: Precisions = field(default_factory=Precisions, compare=False)


@dataclass(frozen=True)
class MicroConditioning:
    """How each image of a batch was scaled and cropped, in pixels: (height, width) or (top, left) per sample."""

    original_size: Sequence[tuple[int, int]]
    crop_top_left: Sequence[tuple[int, int]]
    target_size: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class LoraSettings:
    """Shape of a LoRA adapter."""

    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ExportInfo:
    """How a student is exported, and facts that are written beside it.

    Attributes:
        sampler: The way in which it is run.
        model_type: What was trained.
        lora: Shape of the adapter; None for full training.
        adapter: Name of the adapter.
        metadata: Further facts, for the header of the file.
        dtype: Type of the exported weights; None: the one that they were trained in.
        rounding: Norm of what that type rounds away, over the norm of the trained weights; None where nothing is.
    """

    sampler: Sampler
    model_type: Literal["lora", "full"]
    lora: LoraSettings | None = None
    adapter: str = "student"
    metadata: Mapping[str, str] = field(default_factory=dict)
    dtype: Precision | None = None
    rounding: float | None = None


class ModelFamily(Guided, InnerActivations, PixelDecoding, MemoryEstimates, LoraTools, ABC):
    """A teacher architecture: load, encode, predict, decode, generate, export.

    Components load when they are first needed and can be released; :meth:`fingerprint` identifies them without loading.
    The methods below never touch adapters or ``requires_grad``: the engine does.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[Mapping[str, str]] = {}
    """Import name -> name to pip install, for packages that only this family needs."""
    capabilities: ClassVar[Capabilities]
    lora_targets: ClassVar[tuple[str, ...]]
    """Suffixes of the names of modules that a LoRA adapts unless the user says otherwise."""
    pixel_multiple: ClassVar[int] = 8
    """Edges of images, in pixels, must be multiples of this for any model of the family (an instance may be laxer)."""
    default_guidance: ClassVar[float] = 5.0
    """Guidance scale that its images are usually generated with; the teacher's, where a run names none."""
    overflow_remedies: ClassVar[Mapping[Literal["text", "vae"], str]] = {
        "text": "use mixed_precision=bf16 or no, or restore the text encoder's weights",
        "vae": "use mixed_precision=bf16 or no, or another autoencoder (pretrained_vae_model_name_or_path)",
    }
    """What users can do where the text encoders or the autoencoder give values that are not finite."""
    miniature: ClassVar[Path | None] = None
    """Folder of the trained miniature that ships with the package: model, ``recipe.json`` with run defaults."""

    class Config(BaseModel):
        """The family's own settings, under ``family_config``."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def __init__(self, config: Any, settings: ModelSettings) -> None:
        self.config = config
        self.settings = settings

    @classmethod
    def example(cls, folder: Path) -> Path | None:
        """Return the folder of a small model for the conformance suite (:mod:`.testing`), or None where there is none.

        It is written into `folder`, or ships with the plugin. The best is a random model of a few hundred thousand
        weights, with every part of the real architecture.
        """
        return cls.miniature

    # -- identity ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def check_source(self) -> None:
        """Raise UserError, without loading weights, if the source is not a model of this family."""

    @abstractmethod
    def fingerprint(self, part: Literal["text", "vae", "denoiser"]) -> str:
        """Return a short hash, made from files, of all that decides this part's output, fused LoRAs included."""

    @property
    @abstractmethod
    def prediction_type(self) -> str:
        """``epsilon``, ``v_prediction``, ``sample`` or ``flow``, from the model's scheduler config."""

    @property
    @abstractmethod
    def schedule(self) -> Schedule:
        """The noise schedule, read from the model's scheduler config."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Number of channels C of the latents."""

    @property
    @abstractmethod
    def scale_factor(self) -> int:
        """Pixels per latent along an edge, of the loaded model (the autoencoder's compression)."""

    @property
    def usual_guidance(self) -> float:
        """Guidance scale that images of this very model are usually generated with."""
        return self.default_guidance

    @property
    def guided_by_input(self) -> bool:
        """True if the teacher takes the guidance scale as an input; guidance then costs one call of the network."""
        return False

    # -- encoders ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return text embeddings that can be cached, each of shape (B, ...), on the CPU."""

    @property
    def max_prompt_tokens(self) -> int | None:
        """The number of tokens of a prompt that its text encoders read, without marks of beginning and end: the rest is
        cut off. None where nothing is, or where it is unknown.
        """
        return None

    def count_tokens(self, prompts: Sequence[str]) -> Sequence[int]:
        """Return the number of tokens of each whole prompt, as :attr:`max_prompt_tokens` counts; loads no weights."""
        raise NotImplementedError(f"the family {self.name} has no limit (max_prompt_tokens)")

    def long_prompts_remedy(self, num_tokens: int) -> str:
        """Return what users can do so that prompts of `num_tokens` tokens are read whole."""
        del num_tokens
        return "write the most important first, or shorten them"

    @abstractmethod
    def condition(self, embeds: Conditioning, micro: MicroConditioning) -> Conditioning:
        """Return the network's conditioning, each (B, ...): cached embeddings and micro-conditioning (fp32)."""

    @abstractmethod
    def uncond(self, cond: Conditioning) -> Conditioning:
        """Return the unconditional counterpart of `cond`, micro-conditioning kept."""

    @abstractmethod
    def encode_images(self, pixels: Tensor, generator: Sequence[torch.Generator] | None = None) -> Tensor:
        """Return scaled latents (B, C, h, w) of images.

        Args:
            pixels: Images (B, 3, H, W) in [-1, 1].
            generator: One per image, to sample the autoencoder's distribution; None takes its mode.
        """

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in [0, 1], float32, decoded from scaled latents (B, C, h, w)."""

    @abstractmethod
    def release_encoders(self) -> None:
        """Free the text encoders and the autoencoder; they load again when needed."""

    # -- network ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def load_network(self) -> nn.Module:
        """Load the denoiser with the teacher's LoRAs fused, frozen, in eval mode, on the device."""

    def empty_network(self) -> nn.Module | None:
        """Return the denoiser on the meta device, made from its config alone, to estimate memory; None if unknown."""
        return None

    @abstractmethod
    def attach_adapter(self, network: nn.Module, path: str, adapter: str) -> None:
        """Put the LoRA at `path` (file, folder or hub id), and a second time beside it, onto `network` as `adapter`.

        Raises UserError when it does not fit.
        """

    @abstractmethod
    def student_network(
        self, teacher: nn.Module, *, guidance_embedding: bool, second_time: bool = False, smaller: bool = False
    ) -> nn.Module:
        """Return a trainable fp32 copy of the teacher for full training.

        Args:
            teacher: What :meth:`load_network` returned.
            guidance_embedding: Whether the copy takes the guidance scale as an input; the embedding starts at zero.
            second_time: Whether the copy takes a second time (:meth:`add_second_time`).
            smaller: Whether the copy has only the blocks that the settings keep (:meth:`smaller_keys`); set for the
                student alone, where there are such settings.
        """

    @classmethod
    def smaller_keys(cls, config: Any) -> Sequence[str]:
        """Return the keys of ``family_config`` given in `config` that make the student smaller than its teacher."""
        return ()

    def add_second_time(self, network: nn.Module, *, name: str = "student") -> nn.Module:
        """Give `network` in place an embedding of a second time r that starts at zero; return it, trainable, in fp32.

        It lies at ``network.second_time.<name>`` and goes with the adapter `name`, or with the network itself where
        there is no such adapter. Called again for a name it returns the same module.
        """
        raise NotImplementedError(f"the family {self.name} has no second time (capabilities.second_time)")

    @abstractmethod
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
        """Return the network's raw output at `x_t`, shape (B, C, h, w).

        Args:
            network: What :meth:`load_network` or :meth:`student_network` returned, adapters already set.
            x_t: Noised latents (B, C, h, w), in the schedule's scaling.
            time: The network's time input, shape (B,) (:meth:`Schedule.network_time`).
            cond: As :meth:`condition` returned it, each tensor of shape (B, ...).
            guidance: The paper's w (guidance scale minus one), shape (B,), only for networks with a guidance embedding.
                A teacher that has one of its own (:attr:`guided_by_input`) uses its usual scale when this is None.
            second_time: The network's input for r, shape (B,) (:meth:`Schedule.network_time`), only for networks with
                a second time (:meth:`add_second_time`). None: no embedding of it is applied.
        """

    def forward_ad(self) -> AbstractContextManager[None]:
        """Return a context manager inside which :meth:`predict` can be differentiated in forward mode."""
        return nullcontext()

    # -- images and export ----------------------------------------------------------------------------------------

    @abstractmethod
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
        """Generate images (B, 3, H, W) in [0, 1] with the plain diffusers pipeline around `network`.

        Args:
            network: Adapters already set by the caller.
            embeds: As :meth:`encode_prompts` returned them, each of shape (B, ...).
            sampler: The method's sampler, or None for the model's own scheduler.
            seeds: B seeds; image i depends on ``seeds[i]`` only (noise drawn by CPU generators).
            width: Width in pixels.
            height: Height in pixels.
            num_inference_steps: Overrides the sampler's.
            guidance_scale: Overrides the sampler's; 0 and 1 both mean off.
            negative_embeds: Embeddings of the negative prompts; None means the family's unconditional ones.
        """

    @abstractmethod
    def export(self, network: nn.Module, folder: Path, info: ExportInfo) -> None:
        """Write a student that loads in plain diffusers: LoRA file or full pipeline, and ``scheduler/``."""

    @classmethod
    def kohya_problem(cls) -> str | None:
        """Return why a student's LoRA cannot be written in kohya's format (:meth:`export_kohya`); None where it can."""
        return f"the family {cls.name} has no export in kohya's format"

    def export_kohya(self, student: Path, file: Path, *, title: str, dtype: Precision | None = None) -> Sequence[str]:
        """Write an exported LoRA once more, as one file in kohya's format (ComfyUI, AUTOMATIC1111, sd-scripts).

        Args:
            student: Folder that :meth:`export` wrote.
            file: The file to write, completely or not at all.
            title: Name of the LoRA.
            dtype: Type of its tensors; None: that of the exported LoRA.

        Returns:
            Notes for users of the file, a line each.

        Raises:
            UserError: The student is no LoRA, or one that the format cannot hold.
        """
        raise NotImplementedError(self.kohya_problem())

    @abstractmethod
    def load_student(self, folder: Path, *, extra_loras: Sequence[ExtraLora] = ()) -> nn.Module:
        """Load the exported student as a network on the teacher's base, ready for :meth:`generate`."""

    @abstractmethod
    def usage_snippet(self, info: ExportInfo) -> str:
        """Return about ten lines of plain diffusers code that load and run the exported student, for the model card.

        They load the folder ``student`` and contain ``image = pipe(prompt, ...).images[0]``.
        """
