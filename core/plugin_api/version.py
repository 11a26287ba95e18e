"""The version of the plugin API, and the one that a plugin states it was built for.

A plugin states it as a text in its file, or in the module (or package) of its entry point: ``DISTILL_API = "1"`` for
any 1.x, ``"1.3"`` where it needs what came with 1.3. It is read from the source, so that nothing of a plugin runs that
was built for another API. A plugin that states nothing is taken as it is.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from ..errors import UserError

API_VERSION = "1.0"
"""MAJOR.MINOR. The major number changes when plugins that worked would not any more, the minor one when something is
added that a plugin may need."""
ATTRIBUTE = "DISTILL_API"
_VERSION = re.compile(r"(\d+)(?:\.(\d+))?")


def check_api(stated: str, label: str) -> None:
    """Refuse a plugin of another major version, and one that needs a newer minor version.

    Args:
        stated: The version that the plugin states, as ``1`` or ``1.0``.
        label: The plugin, for messages.

    Raises:
        UserError: It was built for another API.
    """
    wanted, here = _parsed(stated, label), _parsed(API_VERSION, "distill")
    if wanted[0] == here[0] and wanted <= here:
        return
    reason = f"{label} was built for version {stated} of the plugin API, and this distill has version {API_VERSION}."
    if wanted > here:
        raise UserError(reason, f"upgrade distill, or use a release of the plugin for API {here[0]}.")
    raise UserError(
        reason,
        f"use a newer release of the plugin, or port it to API {here[0]} (CHANGELOG.md says what changed) and state "
        f'{ATTRIBUTE} = "{here[0]}".',
    )


def _parsed(version: str, label: str) -> tuple[int, int]:
    found = _VERSION.fullmatch(version)
    if found is None:
        raise UserError(
            f"{label}: {ATTRIBUTE} = {version!r} is no version of the plugin API.",
            f'write {ATTRIBUTE} = "{API_VERSION.partition(".")[0]}", or with the minor version that it needs, as '
            f'"{API_VERSION}".',
        )
    return int(found[1]), int(found[2] or 0)


def stated_api(source: bytes, label: str) -> str | None:
    """Return the version that a module's source states; None where it states none or is not Python.

    Raises:
        UserError: The stated version is not a text.
    """
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return None
    for node in body:
        targets, value = _assigned(node)
        if value is not None and any(isinstance(target, ast.Name) and target.id == ATTRIBUTE for target in targets):
            if not isinstance(value, ast.Constant) or not isinstance(value.value, str):
                raise UserError(
                    f"{label}: {ATTRIBUTE} = {ast.unparse(value)} cannot be read without running the plugin.",
                    f'write the version itself as a text: {ATTRIBUTE} = "{API_VERSION.partition(".")[0]}".',
                )
            return value.value
    return None


def _assigned(node: ast.stmt) -> tuple[list[ast.expr], ast.expr | None]:
    """Return targets and value of an assignment; nothing for other statements."""
    if isinstance(node, ast.Assign):
        return node.targets, node.value
    return ([node.target], node.value) if isinstance(node, ast.AnnAssign) else ([], None)


def check_file(path: Path, label: str) -> None:
    """Check the version that a plugin file states. Raises UserError as :func:`check_api`."""
    stated = stated_api(path.read_bytes(), label)
    if stated is not None:
        check_api(stated, label)


def check_module(name: str, label: str) -> None:
    """Check the version that an installed module, or a package around it, states. Raises as :func:`check_api`."""
    for path in _sources(name):
        check_file(path, label)


def _sources(name: str) -> Iterator[Path]:
    """Yield the source files of a dotted module and the packages around it, found without importing any of them."""
    first, *rest = name.split(".")
    spec = importlib.util.find_spec(first)
    for count in range(len(rest) + 1):
        if spec is None:
            return
        if spec.origin is not None and spec.origin.endswith(".py"):
            yield Path(spec.origin)
        if count < len(rest):
            spec = PathFinder.find_spec(".".join([first, *rest[: count + 1]]), spec.submodule_search_locations)
