"""What the CUDA operators do and the CPU's do not, on the emulated module: a program run by test_cuda_operators.py."""

from __future__ import annotations

import torch

from aep_ext import _load, ops
from aep_ext.ops import reference


def kernels_run() -> None:
    """The loaded module is the emulated one, and counts its launches: the number that each operator promises."""
    assert _load.extension is not None and _load.extension.isa_in_use() == "cuda-emulated"
    x, weights, target = torch.randn(3, 5, 7), torch.rand(3), torch.arange(5)
    launches = {
        "global_avg_pool": (1, lambda: ops.global_avg_pool(torch.randn(2, 3, 4, 4))),
        "ensemble": (1, lambda: ops.ensemble(x, weights)),
        "ensemble_stats": (1, lambda: ops.ensemble_stats(x, weights)),
        "joint_cross_entropy": (2, lambda: ops.joint_cross_entropy(x, target, weights)),
        "multi_exit_loss": (2, lambda: ops.multi_exit_loss(x, target, weights, weights, distillation=0.5)),
        "subset_correct": (1, lambda: ops.subset_correct(x, weights, target)),
    }
    for name, (number, call) in launches.items():
        before = _load.extension.launches()
        call()
        assert _load.extension.launches() - before == number, name


def a_label_out_of_range() -> None:
    """NaN loss, zero gradient in that row and a right one in the others, never counted."""
    for memory in ("recompute", "in_forward", "in_place"):
        for bad in (-1, 7, 2**40, -(2**63)):
            leaf = torch.randn(3, 5, 7).requires_grad_()
            weights, target = torch.rand(3), torch.tensor([1, bad, 2, 0, -100])
            loss = ops.joint_cross_entropy(leaf * 1.0, target, weights, memory=memory).loss
            loss.backward()
            assert loss.isnan(), (memory, bad)
            assert (leaf.grad[:, 1] == 0).all() and (leaf.grad[:, 4] == 0).all(), (memory, bad)
            good = leaf.detach().clone().requires_grad_()
            expected = reference.joint_cross_entropy(good, torch.tensor([1, 6, 2, 0, -100]), weights).loss
            expected.backward()
            for row in (0, 2, 3):
                torch.testing.assert_close(leaf.grad[:, row], good.grad[:, row])
            terms = {"prefix_weights": weights, "distillation": 0.5, "memory": memory}
            (again,) = torch.autograd.grad(ops.multi_exit_loss(leaf * 1.0, target, weights, **terms).loss, leaf)
            assert (again[:, [1, 4]] == 0).all() and again[:, [0, 2, 3]].isfinite().all(), (memory, bad)
    x, weights, target = torch.randn(3, 5, 7), torch.rand(3), torch.randint(7, (5,))
    wrong = target.clone()
    wrong[3] = 7
    keep = torch.tensor([0, 1, 2, 4])
    assert torch.equal(ops.subset_correct(x, weights, wrong), ops.subset_correct(x[:, keep], weights, target[keep]))


def a_label_out_of_range_in_linear_losses() -> None:
    """The same where the logits are formed in chunks."""
    for chunk in (None, 2):
        pooled = [torch.randn(5, 4, requires_grad=True) for _ in range(2)]
        weights = [torch.randn(7, 4, requires_grad=True) for _ in range(2)]
        target = torch.tensor([1, 9, 2, 0, 6])
        loss = ops.linear_joint_cross_entropy(pooled, weights, None, target, torch.rand(2), chunk=chunk).loss
        loss.backward()
        assert loss.isnan()
        for tensor in pooled:
            assert (tensor.grad[1] == 0).all() and tensor.grad.isfinite().all()
        assert all(tensor.grad.isfinite().all() for tensor in weights)


if __name__ == "__main__":
    torch.manual_seed(420)
    for check in (kernels_run, a_label_out_of_range, a_label_out_of_range_in_linear_losses):
        check()
        print(check.__name__, "ok")
