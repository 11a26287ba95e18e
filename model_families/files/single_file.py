"""A model in one ``.safetensors`` file: which of its tensors belong to which network.

Each network may lie under one of several prefixes (:class:`.SingleFile`), in the names of the original code or in those
of its library; a text encoder's names have ``text_model.`` once, twice or not at all; weights in eight bits may have
scales.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError
from .checks import check_local_folder, check_original_parts
from .empty import by_name_of, empty_network, without_text_model
from .file_signs import Sign, read_signs, refuse_edm, stated_resolution
from .hub import hub_folder
from .hub_source import HubSource
from .reading import hash_files, quiet_libraries
from .source import SETTINGS, FolderSource, Source, TextEncoders, settings_in
from .weights import WeightFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .architecture import Architecture

OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")
"""Prefixes under which diffusers' converter takes an OpenCLIP encoder: without its last layer and projection (SD 2.x),
and with its projection (SDXL)."""
NOT_CONVERTED = (KeyError, IndexError, ValueError, RuntimeError, AttributeError, TypeError)
"""Errors in which diffusers' converters end where the tensors are not those of the config."""


@dataclass
class FileSource(Source):
    """A single ``.safetensors`` file; configs and tokenizers come from `configs`."""

    name: str
    architecture: Architecture
    configs: FolderSource

    def config(self, relative: str) -> dict[str, Any]:
        return self.configs.config(relative)

    def has(self, part: str) -> bool:
        return self.configs.has(part)

    @cached_property
    def file(self) -> WeightFile:
        """The file, its header read."""
        return WeightFile.open(Path(self.name))

    def signs(self) -> list[Sign]:
        return read_signs(self.file.entries, self.file.metadata)

    def resolution(self) -> tuple[int, int] | None:
        return stated_resolution(self.file.metadata)

    def check(self, *, without: Collection[str] = ()) -> None:
        refuse_edm(self.name, self.file.entries)
        check_original_parts(self.name, self.file.names, self.architecture, without=without)
        if isinstance(self.configs, HubSource):
            self._check_hub_configs(self.configs)
        else:
            check_local_folder(Path(self.configs.name), key="model_config_source")
        self.configs.check_configs()

    def _check_hub_configs(self, configs: HubSource) -> None:
        try:
            configs.file("model_index.json")
        except UserError as error:
            raise type(error)(
                f"single file {self.name!r}: its configs and tokenizers would come from the hub ({configs.name}), "
                "which cannot be reached",
                config_remedy(self.architecture),
            ) from error

    def settings_of(self, folders: Sequence[str]) -> list[Path]:
        return settings_in([Path(self.config_root()) / folder for folder in folders])  # never asks the hub for weights

    def stored(self, part: str) -> Mapping[str, Tensor]:
        import torch

        network = empty_network(self.architecture, part, self.config(f"{part}/config.json"))
        return self._read(part, network, torch.float32)

    def weights_digest(self, part: str) -> str:
        return hash_files([Path(self.name)])

    def config_root(self) -> str:
        """Return a local folder with every config and tokenizer."""
        if not isinstance(self.configs, HubSource):
            return self.configs.name
        patterns = ["*.json", *(f"*/{pattern}" for pattern in SETTINGS)]
        return str(hub_folder(self.configs.name, revision=self.configs.revision, allow_patterns=patterns))

    def tensor_files(self, part: str) -> Sequence[tuple[WeightFile, Mapping[str, str]]]:
        return [(self.file, self._own_names(part))]

    def _own_names(self, part: str) -> dict[str, str]:
        """Return the names of a part's tensors without their prefix -> their names in the file."""
        single = self.architecture.single_file
        assert single is not None
        prefixes = (*single.parts[part].prefixes, "")  # without any: a file of one network
        prefix = next(one for one in prefixes if any(name.startswith(one) for name in self.file.names))
        return {name.removeprefix(prefix): name for name in self.file.names if name.startswith(prefix)}

    def named(self, part: str, network: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        expected = network.state_dict()
        convert = self._in_text if part in self.architecture.encoders else self._in_network
        if len(expected.keys() & by_name_of(network, tensors).keys()) * 2 > len(expected):
            return by_name_of(network, tensors)
        try:
            return convert(network, tensors)
        except NOT_CONVERTED as error:
            raise UserError(
                f"model {self.name!r}, {part}: the weights are not those that its config describes "
                f"({type(error).__name__}: {error})",
                self.weights_remedy,
            ) from error

    def _in_network(self, network: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the names of a UNet or an autoencoder from those of the original code."""
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

        prefix = {"UNet2DConditionModel": "model.diffusion_model.", "AutoencoderKL": "first_stage_model."}
        kind = type(network).__name__
        given = {prefix[kind] + name: tensor for name, tensor in tensors.items()}
        with quiet_libraries():
            found = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"](
                config=dict(network.config), checkpoint=given
            )
        taken = {id(one) for tensor in found.values() for one in (tensor, tensor._base)}
        spare = {name: tensor for name, tensor in tensors.items() if id(tensor) not in taken}
        return {**found, **{name: tensor for name, tensor in spare.items() if not name.startswith("loss.")}}

    def _in_text(self, network: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the names of a text encoder: of CLIP with any number of ``text_model.``, or of OpenCLIP."""
        inner = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        inner = {without_text_model(name): tensor for name, tensor in inner.items()}
        if "embeddings.token_embedding.weight" not in inner:
            from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

            prefix = OPEN_CLIP[hasattr(network, "text_projection")]
            given = {prefix + name: tensor for name, tensor in tensors.items()}
            inner = convert_open_clip_checkpoint(network, given, prefix=prefix)
            inner = {without_text_model(name): tensor for name, tensor in inner.items()}
        elif "text_projection" in inner:  # OpenCLIP's parameter beside CLIP's layers
            inner["text_projection.weight"] = inner.pop("text_projection").T.contiguous()
        return by_name_of(network, inner)

    def load_denoiser(self, dtype: torch.dtype) -> Any:
        return self._load(self.architecture.network_class(), self.architecture.denoiser, dtype)

    def load_vae(self, dtype: torch.dtype) -> Any:
        return self._load(self.architecture.autoencoder_class(), "vae", dtype)

    def _load(self, kind: Any, part: str, dtype: torch.dtype) -> Any:
        self.check_part(part)
        tensors = self._read(part, empty_network(self.architecture, part, self.config(f"{part}/config.json")), dtype)
        with quiet_libraries():
            return kind.from_single_file(
                tensors, config=self.config_root(), subfolder=part, local_files_only=True, torch_dtype=dtype
            )

    def _read(self, part: str, network: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read the tensors of a part, by the names of `network`."""
        own = self._own_names(part)
        read = self.file.read(own.values(), dtype)
        expected = network.state_dict()
        found = self.named(part, network, {name: read[full] for name, full in own.items()})
        return {name: tensor for name, tensor in found.items() if name in expected}

    def load_text(self, dtype: torch.dtype, *, without: Collection[str] = ()) -> TextEncoders:
        encoders = {part: self._load_encoder(part, dtype) for part in self.architecture.encoders if part not in without}
        return TextEncoders(self.configs.load_tokenizers(without=without), encoders)

    def _load_encoder(self, part: str, dtype: torch.dtype) -> Any:
        import transformers
        from accelerate import init_empty_weights

        self.check_part(part)
        kind = getattr(transformers, self.architecture.encoders[part])
        with init_empty_weights():
            network = kind(kind.config_class.from_dict(self.config(f"{part}/config.json")))
        network.load_state_dict(self._read(part, network, dtype), assign=True)
        return network.to(dtype).eval()


def config_remedy(architecture: Architecture) -> str:
    """Return the sentence on where else the configs of a single file may come from."""
    tokenizers = ", ".join(f"{part}/" for part in architecture.tokenizers)
    return (
        f"set model_config_source to a folder in diffusers layout with the configs and tokenizers of "
        f"{architecture.title} (model_index.json, scheduler/, {tokenizers} and the config.json of each network; no "
        "weights needed)"
    )
