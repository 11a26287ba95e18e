"""The parts of a configuration that belong to plugins: folded into one form, checked by their owners' models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ..errors import Finding, UserError
from ..plugin_api.method import MethodPart, MethodSetup, method_parts
from ..settings.configuration import PARTS
from ..settings.dataset_settings import DatasetSettings
from ..settings.run_settings import FULL_RATE, LORA_RATE, RunSettings
from ..utils import packages
from .findings import PartCheck
from .quantisation import named_quantizers
from .reading import ConfigReport, Origin

if TYPE_CHECKING:
    from ..registry.registry import Registry

NAMED = {"distillation_method": "method", "model_family": "family", "optimizer": "optimizer"}
"""Keys that name one plugin -> its kind."""
LISTED = {"report_to": "tracker", "evaluators": "evaluator", "publish_to": "publisher"}
"""Keys that name several."""
FACTORS = (0.1, 10.0)
"""Least and greatest learning rate of optimizers that estimate the size of their steps themselves."""
ADAM_KEYS = ("adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay")
Parts = dict[str, dict[str, BaseModel]]
"""Key of a part -> plugin's name -> its validated configuration."""


def _lists(kind: str, run: RunSettings) -> list[tuple[str, Sequence[str]]]:
    """Return the keys that name plugins of a kind, each with the names."""
    if kind == "quantizer":
        return [(key, [name]) for key, name in named_quantizers(run).items()]
    return [(key, getattr(run, key)) for key, listed in LISTED.items() if listed == kind]


