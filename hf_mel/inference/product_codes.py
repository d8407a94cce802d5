"""Codes of vectors of entities that give their inner products with few vectors of a mention, up to a radius.

The codes are those of [`~hf_mel.inference.score_bounds`]: a vector x is centred and rotated, y = R(x - mean), its first
coordinates, the head, are rounded to 8 bits, and so are the others, the tail. With p = Rv for a vector v of a mention,
⟨v, x⟩ = ⟨v, mean⟩ + ⟨p₁, y₁⟩ + ⟨p₂, y₂⟩. By Cauchy and Schwarz,

- from the head and the norm of the tail, ⟨p₁, ŷ₁⟩ is within |p₁| e₁ + |p₂||y₂|, with e₁ for the error of the head;
- from the whole code, ⟨p₁, ŷ₁⟩ + ⟨p₂, ŷ₂⟩ is within |p₁| e₁ + |p₂| e₂.

A radius has the rounding of float32, and the defect of R, in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_mel.inference.score_bounds import UNIT_ROUNDOFF, check_rotation

#: Rows whose products are in memory at a time: they stay in the cache.
_BLOCK_ROWS = 1 << 14
#: Heads have this share of the coordinates, and a multiple of this number.
_HEAD_SHARE, _HEAD_MULTIPLE = 4, 8


def product_head_width(dim: int) -> int:
    """Returns how many of `dim` coordinates are in the head: a quarter, and at least 16."""
    return min(dim, max(2 * _HEAD_MULTIPLE, dim // _HEAD_SHARE // _HEAD_MULTIPLE * _HEAD_MULTIPLE))


@dataclass
class ProductQueries:
    """K vectors of a mention in the form that [`ProductCodes`] multiply.

    Args:
        heads (`torch.Tensor` `[K, H]`), tails (`torch.Tensor` `[K, D - H]`): The rotated vectors (float32).
        constants (`torch.Tensor` `[K, 1]`): Their products with the mean (float32).
        lengths (`torch.Tensor` `[K, 2]`): Norms of heads and tails (float32).
        slack (`torch.Tensor` `[K, 1]`): The rounding (float32).
    """

    heads: torch.Tensor
    tails: torch.Tensor
    constants: torch.Tensor
    lengths: torch.Tensor
    slack: torch.Tensor


@dataclass
class ProductCodes:
    """The codes of one vector of each of N entities.

    Args:
        mean (`np.ndarray` `[D]`), rotation (`np.ndarray` `[D, D]`): Of the coordinates (float64).
        head (`torch.Tensor` `[N, H]`), tail (`torch.Tensor` `[N, D - H]`): Integers (int8).
        norms (`torch.Tensor` `[3, N]`): Step and error of the head, and norm of the tail (float32).
        tail_norms (`torch.Tensor` `[2, N]`): Step and error of the tail (float32).
        longest (`float`): The largest norm of a vector.
    """

    mean: np.ndarray
    rotation: np.ndarray
    head: torch.Tensor
    tail: torch.Tensor
    norms: torch.Tensor
    tail_norms: torch.Tensor
    longest: float

    def __post_init__(self):
        check_rotation(self.rotation)

    def queries(self, vectors: np.ndarray) -> ProductQueries:
        """Returns the form that the products read of K vectors [K, D]."""
        vectors = vectors.astype(np.float64)
        rotated, width = vectors @ self.rotation.T, self.head.shape[1]
        lengths = np.stack([np.linalg.norm(part, axis=1) for part in (rotated[:, :width], rotated[:, width:])], 1)
        reach = np.linalg.norm(vectors, axis=1) * (self.longest + np.linalg.norm(self.mean))
        slack = 2 * (vectors.shape[1] + 64) * UNIT_ROUNDOFF * reach
        heads, tails, constants, lengths, slack = (
            torch.from_numpy(part).float()
            for part in (rotated[:, :width], rotated[:, width:], vectors @ self.mean, lengths, slack)
        )
        return ProductQueries(heads, tails, constants[:, None], lengths, slack[:, None])

    def from_heads(self, queries: ProductQueries, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the products [K, n] with consecutive entities, and radii [K, n], from the heads and the norms alone."""
        norms = self.norms[:, rows]
        values = (queries.heads @ self.head[rows].float().T).mul_(norms[0]).add_(queries.constants)
        return values, torch.addmm(queries.slack, queries.lengths, norms[1:])

    def from_all(self, queries: ProductQueries, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the products [K, n] with the entities `rows` [n], and radii [K, n], from the whole codes."""
        norms, tail_norms = self.norms.index_select(1, rows), self.tail_norms.index_select(1, rows)
        # Several times as fast as indexing by a tensor.
        head, tail = (codes.index_select(0, rows).float() for codes in (self.head, self.tail))
        values = (queries.heads @ head.T).mul_(norms[0]).add_((queries.tails @ tail.T).mul_(tail_norms[0]))
        errors = torch.stack([norms[1], tail_norms[1]])
        return values.add_(queries.constants), torch.addmm(queries.slack, queries.lengths, errors)


@dataclass
class MentionProducts:
    """A mention in the form that [`EntityProducts`] reads: its state [S] (float32), and its vectors by name."""

    state: torch.Tensor
    queries: dict[str, ProductQueries]


class EntityProducts:
    """The codes of all vectors of N entities, with the bounds that a model makes of them.

    Args:
        codes (`Mapping`): Name → [`ProductCodes`].
        numbers (`torch.Tensor` `[R, N]`): The numbers of the entities (float32).
        bound (`Callable`): [`product_bounds`](hf_mel.protocols.BoundsByProducts.product_bounds) of the model.
    """

    def __init__(self, codes: Mapping[str, ProductCodes], numbers: torch.Tensor, bound: Callable[..., Any]):
        self.codes, self.numbers, self._bound = codes, numbers, bound

    def mentions(self, vectors: Mapping[str, np.ndarray], states: np.ndarray) -> list[MentionProducts]:
        """Returns the form that the bounds read of M mentions: name → [M, K, D], and states [M, S]."""
        return [
            MentionProducts(
                torch.from_numpy(state).float(),
                {name: codes.queries(vectors[name][number]) for name, codes in self.codes.items()},
            )
            for number, state in enumerate(states)
        ]

    def add_quick(self, mention: MentionProducts, bounds: torch.Tensor) -> None:
        """Lowers the bounds [N] of all entities in place, from the heads."""
        for first in range(0, len(bounds), _BLOCK_ROWS):
            rows = slice(first, min(first + _BLOCK_ROWS, len(bounds)))
            products = {name: codes.from_heads(mention.queries[name], rows) for name, codes in self.codes.items()}
            bounds[rows] += self._bound(mention.state, products, self.numbers[:, rows])

    def closer(self, mention: MentionProducts, rows: torch.Tensor) -> torch.Tensor:
        """Returns how much lower the bounds of the entities `rows` are [n] (float64, at most 0), from the whole codes."""
        parts = [torch.empty(0, dtype=torch.float64)]
        for block in rows.split(_BLOCK_ROWS):
            products = {name: codes.from_all(mention.queries[name], block) for name, codes in self.codes.items()}
            parts.append(self._bound(mention.state, products, self.numbers.index_select(1, block)).double())
        return torch.cat(parts)
