"""Spans of mentions in a text: what a detector returns, checks, overlaps, windows of long texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

from hf_mel.errors import SpanError

_REMEDY = "Count characters of the text from 0; end is the first character after the mention."


@dataclass(frozen=True)
class MentionSpan:
    """A mention in a text.

    Args:
        start, end (`int`): Its characters in the text, end exclusive.
        label (`str`, *optional*): The kind of thing that it names, in the words of the detector, such as "PERSON".
        score (`float`, *optional*): How sure the detector is, higher is better. Its scale is that of the detector.
    """

    start: int
    end: int
    label: str = ""
    score: float | None = None


@runtime_checkable
class MentionDetector(Protocol):
    """Finds the mentions of texts. A function of the user's own is one, too.

    Optional abilities:

    - `describe()` returns a dict of everything that the spans depend on. With it, an interrupted
      [`~hf_mel.linking.annotate_file.annotate_file`] notices that it is resumed with another detector.
    - `with_overlaps(texts)` also returns spans that the detector leaves out because they overlap others. It is asked
      instead if overlapping mentions are kept.
    """

    def __call__(self, texts: Sequence[str]) -> Sequence[Sequence[MentionSpan]]:
        """Returns the spans of each of T texts, in any order. They may overlap."""
        ...


def read_span(value: Any) -> MentionSpan:
    """Reads a span of the user's own: a [`MentionSpan`], a pair `[start, end]`, or a mapping of its fields.

    Raises:
        SpanError: It is none of these.
    """
    if isinstance(value, MentionSpan):
        return value
    try:
        if isinstance(value, Mapping):
            score = value.get("score")
            return MentionSpan(value["start"], value["end"], value.get("label") or "", score)
        start, end = value
        return MentionSpan(start, end)
    except (KeyError, TypeError, ValueError):
        raise SpanError(
            f"{value!r} is no span.", remedy='Give [start, end], or {"start": 0, "end": 5, "label": "person"}.'
        ) from None


def checked_spans(
    text: str, spans: Sequence[Any], *, overlapping: bool, row: int | str | None = None
) -> list[MentionSpan]:
    """Returns the spans of a text, sorted by start, without white space at their edges and without overlaps.

    Args:
        text (`str`): The text.
        spans (sequence): Spans that [`read_span`] reads.
        overlapping (`bool`): Whether to keep overlapping spans, instead of [`resolve_overlaps`].
        row (`int` or `str`, *optional*): The position of the text, for error messages.

    Raises:
        SpanError: A span is outside the text or empty, or is no span.
    """
    checked = []
    for value in spans:
        try:
            span = read_span(value)
        except SpanError as error:
            raise error.changed(row=row) from None
        start, end = span.start, span.end
        is_int = all(isinstance(offset, Integral) and not isinstance(offset, bool) for offset in (start, end))
        if not is_int or not 0 <= start < end <= len(text) or not (surface := text[start:end]).strip():
            raise SpanError(
                f"The span start={start!r}, end={end!r} holds no mention in a text of {len(text):,} characters.",
                row=row,
                remedy=_REMEDY,
            )
        start, end = int(start), int(end)  # NumPy's integers cannot be written as JSON
        start += len(surface) - len(surface.lstrip())
        end -= len(surface) - len(surface.rstrip())
        checked.append(MentionSpan(start, end, span.label, span.score))
    if overlapping:
        return sorted(dict.fromkeys(checked), key=lambda span: (span.start, span.end))
    return resolve_overlaps(checked)


def resolve_overlaps(spans: Sequence[MentionSpan]) -> list[MentionSpan]:
    """Returns spans that do not overlap, sorted by start.

    A span is left out if it overlaps a longer one that is kept. Of equally long spans, the one with the higher score is
    kept (no score is the lowest), then the one that starts first, then the one that comes first.
    """
    order = sorted(
        spans,
        key=lambda span: (span.start - span.end, float("inf") if span.score is None else -span.score, span.start),
    )
    kept: list[MentionSpan] = []
    taken: set[int] = set()  # characters of the kept spans
    for span in order:
        # Kept spans are at least as long, so that one that overlaps this one covers one of its ends.
        if span.start in taken or span.end - 1 in taken:
            continue
        kept.append(span)
        taken.update(range(span.start, span.end))
    return sorted(kept, key=lambda span: span.start)


@dataclass(frozen=True)
class Window:
    """A part of a text, and the inner part of it in which spans start that are taken from it.

    Args:
        start, end (`int`): The characters that are read.
        first, last (`int`): The characters at which spans may start, last exclusive. Those of all windows of a text are
            the whole text, without overlap.
    """

    start: int
    end: int
    first: int
    last: int


def windows(text: str, size: int, margin: int) -> list[Window]:
    """Cuts a text into overlapping windows of at most `size` characters.

    A text of at most `size` characters is one window. Windows are cut at white space where there is some.

    Args:
        text (`str`): The text.
        size (`int`): Maximal number of characters of a window, more than twice the margin.
        margin (`int`): Number of characters before and after the inner part. A span of at most `margin` characters, which
            starts in the inner part, is in the window as a whole.
    """
    if len(text) <= size:
        return [Window(0, len(text), 0, len(text))]
    parts: list[Window] = []
    first = 0
    while True:
        start = max(0, first - margin)
        end = start + size
        if end >= len(text):
            parts.append(Window(start, len(text), first, len(text)))
            return parts
        last = end - margin
        if gap := _last_space(text, max(first + 1, last - margin), last):
            last = gap
        parts.append(Window(start, end, first, last))
        first = last


def _last_space(text: str, start: int, end: int) -> int | None:
    """Returns the position after the last white space in a part of a text."""
    spaces = [match.end() for match in re.finditer(r"\s", text[start:end])]
    return start + spaces[-1] if spaces else None


def detect_in_windows(
    detect: Callable[[list[str]], Iterator[list[MentionSpan]]], texts: Sequence[str], size: int, margin: int
) -> list[list[MentionSpan]]:
    """Finds spans in windows of texts, with a function that cannot read long ones.

    Args:
        detect: Takes texts of at most `size` characters, and yields the spans of each.
        texts (sequence of `str`): T texts.
        size, margin: As in [`windows`].
    """
    spans: list[list[MentionSpan]] = [[] for _ in texts]
    parts = [(number, window) for number, text in enumerate(texts) for window in windows(text, size, margin)]
    pieces = [texts[number][window.start : window.end] for number, window in parts]
    for (number, window), piece_spans in zip(parts, detect(pieces), strict=True):
        for span in piece_spans:
            start = span.start + window.start
            if window.first <= start < window.last:
                spans[number].append(MentionSpan(start, span.end + window.start, span.label, span.score))
    return spans
