"""The candidate protocol: each mention against its own few candidates, end to end and with the gold added."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch

from hf_mel.candidates.lists import CandidateLists
from hf_mel.data.loading import check_golds
from hf_mel.errors import KnowledgeBaseError, RecipeError
from hf_mel.evaluation.full_evaluator import KS, device_name, software_versions
from hf_mel.evaluation.strata import Labels, strata_of
from hf_mel.inference.execution import model_device
from hf_mel.inference.fingerprint import describe_model
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.reranking import score_pairs
from hf_mel.protocols import ranks_jointly
from hf_mel.schema import NIL
from hf_mel.spaces.mel_ranking.mel_ranking import ranking_metrics, resolve_ranks

#: A gold that was not among the candidates is a miss.
END_TO_END = "candidates (end to end)"
#: A gold that was not among the candidates is put there, as published tables do.
GOLD_ADDED = "candidates (gold added)"
_RERANKER, _JOINT, _COMBINED = "reranker", "reranker, jointly", "reranker + candidates"
#: The weights of the candidates' own scores that [`choose_candidate_weight`] tries; with 0 the reranker decides alone.
CANDIDATE_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass
class CandidateResult:
    """What the candidate protocol found for M mentions with up to C candidates each.

    Args:
        orders (`dict`): For [`END_TO_END`] and [`GOLD_ADDED`], the metrics of every order of the candidates: {protocol:
            {order: {"metrics": …, "strata": {what divides them: {group: metrics}}}}}. The orders are "reranker",
            "reranker, jointly" (the mentions of a context ranked together), "candidates: <source>", the order in which
            a source gave them, and "reranker + candidates" where the candidates' own scores were given a weight.
        order (`str`): The reranker's order that counts: with a weight "reranker + candidates", else that of ranking
            jointly where it was asked for.
        mention_ids, golds (`list` of `str` `[M]`): The mentions and their golds, or NIL.
        candidates (`list` of `list` of `str` `[M]`): The candidates in the order of their ids, the added gold among
            them.
        retrieved (`np.ndarray` `[M, C]`): True for a candidate that was not added.
        scores (`dict`): For both protocols, the scores [M, C] of the reranker's order that counts.
        ranks (`dict`): For both protocols, the gold's rank in it [M], nan for a miss and for NIL.
        setting (`dict`): What the numbers depend on.
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
        """End to end, of the reranker's order that counts."""
        return self.orders[END_TO_END][self.order]["metrics"]

    def to_dict(self) -> dict[str, Any]:
        """What results.json holds: the protocol end to end, and under "gold_added" the other one."""
        results = [
            {"protocol": protocol, "order": self.order, **orders[self.order], "orders": orders}
            for protocol, orders in self.orders.items()
        ]
        return {**self.setting, **results[0], "gold_added": results[1]}

    def records(self) -> Iterator[dict[str, Any]]:
        """One record per mention, end to end: its gold, the gold's rank (`None` for a miss and NIL), and the candidates
        in the reranker's order.
        """
        scores, ranks = self.scores[END_TO_END], self.ranks[END_TO_END]
        for i, (mention_id, gold) in enumerate(zip(self.mention_ids, self.golds, strict=True)):
            places = [c for c in range(len(self.candidates[i])) if self.retrieved[i, c]]
            places.sort(key=lambda c: -scores[i, c])
            yield {
                "mention_id": mention_id,
                "entity_id": gold,
                "rank": None if np.isnan(ranks[i]) else float(ranks[i]),
                "candidates": [{"entity_id": self.candidates[i][c], "score": float(scores[i, c])} for c in places],
            }


