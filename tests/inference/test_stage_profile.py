"""What measured times lead to."""

from __future__ import annotations

import math
import time

import pytest
import torch
from replay import gate

from aep_ext.inference import GatedNet, StageProfile
from aep_ext.inference.stage_profile import faster_without
from aep_ext.surgery.networks import build


def test_times_are_interpolated():
    profile = StageProfile((2, 4, 8), ((1.0, 3.0, 4.0), (2.0, 2.0, 2.0)))
    assert [profile.stage(0, n) for n in (0, 1, 2, 3, 4, 6, 8, 16)] == [0.0, 1.0, 1.0, 2.0, 3.0, 3.5, 4.0, 8.0]
    assert profile.ungated(4) == 5.0


def test_the_expected_time_of_a_sample():
    profile = StageProfile((1, 8), ((1.0, 4.0), (2.0, 8.0), (4.0, 16.0)))
    assert profile.predicted([1, 0, 0]) == 1.0 and profile.predicted([0, 0, 5]) == 7.0
    # By the formula: 2 samples of 1 ms, 1 of 1 + 2, 1 of 1 + 2 + 4.
    assert profile.predicted(torch.tensor([2, 1, 1])) == profile.predicted([0.5, 0.25, 0.25]) == (2 * 1 + 3 + 7) / 4
    # All to the end in a batch of eight; then half leave at the first exit.
    assert math.isclose(profile.predicted([0, 0, 3], rows=8), 28 / 8)
    half = 4.0 + profile.stage(1, 4) + profile.stage(2, 4)
    assert math.isclose(profile.predicted([1, 0, 1], rows=8), half / 8)
    for counts in ([1, 2], [0, 0, 0], [1, -1, 3], [1, math.nan, 3]):
        with pytest.raises(ValueError, match="predicted: counts must be 3 finite numbers, none negative, not all 0"):
            profile.predicted(counts)


def test_measuring_a_network():
    net = build("resnet_small", 5, in_channels=1).eval()
    gated, x = gate(net, lambda state: state.stats[:, 0] > 0.9, 0.0), torch.randn(6, 1, 12, 12)
    kept = x.clone()
    profile = gated.measure(x, repeats=2)
    assert gated.profile is profile and profile.sizes == (1, 2, 4, 6) and torch.equal(x, kept)
    assert len(profile.stages) == 4 and all(0 < value < 1e4 for row in profile.stages for value in row)
    assert gated.measure(x, sizes=[3], repeats=1).sizes == (3,)
    gated(x)
    for arguments, message in (
        ({"sizes": [7]}, r"sizes must be within 1..6, got \[7\]"),
        ({"sizes": []}, r"sizes must be within 1..6, got \[\]"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            gated.measure(x, **({"repeats": 1} | arguments))


def _two_exits() -> tuple[GatedNet, torch.Tensor]:
    """A gate at which every sample would leave."""
    net = build("resnet_small", 4).eval()
    return gate(net, "confidence", 0.0), torch.randn(9, 3, 8, 8)


def test_gates_stay_shut_at_batch_sizes_where_the_network_is_faster_without(monkeypatch: pytest.MonkeyPatch):
    gated, x = _two_exits()
    assert gated.gates_at(1) and gated.gates_at(1000)
    seen = []

    def slower(with_gates, without, example, sizes, repeats):
        seen.append((with_gates(x[:4]).exit.tolist(), without(x[:4]).exit.tolist(), tuple(sizes)))
        return frozenset({2, 4})

    monkeypatch.setattr("aep_ext.inference.gated_net.faster_without", slower)
    gated.measure(x, [2, 4, 8], repeats=1)
    assert seen == [([0] * 4, [3] * 4, (2, 4, 8))]
    assert [gated.gates_at(n) for n in (0, 1, 2, 3, 4, 7, 8, 9)] == [False] * 6 + [True] * 2
    for n in (1, 4, 7, 8, 9):  # below the first size measured it decides too
        found = gated(x[:n])
        assert set(found.exit.tolist()) == ({0} if n >= 8 else {3})
        reference = gated.net(x[:n]) if n < 8 else gated.simulate(gated.net.exit_logits(x[:n]).detach()).logits
        torch.testing.assert_close(found.logits, reference)


def test_whole_calls_are_timed_in_turn():
    calls = {"gated": [], "ungated": []}

    def timed(name, seconds):
        def call(batch):
            calls[name].append(len(batch))
            time.sleep(seconds(len(batch)))

        return call

    example = torch.zeros(8, 1)
    found = faster_without(
        timed("gated", lambda n: 0.004 if n < 4 else 0.001), timed("ungated", lambda n: 0.002), example, [1, 2, 4, 8], 2
    )
    assert found == {1, 2}
    assert calls["gated"] == calls["ungated"] and set(calls["gated"]) == {1, 2, 4, 8}
