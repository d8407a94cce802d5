"""The full protocol: every mention against every entity of the knowledge base."""

from __future__ import annotations

import platform
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState

from hf_mel.data.loading import check_golds
from hf_mel.errors import KnowledgeBaseError
from hf_mel.evaluation.nil import NilThreshold, best_other_scores, calibrate_nil_threshold
from hf_mel.evaluation.strata import strata_of
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.entity_sources import EncodedEntities, EntityPart, EntitySource, part_of_process
from hf_mel.inference.execution import evaluation_mode, model_device
from hf_mel.inference.fingerprint import describe_model
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.ranking import RankingResult, rank, score_of_units
from hf_mel.protocols import Encodings
from hf_mel.schema import NIL
from hf_mel.spaces.mel_ranking.mel_ranking import nil_metrics, ranking_metrics, resolve_ranks

#: The k of H@k that are reported unless others are asked for.
KS = (1, 3, 5, 10, 20)


@dataclass
class FullResult:
    """What the full protocol found for M mentions and N entities.

    Args:
        metrics (`dict`): Of all mentions, as fractions: "hits@k", "mrr", "mr" over the mentions whose gold is in the
            knowledge base, and with a NIL threshold "accuracy", "micro_f1", "nil_precision", … over all; "num_*" are
            counts. Definitions: the card of the metric, `spaces/mel_ranking/README.md`.
        strata (`dict`): The same for every group of mentions: {what divides them: {group: metrics}}.
        ranking ([`~hf_mel.inference.ranking.RankingResult`]): The best entities and the gold's place, [M].
        mention_ids (`list` of `str` `[M]`): Ids of the mentions.
        golds (`list` of `str` `[M]`): Their gold ids, or NIL.
        gold_rows (`np.ndarray` `[M]`): Row of the gold in the knowledge base, -1 for NIL.
        entity_ids (sequence of `str` `[N]`): Ids of the entities.
        setting (`dict`): What the numbers depend on: protocol, sizes, ties, data, model, versions, time.
    """

    metrics: dict[str, float]
    strata: dict[str, dict[str, dict[str, float]]]
    ranking: RankingResult
    mention_ids: list[str]
    golds: list[str]
    gold_rows: np.ndarray
    entity_ids: Sequence[str]
    setting: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """What results.json holds: setting, metrics and strata."""
        return {**self.setting, "metrics": self.metrics, "strata": self.strata}

    def records(self) -> Iterator[dict[str, Any]]:
        """One record per mention: its gold, the gold's rank and score (`None` for NIL), and the ranked candidates."""
        ranks = self._ranks()
        found = self.ranking
        assert found.gold_score is not None
        assert found.best_rank is not None
        assert found.worst_rank is not None
        for i, (mention_id, gold) in enumerate(zip(self.mention_ids, self.golds, strict=True)):
            in_kb = self.gold_rows[i] >= 0
            yield {
                "mention_id": mention_id,
                "entity_id": gold,
                "rank": float(ranks[i]) if in_kb else None,
                "best_rank": int(found.best_rank[i]) if in_kb else None,
                "worst_rank": int(found.worst_rank[i]) if in_kb else None,
                "gold_score": float(found.gold_score[i]) if in_kb else None,
                "candidates": [
                    {"entity_id": self.entity_ids[row], "score": score}
                    for row, score in zip(found.top_rows[i].tolist(), found.top_scores[i].tolist(), strict=True)
                ],
            }

    def calibrate_nil_threshold(self) -> NilThreshold:
        """[`~hf_mel.evaluation.nil.calibrate_nil_threshold`] on these mentions; call it on a validation set.

        Raises:
            `ValueError`: no mentions, or, where none is NIL, fewer than two candidates were kept per mention.
        """
        gold_is_nil = self.gold_rows < 0
        others = None if gold_is_nil.any() else best_other_scores(self.ranking, self.gold_rows)
        return calibrate_nil_threshold(self.ranking.top_scores[:, 0], self._ranks() <= 1, gold_is_nil, others)

    def _ranks(self) -> np.ndarray:
        return _resolved_ranks(self.ranking, self.gold_rows, self.setting["ties"])


