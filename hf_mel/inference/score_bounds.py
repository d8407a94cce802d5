"""Codes of entities that bound their scores from above, so that a ranking proves what it leaves out.

A retriever of [`~hf_mel.protocols.BoundsScores`] gives a vector x and numbers b of every entity, and q, w and c of every
mention, with score ≤ ⟨q, x⟩ + ⟨w, b⟩ + c. A code is a short form of x whose error is known, so it bounds ⟨q, x⟩ too:

1. Vectors are centred and rotated, y = R(x - mean), with the principal directions of a sample first. R is orthogonal up
   to the defect |I - RᵀR|, so ⟨q, x⟩ = ⟨q, mean⟩ + ⟨Rq, y⟩ up to defect · |q||x - mean|.
2. The first coordinates, the head, are rounded to 8 bits: ŷ₁ = s·(integers), and the code keeps e₁ ≥ |y₁ - ŷ₁|. Of the
   others, the tail, the first step knows only the norm.
   With p = Rq, ⟨p, y⟩ = ⟨p₁, ŷ₁⟩ + ⟨p₁, y₁ - ŷ₁⟩ + ⟨p₂, y₂⟩ ≤ ⟨p₁, ŷ₁⟩ + |p₁| e₁ + |p₂||y₂| by Cauchy and Schwarz.
3. The head of p is rounded to 8 bits as well, p̂₁, so that ⟨p̂₁, ŷ₁⟩ is a product of integers, which has no rounding
   error. That costs |p₁ - p̂₁|·max|y₁| ([`BoundCodes.quick_bounds`]).
4. The second step has 8 bits of the tail too: ⟨p₂, y₂⟩ ≤ ⟨p̂₂, ŷ₂⟩ + |p̂₂| e₂ + |p₂ - p̂₂||y₂|. It rounds p, and what that
   leaves again, so that p̂ is close ([`BoundCodes.bounds`]).

Every norm is rounded up to float32. The *slack* covers all other rounding: that of the model, whose float32 score may be
above the exact one, and that of the bounds. A sum of D float32 products, in any order, is off by at most
D·2⁻²⁴·|q||x|; the slack is twice that, once for each of the two, with D + 64 in place of D. It covers defects below 10⁻¹⁰.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

#: Bytes of the first step for one entity.
_HEAD_BYTES = 200
_HEAD_MULTIPLE = 16
#: Half the distance of two float32 numbers near 1.
UNIT_ROUNDOFF = 2.0**-24
_LARGEST_CODE = 127
_LARGEST_DEFECT = 1e-10
#: Rows of codes that are multiplied at a time by floating-point numbers, which stay in the cache.
_BLOCK_ROWS = 1024
#: Rows of heads that are multiplied at a time: their bounds stay in the cache. Of whole codes, the codes do.
_QUICK_ROWS, _WHOLE_ROWS = 1 << 16, 1 << 14


def head_width(dim: int, extras: int) -> int:
    """Returns how many of `dim` coordinates are in the head: as many as fit into 200 bytes beside the norms and b."""
    room = _HEAD_BYTES - 4 * (3 + extras)
    return min(dim, max(_HEAD_MULTIPLE, room // _HEAD_MULTIPLE * _HEAD_MULTIPLE))


def make_rotation(sample: np.ndarray, head: int, seed: int = 0) -> np.ndarray:
    """Returns an orthogonal matrix [D, D] (float64) that maps centred vectors to the coordinates of their codes.

    The principal directions of the sample come first. Head and tail are then rotated at random within themselves, so that
    no coordinate is much larger than the others, which all share one step of rounding.

    Args:
        sample (`np.ndarray` `[n, D]`): Centred vectors.
        head (`int`): Width of the head.
        seed (`int`): Seed of the random rotations.
    """
    dim = sample.shape[1]
    _, directions = np.linalg.eigh(sample.astype(np.float64).T @ sample)
    directions = directions.T[::-1]
    generator = np.random.default_rng(seed)
    parts = [
        np.linalg.qr(generator.standard_normal((stop - start, stop - start)))[0] @ directions[start:stop]
        for start, stop in ((0, head), (head, dim))
    ]
    return np.concatenate(parts)


def rounded_up(values: np.ndarray) -> np.ndarray:
    """Returns float32 numbers that are at least `values` (float64), which must not be negative."""
    nearest = values.astype(np.float32)
    return np.where(nearest.astype(np.float64) < values, np.nextafter(nearest, np.float32(np.inf)), nearest)


def encode(vectors: np.ndarray, mean: np.ndarray, rotation: np.ndarray, head: int) -> dict[str, np.ndarray]:
    """Returns the codes of n vectors [n, D].

    Returns:
        `dict`: `head` [n, H] and `tail` [n, D - H] (int8); `norms` [3, n]: step and error of the head, and norm of the
        tail; `tail_norms` [2, n]: step and error of the tail (float32); `longest` [2]: the largest norms of a head and of
        a vector (float64).
    """
    vectors = vectors.astype(np.float64)
    rotated = (vectors - mean) @ rotation.T
    first, second = rotated[:, :head], rotated[:, head:]
    head_codes, head_steps, head_errors = rounded(first)
    tail_codes, tail_steps, tail_errors = rounded(second)
    tail_norm = rounded_up(np.linalg.norm(second, axis=1))
    longest = [np.linalg.norm(part, axis=1).max(initial=0) for part in (first, vectors)]
    return {
        "head": head_codes,
        "tail": tail_codes,
        "norms": np.stack([head_steps, head_errors, tail_norm]),
        "tail_norms": np.stack([tail_steps, tail_errors]),
        "longest": np.array(longest),
    }


@dataclass
class RoundedVectors:
    """Vectors [K, d] as integers of 8 bits times a step, and what that leaves in the same way, as often as is asked.

    Args:
        integers (`torch.Tensor` `[rounds · K, d]`): Those of the K vectors, those of what they leave, and so on (int8).
        steps (`torch.Tensor` `[rounds · K]`): Their steps (float32).
        lengths (`np.ndarray` `[K]`): |v̂| of the rounded vectors (float64).
        errors (`np.ndarray` `[K]`): |v - v̂|, rounded up (float32).
    """

    integers: torch.Tensor
    steps: torch.Tensor
    lengths: np.ndarray
    errors: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, rounds: int) -> RoundedVectors:
        """Rounds vectors [K, d] (float64)."""
        left, parts = vectors, []
        for _ in range(rounds):
            integers, steps, errors = rounded(left)
            left = left - integers * steps[:, None].astype(np.float64)
            parts.append((torch.from_numpy(integers), torch.from_numpy(steps)))
        lengths = np.linalg.norm(vectors - left, axis=1)
        return cls(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), lengths, errors)

    def products(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns the inner products [K, n] (float32) of v̂ with codes [n, d] (int8)."""
        count = len(self.lengths)
        total = torch.zeros(count, len(codes))
        for number, (products, step) in enumerate(
            zip(integer_products(codes, self.integers), self.steps.tolist(), strict=True)
        ):
            total[number % count].add_(products, alpha=step)
        return total


