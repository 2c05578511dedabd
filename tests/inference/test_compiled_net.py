"""A prepared network answers as the network does, whatever the batch, strides and order of calls."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch

from aep_ext import MultiExitNet
from aep_ext.deploy import PreparedNet

BATCHES = (0, 1, 2, 7, 33)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", BATCHES)
def test_same_answers(prepared: PreparedNet, net: MultiExitNet, n: int) -> None:
    x = torch.randn(n, 3, 16, 16)
    with torch.no_grad():
        close(prepared.exit_logits(x), net.exit_logits(x))
        close(prepared(x), net(x))
    assert prepared.exit_logits(x).shape == (4, n, 5)


def test_interface(prepared: PreparedNet, net: MultiExitNet) -> None:
    assert (prepared.num_exits, prepared.num_classes, prepared.exit_ids) == (4, 5, (0, 1, 2, 3))
    assert torch.equal(prepared.output_weights, net.output_weights) and len(prepared.stages) == 4
    assert prepared.backend in repr(prepared)
    assert prepared.batches == (() if prepared.backend == "eager" else (1, 7))
    assert 0 <= prepared.max_logit_difference < 1e-3 and prepared.timings == {}


@pytest.mark.parametrize("n", BATCHES)
def test_units_one_by_one(prepared: PreparedNet, net: MultiExitNet, n: int) -> None:
    x = torch.randn(n, 3, 16, 16)
    with torch.no_grad():
        maps, logits = net.features(x), net.exit_logits(x)
    features: torch.Tensor | None = x
    for position, unit in enumerate(prepared.stages):
        features, found = unit(features)
        close(found, logits[position])
        if position < 3:
            close(features, maps[position])
    assert features is None
    ours = prepared.features(x)
    assert len(ours) == 3
    for a, b in zip(ours, maps, strict=False):
        close(a, b)


@pytest.mark.parametrize("n", (1, 4, 7))
def test_results_are_the_callers(prepared: PreparedNet, n: int) -> None:
    """Later calls do not write into what earlier ones returned."""
    first, second = torch.randn(n, 3, 16, 16), torch.randn(n, 3, 16, 16)
    results = [prepared(first), prepared.exit_logits(first), *prepared.features(first)]
    results += [*prepared.gated(first, "confidence", 0.5)]
    kept = [result.clone() for result in results]
    prepared(second), prepared.features(second), prepared.gated(second, "confidence", 0.9)
    assert all(torch.equal(a, b) for a, b in zip(results, kept, strict=True))


def test_batches_in_any_order(prepared: PreparedNet, net: MultiExitNet) -> None:
    for n in (3, 1, 7, 2, 7, 1, 9, 3):
        x = torch.randn(n, 3, 16, 16)
        with torch.no_grad():
            close(prepared(x), net(x))


def test_any_strides(prepared: PreparedNet, net: MultiExitNet) -> None:
    x = torch.randn(7, 3, 16, 16)
    with torch.no_grad():
        wanted = net(x)
    close(prepared(x.to(memory_format=torch.channels_last)), wanted)
    close(prepared(x.transpose(2, 3).contiguous().transpose(2, 3)), wanted)
    padded = torch.randn(14, 4, 18, 20)
    padded[::2, 1:, 1:17, 2:18] = x
    view = padded[::2, 1:, 1:17, 2:18]
    close(prepared(view), wanted)
    close(prepared(x[:1].expand(7, -1, -1, -1)), wanted[:1].expand(7, -1))


def test_no_gradient(prepared: PreparedNet) -> None:
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    assert not prepared(x).requires_grad and not prepared.exit_logits(x).requires_grad
    assert not any(part.requires_grad for part in prepared.gated(x, "entropy", 0.5))


def test_input_is_not_changed(prepared: PreparedNet) -> None:
    x = torch.randn(7, 3, 16, 16)
    before = x.clone()
    prepared(x), prepared.gated(x, "confidence", 0.6), prepared.stages[0](x)
    assert torch.equal(x, before)


def test_not_finite(prepared: PreparedNet) -> None:
    x = torch.randn(7, 3, 16, 16)
    x[2] = float("nan")
    found = prepared.exit_logits(x)
    assert found[:, [0, 1, 3, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.zeros(2, 3, 16, 17),
            ValueError,
            r"PreparedNet: x must have shape \[N, 3, 16, 16\].*got \[2, 3, 16, 17\]",
        ),
        (torch.zeros(3, 16, 16), ValueError, r"PreparedNet: x must have shape.*got \[3, 16, 16\]"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.float64), TypeError, "PreparedNet: x must be torch.float32.*float64"),
        (torch.zeros(2, 3, 16, 16, device="meta"), ValueError, "PreparedNet: x must be on cpu.*got meta"),
        ([1.0], TypeError, "PreparedNet: x must be a torch.Tensor, got list"),
        (
            torch.zeros(2, 3, 16, 16).to_sparse(),
            TypeError,
            r"PreparedNet: x must be a dense \(strided\) tensor, got torch.sparse_coo",
        ),
        (torch.zeros(2, 3, 16, 16).to_mkldnn(), TypeError, r"PreparedNet: x must be a dense \(strided\) tensor, got"),
    ],
)
def test_wrong_input(prepared: PreparedNet, x: object, error: type[Exception], message: str) -> None:
    for call in (prepared, prepared.exit_logits, lambda z: prepared.gated(z, "confidence", 0.5)):
        with pytest.raises(error, match=message):
            call(x)


def test_wrong_features(prepared: PreparedNet) -> None:
    with pytest.raises(ValueError, match=r"features of unit 1 must have shape \[n, .*got \[2, 3, 16, 16\]"):
        prepared.stages[1](torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match="features of unit 0 must be torch.float32 on cpu, got torch.float64"):
        prepared.stages[0](torch.zeros(2, 3, 16, 16, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"features of unit 0 must be a dense \(strided\) tensor, got torch.sparse_coo"):
        prepared.stages[0](torch.zeros(2, 3, 16, 16).to_sparse())


def test_negative_bit(prepared: PreparedNet) -> None:
    """Tensors whose negation torch has put off: they have no memory that an engine could read."""
    x = torch.randn(2, 3, 16, 16)
    negated = torch._neg_view(-x)
    assert negated.is_neg() and torch.equal(negated, x)
    close(prepared(negated), prepared(x))
    close(prepared.gated(negated, "margin", 0.5).logits, prepared.gated(x, "margin", 0.5).logits)
    close(prepared.stages[0](negated)[1], prepared.stages[0](x)[1])
    features = prepared.features(x)[0]
    negated = torch._neg_view(-features)
    close(prepared.stages[1](negated)[1], prepared.stages[1](features)[1])


def test_not_picklable(prepared: PreparedNet) -> None:
    for refused in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(TypeError, match="PreparedNet: compiled units cannot be pickled or copied"):
            refused(prepared)


def test_threads_take_turns(prepared: PreparedNet, net: MultiExitNet) -> None:
    inputs = [torch.randn(n, 3, 16, 16) for n in (1, 1, 7, 7)]
    with torch.no_grad():
        wanted = [net(x) for x in inputs]
    failures: list[BaseException] = []

    def work(x: torch.Tensor, expected: torch.Tensor) -> None:
        try:
            for _ in range(20):
                close(prepared(x), expected)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(inputs, wanted, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_verify(prepared: PreparedNet) -> None:
    x = torch.randn(130, 3, 16, 16)
    found = prepared.verify(x)
    assert found.n == 130 and found.same_predictions >= 129 and min(found.same_exit_predictions) >= 129
    assert 0 <= found.max_logit_difference < 1e-3 * max(1, found.max_logit)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:10], torch.zeros(10)), batch_size=4)
    assert prepared.verify(loader).n == 10
    assert prepared.verify([x[:3], x[3:5]]).n == 5 and prepared.verify([]).n == 0
    with pytest.raises(TypeError, match="PreparedNet.verify: data must be a tensor, or batches"):
        prepared.verify([{"x": x}])
    for wrong, name in ((None, "NoneType"), (3, "int")):
        with pytest.raises(TypeError, match=f"PreparedNet.verify: data must be a tensor, or batches.* got {name}$"):
            prepared.verify(wrong)
    with pytest.raises(TypeError, match="PreparedNet.verify: data must be .* got a batch of list"):
        prepared.verify([[]])
    with pytest.raises(ValueError, match="PreparedNet: x must have shape"):
        prepared.verify(torch.tensor(1.0))
