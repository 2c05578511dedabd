"""A compiled network answers as the network does, whatever the batch, strides and order of calls."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import gate

from aep_ext import GatedNet, MultiExitNet
from aep_ext.inference import CRITERIA, CompiledNet, simulate

BATCHES = (0, 1, 2, 7, 33)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", BATCHES)
def test_same_answers(compiled: CompiledNet, net: MultiExitNet, n: int) -> None:
    x = torch.randn(n, 3, 16, 16)
    with torch.no_grad():
        close(compiled.exit_logits(x), net.exit_logits(x))
        close(compiled(x), net(x))
    assert compiled.exit_logits(x).shape == (4, n, 5)


def test_interface(compiled: CompiledNet, net: MultiExitNet) -> None:
    assert (compiled.num_exits, compiled.num_classes, compiled.exit_ids) == (4, 5, (0, 1, 2, 3))
    assert torch.equal(compiled.output_weights, net.output_weights)
    assert compiled.backend in repr(compiled)
    assert 0 <= compiled.max_logit_difference < 1e-3 and compiled.timings == {}


@pytest.mark.parametrize("n", (1, 4, 7))
def test_results_are_the_callers(compiled: CompiledNet, n: int) -> None:
    """Later calls do not write into what earlier ones returned."""
    first, second = torch.randn(n, 3, 16, 16), torch.randn(n, 3, 16, 16)
    gated = gate(compiled, "confidence", 0.5)
    results = [compiled(first), compiled.exit_logits(first), *gated(first)]
    kept = [result.clone() for result in results]
    compiled(second), compiled.exit_logits(second), gated(second)
    assert all(torch.equal(a, b) for a, b in zip(results, kept, strict=True))


def test_batches_in_any_order(compiled: CompiledNet, net: MultiExitNet) -> None:
    for n in (3, 1, 7, 2, 7, 1, 9, 3):
        x = torch.randn(n, 3, 16, 16)
        with torch.no_grad():
            close(compiled(x), net(x))


def test_any_strides(compiled: CompiledNet, net: MultiExitNet) -> None:
    x = torch.randn(7, 3, 16, 16)
    with torch.no_grad():
        wanted = net(x)
    close(compiled(x.to(memory_format=torch.channels_last)), wanted)
    close(compiled(x.transpose(2, 3).contiguous().transpose(2, 3)), wanted)
    padded = torch.randn(14, 4, 18, 20)
    padded[::2, 1:, 1:17, 2:18] = x
    view = padded[::2, 1:, 1:17, 2:18]
    close(compiled(view), wanted)
    close(compiled(x[:1].expand(7, -1, -1, -1)), wanted[:1].expand(7, -1))


def test_no_gradient(compiled: CompiledNet) -> None:
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    assert not compiled(x).requires_grad and not compiled.exit_logits(x).requires_grad
    assert not any(part.requires_grad for part in gate(compiled, "entropy", 0.5)(x))


def test_input_is_not_changed(compiled: CompiledNet) -> None:
    x = torch.randn(7, 3, 16, 16)
    before = x.clone()
    compiled(x), gate(compiled, "confidence", 0.6)(x)
    assert torch.equal(x, before)


def test_not_finite(compiled: CompiledNet) -> None:
    x = torch.randn(7, 3, 16, 16)
    x[2] = float("nan")
    found = compiled.exit_logits(x)
    assert found[:, [0, 1, 3, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.zeros(2, 3, 16, 17),
            ValueError,
            r"CompiledNet: x must have shape \[N, 3, 16, 16\].*got \[2, 3, 16, 17\]",
        ),
        (torch.zeros(3, 16, 16), ValueError, r"CompiledNet: x must have shape.*got \[3, 16, 16\]"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.float64), ValueError, "CompiledNet: x must be torch.float32.*float64"),
        (torch.zeros(2, 3, 16, 16, device="meta"), ValueError, "CompiledNet: x must be torch.float32 on cpu.*on meta"),
        (
            torch.zeros(2, 3, 16, 16).to_sparse(),
            TypeError,
            r"CompiledNet: x must be a dense \(strided\) tensor, got torch.sparse_coo",
        ),
        (torch.zeros(2, 3, 16, 16).to_mkldnn(), TypeError, r"CompiledNet: x must be a dense \(strided\) tensor, got"),
    ],
)
def test_wrong_input(compiled: CompiledNet, x: object, error: type[Exception], message: str) -> None:
    for call in (compiled, compiled.exit_logits, gate(compiled, "confidence", 0.5)):
        with pytest.raises(error, match=message):
            call(x)


def test_negative_bit(compiled: CompiledNet) -> None:
    """Tensors whose negation torch has put off: they have no memory that an engine could read."""
    x = torch.randn(2, 3, 16, 16)
    negated = torch._neg_view(-x)
    assert negated.is_neg() and torch.equal(negated, x)
    close(compiled(negated), compiled(x))
    gated = gate(compiled, "margin", 0.5)
    close(gated(negated).logits, gated(x).logits)


def test_not_picklable(compiled: CompiledNet) -> None:
    for refused in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(TypeError, match="CompiledNet: compiled stages cannot be pickled or copied"):
            refused(compiled)


def test_threads_take_turns(compiled: CompiledNet, net: MultiExitNet) -> None:
    inputs = [torch.randn(n, 3, 16, 16) for n in (1, 1, 7, 7)]
    with torch.no_grad():
        wanted = [net(x) for x in inputs]
    failures: list[BaseException] = []

    def work(x: torch.Tensor, expected: torch.Tensor) -> None:
        try:
            for _ in range(20):
                close(compiled(x), expected)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(inputs, wanted, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_verify(compiled: CompiledNet) -> None:
    x = torch.randn(130, 3, 16, 16)
    found = compiled.verify(x.split(64))
    assert found.n == 130 and found.same_predictions >= 129
    assert 0 <= found.max_logit_difference < 1e-2
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:10], torch.zeros(10)), batch_size=4)
    assert compiled.verify(loader).n == 10
    assert compiled.verify([x[:3], x[3:5]]).n == 5 and compiled.verify([]).n == 0
    for batch in ({"x": x}, []):
        with pytest.raises(TypeError, match="CompiledNet.verify: loader must yield tensors, tuples that begin"):
            compiled.verify([batch])
    with pytest.raises(ValueError, match="CompiledNet: x must have shape"):
        compiled.verify([torch.zeros(1, 3, 8, 8)])


def images(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=generator) + 2 * torch.randn(n, 3, 1, 1, generator=generator)


def agrees(gated: GatedNet, x: torch.Tensor) -> None:
    """With the simulator on the same network's logits, except for samples near a threshold."""
    logits = gated.net.exit_logits(x)
    output, expected = gated(x), gated.simulate(logits)
    sure = torch.ones(len(x), dtype=torch.bool)
    if isinstance(gated.policy.criterion, str):
        sure = ~gated.near_threshold(logits, tolerance=1e-4)
    assert sure.sum() >= 0.9 * len(x)
    assert torch.equal(output.exit[sure], expected.exit[sure])
    torch.testing.assert_close(output.confidence[sure], expected.confidence[sure], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output.logits[sure], expected.logits[sure], rtol=1e-3, atol=1e-3)
    assert output.logits.shape == (len(x), 5) and output.exit.shape == output.confidence.shape == (len(x),)


