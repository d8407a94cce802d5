"""Codes of vectors of entities that give their inner products with few vectors of a mention, up to a radius.

A vector x is centred, y = x - mean, and rounded to 8 bits, ŷ = s·(integers); the code keeps e ≥ |y - ŷ| and |y|. A vector v of a
mention is rounded too, and what that leaves again, v̂, so that ⟨v̂, ŷ⟩ is made of products of integers, which have no rounding
error. By Cauchy and Schwarz, ⟨v, x⟩ = ⟨v, mean⟩ + ⟨v̂, ŷ⟩ + ⟨v̂, y - ŷ⟩ + ⟨v - v̂, y⟩ is within |v̂| e + |v - v̂||y| of ⟨v, mean⟩ + ⟨v̂, ŷ⟩. The radius has the
rounding of float32 in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_mel.inference.score_bounds import UNIT_ROUNDOFF, RoundedVectors, rounded, rounded_up

#: Rows whose products are in memory at a time: they stay in the cache.
_BLOCK_ROWS = 1 << 14


def encode_product_vectors(vectors: np.ndarray, mean: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the codes of n vectors [n, D]: `integers` [n, D] (int8); `norms` [3, n]: step, error, and norm (float32)."""
    centred = vectors.astype(np.float64) - mean
    integers, steps, errors = rounded(centred)
    return {"integers": integers, "norms": np.stack([steps, errors, rounded_up(np.linalg.norm(centred, axis=1))])}


@dataclass
class ProductQueries:
    """K vectors of a mention in the form that [`ProductCodes`] multiply.

    Args:
        rounded ([`~hf_mel.inference.score_bounds.RoundedVectors`]): v̂.
        constants, slack (`torch.Tensor` `[K, 1]`): ⟨v, mean⟩ and the rounding (float32).
        lengths (`torch.Tensor` `[K, 2]`): |v̂| and |v - v̂| (float32).
    """

    rounded: RoundedVectors
    constants: torch.Tensor
    lengths: torch.Tensor
    slack: torch.Tensor


@dataclass
class ProductCodes:
    """The codes of one vector of each of N entities.

    Args:
        mean (`np.ndarray` `[D]`): The mean (float64).
        integers (`torch.Tensor` `[N, D]`): ŷ in units of the step (int8).
        norms (`torch.Tensor` `[3, N]`): Step, error e, and norm |y| (float32).
    """

    mean: np.ndarray
    integers: torch.Tensor
    norms: torch.Tensor

    def queries(self, vectors: np.ndarray) -> ProductQueries:
        """Returns the form that the products read of K vectors [K, D]."""
        vectors = vectors.astype(np.float64)
        twice = RoundedVectors.of(vectors, 2)
        longest = float(self.norms[2].max()) if len(self.integers) else 0.0
        reach = np.linalg.norm(vectors, axis=1) * (longest + 2 * np.linalg.norm(self.mean))
        slack = 2 * (vectors.shape[1] + 64) * UNIT_ROUNDOFF * reach
        constants, slack = (torch.from_numpy(part).float()[:, None] for part in (vectors @ self.mean, slack))
        lengths = torch.from_numpy(np.stack([twice.lengths, twice.errors], 1)).float()
        return ProductQueries(twice, constants, lengths, slack)

    def products(self, queries: ProductQueries, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the products [K, n] with the entities `rows` [n], and radii [K, n]."""
        # Several times as fast as indexing by a tensor.
        integers, norms = self.integers.index_select(0, rows), self.norms.index_select(1, rows)
        values = queries.rounded.products(integers).mul_(norms[0])
        return values.add_(queries.constants), torch.addmm(queries.slack, queries.lengths, norms[1:])


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

    def bounds(self, mention: MentionProducts, rows: torch.Tensor) -> torch.Tensor:
        """Returns f [n] (float32, at most 0) of the entities `rows` [n], which lowers the bounds of their scores."""
        parts = [torch.empty(0)]
        for block in rows.split(_BLOCK_ROWS):
            products = {name: codes.products(mention.queries[name], block) for name, codes in self.codes.items()}
            parts.append(self._bound(mention.state, products, self.numbers.index_select(1, block)))
        lower = torch.cat(parts)
        return torch.where(lower.isfinite(), lower, 0)  # what overflowed proves nothing
