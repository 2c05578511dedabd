"""``compile``: choice of the engine, refusals, kinds of networks, and that the user's network is left alone."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable

import pytest
import torch
from replay import gate
from torch import Tensor, nn

import aep_ext
from aep_ext import GatedNet, MultiExitNet, anticipate, prune
from aep_ext.inference import CompiledNet, compile
from aep_ext.inference.backends import build, missing
from aep_ext.inference.backends.engine import Engine, TorchChain
from aep_ext.surgery.heads import ConvPooledLinearHead, ConvPooledMLPHead, PooledLinearHead

ENGINES = ("openvino", "onnxruntime")


def needs(backend: str) -> None:
    reason = missing(backend)
    if reason:
        pytest.skip(reason)


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def heads_of_all_kinds() -> MultiExitNet:
    """Five stages, exits after the second, third and last; one head of each kind; two input channels."""
    return MultiExitNet(
        [conv(2, 4), conv(4, 6, 2), conv(6, 6), conv(6, 8, 2), conv(8, 8)],
        [ConvPooledMLPHead(6, 3), ConvPooledLinearHead(6, 3), PooledLinearHead(8, 3, pre=nn.ReLU(), dropout=0.3)],
        exit_stages=[1, 2, 4],
        num_classes=3,
    )


def agrees(compiled: CompiledNet, net: MultiExitNet, *shape: int) -> None:
    net = net.eval()
    for n in (1, 2, 5):
        x = torch.randn(n, *shape)
        with torch.no_grad():
            wanted = net.exit_logits(x)
        torch.testing.assert_close(compiled.exit_logits(x), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", (*ENGINES, "eager"))
def test_heads_gaps_and_oblong_images(backend: str) -> None:
    needs(backend)
    net = heads_of_all_kinds()
    compiled = compile(net, torch.randn(2, 2, 12, 20), backend, threads=1)
    agrees(compiled, net, 2, 12, 20)


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("exits", [pytest.param((0,), marks=pytest.mark.slow), (1, 2)])
def test_pruned(net: MultiExitNet, backend: str, exits: tuple[int, ...]) -> None:
    needs(backend)
    small = prune(net, exits)
    compiled = compile(small, torch.randn(1, 3, 16, 16), backend, threads=1, batches=[])
    assert compiled.exit_ids == exits and compiled.num_exits == len(exits)
    agrees(compiled, small, 3, 16, 16)
    x = torch.randn(3, 3, 16, 16)
    assert (gate(compiled, "confidence", 0.0 if len(exits) > 1 else [])(x).exit == 0).all()


class Residual(nn.Module):
    """A user's network with a view head, traced by anticipate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(3, 8, 2), conv(8, 8), conv(8, 16, 2)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.third(x + self.second(x))
        return self.fc(self.pool(x).view(x.size(0), -1))


