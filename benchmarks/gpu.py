"""Throughput of distillation on the card there is: samples per second, model FLOP utilisation, memory, time to start.

    python benchmarks/gpu.py [--minutes 10] [--rows TEXT,TEXT] [--steps 30] [--workspace FOLDER] [--output FOLDER]
    python benchmarks/gpu.py --small --device cpu --steps 10       # every row on a small network, to try the script

SDXL, Stable Diffusion 3.5 medium and FLUX.1 with random weights of the published sizes, which speed does not depend on.
Each row is a whole `distill run`, in a process of its own unless it is small: caches, clipping, metrics, export. The
rows come in the order of their importance; those that the minutes do not reach are named. What is done is kept in
`gpu.json` of the output folder, and the next call goes on with the rest. `gpu.md` is the table. Nothing is fetched: a
checkout and its installed packages are enough.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_flops import RANK, TURN, counted_passes, peak_flops, step_flops
from gpu_models import MODELS, write_pipeline
from step_workspace import write_images

WARM_UP = 10
"""Steps that do not count: memory is taken and kernels are chosen and compiled in them."""
COMMON = [
    "gradient_checkpointing=true", f"lora_rank={RANK}", "learning_rate=1e-4", "validation_step_interval=0",
    "checkpoint_step_interval=0", "evaluation_num_samples=0", f"log_step_interval={TURN}", "report_to=none",
    "resolution_type=pixel", "distillation_config.lcm.w_min=4", "distillation_config.lcm.w_max=4",
]  # fmt: skip
ADVERSARIAL = ["gan_weight=5e-3", "heads=strided", "head_levels=middle", f"fake_updates_per_student_update={TURN}"]
HEADS = [
    "row", "samples/s", "MFU", "TFLOP/s", "peak GiB", "s to first step", "s of first step", "s of compiling",
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What is measured in one run."""

    model: str
    method: str = "lcm"
    kind: str = "lora"
    batch: int = 1
    edge: int = 1024
    precision: str = "bf16"
    compiled: str = "off"
    channels_last: bool = True

    @property
    def name(self) -> str:
        """Its name in tables and files."""
        compiled = "" if self.compiled == "off" else f", compile {self.compiled}"
        layout = "" if self.channels_last else ", channels first"
        size = f"{self.edge} px x {self.batch}"
        return f"{self.model}, {self.method} {self.kind}, {size}, {self.precision}{compiled}{layout}"

    def settings(self, *, compiles: bool) -> list[str]:
        """Return what it changes of :data:`COMMON`.

        Args:
            compiles: Whether this version has the key ``compile``.
        """
        found = [f"model_type={self.kind}", f"train_batch_size={self.batch}", f"distillation_method={self.method}"]
        if self.precision == "fp8":
            found += ["mixed_precision=bf16", "base_model_precision=fp8-torchao"]
        else:
            found.append(f"mixed_precision={self.precision}")
        if not self.channels_last:
            found.append("family_config.channels_last=false")
        if self.method == "dmd2":
            found += [f"distillation_config.dmd2.{each}" for each in ADVERSARIAL]
        if compiles and self.compiled == "whole":  # it recomputes inside its one region
            found += ["gradient_checkpointing=false", "activation_memory_budget=0.5"]
        return [*found, *([f"compile={self.compiled}"] if compiles else [])]


def rows() -> list[Row]:
    """Return all rows in the order of their importance: a model's usual run, then one change after the other."""
    changes: list[dict[str, Any]] = [
        {}, {"compiled": "regions"}, {"method": "dmd2"}, {"batch": 4}, {"batch": 4, "compiled": "regions"},
        {"precision": "fp8"}, {"edge": 512}, {"kind": "full"}, {"precision": "fp16"}, {"edge": 512, "batch": 4},
        {"precision": "fp8", "compiled": "regions"}, {"compiled": "whole"},
        {"method": "dmd2", "compiled": "regions"}, {"method": "dmd2", "kind": "full"},
        {"batch": 8, "compiled": "regions"}, {"kind": "full", "compiled": "regions"},
        {"batch": 4, "channels_last": False}, {"batch": 4, "compiled": "regions", "channels_last": False},
    ]  # fmt: skip
    offsets = {"SDXL": 0, "SD3.5-medium": 3.5, "FLUX.1": 4.5}  # as if so many changes lay before a model's first row
    found = [
        (offset + number, Row(model, **change))
        for model, offset in offsets.items()
        for number, change in enumerate(changes)
        if not (model == "FLUX.1" and change.get("kind") == "full")  # 190 GB of weights and moments: no card holds it
        and (model == "SDXL" or change.get("channels_last", True))  # transformers have no convolutions
    ]
    return [row for _, row in sorted(found, key=lambda each: each[0])]


# -- what a row runs on -----------------------------------------------------------------------------------------------


