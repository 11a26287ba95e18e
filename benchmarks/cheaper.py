"""Each switch of cheaper distillation against the default on the miniature SDXL, at equal CPU seconds of training.

    python benchmarks/cheaper.py --method lcm --seconds 120 --seeds 1,2,3 --output output/cheaper-lcm

A short run of each row measures the CPU seconds of a step, and so how many the budget pays for; then every row is
trained with every seed, in one thread, and all students are scored on the same prompts and noise. What is made before
training (trajectories, in a cache that all rows share) is timed by itself and not part of the budget. What has finished
is taken as it is. Writes cheaper.json and cheaper.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from count_seconds import FILE  # noqa: E402
from methods import IMAGES, RECIPE, commit, score, table  # noqa: E402

COUNTER = ROOT / "benchmarks" / "count_seconds.py"
OF_LCM = RECIPE["distillation_config"]["lcm"]
PROBE_STEPS = 24
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "by_loss": {"timestep_sampling": "loss"},
    "cached": {"cached_trajectories": True},
}
"""Row -> settings of the method beside the miniature's own recipe."""
FULL: dict[str, dict[str, Any]] = {"full": {}, "teacher_int8": {"teacher_precision": "int8-torchao"}}
"""Rows of full students -> keys of the run."""


def data_file(folder: Path, *, guidance: float, num_steps: int) -> Path:
    """The miniature's images, and trajectories of as many steps as the grid has, in a folder that all rows share."""
    pairs = {
        "id": "pairs", "dataset_type": "distillation_cache", "num_inference_steps": num_steps,
        "guidance_scale": guidance, "cache_dir": str(folder / "pairs"),
    }  # fmt: skip
    caches = {"cache_dir_vae": str(folder / "latents")}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "data.json"
    file.write_text(json.dumps([{**IMAGES, **caches}, pairs], indent=1))
    return file


def words(action: list[str], row: str, output: Path, *, arguments: argparse.Namespace, **settings: Any) -> list[str]:
    """The command line of a row."""
    method = arguments.method
    own = {f"distillation_config.{method}.{key}": value for key, value in ROWS.get(row, {}).items()}
    if row in FULL:
        own = {"model_type": "full", "learning_rate": arguments.full_rate, **FULL[row]}
    settings = {
        **own, "evaluation_num_samples": 0, "validation_step_interval": 0, "checkpoint_step_interval": 0,
        "report_to": "none", **settings,
    }  # fmt: skip
    chosen = ["--method", method, "--family", "sdxl", "--data", str(arguments.output / "data.json")]
    more = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return [sys.executable, "-m", "distill", *action, *chosen, "--output-dir", str(output), *more]


def spent(command: list[str], log: Path) -> float:
    """Run a command in one thread, and return its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=file, stderr=file, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train(row: str, output: Path, arguments: argparse.Namespace, *, seed: int, steps: int) -> list[float]:
    """Train a row, unless it is there; return the CPU seconds after each step."""
    if not (output / "student").exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        settings = {"seed": seed, "max_train_steps": steps, "lr_warmup_steps": min(20, steps - 1)}
        command = words(["run"], row, output, arguments=arguments, **settings)
        spent([*command, "--plugin", str(COUNTER)], output.parent / f"{output.name}.log")
    lines = (output / FILE).read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines]


def per_step(seconds: list[float]) -> float:
    """CPU seconds of a step: the median, which leaves out what happens once."""
    return median(later - earlier for earlier, later in pairwise(seconds[1:]))


def heading(found: Mapping[str, Any]) -> str:
    """What the table was made with."""
    rows = "; ".join(
        f"{row}: {found['steps'][row]} steps of {found['seconds_per_step'][row]:.2f} s" for row in found["steps"]
    )
    made = "" if found["making"] is None else f" Making the trajectories took {found['making']:.0f} CPU seconds before."
    return (
        f"Commit {found['commit']}: {found['method']}, {found['seconds']:g} CPU seconds of steps a run ({rows}), seeds "
        f"{', '.join(found['seeds'])}, {found['num_samples']} samples; mean of the seeds (lowest to highest).{made}"
    )


def main() -> None:
    """Train, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="lcm", help="a method with these switches")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {', '.join([*ROWS, *FULL])}")
    parser.add_argument("--seconds", type=float, default=120, help="CPU seconds of steps of each run")
    parser.add_argument("--seeds", default="1,2,3")
    middle = (OF_LCM["w_min"] + OF_LCM["w_max"]) / 2
    parser.add_argument("--guidance", type=float, default=middle, help="of the trajectories; lcm's mean unless given")
    parser.add_argument("--grid", type=int, default=20, help="steps of the trajectories")
    parser.add_argument("--full-rate", type=float, default=1e-4, help="learning rate of full students")
    parser.add_argument("--num-samples", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("output/cheaper"))
    arguments = parser.parse_args()
    arguments.output = arguments.output.resolve()
    rows, seeds, runs = arguments.rows.split(","), arguments.seeds.split(","), arguments.output / "runs"
    data_file(arguments.output, guidance=arguments.guidance, num_steps=arguments.grid)
    making = None
    if "cached" in rows:
        kept = arguments.output / "making.json"
        if not kept.exists():
            build = words(["cache", "build"], "cached", runs / "making", arguments=arguments)
            kept.write_text(json.dumps(spent(build, arguments.output / "making.log")))
        making = json.loads(kept.read_text())
    costs = {row: per_step(train(row, runs / f"{row}-probe", arguments, seed=0, steps=PROBE_STEPS)) for row in rows}
    steps = {row: max(PROBE_STEPS, round(arguments.seconds / cost)) for row, cost in costs.items()}
    folders = {}
    for seed in seeds:
        for row in rows:
            folders[f"{row}-{seed}"] = runs / f"{row}-{seed}"
            train(row, folders[f"{row}-{seed}"], arguments, seed=int(seed), steps=steps[row])
            print(f"{row}-{seed}: {steps[row]} steps", flush=True)
    scored = score(folders, num_samples=arguments.num_samples, per_prompt=4, images=arguments.output / "images")
    found = {
        "commit": commit(), "method": arguments.method, "seconds": arguments.seconds, "seconds_per_step": costs,
        "steps": steps, "seeds": seeds, "num_samples": arguments.num_samples, "making": making, "rows": scored,
    }  # fmt: skip
    text = f"{heading(found)}\n\n{table(scored)}"
    (arguments.output / "cheaper.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.output / "cheaper.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
