"""One of several real processes over gloo that read three datasets. A script: folder, port, rank, start, stop.

Logs a line ``step key key ...`` for each optimizer step, and kills itself when it comes to `stop`, as a machine would.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from distill.core.errors import DistillError, OutOfReach
from distill.core.settings.dataset_settings import DatasetSettings
from support import data_helpers
from support.data_helpers import FakeFamily, entry, pipeline

WORLD, MICRO, ACCUMULATION = 2, 2, 1


def datasets(root: Path) -> list[DatasetSettings]:
    """Three, of three weights; one has a batch size of its own."""
    return [
        entry(root / "one", repeats=1),
        entry(root / "two", probability=0.5, random_flip=True),
        entry(root / "three", probability=0.25, repeats=1, train_batch_size=1),
    ]


def fails(root: Path, family: FakeFamily, what: DatasetSettings, rank: int) -> dict[str, object]:
    """How a pipeline ends that cannot be prepared by one of the processes."""
    data, _ = pipeline(what, root=root, family=family, rank=rank, world=WORLD)
    started = time.monotonic()
    try:
        data.prepare()
    except DistillError as error:
        return {"kind": type(error).__name__, "text": str(error), "seconds": time.monotonic() - started}
    return {}


class Unreachable(FakeFamily):
    """Its encoder is out of reach."""

    def encode_prompts(self, prompts):
        raise OutOfReach("the encoder", "no answer")


def feed(root: Path, rank: int, start: int, stop: int) -> Iterator[str]:
    """The keys of each step, with four workers."""
    configuration = data_helpers.configuration

    def of_four(*given: DatasetSettings):
        made = configuration(*given)
        made.run.num_workers = 4
        return made

    data_helpers.configuration = of_four
    data, _ = pipeline(
        *datasets(root), root=root, micro=MICRO, accumulation=ACCUMULATION, rank=rank, world=WORLD, seed=3
    )
    data.prepare()
    steps = data.steps(start)
    for step in range(start, stop):
        yield " ".join([str(step), *(key for batch in next(steps) for key in batch.keys)])


def main() -> None:
    root, port, rank, start, stop = Path(sys.argv[1]), *map(int, sys.argv[2:6])
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    if start == 0:
        one = entry(root / "one", write_batch_size=2)
        found = [
            fails(root / "nowhere", FakeFamily(), entry(root / "absent"), rank),
            fails(root / "other", Unreachable() if rank else FakeFamily(), one, rank),
        ]
        (root / f"failures-{rank}.json").write_text(json.dumps(found))
    with (root / f"keys-{rank}-{start}.log").open("w") as log:
        for line in feed(root, rank, start, stop):
            log.write(line + "\n")
            log.flush()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
