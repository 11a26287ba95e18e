"""Where an SDXL comes from: a folder in diffusers layout, a hub repository, or a single ``.safetensors`` file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ._sdxl_checks import check_index, check_local_folder, check_original_keys, check_unet
from ._sdxl_files import hash_files, quiet_libraries, read_header

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

PARTS: Mapping[str, tuple[str, ...]] = {
    "text": ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"),
    "vae": ("vae",),
    "denoiser": ("unet",),
}
"""Folders of each part of a model."""
BASE_REPOSITORY = "stabilityai/stable-diffusion-xl-base-1.0"
"""Where the configs and tokenizers of a single file come from unless a folder is named."""
CONFIG_REMEDY = (
    "set model_config_source to a folder in diffusers layout with the configs and tokenizers of an SDXL "
    "(model_index.json, scheduler/, tokenizer/, tokenizer_2/ and the config.json of each network; no weights needed)"
)
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")


@dataclass
class TextEncoders:
    """Both tokenizers and both encoders."""

    tokenizers: tuple[Any, Any]
    encoders: tuple[Any, Any]


class Source(ABC):
    """The files of one model. Nothing is read before a method is called."""

    name: str
    """As the user wrote it."""

    @abstractmethod
    def config(self, relative: str) -> dict[str, Any]:
        """A JSON file of the model, as ``vae/config.json``."""

    @abstractmethod
    def check(self) -> None:
        """Raise UserError unless it is an SDXL in safetensors; reads no weights."""

    @abstractmethod
    def digest(self, part: str) -> str:
        """Hash of what decides the output of ``text``, ``vae`` or ``denoiser``."""

    @abstractmethod
    def load_unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """The denoiser on the CPU."""

    @abstractmethod
    def load_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """The autoencoder on the CPU."""

    @abstractmethod
    def load_text(self, dtype: torch.dtype) -> TextEncoders:
        """Tokenizers and text encoders on the CPU."""


@dataclass
class FolderSource(Source):
    """A folder in diffusers layout. Never asks the hub."""

    name: str
    variant: str | None = None
    """Middle part of the weights' names, as ``fp16``; found by itself when only one variant lies there."""

    def component(self, part: str) -> Path:
        """The folder of one component."""
        return Path(self.name) / part

    def file(self, relative: str) -> Path:
        """One file of the model. Raises UserError when it is not there."""
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
        for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            self.weights_variant(part)

    def check_configs(self) -> None:
        """Raise UserError unless the configs describe an SDXL with every component."""
        check_index(self.name, self.config("model_index.json"))
        check_unet(self.name, self.config("unet/config.json"), self.config("vae/config.json"))

    def weights_variant(self, part: str) -> str | None:
        """Which variant of a component's weights to read. Raises UserError without safetensors."""
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
        folders = [self.component(folder) for folder in PARTS[part]]
        return hash_files(sorted(path for folder in folders for path in self._deciding_files(folder)))

    def _deciding_files(self, folder: Path) -> list[Path]:
        configs = [path for pattern in ("*.json", "*.txt") for path in folder.glob(pattern)]
        if not (weights := sorted(folder.glob("*.safetensors"))):
            return configs
        variant = self.weights_variant(folder.name)
        return [*configs, *(path for path in weights if _variant_of(path.name) == variant)]

    def load_unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        from diffusers import UNet2DConditionModel

        return self._load(UNet2DConditionModel, "unet", torch_dtype=dtype)

    def load_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        from diffusers import AutoencoderKL

        return self._load(AutoencoderKL, "vae", torch_dtype=dtype)

    def load_text(self, dtype: torch.dtype) -> TextEncoders:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        with quiet_libraries():
            tokenizers = [
                CLIPTokenizer.from_pretrained(self.component(part), local_files_only=True)
                for part in ("tokenizer", "tokenizer_2")
            ]
        first = self._load(CLIPTextModel, "text_encoder").to(dtype)
        second = self._load(CLIPTextModelWithProjection, "text_encoder_2").to(dtype)
        return TextEncoders((tokenizers[0], tokenizers[1]), (first, second))

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
        patterns = [f"{part}/*.json", f"{part}/*.txt", weights]
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
    configs: FolderSource

    def config(self, relative: str) -> dict[str, Any]:
        config = self.configs.config(relative)
        if relative == "scheduler/scheduler_config.json":
            config |= _scheduler_flags(self.header())
        return config

    def header(self) -> dict[str, Any]:
        """Names, types and shapes of the tensors, read without the weights."""
        return read_header(Path(self.name))

    def check(self) -> None:
        check_original_keys(self.name, self.header())
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
                CONFIG_REMEDY,
            ) from error

    def digest(self, part: str) -> str:
        configs = [self.configs.component(folder) for folder in PARTS[part]]
        settings = [path for folder in configs for pattern in ("*.json", "*.txt") for path in folder.glob(pattern)]
        return hash_files([Path(self.name), *sorted(settings)])

    def config_root(self) -> str:
        """A local folder with every config and tokenizer."""
        if not isinstance(self.configs, HubSource):
            return self.configs.name
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*/*.json", "*/*.txt"]
        return snapshot_download(self.configs.name, revision=self.configs.revision, allow_patterns=patterns)

    def load_unet(self, dtype: torch.dtype) -> UNet2DConditionModel:
        from diffusers import UNet2DConditionModel

        return self._load(UNet2DConditionModel, subfolder="unet", torch_dtype=dtype)

    def load_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        from diffusers import AutoencoderKL

        return self._load(AutoencoderKL, subfolder="vae", torch_dtype=dtype)

    def load_text(self, dtype: torch.dtype) -> TextEncoders:
        with quiet_libraries():
            from diffusers import StableDiffusionXLPipeline

        pipeline = self._load(StableDiffusionXLPipeline, unet=None, vae=None, torch_dtype=dtype)
        return TextEncoders(
            (pipeline.tokenizer, pipeline.tokenizer_2), (pipeline.text_encoder, pipeline.text_encoder_2)
        )

    def _load(self, kind: Any, **arguments: Any) -> Any:
        with quiet_libraries():
            return kind.from_single_file(self.name, config=self.config_root(), local_files_only=True, **arguments)


