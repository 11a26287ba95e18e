"""How far our cached step is from its floor and from a script of yours, what it makes the host do, how soon it comes.

    python benchmarks/step.py [--methods lcm,dmd2,pcm] [--batch 1,4] [--steps 40] [--runs 1] [--reference FILE]
                              [--repeats 3] [--workspace FOLDER] [--json FILE]

One thread, fp32, latents 16x16 (128 px), a random miniature SDXL of 7.8M parameters, LoRA of rank 64 over the full LCM
target list; dmd2 and pcm with their adversarial terms. Steps are interleaved in one process (ours, floor, reference,
ours ...), so that all see the same machine. Ours is a whole run's step: reading the batch from the caches, the draws,
the norm and its clipping, metrics, TensorBoard every ten steps. The floors are in step_floor.py, step_floor_dmd2.py and
step_floor_pcm.py. Times are of the process's CPU, which other work on the machine changes less, and by the clock;
medians over periods (five steps of dmd2, in which all its networks are trained), and of their ratios over the runs.

`--reference FILE` is a script that defines `make_step(model, targets, *, batch, edge, rank) -> Callable[[], None]`: the
folder of a pipeline, the modules to adapt, and what it returns takes one step.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch starts its threads

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from step_workspace import EDGE, RANK, write_workspace

SETTINGS = {
    "lcm": {},
    "dmd2": {"gan_weight": 5e-3, "heads": "strided", "head_levels": "middle"},
    "pcm": {"adversarial_weight": 0.1},
}
"""Method -> its settings, over its defaults."""
PERIODS = {"dmd2": 5}
"""Method -> steps after which it has trained every network as often as it does; 1 for all others."""
CALLS = 4
"""Most calls of dmd2's student in a simulation."""
AT_MOST = {
    "lcm cpu_ratio": 0.95, "dmd2 cpu_ratio": 1.05, "pcm cpu_ratio": 1.05, "peak_mb": 740.0, "start_ratio": 1.3,
    "wait_for_data_share": 0.01,
}  # fmt: skip
AT_LEAST = {"lcm reference_cpu_ratio": 1.35}
LOADING = """
import time; start = time.time()
import torch, diffusers
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
{statement}
print(time.time())
"""
UNET = "UNet2DConditionModel.from_pretrained({folder!r}, subfolder='unet')"
PIPELINE = "StableDiffusionXLPipeline.from_pretrained({folder!r}, add_watermarker=False)"
Step = Callable[[], None]
OURS = "ours"


@dataclass
class Column:
    """Seconds of the steps of one of those that are compared."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, begin: tuple[float, float], end: tuple[float, float]) -> None:
        """Add a step by its begin and its end, each (wall, CPU)."""
        self.wall.append(end[0] - begin[0])
        self.cpu.append(end[1] - begin[1])


def now() -> tuple[float, float]:
    """Return the seconds of both clocks: of the wall, and of this process on its cores."""
    return time.perf_counter(), time.process_time()


class Interleaved:
    """An observing plugin that takes a step of each of the others after each of ours, and times all.

    Args:
        others: Name -> what takes one step.
    """

    def __init__(self, others: Mapping[str, Step]) -> None:
        self.others = others
        self.columns = {name: Column() for name in (OURS, *others)}
        self._since: tuple[float, float] | None = None

    def before_first(self) -> None:
        """Our first step begins."""
        self._since = now()

    def after_step(self) -> None:
        """Our step has ended."""
        begin = now()
        assert self._since is not None
        self.columns[OURS].add(self._since, begin)
        for name, step in self.others.items():
            step()
            end = now()
            self.columns[name].add(begin, end)
            begin = end
        self._since = now()


def calls_of_steps(seed: int = 42) -> Iterator[int]:
    """Yield the number of calls that each step's simulation of dmd2 makes in a run with this seed."""
    from distill.core.utils.seeds import RngStreams

    step = 0
    while True:
        yield 1 + RngStreams(seed, step, ()).shared_integer("calls", CALLS)
        step += 1


def make_floor(method: str, model: Path, targets: Sequence[str], **sizes: int) -> Step:
    """Return the floor of a method."""
    if method == "dmd2":
        from step_floor_dmd2 import make_dmd2_floor

        return make_dmd2_floor(model, targets, calls=calls_of_steps(), **sizes)
    if method == "pcm":
        from step_floor_pcm import make_pcm_floor

        return make_pcm_floor(model, targets, **sizes)
    from step_floor import make_floor as make_lcm_floor

    return make_lcm_floor(model, targets, **sizes)


