"""Prints tables, by rich: on a terminal, in a pipe, in a log of CI.

A table is written as Markdown has it, so that it can be put into a document as it is. Nothing is
cut off, whatever the width of the terminal, and nothing but text reaches a file. The examples, the
benchmarks and the tools print theirs by this too.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

#: Wider than any table: a line ends where the table does.
WIDE = 1000


def show(
    header: Sequence[str], rows: Sequence[Sequence[object]], words: Collection[int] = (0,)
) -> None:
    """Prints a table of figures, words to the left and numbers to the right.

    Args:
        header: above the columns.
        rows: of the table.
        words: the columns of words, the first is 0.
    """
    # Here, not above: help prints no tables, and need not wait for what does.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.MARKDOWN, show_edge=True)
    for number, title in enumerate(header):
        table.add_column(Text(title), justify="left" if number in words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = Console(file=sys.stdout, width=WIDE, force_terminal=False, color_system=None)
    with console.capture() as captured:
        console.print(table)
    # Above and below a table rich leaves a line of blanks.
    print("\n".join(line for line in captured.get().splitlines() if line.strip()), flush=True)


def show_prose(
    header: Sequence[str], rows: Sequence[Sequence[object]], styles: Sequence[str] = ()
) -> None:
    """Prints a table of sentences: wrapped to fit a terminal, and elsewhere as ``show`` does.

    Args:
        header: above the columns.
        rows: of the table.
        styles: a style of rich for each row, such as ``bold red``, which only a terminal shows.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        show(header, rows, words=range(len(header)))
        return
    table = Table(*header)
    for number, row in enumerate(rows):
        style = styles[number] if styles else None
        table.add_row(*(Text(str(cell)) for cell in row), style=style)
    console.print(table)
