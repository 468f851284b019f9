"""Tables of short texts, for a terminal and for a notebook."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

_ACROSS = 100  # characters of a terminal
_LEAST = 28  # of a column of prose


@dataclass(frozen=True)
class Table:
    """rows: of texts, the first of them the heads of the columns. right: which columns end together. prose: those that
    go on in the next line where, in a terminal, they would be too wide; the last column has what the others leave."""

    rows: Sequence[Sequence[str]]
    right: Sequence[int] = ()
    prose: Sequence[int] = ()

    def plain(self) -> str:
        """Columns side by side."""
        sizes = [max(len(row[k]) for row in self.rows) for k in range(len(self.rows[0]))]
        for k in self.prose:
            left = _ACROSS - sum(sizes[:-1]) - 2 * (len(sizes) - 1) if k == len(sizes) - 1 else _LEAST
            sizes[k] = min(sizes[k], max(left, _LEAST))
        lines = [line for row in self.rows for line in self._broken(row, sizes)]
        return "\n".join("  ".join(map(self._filled, range(len(sizes)), line, sizes)).rstrip() for line in lines)

    def _filled(self, k: int, cell: str, size: int) -> str:
        return cell.rjust(size) if k in self.right else cell.ljust(size)

    def _broken(self, row: Sequence[str], sizes: Sequence[int]) -> list[tuple[str, ...]]:
        parts = [textwrap.wrap(c, sizes[k]) or [""] if k in self.prose else [c] for k, c in enumerate(row)]
        return list(zip_longest(*parts, fillvalue=""))

    def notebook(self) -> str:
        """The same as HTML."""

        def cells(row: Sequence[str], tag: str) -> str:
            sides = ("right" if k in self.right else "left" for k in range(len(row)))
            return "".join(
                f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
                for cell, side in zip(row, sides, strict=True)
            )

        head, *rows = self.rows
        body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
        return f"<table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"