class Workspace:
    """Models, images and caches, made when a row first needs them.

    Args:
        folder: Where they are kept.
        small: Small networks at an eighth of the resolution.
        device: Device of the runs.
    """

    def __init__(self, folder: Path, *, small: bool, device: str) -> None:
        self.folder, self.small, self.device = folder.resolve(), small, device

    def edge(self, row: Row) -> int:
        """Return the edge of the images in pixels."""
        return row.edge // 8 if self.small else row.edge

    def model(self, row: Row) -> Path:
        """Return the folder of a row's model."""
        folder = self.folder / f"{row.model}{'-small' if self.small else ''}"
        if not (folder / "model_index.json").is_file():
            write_pipeline(MODELS[row.model], folder, small=self.small, device=self.device)
        return folder

    def data(self, row: Row) -> Path:
        """Return the data file of a row: sixteen random images, caches for each model and size."""
        edge, name = self.edge(row), f"{row.model}-{self.edge(row)}"
        images, file = self.folder / f"images-{edge}", self.folder / f"{name}.json"
        if not images.is_dir():
            write_images(images, edge=edge)
        caches = self.folder / "caches" / name
        entries = [
            {"id": "images", "instance_data_dir": str(images), "cache_dir_vae": str(caches / "vae")},
            {"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": str(caches / "text")},
        ]
        file.write_text(json.dumps(entries))
        return file


def measure(row: Row, workspace: Workspace, *, steps: int, seconds: float) -> dict[str, Any]:
    """Return the figures of one run, or why there are none.

    Args:
        row: What to measure.
        workspace: What it runs on.
        steps: Optimizer steps of the run.
        seconds: Time after which it is ended.
    """
    if row.compiled != "off" and not has_compile():
        return {"failed": "this version has no key `compile`"}
    output = workspace.folder / "runs" / "".join(c if c.isalnum() else "-" for c in row.name)
    notes, edge = output.with_suffix(".json"), workspace.edge(row)
    output.parent.mkdir(parents=True, exist_ok=True)
    alignment = [f"resolution={edge}", f"aspect_bucket_alignment={min(64, edge)}", f"max_train_steps={steps}"]
    settings = [*COMMON, *row.settings(compiles=has_compile()), *alignment, f"device={workspace.device}"]
    command = ["run", "--overwrite", "--family", MODELS[row.model].family, "--output-dir", str(output)]
    command += ["--model", str(workspace.model(row)), "--data", str(workspace.data(row))]
    command += ["--plugin", str(Path(__file__).with_name("step_probe.py"))]
    command += [word for setting in settings for word in ("--set", setting)]
    os.environ |= {"STEP_PROBE": str(notes), "HF_HUB_OFFLINE": "1"}
    begun = time.time()
    try:
        code, said = run_here(command) if workspace.small else run_apart(command, seconds=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within the {seconds:.0f} s that were left"}
    if code:
        return {"failed": reason(said) or f"exit code {code}"}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return figures(row, workspace, json.loads(notes.read_text()), lines, begun=begun)


def run_apart(command: Sequence[str], *, seconds: float) -> tuple[int, str]:
    """Return the exit code of `distill` in a process of its own, whose memory is nobody else's, and what it said."""
    whole = [sys.executable, "-m", "distill", *command]
    done = subprocess.run(whole, capture_output=True, text=True, check=False, timeout=seconds)
    return done.returncode, done.stderr


def run_here(command: Sequence[str]) -> tuple[int, str]:
    """Return the exit code of `distill` in this process, which spares small networks the imports, and what it said."""
    from distill.core.cli import app
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, list(command))
    unforeseen = done.exception is not None and not isinstance(done.exception, SystemExit)
    return done.exit_code, done.output + (f"\nerror: {done.exception!r}" if unforeseen else "")


def reason(said: str) -> str:
    """Return the line that says why a run failed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("error")), lines[-1] if lines else "")


def figures(
    row: Row, workspace: Workspace, notes: Mapping[str, float], lines: Sequence[Mapping[str, Any]], *, begun: float
) -> dict[str, Any]:
    """Return what is told of a run, from its metrics and from what the probe noted."""
    after = min(WARM_UP, len(lines) // 2)
    speed = statistics.median(line["samples_per_second"] for line in lines if line["step"] > after)
    model = MODELS[row.model]
    passes = counted_passes(
        row.model, targets_of(model.family), edge=workspace.edge(row), full=row.kind == "full", small=workspace.small
    )
    flops = step_flops(row.method, passes, guided_by_input=model.guided_by_input)
    peak = peak_flops(card())
    first = notes["first_step_ends"] - notes["first_step_begins"]
    return {
        "samples_per_second": speed,
        "flops_per_sample": flops,
        "flops_per_second": flops * speed,
        "model_flop_utilisation": flops * speed / peak if peak else None,
        "peak_gib": notes["memory_gib"],
        "seconds_to_first_step": notes["first_step_begins"] - begun,
        "seconds_of_first_step": first,
        "seconds_of_compiling": max(0.0, first - row.batch / speed) if row.compiled != "off" else None,
    }


def targets_of(family: str) -> Sequence[str]:
    """Return the modules that a family's adapters are put on."""
    from distill.core.registry.registry import Registry

    return Registry.load(installed=False).get("family", family).lora_targets


