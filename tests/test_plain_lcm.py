"""The command's LCM-LoRA against a plain loop of torch, diffusers and peft: the same batches and draws, ten steps.

In float64, so that rounding hides nothing: Adam's first steps have the size of the rate whatever the gradient's, and an
element whose gradient is nearly zero goes up in one loop and down in the other in float32.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler
from distill.core.plugin_api.batch import Batch
from distill.core.utils.seeds import RngStreams, derive_seed
from distill.distill_methods.lcm import LCM
from distill.model_families.sdxl import SDXL
from safetensors.torch import load_file
from support.config_files import distill
from support.plain_lcm import Inputs, PlainLcmLora, Settings
from torch import Tensor

STEPS, SEED, RANK, GRID, RATE, LAST_RATE, WARMUP = 10, 3, 16, 50, 1e-3, 1e-4, 3
GUIDANCE = (5.0, 8.0)
"""Of the miniature's recipe."""
SETTINGS = {
    "max_train_steps": STEPS, "seed": SEED, "lora_rank": RANK, "train_batch_size": 4, "learning_rate": RATE,
    "lr_scheduler": "linear", "lr_warmup_steps": WARMUP, "lr_end": LAST_RATE, "use_ema": True, "ema_decay": 0.9,
    "export_online_weights": True, "distillation_config.lcm.num_ddim_timesteps": GRID,
    "data.scenes.max_num_samples": 16, "data.scenes.random_flip": True, "validation_step_interval": 0,
    "evaluation_num_samples": 0, "checkpoint_step_interval": 0, "report_to": "none",
}  # fmt: skip


@dataclass
class Recorded:
    """Steps of the command: what each was given, and the adapter before it."""

    folder: Path
    batches: list[Batch]
    weights: list[dict[str, Tensor]]

    @property
    def losses(self) -> list[float]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Ten steps of `distill run` on the miniature, its networks turned into float64 before the first."""
    folder, batches, weights = tmp_path_factory.mktemp("ours") / "out", [], []
    original = LCM.updates

    def updates(method, context, batch, step):
        networks = context._runtime.networks
        weights.append({name: w.detach().clone() for name, w in networks.named_parameters("student").items()})
        networks.base.double()
        cond = {name: value.double() for name, value in batch.cond.items()}
        batch = dataclasses.replace(batch, latents=batch.latents.double(), cond=cond)
        batches.append(batch)
        yield from original(method, context, batch, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LCM, "updates", updates)
        words = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
        result = distill("run", "--method", "lcm", "--family", "sdxl", "--output-dir", folder, *words)
    assert result.exit_code == 0, result.output
    return Recorded(folder, batches, weights)


@pytest.fixture(scope="module")
def plain():
    settings = Settings(lora_rank=RANK, lora_alpha=RANK, w_min=2.0, w_max=4.0, num_ddim_timesteps=GRID)
    return PlainLcmLora(SDXL.miniature, settings, seed=derive_seed(SEED, "lora", "student"))


def named(weights: dict[str, Tensor], *, adapter: str) -> dict[str, Tensor]:
    """The adapter's weights by the names of the file."""
    short = {name.removeprefix("base_model.model.").replace(f".{adapter}.", "."): w for name, w in weights.items()}
    return {f"unet.{name}": weight.detach().clone() for name, weight in short.items()}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of a weight."""
    assert set(ours) == set(theirs)
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours)


def rate(step: int) -> float:
    """Three steps of warm-up from zero, then along a line to its end."""
    if step < WARMUP:
        return RATE * step / WARMUP
    return LAST_RATE + (RATE - LAST_RATE) * (1 - (step - WARMUP) / (STEPS - WARMUP))


def test_ten_steps_are_those_of_the_plain_loop(ours, plain):
    """Modules, first weights, losses, each step's weights, the average and what is exported."""
    assert len(ours.batches) == len(ours.losses) == STEPS
    start = named(ours.weights[0], adapter="student")
    assert distance(start, named(plain.weights, adapter="default")) == 0, "the same modules and first weights"
    plain.teacher.double()
    plain.student.double()
    plain.use_table(torch.float64)
    average = named(plain.weights, adapter="default")
    for step, (batch, loss) in enumerate(zip(ours.batches, ours.losses, strict=True)):
        before = named(ours.weights[step], adapter="student")
        assert distance(before, named(plain.weights, adapter="default")) < 1e-9, f"before step {step}"
        draws, cond = RngStreams(SEED, step, batch.positions), batch.cond
        own = plain.step(
            Inputs(batch.latents, cond["prompt_embeds"], cond["pooled_prompt_embeds"], cond["time_ids"]),
            index=draws.integers("index", GRID),
            noise=draws.randn("noise", batch.latents.shape[1:]).double(),
            w=draws.uniform("w", *GUIDANCE) - 1,
            learning_rate=rate(step),
        )
        assert loss == pytest.approx(own, rel=1e-10)
        average = {name: average[name].lerp(w, 0.1) for name, w in named(plain.weights, adapter="default").items()}
    file = "pytorch_lora_weights.safetensors"
    last = named(plain.weights, adapter="default")
    assert distance(last, start) > 1e-3, "it was trained"
    assert distance(load_file(ours.folder / "student-online" / file), last) < 1e-9
    assert distance(load_file(ours.folder / "student" / file), average) < 1e-7  # the average is kept in float32


def test_the_exported_sampler_is_the_one_that_the_script_makes_of_the_model(ours):
    """First times, noise levels and boundary of LCMScheduler, at one step as at eight."""
    student = LCMScheduler.from_pretrained(ours.folder / "student" / "scheduler")
    script = LCMScheduler.from_pretrained(SDXL.miniature / "scheduler")
    assert torch.equal(student.alphas_cumprod, script.alphas_cumprod)
    assert student.final_alpha_cumprod == script.final_alpha_cumprod
    x, output = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for steps, first in ((1, [999]), (2, [999, 499]), (4, [999, 759, 499, 259]), (8, [999])):
        for scheduler in (student, script):
            scheduler.set_timesteps(steps)
        assert student.timesteps.tolist()[: len(first)] == first
        assert torch.equal(student.timesteps, script.timesteps)
        results = []
        for scheduler in (student, script):
            g = torch.Generator().manual_seed(1)
            results.append(scheduler.step(output, scheduler.timesteps[0], x, generator=g))
        assert torch.equal(results[0].prev_sample, results[1].prev_sample)
        assert torch.equal(results[0].denoised, results[1].denoised)
