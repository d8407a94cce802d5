"""Explains a score by the model's attention to the words of the text and to the patches of the images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_mel.inference.inputs import ModelInputs
from hf_mel.protocols import Explains, LocatesTokens, leaves_out_missing_images
from hf_mel.schema import Row

#: First code point of the scripts that are written without spaces. There, every token is shown as a word.
_FIRST_CJK = 0x2E80


@dataclass
class Explanation:
    """The attention of a model to one mention and one entity.

    Args:
        words (`list[tuple[int, int, float]]`): Words of the text in order, as (start, end, share): characters of the text,
            end exclusive, and share of the attention. Shares sum to less than 1 if the model also attends to other parts
            of its template, such as the repeated mention. Empty if the model does not show its attention to words.
        mention_patches, entity_patches (`list[list[float]]`, *optional*): Shares of the h × w patches of the mention's
            image and of the entity's first image, row by row. `None` without an image, or if the model does not show its
            attention to patches. Both are `None` if the mention has no image and the model leaves out missing images
            ([`~hf_mel.protocols.leaves_out_missing_images`]), because no image has a share in the score then.
    """

    words: list[tuple[int, int, float]]
    mention_patches: list[list[float]] | None = None
    entity_patches: list[list[float]] | None = None


def explain(inputs: ModelInputs, mention: Row, entity: Row) -> Explanation | None:
    """Returns the attention of a model when it scores a mention and an entity.

    Args:
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): A retriever in evaluation mode and its processor.
        mention (row): A mention row whose image is a PIL image or `None`.
        entity (row): An entity row whose images are PIL images.

    Returns:
        [`Explanation`], or `None` if the model does not show its attention ([`~hf_mel.protocols.Explains`]).
    """
    model, processor = inputs.model, inputs.processor
    if not isinstance(model, Explains):
        return None
    with torch.inference_mode():
        attention = model.attention(**inputs.mentions([mention]), **inputs.entities([entity]))
    words: list[tuple[int, int, float]] = []
    if "words" in attention and isinstance(processor, LocatesTokens):
        (spans,) = processor.text_spans([mention])
        words = _word_shares(mention["text"], spans, attention["words"][0, 0].tolist())
    images = {"mention": mention.get("image"), "entity": next(iter(entity.get("images") or ()), None)}
    if images["mention"] is None and leaves_out_missing_images(model):
        images["entity"] = None
    patches = {
        f"{side}_patches": attention[f"{side}_patches"][0].tolist()
        for side, image in images.items()
        if image is not None and f"{side}_patches" in attention
    }
    return Explanation(words, **patches)


def _word_shares(text: str, spans: list[tuple[int, int] | None], shares: list[float]) -> list[tuple[int, int, float]]:
    """Joins the tokens of every word, and returns the words with the sums of the shares."""
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
    """Returns whether the characters before and after a position belong to the same word."""
    left, right = text[position - 1], text[position]
    return left.isalnum() and right.isalnum() and max(ord(left), ord(right)) < _FIRST_CJK
