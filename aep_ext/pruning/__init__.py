"""Pruning: score every subset of the exits, choose one, and take it out as a smaller network."""

from __future__ import annotations

from .cost import Latency, SubsetCosts, count_macs, count_parameters, measure_latency, subset_costs
from .extract import prune, single_exit
from .inferiority import NonInferiority, non_inferior, smallest_non_inferior
from .score import score_logits, score_subsets, subset_correctness
from .scores import SubsetScore, SubsetScores
from .subsets import exits_of_mask, mask_of_exits

__all__ = [
    "Latency",
    "NonInferiority",
    "SubsetCosts",
    "SubsetScore",
    "SubsetScores",
    "count_macs",
    "count_parameters",
    "exits_of_mask",
    "mask_of_exits",
    "measure_latency",
    "non_inferior",
    "prune",
    "score_logits",
    "score_subsets",
    "single_exit",
    "smallest_non_inferior",
    "subset_correctness",
    "subset_costs",
]
