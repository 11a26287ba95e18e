"""LCM-LoRA at one step: our loop against a plain one (tests/support/plain_lcm.py) over several seeds on the miniature.

    python benchmarks/one_step.py --seeds 1,2,3,4,5 --steps 600 --jobs 2 --output output/one-step

Both train on the same 1,024 images, embeddings and time ids, each with a data order and draws of its own; `same` is the
plain loop with the batches and draws of ours. Along with the last weights, averages of them are kept; `decay` is our
loop with a rate that falls along a line. What has finished is taken as it is, so a run that was stopped goes on. Writes
one_step.json, and prints a Markdown table with the mean and the standard deviation over the seeds.
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

from methods import IMAGES, RECIPE  # noqa: E402
from scores import score  # noqa: E402

NUM_IMAGES, BATCH_SIZE, RATE, LAST_RATE = 1024, 32, 1e-3, 5e-5
DECAYS = (0.95, 0.99)
EARLIER = (40, 30, 20, 10)
"""Steps before the end at which the plain loop's weights are kept too: how far one run scatters within itself."""
SETTINGS = {
    "train_batch_size": BATCH_SIZE, "learning_rate": RATE, "lr_warmup_steps": 0, "lr_scheduler": "constant",
    "use_ema": True, "ema_decay": DECAYS[0], "export_online_weights": True, "num_workers": 1,
    "distillation_config.lcm.num_ddim_timesteps": 50, f"data.{IMAGES['id']}.max_num_samples": NUM_IMAGES,
    "validation_step_interval": 0, "evaluation_num_samples": 0, "report_to": "none", "checkpoint_step_interval": 200,
    "resume_from_checkpoint": "latest",
}  # fmt: skip
"""The issue's setting beside the recipe's rank 64, guidance, Huber loss and float32."""
LOOPS = {"ours": {}, "ours, decaying rate": {"lr_scheduler": "linear", "lr_end": LAST_RATE}}


def distil(loop: str, folder: Path, *, seed: int, steps: int) -> None:
    """Run our loop, unless it has finished before."""
    if (folder / "student-online").exists():
        return
    settings = {**SETTINGS, **LOOPS[loop], "seed": seed, "max_train_steps": steps}
    settings[f"data.{IMAGES['id']}.cache_dir_vae"] = folder.parent / "latents"
    words = [sys.executable, "-m", "distill", "run", "--method", "lcm", "--family", "sdxl", "--output-dir", str(folder)]
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    launch(words, folder)


def launch(words: Sequence[str], folder: Path) -> None:
    """Run a command in one thread, its output beside `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        subprocess.run(words, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def pipeline(folder: Path, *, seed: int) -> Any:
    """Return the data of a finished run of ours, in the order of another seed."""
    from distill.core.data.loader import BatchLayout
    from distill.core.data.pipeline import DataPipeline
    from distill.core.runs.builders import build_family
    from distill.core.runs.finished import open_run

    configuration, registry = open_run(folder)
    family, layout = build_family(configuration, registry), BatchLayout(BATCH_SIZE, 1)
    return DataPipeline(configuration, registry, family, layout=layout, seed=seed, cache_root=folder / "cache")


def batches(data: Any, steps: int) -> Iterator[tuple[Any, Any]]:
    """Yield the batches of our loop's first steps, each with its form for the plain loop."""
    from support.plain_lcm import Inputs

    found = data.steps(0)
    for _ in range(steps):
        (batch,) = next(found)
        names = ("prompt_embeds", "pooled_prompt_embeds", "time_ids")
        yield batch, Inputs(batch.latents, *(batch.cond[name] for name in names))
    found.close()


