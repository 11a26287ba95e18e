"""Sources of a model: a folder in diffusers layout, a hub repository, or a single ``.safetensors`` file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ._checks import check_index, check_local_folder, check_original_keys, has_part
from ._files import hash_files, quiet_libraries, read_header

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

    from ._architecture import Architecture

SETTINGS = ("*.json", "*.txt", "*.model")
"""Files beside the weights that change a part's output: configs, vocabularies, sentencepiece models."""
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")


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
    def check(self) -> None:
        """Raise UserError unless it is a model of the architecture in safetensors; reads no weights."""

    @abstractmethod
    def has(self, part: str) -> bool:
        """Return True if the model has this component; only those that are optional are looked for."""

    @abstractmethod
    def digest(self, part: str) -> str:
        """Return a hash of all files that decide the output of ``text``, ``vae`` or ``denoiser``."""

    @abstractmethod
    def load_denoiser(self, dtype: torch.dtype) -> Any:
        """Load the denoiser on the CPU."""

    @abstractmethod
    def load_vae(self, dtype: torch.dtype) -> AutoencoderKL:
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
        path = self.file(relative)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}", "restore the file from the model's origin") from error

    def check(self) -> None:
        check_local_folder(Path(self.name))
        self.check_configs()
        for part in self.architecture.networks:
            if self.has(part):
                self.weights_variant(part)

    def check_configs(self) -> None:
        """Raise UserError unless the configs describe a model of the architecture with every component."""
        check_index(self.name, self.config("model_index.json"), self.architecture)
        self.architecture.check(self.name, self.config)

    def has(self, part: str) -> bool:
        return part not in self.architecture.optional or has_part(self.config("model_index.json"), part)

    def weights_variant(self, part: str) -> str | None:
        """Return the variant of a component's weights to read. Raises UserError without safetensors."""
        folder = self.component(part)
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        if not found:
            pickles = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
            raise UserError(
                f"model {self.name!r} has no safetensors weights in {part}/"
                + (f", only {', '.join(pickles)}" if pickles else ""),
                "pickled weights can run code and are never loaded: convert them with "
                "pipeline.save_pretrained(folder, safe_serialization=True) where you trust them"
                if pickles
                else "is the download complete?",
            )
        variants = {_variant_of(name) for name in found}
        if self.variant in variants:
            return self.variant
        if self.variant is None and len(variants) == 1:
            return variants.pop()
        raise UserError(
            f"model {self.name!r} has no {part} weights of variant {self.variant!r}, only {', '.join(found)}",
            "set family_config.variant to one that is there",
        )

    def digest(self, part: str) -> str:
        folders = [self.component(folder) for folder in self.architecture.folders(part) if self.has(folder)]
        return hash_files(sorted(path for folder in folders for path in self._deciding_files(folder)))

    def _deciding_files(self, folder: Path) -> list[Path]:
        configs = [path for pattern in SETTINGS for path in folder.glob(pattern)]
        if not (weights := sorted(folder.glob("*.safetensors"))):
            return configs
        variant = self.weights_variant(folder.name)
        return [*configs, *(path for path in weights if _variant_of(path.name) == variant)]

    def load_denoiser(self, dtype: torch.dtype) -> Any:
        return self._load(self.architecture.network_class(), self.architecture.denoiser, torch_dtype=dtype)

    def load_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        from diffusers import AutoencoderKL

        return self._load(AutoencoderKL, "vae", torch_dtype=dtype)

    def load_text(self, dtype: torch.dtype, *, without: Collection[str] = ()) -> TextEncoders:
        import transformers

        own = self.architecture
        with quiet_libraries():
            tokenizers = {
                part: getattr(transformers, kind).from_pretrained(self.component(part), local_files_only=True)
                for part, kind in own.tokenizers.items()
                if part not in without and self.has(part)
            }
        encoders = {
            part: self._load(getattr(transformers, kind), part).to(dtype)
            for part, kind in own.encoders.items()
            if part not in without and self.has(part)
        }
        return TextEncoders(tokenizers, encoders)

    def _load(self, kind: Any, part: str, **arguments: Any) -> Any:
        folder = self.component(part)
        with quiet_libraries():
            return kind.from_pretrained(
                folder, use_safetensors=True, variant=self.weights_variant(part), local_files_only=True, **arguments
            )


