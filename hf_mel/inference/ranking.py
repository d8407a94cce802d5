"""Exact ranking: every mention against every entity, in memory that does not grow with mentions × entities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from hf_mel.errors import KnowledgeBaseError, RecipeError, ScoreError, UnknownEntityError
from hf_mel.inference.encodings import as_float, num_rows, row_bytes, slice_encodings, to_device
from hf_mel.protocols import Encodings

ScoreFunction = Callable[[Encodings, Encodings], torch.Tensor]

# What one pair costs while a model scores it: a few unit scores and the temporaries of the widest unit, as float32.
_SCORING_BYTES_PER_PAIR = 96
# Entities of a chunk, and pairs of a block, at most: more of either is no faster, and leaves the processor's caches.
_CHUNK_ROWS = 8192
_BLOCK_PAIRS = {"cpu": 2**19, "cuda": 2**25}
# Mentions and their golds that are scored at a time: of m² pairs, m are needed.
_GOLD_MENTIONS = 16
# What float32 may round off between two ways to add up a score, relative to its largest part.
_ROUNDING = 1e-5


class EntitySource(Protocol):
    """N encoded entities that can be read again and again, in chunks: a knowledge base, or [`EncodedEntities`]."""

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
            rows (`range`, *optional*): Only these, a range without a step.
            as_stored (`bool`): Half precision as it is, and not as float32.
        """
        ...

    def encodings(self, indices: Sequence[int] | np.ndarray) -> Encodings:
        """Encodings of the rows `indices`, in any order."""
        ...


@dataclass
class EncodedEntities:
    """An [`EntitySource`] in memory.

    Args:
        entity_ids (sequence of `str` `[N]`): Entity id of each row.
        tensors (`Mapping[str, torch.Tensor]`): Their encodings, tensors with first axis N.
        part (`range`, *optional*): The rows that `tensors` has, where this process encoded only its own.
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
        """See [`EntitySource`]; the chunks are views, unless half precision is to be float32."""
        rows = range(len(self)) if rows is None else rows
        start = 0 if self.part is None else self.part.start
        for first in range(rows.start, rows.stop, chunk_size):
            some = slice(first - start, min(first + chunk_size, rows.stop) - start)
            chunk = slice_encodings(self.tensors, some)
            yield first, chunk if as_stored else as_float(chunk)

    def encodings(self, indices: Sequence[int] | np.ndarray) -> Encodings:
        """See [`EntitySource`]."""
        start = 0 if self.part is None else self.part.start
        return as_float(slice_encodings(self.tensors, torch.as_tensor(indices, dtype=torch.long) - start))


@dataclass
class EntityPart:
    """Some rows of an [`EntitySource`], as one of their own.

    Args:
        source ([`EntitySource`]): N entities.
        part (`range`): Which of them, a range without a step.
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
        some = self.part if rows is None else self.part[rows.start : rows.stop]
        for first, chunk in self.source.iter_chunks(chunk_size, rows=some, as_stored=as_stored):
            yield first - self.part.start, chunk

    def encodings(self, indices: Sequence[int] | np.ndarray) -> Encodings:
        """See [`EntitySource`]."""
        return self.source.encodings(np.asarray(indices) + self.part.start)


