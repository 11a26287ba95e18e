"""The floor of an LCM-LoRA step: what the method cannot do without. Nothing of ours, no data, no logs, no clipping."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer


def make_floor(model: Path, targets: Sequence[str], *, batch: int, edge: int, rank: int) -> Callable[[], None]:
    """A function that takes one step: teacher, student with backward, target, fused AdamW."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], 1e-4, fused=True)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    x, t, text = torch.randn(batch, 4, edge, edge), torch.full((batch,), 499), torch.randn(batch, 77, 256)
    added = {"text_embeds": torch.randn(batch, pooled), "time_ids": torch.full((batch, 6), 8.0 * edge)}
    doubled = {name: torch.cat([value, value]) for name, value in added.items()}

    def step() -> None:
        for layer in layers:
            layer._disable_adapters = True
        with torch.no_grad():
            unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, text]), added_cond_kwargs=doubled)
        for layer in layers:
            layer._disable_adapters = False
        student = unet(x, t, text, added_cond_kwargs=added).sample
        with torch.no_grad():
            target = unet(x, t - 20, text, added_cond_kwargs=added).sample
        (student - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
