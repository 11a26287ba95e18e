"""A random CLIP in transformers' layout, whose processor only scales and norms images of its own size."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from .tiny_sdxl import text_config, write_tokenizer

EDGE = 32
"""Pixels along an edge of its images."""


def write_tiny_clip(folder: Path) -> Path:
    """Write it into `folder`, and return that."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    write_tokenizer(folder, pad="<|endoftext|>")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": EDGE, "patch_size": 8}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CLIPModel(
            CLIPConfig(text_config=text_config(32, "quick_gelu").to_dict(), vision_config=vision, projection_dim=24)
        )
        for weight in model.parameters():
            weight.data.add_(0.2 * torch.randn(weight.shape))
        model.logit_scale.data = torch.tensor(math.log(10.0))
    model.save_pretrained(folder)
    size = {"height": EDGE, "width": EDGE}
    CLIPImageProcessor(size={"shortest_edge": EDGE}, crop_size=size).save_pretrained(folder)
    return folder
