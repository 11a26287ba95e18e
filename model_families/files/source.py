"""Sources of a model: a folder in diffusers layout, a hub repository, or a single ``.safetensors`` file."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError
from ...core.utils.files import read_json_object
from .checks import check_index, check_kind, check_local_folder, has_part
from .comparison import check_tensors
from .empty import by_name_of, empty_network
from .reading import hash_files, hash_tensors, quiet_libraries
from .tokenizer_files import as_filed
from .weights import WeightFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .architecture import Architecture
    from .file_signs import Sign

SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files beside the weights that change a part's output: configs, vocabularies, sentencepiece models, chat
templates.
"""
INDEX = ".index.json"
"""What the name of a list of shards ends with."""
LOADED = re.compile(r"(diffusion_pytorch_)?model[.-]")
"""What names of weights that diffusers and transformers load begin with."""
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")


ReadShapes = Callable[[str, Any], Mapping[str, "Tensor"]]
"""Gives the tensors of a part on the meta device, for its network on that device."""


@dataclass
class TextEncoders:
    """Tokenizers and encoders by their names in the pipeline; those that the model lacks are left out."""

    tokenizers: dict[str, Any]
    encoders: dict[str, Any]

    def pairs(self) -> list[tuple[Any, Any]]:
        """Return the pairs (tokenizer, encoder) in order."""
        return list(zip(self.tokenizers.values(), self.encoders.values(), strict=True))


