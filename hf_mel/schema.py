"""The rows of a data set: columns of mentions, entities and posts, and NIL.

A *mention* is a surface form in a text with an optional image. Its *gold* is the id of an entity of a *knowledge base*,
or [`NIL`] if the knowledge base does not hold the entity. Scores are always higher-is-better.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import datasets

#: The gold (and the prediction) of a mention whose entity is not in the knowledge base.
NIL = "NIL"

#: `start` and `end` of a mention whose position in the text the release does not give.
NO_SPAN = -1


def threshold_in_json(threshold: float | None) -> float | None:
    """Returns a NIL threshold as JSON can express it: an infinite one becomes the nearest float, which decides alike."""
    return None if threshold is None else max(-sys.float_info.max, min(threshold, sys.float_info.max))


def mention_features(**extra: Any) -> datasets.Features:
    """Returns the columns of the `mentions` configuration, which has one row per mention.

    - `mention_id` (`str`): unique in the data set.
    - `context_id` (`str`): shared by the mentions of one text.
    - `text` (`str`): the whole text; `mention` (`str`): the surface form.
    - `start`, `end` (`int`): character offsets of the mention in `text`, end exclusive; [`NO_SPAN`] if unknown.
    - `mention_type`, `topic` (`str`): empty if the release has none.
    - `image` (`Image` or `None`): the image of the context.
    - `entity_id` (`str`): the gold, or [`NIL`].
    - `candidates` (list of `str`): entity ids that the release ships for this mention; may be empty.

    Some data sets have more columns:

    - `document_id` (`str`): shared by the mentions of one document, which may have several texts and images.
    - `modality` (`str`): "text", or "image" for a visual mention, whose `text` and `mention` are empty and whose `image`
      shows its gold. Without this column, every mention is textual.
    - `candidate_priors` (list of `float`): p(e|m) of each of `candidates`.

    Args:
        extra: Further columns of one data set, for instance FlagsMEL's `stratum`.
    """
    return datasets.Features(
        {
            "mention_id": datasets.Value("string"),
            "context_id": datasets.Value("string"),
            "text": datasets.Value("string"),
            "mention": datasets.Value("string"),
            "start": datasets.Value("int32"),
            "end": datasets.Value("int32"),
            "mention_type": datasets.Value("string"),
            "topic": datasets.Value("string"),
            "image": datasets.Image(),
            "entity_id": datasets.Value("string"),
            "candidates": [datasets.Value("string")],
            **extra,
        }
    )


#: The columns of an entity that tell it from its namesakes. They may be empty.
DESCRIBING_COLUMNS = ("aliases", "description", "attributes")


def entity_features(**extra: Any) -> datasets.Features:
    """Returns the columns of the `entities` configuration, which has one row per entity of the knowledge base.

    - `entity_id` (`str`): unique; a Wikidata QID if the release has one.
    - `name` (`str`), `description` (`str`), `aliases` (list of `str`).
    - `attributes` (`str`): facts in the releases' form "Key: value. Key: value."; may be empty.
    - `images` (list of `Image`): zero or more; evaluation uses the first.
    """
    return datasets.Features(
        {
            "entity_id": datasets.Value("string"),
            "name": datasets.Value("string"),
            "description": datasets.Value("string"),
            "attributes": datasets.Value("string"),
            "aliases": [datasets.Value("string")],
            "images": [datasets.Image()],
            **extra,
        }
    )


def post_features(**extra: Any) -> datasets.Features:
    """Returns the columns of the `posts` configuration: texts and images about (or by) an entity.

    `post_id` (`str`), `entity_id` (`str`), `text` (`str`), `image` (`Image` or `None`).
    """
    return datasets.Features(
        {
            "post_id": datasets.Value("string"),
            "entity_id": datasets.Value("string"),
            "text": datasets.Value("string"),
            "image": datasets.Image(),
            **extra,
        }
    )


#: A row of `mentions`, `entities` or `posts`, as `datasets` yields it.
Row = Mapping[str, Any]
