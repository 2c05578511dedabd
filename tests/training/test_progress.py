"""How far a run is: bars in a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

pytest.importorskip("lightning", reason="the training needs lightning")
pytest.importorskip("rich", reason="the bars are rich's")

from rich.console import Console

from aep_ext import _progress as progress
from aep_ext._progress import Progress


class Clock:
    """Stands in for ``time.monotonic``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def terminal() -> Any:
    return Console(file=io.StringIO(), force_terminal=True, width=100, force_interactive=True)


def test_a_terminal_shows_a_bar_with_the_time_left() -> None:
    console = terminal()
    shown = Progress(console=console)
    with shown.task("seed 0 [mixed]", 40) as task:
        task(20)
        shown.line("a line [above] it")
        task(80, 80, title="epoch 2/2")
    text = console.file.getvalue()
    assert "seed 0 [mixed]" in text and "━" in text and "a line [above] it" in text and "epoch 2/2" in text
    assert "100%" in text and "-:--:--" in text and "0:00:00" in text  # the time left, at first and at last


def test_elsewhere_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = Clock(monkeypatch), []
    plain = Console(file=io.StringIO())
    shown = Progress(lines.append, plain)
    assert shown.console is None
    with shown.task("training", 400) as task:
        for step in range(1, 401):
            clock.now += 1.0
            task(step)
    shown.line("done")
    assert lines[0] == "training: 8 %, 6 min left" and lines[-2:] == ["training: 98 %, 10 s left", "done"]
    assert len(lines) == 14 and plain.file.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert progress._duration(seconds) == text


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shown = Clock(monkeypatch), Progress.of_terminal(quiet=True)
    with shown.task("training", 2) as task:
        clock.now = 100.0
        task(1)
    shown.line("done")
    assert capsys.readouterr() == ("", "")


def test_the_terminal_is_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress.of_terminal()
    assert shown.console is None or sys.stdout.isatty()
    shown.line("done")
    assert capsys.readouterr().out == "done\n"


def test_batches_are_counted() -> None:
    console = terminal()
    assert list(Progress(console=console).loader("val images", [1, 2, 3])) == [1, 2, 3]
    assert "val images" in console.file.getvalue() and "100%" in console.file.getvalue()
