"""Train the miniature SDXL teacher that ships with the package, its captioned images, and its judge.

    python benchmarks/miniature.py data      # compose the training pool and write the shipped image set
    python benchmarks/miniature.py vae       # the autoencoder, then the latents of the whole pool
    python benchmarks/miniature.py judge     # the classifier that scores prompt agreement
    python benchmarks/miniature.py unet      # tokenizers, both text encoders and the UNet, jointly; writes the teacher
    python benchmarks/miniature.py refine    # trains that teacher further, from the weights that `unet` wrote
    python benchmarks/miniature.py report    # the figures and image grids of the model card

Seeds are fixed; every stage leaves its result in `--work` or in the assets. About an hour on two cores.
Needs the Noto Color Emoji font (Debian: fonts-noto-color-emoji) and fonttools, beside the package's own dependencies.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, DiffusionPipeline
from distill.plugins.miniature_classifier import MiniatureClassifier
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

import miniature_data as scenes  # noqa: E402
import miniature_networks as networks  # noqa: E402

ASSETS = ROOT / "model_families" / "assets"
TEACHER, IMAGES = ROOT / "tests" / "assets" / "sdxl_miniature", ASSETS / "emoji_scenes"
POOL_SIZE, SHIPPED_SIZE, HELD_OUT_SIZE = 60_000, 1_200, 4_000
UNET_STEPS, REFINE_STEPS = 5000, 4500
SIZE = scenes.RESOLUTION
Network = TypeVar("Network", bound=nn.Module)


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
    """Compose the training pool and the held-out pool, and write the image set that ships."""
    for name, count, seed, cropped in (("pool", POOL_SIZE, 1, 0.15), ("held_out", HELD_OUT_SIZE, 2, 0.0)):
        np.savez(work / f"{name}.npz", **compose_pool(count, seed, crop_probability=cropped))  # type: ignore[arg-type]
        progress(f"{name}: {count} scenes")
    IMAGES.mkdir(parents=True, exist_ok=True)
    shipped = compose_pool(SHIPPED_SIZE, 3, crop_probability=0.0)
    for index, (pixels, caption) in enumerate(zip(shipped["pixels"], shipped["captions"], strict=True), start=1):
        Image.fromarray(pixels).save(IMAGES / f"{index:04d}.png", optimize=True)
        (IMAGES / f"{index:04d}.txt").write_text(f"{caption}\n", encoding="utf-8")
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
    generator, order, position = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long, device="cpu"), 0
    for _ in range(steps):
        if position + batch_size > len(order):
            order, position = torch.randperm(count, generator=generator, device="cpu"), 0
        yield order[position : position + batch_size]
        position += batch_size


def decayed(step: int, steps: int, *, warmup: int, decay_from: float) -> float:
    """Learning-rate factor: linear warm-up, constant, then a half cosine to 2 % from `decay_from` of the way on."""
    if step < warmup:
        return (step + 1) / warmup
    done = max(0.0, (step / steps - decay_from) / (1 - decay_from))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


# --------------------------------------------------------------------------------------------------------- judge


def train_classifier(work: Path, *, steps: int = 1600, batch_size: int = 64) -> None:
    """Train the classifier on the pool, half of each batch through the autoencoder.

    It must judge what an image shows and be blind to what every decoded image loses, for students and teacher alike.
    """
    torch.manual_seed(0)
    pool, held_out = load_pool(work, "pool"), load_pool(work, "held_out")
    vae, latents = load_vae(), np.load(work / "latents.npy", mmap_mode="r")
    vocabulary = {"kind": list(scenes.KINDS), "colour": list(scenes.COLOURS), "texture": list(scenes.TEXTURES)}
    judge = MiniatureClassifier(vocabulary, resolution=SIZE)
    progress(f"judge: {sum(p.numel() for p in judge.parameters()) / 1e6:.2f}M parameters")
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: decayed(s, steps, warmup=100, decay_from=0.1))
    labels = {name: torch.from_numpy(pool[name]) for name in vocabulary}
    for step, index in enumerate(index_batches(POOL_SIZE, batch_size, steps, seed=4)):
        half = batch_size // 2
        decoded = decode(vae, torch.from_numpy(latents[index[half:].numpy()]).float())
        images = torch.cat([to_images(pool["pixels"][index[:half].numpy()]), decoded])
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
    judge = MiniatureClassifier.from_pretrained(TEACHER / "judge")
    captions, real = held_out["captions"].tolist(), to_images(held_out["pixels"])
    again = decode(vae, encode_pool(vae, held_out["pixels"]) * vae.config.scaling_factor)
    for name, images in (("held-out scenes", real), ("of them through the autoencoder", again)):
        right = judge.agreement(images, captions)
        progress(f"judge: {right.float().mean():.4f} of {len(right)} {name} right")


def load_vae() -> AutoencoderKL:
    """The autoencoder as it ships, in float32."""
    return AutoencoderKL.from_pretrained(TEACHER / "vae", torch_dtype=torch.float32).eval()


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents -> images in [0, 1]."""
    pieces = [vae.decode(piece / vae.config.scaling_factor).sample for piece in latents.split(250)]
    return (torch.cat(pieces) / 2 + 0.5).clamp(0, 1)


