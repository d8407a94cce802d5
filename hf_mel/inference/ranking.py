"""Exact ranking of every entity for every mention, in memory that does not grow with mentions × entities."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from hf_mel.errors import KnowledgeBaseError, LostProcessError, RecipeError, ScoreError, UnknownEntityError
from hf_mel.inference.encodings import num_rows, row_bytes, slice_encodings, to_device
from hf_mel.inference.entity_sources import EntitySource, PartlyRead
from hf_mel.inference.execution import model_device
from hf_mel.inference.sparse_scores import SparseScores
from hf_mel.protocols import (
    Encodings,
    TellsWhatToRead,
    TwoStepScores,
    leaves_out_missing_images,
    takes_half_precision,
)

ScoreFunction = Callable[[Encodings, Encodings], torch.Tensor]

# Memory of one pair while a model scores it: a few unit scores and the temporaries of the widest unit, as float32.
_SCORING_BYTES_PER_PAIR = 96
# Limits of entities per chunk and pairs per block. Larger ones are no faster, and exceed the processor's caches.
_CHUNK_ROWS = 8192
_BLOCK_PAIRS = {"cpu": 2**19, "cuda": 2**25}
# Mentions that are scored with their golds at a time. Of m² scored pairs only m are used, so the number is small.
_GOLD_MENTIONS = 16
#: Scores are equal if they differ by at most this times max(1, |score|). Rounding depends on the shape of a chunk.
TIE_TOLERANCE = 1e-6
# Rounding error of float32 between two orders of adding up a score, relative to its largest part.
_ROUNDING = 1e-5


@dataclass
class RankingResult:
    """The result of [`rank`] for M mentions and N entities, on the CPU.

    Args:
        top_scores (`torch.Tensor` `[M, k]`): The k best scores, best first; k is at most N.
        top_rows (`torch.Tensor` `[M, k]`): Their entity rows (`int64`). Of equal scores the lower row comes first.
        gold_score (`torch.Tensor` `[M]`, *optional*): Score of the gold, nan for a mention without a gold row.
        best_rank (`torch.Tensor` `[M]`, *optional*): 1 + number of entities better than the gold (`int64`), 0 for a
            mention without a gold row.
        worst_rank (`torch.Tensor` `[M]`, *optional*): `best_rank` + number of other entities equal to the gold.
        bounds (`torch.Tensor` `[M]`, *optional*): No entity that was left out scores above this; -inf for a mention that
            was scored with all entities, inf for one about whose other entities nothing is known. `None`: all were scored.
    """

    top_scores: torch.Tensor
    top_rows: torch.Tensor
    gold_score: torch.Tensor | None = None
    best_rank: torch.Tensor | None = None
    worst_rank: torch.Tensor | None = None
    bounds: torch.Tensor | None = None


@torch.no_grad()
def rank(
    model: Any,
    mention_encodings: Encodings,
    entity_chunks: EntitySource,
    *,
    gold_rows: torch.Tensor | np.ndarray | Sequence[int] | None = None,
    top_k: int = 20,
    byte_budget: int = 2**29,
    tie_tolerance: float = TIE_TOLERANCE,
    score: ScoreFunction | None = None,
    added: SparseScores | None = None,
    among: torch.Tensor | None = None,
    floor: float = -torch.inf,
    prune: bool = True,
    processes: PartialState | None = None,
    progress: bool = False,
) -> RankingResult:
    """Scores M mentions against all N entities, and keeps the k best entities and the rank of each gold.

    Ranking reads the entities once, in chunks, and scores every chunk with all mentions, in batches. It keeps the k best
    so far and counts, so memory holds one chunk, one block of pairs and the encodings of the mentions. Pairs are scored
    in float32, also inside an autocast context.

    For [`~hf_mel.protocols.TwoStepScores`], the second step is computed only for pairs that may enter the k best so far
    or reach the gold. The skipped pairs change neither the k best nor any rank. If the model tells what to read
    ([`~hf_mel.protocols.TellsWhatToRead`]) and the source converts what it reads, the encodings that only the second step
    needs are read of the entities in these pairs alone.

    Rounding in matrix products depends on the shape of a chunk, so identical entities may score slightly differently. An
    entity is *equal* to the gold if its score differs by at most `tie_tolerance` * max(1, |gold score|), and *better* if
    its score is above that.

    Args:
        model ([`~hf_mel.protocols.Retriever`]): Its `score` is used, on its device.
        mention_encodings (`Mapping[str, torch.Tensor]`): Tensors with first axis M.
        entity_chunks ([`~hf_mel.inference.entity_sources.EntitySource`]): The N entities.
        gold_rows (integers `[M]`, *optional*): Entity row of each mention's gold, -1 for none.
        top_k (`int`): Number of entities to keep per mention; N if N is smaller.
        byte_budget (`int`): Memory in bytes for one block of scores and one chunk of entities on the model's device. The
            encodings of the mentions come on top.
        tie_tolerance (`float`): See above.
        score (`Callable`, *optional*): Replaces `model.score`: (mentions, entities) → scores [M, N].
        added ([`~hf_mel.inference.sparse_scores.SparseScores`], *optional*): Scores of some pairs of the M mentions and the N
            entities, finite, which are added to those of the model.
        among (`torch.Tensor` `[M, N]`, *optional*): True for the pairs that are ranked (bool). The others get the score -inf,
            and come last. Not with `gold_rows` or `processes`.
        floor (`float`): Entities that score below it are not needed. They may come last, with the score -inf.
        prune (`bool`): Whether to skip pairs that cannot matter, if the model supports it.
        processes (`accelerate.PartialState`, *optional*): The processes that share the work. All of them call this, each
            with its part of the entities ([`~hf_mel.inference.entity_sources.part_of_process`]) and the same mentions,
            whose `gold_rows` count all entities. Every process gets the whole result, or the error of the first process
            that has one.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`RankingResult`].

    Raises:
        [`~hf_mel.errors.ScoreError`]: A score is nan or infinite; names the mention and the entity row.
        [`~hf_mel.errors.KnowledgeBaseError`]: The source has no entities, or its chunks do not add up to N rows.
        [`~hf_mel.errors.UnknownEntityError`]: A gold row is outside the knowledge base.
        `ValueError`: `top_k` is below 1, the number of gold rows is not M, or `among` is given with golds or processes.
    """
    two_steps = score is None and prune and isinstance(model, TwoStepScores)
    reads_partly = two_steps and entity_chunks.converts and isinstance(model, TellsWhatToRead)
    names = list(model.pair_bound_encodings) or None if reads_partly else None
    scorer = _Pruned(model, added, among, floor) if two_steps else _Plain(score or model.score, added, among)
    as_stored = two_steps or (score is None and takes_half_precision(model))
    device = model_device(model)
    group = process_group(processes)
    mentions, sizes = num_rows(mention_encodings), group.gather(len(entity_chunks))
    start, entities = sum(sizes[: group.index]), sum(sizes)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}.")
    if among is not None and (gold_rows is not None or processes is not None):
        raise ValueError("Positions of golds, and processes, are not supported among chosen pairs.")
    if not entities:
        raise KnowledgeBaseError("The knowledge base has no entities to rank.", remedy="Give at least one entity.")
    golds = None if gold_rows is None else _checked_golds(gold_rows, mentions, entities).to(device)

    with group.raise_together():
        one_row = next((chunk for _, chunk in entity_chunks.iter_chunks(1, as_stored=as_stored)), {})
        bytes_per_entity = row_bytes(one_row) if one_row else 0
        mention_encodings = to_device(mention_encodings, device)
    half_budget, min_scoring_bytes = byte_budget // 2, _SCORING_BYTES_PER_PAIR * min(mentions, 64)
    chunk_size = max(
        1, min(len(entity_chunks), _CHUNK_ROWS, half_budget // max(1, min_scoring_bytes + bytes_per_entity))
    )
    pairs = min(half_budget // _SCORING_BYTES_PER_PAIR, _BLOCK_PAIRS.get(device.type, 2**22))
    batch_size = max(1, min(mentions, pairs // chunk_size))

    bar = tqdm(
        total=mentions * len(entity_chunks),
        desc="Ranking",
        unit="pair",
        unit_scale=True,
        delay=1,
        disable=not progress,
    )
    with bar, torch.autocast(device.type, enabled=False):
        state = _RankingState.start(mentions, min(top_k, entities), device)
        if golds is not None:
            with group.raise_together():
                is_local = (golds >= start) & (golds < start + len(entity_chunks))
                local_golds = torch.where(is_local, golds - start, -1)
                scores = _gold_scores(scorer, mention_encodings, local_golds, entity_chunks, start)
            state.golds = _GoldCounts.start(golds, group.smallest(scores), tie_tolerance)
        with group.raise_together():
            for first, read in _checked_chunks(entity_chunks, chunk_size, as_stored, names):
                chunk: Encodings = to_device(read, device)
                if names is not None:
                    chunk = PartlyRead(entity_chunks, first, chunk, [name for name in one_row if name not in names])
                for m in range(0, mentions, batch_size):
                    selection = slice(m, min(m + batch_size, mentions))
                    batch, part = slice_encodings(mention_encodings, selection), state.slice(selection)
                    part.update(scorer.block(batch, chunk, part, (m, start + first)), start + first)
                    bar.update((selection.stop - m) * num_rows(chunk))
        state.merge(group)
    return state.result()


class SingleProcess:
    """The only process of a ranking or a build."""

    index, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """Returns `value` of every process."""
        return [value]

    def smallest(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the elementwise minimum over all processes."""
        return torch.stack(self.gather(values)).amin(0)

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """If one process raises in the block, all raise, so that no collective call hangs.

        The others raise where they gather next, in the block or at its end. A [`~hf_mel.errors.LostProcessError`] is raised
        at once: no collective call reaches the lost process.
        """
        yield

    @contextmanager
    def without_limit(self) -> Iterator[None]:
        """Lets the processes wait for each other in the block however long it takes ([`unlimited_group`])."""
        yield


