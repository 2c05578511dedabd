"""``prepare``: choice of the engine, refusals, kinds of networks, and that the user's network is left alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from aep_ext import MultiExitNet, anticipate, prune
from aep_ext.deploy import PreparedNet, prepare
from aep_ext.deploy import prepare as face
from aep_ext.inference.backends import BACKENDS, Engine, engine_class, missing
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


def agrees(prepared: PreparedNet, net: MultiExitNet, *shape: int) -> None:
    net = net.eval()
    for n in (1, 2, 5):
        x = torch.randn(n, *shape)
        with torch.no_grad():
            wanted = net.exit_logits(x)
        torch.testing.assert_close(prepared.exit_logits(x), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", (*ENGINES, "eager"))
def test_heads_gaps_and_oblong_images(backend: str) -> None:
    needs(backend)
    net = heads_of_all_kinds()
    prepared = prepare(net, torch.randn(2, 2, 12, 20), backend, threads=1)
    agrees(prepared, net, 2, 12, 20)
    assert [tuple(z.shape) for z in prepared.features(torch.randn(3, 2, 12, 20))] == [(3, 6, 6, 10)] * 2


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("exits", [pytest.param((0,), marks=pytest.mark.slow), (1, 2)])
def test_pruned(net: MultiExitNet, backend: str, exits: tuple[int, ...]) -> None:
    needs(backend)
    small = prune(net, exits)
    prepared = prepare(small, torch.randn(1, 3, 16, 16), backend, threads=1, batches=[])
    assert prepared.exit_ids == exits and prepared.num_exits == len(exits) and prepared.batches == ()
    agrees(prepared, small, 3, 16, 16)
    x = torch.randn(3, 3, 16, 16)
    assert (prepared.gated(x, "confidence", 0.0 if len(exits) > 1 else []).exit == 0).all()


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
    agrees(prepare(net, example, backend, threads=1, batches=[]), net, 3, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5"])
def test_libraries(name: str, backend: str) -> None:
    needs(backend)
    pytest.importorskip("torchvision", reason="the networks are torchvision's")
    from aep_ext.surgery.networks import build

    net = build(name, 10)
    prepared = prepare(net, torch.randn(2, 3, 64, 64), backend, threads=1)
    agrees(prepared, net, 3, 64, 64)
    assert prepared.verify(torch.randn(8, 3, 64, 64)).same_predictions == 8


@pytest.mark.slow
def test_inductor(net: MultiExitNet) -> None:
    from aep_ext.inference.backends.inductor import no_compiler

    if no_compiler(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    small = prune(net, (0, 1))
    prepared = prepare(small, torch.randn(3, 3, 16, 16), "inductor")
    agrees(prepared, small, 3, 16, 16)
    assert prepared.gated(torch.randn(6, 3, 16, 16), "confidence", 2.0).exit.tolist() == [1] * 6
    with pytest.raises(ValueError, match="backend 'inductor' takes the built-in policies"):
        prepared.gated(torch.randn(1, 3, 16, 16), lambda judged: judged.indices > 0, 0.0)


def test_no_compiler(net: MultiExitNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match="deploy.prepare: backend 'inductor' needs a C.. compiler at run time"):
        prepare(net, torch.randn(1, 3, 16, 16), "inductor")
    prepared = prepare(net, torch.randn(1, 3, 16, 16), candidates=["inductor", "eager"])
    assert prepared.backend == "eager" and any("C++ compiler" in notice for notice in prepared.notices)


def test_the_network_is_left_alone(net: MultiExitNet) -> None:
    net.train()
    net.stages[1].eval()  # a part that the user has frozen
    net(torch.randn(2, 3, 16, 16)).sum().backward()
    calls: list[int] = []
    net.stages[0].register_forward_hook(lambda *_: calls.append(1))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    modes = [module.training for module in net.modules()]
    prepared = prepare(net, torch.randn(2, 3, 16, 16), "eager")
    prepared(torch.randn(2, 3, 16, 16))
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(p.grad, g) and p.requires_grad for p, g in zip(net.parameters(), gradients, strict=True))
    with torch.no_grad():  # and what is prepared does not follow what becomes of it
        before = prepared(torch.ones(1, 3, 16, 16))
        for parameter in net.parameters():
            parameter.zero_()
        assert torch.equal(prepared(torch.ones(1, 3, 16, 16)), before)
        assert prepared.verify(torch.randn(3, 3, 16, 16)).same_predictions == 3


class Slow(Engine):
    """Stands for an engine; what it does is set by the tests."""

    name = "slow"
    fault: str | None = None

    def __init__(self, segments: object, inputs: object, settings: object) -> None:
        if self.fault == "refuses":
            raise NotImplementedError("operator aten::sinc\n is not supported")
        inner = engine_class("eager")(segments, inputs, settings)
        self._inner, self.notices = inner, ["a notice of its own"]

    def chain(self, n: int) -> object:
        chain = self._inner.chain(n)
        run_all = type(chain).run_all

        def changed() -> Tensor:
            logits = run_all(chain)
            if self.fault == "slow":
                sum(range(300_000))
            if self.fault == "large":
                logits = logits + 1000.5 * (n == 2)
            return logits + {"wrong": 1.0, "nan": float("nan")}.get(self.fault, 0.0)

        chain.run_all = changed
        return chain


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Puts ``Slow`` in OpenVINO's place, with a fault."""
    import aep_ext.inference.compile  # noqa: F401  (the name on the face is the function)

    module = importlib.import_module("aep_ext.inference.compile")

    def put(fault: str | None) -> None:
        kind = type("Faulty", (Slow,), {"fault": fault, "name": "openvino"})
        monkeypatch.setattr(module, "engine_class", lambda n: kind if n == "openvino" else engine_class(n))
        monkeypatch.setattr(module, "missing", lambda n: None if n == "openvino" else missing(n))

    return put


