"""Exact ranking that proves by codes which entities cannot be among the best, and scores only the others.

The codes of [`~hf_mel.inference.score_bounds`] bound the score of every entity from above. For a mention,

1. of the entities with the highest bounds, those with the highest tighter bounds are scored by the model, and their k-th
   best score is the floor;
2. every entity whose bound is below the floor is left out: it cannot be among the k best;
3. the others get tighter bounds from the rest of their codes, and from the products of a model of
   [`~hf_mel.protocols.BoundsByProducts`]. They are scored in the order of these, a batch at a time. The floor rises, and when
   the next bound is below it, the answer is proven;
4. of a batch, a model of [`~hf_mel.protocols.BoundsPairs`] reads whole only the entities whose small encodings do not prove
   that they are below the floor.

If the bounds leave too many entities, all are ranked. So the k best are always those of the exact ranking.

The codes are stored beside the knowledge base: `index-codes.json` is their record, which names a safetensors file. Like
indexes, codes cover physical rows. Entities that were removed are passed over, and those that were added later are scored
for every mention until the codes are built again.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from hf_mel.errors import KnowledgeBaseError, ScoreError
from hf_mel.files import fsync_and_describe, write_errors
from hf_mel.inference.encodings import num_rows, row_bytes, slice_encodings, to_device
from hf_mel.inference.execution import model_device
from hf_mel.inference.product_codes import EntityProducts, MentionProducts, ProductCodes, encode_product_vectors
from hf_mel.inference.ranking import RankingResult, SingleProcess
from hf_mel.inference.score_bounds import BoundCodes, BoundQueries, encode, head_width, make_rotation
from hf_mel.inference.sparse_scores import SparseScores
from hf_mel.kb.indexes.base import (
    ExactIndex,
    IndexRecord,
    damaged_index_error,
    default_chunk_size,
    install_file,
    iter_computed,
    rank_rows,
    read_record,
    rows_per_chunk,
    stale_index_error,
    verified_path,
)
from hf_mel.kb.shared_work import SharedFolder, WorkUnit, check_same_settings, work_together, work_units
from hf_mel.protocols import BoundsPairs, Encodings, bounds_by_products, bounds_scores

if TYPE_CHECKING:
    from hf_mel.kb.knowledge_base import KnowledgeBase

#: The kind under which the codes are stored.
CODES = "codes"
_SUFFIX = ".safetensors"
#: With fewer entities, or fewer than this for each mention and each of the k best, ranking all of them is as fast. It reads
#: them once for all mentions, while codes are compared mention by mention.
_LEAST_ENTITIES, _LEAST_PER_RESULT = 20_000, 300
#: Mentions whose quick bounds are in memory at a time.
_BOUNDED_TOGETHER = 8
#: Entities that are scored first, and in the first batch after them; each further batch is four times as large.
_FIRST_SCORED, _BATCH = 64, 512
#: Those that are scored first are the best of this many times as many by their codes, and of these times as many by bounds
#: of pairs. The better they are, the fewer are left open.
_FIRST_SURPLUS, _FIRST_BOUNDED = 16, 4
#: Rounding of float32 scores and of bounds of pairs, relative to the largest.
_PAIR_ROUNDING = 2e-5
#: If the heads leave more than this share, the whole codes of all entities are read.
_CHOSEN_SHARE = 0.25
#: If more than this share of the entities may be among the best, all are ranked.
_LARGEST_SHARE = 0.25
#: Most rows that are coded or bounded at a time: more do not stay in the cache.
_CHUNK_ROWS = 1 << 11
#: Rows of the sample that gives the directions, and consecutive rows in it.
_SAMPLE_ROWS, _SAMPLE_RUN = 1 << 14, 1 << 10
#: Rows of a unit that a process codes, but for a smaller knowledge base.
_UNIT_ROWS = 1 << 17
#: The file of mean and rotation in the working folder.
_DIRECTIONS = f"directions{_SUFFIX}"
#: The axis of the rows in each tensor of codes. Tensors of products have their name before these, and a full stop.
_ROW_AXES = {"norms": 1, "tail_norms": 1, "head": 0, "tail": 0, "integers": 0, "numbers": 1}
_OF_SUMS, _OF_PRODUCTS = ("norms", "tail_norms", "head", "tail"), ("integers", "norms")
_NUMBERS = "numbers"
_DTYPES = {"int8": "I8", "float32": "F32", "float64": "F64"}


@dataclass
class _Query:
    """A mention in the forms that its bounds read. `products` is `None` with a model that has no products."""

    sums: BoundQueries
    products: MentionProducts | None


class CertifiedIndex(ExactIndex):
    """Exact ranking with codes: the k best of all entities, and a bound on the scores of those that were not scored.

    Args:
        kb ([`~hf_mel.KnowledgeBase`]): The knowledge base.
        model ([`~hf_mel.protocols.Retriever`]): The model that built it.

    Raises:
        KnowledgeBaseError: The codes are missing or damaged, or another model or other encodings made them.
    """

    def __init__(self, kb: KnowledgeBase, model: Any):
        super().__init__(kb, model)
        check_bounds_scores(model)
        self.record = read_record(kb.path, CODES)
        self._check_covers()
        self._codes, self._products = _read_codes(kb, self.record, model)
        recorded = np.array(self.record.probe, dtype=np.float32)
        current = np.concatenate(_probe(kb, model, with_products=self._products is not None))
        if current.shape != recorded.shape or not np.allclose(current, recorded, rtol=1e-5, atol=1e-6):
            raise stale_index_error(kb, CODES, "the vectors of this model are others")
        #: Number of removed entities, and the physical rows that stay.
        self._covered: tuple[int, torch.Tensor | None] = (0, None)

    def _check_covers(self) -> None:
        if not self.record.covers(self.kb):
            raise stale_index_error(self.kb, CODES, "they were made of other encodings")

    @classmethod
    def build(
        cls, kb: KnowledgeBase, model: Any, group: SingleProcess | None = None, *, progress: bool = True
    ) -> CertifiedIndex | None:
        """Codes all physical rows; see [`~hf_mel.kb.indexes.build_index`]. Older codes stay until the new ones are complete.

        The processes of `group` share the rows. The file is that of one process.
        """
        group = group or SingleProcess()
        target = kb.path / f"index-{CODES}"
        with group.raise_together():
            check_bounds_scores(model)
            step = default_chunk_size(kb, _CHUNK_ROWS, as_stored=True)
            probe = _probe(kb, model)
        check_same_settings(group, {"knowledge base": kb.shards}, target)
        units = work_units(kb.num_physical_rows, step * max(1, _UNIT_ROWS // step), step)

        def write_units(work: SharedFolder, chosen: list[WorkUnit]) -> None:
            with tqdm(
                total=sum(len(unit.rows) for unit in chosen), desc=CODES, unit="entity", delay=1, disable=not progress
            ) as bar:
                for unit in chosen:
                    _write_unit(work, unit, kb, model, step, bar)

        def install(work: SharedFolder) -> None:
            path = work.stage / f"codes{_SUFFIX}"
            with write_errors(target):
                install_file(kb, _join(path, work, units, kb, probe), path, _SUFFIX)

        work_together(
            target,
            {"shards": kb.shards, "step": step, "probe": np.concatenate(probe).tolist()},
            units,
            group,
            write_units,
            install,
            lock=nullcontext,  # the caller holds that of the knowledge base
            prepare=lambda stage: [_write_directions(stage, kb, model, len(probe[1]))],
        )
        return cls(kb, model) if group.index == 0 else None

    def find(
        self,
        mentions: Encodings,
        top_k: int,
        *,
        units: Sequence[str] | None = None,
        added: SparseScores | None = None,
        rows: np.ndarray | None = None,
    ) -> RankingResult:
        """Finds the best entities and proves them; see [`Index.find`](hf_mel.kb.indexes.base.Index.find)."""
        count = len(self.kb) if rows is None else len(rows)
        if units is not None or count < max(
            _LEAST_ENTITIES, _LEAST_PER_RESULT * top_k * num_rows(mentions), top_k + 1
        ):
            return super().find(mentions, top_k, units=units, added=added, rows=rows)
        self._check_covers()
        queries = self._queries(mentions)
        results: list[RankingResult] = []
        products = self._product_queries(mentions)
        for first in range(0, len(queries), _BOUNDED_TOGETHER):
            group = slice(first, first + _BOUNDED_TOGETHER)
            bounds = self._quick_bounds(queries[group], added, first, rows)
            for number, of_mention in enumerate(bounds, first):
                mention = slice(number, number + 1)
                results.append(
                    self._find_one(
                        slice_encodings(mentions, mention),
                        _Query(queries[mention], products[number] if products else None),
                        of_mention,
                        top_k,
                        None if added is None else added.select([number]),
                        rows,
                    )
                )
        parts = [(result.top_scores, result.top_rows, result.bounds) for result in results]
        scores, found, highest = (torch.cat([part[k] for part in parts]) for k in range(3))  # type: ignore[misc]
        return RankingResult(scores, found, bounds=highest)

    def _queries(self, mentions: Encodings) -> BoundQueries:
        """Returns the mentions in the form that the bounds read."""
        vectors, weights, constants = bound_queries_of(self.model, mentions)
        if (weights < 0).any():
            raise ScoreError("bound_queries of the model returned a weight below 0.", remedy="Return w ≥ 0.")
        return self._codes.queries(vectors, weights, constants)

    def _product_queries(self, mentions: Encodings) -> list[MentionProducts]:
        """Returns the products of the mentions; none with a model that has no products."""
        if self._products is None:
            return []
        with torch.inference_mode():
            vectors, states = self.model.product_queries(to_device(mentions, model_device(self.model)))
        arrays = {name: part.float().cpu().numpy() for name, part in {**vectors, "": states}.items()}
        if not all(np.isfinite(part).all() for part in arrays.values()):
            raise ScoreError("The vector of a mention is nan or infinite.", remedy="Check the weights of the model.")
        states = arrays.pop("")
        return self._products.mentions(arrays, states)

    def _quick_bounds(
        self, queries: BoundQueries, added: SparseScores | None, first: int, rows: np.ndarray | None
    ) -> torch.Tensor:
        """Returns the bounds [m, n] of the first n rows of the knowledge base, which the codes cover.

        Added scores are in them, and rows that may not be found have -inf. `first` is the number of the first mention.
        """
        bounds = self._codes.quick_bounds(queries)
        physical = self._physical()
        bounds = bounds if physical is None else bounds[:, physical]
        if added is not None:
            added.add_to(bounds, first, 0)
        if rows is not None:
            left_out = torch.ones(bounds.shape[1], dtype=torch.bool)
            left_out[torch.from_numpy(rows[rows < bounds.shape[1]])] = False
            bounds.masked_fill_(left_out, -torch.inf)
        return bounds

    def _physical(self) -> torch.Tensor | None:
        """Returns the physical row of each of the first rows, which the codes cover; `None` if both are the same."""
        num_removed = self.kb.num_physical_rows - len(self.kb)
        if self._covered[0] != num_removed:
            kept = self.kb.rows_of_physical(np.arange(self.record.rows)) >= 0
            self._covered = num_removed, torch.from_numpy(np.flatnonzero(kept))
        return self._covered[1]

    def _find_one(
        self,
        mention: Encodings,
        query: _Query,
        bounds: torch.Tensor,
        top_k: int,
        added: SparseScores | None,
        rows: np.ndarray | None,
    ) -> RankingResult:
        """Finds the best entities of one mention.

        Args:
            mention, query: The mention with a first axis of 1.
            bounds (`torch.Tensor` `[n]`): Its quick bounds. They are changed.
            top_k, added, rows: As in [`CertifiedIndex.find`]; `added` is about this mention.
        """

        def ranked(chosen: torch.Tensor, floor: float = -torch.inf) -> RankingResult:
            """Ranks some entities that may score `floor` or more. Rows ascend, so that ties are ordered as in the ranking of all entities."""
            ordered = chosen.sort().values.numpy()
            return rank_rows(self.model, mention, self.kb, ordered, top_k=top_k, added=added, floor=floor)

        uncovered = np.arange(len(bounds), len(self.kb)) if rows is None else rows[rows >= len(bounds)]
        reads_less = isinstance(self.model, BoundsPairs) and bool(self.model.pair_bound_encodings)

        def floor_of(best: RankingResult) -> float:
            return float(best.top_scores[0, -1]) if best.top_scores.shape[1] == top_k else -torch.inf

        scored = self._first(mention, query, bounds, top_k, added, reads_less)
        best = ranked(torch.cat([scored, torch.from_numpy(uncovered)]))
        bounds[scored] = -torch.inf
        num_scored = len(scored)
        still_open = (bounds >= floor_of(best)).nonzero()[:, 0]
        if len(still_open) <= _CHOSEN_SHARE * len(bounds):
            tight = self._tight_bounds(query, still_open, bounds, added)
        else:
            # The heads leave many. To read all codes in their order is faster than to choose, and gives a better start.
            bounds = torch.minimum(bounds, self._all_tight_bounds(query, added))
            scored = self._first(mention, query, bounds, top_k, added, reads_less)
            best = ranked(torch.cat([scored, best.top_rows[0]]))
            bounds[scored] = -torch.inf
            num_scored += len(scored)
            still_open = (bounds >= floor_of(best)).nonzero()[:, 0]
            tight = bounds[still_open]
        floor = floor_of(best)
        bounds[still_open] = -torch.inf
        highest = float(bounds.amax())
        still_open, tight, highest = _split(still_open, tight, floor, highest)
        tight = self._lowered(query, still_open, tight)
        still_open, tight, highest = _split(still_open, tight, floor, highest)
        if floor == -torch.inf or num_scored + len(still_open) > _LARGEST_SHARE * len(bounds):
            return replace(super().find(mention, top_k, added=added, rows=rows), bounds=torch.full((1,), -torch.inf))
        order = tight.argsort(descending=True)
        still_open, tight = still_open[order], tight[order]
        first, size = 0, _BATCH
        while first < len(still_open) and tight[first] >= floor:
            stop = first + size
            batch = still_open[first:stop][tight[first:stop] >= floor]
            first += len(batch)
            size *= 4
            batch = batch.sort().values  # so that they are read in the order of the file
            if reads_less:
                batch, of_others = self._may_reach(mention, batch, floor, added)
                highest = max(highest, of_others)
            if len(batch):
                best = ranked(torch.cat([batch, best.top_rows[0]]), floor)
                floor = float(best.top_scores[0, -1])
        highest = max(highest, *tight[first : first + 1].tolist(), -torch.inf)
        return replace(best, bounds=torch.tensor([highest]))

    def _first(
        self,
        mention: Encodings,
        query: _Query,
        bounds: torch.Tensor,
        top_k: int,
        added: SparseScores | None,
        reads_less: bool,
    ) -> torch.Tensor:
        """Returns the rows [n] to score first, from quick bounds: by their k-th best score, few others are left open."""
        count = max(_FIRST_SCORED, 2 * top_k)
        chosen = bounds.topk(min(_FIRST_SURPLUS * count, len(bounds))).indices
        chosen = chosen[bounds[chosen] > -torch.inf]
        tight = self._lowered(query, chosen, self._tight_bounds(query, chosen, bounds, added))
        if not reads_less:
            return chosen[tight.topk(min(count, len(chosen))).indices]
        chosen = chosen[tight.topk(min(_FIRST_BOUNDED * count, len(chosen))).indices].sort().values
        # Bounds of pairs come close to scores, so the k best of them do nearly as well, and are read whole.
        of_pairs = torch.from_numpy(self._pair_bounds(mention, chosen, added))
        return chosen[of_pairs.topk(min(max(_FIRST_SCORED, top_k), len(chosen))).indices]

    def _pair_bounds(self, mention: Encodings, chosen: torch.Tensor, added: SparseScores | None) -> np.ndarray:
        """Returns the bounds [n] of the rows `chosen` [n] from their small encodings, without rounding."""
        rows, model = chosen.numpy(), self.model
        device, names = model_device(model), model.pair_bound_encodings
        mention = to_device(mention, device)
        bytes_per_row = row_bytes(self.kb.encodings(rows[:1], as_stored=True, names=names))
        parts = [torch.empty(0)]
        for part in np.split(rows, range(0, len(rows), rows_per_chunk(bytes_per_row, _CHUNK_ROWS))[1:]):
            entities = self.kb.encodings(part, as_stored=True, names=names)
            with torch.inference_mode():
                parts.append(model.pair_bounds(mention, to_device(entities, device))[0].float().cpu())
            del entities  # two parts are never in memory
        bounds = torch.cat(parts).double().numpy()
        return bounds if added is None else bounds + added.of(0, rows)

    def _may_reach(
        self, mention: Encodings, chosen: torch.Tensor, floor: float, added: SparseScores | None
    ) -> tuple[torch.Tensor, float]:
        """Returns those of the rows `chosen` [n] whose small encodings leave it open, and the highest bound of the others."""
        bounds = self._pair_bounds(mention, chosen, added)
        bounds = bounds + _PAIR_ROUNDING * (np.abs(bounds).max() + abs(floor))
        below = bounds < floor  # False for nan, which scoring reports
        return chosen[torch.from_numpy(~below)], bounds[below].max(initial=-np.inf)

    def _tight_bounds(
        self, query: _Query, chosen: torch.Tensor, quick: torch.Tensor, added: SparseScores | None
    ) -> torch.Tensor:
        """Returns the bounds [n] of the rows `chosen` [n] from their whole codes, none above their quick ones."""
        tight = self._codes.bounds(query.sums, self._of_codes(chosen))
        if added is not None:
            tight += torch.from_numpy(added.of(0, chosen.numpy()))
        return torch.minimum(tight, quick[chosen])

    def _all_tight_bounds(self, query: _Query, added: SparseScores | None) -> torch.Tensor:
        """Returns the bounds [n] of all rows that the codes cover, from their whole codes."""
        physical = self._physical()
        tight = self._codes.bounds(query.sums)
        tight = tight if physical is None else tight[physical]
        if added is not None:
            added.add_to(tight[None], 0, 0)
        return tight

    def _lowered(self, query: _Query, chosen: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        """Returns the bounds [n] of the rows `chosen` [n], which the products lower if the model has them."""
        if self._products is None or query.products is None:
            return bounds
        return bounds + self._products.bounds(query.products, self._of_codes(chosen))

    def _of_codes(self, chosen: torch.Tensor) -> torch.Tensor:
        """Returns the physical rows [n] of the rows `chosen` [n]."""
        physical = self._physical()
        return chosen if physical is None else physical[chosen]


def _split(
    rows: torch.Tensor, bounds: torch.Tensor, floor: float, highest: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Returns the rows and bounds [n] that are not below the floor, and the highest bound of all others."""
    is_open = bounds >= floor
    below = bounds[~is_open]
    return rows[is_open], bounds[is_open], max(highest, float(below.amax()) if len(below) else -torch.inf)


