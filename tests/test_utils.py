from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from aep_ext._utils import aligned, html_table, per_exit


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (0.5, (0.5, 0.5, 0.5)),
        (torch.tensor(2), (2.0, 2.0, 2.0)),
        ([1, 2.5, math.inf], (1.0, 2.5, math.inf)),
        (torch.tensor([1.0, 2.0, 3.0], requires_grad=True), (1.0, 2.0, 3.0)),
        (np.array([1, 2, 3]), (1.0, 2.0, 3.0)),
        ((v for v in (1, 2, 3)), (1.0, 2.0, 3.0)),
    ],
)
def test_one_number_or_one_per_exit(values, expected):
    result = per_exit("f", "thresholds", values, 3)
    assert result == expected and all(type(v) is float for v in result)


def test_no_exit_needs_no_number():
    assert per_exit("f", "thresholds", 0.5, 0) == per_exit("f", "thresholds", [], 0) == ()


@pytest.mark.parametrize(
    ("values", "positive", "error", "message"),
    [
        ([0.5], False, ValueError, r"f: b must have 2 entries, got 1"),
        ([1.0, math.nan], False, ValueError, r"f: b must not be NaN, got nan at position 1"),
        ([1.0, 0.0], True, ValueError, r"f: b must be positive and finite, got 0.0 at position 1"),
        ([-1.0, 1.0], True, ValueError, r"f: b must be positive and finite, got -1.0 at position 0"),
        (math.inf, True, ValueError, r"f: b must be positive and finite, got inf at position 0"),
        (math.nan, True, ValueError, r"f: b must be positive and finite, got nan at position 0"),
        ([1e-39, 1.0], True, ValueError, r"f: b must be positive and finite, got 1e-39 at position 0"),  # in float32
        ([1.0, 1e39], True, ValueError, r"f: b must be positive and finite, got 1e\+39 at position 1"),
        (np.array([1.0, 1e300]), True, ValueError, r"f: b must be positive and finite, got 1e\+300 at position 1"),
        (torch.tensor([0, 1], dtype=torch.int8), True, ValueError, r"f: b must be positive and finite, got 0.0 at"),
        (torch.tensor([1, 0]).half(), True, ValueError, r"f: b must be positive and finite, got 0.0 at position 1"),
        (torch.tensor([1j, 1j]), True, TypeError, r"f: b must be a number or a sequence of numbers"),
        (np.ones((2, 1)), True, ValueError, r"f: b must have one dimension, got shape \[2, 1\]"),
        ("12", True, TypeError, r"f: b must be a number or a sequence of numbers, got '12'"),
        (torch.ones(2, 2), True, ValueError, r"f: b must have one dimension, got shape \[2, 2\]"),
        ("ab", False, TypeError, r"f: b must be a number or a sequence of numbers, got 'ab'"),
        (None, False, TypeError, r"f: b must be a number or a sequence of numbers, got None"),
        ([None, 1], False, TypeError, r"f: b must be a number or a sequence of numbers"),
    ],
)
def test_what_is_refused(values, positive, error, message):
    with pytest.raises(error, match=f"^{message}"):
        per_exit("f", "b", values, 2, positive=positive)


def test_tables():
    head, rows = ["exit", "a<b"], [["1", "x & y"], ["2", ""]]
    assert aligned([head, *rows]) == ["exit    a<b", "   1  x & y", "   2"]
    assert aligned([head, *rows], left=1) == ["exit    a<b", "1     x & y", "2"]
    found = html_table("<title>", head, rows)
    assert "<b>&lt;title&gt;</b>" in found and "<th>a&lt;b</th>" in found and "<td>x &amp; y</td>" in found
    assert found.count("<tr>") == found.count("</tr>") == 3
