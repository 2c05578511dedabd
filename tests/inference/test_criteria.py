"""Criteria by name and of the user's own, and the record of a policy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from aep_ext.inference import CRITERIA, ExitPolicy
from aep_ext.inference.criteria import gate_step, initial_state


def test_initial_states():
    assert CRITERIA == ("confidence", "entropy", "margin", "patience", "vote")
    assert initial_state("confidence", 3, 10).shape == (3, 0)
    assert initial_state("patience", 2, 10).tolist() == [[-1, 0], [-1, 0]]
    votes = initial_state("vote", 2, 4)
    assert votes.tolist() == [[0] * 4] * 2 and votes.dtype == torch.int64
    assert initial_state(lambda state: state.indices > 0, 3, 10).shape == (3, 0)


def step(criterion, on, features, logits, **options):
    n, classes = logits.shape
    rows = (features, torch.zeros(n, classes), 0.0, torch.arange(n), initial_state(criterion, n, classes), logits)
    return gate_step(criterion, on, *rows, exit_index=0, weight=0.5, **options)


@pytest.mark.parametrize("on", ["ensemble", "exit"])
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_a_criterion_of_the_users_partitions_as_the_operator_does(on, enabled, last):
    logits = torch.randn(9, 4) * 2
    logits[3, 1] = math.nan
    features = torch.randn(9, 5, 2, 2).contiguous(memory_format=torch.channels_last)
    seen = []

    def rule(state):
        seen.append(state)
        return state.stats[:, 0] >= state.threshold

    options = {"threshold": 0.6, "temperature": 1.5, "enabled": enabled, "last": last}
    ours = step(rule, on, features, logits, **options)
    theirs = step("confidence", on, features, logits, **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=0, equal_nan=True)
    assert ours.features.is_contiguous(memory_format=torch.channels_last)
    assert bool(seen) == (enabled and not last)
    if seen:
        assert seen[0].exit_index == 0 and seen[0].indices.tolist() == list(range(9))
        expected = torch.softmax(seen[0].logits, dim=1).amax(dim=1)
        torch.testing.assert_close(expected, seen[0].stats[:, 0], equal_nan=True)


def test_a_criterion_of_the_users_cannot_release_a_nan():
    logits = torch.zeros(2, 3)
    logits[0, 0] = math.nan

    def everybody(state):
        return torch.ones(len(state.indices), dtype=torch.bool)

    result = step(everybody, "ensemble", torch.zeros(2, 1), logits, threshold=0.0)
    assert int(result.count) == 1 and result.indices.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda state: state.stats[:, 0], r"torch.float32 \[2\]"),
        (lambda state: torch.ones(1, dtype=torch.bool), r"torch.bool \[1\]"),
        (lambda state: True, "bool"),
    ],
)
def test_a_criterion_of_the_users_must_answer_with_bools(answer, found):
    with pytest.raises(ValueError, match=rf"criterion <lambda>: must return a bool tensor of shape \[2\], got {found}"):
        step(answer, "ensemble", torch.zeros(2, 1), torch.zeros(2, 3), threshold=0.0)


def test_a_policy_is_a_record():
    policy = ExitPolicy(
        output_weights=torch.tensor([0.25, 0.5, 0.25]),
        thresholds=np.float32([0.5, 1.0]),
        temperatures=2,
        enabled=torch.tensor([True, False]),
        criterion="entropy",
        criterion_on="exit",
        exits=(0, 2, 3),
    )
    assert policy.num_exits == 3 and policy.temperatures == (2.0,) * 3 and policy.enabled == (True, False)
    assert ExitPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    assert "exit 3: disabled" in str(policy) and "entropy of the exit" in str(policy)
    found = policy._repr_html_()
    assert "ExitPolicy: entropy of the exit" in found and "<td>3</td><td>disabled</td>" in found
    assert ExitPolicy(output_weights=[1.0]).thresholds == ()
    with pytest.raises(ValueError, match="criterion must be a name, got rule"):

        def rule(state):
            return state.indices > 0

        ExitPolicy(output_weights=[1.0], criterion=rule).to_dict()
    for broken in ({"exits": [0]}, {"luck": 1}):
        with pytest.raises((TypeError, ValueError), match="ExitPolicy"):
            ExitPolicy.from_dict(policy.to_dict() | broken)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"output_weights": 1.0}, TypeError, "output_weights must be at least one number, got 1.0"),
        ({"output_weights": []}, TypeError, "output_weights must be at least one number, got"),
        ({"output_weights": [1.0, 1e-60]}, ValueError, "output_weights must be positive and finite, got 1e-60 at"),
        (
            {"output_weights": [1.0, 0.0]},
            ValueError,
            "output_weights must be positive and finite, got 0.0 at position 1",
        ),
        (
            {"temperatures": [math.inf, 1.0]},
            ValueError,
            "temperatures must be positive and finite, got inf at position",
        ),
        ({"temperatures": [1.0]}, ValueError, "temperatures must have 2 entries, got 1"),
        ({"thresholds": [0.1, 0.2]}, ValueError, "thresholds must have 1 entries, got 2"),
        ({"thresholds": [math.nan]}, ValueError, "thresholds must not be NaN, got nan at position 0"),
        ({"thresholds": "high"}, TypeError, "thresholds must be a number or a sequence of numbers, got 'high'"),
        ({"enabled": [True, True]}, ValueError, "enabled must have 1 entries, got 2"),
        ({"enabled": [0.5]}, TypeError, "enabled must be True or False for each exit, got 0.5"),
        ({"exits": (1, 0)}, ValueError, r"exits must be ascending from 0 on, got \[1, 0\]"),
        ({"criterion": "luck"}, ValueError, "criterion must be one of confidence, .*got 'luck'"),
        ({"criterion": 3}, TypeError, "criterion must be a name or callable, got int"),
        ({"criterion_on": "both"}, ValueError, "criterion_on must be 'ensemble' or 'exit', got 'both'"),
    ],
)
def test_bad_policies_are_refused(change, error, message):
    with pytest.raises(error, match=f"ExitPolicy: {message}"):
        ExitPolicy(**({"output_weights": [0.5, 0.5], "thresholds": 0.5} | change))
