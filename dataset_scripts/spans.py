"""Finds mentions in their text, for releases without character offsets or with wrong ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hf_mel.schema import NO_SPAN


def locate(text: str, mentions: Sequence[str], occupied: Sequence[tuple[int, int]] = ()) -> list[tuple[int, int]]:
    """Finds each mention in `text` by literal search.

    A mention gets its first occurrence that does not overlap the spans of earlier mentions. If all occurrences overlap,
    it gets the first one that is not exactly the span of an earlier mention, such as a surname inside a full name.

    Args:
        text (`str`): The text.
        mentions (sequence of `str`): Surface forms, in the order in which they choose their spans.
        occupied (sequence of `tuple[int, int]`): Spans that count as those of earlier mentions.

    Returns:
        `list[tuple[int, int]]`: For each mention start and end (exclusive) in characters, or ([`NO_SPAN`], [`NO_SPAN`])
        if it has no free occurrence.
    """
    spans = list(occupied)
    for mention in mentions:
        occurrences = list(_occurrences(text, mention))
        clear = (s for s in occurrences if all(s[1] <= t[0] or t[1] <= s[0] for t in spans))
        unused = (s for s in occurrences if s not in spans)
        spans.append(next(clear, None) or next(unused, (NO_SPAN, NO_SPAN)))
    return spans[len(occupied) :]


def nearest(text: str, mention: str, start: int) -> tuple[int, int]:
    """Finds the occurrence of `mention` in `text` that begins nearest to `start`; of two as near, the earlier.

    Returns:
        `tuple[int, int]`: Start and end (exclusive) in characters, or ([`NO_SPAN`], [`NO_SPAN`]) without occurrence.
    """
    return min(_occurrences(text, mention), key=lambda span: abs(span[0] - start), default=(NO_SPAN, NO_SPAN))


def _occurrences(text: str, mention: str) -> Iterator[tuple[int, int]]:
    start = text.find(mention) if mention else -1
    while start >= 0:
        yield start, start + len(mention)
        start = text.find(mention, start + 1)
