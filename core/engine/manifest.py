"""The manifest of a checkpoint: which files it has, and what they must be."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..utils.files import sha256

FORMAT = 1
MANIFEST = "manifest.json"
META = "state.json"
GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""Names of groups, each of which is a file."""


def manifest_entries(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return name -> size and checksum of files, as a manifest has them."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """Read the manifest of a complete checkpoint.

    Raises:
        ValueError: It is no JSON, has not the form of a manifest, or names files outside of the folder.
    """
    try:
        manifest = json.loads((folder / name).read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("it nests too many objects and lists") from error
    if isinstance(manifest, dict) and manifest.get("format") != FORMAT:
        return manifest  # another version's, which the caller refuses as that
    return _Manifest.model_validate(manifest).model_dump()


class _ManifestFile(BaseModel):
    """What a manifest says of a file."""

    model_config = ConfigDict(extra="allow")

    bytes: int = Field(ge=0)
    sha256: str


class _Manifest(BaseModel):
    """The form of a manifest."""

    model_config = ConfigDict(extra="allow")

    format: Any = None
    step: int = Field(ge=0)
    groups: list[Annotated[str, Field(pattern=f"^{GROUP.pattern}$")]]
    sharded: list[Annotated[str, Field(pattern=f"^{GROUP.pattern}$")]] = []
    files: dict[Annotated[str, Field(pattern=r"^[^/\\\x00]+$")], _ManifestFile]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        absent = [name for name in (META, *(f"{group}.safetensors" for group in self.groups)) if name not in self.files]
        if absent:
            raise ValueError(f"it has no checksum of {', '.join(absent)}")
        return self
