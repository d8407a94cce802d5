"""Caches encoded images, so that each distinct image is encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import torch
from PIL import Image
from tqdm.auto import tqdm

from hf_mel.data.images import open_image
from hf_mel.data.lazy_rows import LazyRow, LazyRows
from hf_mel.inference.execution import evaluation_mode
from hf_mel.inference.features.row_features import RowFeatures, with_column
from hf_mel.inference.probe import sees_images_in_pairs
from hf_mel.protocols import EncodesImages, OpensImages, images_per_entity
from hf_mel.schema import Row

#: Images per forward pass.
_BATCH_SIZE = 32


class ImageFeatures(RowFeatures):
    """Features of the images of rows, encoded once for each distinct image.

    Args:
        model ([`~hf_mel.protocols.EncodesImages`]): Encodes images.
        processor ([`~hf_mel.protocols.OpensImages`]): Makes pixel values of images.
    """

    def __init__(self, model: Any, processor: Any):
        super().__init__(model, processor)
        self.images_per_entity = images_per_entity(processor)
        self._cache: dict[str, torch.Tensor] = {}
        self._mention_keys: set[str] = set()

    @classmethod
    def for_model(cls, model: Any, processor: Any) -> ImageFeatures | None:
        """Returns the features of a model that encodes images apart from texts, with a processor that reads images;
        otherwise `None`.
        """
        supported = isinstance(model, EncodesImages) and isinstance(processor, OpensImages)
        return cls(model, processor) if supported and sees_images_in_pairs(processor) else None

    def precompute(self, rows: datasets.Dataset, *, progress: bool = False) -> None:
        """Encodes every image of the rows that a batch may show.

        With a processor that reads one image per entity these are all images of an entity, because training draws one.
        """
        lazy, is_entity = LazyRows(rows), "images" in rows.column_names
        limit = None if self.images_per_entity == 1 else self.images_per_entity
        bar = tqdm(range(0, len(rows), _BATCH_SIZE), desc="Encoding images", delay=1, disable=not progress)
        for first in bar:
            for row in lazy.__getitems__(list(range(first, min(first + _BATCH_SIZE, len(rows))))):
                count = len((row.undecoded("images") or ())[:limit]) if is_entity else 0
                self.attach([row.with_image("images", k) for k in range(count)] if is_entity else [row])

    def attach(self, rows: Iterable[Row]) -> list[Row]:
        """Returns the rows, each with `image_features`: a tensor [d], or `None` for a row without an image.

        For a processor that reads several images of an entity, an entity with k > 1 images gets a tensor [k, d]. Images
        that are not cached yet are encoded now.
        """
        rows = list(rows)
        keys: list[list[str]] = []
        missing: dict[str, Image.Image | Mapping[str, Any]] = {}
        row_ids: dict[str, str | None] = {}
        for row in rows:
            images = _stored_images(row, self.images_per_entity)
            keys.append([_image_key(image) for image in images])
            for key, image in zip(keys[-1], images, strict=True):
                if key not in self._cache and key not in missing:
                    missing[key], row_ids[key] = image, row.get("mention_id") or row.get("entity_id")
                    if "mention" in row:
                        self._mention_keys.add(key)
        for first in range(0, len(missing), _BATCH_SIZE):
            batch = list(missing)[first : first + _BATCH_SIZE]
            opened = [open_image(missing[key], row=row_ids[key]) for key in batch]
            for key, features in zip(batch, self._encode(opened), strict=True):
                self._cache[key] = features
        return [
            with_column(row, "image_features", self._features(row_keys))
            for row_keys, row in zip(keys, rows, strict=True)
        ]

    def forget_mentions(self) -> None:
        """Drops the images that only mentions have shown. Images of entities recur, images of mentions rarely do."""
        for key in self._mention_keys:
            del self._cache[key]
        self._mention_keys.clear()

    def _features(self, keys: list[str]) -> torch.Tensor | None:
        if len(keys) < 2:
            return self._cache[keys[0]] if keys else None
        return torch.stack([self._cache[key] for key in keys])

    def _encode(self, images: list[Image.Image]) -> torch.Tensor:
        with evaluation_mode(self.model), torch.no_grad():
            pixels = self.processor.images(images)
            if isinstance(pixels, Mapping):
                pixels = pixels["pixel_values"]
            return self.model.encode_images(pixels.to(self.model.device, self.model.dtype)).float().cpu()


def _stored_images(row: Row, count: int | None) -> list[Image.Image | Mapping[str, Any]]:
    """Returns the image of a mention, or the first `count` images of an entity, without decoding them."""
    undecoded = row.undecoded if isinstance(row, LazyRow) else row.__getitem__
    # A text column tells the kind of row; looking at an image column would decode the image.
    images = [undecoded("image")] if "mention" in row else (undecoded("images") or [])[:count]
    return [image for image in images if image is not None]


def _image_key(image: Image.Image | Mapping[str, Any]) -> str:
    """Returns the cache key of an image: a digest of its bytes or pixels, or its path."""
    if isinstance(image, Mapping):
        content = image.get("bytes")
        return str(image["path"]) if content is None else hashlib.sha256(content).hexdigest()
    pixels = open_image(image)
    return hashlib.sha256(f"{pixels.mode} {pixels.size}".encode() + pixels.tobytes()).hexdigest()
