"""Finds out what a processor reads by comparing its outputs for fixed rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from hf_mel.data.posts import entity_as_post
from hf_mel.protocols import MelProcessor


def sees_images(processor: MelProcessor, *, posts: bool = False) -> bool:
    """Returns whether an image changes the tensors of an entity, or with `posts` those of a post."""
    with_image, without = (entity_side_tensors(processor, image, posts=posts) for image in (probe_image(), None))
    return any(name not in without or not torch.equal(with_image[name], without[name]) for name in with_image)


def sees_images_in_pairs(processor: MelProcessor) -> bool:
    """Returns whether an image changes the tensors of a pair."""

    def tensors(image: Image.Image | None, modality: str) -> Mapping[str, Any]:
        mention: dict[str, Any] = {
            "mention_id": "m",
            "context_id": "c",
            "text": "A b.",
            "mention": "A",
            "start": 0,
            "end": 1,
        }
        mention |= {"mention_type": "", "topic": "", "image": image, "entity_id": "Q0", "candidates": []}
        mention |= {"modality": modality}
        entity: dict[str, Any] = {"entity_id": "Q0", "name": "A", "description": "", "attributes": "", "aliases": []}
        entity |= {"images": [] if image is None else [image]}
        return processor(pairs=[(_EmptyColumns(mention), [_EmptyColumns(entity)])])

    image = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
    for modality in ("text", "image"):  # a document model may read the images of visual mentions only
        with_image, without = tensors(image, modality), tensors(None, modality)
        if with_image.keys() != without.keys() or any(
            with_image[name].shape != without[name].shape or not torch.equal(with_image[name], without[name])
            for name in with_image
        ):
            return True
    return False


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
    return processor(posts=[_EchoColumns(entity_as_post(row)) for row in rows])


def probe_image() -> Image.Image:
    """Returns an image that is not square and differs everywhere, so that size, crop and interpolation all show."""
    channels = [Image.linear_gradient("L").rotate(90 * turn).resize((96, 64)) for turn in range(3)]
    return Image.merge("RGB", channels)


class _EmptyColumns(dict):
    """A row in which every missing column is "", except `image_features`, which is absent."""

    def __missing__(self, column: str) -> str:
        if column == "image_features":
            raise KeyError(column)
        return ""


class _EchoColumns(dict):
    """A row in which every missing column is its name, for templates over columns that only some data sets have."""

    def __missing__(self, column: str) -> str:
        return column
