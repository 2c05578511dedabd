from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aep_ext import ops
from aep_ext.inference import CRITERIA, ExitPolicy, Simulation, near_threshold, simulate


def simulated(logits, weights, criterion, thresholds, *, target=None, costs=None, **options) -> Simulation:
    """Of a policy whose numbers are given one by one."""
    names = {"on": "criterion_on"}
    policy = ExitPolicy(
        output_weights=weights,
        criterion=criterion,
        thresholds=thresholds,
        **{names.get(name, name): value for name, value in options.items()},
    )
    return simulate(logits, policy, target=target, costs=costs)


def gate_loop(logits, weights, policy, thresholds, temperatures, enabled, on):
    """A batch walked by the operator itself, with features to carry: what an executor does."""
    exits, n, classes = logits.shape
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    answers = {}
    state = torch.zeros(n, {"patience": 2, "vote": classes}.get(policy, 0), dtype=torch.int64)
    if policy == "patience":
        state[:, 0] = -1
    features, running = torch.arange(float(n))[:, None], torch.zeros(n, classes, dtype=acc)
    indices, total = torch.arange(n), 0.0
    for e in range(exits):
        last = e == exits - 1
        step = ops.gate(
            features,
            running,
            total,
            indices,
            state,
            logits[e][indices],
            weight=weights[e],
            threshold=0.0 if last else thresholds[e],
            temperature=temperatures[e],
            criterion=policy,
            criterion_on=on,
            enabled=False if last else enabled[e],
            last=last,
        )
        stay = int(step.count)
        for row in range(stay, len(indices)):
            answers[int(step.indices[row])] = (e, int(step.argmax[row]), step.stats[row, 0], step.running[row])
        assert step.features[:stay, 0].tolist() == [float(i) for i in step.indices[:stay]]
        features, running, indices = step.features[:stay], step.running[:stay], step.indices[:stay]
        state, total = step.state[:stay], step.weight_sum
    return [answers[i] for i in range(n)]


def one_sample(logits, weights, policy, thresholds, temperatures, enabled, on):
    """The definition, for one sample's (E, K) logits, on statistics of torch's own softmax: exit and prediction."""
    running, total, last_class, run = torch.zeros(logits.shape[1], dtype=logits.dtype), 0.0, -1, 0
    votes = [0] * logits.shape[1]
    for e, own in enumerate(logits):
        running = running + own * weights[e]
        total = total + weights[e]
        judged = running / (total * temperatures[e]) if on == "ensemble" else own / temperatures[e]
        p = torch.softmax(judged, dim=0)
        if e == len(logits) - 1:
            return e, int(running.argmax())
        if bool(p.isnan().any()):
            last_class, run = -1, 0
            continue
        top = int((running if on == "ensemble" else own).argmax())
        run = run + 1 if top == last_class else 1
        last_class = top
        votes[top] += 1
        ordered = p.sort(descending=True).values
        measure = {
            "confidence": float(ordered[0]),
            "entropy": -float(torch.special.entr(p).sum()),
            "margin": float(ordered[0] - ordered[1]) if len(p) > 1 else 1.0,
            "patience": run,
            "vote": max(votes),
        }[policy]
        if enabled[e] and measure >= (-thresholds[e] if policy == "entropy" else thresholds[e]):
            return e, int(running.argmax())
    raise AssertionError("the last exit answers")