@pytest.mark.parametrize("fault", ["wrong", "nan"])
def test_absurd_logits(net: MultiExitNet, stand_in: Callable[[str | None], None], fault: str) -> None:
    stand_in(fault)
    with pytest.raises(RuntimeError, match="backend 'openvino' must give the network's logits up to .*difference of"):
        prepare(net, torch.randn(2, 3, 16, 16), "openvino")
    prepared = prepare(net, torch.randn(2, 3, 16, 16), candidates=["openvino", "eager"])
    assert prepared.backend == "eager" and list(prepared.timings) == ["eager"]
    assert any(notice.startswith("openvino: deploy.prepare: backend 'openvino' must") for notice in prepared.notices)


def test_tolerance_is_of_the_largest_logit(
    net: MultiExitNet, stand_in: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all batches that are compared, not of the last one."""
    stand_in("large")
    own = MultiExitNet.exit_logits

    def large(self: MultiExitNet, x: Tensor) -> Tensor:
        return own(self, x) + 1000.0 * (len(x) == 2)

    monkeypatch.setattr(MultiExitNet, "exit_logits", large)
    assert 0.49 < prepare(net, torch.randn(2, 3, 16, 16), "openvino").max_logit_difference < 0.51


def test_an_engine_that_fails(net: MultiExitNet, stand_in: Callable[[str | None], None]) -> None:
    stand_in("refuses")
    with pytest.raises(RuntimeError, match="'openvino' cannot run this network: operator aten::sinc is not supported"):
        prepare(net, torch.randn(2, 3, 16, 16), "openvino")
    prepared = prepare(net, torch.randn(2, 3, 16, 16), candidates=["eager", "openvino"])
    assert prepared.backend == "eager" and any("aten::sinc" in notice for notice in prepared.notices)
    with pytest.raises(RuntimeError, match="no backend can run this network: openvino: .*aten::sinc"):
        prepare(net, torch.randn(2, 3, 16, 16), candidates=["openvino"])


def test_auto_takes_the_fastest(net: MultiExitNet, stand_in: Callable[[str | None], None]) -> None:
    stand_in("slow")
    prepared = prepare(net, torch.randn(2, 3, 16, 16), candidates=["openvino", "eager"])
    assert prepared.backend == "eager" and set(prepared.timings) == {"openvino", "eager"}
    assert prepared.timings["eager"] < prepared.timings["openvino"]


def test_auto(net: MultiExitNet) -> None:
    small = prune(net, [0])
    prepared = prepare(small, torch.randn(2, 3, 16, 16), batches=[])
    agrees(prepared, small, 3, 16, 16)
    assert prepared.gated(torch.randn(3, 3, 16, 16), "confidence", []).exit.tolist() == [0] * 3
    there = {name for name in (*ENGINES, "eager") if missing(name) is None}
    if there != {"eager"}:
        assert set(prepared.timings) == there and any("inductor: left out" in n for n in prepared.notices)
    assert prepared.backend == min(prepared.timings, key=prepared.timings.get)


def test_nothing_but_torch(net: MultiExitNet, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    hidden = {"openvino", "onnxruntime", "onnx", "onnxscript"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else found(name, *rest))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    for name in ENGINES:
        with pytest.raises(ImportError, match=rf"backend '{name}' needs .*: pip install 'aep_ext\[{name}\]'"):
            prepare(net, torch.randn(1, 3, 16, 16), name)
    prepared = prepare(net, torch.randn(1, 3, 16, 16))
    assert prepared.backend == "eager" and any("eager is all there is" in notice for notice in prepared.notices)


@pytest.mark.parametrize("backend", ENGINES)
def test_other_dtypes(net: MultiExitNet, backend: str) -> None:
    if missing(backend) is None:
        with pytest.raises(ValueError, match=f"'{backend}' must be given a float32 network on the CPU, got"):
            prepare(net.double(), torch.randn(1, 3, 16, 16).double(), backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_eager_takes_other_dtypes(net: MultiExitNet, dtype: torch.dtype) -> None:
    net = net.to(dtype)
    x = torch.randn(6, 3, 16, 16, dtype=dtype)
    prepared = prepare(net, x, "eager")
    assert prepared(x).dtype == dtype and prepared.gated(x, "confidence", 0.5).logits.dtype == dtype
    assert prepared.gated(x[:1], "confidence", 0.5).logits.dtype == dtype
    if dtype == torch.float64:
        with torch.no_grad():
            torch.testing.assert_close(prepared(x), net(x))


@pytest.mark.parametrize("precision", ["float32", "engine"])
def test_precision(net: MultiExitNet, precision: str) -> None:
    """float32 is what it says, also on a CPU where the engine would take bfloat16."""
    needs("openvino")
    prepared = prepare(prune(net, [0]), torch.randn(2, 3, 16, 16), "openvino", precision=precision, batches=[])
    if precision == "float32":
        assert prepared.max_logit_difference < 1e-4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"net": nn.Linear(2, 2)}, TypeError, "net must be a MultiExitNet, got Linear"),
        ({"example": (3, 16, 16)}, TypeError, "example must be a torch.Tensor, got tuple"),
        ({"example": torch.zeros(3, 16, 16)}, ValueError, r"example must have shape \[N, C, H, W\].*got \[3, 16, 16\]"),
        ({"example": torch.zeros(0, 3, 16, 16)}, ValueError, r"example must have shape.*got \[0, 3, 16, 16\]"),
        ({"example": torch.zeros(1, 3, 16, 16).double()}, ValueError, "the network's dtype, torch.float32, got"),
        (
            {"example": torch.zeros(1, 3, 16, 16).to_sparse()},
            TypeError,
            r"example must be a dense \(strided\) tensor, got torch.sparse_coo",
        ),
        ({"example": torch.zeros(1, 3, 16, 16, device="meta")}, ValueError, "the network's device, cpu, got meta"),
        ({"backend": "tensorrt"}, ValueError, "backend must be one of auto, openvino.*got 'tensorrt'"),
        ({"precision": "half"}, ValueError, "precision must be one of float32, engine, got 'half'"),
        ({"threads": 0}, ValueError, "threads must be whole numbers of at least 1, got 0"),
        ({"batches": [0]}, ValueError, "batches must be whole numbers of at least 1, got 0"),
        ({"candidates": ["eager"]}, ValueError, "candidates go with backend 'auto', got backend 'eager'"),
        ({"backend": "auto", "candidates": ["no"]}, ValueError, r"candidates must be some of .*got \['no'\]"),
    ],
)
def test_wrong_arguments(net: MultiExitNet, change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"net": net, "example": torch.randn(1, 3, 16, 16), "backend": "eager", **change}
    with pytest.raises(error, match=f"deploy.prepare: .*{message}" if "auto" in message else message):
        prepare(**arguments)


def test_every_backend_has_a_class() -> None:
    assert face is prepare
    for backend in BACKENDS:
        if missing(backend) is None:
            assert engine_class(backend).name == backend
