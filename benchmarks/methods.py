"""Every method on the miniature SDXL at an equal budget of network evaluations: one table, one image.

    python benchmarks/methods.py --budget 24000 --seeds 1,2,3 --num-samples 400 --jobs 2 --output output/methods

Each method runs as `distill run --method NAME --family sdxl` does by default, for as many steps as the budget pays for
(measured in a short run first; `count_evaluations.py` says what is counted). `--jobs` trains so many rows at once; each
computes in one thread whatever their number, so that it changes no figure. All students are then scored on the same
prompts and noise as the teacher, and as DPM++ 2M with the teacher's guidance and `--solver-guidance`. What has finished
is taken as it is, so a run that was stopped goes on. Writes methods.json, methods.md and methods.png. `--precisions
no,bf16,fp16` trains each method in each (rows `lcm`, `lcm-bf16`, ...); all students are scored in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from scores import Students, cell, fast_solvers  # noqa: E402

COUNTER = ROOT / "benchmarks" / "count_evaluations.py"
FP16_ON_CPU = ROOT / "benchmarks" / "half_on_cpu.py"
STEPS = (1, 2, 4, 8)
SOLVER_STEPS = (2, 4, 8)
PROBE_STEPS = 20
PAIRS_FILE = "pairs.json"
SOLVER = "-solver"
"""In names of images: made by the fast solver."""
SHOWN = 8
"""Images of each row that :func:`distill.core.evaluation.evaluate.evaluate` keeps."""
SCORES = {
    "prompt_agreement_judge": "scenes right ↑",
    "frechet_distance_to_data_judge": "distance to data ↓",
    "image_quality_judge": "quality ↑",
    "distance_to_teacher_pixels": "distance to full teacher ↓",
    "diversity_judge": "diversity ↑",
}
MINIATURE = ROOT / "model_families" / "assets" / "sdxl_scenes"
RECIPE: dict[str, Any] = json.loads((MINIATURE / "recipe.json").read_text())
(_IMAGES,) = RECIPE["data"]
IMAGES: dict[str, Any] = {**_IMAGES, "instance_data_dir": str((MINIATURE / _IMAGES["instance_data_dir"]).resolve())}
"""The miniature's images, as an entry of a data file that may lie anywhere."""
OF_DMD2 = RECIPE["methods"]["dmd2"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lcm": ("lcm", {}),
    "pcm": ("pcm", {}),
    "tcd": ("tcd", {}),
    "tscd": ("tcd", {"distillation_config.tcd.segments": "[8,4,2,1]"}),
    "dmd2": ("dmd2", {}),
    "progressive": ("progressive", {}),
    "guidance": ("guidance", {}),
    "meanflow": ("meanflow", {}),
    "kd": ("kd", {}),
    "lcm+dmd2": (
        "recipe",
        {
            **{key: OF_DMD2[key] for key in ("learning_rate", "lr_end")},
            "distillation_config.recipe.sampler": "lcm",
            "distillation_config.recipe.terms": json.dumps([
                {"method": "lcm", "config": RECIPE["distillation_config"]["lcm"]},
                {"method": "dmd2", "weight": 0.05, "config": OF_DMD2["distillation_config"]["dmd2"]},
            ]),
        },
    ),
}  # fmt: skip
"""Row of the table -> method and what is set beside the miniature's own recipe."""
PAIRS: dict[str, Any] = {**RECIPE["methods"]["kd"]["data"][0], "num_pairs_per_prompt": 1}
PAIR_COST = 2 * PAIRS["num_inference_steps"]
"""Network evaluations of a noise-image pair of the teacher, with guidance, by DPM++ 2M."""
PAIRS_SHARE = 0.5
"""Of a budget: what `kd` spends on pairs, before it trains."""


