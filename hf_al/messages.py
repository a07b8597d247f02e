"""Text for users: the nearest known name, long lists of names, the last line of a library's error, rows as a table."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean ...?` if a known name resembles this one, else nothing."""
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f" Did you mean {close[0]}?" if close else ""


def some(names: Sequence[str], most: int) -> str:
    """The first `most` names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def duration(seconds: float) -> str:
    """In words, with the precision of an estimate."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def last_line(error: Exception) -> str:
    """The last line of an error's text, without the name of an error class: the original message if a library put
    lines of its own before it."""
    lines = str(error).strip().splitlines()
    return re.sub(r"^\w*Error: ", "", lines[-1].strip()) if lines else type(error).__name__


def table(rows: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    """Rows as a table, with their keys as its header.

    Args:
        rows: a missing value shows as a dash, or as an empty cell in Markdown.
        markdown: Markdown if True, else aligned columns with numbers to the right.
    """
    if not rows:
        return "(none)"
    head = list({name: None for row in rows for name in row})
    missing = "" if markdown else "-"
    cells = [head, *[[_cell(row.get(name), missing) for name in head] for row in rows]]
    if markdown:
        lines = ["| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in row) + " |" for row in cells]
        return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(head))]
    lines = [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: Any, missing: str) -> str:
    if value is None:
        return missing
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").removesuffix("%").isdigit()
