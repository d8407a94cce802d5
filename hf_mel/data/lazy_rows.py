"""Rows of a data set whose images are decoded on access, so that text models never decode them."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
from torch.utils.data import Dataset

from hf_mel.data.images import open_image
from hf_mel.schema import Row


def with_scores(entity: Row, prior: float | None = None, list_score: float | None = None) -> Row:
    """Returns a view of a candidate's row with its `prior`, p(e|m), and its `list_score`. A copy would decode the images.

    Args:
        entity (`Row`): The row.
        prior, list_score (`float`, *optional*): As in [`~hf_mel.protocols.Reranker`]. The view lacks what is `None`.
    """
    scores = {"prior": prior, "list_score": list_score}
    given = {name: value for name, value in scores.items() if value is not None}
    if isinstance(entity, LazyRow):  # many times per batch, and a chain is slow to read
        return entity.with_values(given)
    return ChainMap(given, entity) if given else entity  # type: ignore[arg-type]


class LazyRow(Mapping[str, Any]):
    """Row of a data set that decodes an image when it is accessed.

    Args:
        values (`dict`): The row, with images as `datasets` stores them.
        features (`datasets.Features`): The columns of the data set.
    """

    def __init__(self, values: dict[str, Any], features: datasets.Features):
        self._values, self._features = values, features

    def __getitem__(self, column: str) -> Any:
        value, feature = self._values[column], self._features.get(column)
        if isinstance(feature, datasets.Image):
            return self._decode(value)
        if isinstance(getattr(feature, "feature", None), datasets.Image):
            return [self._decode(image) for image in value or ()]
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, column: str, default: Any = None) -> Any:
        """Returns a value, or `default` if the row has no such column."""
        return self[column] if column in self._values else default

    def with_values(self, values: Mapping[str, Any]) -> LazyRow:
        """Returns the row with further values, none of which is an image."""
        return LazyRow({**self._values, **values}, self._features)

    def with_image(self, column: str, index: int) -> LazyRow:
        """Returns the row with only image number `index` in the list `column`."""
        return LazyRow({**self._values, column: [self._values[column][index]]}, self._features)

    def first_images(self, column: str, count: int | None) -> LazyRow:
        """Returns the row with the first `count` images of the list `column` (`None`: all)."""
        return LazyRow({**self._values, column: (self._values[column] or [])[:count]}, self._features)

    def undecoded(self, column: str) -> Any:
        """Returns the value of a column with images as `datasets` stores them."""
        return self._values[column]

    def _decode(self, image: dict[str, Any] | None) -> Any:
        if image is None:
            return None
        key = next((name for name in ("mention_id", "post_id", "entity_id") if name in self._values), None)
        return open_image(image, row=self._values[key] if key else None)


def with_rgb_images(row: Row) -> Row:
    """Returns a view of a row whose images are RGB as [`~hf_mel.data.images.open_image`] gives them.

    Rows of a [`LazyRows`] are so already. Other rows hold whatever their owner put there: `datasets` decodes a 16-bit
    scan to a mode that processors would turn all white.
    """
    return row if isinstance(row, LazyRow) else _RowInRgb(row)


class _RowInRgb(Mapping[str, Any]):
    """View of a row that opens `image` and `images` on access."""

    def __init__(self, row: Row):
        self._row = row

    def __getitem__(self, column: str) -> Any:
        value = self._row[column]
        if column == "image":
            return None if value is None else self._open(value)
        if column == "images":
            return [self._open(image) for image in value or () if image is not None]
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def _open(self, image: Any) -> Any:
        ids = (self._row[name] for name in ("mention_id", "post_id", "entity_id") if name in self._row)
        return open_image(image, row=next(ids, None))


class LazyRows(Dataset):
    """Map-style dataset of [`LazyRow`]s, for a `DataLoader`.

    Args:
        dataset (`datasets.Dataset`): M rows.
    """

    def __init__(self, dataset: datasets.Dataset):
        self.dataset = dataset
        self._undecoded = dataset.with_format("arrow")  # the plain format would decode every image

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> LazyRow:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[LazyRow]:
        """Returns the rows of a batch, in the given order."""
        features = self.dataset.features  # a deep copy at every access
        return [LazyRow(values, features) for values in self._undecoded[indices].to_pylist()]
