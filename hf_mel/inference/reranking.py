"""Scoring candidate lists: with a reranker, whose pairs come in length-sorted batches with each image encoded once and whole
contexts, or with a retriever, which encodes each mention and candidate once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from hf_mel.data.examples import example_groups
from hf_mel.data.lazy_rows import LazyRow, LazyRows, with_rgb_images, with_scores
from hf_mel.errors import ScoreError, UnknownEntityError
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.encodings import slice_encodings, to_device
from hf_mel.inference.execution import evaluation_mode, model_device
from hf_mel.inference.features.image_features import ImageFeatures
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.ranking import process_group
from hf_mel.protocols import images_per_entity, max_mentions, ranks_jointly
from hf_mel.schema import Row

#: Pairs that are sorted together, and whose features are held for ranking jointly. Bounds memory.
_CHUNK_PAIRS = 8192
#: Mentions that a retriever scores with all their candidates at a time. Few of these pairs are wanted, so it is small.
_LISTED_MENTIONS = 8


@dataclass
class PairScores:
    """Scores of M mentions with up to C candidates each, on the CPU as float32; -inf without a candidate.

    Args:
        scores (`torch.Tensor` `[M, C]`): The model's scores, higher is better.
        joint (`list[torch.Tensor]`, each `[M, C]`): For every joint mask, the scores after ranking the mentions of each
            context together; -inf outside the mask.
    """

    scores: torch.Tensor
    joint: list[torch.Tensor] = field(default_factory=list)


def score_pairs(
    inputs: ModelInputs,
    mentions: datasets.Dataset | Sequence[Row],
    entities: datasets.Dataset | Sequence[Row],
    candidates: Sequence[Sequence[int]],
    *,
    priors: Sequence[Sequence[float]] | None = None,
    list_scores: Sequence[Sequence[float]] | None = None,
    joint_masks: Sequence[torch.Tensor] = (),
    batch_size: int = 64,
    processes: PartialState | None = None,
    progress: bool = False,
) -> PairScores:
    """Scores M mentions with their candidates, in evaluation mode.

    If the model's pairs are independent, they are scored in batches of similar length; otherwise a batch holds whole
    examples. Each image is encoded once if the model encodes images apart ([`~hf_mel.protocols.EncodesImages`]).

    Args:
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): A reranker and its processor. Precomputed image features are
            used, and features of further images added to them.
        mentions (`datasets.Dataset` or sequence of rows): M mentions. To rank jointly, or for a model whose examples are
            contexts or documents, all mentions of each ([`~hf_mel.data.examples.example_groups`]). The model does not
            see mentions without candidates.
        entities (`datasets.Dataset` or sequence of rows): N entities.
        candidates (M sequences of `int`): Rows of `entities`, 0 to C for each mention.
        priors (M sequences of `float`, *optional*): p(e|m) of the candidates, which their rows then carry as `prior`.
        list_scores (M sequences of `float`, *optional*): Scores of the list, which the rows then carry as `list_score`
            ([`~hf_mel.protocols.Reranker`]).
        joint_masks (sequence of `torch.Tensor` `[M, C]`): For each mask, rank jointly among the candidates it selects.
        batch_size (`int`): Pairs per forward pass. An example of dependent pairs that is larger is a batch of its own.
        processes (`accelerate.PartialState`, *optional*): Processes that share the contexts or documents. All of them make
            this call, and get the scores of all mentions, or the error of the first process that has one.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`PairScores`].

    Raises:
        [`~hf_mel.errors.ScoreError`]: A score is nan or infinite; names the mention and the entity.
        [`~hf_mel.errors.UnknownEntityError`]: A candidate is not a row of `entities`; names the mention.
        [`~hf_mel.errors.ImageError`]: An image is damaged.
        [`~hf_mel.errors.DataFormatError`]: An example has more mentions than the model's `max_mentions`.
        `ValueError`: The lengths of `candidates`, `priors` or `list_scores` do not match, or the model cannot rank
            jointly.
    """
    model = inputs.model
    if len(candidates) != len(mentions):
        raise ValueError(f"{len(mentions)} mentions need as many lists of candidates, not {len(candidates)}.")
    for name, values in (("prior", priors), ("list score", list_scores)):
        if values is not None and list(map(len, values)) != list(map(len, candidates)):
            raise ValueError(f"There must be one {name} per candidate.")
    if len(joint_masks) and not ranks_jointly(model):
        raise ValueError(f"{type(model).__name__} cannot rank the mentions of a context jointly.")
    limit = images_per_entity(inputs.processor)
    read_mentions, read_entities = _row_reader(mentions, limit), _row_reader(entities, limit)
    shape = (len(mentions), max((len(rows) for rows in candidates), default=0))
    result = PairScores(torch.full(shape, -torch.inf), [torch.full(shape, -torch.inf) for _ in joint_masks])
    unit = str(getattr(model, "example_unit", "mention"))
    # Single mentions are grouped by context, too, because a context may be ranked jointly.
    groups = example_groups(mentions, "context" if unit == "mention" else unit, max_mentions(model))
    images = inputs.image_features
    if images is None:  # a cache for this call only: training may change the image encoder
        images = ImageFeatures.for_model(model, inputs.processor)
    group_of_processes = process_group(processes)
    if processes is not None:
        groups = groups[processes.process_index :: processes.num_processes]
    total = sum(len(candidates[i]) for group in groups for i in group)
    with (
        group_of_processes.raise_together(),
        evaluation_mode(model),
        tqdm(total=total, desc="Reranking", unit="pair", unit_scale=True, delay=1, disable=not progress) as bar,
        torch.inference_mode(),
    ):
        for chunk in _chunks(groups, candidates):
            groups_in_chunk = [[i for i in group if len(candidates[i])] for group in chunk]
            numbers = [i for group in groups_in_chunk for i in group]
            if not numbers:
                continue
            entity_numbers = sorted({row for i in numbers for row in candidates[i]})
            _check_rows(entity_numbers, len(entities), numbers, candidates)
            mention_rows = dict(zip(numbers, read_mentions(numbers), strict=True))
            entity_rows = dict(zip(entity_numbers, read_entities(entity_numbers), strict=True))
            if images is not None:
                mention_rows = dict(zip(numbers, images.attach(mention_rows.values()), strict=True))
                entity_rows = dict(zip(entity_numbers, images.attach(entity_rows.values()), strict=True))
            pairs = _Pairs(mention_rows, entity_rows, candidates, priors, list_scores)
            score = _score_independent if model.pairs_are_independent else _score_examples
            scores, features = score(inputs, pairs, groups_in_chunk, batch_size, bar.update)
            result.scores[numbers, : scores.shape[1]] = scores
            if joint_masks:
                contexts = torch.tensor([k for k, group in enumerate(groups_in_chunk) for _ in group])
                for mask, joint in zip(joint_masks, result.joint, strict=True):
                    joint[numbers] = _joint_scores(
                        model,
                        result.scores[numbers],
                        features,
                        mask[numbers],
                        contexts,
                        [candidates[number] for number in numbers],
                    )
            if images is not None and inputs.image_features is None:
                images.forget_mentions()
    if processes is not None:  # every score is -inf in all processes but one
        whole = [torch.stack(group_of_processes.gather(scores)).amax(0) for scores in (result.scores, *result.joint)]
        result = PairScores(whole[0], whole[1:])
    inputs.left_out.warn("pairs")
    return result


@torch.no_grad()
def score_listed(
    inputs: ModelInputs,
    mentions: datasets.Dataset,
    entities: datasets.Dataset,
    candidates: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> torch.Tensor:
    """Scores M mentions with their candidates by a retriever, in evaluation mode. Only entities in a list are encoded.

    Args:
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): A retriever and its processor.
        mentions (`datasets.Dataset`): M mentions.
        entities (`datasets.Dataset`): N entities.
        candidates (M sequences of `int`): Rows of `entities`, 0 to C for each mention.
        batch_size (`int`): Rows per forward pass.
        progress (`bool`): Whether to show progress bars.

    Returns:
        `torch.Tensor` `[M, C]`: the scores, on the CPU as float32; -inf without a candidate.

    Raises:
        [`~hf_mel.errors.ScoreError`]: A score is nan or infinite; names the mention and the entity.
    """
    scores = torch.full((len(mentions), max(map(len, candidates), default=0)), -torch.inf)
    rows = sorted({row for listed in candidates for row in listed})
    if not rows:
        return scores
    place_of = {row: place for place, row in enumerate(rows)}
    model, device = inputs.model, model_device(inputs.model)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    with evaluation_mode(model):
        entity_encodings = encode_rows(inputs, entities.select(rows), "entities", **options)
        mention_encodings = encode_rows(inputs, mentions, "mentions", **options)
        for first in range(0, len(mentions), _LISTED_MENTIONS):
            numbers = range(first, min(first + _LISTED_MENTIONS, len(mentions)))
            places = sorted({place_of[row] for number in numbers for row in candidates[number]})
            if not places:
                continue
            column_of = {place: column for column, place in enumerate(places)}
            block = model.score(
                to_device(slice_encodings(mention_encodings, slice(numbers.start, numbers.stop)), device),
                to_device(slice_encodings(entity_encodings, places), device),
            )
            for number, of_mention in zip(numbers, block.float().cpu(), strict=True):
                columns = [column_of[place_of[row]] for row in candidates[number]]
                scores[number, : len(columns)] = of_mention[columns]
    wrong = [(i, c) for i, listed in enumerate(candidates) for c in range(len(listed)) if not scores[i, c].isfinite()]
    if wrong:
        mention, column = wrong[0]
        raise ScoreError(
            f"The score with entity {entities['entity_id'][candidates[mention][column]]!r} is {scores[mention, column]}.",
            row=mentions["mention_id"][mention],
            remedy="Look for nan or overflow in the weights and in the encodings of these two rows.",
        )
    return scores


@dataclass
class _Pairs:
    """The rows of the mentions and candidates of one chunk.

    Args:
        mentions, entities (`dict[int, Row]`): Rows by their numbers.
        candidates, priors, list_scores: As in [`score_pairs`], of all mentions.
    """

    mentions: dict[int, Row]
    entities: dict[int, Row]
    candidates: Sequence[Sequence[int]]
    priors: Sequence[Sequence[float]] | None
    list_scores: Sequence[Sequence[float]] | None

    def candidate(self, i: int, c: int) -> Row:
        """Returns the row of candidate c of mention i, with its prior and its list score."""
        return with_scores(
            self.entities[self.candidates[i][c]],
            prior=None if self.priors is None else float(self.priors[i][c]),
            list_score=None if self.list_scores is None else float(self.list_scores[i][c]),
        )


def _row_reader(rows: datasets.Dataset | Sequence[Row], limit: int | None) -> Callable[[list[int]], list[Any]]:
    """Returns a function from row numbers to rows. Rows of a data set are read on demand, entities with their first
    `limit` images.
    """
    if not isinstance(rows, datasets.Dataset):
        return lambda numbers: [with_rgb_images(rows[i]) for i in numbers]
    lazy = LazyRows(rows)

    def read(numbers: list[int]) -> list[LazyRow]:
        selected = lazy.__getitems__(numbers)
        if "images" not in rows.column_names:
            return selected
        return [row.first_images("images", limit) for row in selected]

    return read


def _chunks(groups: list[list[int]], candidates: Sequence[Sequence[int]]) -> Iterator[list[list[int]]]:
    """Yields whole groups of mentions with about `_CHUNK_PAIRS` pairs together."""
    chunk: list[list[int]] = []
    pairs = 0
    for group in groups:
        chunk.append(group)
        pairs += sum(len(candidates[i]) for i in group)
        if pairs >= _CHUNK_PAIRS:
            yield chunk
            chunk, pairs = [], 0
    if chunk:
        yield chunk


def _check_rows(
    sorted_rows: list[int], num_entities: int, numbers: list[int], candidates: Sequence[Sequence[int]]
) -> None:
    outside = {row for row in (sorted_rows[0], sorted_rows[-1]) if not 0 <= row < num_entities}
    if outside:
        number = next(i for i in numbers if outside & set(candidates[i]))
        raise UnknownEntityError(
            f"Candidate row {min(outside)} is not one of the {num_entities} entities.",
            row=number,
            remedy="Make the candidates from this knowledge base.",
        )


def _score_independent(
    inputs: ModelInputs,
    pairs: _Pairs,
    groups: list[list[int]],
    batch_size: int,
    progress: Callable[[int], Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns scores [m, C] and features [m, C, d] (or `None`) of independent pairs, scoring the longest first."""
    numbers = [i for group in groups for i in group]
    candidates = pairs.candidates
    output = _ChunkOutput(len(numbers), max(len(candidates[i]) for i in numbers))
    mention_lengths = {i: len(row["text"]) for i, row in pairs.mentions.items()}
    entity_lengths = {
        j: sum(len(row.get(part) or "") for part in ("name", "description", "attributes"))
        for j, row in pairs.entities.items()
    }
    order = [(k, i, c, j) for k, i in enumerate(numbers) for c, j in enumerate(candidates[i])]
    order.sort(key=lambda pair: mention_lengths[pair[1]] + entity_lengths[pair[3]], reverse=True)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        rows = [(pairs.mentions[i], [pairs.candidate(i, c)]) for _, i, c, _ in batch]
        inputs.left_out.add("pairs", rows)
        model_output = inputs.model(**inputs.pairs(rows))
        scores = model_output["scores"][:, 0].float().cpu()
        _check_scores(scores, [(pairs.mentions[i], pairs.entities[j]) for _, i, _, j in batch])
        vectors = model_output.get("features")
        places = [k for k, *_ in batch], [c for _, _, c, _ in batch]
        output.set(places, scores, None if vectors is None else vectors[:, 0])
        progress(len(batch))
    return output.scores, output.features


