"""CudaGraphGatedNet on a GPU: the same answers, one launch, nothing that waits, stages that stay out."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap

import pytest
import torch
from graphed_fake import run_exit
from replay import gate, numbered, replay_net
from torch import nn

from aep_ext import ExitWeights, MultiExitNet, _load
from aep_ext.inference import CRITERIA, GatedNet
from aep_ext.inference.criteria import initial_state
from aep_ext.inference.cuda_graph import CudaGraphGatedNet
from aep_ext.inference.cuda_graph_capture import StaticPass
from aep_ext.surgery.heads import PooledLinearHead
from aep_ext.surgery.networks import build

pytestmark = pytest.mark.gpu
EXITS, SAMPLES, CLASSES = 4, 64, 10
WEIGHTS = [0.3, 0.7, 0.4, 1.0]


@pytest.fixture(autouse=True)
def _full_precision():
    """No TF32: the eager net, which runs on other batch sizes and so by other algorithms, would leave elsewhere."""
    settings = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    yield
    for setting, flag in zip(settings, before, strict=True):
        setting.allow_tf32 = flag


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(EXITS, SAMPLES, CLASSES) * 2


def gated_on(logits: torch.Tensor, criterion="confidence", thresholds=0.6, **options) -> GatedNet:
    return gate(replay_net(logits, WEIGHTS), criterion, thresholds, **options).cuda()


class Counted(nn.Module):
    """A stage that counts on the device how often it ran."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("runs", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs.add_(1)
        return self.inner(x)


@pytest.fixture(scope="module")
def net() -> MultiExitNet:
    torch.manual_seed(0)
    net = build("resnet_small", CLASSES, in_channels=3)
    net.set_exit_weights(ExitWeights.mixed(net.num_exits))
    net(torch.randn(32, 3, 16, 16))
    with torch.no_grad():
        for head in net.exits:
            head.linear.weight.mul_(20)
    return net.eval().cuda()


def agrees(answer, gated: GatedNet, x: torch.Tensor, atol: float = 1e-3) -> None:
    """With the simulator and with the gated net, but for samples near a threshold."""
    with torch.no_grad():
        logits = gated.net.exit_logits(x)
    sure = ~gated.near_threshold(logits, 1e-3)  # algorithms of convolution differ by more than rounding
    assert sure.any()
    for exits, confidences, sums in (
        (lambda s: (s.exit, s.confidence, s.logits))(gated.simulate(logits)),
        (lambda g: (g.exit, g.confidence, g.logits))(gated(x)),
    ):
        assert torch.equal(answer.exit[sure], exits[sure])
        torch.testing.assert_close(answer.confidence[sure], confidences[sure], rtol=0, atol=atol)
        torch.testing.assert_close(answer.logits[sure], sums[sure], rtol=atol, atol=10 * atol)


