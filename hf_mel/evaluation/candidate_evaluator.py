"""The candidate protocol: a model orders the candidates of each mention, end to end and with the gold added."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import datasets
import numpy as np
import torch
from accelerate import PartialState

from hf_mel.candidates.lists import CandidateLists
from hf_mel.data.loading import check_golds
from hf_mel.errors import RecipeError
from hf_mel.evaluation.evaluator import Evaluator, metrics_and_strata
from hf_mel.inference.execution import model_device
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.ranking import TIE_TOLERANCE
from hf_mel.inference.reranking import score_listed, score_pairs
from hf_mel.protocols import Reranker, ranks_jointly, ranks_jointly_by_default, reads_list_scores
from hf_mel.schema import NIL

# The metrics are defined in a Space because `evaluate.load` needs a file that imports nothing of this package.
from hf_mel.spaces.mel_ranking.mel_ranking import ranking_metrics, resolve_ranks

#: The protocol in which a gold that is not among the candidates is a miss.
END_TO_END = "candidates (end to end)"
#: The protocol in which a gold that is not among the candidates is added to them, as in published tables.
GOLD_ADDED = "candidates (gold added)"
# Orders of the candidates, as results name them.
_RERANKER, _JOINT, _RETRIEVER = "reranker", "reranker, jointly", "retriever"
#: Weights of the list scores that [`choose_candidate_weight`] tries. With 0 the reranker decides alone.
CANDIDATE_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass
class CandidateResult:
    """Results of the candidate protocol for M mentions with up to C candidates each.

    Args:
        orders (`dict`): Metrics of every order of the candidates by [`END_TO_END`] and [`GOLD_ADDED`]: {protocol: {order:
            {"metrics": …, "strata": {stratification: {group: metrics}}}}}. The orders are "reranker"; "reranker, jointly"
            (the mentions of a context ranked together); "candidates: <source>", the order of the scores of a source; and,
            with a weight, "reranker + candidates". A retriever's order is "retriever".
        order (`str`): The main order: "reranker + candidates" if there is a weight, else "reranker, jointly" or
            "reranker", as the evaluator was asked.
        mention_ids (`list` of `str` `[M]`): Ids of the mentions.
        golds (`list` of `str` `[M]`): Ids of their golds, or NIL.
        candidates (`list` of `list` of `str` `[M]`): Ids of the candidates and of the added golds, sorted.
        retrieved (`np.ndarray` `[M, C]`): False for padding and for added golds.
        scores (`dict`): Scores [M, C] of the main order by protocol, -inf for entries that are not candidates.
        ranks (`dict`): Ranks [M] of the golds in the main order by protocol, nan for a miss and for NIL.
        setting (`dict`): How the metrics were obtained: candidates, sizes, ties, data, model, versions, time.
    """

    orders: dict[str, dict[str, dict[str, Any]]]
    order: str
    mention_ids: list[str]
    golds: list[str]
    candidates: list[list[str]]
    retrieved: np.ndarray
    scores: dict[str, np.ndarray]
    ranks: dict[str, np.ndarray]
    setting: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        """End-to-end metrics of the main order."""
        return self.orders[END_TO_END][self.order]["metrics"]

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of results.json: the end-to-end results, and the others under "gold_added"."""
        end_to_end, gold_added = (
            {"protocol": protocol, "order": self.order, **orders[self.order], "orders": orders}
            for protocol, orders in self.orders.items()
        )
        return {**self.setting, **end_to_end, "gold_added": gold_added}

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields one end-to-end record per mention: the gold, its rank (`None` for a miss and for NIL), and the
        candidates in the main order.
        """
        scores, ranks = self.scores[END_TO_END], self.ranks[END_TO_END]
        for i, (mention_id, gold) in enumerate(zip(self.mention_ids, self.golds, strict=True)):
            columns = [c for c in range(len(self.candidates[i])) if self.retrieved[i, c]]
            columns.sort(key=lambda c: -scores[i, c])
            yield {
                "mention_id": mention_id,
                "entity_id": gold,
                "rank": None if np.isnan(ranks[i]) else float(ranks[i]),
                "candidates": [{"entity_id": self.candidates[i][c], "score": float(scores[i, c])} for c in columns],
            }


@dataclass(kw_only=True, eq=False, repr=False)
class CandidateEvaluator(Evaluator):
    """Evaluates a model on candidates: orders those of M mentions, and compares the order with that of their sources.

    The model is a reranker, or a retriever that ranks the candidates alone, as in papers whose data sets give a list with
    every mention. A retriever's score is then that of the model, without a name weight.

    There are two protocols. End to end, a gold that is not among the candidates is a miss. With the gold added, it becomes
    one of them. Mentions whose gold is NIL are not ranked.

    Every pair is scored once and serves both protocols, with and without joint ranking. A model whose pairs depend on each
    other scores the candidates of each protocol instead. The model gets the candidates sorted by id, so their order does
    not reveal the gold.

    "micro_f1" is defined as in Tables 3 and 4 of MM-nel: a mention is linked to the candidate with the highest score, or
    to nothing if it has no candidates. Over the mentions whose gold is not NIL, precision is the share of correct links
    among the links, and recall is the share of mentions with a correct link. If every mention has candidates, micro-F1
    equals H@1. A gold that shares the highest score counts as it does in H@1.

    The order of a source's scores is evaluated too. A gold that the source did not give is a miss end to end, and is ranked
    last with the gold added.

    With a weight w, the main order is that of reranker score + w * (list score / scale). This combination is ours, not from
    a paper. The list score is that of one source, which must be named if several gave scores. The scale is the standard deviation
    of its scores over all lists (1 if they are all equal), so that w means the same for cosines and for logits. A candidate
    without a list score, such as an added gold, gets the lowest list score of its mention. List scores are shifted so that
    the highest score of a mention is 0, which changes no rank. With w = 0 the order is the reranker's.

    ```python
    >>> evaluator = CandidateEvaluator(entities, candidate_weight=2.0)  # doctest: +SKIP
    >>> result = evaluator(ModelInputs(model, processor), mentions, lists)  # doctest: +SKIP
    >>> result.metrics["hits@1"], result.orders["candidates (gold added)"]["reranker"]["metrics"]["mrr"]  # doctest: +SKIP
    (0.864, 0.921)
    ```

    Args:
        entities, ks, ties, tie_tolerance, strata, train_golds, entity_names, data_version, batch_size, progress: See
            [`~hf_mel.evaluation.evaluator.Evaluator`]. `ks` are also those of the candidates' recall.
        joint (`bool`, *optional*): Whether the main order ranks the mentions of a context together. Default: whether the
            model can. Both orders are reported.
        candidate_weight (`float` or "auto", *optional*): The weight w, at least 0. "auto" takes the weight that
            [`choose_candidate_weight`] finds best end to end on the evaluated mentions, which should be those of a
            validation split. The setting of the result has the weight, its source and the scale.
        candidate_source (`str`, *optional*): The source whose scores get the weight, for instance "retriever". Default: the
            only source that gave scores.

    Raises:
        [`~hf_mel.errors.KnowledgeBaseError`]: There are no entities.
        [`~hf_mel.errors.RecipeError`]: The weight is negative or not finite, or there is a source without a weight.
        `ValueError`: One of `ks` is below 1, or `ties` is unknown.
    """

    joint: bool | None = None
    candidate_weight: float | Literal["auto"] | None = None
    candidate_source: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.entities, datasets.Dataset):
            raise TypeError("Candidates are read as rows. Give the entities as a datasets.Dataset.")
        if isinstance(self.candidate_weight, int | float) and not 0 <= self.candidate_weight < np.inf:
            raise RecipeError(f"The weight of the candidates is {self.candidate_weight}.", remedy="Give 0 or more.")
        if self.candidate_source is not None and self.candidate_weight is None:
            raise RecipeError(
                f"The candidates of {self.candidate_source!r} have no weight.", remedy="Give candidate_weight too."
            )

    def __call__(
        self,
        inputs: ModelInputs,
        mentions: datasets.Dataset,
        candidates: CandidateLists,
        *,
        processes: PartialState | None = None,
    ) -> CandidateResult:
        """Evaluates a model on M mentions.

        Args:
            inputs ([`~hf_mel.inference.inputs.ModelInputs`]): A reranker or a retriever, and its processor.
            mentions (`datasets.Dataset`): M mention rows of the schema.
            candidates ([`~hf_mel.candidates.lists.CandidateLists`]): Candidates of these and possibly other mentions. If
                their scores include p(e|m) ("prior"), the model gets it with every candidate.
            processes (`accelerate.PartialState`, *optional*): Processes that share the pairs of a reranker. All of them make
                this call, and get the result for all mentions.

        Raises:
            [`~hf_mel.errors.UnknownEntityError`]: A gold or a candidate is not in the knowledge base; names the mention.
            [`~hf_mel.errors.DataFormatError`]: A mention has no list, the mentions lack one of the columns `strata`, a
                prior is not a probability, or an example has more mentions than the model's `max_mentions`.
            [`~hf_mel.errors.RecipeError`]: The model cannot rank jointly, no source or several have scores to weight, the
                named source has none, or the weight is "auto" and every gold is NIL.
            [`~hf_mel.errors.ScoreError`]: A score is nan or infinite.
        """
        start, model = time.perf_counter(), inputs.model
        if self.joint and not ranks_jointly(model):
            raise RecipeError(
                f"{type(model).__name__} cannot rank the mentions of a context jointly.",
                remedy="Leave out joint (--joint).",
            )
        entity_ids = self._entity_ids()
        check_golds(mentions, entity_ids)
        labels = self._labels(mentions)
        golds = list(mentions["entity_id"])
        candidates = candidates.for_mentions(mentions)
        if reads_list_scores(model):
            candidates.check_relative_scores()
        candidates.rows(entity_ids)  # raises for an unknown candidate, before any pair is scored
        priors = candidates.priors
        padded = PaddedCandidates(candidates, golds, {entity_id: row for row, entity_id in enumerate(entity_ids)})
        # Computed now, because it raises if there is not one source to weight.
        list_scores = None if self.candidate_weight is None else padded.scaled_list_scores(self.candidate_source)

        scores = self._scores(inputs, mentions, padded, priors, candidates.relative_scores, processes)
        order = _RERANKER if isinstance(model, Reranker) else _RETRIEVER
        if ranks_jointly_by_default(model) if self.joint is None else self.joint:
            order = _JOINT
        weighting: dict[str, Any] = {}
        if list_scores is not None:
            weighting = self._add_weighted_order(scores, order, *list_scores, padded.gold_columns)
            order = _with_candidates(order)
        in_kb = np.asarray([gold != NIL for gold in golds], dtype=bool)
        orders: dict[str, dict[str, dict[str, Any]]] = {}
        ranks: dict[str, np.ndarray] = {}
        for protocol, scores_of_orders in scores.items():
            is_candidate = padded.masks[protocol].numpy()
            gold_ranks = {
                name: rank_golds(order_scores.double().numpy(), padded.gold_columns, self.tie_tolerance)
                for name, order_scores in scores_of_orders.items()
            }
            linked: dict[str, Any] = dict.fromkeys(gold_ranks, is_candidate.any(1))
            for source in candidates.scores:
                name = f"candidates: {source}"
                best, worst, linked[name] = padded.rank_by_list(
                    padded.source_scores(source), protocol, in_kb, self.tie_tolerance
                )
                gold_ranks[name] = best, worst
            orders[protocol] = {
                name: metrics_and_strata(
                    labels, len(golds), partial(candidate_metrics, self, *best_and_worst, linked[name], in_kb)
                )
                for name, best_and_worst in gold_ranks.items()
            }
            ranks[protocol] = resolve_ranks(*gold_ranks[order], self.ties)
        autocast = torch.is_autocast_enabled(model_device(model).type)
        return CandidateResult(
            orders=orders,
            order=order,
            mention_ids=list(mentions["mention_id"]),
            golds=golds,
            candidates=padded.ids,
            retrieved=padded.masks[END_TO_END].numpy(),
            scores={protocol: scores_of_orders[order].numpy() for protocol, scores_of_orders in scores.items()},
            ranks=ranks,
            setting=self._setting(
                END_TO_END,
                model,
                num_mentions=len(golds),
                num_nil=int((~in_kb).sum()),
                start=start,
                candidates={
                    **candidates_setting(candidates, golds, self.ks),
                    **(
                        {} if priors is None else {"without_prior": sum(not priors[m] for m in mentions["mention_id"])}
                    ),
                },
                **({"candidate_weight": weighting} if weighting else {}),
                precision="bfloat16"
                if autocast
                else str(getattr(model, "dtype", torch.float32)).removeprefix("torch."),
            ),
        )

    def _scores(
        self,
        inputs: ModelInputs,
        mentions: datasets.Dataset,
        padded: PaddedCandidates,
        priors: Mapping[str, Mapping[str, float]] | None,
        list_scores: Mapping[str, Mapping[str, float]] | None,
        processes: PartialState | None,
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Returns the model's scores [M, C] by protocol and order, -inf for entries that are not candidates."""
        entities: Any = self.entities
        joint = ranks_jointly(inputs.model)
        options: dict[str, Any] = {"batch_size": self.batch_size, "progress": self.progress}
        scores: dict[str, dict[str, torch.Tensor]] = {protocol: {} for protocol in padded.masks}
        if not isinstance(inputs.model, Reranker):
            listed = score_listed(inputs, mentions, entities, padded.rows, **options)
            for protocol, mask in padded.masks.items():
                scores[protocol][_RETRIEVER] = listed.masked_fill(~mask, -torch.inf)
            return scores
        if inputs.model.pairs_are_independent:
            scored = score_pairs(
                inputs,
                mentions,
                entities,
                padded.rows,
                priors=padded.priors(priors, padded.ids),
                list_scores=padded.list_scores(list_scores, padded.ids),
                joint_masks=list(padded.masks.values()) if joint else [],
                processes=processes,
                **options,
            )
            for number, (protocol, mask) in enumerate(padded.masks.items()):
                scores[protocol][_RERANKER] = scored.scores.masked_fill(~mask, -torch.inf)
                if joint:
                    scores[protocol][_JOINT] = scored.joint[number]
            return scores
        for protocol, mask in padded.masks.items():
            columns = [row.nonzero().flatten().tolist() for row in mask]
            rows = [[rows[c] for c in chosen] for rows, chosen in zip(padded.rows, columns, strict=True)]
            ids = [[ids[c] for c in chosen] for ids, chosen in zip(padded.ids, columns, strict=True)]
            lengths = torch.tensor([len(chosen) for chosen in columns], dtype=torch.long)
            joint_mask = torch.arange(max(map(len, rows), default=0)) < lengths[:, None]
            scored = score_pairs(
                inputs,
                mentions,
                entities,
                rows,
                priors=padded.priors(priors, ids),
                list_scores=padded.list_scores(list_scores, ids),
                joint_masks=[joint_mask] if joint else [],
                processes=processes,
                **options,
            )
            for order, compact in zip((_RERANKER, _JOINT), (scored.scores, *scored.joint), strict=False):
                scores[protocol][order] = torch.full(mask.shape, -torch.inf)
                for i, chosen in enumerate(columns):
                    scores[protocol][order][i, chosen] = compact[i, : len(chosen)]
        return scores

    def _add_weighted_order(
        self,
        scores: dict[str, dict[str, torch.Tensor]],
        order: str,
        list_scores: np.ndarray,
        weighting: Mapping[str, Any],
        gold_columns: np.ndarray,
    ) -> dict[str, Any]:
        """Adds the weighted order to the scores of both protocols, and returns how it is weighted."""
        weight, chosen = self.candidate_weight, {}
        if weight == "auto":
            weight, chosen["chosen_by_mrr"] = choose_candidate_weight(
                scores[END_TO_END][order].double().numpy(),
                list_scores,
                gold_columns,
                ties=self.ties,
                tie_tolerance=self.tie_tolerance,
            )
        assert weight is not None
        for scores_of_orders in scores.values():
            weighted = float(weight) * torch.from_numpy(list_scores)
            scores_of_orders[_with_candidates(order)] = scores_of_orders[order].double() + weighted
        return {"weight": float(weight), "reranker": order, **weighting, **chosen}


