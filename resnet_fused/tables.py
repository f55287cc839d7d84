"""Tables as text, of the width of the terminal where they are printed to one."""

import re
import shutil
import sys
from collections.abc import Sequence

_GAP = "  "
_NARROWEST = 8


def table(rows: Sequence[Sequence], headers: Sequence[str] = (), right: Sequence[int] = ()) -> str:
    """A table of ``rows``; where standard output is a terminal that it is too wide for, its cells are wrapped.

    Args:
        rows: of cells; None is empty.
        headers: of the columns, or none.
        right: the columns that are aligned to the right.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in ([headers] if headers else []) + [*rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if sys.stdout.isatty():
        widths = _fitted(widths, shutil.get_terminal_size().columns)
    rule = _GAP.join("-" * width for width in widths)
    lines = [] if headers else [rule]
    for i, row in enumerate(cells):
        wrapped = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
        for parts in zip(*(column + [""] * (max(map(len, wrapped)) - len(column)) for column in wrapped), strict=True):
            aligned = [
                part.rjust(width) if place in right else part.ljust(width)
                for place, (part, width) in enumerate(zip(parts, widths, strict=True))
            ]
            lines.append(_GAP.join(aligned).rstrip())
        if headers and i == 0:
            lines.append(rule)
    return "\n".join(lines if headers else [*lines, rule])


def _fitted(widths: list[int], available: int) -> list[int]:
    """The widest columns cut to one width, so that all of them fit."""
    available -= len(_GAP) * (len(widths) - 1)
    limit = max(widths)
    while limit > _NARROWEST and sum(min(width, limit) for width in widths) > available:
        limit -= 1
    return [min(width, limit) for width in widths]


def _wrapped(text: str, width: int) -> list[str]:
    """``text`` in lines, broken at spaces and within names and paths; in the midst of a word where that must be."""
    lines = [""]
    for piece in re.findall(r"\s+|[^\s./+]+[./+]?|[./+]", text):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece if lines[-1] else piece.lstrip()
        while len(lines[-1].rstrip()) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return [line.rstrip() for line in lines]
