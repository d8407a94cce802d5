"""Annotating texts: the mentions of a text are found, and linked together."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hf_mel.data.images import open_image
from hf_mel.detection.spans import MentionDetector, MentionSpan, checked_spans
from hf_mel.errors import DataFormatError, SpanError
from hf_mel.linking.mentions import check_characters
from hf_mel.linking.results import LinkResult
from hf_mel.schema import NIL

#: A text to annotate: a string, or a mapping with `text`, and optionally `image` and `spans`.
TextLike = str | Mapping[str, Any]

_EXAMPLE = '{"text": "Swift on stage.", "image": "photo.jpg"}'
#: Texts that are annotated together. They are many, so that few passes over the knowledge base are made, but their pictures
#: are in memory together, and an interrupted run loses the work of a batch.
_TEXTS_PER_BATCH, _IMAGES_PER_BATCH, _CHARACTERS_PER_BATCH = 512, 64, 1 << 16
#: Mentions per pass over the knowledge base. A reranker reads the images of all of their candidates.
_MENTIONS_PER_PASS, _MENTIONS_PER_PASS_OF_RERANKER = 256, 32
#: A mention is linked in at most so many characters around it, and in fewer if the model does not read them.
_MAX_CONTEXT, _MIN_CONTEXT = 4_000, 200


@dataclass
class AnnotatedMention:
    """A mention that was found in a text, and the entity that it is linked to.

    Args:
        start, end (`int`): Characters of the mention in the text, end exclusive.
        mention (`str`): Its words, as in the text.
        label (`str`): The kind of thing that it names, in the words of the detector. May be empty.
        detection_score (`float`, *optional*): How sure the detector is. `None` if it does not say.
        link ([`~hf_mel.linking.results.LinkResult`], *optional*): Candidates, scores and decision. `None` if it was not linked.
    """

    start: int
    end: int
    mention: str
    label: str = ""
    detection_score: float | None = None
    link: LinkResult | None = None

    @property
    def entity_id(self) -> str | None:
        """Id of the entity; "NIL" if the knowledge base does not hold it; `None` if the mention was not linked, for instance
        because the link is not sure enough for the precision of the linker.
        """
        return None if self.link is None else self.link.entity_id

    @property
    def name(self) -> str | None:
        """Name of the entity that it is linked to; `None` if it is NIL, or was not linked."""
        return None if self.link is None or self.entity_id in (None, NIL) else self.link.best.name

    @property
    def score(self) -> float | None:
        """Score of the best candidate, also if the mention is NIL; `None` if it was not linked."""
        return None if self.link is None else self.link.best.score

    def to_dict(self) -> dict[str, Any]:
        """Returns the mention as plain data for JSON, with the fields of its `link`. If it was not linked, `entity_id` is
        `None`, and there are no candidates.
        """
        found = {"start": self.start, "end": self.end, "mention": self.mention, "label": self.label}
        linked = {"entity_id": None, "candidates": []} if self.link is None else self.link.to_dict()
        return {
            **found,
            "detection_score": self.detection_score,
            **{k: v for k, v in linked.items() if k not in found},
        }


@dataclass
class AnnotatedText:
    """A text with its mentions, in the order of the text.

    Args:
        text (`str`): The text.
        mentions (`list[AnnotatedMention]`): Its mentions.
        warnings (`list[str]`): Sentences for the user, for instance that no mention was found.
    """

    text: str
    mentions: list[AnnotatedMention] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.mentions)

    def __iter__(self) -> Iterator[AnnotatedMention]:
        return iter(self.mentions)

    def to_dict(self) -> dict[str, Any]:
        """Returns text, mentions and warnings as plain data for JSON."""
        mentions = [mention.to_dict() for mention in self.mentions]
        return {"text": self.text, "mentions": mentions, "warnings": self.warnings}


def check_text(text: TextLike, row: int | str | None = None) -> None:
    """Checks a text to annotate and its spans, if it has some.

    Args:
        text (`str` or mapping): The text, as in [`~hf_mel.EntityLinker.annotate`].
        row (`int` or `str`, *optional*): Its position in a list or file, for error messages.

    Raises:
        DataFormatError: It has no valid `text`, or a value has the wrong type.
        SpanError: A span is not in the text.
    """
    content = {"text": text} if isinstance(text, str) else text
    if not isinstance(content, Mapping) or not isinstance(content.get("text"), str):
        raise DataFormatError("The text is missing or no string.", row=row, remedy=f"Give a string, or {_EXAMPLE}.")
    check_characters(content["text"], row)
    spans = content.get("spans")
    if spans is None:
        return
    if isinstance(spans, str) or not isinstance(spans, Sequence):
        raise DataFormatError(
            f"spans={spans!r} is no list.",
            row=row,
            remedy="Give the start and end of each mention: [[0, 5], [12, 20]].",
        )
    checked_spans(content["text"], spans, overlapping=True, row=row)


def annotate_batches(
    linker: Any,
    texts: Sequence[TextLike],
    detector: MentionDetector,
    *,
    overlapping: bool = False,
    top_k: int = 5,
    batch_size: int | None = None,
    done: Container[int] = (),
) -> Iterator[tuple[list[int], list[AnnotatedText]]]:
    """Annotates texts batch by batch, so that results can be kept as they come.

    Args:
        linker ([`~hf_mel.EntityLinker`]): The linker.
        texts, detector, overlapping, top_k, batch_size: As in [`~hf_mel.EntityLinker.annotate`]. All texts are checked
            first.
        done (container of `int`): Positions of texts that need no result.

    Yields:
        `tuple[list[int], list[AnnotatedText]]`: Positions of the texts of a batch, in their order, and their results.

    Raises:
        As in [`~hf_mel.EntityLinker.annotate`].
    """
    for number, text in enumerate(texts):
        check_text(text, number)
    if batch_size is None:
        batch_size = _MENTIONS_PER_PASS if linker.reranker is None else _MENTIONS_PER_PASS_OF_RERANKER
    for batch, contents in _batches(texts, done):
        spans = _find_spans(contents, batch, detector, overlapping)
        yield batch, _link_spans(linker, contents, batch, spans, top_k, batch_size)


def _batches(texts: Sequence[TextLike], done: Container[int]) -> Iterator[tuple[list[int], list[Mapping[str, Any]]]]:
    """Yields the positions and the contents of the texts of each batch."""
    batch: list[int] = []
    contents: list[Mapping[str, Any]] = []
    total, limits = np.zeros(3), (_TEXTS_PER_BATCH, _IMAGES_PER_BATCH, _CHARACTERS_PER_BATCH)
    for number, text in enumerate(texts):
        if number in done:
            continue
        content = {"text": text} if isinstance(text, str) else text
        size = np.array([1, content.get("image") is not None, len(content["text"])])
        if batch and (total + size > limits).any():
            yield batch, contents
            batch, contents, total = [], [], np.zeros(3)
        batch.append(number)
        contents.append(content)
        total = total + size
    if batch:
        yield batch, contents


def _find_spans(
    contents: list[Mapping[str, Any]], batch: list[int], detector: MentionDetector, overlapping: bool
) -> list[list[MentionSpan]]:
    """Returns the spans of each text: its own ones, or those of the detector."""
    asked = [k for k, content in enumerate(contents) if content.get("spans") is None]
    texts = [contents[k]["text"] for k in asked]
    find: Any = getattr(detector, "with_overlaps", detector) if overlapping else detector
    detected: Any = find(texts) if texts else []
    is_list = isinstance(detected, Iterable)
    detected = list(detected) if is_list else []
    if len(detected) != len(texts) or not all(isinstance(spans, Iterable) for spans in detected):
        answer = f"spans of {len(detected)} texts" if is_list else "no list"
        raise SpanError(
            f"The detector returned {answer} for {len(texts)} texts.",
            remedy="Return one list of spans for each text.",
        )
    given: list[Any] = [content.get("spans") for content in contents]
    for k, spans in zip(asked, detected, strict=True):
        given[k] = spans
    checked = []
    for k, spans in enumerate(given):
        try:
            checked.append(checked_spans(contents[k]["text"], spans, overlapping=overlapping, row=batch[k]))
        except SpanError as error:
            culprit = f"The detector {type(detector).__name__} returned what is no mention. " if k in asked else ""
            raise error.changed(message=culprit + error.message) from error
    return checked


def _link_spans(
    linker: Any,
    contents: list[Mapping[str, Any]],
    batch: list[int],
    spans: list[list[MentionSpan]],
    top_k: int,
    batch_size: int,
) -> list[AnnotatedText]:
    """Links the spans of a batch of texts."""
    rows: list[dict[str, Any]] = []
    shifts: list[int] = []
    contexts = _contexts(linker, [content["text"] for content in contents], spans)
    for content, number, spans_of_text, contexts_of_text in zip(contents, batch, spans, contexts, strict=True):
        text = content["text"]
        image = content.get("image")
        if image is not None:
            image = open_image(image, row=number)  # once for all mentions of the text
        for span, (first, last) in zip(spans_of_text, contexts_of_text, strict=True):
            key = f"{number} {first} {last}"
            rows.append(
                {
                    "text": text[first:last],
                    "start": span.start - first,
                    "end": span.end - first,
                    "image": image,
                    "context_id": key,
                    "document_id": key,
                }
            )
            shifts.append(first)
    links: list[Any] = [None] * len(rows)
    for positions, results in linker.link_batches(rows, top_k=top_k, batch_size=batch_size):
        for position, result in zip(positions, results, strict=True):
            shift = shifts[position]
            links[position] = replace(result, start=result.start + shift, end=result.end + shift)
    annotated, remaining = [], iter(links)
    for content, spans_of_text in zip(contents, spans, strict=True):
        text = content["text"]
        mentions = [
            AnnotatedMention(
                span.start, span.end, text[span.start : span.end], span.label, span.score, next(remaining)
            )
            for span in spans_of_text
        ]
        warnings = [] if mentions else ["No mention was found." if text.strip() else "The text is empty."]
        annotated.append(AnnotatedText(text, mentions, warnings))
    return annotated


def _contexts(linker: Any, texts: list[str], spans: list[list[MentionSpan]]) -> list[list[tuple[int, int]]]:
    """Returns the part of its text in which each mention of each text is linked.

    It is the whole text if the model reads each mention in it. A longer text is cut into windows, which overlap by half.
    Each mention is linked in the one in whose middle it stands, together with the others of that window. The windows are
    halved until the model reads the last mention of each.
    """
    contexts: list[list[tuple[int, int]]] = [[] for _ in texts]
    sizes = [max(len(text), 1) if len(text) <= _MAX_CONTEXT else _MAX_CONTEXT for text in texts]
    left = [number for number, spans_of_text in enumerate(spans) if spans_of_text]
    while left:
        windows, last_mentions, numbers = [], [], []
        for number in left:
            contexts[number] = [_window(texts[number], span, sizes[number]) for span in spans[number]]
            for (first, last), span in dict(zip(contexts[number], spans[number], strict=True)).items():
                windows.append(texts[number][first:last])
                last_mentions.append((span.start - first, span.end - first))
                numbers.append(number)
        is_read = linker.reads_mentions(windows, last_mentions)
        unread = {number for number, read in zip(numbers, is_read, strict=True) if not read}
        left = [number for number in left if number in unread and sizes[number] > _MIN_CONTEXT]
        for number in left:
            sizes[number] = max(sizes[number] // 2, _MIN_CONTEXT)
    return contexts


def _window(text: str, span: MentionSpan, size: int) -> tuple[int, int]:
    """Returns the window of a text in whose middle a mention stands."""
    if len(text) <= size:
        return 0, len(text)
    step = size // 2
    start = max(0, round((span.start + span.end) / 2 / step) - 1) * step
    start = min(start, len(text) - step)
    return min(start, span.start), max(min(start + size, len(text)), span.end)
