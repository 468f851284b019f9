"""Tables of short texts, for a terminal and for a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence

Cells = Sequence[Sequence[str]]  # rows, the first of them the heads of the columns


def plain(table: Cells, right: Sequence[int] = ()) -> str:
    """Columns side by side; those numbered in `right` end together."""
    widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    return "\n".join(
        "  ".join(c.rjust(w) if k in right else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True)))
        .rstrip()
        for row in table
    )  # fmt: skip


def notebook(table: Cells, right: Sequence[int] = ()) -> str:
    """The same as HTML."""

    def cells(row: Sequence[str], tag: str) -> str:
        sides = ("right" if k in right else "left" for k in range(len(row)))
        return "".join(
            f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
            for cell, side in zip(row, sides, strict=True)
        )

    head, *rows = table
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"