def own_draws(folder: Path, settings: Any, *, seed: int, steps: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield batches and draws of the plain loop's own: shuffled each epoch, by torch's one generator."""
    import torch
    from support.plain_lcm import Inputs

    epoch = [inputs for _, inputs in batches(pipeline(folder, seed=0), NUM_IMAGES // BATCH_SIZE)]
    every = [torch.cat(values) for values in zip(*(vars(inputs).values() for inputs in epoch), strict=True)]
    torch.manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        order = order if len(order) else torch.randperm(NUM_IMAGES)
        chosen, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        inputs = Inputs(*(value[chosen] for value in every))
        index = torch.randint(settings.num_ddim_timesteps, (BATCH_SIZE,))
        w = settings.w_min + (settings.w_max - settings.w_min) * torch.rand(BATCH_SIZE)
        yield inputs, {"index": index, "w": w, "noise": torch.randn_like(inputs.latents)}


def our_draws(folder: Path, settings: Any, *, seed: int, steps: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the very batches and draws of our loop with this seed."""
    from distill.core.utils.seeds import RngStreams

    for step, (batch, inputs) in enumerate(batches(pipeline(folder, seed=seed), steps)):
        draws = RngStreams(seed, step, batch.positions)
        index = draws.integers("index", settings.num_ddim_timesteps)
        w = draws.uniform("w", settings.w_min + 1, settings.w_max + 1) - 1
        yield inputs, {"index": index, "w": w, "noise": draws.randn("noise", inputs.latents.shape[1:])}


def train_plain(folder: Path, *, data: Path, seed: int, steps: int) -> None:
    """Run the plain loop on the samples of one of our runs; write its last weights and their averages."""
    from distill.core.utils.seeds import derive_seed
    from distill.model_families.sdxl import SDXL
    from support.plain_lcm import PlainLcmLora, Settings

    assert SDXL.miniature is not None
    of_lcm = RECIPE["distillation_config"]["lcm"]  # guidance scales; the script's w is one less
    settings = Settings(learning_rate=RATE, w_min=of_lcm["w_min"] - 1, w_max=of_lcm["w_max"] - 1)
    same = folder.name.startswith("same")
    loop = PlainLcmLora(SDXL.miniature, settings, seed=derive_seed(seed, "lora", "student") if same else seed)
    averages = {decay: {name: p.detach().clone() for name, p in loop.weights.items()} for decay in DECAYS}
    losses: list[float] = []
    for inputs, draws in (our_draws if same else own_draws)(data, settings, seed=seed, steps=steps):
        losses.append(loop.step(inputs, **draws, learning_rate=RATE))
        for decay, average in averages.items():
            for name, weight in loop.weights.items():
                average[name].lerp_(weight.detach(), 1 - decay)
        if steps - len(losses) in EARLIER:
            loop.save(folder / f"earlier-{steps - len(losses)}")
    last = {name: p.detach().clone() for name, p in loop.weights.items()}
    for name, weights in {**{f"average-{decay}": average for decay, average in averages.items()}, "last": last}.items():
        loop.load(weights)
        loop.save(folder / name)
    (folder / "losses.json").write_text(json.dumps(losses))


def plain(folder: Path, *, data: Path, seed: int, steps: int) -> None:
    """Run the plain loop in a process of its own, unless it has finished before."""
    if (folder / "losses.json").exists():
        return
    words = [sys.executable, __file__, "--plain", str(folder), "--data", str(data)]
    launch([*words, "--seeds", str(seed), "--steps", str(steps)], folder)


def train(output: Path, seeds: Sequence[int], *, variants: Sequence[int], steps: int, jobs: int) -> None:
    """Train every loop for every seed; the decaying rate, and the plain loop with our draws, for `variants` alone."""
    first = output / f"ours-{seeds[0]}"
    distil("ours", first, seed=seeds[0], steps=steps)  # makes the latents
    with ThreadPoolExecutor(jobs) as pool:
        waiting = []
        for seed in seeds:
            waiting.append(pool.submit(plain, output / f"plain-{seed}", data=first, seed=seed, steps=steps))
            waiting.append(pool.submit(distil, "ours", output / f"ours-{seed}", seed=seed, steps=steps))
        for seed in variants:
            waiting.append(pool.submit(plain, output / f"same-{seed}", data=first, seed=seed, steps=steps))
            run = output / f"decay-{seed}"
            waiting.append(pool.submit(distil, "ours, decaying rate", run, seed=seed, steps=steps))
        for each in waiting:
            each.result()


def students(output: Path, seeds: Sequence[int]) -> dict[str, Path]:
    """Return name and seed -> the folder of each student that is there."""
    found: dict[str, Path] = {}
    for seed in seeds:
        for name, kind in (("plain loop", "plain"), ("plain loop, our batches and draws", "same")):
            own = output / f"{kind}-{seed}"
            found[f"{name}@{seed}"] = own / "last"
            found |= {f"{name}, 10 to 40 steps earlier@{seed} {count}": own / f"earlier-{count}" for count in EARLIER}
            found |= {f"{name}, average {decay}@{seed}": own / f"average-{decay}" for decay in DECAYS}
        for name, kind in (("ours", "ours"), ("ours, decaying rate", "decay")):
            own = output / f"{kind}-{seed}"
            found |= {f"{name}@{seed}": own / "student-online", f"{name}, average {DECAYS[0]}@{seed}": own / "student"}
    return {name: folder for name, folder in found.items() if folder.exists()}


def scored(output: Path, seeds: Sequence[int], *, num_samples: int) -> list[dict[str, Any]]:
    """Return rows of all students, each scored once on the same prompts and noise."""
    rows: list[dict[str, Any]] = []
    for name, folder in students(output, seeds).items():
        file = folder.parent / f"{folder.name}-scores.json"
        if not file.exists():
            found = score(
                {"first": output / f"ours-{seeds[0]}"}, students={name: folder}, num_samples=num_samples, teachers=False
            )
            file.write_text(json.dumps(found["rows"], indent=2) + "\n")
        rows += json.loads(file.read_text())
    return rows


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
    parser.add_argument("--variants", default="1,2,3", help="seeds of `same` and `decay`")
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
    rows = scored(given.output, seeds, num_samples=given.num_samples)
    (given.output / "one_step.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))
    return None


if __name__ == "__main__":
    main()
