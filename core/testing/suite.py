"""All checks of a class, by its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

from . import common
from .checks import Check, Subject, containers

Named = tuple[str, Callable[[], None]]
MODULES = {
    "method": "methods",
    "family": "families",
    "data_backend": "backends",
    "tracker": "trackers",
    "optimizer": "optimizers",
    "quantizer": "quantizers",
    "evaluator": "evaluators",
    "publisher": "publishers",
}
"""Kind of plugin -> the module here with its ``checks``."""


def checks_of(cls: type[Any], *, example: Callable[..., Any] | None = None) -> list[Check]:
    """Return every check for one class, those of all plugins first. They share costly results, and may run in any
    order.

    Args:
        cls: A method, family, data backend, tracker, optimizer, quantizer, evaluator or publisher.
        example: Replaces the class's own ``example``; for kinds without one, returns settings for its ``Config``.

    Raises:
        TypeError: It is no kind of plugin.
    """
    from ..registry.registry import BASES

    subject = Subject(cls, common.kind_of(cls), example)
    base = BASES[subject.kind]
    before = containers(cls)
    checks = [*_of_all(subject, base)]
    if not getattr(cls, "__abstractmethods__", ()):
        module = import_module(f".{MODULES[subject.kind]}", __package__)
        checks += module.checks(subject)
    checks += [("the class is left as it was", partial(common.class_is_left_alone, subject, base, before))]
    return [Check(str(subject), name, function) for name, function in checks]


def _of_all(subject: Subject, base: type[Any]) -> Iterator[Named]:
    yield "the name can be written in configurations", partial(common.name_is_usable, subject)
    yield "it has a docstring", partial(common.it_is_described, subject)
    yield "nothing abstract is left", partial(common.it_is_complete, subject, base)
    yield "signatures are those of the base class", partial(common.signatures_fit, subject, base)
    yield "Config refuses unknown keys", partial(common.config_refuses_unknown_keys, subject)
    yield "every field of Config is described", partial(common.config_is_described, subject)
    yield "Config has a JSON Schema", partial(common.config_has_a_schema, subject)
    yield "numbers of Config are limited", partial(common.config_limits_its_numbers, subject)
    yield "Config accepts its defaults", partial(common.config_accepts_its_defaults, subject)
    yield "its packages are imported late", partial(common.packages_are_imported_late, subject)
