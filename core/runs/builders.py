"""From a validated configuration to the objects of a run: family, method, networks of a finished run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.quantisation import named_quantizers
from ..errors import UserError
from ..plugin_api.evaluator import EvaluationSetting
from ..plugin_api.family import ExtraLora, LoraSettings, ModelFamily, ModelSettings, Precision
from ..plugin_api.method import Method, MethodSetup, Requirements
from ..plugin_api.precision import Precisions
from ..plugin_api.quantizer import NO_CHANGE, Quantizer
from .output_folder import RESOLVED

if TYPE_CHECKING:
    from torch import nn

    from ..config import Configuration
    from ..data.pipeline import DataPipeline
    from ..registry.registry import Registry

STUDENT_FOLDER = "student"
CACHE_FOLDER = "cache"
REPORTS_FOLDER = "data"
_WEIGHT_DTYPES: dict[str, Precision] = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


def model_settings(configuration: Configuration, *, source: str | None = None) -> ModelSettings:
    """Which model the run uses, and how it is held in memory.

    Args:
        configuration: The run's.
        source: The model where the run names none (the family's miniature).

    Raises:
        UserError: There is neither.
    """
    run = configuration.run
    chosen = run.pretrained_model_name_or_path or source
    if chosen is None:
        raise UserError(
            f"pretrained_model_name_or_path is missing, and {run.model_family} ships no miniature",
            "name a model: --model PATH_OR_ID",
        )
    return ModelSettings(
        source=str(chosen),
        vae=run.pretrained_vae_model_name_or_path,
        teacher_lora=tuple((str(lora.path), lora.weight) for lora in run.teacher_lora),
        weight_dtype=_WEIGHT_DTYPES[run.mixed_precision],
        device=resolve_device(run.device),
        revision=run.revision,
        config_source=str(run.model_config_source) if run.model_config_source else None,
        resolution=data_resolution(configuration) if configuration.datasets else None,
    )


def resolve_device(device: str) -> str:
    """``auto`` as what this machine has: cuda, mps or cpu; anything else must be there.

    Raises:
        UserError: The named device is not there.
    """
    import torch

    if device != "auto":
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device = {device!r}: this machine has no CUDA device", "use device=auto or device=cpu")
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def build_family(
    configuration: Configuration,
    registry: Registry,
    *,
    device: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ModelFamily:
    """The run's family; nothing loads before it is needed.

    Args:
        configuration: The run's.
        registry: The run's plugins.
        device: Where its networks lie; what the run's key says unless given.
        say: Takes a line for each network that is quantised, with what that saves.

    Raises:
        UserError: A quantizer cannot be used on this machine.
    """
    family = registry.get("family", configuration.run.model_family)
    source = str(family.miniature) if family.miniature else None
    settings = model_settings(configuration, source=source)
    settings = replace(settings, device=device) if device else settings
    precision = Precisions(_quantizers(configuration, registry, settings.device), say)
    return family(configuration.family, replace(settings, precision=precision))


def _quantizers(configuration: Configuration, registry: Registry, device: str) -> dict[str, Quantizer]:
    """Network -> its quantizer."""
    found: dict[str, Quantizer] = {}
    for key, name in named_quantizers(configuration.run).items():
        quantizer = registry.get("quantizer", name)
        reason = quantizer.usable(device)
        if reason is not None:
            raise UserError(f"{key} = {name!r} cannot be used on {device}: {reason}", f"set {key} to {NO_CHANGE}")
        found[key.removesuffix("_precision")] = quantizer(configuration.quantizers[quantizer.name])
    return found


def lora_settings(configuration: Configuration) -> LoraSettings | None:
    """The shape of the run's adapters; None for full training."""
    run = configuration.run
    if run.model_type == "full":
        return None
    return LoraSettings(run.lora_rank, run.lora_alpha, run.lora_dropout, run.lora_target_modules or None)


def build_method(configuration: Configuration, registry: Registry, family: ModelFamily) -> Method:
    """The run's method, told what it may know of the model."""
    run = configuration.run
    setup = MethodSetup(model_type=run.model_type, prediction_type=family.prediction_type, use_ema=run.use_ema)
    return registry.get("method", run.distillation_method)(configuration.method, setup)


def method_needs(configuration: Configuration, registry: Registry, family: ModelFamily) -> Requirements:
    """What the run's method needs, of its data too; loads no weights."""
    method = build_method(configuration, registry, family)
    return method.requires(configuration.method, method.setup)


def build_pipeline(
    configuration: Configuration,
    registry: Registry,
    *,
    say: Callable[[str], None],
    family: ModelFamily | None = None,
    pairs: bool = True,
) -> DataPipeline:
    """The data path of a run, outside of one: for one process, with the caches where the run would have them.

    Args:
        configuration: The run's.
        registry: The run's plugins.
        say: Takes lines for people.
        family: The run's; built and its files checked unless given.
        pairs: Whether the distillation caches of the data file are made too.
    """
    from ..data.pipeline import DataPipeline

    run = configuration.run
    if family is None:
        family = build_family(configuration, registry, say=say)
        family.check_source()
    return DataPipeline(
        configuration, registry, family, micro_batch_size=run.train_batch_size,
        accumulation=run.gradient_accumulation_steps, seed=run.seed, cache_root=run.output_dir / CACHE_FOLDER, say=say,
        pictures=method_needs(configuration, registry, family).pictures,
        pairs=pairs and bool(configuration.distillation_caches),
    )  # fmt: skip


def default_resolution(configuration: Configuration) -> tuple[int, int]:
    """(width, height) in pixels of pictures: the first validation resolution, else a square of the first dataset's."""
    run = configuration.run
    if run.validation_resolution:
        return run.validation_resolution[0]
    if not configuration.datasets:
        raise UserError("there is no dataset to take a resolution from", "set validation_resolution=1024x1024")
    return data_resolution(configuration)


def data_resolution(configuration: Configuration) -> tuple[int, int]:
    """(width, height) in pixels of a square picture of the first dataset."""
    dataset = configuration.datasets[0]
    multiple = dataset.aspect_bucket_alignment
    edge = max(1, round(dataset.square_edge / multiple)) * multiple
    return edge, edge


def evaluation_setting(family: ModelFamily, *, num_data: int | None = None) -> EvaluationSetting:
    """What evaluators may look at; `num_data` real pictures, where that is known."""
    folder = Path(family.settings.source)
    source = folder if folder.is_dir() else None
    return EvaluationSetting(model_path=source, device=family.settings.device, num_data=num_data)


def early_evaluation_setting(configuration: Configuration) -> EvaluationSetting:
    """The same before there is a family: how many real pictures there will be is not known."""
    run = configuration.run
    folder = Path(run.pretrained_model_name_or_path or "")
    known = run.pretrained_model_name_or_path is not None and folder.is_dir()
    return EvaluationSetting(model_path=folder if known else None)


# -- a finished run ---------------------------------------------------------------------------------------------------


def open_run(output_dir: Path, *, overrides: Sequence[str] = ()) -> tuple[Configuration, Registry]:
    """The configuration and the plugins of the run in `output_dir`, wherever the folder lies now.

    Args:
        output_dir: Of the run.
        overrides: ``key=value`` over the run's own keys.

    Raises:
        UserError: It is not the folder of a finished run.
    """
    from ..config import load_configuration
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
