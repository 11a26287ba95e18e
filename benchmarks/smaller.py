"""A student smaller than its teacher, distilled and trained without a teacher, at equal steps: one table.

    python benchmarks/smaller.py --steps 1000 --seeds 1,2 --num-samples 400 --output output/smaller

On the miniature SDXL the student has no middle block and attention at the coarsest level alone. Both begin with the
weights of the layers that it keeps and see the same images in the same order; both are scored at 25 steps on the same
prompts and noise. What has finished is taken as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
FEWER = ("family_config.student_mid_block=false", "family_config.student_transformer_layers=[0,0,1]")
ROWS = {
    "distilled": ["--method", "guidance"],
    "alone": [
        *("--method", "denoising", "--plugin", str(ROOT / "benchmarks" / "denoising.py")),
        *("--set", "caption_dropout_probability=0.12"),
    ],
}
SCORES = ("prompt_agreement_judge", "frechet_distance_to_data_judge", "distance_to_teacher_pixels")


def train(row: str, output: Path, *, seed: int, steps: int, num_samples: int) -> dict[str, float]:
    """Scores of the row's student at 25 steps."""
    if not (output / "evaluation.json").exists():
        settings = {
            "model_type": "full", "learning_rate": 3e-4, "lr_end": 3e-5, "use_ema": "true", "ema_decay": 0.99,
            "max_train_steps": steps, "seed": seed, "validation_step_interval": 0, "evaluation_steps": 25,
            "evaluation_teacher_steps": 50, "evaluation_num_samples": num_samples,
            "validation_num_inference_steps": 25, "resume_from_checkpoint": "latest",
        }  # fmt: skip
        words = [sys.executable, "-m", "distill", "run", "--family", "sdxl", *ROWS[row], "--output-dir", str(output)]
        words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        words += [word for setting in FEWER for word in ("--set", setting)]
        output.parent.mkdir(parents=True, exist_ok=True)
        with (output.parent / f"{output.name}.log").open("w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(words, check=True, stdout=log, stderr=log, env=environment)
    rows = json.loads((output / "evaluation.json").read_text())["rows"]
    return next(each["scores"] for each in rows if each["role"] == "student")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--num-samples", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("output/smaller"))
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    print("| student at 25 steps | agreement | distance to data | distance to the full teacher's image |")
    print("| --- | --- | --- | --- |")
    for row in ROWS:
        scores = [
            train(row, given.output / f"{row}-{seed}", seed=seed, steps=given.steps, num_samples=given.num_samples)
            for seed in seeds
        ]
        found = [[each[name] for each in scores] for name in SCORES]
        cells = [f"{mean(values):.3g} ({min(values):.3g} to {max(values):.3g})" for values in found]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
