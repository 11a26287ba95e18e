"""The order of samples: a pure function, exact over epochs, at random access."""

import time
import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from distill.core.data.hashing import combine, fractions, permute
from distill.core.data.order import Curriculum, SampleOrder, Span, Stream
from distill.core.errors import UserError

STREAMS = [Stream("a/1", 7, Fraction(2)), Stream("a/2", 3, Fraction(2)), Stream("b/1", 5, Fraction(1, 2))]


@pytest.mark.parametrize("size", [1, 2, 3, 17, 4096, 4097, 70_000])
def test_permutations_are_permutations(size):
    seen = [permute(np.arange(size), size, key) for key in (1, 2)]
    assert all(np.array_equal(np.sort(each), np.arange(size)) for each in seen)
    if size > 4:
        assert not np.array_equal(*seen)
        single = [int(permute(np.array([place]), size, 1)[0]) for place in (0, size // 2, size - 1)]
        assert single == seen[0][[0, size // 2, size - 1]].tolist()


@pytest.mark.parametrize("size", [1000, 5000])
def test_permutations_look_random(size):
    first = np.array([permute(np.array([0]), size, key)[0] for key in range(400)])
    assert abs(first.mean() / size - 0.5) < 0.06
    order = permute(np.arange(size), size, 7)
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.06
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06


def test_every_sample_comes_exactly_as_often_as_asked():
    order = SampleOrder(STREAMS, global_batch=4, seed=3)
    epochs = 8  # 8 x (14, 6, 2.5) samples are whole batches of 4
    steps = round(order.steps_per_epoch * epochs)
    assert steps * 4 == 8 * 22.5
    counts = Counter((batch.stream, int(i)) for batch in map(order.at, range(steps)) for i in batch.indices)
    for number, stream in enumerate(STREAMS):
        assert {counts[number, index] for index in range(stream.size)} == {int(stream.rate * epochs)}


def test_no_sample_falls_behind_after_any_epoch():
    order = SampleOrder(STREAMS, global_batch=4, seed=3)
    counts = {number: np.zeros(stream.size, int) for number, stream in enumerate(STREAMS)}
    epoch = 0
    for step in range(200):
        batch = order.at(step)
        if batch.epoch > epoch:
            epoch = batch.epoch
            assert all(np.ptp(each) <= 1 for each in counts.values())
        np.add.at(counts[batch.stream], batch.indices, 1)
    assert epoch > 20
    assert order.epoch_of(199) == order.at(199).epoch


def test_random_access_equals_sequential_steps():
    sequential = [SampleOrder(STREAMS, global_batch=4, seed=1).at(step).indices.tolist() for step in range(60)]
    order = SampleOrder(STREAMS, global_batch=4, seed=1)
    assert [order.at(step).indices.tolist() for step in range(60)] == sequential
    for step in (59, 0, 31, 30):
        assert order.at(step).indices.tolist() == sequential[step]
    assert [SampleOrder(STREAMS, global_batch=4, seed=2).at(step).indices.tolist() for step in range(60)] != sequential


def test_steps_computed_together_equal_steps_computed_alone():
    streams = [Stream("a", 70_000), Stream("b", 5000, Fraction(7, 3), 12), Stream("c", 3, Fraction(3))]
    order = SampleOrder(streams, global_batch=4, seed=2)
    for start in (0, 17_000, int(2 * order.steps_per_epoch) - 3000):
        sequential = [order.at(step) for step in range(start, start + 6000)]
        for step in (*range(0, 6000, 97), 5999):
            alone = SampleOrder(streams, global_batch=4, seed=2).at(start + step)
            assert (alone.stream, alone.epoch) == (sequential[step].stream, sequential[step].epoch)
            assert alone.indices.tolist() == sequential[step].indices.tolist()


def test_epochs_are_shuffled_differently():
    order = SampleOrder([Stream("a", 64)], global_batch=4, seed=0)
    epochs = [[order.at(step).indices.tolist() for step in range(16 * e, 16 * e + 16)] for e in range(2)]
    assert np.array_equal(np.sort(epochs[0], axis=None), np.arange(64))
    assert np.array_equal(np.sort(epochs[1], axis=None), np.arange(64))
    assert epochs[0] != epochs[1]


def test_an_order_of_tens_of_millions_of_samples_is_cheap():
    order = SampleOrder([Stream("a", 30_000_000, Fraction(101)), Stream("b", 40_000_000)], global_batch=16, seed=0)
    order.at(0)
    start = time.process_time()
    for step in range(0, 10**8, 10**7):
        order.at(step)
    assert (time.process_time() - start) / 10 < 0.01
    tracemalloc.start()
    order.at(123_456_789)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_a_bucket_smaller_than_the_batch_waits_until_it_fills_one():
    order = SampleOrder([Stream("large", 8), Stream("small", 1)], global_batch=4, seed=0)
    batches = [order.at(step) for step in range(9)]  # four epochs: 8 + 1 batches
    assert Counter(batch.stream for batch in batches) == {0: 8, 1: 1}


def test_curriculum_changes_datasets_at_its_steps():
    spans = [Span(0, 10), Span(5, None)]
    plan = Curriculum([Stream("a", 6), Stream("b", 6)], spans, global_batch=2, seed=0)
    used = [plan.at(step).stream for step in range(40)]
    assert set(used[:5]) == {0}
    assert set(used[5:10]) == {0, 1}
    assert set(used[10:]) == {1}
    assert plan.at(7).indices.tolist() == plan.at(7).indices.tolist()
    with pytest.raises(UserError, match="no dataset is in use at step 3"):
        Curriculum([Stream("a", 6)], [Span(5)], global_batch=2, seed=0).at(3)


def test_hashes_depend_on_everything():
    identity = np.arange(20, dtype=np.uint64).reshape(10, 2)
    base = combine(identity, [np.zeros(10, np.int64), np.ones(10, np.int64)])
    swapped = combine(identity, [np.ones(10, np.int64), np.zeros(10, np.int64)])
    assert len(np.unique(np.concatenate([base, swapped]), axis=0)) == 20
    rng = np.arange(20_000, dtype=np.uint64)
    one, two = fractions(rng, 1), fractions(rng, 2)
    assert abs(one.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.03
