"""Loading of files and flags into one validated configuration; all findings are reported at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, Finding, UserError
from ..settings.configuration import PARTS, Configuration
from ..settings.run_settings import RunSettings
from ..utils.redaction import is_redacted
from .checks import check_run
from .coercion import absolute
from .datasets import Datasets, DatasetsCheck, RawEntry, apply_overrides, find_data_file, read_data_file, read_entries
from .findings import PartCheck
from .normalise import align_rounding, drop_zero_length, megapixel_notices, refuse_not_yet, rename_run_keys
from .optimizers import check_role_optimizers
from .parsing import read_file, texts, unusable
from .parts import Parts, PartsCheck
from .published import (
    MERGED,
    PublishedRecipe,
    adapt_rates,
    find_recipe,
    fitting_recipe,
    lay_recommended,
    lay_under,
    recipe_problem,
)
from .quantisation import check_quantisation
from .reading import (
    COMMAND_LINE,
    ConfigReport,
    Layers,
    Origin,
    fill_environment,
    nested,
    parse_override,
    strip_dashes,
)
from .requirements import (
    check_images,
    check_requirements,
    check_smaller_student,
    idle_micro_conditioning,
    trajectory_points,
)
from .trajectory_entries import TrajectoryCheck, TrajectoryNeeds

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ..plugin_api.method import Method
    from ..registry.registry import Registry

RECIPE = "recipe.json"
MODEL = "pretrained_model_name_or_path"
Override = tuple[tuple[str, ...], Any]


def load_configuration(
    registry: Registry,
    *,
    config_file: str | Path | None = None,
    data_file: str | Path | None = None,
    flags: Mapping[str, object] | None = None,
    overrides: Sequence[str] = (),
    to_train: bool = True,
) -> Configuration:
    """Load and validate the configuration.

    Args:
        registry: All plugins by name; plugin files that the configuration names are added to it.
        config_file: JSON, YAML or TOML with the run's keys.
        data_file: JSON, YAML or TOML with the list of datasets.
        flags: Run keys from the command line; stronger than the file.
        overrides: ``key.path=value`` texts; stronger than everything. ``data.<id>.key`` reaches into the datasets.
        to_train: Also check what only training needs: files of data and models, device, packages.

    Raises:
        ConfigError: With all findings.
    """
    loader = ConfigurationLoader(registry, config_file=Path(config_file) if config_file else None, to_train=to_train)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    configuration = loader.load(Path(data_file) if data_file else None, given, overrides)
    if loader.findings or configuration is None:
        raise ConfigError(loader.findings)
    return configuration


@dataclass
class ConfigurationLoader:
    """One pass over all sources, which gathers findings and notices."""

    registry: Registry
    config_file: Path | None = None
    to_train: bool = True
    report: ConfigReport = field(default_factory=lambda: ConfigReport(Layers(), [], []))
    given_parts: list[tuple[str, Any, Origin]] = field(default_factory=list)
    """Values given for plugins' parts, the strongest last; folded once the plugins are known."""
    miniature: bool = False
    miniature_named: bool = False
    readable: bool = True
    """Whether the file could be read; if not, keys that it lacks are not reported."""

    @property
    def layers(self) -> Layers:
        """Values of the run, whose findings and notices the report takes."""
        return self.report.layers

    @property
    def findings(self) -> list[Finding]:
        """Whatever is wrong, of the run and of its data."""
        return self.report.findings

    def load(
        self, data_file: Path | None, flags: Mapping[str, object], overrides: Sequence[str]
    ) -> Configuration | None:
        """Return the configuration, or None where there are findings."""
        data_overrides = self._read(flags, overrides)
        self._load_plugins()
        published = self._lay_published()
        check = PartsCheck(self.registry, self.report)
        check.resolve_names()
        check.fold(self.given_parts)
        drop_zero_length(self.report)
        recipe_data = self._choose_model(check) if self.readable else None
        if published is not None:
            adapt_rates(check, published)
        elif self.readable and not self.miniature:
            lay_recommended(check)
        refuse_not_yet(self.report)
        inline = self.layers.values.pop("data", None)
        check.default_learning_rate()
        run = self._run(check) if self.readable else None
        parts = check.validate(run)
        if run is not None:
            check_run(run, self.report, to_train=self.to_train, adapters=check.adapters(run, parts))
            megapixel_notices(run, "", self.report.notices)
            self._compare(run, parts, check)
        entries = self._entries(run, data_file, inline, recipe_data)
        datasets = self._datasets(run or RunSettings(), entries, data_overrides)
        if run is not None:
            self._compare_data(run, parts, check, entries or [], datasets)
            self._check_plugins(run, parts, check)
        if self.to_train:
            self._refuse_redacted(entries or [])
        if run is None or self.findings:
            return None
        return self._assemble(run, parts, check, datasets)

    def _check_plugins(self, run: RunSettings, parts: Parts, check: PartsCheck) -> None:
        """Check the packages, and whether optimizer and quantizers can be used as the run asks."""
        if self.to_train:
            check.check_optimizer(run)
            check.check_packages()
        _, config = _method_of(parts, check)
        check_quantisation(
            run, check.classes, config, registry=self.registry, report=self.report, to_train=self.to_train
        )

    def _refuse_redacted(self, entries: Sequence[RawEntry]) -> None:
        """Refuse URLs of a resolved configuration, in which secrets are not kept."""
        sources = [("", self.layers), *((entry.prefix, entry.layers) for entry in entries)]
        for prefix, layers in sources:
            for key, value in texts(layers.values):
                if is_redacted(value):
                    problem = "has *** in place of a secret, which is not kept in files"
                    remedy = f"give it again, the secret from the environment: --set '{prefix}{key}=...{{env:NAME}}...'"
                    file = layers.origin(key.partition(".")[0]).file
                    self.findings.append(Finding(file, prefix + key, value, problem, remedy))

    # -- layers -------------------------------------------------------------------------------------------------------

    def _read(self, flags: Mapping[str, object], overrides: Sequence[str]) -> list[Override]:
        """Lay file, flags and overrides on top of each other; return the overrides of datasets."""
        file = self.config_file
        if file is not None:
            self.layers.fallback = Origin(str(file), file.parent.absolute())
            before = len(self.findings)
            content = read_file(file, self.findings, what="--config")
            self.readable = isinstance(content, Mapping)
            if isinstance(content, Mapping):
                self._lay(content, self.layers.fallback)
            elif len(self.findings) == before:
                remedy = 'write {"model_type": "lora", ...}; the list of datasets goes into --data'
                self.findings.append(Finding(str(file), "--config", content, "is not an object of keys", remedy))
        command_line = Origin(COMMAND_LINE, Path.cwd())
        problems = list(unusable(flags))
        self.findings.extend(problem.finding(COMMAND_LINE) for problem in problems)
        self._lay({} if problems else flags, command_line)
        parsed = [override for text in overrides if (override := parse_override(text, self.findings))]
        for path, value in parsed:
            if path[0] != "data":
                self._lay(nested(path, value), command_line)
        return [override for override in parsed if override[0][0] == "data"]

    def _lay(self, values: Mapping[str, Any], origin: Origin) -> None:
        plain = strip_dashes(values, origin.file, self.findings)
        data = plain.pop("data", None)  # entries fill in their own environment, by id
        plain = fill_environment(plain, origin.file, "", self.findings)
        report = ConfigReport(Layers(fallback=origin), self.findings, self.report.notices)
        plain = rename_run_keys(plain, report)
        align_rounding(plain, report)
        self.given_parts += [(key, plain.pop(key), origin) for key in PARTS if key in plain]
        self.layers.add(plain if data is None else {**plain, "data": data}, origin, deep=MERGED)

    def _load_plugins(self) -> None:
        files = self.layers.values.get("plugins") or []
        origin = self.layers.origin("plugins")
        for file in [files] if isinstance(files, str) else files if isinstance(files, list | tuple) else []:
            try:
                self.registry.add_file(absolute(str(file), origin.base))
            except UserError as error:
                self.findings.append(Finding(origin.file, "plugins", file, error.message, error.remedy))

    def _lay_published(self) -> PublishedRecipe | None:
        """Lay the recipe that is named under everything given; return it, or None where there is none."""
        name = self.layers.values.get("recipe")
        if not isinstance(name, str):
            return None
        try:
            recipe = find_recipe(self.registry, name)
        except UserError as error:
            self.report.refuse("recipe", name, error.message, error.remedy)
            return None
        problem = recipe_problem(recipe, self.layers.values)
        if problem is not None:
            self.report.refuse("recipe", name, problem, "leave the method out, or the recipe")
            return None
        settings, lines = fitting_recipe(recipe, self.layers.values)
        self.report.notices.extend(lines)
        given, parts = self.report.layers, self.given_parts
        self.report.layers, self.given_parts = Layers(), []
        self._lay(settings, recipe.origin)
        below, self.report.layers = self.report.layers, given
        lay_under(given, below.values, recipe.origin)
        self.given_parts = [*self.given_parts, *parts]
        return recipe

    # -- model --------------------------------------------------------------------------------------------------------

    def _choose_model(self, check: PartsCheck) -> list[RawEntry] | None:
        """Choose the family's miniature where no model is named, with its recipe under everything given; return its
        data.
        """
        family = check.classes.get("family")
        if family is None:
            return None
        folder: Path | None = family.miniature
        if self.layers.given(MODEL):
            named = absolute(str(self.layers.values[MODEL]), self.layers.origin(MODEL).base)
            self.miniature = self.miniature_named = folder is not None and folder == named
            return None
        recipe = folder / RECIPE if folder else None
        if folder is None or recipe is None or not recipe.is_file():
            problem = f"is required: the family {family.name!r} ships no trained miniature"
            remedy = "name a model: --model PATH_OR_ID (hub id, diffusers folder or .safetensors file)"
            self.report.refuse(MODEL, None, problem, remedy)
            return None
        self.miniature = True
        return self._lay_under(recipe, folder, check)

    def _lay_under(self, recipe_file: Path, folder: Path, check: PartsCheck) -> list[RawEntry]:
        recipe = json.loads(recipe_file.read_text(encoding="utf-8"))
        origin = Origin(str(recipe_file), recipe_file.parent)
        method = check.classes.get("method")
        own = recipe.pop("methods", {}).get(method.name, {}) if method else {}
        data = [*recipe.pop("data", []), *own.pop("data", [])]
        recipe = {MODEL: str(folder), **recipe, **own}
        if self.layers.given("num_train_epochs") or self.layers.given("max_train_steps"):
            recipe.pop("max_train_steps", None)
            recipe.pop("num_train_epochs", None)
        recipe_type = recipe.get("model_type", RunSettings.model_fields["model_type"].default)
        if self.layers.values.get("model_type", recipe_type) != recipe_type:
            recipe.pop("learning_rate", None)
        recipe = check.recipe_for_optimizer(recipe)
        parts = recipe.get("distillation_config", {})
        recipe["distillation_config"] = {name: part for name, part in parts.items() if method and name == method.name}
        lay_under(self.layers, recipe, origin)
        return read_entries(data, origin, self.findings)

    # -- run and data -------------------------------------------------------------------------------------------------

    def _run(self, check: PartsCheck) -> RunSettings | None:
        values = {key: value for key, value in self.layers.values.items() if key not in PARTS and value is not None}
        validator = PartCheck(self.findings, elsewhere=check.elsewhere())
        run = validator.validate(RunSettings, values, "", self.layers.origin, known=[*PARTS, "data"])
        return run if isinstance(run, RunSettings) else None

    def _compare(self, run: RunSettings, parts: Parts, check: PartsCheck) -> None:
        (method, config), family = _method_of(parts, check), check.classes.get("family")
        if method is None or family is None or config is None:
            return
        files = {key[0]: origin.file for key, origin in self.layers.origins.items() if len(key) == 1}
        files[""] = self.layers.fallback.file
        findings, notices = check_requirements(method, config, family, run, files=files)
        if not findings:
            check_role_optimizers(method, config, run, check.classes.get("optimizer"), self.report)
        own = parts["family_config"].get(family.name)
        findings += check_smaller_student(family, own, run, files=files) if own is not None else []
        self.findings.extend(findings)
        self.report.notices.extend(notices)

    def _compare_data(
        self, run: RunSettings, parts: Parts, check: PartsCheck, entries: list[RawEntry], datasets: Datasets
    ) -> None:
        """Compare the datasets with what the method needs; each gets its distillation cache where it needs one."""
        (method, config), family = _method_of(parts, check), check.classes.get("family")
        if method is None or config is None:
            return
        files = {entry.id: entry.layers.origin("dataset_type").file for entry in entries}
        self.findings.extend(check_images(method, config, run, datasets.training, files=files))
        if family is None or self.findings:
            return
        self.report.notices.extend(idle_micro_conditioning(family, datasets.training))
        points, folder = trajectory_points(method, config, run), f"{run.output_dir}/cache/trajectories"
        needs = TrajectoryNeeds(method.name, points, family.default_guidance, folder)
        files = {entry.id: entry.layers.fallback.file for entry in entries}
        trajectories = TrajectoryCheck(needs, files, self.findings, self.report.notices)
        datasets.training, datasets.caches = trajectories.resolve(datasets.training, datasets.caches)

    def _entries(
        self, run: RunSettings | None, data_file: Path | None, inline: Any, recipe: list[RawEntry] | None
    ) -> list[RawEntry] | None:
        """Return the raw entries of the first source there is; None, with a finding, where there is none."""
        before = len(self.findings)
        named = data_file or (run.data_backend_config if run else None)
        if named is not None and inline is not None:
            self.report.notices.append(f"the datasets of {named} are used, not those inside the configuration")
        if named is None and inline is not None:
            return read_entries(inline, self.layers.origin("data"), self.findings)
        if named is None:
            named = find_data_file(self.config_file, run.output_dir if run else None)
            if named is not None:
                self.report.notices.append(f"datasets: {named}")
        if named is not None:
            entries = read_data_file(named, self.findings)
            return None if len(self.findings) > before and not entries else entries
        if recipe is None and run is not None:
            file = self.layers.origin("data_backend_config").file
            problem = "is required: no multidatabackend file beside the configuration, in output_dir or here"
            remedy = "name the data file: --data FILE (`distill config init` writes one)"
            self.findings.append(Finding(file, "data_backend_config", None, problem, remedy))
        return recipe

    def _datasets(self, run: RunSettings, entries: list[RawEntry] | None, overrides: Sequence[Override]) -> Datasets:
        apply_overrides(entries or [], overrides, self.findings)
        if entries is None:
            return Datasets()
        before = len(self.findings)
        check = DatasetsCheck(self.registry, run, self.findings, self.report.notices, to_train=self.to_train)
        datasets = check.check(entries)
        if not datasets.training and len(self.findings) == before:
            file = entries[0].layers.fallback.file if entries else "data file"
            problem = "has no enabled entry of dataset_type image or prompts"
            remedy = "add a dataset with id and instance_data_dir, or set disabled to false"
            self.findings.append(Finding(file, "data", [entry.id for entry in entries], problem, remedy))
        return datasets

    def _assemble(self, run: RunSettings, parts: Parts, check: PartsCheck, datasets: Datasets) -> Configuration:
        given = parts["evaluator_config"]
        usual = [name for name in self.registry.names("evaluator") if self.registry.get("evaluator", name).by_default]
        evaluators = check.wanted("evaluator", run) or dict.fromkeys([*usual, *given])
        return Configuration(
            run=run,
            method=parts["distillation_config"][run.distillation_method],
            family=parts["family_config"][run.model_family],
            optimizer=parts["optimizer_config"][run.optimizer],
            trackers=parts["tracker_config"],
            quantizers=parts["quantizer_config"],
            evaluators={name: given.get(name) or self.registry.get("evaluator", name).Config() for name in evaluators},
            publishers=parts["publisher_config"],
            datasets=tuple(datasets.training),
            caches=tuple(datasets.caches),
            text_cache=datasets.text_cache,
            notices=tuple(dict.fromkeys(self.report.notices)),
            miniature=self.miniature,
            miniature_named=self.miniature_named,
            plugin_files=self.registry.files,
        )


def _method_of(parts: Parts, check: PartsCheck) -> tuple[type[Method] | None, BaseModel | None]:
    """Return the method's class, and its settings where they are valid."""
    method = check.classes.get("method")
    return method, parts["distillation_config"].get(method.name) if method else None