def part_of_process(count: int, processes: PartialState) -> range:
    """The rows of this process, when `count` rows are shared among all in order and as evenly as can be."""
    bounds = [count * k // processes.num_processes for k in range(processes.num_processes + 1)]
    return range(bounds[processes.process_index], bounds[processes.process_index + 1])


@dataclass
class RankingResult:
    """What [`rank`] found for M mentions among N entities, on the CPU.

    Args:
        top_scores (`torch.Tensor` `[M, k]`): The k best scores, best first; k is at most N.
        top_rows (`torch.Tensor` `[M, k]`): Their entity rows (`int64`); of equal scores the lower row comes first.
        gold_score (`torch.Tensor` `[M]`, *optional*): Score of the gold, nan for a mention without a gold row.
        best_rank (`torch.Tensor` `[M]`, *optional*): 1 + number of entities better than the gold (`int64`), 0 for a
            mention without a gold row.
        worst_rank (`torch.Tensor` `[M]`, *optional*): `best_rank` + number of other entities equal to the gold.
    """

    top_scores: torch.Tensor
    top_rows: torch.Tensor
    gold_score: torch.Tensor | None = None
    best_rank: torch.Tensor | None = None
    worst_rank: torch.Tensor | None = None


@torch.no_grad()
def rank(
    model: Any,
    mention_encodings: Encodings,
    entity_chunks: EntitySource,
    *,
    gold_rows: torch.Tensor | np.ndarray | Sequence[int] | None = None,
    top_k: int = 20,
    byte_budget: int = 2**29,
    tie_tolerance: float = 1e-6,
    score: ScoreFunction | None = None,
    prune: bool = True,
    processes: PartialState | None = None,
    progress: bool = False,
) -> RankingResult:
    """Scores M mentions against all N entities and keeps the k best and the position of each gold.

    One pass over the knowledge base, chunk by chunk; each chunk meets all mentions, batch by batch. What is kept are
    the k best so far and counts, so memory is that of one chunk, one block of pairs and the mentions' encodings. Pairs
    are scored in float32, whatever autocast is on around the call.

    A model that scores in two steps (see [`~hf_mel.protocols.Retriever`]) takes the second one only for pairs that may
    come among the k best so far or reach the gold: what is left out changes neither the k best nor any rank.

    Rounding in matrix products depends on the shape of a chunk, so identical entities need not score identically:
    an entity is *equal* to the gold if its score differs by at most `tie_tolerance` * max(1, |gold score|), *better*
    if it is above that.

    Args:
        model ([`~hf_mel.protocols.Retriever`]): Its `score` is used, on its device.
        mention_encodings (`Mapping[str, torch.Tensor]`): Tensors with first axis M.
        entity_chunks ([`EntitySource`]): The N entities.
        gold_rows (integers `[M]`, *optional*): Entity row of each mention's gold, -1 for none.
        top_k (`int`): How many entities to keep per mention; N if N is smaller.
        byte_budget (`int`): Memory for one block of scores and one chunk of entities on the model's device, in bytes.
            The mentions' encodings are there as well.
        tie_tolerance (`float`): See above.
        score (`Callable`, *optional*): (mentions, entities) → scores [M, N], in place of `model.score`.
        prune (`bool`): Whether to leave out what cannot matter, where the model can tell.
        processes (`accelerate.PartialState`, *optional*): Share the work among processes: all of them call this, each
            with its own part of the entities (see [`part_of_process`]) and the same mentions, whose `gold_rows` are
            those of the whole. Each gets the result of the whole, or the error of the first process that has one.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`RankingResult`].

    Raises:
        [`~hf_mel.errors.ScoreError`]: a score is nan or infinite; names the mention and the entity row.
        [`~hf_mel.errors.KnowledgeBaseError`]: no entities, or chunks that do not add up to N rows.
        [`~hf_mel.errors.UnknownEntityError`]: a gold row beyond the knowledge base.
        `ValueError`: `top_k` below 1, or not one gold row per mention.
    """
    two_steps = score is None and prune and hasattr(model, "remaining_scores")
    scorer = _Pruned(model) if two_steps else _Plain(score or model.score)
    device = torch.device(getattr(model, "device", "cpu"))
    team = _Alone() if processes is None else _Team(processes)
    mentions, sizes = num_rows(mention_encodings), team.gather(len(entity_chunks))
    start, entities = sum(sizes[: team.number]), sum(sizes)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}.")
    if not entities:
        raise KnowledgeBaseError("The knowledge base has no entities to rank.")
    golds = None if gold_rows is None else _checked_golds(gold_rows, mentions, entities).to(device)

    with team.all_or_none():
        sample = next((row_bytes(chunk) for _, chunk in entity_chunks.iter_chunks(1, as_stored=two_steps)), 0)
        mention_encodings = to_device(mention_encodings, device)
    half, least = byte_budget // 2, _SCORING_BYTES_PER_PAIR * min(mentions, 64)
    chunk_size = max(1, min(len(entity_chunks), _CHUNK_ROWS, half // max(1, least + sample)))
    pairs = min(half // _SCORING_BYTES_PER_PAIR, _BLOCK_PAIRS.get(device.type, 2**22))
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
        state = _State.start(mentions, min(top_k, entities), device)
        if golds is not None:
            with team.all_or_none():
                here = torch.where((golds >= start) & (golds < start + len(entity_chunks)), golds - start, -1)
                scores = _gold_scores(scorer, mention_encodings, here, entity_chunks)
            state.set_golds(golds, team.smallest(scores), tie_tolerance)
        with team.all_or_none():
            for first, chunk in _checked_chunks(entity_chunks, chunk_size, two_steps):
                chunk = to_device(chunk, device)
                for m in range(0, mentions, batch_size):
                    some = slice(m, min(m + batch_size, mentions))
                    batch, part = slice_encodings(mention_encodings, some), state.rows(some)
                    part.update(scorer.block(batch, chunk, part, (m, start + first)), start + first)
                    bar.update((some.stop - m) * num_rows(chunk))
        state.join(team)
    return state.result()


class _Alone:
    """One process."""

    number = 0

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process."""
        return [value]

    def smallest(self, values: torch.Tensor) -> torch.Tensor:
        """The smallest of all processes, value by value."""
        return torch.stack(self.gather(values)).amin(0)

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """What one process raises in the block is raised in all, so that none waits for another in vain."""
        yield


class _Team(_Alone):
    """Several processes of Accelerate."""

    def __init__(self, processes: PartialState):
        self.number = processes.process_index

    def gather(self, value: Any) -> list[Any]:
        """As [`_Alone.gather`]."""
        device = value.device if isinstance(value, torch.Tensor) else None
        values = gather_object([value if device is None else value.cpu()])
        return values if device is None else [each.to(device) for each in values]

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """As [`_Alone.all_or_none`]."""
        mine: Exception | None = None
        try:
            yield
        except Exception as error:  # of whatever kind: the others have to hear of it
            mine = error
        for theirs in self.gather(mine):
            if theirs is not None:
                raise mine or theirs


@dataclass
class _State:
    """What is known of M mentions after some entities: the k best, and how the gold stands.

    Args:
        top_scores, top_rows (`torch.Tensor` `[M, k]`): Best first; -inf where fewer than k were seen.
        golds, gold_score (`torch.Tensor` `[M]`, *optional*): -1 and inf for a mention without a gold row.
        above, below (`torch.Tensor` `[M]`, *optional*): A score beyond these is better, or worse, than the gold's.
        better, not_worse (`torch.Tensor` `[M]`, *optional*): Entities seen so far; the gold itself is not worse.
    """

    top_scores: torch.Tensor
    top_rows: torch.Tensor
    golds: torch.Tensor | None = None
    gold_score: torch.Tensor | None = None
    above: torch.Tensor | None = None
    below: torch.Tensor | None = None
    better: torch.Tensor | None = None
    not_worse: torch.Tensor | None = None

    @classmethod
    def start(cls, mentions: int, kept: int, device: torch.device) -> _State:
        rows = torch.zeros(mentions, kept, dtype=torch.long, device=device)
        return cls(torch.full((mentions, kept), -torch.inf, device=device), rows)

    def set_golds(self, golds: torch.Tensor, scores: torch.Tensor, tolerance: float) -> None:
        margin = tolerance * scores.abs().clamp(min=1)
        self.golds, self.gold_score = golds, scores
        # Without a gold, inf: nothing is as good.
        self.above = torch.where(golds >= 0, scores + margin, torch.inf)
        self.below = torch.where(golds >= 0, scores - margin, torch.inf)
        self.better, self.not_worse = torch.zeros_like(golds), torch.zeros_like(golds)

    def rows(self, some: slice) -> _State:
        """Views of some mentions."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: column[some] for name, column in columns.items() if column is not None})

    def update(self, block: torch.Tensor, first: int) -> None:
        """Takes in the scores [M, n] of the entity rows from `first` on, -inf where one is below the floor."""
        if self.golds is not None:
            assert self.gold_score is not None
            assert self.above is not None
            assert self.below is not None
            assert self.better is not None
            assert self.not_worse is not None
            # A gold scores what it did when it was compared with nothing else, whatever the shape of this block.
            here = ((self.golds >= first) & (self.golds < first + block.shape[1])).nonzero()[:, 0]
            block[here, self.golds[here] - first] = self.gold_score[here]
            self.better += (block > self.above[:, None]).sum(1)
            self.not_worse += (block >= self.below[:, None]).sum(1)
        # Rows come in order: one that equals the last of the k best comes too late.
        rows, columns = (block > self.top_scores[:, -1:]).nonzero(as_tuple=True)
        if not len(rows):
            return
        counts = torch.bincount(rows, minlength=len(block))
        width, kept = int(counts.max()), self.top_scores.shape[1]
        if width > 2 * kept:
            scores, new = _top_k(block, min(kept, block.shape[1]))
        else:
            place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
            scores = block.new_full((len(block), width), -torch.inf)
            new = rows.new_zeros((len(block), width))
            scores[rows, place], new[rows, place] = block[rows, columns], columns
        scores, new = torch.cat([self.top_scores, scores], 1), torch.cat([self.top_rows, new + first], 1)
        best = scores.sort(dim=1, descending=True, stable=True)
        self.top_scores[:] = best.values[:, :kept]
        self.top_rows[:] = new.gather(1, best.indices[:, :kept])

    def join(self, team: _Alone) -> None:
        """Takes in what the other processes saw; the entities of each come after those of the one before."""
        scores, rows = torch.cat(team.gather(self.top_scores), 1), torch.cat(team.gather(self.top_rows), 1)
        best, kept = scores.sort(dim=1, descending=True, stable=True), self.top_scores.shape[1]
        self.top_scores, self.top_rows = best.values[:, :kept], rows.gather(1, best.indices[:, :kept])
        if self.golds is not None:
            self.better, self.not_worse = sum(team.gather(self.better)), sum(team.gather(self.not_worse))

    def result(self) -> RankingResult:
        if self.golds is None:
            return RankingResult(self.top_scores.cpu(), self.top_rows.cpu())
        assert self.gold_score is not None
        assert self.better is not None
        assert self.not_worse is not None
        known = self.golds >= 0
        columns = (torch.where(known, self.gold_score, torch.nan), (self.better + 1) * known, self.not_worse)
        return RankingResult(*(tensor.cpu() for tensor in (self.top_scores, self.top_rows, *columns)))


def score_of_units(model: Any, units: Sequence[str]) -> ScoreFunction:
    """A score that is the mean of only these of the model's interaction units.

    Raises (when it scores):
        [`~hf_mel.errors.RecipeError`]: the model has no such unit.
    """

    def score(mentions: Encodings, entities: Encodings) -> torch.Tensor:
        scores = model.unit_scores(mentions, entities)
        missing = [unit for unit in units if unit not in scores]
        if missing or not units:
            raise RecipeError(
                f"The model has no unit {', '.join(map(repr, missing))}.",
                remedy=f"It has {', '.join(scores) or 'no units apart from its score'}.",
            )
        return torch.stack([scores[unit] for unit in units]).mean(0)

    return score


def _checked_golds(gold_rows, mentions: int, entities: int) -> torch.Tensor:
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
    """Scores of all pairs of a block."""

    def __init__(self, score: ScoreFunction):
        self.score = score

    def block(self, mentions: Encodings, entities: Encodings, state: _State, firsts: tuple[Any, Any]) -> torch.Tensor:
        """[M, n]; `firsts` are the numbers of the first mention and of the first entity."""
        block = self.score(mentions, entities).float()
        _check_block(block, mentions, entities, firsts)
        return block

    def diagonal(self, mentions: Encodings, entities: Encodings, numbers: tuple[Any, Any]) -> torch.Tensor:
        """Score of each mention with the entity of the same place, [M]; `numbers` are theirs."""
        block = self.score(mentions, entities).float()
        _check_block(block, mentions, entities, numbers)
        return block.diagonal()


class _Pruned:
    """Scores of the pairs of a block that can matter, by a model that scores in two steps; -inf for the others."""

    def __init__(self, model: Any):
        self.model = model

    def block(self, mentions: Encodings, entities: Encodings, state: _State, firsts: tuple[Any, Any]) -> torch.Tensor:
        """As [`_Plain.block`]."""
        quick = self.model.quick_scores(mentions, entities)
        _check_block(quick, mentions, entities, firsts)
        # Added up in another order, or in a block of another shape, a score may come out a little higher.
        spare = _ROUNDING * quick.abs().amax(1)
        last, kept = state.top_scores[:, -1], state.top_scores.shape[1]
        best = seeds = None
        if kept <= quick.shape[1] and (last == -torch.inf).any():
            # So far nothing is known: the k that look best now are no better than the k best.
            best = quick.topk(kept).indices
            some = torch.full_like(quick, torch.inf).scatter_(1, best, -torch.inf)
            seeds = self._remaining(mentions, entities, some).gather(1, best)
            last = torch.maximum(last, (quick.gather(1, best) + seeds).amin(1))
        floor = last if state.below is None else torch.minimum(last, state.below)
        needed = (floor - spare - _ROUNDING * floor.abs())[:, None] - quick
        if best is None or seeds is None:
            rest = self._remaining(mentions, entities, needed)
        else:
            rest = self._remaining(mentions, entities, needed.scatter_(1, best, torch.inf)).scatter_(1, best, seeds)
        self._check(quick, rest, mentions, entities, firsts)
        return quick.add_(rest)

    def diagonal(self, mentions: Encodings, entities: Encodings, numbers: tuple[Any, Any]) -> torch.Tensor:
        """As [`_Plain.diagonal`]."""
        quick = self.model.quick_scores(mentions, entities)
        _check_block(quick, mentions, entities, numbers)
        rest = self._remaining(mentions, entities, torch.full_like(quick, torch.inf).fill_diagonal_(-torch.inf))
        self._check(quick, rest, mentions, entities, numbers)
        return (quick + rest).diagonal()

    def _remaining(self, mentions: Encodings, entities: Encodings, floor: torch.Tensor) -> torch.Tensor:
        return self.model.remaining_scores(mentions, entities, floor)

    @staticmethod
    def _check(quick, rest, mentions, entities, numbers) -> None:
        if not rest.amax() < torch.inf:
            _check_block(quick + rest.masked_fill(rest == -torch.inf, 0), mentions, entities, numbers)


def _gold_scores(
    scorer: _Plain | _Pruned, mentions: Encodings, golds: torch.Tensor, entities: EntitySource
) -> torch.Tensor:
    """Score of each mention's gold, [M]; inf without one."""
    found = torch.full(golds.shape, torch.inf, device=golds.device)
    known = (golds >= 0).nonzero()[:, 0]
    for first in range(0, len(known), _GOLD_MENTIONS):
        some = known[first : first + _GOLD_MENTIONS]
        rows = golds[some]
        gold = to_device(entities.encodings(rows.cpu().numpy()), golds.device)
        found[some] = scorer.diagonal(slice_encodings(mentions, some), gold, (some, rows))
    return found


def _checked_chunks(chunks: EntitySource, chunk_size: int, as_stored: bool) -> Iterator[tuple[int, Encodings]]:
    """The chunks, if they follow one another up to the last entity."""
    seen, total = 0, len(chunks)
    for first, chunk in chunks.iter_chunks(chunk_size, as_stored=as_stored):
        if first != seen or first + num_rows(chunk) > total:
            break
        yield first, chunk
        seen += num_rows(chunk)
    if seen != total:
        raise KnowledgeBaseError(
            f"The chunks of the knowledge base do not follow one another up to its {total} entities: row {seen} is "
            "missing or comes out of turn."
        )


def _check_block(block, mentions, entities, firsts) -> None:
    """Refuses scores of a wrong shape, and scores that cannot be ranked; the firsts are numbers, or tensors of them."""
    count, size = num_rows(mentions), num_rows(entities)
    if block.shape != (count, size):
        raise ScoreError(f"{count} mentions and {size} entities need a score each, not shape {tuple(block.shape)}.")
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
            remedy="Look at the weights and at the encodings of these two rows for nan or overflow.",
        )


def _top_k(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row and their columns; equal values in the order of their columns."""
    values, columns = rows.topk(k)
    # topk picks any of the values that tie with the last one kept: where it had a choice, take the first columns.
    last = values[:, -1:]
    chosen = (rows == last).sum(1) > (values == last).sum(1)
    for row in chosen.nonzero().flatten().tolist():
        ordered = rows[row].sort(descending=True, stable=True)
        values[row], columns[row] = ordered.values[:k], ordered.indices[:k]
    by_column = columns.argsort(1)
    values, columns = values.gather(1, by_column), columns.gather(1, by_column)
    by_value = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, by_value), columns.gather(1, by_value)
