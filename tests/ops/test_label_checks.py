"""check_labels: the CPU's error for a label out of range, on a GPU too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from aep_ext import _load, ops
from aep_ext.ops import label_checks

EXITS, ROWS, CLASSES = 2, 6, 5


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    with ops.check_labels(False):
        yield


@pytest.fixture(params=["as loaded", "reference"])
def path(request: pytest.FixtureRequest) -> str:
    """As it runs, and as it runs without the extension."""
    if request.param == "reference":
        request.getfixturevalue("reference_path")
    return request.param


def logits(device: str, grad: bool = True) -> Tensor:
    return torch.randn(EXITS, ROWS, CLASSES, device=device).requires_grad_(grad)


def loss_of(memory: str) -> Callable[[Tensor], Tensor]:
    def run(target: Tensor) -> Tensor:
        leaf = logits(target.device.type)
        weights = torch.ones(EXITS, device=target.device)
        loss = ops.joint_cross_entropy(leaf * 1, target, weights, memory=memory).loss
        (grad,) = torch.autograd.grad(loss, leaf)
        return torch.cat([loss.detach()[None], grad.flatten()])

    return run


def linear(grad: bool) -> Callable[[Tensor], Tensor]:
    def run(target: Tensor) -> Tensor:
        kind = {"device": target.device}
        pooled = [torch.randn(ROWS, 3, **kind).requires_grad_(grad) for _ in range(EXITS)]
        weights = [torch.randn(CLASSES, 3, **kind) for _ in range(EXITS)]
        loss = ops.linear_joint_cross_entropy(pooled, weights, None, target, torch.ones(EXITS, **kind)).loss
        grads = torch.autograd.grad(loss, pooled) if grad else ()
        return torch.cat([loss.detach()[None], *(g.flatten() for g in grads)])

    return run


def of_terms(target: Tensor) -> Tensor:
    leaf, weights = logits(target.device.type), torch.ones(EXITS, device=target.device)
    loss = ops.multi_exit_loss(leaf, target, weights, weights, distillation=0.5).loss
    (grad,) = torch.autograd.grad(loss, leaf)
    return torch.cat([loss.detach()[None], grad.flatten()])


def counts(target: Tensor) -> Tensor:
    return ops.subset_correct(logits(target.device.type, False), torch.ones(EXITS, device=target.device), target)


CALLS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "recompute": ("joint_cross_entropy", loss_of("recompute")),
    "in_forward": ("joint_cross_entropy", loss_of("in_forward")),
    "in_place": ("joint_cross_entropy", loss_of("in_place")),
    "several terms": ("multi_exit_loss", of_terms),
    "linear": ("linear_joint_cross_entropy", linear(False)),
    "linear with gradients": ("linear_joint_cross_entropy", linear(True)),
    "subsets": ("subset_correct", counts),
}


def labels(bad: int | None, device: str) -> Tensor:
    target = torch.arange(ROWS, device=device) % CLASSES
    if bad is not None:
        target[4] = bad
    return target


def test_it_is_a_function_and_a_context_manager():
    assert not ops.is_check_labels_enabled()
    with ops.check_labels():
        assert ops.is_check_labels_enabled()
        with ops.check_labels(False):
            assert not ops.is_check_labels_enabled()
        assert ops.is_check_labels_enabled()
    assert not ops.is_check_labels_enabled()
    ops.check_labels()
    assert ops.is_check_labels_enabled()
    with pytest.raises(KeyError), ops.check_labels(False):
        raise KeyError
    assert ops.is_check_labels_enabled()
    kept = ops.check_labels(True)
    ops.check_labels(False)
    with kept:
        assert ops.is_check_labels_enabled()


@pytest.mark.parametrize("mode", [1, None, "on"])
def test_the_mode_is_a_bool(mode):
    with pytest.raises(TypeError, match="^check_labels: mode must be True or False, got "):
        ops.check_labels(mode)
    assert not ops.is_check_labels_enabled()


def test_the_operators_are_told(native):
    for mode in (True, False):
        ops.check_labels(mode)
        assert _load.extension.labels_asked() is mode


def test_the_environment_turns_it_on(native, monkeypatch):
    program = "from aep_ext import ops, _load; print(ops.is_check_labels_enabled(), _load.extension.labels_asked())"
    environment = os.environ | {"AEP_CHECK_LABELS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split() == ["True", "True"], done.stderr
    for value, on in {"": False, "0": False, "off": False, " On ": True}.items():
        monkeypatch.setenv("AEP_CHECK_LABELS", value)
        assert _load.switched_on("AEP_CHECK_LABELS") is on


def test_where_labels_are_looked_at(monkeypatch):
    """On the CPU always, on meta never, elsewhere if asked for and the device can be waited for."""
    capturing = False
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.autograd.set_grad_enabled(True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def wanted() -> list[bool]:
        kinds = ("cpu", "meta", "cuda", "xpu")
        return [label_checks._looks("joint_cross_entropy", torch.device(kind)) for kind in kinds]

    assert wanted() == [True, False, False, False]
    with ops.check_labels():
        assert wanted() == [True, False, True, True]
        capturing = True
        with pytest.raises(RuntimeError, match="^aep::joint_cross_entropy: check_labels must be off while a CUDA gr"):
            wanted()
    assert wanted() == [True, False, False, False]


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_the_cpu_looks_in_any_case(name, mode, path):
    op, call = CALLS[name]
    with ops.check_labels(mode):
        call(labels(None, "cpu"))
        with pytest.raises(IndexError, match=rf"^aep::{op}: target must be within 0\.\.4.*, got 7 at position 4$"):
            call(labels(7, "cpu"))


@pytest.mark.parametrize("name", ["recompute", "in_forward", "linear with gradients", "subsets"])
def test_meta_and_fake_tensors_have_no_labels(name, path):
    call = CALLS[name][1]
    with ops.check_labels():
        assert call(labels(None, "meta")).is_meta
        with FakeTensorMode():
            call(labels(None, "cpu"))


@pytest.mark.parametrize("name", ["recompute", "linear"])
def test_it_does_not_break_graphs(name, path):
    torch._dynamo.reset()
    x, w = torch.randn(EXITS, ROWS, CLASSES), torch.ones(EXITS)

    def run(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        if name == "linear":
            return ops.linear_joint_cross_entropy(list(x), [torch.eye(CLASSES)] * EXITS, None, target, w).loss
        return ops.joint_cross_entropy(x, target, w).loss

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for mode in (True, False):
        with ops.check_labels(mode):
            torch.testing.assert_close(compiled(x, w, labels(None, "cpu")), run(x, w, labels(None, "cpu")))
    assert counter.frame_count == 1
    if path == "reference" or _load.extension is None:  # a graph of torch's own operators looks at nothing
        assert compiled(x, w, labels(9, "cpu")).isnan()
    else:
        with pytest.raises(IndexError, match="got 9 at position 4"):
            compiled(x, w, labels(9, "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [CLASSES, -1, 2**40, -(2**63)])
@pytest.mark.parametrize("name", CALLS)
def test_the_gpu_raises_as_the_cpu_does(name, bad, path):
    op, call = CALLS[name]
    with pytest.raises(IndexError) as expected:
        call(labels(bad, "cpu"))
    call(labels(bad, "cuda"))  # off: no error, now or later
    torch.cuda.synchronize()
    with ops.check_labels():
        with pytest.raises(IndexError) as found:
            call(labels(bad, "cuda"))
        assert str(found.value) == str(expected.value) and op in str(found.value)
        call(labels(None, "cuda"))
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CALLS if "subsets" not in name])
def test_without_it_the_gpu_gives_nan_and_no_gradient(name, path):
    target = labels(CLASSES, "cuda")
    result = CALLS[name][1](target)
    assert result[0].isnan()
    if result.numel() == 1:
        return
    grads = result[1:].view(EXITS, ROWS, -1)
    assert grads.isfinite().all() and not grads[:, 4].any() and grads[:, :4].any()


@pytest.mark.gpu
def test_ignored_labels_pass_on_the_gpu(path):
    with ops.check_labels():
        assert CALLS["recompute"][1](labels(-100, "cuda")).isfinite().all()
        spread = torch.stack([labels(None, "cuda"), torch.full((ROWS,), 99, device="cuda")], 1)[:, 0]
        assert CALLS["recompute"][1](spread).isfinite().all()


@pytest.mark.gpu
def test_nothing_is_overwritten_on_the_gpu(path):
    base = logits("cuda", False)
    x = base.clone().requires_grad_() * 1
    with ops.check_labels(), pytest.raises(IndexError):
        ops.joint_cross_entropy(x, labels(9, "cuda"), torch.ones(EXITS, device="cuda"), memory="in_place")
    assert torch.equal(x, base)


@pytest.mark.gpu
def test_compiled_functions_look_on_the_gpu(native):
    torch._dynamo.reset()
    x, w = logits("cuda", False), torch.ones(EXITS, device="cuda")
    compiled = torch.compile(lambda target: ops.joint_cross_entropy(x, target, w).loss, backend="aot_eager")
    assert compiled(labels(9, "cuda")).isnan()
    with ops.check_labels(), pytest.raises(IndexError, match="got 9 at position 4"):
        compiled(labels(9, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["loss", "subsets"])
def test_a_capture_says_that_it_cannot_wait(name, path):
    x, w, target = logits("cuda", False), torch.ones(EXITS, device="cuda"), labels(None, "cuda")

    def run() -> Tensor:
        if name == "subsets":
            return ops.subset_correct(x, w, target)
        return ops.joint_cross_entropy(x, target, w).loss

    expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="check_labels must be off while a CUDA graph is captured"):
        with torch.cuda.graph(graph), ops.check_labels():
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    graph.replay()
    torch.testing.assert_close(result, expected)