# ----------------------------------------------------------------------------------------------------------- vae


def edges(images: Tensor) -> Tensor:
    """Horizontal and vertical differences, flattened."""
    return torch.cat([images.diff(dim=-1).flatten(), images.diff(dim=-2).flatten()])


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Absolute and squared error, and the error of the differences of neighbours, which keeps edges sharp."""
    error = decoded - images
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * (edges(decoded) - edges(images)).abs().mean()


def train_vae(work: Path, *, steps: int = 1400, batch_size: int = 32) -> None:
    """Train the autoencoder, measure its scale, and cache the latents of the pool."""
    torch.manual_seed(1)
    pool = load_pool(work, "pool")
    vae = networks.new_vae().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    progress(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: decayed(s, steps, warmup=100, decay_from=0.2))
    for step, index in enumerate(index_batches(POOL_SIZE, batch_size, steps, seed=5)):
        images = to_images(pool["pixels"][index.numpy()]) * 2 - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(decoded, images) + 1e-5 * posterior.kl().mean()
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
    """The mean latents of all images, unscaled; (N, 4, S/2, S/2)."""
    chunks = torch.arange(len(pixels)).split(500)
    return torch.cat([vae.encode(to_images(pixels[c.numpy()]) * 2 - 1).latent_dist.mean for c in chunks])


def psnr(decoded: Tensor, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return 10 * math.log10(4 / (decoded - images).square().mean().item())


# ---------------------------------------------------------------------------------------------------------- unet


class Captioned:
    """The pool as the UNet's training sees it: latents, time ids, and the tokens of each sample's caption."""

    def __init__(self, work: Path) -> None:
        pool = load_pool(work, "pool")
        self.latents = torch.from_numpy(np.load(work / "latents.npy"))
        self.time_ids = torch.from_numpy(pool["time_ids"])
        captions, self.caption_of = np.unique(pool["captions"], return_inverse=True)
        texts = captions.tolist()
        self.tokenizers = (
            networks.new_tokenizer(texts, "<|endoftext|>"),
            networks.new_tokenizer(texts, "!"),
        )
        self.tokens = tuple(
            tokenizer(texts, padding="max_length", return_tensors="pt").input_ids for tokenizer in self.tokenizers
        )

    def batch(self, index: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Latents (B, 4, S/2, S/2), both encoders' tokens (B, 24), time ids (B, 6)."""
        chosen = torch.from_numpy(self.caption_of[index.numpy()])
        return self.latents[index].float(), (self.tokens[0][chosen], self.tokens[1][chosen]), self.time_ids[index]


