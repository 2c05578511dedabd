from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch inside": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every other": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "expanded": lambda x: x[:, :, :1, :1].expand_as(x),
}
SHAPES = {
    "four exits": (5, [(8, 6, 6), (16, 3, 3), (24, 2, 5), (32, 1, 1)], 10),
    "one exit": (3, [(7, 4, 4)], 4),
    "no rows": (0, [(4, 3, 3), (6, 2, 2)], 5),
    "one row": (1, [(64, 8, 8), (128, 4, 4)], 10),
    "one class": (4, [(3, 2, 2), (5, 7, 1)], 1),
    "one channel": (2, [(1, 5, 5)], 3),
    "many classes": (2, [(8, 3, 3)], 21841),
    "vector tails": (3, [(67, 7, 7), (33, 9, 3)], 11),
}


def make(
    shape: str, dtype: torch.dtype, device: str, layout: str = "contiguous", bias: str = "all"
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None] | None]:
    rows, maps, classes = SHAPES[shape]
    kind = {"dtype": dtype, "device": device}
    features = [LAYOUTS[layout](torch.randn(rows, *m, **kind)) for m in maps]
    weights = [torch.randn(classes, m[0], **kind) / m[0] ** 0.5 for m in maps]
    biases = [torch.randn(classes, **kind) for _ in maps]
    if bias == "first":
        return features, weights, [b if e == 0 else None for e, b in enumerate(biases)]
    return features, weights, biases if bias == "all" else None


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, dtype, device, close):
    args = make(shape, dtype, device)
    result = ops.multi_exit_linear_head(*args)
    assert result.is_contiguous() and result.dtype == dtype
    close(result, reference.multi_exit_linear_head(*args))


