"""What measured times lead to."""

from __future__ import annotations

import math
import time

import pytest
import torch
from replay import gate, numbered, replay_net

from aep_ext.inference import GatedNet, StageProfile
from aep_ext.inference.stage_profile import faster_without
from aep_ext.surgery.networks import build

LINEAR = StageProfile((1, 8), ((1.0, 8.0),) * 3, ((0.1, 0.1),) * 3, ((0.1, 0.8),) * 2)
"""Three stages of 1 ms a row, copies of 0.1 ms a row."""
FLAT = StageProfile((1, 8), ((8.0, 8.0),) * 3, ((0.1, 0.1),) * 3, ((0.1, 0.8),) * 2)
"""A row costs as much as eight: cutting rows down saves nothing."""


def test_costs_are_interpolated():
    costs = StageProfile((2, 4, 8), ((1.0, 3.0, 4.0), (2.0, 2.0, 2.0)), ((0.1, 0.2, 0.3),) * 2, ((0.5, 0.5, 0.5),))
    assert [costs.stage(0, n) for n in (0, 1, 2, 3, 4, 6, 8, 16)] == [0.0, 1.0, 1.0, 2.0, 3.0, 3.5, 4.0, 8.0]
    assert costs.rest(0, 4) == 2.0 and costs.rest(1, 4) == 0.0 and costs.ungated(4) == 5.0
    assert costs.gate(1, 4) == 0.2 and costs.copy(0, 3) == 0.5


def test_rows_are_cut_down_where_that_is_the_cheapest_way_to_the_end():
    assert LINEAR.compacts(0, 8, 4) and LINEAR.compacts(1, 8, 7)
    assert not FLAT.compacts(0, 8, 4) and not FLAT.compacts(1, 8, 1)
    # The copy is dear here and nearly free at the next exit, and the stage between costs the same for all sizes.
    later = StageProfile((1, 8), ((1.0, 8.0), (1.0, 1.0), (1.0, 8.0)), ((0.1, 0.1),) * 3, ((3.0, 3.0), (0.1, 0.1)))
    assert not later.compacts(0, 8, 2) and later.compacts(1, 8, 2)


def test_cutting_down_is_never_dearer_than_carrying_all_on():
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        numbers = (torch.rand(4 + 4 + 3, 3, generator=generator) * 5).tolist()
        costs = StageProfile(
            (1, 4, 16), *(tuple(map(tuple, part)) for part in (numbers[:4], numbers[4:8], numbers[8:]))
        )
        for e in range(3):
            for stay in range(1, 16):
                if costs.compacts(e, 16, stay):
                    assert costs.copy(e, stay) + costs.rest(e, stay) <= costs.rest(e, 16) + 1e-9


def test_the_expected_time_of_a_sample():
    costs = StageProfile((1, 8), ((1.0, 4.0), (2.0, 8.0), (4.0, 16.0)), ((0.1, 0.2),) * 3, ((0.5, 1.0),) * 2)
    assert costs.predicted([1, 0, 0]) == 1.0 and costs.predicted([0, 0, 5]) == 7.0
    # By the formula: 2 samples of 1 ms, 1 of 1 + 2, 1 of 1 + 2 + 4.
    assert costs.predicted(torch.tensor([2, 1, 1])) == costs.predicted([0.5, 0.25, 0.25]) == (2 * 1 + 3 + 7) / 4
    assert math.isclose(costs.predicted([2, 1, 1], gates=True), 12 / 4 + (2 * 0.1 + 0.2 + 0.3) / 4)
    # All to the end in a batch of eight; then half leave at the first exit and four rows are copied.
    assert math.isclose(costs.predicted([0, 0, 3], rows=8), 28 / 8)
    half = 4.0 + costs.stage(1, 4) + costs.stage(2, 4)
    assert math.isclose(costs.predicted([1, 0, 1], rows=8), half / 8)
    gates = 0.2 + 2 * costs.gate(1, 4) + costs.copy(0, 4)
    assert math.isclose(costs.predicted([1, 0, 1], rows=8, gates=True), (half + gates) / 8)
    for counts, message in (
        ([1, 2], "counts must have 3 entries, got 2"),
        ([0, 0, 0], r"counts must be finite, none negative, not all 0, got \[0.0, 0.0, 0.0\]"),
        ([1, -1, 3], "none negative"),
        ([1, math.nan, 3], "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            costs.predicted(counts)
    with pytest.raises(ValueError, match="rows must be at least 1, the smallest size measured, got 0"):
        costs.predicted([1, 1, 1], rows=0)


@pytest.mark.parametrize(("costs", "expected"), [(None, [8, 4, 4]), (LINEAR, [8, 4, 4]), (FLAT, [8, 8, 8])])
def test_auto_goes_by_the_costs_and_by_hand_does_not(costs, expected):
    logits = torch.zeros(3, 8, 2)
    logits[0, ::2, 0] = 9
    for mode, rows in (("auto", expected), ("compact", [8, 4, 4]), ("mask", [8, 8, 8])):
        net = replay_net(logits, [0.2, 0.3, 0.5])
        gated = gate(net, "confidence", [0.9, 1.1], mode)
        gated.use_profile(costs)
        assert gated(numbered(0, 8)).exit.tolist() == [0, 2] * 4
        assert [stage.rows[0] for stage in net.stages] == rows


def test_measuring_a_network():
    net = build("resnet_small", 5, in_channels=1).eval()
    gated, x = gate(net, lambda state: state.stats[:, 0] > 0.9, 0.0), torch.randn(6, 1, 12, 12)
    kept = x.clone()
    costs = gated.measure(x, repeats=2)
    assert gated.profile is costs and costs.sizes == (1, 2, 4, 6) and torch.equal(x, kept)
    assert len(costs.stages) == len(costs.gates) == 4 and len(costs.copies) == 3
    assert all(value > 0 for row in (*costs.gates, *costs.copies) for value in row)
    assert all(0 <= value < 1e4 for row in costs.stages for value in row)
    assert gated.measure(x, sizes=[3], repeats=1).sizes == (3,)
    gated(x)
    for arguments, message in (
        ({"sizes": [7]}, r"sizes must be within 1..6, got \[7\]"),
        ({"sizes": []}, r"sizes must be within 1..6, got \[\]"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            gated.measure(x, **({"repeats": 1} | arguments))
    with pytest.raises(ValueError, match="profile must be of 4 exits, got 3"):
        gated.use_profile(LINEAR)


def test_costs_of_another_shape_are_refused():
    for sizes in ((), (0, 1), (2, 2)):
        with pytest.raises(ValueError, match="sizes must be positive and ascending"):
            StageProfile(sizes, (), (), ())
    with pytest.raises(ValueError, match=r"copies must have 1 rows of 1 entries, got \[1, 1\]"):
        StageProfile((1,), ((1.0,),) * 2, ((1.0,),) * 2, ((1.0,),) * 2)
    assert not math.isnan(LINEAR.stage(0, 3))


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
        reference = gated.net(x[:n]) if n < 8 else gated.simulate(gated.net.exit_logits(x[:n])).logits
        torch.testing.assert_close(found.logits, reference)
    gated.mode = ("compact", "auto", "auto")  # what was fixed by hand is not given up
    assert gated(x[:4]).exit.tolist() == [0] * 4
    gated.use_profile(gated.profile)
    assert gated.gates_at(4)


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
