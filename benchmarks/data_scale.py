"""The data path at ten thousand to ten million samples: seconds and memory of each stage, cost of a batch.

    python benchmarks/data_scale.py output/scale --counts 10000 100000 1000000 10000000

Each size is measured in a fresh process, on an index and caches of made-up samples that are written here in chunks:
whole in every column, but there are no images. Everything that a start does is measured; `_cpu_s` is processor time,
`own_` memory is that of the process itself, without the pages of mapped files, which are given back when others need
memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from distill.core.data.cache import tensor_cache as cache_module
from distill.core.data.cache.cache_builder import latent_descriptor, text_descriptor
from distill.core.data.cache.cache_paths import CachePaths
from distill.core.data.cache.tensor_cache import TensorCache
from distill.core.data.dataset import Dataset
from distill.core.data.hashing import mix
from distill.core.data.index.build_folder import BuildFolder
from distill.core.data.index.index import SCHEMA, Index, write_index
from distill.core.data.index.index_builder import source_of
from distill.core.data.loader import BatchLayout
from distill.core.data.pipeline import DataPipeline
from distill.core.data.samples.captions import CaptionRules
from distill.core.data.samples.geometry import Geometry
from distill.core.plugin_api.backend import SampleBackend, SampleChunk
from distill.core.settings.dataset_settings import DatasetSettings

CHUNK = 1 << 18
SHARD = 1 << 14
SIZES = [(1024, 1024), (1280, 960), (960, 1280), (1920, 1080), (1500, 1000)]
BATCHES, WALK = 2000, 10_000


class MadeUp(SampleBackend):
    """Says that nothing has changed, and holds nothing."""

    name = "made-up"

    @property
    def location(self) -> str:
        """Nowhere."""
        return "nowhere"

    def identity(self) -> str:
        """Always the same."""
        return "made up"

    def samples(self, *, images: bool = True) -> Iterator[SampleChunk]:
        """Never asked for."""
        raise AssertionError("the index was built anew")

    def open(self, key: str) -> BinaryIO:
        """Never asked for."""
        raise AssertionError(f"{key} was opened")


class Nothing:
    """A family that never encodes."""

    name, pixel_multiple, latent_channels, scale_factor = "nothing", 8, 1, 8

    def fingerprint(self, part: str) -> str:
        """Always the same."""
        return part

    def condition(self, embeds: dict[str, torch.Tensor], micro: Any) -> dict[str, torch.Tensor]:
        """The embeddings with the sizes."""
        return {**embeds, "sizes": torch.tensor(micro.original_size)}

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Never asked for."""
        raise AssertionError("captions were encoded")

    encode_images = encode_prompts

    def release_encoders(self) -> None:
        """Nothing to release."""


def settings(root: Path) -> DatasetSettings:
    """The one dataset."""
    return DatasetSettings(id="made-up", resolution=1024, cache_dir_vae=root / "vae")


def configuration(root: Path) -> Any:
    """A run with that dataset."""
    run = SimpleNamespace(num_workers=2, dataloader_prefetch=2)
    return SimpleNamespace(run=run, datasets=(settings(root),), caches=(), text_cache=None)


def rows(count: int) -> Iterator[pa.RecordBatch]:
    """The index of `count` samples with a caption each."""
    for start in range(0, count, CHUNK):
        numbers = np.arange(start, min(start + CHUNK, count))
        size, names = len(numbers), pc.utf8_lpad(pa.array(numbers).cast(pa.string()), width=9, padding="0")
        words, hashes = names.cast(pa.large_string()), mix(numbers.astype(np.uint64))
        shapes = np.array(SIZES, np.int32)[(hashes % np.uint64(len(SIZES))).astype(np.int64)]
        empty = pa.repeat(pa.scalar("", pa.large_string()), size)
        ends = pa.array(np.arange(size + 1))
        digests = cache_module.as_binary(np.stack([mix(~hashes), ~hashes], 1))
        columns = {
            "key": joined(words, ".jpg"), "size": pa.array(numbers + 100_000), "version": empty,
            "caption_version": empty, "position": empty, "width": pa.array(shapes[:, 0]),
            "height": pa.array(shapes[:, 1]), "draw": pa.array(hashes),
            "identity": cache_module.as_binary(np.stack([mix(hashes), hashes], 1)),
            "captions": pa.LargeListArray.from_arrays(ends, joined(words, " is the number of an image of nothing")),
            "digests": pa.LargeListArray.from_arrays(ends, digests), "problem": empty,
        }  # fmt: skip
        yield pa.RecordBatch.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def joined(words: pa.Array, end: str) -> pa.Array:
    """Each word with `end` behind it."""
    return pc.binary_join_element_wise(words, pa.scalar(end, pa.large_string()), pa.scalar("", pa.large_string()))