@pytest.mark.parametrize("bias", ["all", "first", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_biases(layout, bias, device, close):
    features, weights, biases = make("vector tails", torch.float32, device, layout, bias)
    expected = torch.stack(
        [
            F.linear(x.double().mean((2, 3)), w.double(), None if b is None else b.double())
            for x, w, b in zip(features, weights, biases or [None, None], strict=True)
        ]
    )
    close(ops.multi_exit_linear_head(features, weights, biases), expected.float())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_half_pool_accumulates_in_float32(layout, device, close):
    """4096 ones and an 8: a bfloat16 accumulator would stop at 256."""
    x = torch.ones(1, 2, 64, 64, dtype=torch.bfloat16, device=device)
    result = ops.multi_exit_linear_head([LAYOUTS[layout](x)], [torch.ones(1, 2, dtype=x.dtype, device=device)])
    assert result.item() == 2.0


@pytest.mark.parametrize("bias", ["all", "first", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_equal_reference(layout, bias, device, close):
    args = make("four exits", torch.float32, device, layout, bias)
    results = []
    for function in (ops.multi_exit_linear_head, reference.multi_exit_linear_head):
        copies = [[None if t is None else t.detach().clone().requires_grad_() for t in ts or []] for ts in args]
        out = function(copies[0], copies[1], copies[2] or None)
        (out * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)).sum().backward()
        results.append([t.grad for ts in copies for t in ts if t is not None])
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_gradcheck(device):
    torch.manual_seed(1)
    features = [torch.randn(2, 3, 2, 3, dtype=torch.float64, device=device, requires_grad=True)]
    features.append(torch.randn(2, 2, 1, 1, dtype=torch.float64, device=device, requires_grad=True))
    weights = [torch.randn(4, x.shape[1], dtype=torch.float64, device=device, requires_grad=True) for x in features]
    biases = [torch.randn(4, dtype=torch.float64, device=device, requires_grad=True), None]

    def head(*tensors: Tensor) -> Tensor:
        return ops.multi_exit_linear_head(tensors[:2], tensors[2:4], [tensors[4], None])

    assert torch.autograd.gradcheck(head, (*features, *weights, biases[0]))


def test_feature_gradient_is_an_expanded_view(native, device):
    """No full-size tensor is made for the trunk's gradient."""
    features, weights, biases = make("one row", torch.float32, device)
    features[0].requires_grad_()
    seen = []
    tap = features[0].view_as(features[0])
    tap.register_hook(lambda grad: seen.append(grad.stride()))
    ops.multi_exit_linear_head([tap, features[1]], weights, biases).sum().backward()
    assert seen[0][2:] == (0, 0)


@pytest.mark.parametrize("which", ["features", "weights", "biases", "second feature"])
def test_only_wanted_gradients(which, device):
    features, weights, biases = make("one row", torch.float32, device)
    wanted = {"features": features, "weights": weights, "biases": biases, "second feature": features[1:]}[which]
    for tensor in wanted:
        tensor.requires_grad_()
    ops.multi_exit_linear_head(features, weights, biases).sum().backward()
    for tensor in [*features, *weights, *biases]:
        assert (tensor.grad is not None) == tensor.requires_grad


def test_feature_maps_are_not_kept(native):
    """The backward needs the pooled features and the weights only."""
    features, weights, biases = make("four exits", torch.float32, "cpu")
    for tensor in [*features, *weights]:
        tensor.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        ops.multi_exit_linear_head(features, weights, biases)
    assert all(len(shape) <= 2 for shape in saved) and len(saved) == 5


def test_double_backward_says_so(native, device):
    features, weights, biases = make("one exit", torch.float32, device)
    features[0].requires_grad_()
    out = ops.multi_exit_linear_head(features, weights, biases)
    (grad,) = torch.autograd.grad(out.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="aep::multi_exit_linear_head: double backward is not supported"):
        grad.sum().backward()


def test_autocast_casts_as_linear_does(device, on_reference, close):
    features, weights, biases = make("four exits", torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        result = ops.multi_exit_linear_head(features, weights, biases)
        expected = on_reference(ops.multi_exit_linear_head, features, weights, biases)
    assert result.dtype == expected.dtype == torch.bfloat16
    close(result, expected)
    narrow = [x.bfloat16() for x in features]  # as a convolution under autocast leaves them
    with torch.autocast(device, dtype=torch.bfloat16):
        close(ops.multi_exit_linear_head(narrow, weights, biases), expected)
        close(on_reference(ops.multi_exit_linear_head, narrow, weights, biases), expected)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=False):
        assert ops.multi_exit_linear_head(features, weights, biases).dtype == torch.float32


def test_autocast_leaves_float64(device):
    args = make("one exit", torch.float64, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ops.multi_exit_linear_head(*args).dtype == torch.float64


def test_autocast_gradients_reach_the_float32_parameters(device):
    features, weights, biases = make("one exit", torch.float32, device)
    weights[0].requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        ops.multi_exit_linear_head(features, weights, biases).float().sum().backward()
    assert weights[0].grad.dtype == torch.float32


FEW_OR_MANY = [1, 2, 5, 8, 9, 64]
"""Rows on both sides of where a GPU's small kernel ends and ATen begins."""


@pytest.mark.parametrize("rows", FEW_OR_MANY)
def test_an_exit_gives_the_same_bits_whatever_exits_run_beside_it(rows, dtype, device):
    kind = {"dtype": dtype, "device": device}
    features = [torch.randn(rows, channels, 3, 3, **kind) for channels in (16, 38, 61, 7, 128)]
    weights = [torch.randn(10, x.shape[1], **kind) for x in features]
    weights[3] = weights[3].t().contiguous().t()  # strides that only ATen takes
    biases = [torch.randn(10, **kind) for _ in features]
    together = ops.multi_exit_linear_head(features, weights, biases)
    for kept in ([0], [2], [4], [1, 3], [0, 2, 4]):
        alone = ops.multi_exit_linear_head(*([part[e] for e in kept] for part in (features, weights, biases)))
        assert torch.equal(alone, together[kept])


@pytest.mark.parametrize("rows", FEW_OR_MANY)
def test_strides_of_the_weights(rows, dtype, device, layouts, close):
    features = [torch.randn(rows, c, 2, 2, dtype=dtype, device=device) for c in (64, 33)]
    weights = [torch.randn(7, c, dtype=dtype, device=device) / c**0.5 for c in (64, 33)]
    biases = [torch.randn(14, dtype=dtype, device=device)[::2], None]
    expected = reference.multi_exit_linear_head(features, weights, biases)
    for others in zip(*([weight for _, weight in layouts(w)] for w in weights), strict=True):
        close(ops.multi_exit_linear_head(features, others, biases), expected)
    one_for_all = [w[:1].expand(7, -1) for w in weights]
    expected = reference.multi_exit_linear_head(features, one_for_all, biases)
    close(ops.multi_exit_linear_head(features, one_for_all, biases), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("exits", [1, 4, 20])
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_few_rows_against_double(rows, exits, dtype, close):
    """Many classes too, where a warp of the small kernel holds several rows and classes."""
    kind = {"dtype": dtype, "device": "cuda"}
    channels = [(64, 200, 33, 512)[e % 4] for e in range(exits)]
    for classes in (10, 1001):
        features = [torch.randn(rows, c, 2, 2, **kind) for c in channels]
        weights = [torch.randn(classes, c, **kind) / c**0.5 for c in channels]
        biases = [torch.randn(classes, **kind) for _ in channels]
        expected = [
            F.linear(ops.global_avg_pool(x).double(), w.double(), b.double())
            for x, w, b in zip(features, weights, biases, strict=True)
        ]
        close(ops.multi_exit_linear_head(features, weights, biases), torch.stack(expected).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", FEW_OR_MANY)
def test_in_a_cuda_graph(rows):
    features = [torch.randn(rows, c, 3, 3, device="cuda") for c in (64, 128)]
    weights = [torch.randn(10, c, device="cuda") for c in (64, 128)]
    ops.multi_exit_linear_head(features, weights)  # libraries set themselves up before a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ops.multi_exit_linear_head(features, weights)
    for tensor in (*features, *weights):
        tensor.normal_()
    graph.replay()
    torch.testing.assert_close(result, ops.multi_exit_linear_head(features, weights))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8])
def test_few_rows_take_two_launches(rows):
    features = [torch.randn(rows, 64, 3, 3, device="cuda") for _ in range(4)]
    weights, biases = [torch.randn(10, 64, device="cuda") for _ in features], [None] * 4
    ops.multi_exit_linear_head(features, weights, biases)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        ops.multi_exit_linear_head(features, weights, biases)
    cudart = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")  # the one that torch has loaded
    nodes = ctypes.c_size_t()
    assert cudart.cudaGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(nodes)) == 0
    assert nodes.value == 2
