"""A small driver for sanitizers: every operator once or twice on sizes that are neither round nor large, compared.

    compute-sanitizer --tool memcheck python3 -m benchmarks.gpu.driver operators
    python3 -m benchmarks.gpu.driver graphed [--device cpu]

It ends with a line ``driver: ...`` where all agreed with the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference
from benchmarks.cases import tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Call(NamedTuple):
    """An operator's call, and the reference's for the same arguments."""

    name: str
    fused: Callable[..., Any]
    plain: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any] = {}


def _randn(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def pool_and_head(dtype: torch.dtype) -> Iterator[Call]:
    """Contiguous, channels_last and a crop; forward and backward."""
    for form in (torch.contiguous_format, torch.channels_last):
        x = _randn(3, 35, 7, 5, dtype=dtype, grad=False).contiguous(memory_format=form).requires_grad_()
        yield Call("global_avg_pool", ops.global_avg_pool, reference.global_avg_pool, (x,))
    cropped = [lambda x, f=f: f(x[:, :, 1:, 1:]) for f in (ops.global_avg_pool, reference.global_avg_pool)]
    yield Call("global_avg_pool of a crop", *cropped, (_randn(3, 35, 9, 6, dtype=dtype, grad=False),))
    features = [_randn(3, c, 6, 6, dtype=dtype) for c in (16, 33)]
    weights, biases = [_randn(11, c, dtype=dtype) for c in (16, 33)], [torch.randn(11, dtype=dtype), None]
    heads = ops.multi_exit_linear_head, reference.multi_exit_linear_head
    yield Call("multi_exit_linear_head", *heads, (features, weights, biases))


def ensembles(dtype: torch.dtype) -> Iterator[Call]:
    """Few and many classes, with statistics, and the subsets' counts."""
    for exits, rows, classes in ((1, 1, 2), (4, 5, 257), (7, 3, 1500)):
        logits, weights = _randn(exits, rows, classes, dtype=dtype), torch.rand(exits, dtype=dtype, requires_grad=True)
        yield Call("ensemble", ops.ensemble, reference.ensemble, (logits, weights))
        bare = logits.detach(), weights.detach()
        yield Call("ensemble_stats", ops.ensemble_stats, reference.ensemble_stats, bare)
    for exits, rows, classes in ((1, 3, 2), (4, 70, 33), (7, 9, 130)):
        logits, target = _randn(exits, rows, classes, dtype=dtype, grad=False), torch.randint(classes, (rows,))
        arguments = logits, torch.rand(exits, dtype=dtype), target
        yield Call("subset_correct", ops.subset_correct, reference.subset_correct, arguments)


def losses(dtype: torch.dtype) -> Iterator[Call]:
    """The joint loss in its memory modes, with ignored labels, weights and smoothing; and that of linear exits."""

    def plain(*arguments: Any, **options: Any) -> Tensor:
        return reference.joint_cross_entropy(*arguments, **options).loss

    def plain_linear(*arguments: Any) -> Tensor:
        return reference.linear_joint_cross_entropy(*arguments).loss

    for exits, rows, classes in ((1, 1, 2), (4, 5, 257), (3, 9, 1500)):
        target = torch.randint(classes, (rows,))
        if rows > 1:
            target[0] = -100
        arguments = _randn(exits, rows, classes, dtype=dtype), target, torch.rand(exits)
        options = {"class_weight": torch.rand(classes) + 0.5, "label_smoothing": 0.1}
        for memory in ("recompute", "in_forward", "in_place"):

            def fused(x: Tensor, *rest: Any, memory: str = memory, **options: Any) -> Tensor:
                return ops.joint_cross_entropy(x * 1, *rest, memory=memory, **options).loss  # x * 1: no leaf, in place

            yield Call(f"joint_cross_entropy {memory}", fused, plain, arguments, options)
    pooled = [_randn(7, c, dtype=dtype) for c in (16, 33)]
    weights = [_randn(301, c, dtype=dtype, grad=False).mul(0.1).requires_grad_() for c in (16, 33)]
    arguments = pooled, weights, None, torch.randint(301, (7,)), torch.rand(2)
    for chunk in (3, None):

        def fused_linear(*arguments: Any, chunk: int | None = chunk) -> Tensor:
            return ops.linear_joint_cross_entropy(*arguments, chunk=chunk).loss

        yield Call("linear_joint_cross_entropy", fused_linear, plain_linear, arguments)