@dataclass
class HubSource(FolderSource):
    """A repository of the Hugging Face hub, downloaded component by component when needed."""

    revision: str | None = None

    def component(self, part: str) -> Path:
        from huggingface_hub import snapshot_download

        weights = f"{part}/*.{self.variant}*.safetensors" if self.variant else f"{part}/*.safetensors"
        patterns = [*(f"{part}/{pattern}" for pattern in SETTINGS), weights]
        other_variants = None if self.variant else ["*.fp16.*", "*.bf16.*", "*.non_ema.*", "*openvino*"]
        with self._reachable("download"):
            root = snapshot_download(
                self.name, revision=self.revision, allow_patterns=patterns, ignore_patterns=other_variants
            )
        return Path(root) / part

    def file(self, relative: str) -> Path:
        from huggingface_hub import hf_hub_download

        with self._reachable(relative):
            return Path(hf_hub_download(self.name, relative, revision=self.revision))

    def check(self) -> None:
        self.check_configs()

    def digest(self, part: str) -> str:
        commit = self.file("model_index.json").parent.name
        return hashlib.sha256(f"{self.name}@{commit}:{self.variant}:{part}".encode()).hexdigest()

    @contextlib.contextmanager
    def _reachable(self, what: str) -> Iterator[None]:
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError

        try:
            yield
        except (OSError, EntryNotFoundError, HFValidationError) as error:
            raise UserError(
                f"model {self.name!r} is no local folder or .safetensors file, and the hub did not give it "
                f"({what}: {type(error).__name__}: {str(error).strip().splitlines()[0]})",
                "check the spelling of the path or id; a gated model needs `hf auth login`; without a network, "
                "download the model elsewhere and name its folder",
            ) from error


@dataclass
class FileSource(Source):
    """A single ``.safetensors`` file in the original layout; configs and tokenizers come from `configs`."""

    name: str
    architecture: Architecture
    configs: FolderSource

    def config(self, relative: str) -> dict[str, Any]:
        config = self.configs.config(relative)
        if relative == "scheduler/scheduler_config.json":
            config |= _scheduler_flags(self.header())
        return config

    def has(self, part: str) -> bool:
        return self.configs.has(part)

    def header(self) -> dict[str, Any]:
        """Return names, types and shapes of the tensors, read without the weights."""
        return read_header(Path(self.name))

    def check(self) -> None:
        check_original_keys(self.name, self.header(), self.architecture)
        if isinstance(self.configs, HubSource):
            self._check_hub_configs(self.configs)
        else:
            check_local_folder(Path(self.configs.name), key="model_config_source")
        self.configs.check_configs()

    def _check_hub_configs(self, configs: HubSource) -> None:
        try:
            configs.file("model_index.json")
        except UserError as error:
            raise UserError(
                f"single file {self.name!r}: its configs and tokenizers would come from the hub ({configs.name}), "
                "which cannot be reached",
                config_remedy(self.architecture),
            ) from error

    def digest(self, part: str) -> str:
        configs = [self.configs.component(folder) for folder in self.architecture.folders(part)]
        settings = [path for folder in configs for pattern in SETTINGS for path in folder.glob(pattern)]
        return hash_files([Path(self.name), *sorted(settings)])

    def config_root(self) -> str:
        """Return a local folder with every config and tokenizer."""
        if not isinstance(self.configs, HubSource):
            return self.configs.name
        from huggingface_hub import snapshot_download

        patterns = ["*.json", *(f"*/{pattern}" for pattern in SETTINGS)]
        return snapshot_download(self.configs.name, revision=self.configs.revision, allow_patterns=patterns)

    def load_denoiser(self, dtype: torch.dtype) -> Any:
        kind, part = self.architecture.network_class(), self.architecture.denoiser
        return self._load(kind, subfolder=part, torch_dtype=dtype)

    def load_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        from diffusers import AutoencoderKL

        return self._load(AutoencoderKL, subfolder="vae", torch_dtype=dtype)

    def load_text(self, dtype: torch.dtype, *, without: Collection[str] = ()) -> TextEncoders:
        own = self.architecture
        absent: dict[str, Any] = {own.denoiser: None, "vae": None, **own.arguments}
        pipeline = self._load(own.pipeline_class(), torch_dtype=dtype, **absent)
        return TextEncoders(
            {part: getattr(pipeline, part) for part in own.tokenizers if part not in without},
            {part: getattr(pipeline, part) for part in own.encoders if part not in without},
        )

    def _load(self, kind: Any, **arguments: Any) -> Any:
        with quiet_libraries():
            return kind.from_single_file(self.name, config=self.config_root(), local_files_only=True, **arguments)


