"""An upper bound on what any thresholds can reach, so that a search can say how far it may be from the optimum.

Lagrangian decomposition (M. Guignard and S. Kim, "Lagrangean decomposition: a model yielding stronger Lagrangean
bounds", Mathematical Programming 39 (1987) 215-228). Whether sample n would pass gate e is written twice: once for the
sample, which may then choose its exit freely among those it passes, and once for the gate, where the samples that pass
must be its best-ranked ones. Multipliers mu (G, N) charge the two copies for disagreeing. Each copy alone is solved
exactly (the sample's by a maximum over E exits, the gate's by a running sum over its ranks), and the sum of both is at
least the joint optimum for every mu. A subgradient method lowers it; with one gate it reaches the optimum itself.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aep_ext.calibration.problem import Problem

# Tried out on made-up networks of 4 and 7 exits: the bound comes closest in 300 steps.
_MEMORY = 0.8
_PATIENCE = 15
_SHRINK = 0.6


class LagrangianBound:
    """Upper bounds on ``right - price * cost`` over all limits; multipliers are kept from one call to the next."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.mu: NDArray[np.float64] | None = None
        self._single = bool((problem.counts == 1).all())

    def _start(self, worth: NDArray[np.float64], limits: tuple[int, ...]) -> NDArray[np.float64]:
        """What leaving at gate e gains over what ``limits`` let the sample do later: for one gate the optimum."""
        problem = self.problem
        mu = np.empty(problem.ranks.shape)
        later = worth[-1].copy()
        for e in range(problem.gates - 1, -1, -1):
            mu[e] = later - worth[e]
            leaves = problem.ranks[e] < limits[e]
            later[leaves] = worth[e][leaves]
        return mu

    def _evaluate(self, worth: NDArray[np.float64], mu: NDArray[np.float64]) -> tuple[float, NDArray[np.int8]]:
        """The bound at ``mu`` and a subgradient, sample's copy minus gate's copy: (G, N) of -1, 0 and 1."""
        problem = self.problem
        gates, samples = mu.shape
        # The sample's copy: the exit x earns its worth and mu_x; gates after x are passed where that earns something.
        best, choice = worth[-1].copy(), np.full(samples, gates, dtype=np.uint8)
        free = np.zeros(samples)
        for e in range(gates - 1, -1, -1):
            value = worth[e] + mu[e]
            value += free
            np.putmask(choice, value > best, np.uint8(e))
            np.maximum(best, value, out=best)
            free += np.maximum(mu[e], 0.0)
        total = float(best @ problem.counts)
        gradient = np.empty(mu.shape, dtype=np.int8)
        for e in range(gates):
            passes = (choice == e) | ((choice < e) & (mu[e] > 0))
            # The gate's copy: the best-ranked samples pass, as many as lower the charge most; a NaN never does.
            charge = -mu[e] if self._single else -mu[e] * problem.counts
            sums = np.cumsum(np.bincount(problem.ranks[e], weights=charge, minlength=problem.groups[e] + 1)[:-1])
            top = int(np.argmax(sums)) if len(sums) else 0
            np.copyto(gradient[e], passes)
            if len(sums) and sums[top] > 0:
                total += float(sums[top])
                gradient[e] -= problem.ranks[e] <= top
        return total, gradient

    def upper(self, price: float, reached: float, limits: tuple[int, ...], steps: int = 200) -> float:
        """A number that no limits can exceed.

        Args:
            price: in right answers per unit of cost.
            reached: the best value found by a search; the bound stops when it gets there.
            limits: those that reach it.
            steps: of the subgradient method.
        """
        problem = self.problem
        worth = problem.right.astype(np.float64) - price * problem.costs[:, None]
        slack = 1e-9 * max(1.0, abs(reached))  # sums over the samples are rounded
        never = problem.ranks >= np.array(problem.groups, dtype=np.int32).reshape(-1, 1)
        best, best_mu, gradient = np.inf, np.zeros(problem.ranks.shape), np.zeros(problem.ranks.shape, dtype=np.int8)
        for mu in (best_mu, self._start(worth, limits), *([] if self.mu is None else [self.mu])):
            # A sample that can never pass is kept from it by a charge above all that an exit could earn.
            mu = np.where(never, -1.0 - 2 * float(np.abs(worth).max(initial=0.0)), mu)
            value, slope = self._evaluate(worth, mu)
            if value < best:
                best, best_mu, gradient = value, mu, slope
        mu, value, factor, since = best_mu, best, 1.0, 0
        direction = np.zeros(mu.shape)
        for _ in range(steps):
            # Earlier gradients go on counting, or the steps zigzag (P. Camerini, L. Fratta, F. Maffioli, "On improving
            # relaxation methods by modified gradient techniques", 1975).
            direction = _MEMORY * direction + gradient
            norm = float(((direction * direction) @ problem.counts).sum())
            if value - reached <= slack or norm == 0:
                break
            mu = mu - factor * (value - reached) / norm * direction  # Polyak's step towards what was reached
            value, gradient = self._evaluate(worth, mu)
            if value < best:
                best, best_mu, since = value, mu, 0
            else:
                since += 1
                if since == _PATIENCE:  # overshooting
                    factor, since = _SHRINK * factor, 0
        self.mu = best_mu
        return max(best, reached) + slack
