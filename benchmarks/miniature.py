"""Train the miniature SDXL teacher that ships with the package, its captioned pictures, and its judge.

    python benchmarks/miniature.py data      # compose the training pool and write the shipped picture set
    python benchmarks/miniature.py judge     # the classifier that scores prompt agreement
    python benchmarks/miniature.py vae       # the autoencoder, then the latents of the whole pool
    python benchmarks/miniature.py unet      # tokenizers, both text encoders and the UNet, jointly; writes the teacher
    python benchmarks/miniature.py report    # the figures and picture grids of the model card

Seeds are fixed; every stage leaves its result in `--work` or in the assets. About an hour on two cores.
Needs the Noto Color Emoji font (Debian: fonts-noto-color-emoji) and fonttools, beside the package's own dependencies.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "plugins")]

import miniature_data as scenes  # noqa: E402
from judge import Judge  # noqa: E402

ASSETS = ROOT / "model_families" / "assets"
TEACHER, PICTURES = ASSETS / "sdxl_miniature", ASSETS / "emoji_scenes"
POOL_SIZE, SHIPPED_SIZE, HELD_OUT_SIZE = 60_000, 1_200, 4_000
MAX_TOKENS = 24
SIZE = scenes.RESOLUTION


def progress(message: str) -> None:
    """One line with the time of day, flushed at once."""
    print(time.strftime("%H:%M:%S"), message, flush=True)


# ---------------------------------------------------------------------------------------------------------- data


def compose_pool(count: int, seed: int, *, crop_probability: float) -> dict[str, np.ndarray]:
    """Many scenes as arrays: pixels (N, S, S, 3) uint8, captions, labels, time ids (N, 6)."""
    emoji, rng = scenes.load_emoji(), np.random.default_rng(seed)
    drawn = [scenes.compose(emoji, rng, crop_probability=crop_probability) for _ in range(count)]
    pool = {
        "pixels": np.stack([scene.pixels for scene in drawn]),
        "captions": np.array([scene.caption for scene in drawn]),
        "time_ids": np.array([(*scene.original_size, *scene.crop, SIZE, SIZE) for scene in drawn], dtype=np.float32),
    }
    return pool | {name: np.array([scene.labels[name] for scene in drawn]) for name in drawn[0].labels}


def make_data(work: Path) -> None:
    """Compose the training pool and the held-out pool, and write the picture set that ships."""
    for name, count, seed, cropped in (("pool", POOL_SIZE, 1, 0.15), ("held_out", HELD_OUT_SIZE, 2, 0.0)):
        np.savez(work / f"{name}.npz", **compose_pool(count, seed, crop_probability=cropped))  # type: ignore[arg-type]
        progress(f"{name}: {count} scenes")
    PICTURES.mkdir(parents=True, exist_ok=True)
    shipped = compose_pool(SHIPPED_SIZE, 3, crop_probability=0.0)
    for index, (pixels, caption) in enumerate(zip(shipped["pixels"], shipped["captions"], strict=True), start=1):
        Image.fromarray(pixels).save(PICTURES / f"{index:04d}.png", optimize=True)
        (PICTURES / f"{index:04d}.txt").write_text(f"{caption}\n", encoding="utf-8")
    TEACHER.mkdir(parents=True, exist_ok=True)
    (TEACHER / "prompts.txt").write_text("\n".join(scenes.prompts()) + "\n", encoding="utf-8")


def load_pool(work: Path, name: str) -> dict[str, np.ndarray]:
    """What `make_data` stored."""
    with np.load(work / f"{name}.npz") as stored:
        return dict(stored)


def to_images(pixels: np.ndarray) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, 3, S, S) in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def index_batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of indices, reshuffled every epoch."""
    generator, order, position = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long), 0
    for _ in range(steps):
        if position + batch_size > len(order):
            order, position = torch.randperm(count, generator=generator), 0
        yield order[position : position + batch_size]
        position += batch_size


