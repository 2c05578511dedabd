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


def pool_and_head(device: str, dtype: torch.dtype) -> Checked:
    """Contiguous, channels_last and a crop; forward and backward."""
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 35, 7, 5, device=device, dtype=dtype).contiguous(memory_format=form)
        yield "global_avg_pool", ops.global_avg_pool(x), reference.global_avg_pool(x)
    crop = torch.randn(3, 35, 9, 6, device=device, dtype=dtype)[:, :, 1:, 1:]
    yield "global_avg_pool of a crop", ops.global_avg_pool(crop), reference.global_avg_pool(crop)
    features = [torch.randn(3, c, 6, 6, device=device, dtype=dtype, requires_grad=True) for c in (16, 33)]
    weights = [torch.randn(11, c, device=device, dtype=dtype, requires_grad=True) for c in (16, 33)]
    biases = [torch.randn(11, device=device, dtype=dtype), None]
    given, grads = [], []
    for head in (ops.multi_exit_linear_head, reference.multi_exit_linear_head):
        result = head(features, weights, biases)
        given.append(result.detach())
        grads.append(torch.autograd.grad(result.float().square().sum(), [*features, *weights]))
    yield "multi_exit_linear_head", given[0], given[1]
    yield "its gradients", grads[0], grads[1]


def ensemble(device: str, dtype: torch.dtype) -> Checked:
    """Few and many classes, with statistics."""
    for exits, rows, classes in ((1, 1, 2), (4, 5, 257), (7, 3, 1500)):
        logits = torch.randn(exits, rows, classes, device=device, dtype=dtype, requires_grad=True)
        weights = torch.rand(exits, device=device, dtype=dtype, requires_grad=True)
        got, expected = ops.ensemble(logits, weights), reference.ensemble(logits, weights)
        yield "ensemble", got.detach(), expected.detach()
        one, two = (torch.autograd.grad(r.float().square().sum(), [logits, weights]) for r in (got, expected))
        yield "its gradients", one, two
        stats = ops.ensemble_stats(logits.detach(), weights.detach())
        yield "ensemble_stats", tuple(stats), tuple(reference.ensemble_stats(logits.detach(), weights.detach()))


def losses(device: str, dtype: torch.dtype) -> Checked:
    """The joint loss in its memory modes, with ignored labels, weights and smoothing."""
    for exits, rows, classes in ((1, 1, 2), (4, 5, 257), (3, 9, 1500)):
        target = torch.randint(classes, (rows,), device=device)
        if rows > 1:
            target[0] = -100
        exit_weights = torch.rand(exits, device=device)
        options = {"class_weight": torch.rand(classes, device=device) + 0.5, "label_smoothing": 0.1}
        data = torch.randn(exits, rows, classes, device=device, dtype=dtype)

        def graded(loss: Callable[..., object], **more: object) -> tuple[Tensor, Tensor]:
            leaf = data.clone().requires_grad_()  # noqa: B023  (called at once)
            value = loss(leaf * 1, target, exit_weights, **options, **more).loss  # noqa: B023
            return value.detach(), torch.autograd.grad(value, leaf)[0]

        expected = graded(reference.joint_cross_entropy)
        for memory in ("recompute", "in_forward", "in_place"):
            yield f"joint_cross_entropy {memory}", graded(ops.joint_cross_entropy, memory=memory), expected


def linear_losses(device: str, dtype: torch.dtype) -> Checked:
    """The loss that never holds the logits."""
    if not hasattr(ops, "linear_joint_cross_entropy"):
        return
    pooled = [torch.randn(7, c, device=device, dtype=dtype, requires_grad=True) for c in (16, 33)]
    weights = [torch.randn(301, c, device=device, dtype=dtype).mul(0.1).requires_grad_() for c in (16, 33)]
    target, exit_weights = torch.randint(301, (7,), device=device), torch.rand(2, device=device)
    given = []
    for chunk in (3, None):
        loss = ops.linear_joint_cross_entropy(pooled, weights, None, target, exit_weights, chunk=chunk).loss
        given.append((loss.detach(), *torch.autograd.grad(loss, [*pooled, *weights])))
    logits = torch.stack([x @ w.t() for x, w in zip(pooled, weights, strict=True)])
    loss = reference.joint_cross_entropy(logits, target, exit_weights).loss
    expected = (loss.detach(), *torch.autograd.grad(loss, [*pooled, *weights]))
    for got in given:
        yield "linear_joint_cross_entropy", got, expected


def subsets(device: str, dtype: torch.dtype) -> Checked:
    """Counts, which agree exactly."""
    for exits, rows, classes in ((1, 3, 2), (4, 70, 33), (7, 9, 130)):
        logits = torch.randn(exits, rows, classes, device=device, dtype=dtype)
        weights, target = torch.rand(exits, device=device, dtype=dtype), torch.randint(classes, (rows,), device=device)
        got = ops.subset_correct(logits, weights, target)
        yield "subset_correct", got, reference.subset_correct(logits, weights, target)


def gates(device: str, dtype: torch.dtype) -> Checked:
    """Every policy; rows of a length that no wide access divides."""
    for policy, size in (("confidence", 0), ("entropy", 0), ("margin", 0), ("patience", 2), ("vote", 19)):
        for rows in (1, 70):
            logits = torch.randn(rows, 19, device=device, dtype=dtype)
            state = torch.zeros(rows, size, dtype=torch.int64, device=device)
            acc = torch.float64 if dtype == torch.float64 else torch.float32
            arguments = (
                torch.randn(rows, 5, 3, 3, device=device, dtype=dtype),
                torch.randn(rows, 19, device=device, dtype=acc),
                0.5,
                torch.arange(rows, device=device),
                state,
                logits,
            )
            options = {"weight": 0.7, "threshold": 0.41 if size == 0 else 1.0, "policy": policy}
            got, expected = ops.gate(*arguments, **options), reference.gate(*arguments, **options)
            yield f"gate {policy}", tuple(got), tuple(expected)


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
    stages = [torch.nn.Conv2d(3, 8, 3, padding=1)] + [torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)]
    net = MultiExitNet(stages, [PooledLinearHead(8, 10) for _ in stages], num_classes=10).eval().to(device)
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
