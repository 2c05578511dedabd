"""How far a piece of work is: bars with the time left in a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from aep_ext._utils import require

LINE_EVERY = 30.0
"""Seconds between two plain lines of one piece of work."""


class Task:
    """One piece of work: call it with the number of steps that are done, and of all where that is known only now.

    Attributes:
        title: what is shown before the bar.
    """

    def __init__(self, title: str, total: int, show: Callable[[Task], None]) -> None:
        self.title, self.total, self.done, self._show = title, total, 0, show

    def __call__(self, done: int, total: int | None = None, *, title: str | None = None) -> None:
        self.done, self.total, self.title = done, total or self.total, title or self.title
        self._show(self)


class Progress:
    """Tells a user how far a run is.

    Args:
        write: takes plain lines; None: silence.
        console: a ``rich.console.Console``; where it is a terminal, work is shown as bars with the time left, and lines
            are printed above them. Elsewhere work is told by plain lines, at most one in 30 seconds.
    """

    def __init__(self, write: Callable[[str], None] | None = None, console: Any = None) -> None:
        self.console: Any = console if console is not None and console.is_terminal else None
        self.write = self._print if self.console is not None else write

    @classmethod
    def of_terminal(cls, quiet: bool = False, *, stderr: bool = False) -> Progress:
        """On standard output, or on standard error; ``quiet``: silent."""
        if quiet:
            return cls()
        console = require("rich.console", "train", "the progress bar").Console(stderr=stderr)
        return cls(lambda line: print(line, file=console.file, flush=True), console)

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)

    def line(self, text: str) -> None:
        """One plain line, in a terminal too."""
        if self.write is not None:
            self.write(text)

    @contextmanager
    def task(self, title: str, total: int, every: float = LINE_EVERY) -> Iterator[Task]:
        """Shows a piece of work of ``total`` steps while the block runs; plain lines come ``every`` so many seconds."""
        if self.console is None:
            yield Task(title, total, self._lines(every))
            return
        bars = require("rich.progress", "train", "the progress bar")
        columns = (bars.TextColumn("{task.description}", markup=False), bars.BarColumn(), bars.TaskProgressColumn())
        with bars.Progress(*columns, bars.TimeRemainingColumn(), console=self.console, transient=True) as shown:
            number = shown.add_task(title, total=total)

            def show(task: Task) -> None:
                shown.update(number, completed=task.done, total=task.total, description=task.title)

            yield Task(title, total, show)

    def _lines(self, every: float) -> Callable[[Task], None]:
        began = told = time.monotonic()

        def show(task: Task) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told >= every and 0 < task.done < task.total:
                told = now
                left = (now - began) * (task.total - task.done) / task.done
                self.line(f"{task.title}: {100 * task.done / task.total:.0f} %, {_duration(left)} left")

        return show

    def loader(self, title: str, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a sized loader, shown while they are used."""
        with self.task(title, len(loader)) as task:  # type: ignore[arg-type]
            for number, batch in enumerate(loader, start=1):
                yield batch
                task(number)


def _duration(seconds: float) -> str:
    """``45 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
