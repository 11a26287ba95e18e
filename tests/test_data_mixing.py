"""Several datasets at once: weights, repeats, batch sizes of their own, processes, kills."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from distill.core.data.order import Curriculum, SampleOrder, Span, Stream
from support import two_processes
from support.data_helpers import entry, fill, pipeline, take
from test_data_pipeline import MIXED, by_position

STREAMS = [Stream("a/1", 7, Fraction(2)), Stream("a/2", 3, Fraction(2)), Stream("b/1", 5, Fraction(1, 2))]


def test_orders_are_those_that_checkpoints_were_written_with():
    order = SampleOrder(STREAMS, global_batch=4, seed=3)
    found = [(batch.stream, batch.indices.tolist(), batch.epoch) for batch in map(order.at, (0, 1, 2, 3, 4, 7, 1234))]
    assert found == GOLDEN
    plan = Curriculum(STREAMS, [Span(), Span(3), Span(0, 9)], global_batch=2, seed=5)
    assert [(each.stream, each.indices.tolist()) for each in map(plan.at, (0, 2, 3, 8, 9, 500))] == GOLDEN_CURRICULUM


GOLDEN = [
    (1, [0, 1, 2, 2], 0), (0, [4, 5, 3, 1], 0), (0, [2, 6, 0, 3], 0), (0, [2, 1, 6, 0], 0), (0, [2, 4, 1, 6], 1),
    (0, [3, 0, 1, 5], 1), (0, [5, 2, 3, 2], 219),
]  # fmt: skip
GOLDEN_CURRICULUM = [(0, [1, 3]), (0, [5, 6]), (1, [1, 0]), (0, [4, 3]), (0, [3, 1]), (1, [2, 1])]


def test_each_stream_has_batches_of_its_own_size_and_is_seen_as_often_as_asked():
    streams = [STREAMS[0], Stream("c", 9, Fraction(1, 3), 3), Stream("d", 5, Fraction(3), 5)]
    order = SampleOrder(streams, global_batch=2, seed=0)
    assert order.steps_per_epoch == 14 / 2 + 3 / 3 + 15 / 5
    assert order.samples_per_epoch / order.steps_per_epoch == 32 / 11
    counts, steps = Counter(), Counter()
    for batch in map(order.at, range(11 * 6)):
        steps[batch.stream, len(batch.indices)] += 1
        counts.update((batch.stream, index) for index in batch.indices.tolist())
    assert steps == {(0, 2): 42, (1, 3): 6, (2, 5): 18}
    assert {counts[number, i] for number, s in enumerate(streams) for i in range(s.size) if number == 0} == {12}
    assert [counts[1, i] for i in range(9)] == [2] * 9
    assert [counts[2, i] for i in range(5)] == [18] * 5


@pytest.fixture
def mixed(tmp_path):
    one = entry(fill(tmp_path / "one", MIXED), train_batch_size=1)
    two = entry(fill(tmp_path / "two", [(32, 32)] * 9), train_batch_size=3, repeats=1, random_flip=True)
    three = entry(fill(tmp_path / "three", [(64, 64)] * 4), resolution=64, probability=0.5)
    return tmp_path, [one, two, three]


def test_batch_sizes_of_datasets_hold_however_the_batch_is_cut(mixed):
    root, datasets = mixed
    cut = []
    for accumulation, world in ((2, 1), (1, 2)):
        ranks = []
        for rank in range(world):
            data, _ = pipeline(*datasets, root=root, micro=2, accumulation=accumulation, rank=rank, world=world)
            data.prepare()
            ranks.append(take(data, 20))
        cut.append(by_position(ranks))
    assert cut[0] == cut[1]
    data, _ = pipeline(*datasets, root=root, micro=2, accumulation=2)
    data.prepare()
    assert data.steps_per_epoch() == 10 / 2 + 18 / 6 + 2 / 4
    assert data.samples_per_step == 30 / 8.5
    counts = Counter()
    for batches in take(data, 17):  # two epochs
        assert len({batch.latents.shape for batch in batches}) == 1, "buckets never mix in a step"
        names = {key.split("/")[0] for batch in batches for key in batch.keys}
        assert [len(batch) for batch in batches] == [{"one": 1, "two": 3, "three": 2}[names.pop()]] * 2
        assert not names, "datasets never mix in a step"
        counts.update(key for batch in batches for key in batch.keys)
    seen = {name: {count for key, count in counts.items() if key.startswith(name)} for name in ("one", "two", "three")}
    assert seen == {"one": {2}, "two": {4}, "three": {1}}
    assert len(counts) == 23
    later, _ = pipeline(*datasets, root=root, micro=2, accumulation=2)
    whole = by_position([take(data, 17)])
    assert by_position([take(later, 6, start=11)]) == whole[11:]


def test_the_runs_own_batch_size_changes_no_order(mixed):
    root, (one, two, three) = mixed
    plain = [each.model_copy(update={"train_batch_size": None}) for each in (one, two, three)]
    said = [each.model_copy(update={"train_batch_size": 2}) for each in (one, two, three)]
    pipelines = [pipeline(*datasets, root=root, micro=2)[0] for datasets in (plain, said, (one, two, three))]
    assert len({data.fingerprint() for data in pipelines}) == 1, "sizes of steps are compared by themselves"
    sizes = [data.samples_of_steps for data in pipelines]
    assert sizes[0] == sizes[1] != sizes[2]
    assert by_position([take(pipelines[0], 12)]) == by_position([take(pipelines[1], 12)])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(root: Path, start: int, stops: tuple[int, int]) -> list[dict[int, list[str]]]:
    """Two processes from one step to the ones that each is killed at; their logs, step -> keys."""
    port, script = free_port(), Path(two_processes.__file__)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(root), str(port), str(rank), str(start), str(stop)],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank, stop in enumerate(stops)
    ]  # fmt: skip
    for process in processes:
        _, said = process.communicate(timeout=500)
        assert process.returncode == -signal.SIGKILL, said[-3000:]
    logs = []
    for rank in range(2):
        lines = (root / f"keys-{rank}-{start}.log").read_text().splitlines()
        logs.append({int(line.split()[0]): line.split()[1:] for line in lines})
    return logs


def test_two_processes_four_workers_three_datasets_a_kill_and_a_resume(tmp_path):
    """Every sample as often as asked, over four epochs; and an error of one process ends both."""
    sizes = {"one": MIXED, "two": [(32, 32)] * 8, "three": [(32, 32)] * 6 + [(64, 32)] * 2}
    for name, images in sizes.items():
        fill(tmp_path / name, images)
    assert 4 * (20 / 4 + 4 / 4 + 4 / 2) == 32  # steps in four epochs
    first = launch(tmp_path, 0, (21, 17))  # killed at different moments; the last checkpoint is that of step 15
    second = launch(tmp_path, 15, (32, 32))
    counts = Counter()
    for rank in range(2):
        assert list(first[rank]) == list(range((21, 17)[rank]))
        counts.update(key for step, keys in first[rank].items() if step < 15 for key in keys)
        counts.update(key for keys in second[rank].values() for key in keys)
        repeated = [step for step in first[rank] if step >= 15]
        assert [first[rank][step] for step in repeated] == [second[rank][step] for step in repeated]
    asked = {"one": 8, "two": 2, "three": 2}
    assert {name: {n for key, n in counts.items() if key.startswith(f"{name}/")} for name in asked} == {
        name: {count} for name, count in asked.items()
    }
    assert len(counts) == sum(map(len, sizes.values()))
    failures = [json.loads((tmp_path / f"failures-{rank}.json").read_text()) for rank in range(2)]
    nowhere, reach = zip(*failures, strict=True)
    assert [each["kind"] for each in nowhere] == ["UserError"] * 2
    assert nowhere[0]["text"] == nowhere[1]["text"]
    assert "does not exist" in nowhere[0]["text"]
    assert "the encoder cannot be reached: no answer" in reach[0]["text"] == reach[1]["text"]
    assert max(each["seconds"] for each in (*nowhere, *reach)) < 60
