"""A set of strings in eight bytes each."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np


class IdSet:
    """A set of strings, stored as their sorted 64-bit hashes.

    Args:
        hashes (`array` of type "q", *optional*): Hashes of the strings, as `hash` returns them. Empty by default.
    """

    def __init__(self, hashes: array[int] | None = None):
        self._hashes = np.sort(np.frombuffer(hashes, dtype=np.int64)) if hashes else np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, text: object) -> bool:
        return bool(self.contains_hashes([hash(text)])[0])

    def contains_hashes(self, hashes: Sequence[int] | np.ndarray) -> np.ndarray:
        """Looks up many strings by their hashes.

        Args:
            hashes (`[n]` sequence of `int`): Hashes as `hash` returns them.

        Returns:
            `np.ndarray`: `bool` of shape `[n]`.
        """
        if not len(self._hashes):
            return np.zeros(len(hashes), dtype=bool)
        values = np.asarray(hashes, dtype=np.int64)
        positions = np.searchsorted(self._hashes, values)
        return self._hashes[np.minimum(positions, len(self._hashes) - 1)] == values
