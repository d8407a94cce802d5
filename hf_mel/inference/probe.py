"""Finds out what a processor reads by comparing its outputs for fixed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from PIL import Image

from hf_mel.data.posts import entity_as_post
from hf_mel.protocols import MelProcessor, post_columns

_EMPTY_ENTITY: dict[str, Any] = {
    "entity_id": "Q0",
    "name": "A",
    "description": "",
    "attributes": "",
    "aliases": [],
    "images": [],
}


def sees_images(processor: MelProcessor, *, posts: bool = False) -> bool:
    """Returns whether an image changes the tensors of an entity, or with `posts` those of a post."""
    with_image, without = (entity_side_tensors(processor, image, posts=posts) for image in (probe_image(), None))
    return any(name not in without or not torch.equal(with_image[name], without[name]) for name in with_image)


def sees_images_in_pairs(processor: MelProcessor) -> bool:
    """Returns whether an image changes the tensors of a pair."""

    def tensors(image: Image.Image | None, modality: str) -> Mapping[str, Any]:
        mention, entity = _pair(modality)
        images = [] if image is None else [image]
        rows = _EmptyColumns(mention | {"image": image}), [_EmptyColumns(entity | {"images": images})]
        return processor(pairs=[rows])

    image = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
    for modality in ("text", "image"):  # a document model may read the images of visual mentions only
        with_image, without = tensors(image, modality), tensors(None, modality)
        if _differ(with_image, without):
            return True
    return False


def unread_columns(processor: MelProcessor, columns: Iterable[str], *, posts: bool = False) -> list[str]:
    """Returns the text columns that change no tensor of an entity, or with `posts` none of a post about it."""

    def tensors(texts: dict[str, Any]) -> Mapping[str, Any]:
        entity = _EchoColumns(_EMPTY_ENTITY | texts)
        if posts:
            return processor(posts=[_EchoColumns(entity_as_post(entity, post_columns(processor)))])
        return processor(entities=[entity])

    return _unread(tensors, columns)


def unread_columns_in_pairs(processor: MelProcessor, columns: Iterable[str]) -> list[str]:
    """Returns the text columns of a candidate that change no tensor of a pair."""

    def tensors(texts: dict[str, Any]) -> Mapping[str, Any]:
        mention, entity = _pair("text")
        return processor(pairs=[(_EmptyColumns(mention), [_EmptyColumns(entity | texts)])])

    return _unread(tensors, columns)


def _unread(tensors: Callable[[dict[str, Any]], Mapping[str, Any]], columns: Iterable[str]) -> list[str]:
    """Returns the columns of an entity that change no tensor when they are filled."""
    without = tensors({})
    # A processor may leave out words that it does not know, so the text has several common ones.
    text = "a the of in and 1 city king"
    return [
        column
        for column in columns
        if not _differ(tensors({column: [text] if column == "aliases" else text}), without)
    ]


def _differ(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Returns whether two outputs of a processor differ."""
    return first.keys() != second.keys() or any(
        first[name].shape != second[name].shape or not torch.equal(first[name], second[name]) for name in first
    )


def _pair(modality: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a mention and an entity without images."""
    mention: dict[str, Any] = {
        "mention_id": "m",
        "context_id": "c",
        "text": "A b.",
        "mention": "A",
        "start": 0,
        "end": 1,
    }
    mention |= {"mention_type": "", "topic": "", "image": None, "entity_id": "Q0", "candidates": []}
    return mention | {"modality": modality}, dict(_EMPTY_ENTITY)


def entity_side_tensors(
    processor: Any, image: Image.Image | None, *, posts: bool = False
) -> Mapping[str, torch.Tensor]:
    """Returns the processor's tensors of two fixed entities with this image, or with `posts` of two fixed posts.

    Knowledge bases record a digest of these tensors, so the rows must not change.
    """
    full = {
        "entity_id": "Q0",
        "name": "Añó Nuevo (海岛), the 2nd",
        "description": "a place that is not there",
        "attributes": "Sort: island. Area: 12.5 km². " + "Neighbour: none. " * 40,
        "aliases": ["New Year's Isle"],
        "images": [] if image is None else [image],
    }
    rows = [_EchoColumns(full), _EchoColumns(full | {"name": "", "description": "", "attributes": "", "aliases": []})]
    if not posts:
        return processor(entities=rows)
    return processor(posts=[_EchoColumns(entity_as_post(row, post_columns(processor))) for row in rows])


def probe_image() -> Image.Image:
    """Returns an image that is not square and differs everywhere, so that size, crop and interpolation all show."""
    channels = [Image.linear_gradient("L").rotate(90 * turn).resize((96, 64)) for turn in range(3)]
    return Image.merge("RGB", channels)


#: Columns that the library computes and adds to rows. A processor asks whether they are there.
_COMPUTED = frozenset({"image_features", "features", "prototypes", "list_score"})


class _EmptyColumns(dict):
    """A row in which every missing column is "". It has all columns but those that the library computes."""

    def __missing__(self, column: str) -> str:
        if column == "image_features":
            raise KeyError(column)
        return ""

    def __contains__(self, column: object) -> bool:
        # A processor may check that its template's columns are there.
        return super().__contains__(column) or column not in _COMPUTED


class _EchoColumns(dict):
    """A row in which every missing column is its name, for templates over columns that only some data sets have."""

    def __missing__(self, column: str) -> str:
        return column