@st.composite
def gates(draw):
    """Everything that a gate is given, for four exits."""
    criterion = draw(st.sampled_from([*CRITERIA, lambda state: state.indices % 3 == state.exit_index]))
    limit = st.integers(1, 3).map(float) if criterion in ("patience", "vote") else st.floats(0.05, 1.05)
    return {
        "criterion": criterion,
        "criterion_on": draw(st.sampled_from(["ensemble", "exit"])),
        "thresholds": draw(st.lists(limit, min_size=3, max_size=3)),
        "temperatures": draw(st.lists(st.sampled_from([0.7, 1.0, 1.3]), min_size=4, max_size=4)),
        "enabled": draw(st.lists(st.sampled_from([True, True, False]), min_size=3, max_size=3)),
    }


@pytest.mark.parametrize("backend", ("openvino", "onnxruntime", "eager"))
@settings(deadline=None, max_examples=15)
@given(gates(), st.sampled_from([0, 1, 1, 7, 7, 64]), st.integers(0, 1000))
def test_as_simulated(
    compiled_on: Callable[[str], CompiledNet], backend: str, arguments: dict, n: int, seed: int
) -> None:
    agrees(gate(compiled_on(backend), **arguments), images(n, seed))


@pytest.mark.parametrize("criterion", ["confidence", "vote"])
def test_a_large_batch(compiled: CompiledNet, criterion: str) -> None:
    gated = gate(compiled, criterion, 2 if criterion == "vote" else 0.5)
    x = images(257)
    agrees(gated, x)
    assert len(gated(x).exit.unique()) > 1