def open_source(
    name: str, *, revision: str | None = None, variant: str | None = None, config_source: str | None = None
) -> Source:
    """The source that `name` means. Raises UserError when it can be none."""
    path = Path(name).expanduser()
    if path.is_dir():
        return FolderSource(str(path), variant)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"model {name!r} is not a .safetensors file",
                "pickled checkpoints (.ckpt, .bin, .pt) can run code and are never loaded: convert the file to "
                "safetensors where you trust it",
            )
        return FileSource(str(path), _config_source(config_source, revision))
    return open_hub(name, revision=revision, variant=variant)


def open_hub(name: str, *, revision: str | None = None, variant: str | None = None) -> HubSource:
    """The repository `name`, which is no local path. Raises UserError when it cannot be an id."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith((".safetensors", ".ckpt", "/")):
        raise UserError(
            f"model {name!r} does not exist",
            "name an existing folder in diffusers layout, an existing .safetensors file, or a hub id as owner/name",
        )
    return HubSource(name, variant, revision)


def _config_source(name: str | None, revision: str | None) -> FolderSource:
    if name is None:
        return HubSource(BASE_REPOSITORY)
    source = open_source(name, revision=revision)
    if not isinstance(source, FolderSource):
        raise UserError(f"model_config_source = {name!r} is not a folder or hub id", CONFIG_REMEDY)
    return source


def empty_unet(config: Mapping[str, Any]) -> Any:
    """A UNet on the meta device: shapes without memory."""
    import torch

    with quiet_libraries(), torch.device("meta"):
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_config(dict(config))


def _variant_of(filename: str) -> str | None:
    """``fp16`` of ``model.fp16.safetensors`` and ``model.fp16-00001-of-00002.safetensors``."""
    stem = re.sub(r"-\d{5}-of-\d{5}", "", filename.removesuffix(".safetensors"))
    return stem.split(".", 1)[1] if "." in stem else None


def _scheduler_flags(header: Mapping[str, Any]) -> dict[str, Any]:
    """What a single file says of its own noise by marker tensors."""
    flags: dict[str, Any] = {}
    if "v_pred" in header:
        flags["prediction_type"] = "v_prediction"
    if "ztsnr" in header:
        flags["rescale_betas_zero_snr"] = True
    return flags
