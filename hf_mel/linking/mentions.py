"""Mentions to link: which fields they have, and where they stand in their texts."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from typing import Any

from hf_mel.errors import DataFormatError, SpanError
from hf_mel.row_files import other_unicode_form
from hf_mel.schema import NO_SPAN

#: A mention to link. A textual mention has a `text`, its position as `mention`, as `start` and `end`, or as all three, and
#: optionally an `image`. A visual mention, which only a reranker of documents reads, has the `modality` "image" and an
#: `image`. Mentions of one document share a `document_id`.
MentionLike = Mapping[str, Any]

_EXAMPLE = '{"text": "Swift on stage.", "mention": "Swift"}'
#: Columns of the schema that a mention to link may lack, and their values then.
MENTION_DEFAULTS = {
    "mention_id": "",
    "context_id": "",
    "mention_type": "",
    "topic": "",
    "image": None,
    "candidates": (),
}


def context_key(mention: MentionLike) -> Any:
    """Returns a key that is equal for the mentions of one context."""
    if mention.get("context_id"):
        return mention["context_id"]
    image = mention.get("image")
    return mention.get("text"), image if isinstance(image, str | os.PathLike | bytes | None) else id(image)


def locate_mention(mention: MentionLike, row: int | str | None = None) -> tuple[str, int, int]:
    """Checks a mention, and returns its surface form, start and end.

    Args:
        mention (mapping): The mention.
        row (`int` or `str`, *optional*): Its position in a list or file, for error messages.

    Raises:
        SpanError: The mention is empty, not in its text, or not at its offsets.
        DataFormatError: It is no mapping, or a field is missing, of another type, or no valid text.
    """
    if not isinstance(mention, Mapping):
        raise DataFormatError(
            f"The mention is a {type(mention).__name__} instead of a mapping.", row=row, remedy=f"Give {_EXAMPLE}."
        )
    visual = mention.get("modality") == "image"
    for key in ("text", "mention"):
        value = mention.get(key)
        if value is None and key == "text" and not visual:
            raise DataFormatError("The mention has no text=.", row=row, remedy=f"Give {_EXAMPLE}.")
        if value is not None and not isinstance(value, str):
            raise DataFormatError(f"{key}={value!r} is not a string.", row=row, remedy=f"Give {_EXAMPLE}.")
        check_characters(value or "", row)
    if visual:
        if mention.get("image") is None:
            raise DataFormatError("The visual mention has no image=.", row=row, remedy="Give its picture as image=.")
        return "", NO_SPAN, NO_SPAN
    text: str = mention["text"]
    surface: Any = mention.get("mention")
    start, end = _offset(mention, "start", row), _offset(mention, "end", row)
    if surface is None and start is None and end is None:
        raise SpanError(
            "Nothing says where the mention is in its text.", row=row, remedy=f"Give {_EXAMPLE}, or start= and end=."
        )
    if surface is not None and not surface.strip():
        raise SpanError("mention= is empty.", row=row, remedy="Give the words of the text that name the entity.")
    if start is None or end is None:
        if start is not None or end is not None:
            raise SpanError(
                f"{'end' if end is None else 'start'}= is missing.",
                row=row,
                remedy="Give start= and end=, or neither.",
            )
        start = text.find(surface)
        end = start + len(surface)
        if start < 0:
            raise SpanError(
                f"The mention {_quote(surface)} is not in its text.", row=row, remedy=_find_remedy(text, surface)
            )
    elif start == end == NO_SPAN and surface is not None:
        pass  # a mention that is not located
    elif not (0 <= start < end <= len(text)) or (surface is None and not text[start:end].strip()):
        raise SpanError(
            f"start={start}, end={end} holds no mention in a text of {len(text)} characters.",
            row=row,
            remedy="Count characters from 0; end= is the first character after the mention.",
        )
    elif surface is not None and text[start:end] != surface:
        raise SpanError(
            f"The text at start={start}, end={end} is {_quote(text[start:end])}, not {_quote(surface)}.",
            row=row,
            remedy="Count characters from 0; end= is the first character after the mention. Or leave out both, to link "
            "the first occurrence.",
        )
    return text[start:end] if surface is None else surface, start, end


def check_characters(text: str, row: int | str | None = None) -> None:
    """Checks that a text can be encoded, because tokenizers cannot read others.

    Raises:
        DataFormatError: It has half of a surrogate pair, as texts have that were cut between two UTF-16 units.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataFormatError(
            f"Character {error.start} of the text is {text[error.start]!r}, half of a surrogate pair.",
            row=row,
            remedy='Join or replace the halves: text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").',
        ) from None


def _offset(mention: MentionLike, key: str, row: int | str | None) -> int | None:
    """Returns `start` or `end` of a mention, which may be any integer type, such as NumPy's."""
    value = mention.get(key)
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise DataFormatError(
            f"{key}={value!r} is not an integer.", row=row, remedy="Count the characters of the text from 0."
        ) from None


def _find_remedy(text: str, surface: str) -> str:
    """Returns what to do about a mention that its text does not contain."""
    if remedy := other_unicode_form(text, surface):
        return remedy
    if surface.casefold() in text.casefold():
        return "Write it exactly as in the text: upper and lower case differ."
    return "Write it exactly as in the text."


def _quote(text: str) -> str:
    """Returns the text in quotes, shortened to 40 characters."""
    return repr(text if len(text) <= 40 else text[:39] + "…")