def _with_candidates(order: str) -> str:
    """Returns the name of an order to whose scores those of the candidates are added."""
    return f"{_RETRIEVER if order == _RETRIEVER else _RERANKER} + candidates"


def choose_candidate_weight(
    scores: np.ndarray,
    list_scores: np.ndarray,
    gold_columns: np.ndarray,
    *,
    weights: Sequence[float] = CANDIDATE_WEIGHTS,
    ties: str = "realistic",
    tie_tolerance: float = TIE_TOLERANCE,
) -> tuple[float, dict[str, float]]:
    """Returns the weight of the list scores with the highest MRR, the first one of equally good weights.

    Args:
        scores (`np.ndarray` `[M, C]`): Scores of the reranker, -inf for entries that are not candidates.
        list_scores (`np.ndarray` `[M, C]`): Scores of the lists, finite, divided by their standard deviation.
        gold_columns (`np.ndarray` `[M]`): Column of the gold, -1 for NIL. Mentions with NIL do not count.
        weights (sequence of `float`): Weights to try.
        ties, tie_tolerance: As in [`CandidateEvaluator`].

    Returns:
        `tuple[float, dict[str, float]]`: The weight, and the MRR of every weight. A gold with score -inf counts 0.

    Raises:
        [`~hf_mel.errors.RecipeError`]: Every gold is NIL.
    """
    in_kb = gold_columns >= 0
    if not in_kb.any():
        raise RecipeError(
            "A weight of the candidates cannot be chosen: no mention's gold is in the knowledge base.",
            remedy="Give a number.",
        )
    mrr_of = {}
    for weight in weights:
        best, worst = rank_golds(scores + weight * list_scores, gold_columns, tie_tolerance)
        ranks = resolve_ranks(best[in_kb], worst[in_kb], ties)
        mrr_of[weight] = float(np.nan_to_num(1 / ranks).mean())
    return max(mrr_of, key=lambda weight: mrr_of[weight]), {f"{weight:g}": mrr for weight, mrr in mrr_of.items()}