class ProcessGroup(SingleProcess):
    """Several processes of Accelerate that share a ranking or a build."""

    def __init__(self, processes: PartialState):
        self.index, self.size = processes.process_index, processes.num_processes
        self._unlimited: dist.ProcessGroup | None = None
        #: Number of blocks of `raise_together` that this process is in.
        self._depth = 0

    def gather(self, value: Any) -> list[Any]:
        """See [`SingleProcess.gather`]."""
        values = self._exchange(value.cpu() if isinstance(value, torch.Tensor) else value)
        if failures := [other for other in values if isinstance(other, _Failure)]:
            raise _ProcessFailed(failures)
        return [tensor.to(value.device) for tensor in values] if isinstance(value, torch.Tensor) else values

    def _exchange(self, value: Any) -> list[Any]:
        """Returns what every process gives."""
        if self._unlimited is None:
            return gather_object([value])
        values = [None] * self.size
        dist.all_gather_object(values, value, self._unlimited)
        return values

    @contextmanager
    def without_limit(self) -> Iterator[None]:
        """See [`SingleProcess.without_limit`]."""
        self._unlimited = unlimited_group()
        try:
            yield
        finally:
            dist.destroy_process_group(self._unlimited)
            self._unlimited = None

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """See [`SingleProcess.raise_together`]."""
        self._depth += 1
        depth, own_error, error_of_all = self._depth, None, None
        try:
            try:
                yield
            except (LostProcessError, _ProcessFailed):
                raise
            except Exception as error:  # any kind, because the other processes wait for this one
                own_error = error
            self.gather(own_error and _Failure(portable(own_error), depth))
        except _ProcessFailed as failed:
            if failed.depth < depth:
                raise
            error_of_all = own_error or failed.error
        finally:
            self._depth -= 1
        if error_of_all is not None:
            raise error_of_all