@pytest.mark.parametrize("n", [1, 8, 64])
@pytest.mark.parametrize("on", ["ensemble", "exit"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_agrees_on_cached_logits(logits, criterion, on, n):
    limit = {"confidence": 0.6, "entropy": 0.9, "margin": 0.4}.get(criterion, 2)
    gated = gated_on(logits, criterion, limit, criterion_on=on, temperatures=[1.0, 0.5, 2.0, 1.0])
    graphed = CudaGraphGatedNet(gated, numbered(0, n).cuda())
    for first in range(0, SAMPLES - n + 1, max(n, 8)):
        x = numbered(first, first + n).cuda()
        answer, simulated = graphed(x), gated.simulate(logits[:, first : first + n].cuda())
        assert torch.equal(answer.exit, simulated.exit)
        torch.testing.assert_close(answer.confidence, simulated.confidence, rtol=0, atol=1e-6)
        torch.testing.assert_close(answer.logits, simulated.logits, rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 8, 64])
def test_agrees_on_a_living_network_through_changes_in_place(net, n):
    x = torch.randn(n, 3, 16, 16, device="cuda")
    gated = gate(net, "confidence", 0.7)
    graphed = CudaGraphGatedNet(gated, torch.randn_like(x))
    agrees(graphed(x), gated, x)
    gated.thresholds.fill_(2.0)
    answer = graphed(x)
    assert (answer.exit == net.num_exits - 1).all()
    torch.testing.assert_close(answer.logits, net(x).detach(), rtol=1e-3, atol=1e-2)
    gated.thresholds.zero_()
    assert (graphed(x).exit == 0).all()
    gated.enabled[0] = False
    assert (graphed(x).exit == 1).all()
    gated.enabled[0] = True
    gated.thresholds.fill_(0.5)
    gated.temperatures.mul_(2.0)
    agrees(graphed(x), gated, x)
    weight = net.exits[0].linear.weight
    with torch.no_grad():
        weight.mul_(0.25)  # a parameter updated in place
        agrees(graphed(x), gated, x)
        weight.mul_(4)


@pytest.mark.parametrize("n", [1, 64])
def test_stages_behind_the_last_row_do_not_run(logits, n):
    plain = replay_net(logits, WEIGHTS)
    stages = [Counted(stage) for stage in plain.stages]
    counted = MultiExitNet(stages, list(plain.exits), num_classes=CLASSES, output_weights=WEIGHTS).eval()
    gated = gate(counted, "confidence", 0.6).cuda()
    x = numbered(0, n).cuda()
    graphed = CudaGraphGatedNet(gated, x)
    for thresholds in ([0.0, 2, 2], [2, 0.0, 2], [2, 2, 0.0], [2, 2, 2]):
        for stage in stages:
            stage.runs.zero_()
        gated.thresholds.copy_(torch.tensor(thresholds))
        for _ in range(3):
            answer = graphed(x)
        last = thresholds.index(0.0) if 0.0 in thresholds else 3
        assert answer.exit.tolist() == [last] * n
        assert [int(stage.runs) for stage in stages] == [3 if e <= last else 0 for e in range(EXITS)]


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("thresholds", [0.0, 0.6, 2.0])
def test_the_host_never_waits(net, thresholds, copy):
    """Behind a kernel that spins the device is busy: whoever waits for it comes back after the kernel's end."""
    gated = gate(net, "confidence", thresholds)
    x = torch.randn(8, 3, 16, 16, device="cuda")
    graphed = CudaGraphGatedNet(gated, x)
    expected = graphed(x)
    graphed(torch.zeros_like(x))
    torch.cuda.synchronize()
    spun = torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)  # about half a second
    spun.record()
    answer = graphed(x, copy=copy)
    came_back_first = not spun.query()
    torch.cuda.synchronize()
    assert came_back_first, "the host waited for the device"
    assert torch.equal(answer.exit, expected.exit) and torch.equal(answer.logits, expected.logits)


def test_such_a_test_notices_a_net_that_waits(logits):
    """The eager net, which reads its counts, fails the test above: so it can fail."""
    gated = gated_on(logits)
    x = numbered(0, 8).cuda()
    gated(x)
    torch.cuda.synchronize()
    spun = torch.cuda.Event()
    torch.cuda._sleep(200_000_000)
    spun.record()
    gated(x)
    assert spun.query()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, classes", [(1, 1), (1, 1000), (5, 257), (300, 10), (3, 21841)])
@pytest.mark.parametrize("policy", ["confidence", "patience", "vote"])
def test_an_exit_alone_does_what_the_operator_does(dtype, n, classes, policy):
    torch.manual_seed(n + classes)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    exit_logits = torch.randn(3, n, classes).mul(3).to(dtype)
    exit_logits[0, 0, 0] = float("nan")
    state = initial_state(policy, n, classes)
    tensors = {
        "thresholds": torch.tensor([0.5 if policy == "confidence" else 2.0] * 2, dtype=torch.float64),
        "temperatures": torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64),
        "enabled": torch.tensor([True, True]),
        "weights": torch.tensor([0.5, 0.25, 1.0]),
        "running": torch.full((n, classes), 7.0, dtype=acc),  # what another batch left behind
        "state": torch.full_like(state, 5),
        "exit": torch.full((n,), 2),
        "logits": torch.zeros(n, classes, dtype=dtype),
        "confidence": torch.zeros(n),
        "tally": torch.zeros(3, 2, dtype=torch.int32),
        "remaining": torch.zeros(3, dtype=torch.int64),
    }
    on_device = {name: tensor.cuda() for name, tensor in tensors.items()}
    handle = _load.extension.GatedGraph(on_device, policy, "ensemble")
    static = StaticPass(lambda e, x: (x, x), exit_logits[0], 3, tensors, policy, "ensemble")
    for e in range(3):
        handle.run_exit(e, exit_logits[e].cuda(), True)
        run_exit(static, e, exit_logits[e], True)
        for name in ("exit", "remaining", "tally"):
            assert torch.equal(on_device[name].cpu(), tensors[name]), (e, name)
        left = tensors["exit"] >= 0
        near = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
        torch.testing.assert_close(on_device["logits"].cpu()[left], tensors["logits"][left], **near)
        torch.testing.assert_close(on_device["confidence"].cpu()[left], tensors["confidence"][left], **near)
        torch.testing.assert_close(on_device["running"].cpu(), tensors["running"], **near)
        if e < 2:
            assert torch.equal(on_device["state"].cpu()[~left], tensors["state"][~left])


