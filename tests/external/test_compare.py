"""Two curves agree if they are as close as rounding leaves them, and not otherwise."""

from __future__ import annotations

import math

import pytest

from benchmarks.external.compare import METRICS, compare, largest, read_curve


def curve(*losses: float, top1: float = 50.0) -> list[dict[str, float]]:
    return [
        {"epoch": epoch, "train_loss": loss, "eval_loss": loss, "eval_top1": top1} for epoch, loss in enumerate(losses)
    ]


PLAIN = curve(2.0, 1.0, 0.5)
ROUNDED = curve(2.0, 1.001, 0.5)


def verdicts(candidate: list[dict[str, float]], metric: str = "train_loss") -> list[bool]:
    rows = compare(PLAIN, [ROUNDED], candidate, floor=1e-5, validation_images=100)
    return [row["agrees"] for row in rows if row["metric"] == metric]


def test_the_same_curve_agrees_with_itself():
    rows = compare(PLAIN, [PLAIN], PLAIN, floor=1e-5, validation_images=100)
    assert all(row["agrees"] and row["distance"] == 0 for row in rows)
    assert {(row["epoch"], row["metric"]) for row in rows} == {(e, m) for e in range(3) for m in METRICS}


def test_allowed_is_three_times_the_largest_yardstick_so_far():
    assert verdicts(curve(2.0, 1.0029, 0.5029)) == [True, True, True]
    assert verdicts(curve(2.0, 1.0031, 0.5031)) == [True, False, False]
    assert verdicts(curve(2.0029, 1.0, 0.5)) == [False, True, True]  # before the yardstick has moved


def test_the_floor_is_allowed_without_a_yardstick():
    assert verdicts(curve(2.000009, 1.0, 0.5)) == [True, True, True]
    assert verdicts(curve(2.000011, 1.0, 0.5)) == [False, True, True]


def test_one_validation_image_may_change_its_class_and_two_may_not():
    assert all(verdicts(curve(2.0, 1.0, 0.5, top1=51.0), "eval_top1"))
    assert not any(verdicts(curve(2.0, 1.0, 0.5, top1=52.0), "eval_top1"))


def test_the_furthest_yardstick_counts():
    rows = compare(PLAIN, [PLAIN, ROUNDED], ROUNDED, floor=0.0, validation_images=100)
    assert all(row["agrees"] for row in rows)
    assert largest(rows)["train_loss"] == {"distance": pytest.approx(1e-3), "yardstick": pytest.approx(1e-3)}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_does_not_agree(value):
    assert verdicts(curve(2.0, value, 0.5)) == [True, False, True]
    rows = compare(PLAIN, [curve(2.0, value, 0.5)], PLAIN, floor=1e-5, validation_images=100)
    assert not next(row for row in rows if row["metric"] == "train_loss" and row["epoch"] == 1)["agrees"]


def test_other_epochs_and_no_yardstick_are_errors():
    with pytest.raises(ValueError, match="same epochs"):
        compare(PLAIN, [ROUNDED], PLAIN[:2], floor=1e-5, validation_images=100)
    with pytest.raises(ValueError, match="at least one yardstick"):
        compare(PLAIN, [], PLAIN, floor=1e-5, validation_images=100)


def test_a_summary_is_read_in_full_precision(tmp_path):
    file = tmp_path / "summary.csv"
    file.write_text("epoch,train_loss,eval_loss,eval_top1,lr\n0,2.3025850929940455,0.1,12.5,0.05\n")
    assert read_curve(file) == [{"epoch": 0, "train_loss": 2.3025850929940455, "eval_loss": 0.1, "eval_top1": 12.5}]
    file.write_text("epoch,train_loss\n0,1.0\n")
    with pytest.raises(ValueError, match="eval_loss"):
        read_curve(file)