def _score_examples(
    inputs: ModelInputs,
    pairs: _Pairs,
    groups: list[list[int]],
    batch_size: int,
    progress: Callable[[int], Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As [`_score_independent`], with batches of whole examples."""
    numbers = [i for group in groups for i in group]
    place_of = {i: k for k, i in enumerate(numbers)}
    candidates = pairs.candidates
    output = _ChunkOutput(len(numbers), max(len(candidates[i]) for i in numbers))
    examples = (
        [[i] for i in numbers] if inputs.model.example_unit == "mention" else [group for group in groups if group]
    )
    for batch in _example_batches(examples, candidates, batch_size):
        rows = [(pairs.mentions[i], [pairs.candidate(i, c) for c in range(len(candidates[i]))]) for i in batch]
        inputs.left_out.add("pairs", rows)
        model_output = inputs.model(**inputs.pairs(rows))
        scores, vectors = model_output["scores"].float().cpu(), model_output.get("features")
        for k, (i, (mention, entities)) in enumerate(zip(batch, rows, strict=True)):
            count = len(entities)
            _check_scores(scores[k, :count], [(mention, entity) for entity in entities])
            output.set((place_of[i], slice(count)), scores[k, :count], None if vectors is None else vectors[k, :count])
            progress(count)
    return output.scores, output.features


class _ChunkOutput:
    """Scores [m, C], -inf without a candidate, and features [m, C, d], which exist once the model gave some."""

    def __init__(self, mentions: int, width: int):
        self.scores = torch.full((mentions, width), -torch.inf)
        self.features: torch.Tensor | None = None

    def set(self, index: Any, scores: torch.Tensor, features: torch.Tensor | None) -> None:
        """Sets the scores [n], and the features [n, d] if the model has any, at an index of the first two axes."""
        self.scores[index] = scores
        if features is not None:
            if self.features is None:
                self.features = torch.zeros(*self.scores.shape, features.shape[-1])
            self.features[index] = features.float().cpu()


def _example_batches(
    examples: list[list[int]], candidates: Sequence[Sequence[int]], batch_size: int
) -> Iterator[list[int]]:
    """Yields mentions of whole examples with up to `batch_size` pairs, or of one example that has more."""
    batch: list[int] = []
    pairs = 0
    for example in examples:
        size = sum(len(candidates[i]) for i in example)
        if batch and pairs + size > batch_size:
            yield batch
            batch, pairs = [], 0
        batch, pairs = batch + example, pairs + size
    if batch:
        yield batch


def _check_scores(scores: torch.Tensor, pairs: Sequence[tuple[Row, Row]]) -> None:
    wrong = (~scores.isfinite()).nonzero().flatten()
    if len(wrong):
        k = int(wrong[0])
        mention, entity = pairs[k]
        raise ScoreError(
            f"The score with entity {entity.get('entity_id')!r} is {scores[k].item()}.",
            row=mention.get("mention_id"),
            remedy="Look for nan or overflow in the weights and in the tensors of this pair.",
        )


def _joint_scores(
    model: Any,
    scores: torch.Tensor,
    features: Any,
    mask: torch.Tensor,
    contexts: torch.Tensor,
    candidates: Sequence[Sequence[int]],
) -> torch.Tensor:
    """Returns the scores [m, C] of ranking jointly. Mentions without a candidate in `mask` do not take part."""
    mask = mask & scores.isfinite()
    result = torch.full_like(scores, -torch.inf)
    taking_part = mask.any(1)
    if not taking_part.any():
        return result
    width = features.shape[1]
    device = model_device(model)
    inner_mask, inner_scores = mask[taking_part, :width], scores[taking_part, :width]
    arguments: tuple[torch.Tensor, ...] = (
        inner_scores.masked_fill(~inner_mask, -torch.inf),
        features[taking_part],
        inner_mask,
        contexts[taking_part],
    )
    if "entities" in inspect.signature(model.rank_jointly).parameters:
        entities = torch.full(mask.shape, -1)
        for row, numbers in enumerate(candidates):
            entities[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.long)
        arguments = (*arguments, entities[taking_part, :width])
    with torch.autocast(device.type, enabled=False):
        joint = model.rank_jointly(*(tensor.to(device) for tensor in arguments)).float().cpu()
    if not joint[inner_mask].isfinite().all():
        raise ScoreError(f"{type(model).__name__}.rank_jointly gave a score that is nan or infinite.")
    result[taking_part, :width] = joint.masked_fill(~inner_mask, -torch.inf)
    return result
