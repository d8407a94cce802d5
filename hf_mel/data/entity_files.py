"""Files of users' own entities: reading them, and listing everything that is wrong with one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm

from hf_mel.data.images import verify_image
from hf_mel.errors import DataFormatError, DuplicateIdError, ImageError, KnowledgeBaseError, MelError
from hf_mel.row_files import ENTITY_COLUMNS, entity_row, image_file, read_rows, texts_cell
from hf_mel.schema import entity_features


def read_entity_file(path: str | os.PathLike[str], *, bad_images: list[ImageError] | None = None) -> datasets.Dataset:
    """Reads a user's entities from a JSONL, JSON, CSV or TSV file (UTF-8, with or without BOM, any line ends).

    The columns `id` (or `entity_id`) and `name` are required. `description`, `attributes`, `aliases` and `image` (or
    `images`, paths relative to the file) are optional. Several aliases or images are a JSON list, or are separated by
    "|". Every image is decoded once, so that a damaged one is reported now and not in the middle of a run.

    Args:
        path (`str` or `os.PathLike`): A .jsonl, .json, .csv or .tsv file.
        bad_images (list of [`~hf_mel.errors.ImageError`], *optional*): Receives an error for each missing or damaged image,
            which its entity then goes without. Without a list, the first one is raised.

    Returns:
        `datasets.Dataset` of N entities (columns: [`~hf_mel.schema.entity_features`]). Images stay on disk and decode
        to PIL on access.

    Raises:
        DataFormatError: As in [`~hf_mel.row_files.read_rows`] and [`~hf_mel.row_files.entity_row`]; names the line.
        DuplicateIdError: An id occurs twice.
        ImageError: An image is missing, damaged, too large, or not an image, and there is no list `bad_images`.
        KnowledgeBaseError: The file has no rows.
    """
    path = Path(path)
    lines: dict[str, int] = {}
    records = tqdm(read_rows(path, ENTITY_COLUMNS), desc=f"Reading {path.name}", unit=" entities", delay=1)
    rows = [_checked_entity(path, line, record, lines, bad_images) for line, record in records]
    if not rows:
        raise _no_entities_error(path)
    undecoded = [
        {**row, "images": [{"path": str(image.absolute()), "bytes": None} for image in row["images"]]} for row in rows
    ]
    return datasets.Dataset.from_list(undecoded, features=entity_features())


def check_entity_file(
    path: str | os.PathLike[str], image_folder: str | os.PathLike[str] | None = None
) -> tuple[int, list[MelError]]:
    """Collects all problems of a file of entities, where [`read_entity_file`] stops at the first.

    Args:
        path (`str` or `os.PathLike`): A .jsonl, .json, .csv or .tsv file, as in [`read_entity_file`].
        image_folder (`str` or `os.PathLike`, *optional*): Images outside this folder are errors too. Set it for
            uploaded files, whose authors must not read other files of this machine.

    Returns:
        `tuple[int, list[MelError]]`: The number of rows that were read, and the errors in their order: an
        [`~hf_mel.errors.ImageError`] for each missing or damaged image, which [`read_entity_file`] can go on without, and
        other errors. Reading ends at a row that cannot be parsed.
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
            bad_images: list[ImageError] = []
            _checked_entity(path, line, record, lines, bad_images)
            problems += bad_images
        except MelError as error:
            problems.append(error)
    return count, problems if count or problems else [_no_entities_error(path)]


def _check_inside(path: Path, line: int, record: Mapping[str, Any], folder: Path) -> None:
    """Raises a [`~hf_mel.errors.DataFormatError`] for an image outside `folder`, before it is opened."""
    for name in texts_cell(path, line, record, "image"):
        # Joining an absolute name discards the folder, and resolving follows links and "..".
        if "\0" in name or not (path.parent / name).resolve().is_relative_to(folder.resolve()):
            raise DataFormatError(
                f"The image {name!r} is outside the folder of images.",
                file=path,
                row=line,
                remedy="Give a path inside the folder.",
            )


def _checked_entity(
    path: Path,
    line: int,
    record: Mapping[str, Any],
    lines: dict[str, int],
    bad_images: list[ImageError] | None,
) -> dict[str, Any]:
    """Checks and converts one row; `lines` maps the ids of earlier rows to their lines and is updated."""
    row = entity_row(path, line, {**record, "image": None})
    if row["entity_id"] in lines:
        raise DuplicateIdError(
            f"The id {row['entity_id']!r} is also that of line {lines[row['entity_id']]}.",
            file=path,
            row=line,
            remedy="Keep one of the two rows.",
        )
    lines[row["entity_id"]] = line
    for name in texts_cell(path, line, record, "image"):
        try:
            row["images"].append(_checked_image(path, line, name))
        except ImageError as error:
            if bad_images is None:
                raise
            bad_images.append(error)
    return row


def _checked_image(path: Path, line: int, name: str) -> Path:
    image = image_file(path, line, name)
    try:
        verify_image(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error.message}", file=path, row=line, remedy=error.remedy) from error
    return image


def _no_entities_error(path: Path) -> KnowledgeBaseError:
    return KnowledgeBaseError("The file holds no entities.", file=path, remedy="Add at least one row.")
