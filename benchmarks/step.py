"""How far our cached LCM-LoRA step is from its floor, what it holds in memory, and how soon the first one comes.

    python benchmarks/step.py [--steps 40] [--repeats 3] [--workspace FOLDER] [--json FILE]

One thread, fp32, batch 4, latents 16x16 (128 px), a random miniature SDXL of 7.8M parameters, LoRA of rank 64 over the
full LCM target list. Steps are interleaved in one process (ours, floor, ours, floor ...), so that both see the same
machine; figures are medians. Ours is a whole run's step: reading the batch from the caches, the draws, the norm and its
clipping, metrics, TensorBoard every ten steps. The floor is in step_floor.py.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch starts its threads

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from step_workspace import BATCH, EDGE, RANK, write_workspace

WARM_UP = 3
LIMITS = {"step_ratio": 1.10, "peak_mb": 830.0, "start_ratio": 2.0}
LOADING = """
import time; start = time.time()
import torch, diffusers
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
{statement}
print(time.time())
"""
UNET = "UNet2DConditionModel.from_pretrained({folder!r}, subfolder='unet')"
PIPELINE = "StableDiffusionXLPipeline.from_pretrained({folder!r}, add_watermarker=False)"


class Interleaved:
    """An observing plugin that takes a step of the floor after each of ours and times both.

    Args:
        floor: Takes one step.
    """

    def __init__(self, floor: Callable[[], None]) -> None:
        self.floor = floor
        self.ours: list[float] = []
        self.floors: list[float] = []
        self._since: float | None = None

    def after_step(self) -> None:
        """Our step has ended."""
        now = time.perf_counter()
        if self._since is not None:
            self.ours.append(now - self._since)
        self.floor()
        self._since = time.perf_counter()
        self.floors.append(self._since - now)


def measure_steps(workspace: Path, steps: int) -> dict[str, float]:
    """Median seconds of our step and of the floor's, and their ratio, over `steps` pairs in one run."""
    import torch
    from distill.core.config.load import load_configuration
    from distill.core.plugin_api.hookspecs import hookimpl
    from distill.core.registry.registry import Registry
    from distill.core.runs.run import run
    from step_floor import make_floor

    torch.set_num_threads(1)
    registry = Registry.load()
    targets = registry.get("family", "sdxl").lora_targets
    timer = Interleaved(make_floor(workspace / "model", targets, batch=BATCH, edge=EDGE, rank=RANK))

    class Plugin:
        @hookimpl
        def on_step_end(self) -> None:
            timer.after_step()

    registry.add(Plugin(), source="benchmark", name="interleaved")
    configuration = load_configuration(
        registry,
        config_file=workspace / "config.json",
        data_file=workspace / "multidatabackend.json",
        flags={"output_dir": str(workspace / "interleaved")},
        overrides=[f"max_train_steps={steps + WARM_UP}", "overwrite=true"],
    )
    run(configuration, registry)
    ours, floors = timer.ours[WARM_UP - 1 :], timer.floors[WARM_UP:]
    pairs = [ours_seconds / floor_seconds for ours_seconds, floor_seconds in zip(ours, floors, strict=True)]
    return {
        "ours_seconds": statistics.median(ours),
        "floor_seconds": statistics.median(floors),
        "step_ratio": statistics.median(ours) / statistics.median(floors),
        "median_of_pairwise_ratios": statistics.median(pairs),
        "pairs": len(pairs),
    }


def start_run(workspace: Path, *, steps: int) -> dict[str, float]:
    """`distill run` as a process of its own: seconds from the command to the first step's begin and end, peak bytes."""
    notes = workspace / "notes.json"
    command = [
        sys.executable, "-m", "distill", "run", "--config", "config.json", "--data", "multidatabackend.json",
        "--output-dir", "started", "--set", f"max_train_steps={steps}", "--set", "overwrite=true",
        "--plugin", str(Path(__file__).with_name("step_probe.py")),
    ]  # fmt: skip
    begun = time.time()
    _run(command, workspace, {"STEP_PROBE": str(notes)})
    found: dict[str, float] = json.loads(notes.read_text())
    return {name: value if name == "peak_bytes" else value - begun for name, value in found.items()}


def load_only(workspace: Path, statement: str) -> float:
    """Seconds from the command until torch and diffusers are imported and `statement` has loaded the model."""
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


def measure_start(workspace: Path, repeats: int) -> dict[str, float]:
    """Medians of the time to the first step and of merely loading, interleaved, and the peak memory of a run."""
    started, unet, pipeline = [], [], []
    for _ in range(repeats):
        started.append(start_run(workspace, steps=12))
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
    }


def measure(workspace: Path, *, steps: int, repeats: int) -> dict[str, float]:
    """All figures that are asked for."""
    if not (workspace / "config.json").exists():
        write_workspace(workspace)
    start_run(workspace, steps=1)  # builds the caches
    figures: dict[str, float] = {}
    for part in ((measure_steps, steps), (measure_start, repeats)):
        if part[1]:
            found = part[0](workspace, part[1])
            report(found)
            figures |= found
    return figures


def report(figures: dict[str, float]) -> None:
    """Print figures beside their limits."""
    for name, value in figures.items():
        limit = f"   limit {LIMITS[name]:g}" if name in LIMITS else ""
        print(f"{name:34} {value:10.3f}{limit}{'   ABOVE' if value > LIMITS.get(name, value) else ''}", flush=True)


def main() -> None:
    """Measure, print, and say what is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="pairs of steps to time; 0 = none")
    parser.add_argument("--repeats", type=int, default=3, help="starts to time; 0 = none")
    parser.add_argument("--workspace", type=Path, help="where the model and its caches are kept; default: temporary")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        workspace = (options.workspace or Path(temporary)).resolve()
        workspace.mkdir(parents=True, exist_ok=True)
        figures: dict[str, Any] = measure(workspace, steps=options.steps, repeats=options.repeats)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
