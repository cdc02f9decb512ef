"""What a person sees on the terminal: stages, a progress bar with rate and remaining time, tables."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

EVERY_SECONDS = 5.0
"""How often a line of progress is printed where there is no terminal to draw a bar on."""


class Terminal:
    """Progress on standard error; standard output is left to results."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._printed = 0.0
        self._began = 0.0
        self._first = 0
        self._what = ""

    def stage(self, experiment: str, name: str) -> None:
        self._clear()
        self.console.print(f"[bold]{experiment}[/bold]: {name}")

    def progress(self, done: int, total: int, message: str) -> None:
        # What is counted stands before a comma, and how it goes after it.
        what, _, detail = message.partition(", ")
        if self.console.is_terminal:
            if self._bar is None:
                self._bar = Progress(
                    TextColumn("  {task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[rate]}"),
                    TimeRemainingColumn(),
                    console=self.console,
                    transient=True,
                )
                self._bar.start()
            if self._task is None or self._bar.tasks[-1].description != what:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(what, total=total, completed=done, rate="")
                self._start(done)
            rate = self._rate(done) + (f", {detail}" if detail else "")
            self._bar.update(self._task, completed=done, total=total, rate=rate)
            if done == total:
                self._clear()
                self.console.print(f"  {message}: {total} done{self._rate(done)}")
            return
        if self._began == 0.0 or done < self._first or what != self._what:
            self._what = what
            self._start(done)
        if done == total or time.monotonic() - self._printed > EVERY_SECONDS:
            self._printed = time.monotonic()
            self.console.print(f"  {message}: {done} of {total}{self._rate(done)}")
            if done == total:
                self._began = 0.0

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def _start(self, done: int) -> None:
        self._began, self._first = time.monotonic(), done

    def _rate(self, done: int) -> str:
        seconds = time.monotonic() - self._began
        return (
            f", {(done - self._first) / seconds:.3g} a second" if done > self._first and seconds > 0.5 else ""
        )

    def _clear(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def __enter__(self) -> Terminal:
        # Warnings of the engine, progress of downloads.
        self._handler = _Lines(self)
        log = logging.getLogger("megagram")
        log.addHandler(self._handler)
        log.setLevel(logging.INFO)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger("megagram").removeHandler(self._handler)
        self._clear()


class _Lines(logging.Handler):
    """Log records as lines of a display."""

    def __init__(self, display: Terminal) -> None:
        super().__init__()
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.line(record.getMessage())


class Quiet:
    """No display, for scheduled runs."""

    def stage(self, experiment: str, name: str) -> None:
        return None

    def progress(self, done: int, total: int, message: str) -> None:
        return None

    def line(self, text: str) -> None:
        return None


def page(path: Path) -> None:
    """Print a Markdown page on standard output."""
    Console().print(Markdown(path.read_text()))


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> None:
    """Print a table on standard output, as wide as it needs to be where that is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    drawn = Table(title=Text(title) if title else None, title_justify="left", show_header=any(header))
    for k, name in enumerate(header):
        drawn.add_column(name, justify="left" if k == 0 else "default")
    for row in rows:
        drawn.add_row(*(Text(str(cell)) for cell in row))  # as it is: brackets are no markup
    console.print(drawn)