class PaddedCandidates:
    """The candidates of M mentions, padded to C columns. Golds that were not retrieved are added; ids are sorted.

    Args:
        candidates ([`~hf_mel.candidates.lists.CandidateLists`]): Candidates of the M mentions.
        golds (`list` of `str` `[M]`): Ids of the golds, or NIL.
        row_of (`Mapping`): Entity id → row of the knowledge base.

    Attributes:
        ids (`list` of `list` of `str` `[M]`), rows (`list` of `list` of `int` `[M]`): Ids of the candidates, and their rows
            in the knowledge base, without padding.
        masks (`dict`): Masks [M, C] by protocol. [`END_TO_END`] is true for retrieved candidates, [`GOLD_ADDED`] also for
            added golds.
        gold_columns (`np.ndarray` `[M]`): Column of the gold, -1 for NIL.
    """

    def __init__(self, candidates: CandidateLists, golds: list[str], row_of: Mapping[str, int]):
        self.candidates = candidates
        self.ids = [
            sorted({*retrieved, *([] if gold == NIL else [gold])})
            for retrieved, gold in zip(candidates.entity_ids, golds, strict=True)
        ]
        self.rows = [[row_of[entity_id] for entity_id in ids] for ids in self.ids]
        shape = (len(self.ids), max(map(len, self.ids), default=0))
        self.masks = {protocol: torch.zeros(shape, dtype=torch.bool) for protocol in (END_TO_END, GOLD_ADDED)}
        for i, ids in enumerate(self.ids):
            retrieved = set(candidates.entity_ids[i])
            is_retrieved = torch.tensor([entity_id in retrieved for entity_id in ids], dtype=torch.bool)
            self.masks[END_TO_END][i, : len(ids)] = is_retrieved
            self.masks[GOLD_ADDED][i, : len(ids)] = True
        self.gold_columns = np.asarray(
            [-1 if gold == NIL else ids.index(gold) for ids, gold in zip(self.ids, golds, strict=True)], dtype=np.int64
        )

    def priors(
        self, priors: Mapping[str, Mapping[str, float]] | None, ids: Sequence[Sequence[str]]
    ) -> list[list[float]] | None:
        """Returns p(e|m) of candidates, 0 where it is unknown.

        Args:
            priors (`Mapping`, *optional*): Mention id → entity id → p(e|m); without it the result is `None`.
            ids (`[M]` sequences of `str`): Ids of the candidates.
        """
        if priors is None:
            return None
        return [
            [priors[mention_id].get(entity_id, 0.0) for entity_id in listed]
            for mention_id, listed in zip(self.candidates.mention_ids, ids, strict=True)
        ]

    def list_scores(
        self, scores: Mapping[str, Mapping[str, float]] | None, ids: Sequence[Sequence[str]]
    ) -> list[list[float]] | None:
        """Returns the list scores of candidates, for an added gold the lowest of its list.

        Args:
            scores (`Mapping`, *optional*): [`~hf_mel.candidates.lists.CandidateLists.relative_scores`]; without it the
                result is `None`.
            ids (`[M]` sequences of `str`): Ids of the candidates.
        """
        if scores is None:
            return None
        result = []
        for mention_id, listed in zip(self.candidates.mention_ids, ids, strict=True):
            of_list = scores[mention_id]
            lowest = min(of_list.values(), default=0.0)
            result.append([of_list.get(entity_id, lowest) for entity_id in listed])
        return result

    def rank_by_list(
        self, scores: np.ndarray, protocol: str, in_kb: np.ndarray, tie_tolerance: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns best and worst rank [M] of the golds by scores that lists have, and which mentions are linked [M].

        Args:
            scores (`np.ndarray` `[M, C]`): Scores of the lists, -inf where a list has none.
            protocol (`str`): [`END_TO_END`] or [`GOLD_ADDED`], in which a gold without a score is last.
            in_kb (`np.ndarray` `[M]`): False for a mention whose gold is NIL.
            tie_tolerance (`float`): See [`~hf_mel.evaluation.evaluator.Evaluator`].
        """
        best, worst = rank_golds(scores, self.gold_columns, tie_tolerance)
        if protocol == END_TO_END:
            return best, worst, np.asarray(np.isfinite(scores).any(1))
        is_candidate = self.masks[protocol].numpy()
        last = is_candidate.sum(1)
        best, worst = (np.where(np.isnan(column) & in_kb, last, column) for column in (best, worst))
        return best, worst, np.asarray(is_candidate.any(1))

    def order_scores(self) -> np.ndarray:
        """Returns scores [M, C] in the order of the lists: 1 / place, -inf for entries that are not candidates."""
        scores = np.full(self.masks[END_TO_END].shape, -np.inf)
        for i, ids in enumerate(self.ids):
            column_of = {entity_id: column for column, entity_id in enumerate(ids)}
            for place, entity_id in enumerate(self.candidates.entity_ids[i]):
                scores[i, column_of[entity_id]] = 1 / (place + 1)
        return scores

    def source_scores(self, source: str) -> np.ndarray:
        """Returns the scores [M, C] of a source, -inf for entries that the source did not give."""
        scores = np.full(self.masks[END_TO_END].shape, -np.inf)
        for i, ids in enumerate(self.ids):
            column_of = {entity_id: column for column, entity_id in enumerate(ids)}
            for entity_id, score in zip(self.candidates.entity_ids[i], self.candidates.scores[source][i], strict=True):
                if not np.isnan(score):
                    scores[i, column_of[entity_id]] = score
        return scores

    def scaled_list_scores(self, source: str | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Returns list scores [M, C] divided by their scale, at most 0 and finite, and their {"source", "scale"}.

        Args:
            source (`str`, *optional*): The source of the scores. Default: the only one that has any.

        Raises:
            [`~hf_mel.errors.RecipeError`]: The source has no scores; or none is named, and no source or several have any.
        """
        scores_of = {name: self.source_scores(name) for name in self.candidates.scores}
        scored = [name for name, scores in scores_of.items() if np.isfinite(scores).any()]
        if not scored:
            raise RecipeError(
                "The candidates have no scores that could be given a weight.",
                remedy="Leave the weight out, or make the candidates from name, prior or retriever.",
            )
        if source is None and len(scored) > 1:
            raise RecipeError(
                f"The candidates have scores of {' and '.join(scored)}, and the weight names none of them.",
                remedy=f"Name one: --candidate-weight {scored[-1]}=WEIGHT, in Python candidate_source={scored[-1]!r}.",
            )
        source = scored[0] if source is None else source
        if source not in scored:
            raise RecipeError(
                f"The candidates have no scores of {source!r} that could be given a weight.",
                remedy=f"Choose among {', '.join(scored)}.",
            )
        scores = scores_of[source]
        has_score = np.isfinite(scores)
        deviation = float(scores[has_score].std())
        scale = deviation if deviation > 0 else 1.0
        highest = np.where(has_score, scores, -np.inf).max(1, keepdims=True)
        lowest = np.where(has_score, scores, np.inf).min(1, keepdims=True)
        has_any = has_score.any(1, keepdims=True)
        shifted = np.where(has_score, scores, lowest) - np.where(has_any, highest, 0)
        return np.where(has_any, shifted, 0) / scale, {"source": source, "scale": scale}


def candidate_metrics(
    evaluator: Evaluator, best: np.ndarray, worst: np.ndarray, linked: np.ndarray, in_kb: np.ndarray, mask: np.ndarray
) -> dict[str, float]:
    """Returns the metrics of the mentions that a mask [M] selects.

    Args:
        evaluator ([`~hf_mel.evaluation.evaluator.Evaluator`]): The settings.
        best, worst (`np.ndarray` `[M]`): Best and worst rank of the golds, nan for a miss.
        linked (`np.ndarray` `[M]`): True for a mention with candidates.
        in_kb (`np.ndarray` `[M]`): False for a mention whose gold is NIL.
        mask (`np.ndarray` `[M]`): The mentions.
    """
    ranked = mask & in_kb
    correct = ranked & (resolve_ranks(best, worst, evaluator.ties) == 1)
    # 2PR / (P + R) with P = correct / links and R = correct / mentions.
    links_and_mentions = int((ranked & linked).sum() + ranked.sum())
    return {
        **ranking_metrics(best[ranked], worst[ranked], evaluator.ks, evaluator.ties, len(evaluator.entities)),
        "micro_f1": 2 * int(correct.sum()) / links_and_mentions if links_and_mentions else np.nan,
        "num_mentions": int(mask.sum()),
        "num_nil": int(mask.sum() - ranked.sum()),
    }


def candidates_setting(candidates: CandidateLists, golds: Sequence[str], ks: Sequence[int]) -> dict[str, Any]:
    """Returns how the lists of M mentions were made, their lengths, and their recall of the golds."""
    lengths = [len(ids) for ids in candidates.entity_ids]
    return {
        **candidates.setting,
        "k": candidates.longest,
        "sha256": candidates.sha256,
        "mean_length": float(np.mean(lengths)) if lengths else 0.0,
        "without": lengths.count(0),
        "recall": candidates.recall(golds, [k for k in ks if k < candidates.longest] + [candidates.longest]),
    }


def rank_golds(scores: np.ndarray, gold_columns: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best and the worst rank [M] of the golds by scores [M, C]; nan for NIL and for a score of -inf."""
    if not scores.shape[1]:
        return np.full(len(scores), np.nan), np.full(len(scores), np.nan)
    gold_scores = np.where(gold_columns >= 0, scores[np.arange(len(scores)), gold_columns], -np.inf)
    is_ranked = np.isfinite(gold_scores)
    margin = tolerance * np.maximum(1, np.abs(np.where(is_ranked, gold_scores, 0)))
    better = (scores > (gold_scores + margin)[:, None]).sum(1)
    not_worse = (scores >= (gold_scores - margin)[:, None]).sum(1)
    return np.where(is_ranked, better + 1, np.nan), np.where(is_ranked, not_worse, np.nan)
