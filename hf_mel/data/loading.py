"""Loading of data sets in the schema of hf_mel from a folder or the Hub, and checks of what was loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from hf_mel.data.folder_copies import FolderCopy
from hf_mel.errors import (
    DataFormatError,
    DuplicateIdError,
    KnowledgeBaseError,
    UnknownDatasetError,
    UnknownEntityError,
    UnknownSplitError,
)
from hf_mel.files import files_sha256, parquet_sha256
from hf_mel.schema import NIL, entity_features, mention_features, post_features


def load_mentions(
    dataset: str | os.PathLike[str], split: str, revision: str | None = None, *, config: str = "mentions"
) -> datasets.Dataset:
    """Loads the mentions of a split, one a row (columns: [`~hf_mel.schema.mention_features`]).

    Args:
        dataset (`str` or `os.PathLike`): A folder written by `hf-mel data build`, or a data set on the Hub.
        split (`str`): "train", "validation", "test" or another split of the data set.
        revision (`str`, *optional*): Branch, tag or commit of a data set on the Hub.
        config (`str`): The configuration of the mentions.

    Returns:
        `datasets.Dataset` of M rows; images decode to PIL on access.

    Raises:
        UnknownDatasetError: The name is no folder, and no data set on the Hub that can be read.
        UnknownSplitError: The data set has no such configuration or split; the message lists those it has.
        DataFormatError: Columns of the schema are missing.
    """
    return _load(dataset, config, split, revision, mention_features())


def load_entities(dataset: str | os.PathLike[str], revision: str | None = None) -> datasets.Dataset:
    """Loads the entities of a data set, one a row (columns: [`~hf_mel.schema.entity_features`]).

    Args:
        dataset, revision: As in [`load_mentions`].

    Raises:
        KnowledgeBaseError: The data set has no entities.
        MelError: As in [`load_mentions`].
    """
    entities = _load(dataset, "entities", "kb", revision, entity_features())
    if not len(entities):
        raise KnowledgeBaseError("The knowledge base is empty.", file=dataset, remedy="Build the data set again.")
    return entities


def load_posts(dataset: str | os.PathLike[str], split: str = "kb", revision: str | None = None) -> datasets.Dataset:
    """Loads the posts about the entities (columns: [`~hf_mel.schema.post_features`]). Few data sets have posts.

    Args:
        dataset, split, revision: As in [`load_mentions`].

    Raises:
        MelError: As in [`load_mentions`].
    """
    return _load(dataset, "posts", split, revision, post_features())


def _load(
    dataset: str | os.PathLike[str], config: str, split: str, revision: str | None, features: datasets.Features
) -> datasets.Dataset:
    source = os.fspath(dataset)
    _check_source(source, revision)
    copy = FolderCopy.open(source) if Path(source).is_dir() else None
    options = _loading_options(source, revision, copy)
    try:
        splits = datasets.load_dataset(name=config, **options)
    except (DatasetNotFoundError, DataFilesNotFoundError, ConnectionError) as error:
        raise _not_found_error(source, error, copy) from error
    except Exception as error:  # missing configuration, damaged Parquet or full disk: no common base class
        try:
            configs = datasets.get_dataset_config_names(options["path"], revision=revision)
        except Exception:
            raise _not_found_error(source, error, copy) from error
        if config not in configs:
            raise UnknownSplitError(
                f"The data set has no configuration {config!r}; it has {', '.join(map(repr, configs))}.",
                file=source,
                remedy="Give a data set that `hf-mel data build` wrote.",
            ) from error
        raise DataFormatError(
            f"The configuration {config!r} cannot be read ({_reason(error, source, copy)}).",
            file=source,
            remedy="Build it again.",
        ) from error
    if copy is not None:
        copy.delete_earlier()
    if split not in splits:
        raise UnknownSplitError(
            f"The configuration {config!r} has no split {split!r}; it has {', '.join(map(repr, splits))}.",
            file=source,
            remedy="Choose one of these splits.",
        )
    rows = splits[split]
    missing = [column for column in features if column not in rows.column_names]
    if missing:
        raise DataFormatError(
            f"The configuration {config!r} lacks the columns {missing}; it has {rows.column_names}.",
            file=source,
            remedy="Build it with this version of hf_mel.",
        )
    return rows


def _loading_options(source: str, revision: str | None, copy: FolderCopy | None) -> dict[str, Any]:
    """Returns the arguments of `load_dataset` for a data set on the Hub, or for a folder by its copy."""
    if copy is None:
        return {"path": source, "revision": revision}
    return {"path": copy.source, "cache_dir": str(copy.place)}


def open_repository(
    dataset: str | os.PathLike[str], revision: str | None = None
) -> dict[str, datasets.DatasetBuilder]:
    """Returns the builder of every configuration of a data set, by name, without loading any rows.

    Builders know the files of a configuration and the metadata of its card.

    Raises:
        UnknownDatasetError: As in [`load_mentions`].
    """
    source = os.fspath(dataset)
    _check_source(source, revision)
    copy = FolderCopy.open(source) if Path(source).is_dir() else None
    options = _loading_options(source, revision, copy)
    try:
        configs = datasets.get_dataset_config_names(options["path"], revision=revision)
        return {config: datasets.load_dataset_builder(name=config, **options) for config in configs}
    except Exception as error:  # missing repository, damaged card or no network: no common base class
        raise _not_found_error(source, error, copy) from error


def _check_source(source: str, revision: str | None) -> None:
    if Path(source).is_dir():
        if revision is not None:
            raise UnknownDatasetError(
                f"A folder has no revision {revision!r}.", file=source, remedy="Leave the revision out."
            )
    elif Path(source).exists():
        raise UnknownDatasetError(
            "The path is a file, not a data set.", file=source, remedy="Give the folder that contains the data set."
        )
    else:
        try:
            validate_repo_id(source)
        except HFValidationError as error:
            raise _not_found_error(source, None) from error


def _not_found_error(source: str, error: Exception | None, copy: FolderCopy | None = None) -> UnknownDatasetError:
    if Path(source).is_dir():
        return UnknownDatasetError(
            f"The folder holds no data set ({_reason(error, source, copy)}).",
            file=source,
            remedy="Run `hf-mel data build`.",
        )
    if error is None:
        problem = "it cannot be the name of a data set on the Hub"
        remedy = "Check the path, or give a Hub id: OWNER/NAME."
    elif isinstance(error, ConnectionError):
        problem = f"the Hub cannot be reached to look for a data set of this name ({error})"
        remedy = "Check the path. If it is a Hub id, check the network and whether HF_HUB_OFFLINE is set."
    elif isinstance(error, (DatasetNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)):
        problem = f"the Hub has no data set of this name that you may read ({error})"
        remedy = "Check the path or the Hub id. For a private or gated data set, run `hf auth login`."
    else:
        problem = f"what the Hub has under this name is not a data set that can be read ({error})"
        remedy = "Check the path or the Hub id."
    return UnknownDatasetError(
        f"No folder has this name, and {problem}.",
        file=source,
        remedy=f"{remedy} `hf-mel data build` builds a folder.",
    )


def _reason(error: Exception | None, source: str, copy: FolderCopy | None) -> str:
    """Returns the message of an error of `datasets`, with the user's path in place of that of the copy."""
    return str(error) if copy is None else str(error).replace(copy.source, source)


