"""Entities as a knowledge base takes them in: opening their source, checking ids, and the columns that are stored."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import datasets

from hf_mel.data.entity_files import read_entity_file
from hf_mel.data.image_checks import without_bad_images
from hf_mel.data.loading import load_entities
from hf_mel.errors import DataFormatError, DuplicateIdError, ImageError, KnowledgeBaseError
from hf_mel.files import write_text
from hf_mel.inference.entity_sources import part_of
from hf_mel.inference.ranking import SingleProcess
from hf_mel.kb.shared_work import check_same_settings
from hf_mel.row_columns import ColumnMapping
from hf_mel.row_files import ROW_SUFFIXES
from hf_mel.schema import NIL, entity_features

#: The columns of an entity that are text: a string each, `aliases` a list of strings.
TEXT_COLUMNS = ["entity_id", "name", "description", "attributes", "aliases"]

#: The list of the images that a knowledge base goes without, one JSON object a line. It is about files of this machine, so
#: it is not part of the knowledge base: `kb.json` does not name it, and it is not published.
LEFT_OUT_NAME = "left_out_images.jsonl"

#: The folder or Hub id of a data set, a file of entities (.jsonl, .json, .csv, .tsv), or rows with the columns of
#: [`~hf_mel.schema.entity_features`].
EntitiesLike: TypeAlias = str | os.PathLike[str] | datasets.Dataset


def is_row_file(entities: EntitiesLike) -> TypeGuard[str | os.PathLike[str]]:
    """Returns whether entities are given as a file of rows, and not as a data set."""
    if isinstance(entities, datasets.Dataset):
        return False
    name = os.fspath(entities)
    return Path(name).is_file() or (name.lower().endswith(ROW_SUFFIXES) and not Path(name).is_dir())


def open_entities(
    entities: EntitiesLike,
    bad_images: list[ImageError] | None = None,
    mapping: ColumnMapping | None = None,
    group: SingleProcess | None = None,
) -> tuple[datasets.Dataset, str | None]:
    """Opens a source of entities, and checks their images.

    Args:
        entities ([`EntitiesLike`]): The source.
        bad_images (list of [`~hf_mel.errors.ImageError`], *optional*): Receives an error for each missing or damaged image,
            which its entity then goes without. Without a list, the first one is raised.
        mapping ([`~hf_mel.row_columns.ColumnMapping`], *optional*): Columns that have other names in a file of entities.
        group (*optional*): The processes that open the same source, in a block of `raise_together`. Each opens its share of
            the images.

    Returns:
        `tuple[datasets.Dataset, str | None]`: The rows, and the name of their source for error messages.

    Raises:
        KnowledgeBaseError: The source has no entities.
        DataFormatError: A column is missing.
        ImageError: An image is missing or damaged, and there is no list `bad_images`.
        MelError: As in [`~hf_mel.data.loading.load_entities`] and [`~hf_mel.data.entity_files.read_entity_file`].
    """
    group = group or SingleProcess()
    from_file = is_row_file(entities)
    name = None if isinstance(entities, datasets.Dataset) else os.fspath(entities)
    check_same_settings(group, {"entities": from_file}, name)
    if isinstance(entities, datasets.Dataset):
        rows = entities.with_format(None)
    else:
        read_file = partial(
            read_entity_file,
            mapping=mapping,
            bad_images=bad_images,
            share=(group.index, group.size),
            gather=group.gather,
        )
        rows = read_file(entities) if from_file else load_entities(entities)
    if mapping is not None and not from_file:
        raise DataFormatError(
            "Columns are assigned, but the entities do not come from a file of rows.",
            file=name,
            remedy=f"Give a file that ends in {' or '.join(ROW_SUFFIXES)}, or leave the mapping out.",
        )
    missing = [column for column in entity_features() if column not in rows.column_names]
    if missing:
        raise DataFormatError(
            f"The entities lack the columns {missing}; they have {rows.column_names}.",
            file=name,
            remedy="Give all columns of hf_mel.schema.entity_features; all but ids and names may be empty.",
        )
    if not len(rows):
        raise KnowledgeBaseError("The source has no entities.", file=name, remedy="Give at least one entity.")
    if rows.features["images"] != datasets.List(datasets.Image()):
        rows = rows.cast_column("images", datasets.List(datasets.Image()))
    if not from_file:  # the images of a file have been checked with its rows
        rows = checked_images(rows, name, bad_images, group)
    return rows, name


def checked_images(
    rows: datasets.Dataset, name: str | None, bad_images: list[ImageError] | None, group: SingleProcess
) -> datasets.Dataset:
    """Returns rows without bad images; each process of a group opens its part of them."""
    part = part_of(len(rows), group.index, group.size)
    return without_bad_images(rows, file=name, bad_images=bad_images, part=part, gather=group.gather)


def check_ids(rows: datasets.Dataset, name: str | None) -> list[str]:
    """Checks that ids are unique, non-empty strings other than NIL, and returns them.

    Raises:
        DataFormatError: An id is not a string, is empty, or is [`~hf_mel.schema.NIL`].
        DuplicateIdError: An id occurs twice.
    """
    ids = rows.select_columns(["entity_id"])[:]["entity_id"]
    first_rows: dict[str, int] = {}
    for row, entity_id in enumerate(ids):
        if not isinstance(entity_id, str) or not entity_id or entity_id == NIL:
            raise DataFormatError(
                f"The entity id is {entity_id!r}.",
                file=name,
                row=row,
                remedy=f"Give a non-empty string other than {NIL!r}.",
            )
        if first_rows.setdefault(entity_id, row) != row:
            raise DuplicateIdError(
                f"The entity id {entity_id!r} is also that of row {first_rows[entity_id]}.",
                file=name,
                row=row,
                remedy="Keep one of the two entities.",
            )
    return ids


def content_sha256(rows: datasets.Dataset) -> str:
    """Returns a sha256 of all columns. An image file contributes its path, size and modification time."""
    digest = hashlib.sha256()
    undecoded = rows.with_format("arrow")  # the plain format would decode every image
    for start in range(0, len(rows), 256):
        for row in undecoded[start : start + 256].to_pylist():
            for image in row.pop("images", None) or [row.pop("image", None)]:
                if image and image["bytes"] is not None:
                    digest.update(image["bytes"])
                elif image:
                    path = Path(image["path"] or "")
                    stat = path.stat() if path.is_file() else None
                    digest.update(repr((image["path"], stat and (stat.st_size, stat.st_mtime_ns))).encode())
            digest.update(repr(row).encode())
    return digest.hexdigest()


def row_digest(row: Mapping[str, Any]) -> bytes:
    """Returns a digest of an entity as it is stored: its texts, its image and the further columns that are not empty."""
    digest = hashlib.blake2b(repr([row[column] for column in TEXT_COLUMNS]).encode(), digest_size=16)
    for image in row["images"]:
        digest.update(image["bytes"])
    further = {*row} - {*TEXT_COLUMNS, "images"}
    digest.update(repr([(column, row[column]) for column in sorted(further) if row[column] is not None]).encode())
    return digest.digest()


def columns_to_store(columns: dict[str, list], file: str | None) -> dict[str, list]:
    """Returns the columns of the schema with nulls replaced by empty values, and only the first image, as bytes.

    Args:
        columns (`dict[str, list]`): Undecoded columns of a batch of entities.
        file (`str`, *optional*): The source, for error messages.

    Raises:
        ImageError: An image file cannot be read.
    """
    result: dict[str, list] = {}
    for column in TEXT_COLUMNS:
        empty: Any = [] if column == "aliases" else ""
        result[column] = [empty if value is None else value for value in columns[column]]
    result["images"] = [
        [_image_bytes(images[0], file, entity_id)] if images and images[0] else []
        for images, entity_id in zip(columns["images"], columns["entity_id"], strict=True)
    ]
    return result


def _image_bytes(image: Mapping[str, Any], file: str | None, entity_id: str) -> dict[str, Any]:
    data = image.get("bytes")
    if data is None:
        try:
            data = Path(image["path"]).read_bytes()
        except (OSError, TypeError) as error:
            raise ImageError(
                f"The image file {image['path']!r} does not exist or cannot be read.",
                file=file,
                row=entity_id,
                remedy="Restore the file, or remove the image from the row.",
            ) from error
    # The path is dropped: file names can reveal the entity, and private folder names, once the file is published.
    return {"bytes": data, "path": None}


def write_left_out_images(folder: Path, left_out: Sequence[Mapping[str, Any]]) -> None:
    """Writes the list of images that a knowledge base goes without (see `KnowledgeBase.left_out_images`), if any.

    Raises:
        MelError: The file cannot be written.
    """
    if left_out:
        write_text(folder / LEFT_OUT_NAME, (f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in left_out))


def read_left_out_images(folder: Path) -> list[dict[str, Any]]:
    """Reads the list that [`write_left_out_images`] wrote; empty without one.

    Raises:
        KnowledgeBaseError: The file is damaged.
    """
    path = folder / LEFT_OUT_NAME
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise KnowledgeBaseError(f"The file cannot be read ({error}).", file=path, remedy="Delete it.") from error


def describe_bad_images(bad_images: Sequence[ImageError]) -> list[dict[str, Any]]:
    """Returns bad images as entries of `KnowledgeBase.left_out_images`."""
    return [
        {"file": None if error.file is None else Path(error.file).name, "row": error.row, "problem": error.message}
        for error in bad_images
    ]