def teacher_loss(
    teacher: networks.Teacher,
    alphas_cumprod: Tensor,
    batch: tuple[Tensor, tuple[Tensor, Tensor], Tensor],
    dropout: float,
    *,
    floor: float = 0.0,
) -> Tensor:
    """Noise prediction with min-SNR weights (arXiv 2303.09556, gamma = 5): min(5 / SNR, 1) |eps_hat - eps|^2.

    The error of x_0 so weighs min(SNR, 5), and `floor` more: where there is almost nothing but noise, and a scene's
    layout is decided, it would weigh next to nothing.
    """
    x_0, tokens, time_ids = batch
    noise, t = torch.randn(x_0.shape), torch.randint(0, 1000, (len(x_0),))
    signal = alphas_cumprod[t]
    alpha_t, sigma_t = signal.sqrt()[:, None, None, None], (1 - signal).sqrt()[:, None, None, None]
    noisy = (alpha_t * x_0 + sigma_t * noise).contiguous(memory_format=torch.channels_last)
    keep = (torch.rand(len(x_0)) >= dropout).float()
    error = (teacher(noisy, t, tokens, time_ids, keep) - noise).square().mean(dim=(1, 2, 3))
    noise_to_signal = (1 - signal) / signal
    return (((5 * noise_to_signal).clamp(max=1) + floor * noise_to_signal) * error).mean()


def train_unet(work: Path, *, steps: int = UNET_STEPS, horizon: int = 6000) -> None:
    """Train text encoders and UNet on the cached latents from scratch."""
    torch.manual_seed(2)
    data = Captioned(work)
    fit_teacher(networks.Teacher(data.tokenizers), data, steps=steps, horizon=horizon, peak=1.2e-3, seed=6)


def refine_unet(work: Path, *, steps: int = REFINE_STEPS) -> None:
    """Train the teacher that lies in the assets further, at a lower learning rate that ends near zero."""
    torch.manual_seed(3)
    data = Captioned(work)
    teacher = networks.Teacher(data.tokenizers)
    networks.restore_teacher(teacher, TEACHER)
    fit_teacher(teacher, data, steps=steps, horizon=steps, peak=8e-4, seed=7)


def fit_teacher(
    teacher: networks.Teacher, data: Captioned, *, steps: int, horizon: int, peak: float, seed: int
) -> None:
    """:func:`fit` on the loss of noise prediction; the teacher goes to the assets."""
    alphas_cumprod = networks.new_scheduler().alphas_cumprod

    def loss(index: Tensor) -> Tensor:
        return teacher_loss(teacher, alphas_cumprod, data.batch(index), 0.12)

    def save(average: networks.Teacher) -> None:
        networks.save_teacher(average, data.tokenizers, TEACHER)

    fit(teacher, loss, save, steps=steps, horizon=horizon, peak=peak, seed=seed)


