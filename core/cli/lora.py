"""`distill lora`: LoRAs on files, without a run: the difference of two models, another rank, merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import FamilyOption, PluginOption

if TYPE_CHECKING:
    from ..plugin_api.family import ModelFamily
    from ..plugin_api.lora_tools import LoraReport, LoraTarget, LowRank

app = typer.Typer(help="Extract, resize and merge LoRAs.", no_args_is_help=True)

OutputOption = Annotated[Path, typer.Option("--output", "-o", help="File (.safetensors) or folder to write.")]
EnergyOption = Annotated[
    float | None,
    typer.Option(
        help="Share (0-1) of the squared singular values that each layer keeps, in place of one rank for all; "
        "with --rank, that is the largest."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="Device of the decompositions: auto, cpu, cuda, cuda:1, ...")]
TypeOption = Annotated[str, typer.Option("--dtype", help="Type of the tensors: float32, float16 or bfloat16.")]
FormatOption = Annotated[str, typer.Option("--format", help="diffusers, or kohya (ComfyUI, AUTOMATIC1111).")]
ConfigSourceOption = Annotated[
    Path | None, typer.Option(help="Folder with configs and tokenizers for single files, where there is no hub.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output.")]
DTYPES = ("float32", "float16", "bfloat16")
USUAL_RANK = 64


@app.callback()
def _group() -> None:
    """Extract, resize and merge LoRAs."""


@app.command()
def extract(
    base: Annotated[str, typer.Argument(help="The model to start from: folder, .safetensors file or hub id.")],
    tuned: Annotated[str, typer.Argument(help="A model that was trained from it, as a turbo model.")],
    output: OutputOption,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every layer; 64 unless --energy is given.")] = None,
    energy: EnergyOption = None,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="Every linear layer and convolution, not the family's LoRA layers.")
    ] = False,
    family: FamilyOption = None,
    device: DeviceOption = "auto",
    dtype: TypeOption = "float32",
    format_: FormatOption = "diffusers",
    config_source: ConfigSourceOption = None,
    overwrite: OverwriteOption = False,
    plugin: PluginOption = None,
) -> None:
    """Write the difference of two models as a LoRA: the nearest one of its rank, layer by layer."""
    kind = _family(family, plugin)
    target = _target(output, dtype, format_, overwrite=overwrite)
    low_rank = _low_rank(rank or (None if energy is not None else USUAL_RANK), energy, device)
    models = [_model(kind, name, config_source) for name in (base, tuned)]
    report = models[0].extract_lora(models[1], target, low_rank, modules=() if all_layers else None)
    _say(report, target.file, f"of the norm of the difference of {tuned} and {base} in these layers")


@app.command()
def resize(
    lora: Annotated[str, typer.Argument(help="The LoRA: a file, a folder, or a hub id (owner/name/file).")],
    output: OutputOption,
    rank: Annotated[int | None, typer.Option(min=1, help="The new rank, smaller or larger.")] = None,
    energy: EnergyOption = None,
    family: FamilyOption = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    plugin: PluginOption = None,
) -> None:
    """Write a LoRA once more with another rank, in the names and types that it has."""
    from ..errors import UserError

    if rank is None and energy is None:
        raise UserError("neither --rank nor --energy is given", "say how much is kept: --rank 32, or --energy 0.95")
    file = _file(output, overwrite=overwrite)
    report = _family(family, plugin).resize_lora(lora, file, _low_rank(rank, energy, device))
    _say(report, file, f"of the norm of {lora}")


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="The model: folder, .safetensors file or hub id.")],
    loras: Annotated[list[str], typer.Argument(metavar="LORA...", help="LoRAs: files, folders or hub ids.")],
    output: OutputOption,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="Factor of a LoRA, once for all or once for each in their order; 1 by default."),
    ] = None,
    as_lora: Annotated[
        bool, typer.Option("--as-lora", help="Write their sum as one LoRA, not the model with them in it.")
    ] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="With --as-lora: its rank; by default all of theirs.")] = None,
    energy: EnergyOption = None,
    family: FamilyOption = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32, float16, bfloat16, or auto: float32 for a LoRA, else the base's.")
    ] = "auto",
    format_: FormatOption = "diffusers",
    config_source: ConfigSourceOption = None,
    overwrite: OverwriteOption = False,
    plugin: PluginOption = None,
) -> None:
    """Write a model with LoRAs in its weights, as a folder of diffusers; or several LoRAs as one."""
    from ..plugin_api.family import ExtraLora

    named = list(zip(loras, _weights(loras, weight or []), strict=True))
    kind = _family(family, plugin)
    if not as_lora:
        unused = {"--rank": rank, "--energy": energy}
        _export_fused(
            kind, base, named, output, dtype=dtype, config_source=config_source, overwrite=overwrite, unused=unused
        )
        return
    target = _target(output, "float32" if dtype == "auto" else dtype, format_, overwrite=overwrite)
    given = [ExtraLora(name, factor) for name, factor in named]
    report = _model(kind, base, config_source).combine_loras(given, target, _low_rank(rank, energy, device))
    _say(report, target.file, "of the norm of their sum")


def _export_fused(
    kind: type[ModelFamily],
    base: str,
    loras: Sequence[tuple[str, float]],
    folder: Path,
    *,
    dtype: str,
    config_source: Path | None,
    overwrite: bool,
    unused: dict[str, Any],
) -> None:
    from ..errors import UserError

    for option, value in unused.items():
        if value is not None:
            raise UserError(
                f"{option} is for a LoRA, and a whole model is written", f"add --as-lora, or leave {option} out"
            )
    if folder.suffix == ".safetensors":
        raise UserError(f"--output {folder}: a whole model is a folder", "name a folder, or add --as-lora")
    _refuse_existing(folder, overwrite=overwrite)
    model = _model(kind, base, config_source)
    precision = model.stored_precision() if dtype == "auto" else _one_of("--dtype", dtype, DTYPES)
    fused = _model(kind, base, config_source, teacher_lora=tuple(loras), weight_dtype=precision)
    fused.check_source()
    fused.export_fused(folder)
    typer.echo(f"{folder}: {base} with {len(loras)} LoRA{'s' * (len(loras) > 1)} in its weights, {precision}")


# -- what was given ---------------------------------------------------------------------------------------------------


def _family(name: str | None, plugins: Sequence[Path] | None) -> type[ModelFamily]:
    """Return the family that is named, or else the one that a run has unless its settings name another."""
    from ..errors import UserError
    from ..registry.registry import Registry
    from ..settings.run_settings import RunSettings

    registry = Registry.load(plugins or ())
    name = str(name or RunSettings.model_fields["model_family"].default)
    if name not in registry.names("family"):
        raise UserError(f"--family {name} is not a registered family", registry.remedy("family", name))
    return registry.get("family", name)


def _model(kind: type[ModelFamily], source: str, config_source: Path | None, **settings: Any) -> ModelFamily:
    from ..plugin_api.family import ModelSettings

    configs = None if config_source is None else str(config_source)
    return kind(kind.Config(), ModelSettings(source, config_source=configs, **settings))


def _target(output: Path, dtype: str, form: str, *, overwrite: bool) -> LoraTarget:
    from ..plugin_api.lora_tools import LoraFormat, LoraTarget

    precision, chosen = _one_of("--dtype", dtype, DTYPES), LoraFormat(_one_of("--format", form, [*LoraFormat]))
    return LoraTarget(_file(output, overwrite=overwrite), precision, chosen)


def _file(output: Path, *, overwrite: bool) -> Path:
    """Return the file of ``--output``, which may be a folder: in it, the name that diffusers looks for."""
    file = output if output.suffix == ".safetensors" else output / "pytorch_lora_weights.safetensors"
    _refuse_existing(file, overwrite=overwrite)
    return file


def _refuse_existing(path: Path, *, overwrite: bool) -> None:
    from ..errors import UserError

    if path.exists() and not overwrite:
        raise UserError(f"--output: {path} is there already", "name another, or add --overwrite")


def _one_of(option: str, value: str, allowed: Sequence[str]) -> Any:
    from ..errors import UserError
    from ..utils.suggest import did_you_mean

    if value not in allowed:
        raise UserError(f"{option} {value} is not known", f"{did_you_mean(value, allowed)}one of {', '.join(allowed)}")
    return value


def _low_rank(rank: int | None, energy: float | None, device: str) -> LowRank:
    from ..errors import UserError
    from ..plugin_api.lora_tools import LowRank
    from ..utils.devices import resolve_device

    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"--energy {energy:g} is no share", "give a number above 0, and up to 1: --energy 0.95")
    return LowRank(rank, energy, resolve_device(device))


def _weights(loras: Sequence[str], weights: Sequence[float]) -> Sequence[float]:
    from ..errors import UserError

    if len(weights) in (0, 1):
        return [*(weights or [1.0])] * len(loras)
    if len(weights) != len(loras):
        raise UserError(
            f"--weight is given {len(weights)} times for {len(loras)} LoRAs", "give it once for all, or once for each"
        )
    return weights


def _say(report: LoraReport, file: Path, of: str) -> None:
    least, most = report.ranks
    ranks = f"rank {least}" if least == most else f"ranks {least} to {most}"
    layers = f"{report.num_layers} layer{'s' * (report.num_layers != 1)}"
    typer.echo(f"{file}: {layers} of {ranks} keep {report.kept:.2%} {of}")
    for line in report.left_out:
        typer.echo(f"  left out: {line}")