def gates(dtype: torch.dtype) -> Iterator[Call]:
    """Every criterion, and the last exit; rows of a length that no wide access divides."""
    wide = torch.promote_types(dtype, torch.float32)
    for rows in (1, 70):
        for criterion, size in (("confidence", 0), ("entropy", 0), ("margin", 0), ("patience", 2), ("vote", 19)):
            features, running = _randn(rows, 5, 3, 3, dtype=dtype, grad=False), torch.randn(rows, 19, dtype=wide)
            logits, state = torch.randn(rows, 19, dtype=dtype), torch.zeros(rows, size, dtype=torch.int64)
            options = {"weight": 0.7, "threshold": 0.41 if size == 0 else 1.0, "criterion": criterion}
            arguments = features, running, 0.5, torch.arange(rows), state, logits
            yield Call(f"gate {criterion}", ops.gate, reference.gate, arguments, options)
        yield Call("gate of the last exit", ops.gate, reference.gate, arguments, options | {"last": True})


def _on(device: str, value: Any) -> Any:
    """Tensors of a structure, on the device: detached, and leaves where they were."""
    if isinstance(value, Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        return type(value)(_on(device, entry) for entry in value)
    return {name: _on(device, entry) for name, entry in value.items()} if isinstance(value, dict) else value


def _check(call: Call, device: str, tolerance: dict[str, float]) -> None:
    """Compares ours on the device with the reference on the CPU, with the gradients of all leaves.

    Only our kernels, and what they call, run on the device: sanitizers take long over every other.

    Raises:
        AssertionError: they differ.
    """
    given, slope = [], None
    for place, function in ((device, call.fused), ("cpu", call.plain)):
        arguments = _on(place, call.arguments)
        results = tensors(function(*arguments, **_on(place, call.options)))
        leaves = [tensor for tensor in tensors(arguments) if tensor.requires_grad]
        grads: tuple[Tensor, ...] = ()
        if leaves:
            slope = torch.randn(results[0].shape, dtype=results[0].dtype) if slope is None else slope
            grads = torch.autograd.grad(results[0], leaves, slope.to(place))
        given.append([part.detach().cpu() for part in (*results, *grads)])
    torch.testing.assert_close(
        *given, equal_nan=True, check_stride=False, **tolerance, msg=lambda text: f"{call.name}: {text}"
    )


def operators(device: str) -> int:
    """All operators in all dtypes; returns how many calls were compared."""
    count = 0
    for dtype in DTYPES:
        tolerance = {"rtol": 2e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
        for part in (pool_and_head, ensembles, losses, gates):
            for call in part(dtype):
                _check(call, device, tolerance)
                count += 1
    return count


def graphed(device: str) -> int:
    """A gated graph, of a batch and of one sample: all leave, some leave, none does."""
    from aep_ext import MultiExitNet
    from aep_ext.inference import ExitPolicy, GatedNet
    from aep_ext.inference.cuda_graph import CudaGraphGatedNet
    from aep_ext.surgery.heads import PooledLinearHead

    # No convolutions: cuDNN has kernels by the thousand, and a sanitizer goes through all it loads.
    stages = [torch.nn.Hardswish(), torch.nn.ReLU(), torch.nn.Sigmoid()]
    net = MultiExitNet(stages, [PooledLinearHead(3, 10) for _ in stages], num_classes=10).eval().to(device)
    count = 0
    for rows in (1, 9):
        x = torch.randn(rows, 3, 8, 8, device=device)
        for criterion in ("confidence", "patience", "vote"):
            policy = ExitPolicy(output_weights=net.output_weights.tolist(), thresholds=0.0, criterion=criterion)
            gated = GatedNet(net, policy)
            run = CudaGraphGatedNet(gated, x) if device == "cuda" else gated
            for threshold in (0.0, 0.12, 2.0, 9.0):
                gated.thresholds.fill_(threshold)
                torch.testing.assert_close(tuple(run(x)), tuple(gated(x)), rtol=1e-3, atol=1e-3)
                count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(prog="driver")
    parser.add_argument("what", choices=("operators", "graphed"))
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    count = (operators if arguments.what == "operators" else graphed)(arguments.device)
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    print(f"driver: {count} results of {arguments.what} agree with the reference")


if __name__ == "__main__":
    main()