@dataclass
class _Failure:
    """The error of a process, which it gathers in place of a value, and the number of blocks of `raise_together` that it is in."""

    error: Exception
    depth: int


class _ProcessFailed(Exception):
    """A process has an error, which all raise at the end of the block of the least `depth` in which one has an error."""

    def __init__(self, failures: list[_Failure]):
        super().__init__()
        self.depth = min(failure.depth for failure in failures)
        self.error = next(failure.error for failure in failures if failure.depth == self.depth)


def unlimited_group() -> dist.ProcessGroup:
    """Returns a new group of all processes, whose operations wait for a process however long it works.

    Those of the ordinary group fail after its time limit, which is ten minutes with NCCL. If a process ends, its connections
    do, and so do the operations of the others.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(days=365))


def process_group(processes: PartialState | None) -> SingleProcess:
    """Returns the group of several processes, or that of a single one."""
    return SingleProcess() if processes is None or processes.num_processes == 1 else ProcessGroup(processes)


def portable(error: Exception) -> Exception:
    """Returns an error that another process can read: itself, or one with its text if it cannot be pickled."""
    try:
        pickle.dumps(error)
        copy.copy(error)  # makes it anew from its arguments, as unpickling does
        return error
    except Exception:  # whatever its class does
        return RuntimeError(f"{type(error).__name__} in another process: {error}")


@dataclass
class _GoldCounts:
    """The position of each of M golds among the entities seen so far.

    Args:
        rows (`torch.Tensor` `[M]`): Entity row of the gold, -1 for a mention without one.
        scores (`torch.Tensor` `[M]`): Score of the gold, inf without one.
        above, below (`torch.Tensor` `[M]`): Scores above or below these are better or worse than the gold's; inf
            without a gold, so that nothing counts.
        better, not_worse (`torch.Tensor` `[M]`): Numbers of entities seen so far. The gold itself is not worse.
    """

    rows: torch.Tensor
    scores: torch.Tensor
    above: torch.Tensor
    below: torch.Tensor
    better: torch.Tensor
    not_worse: torch.Tensor

    @classmethod
    def start(cls, rows: torch.Tensor, scores: torch.Tensor, tolerance: float) -> _GoldCounts:
        """Returns the counts before any entity was seen."""
        margin = tolerance * scores.abs().clamp(min=1)
        above = torch.where(rows >= 0, scores + margin, torch.inf)
        below = torch.where(rows >= 0, scores - margin, torch.inf)
        return cls(rows, scores, above, below, torch.zeros_like(rows), torch.zeros_like(rows))

    def slice(self, mentions: slice) -> _GoldCounts:
        """Returns views of some mentions."""
        return _GoldCounts(**{name: tensor[mentions] for name, tensor in vars(self).items()})

    def update(self, block: torch.Tensor, first: int) -> None:
        """Counts the scores [M, n] of the entity rows from `first` on, and sets those of golds in `block`."""
        # A gold keeps the score it was compared with, whatever rounding the shape of this block causes.
        in_block = ((self.rows >= first) & (self.rows < first + block.shape[1])).nonzero()[:, 0]
        block[in_block, self.rows[in_block] - first] = self.scores[in_block]
        self.better += (block > self.above[:, None]).sum(1)
        self.not_worse += (block >= self.below[:, None]).sum(1)

    def merge(self, processes: SingleProcess) -> None:
        """Adds up the counts of all processes."""
        self.better = sum(processes.gather(self.better))  # type: ignore[assignment]
        self.not_worse = sum(processes.gather(self.not_worse))  # type: ignore[assignment]

    def result(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns `gold_score`, `best_rank` and `worst_rank` of [`RankingResult`]."""
        has_gold = self.rows >= 0
        return torch.where(has_gold, self.scores, torch.nan), (self.better + 1) * has_gold, self.not_worse


