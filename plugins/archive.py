"""Packs a student into one file: a .tar.gz or a .zip, the same bytes for the same student."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..core.errors import UserError
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.publisher import Publisher
from ..core.settings.types import LocalPath
from ..core.utils.files import whole_file

EARLIEST = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a ZIP can hold; every member has it."""
MODE = 0o644


class Archive(Publisher):
    """Packs `student/` into one file beside it, in which it lies in a folder with the run's name."""

    name: ClassVar[str] = "archive"

    class Config(BaseModel):
        """The file to write, and how to pack it."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        format: Literal["tar.gz", "zip"] = "tar.gz"
        """Kind of archive."""
        file: LocalPath | None = None
        """The file; absent: `<name of the run>.<format>` beside `student/`."""
        compression: int = Field(default=1, ge=0, le=9)
        """Compression level (0 = none, 9 = highest). Weights hardly shrink."""

    def problems(self) -> list[str]:
        """Return a problem if the file is a folder or cannot be written."""
        file = self.config.file
        if file is None:
            return []
        if file.is_dir():
            return [f"publisher_config.archive.file = {str(file)!r} is a folder (name the file)"]
        above = next(parent for parent in file.absolute().parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            return [f"publisher_config.archive.file = {str(file)!r}: {above} cannot be written"]
        return []

    def publish(self, student: Path) -> str:
        """Pack the folder, completely or not at all; return the path of the file."""
        file = self.config.file or student.absolute().with_name(f"{self.setting.run_name}.{self.config.format}")
        members = sorted(path for path in student.rglob("*") if path.is_file())
        if not members:
            raise UserError(f"{student} holds no file", "give the folder student/ of a finished run")
        names = [f"{self.setting.run_name}/{path.relative_to(student).as_posix()}" for path in members]
        pack = _pack_zip if self.config.format == "zip" else _pack_tar
        with whole_file(file) as partial, partial.open("wb") as stream:
            pack(stream, members, names, self.config.compression)
        return str(file)


def _pack_tar(stream: IO[bytes], members: Sequence[Path], names: Sequence[str], compression: int) -> None:
    # without a name and a time of its own in gzip's header; members without owner and time
    with (
        gzip.GzipFile("", "wb", compression, stream, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path, name in zip(members, names, strict=True):
            info = tarfile.TarInfo(name)
            info.size, info.mode = path.stat().st_size, MODE
            with path.open("rb") as file:
                tar.addfile(info, file)


def _pack_zip(stream: IO[bytes], members: Sequence[Path], names: Sequence[str], compression: int) -> None:
    kind = zipfile.ZIP_DEFLATED if compression else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", kind, compresslevel=compression) as packed:
        for path, name in zip(members, names, strict=True):
            info = zipfile.ZipInfo(name, EARLIEST)
            info.compress_type, info.create_system, info.external_attr = kind, 3, MODE << 16
            info.file_size = path.stat().st_size  # tells the writer whether the ZIP64 form is needed
            with path.open("rb") as file, packed.open(info, "w") as member:
                shutil.copyfileobj(file, member, 1 << 20)


@hookimpl
def register_publishers() -> Sequence[type[Publisher]]:
    """Return the publisher of this file."""
    return [Archive]