def optimizer_groups(teacher: nn.Module, muon: bool) -> list[tuple[Any, list[Tensor], dict[str, Any]]]:
    """Optimizer, parameters and settings: all of them Adam's, or the matrices Muon's and the rest Adam's."""
    of_muon = {
        parameter: None for name, parameter in teacher.named_parameters()
        if muon and parameter.ndim == 2 and "embed" not in name
    }  # fmt: skip
    rest = [parameter for parameter in teacher.parameters() if parameter not in of_muon]
    groups = [(torch.optim.AdamW, rest, {"betas": (0.9, 0.99), "fused": True})]
    if of_muon:
        groups.append((torch.optim.Muon, list(of_muon), {"adjust_lr_fn": "match_rms_adamw"}))
    return groups


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace each gradient by its mean over the processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joined)
    joined /= dist.get_world_size()
    for gradient, mean in zip(gradients, joined.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def keep(parts: Sequence[Any], state: Path | None, step: int) -> None:
    """Write all that :func:`restored` needs, where there is a file for it."""
    if state is not None:
        written = state.with_suffix(".new")
        torch.save((step, torch.get_rng_state(), [part.state_dict() for part in parts]), written)
        written.replace(state)


def restored(parts: Sequence[Any], state: Path | None) -> int:
    """Load what :func:`keep` has written, into the parts and the generator, and return its step, or 0."""
    if state is None or not state.is_file():
        return 0
    step, generator, states = torch.load(state, weights_only=True)
    torch.set_rng_state(generator)
    for part, each in zip(parts, states, strict=True):
        part.load_state_dict(each)
    return int(step)


def fit(
    teacher: Network,
    loss_of: Callable[[Tensor], Tensor],
    save: Callable[[Network], None],
    *,
    steps: int,
    horizon: int,
    peak: float,
    seed: int,
    batch_size: int = 64,
    resume: Path | None = None,
    count: int = POOL_SIZE,
    muon: bool = False,
) -> None:
    """The first `steps` of a learning rate that decays over `horizon` steps; the EMA of the weights is saved.

    Started by torchrun, each process takes its share of every batch; the first writes.

    Args:
        teacher: Trained in place, all of it.
        loss_of: The loss of the samples of the pool with these indices (B,).
        save: Writes the average; called every 500 steps and at the end.
        steps: Of the optimizer.
        horizon: Steps after which the learning rate has fallen to 2 % of its peak.
        peak: Learning rate after the warm-up.
        seed: Of the order of samples; noise comes from the global generator.
        batch_size: Samples of a step.
        count: Samples of the pool.
        resume: File that holds the state after every 100 steps, from which an interrupted training goes on.
        muon: Steps of matrices, but for embeddings, are made orthogonal and as long as Adam's (arXiv 2502.16982).
    """
    average = deepcopy(teacher).requires_grad_(False)
    progress(f"teacher: {sum(p.numel() for p in teacher.parameters()) / 1e6:.2f}M parameters")
    parameters = list(teacher.parameters())
    optimizers, schedules = [], []
    for kind, group, settings in optimizer_groups(teacher, muon):
        optimizers.append(kind(group, lr=peak, weight_decay=0.01, **settings))
        factor = partial(decayed, steps=horizon, warmup=200, decay_from=0.3)
        schedules.append(torch.optim.lr_scheduler.LambdaLR(optimizers[-1], factor))
    losses: list[Tensor] = []
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = (teacher, average, *optimizers, *schedules)
    done = restored(parts, resume)
    if rank:  # noise of its own
        torch.manual_seed(seed + 1000 * rank + done)
    for step, index in enumerate(index_batches(count, batch_size, steps, seed=seed), start=1):
        if step <= done:
            continue
        loss = loss_of(index[rank::world])
        teacher.zero_grad()
        loss.backward()
        if world > 1:
            average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), parameters, 1 - min(0.999, step / (step + 9)))
        losses.append(loss.detach())
        if rank:
            continue
        if step % 100 == 0:
            progress(f"step {step} loss {torch.stack(losses[-100:]).mean().item():.4f}")
            keep(parts, resume, step)
        if step % 500 == 0 or step == steps:
            save(average)


# -------------------------------------------------------------------------------------------------------- report


