"""A family with deterministic little encoders, folders of images, and a pipeline over them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from distill.core.data.loader import BatchContents, BatchLayout
from distill.core.data.pipeline import DataPipeline
from distill.core.settings.dataset_settings import DatasetSettings
from distill.data_backends.local import LocalBackend
from distill.data_backends.s3 import S3Backend
from distill.data_backends.tables import CsvBackend, JsonLinesBackend, ParquetBackend
from distill.data_backends.webdataset import WebDatasetBackend
from PIL import Image

from .listening import listen


class FakeFamily:
    """Embeddings are a function of the text, latents of the pixels; counts what was encoded."""

    name = "fake"
    pixel_multiple = 8
    latent_channels, scale_factor = 3, 8
    max_prompt_tokens = None
    overflow_remedies = {"text": "mend the text encoder", "vae": "mend the autoencoder"}

    def __init__(self, *, text: str = "t1", vae: str = "v1", fail_after: int | None = None) -> None:
        self.prints = {"text": text, "vae": vae}
        self.prompts: list[str] = []
        self.batches: list[tuple[int, ...]] = []
        self.released = 0
        self.fail_after = fail_after

    def fingerprint(self, part: str) -> str:
        return self.prints[part]

    def encode_prompts(self, prompts):
        self.prompts += prompts
        rows = [torch.Generator().manual_seed(sum(p.encode()) * 1000 + len(p)) for p in prompts]
        return {
            "prompt_embeds": torch.stack([torch.randn(3, 4, generator=g) for g in rows]),
            "pooled": torch.stack([torch.randn(2, generator=g) for g in rows]),
        }

    def condition(self, embeds, micro):
        ids = [
            [*a, *b, *c] for a, b, c in zip(micro.original_size, micro.crop_top_left, micro.target_size, strict=True)
        ]
        return {**embeds, "time_ids": torch.tensor(ids, dtype=torch.float32)}

    def uncond(self, cond):
        return {k: v if k == "time_ids" else torch.zeros_like(v) for k, v in cond.items()}

    def encode_images(self, pixels, generator=None):
        if self.fail_after is not None and len(self.batches) >= self.fail_after:
            raise KeyboardInterrupt
        self.batches.append(tuple(pixels.shape))
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generator])
        return mean + 0.01 * noise

    def release_encoders(self) -> None:
        self.released += 1

    @property
    def num_images(self) -> int:
        return sum(shape[0] for shape in self.batches)


BACKENDS = {
    each.name: each
    for each in (LocalBackend, CsvBackend, JsonLinesBackend, ParquetBackend, WebDatasetBackend, S3Backend)
}
REGISTRY = SimpleNamespace(get=lambda kind, name: BACKENDS[name])


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def fill(folder: Path, sizes, *, captions=True, start=0) -> Path:
    """Random PNGs of the given (width, height), named 000.png ..., each with its own caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(sizes, start):
        image(width, height, number).save(folder / f"{number:03d}.png")
        if captions:
            (folder / f"{number:03d}.txt").write_text(f"image number {number}")
    return folder


def entry(folder: Path, **settings) -> DatasetSettings:
    given = {
        "id": folder.name,
        "resolution": 32,
        "aspect_bucket_alignment": 8,
        "crop_style": "center",
        "cache_dir_vae": folder.parent / "cache" / folder.name,
        **settings,
    }
    backend = LocalBackend.Config(instance_data_dir=folder)
    return DatasetSettings(**given).model_copy(update={"backend": backend})


def prompts(id: str, **settings) -> DatasetSettings:
    """A dataset of captions alone, from `prompts_file` or `instance_data_dir`."""
    paths = {key: settings[key] for key in ("prompts_file", "instance_data_dir") if key in settings}
    given = {"id": id, "dataset_type": "prompts", "resolution": 32, "aspect_bucket_alignment": 8, **settings}
    return DatasetSettings(**given).model_copy(update={"backend": LocalBackend.Config(**paths)})


def source(id: str, type: str, cache: Path, **settings) -> DatasetSettings:
    """A dataset of any backend: its own keys and those of all entries together, as in a data file."""
    own = BACKENDS[type].Config.model_fields
    given = {
        "id": id, "type": type, "resolution": 32, "aspect_bucket_alignment": 8, "crop_style": "center",
        "cache_dir_vae": cache,
    }  # fmt: skip
    given |= {key: value for key, value in settings.items() if key in DatasetSettings.model_fields}
    backend = BACKENDS[type].Config(**{key: value for key, value in settings.items() if key in own})
    return DatasetSettings(**given).model_copy(update={"backend": backend})


def configuration(*datasets: DatasetSettings, caches=(), text_cache=None):
    run = SimpleNamespace(num_workers=2, dataloader_prefetch=2)
    return SimpleNamespace(run=run, datasets=datasets, caches=caches, text_cache=text_cache)


def pipeline(
    *datasets: DatasetSettings, root: Path, family=None, micro=2, accumulation=1, rank=0, world=1, seed=1,
    images=True, trajectories=False, resumes=False, config=None,
):  # fmt: skip
    """A pipeline and the lines that it says."""
    lines = listen()
    data = DataPipeline(
        config or configuration(*datasets),
        REGISTRY,
        family or FakeFamily(),
        layout=BatchLayout(micro, accumulation, rank, world),
        contents=BatchContents(images=images, trajectories=trajectories),
        seed=seed,
        cache_root=root / "cache",
        resumes=resumes,
    )
    return data, lines


def take(data: DataPipeline, count: int, start: int = 0):
    """The batches of some steps."""
    steps = data.steps(start)
    try:
        return [next(steps) for _ in range(count)]
    finally:
        steps.close()