@dataclass
class _RankingState:
    """The k best of the entities seen so far for each of M mentions, and the positions of the golds.

    Args:
        top_scores, top_rows (`torch.Tensor` `[M, k]`): Best first; the score is -inf where fewer than k were seen.
        golds ([`_GoldCounts`], *optional*): `None` without golds.
    """

    top_scores: torch.Tensor
    top_rows: torch.Tensor
    golds: _GoldCounts | None = None

    @classmethod
    def start(cls, mentions: int, k: int, device: torch.device) -> _RankingState:
        """Returns the state before any entity was seen, without golds."""
        rows = torch.zeros(mentions, k, dtype=torch.long, device=device)
        return cls(torch.full((mentions, k), -torch.inf, device=device), rows)

    def slice(self, mentions: slice) -> _RankingState:
        """Returns views of some mentions."""
        golds = None if self.golds is None else self.golds.slice(mentions)
        return _RankingState(self.top_scores[mentions], self.top_rows[mentions], golds)

    def update(self, block: torch.Tensor, first: int) -> None:
        """Adds the scores [M, n] of the entity rows from `first` on; -inf for a score below the floor."""
        if self.golds is not None:
            self.golds.update(block, first)
        # Rows come in order, so an entity that equals the last of the k best comes after it and is left out.
        rows, columns = (block > self.top_scores[:, -1:]).nonzero(as_tuple=True)
        if not len(rows):
            return
        counts = torch.bincount(rows, minlength=len(block))
        width, k = int(counts.max()), self.top_scores.shape[1]
        if width > 2 * k:
            scores, candidates = _top_k(block, min(k, block.shape[1]))
        else:
            place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
            scores = block.new_full((len(block), width), -torch.inf)
            candidates = rows.new_zeros((len(block), width))
            scores[rows, place], candidates[rows, place] = block[rows, columns], columns
        scores = torch.cat([self.top_scores, scores], 1)
        candidates = torch.cat([self.top_rows, candidates + first], 1)
        best = scores.sort(dim=1, descending=True, stable=True)
        self.top_scores[:] = best.values[:, :k]
        self.top_rows[:] = candidates.gather(1, best.indices[:, :k])

    def merge(self, processes: SingleProcess) -> None:
        """Merges the states of all processes, whose entities follow one another in the order of the processes."""
        scores, rows = torch.cat(processes.gather(self.top_scores), 1), torch.cat(processes.gather(self.top_rows), 1)
        best, k = scores.sort(dim=1, descending=True, stable=True), self.top_scores.shape[1]
        self.top_scores, self.top_rows = best.values[:, :k], rows.gather(1, best.indices[:, :k])
        if self.golds is not None:
            self.golds.merge(processes)

    def result(self) -> RankingResult:
        """Returns the ranking, on the CPU."""
        columns = () if self.golds is None else self.golds.result()
        return RankingResult(*(tensor.cpu() for tensor in (self.top_scores, self.top_rows, *columns)))


