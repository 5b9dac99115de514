"""A bar of the bytes that are read, where somebody looks on."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

# Called with a name and the number of bytes that were read for it.
Report: TypeAlias = Callable[[str, int], None]


@contextmanager
def progress(title: str, *, total: int | None = None) -> Iterator[Report]:
    """Shows names and bytes on a terminal, and nothing otherwise; the bar is gone at the end.

    ``total`` is in bytes, None where it is not known.  Of several processes the first shows it.
    """
    import jax

    if not sys.stderr.isatty() or jax.process_index() != 0:
        yield lambda name, size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    from rich.table import Column

    bar = Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[name]}", markup=False, table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(title, total=total, name="")
        yield lambda name, size: bar.update(task, advance=size, name=name)
