"""Replaces the model's autoencoder by another."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ...core.errors import UserError
from .hub import hub_errors, hub_folder
from .hub_source import HubSource
from .open_source import open_hub
from .single_file import FileSource
from .source import FolderSource, Source


def with_vae(vae: str, source: Source) -> Source:
    """Return the source with another autoencoder: a folder (of a VAE or of a whole model), a file or a hub id."""
    path = Path(vae).expanduser()
    if path.is_dir() and not (path / "config.json").is_file() and not (path / "vae" / "config.json").is_file():
        raise UserError(f"vae {vae!r} has neither config.json nor vae/config.json", "name a folder in diffusers layout")
    if path.is_file():
        configs = source.configs if isinstance(source, FileSource) else source
        assert isinstance(configs, FolderSource)
        return FileSource(str(path), source.architecture, configs)
    if path.is_dir():
        kind = BareVae if (path / "config.json").is_file() else FolderSource
        return kind(str(path), source.architecture)
    return BareHubVae(open_hub(vae, source.architecture).name, source.architecture)


class BareVae(FolderSource):
    """A folder that is an autoencoder itself."""

    def component(self, part: str) -> Path:
        return Path(self.name)

    def file(self, relative: str) -> Path:
        return super().file(relative.removeprefix("vae/"))


class BareHubVae(HubSource):
    """A repository that is an autoencoder itself."""

    def component(self, part: str) -> Path:
        with hub_errors(self.name, "download"):
            return hub_folder(self.name, allow_patterns=["config.json", "*.safetensors"])

    def file(self, relative: str) -> Path:
        return super().file(relative.removeprefix("vae/"))

    def folder(self, part: str) -> str:
        return ""

    def digest(self, part: str) -> str:
        commit = self.file("config.json").parent.name
        return hashlib.sha256(f"{self.name}@{commit}".encode()).hexdigest()
