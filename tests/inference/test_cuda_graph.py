"""CudaGraphGatedNet without a GPU: what it refuses, and its pass on a backend that replays it on the CPU."""

from __future__ import annotations

import pytest
import torch
from graphed_fake import FakeBackend
from replay import gate, numbered, replay_net
from torch import nn

from aep_ext import MultiExitNet
from aep_ext.inference import CRITERIA, GatedNet, compile
from aep_ext.inference.cuda_graph import CudaGraphGatedNet
from aep_ext.inference.cuda_graph_capture import CudaBackend
from aep_ext.surgery.heads import PooledLinearHead
from aep_ext.surgery.networks import build

EXITS, SAMPLES, CLASSES = 4, 24, 6
WEIGHTS = [0.3, 0.7, 0.4, 1.0]


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(EXITS, SAMPLES, CLASSES) * 2


def gated_on(logits: torch.Tensor, criterion="confidence", thresholds=0.6, **options) -> GatedNet:
    return gate(replay_net(logits, WEIGHTS[: len(logits)]), criterion, thresholds, **options)


def graphed_on(gated: GatedNet, n: int) -> tuple[CudaGraphGatedNet, FakeBackend]:
    backend = FakeBackend()
    return CudaGraphGatedNet(gated, numbered(0, n), backend=backend), backend