def test_what_the_native_class_refuses(logits):
    gated = gated_on(logits)
    graphed = CudaGraphGatedNet(gated, numbered(0, 4).cuda())
    tensors = graphed._make_tensors(logits[0, :4].cuda())
    make = _load.extension.GatedGraph
    for name, wrong, match in (
        ("exit", tensors["exit"].cpu(), "must be on the CUDA device"),
        ("running", tensors["running"].double(), "accumulation dtype"),
        ("thresholds", tensors["thresholds"][:1], "thresholds must have 3 entries, got 1"),
        ("logits", tensors["logits"].t(), "logits must be contiguous"),
    ):
        with pytest.raises(ValueError, match=match):
            make(tensors | {name: wrong}, "confidence", "ensemble")
    with pytest.raises(ValueError, match="policy must be built in, got 'custom'"):
        make(tensors, "custom", "ensemble")
    with pytest.raises(ValueError, match="exit must be within 0..3"):
        make(tensors, "confidence", "ensemble").run_exit(4, tensors["logits"], True)
    with pytest.raises(ValueError, match="exit_logits must have"):
        make(tensors, "confidence", "ensemble").run_exit(0, tensors["logits"][:2], True)


class Recording(nn.Module):
    """Records an event, which an IF node cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.event = torch.cuda.Event(external=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        self.event.record()
        return y


def test_a_node_that_cannot_stand_in_an_if_is_named(logits):
    plain = replay_net(logits, WEIGHTS)
    stages = [plain.stages[0], Recording(), plain.stages[2], plain.stages[3]]
    recording = MultiExitNet(stages, list(plain.exits), num_classes=CLASSES, output_weights=WEIGHTS).eval()
    gated = gate(recording, "confidence", 0.6).cuda()
    x = numbered(0, 8).cuda()
    with pytest.raises(RuntimeError, match="stage 1 holds a node of kind 'event record'"):
        CudaGraphGatedNet(gated, x)


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x) * 1e-9


def test_random_numbers_are_refused(logits):
    plain = replay_net(logits, WEIGHTS)
    stages = [plain.stages[0], Noise(), plain.stages[2], plain.stages[3]]
    noisy = MultiExitNet(stages, list(plain.exits), num_classes=CLASSES, output_weights=WEIGHTS).eval()
    with pytest.raises(ValueError, match="must not draw random numbers"):
        CudaGraphGatedNet(gate(noisy, "confidence", 0.6).cuda(), numbered(0, 8).cuda())


def test_a_stage_that_reads_a_value_back_is_named_and_the_process_goes_on():
    """In a process of its own: a capture that failed is not what later tests should start from."""
    script = """
        import torch
        from torch import nn
        from aep_ext import ExitPolicy, GatedNet, MultiExitNet
        from aep_ext.inference.cuda_graph import CudaGraphGatedNet
        class Stage(nn.Module):
            def __init__(self, forward):
                super().__init__()
                self.forward = forward
        def gated(head):
            net = MultiExitNet([nn.Identity()] * 2, [Stage(head)] * 2, num_classes=3, output_weights=[1, 1])
            policy = ExitPolicy(output_weights=[1, 1], thresholds=2.0)
            return GatedNet(net.eval(), policy).cuda()
        x = torch.ones(2, 3, device="cuda")
        try:
            CudaGraphGatedNet(gated(lambda x: x * float(x.sum())), x)
        except RuntimeError as error:
            print(error)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert torch.rand(9, device="cuda").unique().numel() > 1
        graphed = CudaGraphGatedNet(gated(lambda x: x @ x.new_ones(3, 3)), x)
        print(graphed(x).exit.tolist(), graphed(x).logits.tolist())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, check=False
    )
    told = done.stdout.strip().splitlines()
    assert len(told) == 2 and "CudaGraphGatedNet: stage 0 cannot be captured" in told[0], done.stdout + done.stderr
    assert "previous error during capture" not in told[0]  # the first error is told, not the one it led to
    assert told[1] == "[1, 1] [[3.0, 3.0, 3.0], [3.0, 3.0, 3.0]]"