def score_of_units(model: Any, units: Sequence[str]) -> ScoreFunction:
    """Returns a score function that is the mean of some of the model's interaction units.

    As in the model's score, units that a mention lacks (nan) are left out. If it lacks all of them, its scores are 0, so
    that all entities tie. The function raises [`~hf_mel.errors.RecipeError`] if the model has no such unit.
    """

    def score(mentions: Encodings, entities: Encodings) -> torch.Tensor:
        scores = model.unit_scores(mentions, entities)
        missing = [unit for unit in units if unit not in scores]
        if missing or not units:
            raise RecipeError(
                f"The model has no unit {', '.join(map(repr, missing))}.",
                remedy=f"It has {', '.join(scores) or 'no units apart from its score'}.",
            )
        chosen = torch.stack([scores[unit] for unit in units])
        if not leaves_out_missing_images(model):
            return chosen.mean(0)
        lacking = chosen.isnan().all(-1, keepdim=True)
        rows = lacking.flatten(1).any(0).nonzero()[:, 0]
        # A mention that lacks a unit has a score all the same. If it has none, the weights or encodings are broken.
        if (
            len(rows)
            and model.score(slice_encodings(mentions, rows), slice_encodings(entities, slice(1))).isnan().any()
        ):
            return chosen.mean(0)
        return chosen.masked_fill(lacking, 0).sum(0) / (~lacking).sum(0).clamp(min=1)

    return score


def _checked_golds(gold_rows: Any, mentions: int, entities: int) -> torch.Tensor:
    golds = torch.as_tensor(gold_rows, dtype=torch.long)
    if golds.shape != (mentions,):
        raise ValueError(f"{mentions} mentions need as many gold rows, not shape {tuple(golds.shape)}.")
    outside = ((golds < -1) | (golds >= entities)).nonzero().flatten()
    if len(outside):
        row = int(outside[0])
        raise UnknownEntityError(
            f"Gold row {int(golds[row])} is not one of the {entities} entities.",
            row=row,
            remedy="Use row numbers of this knowledge base, and -1 for a mention without a gold.",
        )
    return golds


class _Plain:
    """Scores all pairs of a block."""

    def __init__(self, score: ScoreFunction, added: SparseScores | None = None, among: torch.Tensor | None = None):
        self.score, self.added, self.among = score, added, among

    def block(
        self, mentions: Encodings, entities: Encodings, state: _RankingState, firsts: tuple[int, int]
    ) -> torch.Tensor:
        """Returns the scores [M, n] of a block; `firsts` are the numbers of its first mention and entity."""
        block = self.score(mentions, entities).float()
        _check_block(block, mentions, entities, firsts)
        left_out = _left_out(block, self.among, firsts)
        block = _with_added(block, self.added, firsts)
        return block if left_out is None else block.masked_fill(left_out, -torch.inf)

    def diagonal(self, mentions: Encodings, entities: Encodings, numbers: tuple[Any, Any]) -> torch.Tensor:
        """Returns the model's scores [M] of mention i and entity i, whose numbers are `numbers`."""
        block = self.score(mentions, entities).float()
        _check_block(block, mentions, entities, numbers)
        return block.diagonal()