@st.composite
def cases(draw):
    exits, n, classes = draw(st.integers(1, 4)), draw(st.integers(0, 6)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    if draw(st.booleans()):
        logits = torch.randn(exits, n, classes, generator=generator, dtype=torch.float64) * 2
    else:  # few distinct values: ties and equal confidences
        logits = torch.randint(-2, 3, (exits, n, classes), generator=generator).double()
    if n and draw(st.booleans()):
        spoilt = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        logits[draw(st.integers(0, exits - 1)), draw(st.integers(0, n - 1)), draw(st.integers(0, classes - 1))] = spoilt
    logits = logits.to(dtype)
    weights = draw(st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0, 2.0]), min_size=exits, max_size=exits))
    policy = draw(st.sampled_from(CRITERIA))
    on = draw(st.sampled_from(["ensemble", "exit"]))
    limit = st.integers(0, 4).map(float) if policy in ("patience", "vote") else st.floats(0, 1.2)
    thresholds = draw(st.lists(limit, min_size=exits - 1, max_size=exits - 1))
    temperatures = draw(st.lists(st.sampled_from([0.5, 1.0, 1.7]), min_size=exits, max_size=exits))
    enabled = draw(st.lists(st.booleans(), min_size=exits - 1, max_size=exits - 1))
    if draw(st.booleans()) and n and exits > 1 and policy in ("confidence", "entropy", "margin"):
        # A threshold that one sample meets exactly at the first exit.
        running = torch.zeros(n, classes, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        no_state = torch.zeros(n, 0, dtype=torch.int64)
        first = ops.gate(
            torch.zeros(n, 1),
            running,
            0.0,
            torch.arange(n),
            no_state,
            logits[0],
            weight=weights[0],
            threshold=0.0,
            temperature=temperatures[0],
            criterion_on=on,
            enabled=False,
        )
        column = {"confidence": 0, "entropy": 1, "margin": 2}[policy]
        value = float(first.stats[draw(st.integers(0, n - 1)), column])
        if not math.isnan(value):
            thresholds[0] = value
    return logits, weights, policy, thresholds, temperatures, enabled, on


@settings(deadline=None, max_examples=150)
@given(cases())
def test_agrees_with_a_loop_of_the_operator_bit_for_bit(case):
    logits, weights, policy, thresholds, temperatures, enabled, on = case
    result = simulated(logits, weights, policy, thresholds, temperatures=temperatures, enabled=enabled, on=on)
    loop = gate_loop(*case)
    for i, (exit_taken, prediction, confidence, running) in enumerate(loop):
        assert int(result.exit[i]) == exit_taken and int(result.prediction[i]) == prediction
        assert torch.equal(result.confidence[i].nan_to_num(-1), confidence.nan_to_num(-1))
        torch.testing.assert_close(result.logits[i], running.to(logits.dtype), rtol=0, atol=0, equal_nan=True)
    assert result.counts.tolist() == [sum(row[0] == e for row in loop) for e in range(len(weights))]


@settings(deadline=None, max_examples=150)
@given(cases())
def test_agrees_with_the_definition(case):
    logits, weights, policy, thresholds, temperatures, enabled, on = case
    # Away from the thresholds, where the last bit of another softmax decides.
    thresholds = [t + 0.37 / 1000 if policy in ("confidence", "entropy", "margin") else t for t in thresholds]
    result = simulated(logits, weights, policy, thresholds, temperatures=temperatures, enabled=enabled, on=on)
    for i in range(logits.shape[1]):
        rows = logits[:, i].to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
        expected = one_sample(rows, weights, policy, thresholds, temperatures, enabled, on)
        assert (int(result.exit[i]), int(result.prediction[i])) == expected


@settings(deadline=None, max_examples=50)
@given(cases())
def test_with_every_gate_disabled_the_answer_is_the_ensembles(case):
    logits, weights, policy, thresholds, temperatures, _, on = case
    result = simulated(logits, weights, policy, thresholds, temperatures=temperatures, enabled=False, on=on)
    assert (result.exit == len(weights) - 1).all()
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    total = sum((torch.tensor(w, dtype=acc) for w in weights), torch.zeros((), dtype=acc))
    expected = ops.ensemble(logits.to(acc), torch.tensor(weights, dtype=torch.float64)) / total
    torch.testing.assert_close(result.logits, expected.to(logits.dtype), rtol=0, atol=0, equal_nan=True)


@settings(deadline=None, max_examples=50)
@given(cases())
def test_a_criterion_of_the_users_that_copies_confidence(case):
    logits, weights, _, thresholds, temperatures, enabled, on = case
    if logits.dtype == torch.float64:
        logits = logits.float()
    options = {"temperatures": temperatures, "enabled": enabled, "on": on}
    theirs = simulated(logits, weights, "confidence", thresholds, **options)
    ours = simulated(
        logits, weights, lambda state: state.stats[:, 0] >= torch.tensor(state.threshold), thresholds, **options
    )
    assert torch.equal(ours.exit, theirs.exit) and torch.equal(ours.prediction, theirs.prediction)
    assert torch.equal(ours.confidence.nan_to_num(-1), theirs.confidence.nan_to_num(-1))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=0, equal_nan=True)


def test_a_threshold_met_exactly_lets_go():
    logits = torch.tensor([[[0.0, 0.0]], [[9.0, 0.0]]])
    for policy, threshold in (("confidence", 0.5), ("margin", 0.0), ("entropy", math.log(2) + 1e-6)):
        assert simulated(logits, [0.3, 0.7], policy, [threshold]).exit.tolist() == [0]
    assert simulated(logits, [0.3, 0.7], "confidence", [0.500001]).exit.tolist() == [1]
    assert simulated(logits, [0.3, 0.7], "entropy", [0.6]).exit.tolist() == [1]


def test_the_running_ensemble_is_normalised_and_tempered():
    # One exit alone is judged by its own softmax, whatever its weight.
    logits = torch.tensor([[[2.0, 0.0]], [[0.0, 0.0]]])
    confidence = float(torch.softmax(torch.tensor([2.0, 0.0]), dim=0)[0])
    result = simulated(logits, [0.01, 0.99], "confidence", [confidence - 1e-6])
    assert result.exit.tolist() == [0] and float(result.confidence) == pytest.approx(confidence)
    torch.testing.assert_close(result.logits, logits[0])  # R_e: over the sum of the weights so far
    cooler = simulated(logits, [0.01, 0.99], "confidence", [confidence - 1e-6], temperatures=[2.0, 1.0])
    assert cooler.exit.tolist() == [1]


