"""Which source the name of a model means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import UserError
from .hub_source import HubSource
from .single_file import FileSource, config_remedy
from .source import FolderSource, Source

if TYPE_CHECKING:
    from .architecture import Architecture


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


def _config_source(name: str | None, architecture: Architecture, revision: str | None) -> FolderSource:
    assert architecture.single_file is not None
    if name is None:
        return HubSource(architecture.single_file.base_repository, architecture)
    source = open_source(name, architecture, revision=revision)
    if not isinstance(source, FolderSource):
        raise UserError(f"model_config_source = {name!r} is not a folder or hub id", config_remedy(architecture))
    return source
