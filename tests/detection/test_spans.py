"""Spans: checks, overlaps and windows."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_mel.detection.spans import (
    MentionDetector,
    MentionSpan,
    checked_spans,
    detect_in_windows,
    read_span,
    resolve_overlaps,
    windows,
)
from hf_mel.errors import SpanError

SPANS = st.builds(
    lambda start, length, score: MentionSpan(start, start + length, score=score),
    st.integers(0, 12),
    st.integers(1, 6),
    st.sampled_from([None, 0.25, 0.5]),
)


def plain_overlaps(spans):
    """The stated rule, in words: take the best span, drop all that overlap it, repeat."""
    kept, left = [], list(spans)
    while left:
        best = min(
            left, key=lambda s: (-(s.end - s.start), -(s.score if s.score is not None else -9), s.start, left.index(s))
        )
        kept.append(best)
        left = [s for s in left if s.end <= best.start or s.start >= best.end]
    return sorted(kept, key=lambda s: s.start)


@given(st.lists(SPANS, max_size=8))
def test_overlaps_follow_the_stated_rule(spans):
    assert resolve_overlaps(spans) == plain_overlaps(spans)


def test_the_longest_span_is_kept_then_the_surest():
    york, times, square = MentionSpan(0, 8), MentionSpan(0, 14), MentionSpan(9, 21, score=1.0)
    assert resolve_overlaps([york, times, square]) == [times]
    weak, sure = MentionSpan(0, 4, "a", 0.2), MentionSpan(2, 6, "b", 0.9)
    assert resolve_overlaps([weak, sure]) == [sure]


def test_overlapping_spans_can_be_kept_once_each():
    spans = [[4, 8], [0, 8], {"start": 0, "end": 8, "label": None}]
    assert checked_spans("New York", spans, overlapping=True) == [MentionSpan(0, 8), MentionSpan(4, 8)]


def test_white_space_at_the_edges_is_no_part_of_a_mention():
    assert checked_spans("in  Oslo \n", [(2, 10)], overlapping=False) == [MentionSpan(4, 8)]


@pytest.mark.parametrize("span", [(-1, 2), (0, 9), (2, 2), (3, 1), (4, 5), (0.0, 2), (True, 2)])
def test_a_span_outside_the_text_is_named(span):
    with pytest.raises(SpanError, match="holds no mention in a text of 8 characters") as error:
        checked_spans("Oslo won", [span], overlapping=False, row=7)
    assert error.value.row == 7


@pytest.mark.parametrize("value", [3, "Oslo", [1], [1, 2, 3], {"start": 1}, None])
def test_what_is_no_span_is_named(value):
    with pytest.raises(SpanError, match="no span"):
        read_span(value)


def test_a_function_is_a_detector():
    assert isinstance(lambda texts: [[] for _ in texts], MentionDetector)


def words(pieces):
    for piece in pieces:
        yield [MentionSpan(*match.span(), match.group()) for match in re.finditer(r"\w+", piece)]


@given(st.lists(st.text("abé 中\n.", max_size=60), max_size=3), st.integers(21, 40))
def test_windows_give_the_spans_of_the_whole_text(texts, size):
    margin = 10
    short = [re.sub(r"(\w{9})", r"\1 ", text) for text in texts]  # no word is longer than the margin
    assert detect_in_windows(words, short, size, margin) == list(words(short))


@given(st.text("ab \n", max_size=200), st.integers(21, 50))
def test_windows_cover_a_text_once(text, size):
    parts = windows(text, size, 10)
    assert "".join(text[part.first : part.last] for part in parts) == text
    assert all(part.end - part.start <= size and part.start <= part.first < max(part.last, 1) for part in parts)


def test_a_text_without_a_space_is_windowed():
    parts = windows("x" * 1000, 100, 20)
    assert [(part.first, part.last) for part in parts][:2] == [(0, 80), (80, 140)]
    assert parts[-1].last == 1000
