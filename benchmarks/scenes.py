"""Train the miniature SDXL of scenes: 64 px, two or three things, a place, a time of day; and the judge of its images.

    python benchmarks/scenes.py data      # compose the pool, and write the image set that ships
    python benchmarks/scenes.py vae       # the autoencoder (compression 4), then the latents of the whole pool
    python benchmarks/scenes.py judge     # what finds things, colours, places and times, and rates an image's quality
    python benchmarks/scenes.py text      # both text encoders, on what captions say
    python benchmarks/scenes.py unet      # text encoders and UNet, jointly; goes on where it was interrupted
    python benchmarks/scenes.py report    # the figures and image grids of the model card

`torchrun --standalone --nproc_per_node 2 benchmarks/scenes.py unet --threads 1 ...` halves every batch between two
processes: on two cores 0.53 s a step in place of 0.88. `scenes_sides.py` mends a UNet that takes left for right.

Seeds are fixed; each stage leaves its result in `--work` or in the assets. Needs the Noto Color Emoji font (Debian:
fonts-noto-color-emoji) and fonttools, beside the package's own dependencies.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from distill.plugins.scene_judge import SceneJudge, Seen, Words
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

import miniature  # noqa: E402
import scenes_data as scenes  # noqa: E402
import scenes_networks as networks  # noqa: E402
from miniature import decayed, index_batches, progress, psnr, reconstruction_loss, to_images  # noqa: E402
from miniature_networks import load_teacher, new_scheduler, new_tokenizer, save_teacher  # noqa: E402
from miniature_speed import half_precision  # noqa: E402

POOL_SIZE, HELD_OUT_SIZE, SHIPPED_SIZE = 80_000, 4_000, 1_200
CHUNKS = 16
TEACHER, IMAGES = miniature.ASSETS / "sdxl_scenes", miniature.ASSETS / "scenes"
TOKENIZERS = {"endoftext": "<|endoftext|>", "bang": "!"}
"""Folder of each encoder's tokenizer, and what it pads with."""
DEVICE = "cpu"


# ---------------------------------------------------------------------------------------------------------- data


def compose_chunk(seed: tuple[int, int], count: int, crop_probability: float) -> dict[str, np.ndarray]:
    """Scenes as arrays: pixels (N, S, S, 3) uint8, captions, things (N, 3, 5), place, time, time ids (N, 6).

    Of a thing: kind, colour, x, y, size; -1 where there is no third.
    """
    sprites, rng = scenes.load_sprites(), np.random.default_rng(seed)
    drawn = [scenes.compose(sprites, rng, crop_probability=crop_probability) for _ in range(count)]
    things = np.full((count, 3, 5), -1, np.float32)
    for row, scene in zip(things, drawn, strict=True):
        for slot, thing in zip(row, scene.things, strict=False):
            slot[:] = (thing.kind, thing.colour, thing.x, thing.y, thing.size)
    ends = (scenes.RESOLUTION, scenes.RESOLUTION)
    return {
        "pixels": np.stack([scene.pixels for scene in drawn]),
        "captions": np.array([scene.caption for scene in drawn]),
        "things": things,
        "place": np.array([scene.place for scene in drawn]),
        "time": np.array([scene.time for scene in drawn]),
        "time_ids": np.array([(*scene.original_size, *scene.crop, *ends) for scene in drawn], dtype=np.float32),
    }


