"""Published settings that lie under what the user gives: recipes by name, and what a method recommends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

from ..errors import Finding, UserError
from ..settings.configuration import PARTS
from ..settings.run_settings import RunSettings
from ..utils.devices import cuda_available
from ..utils.suggest import did_you_mean
from .parsing import read_file
from .parts import ADAM_KEYS, PartsCheck
from .reading import Layers, Origin

if TYPE_CHECKING:
    from ..plugin_api.method import Method
    from ..plugin_api.recommended import Recommended
    from ..registry.registry import Registry

RATES = ("learning_rate", "lr_end", "lr_scheduler", "use_ema", "ema_decay")
"""Keys that some optimizers handle in their own way."""
MERGED = frozenset({"role_optimizers"})
"""Keys of the run whose objects are merged from file, flags and overrides."""
DEEP = frozenset(PARTS) | MERGED
DEFAULT_RANK = 64
LENGTHS = ("max_train_steps", "num_train_epochs")


@dataclass(frozen=True)
class PublishedRecipe:
    """Published settings by name.

    Attributes:
        name: Its name, that of its file.
        file: The file: a configuration like any other, each line of which names its source in a comment.
        source: Where it comes from: ``built in``, a package, a plugin's file.
        summary: The first line of the file's leading comment.
        settings: Its content; parts of plugins as they stand in the file.
    """

    name: str
    file: Path
    source: str
    summary: str
    settings: Mapping[str, Any]

    @property
    def origin(self) -> Origin:
        """Return the origin that findings about its values name."""
        return Origin(f"recipe {self.name}", self.file.parent)


def find_recipe(registry: Registry, name: str) -> PublishedRecipe:
    """Return a recipe. Raises UserError for an unknown name, and for a file that cannot be read."""
    if name not in registry.recipes:
        known = ", ".join(registry.recipes)
        raise UserError(
            f"there is no recipe {name!r}.", f"{did_you_mean(name, registry.recipes)}recipes: {known or 'none'}."
        )
    file, provenance = registry.recipes[name]
    findings: list[Finding] = []
    content = read_file(file, findings, what="recipe")
    if findings or not isinstance(content, Mapping):
        problem = f"{findings[0].problem}" if findings else "is not an object of keys"
        raise UserError(f"recipe {name!r} ({file}) {problem}.", "mend the file, or load its plugin no more.")
    comments = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return PublishedRecipe(name, file, provenance.source, comments[0].lstrip("# ").strip() if comments else "", content)


def lay_under(layers: Layers, values: Mapping[str, Any], origin: Origin) -> None:
    """Lay values under those that are there; objects of plugins' parts are merged."""
    under = Layers()
    under.add(values, origin, deep=DEEP)
    for key, value in layers.values.items():
        if value is not None:
            under.add({key: value}, layers.origin(key), deep=DEEP)
    under.origins.update(layers.origins)
    layers.values, layers.origins = under.values, under.origins


def recipe_problem(recipe: PublishedRecipe, given: Mapping[str, Any]) -> str | None:
    """Return why the recipe cannot be used with what is given, or None."""
    method, asked = recipe.settings.get("distillation_method"), given.get("distillation_method")
    if method is not None and asked not in (None, method):
        return f"is for the method {method!r}, and distillation_method is {asked!r}"
    return None


