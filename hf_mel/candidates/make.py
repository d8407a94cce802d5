"""Candidate lists from any source: by name, by prior, by a trained retriever, as released, or several together."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock

from hf_mel.candidates.lists import CandidateLists
from hf_mel.candidates.sources import (
    SCORERS,
    document_candidates,
    name_candidates,
    prior_candidates,
    ranked_candidates,
    release_candidates,
    union_candidates,
)
from hf_mel.errors import KnowledgeBaseError, RecipeError
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.features.post_prototypes import Prototypes, knows_posts
from hf_mel.inference.fingerprint import describe_model, describe_processor
from hf_mel.inference.ranking import EncodedEntities, EntitySource, rank
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.protocols import MelProcessor

SOURCES = ("name", "prior", "retriever", "release", "document")


def default_cache() -> Path:
    """Where lists that were made once are kept: beside the caches of `datasets`."""
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
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> CandidateLists:
    """The candidates of M mentions.

    Args:
        source (`str`): "name", "prior", "retriever", "release" (the columns `candidates` and `candidate_priors`), or
            several joined by "+" ("name+prior"), which take turns. After others, "document": a mention for which they
            find nothing gets the candidates of the other mentions of its document.
        mentions (`datasets.Dataset`): M rows of the schema.
        entities (`datasets.Dataset`): N rows of the schema.
        k (`int`): Candidates per mention at most.
        scorer (`str`): How names are compared; see [`~hf_mel.candidates.sources.SCORERS`].
        training (`datasets.Dataset`, *optional*): Mentions that the prior is counted on.
        retriever (`str` or `os.PathLike`, *optional*): Folder or Hub id of a trained retriever.
        device (`str`, *optional*): Where the retriever goes. Default: a GPU if there is one.
        posts (`Callable`, *optional*): Gives the posts about the entities, to a retriever that knows them by posts.
        cache_dir (`str` or `os.PathLike`, *optional*): Where finished lists, and the entities as a retriever encoded them,
            are kept and looked for, by a digest of all they depend on. Default: nowhere.
        progress (`bool`): Whether to show progress bars.

    Raises:
        RecipeError: An unknown source or scorer, or one without what it needs.
        DataFormatError: The source is "release", and the data set ships no candidates, or priors that are none.
        UnknownModelError: No such retriever.
    """
    sources = source.split("+")
    check_source(source, k=k, scorer=scorer, retriever=retriever)
    if "prior" in sources and training is None:
        raise RecipeError(
            "the source 'prior' needs mentions to count on.", remedy="Give a data set with a training split."
        )
    model = processor = None
    if "retriever" in sources:
        assert retriever is not None
        model, processor = load_retriever(retriever, device=device)
    known_by = posts() if posts is not None and knows_posts(model) else None
    made_by = [] if cache_dir is None or processor is None else _made_by(model, processor)
    lists = []
    for each in sources:
        if each == "release":
            lists.append(release_candidates(mentions, k=k))
            continue
        if each == "document":
            continue  # after all others
        file = None
        if cache_dir is not None:
            depends = {"source": each, "k": k, "mentions": _digest(mentions), "entities": _digest(entities)}
            if each == "name":
                depends["scorer"] = scorer
            elif each == "prior":
                depends["training"] = _digest(training)
            else:  # the digest of texts does not see images
                rows = [mentions, entities, *([] if known_by is None else [known_by])]
                depends["model"] = [made_by, *(each._fingerprint for each in rows)]
            key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
            file = Path(cache_dir) / f"{each}-{key[:32]}.parquet"
        if file is not None and file.exists():
            lists.append(CandidateLists.load(file))
            continue
        if each == "name":
            made = name_candidates(mentions, entities, k=k, scorer=scorer, progress=progress)
        elif each == "prior":
            assert training is not None
            made = prior_candidates(mentions, training, k=k)
        else:
            assert processor is not None
            prototypes = Prototypes.of(model, processor, known_by)
            encoded: Any = entities
            if cache_dir is not None:
                encoded = _encoded_once(model, processor, made_by, entities, known_by, Path(cache_dir), progress)
            made = retriever_candidates(
                model, processor, mentions, encoded, k=k, prototypes=prototypes, progress=progress
            )
        if file is not None:
            made.save(file)
        lists.append(made)
    given = [scored for each in lists for scored in each.scores]
    if len(set(given)) < len(given):
        raise RecipeError(
            "the release ships priors of its candidates, and 'prior' would count others.",
            remedy="Leave 'prior' or 'release' out.",
        )
    made = lists[0] if len(lists) == 1 else union_candidates(lists, k=k)
    if "document" in sources:
        made = union_candidates([made, document_candidates(mentions, made, k=k)], k=k)
    return made


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
        source (`str`): A .parquet file, or a source of [`make_candidates`].
        mentions, entities, k, scorer, retriever: As in [`make_candidates`].
        load_split (`Callable`): Loads the mentions of a split; the source "prior" counts in "train".
        options: Other arguments of [`make_candidates`].

    Raises:
        MelError: As in [`CandidateLists.load`] and [`make_candidates`].
    """
    if source.endswith(".parquet"):
        return CandidateLists.load(source)
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
    """Raises a [`~hf_mel.errors.RecipeError`] for what [`make_candidates`] could not do, before anything is loaded."""
    sources = source.split("+")
    for each in sources:
        if each not in SOURCES:
            raise RecipeError(
                f"candidates cannot come from {each!r}.", remedy=f"Sources are {', '.join(SOURCES)}, joined by '+'."
            )
    if len(set(sources)) < len(sources):
        raise RecipeError(f"{source!r} names a source twice.")
    if sources == ["document"]:
        raise RecipeError(
            "'document' shares out the candidates that other sources find.", remedy="For instance prior+name+document."
        )
    if k < 1:
        raise RecipeError(f"{k} candidates per mention are too few.", remedy="Give at least 1.")
    if scorer not in SCORERS:
        raise RecipeError(f"names cannot be compared by {scorer!r}.", remedy=f"Scorers are {', '.join(SCORERS)}.")
    if "retriever" in sources and not retriever:
        raise RecipeError("the source 'retriever' needs a trained one.", remedy="Give its run folder or Hub id.")


