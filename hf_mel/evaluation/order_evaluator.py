"""The candidate protocol without a model: the order in which the candidates come, and what chance would give."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np

from hf_mel.candidates.lists import CandidateLists
from hf_mel.data.loading import check_golds
from hf_mel.evaluation.candidate_evaluator import (
    END_TO_END,
    CandidateResult,
    PaddedCandidates,
    candidate_metrics,
    candidates_setting,
)
from hf_mel.evaluation.evaluator import Evaluator, metrics_and_strata
from hf_mel.schema import NIL
from hf_mel.spaces.mel_ranking.mel_ranking import resolve_ranks

#: The order of a list whose candidates have scores of several sources, or of none.
LIST_ORDER = "candidates in their order"
#: What a random order of the same candidates gives on average.
RANDOM_ORDER = "random order, expected"


@dataclass(kw_only=True, eq=False, repr=False)
class OrderEvaluator(Evaluator):
    """Evaluates candidate lists without a model: every baseline that needs no training is a source of candidates.

    The main order is that of the scores of the source, with ties as the setting says, or the order of the lists if their
    scores come from several sources. "random order, expected" is the mean over all orders of the same candidates, computed
    and not drawn: with the source "dictionary" it is the choice of a random namesake.

    The result has the form of a reranker's, so tables, files and comparisons take it as one.

    ```python
    >>> lists = make_candidates("exact", mentions, entities)  # doctest: +SKIP
    >>> OrderEvaluator(entities)(mentions, lists).metrics["hits@1"]  # doctest: +SKIP
    0.79
    ```

    Args:
        entities, ks, ties, tie_tolerance, strata, train_golds, entity_names, data_version: See
            [`~hf_mel.evaluation.evaluator.Evaluator`].

    Raises:
        [`~hf_mel.errors.KnowledgeBaseError`]: There are no entities.
        `ValueError`: One of `ks` is below 1, or `ties` is unknown.
    """

    def __call__(self, mentions: datasets.Dataset, candidates: CandidateLists) -> CandidateResult:
        """Evaluates the order of the candidates of M mentions.

        Args:
            mentions (`datasets.Dataset`): M mention rows of the schema.
            candidates ([`~hf_mel.candidates.lists.CandidateLists`]): Candidates of these and possibly other mentions.

        Raises:
            [`~hf_mel.errors.UnknownEntityError`]: A gold or a candidate is not in the knowledge base; names the mention.
            [`~hf_mel.errors.DataFormatError`]: A mention has no list, or the mentions lack one of the columns `strata`.
        """
        start = time.perf_counter()
        entity_ids = self._entity_ids()
        check_golds(mentions, entity_ids)
        labels, golds = self._labels(mentions), list(mentions["entity_id"])
        candidates = candidates.for_mentions(mentions)
        candidates.rows(entity_ids)  # raises for an unknown candidate
        padded = PaddedCandidates(candidates, golds, {entity_id: row for row, entity_id in enumerate(entity_ids)})
        in_kb = np.asarray([gold != NIL for gold in golds], dtype=bool)
        scores = {f"candidates: {source}": padded.source_scores(source) for source in candidates.scores}
        order = next(iter(scores)) if len(scores) == 1 else LIST_ORDER
        if order == LIST_ORDER:
            scores = {LIST_ORDER: padded.order_scores(), **scores}
        orders: dict[str, dict[str, dict[str, Any]]] = {}
        ranks: dict[str, np.ndarray] = {}
        for protocol, mask in padded.masks.items():
            is_candidate = mask.numpy()
            orders[protocol] = {}
            for name, values in scores.items():
                best, worst, linked = padded.rank_by_list(values, protocol, in_kb, self.tie_tolerance)
                if name == order:
                    ranks[protocol] = resolve_ranks(best, worst, self.ties)
                orders[protocol][name] = metrics_and_strata(
                    labels, len(golds), partial(candidate_metrics, self, best, worst, linked, in_kb)
                )
            rows = np.arange(len(golds))
            has_gold = np.zeros(len(golds), dtype=bool)
            if is_candidate.shape[1]:
                has_gold = (padded.gold_columns >= 0) & is_candidate[rows, padded.gold_columns]
            orders[protocol][RANDOM_ORDER] = metrics_and_strata(
                labels, len(golds), partial(self._expected, is_candidate.sum(1), has_gold, in_kb)
            )
        return CandidateResult(
            orders=orders,
            order=order,
            mention_ids=list(mentions["mention_id"]),
            golds=golds,
            candidates=padded.ids,
            retrieved=padded.masks[END_TO_END].numpy(),
            scores={
                protocol: np.where(mask.numpy(), scores[order], -np.inf) for protocol, mask in padded.masks.items()
            },
            ranks=ranks,
            setting=self._setting(
                END_TO_END,
                None,
                num_mentions=len(golds),
                num_nil=int((~in_kb).sum()),
                start=start,
                candidates=candidates_setting(candidates, golds, self.ks),
            ),
        )

    def _expected(
        self, lengths: np.ndarray, has_gold: np.ndarray, in_kb: np.ndarray, mask: np.ndarray
    ) -> dict[str, float]:
        """Returns the mean metrics over all orders of the candidates, for the mentions that a mask [M] selects.

        Args:
            lengths (`np.ndarray` `[M]`): Numbers of candidates.
            has_gold (`np.ndarray` `[M]`): True for a mention whose gold is one of them.
            in_kb (`np.ndarray` `[M]`): False for a mention whose gold is NIL.
            mask (`np.ndarray` `[M]`): The mentions.
        """
        ranked = mask & in_kb
        count, num_ranked, num_entities = lengths[ranked], int(ranked.sum()), len(self.entities)
        found = has_gold[ranked]
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, max(1, lengths.max(initial=1)) + 1))])
        share = np.where(found, 1 / np.maximum(count, 1), 0.0)  # of every place of a found gold

        def mean(values: np.ndarray) -> float:
            return float(values.mean()) if num_ranked else float("nan")

        correct, links = float(share.sum()), int((ranked & (lengths > 0)).sum())
        return {
            **{f"hits@{int(k)}": mean(share * np.minimum(count, k)) for k in self.ks},
            "mrr": mean(share * harmonic[count]),
            "mr": mean(np.where(found, (count + 1) / 2, num_entities)),
            "num_ranked": num_ranked,
            "num_missed": int((~found).sum()),
            "micro_f1": 2 * correct / (links + num_ranked) if links + num_ranked else float("nan"),
            "num_mentions": int(mask.sum()),
            "num_nil": int(mask.sum()) - num_ranked,
        }