@dataclass
class PartsCheck:
    """The check of the plugins' names and of their settings."""

    registry: Registry
    report: ConfigReport
    classes: dict[str, type[Any]] = field(default_factory=dict)
    """Kind -> the class chosen by one of the NAMED keys."""

    def resolve_names(self) -> None:
        """Find the classes of method, family and optimizer; replace aliases by names."""
        for key, kind in NAMED.items():
            name = self.report.layers.values.get(key)
            name = RunSettings.model_fields[key].default if name is None else name
            if not isinstance(name, str):
                continue  # its type is refused with the run's keys
            if not self.registry.known(kind, name):
                self.report.refuse(key, name, f"is not a registered {kind}", self.registry.remedy(kind, name))
                continue
            self.classes[kind] = self.registry.get(kind, name)
            if self.classes[kind].name != name:
                self.report.layers.values[key] = self.classes[kind].name
                self.report.note(f"{key} = {name!r} is read as {self.classes[kind].name!r}")

    def fold(self, given: Sequence[tuple[str, Any, Origin]]) -> None:
        """Merge parts on top of each other, each brought into the form {name: {...}} whichever form it was given in.

        Args:
            given: (key, value, origin), the strongest last.
        """
        for key, value, origin in given:
            kind = PARTS[key]
            if isinstance(value, Mapping):
                self.report.layers.add({key: self._folded(key, kind, value, origin)}, origin, deep=frozenset(PARTS))
            elif value is not None:
                remedy = f'write {{"NAME": {{...}}}} with the name of a {kind}'
                self.report.findings.append(Finding(origin.file, key, value, "must be an object {...}", remedy))

    def _folded(self, key: str, kind: str, given: Mapping[str, Any], origin: Origin) -> dict[str, Any]:
        chosen = self.classes.get(kind)
        named: dict[str, Any] = {}
        flat: dict[str, Any] = {}
        for name, value in given.items():
            is_field = chosen is not None and name in chosen.Config.model_fields
            if self.registry.known(kind, name):
                named[self.registry.get(kind, name).name] = value
            elif is_field or (chosen is not None and not isinstance(value, Mapping)):
                flat[name] = value
            elif chosen is not None or kind not in NAMED.values():  # else the unknown name itself is refused already
                problem, remedy = f"is not a registered {kind}", self.registry.remedy(kind, name)
                self.report.findings.append(Finding(origin.file, f"{key}.{name}", value, problem, remedy))
        if chosen is not None and flat:
            beside = named.get(chosen.name, {})
            named[chosen.name] = {**beside, **flat} if isinstance(beside, Mapping) else beside
        return named

    def elsewhere(self) -> dict[str, str]:
        """Return the keys that are known at another level than the run's, each with the place for it."""
        homes = {key: f"the data file, as data.<id>.{key}" for key in DatasetSettings.model_fields}
        for key, kind in PARTS.items():
            if kind in self.classes:
                part = self.classes[kind]
                homes |= {name: f"{key}.{part.name}.{name}" for name in part.Config.model_fields}
        return {key: home for key, home in homes.items() if key not in RunSettings.model_fields}

    def validate(self, run: RunSettings | None) -> Parts:
        """Validate every part that is in use or was given."""
        result: Parts = {}
        for key, kind in PARTS.items():
            given: Mapping[str, Any] = self.report.layers.values.get(key) or {}
            names = dict.fromkeys([*self.wanted(kind, run, report=True), *given])
            parts = {name: self._part(key, kind, name, given.get(name)) for name in names}
            result[key] = {name: part for name, part in parts.items() if part is not None}
        return result

    def _part(self, key: str, kind: str, name: str, raw: Any) -> BaseModel | None:
        if raw is not None and not isinstance(raw, Mapping):
            self.report.refuse(f"{key}.{name}", raw, "is not an object", f"write {{...}} with the settings of {name}")
            return None
        chosen = self.registry.get(kind, name)
        if kind in self.classes and chosen is not self.classes[kind]:
            self.report.note(f"{key}.{name} has no effect: the {kind} is {self.classes[kind].name!r}")
        origin = partial(self.report.layers.origin, key, name)
        return self._validated(chosen, raw or {}, f"{key}.{name}.", origin)

    def _validated(
        self, owner: type[Any], raw: Mapping[str, Any], prefix: str, origin: Callable[[str], Origin]
    ) -> BaseModel | None:
        check = PartCheck(
            self.report.findings, elsewhere={key: f"the run's own keys, as {key}" for key in RunSettings.model_fields}
        )
        config = check.validate(owner.Config, raw, prefix, origin)
        if config is None:
            return None
        parts = list(method_parts(config))
        bound = [self._bind(part, f"{prefix}{path}.", origin(path.partition(".")[0])) for path, part in parts]
        return config if all(bound) else None

    def _bind(self, part: MethodPart, prefix: str, origin: Origin) -> bool:
        """Find a method that is named inside another's settings, and check what it is given there."""
        if not self.registry.known("method", part.method):
            remedy = self.registry.remedy("method", part.method)
            problem = "is not a registered method"
            self.report.findings.append(Finding(origin.file, f"{prefix}method", part.method, problem, remedy))
            return False
        found = self.registry.get("method", part.method)
        settings = self._validated(found, part.config, f"{prefix}config.", lambda key: origin)
        if settings is not None:
            part.bind(found, settings)
        return settings is not None

    def wanted(self, kind: str, run: RunSettings | None, *, report: bool = False) -> list[str]:
        """List the plugins of a kind that the run uses."""
        if kind in self.classes:
            return [self.classes[kind].name]
        named = [] if run is None else [(key, name) for key, names in _lists(kind, run) for name in names]
        for key, name in named if report else ():
            if not self.registry.known(kind, name):
                self.report.refuse(key, name, f"is not a registered {kind}", self.registry.remedy(kind, name))
        names = dict.fromkeys(name for _, name in named if self.registry.known(kind, name))
        return [self.registry.get(kind, name).name for name in names]

    def adapters(self, run: RunSettings, parts: Parts) -> list[str]:
        """Return the networks that the method trains as adapters; none where its settings are not valid."""
        from ..engine.returned import roles_of

        method = self.classes.get("method")
        config = parts["distillation_config"].get(method.name) if method else None
        if method is None or config is None:
            return []
        try:
            roles = roles_of(method, config, MethodSetup(run.model_type, use_ema=run.use_ema))
        except UserError:  # reported with the method's requirements
            return []
        return [role.name for role in roles if role.trains == "lora"]

    def check_optimizer(self, run: RunSettings) -> None:
        """Check that the optimizer honours the ``adam_*`` settings that the user gave."""
        plugin = self.classes.get("optimizer")
        if plugin is None:
            return
        for key in ADAM_KEYS:
            if self.report.layers.given(key) and key not in plugin.honours:
                self._unhonoured(key, getattr(run, key), plugin.name)
        rate, low, high = run.learning_rate, *FACTORS
        if plugin.estimates_learning_rate and not low <= rate <= high:
            problem = f"is a factor on the step size that {plugin.name!r} finds itself, so near 1"
            self.report.refuse("learning_rate", rate, problem, "set learning_rate to 1, or leave it out")
        if plugin.schedule_free:
            self._check_schedule_free(run, plugin.name)

    def check_packages(self) -> None:
        """Check that the packages of method, family and optimizer are installed."""
        for key, kind in NAMED.items():
            chosen = [self.classes[kind]] if kind in self.classes else []
            for found in chosen:
                for problem, remedy in packages.problems(found.packages):
                    self.report.refuse(key, found.name, problem, remedy)

    def _unhonoured(self, key: str, value: float, name: str) -> None:
        if value == RunSettings.model_fields[key].default:  # nothing else was asked for
            self.report.note(f"{key} = {value:g} has no effect: the optimizer {name!r} has no such setting")
            return
        problem = f"is not honoured: the optimizer {name!r} has no such setting"
        self.report.refuse(key, value, problem, f"leave {key} out, or see optimizer_config")

    def _check_schedule_free(self, run: RunSettings, name: str) -> None:
        if run.lr_scheduler not in ("constant", "constant_with_warmup"):
            effect = "its average takes the place of a schedule, and it does lr_warmup_steps itself"
            self.report.note(f"lr_scheduler = {run.lr_scheduler!r} has no effect with {name!r}: {effect}")
        if run.use_ema:
            problem = f"is a second average: the optimizer {name!r} averages its weights itself"
            self.report.refuse("use_ema", True, problem, "set use_ema to false")

    def default_learning_rate(self) -> None:
        """Set the optimizer's own learning rate where neither the user nor a recipe gives one."""
        plugin = self.classes.get("optimizer")
        if plugin is None or self.report.layers.given("learning_rate"):
            return
        rate = plugin.default_learning_rate
        if rate is None and plugin.relative_learning_rate != 1:
            full = self.report.layers.values.get("model_type") == "full"
            rate = plugin.relative_learning_rate * (FULL_RATE if full else LORA_RATE)
        if rate is not None:
            self.report.layers.values["learning_rate"] = rate
            self.report.note(f"learning_rate is {rate:g}, as {plugin.name!r} wants it")

    def recipe_for_optimizer(self, recipe: dict[str, Any], *, whose: str = "the miniature's recipe") -> dict[str, Any]:
        """Adapt a recipe, which is made for AdamW: drop the keys that the chosen optimizer handles in its own way."""
        plugin = self.classes.get("optimizer")
        if plugin is None:
            return recipe
        own = {"learning_rate", "lr_end"} if plugin.default_learning_rate is not None else set()
        own |= {"use_ema", "ema_decay", "lr_scheduler", "lr_end"} if plugin.schedule_free else set()
        kept = {key: value for key, value in recipe.items() if key not in own}
        factor = plugin.relative_learning_rate
        rates = {key: kept[key] * factor for key in ("learning_rate", "lr_end") if key in kept and factor != 1}
        if rates and not self.report.layers.given("learning_rate"):
            reason = f"{factor:g} of that for AdamW in {whose}"
            self.report.note(f"learning_rate is {rates['learning_rate']:g} for {plugin.name!r}, {reason}")
        return kept | rates
