"""collect_logits: one pass in eval mode, everything in order, the network left as it was."""

from __future__ import annotations

import pytest
import torch

from aep_ext import MultiExitNet
from aep_ext.inference import collect_logits


def test_logits_and_labels_of_a_loader(net: MultiExitNet):
    x, y = torch.randn(10, 3, 16, 16), torch.arange(10) % 5
    net.train()
    net.stages[1].eval()  # a part that the user has frozen
    modes, state = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    seen: list[int] = []
    loader = [(a, b, "more") for a, b in zip(x.split(4), y.to(torch.int32).split(4), strict=True)]
    logits, target = collect_logits(net, loader, progress=seen.append)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert logits.dtype == torch.float32 and target.dtype == torch.int64 and seen == [4, 8, 10]
    assert torch.equal(target, y) and not logits.is_inference()
    with torch.no_grad():
        torch.testing.assert_close(logits, net.eval().exit_logits(x), rtol=1e-4, atol=1e-4)
    bfloat = collect_logits(net.bfloat16(), [(x.bfloat16(), y.tolist())])
    assert bfloat[0].dtype == torch.float32 and torch.equal(bfloat[1], y)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (torch.zeros(2, 3, 16, 16), TypeError, r"loader must yield \(x, y\) batches, .*, got Tensor"),
        ((torch.zeros(2, 3, 16, 16),), TypeError, r"loader must yield \(x, y\) batches, .*, got tuple of Tensor"),
        (
            (torch.zeros(2, 3, 16, 16), [0]),
            ValueError,
            r"a batch's y must be integers of shape \[2\], got .*\[1\]",
        ),
        (
            (torch.zeros(2, 3, 16, 16), [0.5, 1.0]),
            ValueError,
            r"a batch's y must be integers of shape \[2\], got torch.float32",
        ),
    ],
)
def test_what_a_loader_must_not_yield(net: MultiExitNet, batch, error, message):
    good = (torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64))
    net.train()
    with pytest.raises(error, match=f"collect_logits: {message}"):
        collect_logits(net, [good, batch])
    assert net.training


def test_other_refusals(net: MultiExitNet):
    with pytest.raises(ValueError, match="collect_logits: loader must yield at least one sample, got none"):
        collect_logits(net, [])
    with pytest.raises(TypeError, match="collect_logits: net must be a MultiExitNet, got Linear"):
        collect_logits(torch.nn.Linear(1, 1), [])
