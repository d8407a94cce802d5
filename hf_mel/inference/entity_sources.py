"""Encoded entities as ranking reads them: in memory, on disk, or a part of either."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from accelerate import PartialState

from hf_mel.inference.encodings import as_float, num_rows, slice_encodings
from hf_mel.protocols import Encodings


class EntitySource(Protocol):
    """N encoded entities that can be read repeatedly, in chunks: a knowledge base, or [`EncodedEntities`]."""

    @property
    def entity_ids(self) -> Sequence[str]:
        """Entity id of each row, [N]."""
        ...

    def __len__(self) -> int:
        """Number of entities."""
        ...

    def iter_chunks(
        self, chunk_size: int, *, rows: range | None = None, as_stored: bool = False
    ) -> Iterator[tuple[int, Encodings]]:
        """Yields (number of the first row, encodings of up to `chunk_size` rows), in row order and without gaps.

        Args:
            chunk_size (`int`): Rows at a time.
            rows (`range`, *optional*): Read only these rows; a range without a step.
            as_stored (`bool`): Whether to leave half precision unconverted instead of giving float32.
        """
        ...

    def encodings(self, indices: Sequence[int] | np.ndarray, *, as_stored: bool = False) -> Encodings:
        """Returns the encodings of the rows `indices`, in any order. `as_stored` is that of `iter_chunks`."""
        ...


@dataclass
class EncodedEntities:
    """An [`EntitySource`] in memory.

    Args:
        entity_ids (sequence of `str` `[N]`): Entity id of each row.
        tensors (`Mapping[str, torch.Tensor]`): Their encodings, tensors with first axis N.
        part (`range`, *optional*): The rows that `tensors` holds, if this process encoded only its part.
    """

    entity_ids: Sequence[str]
    tensors: Encodings
    part: range | None = None

    def __post_init__(self):
        rows = len(self.entity_ids if self.part is None else self.part)
        if rows and rows != num_rows(self.tensors):
            raise ValueError(f"{rows} entity ids but {num_rows(self.tensors)} encoded rows.")

    def __len__(self) -> int:
        return len(self.entity_ids)

    def iter_chunks(
        self, chunk_size: int, *, rows: range | None = None, as_stored: bool = False
    ) -> Iterator[tuple[int, Encodings]]:
        """See [`EntitySource`]. Chunks are views, unless half precision is converted."""
        rows = range(len(self)) if rows is None else rows
        start = 0 if self.part is None else self.part.start
        for first in range(rows.start, rows.stop, chunk_size):
            chunk = slice_encodings(self.tensors, slice(first - start, min(first + chunk_size, rows.stop) - start))
            yield first, chunk if as_stored else as_float(chunk)

    def encodings(self, indices: Sequence[int] | np.ndarray, *, as_stored: bool = False) -> Encodings:
        """See [`EntitySource`]."""
        start = 0 if self.part is None else self.part.start
        chosen = slice_encodings(self.tensors, torch.as_tensor(indices, dtype=torch.long) - start)
        return chosen if as_stored else as_float(chosen)


@dataclass
class EntityPart:
    """Consecutive rows of an [`EntitySource`], as a source.

    Args:
        source ([`EntitySource`]): N entities.
        part (`range`): The rows, a range without a step.
    """

    source: EntitySource
    part: range

    @property
    def entity_ids(self) -> Sequence[str]:
        """See [`EntitySource`]."""
        return self.source.entity_ids[self.part.start : self.part.stop]

    def __len__(self) -> int:
        return len(self.part)

    def iter_chunks(
        self, chunk_size: int, *, rows: range | None = None, as_stored: bool = False
    ) -> Iterator[tuple[int, Encodings]]:
        """See [`EntitySource`]."""
        source_rows = self.part if rows is None else self.part[rows.start : rows.stop]
        for first, chunk in self.source.iter_chunks(chunk_size, rows=source_rows, as_stored=as_stored):
            yield first - self.part.start, chunk

    def encodings(self, indices: Sequence[int] | np.ndarray, *, as_stored: bool = False) -> Encodings:
        """See [`EntitySource`]."""
        return self.source.encodings(np.asarray(indices) + self.part.start, as_stored=as_stored)


@dataclass
class ChosenEntities:
    """Any rows of an [`EntitySource`], as a source.

    Args:
        source ([`EntitySource`]): N entities.
        rows (`np.ndarray` `[R]`): The chosen rows, ascending.
    """

    source: EntitySource
    rows: np.ndarray

    @property
    def entity_ids(self) -> Sequence[str]:
        """See [`EntitySource`]."""
        return [self.source.entity_ids[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def iter_chunks(
        self, chunk_size: int, *, rows: range | None = None, as_stored: bool = False
    ) -> Iterator[tuple[int, Encodings]]:
        """See [`EntitySource`]."""
        rows = range(len(self)) if rows is None else rows
        for first in range(rows.start, rows.stop, chunk_size):
            chosen = self.rows[first : min(first + chunk_size, rows.stop)]
            yield first, self.source.encodings(chosen, as_stored=as_stored)

    def encodings(self, indices: Sequence[int] | np.ndarray, *, as_stored: bool = False) -> Encodings:
        """See [`EntitySource`]."""
        return self.source.encodings(self.rows[np.asarray(indices, dtype=np.int64)], as_stored=as_stored)


def part_of_process(count: int, processes: PartialState) -> range:
    """Returns the rows of this process if `count` rows are shared among all processes, in order and evenly."""
    return part_of(count, processes.process_index, processes.num_processes)


def part_of(count: int, number: int, num_parts: int) -> range:
    """Returns the rows of the part `number` if `count` rows are divided into `num_parts`, in order and evenly."""
    return range(count * number // num_parts, count * (number + 1) // num_parts)
