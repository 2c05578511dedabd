"""A small driver for sanitizers: every operator once or twice on sizes that are neither round nor large, compared.

    compute-sanitizer --tool memcheck python3 -m benchmarks.gpu.driver operators
    python3 -m benchmarks.gpu.driver graphed [--device cpu]

It ends with a line ``driver: ...`` where all agreed with the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
Checked = Iterator[tuple[str, object, object]]
"""What was done, what it gave, what the reference gives."""


def _near(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 2e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}


def _on(device: str, value: object) -> object:
    """Tensors of a structure, on the device: detached, and leaves where they were."""
    if isinstance(value, Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    return [_on(device, entry) for entry in value] if isinstance(value, list) else value


def _leaves(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    return [leaf for entry in value for leaf in _leaves(entry)] if isinstance(value, (list, tuple)) else []


def _both(
    device: str, fused: Callable[..., object], plain: Callable[..., object], *arguments: object, **options: object
) -> tuple[object, object]:
    """What ours gives on the device and the reference on the CPU, with the gradients of all leaves.

    Only our kernels, and what they call, run on the device: sanitizers take long over every other.
    """
    given, slope = [], None
    for place, function in ((device, fused), ("cpu", plain)):
        here = [_on(place, value) for value in arguments]
        result = function(*here, **{name: _on(place, value) for name, value in options.items()})
        result = result if isinstance(result, Tensor) else tuple(result)
        leaves, output = _leaves(here), result if isinstance(result, Tensor) else result[0]
        grads: tuple[Tensor, ...] = ()
        if leaves:
            slope = torch.randn(output.shape, dtype=output.dtype) if slope is None else slope
            grads = torch.autograd.grad(output, leaves, slope.to(place))
        results = [result] if isinstance(result, Tensor) else result
        given.append(tuple(part.detach().cpu() for part in (*results, *grads)))
    return given[0], given[1]


def pool_and_head(device: str, dtype: torch.dtype) -> Checked:
    """Contiguous, channels_last and a crop; forward and backward."""
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 35, 7, 5, dtype=dtype).contiguous(memory_format=form).requires_grad_()
        yield "global_avg_pool", *_both(device, ops.global_avg_pool, reference.global_avg_pool, x)
    crop = torch.randn(3, 35, 9, 6, dtype=dtype)
    cropped = [lambda x, f=f: f(x[:, :, 1:, 1:]) for f in (ops.global_avg_pool, reference.global_avg_pool)]
    yield "global_avg_pool of a crop", *_both(device, *cropped, crop)
    features = [torch.randn(3, c, 6, 6, dtype=dtype, requires_grad=True) for c in (16, 33)]
    weights = [torch.randn(11, c, dtype=dtype, requires_grad=True) for c in (16, 33)]
    biases = [torch.randn(11, dtype=dtype), None]
    heads = ops.multi_exit_linear_head, reference.multi_exit_linear_head
    yield "multi_exit_linear_head", *_both(device, *heads, features, weights, biases)


def ensemble(device: str, dtype: torch.dtype) -> Checked:
    """Few and many classes, with statistics."""
    for exits, rows, classes in ((1, 1, 2), (4, 5, 257), (7, 3, 1500)):
        logits = torch.randn(exits, rows, classes, dtype=dtype, requires_grad=True)
        weights = torch.rand(exits, dtype=dtype, requires_grad=True)
        yield "ensemble", *_both(device, ops.ensemble, reference.ensemble, logits, weights)
        both = _both(device, ops.ensemble_stats, reference.ensemble_stats, logits.detach(), weights.detach())
        yield "ensemble_stats", *both


def losses(device: str, dtype: torch.dtype) -> Checked:
    """The joint loss in its memory modes, with ignored labels, weights and smoothing."""
    for exits, rows, classes in ((1, 1, 2), (4, 5, 257), (3, 9, 1500)):
        target = torch.randint(classes, (rows,))
        if rows > 1:
            target[0] = -100
        data = torch.randn(exits, rows, classes, dtype=dtype, requires_grad=True)
        arguments = data, target, torch.rand(exits)
        options = {"class_weight": torch.rand(classes) + 0.5, "label_smoothing": 0.1}
        for memory in ("recompute", "in_forward", "in_place"):

            def fused(x: Tensor, *rest: object, memory: str = memory, **options: object) -> Tensor:
                return ops.joint_cross_entropy(x * 1, *rest, memory=memory, **options).loss  # x * 1: no leaf, in place

            def plain(*arguments: object, **options: object) -> Tensor:
                return reference.joint_cross_entropy(*arguments, **options).loss

            yield f"joint_cross_entropy {memory}", *_both(device, fused, plain, *arguments, **options)


def linear_losses(device: str, dtype: torch.dtype) -> Checked:
    """The loss that never holds the logits."""
    if not hasattr(ops, "linear_joint_cross_entropy"):
        return
    pooled = [torch.randn(7, c, dtype=dtype, requires_grad=True) for c in (16, 33)]
    weights = [torch.randn(301, c, dtype=dtype).mul(0.1).requires_grad_() for c in (16, 33)]
    arguments = pooled, weights, None, torch.randint(301, (7,)), torch.rand(2)
    for chunk in (3, None):

        def fused(*arguments: object, chunk: int | None = chunk) -> Tensor:
            return ops.linear_joint_cross_entropy(*arguments, chunk=chunk).loss

        def plain(*arguments: object) -> Tensor:
            return reference.linear_joint_cross_entropy(*arguments).loss

        yield "linear_joint_cross_entropy", *_both(device, fused, plain, *arguments)


def subsets(device: str, dtype: torch.dtype) -> Checked:
    """Counts, which agree exactly."""
    for exits, rows, classes in ((1, 3, 2), (4, 70, 33), (7, 9, 130)):
        logits = torch.randn(exits, rows, classes, dtype=dtype)
        weights, target = torch.rand(exits, dtype=dtype), torch.randint(classes, (rows,))
        yield "subset_correct", *_both(device, ops.subset_correct, reference.subset_correct, logits, weights, target)


def gates(device: str, dtype: torch.dtype) -> Checked:
    """Every policy; rows of a length that no wide access divides."""
    for policy, size in (("confidence", 0), ("entropy", 0), ("margin", 0), ("patience", 2), ("vote", 19)):
        for rows in (1, 70):
            logits = torch.randn(rows, 19, dtype=dtype)
            state = torch.zeros(rows, size, dtype=torch.int64)
            acc = torch.float64 if dtype == torch.float64 else torch.float32
            arguments = (
                torch.randn(rows, 5, 3, 3, dtype=dtype),
                torch.randn(rows, 19, dtype=acc),
                0.5,
                torch.arange(rows),
                state,
                logits,
            )
            options = {"weight": 0.7, "threshold": 0.41 if size == 0 else 1.0, "policy": policy}
            (*got, many), (*expected, count) = _both(device, ops.gate, reference.gate, *arguments, **options)
            yield f"gate {policy}: count", many, count
            yield f"gate {policy}", got, expected


OPERATORS: tuple[Callable[[str, torch.dtype], Checked], ...] = (
    pool_and_head,
    ensemble,
    losses,
    linear_losses,
    subsets,
    gates,
)


def operators(device: str) -> int:
    """All operators in all dtypes; returns how many results were compared."""
    count = 0
    for dtype in DTYPES:
        for part in OPERATORS:
            for name, got, expected in part(device, dtype):
                torch.testing.assert_close(
                    got, expected, equal_nan=True, check_stride=False, **_near(dtype), msg=lambda m, n=name: f"{n}: {m}"
                )
                count += 1
    return count


def graphed(device: str) -> int:
    """A gated graph, of a batch and of one sample: all leave, some leave, none does."""
    from aep_ext import MultiExitNet
    from aep_ext.surgery.heads import PooledLinearHead
    from aep_ext.termination import GatedNet, GraphedGatedNet

    torch.manual_seed(0)
    # No convolutions: cuDNN has kernels by the thousand, and a sanitizer goes through all it loads.
    stages = [torch.nn.Hardswish(), torch.nn.ReLU(), torch.nn.Sigmoid()]
    net = MultiExitNet(stages, [PooledLinearHead(3, 10) for _ in stages], num_classes=10).eval().to(device)
    count = 0
    for rows in (1, 9):
        x = torch.randn(rows, 3, 8, 8, device=device)
        for policy in ("confidence", "patience", "vote"):
            gated = GatedNet(net, policy, 0.0)
            run = GraphedGatedNet(gated, x) if device == "cuda" else gated
            for threshold in (0.0, 0.12, 2.0, 9.0):
                gated.thresholds.fill_(threshold)
                got, expected = run(x), gated(x)
                torch.testing.assert_close(tuple(got), tuple(expected), rtol=1e-3, atol=1e-3)
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
