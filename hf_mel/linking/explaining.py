"""Where a model looked: the words of the text and the parts of the images that a pair's score rests on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_mel.inference.inputs import ModelInputs
from hf_mel.protocols import Explains, LocatesTokens
from hf_mel.schema import Row

#: From here on, scripts are written without spaces, and each token is a word of its own.
_FIRST_CJK = 0x2E80


@dataclass
class Explanation:
    """What one entity's score rests on, as far as the model tells.

    Args:
        words (`list[tuple[int, int, float]]`): Words of the text as (start, end, share): characters of the text, end
            exclusive, and the share of the model's attention, in order. What is missing from 1 went to other words of
            the template, for instance the repeated mention. Empty if the model attends to no words.
        mention_patches, entity_patches (`list[list[float]]`, *optional*): Share of each of h × w patches of the
            mention's image and of the entity's first image, by rows; `None` without an image, or if the model attends
            to no patches.
    """

    words: list[tuple[int, int, float]]
    mention_patches: list[list[float]] | None = None
    entity_patches: list[list[float]] | None = None


def explain(inputs: ModelInputs, mention: Row, entity: Row) -> Explanation | None:
    """Where the model looked when it scored this mention against this entity.

    Args:
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): A retriever in evaluation mode and its processor.
        mention (row): A row of `mentions`, its image a PIL image or `None`.
        entity (row): A row of `entities`, its images PIL images.

    Returns:
        [`Explanation`], or `None` if the model has no `attention` to show.
    """
    model, processor = inputs.model, inputs.processor
    if not isinstance(model, Explains):
        return None
    with torch.inference_mode():
        found = model.attention(**inputs.mentions([mention]), **inputs.entities([entity]))
    words: list[tuple[int, int, float]] = []
    if "words" in found and isinstance(processor, LocatesTokens):
        (spans,) = processor.text_spans([mention])
        words = _words(mention["text"], spans, found["words"][0, 0].tolist())
    images = {"mention": mention.get("image"), "entity": next(iter(entity.get("images") or ()), None)}
    patches = {
        f"{side}_patches": found[f"{side}_patches"][0].tolist()
        for side, image in images.items()
        if image is not None and f"{side}_patches" in found
    }
    return Explanation(words, **patches)


def _words(text: str, spans: list[tuple[int, int] | None], shares: list[float]) -> list[tuple[int, int, float]]:
    """Tokens that are pieces of one word put together, their shares added."""
    words: list[tuple[int, int, float]] = []
    for span, share in zip(spans, shares, strict=True):
        if span is None:
            continue
        start, end = span
        if words and words[-1][1] == start and _inside_word(text, start):
            words[-1] = (words[-1][0], end, words[-1][2] + share)
        else:
            words.append((start, end, share))
    return words


def _inside_word(text: str, position: int) -> bool:
    left, right = text[position - 1], text[position]
    return left.isalnum() and right.isalnum() and max(ord(left), ord(right)) < _FIRST_CJK
