"""Making candidate lists from one source, or from several joined by "+"."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from hf_mel.candidates.lists import CandidateLists
from hf_mel.candidates.name_index import NameIndex, name_weight_of
from hf_mel.candidates.sources import (
    SCORERS,
    bm25_candidates,
    dictionary_candidates,
    document_candidates,
    exact_candidates,
    name_candidates,
    namesake_candidates,
    prior_candidates,
    ranked_candidates,
    release_candidates,
    shared_candidates,
    union_candidates,
)
from hf_mel.errors import KnowledgeBaseError, RecipeError
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.entity_sources import EncodedEntities, EntitySource
from hf_mel.inference.fingerprint import describe_model, describe_processor
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.ranking import rank
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.locks import writer_lock
from hf_mel.protocols import knows_posts

#: Sources that find candidates.
_FIRST_SOURCES = ("name", "exact", "bm25", "prior", "dictionary", "namesake", "retriever", "release")
#: Sources that share what others find among the mentions of a document.
_LATER_SOURCES = ("document", "shared")
SOURCES = (*_FIRST_SOURCES, *_LATER_SOURCES)
#: Maximal number of a mention's namesakes whose share is known to a union of several sources.
_MAX_NAMESAKES = 1000
#: How names are compared, so that lists that an earlier version cached are made again.
_NAMES = "case and accents folded, composite by surface form"
_NAME_SCORES = "whole name 1, namesake 3/4, similar words"


def default_cache() -> Path:
    """Returns the folder of cached candidate lists, beside the caches of `datasets`."""
    return Path(datasets.config.HF_CACHE_HOME) / "hf_mel" / "candidates"


def make_candidates(
    source: str,
    mentions: datasets.Dataset,
    entities: datasets.Dataset,
    *,
    k: int = 100,
    scorer: str = "WRatio",
    training: datasets.Dataset | None = None,
    retriever: str | os.PathLike[str] | None = None,
    device: str | None = None,
    posts: Callable[[], datasets.Dataset | None] | None = None,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> CandidateLists:
    """Returns the candidates of M mentions.

    Args:
        source (`str`): "name", "exact", "bm25", "prior", "dictionary", "namesake", "retriever" or "release" (the columns
            `candidates` and `candidate_priors`), or several joined by "+" ("name+prior"), which take turns. After others, "document": a
            mention for which they find nothing gets the candidates of the other mentions of its document; and "shared":
            every mention also gets the first 4 of each other mention of its document, which do not count for `k`.
        mentions (`datasets.Dataset`): M rows of the schema.
        entities (`datasets.Dataset`): N rows of the schema.
        k (`int`): Maximal number of candidates per mention.
        scorer (`str`): String similarity of names; see [`~hf_mel.candidates.sources.SCORERS`].
        training (`datasets.Dataset`, *optional*): Mentions to count priors on.
        retriever (`str` or `os.PathLike`, *optional*): Folder or Hub id of a trained retriever.
        device (`str`, *optional*): Device of the retriever. Default: a GPU if there is one.
        posts (`Callable`, *optional*): Returns the posts about the entities, for a retriever that represents entities
            by posts.
        seed (`int`): Seed of the order of namesakes.
        cache_dir (`str` or `os.PathLike`, *optional*): Cache of finished lists and of the entities a retriever encoded,
            keyed by a digest of everything they depend on. Default: no cache.
        progress (`bool`): Whether to show progress bars.

    Raises:
        RecipeError: A source or scorer is unknown, or a source lacks what it needs.
        DataFormatError: The source is "release", and the data set ships no candidates, or invalid priors.
        UnknownModelError: The retriever cannot be loaded.
    """
    sources = source.split("+")
    check_source(source, k=k, scorer=scorer, retriever=retriever)
    if "prior" in sources and training is None:
        raise RecipeError(
            "The source 'prior' needs mentions to count on.", remedy="Give a data set with a training split."
        )
    cache = None if cache_dir is None else Path(cache_dir)
    inputs = fingerprint = names = None
    if "retriever" in sources:
        model, processor = load_retriever(retriever, device=device)  # type: ignore[arg-type]
        inputs = ModelInputs(model, processor, posts() if posts is not None and knows_posts(model) else None)
        fingerprint = None if cache is None else _fingerprint(inputs)
        if name_weight_of(model):
            names_by_entity = zip(entities["name"], entities["aliases"], strict=True)
            names = NameIndex([name, *(aliases or ())] for name, aliases in names_by_entity)

    def rank_entities() -> CandidateLists:
        assert inputs is not None
        source = entities if cache is None else _cached_entities(inputs, fingerprint, entities, cache, progress)
        return retriever_candidates(inputs, mentions, source, k=k, names=names, progress=progress)

    longest = k if sources == ["dictionary"] else max(k, _MAX_NAMESAKES)
    steps = {
        "name": _Step(
            lambda: name_candidates(mentions, entities, k=k, scorer=scorer, progress=progress),
            lambda: {"scorer": scorer, "names": _NAMES},
        ),
        "prior": _Step(
            lambda: prior_candidates(mentions, training, k=k),  # type: ignore[arg-type]
            lambda: {"training": _digest(training), "names": _NAMES},  # type: ignore[arg-type]
        ),
        "dictionary": _Step(
            lambda: dictionary_candidates(mentions, entities, k=longest), lambda: {"names": _NAMES, "longest": longest}
        ),
        "exact": _Step(lambda: exact_candidates(mentions, entities, k=k)),
        "bm25": _Step(
            lambda: bm25_candidates(mentions, entities, k=k, progress=progress),
            lambda: {"names": _NAMES, "query": "surface form"},
        ),
        "namesake": _Step(
            lambda: namesake_candidates(mentions, entities, k=k, seed=seed), lambda: {"names": _NAMES, "seed": seed}
        ),
        "release": _Step(lambda: release_candidates(mentions, k=k)),
        # The digest of texts does not cover images, the fingerprints of `datasets` do.
        "retriever": _Step(
            rank_entities,
            lambda: {
                "model": [fingerprint, *_fingerprints(mentions, entities, _posts(inputs))],
                **({} if names is None else {"name_weight": name_weight_of(model), "name_scores": _NAME_SCORES}),
            },
        ),
    }
    lists = []
    for name in sources:
        if name in _LATER_SOURCES:  # need all other lists
            continue
        step = steps[name]
        if cache is None or step.depends_on is None:
            lists.append(step.make())
            continue
        depends = {"source": name, "k": k, "mentions": _digest(mentions), "entities": _digest(entities)}
        key = hashlib.sha256(json.dumps(depends | step.depends_on(), sort_keys=True).encode()).hexdigest()
        file = cache / f"{name}-{key[:32]}.parquet"
        if file.exists():
            lists.append(CandidateLists.load(file))
        else:
            lists.append(step.make())
            lists[-1].save(file)
    score_names = [name for part in lists for name in part.scores]
    if len(set(score_names)) < len(score_names):
        raise RecipeError(
            "The release ships priors of its candidates, and 'prior' would count others.",
            remedy="Leave 'prior' or 'release' out.",
        )
    if "document" in sources:
        merged = lists[0] if len(lists) == 1 else union_candidates(lists, k=k)
        lists.append(document_candidates(mentions, merged, k=k))
    candidates = lists[0] if len(lists) == 1 else union_candidates(lists, k=k)
    if "shared" in sources:
        candidates = union_candidates(lists, k=k, shared=shared_candidates(mentions, candidates))
    return candidates


def load_or_make_candidates(
    source: str,
    mentions: datasets.Dataset,
    entities: datasets.Dataset,
    load_split: Callable[[str], datasets.Dataset],
    *,
    k: int,
    scorer: str,
    retriever: str | os.PathLike[str] | None,
    **options: Any,
) -> CandidateLists:
    """Loads candidate lists from a Parquet file, or makes them with the default cache and progress bars.

    Args:
        source (`str`): A .parquet file, whose lists are cut to `k`, or a source of [`make_candidates`].
        mentions, entities, k, scorer, retriever: As in [`make_candidates`].
        load_split (`Callable`): Loads the mentions of a split; the source "prior" counts in "train".
        options: Other arguments of [`make_candidates`].

    Raises:
        MelError: As in [`CandidateLists.load`] and [`make_candidates`].
    """
    if source.endswith(".parquet"):
        lists = CandidateLists.load(source)
        return lists.top(k) if lists.longest > k else lists
    check_source(source, k=k, scorer=scorer, retriever=retriever)
    training = load_split("train") if "prior" in source.split("+") else None
    return make_candidates(
        source,
        mentions,
        entities,
        k=k,
        scorer=scorer,
        retriever=retriever,
        training=training,
        cache_dir=default_cache(),
        progress=True,
        **options,
    )


def check_source(source: str, *, k: int, scorer: str, retriever: Any) -> None:
    """Raises a [`~hf_mel.errors.RecipeError`] for arguments [`make_candidates`] cannot use, before anything is loaded."""
    sources = source.split("+")
    for name in sources:
        if name not in SOURCES:
            raise RecipeError(
                f"Candidates cannot come from {name!r}.",
                remedy=f"Give one of {', '.join(_FIRST_SOURCES)}, or several joined by '+'; '+document' and '+shared' may end them.",
            )
    if len(set(sources)) < len(sources):
        raise RecipeError(f"{source!r} names a source twice.", remedy="Name each source once.")
    if not set(sources).difference(_LATER_SOURCES):
        raise RecipeError(
            f"{source!r} shares the candidates of other sources and finds none.",
            remedy="Name other sources before it, for instance prior+name+document.",
        )
    if k < 1:
        raise RecipeError(f"{k} candidates per mention are too few.", remedy="Give at least 1.")
    if scorer not in SCORERS:
        raise RecipeError(f"Names cannot be compared by {scorer!r}.", remedy=f"Choose of {', '.join(SCORERS)}.")
    if "retriever" in sources and not retriever:
        raise RecipeError("The source 'retriever' needs a trained retriever.", remedy="Give its run folder or Hub id.")


def retriever_candidates(
    inputs: ModelInputs,
    mentions: datasets.Dataset,
    entities: datasets.Dataset | EntitySource,
    *,
    k: int = 16,
    names: NameIndex | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> CandidateLists:
    """Returns the k entities with the highest scores of a retriever, by exact ranking.

    With `names`, the scores are those of the linker: the name scores are added with the weight in the retriever's
    configuration.

    Args:
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): A retriever in evaluation mode and its processor.
        mentions (`datasets.Dataset`): M mentions.
        entities (`datasets.Dataset` or [`~hf_mel.inference.entity_sources.EntitySource`]): N entities.
        k (`int`): Candidates per mention.
        names ([`~hf_mel.candidates.name_index.NameIndex`], *optional*): Index of the names of the N entities.
        batch_size (`int`): Rows per forward pass.
        progress (`bool`): Whether to show progress bars.
    """
    if isinstance(entities, datasets.Dataset):
        encodings = encode_rows(inputs, entities, "entities", batch_size=batch_size, progress=progress)
        entities = EncodedEntities(list(entities["entity_id"]), encodings)
    description = {key: value for key, value in describe_model(inputs.model).items() if key != "config"}
    weight = 0.0 if names is None else name_weight_of(inputs.model)
    top_rows: list[list[int]] = []
    top_scores: list[list[float]] = []
    if len(mentions):
        encodings = encode_rows(inputs, mentions, "mentions", batch_size=batch_size, progress=progress)
        added = None
        if names is not None and weight:
            added = names.scores([surface or "" for surface in mentions["mention"]]) * weight
        ranking = rank(inputs.model, encodings, entities, top_k=k, added=added, progress=progress)
        top_rows, top_scores = ranking.top_rows.tolist(), ranking.top_scores.tolist()
    return ranked_candidates(
        mentions,
        entities.entity_ids,
        top_rows,
        top_scores,
        source="retriever",
        setting={"k": k, "retriever": description, **({"name_weight": weight} if weight else {})},
    )


@dataclass
class _Step:
    """One source: the function that makes its lists, and what they depend on.

    Args:
        make (`Callable`): Makes the lists.
        depends_on (`Callable`, *optional*): Returns what the lists depend on apart from mentions, entities and k, for
            the key of the cache. `None` for lists that are not worth caching.
    """

    make: Callable[[], CandidateLists]
    depends_on: Callable[[], dict[str, Any]] | None = None


def _cached_entities(
    inputs: ModelInputs, fingerprint: Any, entities: datasets.Dataset, folder: Path, progress: bool
) -> KnowledgeBase:
    """Returns the entities as a cached knowledge base, which the lists of every split are made from."""
    parts = [fingerprint, *_fingerprints(entities, _posts(inputs))]
    path = folder / f"kb-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}"
    folder.mkdir(parents=True, exist_ok=True)
    # Of several processes one encodes, and the others wait and read.
    with writer_lock(path.with_suffix(".lock"), wait=math.inf, busy="", remedy="", target=path):
        try:
            kb = KnowledgeBase(path)
            kb.check_made_by(inputs.model, inputs.processor)
            if kb.entity_ids == list(entities["entity_id"]):
                return kb
        except KnowledgeBaseError:
            pass  # missing, damaged, or built by another processor
        return KnowledgeBase.build(
            entities, inputs.model, inputs.processor, output=path, posts=_posts(inputs), progress=progress
        )


def _posts(inputs: ModelInputs | None) -> datasets.Dataset | None:
    return None if inputs is None or inputs.prototypes is None else inputs.prototypes.posts


def _fingerprint(inputs: ModelInputs) -> list[Any]:
    """Returns what identifies a retriever: weights, configuration and how its processor reads rows."""
    return [
        describe_model(inputs.model),
        describe_processor(inputs.processor, posts=inputs.prototypes is not None),
    ]


def _fingerprints(*parts: datasets.Dataset | None) -> list[str]:
    return [rows._fingerprint for rows in parts if rows is not None]


def _digest(rows: datasets.Dataset) -> str:
    """Returns the sha256 of ids and texts."""
    digest = hashlib.sha256()
    for column in ("mention_id", "mention", "text", "entity_id", "name", "aliases", "description", "attributes"):
        if column in rows.column_names:
            digest.update(json.dumps([column, list(rows[column])]).encode())
    return digest.hexdigest()
