from __future__ import annotations

import pytest
import torch

from aep_ext import ExitWeights, JointCrossEntropy, ops


def _percent(count: int, samples: int) -> float:
    return 100 * count / samples


def _class_weight(published, name):
    return None if name is None else published["datasets"][f"{name}W"]["class_weights"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_joint_loss_and_gradient_are_the_published_ones(published, data, dtype):
    for case in published["selection_and_loss"]["weighted_loss"]:
        logits, labels = data(case["E"], case["N"], case["K"])
        logits = logits.to(dtype).requires_grad_()
        weights = ExitWeights(case["branches_weights"], case["ensemble_weights"])
        criterion = JointCrossEntropy(weights, class_weight=_class_weight(published, case["class_weights"]))
        loss, exit_losses, *_ = criterion.losses(logits, labels)
        loss.backward()
        assert loss.item() == pytest.approx(case["net_loss"], rel=1e-6)
        weighted = exit_losses.detach() * torch.tensor(weights.loss, dtype=dtype)
        assert weighted.tolist() == pytest.approx(case["weighted_branch_losses"], rel=1e-6)
        sums = logits.grad.abs().sum(dim=(1, 2))
        assert sums.tolist() == pytest.approx(case["grad_abs_sum_per_exit"], rel=1e-5)
        assert logits.grad[0, 0, :5].tolist() == pytest.approx(case["grad[0,0,:5]"], rel=1e-5)
        assert criterion(logits, labels).item() == loss.item()


def test_accuracies_are_the_published_ones(published, data):
    for case in published["selection_and_loss"]["weighted_loss"]:
        exits, samples = case["E"], case["N"]
        logits, labels = data(exits, samples, case["K"])
        counts = ops.subset_correct(logits, torch.tensor(case["ensemble_weights"]), labels)
        assert _percent(int(counts[-1, 0]), samples) == case["net_top1"]
        assert _percent(int(counts[-1, 1]), samples) == case["net_top5"]
        for e in range(exits):
            row = counts[(1 << e) - 1]
            assert _percent(int(row[0]), samples) == case["branch_top1"][e]
            assert _percent(int(row[1]), samples) == case["branch_top5"][e]