class Source(ABC):
    """The files of one model. Nothing is read before a method is called."""

    name: str
    """As the user wrote it."""
    architecture: Architecture

    @abstractmethod
    def config(self, relative: str) -> dict[str, Any]:
        """Read a JSON file of the model, as ``vae/config.json``."""

    @abstractmethod
    def check(self, *, without: Collection[str] = ()) -> None:
        """Raise UserError unless it is a model of the architecture in safetensors; reads no weights.

        Args:
            without: Networks that come from elsewhere, or are left out.
        """

    def check_weights(self, parts: Sequence[str]) -> None:
        """Raise UserError unless the tensors of each network are those that its config describes; reads no weights."""
        for part in parts:
            if self.has(part):
                self.check_part(part)

    def check_part(self, part: str) -> None:
        """Raise UserError unless the tensors of one network are those that its config describes."""
        self.compare_part(part, self.shapes)

    def compare_part(self, part: str, shapes: ReadShapes) -> None:
        """Raise UserError unless the tensors of one network, as `shapes` reads them, are those of its config."""
        import torch

        config = self.config(f"{part}/config.json")
        check_kind(self.name, part, config, self.architecture)
        network = empty_network(self.architecture, part, config)
        with torch.inference_mode(False):  # in it, views would not know what they are views of
            found = shapes(part, network)
        check_tensors(f"model {self.name!r}, {part}", network, found, remedy=self.weights_remedy)

    def signs(self) -> list[Sign]:
        """Return what the weights' file itself says of its noise; configs are not among it."""
        return []

    def resolution(self) -> tuple[int, int] | None:
        """Return (width, height) in pixels that the weights' file says it was made for; None where it says none."""
        return None

    weights_remedy: str = (
        "restore the weights from the model's origin; the weights of a larger, pruned or inpainting sibling need "
        "the configs that were made with them"
    )

    def shapes(self, part: str, network: Any) -> Mapping[str, Tensor]:
        """Return the tensors of a part on the meta device, by the names of `network` where they have one."""
        files = self.tensor_files(part)
        return self.named(
            part, network, {own: file.shape(stored) for file, names in files for own, stored in names.items()}
        )

    @abstractmethod
    def has(self, part: str) -> bool:
        """Return True if the model has this component; only those that are optional are looked for."""

    def variant_to_load(self) -> str | None:
        """Return the variant of the weights that diffusers must be told to load the model; None where it needs none."""
        return None

    def digest(self, part: str) -> str:
        """Return a hash of all that decides the output of ``text``, ``vae`` or ``denoiser``.

        That of encoders is made of their tensors: a folder and a single file of the same weights share their caches.
        """
        folders = [folder for folder in self.architecture.folders(part) if self.has(folder)]
        pieces = [hash_files(self.settings_of(folders))]
        networks = [folder for folder in folders if folder in self.architecture.networks]
        pieces += [
            self.weights_digest(one) if one == self.architecture.denoiser else hash_tensors(self.stored(one))
            for one in networks
        ]
        return hashlib.sha256("\n".join(pieces).encode()).hexdigest()

    @abstractmethod
    def settings_of(self, folders: Sequence[str]) -> list[Path]:
        """Return the files beside the weights that change the output of these components."""

    @abstractmethod
    def stored(self, part: str) -> Mapping[str, Tensor]:
        """Return a network's tensors by its own names, in the types of the file."""

    def wide_weights(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the denoiser's tensors by its own names, one at a time, in fp32 and in memory of their own.

        Args:
            names: Those to read; None: all that the network has.
        """
        import torch

        part = self.architecture.denoiser
        network = empty_network(self.architecture, part, self.config(f"{part}/config.json"))
        with ExitStack() as stack:
            shapes: dict[str, Tensor] = {}
            readers: dict[int, Callable[[], Tensor]] = {}
            for file, own_names in self.tensor_files(part):
                opened = stack.enter_context(file.reader())
                for own, stored in own_names.items():
                    shapes[own] = file.shape(stored)
                    readers[id(shapes[own])] = partial(file.read_one, opened, stored, torch.float32)
            found = self.named(part, network, shapes)
            for name in network.state_dict() if names is None else names:
                # a copy: weights of a mapped file lie unaligned, for which kernels round otherwise
                yield name, readers[id(found[name])]().to(torch.float32, copy=True)

    @abstractmethod
    def tensor_files(self, part: str) -> Sequence[tuple[WeightFile, Mapping[str, str]]]:
        """Return the files of a network, each with the names of its tensors -> their names in the file."""

    @abstractmethod
    def named(self, part: str, network: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of :meth:`tensor_files` by the names of `network` where they have one."""

    @abstractmethod
    def weights_digest(self, part: str) -> str:
        """Return a hash of the files with the weights of a network."""

    @abstractmethod
    def load_denoiser(self, dtype: torch.dtype) -> Any:
        """Load the denoiser on the CPU."""

    @abstractmethod
    def load_vae(self, dtype: torch.dtype) -> Any:
        """Load the autoencoder on the CPU."""

    @abstractmethod
    def load_text(self, dtype: torch.dtype, *, without: Collection[str] = ()) -> TextEncoders:
        """Load tokenizers and text encoders on the CPU, except for those in `without`."""


@dataclass
class FolderSource(Source):
    """A folder in diffusers layout. Never asks the hub."""

    name: str
    architecture: Architecture
    variant: str | None = None
    """Middle part of the weights' names, as ``fp16``; found automatically when there is only one variant."""

    def component(self, part: str) -> Path:
        """Return the folder of one component."""
        return Path(self.name) / part

    def file(self, relative: str) -> Path:
        """Return one file of the model. Raises UserError when it is not there."""
        path = Path(self.name) / relative
        if not path.is_file():
            raise UserError(f"model {self.name!r} has no {relative}", f"expected {path}; is the folder complete?")
        return path

    def config(self, relative: str) -> dict[str, Any]:
        return _read_json(self.file(relative))

    def check(self, *, without: Collection[str] = ()) -> None:
        check_local_folder(Path(self.name))
        self.check_configs()
        for part in self.architecture.networks:
            if part not in without and self.has(part):
                self.weights_variant(part)

    def tensor_files(self, part: str) -> Sequence[tuple[WeightFile, Mapping[str, str]]]:
        return [(file, {name: name for name in file.names}) for file in self.weights_files(part)]

    def named(self, part: str, network: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return by_name_of(network, tensors)

    def weights_files(self, part: str) -> list[WeightFile]:
        """Open the files of a component's weights. Raises UserError when its index names one that is not there."""
        folder = self.component(part)
        names = self.weights_names(part, [path.name for path in folder.glob("*")])
        return [WeightFile.open(self._shard(folder, name)) for name in names]

    def weights_names(self, part: str, there: Sequence[str]) -> list[str]:
        """Return the names of the files with a component's weights, of those that are `there` or in an index there."""
        variant = self._variant_among(part, there)
        for name in there:
            if name.endswith(f".safetensors{INDEX}") and variant_of(name.removesuffix(INDEX)) == variant:
                return sorted(set(_read_json(self.file(f"{part}/{name}"))["weight_map"].values()))
        return [name for name in safetensors_among(there) if variant_of(name) == variant]

    def _shard(self, folder: Path, name: str) -> Path:
        if not (folder / name).is_file():
            raise UserError(f"model {self.name!r} lacks {folder.name}/{name}, which its index names", "download it")
        return folder / name

    def check_configs(self) -> None:
        """Raise UserError unless the configs describe a model of the architecture with every component."""
        check_index(self.name, self.config("model_index.json"), self.architecture)
        self.architecture.check(self.name, self.config)

    def has(self, part: str) -> bool:
        return part not in self.architecture.optional or has_part(self.config("model_index.json"), part)

    def variant_to_load(self) -> str | None:
        if self.variant:
            return self.variant
        there = {part: self.names_there(part) for part in self.architecture.networks if self.has(part)}
        found = (self._variant_among(part, names) for part, names in there.items() if safetensors_among(names))
        return next(filter(None, found), None)

    def names_there(self, part: str) -> list[str]:
        """Return the names of the files in a component's folder, or of those that are downloaded into it."""
        return [path.name for path in self.component(part).glob("*")]

    def weights_variant(self, part: str) -> str | None:
        """Return the variant of a component's weights to read. Raises UserError without safetensors."""
        return self._variant_among(part, [path.name for path in self.component(part).glob("*")])

    def _variant_among(self, part: str, there: Sequence[str]) -> str | None:
        found = safetensors_among(there)
        if not found:
            pickles = [name for pattern in PICKLES for name in sorted(fnmatch.filter(there, pattern))]
            raise UserError(
                f"model {self.name!r} has no safetensors weights in {part}/"
                + (f", only {', '.join(pickles)}" if pickles else ""),
                "pickled weights can run code and are never loaded: convert them with "
                "pipeline.save_pretrained(folder, safe_serialization=True) where you trust them"
                if pickles
                else "is the download complete?",
            )
        variants = {variant_of(name) for name in found}
        if self.variant in variants:
            return self.variant
        if self.variant is None and len(variants) == 1:
            return variants.pop()
        raise UserError(
            f"model {self.name!r} has no {part} weights of variant {self.variant!r}, only {', '.join(found)}",
            "set family_config.variant to one that is there",
        )

    def settings_of(self, folders: Sequence[str]) -> list[Path]:
        return settings_in([self.component(folder) for folder in folders])

    def stored(self, part: str) -> Mapping[str, Tensor]:
        network = empty_network(self.architecture, part, self.config(f"{part}/config.json"))
        files = self.weights_files(part)
        return by_name_of(network, {name: one for file in files for name, one in file.stored(file.names).items()})

    def weights_digest(self, part: str) -> str:
        return hash_files([file.path for file in self.weights_files(part)])

    def load_denoiser(self, dtype: torch.dtype) -> Any:
        return self._load(self.architecture.network_class(), self.architecture.denoiser, torch_dtype=dtype)

    def load_vae(self, dtype: torch.dtype) -> Any:
        return self._load(self.architecture.autoencoder_class(), "vae", torch_dtype=dtype)

    def load_text(self, dtype: torch.dtype, *, without: Collection[str] = ()) -> TextEncoders:
        encoders = {
            part: self._load(self.architecture.text_class(part), part).to(dtype)
            for part in self.architecture.encoders
            if part not in without and self.has(part)
        }
        return TextEncoders(self.load_tokenizers(without=without), encoders)

    def load_tokenizers(self, *, without: Collection[str] = ()) -> dict[str, Any]:
        """Load the tokenizers by their names in the pipeline."""
        parts = (part for part in self.architecture.tokenizers if part not in without and self.has(part))
        return {part: self.load_tokenizer(part) for part in parts}

    def load_tokenizer(self, part: str) -> Any:
        """Load one tokenizer, or the processor that has it. Raises UserError where a package is missing for it."""
        folder = self.component(part)
        kind, arguments = as_filed(self.architecture.text_class(part), folder)
        try:
            with quiet_libraries():
                return kind.from_pretrained(folder, local_files_only=True, **arguments)
        except ImportError as error:
            said = " ".join(str(error).split()).partition(". ")[0]
            remedy = "install what it names with pip, of the build that goes with your torch"
            raise UserError(f"model {self.name!r}: its {part} cannot be loaded: {said}", remedy) from error

    def _load(self, kind: Any, part: str, **arguments: Any) -> Any:
        self.check_part(part)
        folder, variant = self.component(part), self.weights_variant(part)
        shared = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        with quiet_libraries():
            network, said = kind.from_pretrained(folder, variant=variant, **shared, **arguments)
        if missing := said["missing_keys"]:  # of a version of the library that reads other names
            raise UserError(f"model {self.name!r}, {part}: {len(missing)} tensors are missing", self.weights_remedy)
        return network


def safetensors_among(names: Sequence[str]) -> list[str]:
    """Return the names of weights in a component's folder; others than the libraries load only where these are not
    there, since repositories hold the same weights once more for other programs.
    """
    found = sorted(name for name in names if name.endswith(".safetensors"))
    return [name for name in found if LOADED.match(name)] or found


def variant_of(filename: str) -> str | None:
    """Return ``fp16`` for ``model.fp16.safetensors`` and ``model.fp16-00001-of-00002.safetensors``."""
    stem = re.sub(r"-\d{5}-of-\d{5}", "", filename.removesuffix(".safetensors"))
    return stem.split(".", 1)[1] if "." in stem else None


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, remedy="restore the file from the model's origin")


def settings_in(folders: Sequence[Path]) -> list[Path]:
    """Return the files in these folders, beside the weights, that change the output of a component."""
    found = [path for folder in folders for pattern in SETTINGS for path in sorted(folder.glob(pattern))]
    return [path for path in found if not path.name.endswith(INDEX)]