def command(name: str, output: Path, *, seed: int, steps: int) -> list[str]:
    """The run of a row for a number of steps, without images and scores of its own."""
    variant, _, precision = name.partition("-")
    method, settings = VARIANTS[variant]
    settings = {
        **settings, "seed": seed, "max_train_steps": steps, "evaluation_num_samples": 0,
        "validation_step_interval": 0, "checkpoint_step_interval": 500, "resume_from_checkpoint": "latest",
    }  # fmt: skip
    settings |= {"mixed_precision": precision} if precision else {}
    words = [sys.executable, "-m", "distill", "run", "--method", method, "--family", "sdxl"]
    words += ["--plugin", str(COUNTER), "--output-dir", str(output)]
    words += ["--plugin", str(FP16_ON_CPU)] if precision == "fp16" else []
    words += ["--data", str(output.parent / PAIRS_FILE)] if method == "kd" else []
    return words + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def run(name: str, output: Path, *, seed: int, steps: int) -> None:
    """Train a row's student, unless it is there."""
    if (output / "student").exists():
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (output.parent / f"{output.name}.log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        words = command(name, output, seed=seed, steps=steps)
        subprocess.run(words, check=True, stdout=log, stderr=log, env=environment)
    print(f"{output.name}: {steps} steps in {time.monotonic() - started:.0f} s", flush=True)


def write_pairs(count: int, folder: Path) -> None:
    """Write the data of `kd` with so many pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [PAIRS, {**IMAGES, "max_num_samples": count}]
    (folder / PAIRS_FILE).write_text(json.dumps(entries, indent=1) + "\n")


def steps_for(name: str, budget: float, folder: Path) -> int:
    """As many optimizer steps as the budget pays for, by a short run."""
    if name.startswith("kd"):
        count = int(PAIRS_SHARE * budget / PAIR_COST)
        write_pairs(count, folder)
        budget -= count * PAIR_COST
    probe = folder / f"{name}-probe"
    run(name, probe, seed=0, steps=PROBE_STEPS)
    found = json.loads((probe / "evaluations.json").read_text())
    return max(PROBE_STEPS, round(budget * found["steps"] / found["evaluations"]))


def train(
    names: Sequence[str], seeds: Sequence[str], *, budget: float, num_steps: int | None, folder: Path, jobs: int
) -> tuple[dict[str, int], dict[str, Path]]:
    """Every row's student for every seed: the steps of each row, and the folder of each student."""
    cells = [(name, seed) for seed in seeds for name in names]
    if num_steps:
        write_pairs(num_steps, folder)
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda name: num_steps or steps_for(name, budget, folder), names)
        steps = dict(zip(names, found, strict=True))
        trained = pool.map(lambda at: run(at[0], folder / "-".join(at), seed=int(at[1]), steps=steps[at[0]]), cells)
        list(trained)
    return steps, {"-".join(at): folder / "-".join(at) for at in cells}


