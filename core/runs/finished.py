"""A finished run: its configuration, its plugins and its exported networks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..plugin_api.family import ExtraLora, ModelFamily
from .output_folder import RESOLVED, STUDENT_FOLDER

if TYPE_CHECKING:
    from torch import nn

    from ..registry.registry import Registry
    from ..settings.configuration import Configuration


def open_run(output_dir: Path, *, overrides: Sequence[str] = ()) -> tuple[Configuration, Registry]:
    """The configuration and the plugins of the run in `output_dir`, wherever the folder lies now.

    Args:
        output_dir: Of the run.
        overrides: ``key=value`` over the run's own keys.

    Raises:
        UserError: It is not the folder of a finished run.
    """
    from ..config.load import load_configuration
    from ..registry.registry import Registry

    file = output_dir / RESOLVED
    if not file.is_file():
        raise UserError(
            f"{output_dir} has no {RESOLVED}: it is not the output folder of a run",
            "give the output_dir of a finished `distill run`",
        )
    if not (output_dir / STUDENT_FOLDER).is_dir():
        raise UserError(
            f"{output_dir} has no {STUDENT_FOLDER}/: the run did not finish",
            f"resume it: distill run --config {file} --set resume_from_checkpoint=latest",
        )
    try:
        plugins = json.loads(file.read_text(encoding="utf-8")).get("plugins") or []
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is not JSON of a run: {error}", "restore the file, or run again") from error
    registry = Registry.load(plugins)
    return load_configuration(
        registry, config_file=file, flags={"output_dir": str(output_dir)}, overrides=overrides, to_train=False
    ), registry


def parse_loras(texts: Sequence[str]) -> tuple[ExtraLora, ...]:
    """``PATH[:weight]`` of the command line as LoRAs with weights.

    Raises:
        UserError: A local path does not exist, or a weight is not a number.
    """
    return tuple(_parse_lora(text) for text in texts)


def _parse_lora(text: str) -> ExtraLora:
    head, colon, tail = text.rpartition(":")
    # a path may hold a colon itself; the weight is what follows the last one, when the whole is no path
    if not colon or Path(text).exists() or len(head) == 1:
        path, weight = text, 1.0
    else:
        try:
            path, weight = head, float(tail)
        except ValueError as error:
            raise UserError(
                f"--lora {text}: {tail!r} is not a weight", "write --lora PATH or --lora PATH:0.8"
            ) from error
    looks_local = path.startswith((".", "/", "~")) or path.endswith(".safetensors") or path.count("/") != 1
    expanded = Path(path).expanduser()
    if looks_local and not expanded.exists():
        raise UserError(f"--lora {text}: {path} does not exist", "give a folder, a .safetensors file or a hub id")
    return ExtraLora(str(expanded) if expanded.exists() else path, weight)


class ExportedNetworks:
    """Networks by role of a finished run: one at a time in memory, loaded when its role is asked for.

    Args:
        family: The run's.
        student: The exported ``student/``.
        extra_loras: LoRAs that stand beside the student's; the teacher gets them too, so that the two can be compared.
    """

    def __init__(self, family: ModelFamily, student: Path, *, extra_loras: Sequence[ExtraLora] = ()) -> None:
        self._family, self._student, self._loras = family, student, tuple(extra_loras)
        self._loaded: tuple[str, nn.Module] | None = None

    @contextmanager
    def use(self, role: str) -> Iterator[nn.Module]:
        """The teacher for ``teacher``, else the exported student."""
        if self._loaded is None or self._loaded[0] != role:
            self._loaded = None  # freed before the next one loads
            self._loaded = (role, self._teacher() if role == "teacher" else self._exported())
        yield self._loaded[1]

    def _teacher(self) -> nn.Module:
        if not self._loras:
            return self._family.load_network()
        settings = self._family.settings
        fused = (*settings.teacher_lora, *((lora.path, lora.weight) for lora in self._loras))
        return type(self._family)(self._family.config, replace(settings, teacher_lora=fused)).load_network()

    def _exported(self) -> nn.Module:
        return self._family.load_student(self._student, extra_loras=self._loras)
