"""Scoring candidate lists with a reranker: pairs in length-sorted batches, each image encoded once, contexts whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm

from hf_mel.data.examples import example_groups
from hf_mel.data.lazy_rows import LazyRow, LazyRows, with_prior
from hf_mel.errors import ScoreError, UnknownEntityError
from hf_mel.inference.features.image_features import ImageFeatures
from hf_mel.inference.inputs import images_per_entity, model_inputs
from hf_mel.protocols import MelProcessor
from hf_mel.schema import Row

#: Pairs that are sorted together, and whose features are held for ranking jointly: bounds memory.
_CHUNK_PAIRS = 8192


@dataclass
class PairScores:
    """Scores of M mentions with up to C candidates each, on the CPU as float32; -inf where there is no candidate.

    Args:
        scores (`torch.Tensor` `[M, C]`): The model's scores, higher is better.
        joint (`list[torch.Tensor]`, each `[M, C]`): The scores after ranking the mentions of each context together,
            one for every mask asked for; a candidate outside that mask has -inf.
    """

    scores: torch.Tensor
    joint: list[torch.Tensor] = field(default_factory=list)


def score_pairs(
    model: Any,
    processor: MelProcessor,
    mentions: datasets.Dataset | Sequence[Row],
    entities: datasets.Dataset | Sequence[Row],
    candidates: Sequence[Sequence[int]],
    *,
    priors: Sequence[Sequence[float]] | None = None,
    joint_masks: Sequence[torch.Tensor] = (),
    images: ImageFeatures | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> PairScores:
    """Scores M mentions with their candidates.

    Where the model says that pairs are independent, they are scored one by one in batches of about the same length;
    otherwise a batch holds whole examples. The images of one pass are encoded once each, if the model offers
    `encode_images`. The model is put in evaluation mode, and back into its own afterwards.

    Args:
        model ([`~hf_mel.protocols.Reranker`]): Scores, on the device it is on.
        processor ([`~hf_mel.protocols.MelProcessor`]): Turns pairs into the model's tensors.
        mentions (`datasets.Dataset` or sequence of rows): M mentions. To rank jointly, or for a model whose examples are
            contexts or documents, all of each ([`~hf_mel.data.examples.example_groups`]). A mention without candidates
            is not shown to the model.
        entities (`datasets.Dataset` or sequence of rows): N entities.
        candidates (M sequences of `int`): Rows of `entities`, up to C for each mention; none is fine.
        priors (M sequences of `float`, *optional*): p(e|m) of the candidates, which their rows then carry as `prior`.
        joint_masks (sequence of `torch.Tensor` `[M, C]`): For each, rank jointly among the candidates where it is true.
        images ([`ImageFeatures`], *optional*): Images that are encoded already, and where further ones are kept.
        batch_size (`int`): Pairs to score at a time; a larger example of dependent pairs is a batch of its own.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`PairScores`].

    Raises:
        [`~hf_mel.errors.ScoreError`]: a score is nan or infinite; names the mention and the entity.
        [`~hf_mel.errors.UnknownEntityError`]: a candidate is not a row of `entities`; names the mention.
        [`~hf_mel.errors.ImageError`]: an image is damaged.
        [`~hf_mel.errors.DataFormatError`]: an example has more mentions than the model's `max_mentions`.
        `ValueError`: not one list of candidates per mention or not one prior per candidate, or joint masks for a model that cannot rank jointly.
    """
    if len(candidates) != len(mentions):
        raise ValueError(f"{len(mentions)} mentions need as many lists of candidates, not {len(candidates)}.")
    if priors is not None and list(map(len, priors)) != list(map(len, candidates)):
        raise ValueError("There must be one prior per candidate.")
    if len(joint_masks) and not can_rank_jointly(model):
        raise ValueError(f"{type(model).__name__} cannot rank the mentions of a context jointly.")
    count = images_per_entity(processor)
    mention_rows, entity_rows = _source(mentions, count), _source(entities, count)
    width = max((len(each) for each in candidates), default=0)
    shape = (len(mentions), width)
    result = PairScores(torch.full(shape, -torch.inf), [torch.full(shape, -torch.inf) for _ in joint_masks])
    unit = str(getattr(model, "example_unit", "mention"))
    # Those of single mentions come by context all the same: it may be ranked jointly.
    groups = example_groups(mentions, "context" if unit == "mention" else unit, getattr(model, "max_mentions", None))
    own = images is None
    images = ImageFeatures.of(model, processor) if images is None else images
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        total = sum(map(len, candidates))
        with (
            tqdm(total=total, desc="Reranking", unit="pair", unit_scale=True, delay=1, disable=not progress) as bar,
            torch.inference_mode(),
        ):
            for chunk in _chunks(groups, candidates):
                numbers = [i for context in chunk for i in context if len(candidates[i])]
                if not numbers:
                    continue
                wanted = sorted({row for i in numbers for row in candidates[i]})
                _check_rows(wanted, len(entities), numbers, candidates)
                rows = dict(zip(numbers, mention_rows(numbers), strict=True))
                known = dict(zip(wanted, entity_rows(wanted), strict=True))
                if images is not None:
                    rows = dict(zip(rows, images.on(rows.values()), strict=True))
                    known = dict(zip(known, images.on(known.values()), strict=True))
                score = _score_single if model.pairs_are_independent else _score_whole
                places = [[i for i in context if len(candidates[i])] for context in chunk]

                def listed(i: int, c: int, known: dict[int, Row] = known) -> Row:
                    """The row of the c-th candidate of mention i."""
                    entity = known[candidates[i][c]]
                    return entity if priors is None else with_prior(entity, float(priors[i][c]))

                scores, features = score(model, processor, rows, known, candidates, places, listed, batch_size, bar)
                result.scores[numbers, : scores.shape[1]] = scores
                if joint_masks:
                    ids = {i: number for number, context in enumerate(chunk) for i in context}
                    context = torch.tensor([ids[i] for i in numbers])
                    for mask, found in zip(joint_masks, result.joint, strict=True):
                        found[numbers] = _jointly(model, result.scores[numbers], features, mask[numbers], context)
                if images is not None and own:
                    images.forget_mentions()
    finally:
        if training:
            model.train()
    return result


def can_rank_jointly(model: Any) -> bool:
    """Whether the model ranks the mentions of one context together (see [`~hf_mel.protocols.Reranker`])."""
    return callable(getattr(model, "rank_jointly", None))


def _source(rows: datasets.Dataset | Sequence[Row], count: int | None):
    """Rows by their numbers: those of a data set, read when they are asked for, an entity with its first images only."""
    if not isinstance(rows, datasets.Dataset):
        return lambda numbers: [rows[i] for i in numbers]
    lazy = LazyRows(rows)

    def read(numbers: list[int]) -> list[LazyRow]:
        found = lazy.__getitems__(numbers)
        if "images" not in rows.column_names:
            return found
        return [row.first_images("images", count) for row in found]

    return read


def _chunks(contexts: list[list[int]], candidates: Sequence[Sequence[int]]) -> Iterator[list[list[int]]]:
    """Whole contexts, of about `_CHUNK_PAIRS` pairs together."""
    chunk: list[list[int]] = []
    pairs = 0
    for context in contexts:
        chunk.append(context)
        pairs += sum(len(candidates[i]) for i in context)
        if pairs >= _CHUNK_PAIRS:
            yield chunk
            chunk, pairs = [], 0
    if chunk:
        yield chunk


def _check_rows(wanted: list[int], entities: int, numbers: list[int], candidates: Sequence[Sequence[int]]) -> None:
    outside = {row for row in (wanted[0], wanted[-1]) if not 0 <= row < entities}
    if outside:
        number = next(i for i in numbers if outside & set(candidates[i]))
        raise UnknownEntityError(
            f"candidate row {min(outside)} is not one of the {entities} entities.",
            row=number,
            remedy="Make the candidates from this knowledge base.",
        )


def _score_single(model, processor, rows, entities, candidates, contexts, listed, batch_size, bar):
    """Scores [m, C] and features [m, C, d] (or `None`) of independent pairs, the longest first."""
    numbers = [i for context in contexts for i in context]
    width = max(len(candidates[i]) for i in numbers)
    scores, features = torch.full((len(numbers), width), -torch.inf), None
    lengths = {i: len(row["text"]) for i, row in rows.items()}
    sizes = {
        j: sum(len(row.get(part) or "") for part in ("name", "description", "attributes"))
        for j, row in entities.items()
    }
    pairs = [(k, i, c, j) for k, i in enumerate(numbers) for c, j in enumerate(candidates[i])]
    pairs.sort(key=lambda pair: lengths[pair[1]] + sizes[pair[3]], reverse=True)
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first : first + batch_size]
        output = _forward(model, processor, [(rows[i], [listed(i, c)]) for _, i, c, _ in batch])
        found = output["scores"][:, 0].float().cpu()
        _check(found, [(rows[i], entities[j]) for _, i, _, j in batch])
        at = [k for k, *_ in batch], [c for _, _, c, _ in batch]
        scores[at] = found
        if (vectors := output.get("features")) is not None:
            if features is None:
                features = torch.zeros(len(numbers), width, vectors.shape[-1])
            features[at] = vectors[:, 0].float().cpu()
        bar.update(len(batch))
    return scores, features


def _score_whole(model, processor, rows, entities, candidates, contexts, listed, batch_size, bar):
    """As [`_score_single`], with batches of whole examples."""
    numbers = [i for context in contexts for i in context]
    place = {i: k for k, i in enumerate(numbers)}
    width = max(len(candidates[i]) for i in numbers)
    scores, features = torch.full((len(numbers), width), -torch.inf), None
    examples = [[i] for i in numbers] if model.example_unit == "mention" else [each for each in contexts if each]
    for batch in _batches(examples, candidates, batch_size):
        pairs = [(rows[i], [listed(i, c) for c in range(len(candidates[i]))]) for i in batch]
        output = _forward(model, processor, pairs)
        found, vectors = output["scores"].float().cpu(), output.get("features")
        for k, (i, (mention, shown)) in enumerate(zip(batch, pairs, strict=True)):
            _check(found[k, : len(shown)], [(mention, entity) for entity in shown])
            scores[place[i], : len(shown)] = found[k, : len(shown)]
            if vectors is not None:
                if features is None:
                    features = torch.zeros(len(numbers), width, vectors.shape[-1])
                features[place[i], : len(shown)] = vectors[k, : len(shown)].float().cpu()
            bar.update(len(shown))
    return scores, features


def _batches(examples, candidates, batch_size: int) -> Iterator[list[int]]:
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


def _forward(model: Any, processor: MelProcessor, pairs: list[tuple[Row, list[Row]]]) -> Mapping[str, Any]:
    return model(**model_inputs(model, processor(pairs=pairs)))


def _check(scores: torch.Tensor, pairs: Sequence[tuple[Row, Row]]) -> None:
    wrong = (~scores.isfinite()).nonzero().flatten()
    if len(wrong):
        k = int(wrong[0])
        raise ScoreError(
            f"the score with entity {pairs[k][1].get('entity_id')!r} is {scores[k].item()}.",
            row=pairs[k][0].get("mention_id"),
            remedy="Look at the weights and at the tensors of this pair for nan or overflow.",
        )


def _jointly(model: Any, scores, features, mask, contexts) -> torch.Tensor:
    """Scores [m, C] of ranking jointly; mentions without a candidate in `mask` stay out of it."""
    mask = mask & scores.isfinite()
    result = torch.full_like(scores, -torch.inf)
    some = mask.any(1)
    if not some.any():
        return result
    width = features.shape[1]
    device = getattr(model, "device", "cpu")
    inside, chosen = mask[some, :width], scores[some, :width]
    arguments = (chosen.masked_fill(~inside, -torch.inf), features[some], inside, contexts[some])
    with torch.autocast(torch.device(device).type, enabled=False):
        found = model.rank_jointly(*(tensor.to(device) for tensor in arguments)).float().cpu()
    if not found[inside].isfinite().all():
        raise ScoreError(f"{type(model).__name__}.rank_jointly gave a score that is nan or infinite.")
    result[some, :width] = found.masked_fill(~inside, -torch.inf)
    return result
