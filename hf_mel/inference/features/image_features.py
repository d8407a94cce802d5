"""hf_mel.inference.features.image_features."""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import torch
from PIL import Image
from tqdm.auto import tqdm

from hf_mel.data.images import open_image
from hf_mel.data.lazy_rows import LazyRow, LazyRows
from hf_mel.inference.inputs import images_per_entity
from hf_mel.inference.probe import sees_images_in_pairs
from hf_mel.schema import Row

_IMAGE_BATCH = 32


class ImageFeatures:
    """The image features of rows, encoded once for each distinct image.

    Args:
        model ([`~hf_mel.protocols.Reranker`]): Offers `encode_images`.
        processor ([`~hf_mel.protocols.MelProcessor`]): Offers `images`.
    """

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor, self.per_entity = model, processor, images_per_entity(processor)
        self._of: dict[str, torch.Tensor] = {}
        self._of_mentions: set[str] = set()

    @classmethod
    def of(cls, model: Any, processor: Any) -> ImageFeatures | None:
        """For a model that encodes images apart and a processor that looks at them; otherwise `None`."""
        offered = callable(getattr(model, "encode_images", None)) and callable(getattr(processor, "images", None))
        return cls(model, processor) if offered and sees_images_in_pairs(processor) else None

    def on(self, rows: Iterable[Row]) -> list[Row]:
        """The rows, each with `image_features`: a tensor [d], or `None` where it has no image. Of an entity with k images,
        where the processor reads several, they are [k, d].
        """
        rows = list(rows)
        keys: list[list[str]] = []
        new: dict[str, Image.Image | Mapping[str, Any]] = {}
        named: dict[str, str | None] = {}
        for row in rows:
            images = _stored_images(row, self.per_entity)
            keys.append([_image_key(image) for image in images])
            for key, image in zip(keys[-1], images, strict=True):
                if key not in self._of and key not in new:
                    new[key], named[key] = image, row.get("mention_id") or row.get("entity_id")
                    if "mention" in row:
                        self._of_mentions.add(key)
        for first in range(0, len(new), _IMAGE_BATCH):
            some = list(new)[first : first + _IMAGE_BATCH]
            opened = [open_image(new[key], row=named[key]) for key in some]
            for key, features in zip(some, self._encode(opened), strict=True):
                self._of[key] = features
        # A ChainMap, because copying a row would decode its images.
        return [
            ChainMap({"image_features": self._features(each)}, row)  # type: ignore[arg-type]
            for each, row in zip(keys, rows, strict=True)
        ]

    def _features(self, keys: list[str]) -> torch.Tensor | None:
        if len(keys) < 2:
            return self._of[keys[0]] if keys else None
        return torch.stack([self._of[key] for key in keys])

    def add(self, rows: datasets.Dataset, *, progress: bool = False) -> None:
        """Encodes every image of the rows of a data set that a batch may show."""
        lazy, is_entity = LazyRows(rows), "images" in rows.column_names
        shown = None if self.per_entity == 1 else self.per_entity  # of the one that is shown, training draws which
        bar = tqdm(range(0, len(rows), _IMAGE_BATCH), desc="Encoding images", delay=1, disable=not progress)
        for first in bar:
            for row in lazy.__getitems__(list(range(first, min(first + _IMAGE_BATCH, len(rows))))):
                count = len((row.undecoded("images") or ())[:shown]) if is_entity else 0
                self.on([row.with_image("images", k) for k in range(count)] if is_entity else [row])

    def forget_mentions(self) -> None:
        """Drops the images that only mentions had: those of entities come back, those of mentions hardly do."""
        for key in self._of_mentions:
            del self._of[key]
        self._of_mentions.clear()

    def _encode(self, images: list[Image.Image]) -> torch.Tensor:
        training = self.model.training
        self.model.eval()
        try:
            pixels = self.processor.images(images)
            if isinstance(pixels, Mapping):
                pixels = pixels["pixel_values"]
            with torch.no_grad():
                return self.model.encode_images(pixels.to(self.model.device, self.model.dtype)).float().cpu()
        finally:
            self.model.train(training)


def _stored_images(row: Row, count: int | None) -> list[Image.Image | Mapping[str, Any]]:
    """The image of a mention, or the first `count` of an entity, undecoded where they are not decoded yet."""
    stored = row.undecoded if isinstance(row, LazyRow) else row.__getitem__
    # Which kind of row it is shows in a text: asking for an image would decode it.
    images = [stored("image")] if "mention" in row else (stored("images") or [])[:count]
    return [image for image in images if image is not None]


def _image_key(image: Image.Image | Mapping[str, Any]) -> str:
    """What an image is known by: a digest of its bytes, its path, or its pixels."""
    if isinstance(image, Mapping):
        content = image.get("bytes")
        return str(image["path"]) if content is None else hashlib.sha256(content).hexdigest()
    pixels = open_image(image)
    return hashlib.sha256(f"{pixels.mode} {pixels.size}".encode() + pixels.tobytes()).hexdigest()
