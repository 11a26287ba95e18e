"""The parts of a model in diffusers layout: the facts by which one family's files differ from another's."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..loras.lora_loading import loads_loras, with_adapters, with_lora_files

MINIATURES = Path(__file__).parent.parent / "assets"
"""Folder of the trained miniatures that ship with the package."""
ReadConfig = Callable[[str], dict[str, Any]]
"""Reads a JSON file of a model, as ``vae/config.json``."""


def none_swapped(config: Mapping[str, Any]) -> Collection[str]:
    """Return no path: all modules have the original's order of rows."""
    return ()


@dataclass(frozen=True)
class FilePart:
    """How one network of a checkpoint in one file is found.

    Attributes:
        title: The network in words, as ``the UNet``.
        prefixes: Prefixes of its tensors' names; of several that a file has, the first is taken.
    """

    title: str
    prefixes: tuple[str, ...]


@dataclass(frozen=True)
class SingleFile:
    """How a checkpoint in one file, in the original layout, is recognised and loaded.

    Attributes:
        parts: Network by its name in the pipeline -> where its tensors are.
        base_repository: Repository of its configs and tokenizers, unless a folder is named.
        size: Approximate size of such a file, in words.
    """

    parts: Mapping[str, FilePart]
    base_repository: str
    size: str


UNET = FilePart("the UNet", ("model.diffusion_model.", "unet."))
AUTOENCODER = FilePart("the autoencoder", ("first_stage_model.", "vae."))


@dataclass(frozen=True)
class Architecture:
    """The parts of a model, by their names in its pipeline.

    Attributes:
        title: Name in messages, with its article: ``an SDXL``.
        pipeline: Class of its diffusers pipeline.
        accepted: Classes that ``model_index.json`` may name.
        siblings: Classes that other families take, and people name here -> the family.
        denoiser: Name of the network that is distilled.
        denoiser_class: Its class in diffusers.
        half: The half precision that its pipeline is published in; some text encoders overflow in float16.
        denoiser_aliases: Older names of this class, in the configs of published models.
        tokenizers: Name -> class in transformers.
        encoders: Name of a text encoder -> class in transformers; as many as tokenizers, in the same order.
        check: Raises UserError unless the configs are this architecture's; takes the model's name and a reader.
        made_of: The parts of a complete model, for the message about an incomplete one.
        optional: Parts that a model may lack.
        lora_encoders: Text encoders that a LoRA may change.
        arguments: Further arguments of the pipeline's constructor.
        single_file: Its layout in a single file; None where such files are not read.
        kohya: Its LoRAs in one file for ComfyUI and its kin, in kohya's format where that has names for it; None where
            ComfyUI has no such model.
        swapped: Returns the paths of modules whose rows have their two halves the other way round in the original
            code, given the denoiser's config.
        original_path: Returns the original code's path of a module of the denoiser, given its config, and all modules
            that are one layer there. Raises UserError for a module that has none.
        autoencoder: Class of its autoencoder in diffusers.
        stand_ins: What a pipeline of some parts alone has in place of parts that its constructor asks something.
    """

    title: str
    pipeline: str
    accepted: tuple[str, ...]
    denoiser: str
    denoiser_class: str
    tokenizers: Mapping[str, str]
    encoders: Mapping[str, str]
    check: Callable[[str, ReadConfig], None]
    made_of: str
    siblings: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    lora_encoders: tuple[str, ...] = ("text_encoder",)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    single_file: SingleFile | None = None
    kohya: KohyaFormat | None = None
    swapped: Callable[[Mapping[str, Any]], Collection[str]] = none_swapped
    original_path: Callable[[str, Mapping[str, Any]], tuple[str, Sequence[str]]] | None = None
    autoencoder: str = "AutoencoderKL"
    stand_ins: Mapping[str, Any] = field(default_factory=dict)
    half: str = "float16"
    denoiser_aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The title without its article."""
        return self.title.partition(" ")[2]

    @property
    def components(self) -> tuple[str, ...]:
        """Every part, in the order of a model's folder."""
        return (*self.tokenizers, *self.encoders, "vae", self.denoiser, "scheduler")

    @property
    def networks(self) -> tuple[str, ...]:
        """Parts that have weights."""
        return (self.denoiser, "vae", *self.encoders)

    def folders(self, part: str) -> tuple[str, ...]:
        """Return the folders of ``text``, ``vae`` or ``denoiser``."""
        own = {"text": (*self.tokenizers, *self.encoders), "vae": ("vae",), "denoiser": (self.denoiser,)}
        return own[part]

    def pipeline_class(self) -> Any:
        """Return the pipeline's class in diffusers; one that loads no LoRAs learns it."""
        import diffusers

        return with_lora_files(getattr(diffusers, self.pipeline), self.denoiser)

    def loads_loras(self) -> bool:
        """Return True if the pipeline of plain diffusers loads LoRAs."""
        import diffusers

        return loads_loras(getattr(diffusers, self.pipeline), self.denoiser)

    def network_loads_loras(self) -> bool:
        """Return True if the denoiser of plain diffusers loads LoRAs."""
        import diffusers

        return hasattr(getattr(diffusers, self.denoiser_class), "load_lora_adapter")

    def call_arguments(self) -> Collection[str]:
        """Return the names of the arguments of the pipeline's call."""
        return inspect.signature(self.pipeline_class().__call__).parameters

    def network_class(self) -> Any:
        """Return the denoiser's class in diffusers; one that takes no adapters learns it."""
        import diffusers

        return with_adapters(getattr(diffusers, self.denoiser_class))

    def autoencoder_class(self) -> Any:
        """Return the autoencoder's class in diffusers."""
        import diffusers

        return getattr(diffusers, self.autoencoder)

    def text_class(self, part: str) -> Any:
        """Return the class of a tokenizer or text encoder, in transformers or, where that has none, in the package of
        the pipeline in diffusers.
        """
        import diffusers
        import transformers

        name = {**self.tokenizers, **self.encoders}[part]
        if hasattr(transformers, name):
            return getattr(transformers, name)
        package = getattr(diffusers, self.pipeline).__module__.rpartition(".")[0]
        return getattr(sys.modules[package], name)

    def new_encoder(self, part: str, config: Mapping[str, Any]) -> Any:
        """Return a text encoder with the weights that its class begins with; `config` may be that of a whole of which
        it is the encoder.
        """
        kind = self.text_class(part)
        whole = kind.config_class.from_dict(dict(config))
        return kind(whole.encoder if hasattr(whole, "encoder") else whole)

    def shell(self, **parts: Any) -> Any:
        """Return a pipeline of these parts alone; the others are absent."""
        return self.pipeline_class()(**{**dict.fromkeys(self.components), **self.stand_ins, **parts}, **self.arguments)


