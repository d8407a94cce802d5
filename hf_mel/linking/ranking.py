"""Exact ranking: every mention against every entity, in memory that does not grow with mentions × entities."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_mel.errors import KnowledgeBaseError, RecipeError, ScoreError, UnknownEntityError
from hf_mel.linking.encodings import num_rows, row_bytes, slice_encodings, to_device
from hf_mel.schema import Encodings

ScoreFunction = Callable[[Encodings, Encodings], torch.Tensor]

# What one pair costs while a model scores it: a few unit scores and the temporaries of the widest unit, as float32.
_SCORING_BYTES_PER_PAIR = 96
# What one pair of the buffered rows costs: its score, and the comparisons and index of the selection.
_ROW_BYTES_PER_PAIR = 16


class EntitySource(Protocol):
    """N encoded entities that can be read again and again, in chunks: a knowledge base, or [`EncodedEntities`]."""

    @property
    def entity_ids(self) -> Sequence[str]:
        """Entity id of each row, [N]."""
        ...

    def __len__(self) -> int:
        """Number of entities."""
        ...

    def iter_chunks(self, chunk_size: int) -> Iterator[tuple[int, Encodings]]:
        """Yields (number of the first row, encodings of up to `chunk_size` rows), in row order and without gaps."""
        ...


@dataclass
class EncodedEntities:
    """An [`EntitySource`] in memory.

    Args:
        entity_ids (sequence of `str` `[N]`): Entity id of each row.
        encodings (`Mapping[str, torch.Tensor]`): Tensors with first axis N.
    """

    entity_ids: Sequence[str]
    encodings: Encodings

    def __post_init__(self):
        if len(self.entity_ids) != num_rows(self.encodings):
            raise ValueError(f"{len(self.entity_ids)} entity ids but {num_rows(self.encodings)} encoded rows.")

    def __len__(self) -> int:
        return len(self.entity_ids)

    def iter_chunks(self, chunk_size: int) -> Iterator[tuple[int, Encodings]]:
        """See [`EntitySource`]; the chunks are views."""
        for first in range(0, len(self), chunk_size):
            yield first, slice_encodings(self.encodings, slice(first, first + chunk_size))


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
    progress: bool = False,
) -> RankingResult:
    """Scores M mentions against all N entities and keeps the k best and the position of each gold.

    For a batch of mentions the rows of scores are gathered over all chunks of the knowledge base, then read once. The
    batch is as large as `byte_budget` allows (one mention at least), so a budget smaller than the rows of all mentions
    means as many passes over the chunks. Pairs are scored in float32, whatever autocast is on around the call.

    Rounding in matrix products depends on the shape of a chunk, so identical entities need not score identically:
    an entity is *equal* to the gold if its score differs by at most `tie_tolerance` * max(1, |gold score|), *better*
    if it is above that.

    Args:
        model ([`~hf_mel.schema.Retriever`]): Its `score` is used, on its device.
        mention_encodings (`Mapping[str, torch.Tensor]`): Tensors with first axis M.
        entity_chunks ([`EntitySource`]): The N entities.
        gold_rows (integers `[M]`, *optional*): Entity row of each mention's gold, -1 for none.
        top_k (`int`): How many entities to keep per mention; N if N is smaller.
        byte_budget (`int`): Memory for scores and for one chunk of entities on the model's device, in bytes. The
            mentions' encodings are there as well.
        tie_tolerance (`float`): See above.
        score (`Callable`, *optional*): (mentions, entities) → scores [M, N], in place of `model.score`.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`RankingResult`].

    Raises:
        [`~hf_mel.errors.ScoreError`]: a score is nan or infinite; names the mention and the entity row.
        [`~hf_mel.errors.KnowledgeBaseError`]: no entities, or chunks that do not add up to N rows.
        [`~hf_mel.errors.UnknownEntityError`]: a gold row beyond the knowledge base.
        `ValueError`: `top_k` below 1, or not one gold row per mention.
    """
    score = score or model.score
    device = torch.device(getattr(model, "device", "cpu"))
    mentions, entities = num_rows(mention_encodings), len(entity_chunks)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}.")
    if not entities:
        raise KnowledgeBaseError("The knowledge base has no entities to rank.")
    golds = None if gold_rows is None else _checked_golds(gold_rows, mentions, entities)

    _, sample = next(iter(entity_chunks.iter_chunks(1)))
    batch_size = max(1, min(mentions, byte_budget // 2 // (_ROW_BYTES_PER_PAIR * entities)))
    pair_bytes = _SCORING_BYTES_PER_PAIR * batch_size
    chunk_size = max(1, min(entities, byte_budget // 2 // (pair_bytes + row_bytes(sample))))

    mention_encodings = to_device(mention_encodings, device)
    kept = min(top_k, entities)
    # All that lives longer than one batch is allocated here: what is kept from a batch would otherwise lie between the
    # large blocks that it frees, and memory would grow with every batch.
    top_scores, top_rows = torch.empty(mentions, kept), torch.empty(mentions, kept, dtype=torch.long)
    gold_columns = () if golds is None else (torch.empty(mentions), torch.empty_like(golds), torch.empty_like(golds))
    buffer = torch.empty(batch_size, entities, device=device)
    pairs = tqdm(
        total=mentions * entities, desc="Ranking", unit="pair", unit_scale=True, delay=1, disable=not progress
    )
    with pairs, torch.autocast(device.type, enabled=False):
        for first in range(0, mentions, batch_size):
            some = slice(first, min(first + batch_size, mentions))
            rows = buffer[: some.stop - first]
            _fill_rows(rows, score, slice_encodings(mention_encodings, some), first, entity_chunks, chunk_size, pairs)
            top_scores[some], top_rows[some] = _top_k(rows, kept)
            if golds is not None:
                found = _gold_ranks(rows, golds[some].to(device), tie_tolerance)
                for column, values in zip(gold_columns, found, strict=True):
                    column[some] = values
    return RankingResult(top_scores, top_rows, *gold_columns)


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


def _fill_rows(rows, score, batch, first_mention, chunks, chunk_size, progress) -> None:
    """Writes the scores of one batch of mentions into `rows` [m, N], chunk by chunk."""
    count, total = rows.shape
    seen = 0
    for first, chunk in chunks.iter_chunks(chunk_size):
        size = num_rows(chunk)
        if first != seen or first + size > total:
            break
        block = score(batch, to_device(chunk, rows.device))
        if block.shape != (count, size):
            raise ScoreError(
                f"{count} mentions and {size} entities need a score each, not shape {tuple(block.shape)}."
            )
        low, high = torch.aminmax(block)  # both are nan if any score is
        if not (low.isfinite() and high.isfinite()):
            mention, entity = (~block.isfinite()).nonzero()[0].tolist()
            raise ScoreError(
                f"The score of mention {first_mention + mention} and entity row {first + entity} is "
                f"{block[mention, entity].item()}.",
                remedy="Look at the weights and at the encodings of these two rows for nan or overflow.",
            )
        rows[:, first : first + size] = block
        seen += size
        progress.update(count * size)
    if seen != total:
        raise KnowledgeBaseError(
            f"The chunks of the knowledge base do not follow one another up to its {total} entities: row {seen} is "
            "missing or comes out of turn."
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


def _gold_ranks(rows: torch.Tensor, golds: torch.Tensor, tolerance: float) -> tuple[torch.Tensor, ...]:
    """Score, best and worst rank of each gold among its row, [m] each."""
    known = golds >= 0
    gold_score = rows.gather(1, golds.clamp(min=0)[:, None])[:, 0]
    margin = tolerance * gold_score.abs().clamp(min=1)
    better = (rows > (gold_score + margin)[:, None]).sum(1)
    not_worse = (rows >= (gold_score - margin)[:, None]).sum(1)  # the gold itself is one of them
    nothing = torch.zeros_like(better)
    return (
        torch.where(known, gold_score, torch.nan),
        torch.where(known, better + 1, nothing),
        torch.where(known, not_worse, nothing),
    )