def has_compile() -> bool:
    """Return True if the settings of this version have ``compile``."""
    from distill.core.settings.run_settings import RunSettings

    return "compile" in RunSettings.model_fields


# -- where it runs ----------------------------------------------------------------------------------------------------


def card() -> str:
    """Return the name of the card, or that there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def machine(*, small: bool) -> dict[str, Any]:
    """Return what figures are of: card, versions and commit."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found: dict[str, Any] = {"card": card(), "cuda": torch.version.cuda, "small": small, "commit": commit()}
    for package in ("torch", "diffusers", "transformers", "peft", "torchao"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str:
    """Return the commit of the checkout, with ``+`` where files differ from it."""
    folder = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except FileNotFoundError:
        return "unknown: no git here"


# -- the table --------------------------------------------------------------------------------------------------------


def table(found: Mapping[str, Any]) -> str:
    """Return the figures as a table in Markdown, below a line on the machine."""
    of = dict(found["machine"])
    head = f"{of.pop('card')}{' (small networks)' if of.pop('small') else ''}"
    lines = [f"{head}; {', '.join(f'{name} {value}' for name, value in of.items() if value)}", ""]
    lines += [f"| {' | '.join(HEADS)} |", f"| {' | '.join(['---'] * len(HEADS))} |"]
    lines += [f"| {name} | {' | '.join(cells(each))} |" for name, each in found["rows"].items()]
    if found["not_reached"]:
        lines += ["", f"Not reached in the time given: {'; '.join(found['not_reached'])}."]
    return "\n".join(lines) + "\n"


def cells(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the cells of a row behind its name."""
    if "failed" in row:
        yield from (f"failed: {row['failed']}".replace("|", "/"), *[""] * (len(HEADS) - 2))
        return
    yield f"{row['samples_per_second']:.3f}"
    yield "–" if row["model_flop_utilisation"] is None else f"{row['model_flop_utilisation']:.1%}"
    yield f"{row['flops_per_second'] / 1e12:.4g}"
    yield f"{row['peak_gib']:.1f}"
    for name in ("seconds_to_first_step", "seconds_of_first_step", "seconds_of_compiling"):
        yield "–" if row[name] is None else f"{row[name]:.1f}"


def measure_all(chosen: Sequence[Row], workspace: Workspace, given: argparse.Namespace) -> dict[str, Any]:
    """Measure the rows that are not done yet while there is time, and write what is found after each."""
    given.output.mkdir(parents=True, exist_ok=True)
    file, present = given.output / "gpu.json", machine(small=given.small)
    found = json.loads(file.read_text()) if file.is_file() else {"machine": present, "rows": {}}
    if found["machine"] != present:
        raise SystemExit(f"{file} is of {found['machine']}, and this is {present}: name another folder (--output)")
    ends, longest = time.monotonic() + 60 * given.minutes, 0.0
    for row in chosen:
        if "samples_per_second" in found["rows"].get(row.name, {}):
            continue
        begun = time.monotonic()
        if begun + longest > ends:
            break
        found["rows"][row.name] = measure(row, workspace, steps=given.steps, seconds=max(ends - begun, 1))
        longest = max(longest, time.monotonic() - begun)
        print(f"| {row.name} | {' | '.join(cells(found['rows'][row.name]))} |", flush=True)
        write(found, chosen, given.output)
    write(found, chosen, given.output)
    return found


def write(found: dict[str, Any], chosen: Sequence[Row], folder: Path) -> None:
    """Write both files."""
    found["not_reached"] = [row.name for row in chosen if row.name not in found["rows"]]
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "gpu.md").write_text(table(found))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="time after which no row is begun or goes on")
    parser.add_argument("--steps", type=int, default=30, help=f"optimizer steps of a row; {WARM_UP} are not counted")
    parser.add_argument("--rows", help="comma-separated names of rows, or parts (`;` for a comma); absent: all")
    parser.add_argument("--list", action="store_true", help="print the names of the rows, and measure none")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks at an eighth of the resolution")
    parser.add_argument("--workspace", type=Path, default=Path("build") / "gpu", help="models, images and caches")
    parser.add_argument("--output", type=Path, help="folder of gpu.json and gpu.md; default: the workspace")
    given = parser.parse_args(arguments)
    given.output = (given.output or given.workspace).resolve()
    parts = [part.strip().replace(";", ",") for part in (given.rows or "").split(",")]
    names = {row.name for row in rows()}
    chosen = [row for row in rows() if any(part == row.name if part in names else part in row.name for part in parts)]
    if given.list:
        print("\n".join(row.name for row in chosen))
        return
    workspace = Workspace(given.workspace, small=given.small, device=given.device)
    found = measure_all(chosen, workspace, given)
    print(f"\n{table(found)}\n{given.output / 'gpu.md'}")


if __name__ == "__main__":
    main()
