"""Loading a data set in the schema of hf_mel, from a folder or the Hub, and a user's own file of entities."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from tqdm.auto import tqdm

from hf_mel.data.images import verify_image
from hf_mel.errors import (
    DataFormatError,
    DuplicateIdError,
    ImageError,
    KnowledgeBaseError,
    MelError,
    UnknownDatasetError,
    UnknownEntityError,
    UnknownSplitError,
)
from hf_mel.files import files_sha256, parquet_sha256
from hf_mel.row_files import ENTITY_COLUMNS, entity_row, read_rows, texts_cell
from hf_mel.schema import NIL, entity_features, mention_features, post_features


def load_mentions(
    dataset: str | os.PathLike[str], split: str, revision: str | None = None, *, config: str = "mentions"
) -> datasets.Dataset:
    """The mentions of one split, one row each (columns: [`~hf_mel.schema.mention_features`]).

    Args:
        dataset (`str` or `os.PathLike`): A folder written by `hf-mel data build`, or a data set on the Hub.
        split (`str`): "train", "validation", "test" or whatever the data set has.
        revision (`str`, *optional*): Branch, tag or commit, for a data set on the Hub.
        config (`str`): The configuration, for a data set that has further ones with mentions.

    Returns:
        `datasets.Dataset` of M rows; images decode to PIL on access.

    Raises:
        UnknownDatasetError: Neither a folder nor a data set on the Hub that can be reached.
        UnknownSplitError: It has no mentions, or not that split; the message lists what there is.
        DataFormatError: Columns of the schema are missing.
    """
    return _load(dataset, config, split, revision, mention_features())


def load_entities(dataset: str | os.PathLike[str], revision: str | None = None) -> datasets.Dataset:
    """The knowledge base, one entity a row (columns: [`~hf_mel.schema.entity_features`]).

    Args and errors as in [`load_mentions`], and

    Raises:
        KnowledgeBaseError: The knowledge base is empty.
    """
    entities = _load(dataset, "entities", "kb", revision, entity_features())
    if not len(entities):
        raise KnowledgeBaseError("the knowledge base is empty.", file=dataset, remedy="Build the data set again.")
    return entities


def load_posts(dataset: str | os.PathLike[str], split: str = "kb", revision: str | None = None) -> datasets.Dataset:
    """The posts about the entities (columns: [`~hf_mel.schema.post_features`]); few data sets have them.

    Args and errors as in [`load_mentions`].
    """
    return _load(dataset, "posts", split, revision, post_features())


def _load(
    dataset: str | os.PathLike[str], config: str, split: str, revision: str | None, features: datasets.Features
) -> datasets.Dataset:
    source = os.fspath(dataset)
    _check_source(source, revision)
    try:
        splits = datasets.load_dataset(source, config, revision=revision, cache_dir=_cache_of(source))
    except (DatasetNotFoundError, DataFilesNotFoundError, ConnectionError) as error:
        raise _not_found(source, error) from error
    except Exception as error:  # no common base: a missing configuration, damaged Parquet, a full disk …
        try:
            configs = datasets.get_dataset_config_names(source, revision=revision)
        except Exception:
            raise _not_found(source, error) from error
        if config not in configs:
            raise UnknownSplitError(
                f"has no configuration {config!r}; it has {', '.join(map(repr, configs))}.",
                file=source,
                remedy="Is this a data set built by `hf-mel data build`?",
            ) from error
        raise DataFormatError(
            f"the configuration {config!r} cannot be read ({error}).", file=source, remedy="Build it again."
        ) from error
    if split not in splits:
        raise UnknownSplitError(
            f"{config} has no split {split!r}; it has {', '.join(map(repr, splits))}.", file=source
        )
    rows = splits[split]
    missing = [column for column in features if column not in rows.column_names]
    if missing:
        raise DataFormatError(
            f"{config} lacks the columns {missing}; it has {rows.column_names}.",
            file=source,
            remedy="Build it with this version of hf_mel.",
        )
    return rows


def _cache_of(source: str) -> str | None:
    """A cache of its own for every state of a folder.

    `datasets` tells folders apart by their name and card alone: one that was built anew, or another of that name, would
    give the rows of the first.
    """
    root = Path(source)
    if not root.is_dir():
        return None
    digest = hashlib.sha256(str(root.resolve()).encode())
    for path in sorted(root.rglob("*")):
        if path.is_file():
            state = path.stat()
            digest.update(f"{path.relative_to(root)} {state.st_size} {state.st_mtime_ns}\n".encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE) / f"folder-{digest.hexdigest()[:16]}")


def open_repository(
    dataset: str | os.PathLike[str], revision: str | None = None
) -> dict[str, datasets.DatasetBuilder]:
    """The configurations of a data set, by name, with their files and what its card says of them; nothing is loaded.

    Raises:
        UnknownDatasetError: As in [`load_mentions`].
    """
    source = os.fspath(dataset)
    _check_source(source, revision)
    try:
        configs = datasets.get_dataset_config_names(source, revision=revision)
        return {config: datasets.load_dataset_builder(source, config, revision=revision) for config in configs}
    except Exception as error:  # no common base: no such repository, a damaged card, no network …
        raise _not_found(source, error) from error


def _check_source(source: str, revision: str | None) -> None:
    if Path(source).is_dir():
        if revision is not None:
            raise UnknownDatasetError(f"is a folder, and has no revision {revision!r}.", file=source)
    elif Path(source).exists():
        raise UnknownDatasetError("is a file, not a data set.", file=source, remedy="Give the folder it lies in.")
    else:
        try:
            huggingface_hub.utils.validate_repo_id(source)
        except huggingface_hub.errors.HFValidationError as error:
            raise _not_found(source, None) from error


def _not_found(source: str, error: Exception | None) -> UnknownDatasetError:
    if Path(source).is_dir():
        return UnknownDatasetError(f"holds no data set ({error}).", file=source, remedy="Run `hf-mel data build`.")
    reason = f" that could be reached ({type(error).__name__}: {error})" if error is not None else ""
    return UnknownDatasetError(
        f"{source!r} is neither a folder here nor a data set on the Hub{reason}.",
        remedy="Check the path or the Hub id; build a folder with `hf-mel data build`.",
    )


def dataset_version(dataset: str | os.PathLike[str], revision: str | None = None) -> dict[str, str | None]:
    """What pins down the data a score was computed on.

    Returns:
        `dict` with `dataset` (Hub id, or the folder's name), `revision` (the commit on the Hub; `None` for a folder)
        and `sha256`: one digest of the paths and contents of all Parquet files, the same for a folder and its copy
        on the Hub; `None` if the Hub cannot be asked (a data set read from the cache while offline).

    Raises:
        UnknownDatasetError: As in [`load_mentions`]; also a folder without Parquet files.
    """
    source = os.fspath(dataset)
    _check_source(source, revision)
    if Path(source).is_dir():
        root = Path(source)
        digest = parquet_sha256(root)
        if digest is None:
            raise _not_found(source, FileNotFoundError("no Parquet files"))
        return {"dataset": root.resolve().name, "revision": None, "sha256": digest}
    try:
        info = huggingface_hub.HfApi().dataset_info(source, revision=revision, files_metadata=True)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _not_found(source, error) from error
    except Exception:  # offline or the Hub is down: the data may still come from the cache
        return {"dataset": source, "revision": revision, "sha256": None}
    parquet = [file for file in info.siblings or [] if file.rfilename.endswith(".parquet")]
    known = {file.rfilename: file.lfs.sha256 for file in parquet if file.lfs is not None}
    return {
        "dataset": source,
        "revision": info.sha,
        "sha256": files_sha256(known) if known and len(known) == len(parquet) else None,
    }


def check_golds(
    mentions: datasets.Dataset | Iterable[Mapping[str, Any]], entity_ids: Iterable[str], *, file: str | None = None
) -> None:
    """Checks that ids are unique and that every gold is in the knowledge base or [`~hf_mel.schema.NIL`].

    Args:
        mentions (`datasets.Dataset` or rows): M mentions.
        entity_ids (iterable of `str`): The ids of the knowledge base.
        file (`str`, *optional*): Where the mentions come from, for the error.

    Raises:
        DuplicateIdError: A mention or an entity id occurs twice.
        UnknownEntityError: A gold is not in the knowledge base.
    """
    known: set[str] = set()
    for entity_id in entity_ids:
        if entity_id in known:
            raise DuplicateIdError(f"the entity id {entity_id!r} occurs twice.", file=file)
        known.add(entity_id)
    if isinstance(mentions, datasets.Dataset):
        mentions = mentions.select_columns(["mention_id", "entity_id"])  # leaves the images undecoded
    first: dict[str, int] = {}
    for k, row in enumerate(mentions):
        if row["mention_id"] in first:
            raise DuplicateIdError(
                f"the mention id {row['mention_id']!r} is that of row {first[row['mention_id']]} too.",
                file=file,
                row=k,
            )
        first[row["mention_id"]] = k
        if row["entity_id"] != NIL and row["entity_id"] not in known:
            raise UnknownEntityError(
                f"the gold {row['entity_id']!r} of mention {row['mention_id']!r} is not in the knowledge base.",
                file=file,
                row=k,
                remedy=f"Add the entity to the knowledge base, or set the gold to {NIL!r}.",
            )


def read_entity_file(path: str | os.PathLike[str]) -> datasets.Dataset:
    """A user's own entities from a JSONL, JSON, CSV or TSV file (UTF-8, with or without BOM, any line ends).

    Columns: `id` (or `entity_id`) and `name`, both needed; `description`, `attributes`, `aliases`, and `image` (or
    `images`): paths relative to the file. `aliases` and `image` hold several values as a JSON list, or separated by
    "|". Every image is decoded once here, so that a damaged one is found now and not in the middle of a run.

    Args:
        path (`str` or `os.PathLike`): A file ending in .jsonl, .json, .csv or .tsv.

    Returns:
        `datasets.Dataset` of N entities (columns: [`~hf_mel.schema.entity_features`]); images stay on disk and
        decode to PIL on access.

    Raises:
        DataFormatError: Not such a file, a line that cannot be parsed, an unknown column, a missing or ill-typed
            value; with the line number.
        DuplicateIdError: An id occurs twice.
        ImageError: An image is missing, damaged, huge or not an image.
        KnowledgeBaseError: The file has no rows.
    """
    path = Path(path)
    lines: dict[str, int] = {}
    records = tqdm(read_rows(path, ENTITY_COLUMNS), desc=f"reading {path.name}", unit=" entities", delay=1)
    rows = [_checked_entity(path, line, record, lines) for line, record in records]
    if not rows:
        raise _no_entities(path)
    stored = [
        {**row, "images": [{"path": str(image.absolute()), "bytes": None} for image in row["images"]]} for row in rows
    ]
    return datasets.Dataset.from_list(stored, features=entity_features())


def check_entity_file(
    path: str | os.PathLike[str], image_folder: str | os.PathLike[str] | None = None
) -> tuple[int, list[MelError]]:
    """Everything that is wrong with a file of entities, row by row, where [`read_entity_file`] stops at the first error.

    Args:
        path (`str` or `os.PathLike`): As in [`read_entity_file`].
        image_folder (`str` or `os.PathLike`, *optional*): An image that does not lie in this folder is an error too.
            For files of people who may not read this machine's disk.

    Returns:
        How many rows were read, and the errors in their order. A row that cannot be parsed ends the reading.
    """
    path = Path(path)
    lines: dict[str, int] = {}
    problems: list[MelError] = []
    count = 0
    records = read_rows(path, ENTITY_COLUMNS)
    while True:
        try:
            line, record = next(records)
            count += 1
        except StopIteration:
            break
        except MelError as error:
            problems.append(error)
            break
        try:
            if image_folder is not None:
                _check_inside(path, line, record, Path(image_folder))
            _checked_entity(path, line, record, lines)
        except MelError as error:
            problems.append(error)
    return count, problems if count or problems else [_no_entities(path)]


def _check_inside(path: Path, line: int, record: Mapping[str, Any], folder: Path) -> None:
    """Raises before anything outside of `folder` is looked at."""
    for name in texts_cell(path, line, record, "image"):
        # An absolute name replaces the folder it is joined to; resolving follows links and "..".
        if "\0" in name or not (path.parent / name).resolve().is_relative_to(folder.resolve()):
            raise ImageError(f"the image {name!r} lies outside of the images given.", file=path, row=line)


def _checked_entity(path: Path, line: int, record: Mapping[str, Any], lines: dict[str, int]) -> dict[str, Any]:
    """One row of a file of entities; `lines` holds the line of every id before it, and gets this one's."""
    row = entity_row(path, line, record)
    if row["entity_id"] in lines:
        raise DuplicateIdError(
            f"the id {row['entity_id']!r} is that of line {lines[row['entity_id']]} too.", file=path, row=line
        )
    lines[row["entity_id"]] = line
    for picture in row["images"]:
        try:
            verify_image(picture)
        except ImageError as error:
            raise ImageError(f"{picture}: {error.message}", file=path, row=line, remedy=error.remedy) from error
    return row


def _no_entities(path: Path) -> KnowledgeBaseError:
    return KnowledgeBaseError("holds no entities.", file=path, remedy="A knowledge base needs at least one.")
