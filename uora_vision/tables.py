"""Tables as text, through rich, and lists that may be long."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence


def render(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], footer: Sequence[object] = ()) -> str:
    """A table as text, as wide as it needs to be; on a terminal the last column wraps, if the table would be wider.
    Columns that hold numbers are set to the right."""
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows]
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_footer=bool(footer))
    least = 2
    for i, name in enumerate(columns):
        numeric = all(row[i][:1].isdigit() or not row[i] for row in cells)
        foot = (f"{footer[i]:,}" if isinstance(footer[i], int) else str(footer[i])) if footer else ""
        texts = [name, foot, *(row[i] for row in cells)]
        whole = i + 1 < len(columns)  # the last one wraps: it is what has sentences
        width = max(map(cell_len, texts if whole else " ".join(texts).split()), default=0)
        table.add_column(
            Text(name), footer=Text(foot), justify="right" if numeric else "left", no_wrap=whole, min_width=width
        )
        least += width + 3
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    width = max(least, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 200
    console = Console(width=width, color_system=None, force_jupyter=False)  # Jupyter would show an empty table too
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def shortened(items: Sequence[str], most: int = 8, between: str = ", ") -> str:
    """The first of some items, and how many more there are."""
    return between.join(items[:most]) + (f"{between}and {len(items) - most} more" if len(items) > most else "")