def bound_queries_of(model: Any, mentions: Encodings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns q [M, D], w [M, R] and c [M] (float32) of encoded mentions, by a model that bounds its scores.

    Raises:
        ScoreError: One is nan or infinite.
    """
    with torch.inference_mode():
        parts = model.bound_queries(to_device(mentions, model_device(model)))
        vectors, weights, constants = (part.float().cpu().numpy() for part in parts)
    if not all(np.isfinite(part).all() for part in (vectors, weights, constants)):
        raise ScoreError("The vector of a mention is nan or infinite.", remedy="Check the weights of the model.")
    return vectors, weights, constants


def check_bounds_scores(model: Any) -> None:
    """Checks that a retriever bounds its scores ([`~hf_mel.protocols.BoundsScores`]).

    Raises:
        KnowledgeBaseError: It does not, so that only scoring every entity proves an answer.
    """
    if not bounds_scores(model):
        raise KnowledgeBaseError(
            f"This {type(model).__name__} has no bounds of its scores (bound_queries, bound_vectors), so it has no codes.",
            remedy="Use the index 'exact' without codes: it scores every entity.",
        )


def iter_bound_vectors(
    kb: KnowledgeBase, model: Any, first: int, chunk_size: int | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (first row, x [n, D], b [n, R]) of physical rows, starting at `first`.

    Raises:
        KnowledgeBaseError: They have the wrong shape, or are nan or infinite.
    """
    for start, (vectors, extras) in iter_computed(
        kb, model, model.bound_vectors, first, chunk_size, most_rows=_CHUNK_ROWS, as_stored=True
    ):
        yield start, vectors, extras


def _iter_coded(
    kb: KnowledgeBase, model: Any, first: int, chunk_size: int | None = None
) -> Iterator[tuple[int, dict[str, np.ndarray], np.ndarray, np.ndarray]]:
    """Yields (first row, name → vectors [n, D], b [n, R], numbers of products [n, S]) of physical rows, starting at `first`.

    The name of x is empty. The other vectors, and the numbers, are those of the products, if the model has them.
    """
    names = [""]

    def compute(encodings: Encodings) -> list[torch.Tensor]:
        vectors, extras = model.bound_vectors(encodings)
        products, numbers = model.product_vectors(encodings) if bounds_by_products(model) else ({}, extras[:, :0])
        names[1:] = products
        return [extras, numbers, vectors, *products.values()]

    for start, (extras, numbers, *vectors) in iter_computed(
        kb, model, compute, first, chunk_size, most_rows=_CHUNK_ROWS, as_stored=True
    ):
        yield start, dict(zip(names, vectors, strict=True)), extras, numbers


def _probe(kb: KnowledgeBase, model: Any, with_products: bool = True) -> list[np.ndarray]:
    """Returns x, b, and what the products have of the first physical row, whose change reveals that of a model."""
    _, of_rows, extras, numbers = next(_iter_coded(kb, model, 0, 1))
    products = [vectors[0] for name, vectors in of_rows.items() if name] if with_products else []
    return [of_rows[""][0], extras[0], *products, *([numbers[0]] if products else [])]


def _named(vectors: str, tensor: str) -> str:
    """Returns the name of a tensor of the codes of some vectors; those of x have no name."""
    return f"{vectors}.{tensor}" if vectors else tensor


def _sample(kb: KnowledgeBase, model: Any) -> dict[str, np.ndarray]:
    """Returns the vectors of up to 16,384 physical rows, in runs spread over the knowledge base: name → [n, D] (float64)."""
    total = kb.num_physical_rows
    count = -(-min(total, _SAMPLE_ROWS) // _SAMPLE_RUN)
    starts = np.linspace(0, max(0, total - _SAMPLE_RUN), count).astype(int)
    parts = [next(_iter_coded(kb, model, int(start), _SAMPLE_RUN))[1] for start in starts]
    return {name: np.concatenate([part[name] for part in parts]).astype(np.float64) for name in parts[0]}


def _write_directions(stage: Path, kb: KnowledgeBase, model: Any, num_extras: int) -> Path:
    """Writes the means and the rotation of the codes, unless units of an interrupted build were made with those there are."""
    path = stage / _DIRECTIONS
    names = {_named(name, "mean") for name in next(_iter_coded(kb, model, 0, 1))[1]} | {"rotation"}
    if not path.exists() or load_file(path).keys() != names:
        with write_errors(path):
            shutil.rmtree(stage / "notes", ignore_errors=True)
            directions = {}
            for name, sample in _sample(kb, model).items():
                directions[_named(name, "mean")] = sample.mean(0)
                if not name:
                    width = head_width(sample.shape[1], num_extras)
                    directions["rotation"] = make_rotation(sample - sample.mean(0), width)
            unfinished = stage / f"unfinished-{_DIRECTIONS}"
            save_file(directions, unfinished)
            fsync_and_describe(unfinished)
            unfinished.replace(path)
    return path


def _write_unit(work: SharedFolder, unit: WorkUnit, kb: KnowledgeBase, model: Any, step: int, bar: Any) -> None:
    """Writes the codes of the rows of a unit, which are in chunks of `step`."""
    directions = load_file(work.stage / _DIRECTIONS)
    chunks: dict[str, list[np.ndarray]] = {}
    longest = np.zeros(2)
    for start, of_rows, extras, numbers in _iter_coded(kb, model, unit.rows.start, step):
        work.stop_with_others()
        vectors = of_rows.pop("")
        width = head_width(vectors.shape[1], extras.shape[1])
        codes = encode(vectors, directions["mean"], directions["rotation"], width)
        longest = np.maximum(longest, codes.pop("longest"))
        codes["norms"] = np.concatenate([codes["norms"], extras.T])
        for name, vectors in of_rows.items():
            of_name = encode_product_vectors(vectors, directions[_named(name, "mean")])
            codes |= {_named(name, tensor): values for tensor, values in of_name.items()}
        if of_rows:
            codes[_NUMBERS] = numbers.T
        for name, values in codes.items():
            chunks.setdefault(name, []).append(values)
        bar.update(len(extras))
        if start + len(extras) == unit.rows.stop:
            break
    # safetensors writes the memory of an array, whatever its strides.
    tensors = {name: np.ascontiguousarray(np.concatenate(parts, _row_axis(name))) for name, parts in chunks.items()}
    path = work.own / f"{unit.number:07d}{_SUFFIX}"
    with write_errors(path):
        save_file(tensors, path)
    work.finish(unit, {"codes": fsync_and_describe(path), "longest": longest.tolist()})


def _row_axis(name: str) -> int:
    """Returns the axis of the rows in a tensor of codes."""
    return _ROW_AXES[name.rpartition(".")[2]]


def _shapes(
    dims: dict[str, int], head: int, num_extras: int, num_numbers: int, total: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns dtype and shape of each tensor of the codes. `dims` has the widths by the name of the vectors."""
    dim = dims[""]
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "rotation": ("float64", (dim, dim)),
        "norms": ("float32", (3 + num_extras, total)),
        "tail_norms": ("float32", (2, total)),
        "head": ("int8", (total, head)),
        "tail": ("int8", (total, dim - head)),
    }
    for name, dim in dims.items():
        if name:
            shapes[_named(name, "mean")] = ("float64", (dim,))
            shapes[_named(name, "norms")] = ("float32", (3, total))
            shapes[_named(name, "integers")] = ("int8", (total, dim))
    if len(dims) > 1:
        shapes[_NUMBERS] = ("float32", (num_numbers, total))
    # Numbers of 8 bytes come first, and those of one byte last, so that each tensor begins at a multiple of its size.
    return dict(sorted(shapes.items(), key=lambda item: -np.dtype(item[1][0]).itemsize))


def _join(
    path: Path, work: SharedFolder, units: Sequence[WorkUnit], kb: KnowledgeBase, probe: list[np.ndarray]
) -> IndexRecord:
    """Writes the codes of all units into one safetensors file, and returns their record without `store`."""
    directions = load_file(work.stage / _DIRECTIONS)
    # The vector x has no name.
    dims = {
        name.removesuffix("mean").removesuffix("."): len(directions[name])
        for name in sorted(directions)
        if "mean" in name
    }
    num_extras, total = len(probe[1]), kb.num_physical_rows
    num_numbers = len(probe[-1]) if len(dims) > 1 else 0
    head = head_width(dims[""], num_extras)
    shapes = _shapes(dims, head, num_extras, num_numbers, total)
    offsets, header = {}, {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        offsets[name], end = end, end + np.dtype(dtype).itemsize * math.prod(shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    longest = np.zeros(2)
    # Written a part at a time, because safetensors' own writer needs all tensors in memory.
    with path.open("wb") as file:

        def write(name: str, first: int, values: np.ndarray) -> None:
            """Writes values from the number `first` of a tensor on, counted row by row."""
            file.seek(8 + len(text) + offsets[name] + first * values.itemsize)
            file.write(np.ascontiguousarray(values).tobytes())

        file.write(len(text).to_bytes(8, "little") + text)
        for name in directions.keys() & shapes.keys():
            write(name, 0, directions[name])
        for unit in units:
            entry, start = work.entry_of(unit), unit.rows.start
            for name, codes in load_file(work.stage / unit.folder / entry["codes"]["file"]).items():
                if _row_axis(name) == 0:
                    write(name, start * codes.shape[1], codes)
                else:
                    for number, values in enumerate(codes):
                        write(name, number * total + start, values)
            longest = np.maximum(longest, entry["longest"])
        file.truncate(8 + len(text) + end)
    settings = {
        "dims": dims,
        "head": head,
        "extras": num_extras,
        "numbers": num_numbers,
        "longest": longest.tolist(),
    }
    first = np.concatenate(probe).tolist()
    mean = [*directions["mean"].tolist(), *[0.0] * (len(first) - dims[""])]  # as long as the probe
    return IndexRecord(CODES, kb.shards, first, mean, 0.0, settings)


def _read_codes(kb: KnowledgeBase, record: IndexRecord, model: Any) -> tuple[BoundCodes, EntityProducts | None]:
    """Maps the codes into memory after checking their file.

    Raises:
        KnowledgeBaseError: The file is missing, damaged, or not as the record says.
    """
    path = verified_path(kb.path, record, _SUFFIX)
    try:
        settings = record.settings
        if "dims" not in settings:
            raise stale_index_error(kb, CODES, "they are of an older form")
        dims = {name: int(dim) for name, dim in settings["dims"].items()}
        head, extras, numbers = (int(settings[name]) for name in ("head", "extras", "numbers"))
        longest_head, longest = (float(value) for value in settings["longest"])
        shapes = {name: shape for name, (_, shape) in _shapes(dims, head, extras, numbers, record.rows).items()}
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in shapes}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
            raise ValueError("its tensors have other shapes than the record says")
        codes = BoundCodes(
            np.array(record.mean[: dims[""]]),
            tensors["rotation"].numpy(),
            **{name: tensors[name] for name in _OF_SUMS},
            longest_head=longest_head,
            longest=longest,
        )
        products = {
            name: ProductCodes(
                tensors[_named(name, "mean")].numpy(), **{part: tensors[_named(name, part)] for part in _OF_PRODUCTS}
            )
            for name in dims
            if name
        }
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged_index_error(path, CODES, f"{type(error).__name__}: {error}") from error
    if not products:
        return codes, None
    if not bounds_by_products(model):
        raise stale_index_error(kb, CODES, "they have products, and this model has none")
    return codes, EntityProducts(products, tensors[_NUMBERS], model.product_bounds)
