"""Ten million samples: opened in seconds, under 2 GB, and no dearer by the sample than ten thousand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from distill.core.data.hashing import Lookup, mix
from distill.core.data.order import SampleOrder, Stream

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "data_scale.py"


def measured(root: Path, count: int) -> dict[str, float]:
    """What the benchmark says of one size, in processes of its own."""
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    for flags in (["--make", str(count)], ["--measure"]):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(root), *flags], env=own, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_sample_costs_the_same_in_a_set_ten_times_as_large(tmp_path):
    small, large = (measured(tmp_path / str(count), count) for count in (10**5, 10**6))
    assert large["order_us_per_sample"] < 3 * small["order_us_per_sample"]  # a scan would cost ten times as much
    assert large["batch_us_per_sample"] < 4 * small["batch_us_per_sample"]
    assert large["batch_again_us_per_sample"] < 2 * small["batch_again_us_per_sample"]
    assert large["open_cpu_s"] < 0.5
    assert large["prepare_cpu_s"] < 25 * small["prepare_cpu_s"] + 1  # in proportion: nothing is quadratic
    assert large["own_peak_mib"] - large["import_own_mib"] < 200
    assert large["peak_with_batches_mib"] - large["import_mib"] < 600


@pytest.mark.slow
def test_ten_million_samples(tmp_path):
    found = measured(tmp_path, 10**7)
    assert found["count"] == 10**7
    assert found["open_cpu_s"] < 5
    assert found["own_peak_mib"] < 1200
    assert found["peak_mib"] < 2000
    assert found["peak_with_batches_mib"] < 2000
    assert found["order_us_per_sample"] < 20
    assert found["batch_us_per_sample"] < 1000
    assert found["prepare_cpu_s"] < 120


def test_the_memory_of_an_order_does_not_grow_with_its_samples():
    import tracemalloc

    peaks = []
    for size in (10**4, 10**7):
        order = SampleOrder([Stream("a", size), Stream("b", size // 2)], global_batch=16, seed=0)
        tracemalloc.start()
        for step in range(0, 500, 7):
            order.at(step)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 2**20


def test_keys_are_found_even_where_halves_collide():
    random = np.random.default_rng(0)
    keys = random.integers(0, 50, (400, 2)).astype(np.uint64)  # many share their first half, and some are the same
    keys = np.concatenate([keys, mix(np.arange(600, dtype=np.uint64)).reshape(-1, 2)])
    first = {}
    for place, key in enumerate(map(tuple, keys.tolist())):
        first.setdefault(key, place)
    wanted = np.concatenate([keys[::-1], random.integers(0, 99, (300, 2)).astype(np.uint64), [[2**64 - 1] * 2]])
    found = Lookup(keys).find(wanted.astype(np.uint64))
    assert found.tolist() == [first.get(key, -1) for key in map(tuple, wanted.astype(np.uint64).tolist())]
    assert Lookup(keys[:0]).find(keys[:3]).tolist() == [-1] * 3