def evaluate_full(
    inputs: ModelInputs,
    mentions: datasets.Dataset,
    entities: datasets.Dataset | EntitySource,
    *,
    batch_size: int = 64,
    top_k: int = 20,
    ks: Sequence[int] = KS,
    ties: str = "realistic",
    tie_tolerance: float = 1e-6,
    units: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
    train_golds: Collection[str] | None = None,
    nil_threshold: float | None = None,
    mention_encodings: Encodings | None = None,
    data_version: Mapping[str, Any] | None = None,
    byte_budget: int = 2**29,
    processes: PartialState | None = None,
    progress: bool = True,
) -> FullResult:
    """Ranks all N entities for each of M mentions, and says how well.

    Mentions whose gold is NIL do not enter H@k, MRR and MR; with a threshold they enter accuracy, micro-F1 and the NIL
    figures. The model is put in evaluation mode, and back into its own afterwards. Its weights should be float32:
    half-precision scores round different entities to ties.

    Args:
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): A retriever and its processor.
        mentions (`datasets.Dataset`): M rows of the schema.
        entities (`datasets.Dataset` or [`~hf_mel.inference.entity_sources.EntitySource`]): N rows of the schema, which are
            encoded and kept in memory as float32; or entities that are encoded already (a knowledge base).
        batch_size (`int`): Rows that are encoded at a time.
        top_k (`int`): Candidates to keep per mention, for [`FullResult.records`] and calibration.
        ks (sequence of `int`): The k of H@k.
        ties (`str`): "realistic", "optimistic" or "pessimistic".
        tie_tolerance (`float`): See [`~hf_mel.inference.ranking.rank`].
        units (sequence of `str`, *optional*): Score with the mean of only these of the model's interaction units.
        strata (sequence of `str`, *optional*): Columns to report by; see [`~hf_mel.evaluation.strata.strata_of`].
        train_golds (collection of `str`, *optional*): Golds of the training split; reports seen and unseen ones apart.
        nil_threshold (`float`, *optional*): A mention is NIL if its best score is below this.
        mention_encodings (`Mapping[str, torch.Tensor]`, *optional*): Encodings of `mentions`, if they exist already
            (to score the same encodings with other `units`).
        data_version (`Mapping`, *optional*): What identifies the data, for [`FullResult.setting`].
        byte_budget (`int`): Memory for ranking, in bytes; see [`~hf_mel.inference.ranking.rank`].
        processes (`accelerate.PartialState`, *optional*): Share the entities among processes, all of which make this
            call: each encodes and ranks its part, and gets the result of the whole.
        progress (`bool`): Whether to show progress bars.

    Returns:
        [`FullResult`].

    Raises:
        [`~hf_mel.errors.UnknownEntityError`]: a gold is neither in the knowledge base nor NIL; names the mention.
        [`~hf_mel.errors.DuplicateIdError`]: a mention or entity id occurs twice.
        [`~hf_mel.errors.KnowledgeBaseError`]: there are no entities.
        [`~hf_mel.errors.RecipeError`]: the model has no such unit.
        [`~hf_mel.errors.DataFormatError`]: there is no such column to report by.
        [`~hf_mel.errors.ScoreError`]: a score is nan or infinite.
        [`~hf_mel.errors.ImageError`]: an image is damaged.
    """
    start = time.perf_counter()
    if not len(entities):
        raise KnowledgeBaseError("The knowledge base has no entities.")
    ranking_metrics([], ks=ks, ties=ties)  # a wrong k or policy shows before the work, not after it
    entity_ids = list(entities["entity_id"]) if isinstance(entities, datasets.Dataset) else entities.entity_ids
    check_golds(mentions, entity_ids)
    labels = strata_of(mentions, strata, train_golds)
    golds = list(mentions["entity_id"])
    row_of = {entity_id: row for row, entity_id in enumerate(entity_ids)}
    gold_rows = np.asarray([-1 if gold == NIL else row_of[gold] for gold in golds], dtype=np.int64)
    if units is not None and isinstance(entities, datasets.Dataset):
        check_units(inputs, mentions, entities, units)

    model = inputs.model
    with evaluation_mode(model):
        if isinstance(entities, datasets.Dataset):
            entities = encode_own_entities(
                inputs, entities, batch_size=batch_size, processes=processes, progress=progress
            )
        if processes is not None:
            entities = EntityPart(entities, part_of_process(len(entities), processes))
        if mention_encodings is None:
            mention_encodings = {"none": torch.empty(0)}
            if len(mentions):
                mention_encodings = encode_rows(inputs, mentions, "mentions", batch_size=batch_size, progress=progress)
        ranking = rank(
            model,
            mention_encodings,
            entities,
            gold_rows=gold_rows,
            top_k=top_k,
            byte_budget=byte_budget,
            tie_tolerance=tie_tolerance,
            score=None if units is None else score_of_units(model, units),
            processes=processes,
            progress=progress,
        )

    def metrics(chosen: np.ndarray) -> dict[str, float]:
        return _metrics(ranking, gold_rows, chosen, ks, ties, nil_threshold)

    seconds = time.perf_counter() - start
    return FullResult(
        metrics=metrics(np.ones(len(golds), dtype=bool)),
        strata={
            name: {
                group: metrics(np.asarray([label == group for label in column]))
                for group in sorted({label for label in column if label is not None})
            }
            for name, column in labels.items()
        },
        ranking=ranking,
        mention_ids=list(mentions["mention_id"]),
        golds=golds,
        gold_rows=gold_rows,
        entity_ids=entity_ids,
        setting={
            "protocol": "full",
            "kb_size": len(entity_ids),
            "num_mentions": len(golds),
            "num_nil": int((gold_rows < 0).sum()),
            "ks": [int(k) for k in ks],
            "ties": ties,
            "tie_tolerance": tie_tolerance,
            "units": None if units is None else list(units),
            "nil_threshold": nil_threshold,
            "data": None if data_version is None else dict(data_version),
            "model": {key: value for key, value in describe_model(model).items() if key != "config"},
            "wall_time_seconds": round(seconds, 3),
            "batch_size": batch_size,
            "device": device_name(model),
            "software": software_versions(),
        },
    )