def test_nan_never_leaves_early_and_is_wrong():
    logits = torch.zeros(3, 2, 3)
    logits[0, 0, 0] = math.nan
    logits[:, 1, 2] = 5
    for policy, threshold in (("confidence", 0.0), ("entropy", 9.0), ("margin", 0.0), ("patience", 0.0), ("vote", 0.0)):
        result = simulated(logits, [1.0, 1.0, 1.0], policy, threshold, target=torch.tensor([0, 2]))
        assert result.exit.tolist() == [2, 0] and result.correct.tolist() == [False, True]
        assert math.isnan(result.confidence[0])


def test_patience_and_votes():
    # Classes judged by the five exits alone: 0, 1, 1, 0, 1.
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 0, 1]), 2).float()[:, None] * 4
    weights = [1.0] * 5
    assert simulated(logits, weights, "patience", 2, on="exit").exit.tolist() == [2]
    assert simulated(logits, weights, "patience", 3, on="exit").exit.tolist() == [4]
    assert simulated(logits, weights, "vote", 2, on="exit").exit.tolist() == [2]
    # A disabled exit lets nobody go but is counted.
    assert simulated(logits, weights, "vote", 2, on="exit", enabled=[True, True, False, True]).exit.tolist() == [3]


def test_costs_targets_and_counts():
    logits = torch.zeros(2, 4, 3)
    logits[0, :3, 1] = 9
    logits[1, :, 2] = 1
    result = simulated(logits, [0.5, 0.5], "confidence", 0.9, target=torch.tensor([1, 1, 0, 2]), costs=[10, 26.0])
    assert result.exit.tolist() == [0, 0, 0, 1] and result.counts.tolist() == [3, 1]
    assert result.mean_cost == (3 * 10 + 26) / 4
    assert result.correct.tolist() == [True, True, False, True] and result.accuracy == 0.75
    bare = simulated(logits, [0.5, 0.5], "confidence", torch.tensor([0.9]))
    assert bare.mean_cost is None and bare.correct is None and bare.accuracy is None
    nothing = torch.zeros(0, dtype=torch.int64)
    none = simulated(logits[:, :0], [0.5, 0.5], "confidence", 0.9, target=nothing, costs=[1, 2])
    assert none.exit.shape == (0,) and math.isnan(none.mean_cost) and math.isnan(none.accuracy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3)}, r"exit_logits must have shape \[2, N, K\], got \[2, 3\]"),
        ({"logits": torch.zeros(3, 3, 4)}, r"exit_logits must have shape \[2, N, K\], got \[3, 3, 4\]"),
        ({"costs": [1.0]}, "simulate: costs must have 2 entries, got 1"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target must have shape \[3\], got \[2\]"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"logits": torch.zeros(2, 3, 4), "weights": [0.5, 0.5], "criterion": "confidence", "thresholds": 0.5}
    with pytest.raises(ValueError, match=message):
        simulated(**(arguments | change))


def test_logits_that_are_no_floating_tensor_are_refused():
    for logits, found in (([[[1.0]]], "list"), (torch.zeros(1, 1, 1, dtype=torch.int64), "torch.int64")):
        with pytest.raises(TypeError, match=f"simulate: exit_logits must be a floating tensor, got {found}"):
            simulated(logits, [1.0], "confidence", 0.5)


def test_samples_near_a_threshold():
    logits = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 0.0]])[None].repeat(2, 1, 1)
    confidence = float(torch.softmax(logits[0, 0], 0)[0])

    def near(criterion, thresholds, tolerance=1e-5, logits=logits, **options):
        weights = [0.5] * len(logits)
        policy = ExitPolicy(output_weights=weights, criterion=criterion, thresholds=thresholds, **options)
        return near_threshold(logits, policy, tolerance).tolist()

    assert near("confidence", confidence + 5e-6) == [True, False, False]
    assert near("confidence", confidence + 5e-6, 1e-7) == [False] * 3
    assert near("confidence", confidence + 5e-6, enabled=False) == [False] * 3
    assert near("entropy", 0.0, temperatures=2.0) == [False] * 3
    # Who has left is not near a later threshold; counts are near where the class hangs on a hair.
    assert near("confidence", [confidence - 0.1, confidence], logits=logits[:1].repeat(3, 1, 1)) == [False] * 3
    assert near("vote", 2.0) == [False, False, True]
    with pytest.raises(ValueError, match="near_threshold: criterion must be a name, got <lambda>"):
        near(lambda state: state.stats[:, 0] > 0.5, 0.0)
