"""Where text goes: results to stdout, progress and warnings to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from cart_hf.tables import Table, terminal

_UNWRAPPED = 400

# No markup: brackets in a path or a model's name are what they are.
out = Console(soft_wrap=True, highlight=False, markup=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


def print_table(table: Table) -> None:
    """Print a table to stdout: as wide as the terminal, or with whole lines into a file or pipe."""
    console = out if out.is_terminal else Console(width=_UNWRAPPED, highlight=False, markup=False)
    console.print(terminal(table))


def warn(message: str) -> None:
    """Print a warning to stderr."""
    err.print(Text("warning: ", style="yellow") + Text(message))


class Bars:
    """A progress bar for each step that reports."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}

    def __call__(self, step: str, advance: int, total: int) -> None:
        """Advance the bar of ``step``."""
        if step not in self._bars:
            self._bars[step] = self._progress.add_task(step, total=total)
        self._progress.advance(self._bars[step], advance)


@contextmanager
def progress_bars() -> Iterator[Bars]:
    """Show progress on stderr; silent when it is not a terminal or HF_HUB_DISABLE_PROGRESS_BARS is set."""
    silent = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in {"1", "ON", "YES", "TRUE"}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=silent or not err.is_terminal) as progress:
        yield Bars(progress)


def quiet_libraries(*, models: bool = True) -> None:
    """Keep transformers from reporting on stderr what we report better.

    :param models: whether models will be loaded; if not, transformers may not be needed: it takes long to import.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if models or "transformers" in sys.modules:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()


def size(nbytes: float) -> str:
    """Return bytes for people: ``350.1 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
