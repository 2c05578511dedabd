"""Paired timing, on a clock that the test turns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aep_ext.training.timing import (
    DISTINCT_BATCHES,
    LEAST_TURNS,
    Times,
    draw_batches,
    latency,
    ratio_of_sums,
    time_in_turn,
)


@pytest.mark.parametrize("samples, rows", [(512, 1), (512, 4), (512, 256), (30, 64), (7, 3), (1, 1), (1, 4)])
def test_batches_use_every_sample_before_one_twice(samples, rows):
    batches = draw_batches(samples, rows)
    assert all(batch.shape == (rows,) and batch.dtype == torch.int64 for batch in batches)
    assert len(batches) == max(samples // rows, DISTINCT_BATCHES if samples > 1 else 1)
    used = torch.cat(batches).bincount(minlength=samples)
    assert used.max() - used.min() <= 1
    assert all(map(torch.equal, batches, draw_batches(samples, rows)))  # the same at every call
    if rows <= samples < 2 * rows:
        assert len(batches[0].unique()) == rows


class Clock:
    """A clock that calls move."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def __call__(self) -> float:
        return self.now

    def network(self, name, seconds):
        def call(x):
            self.now += seconds * float(x)
            self.calls.append((name, float(x)))

        return call


def test_calls_take_turns_on_the_same_batches():
    clock = Clock()
    batches = [torch.tensor(v) for v in (1.0, 2.0, 3.0)]
    times = time_in_turn(
        {"slow": clock.network("slow", 2.0), "fast": clock.network("fast", 1.0)}, batches, 60.0, clock=clock
    )
    for b, value in enumerate((1.0, 2.0, 3.0)):
        assert set(times["slow"].batches[b]) == {2 * value} and set(times["fast"].batches[b]) == {value}
        assert len(times["slow"].batches[b]) == len(times["fast"].batches[b])
    timed = clock.calls[4:]  # the first calls tell who is short
    assert timed[:6] == [("slow", 1), ("fast", 1), ("fast", 2), ("slow", 2), ("slow", 3), ("fast", 3)]
    assert 60 <= clock.now <= 60 + 6 + 9 + 6


def test_short_calls_follow_one_that_is_not_timed():
    clock = Clock()
    times = time_in_turn({"a": clock.network("a", 1e-4)}, [torch.tensor(1.0), torch.tensor(2.0)], 0.0, clock=clock)
    assert clock.calls[2:6] == [("a", 2), ("a", 1), ("a", 1), ("a", 2)]  # the batch before, then the batch
    assert sum(map(len, times["a"].batches)) == LEAST_TURNS
    assert np.allclose(times["a"].typical(), [1e-4, 2e-4])


def test_fewer_batches_where_the_time_does_not_last_for_all():
    """An interruption can only be told by repeating."""
    for seconds, expected in ((0.0, 5), (10.0, 8), (100.0, 20), (1000.0, 40)):
        clock = Clock()
        times = time_in_turn({"a": clock.network("a", 1.0)}, [torch.tensor(1.0)] * 40, seconds, clock=clock)
        lengths = [len(taken) for taken in times["a"].batches if taken]
        assert len(lengths) == expected and max(lengths) - min(lengths) <= 1
        assert times["a"].batches[:expected] == tuple((1.0,) * n for n in lengths)


def test_a_batch_without_a_call_is_left_out():
    times = Times(((1.0, 3.0, 2.0), (), (4.0,)))
    assert times.typical().tolist() == [2.0, 4.0] and sorted(times.calls()) == [1.0, 2.0, 3.0, 4.0]
    found = latency(times, 8)
    assert found["p50_ms"] == 2500.0 and found["images_per_s"] == pytest.approx(8 * 4 / 10)
    assert found["p50_ms"] < found["p95_ms"] < found["p99_ms"] <= 4000.0


def test_the_ratio_is_that_of_the_sums():
    slow, fast = np.array([10.0, 10.0, 10.0, 10.0]), np.array([1.0, 1.0, 1.0, 17.0])
    ratio, interval = ratio_of_sums(slow, fast)
    assert ratio == 2.0  # the median of the ratios would be 10
    assert interval[0] < ratio < interval[1]
    assert ratio_of_sums(slow, fast) == (ratio, interval)
    same, (low, high) = ratio_of_sums(slow, slow / 2)
    assert same == low == high == 2.0


def test_the_bootstrap_interval_covers_the_truth():
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        fast = generator.gamma(4.0, 1.0, 60)
        slow = 2 * fast * generator.lognormal(0.0, 0.2, 60) / np.exp(0.02)
        _, (low, high) = ratio_of_sums(slow, fast, seed=seed)
        covered += low <= 2.0 <= high
    assert covered >= 85