def open_source(
    name: str,
    architecture: Architecture,
    *,
    revision: str | None = None,
    variant: str | None = None,
    config_source: str | None = None,
) -> Source:
    """Return the source that `name` means. Raises UserError when it can be none."""
    path = Path(name).expanduser()
    if path.is_dir():
        return FolderSource(str(path), architecture, variant)
    if path.is_file():
        return _open_file(path, name, architecture, revision=revision, config_source=config_source)
    return open_hub(name, architecture, revision=revision, variant=variant)


def _open_file(
    path: Path, name: str, architecture: Architecture, *, revision: str | None, config_source: str | None
) -> FileSource:
    if path.suffix != ".safetensors":
        raise UserError(
            f"model {name!r} is not a .safetensors file",
            "pickled checkpoints (.ckpt, .bin, .pt) can run code and are never loaded: convert the file to "
            "safetensors where you trust it",
        )
    if architecture.single_file is None:
        raise UserError(
            f"model {name!r} is a single file; of {architecture.title} only whole models in diffusers layout are read",
            "name a folder in diffusers layout (model_index.json and a folder for each part), or a hub id",
        )
    return FileSource(str(path), architecture, _config_source(config_source, architecture, revision))


def open_hub(
    name: str, architecture: Architecture, *, revision: str | None = None, variant: str | None = None
) -> HubSource:
    """Return the hub repository `name`, which is no local path. Raises UserError when it cannot be an id."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith((".safetensors", ".ckpt", "/")):
        raise UserError(
            f"model {name!r} does not exist",
            "name an existing folder in diffusers layout, an existing .safetensors file, or a hub id as owner/name",
        )
    return HubSource(name, architecture, variant, revision)


def config_remedy(architecture: Architecture) -> str:
    """Return the sentence on where else the configs of a single file may come from."""
    tokenizers = ", ".join(f"{part}/" for part in architecture.tokenizers)
    return (
        f"set model_config_source to a folder in diffusers layout with the configs and tokenizers of "
        f"{architecture.title} (model_index.json, scheduler/, {tokenizers} and the config.json of each network; no "
        "weights needed)"
    )


def _config_source(name: str | None, architecture: Architecture, revision: str | None) -> FolderSource:
    assert architecture.single_file is not None
    if name is None:
        return HubSource(architecture.single_file.base_repository, architecture)
    source = open_source(name, architecture, revision=revision)
    if not isinstance(source, FolderSource):
        raise UserError(f"model_config_source = {name!r} is not a folder or hub id", config_remedy(architecture))
    return source


def empty_denoiser(architecture: Architecture, config: Mapping[str, Any]) -> Any:
    """Build a denoiser on the meta device: shapes without memory."""
    import torch

    with quiet_libraries(), torch.device("meta"):
        return architecture.network_class().from_config(dict(config))


def _variant_of(filename: str) -> str | None:
    """Return ``fp16`` for ``model.fp16.safetensors`` and ``model.fp16-00001-of-00002.safetensors``."""
    stem = re.sub(r"-\d{5}-of-\d{5}", "", filename.removesuffix(".safetensors"))
    return stem.split(".", 1)[1] if "." in stem else None


def _scheduler_flags(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scheduler settings that marker tensors of a single file state."""
    flags: dict[str, Any] = {}
    if "v_pred" in header:
        flags["prediction_type"] = "v_prediction"
    if "ztsnr" in header:
        flags["rescale_betas_zero_snr"] = True
    return flags
