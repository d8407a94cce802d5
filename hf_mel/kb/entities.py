"""hf_mel.kb.entities."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from hf_mel.data.loading import load_entities, read_entity_file
from hf_mel.errors import DataFormatError, DuplicateIdError, ImageError, KnowledgeBaseError
from hf_mel.schema import NIL, entity_features

_TEXT_COLUMNS = ["entity_id", "name", "description", "attributes", "aliases"]


#: A data set's folder or Hub id, a .jsonl or .csv file, or rows of [`~hf_mel.schema.entity_features`].
EntitiesLike: TypeAlias = str | os.PathLike[str] | datasets.Dataset


def _entity_rows(entities: EntitiesLike) -> tuple[datasets.Dataset, str | None]:
    """The rows, and what to call their source in an error."""
    if isinstance(entities, datasets.Dataset):
        source, name = entities.with_format(None), None
    else:
        name = os.fspath(entities)
        source = read_entity_file(name) if name.lower().endswith((".jsonl", ".csv")) else load_entities(name)
    missing = [column for column in entity_features() if column not in source.column_names]
    if missing:
        raise DataFormatError(
            f"the entities lack the columns {missing}; they have {source.column_names}.",
            file=name,
            remedy="Columns are those of hf_mel.schema.entity_features; descriptions and the like may be empty.",
        )
    if not len(source):
        raise KnowledgeBaseError(
            "there are no entities.", file=name, remedy="A knowledge base needs at least one entity."
        )
    if source.features["images"] != datasets.List(datasets.Image()):
        source = source.cast_column("images", datasets.List(datasets.Image()))
    return source, name


def _checked_ids(source: datasets.Dataset, name: str | None) -> list[str]:
    ids = source.select_columns(["entity_id"])[:]["entity_id"]
    first: dict[str, int] = {}
    for k, entity_id in enumerate(ids):
        if not isinstance(entity_id, str) or not entity_id or entity_id == NIL:
            raise DataFormatError(
                f"the entity id is {entity_id!r}.",
                file=name,
                row=k,
                remedy=f"Ids are texts, not empty and not {NIL!r}.",
            )
        if first.setdefault(entity_id, k) != k:
            raise DuplicateIdError(
                f"the entity id {entity_id!r} is that of row {first[entity_id]} too.",
                file=name,
                row=k,
                remedy="Keep one of them.",
            )
    return ids


def _content_sha256(source: datasets.Dataset) -> str:
    """sha256 of all columns; an image that is a file counts with its path, size and date."""
    digest = hashlib.sha256()
    stored = source.with_format("arrow")  # plain formatting would decode every image
    for first in range(0, len(source), 256):
        for row in stored[first : first + 256].to_pylist():
            for image in row.pop("images", None) or [row.pop("image", None)]:
                if image and image["bytes"] is not None:
                    digest.update(image["bytes"])
                elif image:
                    path = Path(image["path"] or "")
                    stat = path.stat() if path.is_file() else None
                    digest.update(repr((image["path"], stat and (stat.st_size, stat.st_mtime_ns))).encode())
            digest.update(repr(row).encode())
    return digest.hexdigest()


def _as_stored(columns: dict[str, list], file: str | None) -> dict[str, list]:
    """The columns of the schema without nulls; of the images the first, as bytes."""
    stored: dict[str, list] = {}
    for column in _TEXT_COLUMNS:
        empty: Any = [] if column == "aliases" else ""
        stored[column] = [empty if value is None else value for value in columns[column]]
    stored["images"] = [
        [_image_bytes(images[0], file, entity_id)] if images and images[0] else []
        for images, entity_id in zip(columns["images"], columns["entity_id"], strict=True)
    ]
    return stored


def _image_bytes(image: Mapping[str, Any], file: str | None, entity_id: str) -> dict[str, Any]:
    data = image.get("bytes")
    if data is None:
        try:
            data = Path(image["path"]).read_bytes()
        except (OSError, TypeError) as error:
            raise ImageError(
                f"there is no image {image['path']!r}.",
                file=file,
                row=entity_id,
                remedy="Put it there, or leave it out.",
            ) from error
    # Without its path: a file's name may give the answer away, and is nobody's business once the file is published.
    return {"bytes": data, "path": None}
