"""Markdown tables for the cards of data sets, models and knowledge bases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table, or "None." if there are no rows."""
    lines = [list(header), ["---"] * len(header), *(list(row) for row in rows)]
    if len(lines) == 2:
        return "None."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
