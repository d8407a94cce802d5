"""Chooses the weight of the names: how much an entity's name counts beside the score of the model."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np

from hf_mel.candidates.name_index import NameIndex
from hf_mel.data.loading import check_golds
from hf_mel.errors import RecipeError
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.encodings import slice_encodings
from hf_mel.inference.entity_sources import EncodedEntities, EntitySource
from hf_mel.inference.execution import evaluation_mode
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.ranking import TIE_TOLERANCE, rank
from hf_mel.schema import NIL

#: Weights that [`choose_name_weight`] tries, times the spread of the model's scores. With 0 the model decides alone.
_WEIGHTS = (0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4)
#: A gold on a later rank counts 0 in the choice.
_DEPTH = 64


@dataclass
class NameWeight:
    """A chosen weight of the names.

    Args:
        weight (`float`): The weight w of score + w · name score.
        chosen_by_mrr (`dict[str, float]`): MRR on the mentions it was chosen on, by weight. A gold that is not among the
            first 64 counts 0.
    """

    weight: float
    chosen_by_mrr: dict[str, float]


def choose_name_weight(
    inputs: ModelInputs,
    mentions: datasets.Dataset,
    entities: EntitySource,
    names: NameIndex,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> NameWeight:
    """Returns the weight of the names with the highest MRR on M mentions; of equally good ones, the lowest.

    The entities are ranked once, without names. An entity that a weight moves among the first 64 of a mention has a name
    score, or is among the first 64 without names. So only these are scored for every weight.

    Args:
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): A retriever and its processor.
        mentions (`datasets.Dataset`): Mentions of a validation split. Those whose gold is NIL do not count.
        entities ([`~hf_mel.inference.entity_sources.EntitySource`]): N encoded entities.
        names ([`~hf_mel.candidates.name_index.NameIndex`]): The index of their names, in the same order.
        batch_size (`int`): Mentions per forward pass.
        progress (`bool`): Whether to show progress bars.

    Raises:
        [`~hf_mel.errors.RecipeError`]: No gold is in the knowledge base.
        [`~hf_mel.errors.UnknownEntityError`]: A gold is neither in the knowledge base nor NIL.
    """
    check_golds(mentions, entities.entity_ids)
    mentions = mentions.select([row for row, gold in enumerate(mentions["entity_id"]) if gold != NIL])
    if not len(mentions):
        raise RecipeError(
            "A weight of the names cannot be chosen: no mention's gold is in the knowledge base.",
            remedy="Give a number.",
        )
    row_of = {entity_id: row for row, entity_id in enumerate(entities.entity_ids)}
    name_scores = names.scores([surface or "" for surface in mentions["mention"]])
    with evaluation_mode(inputs.model):
        encodings = encode_rows(inputs, mentions, "mentions", batch_size=batch_size, progress=progress)
        ranking = rank(inputs.model, encodings, entities, top_k=_DEPTH, progress=progress)
        scored: list[tuple[np.ndarray, np.ndarray, int]] = []
        for number, gold in enumerate(mentions["entity_id"]):
            rows = np.union1d(ranking.top_rows[number].numpy(), [row_of[gold], *name_scores[number][0]])
            mention = slice_encodings(encodings, slice(number, number + 1))
            some = EncodedEntities([""] * len(rows), entities.encodings(rows))
            of_rows = rank(inputs.model, mention, some, top_k=len(rows))
            scores = np.empty(len(rows))
            scores[of_rows.top_rows[0].numpy()] = of_rows.top_scores[0].double().numpy()
            scored.append((scores, name_scores.of(number, rows), int(np.searchsorted(rows, row_of[gold]))))
    spread = float(np.median([scores.max() - np.median(scores) for scores, _, _ in scored])) or 1.0
    mrr_of = {}
    for weight in (float(f"{spread * share:.2g}") for share in _WEIGHTS):
        reciprocals = [_reciprocal_rank(scores + weight * of_names, gold) for scores, of_names, gold in scored]
        mrr_of[weight] = float(np.mean(reciprocals))
    best = max(mrr_of, key=lambda weight: mrr_of[weight])
    return NameWeight(best, {f"{weight:g}": mrr for weight, mrr in mrr_of.items()})


def _reciprocal_rank(scores: np.ndarray, gold: int) -> float:
    """Returns 1 / rank of an entity, the mean rank of those with the same score; 0 after the first 64."""
    margin = TIE_TOLERANCE * max(1.0, abs(scores[gold]))
    better = int((scores > scores[gold] + margin).sum())
    not_worse = int((scores >= scores[gold] - margin).sum())
    place = (better + 1 + not_worse) / 2
    return 1 / place if place <= _DEPTH else 0.0