def evaluate_candidates(
    inputs: ModelInputs,
    mentions: datasets.Dataset,
    entities: datasets.Dataset,
    candidates: CandidateLists,
    *,
    joint: bool | None = None,
    candidate_weight: float | Literal["auto"] | None = None,
    batch_size: int = 64,
    ks: Sequence[int] = KS,
    ties: str = "realistic",
    tie_tolerance: float = 1e-6,
    strata: Sequence[str] | None = None,
    train_golds: Collection[str] | None = None,
    data_version: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> CandidateResult:
    """Reranks the candidates of M mentions, and says how well, beside the order in which they came.

    Every pair is scored once, for both protocols and with and without ranking jointly (a model whose pairs depend on
    each other scores the lists of each protocol). The candidates are given to the model in the order of their ids, so
    that the place of a gold, added or not, says nothing. Mentions whose gold is NIL are not ranked.

    "micro_f1" is that of MM-nel's Tables 3 and 4 and of the linkers they compare: every mention is linked to the candidate
    of the highest score, or to nothing if it has no candidate. Of the mentions whose gold is in the knowledge base,
    precision is the share of the linked ones that are linked to their gold, recall that of all of them; mentions whose
    gold is NIL count in neither. Where every mention has a candidate, it is H@1; a gold that shares the highest score
    counts as there.

    Where a source's own order is reported, a gold that another source gave, or that was added, counts as a miss end to
    end, and as the last with the gold added.

    With a weight w, which no paper has, one more order counts: that of reranker score + w * (list score / scale). The
    list score is that of the first source that gave any, the one whose candidate stands first in a list; scale is the
    standard deviation of its scores over all lists (1 if they are all equal), so that w means the same for cosines and
    for logits. A candidate that this source did not give, such as an added gold, has the lowest list score of its
    mention. The list's best counts as 0: as with a log-softmax over the candidates, shifting those of a mention
    together changes no rank. With w = 0 the order is the reranker's.

    Args:
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): A reranker and its processor.
        mentions (`datasets.Dataset`): M rows of the schema.
        entities (`datasets.Dataset`): N rows of the schema.
        candidates ([`~hf_mel.candidates.lists.CandidateLists`]): The candidates of these mentions, and maybe of others.
            With p(e|m) among their scores ("prior"), their rows carry it to the model.
        joint (`bool`, *optional*): Whether the order that counts ranks the mentions of a context together. Default: if
            the model can. Both orders are reported.
        candidate_weight (`float` or "auto", *optional*): w, at least 0, added to the order that `joint` says. "auto":
            what [`choose_candidate_weight`] finds best end to end on these mentions, which must be validation's. The
            setting tells w, its source and the scale.
        batch_size (`int`): Pairs to score at a time.
        ks (sequence of `int`): The k of H@k and of the candidates' recall.
        ties (`str`): "realistic", "optimistic" or "pessimistic".
        tie_tolerance (`float`): A candidate equals the gold if its score differs by at most this * max(1, |gold score|).
        strata (sequence of `str`, *optional*): Columns to report by, by default "modality" and "stratum"; see
            [`~hf_mel.evaluation.strata.strata_of`].
        train_golds (collection of `str`, *optional*): Golds of the training split; reports seen and unseen ones apart.
        data_version (`Mapping`, *optional*): What identifies the data.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`CandidateResult`].

    Raises:
        [`~hf_mel.errors.UnknownEntityError`]: a gold or a candidate is not in the knowledge base; names the mention.
        [`~hf_mel.errors.DataFormatError`]: a mention has no list, there is no such column to report by, a prior is no
            probability, or an example has more mentions than the model's `max_mentions`.
        [`~hf_mel.errors.RecipeError`]: `joint` for a model that cannot rank jointly, or a weight that is negative, not
            finite, or for lists without scores, or "auto" without a mention whose gold is in the knowledge base.
        [`~hf_mel.errors.KnowledgeBaseError`]: there are no entities.
        [`~hf_mel.errors.ScoreError`]: a score is nan or infinite.
    """
    start, model = time.perf_counter(), inputs.model
    if not len(entities):
        raise KnowledgeBaseError("The knowledge base has no entities.")
    if joint and not ranks_jointly(model):
        raise RecipeError(
            f"{type(model).__name__} does not rank the mentions of a context jointly.", remedy="Leave joint out."
        )
    if isinstance(candidate_weight, int | float) and not 0 <= candidate_weight < np.inf:
        raise RecipeError(f"The weight of the candidates is {candidate_weight}.", remedy="Give 0 or more.")
    ranking_metrics([], ks=ks, ties=ties)  # a wrong k or policy shows before the work, not after it
    entity_ids = list(entities["entity_id"])
    check_golds(mentions, entity_ids)
    labels = strata_of(mentions, strata, train_golds)
    golds = list(mentions["entity_id"])
    candidates = candidates.of(mentions)
    candidates.rows(entity_ids)  # an unknown one shows now
    table = candidates.priors
    lists = _Lists(candidates, golds, {entity_id: row for row, entity_id in enumerate(entity_ids)})
    given_scores = None if candidate_weight is None else lists.scaled_scores()  # without any, it shows now

    scored: dict[str, dict[str, torch.Tensor]] = {END_TO_END: {}, GOLD_ADDED: {}}
    jointly = ranks_jointly(model)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    masks = {END_TO_END: lists.retrieved, GOLD_ADDED: lists.listed}
    if model.pairs_are_independent:
        asked = list(masks.values()) if jointly else []
        options["priors"] = lists.priors(table, lists.ids)
        found = score_pairs(inputs, mentions, entities, lists.rows, joint_masks=asked, **options)
        for number, (protocol, mask) in enumerate(masks.items()):
            scored[protocol][_RERANKER] = found.scores.masked_fill(~mask, -torch.inf)
            if jointly:
                scored[protocol][_JOINT] = found.joint[number]
    else:
        for protocol, mask in masks.items():
            rows, places = lists.where(mask)
            own = torch.zeros(mask.shape, dtype=torch.bool)
            for i, each in enumerate(rows):
                own[i, : len(each)] = True
            width = max(map(len, rows), default=0)
            shown = [[ids[c] for c in columns] for ids, columns in zip(lists.ids, places, strict=True)]
            options["priors"] = lists.priors(table, shown)
            asked = [own[:, :width]] if jointly else []
            found = score_pairs(inputs, mentions, entities, rows, joint_masks=asked, **options)
            for order, scores in ((_RERANKER, found.scores), *((_JOINT, each) for each in found.joint)):
                scored[protocol][order] = torch.full(mask.shape, -torch.inf)
                for i, columns in enumerate(places):
                    scored[protocol][order][i, columns] = scores[i, : len(columns)]

    in_kb = np.asarray([gold != NIL for gold in golds], dtype=bool)
    order = _JOINT if (jointly if joint is None else joint) else _RERANKER
    weighting: dict[str, Any] = {}
    if candidate_weight is not None and given_scores is not None:
        own_scores, weighting = given_scores
        alone = {protocol: of_orders[order].double() for protocol, of_orders in scored.items()}
        if candidate_weight == "auto":
            candidate_weight, weighting["chosen_by_mrr"] = choose_candidate_weight(
                alone[END_TO_END].numpy(), own_scores, lists.gold_columns, ties=ties, tie_tolerance=tie_tolerance
            )
        weighting = {"weight": float(candidate_weight), "reranker": order, **weighting}
        order = _COMBINED
        for protocol, scores in alone.items():
            scored[protocol][order] = scores + weighting["weight"] * torch.from_numpy(own_scores)
    ranks: dict[str, np.ndarray] = {}
    orders: dict[str, dict[str, dict[str, Any]]] = {}
    for protocol, of_orders in scored.items():
        orders[protocol] = {}
        places_of = {
            name: _places(scores.double().numpy(), lists.gold_columns, tie_tolerance)
            for name, scores in of_orders.items()
        }
        linked = {name: masks[protocol].any(1).numpy() for name in places_of}
        for source in candidates.scores:
            given = lists.source_scores(source)
            best, worst = _places(given, lists.gold_columns, tie_tolerance)
            name = f"candidates: {source}"
            linked[name] = np.any(masks[protocol].numpy() if protocol == GOLD_ADDED else np.isfinite(given), axis=1)
            if protocol == GOLD_ADDED:
                last = lists.listed.sum(1).numpy()
                best, worst = (np.where(np.isnan(each) & in_kb, last, each) for each in (best, worst))
            places_of[name] = best, worst
        for name, (best, worst) in places_of.items():
            orders[protocol][name] = _report(best, worst, linked[name], in_kb, labels, ks, ties, len(entity_ids))
        ranks[protocol] = resolve_ranks(*places_of[order], ties)
    lengths = [len(each) for each in candidates.entity_ids]
    dtype = getattr(model, "dtype", torch.float32)
    return CandidateResult(
        orders=orders,
        order=order,
        mention_ids=list(mentions["mention_id"]),
        golds=golds,
        candidates=lists.ids,
        retrieved=lists.retrieved.numpy(),
        scores={protocol: scored[protocol][order].numpy() for protocol in scored},
        ranks=ranks,
        setting={
            "protocol": END_TO_END,
            "candidates": {
                **candidates.setting,
                "k": candidates.longest,
                "mean_length": float(np.mean(lengths)) if lengths else 0.0,
                "without": lengths.count(0),
                **({} if table is None else {"without_prior": sum(not table[m] for m in mentions["mention_id"])}),
                "recall": candidates.recall(golds, [k for k in ks if k < candidates.longest] + [candidates.longest]),
            },
            **({"candidate_weight": weighting} if weighting else {}),
            "kb_size": len(entity_ids),
            "num_mentions": len(golds),
            "num_nil": int((~in_kb).sum()),
            "ks": [int(k) for k in ks],
            "ties": ties,
            "tie_tolerance": tie_tolerance,
            "data": None if data_version is None else dict(data_version),
            "model": {key: value for key, value in describe_model(model).items() if key != "config"},
            "wall_time_seconds": round(time.perf_counter() - start, 3),
            "batch_size": batch_size,
            "device": device_name(model),
            "precision": "bfloat16" if torch.is_autocast_enabled(model_device(model).type) else str(dtype)[6:],
            "software": software_versions(),
        },
    )


def choose_candidate_weight(
    scores: np.ndarray,
    own_scores: np.ndarray,
    gold_columns: np.ndarray,
    *,
    weights: Sequence[float] = CANDIDATE_WEIGHTS,
    ties: str = "realistic",
    tie_tolerance: float = 1e-6,
) -> tuple[float, dict[str, float]]:
    """The weight of the candidates' own scores with the best MRR; of equal ones, the first.

    Args:
        scores (`np.ndarray` `[M, C]`): The reranker's, -inf for what is no candidate.
        own_scores (`np.ndarray` `[M, C]`): Those of the lists, finite, in units of their standard deviation.
        gold_columns (`np.ndarray` `[M]`): Column of the gold, -1 for NIL, which does not count.
        weights (sequence of `float`): What to try.
        ties, tie_tolerance: As in [`evaluate_candidates`].

    Returns:
        The weight, and the MRR of every weight by its text; a gold at -inf counts 0.

    Raises:
        [`~hf_mel.errors.RecipeError`]: every gold is NIL.
    """
    in_kb = gold_columns >= 0
    if not in_kb.any():
        raise RecipeError(
            "A weight of the candidates cannot be chosen: no mention's gold is in the knowledge base.",
            remedy="Give a number.",
        )
    found = {}
    for weight in weights:
        places = _places(scores + weight * own_scores, gold_columns, tie_tolerance)
        ranks = resolve_ranks(*(each[in_kb] for each in places), ties)
        found[weight] = float(np.nan_to_num(1 / ranks).mean())
    return max(found, key=lambda weight: found[weight]), {f"{weight:g}": mrr for weight, mrr in found.items()}


class _Lists:
    """The candidates of M mentions in the order of their ids, each gold that was not retrieved added to them.

    Attributes:
        ids, rows: [M] lists of ids, and of rows of the knowledge base.
        listed, retrieved (`torch.Tensor` `[M, C]`): Where a candidate is, and where one is that was not added.
        gold_columns (`np.ndarray` `[M]`): Column of the gold, -1 for NIL.
    """

    def __init__(self, candidates: CandidateLists, golds: list[str], row_of: Mapping[str, int]):
        self.candidates = candidates
        self.ids = [
            sorted({*listed, *([] if gold == NIL else [gold])})
            for listed, gold in zip(candidates.entity_ids, golds, strict=True)
        ]
        self.rows = [[row_of[entity_id] for entity_id in ids] for ids in self.ids]
        shape = (len(self.ids), max(map(len, self.ids), default=0))
        self.listed, self.retrieved = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for i, ids in enumerate(self.ids):
            given = set(candidates.entity_ids[i])
            self.listed[i, : len(ids)] = True
            self.retrieved[i, : len(ids)] = torch.tensor([entity_id in given for entity_id in ids], dtype=torch.bool)
        self.gold_columns = np.asarray(
            [-1 if gold == NIL else ids.index(gold) for ids, gold in zip(self.ids, golds, strict=True)], dtype=np.int64
        )

    def where(self, mask: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """The rows of the candidates where `mask` is true, and their columns."""
        places = [each.nonzero().flatten().tolist() for each in mask]
        return [[rows[c] for c in columns] for rows, columns in zip(self.rows, places, strict=True)], places

    def priors(
        self, table: Mapping[str, Mapping[str, float]] | None, shown: Sequence[Sequence[str]]
    ) -> list[list[float]] | None:
        """p(e|m) of the candidates `shown` of each mention, 0 for one without; `None` without a table."""
        if table is None:
            return None
        known = (table[mention_id] for mention_id in self.candidates.mention_ids)
        return [[own.get(entity_id, 0.0) for entity_id in ids] for own, ids in zip(known, shown, strict=True)]

    def source_scores(self, source: str) -> np.ndarray:
        """The scores [M, C] that a source gave; -inf for what it did not give."""
        scores = np.full(self.listed.shape, -np.inf)
        for i, ids in enumerate(self.ids):
            column_of = {entity_id: column for column, entity_id in enumerate(ids)}
            for entity_id, score in zip(self.candidates.entity_ids[i], self.candidates.scores[source][i], strict=True):
                if not np.isnan(score):
                    scores[i, column_of[entity_id]] = score
        return scores

    def scaled_scores(self) -> tuple[np.ndarray, dict[str, Any]]:
        """List scores [M, C] / scale, at most 0 and finite everywhere, and the {"source", "scale"} they are of."""
        for source in self.candidates.scores:
            scores = self.source_scores(source)
            known = np.isfinite(scores)
            if known.any():
                break
        else:
            raise RecipeError(
                "The candidates have no scores that could be given a weight.",
                remedy="Leave the weight out, or make the candidates from name, prior or retriever.",
            )
        deviation = float(scores[known].std())
        scale = deviation if deviation > 0 else 1.0
        highest = np.where(known, scores, -np.inf).max(1, keepdims=True)
        lowest = np.where(known, scores, np.inf).min(1, keepdims=True)
        has_any = known.any(1, keepdims=True)
        below = np.where(known, scores, lowest) - np.where(has_any, highest, 0)
        return np.where(has_any, below, 0) / scale, {"source": source, "scale": scale}


def _places(scores: np.ndarray, gold_columns: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Best and worst rank [M] of the golds by scores [M, C]; nan where there is no gold, or it is out at -inf."""
    if not scores.shape[1]:
        return np.full(len(scores), np.nan), np.full(len(scores), np.nan)
    gold = np.where(gold_columns >= 0, scores[np.arange(len(scores)), gold_columns], -np.inf)
    known = np.isfinite(gold)
    margin = tolerance * np.maximum(1, np.abs(np.where(known, gold, 0)))
    better = (scores > (gold + margin)[:, None]).sum(1)
    not_worse = (scores >= (gold - margin)[:, None]).sum(1)
    return np.where(known, better + 1, np.nan), np.where(known, not_worse, np.nan)


def _report(best, worst, linked, in_kb, labels: Mapping[str, Labels], ks, ties, kb_size) -> dict[str, Any]:
    right = resolve_ranks(best, worst, ties) == 1

    def metrics(chosen: np.ndarray) -> dict[str, float]:
        ranked = chosen & in_kb
        # 2PR / (P + R), with P = right / linked and R = right / all of them.
        both = int((ranked & linked).sum() + ranked.sum())
        micro_f1 = 2 * int((ranked & right).sum()) / both if both else np.nan
        counts = {"num_mentions": int(chosen.sum()), "num_nil": int(chosen.sum() - ranked.sum())}
        return {
            **ranking_metrics(best[ranked], worst[ranked], ks, ties, kb_size),
            "micro_f1": micro_f1,
            **counts,
        }

    return {
        "metrics": metrics(np.ones(len(in_kb), dtype=bool)),
        "strata": {
            name: {
                group: metrics(np.asarray([label == group for label in column]))
                for group in sorted({label for label in column if label is not None})
            }
            for name, column in labels.items()
        },
    }
