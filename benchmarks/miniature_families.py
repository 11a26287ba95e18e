"""Train the miniature teacher of z-image, of 32 px: scenes, autoencoder, judge are those of that SDXL.

    python benchmarks/miniature.py data --assets build/scratch   # the training pool, if it is not there
    python benchmarks/miniature_families.py z-image              # one stream on a flow, a language model, from scratch
    python benchmarks/miniature_families.py report               # the figures and image grids of the model card

Seeds are fixed; a training that was interrupted goes on from `<work>/<family>.pt`. Needs what `miniature.py` needs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

import miniature  # noqa: E402
from miniature_speed import compile_blocks, half_precision  # noqa: E402
from miniature_teachers import Scenes, Teacher  # noqa: E402
from miniature_z_image import ZImageTeacher  # noqa: E402

TEACHERS: dict[str, tuple[type[Teacher], dict[str, Any]]] = {
    "z-image": (ZImageTeacher, {"steps": 12000, "peak": 1e-3, "seed": 13, "batch_size": 64, "muon": True}),
}
"""Family -> its teacher, and how it is trained."""


def train(
    family: str,
    work: Path,
    *,
    steps: int | None,
    device: str,
    half: bool = False,
    compiled: bool = False,
    begin: Path | None = None,
    peak: float | None = None,
) -> None:
    """Train the family's miniature and write it to the assets; with bf16 products, and compiled blocks, if asked.

    Without a state of its own in `work` it begins with the weights in `begin`, a folder of each part's safetensors.
    """
    kind, settings = TEACHERS[family]
    settings = {**settings, "steps": steps or settings["steps"], "peak": peak or settings["peak"]}
    torch.manual_seed(settings["seed"])
    torch.set_float32_matmul_precision("high")  # tf32, on devices that have it
    scenes = Scenes(work, device)
    teacher = kind(scenes).to(device)

    if begin is not None:
        for file in begin.glob("*/*.safetensors"):
            teacher.begin(file.parent.name, load_file(file))
    if compiled:
        compile_blocks(teacher.blocks())

    def loss(index: Tensor) -> Tensor:
        with half_precision(half, device):
            return teacher.loss(*scenes.batch(index, 0.12))

    settings |= {"horizon": settings["steps"], "resume": work / f"{family}.pt"}
    miniature.fit(teacher, loss, lambda average: average.save(), **settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*TEACHERS, "report"))
    parser.add_argument("--family", choices=tuple(TEACHERS), default="z-image", help="whose report")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "miniature", help="folder for what does not ship")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="as `cuda`, where there is one")
    parser.add_argument("--half", action="store_true", help="bf16 products: faster on processors with AMX")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser's blocks (z-image)")
    parser.add_argument("--begin", type=Path, help="folder of weights to begin with, PART/*.safetensors")
    parser.add_argument("--steps", type=int, help="training steps, in place of the stage's own number")
    parser.add_argument("--peak", type=float, help="highest learning rate, in place of the stage's own")
    parser.add_argument("--samples", type=int, default=1000, help="images per row of the report")
    parser.add_argument("--guidance", type=float, help="of the report, in place of the miniature's own")
    parser.add_argument("--sampler-steps", default="1,2,4,8,50", help="rows of the report")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.stage != "report":
        kinds = {"half": given.half, "compiled": given.compile, "begin": given.begin, "peak": given.peak}
        train(given.stage, given.work, steps=given.steps, device=given.device, **kinds)
        return
    kind, _ = TEACHERS[given.family]
    counts = [int(count) for count in given.sampler_steps.split(",")]
    guidance = given.guidance or kind.guidance
    work = given.work / given.family
    work.mkdir(parents=True, exist_ok=True)
    shutil.copy(given.work / "held_out.npz", work / "held_out.npz")
    miniature.report(work, kind.folder, samples=given.samples, guidance=guidance, step_counts=counts, call=kind.call)


if __name__ == "__main__":
    main()