def score(
    folders: Mapping[str, Path], *, num_samples: int, per_prompt: int, images: Path, scales: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """Rows of teacher and students, each with its scores; the first images of each go to `images`.

    `scales` are guidance scales of the fast solver beside the run's own.
    """
    from distill.core.data.loader import BatchLayout
    from distill.core.data.pipeline import DataPipeline
    from distill.core.evaluation.evaluate import evaluate
    from distill.core.evaluation.evaluators import build_evaluators, evaluation_setting
    from distill.core.evaluation.plan import plan_evaluation
    from distill.core.runs.builders import build_family, build_method
    from distill.core.runs.finished import open_run
    from distill.core.utils.console import console

    # any run's data and model serve: they are the miniature's own
    base = next(folder for name, folder in folders.items() if not name.startswith(("dmd2", "kd")))
    configuration, registry = open_run(base, overrides=["mixed_precision=no"])
    run_settings, family = configuration.run, build_family(configuration, registry)
    data = DataPipeline(
        configuration, registry, family, layout=BatchLayout(1, 1), seed=0, cache_root=base / "cache",
    )  # fmt: skip
    data.prepare()
    first = build_method(configuration, registry, family)
    plan = plan_evaluation(
        family, lambda steps: first.sampler(family.schedule, num_inference_steps=steps),
        prompts=data.captions(num_samples // per_prompt), num_samples=num_samples, seed=0,
        resolution=run_settings.validation_resolution[0], steps=STEPS, teacher_steps=(*STEPS, 50),
        teacher_guidance=run_settings.evaluation_teacher_guidance,
    )  # fmt: skip
    teachers = [each for each in plan.sampling_plans if each.role == "teacher" and each.sampler is None]
    guidance = teachers[0].guidance
    teachers += fast_solvers(family, (guidance, *scales), SOLVER_STEPS)
    evaluators, _ = build_evaluators(registry, configuration, evaluation_setting(family))
    real = data.real_images(1000, plan.width, plan.height)
    networks = Students(family, {name: folder / "student" for name, folder in folders.items()})
    sampling_plans = [*teachers, *(each for name, folder in folders.items() for each in students(name, folder, family))]
    plan = replace(plan, sampling_plans=tuple(sampling_plans))
    with console():
        found = evaluate(family, networks, plan, evaluators, data=real)
    images.mkdir(parents=True, exist_ok=True)
    for row in found.rows:
        each = row.sampling_plan
        for index, image in enumerate(row.images):
            image.save(_shown(images, each.role, each.steps, _solver(each, guidance), index))
    (images / "prompts.json").write_text(json.dumps(list(plan.sample_prompts[:SHOWN])))
    return [
        {"row": each.role, "name": each.name, "steps": each.steps, "guidance": each.guidance,
         **row.scores, "seconds_per_image": row.seconds_per_image}
        for row in found.rows for each in [row.sampling_plan]
    ]  # fmt: skip


def _solver(sampling_plan: Any, guidance: float) -> str:
    if sampling_plan.role != "teacher" or sampling_plan.sampler is None:
        return ""
    return SOLVER if sampling_plan.guidance == guidance else f"{SOLVER}-{sampling_plan.guidance:g}"


def _shown(images: Path, who: str, steps: int, solver: str, index: int) -> Path:
    return images / f"{who}-{steps}-{index}{solver}.png"


def students(name: str, folder: Path, family: Any) -> list[Any]:
    """A student at each number of steps that its method can sample with."""
    from distill.core.errors import UserError
    from distill.core.evaluation.sampling import SamplingPlan
    from distill.core.runs.builders import build_method
    from distill.core.runs.finished import open_run

    configuration, registry = open_run(folder)
    method, found = build_method(configuration, registry, family), []
    for steps in STEPS:
        try:
            sampler = method.sampler(family.schedule, num_inference_steps=steps)
        except UserError as refusal:
            print(f"{name} at {steps} steps: {refusal}", flush=True)
            continue
        found.append(SamplingPlan(name, name, sampler, steps, sampler.guidance_scale))
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each number of steps and row, students' figures as mean (lowest to highest)."""
    from distill.core.diffusion.guidance import guides

    lines = ["| | steps | calls | " + " | ".join(SCORES.values()) + " |", "| --- " * (3 + len(SCORES)) + "|"]
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        name = row["name"] if row["row"] == "teacher" else row["row"].rpartition("-")[0]
        groups.setdefault((name, row["steps"]), []).append(row)
    for (name, steps), found in sorted(groups.items(), key=lambda group: group[0][1]):
        cells = [cell([row[key] for row in found if key in row]) for key in SCORES]
        calls = steps * (1 + guides(found[0]["guidance"]))
        lines.append(f"| {name} | {steps} | {calls} | {' | '.join(cells)} |")
    return "\n".join(lines)


def side_by_side(names: Sequence[str], images: Path, *, seed: str, steps: int, scales: Sequence[float] = ()) -> Any:
    """The first prompts: teacher and fast solver at few steps, each method's first student, the teacher in full."""
    from distill.core.drawing.grid import GridRow, labelled_grid
    from PIL import Image

    at = f"{steps} steps"
    columns = {
        ("teacher", steps, ""): f"teacher\n{at}",
        ("teacher", steps, SOLVER): f"DPM++ 2M\n{at}",
        **{("teacher", steps, f"{SOLVER}-{scale:g}"): f"DPM++ 2M\n{at}, guidance {scale:g}" for scale in scales},
        **{(f"{name}-{seed}", steps, ""): f"{name}\n{at}" for name in names},
        ("teacher", 50, ""): "teacher\n50 steps",
    }
    columns = {shown: head for shown, head in columns.items() if _shown(images, *shown, 0).exists()}
    prompts = json.loads((images / "prompts.json").read_text())
    rows = [
        GridRow(prompt, [Image.open(_shown(images, *each, index)) for each in columns], "")
        for index, prompt in enumerate(prompts)
    ]
    footer = "The first prompts of the table's samples, not chosen; all from the same noise."
    return labelled_grid(rows, [*columns.values()], title="Every method at equal cost", footer=footer, largest_cell=128)


def heading(made: Mapping[str, Any]) -> str:
    """What the table was made with, in a sentence."""
    cost = "equal steps" if made["budget"] is None else f"{made['budget']:,.0f} network evaluations a run"
    trained = ", ".join(f"{name} {count}" for name, count in made["steps"].items())
    return (
        f"Commit {made['commit']}: {cost} (optimizer steps: {trained}); "
        f"seeds {', '.join(made['seeds'])}; {made['num_samples']} samples, {made['per_prompt']} of each prompt; "
        "the mean of the seeds (lowest to highest)."
    )


def commit() -> str:
    """The commit of the checkout, marked where files differ from it."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Run, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(VARIANTS))
    parser.add_argument("--budget", type=float, default=24_000, help="network evaluations of each run")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run, in place of a budget")
    parser.add_argument("--precisions", default="no", help="mixed_precision of the runs, some of no,bf16,fp16")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--num-samples", type=int, default=400)
    parser.add_argument("--per-prompt", type=int, default=4, help="samples of each prompt, for the diversity")
    parser.add_argument("--solver-guidance", default="", help="of the fast solver, beside the teacher's own: 3 or 2,3")
    parser.add_argument("--output", type=Path, default=Path("output/methods"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, of one thread each")
    parser.add_argument("--train-only", action="store_true", help="stop after the runs")
    arguments = parser.parse_args()
    names, seeds = arguments.methods.split(","), arguments.seeds.split(",")
    names = [name if precision == "no" else f"{name}-{precision}" for name in names
             for precision in arguments.precisions.split(",")]  # fmt: skip
    runs = arguments.output / "runs"
    steps, folders = train(
        names, seeds, budget=arguments.budget, num_steps=arguments.steps, folder=runs, jobs=arguments.jobs
    )
    if arguments.train_only:
        return
    images = arguments.output / "images"
    scales = [float(scale) for scale in arguments.solver_guidance.split(",") if scale]
    rows = score(
        folders, num_samples=arguments.num_samples, per_prompt=arguments.per_prompt, images=images, scales=scales
    )
    found = {
        "commit": commit(), "budget": None if arguments.steps else arguments.budget, "steps": steps, "seeds": seeds,
        "num_samples": arguments.num_samples, "per_prompt": arguments.per_prompt, "rows": rows,
    }  # fmt: skip
    text = f"{heading(found)}\n\n{table(rows)}"
    (arguments.output / "methods.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.output / "methods.md").write_text(text + "\n")
    side_by_side(names, images, seed=seeds[0], steps=4, scales=scales).save(arguments.output / "methods.png")
    print(text)


if __name__ == "__main__":
    main()
