"""LCM-LoRA at one step: our loop against a plain one (tests/support/plain_lcm.py) over several seeds on the miniature.

    python benchmarks/one_step.py --seeds 1,2,3,4,5 --steps 600 --jobs 2 --output output/one-step

Both train on the same 1,024 images, embeddings and time ids, each with a data order and draws of its own. Along with
the last weights, averages of them are kept; `decay` is our loop with a rate that falls along a line. What has finished
is taken as it is, so a run that was stopped goes on. Writes one_step.json, and prints a Markdown table with the mean
and the spread over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from scores import score  # noqa: E402

NUM_IMAGES, BATCH_SIZE, RATE, LAST_RATE = 1024, 32, 1e-3, 5e-5
DECAYS = (0.95, 0.99)
SETTINGS = {
    "train_batch_size": BATCH_SIZE, "learning_rate": RATE, "lr_warmup_steps": 0, "lr_scheduler": "constant",
    "use_ema": True, "ema_decay": DECAYS[0], "export_online_weights": True, "num_workers": 1,
    "distillation_config.lcm.num_ddim_timesteps": 50, "data.emoji-scenes.max_num_samples": NUM_IMAGES,
    "validation_step_interval": 0, "evaluation_num_samples": 0, "report_to": "none", "checkpoint_step_interval": 200,
    "resume_from_checkpoint": "latest",
}  # fmt: skip
"""The issue's setting beside the recipe's rank 64, w of 2 to 4, Huber loss and float32."""
LOOPS = {"ours": {}, "ours, decaying rate": {"lr_scheduler": "linear", "lr_end": LAST_RATE}}


def distil(loop: str, folder: Path, *, seed: int, steps: int) -> None:
    """Run our loop, unless it has finished before."""
    if (folder / "student-online").exists():
        return
    settings = {**SETTINGS, **LOOPS[loop], "seed": seed, "max_train_steps": steps}
    settings["data.emoji-scenes.cache_dir_vae"] = folder.parent / "latents"
    words = [sys.executable, "-m", "distill", "run", "--method", "lcm", "--family", "sdxl", "--output-dir", str(folder)]
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    launch(words, folder)


def launch(words: Sequence[str], folder: Path) -> None:
    """Run a command in one thread, its output beside `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        subprocess.run(words, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def samples(folder: Path) -> Any:
    """Return all samples of a finished run of ours as one batch of the plain loop's."""
    import torch
    from distill.core.data.loader import BatchLayout
    from distill.core.data.pipeline import DataPipeline
    from distill.core.runs.builders import build_family
    from distill.core.runs.finished import open_run
    from support.plain_lcm import Inputs

    configuration, registry = open_run(folder)
    family = build_family(configuration, registry)
    data = DataPipeline(
        configuration, registry, family, layout=BatchLayout(BATCH_SIZE, 1), seed=0, cache_root=folder / "cache"
    )
    data.prepare()
    steps = data.steps(0)
    batches = [next(steps)[0] for _ in range(NUM_IMAGES // BATCH_SIZE)]
    data.close()
    names = ("prompt_embeds", "pooled_prompt_embeds", "time_ids")
    latents = torch.cat([batch.latents for batch in batches if batch.latents is not None])
    return Inputs(latents, *(torch.cat([batch.cond[name] for batch in batches]) for name in names))


def train_plain(folder: Path, *, data: Path, seed: int, steps: int) -> None:
    """Run the plain loop on the samples of one of our runs: shuffled each epoch, draws by torch's own generator."""
    import torch
    from distill.model_families.sdxl import SDXL
    from support.plain_lcm import Inputs, PlainLcmLora, Settings

    assert SDXL.miniature is not None
    settings = Settings(learning_rate=RATE, w_min=2.0, w_max=4.0)
    loop, inputs = PlainLcmLora(SDXL.miniature, settings, seed=seed), samples(data)
    averages = {decay: {name: p.detach().clone() for name, p in loop.weights.items()} for decay in DECAYS}
    torch.manual_seed(seed)
    losses = []
    for chosen in shuffled(len(inputs.latents), steps):
        batch = Inputs(*(value[chosen] for value in vars(inputs).values()))
        index = torch.randint(settings.num_ddim_timesteps, (BATCH_SIZE,))
        w = settings.w_min + (settings.w_max - settings.w_min) * torch.rand(BATCH_SIZE)
        noise = torch.randn_like(batch.latents)
        losses.append(loop.step(batch, index=index, noise=noise, w=w, learning_rate=RATE))
        for decay, average in averages.items():
            for name, weight in loop.weights.items():
                average[name].lerp_(weight.detach(), 1 - decay)
    for decay, average in averages.items():
        with torch.no_grad():
            kept = {name: p.clone() for name, p in loop.weights.items()}
            for name, weight in loop.weights.items():
                weight.copy_(average[name])
            loop.save(folder / f"average-{decay}")
            for name, weight in loop.weights.items():
                weight.copy_(kept[name])
    (folder / "losses.json").write_text(json.dumps(losses))
    loop.save(folder / "last")


def shuffled(count: int, steps: int) -> Iterator[Any]:
    """Yield the samples of each step, in a new order each epoch."""
    import torch

    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH_SIZE:
            order = torch.randperm(count)
        yield order[:BATCH_SIZE]
        order = order[BATCH_SIZE:]


def plain(folder: Path, *, data: Path, seed: int, steps: int) -> None:
    """Run the plain loop in a process of its own, unless it has finished before."""
    if (folder / "last").exists():
        return
    words = [sys.executable, __file__, "--plain", str(folder), "--data", str(data)]
    launch([*words, "--seeds", str(seed), "--steps", str(steps)], folder)


def train(output: Path, seeds: Sequence[int], *, variants: Sequence[int], steps: int, jobs: int) -> None:
    """Train every loop for every seed; the decaying rate for `variants` alone."""
    first = output / f"ours-{seeds[0]}"
    distil("ours", first, seed=seeds[0], steps=steps)  # makes the latents
    with ThreadPoolExecutor(jobs) as pool:
        waiting = []
        for seed in seeds:
            waiting.append(pool.submit(plain, output / f"plain-{seed}", data=first, seed=seed, steps=steps))
            waiting.append(pool.submit(distil, "ours", output / f"ours-{seed}", seed=seed, steps=steps))
        for seed in variants:
            run = output / f"decay-{seed}"
            waiting.append(pool.submit(distil, "ours, decaying rate", run, seed=seed, steps=steps))
        for each in waiting:
            each.result()


def students(output: Path, seeds: Sequence[int]) -> dict[str, Path]:
    """Return name and seed -> the folder of each student that is there."""
    found: dict[str, Path] = {}
    for seed in seeds:
        own = output / f"plain-{seed}"
        found |= {
            f"plain loop@{seed}": own / "last",
            **{f"plain loop, average {decay}@{seed}": own / f"average-{decay}" for decay in DECAYS},
            f"ours@{seed}": output / f"ours-{seed}" / "student-online",
            f"ours, average {DECAYS[0]}@{seed}": output / f"ours-{seed}" / "student",
            f"ours, decaying rate@{seed}": output / f"decay-{seed}" / "student-online",
            f"ours, decaying rate, average {DECAYS[0]}@{seed}": output / f"decay-{seed}" / "student",
        }
    return {name: folder for name, folder in found.items() if folder.exists()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table: agreement / distance by number of steps, mean and standard deviation over the seeds."""
    keys = ("prompt_agreement_judge", "frechet_distance_to_data_judge")
    counts = sorted({row["steps"] for row in rows if "@" in row["role"]})
    lines = ["| | seeds | " + " | ".join(f"{count} step{'s' * (count > 1)}" for count in counts) + " |"]
    lines.append("| --- " * (2 + len(counts)) + "|")
    names = list(dict.fromkeys(row["role"].partition("@")[0] for row in rows if "@" in row["role"]))
    for name in names:
        own = [row for row in rows if row["role"].partition("@")[0] == name]
        cells = []
        for count in counts:
            values = [[row["scores"][key] for row in own if row["steps"] == count] for key in keys]
            cells.append(" / ".join(_cell(found, digits) for found, digits in zip(values, (3, 1), strict=True)))
        num_seeds = len({row["role"] for row in own})
        lines.append(f"| {name} | {num_seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def main() -> None:
    """Train, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--variants", default="1,2,3", help="seeds of the decaying rate")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--num-samples", type=int, default=512)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("output/one-step"))
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    if given.plain is not None:
        return train_plain(given.plain, data=given.data, seed=seeds[0], steps=given.steps)
    variants = [int(seed) for seed in given.variants.split(",") if seed]
    train(given.output, seeds, variants=variants, steps=given.steps, jobs=given.jobs)
    first, found = {"first": given.output / f"ours-{seeds[0]}"}, students(given.output, seeds)
    result = score(first, students=found, num_samples=given.num_samples)
    (given.output / "one_step.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["rows"]))
    return None


if __name__ == "__main__":
    main()
