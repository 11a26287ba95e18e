"""The floor of a PCM-LoRA step with its adversarial term. Nothing of ours, no data, no logs, no clipping."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class Stop(Exception):
    """The features are there: what comes after them is not computed."""


class Head(nn.Module):
    """Two residual layers of 1 x 1 convolutions and a logit at each place, as the method has them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        normalised = [nn.GroupNorm(channels // 8, channels) for _ in range(2)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 1), norm, nn.LeakyReLU()) for norm in normalised
        )
        self.out = nn.Conv2d(channels, 1, 1)

    def forward(self, level: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 1, h, w) of features (B, C, h, w)."""
        for layer in self.layers:
            level = level + layer(level)
        return self.out(level)


def make_pcm_floor(model: Path, targets: Sequence[str], *, batch: int, edge: int, rank: int) -> Callable[[], None]:
    """Return a function that takes one step: teacher, target, student and features with backward; features, heads."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    student = [p for p in unet.parameters() if p.requires_grad]
    widths = unet.config.block_out_channels
    heads = nn.ModuleList(Head(width) for width in (*widths, widths[-1]))
    optimizer = torch.optim.AdamW(student, 1e-4, fused=True)
    of_heads = torch.optim.AdamW(heads.parameters(), 1e-5, fused=True)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    x, t, text = torch.randn(batch, 4, edge, edge), torch.full((batch,), 499), torch.randn(batch, 77, 256)
    added = {"text_embeds": torch.randn(batch, pooled), "time_ids": torch.full((batch, 6), 8.0 * edge)}
    doubled = {name: torch.cat([value, value]) for name, value in added.items()}
    seen: list[torch.Tensor] = []
    reading = [False]

    def note(module: nn.Module, args: object, output: object) -> None:
        if reading[0]:
            seen.append(output[0] if isinstance(output, tuple) else output)
            if module is unet.mid_block:
                raise Stop

    for block in (*unet.down_blocks, unet.mid_block):
        block.register_forward_hook(note)

    def features(sample: torch.Tensor) -> list[torch.Tensor]:
        reading[0] = True
        with suppress(Stop):
            unet(sample, t, text, added_cond_kwargs=added)
        found, reading[0] = list(seen), False
        seen.clear()
        return found

    def switch(on: bool) -> None:
        for layer in layers:
            layer._disable_adapters = not on

    def step() -> None:
        switch(False)
        with torch.no_grad():
            unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, text]), added_cond_kwargs=doubled)
        switch(True)
        with torch.no_grad():
            target = unet(x, t - 20, text, added_cond_kwargs=added).sample
        output = unet(x, t, text, added_cond_kwargs=added).sample
        switch(False)
        fake = features(output)
        adversarial = torch.stack([(1 - head(level)).relu().mean() for head, level in zip(heads, fake, strict=True)])
        loss = (output - target).square().mean() + 0.1 * adversarial.mean()
        loss.backward(inputs=student)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            real = features(target)
        margins = [
            (1 - head(of_real)).relu().mean() + (1 + head(of_fake.detach())).relu().mean()
            for head, of_real, of_fake in zip(heads, real, fake, strict=True)
        ]
        torch.stack(margins).mean().backward()
        of_heads.step()
        of_heads.zero_grad()

    return step