@torch.no_grad()
def generate(
    pipeline: Any,
    captions: list[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch_size: int = 64,
    call: Mapping[str, Any] | None = None,
) -> Tensor:
    """Images in [0, 1], (N, 3, S, S); the noise depends on the seed and the place in the list alone."""
    noise = torch.randn(len(captions), 4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(seed))
    images = []
    for start in range(0, len(captions), batch_size):
        images.append(
            pipeline(
                prompt=captions[start : start + batch_size],
                latents=noise[start : start + batch_size].clone(),
                height=SIZE,
                width=SIZE,
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="pt",
                generator=torch.Generator().manual_seed(seed + start),
                **(call or {}),
            ).images
        )
    return torch.cat(images)


def frechet(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two sets of features (N, F): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    first, second = first.double(), second.double()
    cov_1, cov_2 = first.T.cov(), second.T.cov()
    root_trace = torch.linalg.eigvals(cov_1 @ cov_2).real.clamp(min=0).sqrt().sum()
    gap = (first.mean(0) - second.mean(0)).square().sum()
    return float(gap + cov_1.trace() + cov_2.trace() - 2 * root_trace)


def image_grid(images: Tensor, columns: int, enlarge: int = 3) -> Image.Image:
    """(N, 3, S, S) in [0, 1] as one image, row by row."""
    rows = [torch.cat(list(row), dim=-1) for row in images.split(columns)]
    array = (torch.cat(rows, dim=-2).permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    image = Image.fromarray(array)
    return image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST)


def report(
    work: Path,
    folder: Path,
    *,
    samples: int,
    guidance: float,
    step_counts: list[int],
    call: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Judge accuracy, reconstruction, and agreement and distance of the teacher in `folder` at several step counts."""
    held_out, pipeline = load_pool(work, "held_out"), DiffusionPipeline.from_pretrained(folder).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    judge = MiniatureClassifier.from_pretrained(folder / "judge")
    real, captions = to_images(held_out["pixels"]), held_out["captions"].tolist()
    vae = pipeline.vae
    with torch.no_grad():
        decoded = vae.decode(encode_pool(vae, held_out["pixels"][:500])).sample / 2 + 0.5  # shifts cancel out
    real_features = judge.features(real)
    figures = {
        "judge_accuracy": judge.agreement(real, captions).float().mean().item(),
        "vae_psnr": psnr(decoded * 2, real[:500] * 2),
        "judge_accuracy_decoded": judge.agreement(decoded.clamp(0, 1), captions[:500]).float().mean().item(),
        "distance_floor": frechet(real_features[:samples], real_features[samples:]),
    }
    image_grid(torch.cat([real[:64], decoded[:64]]), 16).save(work / "reconstructions.png")
    for steps in step_counts:
        started = time.perf_counter()
        images = generate(pipeline, captions[:samples], steps=steps, guidance=guidance, seed=0, call=call)
        figures[f"agreement_{steps}"] = judge.agreement(images, captions[:samples]).float().mean().item()
        figures[f"distance_{steps}"] = frechet(judge.features(images), real_features[samples:])
        figures[f"seconds_per_image_{steps}"] = (time.perf_counter() - started) / samples
        image_grid(images[:96], 16).save(work / f"teacher_{steps}_steps.png")
        progress(f"teacher {steps} steps: { {k: round(v, 4) for k, v in figures.items() if k.endswith(f'_{steps}')} }")
    (work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    progress(json.dumps(figures, indent=2))
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("data", "judge", "vae", "unet", "refine", "report"))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "miniature", help="folder for what does not ship")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder of the teacher and of the image set")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="training steps, in place of the stage's own number")
    parser.add_argument("--samples", type=int, default=1000, help="images per row of the report")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sampler-steps", default="1,2,4,8,50", help="rows of the report")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    global TEACHER, IMAGES
    TEACHER, IMAGES = arguments.assets / TEACHER.name, arguments.assets / IMAGES.name
    arguments.work.mkdir(parents=True, exist_ok=True)
    lengths = {"steps": arguments.steps} if arguments.steps else {}
    match arguments.stage:
        case "data":
            make_data(arguments.work)
        case "judge":
            train_classifier(arguments.work, **lengths)
        case "vae":
            train_vae(arguments.work, **lengths)
        case "unet":
            train_unet(arguments.work, **lengths)
        case "refine":
            refine_unet(arguments.work, **lengths)
        case _:
            counts = [int(count) for count in arguments.sampler_steps.split(",")]
            report(arguments.work, TEACHER, samples=arguments.samples, guidance=arguments.guidance, step_counts=counts)


if __name__ == "__main__":
    main()