def test_nobody_leaves_and_all_is_the_ensemble(compiled: CompiledNet) -> None:
    for n in (1, 7, 12):
        x = images(n)
        for gated in (gate(compiled, "confidence", 2.0), gate(compiled, "vote", 1.0, enabled=False)):
            torch.testing.assert_close(gated(x).logits, compiled(x), rtol=1e-5, atol=1e-5)


def test_pooled(compiled: CompiledNet) -> None:
    """Pools hold features for long, so they are given copies."""
    gated, x = gate(compiled, "confidence", 0.5), images(40)
    sure = ~gated.near_threshold(compiled.exit_logits(x), tolerance=1e-4)
    for capacity in (3, 7, 16):
        pooled = gated.predict_all(x.split(7), capacity=capacity)
        assert torch.equal(pooled.exit[sure], gated(x).exit[sure])
        torch.testing.assert_close(pooled.logits[sure], gated(x).logits[sure], rtol=1e-3, atol=1e-3)


def test_measured(compiled: CompiledNet) -> None:
    gated, x = gate(compiled, "confidence", 0.5), images(9)
    kept = x.clone()
    profile = gated.measure(x, repeats=2)
    assert profile.sizes == (1, 2, 4, 8, 9) and torch.equal(x, kept)
    assert all(value > 0 for row in profile.stages for value in row)
    whole = profile.predicted([0, 0, 0, 1])
    assert abs(whole - profile.ungated(1)) < 1e-9 and profile.predicted([1, 1, 1, 1]) < whole
    if gated.gates_at(len(x)):
        agrees(gated, x)
    else:  # faster without its gates here and now
        assert gated(x).exit.eq(3).all()


def test_a_failed_call_leaves_the_network_free(compiled: CompiledNet) -> None:
    gated, x = gate(compiled, "confidence", 0.5), images(3)
    for wrong in (torch.zeros(3, 3, 8, 8), torch.zeros(2, 3, 16, 16, dtype=torch.float64)):
        with pytest.raises(ValueError, match="CompiledNet: x must"):
            gated(wrong)

    def rule(state: object) -> torch.Tensor:
        return compiled(x).argmax(-1) >= 0  # would wait for itself

    with pytest.raises(RuntimeError, match="CompiledNet: must not be called while it is at work on a batch"):
        gate(compiled, rule, 0.0)(x)
    assert gated(x).exit.shape == (3,) and compiled(x).shape == (3, 5)


def test_threads_take_turns_at_gates(compiled: CompiledNet) -> None:
    gated = gate(compiled, "confidence", 0.5)
    inputs = [images(n, seed) for seed, n in enumerate((1, 1, 7, 9))]
    wanted, failures = [gated(x) for x in inputs], []

    def work(x: torch.Tensor, expected: tuple[torch.Tensor, ...]) -> None:
        try:
            for _ in range(15):
                for a, b in zip(gated(x), expected, strict=True):
                    assert torch.equal(a, b)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(inputs, wanted, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_autocast_and_any_strides(compiled_on: Callable[[str], CompiledNet]) -> None:
    gated, x = gate(compiled_on("eager"), "confidence", 0.5), images(33)
    wanted = gated(x)
    for given_x in (x.contiguous(memory_format=torch.channels_last), x.flip(0).contiguous().flip(0)):
        assert (gated(given_x).exit == wanted.exit).float().mean() > 0.95
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, logits = gated(x), gated.net.exit_logits(x)
        one = gated(x[:1])
    assert found.logits.dtype == one.logits.dtype == logits.dtype == torch.bfloat16
    assert (found.exit == gated.simulate(logits).exit).float().mean() > 0.9


@pytest.mark.parametrize("n", (1, 7))
def test_nan_never_leaves(compiled: CompiledNet, net: MultiExitNet, n: int) -> None:
    """As from the network's own logits; on OpenVINO, whose ReLU maps NaN to 0, they may be finite."""
    x = torch.randn(n, 3, 16, 16)
    x[n // 2] = float("nan")
    gated = gate(compiled, "confidence", 0.0)
    wanted = simulate(net.exit_logits(x).detach(), gated.policy)
    assert wanted.exit[n // 2] == 3 and wanted.logits[n // 2].isnan().all()
    ours = compiled.exit_logits(x)
    finite = ours[:, n // 2].isfinite().all(-1)
    if compiled.backend == "openvino":
        wanted = gated.simulate(ours)
    else:
        assert not finite.any()
    found = gated(x)
    assert torch.equal(found.exit, wanted.exit)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4, equal_nan=True)