def fitting_recipe(recipe: PublishedRecipe, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the recipe's settings without those that something given makes meaningless, and a line for each reason."""
    settings, lines = dict(recipe.settings), []
    if any(given.get(key) is not None for key in LENGTHS):
        settings = {key: value for key, value in settings.items() if key not in LENGTHS}
    kind = settings.get("model_type", RunSettings.model_fields["model_type"].default)
    asked = given.get("model_type")
    if asked not in (None, kind):
        dropped = [key for key in ("learning_rate", "lr_end", "lora_rank", "lora_alpha") if key in settings]
        settings = {key: value for key, value in settings.items() if key not in dropped}
        if dropped:
            lines.append(f"{', '.join(dropped)} of the recipe {recipe.name} are for model_type {kind}, and not used")
    return settings, lines


def adapt_rates(check: PartsCheck, recipe: PublishedRecipe) -> None:
    """Bring a recipe's rates, which are for the optimizer that it names, into the form that the chosen one takes."""
    layers, origin = check.report.layers, recipe.origin
    optimizer = check.classes.get("optimizer")
    if optimizer is None or optimizer.name == recipe.settings.get(
        "optimizer", RunSettings.model_fields["optimizer"].default
    ):
        return
    own = {key: layers.values[key] for key in RATES if key in layers.values and layers.origin(key) == origin}
    adapted = check.recipe_for_optimizer(own, whose="the recipe")
    for key in own:
        if key in adapted:
            layers.values[key] = adapted[key]
        else:
            del layers.values[key]
    _leave_out_unhonoured(layers.values, optimizer, [key for key in ADAM_KEYS if layers.origin(key) == origin])


def _leave_out_unhonoured(values: dict[str, Any], optimizer: Any, keys: list[str]) -> None:
    for key in keys:
        if key not in optimizer.honours:
            values.pop(key, None)


# -- what a method recommends --------------------------------------------------------------------------------------


def fitting(method: type[Method], *, model_type: str, family: str) -> list[Recommended]:
    """Return what a method recommends for this kind of student on this family, from the general to the special."""
    return [each for each in method.recommended if each.fits(model_type=model_type, family=family)]


def lay_recommended(check: PartsCheck) -> None:
    """Lay what the method recommends under what is given, and say in one line what that changes."""
    method, family, layers = check.classes.get("method"), check.classes.get("family"), check.report.layers
    if method is None or family is None:
        return
    known_type = RunSettings.model_fields["model_type"]
    model_type = layers.values.get("model_type") or known_type.default
    if model_type not in get_args(known_type.annotation):
        return  # refused as a value, and nothing is published for it
    found = fitting(method, model_type=model_type, family=family.name)
    run = _for_this_run({key: value for each in found for key, value in each.run.items()}, check)
    given = layers.values.get("distillation_config")
    here = given.get(method.name) if isinstance(given, Mapping) else None
    known = here if isinstance(here, Mapping) else {}
    own = {key: value for each in found for key, value in each.method.items() if key not in known}
    said = [*_changes(run, RunSettings, model_type=model_type), *_changes(own, method.Config)]
    origin = Origin(f"recommended by {method.name}", Path())
    lay_under(layers, {**run, "distillation_config": {method.name: own}}, origin)
    if said:
        sources = "; ".join(dict.fromkeys(each.source for each in found))
        batch = next((f", in batches of {each.batch}" for each in reversed(found) if each.batch), "")
        line = f"{method.name}: {', '.join(said)}, as published{batch}, since nothing else is set ({sources})"
        check.report.notices.append(line)


def _for_this_run(recommended: dict[str, Any], check: PartsCheck) -> dict[str, Any]:
    """Return the recommended keys of the run that nobody set and that this machine and optimizer can use."""
    layers, optimizer = check.report.layers, check.classes.get("optimizer")
    values = check.recipe_for_optimizer(recommended, whose="the published settings") if recommended else {}
    if optimizer is not None:
        _leave_out_unhonoured(values, optimizer, list(ADAM_KEYS))
    values = usable_here(values, device=str(layers.values.get("device") or "auto"))
    rank, alpha = layers.values.get("lora_rank"), values.get("lora_alpha")
    if alpha is not None and layers.given("lora_rank"):
        usable = isinstance(rank, int | float) and rank > 0  # else it is refused, and alpha is not to blame
        values["lora_alpha"] = rank * alpha / values.get("lora_rank", DEFAULT_RANK) if usable else None
    if layers.given("num_train_epochs") or layers.given("max_train_steps"):
        values = {key: value for key, value in values.items() if key not in LENGTHS}
    return {key: value for key, value in values.items() if value is not None and not layers.given(key)}


def usable_here(values: Mapping[str, Any], *, device: str = "auto") -> dict[str, Any]:
    """Return the values without fp16 where there is no card for it."""
    on_card = device not in ("cpu", "mps") and cuda_available()
    return {key: value for key, value in values.items() if on_card or value != "fp16"}


def as_words(key: str, value: object) -> str:
    """Return a setting as ``key value``."""
    return f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"


def told_only(recommended: Recommended) -> list[str]:
    """Return what is recommended and not set, each as ``key value``."""
    batch = [f"a batch of {recommended.batch}"] if recommended.batch else []
    return [*batch, *(as_words(*item) for item in recommended.told.items())]


def _changes(values: Mapping[str, Any], model: type[BaseModel], *, model_type: str = "lora") -> Iterator[str]:
    """Yield the values that differ from the defaults, as ``key value``."""
    defaults = {key: info.get_default(call_default_factory=True) for key, info in model.model_fields.items()}
    if model is RunSettings:
        defaults |= {"learning_rate": RunSettings(model_type=model_type).learning_rate}  # type: ignore[arg-type]
    for key, value in values.items():
        if value != defaults.get(key):
            yield as_words(key, value)