def make_data(work: Path) -> None:
    """Compose the pool and the held-out scenes, and write the image set that ships."""
    for name, count, seed, cropped in (("held_out", HELD_OUT_SIZE, 2, 0.0), ("pool", POOL_SIZE, 1, 0.12)):
        with Pool() as processes:
            jobs = [((seed, chunk), count // CHUNKS, cropped) for chunk in range(CHUNKS)]
            chunks = processes.starmap(compose_chunk, jobs)
        for key in chunks[0]:
            np.save(work / f"{name}_{key}.npy", np.concatenate([chunk[key] for chunk in chunks]))
        progress(f"{name}: {count} scenes")
    shipped = compose_chunk((3, 0), SHIPPED_SIZE, 0.0)
    IMAGES.mkdir(parents=True, exist_ok=True)
    for index, (pixels, caption) in enumerate(zip(shipped["pixels"], shipped["captions"], strict=True), start=1):
        Image.fromarray(pixels).save(IMAGES / f"{index:04d}.png", optimize=True)
        (IMAGES / f"{index:04d}.txt").write_text(f"{caption}\n", encoding="utf-8")


def load(work: Path, name: str, key: str) -> np.ndarray:
    """One array of what `make_data` stored, mapped into memory."""
    return np.load(work / f"{name}_{key}.npy", mmap_mode="r")


def images_of(pixels: np.ndarray, index: Tensor) -> Tensor:
    """Images (B, 3, S, S) in [0, 1] of the pool's pixels with these indices (B,)."""
    return to_images(pixels[index.cpu().numpy()]).to(DEVICE).contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------------- vae


def train_vae(work: Path, *, steps: int, batch_size: int = 16, half: bool = False, begin: Path | None = None) -> None:
    """Train the autoencoder, measure its scale, and cache the latents of the pool."""
    torch.manual_seed(1)
    pixels = load(work, "pool", "pixels")
    vae = networks.new_vae().to(DEVICE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if begin is not None:  # what fits of another autoencoder's weights
        old, new = AutoencoderKL.from_pretrained(begin).state_dict(), vae.state_dict()
        vae.load_state_dict(new | {k: v for k, v in old.items() if v.shape == new[k].shape})
    progress(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: decayed(s, steps, warmup=100, decay_from=0.3))
    for step, index in enumerate(index_batches(len(pixels), batch_size, steps, seed=5)):
        images = images_of(pixels, index) * 2 - 1
        if step < 0.85 * steps:  # a quarter of each image: four times as many steps for the same work
            top, left = torch.randint(0, scenes.RESOLUTION // 2 + 1, (2,)).tolist()
            images = images[..., top : top + scenes.RESOLUTION // 2, left : left + scenes.RESOLUTION // 2]
            images = images.contiguous(memory_format=torch.channels_last)
        with half_precision(half, DEVICE):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        loss = reconstruction_loss(decoded, images) + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            progress(f"vae step {step} loss {loss.item():.4f} psnr {psnr(decoded, images):.1f}")
            vae.save_pretrained(work / "vae")
    vae = vae.to(memory_format=torch.contiguous_format).half().float().eval()
    latents = encode_pool(vae, pixels)
    scale = round(1 / latents.std().item(), 5)
    vae.register_to_config(scaling_factor=scale)
    progress(f"vae: channel means {latents.mean((0, 2, 3)).tolist()} stds {latents.std((0, 2, 3)).tolist()}")
    np.save(work / "pool_latents.npy", (latents * scale).half().numpy())
    held_out = load(work, "held_out", "pixels")[:1000]
    again = decode(vae, encode_pool(vae, held_out) * scale)
    progress(f"vae: held-out psnr {psnr(again * 2, to_images(held_out) * 2):.2f}")
    pairs = [to_images(held_out[:48]), again[:48]]
    miniature.image_grid(torch.cat(pairs), 12, enlarge=2).save(work / "reconstructions.png")
    vae.half().save_pretrained(TEACHER / "vae")


def load_vae() -> AutoencoderKL:
    """The autoencoder as it ships, in float32."""
    return AutoencoderKL.from_pretrained(TEACHER / "vae", torch_dtype=torch.float32).eval().to(DEVICE)


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, pixels: np.ndarray) -> Tensor:
    """The mean latents of all images, unscaled; (N, C, S/4, S/4)."""
    chunks = torch.arange(len(pixels)).split(200)
    return torch.cat([vae.encode(images_of(pixels, chunk) * 2 - 1).latent_dist.mean.cpu() for chunk in chunks])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents -> images in [0, 1]."""
    pieces = [vae.decode(piece.to(DEVICE) / vae.config.scaling_factor).sample for piece in latents.split(100)]
    return (torch.cat(pieces) / 2 + 0.5).clamp(0, 1)


# --------------------------------------------------------------------------------------------------------- judge


def judge_words() -> Words:
    """What the captions of the scenes can mention."""
    return Words(
        kinds=tuple(scenes.KINDS),
        colours=tuple(scenes.COLOURS),
        relations={
            phrase: scenes.RELATIONS[name] for name, phrases in scenes.RELATION_WORDS.items() for phrase in phrases
        },
        locations=tuple(words for words, *_ in scenes.PLACES.values()),
        times=tuple(words for words, *_ in scenes.TIMES.values()),
    )


class Degraded:
    """Images that are blurred, noisy, blended or decoded from noisy latents, by a severity in [0, 1]."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae

    def decoded(self, latents: Tensor, severity: Tensor) -> Tensor:
        """Images of latents that are mixed with their neighbours' and with noise; (B, 3, S, S)."""
        strength = severity[:, None, None, None]
        blend = 0.5 * strength * (torch.rand(len(latents), 1, 1, 1) < 0.5)
        mixed = latents * (1 - blend) + latents.roll(1, 0) * blend
        return decode(self.vae, mixed + 0.7 * strength * (torch.rand_like(strength) < 0.7) * torch.randn_like(mixed))

    @staticmethod
    def pixels(images: Tensor, severity: Tensor) -> Tensor:
        """Images that are blurred, or noisy, or both."""
        strength = severity[:, None, None, None]
        choice = torch.rand(len(images), 1, 1, 1)
        noisy = images + 0.25 * strength * (choice < 0.6) * torch.randn_like(images)
        return blurred(noisy, 2.2 * severity * (choice[:, 0, 0, 0] > 0.4)).clamp(0, 1)


def blurred(images: Tensor, deviation: Tensor) -> Tensor:
    """Images (B, 3, S, S) under a Gaussian of this standard deviation (B,) in pixels each."""
    reach = torch.arange(-6, 7, dtype=torch.float32)
    weights = torch.exp(-(reach**2) / (2 * deviation.clamp(min=1e-3)[:, None] ** 2))
    weights = (weights / weights.sum(dim=1, keepdim=True)).repeat_interleave(3, 0)
    flat = nn.functional.pad(images.reshape(1, -1, *images.shape[2:]), (6, 6, 6, 6), mode="replicate")
    flat = nn.functional.conv2d(flat, weights[:, None, None, :], groups=len(weights))
    return nn.functional.conv2d(flat, weights[:, None, :, None], groups=len(weights)).view_as(images)


def judge_loss(judge: SceneJudge, images: Tensor, severity: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """Focal loss of the centres (arXiv 1904.07850), cross entropies of the rest; what is degraded weighs less."""
    seen = Seen(*(value.float() for value in judge(images)))
    weight = (1 - 1.5 * severity).clamp(min=0)
    scale = seen.kinds.shape[-1] / scenes.RESOLUTION
    things = labels["things"]
    there = things[..., 0] >= 0
    kind, colour = things[..., 0].long().clamp(min=0), things[..., 1].long().clamp(min=0)
    centre = things[..., 2:4] * scale - 0.5
    cells = torch.arange(seen.kinds.shape[-1])
    spread = [torch.exp(-((cells - centre[..., axis, None]) ** 2) / 1.2) for axis in (0, 1)]
    bumps = spread[1][..., :, None] * spread[0][..., None, :] * there[..., None, None]
    target = torch.zeros_like(seen.kinds).scatter_reduce_(
        1, kind[..., None, None].expand_as(bumps), bumps, "amax"
    )  # (B, K, h, h)
    rounded = centre.round().long().clamp(0, len(cells) - 1)
    flat = rounded[..., 1] * len(cells) + rounded[..., 0]
    peak = torch.zeros_like(seen.kinds).flatten(2)
    rows = torch.arange(len(things))[:, None].expand_as(kind)
    peak[rows[there], kind[there], flat[there]] = 1
    peak = peak.view_as(seen.kinds)
    p = seen.kinds.sigmoid().clamp(1e-5, 1 - 1e-5)
    focal = -(peak * (1 - p) ** 2 * p.log() + (1 - peak) * (1 - target).clamp(min=0) ** 4 * p**2 * (1 - p).log())
    loss = (focal.sum(dim=(1, 2, 3)) * weight).mean() / 2
    at_centre = seen.colours.flatten(2)[rows[there], :, flat[there]]
    each = nn.functional.cross_entropy(at_centre, colour[there], reduction="none")
    loss = loss + (each * weight[rows[there]]).mean()
    for logits, name in ((seen.place, "place"), (seen.time, "time")):
        loss = loss + (nn.functional.cross_entropy(logits, labels[name], reduction="none") * weight).mean()
    return loss + nn.functional.binary_cross_entropy_with_logits(seen.quality, 1 - severity)


def train_judge(work: Path, *, steps: int, batch_size: int = 48, half: bool = False) -> None:
    """Train the judge on the pool: a third as it is, a third through the autoencoder, a third degraded."""
    torch.manual_seed(0)
    judge, vae = SceneJudge(judge_words()).to(DEVICE).to(memory_format=torch.channels_last), load_vae()  # type: ignore[call-overload]
    progress(f"judge: {sum(p.numel() for p in judge.parameters()) / 1e6:.2f}M parameters")
    pixels, latents = load(work, "pool", "pixels"), load(work, "pool", "latents")
    labels = {name: torch.tensor(load(work, "pool", name), device=DEVICE) for name in ("things", "place", "time")}
    degraded, third = Degraded(vae), batch_size // 3
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: decayed(s, steps, warmup=100, decay_from=0.2))
    for step, index in enumerate(index_batches(len(pixels), batch_size, steps, seed=4)):
        severity = torch.cat([torch.zeros(third * 2), torch.rand(batch_size - 2 * third)])
        stored = torch.from_numpy(latents[index[third : 2 * third + third // 2].numpy()]).to(DEVICE).float()
        again = degraded.decoded(stored, severity[third : 2 * third + third // 2])
        plain, rest = images_of(pixels, index[:third]), images_of(pixels, index[2 * third + third // 2 :])
        images = torch.cat([plain, again, degraded.pixels(rest, severity[2 * third + third // 2 :])])
        images = (images + 0.015 * torch.rand(batch_size, 1, 1, 1) * torch.randn_like(images)).clamp(0, 1)
        with half_precision(half, DEVICE):
            seen = judge_loss(judge, images, severity, {name: value[index] for name, value in labels.items()})
        optimizer.zero_grad()
        seen.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            progress(f"judge step {step} loss {seen.item():.4f}")
    judge.to(memory_format=torch.contiguous_format).eval().save_pretrained(TEACHER / "judge")  # type: ignore[call-overload]


def judge_figures(work: Path) -> dict[str, Any]:
    """How often the judge is right on held-out scenes, by question, and what blur and noise do to its scores."""
    judge, vae = SceneJudge.from_pretrained(TEACHER / "judge"), load_vae()
    pixels, captions = load(work, "held_out", "pixels"), load(work, "held_out", "captions").tolist()
    real = to_images(np.array(pixels))
    again = decode(vae, encode_pool(vae, pixels[:1000]) * vae.config.scaling_factor)
    figures: dict[str, Any] = {}
    for name, images in (("held_out", real), ("through_the_autoencoder", again)):
        batches = [slice(start, start + 250) for start in range(0, len(images), 250)]
        parts = [judge.answers(images[batch], captions[batch]) for batch in batches]
        answers = {question: torch.cat([part[question] for part in parts]) for question in parts[0]}
        figures[name] = {q: (v == 1).sum().item() / (v >= 0).sum().item() for q, v in answers.items()}
        figures[name]["all"] = torch.stack([v != 0 for v in answers.values()]).all(dim=0).float().mean().item()
        others = [*captions[1:], captions[0]]
        wrong = torch.cat([judge.agreement(images[batch], others[batch]) for batch in batches])
        figures[name]["right_by_another_caption"] = wrong.float().mean().item()
    whole = judge.features(real[2000:])
    for name, change in (("blur", lambda x, s: blurred(x, torch.full((len(x),), 2.2 * s))),
                         ("noise", lambda x, s: (x + 0.25 * s * torch.randn_like(x)).clamp(0, 1))):  # fmt: skip
        rows = []
        for severity in (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0):
            changed = torch.cat([change(part, severity) for part in real[:1000].split(250)])
            distance = miniature.frechet(judge.features(changed), whole)
            agreed = judge.agreement(changed, captions[:1000]).float().mean().item()
            rows.append((severity, judge.rate(changed).mean().item(), distance, agreed))
        figures[name] = {"severity, quality, distance, agreement": rows}
    progress(json.dumps(figures, indent=1))
    return figures


# ---------------------------------------------------------------------------------------------------------- text


class Captioned:
    """The pool as training sees it: latents, time ids, and the tokens of each sample's caption for both encoders."""

    def __init__(self, work: Path) -> None:
        self.captions = load(work, "pool", "captions").tolist()
        self.latents = load(work, "pool", "latents") if (work / "pool_latents.npy").is_file() else None
        self.time_ids = torch.tensor(load(work, "pool", "time_ids"), device=DEVICE)
        made = work / "tokenizers"
        learned = self.captions[:20_000]
        self.tokenizers = tuple(
            networks.CLIPTokenizer.from_pretrained(made / name) if (made / name).is_dir()
            else new_tokenizer(learned, pad, networks.MAX_TOKENS) for name, pad in TOKENIZERS.items()
        )  # fmt: skip
        self.tokens = tuple(self._tokens(work / f"pool_tokens_{n}.npy", t) for n, t in enumerate(self.tokenizers))

    def _tokens(self, stored: Path, tokenizer: Any) -> Tensor:
        if not stored.is_file():
            longest = max(len(ids) for ids in tokenizer(self.captions[:20_000]).input_ids)
            assert longest <= networks.MAX_TOKENS - networks.REGISTERS, f"captions have {longest} tokens"
            kinds = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
            written = stored.with_name(f"{os.getpid()}_{stored.name}")  # of two processes each writes its own
            np.save(written, tokenizer(self.captions, **kinds).input_ids)
            written.replace(stored)
        return torch.from_numpy(np.load(stored)).to(DEVICE)

    def batch(self, index: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Latents (B, C, h, w), both encoders' tokens (B, T), time ids (B, 6)."""
        assert self.latents is not None, "the autoencoder comes first"
        latents = torch.from_numpy(self.latents[index.cpu().numpy()]).to(DEVICE).float()
        return latents, (self.tokens[0][index], self.tokens[1][index]), self.time_ids[index]


class Reading(nn.Module):
    """Linear heads that read off the text's states what a caption asks for; used to begin both encoders only.

    The last states of a padded caption follow all its words. One is to hold the first thing, one the second, one the
    third and one the place and the time, so that the UNet's attention finds bound together what belongs together.
    """

    def __init__(self, words: Words) -> None:
        super().__init__()
        width = networks.TEXT_WIDTH
        self.sizes = (
            len(words.kinds),
            len(words.colours),
            len(scenes.RELATIONS),
            len(words.locations),
            len(words.times),
        )
        outputs = sum(size + 1 for size in self.sizes)
        self.registers = nn.ModuleList(nn.Linear(width, outputs) for _ in range(2 * networks.REGISTERS))
        self.pooled = nn.ModuleList(nn.Linear(networks.POOLED, outputs) for _ in range(networks.REGISTERS))

    def forward(self, states: Tensor, pooled: Tensor) -> list[Tensor]:
        """Logits (B, outputs) of each register, by either encoder and by the pooled text."""
        tail = states[:, -networks.REGISTERS :]
        halves = tail.split(networks.TEXT_WIDTH, dim=-1)
        each = [half[:, register] for register in range(networks.REGISTERS) for half in halves]
        logits = [head(state) for head, state in zip(self.registers, each, strict=True)]
        return logits + [head(pooled) for head in self.pooled]

    def loss(self, states: Tensor, pooled: Tensor, asked: Tensor) -> Tensor:
        """Cross entropy; asked is (B, REGISTERS, 5): kind, colour, direction, place, time, -1 where left open."""
        logits, count = self(states, pooled), networks.REGISTERS
        order = [register for register in range(count) for _ in range(2)] + list(range(count))
        losses = [
            nn.functional.cross_entropy(part, asked[:, register, column] + 1)
            for one, register in zip(logits, order, strict=True)
            for column, part in enumerate(one.split([size + 1 for size in self.sizes], dim=-1))
        ]
        return torch.stack(losses).sum() / len(order)


def asked_of(captions: Sequence[str], words: Words) -> Tensor:
    """What captions ask of each register (N, REGISTERS, 5): kind, colour, direction, place, time; -1 where open."""
    ways, rows = list(scenes.RELATIONS.values()), np.full((len(captions), networks.REGISTERS, 5), -1, np.int64)
    for row, caption in zip(rows, captions, strict=True):
        asked = words.read(caption)
        for register, thing in enumerate(asked.things):
            row[register, :2] = thing.kind, -1 if thing.colour is None else thing.colour
        if asked.relation is not None:
            x, y = asked.relation
            row[0, 2], row[1, 2] = ways.index((x, y)), ways.index((-x, -y))
        row[3, 3:] = -1 if asked.place is None else asked.place, -1 if asked.time is None else asked.time
    return torch.from_numpy(rows)


def train_text(work: Path, *, steps: int, batch_size: int = 128) -> None:
    """Teach both text encoders to gather what a caption says, before any image is seen."""
    torch.manual_seed(4)
    data, words = Captioned(work), judge_words()
    for tokenizer, name in zip(data.tokenizers, TOKENIZERS, strict=True):
        tokenizer.save_pretrained(work / "tokenizers" / name)
    asked = asked_of(data.captions, words).to(DEVICE)
    teacher, reading = networks.Teacher(data.tokenizers).to(DEVICE), Reading(words).to(DEVICE)
    parameters = [*teacher.text_encoder.parameters(), *teacher.text_encoder_2.parameters(), *reading.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: decayed(s, steps, warmup=100, decay_from=0.3))
    for step, index in enumerate(index_batches(len(asked), batch_size, steps, seed=8)):
        states, pooled = teacher.encode((data.tokens[0][index], data.tokens[1][index]))
        loss = reading.loss(states, pooled, asked[index])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            progress(f"text step {step} loss {loss.item():.4f}")
    states = {name: getattr(teacher, name).state_dict() for name in ("text_encoder", "text_encoder_2")}
    torch.save(states, work / "text.pt")


# ---------------------------------------------------------------------------------------------------------- unet


def drawn_from(work: Path) -> Tensor:
    """Indices of the pool's scenes; those of three things, which are harder, stand there four times."""
    of_three = torch.tensor(load(work, "pool", "things")[:, 2, 0]) >= 0
    return torch.cat([torch.arange(len(of_three)), of_three.nonzero().flatten().repeat(3)])


def train_unet(
    work: Path, *, steps: int, horizon: int, batch_size: int, peak: float, half: bool, begin: Path | None = None
) -> None:
    """Train text encoders and UNet on the cached latents.

    Goes on from `<work>/unet.pt` where that is there; else it begins with the weights in `begin`, a folder of each
    part's safetensors, or with those of the text stage.
    """
    torch.manual_seed(2)
    data = Captioned(work)
    teacher = networks.Teacher(data.tokenizers).to(DEVICE)
    if begin is None:
        states = torch.load(work / "text.pt", weights_only=True)
    else:
        states = {file.parent.name: load_file(file) for file in begin.glob("*/*.safetensors")}
    for name, state in states.items():
        if hasattr(teacher, name):  # not the autoencoder
            getattr(teacher, name).load_state_dict(state)
    alphas_cumprod = new_scheduler().alphas_cumprod.to(DEVICE)
    drawn = drawn_from(work)

    def loss(index: Tensor) -> Tensor:
        with half_precision(half, DEVICE):
            return miniature.teacher_loss(teacher, alphas_cumprod, data.batch(drawn[index]), 0.1, floor=0.15)

    def save(average: networks.Teacher) -> None:
        save_teacher(average, data.tokenizers, TEACHER)

    miniature.fit(
        teacher, loss, save, steps=steps, horizon=horizon, peak=peak, seed=6, batch_size=batch_size,
        resume=work / "unet.pt", count=len(drawn), muon=True,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- report


@torch.no_grad()
def generate(
    pipeline: Any, captions: Sequence[str], *, steps: int, guidance: float, seed: int = 0,
    call: Mapping[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Images (N, 3, S, S) in [0, 1]; the noise depends on the seed and the place in the list alone."""
    shape = (len(captions), networks.LATENT_CHANNELS, networks.LATENT_SIZE, networks.LATENT_SIZE)
    noise, images = torch.randn(shape, generator=torch.Generator().manual_seed(seed)), []
    for start in range(0, len(captions), 50):
        images.append(
            pipeline(
                prompt=list(captions[start : start + 50]), latents=noise[start : start + 50].clone(),
                height=scenes.RESOLUTION, width=scenes.RESOLUTION, num_inference_steps=steps,
                guidance_scale=guidance, output_type="pt", **(call or {}),
            ).images
        )  # fmt: skip
    return torch.cat(images)


def report(work: Path, *, samples: int, guidance: float, rows: Sequence[str]) -> None:
    """Answers, distance and quality of the teacher, with Euler or DPM++ 2M, at several numbers of steps."""
    pipeline, judge = load_teacher(TEACHER), SceneJudge.from_pretrained(TEACHER / "judge")
    figures = figures_of(pipeline, judge, work, "teacher", samples=samples, guidance=guidance, rows=rows)
    (work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


def figures_of(
    pipeline: Any, judge: SceneJudge, work: Path, name: str, *, samples: int, guidance: float, rows: Sequence[str],
    multistep: Mapping[str, Any] | None = None, call: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Figures by row, each a solver and its steps, on held-out captions; an image grid of each as `<name>_<row>.png`.

    `dpm-4` is DPM++ 2M with `multistep` beside the settings of the pipeline's own scheduler, which all others take.
    """
    pixels = load(work, "held_out", "pixels")
    captions = load(work, "held_out", "captions")[:samples].tolist()
    real = torch.cat([judge.features(to_images(pixels[start : start + 250])) for start in range(1000, 4000, 250)])
    own, figures = pipeline.scheduler, {}
    for row in rows:
        solver, steps = row.split("-")
        fast = DPMSolverMultistepScheduler.from_config(own.config, **(multistep or {}))
        pipeline.scheduler = fast if solver == "dpm" else own
        images = generate(pipeline, captions, steps=int(steps), guidance=guidance, call=call)
        figures[row] = measure(judge, images, captions, real)
        miniature.image_grid(images[:96], 16, enlarge=2).save(work / f"{name}_{row}.png")
        progress(f"{row}: {figures[row]}")
    return figures


def measure(judge: SceneJudge, images: Tensor, captions: Sequence[str], real: Tensor) -> dict[str, float]:
    """Shares of right answers, of scenes that are right, the mean quality, and the distance to real features."""
    parts = [slice(start, start + 250) for start in range(0, len(images), 250)]
    answers = [judge.answers(images[part], captions[part]) for part in parts]
    joined = {question: torch.cat([each[question] for each in answers]) for question in answers[0]}
    figures = {q: (v == 1).sum().item() / max(1, (v >= 0).sum().item()) for q, v in joined.items()}
    figures["all"] = torch.stack([v != 0 for v in joined.values()]).all(dim=0).float().mean().item()
    figures["quality"] = torch.cat([judge.rate(images[part]) for part in parts]).mean().item()
    figures["distance"] = miniature.frechet(torch.cat([judge.features(images[part]) for part in parts]), real)
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("data", "vae", "judge", "text", "unet", "report"))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "scenes", help="folder for what does not ship")
    parser.add_argument("--assets", type=Path, default=miniature.ASSETS, help="folder of the teacher and of its images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="as `cuda`, where there is one")
    parser.add_argument("--half", action="store_true", help="bf16 products: faster on processors with AMX")
    steps = (
        "of the optimizer, in place of the stage's own number; "
        "0 of the autoencoder: latents of the pool alone, of the judge: its figures"
    )
    parser.add_argument("--steps", type=int, help=steps)
    parser.add_argument("--begin", type=Path, help="weights to begin with: an autoencoder's folder; PART/*.safetensors")
    parser.add_argument("--horizon", type=int, help="steps after which the UNet's learning rate has decayed")
    parser.add_argument("--batch-size", type=int, default=48, help="of the UNet")
    parser.add_argument("--peak", type=float, default=1.2e-3, help="learning rate of the UNet")
    parser.add_argument("--samples", type=int, default=1000, help="images per row of the report")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the report")
    parser.add_argument("--rows", default="euler-1,euler-2,euler-4,dpm-4,euler-8,euler-50,dpm-50", help="of the report")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_default_device(given.device)
    global TEACHER, IMAGES, DEVICE
    DEVICE = given.device
    TEACHER, IMAGES = given.assets / TEACHER.name, given.assets / IMAGES.name
    if "WORLD_SIZE" in os.environ:  # of torchrun, for the stage `unet`
        torch.distributed.init_process_group("gloo" if DEVICE == "cpu" else "nccl")
    for folder in (given.work, TEACHER):
        folder.mkdir(parents=True, exist_ok=True)
    match given.stage:
        case "data":
            make_data(given.work)
        case "vae":
            train_vae(
                given.work, steps=5000 if given.steps is None else given.steps, half=given.half, begin=given.begin
            )
        case "judge":
            if steps := 4000 if given.steps is None else given.steps:
                train_judge(given.work, steps=steps, half=given.half)
            (given.work / "judge.json").write_text(json.dumps(judge_figures(given.work), indent=2) + "\n")
        case "text":
            train_text(given.work, steps=given.steps or 1500)
        case "unet":
            steps = given.steps or 30_000
            train_unet(
                given.work, steps=steps, horizon=given.horizon or steps, batch_size=given.batch_size,
                peak=given.peak, half=given.half, begin=given.begin,
            )  # fmt: skip
        case _:
            report(given.work, samples=given.samples, guidance=given.guidance, rows=given.rows.split(","))


if __name__ == "__main__":
    main()
