"""New plugins: a package that installs, or a single file, with code of its kind that runs (`distill plugins new`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...plugin_api.version import API_VERSION
from ...utils.files import write_text

if TYPE_CHECKING:
    from ...registry.registry import Registry

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_WORDS_OF_CONFIGURATIONS = {"none", "null", "true", "false", "all"}
_SUFFIXES = {"data_backend": "Backend"}
"""Kind -> what its classes end with, where that is not the kind."""


@dataclass(frozen=True)
class Names:
    """What a new plugin is called.

    Attributes:
        kind: As the registry has it.
        name: As configurations say it, ``soft-targets``.
    """

    kind: str
    name: str

    @property
    def package(self) -> str:
        """Of the package, ``distill-soft-targets``."""
        return f"distill-{self.name.replace('_', '-')}"

    @property
    def module(self) -> str:
        """Of the module, ``distill_soft_targets``: no name that a package of others may have."""
        return self.package.replace("-", "_")

    @property
    def class_name(self) -> str:
        """Of the class, ``SoftTargetsMethod``."""
        camel = "".join(part.capitalize() for part in re.split(r"[-_]", self.name))
        suffix = _SUFFIXES.get(self.kind, self.kind.capitalize())
        return camel if camel.endswith(suffix) and camel != suffix else camel + suffix

    def values(self) -> dict[str, str]:
        """Return the values of the placeholders of the templates."""
        return {
            "name": self.name,
            "spoken": self.kind.replace("_", " "),
            "package": self.package,
            "module": self.module,
            "class_name": self.class_name,
            "api": API_VERSION.partition(".")[0],
        }


def check_name(kind: str, name: str, registry: Registry) -> None:
    """Refuse a name that cannot be one, or that is taken.

    Raises:
        UserError: With what is accepted, or with who has the name.
    """
    if not _NAME.fullmatch(name) or name in _WORDS_OF_CONFIGURATIONS:
        proposal = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")
        usable = proposal and _NAME.fullmatch(proposal) and proposal not in _WORDS_OF_CONFIGURATIONS
        raise UserError(
            f"{name!r} cannot be the name of a plugin.",
            "names are small letters and digits, with dashes between them, and begin with a letter, as "
            f"{proposal if usable else 'soft-targets'!r}.",
        )
    if registry.known(kind, name):
        taken = registry.provenance(kind, name)
        raise UserError(
            f"the {kind.replace('_', ' ')} {name!r} is there already: plugin {taken.plugin!r} ({taken.source}).",
            "choose another name; two of one name cannot be loaded together.",
        )


def new_files(names: Names, *, single_file: bool, read: Mapping[str, str] | None = None) -> Mapping[str, str]:
    """Path, relative to where the plugin goes -> text.

    Args:
        names: What it is called.
        single_file: Whether it is one file, not a package.
        read: What was read from a model (:func:`read_model`); None: the template that needs none.
    """
    values = {**names.values(), **(read or {})}
    kind = names.kind if read is None else f"{names.kind}_of"
    code = _filled(f"{kind}.py", values)
    if single_file:
        return {f"{names.module}.py": code}
    usage = _filled(f"usage_{kind}.md", values)
    return {
        f"{names.package}/{names.module}.py": code,
        f"{names.package}/tests/test_{names.module}.py": _filled(f"test_{kind}.py", values),
        f"{names.package}/pyproject.toml": _filled("pyproject.toml", values),
        f"{names.package}/README.md": _filled("README.md", {**values, "usage": usage.strip()}),
    }


def _filled(template: str, values: Mapping[str, str]) -> str:
    text = (files(__name__) / "assets" / f"{template}.template").read_text(encoding="utf-8")
    return Template(text).substitute(values)


def read_model(names: Names, model: str, registry: Registry) -> Mapping[str, str]:
    """Return what a model's configs and its pipeline's own calls say of a family: placeholder -> code.

    Raises:
        UserError: The plugin is no family, or the pipeline's calls cannot be read.
    """
    if names.kind != "family":
        raise UserError("--model is for a family, whose pipeline is read from it.", "leave it out.")
    families = (registry.get("family", name) for name in registry.names("family"))
    reader: Any = next(found for found in families if hasattr(found, "sketch"))  # the one that describes pipelines
    return reader.sketch(model)


def write_plugin(names: Names, folder: Path, *, single_file: bool, read: Mapping[str, str] | None = None) -> Path:
    """Write a plugin below `folder`; returns the package's folder, or the file.

    Raises:
        UserError: It is there already.
    """
    target = folder / (f"{names.module}.py" if single_file else names.package)
    if target.exists():
        raise UserError(f"{target} exists already.", "choose another name, or another folder: --output DIR.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file.", "give a folder.")
    try:
        for path, text in new_files(names, single_file=single_file, read=read).items():
            write_text(folder / path, text)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}.", "choose a folder of yours: --output DIR.") from error
    return target
