"""LCM-LoRA of an SDXL in plain torch, diffusers and peft, written from the paper: nothing of distill is imported here.

It keeps the conventions of diffusers' script for it (``train_lcm_distill_lora_sdxl_wds.py``): two copies of the UNet,
the teacher called once with and once without the prompt, w of cond + w (cond - uncond), the student as its own target.

References:
    Luo et al., Latent Consistency Models, arXiv 2310.04378.
    Luo et al., LCM-LoRA, arXiv 2311.05556.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor

TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The script's arguments, under its names, with its defaults."""

    lora_rank: int = 64
    lora_alpha: int = 64
    learning_rate: float = 1e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    num_ddim_timesteps: int = 50
    w_min: float = 3.0
    w_max: float = 15.0
    huber_c: float = 0.001
    timestep_scaling_factor: float = 10.0


@dataclass(frozen=True)
class Inputs:
    """A batch: latents (B, C, h, w), prompt embeddings (B, 77, D), pooled (B, P), time ids (B, 6)."""

    latents: Tensor
    prompt_embeds: Tensor
    pooled: Tensor
    time_ids: Tensor


class PlainLcmLora:
    """Teacher, student and optimizer; `seed` decides the adapter's first weights."""

    def __init__(self, model: Path, settings: Settings, *, seed: int) -> None:
        self.settings = settings
        self.teacher = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
        unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
        adapter = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=TARGETS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.student = get_peft_model(unet, adapter)
        self.student.train()
        self.weights = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.weights.values(),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay,
            eps=settings.adam_epsilon,
        )
        self.noise = DDPMScheduler.from_pretrained(model, subfolder="scheduler").config
        self.use_table(torch.float32)

    def use_table(self, dtype: torch.dtype) -> None:
        """Compute alpha and sigma of all times in this type; in float32 they are ``DDPMScheduler``'s own."""
        noise = self.noise
        assert noise.beta_schedule == "scaled_linear"
        roots = torch.linspace(noise.beta_start**0.5, noise.beta_end**0.5, noise.num_train_timesteps, dtype=dtype)
        bar = torch.cumprod(1 - roots**2, dim=0)
        self.alpha, self.sigma = bar.sqrt(), (1 - bar).sqrt()

    def step(self, inputs: Inputs, *, index: Tensor, noise: Tensor, w: Tensor, learning_rate: float) -> float:
        """Take one optimizer step; return its loss.

        Args:
            inputs: The batch.
            index: Numbers of the grid's times, (B,).
            noise: Of the latents' shape.
            w: Guidance as the paper counts it, (B,).
            learning_rate: Of this step.
        """
        loss = self.loss(inputs, index=index, noise=noise, w=w)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self.settings.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def loss(self, inputs: Inputs, *, index: Tensor, noise: Tensor, w: Tensor) -> Tensor:
        """Return the Huber loss of one batch; arguments are those of :meth:`step`."""
        stride = 1000 // self.settings.num_ddim_timesteps
        start = (index + 1) * stride - 1
        end = (start - stride).clamp(min=0)
        alpha, sigma = self.at(start)
        noisy = alpha * inputs.latents + sigma * noise
        output = self.consistent(noisy, start, inputs)
        with torch.no_grad():
            cond = self.call(self.teacher, noisy, start, inputs)
            nothing = Inputs(
                inputs.latents,
                torch.zeros_like(inputs.prompt_embeds),
                torch.zeros_like(inputs.pooled),
                inputs.time_ids,
            )
            uncond = self.call(self.teacher, noisy, start, nothing)
            eps = cond + w.to(cond.dtype).view(-1, 1, 1, 1) * (cond - uncond)
            alpha_end, sigma_end = self.at(end)
            before = alpha_end * (noisy - sigma * eps) / alpha + sigma_end * eps
            target = self.consistent(before, end, inputs)
        c = self.settings.huber_c
        return torch.mean(torch.sqrt((output - target) ** 2 + c**2) - c)

    def consistent(self, x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        """Return c_skip x + c_out x_0 of the student."""
        alpha, sigma = self.at(t)
        clean = (x - sigma * self.call(self.student, x, t, inputs)) / alpha
        scaled = self.settings.timestep_scaling_factor * t.to(x.dtype).view(-1, 1, 1, 1)
        return 0.25 / (scaled**2 + 0.25) * x + scaled / (scaled**2 + 0.25) ** 0.5 * clean

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of the times, each (B, 1, 1, 1)."""
        return self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    @staticmethod
    def call(unet: torch.nn.Module, x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        """Return what the network predicts."""
        added = {"text_embeds": inputs.pooled, "time_ids": inputs.time_ids}
        return unet(x, t, encoder_hidden_states=inputs.prompt_embeds, added_cond_kwargs=added).sample

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take these weights, by the names of :attr:`weights`."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """Write the adapter for ``load_lora_weights``."""
        state = get_peft_model_state_dict(self.student)
        layers = {name.removeprefix("base_model.model."): weight for name, weight in state.items()}
        StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers)
