"""score_subsets on several ranks: two processes over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from aep_ext import score_subsets
from aep_ext.pruning import SubsetScores
from aep_ext.surgery import networks

HOW = ((True, None), (False, None), (True, 1), (False, 1))  # wrapped, width of the beam
SIZES = (7, 5, 9)  # of the batches; the first rank gets the first and the last


def scored(batches: list[tuple[torch.Tensor, torch.Tensor]], wrap: bool, beam: int | None = None) -> SubsetScores:
    torch.manual_seed(0)
    net = networks.build("resnet_small", 3, 1)
    return score_subsets(DistributedDataParallel(net) if wrap else net, batches, keep_correct=True, beam=beam)


def agree(found: dict, expected: dict) -> bool:
    """Counts exactly; losses are added in another order."""
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-6)
    return {**found, "nll": None} == {**expected, "nll": None}


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 3) for n in SIZES]


def rank(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=2)
    given = batches()
    shares = [given[::2], given[1::2]], [given, []], [given[::2], given[1::2]], [given, []]
    found = [scored(share[number], *how) for share, how in zip(shares, HOW, strict=True)]
    torch.save([(scores.to_dict(), scores.correct) for scores in found], f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_every_rank_gets_the_scores_on_all_samples(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank, (str(tmp_path),), nprocs=2)
    ours, theirs = (torch.load(tmp_path / f"{number}.pt") for number in (0, 1))
    given = batches()
    orders = ([0, 2, 1], [0, 1, 2]) * 2
    for found, order, (_, beam) in zip(zip(ours, theirs, strict=True), orders, HOW, strict=True):
        expected = scored([given[index] for index in order], False, beam)
        for scores, correct in found:  # the second rank of every second round has no sample at all
            assert agree(scores, expected.to_dict()) and torch.equal(correct, expected.correct)


def test_a_wrapped_network_on_one_rank(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert scored(batches(), True).to_dict() == scored(batches(), False).to_dict()
    finally:
        dist.destroy_process_group()
