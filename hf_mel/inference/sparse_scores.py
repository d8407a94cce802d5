"""Scores of a few pairs of mentions and entities, and of entities, which ranking adds to those of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass
class SparseScores:
    """Scores of some pairs of M mentions and N entities. All other pairs have the score 0, or that of their entity.

    Args:
        offsets (`np.ndarray` `[M + 1]`): The pairs of mention m are those from `offsets[m]` up to `offsets[m + 1]` (`int64`).
        rows (`np.ndarray` `[P]`): Entity row of each pair (`int64`), ascending within a mention and without duplicates.
        values (`np.ndarray` `[P]`): Score of each pair (`float32`).
        of_entities (`np.ndarray` `[N]`, *optional*): Score of each entity, which all of its pairs have in addition
            (`float32`).
    """

    offsets: np.ndarray
    rows: np.ndarray
    values: np.ndarray
    of_entities: np.ndarray | None = None

    @classmethod
    def of_mentions(cls, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> SparseScores:
        """Joins the entity rows and the values of each of M mentions."""
        offsets = np.cumsum([0, *(len(rows) for rows, _ in pairs)], dtype=np.int64)
        empty = (np.empty(0, np.int64), np.empty(0, np.float32))
        rows, values = (np.concatenate(parts) for parts in zip(empty, *pairs, strict=True))
        return cls(offsets, rows.astype(np.int64, copy=False), values.astype(np.float32, copy=False))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, mention: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the entity rows and the values of one mention."""
        pairs = slice(self.offsets[mention], self.offsets[mention + 1])
        return self.rows[pairs], self.values[pairs]

    def __mul__(self, weight: float) -> SparseScores:
        of_entities = None if self.of_entities is None else self.of_entities * np.float32(weight)
        return SparseScores(self.offsets, self.rows, self.values * np.float32(weight), of_entities)

    def of(self, mention: int, rows: np.ndarray) -> np.ndarray:
        """Returns the scores of one mention and the entity rows [R], in any order."""
        scores = _look_up(*self[mention], rows)
        return scores if self.of_entities is None else scores + self.of_entities[rows]

    def select(self, mentions: Sequence[int] | np.ndarray) -> SparseScores:
        """Returns the scores of some mentions, in the given order."""
        return replace(
            SparseScores.of_mentions([self[int(mention)] for mention in mentions]), of_entities=self.of_entities
        )

    def among(self, rows: np.ndarray) -> SparseScores:
        """Returns the scores of a choice of entities, which are numbered anew.

        Args:
            rows (`np.ndarray` `[R]`): Entity rows, ascending. Row `rows[r]` becomes row r; pairs with others are dropped.
        """
        of_entities = None if self.of_entities is None else self.of_entities[rows]
        if not len(rows):
            return SparseScores(np.zeros_like(self.offsets), self.rows[:0], self.values[:0], of_entities)
        places = np.minimum(np.searchsorted(rows, self.rows), len(rows) - 1)
        is_kept = rows[places] == self.rows
        offsets = np.concatenate([[0], np.cumsum(is_kept)])[self.offsets]
        return SparseScores(offsets, places[is_kept], self.values[is_kept], of_entities)

    def add_to(self, block: torch.Tensor, first_mention: int, first_entity: int) -> None:
        """Adds the scores to a block [m, n] in place, whose first mention and entity have these numbers."""
        if self.of_entities is not None:
            block += torch.from_numpy(self.of_entities[first_entity : first_entity + block.shape[1]]).to(block)
        start, stop = self.offsets[first_mention], self.offsets[first_mention + len(block)]
        rows = self.rows[start:stop] - first_entity
        inside = np.flatnonzero((rows >= 0) & (rows < block.shape[1]))
        if not len(inside):
            return
        mentions = np.searchsorted(self.offsets, inside + start, side="right") - 1 - first_mention
        places = (torch.from_numpy(mentions).to(block.device), torch.from_numpy(rows[inside]).to(block.device))
        block[places] += torch.from_numpy(self.values[start:stop][inside]).to(block)


def _look_up(known: np.ndarray, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the values of `rows`, 0 for those that are not among the ascending rows `known`."""
    if not len(known):
        return np.zeros(len(rows), np.float32)
    places = np.minimum(np.searchsorted(known, rows), len(known) - 1)
    return np.where(known[places] == rows, values[places], np.float32(0))
