"""Wrong arguments: native operators and reference path raise an error that names the operator and the argument."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aep_ext import ops

X = torch.zeros(3, 5, 4)
W = torch.ones(3)
Y = torch.zeros(5, dtype=torch.int64)
F1, F2 = torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 2, 2)
P1, P2 = torch.zeros(5, 3), torch.zeros(5, 6)
W1, W2, B = torch.zeros(4, 3), torch.zeros(4, 6), torch.zeros(4)


def head(features=(F1, F2), weights=(W1, W2), biases=(B, None)):
    return ops.multi_exit_linear_head(features, weights, biases)


def linear_loss(pooled=(P1, P2), weights=(W1, W2), biases=(B, None)):
    return ops.linear_joint_cross_entropy(pooled, weights, biases, Y, W[:2])


def gate(**changes):
    args = {
        "features": torch.zeros(5, 2),
        "running": torch.zeros(5, 4),
        "weight_sum": 0.0,
        "indices": Y,
        "state": torch.zeros(5, 0, dtype=torch.int64),
        "exit_logits": X[0],
        "weight": 1.0,
        "threshold": 0.5,
    }
    return ops.gate(**args | changes)


def loss(x=X, y=Y, a=W, **kwargs):
    return ops.joint_cross_entropy(x, y, a, **kwargs)


def terms(x=X, y=Y, a=W, **kwargs):
    return ops.multi_exit_loss(x, y, a, **kwargs)


def subsets(x=X, w=W, y=Y):
    return ops.subset_correct(x, w, y)


CASES = {
    "no features": (lambda: head((), (), ()), ValueError, "multi_exit_linear_head: features"),
    "weights too few": (lambda: head(weights=(W1,)), ValueError, "multi_exit_linear_head: .*weights"),
    "biases too many": (lambda: head(biases=(B, B, B)), ValueError, "multi_exit_linear_head: .*biases"),
    "features 2-D": (lambda: head((F1, F2[0, 0])), ValueError, r"multi_exit_linear_head: features\[1\]"),
    "features empty": (lambda: head((F1, F2[:, :, :0])), ValueError, r"multi_exit_linear_head: features\[1\]"),
    "features int": (lambda: head((F1, F2.int())), TypeError, r"multi_exit_linear_head: features\[1\]"),
    "features mixed": (lambda: head((F1, F2.double())), TypeError, r"multi_exit_linear_head: features\[1\]"),
    "features rows": (lambda: head((F1, F2[:1])), ValueError, r"multi_exit_linear_head: features\[1\]"),
    "features list": (lambda: head(([1], [2])), TypeError, r"multi_exit_linear_head: features\[0\]"),
    "features none": (lambda: head(None), TypeError, "multi_exit_linear_head: features"),
    "features a tensor": (lambda: head(F1), TypeError, "multi_exit_linear_head: features"),
    "features none first": (lambda: head((None, F2)), TypeError, r"multi_exit_linear_head: features\[0\]"),
    "features none last": (lambda: head((F1, None)), TypeError, r"multi_exit_linear_head: features\[1\]"),
    "features all none": (lambda: head((None, None)), TypeError, r"multi_exit_linear_head: features\[0\]"),
    "head weights none": (lambda: head(weights=None), TypeError, "multi_exit_linear_head: weights"),
    "head weight none": (lambda: head(weights=(W1, None)), TypeError, r"multi_exit_linear_head: weights\[1\]"),
    "head biases number": (lambda: head(biases=0.0), TypeError, "multi_exit_linear_head: biases"),
    "head bias number": (lambda: head(biases=(0.0, B)), TypeError, r"multi_exit_linear_head: biases\[0\]"),
    "linear loss pooled none": (lambda: linear_loss(None), TypeError, "linear_joint_cross_entropy: pooled"),
    "linear loss none": (lambda: linear_loss((P1, None)), TypeError, r"linear_joint_cross_entropy: pooled\[1\]"),
    "linear loss weights none": (lambda: linear_loss(weights=None), TypeError, "linear_joint_cross_entropy: weights"),
    "linear loss weight none": (
        lambda: linear_loss(weights=(None, W2)),
        TypeError,
        r"linear_joint_cross_entropy: weights\[0\]",
    ),
    "linear loss bias list": (
        lambda: linear_loss(biases=([0.0] * 4, None)),
        TypeError,
        r"linear_joint_cross_entropy: biases\[0\]",
    ),
    "pool none": (lambda: ops.global_avg_pool(None), TypeError, "global_avg_pool: features"),
    "gate features none": (lambda: gate(features=None), TypeError, "gate: features"),
    "head weight shape": (lambda: head(weights=(W1, W1)), ValueError, r"multi_exit_linear_head: weights\[1\]"),
    "head weight 1-D": (lambda: head(weights=(B, W2)), ValueError, r"multi_exit_linear_head: weights\[0\]"),
    "head weight dtype": (lambda: head(weights=(W1, W2.half())), TypeError, r"multi_exit_linear_head: weights\[1\]"),
    "head bias shape": (lambda: head(biases=(B, B[:3])), ValueError, r"multi_exit_linear_head: biases\[1\]"),
    "head bias dtype": (lambda: head(biases=(B, B.double())), TypeError, r"multi_exit_linear_head: biases\[1\]"),
    "ensemble dims": (lambda: ops.ensemble(X[0], W), ValueError, "ensemble: exit_logits"),
    "ensemble no exits": (lambda: ops.ensemble(X[:0], W[:0]), ValueError, "ensemble: exit_logits"),
    "ensemble no classes": (lambda: ops.ensemble(X[..., :0], W), ValueError, "ensemble: exit_logits"),
    "ensemble dtype": (lambda: ops.ensemble(X.long(), W), TypeError, "ensemble: exit_logits"),
    "ensemble complex": (lambda: ops.ensemble(X.cfloat(), W), TypeError, "ensemble: exit_logits"),
    "ensemble list": (lambda: ops.ensemble([1.0], W), TypeError, "ensemble: exit_logits"),
    "ensemble weights": (lambda: ops.ensemble(X, W[:2]), ValueError, "ensemble: weights"),
    "ensemble weights 2-D": (lambda: ops.ensemble(X, W[:, None]), ValueError, "ensemble: weights"),
    "ensemble weights int": (lambda: ops.ensemble(X, W.int()), TypeError, "ensemble: weights"),
    "ensemble weights list": (lambda: ops.ensemble(X, [1.0] * 3), TypeError, "ensemble: weights"),
    "ensemble weights none": (lambda: ops.ensemble(X.clone().requires_grad_(), None), TypeError, "ensemble: weights"),
    "stats dims": (lambda: ops.ensemble_stats(X[0], W), ValueError, "ensemble_stats: exit_logits"),
    "stats none": (lambda: ops.ensemble_stats(None, W), TypeError, "ensemble_stats: exit_logits"),
    "stats weights": (lambda: ops.ensemble_stats(X, (1.0,) * 3), TypeError, "ensemble_stats: weights"),
    "stats normalizer": (lambda: ops.ensemble_stats(X, W, normalizer=0), ValueError, "ensemble_stats: normalizer"),
    "stats inf": (lambda: ops.ensemble_stats(X, W, normalizer=math.inf), ValueError, "ensemble_stats: normalizer"),
    "stats nan": (lambda: ops.ensemble_stats(X, W, temperature=math.nan), ValueError, "ensemble_stats: temperature"),
    "stats negative": (lambda: ops.ensemble_stats(X, W, temperature=-1.5), ValueError, "ensemble_stats: temperature"),
    "stats vector": (lambda: ops.ensemble_stats(X, W, normalizer=W), ValueError, "ensemble_stats: normalizer"),
    "stats int tensor": (lambda: ops.ensemble_stats(X, W, normalizer=Y[0]), TypeError, "ensemble_stats: normalizer"),
    "stats text": (lambda: ops.ensemble_stats(X, W, normalizer="1"), TypeError, "ensemble_stats: normalizer"),
    "loss dims": (lambda: loss(X[0]), ValueError, "joint_cross_entropy: exit_logits"),
    "loss number": (lambda: loss(1.0), TypeError, "joint_cross_entropy: exit_logits"),
    "loss target shape": (lambda: loss(y=Y[:4]), ValueError, "joint_cross_entropy: target"),
    "loss target one-hot": (lambda: loss(y=torch.zeros(5, 4)), TypeError, "joint_cross_entropy: target"),
    "loss target int32": (lambda: loss(y=Y.int()), TypeError, "joint_cross_entropy: target"),
    "loss target list": (lambda: loss(y=[0] * 5), TypeError, "joint_cross_entropy: target"),
    "loss exit weights": (lambda: loss(a=W[:2]), ValueError, "joint_cross_entropy: exit_weights"),
    "loss exit weights none": (lambda: loss(a=None), TypeError, "joint_cross_entropy: exit_weights"),
    "loss class weights": (lambda: loss(class_weight=torch.ones(5)), ValueError, "joint_cross_entropy: class_weight"),
    "loss class weights int": (lambda: loss(class_weight=Y[:4]), TypeError, "joint_cross_entropy: class_weight"),
    "loss class weights list": (lambda: loss(class_weight=[1.0] * 4), TypeError, "joint_cross_entropy: class_weight"),
    "loss smoothing": (lambda: loss(label_smoothing=1.5), ValueError, "joint_cross_entropy: label_smoothing"),
    "loss smoothing negative": (
        lambda: loss(label_smoothing=-0.25),
        ValueError,
        "joint_cross_entropy: label_smoothing",
    ),
    "loss reduction": (lambda: loss(reduction="avg"), ValueError, "joint_cross_entropy: reduction"),
    "loss memory": (lambda: loss(memory="inplace"), ValueError, "joint_cross_entropy: memory"),
    "loss memory none": (lambda: loss(memory="in_place", reduction="none"), ValueError, "joint_cross_entropy: memory"),
    "terms target shape": (lambda: terms(y=torch.zeros(5, 3)), ValueError, "multi_exit_loss: target"),
    "terms target one-hot int": (lambda: terms(y=torch.zeros(5, 4).long()), TypeError, "multi_exit_loss: target"),
    "terms prefix weights": (lambda: terms(prefix_weights=W[:2]), ValueError, "multi_exit_loss: prefix_weights"),
    "terms prefix list": (lambda: terms(prefix_weights=[1.0] * 3), TypeError, "multi_exit_loss: prefix_weights"),
    "terms output weights": (lambda: terms(output_weights=Y[:3]), TypeError, "multi_exit_loss: output_weights"),
    "terms distillation": (lambda: terms(distillation=-0.1), ValueError, "multi_exit_loss: distillation"),
    "terms distillation nan": (lambda: terms(distillation=math.nan), ValueError, "multi_exit_loss: distillation"),
    "terms temperature": (lambda: terms(temperature=0.0), ValueError, "multi_exit_loss: temperature"),
    "terms temperature inf": (lambda: terms(temperature=math.inf), ValueError, "multi_exit_loss: temperature"),
    "terms reduction": (lambda: terms(reduction="avg"), ValueError, "multi_exit_loss: reduction"),
    "terms memory": (lambda: terms(memory="in_place", reduction="none"), ValueError, "multi_exit_loss: memory"),
    "subsets exits": (
        lambda: subsets(torch.zeros(17, 5, 3), torch.ones(17)),
        ValueError,
        "subset_correct: exit_logits",
    ),
    "subsets text": (lambda: subsets("x"), TypeError, "subset_correct: exit_logits"),
    "subsets weights": (lambda: subsets(w=W[:2]), ValueError, "subset_correct: weights"),
    "subsets target": (lambda: subsets(y=Y.float()), TypeError, "subset_correct: target"),
    "subsets target number": (lambda: subsets(y=3), TypeError, "subset_correct: target"),
    "gate criterion": (lambda: gate(criterion="sure"), ValueError, "gate: criterion"),
    "gate criterion_on": (lambda: gate(criterion_on="both"), ValueError, "gate: criterion_on"),
    "gate logits": (lambda: gate(exit_logits=X), ValueError, "gate: exit_logits"),
    "gate features rows": (lambda: gate(features=torch.zeros(4, 2)), ValueError, "gate: features"),
    "gate features 0-d": (lambda: gate(features=torch.zeros(())), ValueError, "gate: features"),
    "gate features int": (lambda: gate(features=Y[:, None]), TypeError, "gate: features"),
    "gate features list": (lambda: gate(features=[1.0]), TypeError, "gate: features"),
    "gate running dtype": (lambda: gate(running=X[0].half()), TypeError, "gate: running"),
    "gate running wide": (lambda: gate(running=X[0].double(), exit_logits=X[0].half()), TypeError, "gate: running"),
    "gate running shape": (lambda: gate(running=X[0, :, :3]), ValueError, "gate: running"),
    "gate indices": (lambda: gate(indices=Y.int()), TypeError, "gate: indices"),
    "gate indices shape": (lambda: gate(indices=Y[:2]), ValueError, "gate: indices"),
    "gate indices list": (lambda: gate(indices=[0] * 5), TypeError, "gate: indices"),
    "gate state": (lambda: gate(criterion="patience"), ValueError, "gate: state"),
    "gate state none": (lambda: gate(state=None), TypeError, "gate: state"),
    "gate votes": (lambda: gate(criterion="vote"), ValueError, "gate: state"),
    "gate temperature": (lambda: gate(temperature=0.0), ValueError, "gate: temperature"),
    "gate threshold": (lambda: gate(threshold=math.nan), ValueError, "gate: threshold"),
    "gate weight vector": (lambda: gate(weight=W[:1]), ValueError, "gate: weight"),
    "gate weight none": (lambda: gate(weight=None), TypeError, "gate: weight"),
}


@pytest.mark.parametrize("path", ["as loaded", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_error_names_operator_and_argument(case, path, on_reference):
    function, error, name = CASES[case]
    with pytest.raises(error, match=f"^aep::{name}(?!\\w).*, got "):
        on_reference(function) if path == "reference" else function()


FAR = torch.ones(3, device="meta")
ELSEWHERE = {
    "multi_exit_linear_head": lambda: head(weights=(W1, W2.to("meta"))),
    "ensemble": lambda: ops.ensemble(X, FAR),
    "ensemble_stats": lambda: ops.ensemble_stats(X, W, normalizer=FAR[0]),
    "joint_cross_entropy": lambda: loss(a=FAR),
    "multi_exit_loss": lambda: terms(prefix_weights=FAR),
    "subset_correct": lambda: subsets(w=FAR),
    "gate": lambda: gate(weight_sum=FAR[0]),
}


@pytest.mark.parametrize("path", ["as loaded", "reference"])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_tensors_on_two_devices(name, path, on_reference):
    with pytest.raises(ValueError, match=f"^aep::{name}: .*device.*, got .*meta"):
        on_reference(ELSEWHERE[name]) if path == "reference" else ELSEWHERE[name]()


def tensors(max_dim: int = 4) -> st.SearchStrategy[Tensor]:
    """Small tensors of any shape and dtype."""
    dtypes = [
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.bool,
        torch.complex64,
    ]
    return st.builds(
        lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        st.lists(st.integers(0, 4), max_size=max_dim),
        st.sampled_from(dtypes),
    )


ARGUMENTS = {
    "ensemble": (ops.ensemble, 2),
    "ensemble_stats": (ops.ensemble_stats, 2),
    "joint_cross_entropy": (ops.joint_cross_entropy, 4),
    "multi_exit_loss": (ops.multi_exit_loss, 5),
    "linear_joint_cross_entropy": (
        lambda x, z, w, v, b, y, a: ops.linear_joint_cross_entropy([x, z], [w, v], [b, None], y, a),
        7,
    ),
    "subset_correct": (ops.subset_correct, 3),
    "gate": (
        lambda f, r, i, s, x, t: ops.gate(f, r, 0.5, i, s, x, weight=0.5, threshold=t, criterion="patience"),
        6,
    ),
    "multi_exit_linear_head": (lambda f, g, w, v, b: ops.multi_exit_linear_head([f, g], [w, v], [b, None]), 5),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_any_tensors_give_a_result_or_a_clear_error(name, on_reference):
    """Whatever the shapes and dtypes: both paths accept the same and refuse the same."""
    function, count = ARGUMENTS[name]

    def outcome(call, *args):
        try:
            result = call(*args)
        except (TypeError, ValueError, IndexError) as error:
            return str(error).partition(": ")[0]
        return [(t.shape, t.dtype) for t in ([result] if isinstance(result, Tensor) else result)]

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.tuples(*[tensors()] * count))
    def check(args):
        actual, expected = outcome(function, *args), outcome(lambda *a: on_reference(function, *a), *args)
        assert actual == expected
        assert isinstance(actual, list) or actual == f"aep::{name}"

    check()
