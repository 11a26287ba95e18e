"""The same steps in one process and in several that share the networks. A script for torchrun:

    torchrun ... strategies.py OUT.json FOLDER STRATEGY float64|float32 STEPS CASE CASE*2 ...

Each case takes `STEPS` engine steps of a method on a random tiny SDXL in `FOLDER`, over as many micro-batches as stand
behind its name. OUT.json gets, by case, the losses and
gradient norms, a digest of each role's weights at the end, how many bytes of the base this process holds, and whether
the frozen weights are what they were.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from distill.core.engine.parallel import build_strategy
from distill.core.engine.processes import Processes
from distill.core.engine.shards import part_of, whole
from distill.core.plugin_api.batch import Batch, Trajectories
from distill.core.utils.strategies import ParallelSettings
from distill.distill_methods.dmd2 import DMD2
from distill.distill_methods.guidance import Guidance
from distill.distill_methods.kd import KD
from distill.distill_methods.lcm import LCM
from distill.distill_methods.meanflow import MeanFlow
from distill.distill_methods.pcm import PCM
from distill.distill_methods.progressive import Progressive
from distill.distill_methods.tcd import TCD
from support.sdxl_methods import Parts, make_parts
from support.sdxl_setup import make_batch, split

BATCH = 4
GAN = {"fake_updates_per_student_update": 2, "gan_weight": 0.1, "guidance_scale": 3.0, "divergence": "js"}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "lcm-lora": (LCM, {"w_min": 2.0, "w_max": 6.0}),
    "lcm-full": (LCM, {"w_min": 2.0, "w_max": 6.0, "model_type": "full", "ema_target": True}),
    "lcm-full-average": (LCM, {"w_min": 2.0, "w_max": 6.0, "model_type": "full", "use_ema": True}),
    "dmd2-lora": (DMD2, {**GAN, "adapt_features": True}),
    "dmd2-full": (DMD2, {**GAN, "model_type": "full", "adapt_features": True}),
    "dmd2-mixed": (DMD2, {**GAN, "fake_score": "full", "adapt_features": True}),
    "pcm-lora": (PCM, {"adversarial_weight": 0.1}),
    "pcm-full": (PCM, {"adversarial_weight": 0.1, "model_type": "full"}),
    "progressive-lora": (Progressive, {"student_steps": [8, 4], "w_min": 2.0, "w_max": 4.0}),
    "progressive-full": (Progressive, {"student_steps": [8, 4], "w_min": 2.0, "w_max": 4.0, "model_type": "full"}),
    "tcd-lora": (TCD, {"ema_target": True, "w_min": 2.0, "w_max": 4.0}),
    "tcd-full": (TCD, {"model_type": "full", "w_min": 2.0, "w_max": 4.0}),
    "guidance-lora": (Guidance, {}),
    "guidance-full": (Guidance, {"model_type": "full"}),
    "kd-lora": (KD, {}),
    "kd-full": (KD, {"model_type": "full"}),
    "meanflow-lora": (MeanFlow, {}),
    "meanflow-full": (MeanFlow, {"model_type": "full"}),
}


def trajectories(batch: Batch) -> Batch:
    """`batch` with a trajectory of four points for each sample."""
    g = torch.Generator().manual_seed(7)
    assert batch.latents is not None
    points = torch.randn(len(batch), 4, *batch.latents.shape[1:], generator=g).to(batch.latents.dtype)
    times = torch.tensor([999.0, 749.0, 499.0, 249.0], dtype=torch.float64)
    found = Trajectories(points, times, batch.latents, batch.cond)
    return Batch(batch.latents, batch.cond, batch.keys, batch.positions, trajectories=found)


def mine(batch: Batch, rank: int, world: int, *, accumulation: int = 1) -> list[Batch]:
    """This process's micro-batches of a step."""
    parts = split(batch, world * accumulation)
    if batch.trajectories is None:
        return parts[rank * accumulation : (rank + 1) * accumulation]
    whole_one, size = batch.trajectories, len(batch) // (world * accumulation)
    found = []
    for number in range(rank * accumulation, (rank + 1) * accumulation):
        cut = slice(number * size, (number + 1) * size)
        cond = {name: value[cut] for name, value in whole_one.cond.items()}
        part = Trajectories(whole_one.points[cut], whole_one.times, whole_one.data[cut], cond)
        each = parts[number]
        found.append(Batch(each.latents, each.cond, each.keys, each.positions, trajectories=part))
    return found


def run(case: str, folder: Path, strategy: Any, dtype: torch.dtype, *, steps: int) -> dict[str, Any]:
    """The steps of a case, as JSON values."""
    name, _, count = case.partition("*")
    (method, config), accumulation = CASES[name], int(count or 1)
    rank, world = strategy.processes.rank, strategy.processes.world_size
    parts = make_parts(
        method, folder, checkpointing=True, strategy=strategy, dtype=dtype, total_steps=steps, scheduler="constant",
        **config,
    )  # fmt: skip
    batch = make_batch(parts.family, BATCH, dtype=dtype)
    if method is KD:
        batch = trajectories(batch)
    frozen = {name: p.detach().clone() for name, p in frozen_weights(parts).items()}
    losses, norms = [], []
    for step in range(steps):
        result = parts.loop.step(step, mine(batch, rank, world, accumulation=accumulation)).metrics
        losses += [float(value) for name, value in result.items() if name.endswith("loss")]
        norms += [float(value) for name, value in result.items() if name.endswith("grad_norm")]
    state = parts.networks.state()
    sums = {group: digest(list(tensors.values())) for group, tensors in state.items()}
    base = list(base_weights(parts).values())
    return {
        "losses": losses, "norms": norms, "weights": sums,
        "held": sum(part_of(p).numel() for p in base),
        "of": sum(getattr(p, "ds_numel", p.numel()) for p in base),
        "frozen": all(torch.equal(p.detach(), frozen[name]) for name, p in frozen_weights(parts).items()),
    }  # fmt: skip


def frozen_weights(parts: Parts) -> dict[str, torch.Tensor]:
    """This process's parts of the base's own weights, which nothing trains."""
    return {name: part_of(p) for name, p in base_weights(parts).items()}


def base_weights(parts: Parts) -> dict[str, torch.nn.Parameter]:
    """The base's own weights, adapters aside."""
    return {
        name: p
        for name, p in parts.networks.base.named_parameters()
        if "lora_" not in name and "second_time" not in name
    }


def digest(tensors: list[torch.Tensor]) -> list[float]:
    """Sum, and sum of magnitudes, over all weights; every process must call it."""
    found = [whole(tensor).double() for tensor in tensors]
    return [sum(float(t.sum()) for t in found), sum(float(t.abs().sum()) for t in found)]


def main() -> None:
    out, folder, name, dtype, steps, *cases = sys.argv[1:]
    processes = Processes("cpu")
    found = {}
    for case in cases:
        strategy = build_strategy(processes, ParallelSettings(name))
        found[case] = run(case, Path(folder), strategy, getattr(torch, dtype), steps=int(steps))
        processes.barrier()
    if processes.main:
        Path(out).write_text(json.dumps(found))
    processes.close()


if __name__ == "__main__":
    main()
