"""Pooled batches: full late stages, order kept, memory bounded, delay bounded."""

from __future__ import annotations

import itertools

import pytest
import torch
from replay import gate, numbered, replay_net
from torch import nn

from aep_ext import MultiExitNet
from aep_ext.inference import ContinuousBatcher, GatedNet


def waiting(batcher: ContinuousBatcher) -> int:
    """Samples whose features are held."""
    return sum(pool.count for pool in batcher._pools.values())


def some_stay(every: tuple[int, ...], n: int) -> torch.Tensor:
    """Exit logits (E, n, 2) by which only every k-th sample is unsure at exit e; a later k must be a multiple."""
    logits = torch.zeros(len(every) + 1, n, 2)
    logits[:, :, 0] = 9
    for e, k in enumerate(every):
        logits[: e + 1, ::k] = 0
    return logits


def gated_net(logits: torch.Tensor, **options) -> GatedNet:
    return gate(replay_net(logits, [1.0] * len(logits)), "confidence", 0.9, **options)


def test_late_stages_run_on_full_batches():
    gated = gated_net(some_stay((4, 8), 320))
    outputs = list(gated.predict(numbered(0, 320).split(16), max_delay=None))
    assert torch.cat([o.exit for o in outputs]).tolist() == [2, 0, 0, 0, 1, 0, 0, 0] * 40
    first, second, third = (stage.rows for stage in gated.net.stages)
    assert first == [16] * 20 and second == [16] * 5 and third == [16] * 2 + [8]
    alone = gated_net(some_stay((4, 8), 320))
    assert [len(alone(x).exit) for x in numbered(0, 320).split(16)] == [16] * 20
    assert alone.net.stages[2].rows == [2] * 20


def test_a_batch_that_nobody_leaves_is_not_held_back():
    gated = gated_net(torch.zeros(3, 64, 2))
    stream = gated.predict(numbered(0, 64).split(16))
    for _ in range(4):
        assert next(stream).exit.tolist() == [2] * 16
    assert gated.net.stages[2].rows == [16] * 4


def endless(period: int):
    """Batches of 8 for ever; the inputs repeat."""
    for start in itertools.cycle(range(0, period, 8)):
        yield numbered(start, start + 8)


@pytest.mark.parametrize("capacity", [4, 8, 32])
@pytest.mark.parametrize("max_delay", [1, 5, 40])
def test_an_endless_stream_stays_within_its_bounds(capacity, max_delay):
    # One sample in a thousand stays at the second exit: unless it is carried on, it blocks all answers after it.
    logits = some_stay((10, 1000), 1000)
    gated = gated_net(logits)
    batcher, read, given, most = gated.batcher(capacity, max_delay), 0, 0, 0
    expected = gated.simulate(logits).exit
    for x in itertools.islice(endless(1000), 500):
        outputs = batcher.push(x)
        read += 1
        for output in outputs:
            first = given * 8 % 1000
            assert torch.equal(output.exit, expected[first : first + 8])
            given += 1
        assert batcher.unanswered == read - given <= max_delay
        assert waiting(batcher) <= 2 * (capacity - 1)
        most = max(most, waiting(batcher))
    assert most > 0
    assert len(batcher.flush()) == read - given and waiting(batcher) == batcher.unanswered == 0
    stream = gated.predict(endless(1000), capacity=capacity, max_delay=max_delay)
    assert sum(len(output.exit) for output in itertools.islice(stream, 100)) == 800


def test_what_the_pools_hold_is_no_more_than_their_rows():
    """Rows that went on do not stay in memory behind those that wait."""
    gated = gated_net(some_stay((2, 4), 100))
    batcher, held = gated.batcher(capacity=10, max_delay=None), 0
    for first, end in ((0, 9), (9, 40), (40, 47), (47, 100)):
        batcher.push(numbered(first, end))
        for pool in batcher._pools.values():
            for features, rows in pool.parts:
                for column in (features, *rows):
                    assert column.untyped_storage().nbytes() <= column.numel() * column.element_size()
                    held += 1
    assert held > 10


def test_delay_zero_and_flush():
    gated = gated_net(some_stay((4, 8), 64))
    batcher = gated.batcher(capacity=16, max_delay=0)
    for x in numbered(0, 64).split(8):
        assert [len(o.exit) for o in batcher.push(x)] == [8] and batcher.unanswered == 0
    assert batcher.flush() == []
    lazy = gated.batcher(capacity=16, max_delay=None)
    assert lazy.push(numbered(0, 8)) == [] and waiting(lazy) == 2
    assert [o.exit.tolist() for o in lazy.flush()] == [[2, 0, 0, 0, 1, 0, 0, 0]]


def test_batches_of_any_size_and_form():
    logits = some_stay((2, 4), 40)
    gated = gated_net(logits)
    loader = [numbered(0, 0), (numbered(0, 1), "label"), [numbered(1, 30)], numbered(30, 30), numbered(30, 40)]
    outputs = list(gated.predict(loader, capacity=7))
    assert [len(o.exit) for o in outputs] == [0, 1, 29, 0, 10]
    assert torch.equal(torch.cat([o.exit for o in outputs]), gated.simulate(logits).exit)
    assert list(gated.predict([])) == []
    assert gated.predict_all([numbered(0, 0)]).logits.shape == (0, 2)
    with pytest.raises(ValueError, match="loader must give at least one batch, got none"):
        gated.predict_all([])
    for item in ("images", {"x": 1}, (), ("a", "b")):
        with pytest.raises(TypeError, match="GatedNet.predict: loader must yield tensors, tuples that begin"):
            list(gated.predict([item]))
    with pytest.raises(ValueError, match="ContinuousBatcher: capacity must be at least 1, got 0"):
        gated.batcher(capacity=0)
    with pytest.raises(ValueError, match="ContinuousBatcher: max_delay must be at least 0, got -1"):
        gated.predict([], max_delay=-1)


def test_the_numbers_are_those_at_the_start_of_the_stream():
    gated = gated_net(some_stay((4, 8), 64))
    stream = gated.predict(numbered(0, 64).split(8), max_delay=None)
    first = [next(stream)]
    gated.enabled.fill_(False)
    exits = torch.cat([o.exit for o in (*first, *stream)]).tolist()
    assert exits == [2, 0, 0, 0, 1, 0, 0, 0] * 8
    assert isinstance(gated.batcher(), ContinuousBatcher)


def test_features_of_channels_last_networks_stay_so_in_the_pools():
    seen = []

    class Note(nn.Conv2d):
        def forward(self, x):
            seen.append((len(x), x.is_contiguous(memory_format=torch.channels_last)))
            return super().forward(x)

    class Head(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    net = MultiExitNet([nn.Conv2d(3, 4, 3), Note(4, 4, 3)], [Head(), Head()], num_classes=4).eval()
    net = net.to(memory_format=torch.channels_last)
    x = torch.randn(60, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    values = torch.softmax(Head()(net.stages[0](x)).detach(), -1).amax(-1).sort().values
    gated = gate(net, "confidence", float(values[29:31].mean()))
    assert gated.predict_all(x.split(7), capacity=9).exit.sum() == 30
    assert all(last for _, last in seen) and [n for n, _ in seen] == [9, 9, 9, 3]
