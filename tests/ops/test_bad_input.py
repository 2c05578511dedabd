"""Wrong arguments: native operators, reference path and fake kernels raise the same error with the same words."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import _dispatch

X = torch.zeros(3, 5, 4)
W = torch.ones(3)
Y = torch.zeros(5, dtype=torch.int64)
F1, F2 = torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 2, 2)
W1, W2, B = torch.zeros(4, 3), torch.zeros(4, 6), torch.zeros(4)


def head(features=(F1, F2), weights=(W1, W2), biases=(B, None)):
    return ops.multi_exit_linear_head(features, weights, biases)


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


META = torch.ones(3, device="meta")
CASES = {
    # multi_exit_linear_head
    "no features": (
        lambda: head((), (), ()),
        ValueError,
        "multi_exit_linear_head: features must hold at least 1 tensor, got 0",
    ),
    "weights too few": (lambda: head(weights=(W1,)), ValueError, "head: weights must hold 2 tensors, got 1"),
    "biases too many": (lambda: head(biases=(B, B, B)), ValueError, "head: biases must hold 2 tensors, got 3"),
    "features 2-D": (
        lambda: head((F1, torch.zeros(2, 6))),
        ValueError,
        r"features\[1\] must have 4 dimensions \(N, C, H, W\), got shape \[2, 6\]",
    ),
    "features empty": (
        lambda: head((F1, torch.zeros(2, 6, 0, 2))),
        ValueError,
        r"features\[1\] must have C, H and W of at least 1, got shape \[2, 6, 0, 2\]",
    ),
    "features int": (
        lambda: head((F1, F2.int())),
        TypeError,
        r"features\[1\] must be float32, float64, bfloat16 or float16, got int32",
    ),
    "features mixed": (lambda: head((F1, F2.double())), TypeError, r"features\[1\] must be float32, got float64"),
    "features rows": (
        lambda: head((F1, F2[:1])),
        ValueError,
        r"features\[1\] must have N = 2, got shape \[1, 6, 2, 2\]",
    ),
    "head weight shape": (
        lambda: head(weights=(W1, W1)),
        ValueError,
        r"weights\[1\] must have shape \[4, 6\], got \[4, 3\]",
    ),
    "head weight 1-D": (
        lambda: head(weights=(B, W2)),
        ValueError,
        r"weights\[0\] must have shape \[K, C\] with K >= 1, got \[4\]",
    ),
    "head weight dtype": (
        lambda: head(weights=(W1, W2.half())),
        TypeError,
        r"weights\[1\] must be float32, got float16",
    ),
    "head bias shape": (
        lambda: head(biases=(B, torch.zeros(5))),
        ValueError,
        r"biases\[1\] must have shape \[4\], got \[5\]",
    ),
    "head bias dtype": (lambda: head(biases=(B, B.double())), TypeError, r"biases\[1\] must be float32, got float64"),
    "head device": (
        lambda: head(weights=(W1, W2.to("meta"))),
        ValueError,
        r"weights\[1\] must be on device cpu, got meta",
    ),
    # ensemble, ensemble_stats
    "ensemble dims": (
        lambda: ops.ensemble(X[0], W),
        ValueError,
        r"aep::ensemble: exit_logits must have 3 dimensions \(E, N, K\), got shape \[5, 4\]",
    ),
    "ensemble no exits": (
        lambda: ops.ensemble(X[:0], W[:0]),
        ValueError,
        r"aep::ensemble: exit_logits must have E >= 1 and K >= 1, got shape \[0, 5, 4\]",
    ),
    "ensemble no classes": (lambda: ops.ensemble(X[..., :0], W), ValueError, r"got shape \[3, 5, 0\]"),
    "ensemble dtype": (
        lambda: ops.ensemble(X.long(), W),
        TypeError,
        "aep::ensemble: exit_logits must be float32, float64, bfloat16 or float16, got int64",
    ),
    "ensemble complex": (lambda: ops.ensemble(X.cfloat(), W), TypeError, "got complex64"),
    "ensemble weights": (
        lambda: ops.ensemble(X, torch.ones(4)),
        ValueError,
        r"aep::ensemble: weights must have shape \[3\], got \[4\]",
    ),
    "ensemble weights 2-D": (
        lambda: ops.ensemble(X, torch.ones(3, 1)),
        ValueError,
        r"weights must have shape \[3\], got \[3, 1\]",
    ),
    "ensemble weights int": (
        lambda: ops.ensemble(X, W.int()),
        TypeError,
        "weights must be float32, float64, bfloat16 or float16, got int32",
    ),
    "ensemble device": (
        lambda: ops.ensemble(X, META),
        ValueError,
        "aep::ensemble: weights must be on device cpu, got meta",
    ),
    "stats dims": (
        lambda: ops.ensemble_stats(X[0], W),
        ValueError,
        "aep::ensemble_stats: exit_logits must have 3 dimensions",
    ),
    "stats normalizer": (
        lambda: ops.ensemble_stats(X, W, normalizer=0),
        ValueError,
        "aep::ensemble_stats: normalizer must be finite and greater than 0, got 0",
    ),
    "stats temperature": (
        lambda: ops.ensemble_stats(X, W, temperature=-1.5),
        ValueError,
        "temperature must be finite and greater than 0, got -1.5",
    ),
    "stats nan": (
        lambda: ops.ensemble_stats(X, W, temperature=float("nan")),
        ValueError,
        "temperature must be finite and greater than 0, got nan",
    ),
    "stats inf": (
        lambda: ops.ensemble_stats(X, W, normalizer=float("inf")),
        ValueError,
        "normalizer must be finite and greater than 0, got inf",
    ),
    "stats vector": (
        lambda: ops.ensemble_stats(X, W, normalizer=W),
        ValueError,
        r"normalizer must have shape \[\], got \[3\]",
    ),
    "stats int tensor": (
        lambda: ops.ensemble_stats(X, W, normalizer=torch.tensor(1)),
        TypeError,
        "normalizer must be float32, float64, bfloat16 or float16, got int64",
    ),
    "stats text": (
        lambda: ops.ensemble_stats(X, W, normalizer="1"),
        TypeError,
        "normalizer must be a number or a 0-d tensor, got str",
    ),
    # joint_cross_entropy
    "loss dims": (lambda: loss(X[0]), ValueError, "aep::joint_cross_entropy: exit_logits must have 3 dimensions"),
    "loss target shape": (
        lambda: loss(y=Y[:4]),
        ValueError,
        r"aep::joint_cross_entropy: target must have shape \[5\], got \[4\]",
    ),
    "loss target one-hot": (lambda: loss(y=torch.zeros(5, 4)), TypeError, "target must be int64, got float32"),
    "loss target int32": (lambda: loss(y=Y.int()), TypeError, "target must be int64, got int32"),
    "loss exit weights": (lambda: loss(a=torch.ones(2)), ValueError, r"exit_weights must have shape \[3\], got \[2\]"),
    "loss class weights": (
        lambda: loss(class_weight=torch.ones(5)),
        ValueError,
        r"class_weight must have shape \[4\], got \[5\]",
    ),
    "loss class weights int": (
        lambda: loss(class_weight=torch.ones(4).int()),
        TypeError,
        "class_weight must be float32.*, got int32",
    ),
    "loss smoothing": (
        lambda: loss(label_smoothing=1.5),
        ValueError,
        r"label_smoothing must be within 0\.\.1, got 1.5",
    ),
    "loss smoothing negative": (
        lambda: loss(label_smoothing=-0.25),
        ValueError,
        r"label_smoothing must be within 0\.\.1, got -0.25",
    ),
    "loss reduction": (
        lambda: loss(reduction="avg"),
        ValueError,
        "reduction must be 'none', 'mean' or 'sum', got 'avg'",
    ),
    "loss device": (lambda: loss(a=META), ValueError, "exit_weights must be on device cpu, got meta"),
    # subset_correct
    "subsets exits": (
        lambda: ops.subset_correct(torch.zeros(17, 2, 3), torch.ones(17), Y[:2]),
        ValueError,
        "aep::subset_correct: exit_logits must have at most 16 exits, got 17",
    ),
    "subsets weights": (
        lambda: ops.subset_correct(X, torch.ones(2), Y),
        ValueError,
        r"aep::subset_correct: weights must have shape \[3\], got \[2\]",
    ),
    "subsets target": (
        lambda: ops.subset_correct(X, W, Y.float()),
        TypeError,
        "aep::subset_correct: target must be int64, got float32",
    ),
    # gate
    "gate policy": (
        lambda: gate(policy="sure"),
        ValueError,
        "aep::gate: policy must be one of confidence, entropy, margin, patience, vote, got 'sure'",
    ),
    "gate on": (lambda: gate(on="both"), ValueError, "aep::gate: on must be 'ensemble' or 'exit', got 'both'"),
    "gate logits": (
        lambda: gate(exit_logits=X),
        ValueError,
        r"aep::gate: exit_logits must have shape \[n, K\] with K >= 1, got \[3, 5, 4\]",
    ),
    "gate features rows": (
        lambda: gate(features=torch.zeros(4, 2)),
        ValueError,
        r"features must have 5 rows, got shape \[4, 2\]",
    ),
    "gate features 0-d": (
        lambda: gate(features=torch.zeros(())),
        ValueError,
        r"features must have 5 rows, got shape \[\]",
    ),
    "gate features int": (
        lambda: gate(features=Y[:, None]),
        TypeError,
        "features must be float32, float64, bfloat16 or float16, got int64",
    ),
    "gate running dtype": (
        lambda: gate(running=torch.zeros(5, 4).half()),
        TypeError,
        "running must be float32, got float16",
    ),
    "gate running wide": (
        lambda: gate(running=torch.zeros(5, 4).double(), exit_logits=X[0].half()),
        TypeError,
        "running must be float32 or float16, got float64",
    ),
    "gate running shape": (
        lambda: gate(running=torch.zeros(5, 3)),
        ValueError,
        r"running must have shape \[5, 4\], got \[5, 3\]",
    ),
    "gate indices": (lambda: gate(indices=Y.int()), TypeError, "indices must be int64, got int32"),
    "gate indices shape": (lambda: gate(indices=Y[:2]), ValueError, r"indices must have shape \[5\], got \[2\]"),
    "gate state": (lambda: gate(policy="patience"), ValueError, r"state must have shape \[5, 2\], got \[5, 0\]"),
    "gate votes": (lambda: gate(policy="vote"), ValueError, r"state must have shape \[5, 4\], got \[5, 0\]"),
    "gate temperature": (
        lambda: gate(temperature=0.0),
        ValueError,
        "temperature must be finite and greater than 0, got 0",
    ),
    "gate threshold": (lambda: gate(threshold=float("nan")), ValueError, "threshold must not be NaN, got nan"),
    "gate weight vector": (lambda: gate(weight=torch.ones(1)), ValueError, r"weight must have shape \[\], got \[1\]"),
    "gate weight none": (lambda: gate(weight=None), TypeError, "weight must be a number or a 0-d tensor, got NoneType"),
    "gate device": (
        lambda: gate(weight_sum=torch.ones((), device="meta")),
        ValueError,
        "weight_sum must be on device cpu, got meta",
    ),
}


@pytest.mark.parametrize("path", ["as loaded", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_error_names_operator_rule_and_value(case, path, monkeypatch):
    if path == "reference":
        monkeypatch.setattr(_dispatch, "_native", {})
        monkeypatch.setattr(_dispatch, "_warned", {"cpu", "meta"})
    function, error, message = CASES[case]
    with pytest.raises(error, match=message) as caught:
        function()
    assert str(caught.value).startswith("aep::")


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: ops.ensemble([1.0], W), "aep::ensemble: exit_logits must be a torch.Tensor, got list"),
        (lambda: ops.ensemble_stats(None, W), "aep::ensemble_stats: exit_logits must be a torch.Tensor, got NoneType"),
        (lambda: loss(x=1.0), "aep::joint_cross_entropy: exit_logits must be a torch.Tensor, got float"),
        (lambda: ops.subset_correct("x", W, Y), "aep::subset_correct: exit_logits must be a torch.Tensor, got str"),
        (lambda: ops.ensemble(X, [1.0] * 3), "aep::ensemble: weights must be a torch.Tensor, got list"),
        (lambda: ops.ensemble(X.clone().requires_grad_(), None), "aep::ensemble: weights must be a torch.Tensor"),
        (lambda: ops.ensemble_stats(X, (1.0,) * 3), "aep::ensemble_stats: weights must be a torch.Tensor, got tuple"),
        (lambda: loss(y=[0] * 5), "aep::joint_cross_entropy: target must be a torch.Tensor, got list"),
        (lambda: loss(a=None), "aep::joint_cross_entropy: exit_weights must be a torch.Tensor, got NoneType"),
        (lambda: loss(class_weight=[1.0] * 4), "aep::joint_cross_entropy: class_weight must be a torch.Tensor, got"),
        (lambda: ops.subset_correct(X, W, 3), "aep::subset_correct: target must be a torch.Tensor, got int"),
        (lambda: gate(indices=[0] * 5), "aep::gate: indices must be a torch.Tensor, got list"),
        (lambda: gate(state=None), "aep::gate: state must be a torch.Tensor, got NoneType"),
        (lambda: head(([1], [2])), "features.0. must be a torch.Tensor, got list"),
    ],
)
def test_no_tensor_at_all(call, name):
    with pytest.raises(TypeError, match=name):
        call()


@pytest.mark.parametrize("change", [{"label_smoothing": "a"}, {"ignore_index": 1.5}])
def test_reference_refuses_what_is_no_number(change, reference_path):
    with pytest.raises(TypeError, match=f"aep::joint_cross_entropy: {next(iter(change))} must be an? .*, got"):
        loss(**change)


def tensors(max_dim: int = 4) -> st.SearchStrategy[Tensor]:
    """Small tensors of any shape, dtype and device."""
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
        lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device),
        st.lists(st.integers(0, 4), max_size=max_dim),
        st.sampled_from(dtypes),
        st.sampled_from(["cpu", "cpu", "cpu", "meta"]),
    )


ARGUMENTS = {
    "ensemble": (ops.ensemble, 2),
    "ensemble_stats": (ops.ensemble_stats, 2),
    "joint_cross_entropy": (ops.joint_cross_entropy, 4),
    "linear_joint_cross_entropy": (
        lambda x, z, w, v, b, y, a: ops.linear_joint_cross_entropy([x, z], [w, v], [b, None], y, a),
        7,
    ),
    "subset_correct": (ops.subset_correct, 3),
    "gate": (
        lambda f, r, i, s, x, t: ops.gate(f, r, 0.5, i, s, x, weight=0.5, threshold=t, policy="patience"),
        6,
    ),
    "multi_exit_linear_head": (lambda f, g, w, v, b: ops.multi_exit_linear_head([f, g], [w, v], [b, None]), 5),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_any_tensors_give_a_result_or_a_clear_error(name, on_reference):
    """Whatever the shapes, dtypes and devices: both paths accept the same, and refuse the same with the same words."""
    function, count = ARGUMENTS[name]

    def outcome(call, *args):
        try:
            result = call(*args)
        except (TypeError, ValueError, IndexError) as error:
            return type(error), str(error)
        return [(t.shape, t.dtype, t.device) for t in ([result] if isinstance(result, Tensor) else result)]

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.tuples(*[tensors()] * count))
    def check(args):
        actual, expected = outcome(function, *args), outcome(lambda *a: on_reference(function, *a), *args)
        assert actual == expected
        if isinstance(actual, tuple):
            assert actual[1].startswith(f"aep::{name}: ")

    check()
