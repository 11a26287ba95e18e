"""Samples per second of each stage of the data path, of libraries that could decode, and beside other loaders.

    python benchmarks/data.py [--images 20] [--resolution 256] [--rounds 3] [--json FILE]

JPEGs of 1.5 megapixels with photo-like noise, made for the occasion. Stages, libraries and loaders without workers are
told in samples per second of *CPU time of one core*, which another program on the machine changes little; loaders with
workers by the clock. What is compared runs in turns, round by round, in one process; figures are medians over rounds.

Loaders: ours (``Dataset.pixels``, threads) against torch's DataLoader over a Dataset that opens the same files with
Pillow, and against a map-style dataset of the package ``datasets`` (image folder) with the same transform. All decode,
convert to RGB, scale with Lanczos, crop in the middle and give uint8 tensors of the same size.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}  # before torch starts

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (1500, 1000)
STEP_SECONDS = 0.2
"""Length of the training step that the wait for data is measured against."""


def write_images(folder: Path, count: int) -> None:
    """Smooth shapes with grain, as JPEGs of quality 90, and a caption each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize(
            SIZE, Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 6, (SIZE[1], SIZE[0], 1))
        pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.jpg", quality=90)
        (folder / f"{number:04d}.txt").write_text(f"a smooth image, number {number}")


def open_pipeline(root: Path, resolution: int) -> Any:
    """The data path of a run with the family's miniature over the images."""
    from distill.core.config.load import load_configuration
    from distill.core.registry.registry import Registry
    from distill.core.runs.builders import build_pipeline

    data = [{"id": "images", "instance_data_dir": str(root / "images"), "resolution": resolution,
             "resolution_type": "pixel_area", "crop": True, "crop_style": "center"}]  # fmt: skip
    (root / "data.json").write_text(json.dumps(data))
    registry = Registry.load(installed=False)
    configuration = load_configuration(
        registry,
        data_file=root / "data.json",
        flags={"output_dir": str(root / "out")},
        overrides=["train_batch_size=4"],
    )
    return build_pipeline(configuration, registry)