def dataset_version(dataset: str | os.PathLike[str], revision: str | None = None) -> dict[str, str | None]:
    """Identifies the data on which a score is computed.

    Returns:
        `dict` with `dataset` (Hub id or name of the folder), `revision` (commit on the Hub; `None` for a folder) and
        `sha256`: one digest of the paths and contents of all Parquet files, equal for a folder and its copy on the Hub;
        `None` if the Hub cannot be reached and the data set comes from the cache.

    Raises:
        UnknownDatasetError: As in [`load_mentions`]; also for a folder without Parquet files.
    """
    source = os.fspath(dataset)
    _check_source(source, revision)
    if Path(source).is_dir():
        root = Path(source)
        digest = parquet_sha256(root)
        if digest is None:
            raise _not_found_error(source, FileNotFoundError("no Parquet files"))
        return {"dataset": root.resolve().name, "revision": None, "sha256": digest}
    try:
        info = huggingface_hub.HfApi().dataset_info(source, revision=revision, files_metadata=True)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _not_found_error(source, error) from error
    except Exception:  # offline, or the Hub is down: the data may still come from the cache
        return {"dataset": source, "revision": revision, "sha256": None}
    parquet = [file for file in info.siblings or [] if file.rfilename.endswith(".parquet")]
    digests = {file.rfilename: file.lfs.sha256 for file in parquet if file.lfs is not None}
    return {
        "dataset": source,
        "revision": info.sha,
        "sha256": files_sha256(digests) if digests and len(digests) == len(parquet) else None,
    }


def check_golds(
    mentions: datasets.Dataset | Iterable[Mapping[str, Any]], entity_ids: Iterable[str], *, file: str | None = None
) -> None:
    """Checks that ids are unique and that every gold is in the knowledge base or [`~hf_mel.schema.NIL`].

    Args:
        mentions (`datasets.Dataset` or rows): M mentions.
        entity_ids (iterable of `str`): The ids of the entities.
        file (`str`, *optional*): The source of the mentions, for error messages.

    Raises:
        DuplicateIdError: A mention or an entity id occurs twice.
        UnknownEntityError: A gold is not in the knowledge base.
    """
    ids: set[str] = set()
    for entity_id in entity_ids:
        if entity_id in ids:
            raise DuplicateIdError(
                f"The entity id {entity_id!r} occurs twice.", file=file, remedy="Keep one of the two entities."
            )
        ids.add(entity_id)
    if isinstance(mentions, datasets.Dataset):
        mentions = mentions.select_columns(["mention_id", "entity_id"])  # avoids decoding images
    first_rows: dict[str, int] = {}
    unknown: list[tuple[int, Any, Any]] = []
    for number, row in enumerate(mentions):
        if row["mention_id"] in first_rows:
            raise DuplicateIdError(
                f"The mention id {row['mention_id']!r} is also that of row {first_rows[row['mention_id']]}.",
                file=file,
                row=number,
                remedy="Give every mention another id.",
            )
        first_rows[row["mention_id"]] = number
        if row["entity_id"] != NIL and row["entity_id"] not in ids:
            unknown.append((number, row["mention_id"], row["entity_id"]))
    if unknown:
        number, mention_id, gold = unknown[0]
        more = f" {len(unknown):,} of {len(first_rows):,} mentions have such golds." if len(unknown) > 1 else ""
        raise UnknownEntityError(
            f"The gold {gold!r} of mention {mention_id!r} is not in the knowledge base.{more}",
            file=file,
            row=number,
            remedy=f"Add the entity to the knowledge base, or set the gold to {NIL!r}.",
        )
