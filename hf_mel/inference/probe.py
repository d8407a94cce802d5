"""hf_mel.inference.probe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from hf_mel.data.posts import entity_as_post
from hf_mel.protocols import MelProcessor


def sees_images_in_pairs(processor: MelProcessor) -> bool:
    """Whether an image changes the tensors of a pair: false for a text-only processor."""

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

    picture = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
    for modality in ("text", "image"):  # a document model may look at the images of visual mentions alone
        seen, blind = tensors(picture, modality), tensors(None, modality)
        if seen.keys() != blind.keys() or any(
            seen[name].shape != blind[name].shape or not torch.equal(seen[name], blind[name]) for name in seen
        ):
            return True
    return False


class _EmptyColumns(dict):
    """A row that has every column of any data set, empty. Its image features are those of nobody: it has none."""

    def __missing__(self, column: str) -> str:
        if column == "image_features":
            raise KeyError(column)
        return ""


def sees_images(processor: MelProcessor, *, posts: bool = False) -> bool:
    """Whether an image changes the tensors of an entity, or of a post: false for a text-only processor."""
    with_image, without = (_probe(processor, image, posts) for image in (_image(), None))
    return any(name not in without or not torch.equal(with_image[name], without[name]) for name in with_image)


class _AnyColumn(dict):
    """A row that has every column, for templates over columns of one data set."""

    def __missing__(self, column: str) -> str:
        return column


def _probe(processor: Any, image: Image.Image | None, posts: bool) -> Mapping[str, torch.Tensor]:
    rows = _probe_rows(image)
    if not posts:
        return processor(entities=rows)
    return processor(posts=[_AnyColumn(entity_as_post(row)) for row in rows])


def _probe_rows(image: Image.Image | None) -> list[_AnyColumn]:
    full = {
        "entity_id": "Q0",
        "name": "Añó Nuevo (海岛), the 2nd",
        "description": "a place that is not there",
        "attributes": "Sort: island. Area: 12.5 km². " + "Neighbour: none. " * 40,
        "aliases": ["New Year's Isle"],
        "images": [] if image is None else [image],
    }
    return [_AnyColumn(full), _AnyColumn(full | {"name": "", "description": "", "attributes": "", "aliases": []})]


def _image() -> Image.Image:
    # Not square, and different everywhere, so that size, crop and interpolation all show.
    channels = [Image.linear_gradient("L").rotate(90 * turn).resize((96, 64)) for turn in range(3)]
    return Image.merge("RGB", channels)