def retriever_candidates(
    model: Any,
    processor: MelProcessor,
    mentions: datasets.Dataset,
    entities: datasets.Dataset | EntitySource,
    *,
    k: int = 16,
    prototypes: Prototypes | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> CandidateLists:
    """The k entities that a retriever scores highest, exactly.

    Args:
        model ([`~hf_mel.protocols.Retriever`]): In evaluation mode.
        processor ([`~hf_mel.protocols.MelProcessor`]): Its processor.
        mentions (`datasets.Dataset`): M mentions.
        entities (`datasets.Dataset` or [`~hf_mel.inference.ranking.EntitySource`]): N entities.
        k (`int`): Candidates per mention.
        prototypes ([`~hf_mel.inference.features.post_prototypes.Prototypes`], *optional*): For a model that knows entities by posts.
        batch_size (`int`): Rows that are encoded at a time.
        progress (`bool`): Whether to show progress bars.
    """
    if isinstance(entities, datasets.Dataset):
        encodings = encode_rows(
            model, processor, entities, "entities", prototypes=prototypes, batch_size=batch_size, progress=progress
        )
        entities = EncodedEntities(list(entities["entity_id"]), encodings)
    made_by = {key: value for key, value in describe_model(model).items() if key != "config"}
    top_rows: list[list[int]] = []
    top_scores: list[list[float]] = []
    if len(mentions):
        encoded = encode_rows(model, processor, mentions, "mentions", batch_size=batch_size, progress=progress)
        found = rank(model, encoded, entities, top_k=k, progress=progress)
        top_rows, top_scores = found.top_rows.tolist(), found.top_scores.tolist()
    return ranked_candidates(
        mentions, entities.entity_ids, top_rows, top_scores, source="retriever", setting={"k": k, "retriever": made_by}
    )


def _encoded_once(
    model: Any,
    processor: MelProcessor,
    made_by: list[Any],
    entities: datasets.Dataset,
    known_by: datasets.Dataset | None,
    folder: Path,
    progress: bool,
) -> KnowledgeBase:
    """The entities as a knowledge base of the cache: the lists of every split are made from it."""
    parts = [made_by, *(rows._fingerprint for rows in (entities, known_by) if rows is not None)]
    path = folder / f"kb-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # another process may be at it: one encodes, the others read
        try:
            kb = KnowledgeBase(path)
            kb.check_made_by(model, processor)
            if kb.entity_ids == list(entities["entity_id"]):
                return kb
        except KnowledgeBaseError:
            pass  # not there, or of another processor
        return KnowledgeBase.build(entities, model, processor, output=path, posts=known_by, progress=progress)


def _made_by(model: Any, processor: Any) -> list[Any]:
    """What pins down a retriever: weights, configuration and how its processor reads rows."""
    return [describe_model(model), describe_processor(processor, posts=knows_posts(model))]


def _digest(rows: datasets.Dataset | None) -> str:
    """sha256 of ids and texts."""
    assert rows is not None
    digest = hashlib.sha256()
    for column in ("mention_id", "mention", "text", "entity_id", "name", "aliases", "description", "attributes"):
        if column in rows.column_names:
            digest.update(json.dumps([column, list(rows[column])]).encode())
    return digest.hexdigest()