def rate(count: int, work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Samples per second."""
    start = clock()
    work()
    return count / max(clock() - start, 1e-9)


# -- stages -----------------------------------------------------------------------------------------------------------


def stages(pipeline: Any) -> dict[str, float]:
    """Samples per CPU second of every stage, in the order of a sample's way."""
    from distill.core.data.samples.images import decode, probe, scale_and_crop

    found: dict[str, float] = {}
    (dataset,) = pipeline._indexed()
    backend, rows, count = dataset.backend, dataset.rows.tolist(), len(dataset.rows)
    keys = [dataset.index.key(row) for row in rows]
    captions = [dataset.index.caption(row) for row in range(count)]
    plan = dataset.plan(dataset.rows)

    def read(key: str) -> bytes:
        with backend.open(key) as stream:
            return stream.read()

    def header(key: str) -> None:
        with backend.open(key) as stream:
            probe(stream)

    def scaled(number: int) -> np.ndarray:
        size = int(plan.resized_w[number]), int(plan.resized_h[number])
        bucket = int(plan.bucket_w[number]), int(plan.bucket_h[number])
        place = {"left": int(plan.left[number]), "top": int(plan.top[number])}
        return scale_and_crop(images[number], size=size, bucket=bucket, **place)

    found["list"] = rate(count, lambda: list(backend.list()))
    found["probe"] = rate(count, lambda: [header(key) for key in keys])
    found["read"] = rate(count, lambda: [read(key) for key in keys])
    contents = [read(key) for key in keys]
    found["decode"] = rate(count, lambda: [decode(content) for content in contents])
    images = [decode(content) for content in contents]
    found["scale and crop"] = rate(count, lambda: [scaled(number) for number in range(count)])
    pipeline._family.encode_prompts(captions[:1])  # loads
    found["encode captions (miniature)"] = rate(count, lambda: pipeline._family.encode_prompts(captions))
    few = _tensor(np.stack([scaled(number) for number in range(min(8, count))]))
    _encode(pipeline._family, few[:1])
    found["encode images (miniature)"] = rate(len(few), lambda: _encode(pipeline._family, few))
    pipeline.prepare()
    loader, steps = pipeline._ready(), max(1, count // 4)
    for step in range(steps):
        loader.at(step)
    found["load from the caches"] = rate(4 * steps, lambda: [loader.at(step) for step in range(steps)])
    return found


def _tensor(pixels: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def _encode(family: Any, pixels: Any) -> None:
    import torch

    with torch.inference_mode():
        family.encode_images(pixels, [torch.Generator().manual_seed(number) for number in range(len(pixels))])


def wait_share(pipeline: Any, steps: int = 20) -> float:
    """Share of the time that a loop with steps of :data:`STEP_SECONDS` waits for its batches."""
    batches, waited, start = pipeline.steps(0), 0.0, 0.0
    next(batches)
    start = time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - before
        time.sleep(STEP_SECONDS)
    batches.close()
    return waited / (time.perf_counter() - start)


# -- libraries --------------------------------------------------------------------------------------------------------


def pillow(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """What our pipeline uses."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.Resampling.LANCZOS))


def pillow_draft(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """The same, JPEGs decoded at a fraction of their size: other pixels."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", size)
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))


def opencv(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """By areas: its Lanczos does not smooth when it scales down."""
    import cv2

    image = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def pyvips_(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """As a stream."""
    import pyvips

    image = pyvips.Image.new_from_buffer(data, "", access="sequential")
    return image.resize(size[0] / image.width, vscale=size[1] / image.height, kernel="lanczos3").numpy()


def simplejpeg_(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Another binding of the JPEG library that Pillow has."""
    import simplejpeg

    return np.asarray(Image.fromarray(simplejpeg.decode_jpeg(data)).resize(size, Image.Resampling.LANCZOS))


LIBRARIES = {
    "Pillow": ("PIL", pillow), "Pillow, JPEG draft": ("PIL", pillow_draft), "opencv, area": ("cv2", opencv),
    "pyvips, Lanczos": ("pyvips", pyvips_), "simplejpeg, scaled by Pillow": ("simplejpeg", simplejpeg_),
}  # fmt: skip


def libraries(contents: list[bytes], resolution: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Of each importable library the samples per CPU second, and the largest difference of a pixel from Pillow's."""
    scale = resolution / min(SIZE)
    size = round(SIZE[0] * scale), round(SIZE[1] * scale)
    there = {name: work for name, (module, work) in LIBRARIES.items() if find_spec(module)}
    if "opencv, area" in there:
        __import__("cv2").setNumThreads(1)
    ours = [pillow(content, size).astype(int) for content in contents[:4]]
    differences = {
        name: max(np.abs(work(content, size) - mine).max() for content, mine in zip(contents[:4], ours, strict=True))
        for name, work in there.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in there}
    for _ in range(rounds):
        for name, work in there.items():
            rates[name].append(rate(len(contents), lambda work=work: [work(each, size) for each in contents]))
    return {name: (statistics.median(rates[name]), float(differences[name])) for name in there}


# -- loaders ----------------------------------------------------------------------------------------------------------


class Cut:
    """Scales to cover a square of `edge` with Lanczos and crops in the middle: what our pipeline does to these."""

    def __init__(self, edge: int) -> None:
        self.edge = edge

    def __call__(self, image: Image.Image) -> Any:
        """A uint8 tensor of shape (3, edge, edge)."""
        import torch

        scale = self.edge / min(image.size)
        size = round(image.width * scale), round(image.height * scale)
        image = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        left, top = (size[0] - self.edge) // 2, (size[1] - self.edge) // 2
        pixels = np.asarray(image.crop((left, top, left + self.edge, top + self.edge)))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


class Files:
    """A plain map-style dataset over files."""

    def __init__(self, paths: list[Path], cut: Cut) -> None:
        self.paths, self.cut = paths, cut

    def __len__(self) -> int:
        """Number of files."""
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        """One image."""
        with Image.open(self.paths[number]) as image:
            return self.cut(image)


def ours(dataset: Any, workers: int) -> Iterator[Any]:
    """Our first pass over the images, as the latent cache is filled."""
    import torch

    def pixels(row: int) -> Any:
        return torch.from_numpy(dataset.pixels(row, flip=False).copy()).permute(2, 0, 1)

    if not workers:
        yield from map(pixels, dataset.rows.tolist())
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(pixels, dataset.rows.tolist())


def loaders(pipeline: Any, root: Path, resolution: int, rounds: int, workers: int) -> dict[str, float]:
    """Samples per second of each loader: of CPU time without workers, by the clock with."""
    from datasets import load_dataset
    from torch.utils.data import DataLoader

    (dataset,) = pipeline._indexed()
    cut, paths = Cut(resolution), sorted((root / "images").glob("*.jpg"))
    hub: Any = load_dataset("imagefolder", data_dir=str(root / "images"), split="train", cache_dir=str(root / "hf"))
    hub.set_transform(lambda rows: {"image": [cut(image) for image in rows["image"]]})
    options = {"batch_size": 4, "num_workers": workers}
    runs: dict[str, Callable[[], Iterator[Any]]] = {
        "ours, first pass": lambda: ours(dataset, workers),
        "torch DataLoader + Pillow": lambda: iter(DataLoader(Files(paths, cut), **options)),  # type: ignore[arg-type]
        "datasets, map-style": lambda: iter(DataLoader(hub, **options)),
        "ours, cached training": lambda: map(pipeline._ready().at, range(len(paths) // 4)),
    }
    clock = time.perf_counter if workers else time.process_time
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            rates[name].append(rate(len(paths), lambda run=run: sum(1 for _ in run()), clock))
    return {name: statistics.median(found) for name, found in rates.items()}


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures, printed as they come."""
    write_images(root / "images", options.images)
    pipeline = open_pipeline(root, options.resolution)
    figures: dict[str, Any] = {"stages": stages(pipeline), "wait_share": wait_share(pipeline)}
    table("stage", figures["stages"])
    print(f"waiting for data with steps of {STEP_SECONDS} s: {figures['wait_share']:.4%} of the time\n")
    contents = [path.read_bytes() for path in sorted((root / "images").glob("*.jpg"))[:32]]
    figures["libraries"] = libraries(contents, options.resolution, options.rounds)
    print("| decode and scale | samples per CPU second | largest difference of a pixel |\n| --- | --- | --- |")
    for name, (found, difference) in figures["libraries"].items():
        print(f"| {name} | {found:,.1f} | {difference:.0f} |")
    for workers in (0, 2):
        figures[f"loaders_{workers}"] = found = loaders(pipeline, root, options.resolution, options.rounds, workers)
        table(
            f"loader, {workers} workers" if workers else "loader, CPU time", found, beside="torch DataLoader + Pillow"
        )
    pipeline.close()
    return figures


def table(head: str, rates: dict[str, float], beside: str | None = None) -> None:
    """Rates as Markdown, with the ratio to one of them."""
    print(f"\n| {head} | samples per second |{' ratio |' if beside else ''}\n| --- | --- |{' --- |' if beside else ''}")
    for name, found in rates.items():
        print(f"| {name} | {found:,.1f} |{f' {found / rates[beside]:.2f} |' if beside else ''}", flush=True)
    print()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--resolution", type=int, default=256, help="edge of the training images in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(Path(temporary), options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