def rounded(part: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rounds rows [n, d] to integers times a step: int8 [n, d], the steps [n], and norms of the errors, rounded up [n]."""
    steps = (np.abs(part).max(1, initial=0) / _LARGEST_CODE).astype(np.float32)
    divisors = np.where(steps > 0, steps, 1).astype(np.float64)[:, None]
    integers = np.clip(np.rint(part / divisors), -_LARGEST_CODE, _LARGEST_CODE)
    errors = np.linalg.norm(part - integers * steps[:, None].astype(np.float64), axis=1)
    return integers.astype(np.int8), steps, rounded_up(errors)


@dataclass
class BoundQueries:
    """M mentions in the form that the bounds read.

    Args:
        rotated (`np.ndarray` `[M, D]`): p, the rotated vectors (float64).
        weights (`np.ndarray` `[M, R]`): w (float64).
        constants (`np.ndarray` `[M]`): The part that is the same for all entities: c, ⟨q, mean⟩ and the slack (float64).
    """

    rotated: np.ndarray
    weights: np.ndarray
    constants: np.ndarray

    def __getitem__(self, mentions: slice) -> BoundQueries:
        return BoundQueries(self.rotated[mentions], self.weights[mentions], self.constants[mentions])

    def __len__(self) -> int:
        return len(self.rotated)


@dataclass
class BoundCodes:
    """The codes of N entities.

    Args:
        mean (`np.ndarray` `[D]`), rotation (`np.ndarray` `[D, D]`): Of the coordinates (float64).
        head (`torch.Tensor` `[N, H]`), tail (`torch.Tensor` `[N, D - H]`): Integers (int8).
        norms (`torch.Tensor` `[3 + R, N]`): Step and error of the head, norm of the tail, and b (float32).
        tail_norms (`torch.Tensor` `[2, N]`): Step and error of the tail (float32).
        longest_head, longest (`float`): The largest norms of a head and of a vector.
    """

    mean: np.ndarray
    rotation: np.ndarray
    head: torch.Tensor
    tail: torch.Tensor
    norms: torch.Tensor
    tail_norms: torch.Tensor
    longest_head: float
    longest: float

    def __post_init__(self):
        defect = np.linalg.norm(np.eye(len(self.rotation)) - self.rotation.T @ self.rotation)
        if not defect < _LARGEST_DEFECT:
            raise ValueError(f"the rotation is not orthogonal: |I - RᵀR| is {defect:.2g}")
        self._largest_extras = self.norms[3:].abs().amax(1).double().numpy() if len(self) else np.zeros(0)

    def __len__(self) -> int:
        return self.head.shape[0]

    def queries(self, vectors: np.ndarray, weights: np.ndarray, constants: np.ndarray) -> BoundQueries:
        """Returns the form that the bounds read of q [M, D], w [M, R] and c [M]."""
        vectors, weights = vectors.astype(np.float64), weights.astype(np.float64)
        constants = constants.astype(np.float64)
        norms = np.linalg.norm(vectors, axis=1)
        reach = norms * (self.longest + np.linalg.norm(self.mean)) + np.abs(weights) @ self._largest_extras
        slack = 2 * (vectors.shape[1] + 64) * UNIT_ROUNDOFF * (reach + np.abs(constants))
        return BoundQueries(vectors @ self.rotation.T, weights, constants + vectors @ self.mean + slack)

    def quick_bounds(self, queries: BoundQueries) -> torch.Tensor:
        """Returns bounds [M, N] (float32) from the heads and the norms alone: the first step."""
        width = self.head.shape[1]
        heads = RoundedVectors.of(queries.rotated[:, :width], 1)
        lengths = np.stack([heads.lengths, np.linalg.norm(queries.rotated[:, width:], axis=1)], 1)
        factors = torch.from_numpy(np.concatenate([lengths, queries.weights], 1)).float()
        constants = torch.from_numpy(queries.constants + heads.errors.astype(np.float64) * self.longest_head).float()
        bounds = torch.empty(len(queries), len(self))
        for first in range(0, len(self), _QUICK_ROWS):
            block = slice(first, first + _QUICK_ROWS)
            norms = self.norms[:, block]
            part = torch.addmm(constants[:, None], factors, norms[1:], out=bounds[:, block])
            for number, products in enumerate(integer_products(self.head[block], heads.integers)):
                part[number].addcmul_(products, norms[0], value=float(heads.steps[number]))
        return bounds

    def bounds(self, query: BoundQueries, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Returns bounds [n] (float32) of one mention and the entities `rows` [n] from their whole codes: the second step.

        By default, all entities are bounded. That is faster than choosing many of them, and rounds p once.
        """
        width = self.head.shape[1]
        head_query, tail_query = (
            RoundedVectors.of(part, 1 if rows is None else 2)
            for part in (query.rotated[:, :width], query.rotated[:, width:])
        )
        constant = float(query.constants[0]) + float(head_query.errors[0]) * self.longest_head
        # Of the rows of the norms after the steps: the error of the head, the norm of the tail, and b.
        factors = torch.tensor(
            [head_query.lengths[0], tail_query.errors[0], *query.weights[0].tolist()], dtype=torch.float32
        )
        bounds = torch.empty(len(self) if rows is None else len(rows))
        for first in range(0, len(bounds), _WHOLE_ROWS):
            block = slice(first, first + _WHOLE_ROWS)
            if rows is None:
                head, tail = self.head[block], self.tail[block]
                norms, tail_norms = self.norms[:, block], self.tail_norms[:, block]
            else:
                # Several times as fast as indexing by a tensor.
                head, tail = (codes.index_select(0, rows[block]) for codes in (self.head, self.tail))
                norms, tail_norms = (codes.index_select(1, rows[block]) for codes in (self.norms, self.tail_norms))
            part = torch.addmv(torch.tensor(constant, dtype=torch.float32), norms[1:].T, factors, out=bounds[block])
            part.add_(tail_norms[1], alpha=float(tail_query.lengths[0]))
            for of_query, codes, steps in ((head_query, head, norms[0]), (tail_query, tail, tail_norms[0])):
                part.addcmul_(of_query.products(codes)[0], steps)
        return bounds


@dataclass
class QueryCodes:
    """M mentions in few bytes, which bound their scores of entities that come later.

    q is rounded to 8 bits as well, q̂, and e ≥ |q - q̂| is kept: ⟨q, x⟩ = ⟨q̂, x⟩ + ⟨q - q̂, x⟩ ≤ ⟨q̂, x⟩ + e|x| by Cauchy and
    Schwarz. The slack is that of [`BoundCodes`].

    Args:
        integers (`np.ndarray` `[M, D]`): q̂ in units of the step (int8).
        steps, errors (`np.ndarray` `[M]`): Step and error of the rounding (float32).
        weights (`np.ndarray` `[M, R]`), constants (`np.ndarray` `[M]`): w and c (float32).
    """

    integers: np.ndarray
    steps: np.ndarray
    errors: np.ndarray
    weights: np.ndarray
    constants: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, weights: np.ndarray, constants: np.ndarray) -> QueryCodes:
        """Codes q [M, D], w [M, R] and c [M] (float32)."""
        return cls(*rounded(vectors.astype(np.float64)), weights, constants)

    def __getitem__(self, mentions: slice) -> QueryCodes:
        return QueryCodes(*(part[mentions] for part in vars(self).values()))

    def __len__(self) -> int:
        return len(self.integers)

    def bounds(self, vectors: np.ndarray, extras: np.ndarray) -> np.ndarray:
        """Returns bounds [M, N] (float64) of the scores with the entities that have x [N, D] and b [N, R] (float32)."""
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        steps, errors = self.steps.astype(np.float64), self.errors.astype(np.float64)
        weights, extras = self.weights.astype(np.float64), extras.astype(np.float64)
        constants = self.constants.astype(np.float64)
        # No shorter than q.
        longest = np.linalg.norm(self.integers.astype(np.float64), axis=1) * steps + errors
        reach = (
            longest * lengths.max(initial=0) + np.abs(weights) @ np.abs(extras).max(0, initial=0) + np.abs(constants)
        )
        slack = 2 * (vectors.shape[1] + 64) * UNIT_ROUNDOFF * reach
        products = (torch.from_numpy(self.integers).float() @ torch.from_numpy(vectors).T).numpy().astype(np.float64)
        products *= steps[:, None]
        products += errors[:, None] * lengths + weights @ extras.T + (constants + slack)[:, None]
        return products


