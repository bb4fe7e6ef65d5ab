"""What the command line draws: progress bars and tables on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

Progress = Callable[[str, float], None]


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Yield a `progress(stage, fraction)` callback that draws on stderr; a line per stage where that is no terminal."""
    if not sys.stderr.isatty():
        yield _stage_printer(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.fields[title]}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0, title=title)
        yield lambda stage, fraction: bar.update(task, description=stage, completed=fraction)
        bar.update(task, completed=1.0)


def _stage_printer(title: str, step: float = 0.1) -> Progress:
    """One line for each tenth of the work, so that a log stays readable."""
    printed = -1

    def show(stage: str, fraction: float) -> None:
        nonlocal printed
        if int(fraction / step) > printed:
            printed = int(fraction / step)
            print(f"{title} {fraction:4.0%}  {stage}", file=sys.stderr, flush=True)

    return show


def print_table(rows: Iterable[Sequence[str]], header: Sequence[str] = (), title: str = "") -> None:
    """A table on stdout; the first column is text, the others align right when they begin with a digit."""
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    table = Table(title=title or None, show_header=bool(header), title_justify="left")
    for index in range(max(len(header), *(len(row) for row in rows))):
        cells = [row[index] for row in rows if index < len(row)]
        numeric = index > 0 and all(cell[:1].isdigit() or cell in ("", "-") for cell in cells)
        table.add_column(header[index] if header else "", justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    console.print(table)


def format_bytes(size_bytes: float) -> str:
    """1,234,567 -> '1.18 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:,.0f} {unit}" if unit == "B" else f"{size_bytes:,.2f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:,.2f} TiB"
