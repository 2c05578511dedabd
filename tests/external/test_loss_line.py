"""One line of a script is replaced, and nothing else."""

from __future__ import annotations

import pytest

from benchmarks.external.loss_line import replace_line

SCRIPT = """\
def main():
    if args.smoothing:
        loss = Smoothed(args.smoothing)
    else:
        loss = nn.CrossEntropyLoss()
    loss = loss.to(device)
    other_loss = nn.CrossEntropyLoss()  # a longer line with the same words
"""
OLD = "loss = nn.CrossEntropyLoss()"


def test_exactly_one_line_differs_at_its_indentation():
    changed = replace_line(SCRIPT, OLD, "import x; loss = x.Loss()")
    pairs = list(zip(SCRIPT.splitlines(), changed.splitlines(), strict=True))
    assert [(old, new) for old, new in pairs if old != new] == [
        ("        loss = nn.CrossEntropyLoss()", "        import x; loss = x.Loss()")
    ]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_line_endings_and_a_missing_last_one_stay(ending):
    source = f"a{ending}\tb{ending}c"
    assert replace_line(source, "b", "d") == f"a{ending}\td{ending}c"
    assert replace_line(source, "c", "d") == f"a{ending}\tb{ending}d"


def test_a_line_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"'loss = Missing\(\)' exactly once, found 0 times$"):
        replace_line(SCRIPT, "loss = Missing()", "pass")


def test_a_line_that_is_there_twice_is_refused():
    with pytest.raises(ValueError, match=r"exactly once, found 2 times \(lines 1, 3\)"):
        replace_line("a\nb\n  a\n", "a", "c")


@pytest.mark.parametrize("new", ["", "  ", "a\nb"])
def test_the_new_line_is_one_line(new):
    with pytest.raises(ValueError, match="must be one line"):
        replace_line(SCRIPT, OLD, new)
