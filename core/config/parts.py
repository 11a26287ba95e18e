"""The parts of a configuration that plugins own: folded into one form, checked by their owners' models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ..errors import Finding
from .configuration import PARTS
from .dataset_settings import DatasetSettings
from .findings import PartCheck
from .reading import Layers
from .run_settings import RunSettings

if TYPE_CHECKING:
    from ..plugins import Registry

NAMED = {"distillation_method": "method", "model_family": "family", "optimizer": "optimizer"}
"""Keys that name one plugin -> its kind."""
LISTED = {"report_to": "tracker", "evaluators": "evaluator", "publish_to": "publisher"}
"""Keys that name several."""
ADAM_KEYS = ("adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay")
Parts = dict[str, dict[str, BaseModel]]
"""Key of a part -> plugin's name -> its validated configuration."""


@dataclass
class PartsCheck:
    """Names of plugins and the settings under them."""

    registry: Registry
    layers: Layers
    findings: list[Finding]
    notices: list[str]
    classes: dict[str, type[Any]] = field(default_factory=dict)
    """Kind -> the class chosen by one of the NAMED keys."""

    def refuse(self, key: str, value: object, problem: str, remedy: str) -> None:
        """Add a finding about a key."""
        self.findings.append(Finding(self.layers.origin(*key.split(".")).file, key, value, problem, remedy))

    def resolve_names(self) -> None:
        """Find the classes of method, family and optimizer; aliases become names."""
        for key, kind in NAMED.items():
            name = self.layers.values.get(key)
            name = RunSettings.model_fields[key].default if name is None else name
            if not isinstance(name, str):
                continue  # its type is refused with the run's keys
            if not self.registry.known(kind, name):
                self.refuse(key, name, f"is not a registered {kind}", self.registry.remedy(kind, name))
                continue
            self.classes[kind] = self.registry.get(kind, name)
            if self.classes[kind].name != name:
                self.layers.values[key] = self.classes[kind].name
                self.notices.append(f"{key} = {name!r} is read as {self.classes[kind].name!r}")

    def fold(self) -> None:
        """Bring ``distillation_config`` and its like into the form {name: {...}}, whichever form was given."""
        for key, kind in PARTS.items():
            given = self.layers.values.get(key)
            if given is None:
                self.layers.values.pop(key, None)
            elif not isinstance(given, Mapping):
                self.refuse(key, given, "is not an object", f'write {{"NAME": {{...}}}} with the name of a {kind}')
                del self.layers.values[key]
            else:
                self.layers.values[key] = self._folded(key, kind, given)

    def _folded(self, key: str, kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
        chosen = self.classes.get(kind)
        folded: dict[str, Any] = {}
        for name, value in given.items():
            if self.registry.known(kind, name):
                folded[self.registry.get(kind, name).name] = value
            elif chosen is None:
                self._unknown(key, kind, name, value)
            elif isinstance(value, Mapping) and name not in chosen.Config.model_fields:
                self._unknown(key, kind, name, value)
        for name, value in given.items():
            flat = chosen is not None and not self.registry.known(kind, name)
            if chosen is not None and flat and (name in chosen.Config.model_fields or not isinstance(value, Mapping)):
                part = folded.setdefault(chosen.name, {})
                folded[chosen.name] = {**part, name: value} if isinstance(part, Mapping) else part
                self.layers.origins[(key, chosen.name, name)] = self.layers.origin(key, name)
        return folded

    def _unknown(self, key: str, kind: str, name: str, value: Any) -> None:
        if kind in NAMED.values() and kind not in self.classes:
            return  # the name that would tell is itself unknown and refused already
        self.refuse(f"{key}.{name}", value, f"is not a registered {kind}", self.registry.remedy(kind, name))

    def elsewhere(self) -> dict[str, str]:
        """Keys that are known at another level than the run's -> where."""
        places = {key: f"the data file, as data.<id>.{key}" for key in DatasetSettings.model_fields}
        for key, kind in PARTS.items():
            if kind in self.classes:
                part = self.classes[kind]
                places |= {name: f"{key}.{part.name}.{name}" for name in part.Config.model_fields}
        return {key: place for key, place in places.items() if key not in RunSettings.model_fields}

    def validate(self, run: RunSettings | None) -> Parts:
        """Every part that is in use or was given."""
        result: Parts = {}
        for key, kind in PARTS.items():
            given: Mapping[str, Any] = self.layers.values.get(key) or {}
            names = dict.fromkeys([*self.wanted(kind, run, report=True), *given])
            parts = {name: self._part(key, kind, name, given.get(name)) for name in names}
            result[key] = {name: part for name, part in parts.items() if part is not None}
        return result

    def _part(self, key: str, kind: str, name: str, raw: Any) -> BaseModel | None:
        if raw is not None and not isinstance(raw, Mapping):
            self.refuse(f"{key}.{name}", raw, "is not an object", f"write {{...}} with the settings of {name}")
            return None
        chosen = self.registry.get(kind, name)
        if kind in self.classes and chosen is not self.classes[kind]:
            self.notices.append(f"{key}.{name} has no effect: the {kind} is {self.classes[kind].name!r}")
        check = PartCheck(self.findings, elsewhere={key: f"the run's own keys, as {key}" for key in RunSettings.model_fields})
        return check.validate(
            chosen.Config, raw or {}, f"{key}.{name}.", lambda part: self.layers.origin(key, name, part)
        )

    def wanted(self, kind: str, run: RunSettings | None, *, report: bool = False) -> list[str]:
        """Names of the plugins of a kind that the run uses."""
        if kind in self.classes:
            return [self.classes[kind].name]
        keys = [key for key, listed in LISTED.items() if listed == kind]
        names: Sequence[str] = getattr(run, keys[0]) if run is not None and keys else ()
        for name in names if report else ():
            if not self.registry.known(kind, name):
                self.refuse(keys[0], name, f"is not a registered {kind}", self.registry.remedy(kind, name))
        return [self.registry.get(kind, name).name for name in names if self.registry.known(kind, name)]

    def check_optimizer(self, run: RunSettings) -> None:
        """Its package is there, and it has the ``adam_*`` settings that the user gave."""
        plugin = self.classes.get("optimizer")
        if plugin is None:
            return
        for key in ADAM_KEYS:
            if self.layers.given(key) and key not in plugin.honours:
                problem = f"is not honoured: the optimizer {plugin.name!r} has no such setting"
                self.refuse(key, getattr(run, key), problem, f"leave {key} out, or see optimizer_config")
        for package, install in plugin.packages.items():
            if find_spec(package) is None:
                problem = f"needs the package {package}, which is not installed"
                self.refuse("optimizer", run.optimizer, problem, f"pip install '{install}'")
