from __future__ import annotations

import copy
import pickle

import pytest
import torch

from aep_ext.termination import POLICIES, Confidence, Custom, Margin, Patience, Vote, as_policy


def test_the_built_in_policies_are_those_of_the_operator():
    assert list(POLICIES) == ["confidence", "entropy", "margin", "patience", "vote"]
    for name, kind in POLICIES.items():
        policy = as_policy(name)
        assert type(policy) is kind and policy.name == name and policy.on == "ensemble" and policy.built_in
        assert as_policy(policy) is policy and as_policy(name, "exit").on == "exit"
        assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy


def test_initial_states():
    assert Confidence().initial_state(3, 10).shape == (3, 0)
    assert Patience().initial_state(2, 10).tolist() == [[-1, 0], [-1, 0]]
    votes = Vote().initial_state(2, 4)
    assert votes.tolist() == [[0] * 4] * 2 and votes.dtype == torch.int64


def test_a_callable_becomes_a_custom_policy():
    def rule(judged):
        return judged.stats[:, 0] > 0.5

    policy = as_policy(rule, "exit")
    assert isinstance(policy, Custom) and policy.rule is rule and policy.on == "exit"
    assert policy.name == "custom" and not policy.built_in and policy.state_size(10) == 0


def test_bad_policies_are_refused():
    with pytest.raises(ValueError, match="must be one of confidence, entropy, margin, patience, vote, got 'luck'"):
        as_policy("luck")
    with pytest.raises(ValueError, match="on must be 'ensemble' or 'exit', got 'both'"):
        Margin("both")
    with pytest.raises(ValueError, match="on must agree with the policy's own, 'ensemble', got 'exit'"):
        as_policy(Margin(), "exit")
    with pytest.raises(TypeError, match="a Policy, a name or a callable, got int"):
        as_policy(3)
    with pytest.raises(TypeError, match="rule must be callable, got NoneType"):
        Custom()


def _step(policy, features, logits, **options):
    n, classes = logits.shape
    state = policy.initial_state(n, classes)
    return policy.gate(
        features, torch.zeros(n, classes), 0.0, torch.arange(n), state, logits, exit_index=0, weight=0.5, **options
    )


@pytest.mark.parametrize("on", ["ensemble", "exit"])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_custom_rule_partitions_as_the_operator_does(on, enabled):
    logits = torch.randn(9, 4) * 2
    logits[3, 1] = float("nan")
    features = torch.randn(9, 5, 2, 2).contiguous(memory_format=torch.channels_last)
    seen = []

    def rule(judged):
        seen.append(judged)
        return judged.stats[:, 0] >= judged.threshold

    options = {"threshold": 0.6, "temperature": 1.5, "enabled": enabled}
    ours = _step(Custom(on, rule), features, logits, **options)
    theirs = _step(Confidence(on), features, logits, **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=0, equal_nan=True)
    assert ours.features.is_contiguous(memory_format=torch.channels_last)
    assert bool(seen) == enabled
    if enabled:
        assert seen[0].exit_index == 0 and seen[0].indices.tolist() == list(range(9))
        expected = torch.softmax(seen[0].logits, dim=1).amax(dim=1)
        torch.testing.assert_close(expected, seen[0].stats[:, 0], equal_nan=True)


def test_a_custom_rule_cannot_release_a_nan():
    logits = torch.zeros(2, 3)
    logits[0, 0] = float("nan")
    everybody = Custom(rule=lambda judged: torch.ones(len(judged.indices), dtype=torch.bool))
    step = _step(everybody, torch.zeros(2, 1), logits, threshold=0.0)
    assert int(step.count) == 1 and step.indices.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda judged: judged.stats[:, 0], r"torch.float32 of shape \[2\]"),
        (lambda judged: torch.ones(1, dtype=torch.bool), r"torch.bool of shape \[1\]"),
        (lambda judged: True, "bool"),
    ],
)
def test_a_custom_rule_must_answer_with_bools(answer, found):
    with pytest.raises(ValueError, match=rf"rule must return a bool tensor of shape \[2\], got {found}"):
        _step(Custom(rule=answer), torch.zeros(2, 1), torch.zeros(2, 3), threshold=0.0)