def make(root: Path, count: int) -> float:
    """Write index and caches of `count` samples; returns the seconds that the index took."""
    shutil.rmtree(root, ignore_errors=True)
    own, paths = settings(root), CachePaths(configuration(root), root / "cache")
    started = time.perf_counter()
    with BuildFolder(paths.index(own)) as build_folder:
        rules, source = CaptionRules(own).identity(), source_of(MadeUp(None))
        index = write_index(rows(count), paths.index(own), rules, source, folder=build_folder.folder)
    took = time.perf_counter() - started
    family: Any = Nothing()
    dataset = Dataset(own, MadeUp(None), index, Geometry(own, multiple=8))
    fill(paths.latents(own), latent_descriptor(family, own.id), dataset.entry_keys(dataset.rows, 0), "latents")
    fill(paths.texts(own), text_descriptor(family), index.caption_digests, "embeds")
    return took


def fill(parent: Path, descriptor: dict[str, Any], keys: np.ndarray, name: str) -> None:
    """A cache with an entry of four zeros for each key."""
    one = cache_module.row_checksum({name: torch.zeros(1, 4)}, 0)
    cache_module.row_checksums = lambda tensors: torch.full((len(tensors[name]),), one)
    cache = TensorCache(parent, descriptor, label=name)
    for start in range(0, len(keys), SHARD):
        part = keys[start : start + SHARD]
        cache.write(part, {name: torch.zeros(len(part), 4)})


def measure(root: Path) -> dict[str, Any]:
    """Everything that a start does, then a walk through the order, jumps in it, and batches one after the other."""
    found: dict[str, Any] = {"import_mib": resident("VmHWM"), "import_own_mib": resident("RssAnon")}
    threading.Thread(target=watch, args=(found,), daemon=True).start()
    own, family = settings(root), Nothing()
    paths = CachePaths(configuration(root), root / "cache")
    index = timed(found, "open", lambda: Index(paths.index(own)))
    found["count"] = len(index)
    timed(found, "dataset", partial(Dataset, own, MadeUp(None), index, Geometry(own, multiple=8)))
    del index
    registry = SimpleNamespace(get=lambda kind, name: MadeUp)
    data = DataPipeline(
        configuration(root), registry, family, layout=BatchLayout(4, 1), seed=0, cache_root=root / "cache",
    )  # type: ignore[arg-type]  # fmt: skip
    report = timed(found, "prepare", data.prepare)
    assert report.captions_encoded == report.images_encoded == 0
    timed(found, "fingerprint", data.fingerprint)
    found["peak_mib"], found["own_mib"] = resident("VmHWM"), resident("RssAnon")
    loader, epoch = data._ready(), int(data.steps_per_epoch())
    half, jumps = epoch // 2, np.random.default_rng(0).integers(0, epoch, 400).tolist()
    batches = range(half, half + min(half, BATCHES))
    return {
        **found,
        "order_us_per_sample": cost(loader.order.at, range(half, half + min(half, WALK))) / 4,
        "jump_us_per_sample": cost(loader.order.at, jumps) / 4,
        "batch_us_per_sample": cost(loader.at, batches) / 4,
        "batch_again_us_per_sample": cost(loader.at, batches) / 4,
        "peak_with_batches_mib": resident("VmHWM"),
    }


def timed(found: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    """Seconds of `work`, by the clock and of the processor."""
    started, worked = time.perf_counter(), time.process_time()
    result = work()
    found[f"{name}_s"], found[f"{name}_cpu_s"] = time.perf_counter() - started, time.process_time() - worked
    return result


def cost(make: Callable[[int], Any], steps: Sequence[int]) -> float:
    """Mean microseconds of processor time per step, after a few to warm up."""
    for step in steps[:20]:
        make(step)
    started = time.process_time()
    for step in steps:
        make(step)
    return (time.process_time() - started) / len(steps) * 1e6


def watch(found: dict[str, Any]) -> None:
    """Note the most memory of its own that the process ever has: the system keeps no such figure."""
    while True:
        found["own_peak_mib"] = max(found.get("own_peak_mib", 0.0), resident("RssAnon"))
        time.sleep(0.02)


def resident(name: str) -> float:
    """A figure of this process's memory, MiB: VmHWM (peak, mapped files included) or RssAnon (its own, now)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


def in_fresh_process(root: Path, count: int) -> dict[str, Any]:
    """:func:`make` and :func:`measure`, each in a process of its own."""
    own, here = {**os.environ, "OMP_NUM_THREADS": "1"}, [sys.executable, __file__, str(root)]
    made = subprocess.run([*here, "--make", str(count)], env=own, check=True, capture_output=True, text=True)
    done = subprocess.run([*here, "--measure"], env=own, check=True, capture_output=True, text=True)
    return {**json.loads(done.stdout), "write_index_s": float(made.stdout)}


def main() -> None:
    """Measure each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--make", type=int)
    parser.add_argument("--measure", action="store_true")
    given = parser.parse_args()
    if given.make:
        print(make(given.root, given.make))
    elif given.measure:
        print(json.dumps(measure(given.root)))
    else:
        for count in given.counts:
            found = in_fresh_process(given.root, count)
            print(", ".join(f"{name} {value:,.3g}" for name, value in found.items()), flush=True)
        shutil.rmtree(given.root)


if __name__ == "__main__":
    main()
