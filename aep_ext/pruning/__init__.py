"""Pruning: score every subset of the exits, choose one, and take it out as a smaller network."""

from __future__ import annotations

from aep_ext.pruning.cost import (
    Latency,
    SubsetCosts,
    count_macs,
    count_parameters,
    exit_costs,
    measure_latency,
    subset_costs,
)
from aep_ext.pruning.extract import prune, single_exit
from aep_ext.pruning.non_inferiority import NonInferiority, non_inferiority_test
from aep_ext.pruning.objectives import MEASURES, OBJECTIVES, parse_constraints
from aep_ext.pruning.score import score_logits, score_subsets, subset_correctness, subset_nll
from aep_ext.pruning.scores import SubsetScore, SubsetScores, pareto_front, smallest_non_inferior
from aep_ext.pruning.subsets import exits_of_mask, mask_of_exits

__all__ = [
    "MEASURES",
    "OBJECTIVES",
    "Latency",
    "NonInferiority",
    "SubsetCosts",
    "SubsetScore",
    "SubsetScores",
    "count_macs",
    "count_parameters",
    "exit_costs",
    "exits_of_mask",
    "mask_of_exits",
    "measure_latency",
    "non_inferiority_test",
    "pareto_front",
    "parse_constraints",
    "prune",
    "score_logits",
    "score_subsets",
    "single_exit",
    "smallest_non_inferior",
    "subset_correctness",
    "subset_costs",
    "subset_nll",
]