class _Pruned:
    """Scores the pairs of a block that can matter, by a model that scores in two steps; -inf for the others."""

    def __init__(
        self,
        model: TwoStepScores,
        added: SparseScores | None = None,
        among: torch.Tensor | None = None,
        floor: float = -torch.inf,
    ):
        self.model: Any = model  # also TellsWhatToRead where chunks are PartlyRead
        self.added, self.among, self.floor = added, among, floor

    def block(
        self, mentions: Encodings, entities: Encodings, state: _RankingState, firsts: tuple[int, int]
    ) -> torch.Tensor:
        """See [`_Plain.block`]. The added scores belong to the quick ones."""
        quick = self.model.quick_scores(mentions, entities)
        _check_block(quick, mentions, entities, firsts)
        quick = _with_added(quick, self.added, firsts)
        # Another order of addition, or a block of another shape, may make a score slightly higher.
        rounding = _ROUNDING * quick.abs().amax(1)
        left_out = _left_out(quick, self.among, firsts)
        if left_out is not None:
            quick = quick.masked_fill(left_out, -torch.inf)
        threshold, k = state.top_scores[:, -1].clamp(min=self.floor), state.top_scores.shape[1]
        best = best_remaining = None
        if k <= quick.shape[1] and (threshold == -torch.inf).any():
            # In the first block there is no threshold yet. The exact scores of the k pairs with the best quick scores
            # give one, because they cannot be better than the k best.
            best = quick.topk(k).indices
            floor = torch.full_like(quick, torch.inf).scatter_(1, best, -torch.inf)
            floor = floor if left_out is None else floor.masked_fill_(left_out, torch.inf)
            best_remaining = self._remaining(mentions, entities, floor).gather(1, best)
            threshold = torch.maximum(threshold, (quick.gather(1, best) + best_remaining).amin(1))
        if state.golds is not None:
            threshold = torch.minimum(threshold, state.golds.below)
        floor = (threshold - rounding - _ROUNDING * threshold.abs())[:, None] - quick
        floor = floor if left_out is None else floor.masked_fill_(left_out, torch.inf)
        if best is None or best_remaining is None:
            remaining = self._remaining(mentions, entities, floor)
        else:
            remaining = self._remaining(mentions, entities, floor.scatter_(1, best, torch.inf))
            remaining = remaining.scatter_(1, best, best_remaining)
        self._check(quick, remaining, mentions, entities, firsts)
        return quick.add_(remaining)

    def _remaining(self, mentions: Encodings, entities: Encodings, floor: torch.Tensor) -> torch.Tensor:
        """Returns the second part [M, n] of the scores, after reading what it needs; -inf where it is below `floor`."""
        if not isinstance(entities, PartlyRead) or entities.is_whole:
            return self.model.remaining_scores(mentions, entities, floor)
        may_reach = self.model.may_reach(mentions, entities, floor)
        rows = may_reach.any(0).nonzero()[:, 0]
        if entities.num_read + len(rows) > floor.shape[1]:  # the next mentions may need them again
            return self.model.remaining_scores(mentions, entities.read_all(), floor)
        remaining = torch.full_like(floor, -torch.inf)
        if len(rows):
            floor_of_rows = floor[:, rows].masked_fill_(~may_reach[:, rows], torch.inf)
            remaining[:, rows] = self.model.remaining_scores(mentions, entities.whole(rows), floor_of_rows)
        return remaining

    def diagonal(self, mentions: Encodings, entities: Encodings, numbers: tuple[Any, Any]) -> torch.Tensor:
        """See [`_Plain.diagonal`]."""
        quick = self.model.quick_scores(mentions, entities)
        _check_block(quick, mentions, entities, numbers)
        floor = torch.full_like(quick, torch.inf).fill_diagonal_(-torch.inf)
        remaining = self.model.remaining_scores(mentions, entities, floor)
        self._check(quick, remaining, mentions, entities, numbers)
        return (quick + remaining).diagonal()

    @staticmethod
    def _check(
        quick: torch.Tensor, remaining: torch.Tensor, mentions: Encodings, entities: Encodings, numbers: Any
    ) -> None:
        if not remaining.amax() < torch.inf:
            total = quick + remaining.masked_fill(remaining == -torch.inf, 0)
            _check_block(total, mentions, entities, numbers)