def integer_products(codes: torch.Tensor, queries: torch.Tensor) -> list[torch.Tensor]:
    """Returns the exact inner products, [N] (float32) for each of M queries, of codes [N, H] and queries [M, H] (int8).

    Integers below 2²⁴ are exact in float32, and so are sums of up to 1,040 products of codes.
    """
    if _multiplies_exactly() and 0 < queries.shape[1] <= 1040 and len(codes):
        # Of all shapes, one query at a time is the fastest on the processors that were measured.
        return [torch._int_mm(codes, query[:, None]).squeeze(1).float() for query in queries]
    products = torch.empty(len(queries), len(codes))
    exact = torch.float32 if queries.shape[1] <= 1040 else torch.float64
    for first in range(0, len(codes), _BLOCK_ROWS):
        block = codes[first : first + _BLOCK_ROWS].to(exact)
        products[:, first : first + _BLOCK_ROWS] = queries.to(exact) @ block.T
    return list(products)


@cache
def _multiplies_exactly() -> bool:
    """Whether PyTorch multiplies matrices of int8 without error here. Some processors saturate sums of 16 bits."""
    largest = torch.full((64, 64), _LARGEST_CODE, dtype=torch.int8)
    random = torch.randint(-_LARGEST_CODE, _LARGEST_CODE + 1, (64, 64), generator=torch.Generator().manual_seed(0))
    try:
        return all(
            torch.equal(torch._int_mm(left, right.T[:, :1].contiguous()), (left.int() @ right.T.int())[:, :1])
            for left in (largest, -largest, random.to(torch.int8))
            for right in (largest, -largest, random.to(torch.int8))
        )
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