def read_reference(file: Path) -> Callable[..., Step]:
    """Return ``make_step`` of a script."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_step


def run_with(workspace: Path, plugin: object, *, method: str, batch: int, steps: int) -> None:
    """Take so many steps of a method in this process, observed by a plugin."""
    import torch
    from distill.core.config.load import load_configuration
    from distill.core.registry.registry import Registry
    from distill.core.runs.run import run

    torch.set_num_threads(1)
    registry = Registry.load()
    registry.add(plugin, source="benchmark", name="observer")
    own = [f"distillation_config.{method}.{key}={value}" for key, value in SETTINGS[method].items()]
    sizes = [f"distillation_method={method}", f"train_batch_size={batch}", f"max_train_steps={steps}"]
    configuration = load_configuration(
        registry,
        config_file=workspace / "config.json",
        data_file=workspace / "multidatabackend.json",
        flags={"output_dir": str(workspace / "interleaved")},
        overrides=[*own, *sizes, "overwrite=true"],
    )
    run(configuration, registry)


def measure_steps(
    workspace: Path, *, method: str, batch: int, steps: int, reference: Path | None = None
) -> dict[str, Column]:
    """Return the seconds of our steps, the floor's and the reference's, in one run after a warm-up."""
    from distill.core.plugin_api.hookspecs import hookimpl
    from distill.core.registry.registry import Registry

    targets = Registry.load().get("family", "sdxl").lora_targets
    sizes = {"batch": batch, "edge": EDGE, "rank": RANK}
    others = {"floor": make_floor(method, workspace / "model", targets, **sizes)}
    if reference is not None:
        others["reference"] = read_reference(reference)(workspace / "model", targets, **sizes)
    timer, period = Interleaved(others), PERIODS.get(method, 1)

    class Plugin:
        @hookimpl
        def on_run_start(self) -> None:
            timer.before_first()

        @hookimpl
        def on_step_end(self) -> None:
            timer.after_step()

    warm_up = max(3, period)
    steps = -(-steps // period) * period
    run_with(workspace, Plugin(), method=method, batch=batch, steps=steps + warm_up)
    return {
        name: Column(by_period(column.wall[warm_up:], period), by_period(column.cpu[warm_up:], period))
        for name, column in timer.columns.items()
    }


def by_period(seconds: Sequence[float], period: int) -> list[float]:
    """Return the mean step of each period."""
    return [sum(seconds[at : at + period]) / period for at in range(0, len(seconds), period)]


def compare(runs: Sequence[Mapping[str, Column]]) -> dict[str, Any]:
    """Return the medians of the runs' medians, and of our ratios to the floor, and the reference's to ours."""
    medians = [
        {(name, clock): statistics.median(values) for name, column in each.items() for clock, values in pairs(column)}
        for each in runs
    ]
    found: dict[str, Any] = {
        f"{name}_{clock}_seconds": statistics.median(each[name, clock] for each in medians)
        for name, clock in medians[0]
    }
    for clock in ("cpu", "wall"):
        ratios = [each[OURS, clock] / each["floor", clock] for each in medians]
        found[f"{clock}_ratio"], found[f"{clock}_ratios"] = statistics.median(ratios), ratios
        if "reference" in runs[0]:
            ratios = [each["reference", clock] / each[OURS, clock] for each in medians]
            found[f"reference_{clock}_ratio"] = statistics.median(ratios)
            found[f"reference_{clock}_ratios"] = ratios
    return found


def pairs(column: Column) -> list[tuple[str, list[float]]]:
    """Return the two clocks' names with their seconds."""
    return [("wall", column.wall), ("cpu", column.cpu)]


def measure_counts(workspace: Path, *, method: str, batch: int) -> dict[str, Any]:
    """Return what one step, in which all networks are trained, makes networks, host and device do."""
    from distill.core.plugin_api.hookspecs import hookimpl
    from distill.core.testing.step_counts import StepCounter

    counter, taken = StepCounter(), []

    class Plugin:
        @hookimpl
        def on_run_start(self, state: Any) -> None:
            counter.watch(state.networks)
            counter.take()

        @hookimpl
        def on_step_end(self) -> None:
            taken.append(counter.take())

    with counter.counting():
        run_with(workspace, Plugin(), method=method, batch=batch, steps=max(2, PERIODS.get(method, 1)))
    last = taken[-1]
    return {
        "calls": last.rows(),
        "reads": dict(last.reads),
        "casts": dict(last.casts),
        "copied_bytes": last.copied_bytes,
    }


# -- starting ---------------------------------------------------------------------------------------------------------


