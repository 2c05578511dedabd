"""Results in tensors of the caller (`out=`): the same values, in place, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import EnsembleStats, GateResult


@pytest.fixture(params=["as loaded", "reference"], autouse=True)
def path(request: pytest.FixtureRequest) -> str:
    if request.param == "reference":
        request.getfixturevalue("reference_path")
    return request.param


def logits(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 5, 7, device=device).mul(3).to(dtype)
    return x, torch.rand(3, device=device), torch.randint(7, (5,), device=device)


def gate_arguments(
    dtype: torch.dtype = torch.float32, device: str = "cpu", policy: str = "confidence", layout: object = None
) -> tuple[tuple, dict]:
    features = torch.randn(6, 4, 3, 3, device=device, dtype=dtype)
    features = features.contiguous(memory_format=layout or torch.contiguous_format)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    running, own = torch.randn(6, 5, device=device, dtype=wide), torch.randn(6, 5, device=device).to(dtype)
    state = torch.zeros(6, {"patience": 2, "vote": 5}.get(policy, 0), dtype=torch.int64, device=device)
    threshold = 0.45 if policy == "confidence" else 1.0
    args = (features, running, 0.25, torch.arange(6, device=device), state, own)
    return args, {"weight": 0.5, "threshold": threshold, "policy": policy}


def filled(results: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.full_like(t, 77) for t in results]


def test_ensemble(dtype, device):
    x, w, _ = logits(dtype, device)
    out = torch.empty(5, 7, dtype=dtype, device=device)
    assert ops.ensemble(x, w, out=out) is out
    assert torch.equal(out, ops.ensemble(x, w))


@pytest.mark.parametrize("scalars", [{}, {"normalizer": 2, "temperature": 0.5}, {"temperature": "tensor"}])
def test_ensemble_stats(scalars, dtype, device):
    x, w, _ = logits(dtype, device)
    scalars = {k: torch.tensor(0.7, device=device) if v == "tensor" else v for k, v in scalars.items()}
    expected = ops.ensemble_stats(x, w, **scalars)
    out = filled(expected)
    result = ops.ensemble_stats(x, w, **scalars, out=tuple(out))
    assert isinstance(result, EnsembleStats) and all(a is b for a, b in zip(result, out, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_statistics_alone(dtype, device):
    x, w, _ = logits(dtype, device)
    expected = ops.ensemble_stats(x, w, temperature=2.0)
    result = ops.ensemble_stats(x, w, temperature=2.0, out=EnsembleStats(None, *filled(expected[1:])))
    assert result.logits is None
    assert torch.equal(result.stats, expected.stats) and torch.equal(result.argmax, expected.argmax)


def test_subset_correct_overwrites(dtype, device):
    x, w, y = logits(dtype, device)
    out = torch.full((7, 2), 99, dtype=torch.int64, device=device)
    assert ops.subset_correct(x, w, y, out=out) is out
    assert torch.equal(out, ops.subset_correct(x, w, y))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("policy", ["confidence", "patience", "vote"])
def test_gate(policy, layout, dtype, device):
    args, options = gate_arguments(dtype, device, policy, layout)
    expected = ops.gate(*args, **options)
    out = filled(expected)
    result = ops.gate(*args, **options, out=tuple(out))
    assert isinstance(result, GateResult) and all(a is b for a, b in zip(result, out, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(result[1:], expected[1:], strict=True))
    stay = int(result.count)
    assert torch.equal(result.features[:stay], expected.features[:stay])
    assert (result.features[stay:] == 77).all()  # left as they were


def test_gate_without_rows(device):
    args, options = gate_arguments(device=device)
    args = tuple(a[:0] if isinstance(a, Tensor) else a for a in args)
    out = filled(ops.gate(*args, **options))
    assert ops.gate(*args, **options, out=tuple(out)).count == 0


X, W, Y = logits()


def stats_out(**changes: object) -> tuple:
    out = {"logits": torch.empty(5, 7), "stats": torch.empty(5, 3), "argmax": torch.empty(5, dtype=torch.int64)}
    return tuple((out | changes).values())


def gate_with(**changes: object) -> Callable[[], object]:
    def call() -> object:
        args, options = gate_arguments()
        out = ops.gate(*args, **options)
        changed = {k: v(args) if callable(v) else v for k, v in changes.items()}
        return ops.gate(*args, **options, out=out._replace(**changed))

    return call


BUFFER = torch.zeros(200)
CASES = {
    "ensemble dtype": (lambda: ops.ensemble(X, W, out=torch.empty(5, 7).double()), TypeError,
                       "ensemble: out must be float32, got float64"),
    "ensemble shape": (lambda: ops.ensemble(X, W, out=torch.empty(7, 5)), ValueError,
                       r"ensemble: out must have shape \[5, 7\], got \[7, 5\]"),
    "ensemble device": (lambda: ops.ensemble(X, W, out=torch.empty(5, 7, device="meta")), ValueError,
                        "ensemble: out must be on device cpu, got meta"),
    "ensemble strides": (lambda: ops.ensemble(X, W, out=torch.empty(7, 5).t()), ValueError,
                         r"ensemble: out must be contiguous, got strides \[1, 5\]"),
    "ensemble no tensor": (lambda: ops.ensemble(X, W, out=[1]), TypeError,
                           "ensemble: out must be a torch.Tensor, got list"),
    "ensemble in the logits": (lambda: ops.ensemble(X, W, out=X[1]), ValueError,
                               "ensemble: out must not share memory with exit_logits, got overlapping memory"),
    "ensemble in the weights": (lambda: ops.ensemble(X, BUFFER[34:37], out=BUFFER[:35].view(5, 7)), ValueError,
                                "ensemble: out must not share memory with weights, got overlapping memory"),
    "ensemble gradient": (lambda: ops.ensemble(X.clone().requires_grad_(), W, out=torch.empty(5, 7)), ValueError,
                          "ensemble: arguments must not require a gradient where out is given, got requires_grad=True"),
    "ensemble gradient of out": (lambda: ops.ensemble(X, W, out=torch.empty(5, 7, requires_grad=True)), ValueError,
                                 "ensemble: arguments must not require a gradient where out is given"),
    "ensemble bad logits first": (lambda: ops.ensemble(X[0], W, out=torch.empty(1)), ValueError,
                                  "ensemble: exit_logits must have 3 dimensions"),
    "stats count": (lambda: ops.ensemble_stats(X, W, out=(None, None)), TypeError,
                    r"ensemble_stats: out must be a tuple of 3 tensors \(logits, stats, argmax\), got 2 entries"),
    "stats tensor": (lambda: ops.ensemble_stats(X, W, out=torch.empty(3)), TypeError,
                     "ensemble_stats: out must be a tuple of 3 tensors .*, got Tensor"),
    "stats None": (lambda: ops.ensemble_stats(X, W, out=stats_out(stats=None)), TypeError,
                   "ensemble_stats: out stats must be a torch.Tensor, got NoneType"),
    "stats dtype": (lambda: ops.ensemble_stats(X, W, out=stats_out(argmax=torch.empty(5).int())), TypeError,
                    "ensemble_stats: out argmax must be int64, got int32"),
    "stats shape": (lambda: ops.ensemble_stats(X, W, out=stats_out(stats=torch.empty(5, 2))), ValueError,
                    r"ensemble_stats: out stats must have shape \[5, 3\], got \[5, 2\]"),
    "stats scalar": (lambda: ops.ensemble_stats(X, W, temperature="x", out=stats_out()), TypeError,
                     "ensemble_stats: temperature must be a number or a 0-d tensor, got str"),
    "stats in each other": (
        lambda: ops.ensemble_stats(X, W, out=stats_out(logits=BUFFER[:35].view(5, 7), stats=BUFFER[30:45].view(5, 3))),
        ValueError, "ensemble_stats: out logits must not share memory with out stats, got overlapping memory"),
    "stats in the temperature": (
        lambda: ops.ensemble_stats(X, W, temperature=BUFFER[3], out=stats_out(stats=BUFFER[:15].view(5, 3))),
        ValueError, "ensemble_stats: out stats must not share memory with temperature, got overlapping memory"),
    "subsets shape": (lambda: ops.subset_correct(X, W, Y, out=torch.empty(3, 2, dtype=torch.int64)), ValueError,
                      r"subset_correct: out must have shape \[7, 2\], got \[3, 2\]"),
    "subsets in the labels": (
        lambda: (lambda b: ops.subset_correct(X, W, b[:5], out=b[4:18].view(7, 2)))(torch.zeros(20).long()),
        ValueError, "subset_correct: out must not share memory with target, got overlapping memory"),
    "gate count": (lambda: gate_with()() and ops.gate(*gate_arguments()[0], weight=1.0, threshold=1.0, out=()),
                   TypeError, "gate: out must be a tuple of 8 tensors .*, got 0 entries"),
    "gate layout": (gate_with(features=torch.empty(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)),
                    ValueError, "gate: out features must be contiguous, got strides"),
    "gate dtype": (gate_with(weight_sum=torch.empty((), dtype=torch.float64)), TypeError,
                   "gate: out weight_sum must be float32, got float64"),
    "gate in the features": (gate_with(features=lambda args: args[0]), ValueError,
                             "gate: out features must not share memory with features, got overlapping memory"),
    "gate in the running sum": (gate_with(running=lambda args: args[1]), ValueError,
                                "gate: out running must not share memory with running, got overlapping memory"),
    "gate twice the same": (gate_with(indices=BUFFER.long()[:6], argmax=lambda args: args[3]), ValueError,
                            "gate: out argmax must not share memory with indices, got overlapping memory"),
    "gate gradient": (gate_with(running=torch.empty(6, 5, requires_grad=True)), ValueError,
                      "gate: arguments must not require a gradient where out is given"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_wrong_out(name):
    call, error, message = CASES[name]
    with pytest.raises(error, match="aep::" + message):
        call()


def test_nothing_is_written_where_a_label_is_wrong():
    out = torch.full((7, 2), 99, dtype=torch.int64)
    with pytest.raises(IndexError, match="target must be within"):
        ops.subset_correct(X, W, Y + 7, out=out)
    assert (out == 99).all()


def test_neighbours_in_one_buffer_are_fine():
    buffer = torch.full((40,), -5.0)
    ops.ensemble(X, W, out=buffer[2:37].view(5, 7))
    assert torch.equal(buffer[2:37].view(5, 7), ops.ensemble(X, W))
    assert (buffer[:2] == -5).all() and (buffer[37:] == -5).all()


def test_without_grad_mode_a_gradient_may_be_required():
    with torch.no_grad():
        out = ops.ensemble(X.clone().requires_grad_(), W, out=torch.empty(5, 7))
    assert torch.equal(out, ops.ensemble(X, W))


@pytest.mark.parametrize("inference", [False, True], ids=["ordinary", "inference mode"])
def test_autograd_sees_that_out_was_written(inference):
    out = torch.zeros(5, 7)
    y = torch.ones(5, 7, requires_grad=True).mul(out)  # keeps `out` for its backward
    version = out._version
    with torch.inference_mode(inference):
        ops.ensemble(X, W, out=out)
    assert out._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_compiles_without_graph_breaks():
    def steps(x: Tensor, w: Tensor, out: Tensor, stats: Tensor, argmax: Tensor) -> Tensor:
        ops.ensemble(x, w, out=out)
        ops.ensemble_stats(x, w, out=(None, stats, argmax))
        return out + stats[:, :1] + argmax[:, None]

    def buffers() -> tuple[Tensor, ...]:
        return torch.empty(5, 7), torch.empty(5, 3), torch.empty(5, dtype=torch.int64)

    torch._dynamo.reset()
    compiled, plain = buffers(), buffers()
    result = torch.compile(steps, fullgraph=True, backend="aot_eager")(X, W, *compiled)
    torch.testing.assert_close(result, steps(X, W, *plain))
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_gate_compiles_without_graph_breaks():
    args, options = gate_arguments()
    expected = ops.gate(*args, **options)
    out, plain = filled(expected), filled(expected)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda out: ops.gate(*args, **options, out=out).features * 2, fullgraph=True, backend="aot_eager"
    )
    result = compiled(tuple(out))
    ops.gate(*args, **options, out=tuple(plain))
    torch.testing.assert_close(result, plain[0] * 2)
    for a, b in zip(out, plain, strict=True):
        torch.testing.assert_close(a, b)