def decayed(step: int, steps: int, *, warmup: int, decay_from: float) -> float:
    """Learning-rate factor: linear warm-up, constant, then a half cosine to 2 % from `decay_from` of the way on."""
    if step < warmup:
        return (step + 1) / warmup
    done = max(0.0, (step / steps - decay_from) / (1 - decay_from))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


# --------------------------------------------------------------------------------------------------------- judge


def train_judge(work: Path, *, steps: int = 3000, batch_size: int = 64) -> None:
    """Train the classifier on the pool (with slight noise and fading, so that decoded pictures are no surprise to it)."""
    torch.manual_seed(0)
    pool, held_out = load_pool(work, "pool"), load_pool(work, "held_out")
    vocabulary = {"kind": list(scenes.KINDS), "colour": list(scenes.COLOURS), "texture": list(scenes.TEXTURES)}
    judge = Judge(vocabulary, resolution=SIZE)
    progress(f"judge: {sum(p.numel() for p in judge.parameters()) / 1e6:.2f}M parameters")
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: decayed(s, steps, warmup=100, decay_from=0.1))
    labels = {name: torch.from_numpy(pool[name]) for name in vocabulary}
    for step, index in enumerate(index_batches(POOL_SIZE, batch_size, steps, seed=4)):
        images = to_images(pool["pixels"][index.numpy()])
        images = (images + torch.rand(batch_size, 1, 1, 1) * 0.04 * torch.randn_like(images)).clamp(0, 1)
        logits = judge(images)
        loss = sum(nn.functional.cross_entropy(logits[name], labels[name][index]) for name in vocabulary)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            progress(f"judge step {step} loss {loss.item():.4f}")
    judge.eval().save_pretrained(TEACHER / "judge")
    judge = Judge.from_pretrained(TEACHER / "judge")
    right = judge.agreement(to_images(held_out["pixels"]), held_out["captions"].tolist())
    progress(f"judge: {right.float().mean():.4f} of {len(right)} held-out scenes right")


# ----------------------------------------------------------------------------------------------------------- vae


def new_vae() -> AutoencoderKL:
    """The SDXL autoencoder in small: two levels (compression 2), four latent channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(24, 48),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
        force_upcast=False,
    )


def edges(images: Tensor) -> Tensor:
    """Horizontal and vertical differences, flattened."""
    return torch.cat([images.diff(dim=-1).flatten(), images.diff(dim=-2).flatten()])


def train_vae(work: Path, *, steps: int = 1400, batch_size: int = 32) -> None:
    """Train the autoencoder, measure its scale, and cache the latents of the pool."""
    torch.manual_seed(1)
    pool = load_pool(work, "pool")
    vae = new_vae().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    progress(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: decayed(s, steps, warmup=100, decay_from=0.2))
    for step, index in enumerate(index_batches(POOL_SIZE, batch_size, steps, seed=5)):
        images = to_images(pool["pixels"][index.numpy()]) * 2 - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        error = decoded - images
        loss = error.abs().mean() + 2 * error.square().mean() + 0.5 * (edges(decoded) - edges(images)).abs().mean()
        loss = loss + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            progress(f"vae step {step} loss {loss.item():.4f} psnr {psnr(decoded, images):.1f}")
    vae = vae.to(memory_format=torch.contiguous_format).half().float().eval()
    latents = encode_pool(vae, pool["pixels"])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    progress(f"vae: channel means {latents.mean((0, 2, 3)).tolist()} stds {latents.std((0, 2, 3)).tolist()}")
    vae.half().save_pretrained(TEACHER / "vae")
    np.save(work / "latents.npy", (latents * vae.config.scaling_factor).half().numpy())


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, pixels: np.ndarray) -> Tensor:
    """The mean latents of all pictures, unscaled; (N, 4, S/2, S/2)."""
    chunks = torch.arange(len(pixels)).split(500)
    return torch.cat([vae.encode(to_images(pixels[c.numpy()]) * 2 - 1).latent_dist.mean for c in chunks])


def psnr(decoded: Tensor, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return 10 * math.log10(4 / (decoded - images).square().mean().item())


if __name__ == "__main__":
    work = Path("/work/scratch/mini")
    torch.set_num_threads(2)
    globals()[sys.argv[1]](work)
