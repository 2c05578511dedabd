"""Executor and simulator on the same cached logits: exit, prediction, confidence and logits, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from replay import gate, numbered, replay_net
from torch import Tensor

from aep_ext import GatedNet, ops
from aep_ext.inference import CRITERIA, GatedOutput, Simulation, simulate


def clever(state) -> Tensor:
    """A user's own criterion that looks at everything it is given."""
    odd = state.indices % 2 == 1
    return odd & (state.stats[:, 0] + state.exit_index * 0.05 >= state.threshold) | (state.prediction == 0)


def same(output: GatedOutput, expected: Simulation, sharp: bool = True) -> None:
    assert torch.equal(output.exit, expected.exit)
    assert torch.equal(output.confidence.nan_to_num(-1), expected.confidence.nan_to_num(-1))
    assert output.logits.dtype == expected.logits.dtype
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=0, equal_nan=True)
    if sharp:  # logits rounded to bfloat16 may tie where the sum they come from does not
        assert torch.equal(output.logits.argmax(-1), expected.prediction)


@st.composite
def cases(draw, sizes=(0, 1, 7, 64, 257)):
    exits, classes = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 5, 10]))
    n = draw(st.sampled_from(sizes))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    if draw(st.booleans()):
        logits = torch.randn(exits, n, classes, generator=generator, dtype=torch.float64) * 2
    else:  # few distinct values: ties and equal confidences
        logits = torch.randint(-2, 3, (exits, n, classes), generator=generator).double()
    if n and draw(st.booleans()):
        spoilt = torch.rand(logits.shape, generator=generator) < 0.02
        logits[spoilt] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    weights = draw(st.lists(st.sampled_from([0.1, 0.25, 0.3, 1.0, 2.0]), min_size=exits, max_size=exits))
    name = draw(st.sampled_from([*CRITERIA, clever]))
    on = draw(st.sampled_from(["ensemble", "exit"]))
    limit = st.integers(0, 4).map(float) if name in ("patience", "vote") else st.floats(0, 1.2)
    thresholds = draw(st.lists(limit, min_size=exits - 1, max_size=exits - 1))
    temperatures = draw(st.lists(st.sampled_from([0.5, 1.0, 1.7]), min_size=exits, max_size=exits))
    enabled = draw(st.lists(st.sampled_from([True, True, False]), min_size=exits - 1, max_size=exits - 1))
    net = replay_net(logits.to(dtype), weights)
    options = {"criterion_on": on, "temperatures": temperatures, "enabled": enabled}
    return gate(net, name, thresholds, **options), logits.to(dtype)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_executor_and_simulator_agree_bit_for_bit(case):
    gated, logits = case
    sharp = logits.dtype != torch.bfloat16
    output = gated(numbered(0, logits.shape[1]))
    same(output, gated.simulate(logits), sharp)
    same(output, simulate(logits, gated.policy), sharp)


@settings(deadline=None, max_examples=60)
@given(cases(sizes=(0, 1, 7)))
def test_one_by_one_and_simulator_agree_bit_for_bit(case):
    gated, logits = case
    assume(isinstance(gated.policy.criterion, str))  # the user's own looks at the number in the batch
    singles = [gated(x) for x in numbered(0, logits.shape[1]).split(1)]
    joined = GatedOutput(*(torch.cat(column) for column in zip(*singles, strict=True)))
    same(joined, gated.simulate(logits), logits.dtype != torch.bfloat16)


@settings(deadline=None, max_examples=100)
@given(cases(), st.data())
def test_pooled_batches_are_answered_as_alone(case, data):
    gated, logits = case
    total = logits.shape[1]
    capacity = data.draw(st.sampled_from([1, 3, 16, 100]))
    max_delay = data.draw(st.sampled_from([0, 1, 3, None]))
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=8)))
    bounds = list(zip([0, *cuts], [*cuts, total], strict=True))

    def loader() -> Iterator[Tensor]:
        yield from (numbered(first, end) for first, end in bounds)

    outputs = list(gated.predict(loader(), capacity=capacity, max_delay=max_delay))
    assert [len(o.exit) for o in outputs] == [end - first for first, end in bounds]
    joined = GatedOutput(*(torch.cat(column) for column in zip(*outputs, strict=True)))
    same(joined, gated.simulate(logits), logits.dtype != torch.bfloat16)
    # Every row is computed at most once by every stage.
    assert all(sum(stage.rows) <= total for stage in gated.net.stages)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_with_every_gate_off_the_output_is_the_ensembles(case):
    gated, logits = case
    gated.enabled.fill_(False)
    x = numbered(0, logits.shape[1])
    for output in (gated(x), GatedNet(gated.net, replace(gated.policy, enabled=False))(x)):
        assert (output.exit == gated.num_exits - 1).all()
        acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
        weights = gated.net.output_weights
        total = sum(weights.to(acc).unbind(), torch.zeros((), dtype=acc))
        expected = (ops.ensemble(logits.to(acc), weights) / total).to(logits.dtype)
        torch.testing.assert_close(output.logits, expected, rtol=0, atol=0, equal_nan=True)


def test_stages_see_those_who_are_still_there():
    """Half leave at the first exit, the other half at the last."""
    logits = torch.zeros(3, 8, 2)
    logits[0, ::2, 0] = 9
    for enabled, rows, exits in ((True, [8, 4, 4], [0, 2] * 4), (False, [8, 8, 8], [2] * 8)):
        net = replay_net(logits, [0.2, 0.3, 0.5])
        output = gate(net, "confidence", [0.9, 1.1], enabled=enabled)(numbered(0, 8))
        assert [stage.rows[0] for stage in net.stages] == rows and output.exit.tolist() == exits
    net = replay_net(logits[:2] + logits[:1], [0.5, 0.5])
    assert gate(net, "confidence", 0.0)(numbered(0, 8)).exit.eq(0).all()
    assert net.stages[1].rows == []  # nobody went on


def test_a_criterion_of_the_users_sees_those_who_are_there():
    seen = []

    def rule(state):
        seen.append((state.exit_index, state.indices.tolist()))
        return state.indices >= 2

    gated = gate(replay_net(torch.randn(3, 4, 2), [1.0] * 3), rule, 0.0)
    assert gated(numbered(0, 4)).exit.tolist() == [2, 2, 0, 0]
    assert seen == [(0, [0, 1, 2, 3]), (1, [0, 1])]