def _gold_scores(
    scorer: _Plain | _Pruned, mentions: Encodings, golds: torch.Tensor, entities: EntitySource, start: int
) -> torch.Tensor:
    """Returns the score [M] of each mention's gold; inf for a mention without one. `start` is the row of the first entity."""
    scores = torch.full(golds.shape, torch.inf, device=golds.device)
    with_gold = (golds >= 0).nonzero()[:, 0]
    for first in range(0, len(with_gold), _GOLD_MENTIONS):
        batch = with_gold[first : first + _GOLD_MENTIONS]
        rows = golds[batch]
        encodings = to_device(entities.encodings(rows.cpu().numpy()), golds.device)
        scores[batch] = scorer.diagonal(slice_encodings(mentions, batch), encodings, (batch, rows))
        if scorer.added is not None:
            for mention, row in zip(batch.tolist(), (rows + start).tolist(), strict=True):
                scores[mention] += float(scorer.added.of(mention, np.asarray([row]))[0])
    return scores


def _with_added(block: torch.Tensor, added: SparseScores | None, firsts: tuple[int, int]) -> torch.Tensor:
    """Returns a block of scores with the added ones. A model may return a tensor that must not be changed in place."""
    if added is None:
        return block
    block = block.clone()
    added.add_to(block, *firsts)
    return block


def _left_out(block: torch.Tensor, among: torch.Tensor | None, firsts: tuple[int, int]) -> torch.Tensor | None:
    """Returns which pairs of a block are not ranked, [m, n]; `None` if all are. `firsts`: see [`_Plain.block`]."""
    if among is None:
        return None
    (m, n), (first_mention, first_entity) = block.shape, firsts
    return ~among[first_mention : first_mention + m, first_entity : first_entity + n].to(block.device)


def _checked_chunks(
    chunks: EntitySource, chunk_size: int, as_stored: bool, names: Sequence[str] | None
) -> Iterator[tuple[int, Encodings]]:
    """Yields the chunks, and raises an error if they do not follow one another up to the last entity."""
    seen, total = 0, len(chunks)
    for first, chunk in chunks.iter_chunks(chunk_size, as_stored=as_stored, names=names):
        if first != seen or first + num_rows(chunk) > total:
            break
        yield first, chunk
        seen += num_rows(chunk)
    if seen != total:
        raise KnowledgeBaseError(
            f"The chunks of the knowledge base must hold its {total} entities in order, but row {seen} is missing or "
            "out of order."
        )


def _check_block(block: torch.Tensor, mentions: Encodings, entities: Encodings, firsts: tuple[Any, Any]) -> None:
    """Checks the shape and the values of scores. `firsts` are the first numbers of both axes, or tensors of all."""
    count, size = num_rows(mentions), num_rows(entities)
    if block.shape != (count, size):
        raise ScoreError(
            f"The scores of {count} mentions and {size} entities have the shape {tuple(block.shape)}.",
            remedy="Return one score for every pair.",
        )
    low, high = torch.aminmax(block)  # both are nan if any score is
    if not (low.isfinite() and high.isfinite()):
        mention, entity = (~block.isfinite()).nonzero()[0].tolist()
        value = block[mention, entity].item()
        numbers = [
            int(first[k]) if isinstance(first, torch.Tensor) else first + k
            for first, k in zip(firsts, (mention, entity), strict=True)
        ]
        raise ScoreError(
            f"The score of mention {numbers[0]} and entity row {numbers[1]} is {value}.",
            remedy="Look for nan or overflow in the weights and in the encodings of these two rows.",
        )


def _top_k(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the k largest values of each row and their columns; equal values in the order of their columns."""
    values, columns = rows.topk(k)
    # Of values that equal the last one kept, topk takes any. Where it had a choice, take the first columns.
    last = values[:, -1:]
    had_choice = (rows == last).sum(1) > (values == last).sum(1)
    for row in had_choice.nonzero().flatten().tolist():
        ordered = rows[row].sort(descending=True, stable=True)
        values[row], columns[row] = ordered.values[:k], ordered.indices[:k]
    by_column = columns.argsort(1)
    values, columns = values.gather(1, by_column), columns.gather(1, by_column)
    by_value = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, by_value), columns.gather(1, by_value)