def start_run(workspace: Path, *, steps: int) -> dict[str, float]:
    """Return, of `distill run` as a process of its own, seconds from the command to the first step's begin and end,
    peak bytes, and the share of time that its last ten steps waited for data.
    """
    notes = workspace / "notes.json"
    command = [
        sys.executable, "-m", "distill", "run", "--config", "config.json", "--data", "multidatabackend.json",
        "--output-dir", "started", "--set", f"max_train_steps={steps}", "--set", "overwrite=true",
        "--plugin", str(Path(__file__).with_name("step_probe.py")),
    ]  # fmt: skip
    begun = time.time()
    _run(command, workspace, {"STEP_PROBE": str(notes)})
    noted: dict[str, float] = json.loads(notes.read_text())
    found = {name: value if name == "peak_bytes" else value - begun for name, value in noted.items()}
    last = (workspace / "started" / "metrics.jsonl").read_text().splitlines()[-1]
    return {**found, "wait_for_data_share": json.loads(last)["wait_for_data_share"]}


def load_only(workspace: Path, statement: str) -> float:
    """Return the seconds from the command until torch and diffusers are imported and `statement` has loaded a model."""
    code = LOADING.format(statement=statement.format(folder=str(workspace / "model")))
    begun = time.time()
    output = _run([sys.executable, "-c", code], workspace, {})
    return float(output.splitlines()[-1]) - begun


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def measure_start(workspace: Path, repeats: int) -> dict[str, Any]:
    """Return medians of the time to the first step and of merely loading, interleaved, and the peak of a run."""
    start_run(workspace, steps=1)  # builds the caches
    started, unet, pipeline = [], [], []
    for _ in range(repeats):
        started.append(start_run(workspace, steps=20))
        unet.append(load_only(workspace, UNET))
        pipeline.append(load_only(workspace, PIPELINE))
    begins = statistics.median(run["first_step_begins"] for run in started)
    ends = statistics.median(run["first_step_ends"] for run in started)
    return {
        "first_step_begins_seconds": begins,
        "first_step_ends_seconds": ends,
        "import_and_load_unet_seconds": statistics.median(unet),
        "import_and_load_pipeline_seconds": statistics.median(pipeline),
        "start_ratio": ends / statistics.median(unet),
        "start_ratio_to_pipeline": ends / statistics.median(pipeline),
        "peak_mb": max(run["peak_bytes"] for run in started) / 1e6,
        "wait_for_data_share": statistics.median(run["wait_for_data_share"] for run in started),
    }


# -- the command ------------------------------------------------------------------------------------------------------


def measure(workspace: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Return all figures that are asked for, printed as they come."""
    if not (workspace / "config.json").exists():
        write_workspace(workspace)
    figures: dict[str, Any] = {}
    for method in given.methods.split(","):
        for batch in map(int, given.batch.split(",")):
            if not given.steps:
                continue
            one = {"method": method, "batch": batch}
            reference = given.reference if method == "lcm" else None
            runs = [measure_steps(workspace, **one, steps=given.steps, reference=reference) for _ in range(given.runs)]
            found = {**compare(runs), **measure_counts(workspace, **one)}
            figures[f"{method}, batch {batch}"] = found
            report(found, title=f"{method}, batch {batch}", method=method)
    if given.repeats:
        figures["start"] = measure_start(workspace, given.repeats)
        report(figures["start"], title="start", method="")
    return figures


def report(figures: Mapping[str, Any], *, title: str, method: str) -> None:
    """Print figures beside their limits."""
    print(f"\n{title}")
    for name, value in figures.items():
        if not isinstance(value, float):
            shown = [round(each, 3) for each in value] if isinstance(value, list) else value
            print(f"{name:34} {shown}", flush=True)
            continue
        limit = ""
        for key in (name, f"{method} {name}"):
            if key in AT_MOST:
                limit = f"   at most {AT_MOST[key]:g}{'   ABOVE' if value > AT_MOST[key] else ''}"
            if key in AT_LEAST:
                limit = f"   at least {AT_LEAST[key]:g}{'   BELOW' if value < AT_LEAST[key] else ''}"
        print(f"{name:34} {value:10.4f}{limit}", flush=True)


def main() -> None:
    """Measure, print, and say what is beyond its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="lcm", help=f"comma-separated, of {', '.join(SETTINGS)}")
    parser.add_argument("--batch", default="4", help="comma-separated numbers of samples in a step")
    parser.add_argument("--steps", type=int, default=40, help="steps to time in each run; 0 = none")
    parser.add_argument("--runs", type=int, default=1, help="runs of each method and batch")
    parser.add_argument("--reference", type=Path, help="a script with make_step, compared with lcm")
    parser.add_argument("--repeats", type=int, default=3, help="starts to time; 0 = none")
    parser.add_argument("--workspace", type=Path, help="where the model and its caches are kept; default: temporary")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        workspace = (given.workspace or Path(temporary)).resolve()
        workspace.mkdir(parents=True, exist_ok=True)
        figures = measure(workspace, given)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