@pytest.mark.parametrize("on", ["ensemble", "exit"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("n", [1, 8, SAMPLES])
def test_agrees_with_the_gated_net_and_the_simulator(logits, criterion, on, n):
    limit = {"confidence": 0.6, "entropy": 0.9, "margin": 0.4}.get(criterion, 2)
    gated = gated_on(logits, criterion, limit, criterion_on=on, temperatures=[1.0, 0.5, 2.0, 1.0])
    graphed, _ = graphed_on(gated, n)
    for first in range(0, SAMPLES - n + 1, n):
        x = numbered(first, first + n)
        answer, expected = graphed(x), gated(x)
        assert torch.equal(answer.exit, expected.exit)
        assert torch.equal(answer.confidence, expected.confidence)
        assert torch.equal(answer.logits, expected.logits)
        simulated = gated.simulate(logits[:, first : first + n])
        assert torch.equal(answer.exit, simulated.exit) and torch.equal(answer.logits, simulated.logits)


def test_stages_behind_the_last_row_do_not_run(logits):
    gated = gated_on(logits, thresholds=0.0)
    graphed, backend = graphed_on(gated, 8)
    assert graphed(numbered(0, 8)).exit.tolist() == [0] * 8 and backend.built[0].ran == [0]
    gated.thresholds.fill_(2.0)
    assert graphed(numbered(0, 8)).exit.tolist() == [3] * 8 and backend.built[0].ran == [0, 1, 2, 3]
    gated.thresholds[1] = 0.0
    assert graphed(numbered(0, 8)).exit.tolist() == [1] * 8 and backend.built[0].ran == [0, 1]
    gated.enabled[1] = False
    assert graphed(numbered(0, 8)).exit.tolist() == [3] * 8


@pytest.mark.parametrize("number", ["thresholds", "temperatures", "enabled", "output_weights"])
def test_numbers_changed_in_place_count_from_the_next_call(logits, number):
    gated = gated_on(logits)
    graphed, _ = graphed_on(gated, SAMPLES)
    x = numbered(0, SAMPLES)
    before = graphed(x)
    tensor = gated.net.output_weights if number == "output_weights" else getattr(gated, number)
    with torch.no_grad():
        if number == "enabled":
            tensor[0] = False
        else:
            tensor.mul_(torch.tensor([0.4, 2.0, 0.7, 1.5], dtype=tensor.dtype)[: len(tensor)])
    after, expected = graphed(x), gated(x)
    assert not torch.equal(before.exit, after.exit)
    assert torch.equal(after.exit, expected.exit) and torch.equal(after.logits, expected.logits)


def test_a_row_of_nan_goes_to_the_end_and_others_do_not_mind(logits):
    logits[0, 3, 2] = float("nan")
    gated = gated_on(logits)
    graphed, _ = graphed_on(gated, SAMPLES)
    answer, expected = graphed(numbered(0, SAMPLES)), gated(numbered(0, SAMPLES))
    assert answer.exit[3] == EXITS - 1 and torch.equal(answer.exit, expected.exit)
    torch.testing.assert_close(answer.logits, expected.logits, rtol=0, atol=0, equal_nan=True)


def test_copies_views_and_the_input_buffer(logits):
    graphed, _ = graphed_on(gated_on(logits), 4)
    kept = graphed(numbered(0, 4))
    shared = graphed(numbered(4, 8), copy=False)
    assert shared is graphed.output and not torch.equal(kept.logits, shared.logits)
    graphed.input.copy_(numbered(0, 4))
    assert torch.equal(graphed(graphed.input).logits, kept.logits)
    assert torch.equal(shared.logits, kept.logits)
    x = numbered(0, 4).requires_grad_()
    assert torch.equal(graphed(x).logits, kept.logits) and not graphed.input.requires_grad
    with torch.inference_mode():
        assert torch.equal(graphed(numbered(0, 4)).logits, kept.logits)


def test_one_exit_alone(logits):
    gated = gate(replay_net(logits[:1], [1.0]), "confidence", [])
    graphed, _ = graphed_on(gated, 3)
    assert torch.equal(graphed(numbered(0, 3)).logits, gated(numbered(0, 3)).logits)


def test_what_a_call_refuses(logits):
    gated = gated_on(logits)
    graphed, _ = graphed_on(gated, 4)
    before = graphed(numbered(0, 4))
    for wrong in (numbered(0, 5), numbered(0, 4).float(), numbered(0, 4).to("meta")):
        with pytest.raises(ValueError, match=r"x must be \[4, 1, 1, 1\] float64 on cpu, as the graph was made for"):
            graphed(wrong)
    gated.train()
    with pytest.raises(RuntimeError, match="eval mode, got training mode"):
        graphed(numbered(0, 4))
    gated.eval()
    gated.thresholds = gated.thresholds.clone()
    with pytest.raises(RuntimeError, match="thresholds must be changed in place, but was replaced"):
        graphed(numbered(0, 4))
    graphed.recapture()
    assert torch.equal(graphed(numbered(0, 4)).logits, before.logits)


def test_what_cannot_be_made(logits):
    gated, x, fake = gated_on(logits), numbered(0, 4), FakeBackend()
    with pytest.raises(TypeError, match="gated must be a GatedNet, got MultiExitNet"):
        CudaGraphGatedNet(gated.net, x, backend=fake)
    with pytest.raises(TypeError, match="example must be a torch.Tensor, got list"):
        CudaGraphGatedNet(gated, [1.0], backend=fake)
    with pytest.raises(ValueError, match="gated must be on the cuda device of gated, got cpu"):
        CudaGraphGatedNet(gated, x)
    with pytest.raises(ValueError, match="example must be on the cpu device of gated, got meta"):
        CudaGraphGatedNet(gated, x.to("meta"), backend=fake)
    with pytest.raises(ValueError, match="at least one row"):
        CudaGraphGatedNet(gated, x[:0], backend=fake)
    with pytest.raises(ValueError, match="criterion must be a name, got surely"):

        def surely(state):
            return state.stats[:, 0] > 0.5

        CudaGraphGatedNet(gated_on(logits, surely, 0.0), x, backend=fake)
    compiled = compile(build("resnet_small", 3).eval(), torch.randn(2, 3, 16, 16), "eager")
    with pytest.raises(ValueError, match="gated must be of a MultiExitNet, got CompiledNet"):
        CudaGraphGatedNet(gate(compiled, "margin", 0.5), x, backend=fake)
    gated.net.train()
    with pytest.raises(RuntimeError, match="eval mode, got training mode"):
        CudaGraphGatedNet(gated, x, backend=fake)


def test_on_a_network_with_convolutions_and_in_bfloat16():
    torch.manual_seed(0)
    stages = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)]
    net = MultiExitNet(stages, [PooledLinearHead(8, 5) for _ in stages], num_classes=5).eval().bfloat16()
    x = torch.randn(16, 3, 9, 9, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        first = torch.softmax(net.exit_logits(x)[0].float(), -1).amax(-1).sort().values
    gated = gate(net, "confidence", float(first[7:9].mean()))
    graphed = CudaGraphGatedNet(gated, x, backend=FakeBackend())
    assert graphed.input.is_contiguous(memory_format=torch.channels_last)
    answer, expected = graphed(x), gated(x)
    assert answer.logits.dtype == torch.bfloat16 and graphed.output.exit.unique().numel() == 2
    assert torch.equal(answer.exit, expected.exit)
    torch.testing.assert_close(answer.logits, expected.logits)


def test_the_cuda_backend_says_what_is_missing():
    from aep_ext import _load

    backend = CudaBackend()
    assert backend.device_type == "cuda"
    if not hasattr(_load.extension, "GatedGraph"):
        with pytest.raises(RuntimeError, match="needs the native module built with CUDA"):
            backend.check()