@pytest.mark.parametrize("backend", ["openvino", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_anticipated(backend: str) -> None:
    needs(backend)
    net = anticipate(Residual(), exits=2, example=(3, 16, 16))
    example = torch._neg_view(torch.randn(2, 3, 16, 16))  # contiguous, but its negation is put off
    agrees(compile(net, example, backend, threads=1, batches=[]), net, 3, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5"])
def test_libraries(name: str, backend: str) -> None:
    needs(backend)
    pytest.importorskip("torchvision", reason="the networks are torchvision's")
    from aep_ext.surgery.networks import build

    net = build(name, 10)
    compiled = compile(net, torch.randn(2, 3, 64, 64), backend, threads=1)
    agrees(compiled, net, 3, 64, 64)
    assert compiled.verify([torch.randn(8, 3, 64, 64)]).same_predictions == 8


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler")
def test_inductor(net: MultiExitNet) -> None:
    small = prune(net, (0, 1))
    compiled = compile(small, torch.randn(3, 3, 16, 16), "inductor")
    agrees(compiled, small, 3, 16, 16)
    assert gate(compiled, "confidence", 2.0)(torch.randn(6, 3, 16, 16)).exit.tolist() == [1] * 6


def test_the_network_is_left_alone(net: MultiExitNet) -> None:
    net.train()
    net.stages[1].eval()  # a part that the user has frozen
    net(torch.randn(2, 3, 16, 16)).sum().backward()
    calls: list[int] = []
    net.stages[0].register_forward_hook(lambda *_: calls.append(1))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    modes = [module.training for module in net.modules()]
    compiled = compile(net, torch.randn(2, 3, 16, 16), "eager")
    compiled(torch.randn(2, 3, 16, 16))
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(p.grad, g) and p.requires_grad for p, g in zip(net.parameters(), gradients, strict=True))
    with torch.no_grad():  # and what is compiled does not follow what becomes of it
        before = compiled(torch.ones(1, 3, 16, 16))
        for parameter in net.parameters():
            parameter.zero_()
        assert torch.equal(compiled(torch.ones(1, 3, 16, 16)), before)
        assert compiled.verify([torch.randn(3, 3, 16, 16)]).same_predictions == 3


class Faulty(TorchChain):
    """Stands for an engine's segments; what is wrong with them is set by the tests."""

    fault: str | None = None

    def run(self, e: int) -> Tensor:
        logits = super().run(e)
        if self.fault == "slow":
            sum(range(100_000))
        if self.fault == "large":
            logits = logits + 1000.5 * (len(logits) == 2)
        return logits + {"wrong": 1.0, "nan": float("nan")}.get(self.fault, 0.0)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts ``Faulty`` in OpenVINO's place."""
    module = importlib.import_module("aep_ext.inference.compile")  # the name on the face is the function

    def put(fault: str) -> None:
        def made(name: str, segments: object, inputs: object, settings: object) -> Engine:
            if name != "openvino":
                return build(name, segments, inputs, settings)
            if fault == "refuses":
                raise ValueError("operator aten::sinc\n is not supported")
            chain = Faulty(segments)
            chain.fault = fault
            return Engine(chain, notices=["a notice of its own"])

        monkeypatch.setattr(module, "build", made)
        monkeypatch.setattr(module, "missing", lambda n: None if n == "openvino" else missing(n))

    return put


@pytest.mark.parametrize("fault", ["wrong", "nan"])
def test_absurd_logits(net: MultiExitNet, stand_in: Callable[[str], None], fault: str) -> None:
    stand_in(fault)
    with pytest.raises(RuntimeError, match="backend 'openvino' must give the network's logits up to .*difference of"):
        compile(net, torch.randn(2, 3, 16, 16), "openvino")
    compiled = compile(net, torch.randn(2, 3, 16, 16), ["openvino", "eager"])
    assert compiled.backend == "eager" and list(compiled.timings) == ["eager"]
    assert any(notice.startswith("openvino: compile: backend 'openvino' must") for notice in compiled.notices)


def test_tolerance_is_of_the_largest_logit(
    net: MultiExitNet, stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all batches that are compared, not of the last one."""
    stand_in("large")
    own = MultiExitNet.exit_logits

    def large(self: MultiExitNet, x: Tensor) -> Tensor:
        return own(self, x) + 1000.0 * (len(x) == 2)

    monkeypatch.setattr(MultiExitNet, "exit_logits", large)
    assert 0.49 < compile(net, torch.randn(2, 3, 16, 16), "openvino").max_logit_difference < 0.51


def test_an_engine_that_fails(net: MultiExitNet, stand_in: Callable[[str], None]) -> None:
    stand_in("refuses")
    with pytest.raises(RuntimeError, match="'openvino' cannot run this network: operator aten::sinc is not supported"):
        compile(net, torch.randn(2, 3, 16, 16), "openvino")
    compiled = compile(net, torch.randn(2, 3, 16, 16), ["eager", "openvino"])
    assert compiled.backend == "eager" and any("aten::sinc" in notice for notice in compiled.notices)
    with pytest.raises(RuntimeError, match="no backend can run this network: openvino: .*aten::sinc"):
        compile(net, torch.randn(2, 3, 16, 16), ["openvino"])


def test_auto_takes_the_fastest(net: MultiExitNet, stand_in: Callable[[str], None]) -> None:
    stand_in("slow")
    compiled = compile(net, torch.randn(2, 3, 16, 16), ["openvino", "eager"])
    assert compiled.backend == "eager" and set(compiled.timings) == {"openvino", "eager"}
    assert compiled.timings["eager"] < compiled.timings["openvino"]


def test_auto(net: MultiExitNet) -> None:
    small = prune(net, [0])
    compiled = compile(small, torch.randn(2, 3, 16, 16), batches=[])
    agrees(compiled, small, 3, 16, 16)
    assert gate(compiled, "confidence", [])(torch.randn(3, 3, 16, 16)).exit.tolist() == [0] * 3
    there = {name for name in (*ENGINES, "eager") if missing(name) is None}
    if there != {"eager"}:
        assert set(compiled.timings) == there
    assert compiled.backend == min(compiled.timings, key=compiled.timings.get)


def test_nothing_but_torch(net: MultiExitNet, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    hidden = {"openvino", "onnxruntime", "onnx", "onnxscript"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else found(name, *rest))
    for name in ENGINES:
        with pytest.raises(ImportError, match=rf"backend '{name}' needs .*: pip install 'aep_ext\[{name}\]'"):
            compile(net, torch.randn(1, 3, 16, 16), name)
    compiled = compile(net, torch.randn(1, 3, 16, 16))
    assert compiled.backend == "eager" and any("eager is all there is" in notice for notice in compiled.notices)


@pytest.mark.parametrize("backend", ENGINES)
def test_other_dtypes(net: MultiExitNet, backend: str) -> None:
    if missing(backend) is None:
        with pytest.raises(ValueError, match=f"'{backend}' must be given a float32 network on the CPU, got"):
            compile(net.double(), torch.randn(1, 3, 16, 16).double(), backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_eager_takes_other_dtypes(net: MultiExitNet, dtype: torch.dtype) -> None:
    net = net.to(dtype)
    x = torch.randn(6, 3, 16, 16, dtype=dtype)
    compiled = compile(net, x, "eager")
    gated = gate(compiled, "confidence", 0.5)
    assert compiled(x).dtype == gated(x).logits.dtype == gated(x[:1]).logits.dtype == dtype
    if dtype == torch.float64:
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("precision", ["float32", "engine"])
def test_precision(net: MultiExitNet, precision: str) -> None:
    """float32 is what it says, also on a CPU where the engine would take bfloat16."""
    needs("openvino")
    compiled = compile(prune(net, [0]), torch.randn(2, 3, 16, 16), "openvino", precision=precision, batches=[])
    if precision == "float32":
        assert compiled.max_logit_difference < 1e-4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"net": nn.Linear(2, 2)}, TypeError, "net must be a MultiExitNet, got Linear"),
        ({"example": (3, 16, 16)}, TypeError, "example must be a torch.Tensor, got tuple"),
        ({"example": torch.zeros(3, 16, 16)}, ValueError, r"example must have shape \[N, C, H, W\].*got \[3, 16, 16\]"),
        ({"example": torch.zeros(0, 3, 16, 16)}, ValueError, r"example must have shape.*got \[0, 3, 16, 16\]"),
        (
            {"example": torch.zeros(1, 3, 16, 16).double()},
            ValueError,
            "example must be torch.float32 on cpu like the network, got torch.float64",
        ),
        (
            {"example": torch.zeros(1, 3, 16, 16).to_sparse()},
            TypeError,
            r"example must be a dense \(strided\) tensor, got torch.sparse_coo",
        ),
        (
            {"example": torch.zeros(1, 3, 16, 16, device="meta")},
            ValueError,
            "example must be torch.float32 on cpu like the network, .*on meta",
        ),
        ({"backend": "tensorrt"}, ValueError, "backend must be auto, or of openvino.*got 'tensorrt'"),
        ({"backend": ["eager", "no"]}, ValueError, "backend must be auto, or of openvino.*got 'eager, no'"),
        ({"backend": []}, ValueError, "backend must be auto, or of openvino.*got ''"),
        ({"precision": "half"}, ValueError, "precision must be one of float32, engine, got 'half'"),
        ({"threads": 0}, ValueError, "threads must be whole numbers of at least 1, got 0"),
        ({"batches": [0]}, ValueError, "batches must be whole numbers of at least 1, got 0"),
    ],
)
def test_wrong_arguments(net: MultiExitNet, change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"net": net, "example": torch.randn(1, 3, 16, 16), "backend": "eager", **change}
    with pytest.raises(error, match=f"compile: .*{message}"):
        compile(**arguments)


def test_a_gated_net_is_compiled_with_its_policy(net: MultiExitNet) -> None:
    gated = gate(net, "margin", 0.3, temperatures=1.5)
    compiled = aep_ext.compile(gated, torch.randn(4, 3, 16, 16), "eager")
    assert isinstance(compiled, GatedNet) and isinstance(compiled.net, CompiledNet) and not compiled.training
    assert compiled.policy == gated.policy
    x = torch.randn(40, 3, 16, 16)
    sure = ~gated.near_threshold(net.exit_logits(x).detach(), 1e-4)
    assert torch.equal(compiled(x).exit[sure], gated(x).exit[sure])
    torch.testing.assert_close(compiled(x).logits[sure], gated(x).logits[sure], rtol=1e-3, atol=1e-3)
    with pytest.raises(TypeError, match="compile: net must be a MultiExitNet, got CompiledNet"):
        compile(compiled, x)


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, lines = heads_of_all_kinds(), torch.randn(2, 2, 12, 20), []
    compile(net, x, "eager", progress=lines.append)
    assert lines == ["compile: eager: building 3 stages for batches of 1, 2 and any", "compile: done, on eager"]
    lines.clear()
    compile(net, x, ["eager"], progress=lines.append)
    assert "compile: timing eager on 2 images" in lines and lines[-1].startswith("compile: done, on eager, eager ")
    assert capsys.readouterr() == ("", "")
    compile(net, x, "eager")
    assert capsys.readouterr() == ("", "")  # no terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    compile(net, x, "eager")
    assert capsys.readouterr() == ("", "\n".join([lines[0], "compile: done, on eager", ""]))
