"""Writes a student's LoRA in kohya's format, for ComfyUI, AUTOMATIC1111, InvokeAI and sd-scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from ..core.errors import UserError
from ..core.plugin_api.hookspecs import hookimpl
from ..core.plugin_api.publisher import Publisher
from ..core.settings.types import LocalPath


class Kohya(Publisher):
    """One `.safetensors` file beside `student/`, which goes into ComfyUI's `models/loras/`."""

    name: ClassVar[str] = "kohya"
    aliases: ClassVar[tuple[str, ...]] = ("comfyui",)

    class Config(BaseModel):
        """The file to write, and its precision."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        file: LocalPath | None = None
        """The file; absent: `<name of the run>-kohya.safetensors` beside `student/`."""
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
        """Type of the tensors. `auto`: that of the exported student (`export_dtype`); `float16` and `bfloat16` are half
        as large as `float32`, and rounded."""

    def problems(self) -> list[str]:
        """Return problems: a fully trained student, a family without such a format, a file of another kind."""
        found = []
        family, file = self.setting.family, self.config.file
        if self.setting.model_type == "full":
            found.append("kohya's format is for LoRAs, and the student is fully trained (publish its folder: hub, s3)")
        if family is not None and family.kohya_problem():
            found.append(family.kohya_problem())
        if file is not None and file.suffix != ".safetensors":
            found.append(f"publisher_config.kohya.file = {str(file)!r} does not end in .safetensors")
        return found

    def publish(self, student: Path) -> str:
        """Write the file; return its path, and the layers that its readers ignore."""
        if self.setting.load_family is None:
            raise UserError("it is not known of which family the student is", "publish a run: distill publish")
        title = f"{self.setting.run_name}-kohya"
        file = self.config.file or student.absolute().with_name(f"{title}.safetensors")
        dtype = None if self.config.dtype == "auto" else self.config.dtype
        notes = self.setting.load_family().export_kohya(student, file, title=title, dtype=dtype)
        return f"{file}{''.join(f' ({note})' for note in notes)}"


@hookimpl
def register_publishers() -> Sequence[type[Publisher]]:
    """Return the publisher of this file."""
    return [Kohya]
