"""Encoded entities as ranking reads them: in memory, on disk, or a part of either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from accelerate import PartialState

from hf_mel.inference.encodings import as_float, num_rows, slice_encodings, to_device
from hf_mel.protocols import Encodings


class EntitySource(Protocol):
    """N encoded entities that can be read repeatedly, in chunks: a knowledge base, or [`EncodedEntities`]."""

    @property
    def entity_ids(self) -> Sequence[str]:
        """Entity id of each row, [N]."""
        ...

    @property
    def converts(self) -> bool:
        """Whether reading converts what is stored, so that it takes less time to read fewer encodings."""
        ...

    def __len__(self) -> int:
        """Number of entities."""
        ...

    def iter_chunks(
        self,
        chunk_size: int,
        *,
        rows: range | None = None,
        as_stored: bool = False,
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, Encodings]]:
        """Yields (number of the first row, encodings of up to `chunk_size` rows), in row order and without gaps.

        Args:
            chunk_size (`int`): Rows at a time.
            rows (`range`, *optional*): Read only these rows; a range without a step.
            as_stored (`bool`): Whether to leave half precision unconverted instead of giving float32.
            names (sequence of `str`, *optional*): Read only these encodings.
        """
        ...

    def encodings(
        self, indices: Sequence[int] | np.ndarray, *, as_stored: bool = False, names: Sequence[str] | None = None
    ) -> Encodings:
        """Returns the encodings of the rows `indices`, in any order. `as_stored` and `names` are those of `iter_chunks`."""
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

    @property
    def converts(self) -> bool:
        """See [`EntitySource`]."""
        return False

    def __len__(self) -> int:
        return len(self.entity_ids)

    def iter_chunks(
        self,
        chunk_size: int,
        *,
        rows: range | None = None,
        as_stored: bool = False,
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, Encodings]]:
        """See [`EntitySource`]. Chunks are views, unless half precision is converted."""
        rows = range(len(self)) if rows is None else rows
        start = 0 if self.part is None else self.part.start
        for first in range(rows.start, rows.stop, chunk_size):
            part = slice(first - start, min(first + chunk_size, rows.stop) - start)
            chunk = slice_encodings(self._tensors(names), part)
            yield first, chunk if as_stored else as_float(chunk)

    def encodings(
        self, indices: Sequence[int] | np.ndarray, *, as_stored: bool = False, names: Sequence[str] | None = None
    ) -> Encodings:
        """See [`EntitySource`]."""
        start = 0 if self.part is None else self.part.start
        chosen = slice_encodings(self._tensors(names), torch.as_tensor(indices, dtype=torch.long) - start)
        return chosen if as_stored else as_float(chosen)

    def _tensors(self, names: Sequence[str] | None) -> Encodings:
        return self.tensors if names is None else {name: self.tensors[name] for name in names}


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

    @property
    def converts(self) -> bool:
        """See [`EntitySource`]."""
        return self.source.converts

    def __len__(self) -> int:
        return len(self.part)

    def iter_chunks(
        self,
        chunk_size: int,
        *,
        rows: range | None = None,
        as_stored: bool = False,
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, Encodings]]:
        """See [`EntitySource`]."""
        source_rows = self.part if rows is None else self.part[rows.start : rows.stop]
        for first, chunk in self.source.iter_chunks(chunk_size, rows=source_rows, as_stored=as_stored, names=names):
            yield first - self.part.start, chunk

    def encodings(
        self, indices: Sequence[int] | np.ndarray, *, as_stored: bool = False, names: Sequence[str] | None = None
    ) -> Encodings:
        """See [`EntitySource`]."""
        return self.source.encodings(np.asarray(indices) + self.part.start, as_stored=as_stored, names=names)


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

    @property
    def converts(self) -> bool:
        """See [`EntitySource`]."""
        return self.source.converts

    def __len__(self) -> int:
        return len(self.rows)

    def iter_chunks(
        self,
        chunk_size: int,
        *,
        rows: range | None = None,
        as_stored: bool = False,
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, Encodings]]:
        """See [`EntitySource`]."""
        rows = range(len(self)) if rows is None else rows
        for first in range(rows.start, rows.stop, chunk_size):
            chosen = self.rows[first : min(first + chunk_size, rows.stop)]
            yield first, self.source.encodings(chosen, as_stored=as_stored, names=names)

    def encodings(
        self, indices: Sequence[int] | np.ndarray, *, as_stored: bool = False, names: Sequence[str] | None = None
    ) -> Encodings:
        """See [`EntitySource`]."""
        chosen = self.rows[np.asarray(indices, dtype=np.int64)]
        return self.source.encodings(chosen, as_stored=as_stored, names=names)


class PartlyRead(Mapping[str, torch.Tensor]):
    """Some of the encodings of consecutive entities, as stored. The others are read of the entities that need them.

    Args:
        source ([`EntitySource`]): N entities.
        first (`int`): The first of n rows.
        read (`Mapping[str, torch.Tensor]`): The encodings of these rows that were read, on the device that the others
            get, too.
        others (sequence of `str`): Names of the others.
    """

    def __init__(self, source: EntitySource, first: int, read: Encodings, others: Sequence[str]):
        self._source, self._first, self._others = source, first, others
        self._tensors, self._count = dict(read), num_rows(read)
        #: How many rows were read whole, each as often as it was.
        self.num_read = 0
        self._device = next(iter(read.values())).device

    def whole(self, rows: torch.Tensor) -> Encodings:
        """Returns all encodings of the rows [r], counted from the first."""
        self.num_read += len(rows)
        return slice_encodings(self._tensors, rows) | self._read(rows.cpu().numpy() + self._first)

    def read_all(self) -> Encodings:
        """Reads the others of all rows, and returns all encodings."""
        if self._others:
            self._tensors |= self._read(np.arange(self._first, self._first + self._count))
            self._others = []
        return self._tensors

    def _read(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        return to_device(self._source.encodings(rows, as_stored=True, names=self._others), self._device)

    @property
    def is_whole(self) -> bool:
        """Whether all encodings were read."""
        return not self._others

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def part_of_process(count: int, processes: PartialState) -> range:
    """Returns the rows of this process if `count` rows are shared among all processes, in order and evenly."""
    return part_of(count, processes.process_index, processes.num_processes)


def part_of(count: int, number: int, num_parts: int) -> range:
    """Returns the rows of the part `number` if `count` rows are divided into `num_parts`, in order and evenly."""
    return range(count * number // num_parts, count * (number + 1) // num_parts)
