"""The README's figures: the default command's own student against its teacher, over several seeds.

    python benchmarks/scores.py --seeds 1,2,3 --num-samples 1000 --output output/scores
    python benchmarks/scores.py --family sd2x --method pcm --seeds 1 --output output/scores-sd2x-pcm

Runs `distill run --method lcm --family sdxl` once for each seed (a finished one is taken as it is), then scores all
students and the teacher on the same noise and prompts. Writes scores.json, and prints a Markdown table with the mean
and the spread (lowest to highest) over the seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

SCORES = {
    "prompt_agreement_judge": "prompt agreement",
    "frechet_distance_to_data_judge": "Fréchet distance to data (judge features)",
    "image_quality_judge": "quality",
    "distance_to_teacher_pixels": "distance to the full teacher's image",
}


def distil(seed: int, output: Path, *, family: str, method: str) -> None:
    """The default command with another seed, unless it has finished before."""
    if (output / "student").exists():
        return
    command = [sys.executable, "-m", "distill", "run", "--method", method, "--family", family]
    command += ["--output-dir", str(output), "--set", f"seed={seed}", "--set", "resume_from_checkpoint=latest"]
    subprocess.run(command, check=True)


class Students:
    """The teacher and the students of several runs, one in memory at a time."""

    def __init__(self, family: Any, folders: dict[str, Path]) -> None:
        self._family, self._folders = family, folders
        self._loaded: tuple[str, nn.Module] | None = None

    @contextmanager
    def use(self, role: str) -> Iterator[nn.Module]:
        """The network of `role`: ``teacher`` or one of the folders' names."""
        if self._loaded is None or self._loaded[0] != role:
            folder = self._folders.get(role)
            network = self._family.load_network() if folder is None else self._family.load_student(folder)
            self._loaded = (role, network)
        yield self._loaded[1]


def score(
    folders: dict[str, Path],
    *,
    num_samples: int,
    students: dict[str, Path] | None = None,
    teachers: bool = True,
    solver_guidance: Sequence[float] = (),
) -> dict[str, Any]:
    """Scores by recipe.

    Args:
        folders: Output folders of finished runs by name.
        num_samples: Images of each row.
        students: Folders of students by name; those of the runs unless given.
        teachers: Whether the teacher gets rows too; if not, the distance to its images is to those of one step.
        solver_guidance: Scales of the fast solver beside the run's own, where the teacher gets rows.
    """
    from distill.core.data.loader import BatchContents, BatchLayout
    from distill.core.data.pipeline import DataPipeline
    from distill.core.evaluation.evaluate import evaluate
    from distill.core.evaluation.evaluators import build_evaluators, evaluation_setting
    from distill.core.evaluation.plan import plan_evaluation
    from distill.core.runs.builders import build_family, build_method, method_needs
    from distill.core.runs.finished import open_run
    from distill.core.utils.console import console

    first = next(iter(folders.values()))
    configuration, registry = open_run(first)
    run, family = configuration.run, build_family(configuration, registry)
    method = build_method(configuration, registry, family)
    data = DataPipeline(
        configuration,
        registry,
        family,
        layout=BatchLayout(1, 1),
        seed=0,
        cache_root=first / "cache",
        contents=BatchContents(images=method_needs(configuration, registry, family).images),
    )
    with console():
        data.prepare()
    plan = plan_evaluation(
        family, lambda steps: method.sampler(family.schedule, num_inference_steps=steps),
        prompts=data.captions(num_samples), num_samples=num_samples, seed=0, resolution=run.validation_resolution[0],
        steps=run.evaluation_steps,
        teacher_steps=sorted({1, 2, 4, 8, *run.evaluation_teacher_steps}) if teachers else (1,),
        teacher_guidance=run.evaluation_teacher_guidance,
    )  # fmt: skip
    solver = next(each for each in plan.sampling_plans if each.sampler is not None and each.role == "teacher")
    many = [each for each in plan.sampling_plans if each.role == "teacher" and each is not solver]
    few = [each for each in plan.sampling_plans if each.role == "student"]
    students = students or {name: folder / "student" for name, folder in folders.items()}
    solvers = fast_solvers(family, (solver.guidance, *solver_guidance), (2, 4))
    sampling_plans = [*many, *solvers] if teachers else []
    sampling_plans += [replace(each, role=name) for name in students for each in few]
    real = data.real_images(1000, plan.width, plan.height)
    setting = evaluation_setting(family, num_data=len(real))
    evaluators, left_out = build_evaluators(registry, configuration, setting)
    networks = Students(family, students)
    plan = replace(plan, sampling_plans=tuple(sampling_plans))
    with console():
        found = evaluate(family, networks, plan, evaluators, data=real, left_out=left_out)
    rows = [
        {"name": row.sampling_plan.name, "role": row.sampling_plan.role, "steps": row.sampling_plan.steps,
         "scores": row.scores, "seconds_per_image": row.seconds_per_image}
        for row in found.rows
    ]  # fmt: skip
    return {"num_samples": num_samples, "num_data": len(real), "rows": rows}


def fast_solvers(family: Any, guidance: Sequence[float], steps: Sequence[int]) -> list[Any]:
    """DPM++ 2M at each scale and number of steps; scales but the first are named."""
    from distill.core.evaluation.plan import fast_solver

    plans = [fast_solver(family, number, scale) for scale in guidance for number in steps]
    return [
        each if each.guidance == guidance[0] else replace(each, name=f"{each.name}, guidance {each.guidance:g}")
        for each in plans
    ]


def table(result: dict[str, Any]) -> str:
    """Markdown, students' figures as mean (lowest to highest) over the seeds."""
    lines = ["| | steps | " + " | ".join(SCORES.values()) + " |", "| --- " * (2 + len(SCORES)) + "|"]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["name"], row["steps"]), []).append(row["scores"])
    for (name, steps), scores in groups.items():
        cells = [cell([entry[key] for entry in scores if key in entry]) for key in SCORES]
        lines.append(f"| {name} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(values: Sequence[float]) -> str:
    """The mean, and the lowest and highest where there are several."""
    if not values:
        return "–"
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    return f"{mean(values):.3g}{spread}"


def main() -> None:
    """Run, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--family", default="sdxl")
    parser.add_argument("--method", default="lcm")
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("output/scores"))
    parser.add_argument("--solver-guidance", default="", help="of the fast solver, beside the run's own")
    arguments = parser.parse_args()
    folders = {f"seed-{seed}": arguments.output / f"seed-{seed}" for seed in arguments.seeds.split(",")}
    for name, folder in folders.items():
        distil(int(name.removeprefix("seed-")), folder, family=arguments.family, method=arguments.method)
    scales = [float(scale) for scale in arguments.solver_guidance.split(",") if scale]
    result = score(folders, num_samples=arguments.num_samples, solver_guidance=scales)
    (arguments.output / "scores.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