def own_net(stage: nn.Module, head: nn.Module, exits: int, classes: int) -> MultiExitNet:
    return MultiExitNet([stage] * exits, [head] * exits, num_classes=classes, output_weights=[1.0] * exits).eval()


def test_a_stage_of_no_kernel():
    gated = gate(own_net(nn.Identity(), nn.Identity(), 3, 2), "confidence", 0.9).cuda()
    x = torch.tensor([[0.0, 9.0], [0.0, 1.0]], device="cuda")
    graphed = CudaGraphGatedNet(gated, x)
    assert graphed(x).exit.tolist() == [0, 2] and graphed(x).logits.tolist() == [[0.0, 9.0], [0.0, 1.0]]


class First(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :8].contiguous()


def test_graphs_outlive_each_other_and_what_was_kept_for_other_streams():
    """More nets than torch has streams to give, half of which go: nobody's workspace goes with them."""
    torch.manual_seed(0)
    stage = nn.Sequential(nn.Linear(512, 512), nn.ReLU())
    x = torch.randn(16, 512, device="cuda")
    gated = gate(own_net(stage, First(), 2, 8), "confidence", 2.0).cuda()
    nets = [CudaGraphGatedNet(gated, x) for _ in range(34)]
    expected = [graphed(x).logits for graphed in nets]
    del nets[::2], expected[::2]
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # as torch.compile's graphs do
    torch.cuda.empty_cache()
    others = [torch.ones(1 << 22, device="cuda") for _ in range(16)]
    for graphed, logits in zip(nets, expected, strict=True):
        assert torch.equal(graphed(x).logits, logits)
    assert all(bool((other == 1).all()) for other in others)


def test_two_nets_in_one_process_do_not_disturb_each_other(net, logits):
    first, second = gate(net, "confidence", 0.7), gated_on(logits, "vote", 2)
    x, y = torch.randn(8, 3, 16, 16, device="cuda"), numbered(0, 8).cuda()
    a, b = CudaGraphGatedNet(first, x), CudaGraphGatedNet(second, y)
    alone = a(x), b(y)
    for _ in range(5):
        both = a(x), b(y)
        for got, expected in zip(both, alone, strict=True):
            assert torch.equal(got.exit, expected.exit) and torch.equal(got.logits, expected.logits)


def test_replays_hold_no_more_memory_and_the_pool_is_given_back(net):
    x = torch.randn(8, 3, 16, 16, device="cuda")
    gated = gate(net, "confidence", 0.7)
    gated(x)

    def reserved() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    del_me = CudaGraphGatedNet(gated, x)  # what libraries keep for good is counted from here
    del del_me
    before = reserved()
    graphed = CudaGraphGatedNet(gated, x)
    held = reserved()
    for _ in range(20):
        graphed(x, copy=False)
    assert reserved() <= held
    del graphed
    assert reserved() <= before + (2 << 20)


def test_under_autocast_weights_are_cast_inside_the_graph(net):
    gated = gate(net, "confidence", 2.0)
    x = torch.randn(8, 3, 16, 16, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        graphed = CudaGraphGatedNet(gated, x)
        expected = gated(x)
    torch.cuda.empty_cache()
    torch.testing.assert_close(graphed(x).logits, expected.logits, rtol=0.05, atol=0.5)


def test_on_another_stream_and_in_channels_last(net):
    gated = gate(net, "confidence", 0.7)
    x = torch.randn(8, 3, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
    graphed = CudaGraphGatedNet(gated, x)
    expected = graphed(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        answer = graphed(x)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(answer.exit, expected.exit) and torch.equal(answer.logits, expected.logits)


def test_half_precision_network():
    torch.manual_seed(0)
    stages = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)]
    net = MultiExitNet(stages, [PooledLinearHead(16, 5) for _ in stages], num_classes=5).eval().cuda().half()
    x = torch.randn(16, 3, 9, 9, device="cuda", dtype=torch.float16)
    gated = gate(net, "confidence", 2.0)
    graphed = CudaGraphGatedNet(gated, x)
    answer = graphed(x)
    assert answer.logits.dtype == torch.float16
    torch.testing.assert_close(answer.logits, gated(x).logits)
