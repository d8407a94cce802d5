"""The full protocol: every entity of the knowledge base is ranked for every mention."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState

from hf_mel.candidates.name_index import NameIndex
from hf_mel.data.loading import check_golds
from hf_mel.errors import RecipeError
from hf_mel.evaluation.evaluator import Evaluator, metrics_and_strata
from hf_mel.evaluation.nil import NilThreshold, Objective, best_other_scores, calibrate_nil_threshold, nil_detection
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.entity_sources import EncodedEntities, EntityPart, part_of_process
from hf_mel.inference.execution import evaluation_mode
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.ranking import RankingResult, rank, score_of_units
from hf_mel.inference.selective import RiskCoverage, link_confidence
from hf_mel.protocols import Encodings, learns_nil
from hf_mel.schema import NIL, threshold_in_json

# The metrics are defined in a Space because `evaluate.load` needs a file that imports nothing of this package.
from hf_mel.spaces.mel_ranking.mel_ranking import nil_metrics, ranking_metrics, resolve_ranks


@dataclass
class FullResult:
    """Results of the full protocol for M mentions and N entities.

    Args:
        metrics (`dict`): Metrics of all mentions, as fractions. "hits@k", "mrr" and "mr" are over the mentions whose gold
            is in the knowledge base. With a NIL threshold, "accuracy", "micro_f1", "nil_precision" and others are over
            all mentions. "num_*" are counts. `spaces/mel_ranking/README.md` defines the metrics.
        strata (`dict`): The same metrics for every group: {stratification: {group: metrics}}.
        ranking ([`~hf_mel.inference.ranking.RankingResult`]): The best entities and the position of the gold.
        mention_ids (`list` of `str` `[M]`): Ids of the mentions.
        golds (`list` of `str` `[M]`): Ids of their golds, or NIL.
        gold_rows (`np.ndarray` `[M]`): Row of the gold among the entities, -1 for NIL.
        entity_ids (sequence of `str` `[N]`): Ids of the entities.
        setting (`dict`): How the metrics were obtained: protocol, sizes, ties, data, model, versions, time.
        nil_is_learned (`bool`): Whether the scores are above a NIL score that the model has learned.
    """

    metrics: dict[str, float]
    strata: dict[str, dict[str, dict[str, float]]]
    ranking: RankingResult
    mention_ids: list[str]
    golds: list[str]
    gold_rows: np.ndarray
    entity_ids: Sequence[str]
    setting: dict[str, Any]
    nil_is_learned: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of results.json: setting, metrics and strata."""
        return {**self.setting, "metrics": self.metrics, "strata": self.strata}

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields one record per mention: the gold, its rank and score (`None` for NIL), and the best entities."""
        ranking, ranks = self.ranking, self._ranks()
        assert ranking.gold_score is not None
        assert ranking.best_rank is not None
        assert ranking.worst_rank is not None
        for i, (mention_id, gold) in enumerate(zip(self.mention_ids, self.golds, strict=True)):
            in_kb = self.gold_rows[i] >= 0
            yield {
                "mention_id": mention_id,
                "entity_id": gold,
                "rank": float(ranks[i]) if in_kb else None,
                "best_rank": int(ranking.best_rank[i]) if in_kb else None,
                "worst_rank": int(ranking.worst_rank[i]) if in_kb else None,
                "gold_score": float(ranking.gold_score[i]) if in_kb else None,
                "candidates": [
                    {"entity_id": self.entity_ids[row], "score": score}
                    for row, score in zip(ranking.top_rows[i].tolist(), ranking.top_scores[i].tolist(), strict=True)
                ],
            }

    def calibrate_nil_threshold(self, objective: Objective | None = None) -> NilThreshold:
        """Calibrates the NIL threshold on these mentions, which should be those of a validation split.

        Args:
            objective (`str`, *optional*): The measure that it maximises ([`~hf_mel.evaluation.nil.calibrate_nil_threshold`]). Default: the
                F1 of NIL if the model learns NIL and some golds are, else accuracy.

        Raises:
            `ValueError`: There are no mentions, or no gold is NIL and fewer than two entities per mention were kept.
        """
        gold_is_nil = self.gold_rows < 0
        others = None if gold_is_nil.any() else best_other_scores(self.ranking, self.gold_rows)
        if objective is None:
            objective = "f1" if self.nil_is_learned and gold_is_nil.any() else "accuracy"
        return calibrate_nil_threshold(
            self.ranking.top_scores[:, 0], self._ranks() <= 1, gold_is_nil, others, objective
        )

    def link_confidences(self) -> np.ndarray:
        """Returns how sure the link of each mention is, [M] ([`~hf_mel.inference.selective.link_confidence`]).

        Raises:
            `ValueError`: One entity per mention was kept, of several.
        """
        scores = self.ranking.top_scores.double().numpy()
        if scores.shape[1] < 2 and len(self.entity_ids) > 1:
            raise ValueError("A confidence needs the two best entities of every mention. Use a larger top_k.")
        second = scores[:, 1] if scores.shape[1] > 1 else np.full(len(scores), -np.inf)
        return link_confidence(scores[:, 0], second, self.nil_is_learned)

    def risk_coverage(self, nil_threshold: float | None = None) -> RiskCoverage:
        """Returns the risk–coverage curve of the links. A link is wrong if the best entity is not the gold.

        Args:
            nil_threshold (`float`, *optional*): Mentions whose best score is below it are not linked.
        """
        best = self.ranking.top_scores[:, 0].double().numpy()
        linked = np.ones(len(best), dtype=bool) if nil_threshold is None else best >= nil_threshold
        return RiskCoverage.of(self.link_confidences(), self._ranks() <= 1, linked)

    def at_precision(
        self, precision: float, calibration: RiskCoverage, nil_threshold: float | None = None
    ) -> dict[str, Any]:
        """Returns what comes of a stated precision: how many links are made, and how many of them are right.

        Args:
            precision (`float`): The stated precision.
            calibration ([`~hf_mel.inference.selective.RiskCoverage`]): The curve of another split, which gives the
                threshold.
            nil_threshold (`float`, *optional*): As in [`FullResult.risk_coverage`].
        """
        threshold = calibration.threshold(precision)
        best = self.ranking.top_scores[:, 0].double().numpy()
        predicted_nil = np.zeros(len(best), dtype=bool) if nil_threshold is None else best < nil_threshold
        made = ~predicted_nil & (self.link_confidences() >= threshold)
        return {
            "stated": precision,
            "threshold": threshold if np.isfinite(threshold) else None,
            "links": int(made.sum()),
            "nil": int(predicted_nil.sum()),
            "review": int((~made & ~predicted_nil).sum()),
            "precision": float((self._ranks()[made] <= 1).mean()) if made.any() else None,
            "coverage": float(made.mean()) if len(made) else None,
        }

    def nil_detection(self, train_golds: Collection[str] | None = None) -> dict[str, dict[str, float]]:
        """Returns how well the best score tells NIL from entities of the knowledge base.

        "annotated" are the mentions whose gold is NIL. "left out" simulates NIL: the mentions whose gold is not in
        training, as if it were not in the knowledge base either, so that their best score is that of another entity.
        All mentions with a gold in the knowledge base stand against each of the two groups; those that are left out stand
        on both sides, with their gold and without.

        Args:
            train_golds (collection of `str`, *optional*): Golds of the training split. Default: all mentions are left out.

        Returns:
            `dict` of "annotated" and "left out", as far as there are such mentions: "num", "auc" (probability that a NIL
            mention has a lower best score than another), and with a NIL threshold "precision" and "recall".
        """
        best, in_kb = self.ranking.top_scores[:, 0].double().numpy(), self.gold_rows >= 0
        groups = {"annotated": best[~in_kb]}
        if self.ranking.top_scores.shape[1] > 1 and in_kb.any():
            unseen = in_kb & np.asarray([train_golds is None or gold not in train_golds for gold in self.golds])
            groups["left out"] = best_other_scores(self.ranking, self.gold_rows)[unseen]
        threshold = self.setting.get("nil_threshold")
        results = {}
        for name, scores in groups.items():
            if len(scores) and in_kb.any():
                results[name] = nil_detection(scores, best[in_kb], threshold)
        return results

    def _ranks(self) -> np.ndarray:
        return _resolved_ranks(self.ranking, self.gold_rows, self.setting["ties"])


@dataclass(kw_only=True, eq=False, repr=False)
class FullEvaluator(Evaluator):
    """Evaluates a retriever: ranks all N entities for each of M mentions.

    H@k, MRR and MR are over the mentions whose gold is not NIL. With a NIL threshold, all mentions count in accuracy,
    micro-F1 and the NIL metrics. Weights should be float32, because half-precision scores of different entities may
    round to the same number.

    ```python
    >>> evaluator = FullEvaluator(entities, ks=(1, 5), strata=["topic"])  # doctest: +SKIP
    >>> result = evaluator(ModelInputs(model, processor), mentions)  # doctest: +SKIP
    >>> result.metrics["hits@1"], result.strata["topic"]["sports"]["mrr"]  # doctest: +SKIP
    (0.761, 0.812)
    ```

    Args:
        entities, ks, ties, tie_tolerance, strata, train_golds, entity_names, data_version, batch_size, progress: See
            [`~hf_mel.evaluation.evaluator.Evaluator`]. A data set of entities is encoded at every call and kept in memory
            as float32.
        top_k (`int`): Entities to keep per mention, for [`FullResult.records`]. Calibration needs 2.
        units (sequence of `str`, *optional*): Interaction units of the model. The score is the mean of theirs. Default:
            the score of the model.
        nil_threshold (`float`, *optional*): A mention is NIL if its best score is below this.
        name_weight (`float`): Weight w of the names: w times the name score of an entity
            ([`~hf_mel.candidates.name_index.NameIndex.scores`]) is added to its score.
        byte_budget (`int`): Memory for ranking, in bytes; see [`~hf_mel.inference.ranking.rank`].
    """

    top_k: int = 20
    units: Sequence[str] | None = None
    nil_threshold: float | None = None
    name_weight: float = 0.0
    byte_budget: int = 2**29

    def __post_init__(self):
        super().__post_init__()
        if self.nil_threshold is not None and math.isnan(self.nil_threshold):
            raise ValueError("nil_threshold is nan, so no score is above or below it. Give a number.")

    def __call__(
        self,
        inputs: ModelInputs,
        mentions: datasets.Dataset,
        *,
        mention_encodings: Encodings | None = None,
        processes: PartialState | None = None,
    ) -> FullResult:
        """Evaluates a model on M mentions, in evaluation mode.

        Args:
            inputs ([`~hf_mel.inference.inputs.ModelInputs`]): A retriever and its processor.
            mentions (`datasets.Dataset`): M mention rows of the schema.
            mention_encodings (`Mapping[str, torch.Tensor]`, *optional*): Encodings of `mentions`, to score the same
                encodings with several `units`. Default: the mentions are encoded.
            processes (`accelerate.PartialState`, *optional*): Processes that share the entities. All of them make this
                call, encode and rank their part of the entities, and get the result for all entities.

        Raises:
            [`~hf_mel.errors.UnknownEntityError`]: A gold is neither in the knowledge base nor NIL; names the mention.
            [`~hf_mel.errors.DuplicateIdError`]: A mention or entity id occurs twice.
            [`~hf_mel.errors.RecipeError`]: The model has no such unit, or the entities have no names to give weight to.
            [`~hf_mel.errors.DataFormatError`]: The mentions lack one of the columns `strata`.
            [`~hf_mel.errors.ScoreError`]: A score is nan or infinite.
            [`~hf_mel.errors.ImageError`]: An image is damaged.
        """
        start, model, entities = time.perf_counter(), inputs.model, self.entities
        entity_ids = self._entity_ids()
        check_golds(mentions, entity_ids)
        labels = self._labels(mentions)
        golds = list(mentions["entity_id"])
        row_of = {entity_id: row for row, entity_id in enumerate(entity_ids)}
        gold_rows = np.asarray([-1 if gold == NIL else row_of[gold] for gold in golds], dtype=np.int64)
        if self.units is not None and isinstance(entities, datasets.Dataset):
            check_units(inputs, mentions, entities, self.units)

        added = None
        if self.name_weight:
            surfaces = [surface or "" for surface in mentions["mention"]]
            added = self.name_index().scores(surfaces) * self.name_weight

        options: dict[str, Any] = {"batch_size": self.batch_size, "progress": self.progress}
        with evaluation_mode(model):
            if isinstance(entities, datasets.Dataset):
                entities = encode_entities(inputs, entities, processes=processes, **options)
            if processes is not None:
                entities = EntityPart(entities, part_of_process(len(entities), processes))
            if mention_encodings is None:
                mention_encodings = {"none": torch.empty(0)}
                if len(mentions):
                    mention_encodings = encode_rows(inputs, mentions, "mentions", **options)
            ranking = rank(
                model,
                mention_encodings,
                entities,
                gold_rows=gold_rows,
                top_k=self.top_k,
                byte_budget=self.byte_budget,
                tie_tolerance=self.tie_tolerance,
                score=None if self.units is None else score_of_units(model, self.units),
                added=added,
                processes=processes,
                progress=self.progress,
            )
        return FullResult(
            **metrics_and_strata(labels, len(golds), lambda mask: self._metrics(ranking, gold_rows, mask)),
            ranking=ranking,
            mention_ids=list(mentions["mention_id"]),
            golds=golds,
            gold_rows=gold_rows,
            entity_ids=entity_ids,
            nil_is_learned=learns_nil(model) and self.units is None,
            setting=self._setting(
                "full",
                model,
                num_mentions=len(golds),
                num_nil=int((gold_rows < 0).sum()),
                start=start,
                units=None if self.units is None else list(self.units),
                name_weight=self.name_weight,
                nil_threshold=threshold_in_json(self.nil_threshold),
            ),
        )

    def name_index(self) -> NameIndex:
        """Returns the index of the names of the entities.

        Raises:
            [`~hf_mel.errors.RecipeError`]: The entities are encodings without names.
        """
        names = self._entity_names()
        if names is None:
            raise RecipeError("The entities have no names to compare.", remedy="Give entity_names, or no name_weight.")
        return NameIndex(names[entity_id] for entity_id in self._entity_ids())

    def _metrics(self, ranking: RankingResult, gold_rows: np.ndarray, mask: np.ndarray) -> dict[str, float]:
        """Returns the metrics of the mentions that a mask [M] selects."""
        assert ranking.best_rank is not None
        assert ranking.worst_rank is not None
        in_kb = mask & (gold_rows >= 0)
        best, worst = ranking.best_rank.numpy()[in_kb], ranking.worst_rank.numpy()[in_kb]
        metrics = ranking_metrics(best, worst, self.ks, self.ties)
        del metrics["num_missed"]  # always 0, because the full protocol ranks every gold
        if self.nil_threshold is None:
            return {**metrics, "num_mentions": int(mask.sum()), "num_nil": int(mask.sum() - in_kb.sum())}
        predicted_nil = ranking.top_scores[:, 0].double().numpy() < self.nil_threshold
        correct = _resolved_ranks(ranking, gold_rows, self.ties) <= 1
        return {**metrics, **nil_metrics(gold_rows[mask] < 0, predicted_nil[mask], correct[mask])}


def encode_entities(
    inputs: ModelInputs,
    entities: datasets.Dataset,
    *,
    processes: PartialState | None = None,
    **options: Any,
) -> EncodedEntities:
    """Encodes N entities for [`FullEvaluator`]. Of several processes, each encodes its part.

    Args:
        inputs, entities, options: As in [`~hf_mel.inference.encode.encode_rows`].
        processes (`accelerate.PartialState`, *optional*): Processes that share the work. Default: this process encodes
            all entities.
    """
    part = range(len(entities)) if processes is None else part_of_process(len(entities), processes)
    encodings: Encodings = {"none": torch.empty(0)}  # for an empty part, if there are more processes than entities
    if len(part):
        rows = entities if len(part) == len(entities) else entities.select(part)
        encodings = encode_rows(inputs, rows, "entities", **options)
    return EncodedEntities(list(entities["entity_id"]), encodings, part)


def check_units(
    inputs: ModelInputs,
    mentions: datasets.Dataset,
    entities: datasets.Dataset,
    units: Sequence[str],
) -> None:
    """Scores one pair with `units`, so that an unknown unit is an error before all rows are encoded.

    Raises:
        [`~hf_mel.errors.RecipeError`]: The model has no such unit.
    """
    if len(mentions) and len(entities):
        mention_encodings = encode_rows(inputs, mentions.select([0]), "mentions")
        entity_encodings = encode_rows(inputs, entities.select([0]), "entities")
        score = score_of_units(inputs.model, units)
        rank(inputs.model, mention_encodings, EncodedEntities([""], entity_encodings), score=score)


def _resolved_ranks(ranking: RankingResult, gold_rows: np.ndarray, ties: str) -> np.ndarray:
    """Returns the ranks [M] of the golds, nan for NIL."""
    assert ranking.best_rank is not None
    assert ranking.worst_rank is not None
    best, worst = (
        np.where(gold_rows >= 0, column.numpy(), np.nan) for column in (ranking.best_rank, ranking.worst_rank)
    )
    return resolve_ranks(best, worst, ties)
