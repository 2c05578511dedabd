from __future__ import annotations

import pytest

from aep_ext import ExitWeights


@pytest.mark.parametrize("name", ["UNIF", "ASC", "DESC", "MIX"])
def test_rounded_weights_are_the_published_ones(published, name):
    for exits, figures in published["weights"][name].items():
        weights = ExitWeights.named(name, int(exits))
        assert [round(v, 4) for v in weights.loss] == figures["branches"]
        assert [round(v, 4) for v in weights.output] == figures["ensemble"]
        assert sum(round(v, 4) for v in weights.loss) == pytest.approx(figures["sum_branches"], abs=1e-9)
        assert sum(weights.loss) == pytest.approx(1, abs=1e-12) and sum(weights.output) == pytest.approx(1, abs=1e-12)
