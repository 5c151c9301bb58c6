"""What is under way, on standard error: a live bar on a terminal, else a line for each thing."""

import sys
from collections.abc import Generator, Iterator
from typing import TypeVar

from kenspeckle.core import Stage

__all__ = ["say", "watch"]

Result = TypeVar("Result")


def say(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr, flush=True)


def watch(work: Generator[object, None, Result], quiet: bool) -> Result:
    """Draw the events of some work as they come, and return its result.

    Args:
        work: yields `Stage` for progress; any other event is a line of text.
        quiet: draw nothing.
    """
    results: list[Result] = []

    def events() -> Iterator[object]:
        results.append((yield from work))

    draw = _silent if quiet else _bars if sys.stderr.isatty() else _lines
    for _ in draw(events()):
        pass
    return results[0]


def _silent(events: Iterator[object]) -> Iterator[object]:
    yield from events


def _lines(events: Iterator[object]) -> Iterator[object]:
    """One line for each thing worth keeping, for logs and pipes."""
    stage = ""
    for event in events:
        if isinstance(event, Stage):
            if event.name != stage:
                stage = event.name
                say(f"{stage} …")
        else:
            say(str(event))
        yield event


def _bars(events: Iterator[object]) -> Iterator[object]:
    """A live bar with the time left, and the same lines as `_lines` above it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    columns = ("[progress.description]{task.description}", "{task.completed}/{task.total}")
    bar = Progress(
        TextColumn(columns[0]),
        BarColumn(),
        TextColumn(columns[1]),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task("starting", total=None, detail="")
    stage = ""
    with bar:
        for event in events:
            if isinstance(event, Stage):
                if event.name != stage:
                    stage = event.name
                    bar.reset(task, total=event.total, description=stage)
                bar.update(task, completed=event.done, total=event.total, detail=event.detail)
            else:
                bar.console.print(Text(str(event)))
            yield event
