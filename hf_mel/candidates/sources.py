"""Sources of candidates: names, priors, a dictionary, the release, a document, a ranking, and the union of several."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import datasets
import numpy as np
from rapidfuzz import distance, fuzz, process
from tqdm.auto import tqdm

from hf_mel.candidates.lists import DICTIONARY, PRIOR, CandidateLists
from hf_mel.data.examples import example_groups
from hf_mel.errors import DataFormatError, MissingExtraError
from hf_mel.names import WORD, fold_name, namesakes_of
from hf_mel.schema import NIL

#: Columns of an entity that BM25 reads.
_TEXT_COLUMNS = ["entity_id", "name", "aliases", "description", "attributes"]
#: Maximal number of name similarities in memory at a time.
_CHUNK_SCORES = 2**23


def _compare(scorer: Callable, surfaces: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Returns the similarity [S, N] of S surface forms and N names."""
    return process.cdist(surfaces, names, scorer=scorer, dtype=np.float32, workers=-1)


def _composite(surfaces: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Returns the composite similarity [S, N] of S surface forms and N names; see [`name_candidates`]."""
    word_starts = [[word.start() for word in WORD.finditer(name)] or [0] for name in names]
    rests = [name[start:] for name, starts in zip(names, word_starts, strict=True) for start in starts]
    first_rests = np.cumsum([0, *map(len, word_starts)])[:-1]
    lengths = np.asarray([len(surface) for surface in surfaces], dtype=np.float32)[:, None]
    prefixes = np.maximum.reduceat(_compare(distance.Prefix.similarity, surfaces, rests), first_rests, axis=1)
    subsequences = _compare(distance.LCSseq.similarity, surfaces, names)
    edits = _compare(distance.Levenshtein.normalized_similarity, surfaces, names)
    return ((subsequences + prefixes) / lengths + edits) / 3


#: String similarities of surface forms and names, higher for more similar ones.
SCORERS: dict[str, Callable[[Sequence[str], Sequence[str]], np.ndarray]] = {
    "WRatio": partial(_compare, fuzz.WRatio),
    "QRatio": partial(_compare, fuzz.QRatio),
    "ratio": partial(_compare, fuzz.ratio),
    "partial_ratio": partial(_compare, fuzz.partial_ratio),
    "token_sort_ratio": partial(_compare, fuzz.token_sort_ratio),
    "token_set_ratio": partial(_compare, fuzz.token_set_ratio),
    "jaro_winkler": partial(_compare, distance.JaroWinkler.normalized_similarity),
    "common_subsequence": partial(_compare, distance.LCSseq.normalized_similarity),
    "common_prefix": partial(_compare, distance.Prefix.normalized_similarity),
    "edit_distance": partial(_compare, distance.Levenshtein.normalized_similarity),
    "composite": _composite,
}


def name_candidates(
    mentions: datasets.Dataset,
    entities: datasets.Dataset,
    *,
    k: int = 100,
    scorer: str = "WRatio",
    progress: bool = False,
) -> CandidateLists:
    """Returns the entities whose name or alias is most similar to the surface form.

    Case and accents do not count ([`~hf_mel.names.fold_name`]). The score of an entity is that of its most
    similar name or alias. An entity with score 0 is no candidate, so a list may be shorter than `k`, or empty. Equal scores
    are ordered by a digest of the entity id, so that neither the order of the knowledge base nor the gold decides which
    entity is cut off. A mention without a surface form (a visual mention) has no candidates.

    "composite" is the mean of the three similarities that MMEL names (§4.1), each in [0, 1]: the longest common subsequence
    and the longest common prefix, as fractions of the surface form, and the edit distance, normalised by the longer string.
    The paper does not say how it combines them. The prefix is that of the rest of the name from any of its words, so that
    a surname is as similar to a full name as a first name is.

    Args:
        mentions (`datasets.Dataset`): M mentions.
        entities (`datasets.Dataset`): N entities.
        k (`int`): Maximal number of candidates per mention.
        scorer (`str`): One of [`SCORERS`].
        progress (`bool`): Whether to show a progress bar.

    Raises:
        `ValueError`: The scorer is unknown, or `k` is below 1.
    """
    if scorer not in SCORERS:
        raise ValueError(f"scorer must be one of {', '.join(SCORERS)}, not {scorer!r}.")
    _check_k(k)
    ids = list(entities["entity_id"])
    order = sorted(range(len(ids)), key=lambda row: _digest(ids[row]))  # the order of equal scores
    names_of = [[name, *(aliases or ())] for name, aliases in zip(entities["name"], entities["aliases"], strict=True)]
    names = [fold_name(name) for row in order for name in names_of[row]]
    starts = np.cumsum([0, *(len(names_of[row]) for row in order)])[:-1]
    folded_mentions = [fold_name(surface) for surface in mentions["mention"]]
    surfaces = sorted(set(folded_mentions) - {""})
    by_surface: dict[str, tuple[list[str], list[float]]] = {}
    step = max(1, _CHUNK_SCORES // max(1, len(names)))
    with tqdm(total=len(surfaces), desc="Comparing names", unit="name", delay=1, disable=not progress) as bar:
        for first in range(0, len(surfaces), step):
            chunk = surfaces[first : first + step]
            best = np.maximum.reduceat(SCORERS[scorer](chunk, names), starts, axis=1)
            columns = _top_columns(best, k)
            for surface, row, top in zip(chunk, best, columns, strict=True):
                top = top[row[top] > 0]
                by_surface[surface] = [ids[order[column]] for column in top], row[top].tolist()
            bar.update(len(chunk))
    lists = [by_surface[surface] if surface else ([], []) for surface in folded_mentions]
    return CandidateLists(
        list(mentions["mention_id"]),
        [entity_ids for entity_ids, _ in lists],
        {"name": [scores for _, scores in lists]},
        {"source": "name", "k": k, "scorer": scorer},
    )


def prior_candidates(mentions: datasets.Dataset, training: datasets.Dataset, *, k: int = 100) -> CandidateLists:
    """Returns the entities to which the surface form is linked in training, best first.

    The score of an entity is p(e|m), the fraction of the occurrences of the surface form that are linked to it. Case and
    accents do not count ([`~hf_mel.names.fold_name`]). A mention that is itself in training does not count
    for its own list. NIL counts as an occurrence, but is not a candidate. Equal priors are ordered by a digest of the
    entity id. A mention without a surface form (a visual mention) has no candidates and does not count.

    Args:
        mentions (`datasets.Dataset`): M mentions.
        training (`datasets.Dataset`): Mentions with golds.
        k (`int`): Maximal number of candidates per mention. A surface form that does not occur in training has none.

    Raises:
        `ValueError`: `k` is below 1.
    """
    _check_k(k)
    counts_by_surface: dict[str, Counter[str]] = defaultdict(Counter)
    training_golds: dict[str, str] = {}
    for mention_id, surface, gold in zip(
        training["mention_id"], training["mention"], training["entity_id"], strict=True
    ):
        if surface:
            counts_by_surface[fold_name(surface)][gold] += 1
            training_golds[mention_id] = gold
    lists: list[list[str]] = []
    scores: list[list[float]] = []
    for mention_id, surface in zip(mentions["mention_id"], mentions["mention"], strict=True):
        counts = Counter(counts_by_surface.get(fold_name(surface), {}))
        if mention_id in training_golds:
            counts[training_golds[mention_id]] -= 1
        total = sum(counts.values())
        candidates = [entity_id for entity_id, count in counts.items() if count > 0 and entity_id != NIL]
        candidates.sort(key=lambda entity_id: (-counts[entity_id], _digest(entity_id)))
        lists.append(candidates[:k])
        scores.append([counts[entity_id] / total for entity_id in candidates[:k]])
    return CandidateLists(
        list(mentions["mention_id"]), lists, {PRIOR: scores}, {"source": "prior", "k": k, "training": len(training)}
    )


def dictionary_candidates(mentions: datasets.Dataset, entities: datasets.Dataset, *, k: int = 100) -> CandidateLists:
    """Returns the namesakes of the surface form: the entities whose name or alias has all its words.

    The score of an entity is 1 / N, if the whole knowledge base has N namesakes of the surface form. This is the half of the
    prior that MM-nel (§4.1) and the models it follows take from a dictionary of names; [`prior_candidates`] is the other
    half. The order is that of a digest of the entity id. A mention without a surface form (a visual mention) has no
    candidates.

    Args:
        mentions (`datasets.Dataset`): M mentions.
        entities (`datasets.Dataset`): N entities.
        k (`int`): Maximal number of candidates per mention.

    Raises:
        `ValueError`: `k` is below 1.
    """
    _check_k(k)
    columns = (entities["entity_id"], entities["name"], entities["aliases"])
    names = {entity_id: [name, *(aliases or ())] for entity_id, name, aliases in zip(*columns, strict=True)}
    surfaces = [surface or "" for surface in mentions["mention"]]
    lists: dict[str, list[str]] = {}
    shares: dict[str, list[float]] = {}
    for surface, namesakes in namesakes_of(dict.fromkeys(surfaces), names).items():
        lists[surface] = sorted(namesakes, key=_digest)[:k]
        shares[surface] = [1 / len(namesakes) for _ in lists[surface]]
    return CandidateLists(
        list(mentions["mention_id"]),
        [lists[surface] for surface in surfaces],
        {DICTIONARY: [shares[surface] for surface in surfaces]},
        {"source": "dictionary", "k": k},
    )


def exact_candidates(mentions: datasets.Dataset, entities: datasets.Dataset, *, k: int = 100) -> CandidateLists:
    """Returns the entities that have the surface form as their name, with score 1, or as an alias, with score 1/2.

    Case and accents do not count ([`~hf_mel.names.fold_name`]). Equal scores are ordered by a digest of the entity id. A
    mention without a surface form (a visual mention) has no candidates.

    Args:
        mentions (`datasets.Dataset`): M mentions.
        entities (`datasets.Dataset`): N entities.
        k (`int`): Maximal number of candidates per mention.

    Raises:
        `ValueError`: `k` is below 1.
    """
    _check_k(k)
    scores_by_name: dict[str, dict[str, float]] = defaultdict(dict)
    for entity_id, name, aliases in zip(entities["entity_id"], entities["name"], entities["aliases"], strict=True):
        for alias in aliases or ():
            scores_by_name[fold_name(alias)][entity_id] = 0.5
        scores_by_name[fold_name(name)][entity_id] = 1.0
    lists: list[list[str]] = []
    scores: list[list[float]] = []
    for surface in mentions["mention"]:
        score_of = scores_by_name.get(fold_name(surface), {}) if surface else {}
        lists.append(_best_first(score_of)[:k])
        scores.append([score_of[entity_id] for entity_id in lists[-1]])
    return CandidateLists(list(mentions["mention_id"]), lists, {"exact": scores}, {"source": "exact", "k": k})


def namesake_candidates(
    mentions: datasets.Dataset, entities: datasets.Dataset, *, k: int = 100, seed: int = 0
) -> CandidateLists:
    """Returns the namesakes of the surface form, as [`dictionary_candidates`], in an order that is drawn at random.

    It is what every method should beat: a choice among equal names. The score is the drawn number, in [0, 1). It depends on
    the seed, the mention and the entity only.

    Args:
        mentions (`datasets.Dataset`): M mentions.
        entities (`datasets.Dataset`): N entities.
        k (`int`): Maximal number of candidates per mention.
        seed (`int`): Seed of the order.

    Raises:
        `ValueError`: `k` is below 1.
    """
    namesakes = dictionary_candidates(mentions, entities, k=k if k < 1 else max(k, len(entities)))
    lists: list[list[str]] = []
    scores: list[list[float]] = []
    for mention_id, entity_ids in zip(namesakes.mention_ids, namesakes.entity_ids, strict=True):
        draws = {
            entity_id: int.from_bytes(_digest(f"{seed} {mention_id} {entity_id}")[:6], "big") / 2**48
            for entity_id in entity_ids
        }
        lists.append(_best_first(draws)[:k])
        scores.append([draws[entity_id] for entity_id in lists[-1]])
    return CandidateLists(
        namesakes.mention_ids, lists, {"namesake": scores}, {"source": "namesake", "k": k, "seed": seed}
    )


def bm25_candidates(
    mentions: datasets.Dataset, entities: datasets.Dataset, *, k: int = 100, progress: bool = False
) -> CandidateLists:
    """Returns the entities whose texts fit that of the mention best by BM25.

    The text of an entity is its name, aliases, description and attributes; the query is the surface form. A word is a run of
    letters and digits, without case and accents. An entity that shares no word with the query is no candidate. Equal scores
    are ordered by a digest of the entity id.

    Args:
        mentions (`datasets.Dataset`): M mentions.
        entities (`datasets.Dataset`): N entities.
        k (`int`): Maximal number of candidates per mention.
        progress (`bool`): Whether to show a progress bar.

    Raises:
        MissingExtraError: The package bm25s is not installed.
        `ValueError`: `k` is below 1.
    """
    _check_k(k)
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtraError(
            "Candidates by BM25 need the package bm25s, which is not installed.",
            remedy='Run pip install "hf_mel[bm25]".',
        ) from error
    rows = sorted(
        entities.select_columns(_TEXT_COLUMNS), key=lambda row: _digest(row["entity_id"])
    )  # order of equal scores
    ids = [row["entity_id"] for row in rows]
    texts = [[row["name"], *(row["aliases"] or ()), row["description"], row["attributes"]] for row in rows]
    index = bm25s.BM25()
    index.index([WORD.findall(fold_name(" ".join(filter(None, text)))) for text in texts], show_progress=False)
    lists: list[list[str]] = []
    scores: list[list[float]] = []
    for surface in tqdm(mentions["mention"], desc="Comparing words", unit="mention", delay=1, disable=not progress):
        words = [word for word in WORD.findall(fold_name(surface or "")) if word in index.vocab_dict]
        values = index.get_scores(words) if words else np.zeros(len(ids), dtype=np.float32)
        top = _top_columns(values[None], k)[0]
        top = top[values[top] > 0]
        lists.append([ids[column] for column in top])
        scores.append(values[top].tolist())
    return CandidateLists(list(mentions["mention_id"]), lists, {"bm25": scores}, {"source": "bm25", "k": k})


def release_candidates(mentions: datasets.Dataset, *, k: int = 100) -> CandidateLists:
    """Returns the candidates that the release ships, ordered by prior if it ships priors.

    Args:
        mentions (`datasets.Dataset`): M mentions with the column `candidates`, and optionally the column
            `candidate_priors`, p(e|m) of each candidate.
        k (`int`): Maximal number of candidates per mention.

    Raises:
        DataFormatError: The data set ships no candidates, the number of a mention's priors is neither 0 nor that of its
            candidates, or a prior is not a probability; names the mention.
        `ValueError`: `k` is below 1.
    """
    _check_k(k)
    shipped = list(mentions["candidates"])
    if len(shipped) and not any(shipped):
        raise DataFormatError(
            "The data set ships no candidates: its column 'candidates' is empty.",
            remedy="Take candidates from name, prior or retriever.",
        )
    priors = list(mentions["candidate_priors"]) if "candidate_priors" in mentions.column_names else []
    has_priors = any(priors)
    lists: list[list[str]] = []
    scores: list[list[float]] = []
    for row, (mention_id, ids) in enumerate(zip(mentions["mention_id"], shipped, strict=True)):
        mention_priors = priors[row] if has_priors and priors[row] else [0.0] * len(ids)
        if len(mention_priors) != len(ids):
            raise DataFormatError(
                f"The mention has {len(ids)} candidates and {len(mention_priors)} priors.",
                row=mention_id,
                remedy="Build the data set again.",
            )
        for prior in mention_priors:
            if prior is None or not 0 <= prior < math.inf:
                raise DataFormatError(
                    f"The prior {prior} is not a probability.", row=mention_id, remedy="Build the data set again."
                )
        prior_by_id: dict[str, float] = {}  # of a duplicate, the highest prior
        for entity_id, prior in sorted(zip(ids, mention_priors, strict=True), key=lambda pair: -pair[1]):
            prior_by_id.setdefault(entity_id, prior)
        lists.append(list(prior_by_id)[:k])
        scores.append(list(prior_by_id.values())[:k])
    if not has_priors:  # only the order is known
        scores = [[1 / (place + 1) for place in range(len(ids))] for ids in lists]
    return CandidateLists(
        list(mentions["mention_id"]),
        lists,
        {PRIOR if has_priors else "release": scores},
        {"source": "release", "k": k},
    )


def document_candidates(mentions: datasets.Dataset, lists: CandidateLists, *, k: int = 100) -> CandidateLists:
    """Returns, for each mention without candidates, the candidates of the other mentions of its document.

    A visual mention is thus compared with what the text beside it may mean (the heuristic linking of MM-nel, §2.4), and
    an unknown surface form with the entities around it. The score of an entity is the sum of 1 / place over the lists of
    the document that hold it. Equal scores are ordered by a digest of the entity id.

    Args:
        mentions (`datasets.Dataset`): M mentions, whole documents ([`~hf_mel.data.examples.example_groups`]).
        lists ([`CandidateLists`]): Their candidates from other sources.
        k (`int`): Maximal number of candidates per mention.

    Raises:
        `ValueError`: `k` is below 1.
    """
    _check_k(k)
    lists = lists.for_mentions(mentions)
    entity_ids: list[list[str]] = [[] for _ in range(len(lists))]
    scores: list[list[float]] = [[] for _ in range(len(lists))]
    for document in example_groups(mentions, "document"):
        empty_rows = [row for row in document if not lists.entity_ids[row]]
        if not empty_rows:
            continue
        votes: dict[str, float] = defaultdict(float)
        for row in document:
            for place, entity_id in enumerate(lists.entity_ids[row]):
                votes[entity_id] += 1 / (place + 1)
        best = sorted(votes, key=lambda entity_id: (-votes[entity_id], _digest(entity_id)))[:k]
        for row in empty_rows:
            entity_ids[row], scores[row] = list(best), [votes[entity_id] for entity_id in best]
    return CandidateLists(
        list(mentions["mention_id"]), entity_ids, {"document": scores}, {"source": "document", "k": k}
    )


def shared_candidates(mentions: datasets.Dataset, lists: CandidateLists, *, first: int = 4) -> CandidateLists:
    """Returns, for each mention, the first candidates of the other mentions of its document.

    What one mention of a document means, others often mean, too, such as an image and the text beside it. The score of an
    entity is the sum of 1 / place over the lists of the other mentions. Equal scores are ordered by a digest of the entity
    id.

    Args:
        mentions (`datasets.Dataset`): M mentions, whole documents ([`~hf_mel.data.examples.example_groups`]).
        lists ([`CandidateLists`]): Their candidates from other sources.
        first (`int`): Number of candidates to take from each other mention.

    Raises:
        `ValueError`: `first` is below 1.
    """
    _check_k(first)
    lists = lists.for_mentions(mentions)
    entity_ids: list[list[str]] = [[] for _ in range(len(lists))]
    scores: list[list[float]] = [[] for _ in range(len(lists))]
    for document in example_groups(mentions, "document"):
        votes: dict[str, Fraction] = defaultdict(Fraction)
        for row in document:
            for place, entity_id in enumerate(lists.entity_ids[row][:first]):
                votes[entity_id] += Fraction(1, place + 1)
        for row in document:
            of_others = dict(votes)
            for place, entity_id in enumerate(lists.entity_ids[row][:first]):
                of_others[entity_id] -= Fraction(1, place + 1)
            shared = [entity_id for entity_id, vote in of_others.items() if vote > 0]
            entity_ids[row] = sorted(shared, key=lambda entity_id: (-of_others[entity_id], _digest(entity_id)))
            scores[row] = [float(of_others[entity_id]) for entity_id in entity_ids[row]]
    return CandidateLists(
        list(mentions["mention_id"]), entity_ids, {"shared": scores}, {"source": "shared", "first": first}
    )


def union_candidates(
    lists: Sequence[CandidateLists], *, k: int, shared: CandidateLists | None = None
) -> CandidateLists:
    """Merges the candidates of several sources, which take turns: the best of each, then the second of each, up to `k`.

    Args:
        lists (sequence of [`CandidateLists`]): Lists of the same mentions in the same order, each source once. A list may be
            longer than `k`; its scores of candidates that other sources give are kept.
        k (`int`): Maximal number of candidates per mention.
        shared ([`CandidateLists`], *optional*): Further candidates of the same mentions, which follow after the `k`.

    Raises:
        `ValueError`: There are no lists, their mentions differ, a source occurs twice, or `k` is below 1.
    """
    _check_k(k)
    parts = [*lists, *([] if shared is None else [shared])]
    if not lists or any(part.mention_ids != lists[0].mention_ids for part in parts):
        raise ValueError("A union needs lists of the same mentions in the same order.")
    sources = [source for part in parts for source in part.scores]
    if len(set(sources)) < len(sources):
        raise ValueError(f"A source occurs twice: {', '.join(sources)}.")
    merged: list[list[str]] = []
    scores: dict[str, list[list[float]]] = {source: [] for source in sources}
    for row in range(len(lists[0])):
        candidates = [part.entity_ids[row] for part in lists]
        turns = (ids[place] for place in range(max(map(len, candidates))) for ids in candidates if place < len(ids))
        taken = list(dict.fromkeys(turns))[:k]
        if shared is not None:
            taken = list(dict.fromkeys([*taken, *shared.entity_ids[row]]))
        merged.append(taken)
        for part in parts:
            place_of = {entity_id: place for place, entity_id in enumerate(part.entity_ids[row])}
            for source, values in part.scores.items():
                scores[source].append([values[row][place_of[e]] if e in place_of else math.nan for e in taken])
    setting = {"source": "+".join(part.setting.get("source", "?") for part in parts), "k": k}
    return CandidateLists(
        list(lists[0].mention_ids), merged, scores, {**setting, "of": [dict(part.setting) for part in parts]}
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
    """Returns the lists of a ranking.

    Args:
        mentions (`datasets.Dataset`): M mentions.
        entity_ids (sequence of `str` `[N]`): Ids of the knowledge base.
        top_rows, top_scores (M sequences): Rows of the knowledge base and their scores, best first.
        source (`str`): Name of the source.
        setting (mapping): How the ranking was made.
    """
    return CandidateLists(
        list(mentions["mention_id"]),
        [[entity_ids[row] for row in rows] for rows in top_rows],
        {source: [[float(score) for score in scores] for scores in top_scores]},
        {"source": source, **setting},
    )


def _top_columns(scores: np.ndarray, k: int) -> np.ndarray:
    """Returns the columns [m, k] of the k largest values of each row, best first, equal values in column order."""
    k = min(k, scores.shape[1])
    if k < scores.shape[1]:
        last = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
        # Columns above the last value come first, then those equal to it, in column order.
        group = np.where(scores > last, 0, np.where(scores == last, 1, 2))
        columns = np.sort(np.argsort(group, axis=1, kind="stable")[:, :k], axis=1)
    else:
        columns = np.broadcast_to(np.arange(k), scores.shape)
    order = np.argsort(-np.take_along_axis(scores, columns, 1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, 1)


def _best_first(scores: Mapping[str, float]) -> list[str]:
    """Returns entity ids by score, equal scores by a digest of the id."""
    return sorted(scores, key=lambda entity_id: (-scores[entity_id], _digest(entity_id)))


def _digest(entity_id: str) -> bytes:
    return hashlib.sha256(entity_id.encode()).digest()


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}.")
