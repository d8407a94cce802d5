"""Candidate lists: the few entities each mention may mean, found by name or by how often a name meant them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from rapidfuzz import distance, fuzz, process
from tqdm.auto import tqdm

from hf_mel.candidates.lists import PRIOR, CandidateLists
from hf_mel.data.examples import example_groups
from hf_mel.errors import DataFormatError
from hf_mel.schema import NIL

#: How two names may be compared, each higher for more alike. "composite" is the mean of the last three.
SCORERS: dict[str, tuple[Callable, ...]] = {
    "WRatio": (fuzz.WRatio,),
    "QRatio": (fuzz.QRatio,),
    "ratio": (fuzz.ratio,),
    "partial_ratio": (fuzz.partial_ratio,),
    "token_sort_ratio": (fuzz.token_sort_ratio,),
    "token_set_ratio": (fuzz.token_set_ratio,),
    "jaro_winkler": (distance.JaroWinkler.normalized_similarity,),
    "common_subsequence": (distance.LCSseq.normalized_similarity,),
    "common_prefix": (distance.Prefix.normalized_similarity,),
    "edit_distance": (distance.Levenshtein.normalized_similarity,),
    "composite": (
        distance.LCSseq.normalized_similarity,
        distance.Prefix.normalized_similarity,
        distance.Levenshtein.normalized_similarity,
    ),
}

#: Scores of names that are in memory at a time.
_CHUNK_SCORES = 2**23


def name_candidates(
    mentions: datasets.Dataset,
    entities: datasets.Dataset,
    *,
    k: int = 100,
    scorer: str = "WRatio",
    progress: bool = False,
) -> CandidateLists:
    """The entities whose name or an alias is most like the surface form.

    An entity scores as its best name does. The composite of MMEL (§4.1: longest common subsequence, common prefix,
    normalised edit distance) is the mean of the three, each in [0, 1]; the paper does not say how it combines them.
    Entities that score the same come in the order of a digest of their ids, so that neither the order of the knowledge
    base nor the gold decides who is cut off. A mention without a surface form (a visual one) has no candidates.

    Args:
        mentions (`datasets.Dataset`): M mentions.
        entities (`datasets.Dataset`): N entities.
        k (`int`): Candidates per mention; N if N is smaller.
        scorer (`str`): One of [`SCORERS`].
        progress (`bool`): Whether to show a progress bar.

    Raises:
        `ValueError`: unknown scorer, or `k` below 1.
    """
    if scorer not in SCORERS:
        raise ValueError(f"scorer must be one of {', '.join(SCORERS)}, not {scorer!r}.")
    _check_k(k)
    ids = list(entities["entity_id"])
    order = sorted(range(len(ids)), key=lambda row: _digest(ids[row]))  # of equal scores, the first here is first
    listed = [[name, *(aliases or ())] for name, aliases in zip(entities["name"], entities["aliases"], strict=True)]
    names = [name for row in order for name in listed[row]]
    starts = np.cumsum([0, *(len(listed[row]) for row in order)])[:-1]
    surfaces = sorted(set(mentions["mention"]) - {""})
    found: dict[str, tuple[list[str], list[float]]] = {}
    step = max(1, _CHUNK_SCORES // max(1, len(names)))
    with tqdm(total=len(surfaces), desc="Comparing names", unit="name", delay=1, disable=not progress) as bar:
        for first in range(0, len(surfaces), step):
            some = surfaces[first : first + step]
            scores = np.zeros((len(some), len(names)), dtype=np.float32)
            for part in SCORERS[scorer]:
                scores += process.cdist(some, names, scorer=part, dtype=np.float32, workers=-1)
            scores /= len(SCORERS[scorer])
            best = np.maximum.reduceat(scores, starts, axis=1)
            columns = _top_columns(best, k)
            for surface, row, chosen in zip(some, best, columns, strict=True):
                found[surface] = [ids[order[column]] for column in chosen], row[chosen].tolist()
            bar.update(len(some))
    lists = [found[surface] if surface else ([], []) for surface in mentions["mention"]]
    return CandidateLists(
        list(mentions["mention_id"]),
        [entity_ids for entity_ids, _ in lists],
        {"name": [scores for _, scores in lists]},
        {"source": "name", "k": k, "scorer": scorer},
    )


def prior_candidates(mentions: datasets.Dataset, training: datasets.Dataset, *, k: int = 100) -> CandidateLists:
    """The entities that the surface form meant in training, with p(e|m): their share of its uses.

    A mention that is one of training itself does not count for its own list. NIL counts as a use, and is no candidate.
    Surface forms are compared case folded; entities of the same share come in the order of a digest of their ids. A
    mention without a surface form (a visual one) has no candidates, and is no use of any.

    Args:
        mentions (`datasets.Dataset`): M mentions.
        training (`datasets.Dataset`): Mentions with golds.
        k (`int`): Candidates per mention at most; a surface form that training does not have has none.

    Raises:
        `ValueError`: `k` below 1.
    """
    _check_k(k)
    uses: dict[str, Counter[str]] = defaultdict(Counter)
    own: dict[str, str] = {}
    for mention_id, surface, gold in zip(
        training["mention_id"], training["mention"], training["entity_id"], strict=True
    ):
        if surface:
            uses[surface.casefold()][gold] += 1
            own[mention_id] = gold
    lists: list[list[str]] = []
    scores: list[list[float]] = []
    for mention_id, surface in zip(mentions["mention_id"], mentions["mention"], strict=True):
        counts = Counter(uses.get(surface.casefold(), {}))
        if mention_id in own:
            counts[own[mention_id]] -= 1
        total = sum(counts.values())
        meant = [entity_id for entity_id, count in counts.items() if count > 0 and entity_id != NIL]
        meant.sort(key=lambda entity_id: (-counts[entity_id], _digest(entity_id)))
        lists.append(meant[:k])
        scores.append([counts[entity_id] / total for entity_id in meant[:k]])
    return CandidateLists(
        list(mentions["mention_id"]), lists, {PRIOR: scores}, {"source": "prior", "k": k, "training": len(training)}
    )


def release_candidates(mentions: datasets.Dataset, *, k: int = 100) -> CandidateLists:
    """The candidates that the release ships: the column `candidates`, the best first where `candidate_priors` says so.

    Args:
        mentions (`datasets.Dataset`): M mentions; with a column `candidate_priors`, p(e|m) of each of its candidates.
        k (`int`): Candidates per mention at most.

    Raises:
        DataFormatError: The data set ships none, a mention has not as many priors as candidates (none is fine), or a
            prior is no probability; names the mention.
        `ValueError`: `k` below 1.
    """
    _check_k(k)
    listed = list(mentions["candidates"])
    if len(listed) and not any(listed):
        raise DataFormatError(
            "the data set ships no candidates: its column 'candidates' is empty.",
            remedy="Take them from name, prior or retriever.",
        )
    shipped = list(mentions["candidate_priors"]) if "candidate_priors" in mentions.column_names else []
    priors = shipped if any(shipped) else None
    lists: list[list[str]] = []
    scores: list[list[float]] = []
    for row, (mention_id, ids) in enumerate(zip(mentions["mention_id"], listed, strict=True)):
        own = priors[row] if priors is not None and priors[row] else [0.0] * len(ids)
        if len(own) != len(ids):
            raise DataFormatError(f"{len(ids)} candidates have {len(own)} priors.", row=mention_id)
        wrong = [prior for prior in own if prior is None or not 0 <= prior < math.inf]
        if wrong:
            raise DataFormatError(
                f"the prior {wrong[0]} is no probability.", row=mention_id, remedy="Build the data set again."
            )
        first: dict[str, float] = {}
        for entity_id, prior in sorted(zip(ids, own, strict=True), key=lambda pair: -pair[1]):
            first.setdefault(entity_id, prior)
        lists.append(list(first)[:k])
        scores.append(list(first.values())[:k])
    if priors is None:  # an order is all that is known
        scores = [[1 / (place + 1) for place in range(len(ids))] for ids in lists]
    return CandidateLists(
        list(mentions["mention_id"]),
        lists,
        {"release" if priors is None else PRIOR: scores},
        {"source": "release", "k": k},
    )


def document_candidates(mentions: datasets.Dataset, lists: CandidateLists, *, k: int = 100) -> CandidateLists:
    """For each mention that has no candidates, those of the other mentions of its document.

    So a photograph is compared with what the text beside it may mean (the heuristic linking of MM-nel, §2.4), and a
    surface form that nothing knows with what is spoken of around it. An entity's score is the sum of 1 / place over the
    lists it is in; entities of the same score come in the order of a digest of their ids.

    Args:
        mentions (`datasets.Dataset`): M mentions, whole documents ([`~hf_mel.data.examples.example_groups`]).
        lists ([`CandidateLists`]): Their candidates from other sources.
        k (`int`): Candidates per mention at most.

    Raises:
        `ValueError`: `k` below 1.
    """
    _check_k(k)
    lists = lists.of(mentions)
    found: list[list[str]] = [[] for _ in range(len(lists))]
    scores: list[list[float]] = [[] for _ in range(len(lists))]
    for group in example_groups(mentions, "document"):
        without = [row for row in group if not lists.entity_ids[row]]
        if not without:
            continue
        votes: dict[str, float] = defaultdict(float)
        for row in group:
            for place, entity_id in enumerate(lists.entity_ids[row]):
                votes[entity_id] += 1 / (place + 1)
        best = sorted(votes, key=lambda entity_id: (-votes[entity_id], _digest(entity_id)))[:k]
        for row in without:
            found[row], scores[row] = list(best), [votes[entity_id] for entity_id in best]
    return CandidateLists(list(mentions["mention_id"]), found, {"document": scores}, {"source": "document", "k": k})


def union_candidates(lists: Sequence[CandidateLists], *, k: int) -> CandidateLists:
    """The candidates of several sources, in turns: the best of each, then the second of each, up to `k`.

    Args:
        lists (sequence of [`CandidateLists`]): Of the same mentions in the same order; each source once.
        k (`int`): Candidates per mention at most.

    Raises:
        `ValueError`: other mentions, a source twice, no lists, or `k` below 1.
    """
    _check_k(k)
    if not lists or any(each.mention_ids != lists[0].mention_ids for each in lists):
        raise ValueError("A union needs lists of the same mentions in the same order.")
    sources = [source for each in lists for source in each.scores]
    if len(set(sources)) < len(sources):
        raise ValueError(f"A source occurs twice: {', '.join(sources)}.")
    merged: list[list[str]] = []
    scores: dict[str, list[list[float]]] = {source: [] for source in sources}
    for row in range(len(lists[0])):
        own = [each.entity_ids[row] for each in lists]
        turns = (ids[place] for place in range(max(map(len, own))) for ids in own if place < len(ids))
        chosen = list(dict.fromkeys(turns))[:k]
        merged.append(chosen)
        for each in lists:
            place_of = {entity_id: place for place, entity_id in enumerate(each.entity_ids[row])}
            for source, values in each.scores.items():
                known = values[row]
                scores[source].append([known[place_of[e]] if e in place_of else math.nan for e in chosen])
    setting = {"source": "+".join(each.setting.get("source", "?") for each in lists), "k": k}
    return CandidateLists(
        list(lists[0].mention_ids), merged, scores, {**setting, "of": [dict(each.setting) for each in lists]}
    )


def ranked_candidates(
    mentions: datasets.Dataset,
    entity_ids: Sequence[str],
    top_rows: Sequence[Sequence[int]],
    top_scores: Sequence[Sequence[float]],
    *,
    source: str,
    setting: Mapping[str, Any],
) -> CandidateLists:
    """The lists of a ranking: M times k rows of the knowledge base and their scores, best first."""
    return CandidateLists(
        list(mentions["mention_id"]),
        [[entity_ids[row] for row in rows] for rows in top_rows],
        {source: [[float(score) for score in scores] for scores in top_scores]},
        {"source": source, **setting},
    )


def _top_columns(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns [m, k] of the k largest of each row, best first; equal ones in the order of their columns."""
    k = min(k, scores.shape[1])
    if k < scores.shape[1]:
        last = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
        # Ranks of the columns that may be kept: those above the last value, then those equal to it, in their order.
        chosen = np.where(scores > last, 0, np.where(scores == last, 1, 2))
        columns = np.sort(np.argsort(chosen, axis=1, kind="stable")[:, :k], axis=1)
    else:
        columns = np.broadcast_to(np.arange(k), scores.shape)
    order = np.argsort(-np.take_along_axis(scores, columns, 1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, 1)


def _digest(entity_id: str) -> bytes:
    return hashlib.sha256(entity_id.encode()).digest()


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}.")
