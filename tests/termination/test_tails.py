from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from aep_ext.calibration.tails import betting, binomial_cdf, binomial_upper, hoeffding_bentkus


def exact_cdf(k, n, p):
    """The binomial tail in whole numbers."""
    p = Fraction(p)
    return float(sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)))


@pytest.mark.parametrize("n", [1, 2, 7, 15, 16, 40, 300])
@pytest.mark.parametrize("p", [1e-9, 0.01, 0.25, 0.5, 0.8, 0.999])
def test_the_binomial_tail_is_exact(n, p):
    for k in sorted({0, 1, n // 7, n // 3, n // 2, int(n * p), min(n - 1, int(n * p) + 2), n - 1, n}):
        expected = exact_cdf(k, n, p)
        # Above the mean it is 1 minus the other tail, good to an absolute 1e-13.
        tolerance = {"rel": 1e-11, "abs": 0} if k <= n * p else {"rel": 0, "abs": 1e-13}
        assert binomial_cdf(k, n, p) == pytest.approx(expected, **tolerance)


def test_the_binomial_tail_against_scipy():
    stats = pytest.importorskip("scipy.stats", reason="a comparison with scipy")
    for n in (1000, 50_000, 2_000_000):
        for p in (1e-5, 0.005, 0.5, 0.97):
            for k in (int(n * p * 0.8), int(n * p), int(n * p * 1.05) + 1):
                expected = float(stats.binom.cdf(k, n, p))
                if expected > 1e-280:
                    assert binomial_cdf(k, n, p) == pytest.approx(expected, rel=1e-9)


def test_the_ends_of_the_binomial_tail():
    assert binomial_cdf(-1, 5, 0.5) == 0 and binomial_cdf(5, 5, 0.5) == 1 and binomial_cdf(0, 0, 0.5) == 1
    assert binomial_cdf(2, 5, 0) == 1 and binomial_cdf(2, 5, 1) == 0
    with pytest.raises(ValueError, match=r"n must be >= 0 and p within \[0, 1\], got 3 and 1.5"):
        binomial_cdf(1, 3, 1.5)


def test_clopper_and_pearson():
    assert binomial_upper(0, 100, 0.05) == pytest.approx(1 - 0.05 ** (1 / 100), rel=1e-9)
    assert binomial_upper(100, 100, 0.05) == binomial_upper(0, 0, 0.05) == 1
    for k, n in ((3, 50), (40, 1000)):
        assert binomial_cdf(k, n, binomial_upper(k, n, 0.1)) == pytest.approx(0.1, rel=1e-9)
    with pytest.raises(ValueError, match="k must be within 0..n"):
        binomial_upper(3, 2, 0.1)


def test_hoeffding_bentkus():
    assert hoeffding_bentkus(0.0, 100, 0.05) == pytest.approx(min(0.95**100, math.e * 0.95**100))
    assert hoeffding_bentkus(0.3, 100, 0.05) == 1
    # Never below the exact tail, which it bounds.
    for k in range(0, 20):
        assert hoeffding_bentkus(k / 200, 200, 0.1) >= binomial_cdf(k, 200, 0.1) * (1 - 1e-12)
    with pytest.raises(ValueError, match="epsilon within"):
        hoeffding_bentkus(0.1, 10, 0)


@pytest.mark.parametrize(
    ("values", "chances", "epsilon"),
    [
        ([0.0, 1.0], [0.95, 0.05], 0.05),
        ([0.0, 0.5, 1.0], [0.02, 0.94, 0.04], 0.51),
        ([0.0, 0.25], [0.2, 0.8], 0.2),
    ],
)
def test_betting_is_a_p_value_at_the_edge_of_the_hypothesis(values, chances, epsilon):
    rng = np.random.default_rng(7)
    p = betting(rng.choice(values, size=(3000, 400), p=chances), epsilon)
    for delta in (0.02, 0.1, 0.3):
        # Three standard errors above delta.
        assert (p <= delta).mean() <= delta + 3 * math.sqrt(delta * (1 - delta) / 3000)


def test_betting_beats_hoeffding_on_paired_differences():
    rng = np.random.default_rng(3)
    x = rng.choice([0.0, 0.5, 1.0], size=(200, 2000), p=[0.01, 0.98, 0.01])
    betted = (betting(x, 0.505) <= 0.1).mean()
    bounded = np.mean([hoeffding_bentkus(float(row.mean()), 2000, 0.505) <= 0.1 for row in x])
    assert betted > 0.6 > bounded
    assert betting(np.zeros((2, 0)), 0.5).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"values must be within \[0, 1\]"):
        betting([0.5, 1.5], 0.5)
