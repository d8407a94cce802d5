"""The common interface of features that a model computes once per row, before the processor needs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Sequence
from typing import Any

import datasets

from hf_mel.schema import Row


class RowFeatures(ABC):
    """Features that one model computes from rows, cached, and attached to the rows its processor gets.

    Args:
        model: Computes the features.
        processor ([`~hf_mel.protocols.MelProcessor`]): Prepares the model's input, and reads the attached features.
    """

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor

    @classmethod
    @abstractmethod
    def for_model(cls, model: Any, processor: Any) -> RowFeatures | None:
        """Returns the features of a model that supports them, otherwise `None`."""

    @abstractmethod
    def precompute(self, rows: datasets.Dataset, *, progress: bool = False) -> None:
        """Computes the features of all rows of a data set and caches them."""

    @abstractmethod
    def attach(self, rows: Sequence[Row]) -> list[Row]:
        """Returns the rows, each with its features as one more column."""


def with_column(row: Row, name: str, value: Any) -> Row:
    """Returns a view of a row with one more column; a copy would decode the row's images."""
    return ChainMap({name: value}, row)  # type: ignore[arg-type]