@dataclass(frozen=True)
class Layer:
    """An adapted layer: its weight changes by ``alpha / rank * up @ down``."""

    down: Tensor  # (rank, in, ...)
    up: Tensor  # (out, rank, ...)
    alpha: float

    @property
    def rank(self) -> int:
        """Inner size of the product."""
        return len(self.down)


Layers = dict[str, Layer]
"""Path of a module -> its layer."""


@dataclass(frozen=True)
class LayerNames:
    """How the tensors of a layer are named in a file.

    Attributes:
        prefix: What stands before the module's path.
        separator: What stands for the dots of the path.
        down: Name of the first matrix.
        up: Name of the second.
        alpha: Whether there is a third tensor, ``alpha``. Without, the change of the weight is up @ down.
    """

    prefix: str = "lora_unet_"
    separator: str = "_"
    down: str = "lora_down"
    up: str = "lora_up"
    alpha: bool = True


SD_SCRIPTS = LayerNames()
"""kohya's."""
DIFFUSERS = LayerNames("transformer.", ".", "lora_A", "lora_B", alpha=False)
"""diffusers' own, which ComfyUI reads where it has a map of the modules."""
AI_TOOLKIT = LayerNames("diffusion_model.", ".", "lora_A", "lora_B", alpha=False)
"""Those of ostris' trainer; ComfyUI's for any module of its own networks."""


@dataclass(frozen=True)
class KohyaFormat:
    """Names that a file for ComfyUI and its kin has for one architecture.

    Attributes:
        base_model: ``ss_base_model_version``.
        architecture: ``modelspec.architecture``.
        renamed: Renames layers from diffusers' module paths to those of the file, given the denoiser's config. Raises
            UserError for a layer that has none.
        of_v: The first two of models that predict v, where they differ.
        module: ``ss_network_module``.
        second_generation: ``ss_v2``.
        unread: diffusers' paths of modules that its own reader of the format leaves out.
        names: How the tensors of a layer are named.
        beside_diffusers: Programs that read the file where diffusers does not; empty where it does.
    """

    base_model: str
    architecture: str
    renamed: Callable[[Layers, Mapping[str, Any]], Layers] = lambda layers, config: layers
    of_v: tuple[str, str] | None = None
    module: str = "networks.lora"
    second_generation: bool = False
    unread: tuple[str, ...] = ()
    names: LayerNames = SD_SCRIPTS
    beside_diffusers: str = ""