def encode_own_entities(
    inputs: ModelInputs,
    entities: datasets.Dataset,
    *,
    processes: PartialState | None = None,
    **options: Any,
) -> EncodedEntities:
    """All N entities, of which this process encodes its part; for [`evaluate_full`] on the same `processes`.

    Args:
        inputs, entities, options: As in [`~hf_mel.inference.encode.encode_rows`].
        processes (`accelerate.PartialState`, *optional*): Who shares the work. Default: this process does all.
    """
    own = range(len(entities)) if processes is None else part_of_process(len(entities), processes)
    encoded: Encodings = {"none": torch.empty(0)}  # more processes than entities
    if len(own):
        some = entities if len(own) == len(entities) else entities.select(own)
        encoded = encode_rows(inputs, some, "entities", **options)
    return EncodedEntities(list(entities["entity_id"]), encoded, own)


def check_units(
    inputs: ModelInputs,
    mentions: datasets.Dataset,
    entities: datasets.Dataset,
    units: Sequence[str],
) -> None:
    """Scores one mention and one entity with `units`, so that a wrong name shows before everything is encoded.

    Raises:
        [`~hf_mel.errors.RecipeError`]: the model has no such unit.
    """
    if len(mentions) and len(entities):
        encoded = [
            encode_rows(inputs, mentions.select([0]), "mentions"),
            encode_rows(inputs, entities.select([0]), "entities"),
        ]
        score = score_of_units(inputs.model, units)
        rank(inputs.model, encoded[0], EncodedEntities([""], encoded[1]), score=score)


def _resolved_ranks(ranking: RankingResult, gold_rows: np.ndarray, ties: str) -> np.ndarray:
    """One rank per mention, [M]; nan for NIL."""
    assert ranking.best_rank is not None
    assert ranking.worst_rank is not None
    best, worst = (
        np.where(gold_rows >= 0, column.numpy(), np.nan) for column in (ranking.best_rank, ranking.worst_rank)
    )
    return resolve_ranks(best, worst, ties)


def _metrics(ranking, gold_rows, chosen, ks, ties, nil_threshold) -> dict[str, float]:
    in_kb = chosen & (gold_rows >= 0)
    best, worst = ranking.best_rank.numpy()[in_kb], ranking.worst_rank.numpy()[in_kb]
    metrics = ranking_metrics(best, worst, ks, ties)
    del metrics["num_missed"]  # the full protocol ranks every gold
    counts = {"num_mentions": int(chosen.sum()), "num_nil": int(chosen.sum() - in_kb.sum())}
    if nil_threshold is None:
        return {**metrics, **counts}
    predicted_nil = ranking.top_scores[:, 0].double().numpy() < nil_threshold
    correct = _resolved_ranks(ranking, gold_rows, ties) <= 1
    return {**metrics, **nil_metrics(gold_rows[chosen] < 0, predicted_nil[chosen], correct[chosen])}


def device_name(model: Any) -> str:
    """Where a model is, as results name it."""
    device = model_device(model)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def software_versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    versions = {"python": platform.python_version()}
    for package in ("hf_mel", "torch", "transformers", "datasets", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return versions
