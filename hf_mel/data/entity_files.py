"""Files of users' own entities: reading them, and listing everything that is wrong with one."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm

from hf_mel.data.images import verify_image
from hf_mel.errors import DataFormatError, DuplicateIdError, ImageError, KnowledgeBaseError, MelError
from hf_mel.row_columns import ColumnMapping
from hf_mel.row_files import ENTITY_COLUMNS, bad_rows_error, entity_row, image_file, read_rows, texts_cell
from hf_mel.schema import entity_features


def read_entity_file(
    path: str | os.PathLike[str],
    *,
    mapping: ColumnMapping | None = None,
    bad_images: list[ImageError] | None = None,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[Any], list[Any]] = lambda outcome: [outcome],
) -> datasets.Dataset:
    """Reads a user's entities from a JSONL, JSON, CSV or TSV file (UTF-8, with or without BOM, any line ends).

    The columns `id` (or `entity_id`) and `name` are required. `description`, `attributes`, `aliases` and `image` (or
    `images`, paths relative to the file) are optional. Several aliases or images are a JSON list, or are separated by
    "|". Every image is decoded once, so that a damaged one is reported now and not in the middle of a run.

    Args:
        path (`str` or `os.PathLike`): A .jsonl, .ndjson, .json, .csv or .tsv file.
        mapping ([`~hf_mel.row_columns.ColumnMapping`], *optional*): Columns that have other names in the file.
        bad_images (list of [`~hf_mel.errors.ImageError`], *optional*): Receives an error for each missing or damaged image,
            which its entity then goes without. Without a list, the first one is raised.
        share (`tuple[int, int]`): The number of this process, and that of all processes. Each opens the images of its share.
        gather (callable): Returns what each process passes to it.

    Returns:
        `datasets.Dataset` of N entities (columns: [`~hf_mel.schema.entity_features`], and those that the mapping keeps:
        whole numbers, numbers, dates (1999-12-31), truth values, texts or lists of texts, as their values are; `types` are
        always lists, separated by "|"). Images stay on disk and decode
        to PIL on access.

    Raises:
        DataFormatError: As in [`~hf_mel.row_files.read_rows`] and [`~hf_mel.row_files.entity_row`]. Several bad rows are
            one error, which lists them.
        DuplicateIdError: An id occurs twice.
        ImageError: An image is missing, damaged, too large, or not an image, and there is no list `bad_images`.
        KnowledgeBaseError: The file has no rows.
    """
    bad_rows: list[MelError] = []
    own_errors: list[ImageError] = []
    rows = _read(Path(path), mapping, bad_rows, own_errors, share=share)
    if bad_rows:
        raise bad_rows_error(bad_rows)
    own_images = {number: row["images"] for number, row in enumerate(rows) if row["images"]}
    images: list[ImageError] = []
    for good, errors in gather((own_images, own_errors)):
        images += errors
        for number in good.keys() & range(len(rows)):  # another process may have more rows, which its caller finds out
            rows[number]["images"] = good[number]
    images.sort(key=lambda error: int(error.row or 0))  # by line; those of one are in order
    if bad_images is None and images:
        raise images[0]
    if bad_images is not None:
        bad_images += images
    undecoded = [
        {**row, "images": [{"path": str(image.absolute()), "bytes": None} for image in row["images"]]} for row in rows
    ]
    further: dict[str, Any] = {}
    for name in () if mapping is None else mapping.kept:
        values, further[name] = _typed_column([row[name] for row in undecoded])
        for row, value in zip(undecoded, values, strict=True):
            row[name] = value
    return datasets.Dataset.from_list(undecoded, features=entity_features(**further))


def _typed_column(values: list[Any]) -> tuple[list[Any], Any]:
    """Returns the values of a column of a file, `None` for empty ones, and the feature that holds them.

    A column is one of lists of texts, truth values, whole numbers, numbers, dates, or texts, the first that all values fit.
    """
    values = [None if value is None or value == "" else value for value in values]
    present = [value for value in values if value is not None]
    if any(isinstance(value, list) for value in present):
        return [value or [] for value in values], [datasets.Value("string")]
    if present and all(isinstance(value, bool) for value in present):
        return values, datasets.Value("bool")
    texts = [value if isinstance(value, str) else json.dumps(value) for value in present]
    kinds: list[tuple[str, Callable[[str], Any]]] = [
        ("int64", int),
        ("float64", float),
        ("date32", datetime.date.fromisoformat),
    ]
    for name, parse in kinds:
        try:
            parsed = iter([parse(text) for text in texts])
        except ValueError:
            continue
        if present:
            return [None if value is None else next(parsed) for value in values], datasets.Value(name)
    parsed = iter(texts)
    return [None if value is None else next(parsed) for value in values], datasets.Value("string")


def check_entity_rows(path: str | os.PathLike[str], mapping: ColumnMapping | None = None) -> None:
    """Raises what [`read_entity_file`] raises, except for images, which it does not open. So it takes a moment only."""
    problems: list[MelError] = []
    _read(Path(path), mapping, problems, None)
    if problems:
        raise bad_rows_error(problems)


def check_entity_file(
    path: str | os.PathLike[str],
    image_folder: str | os.PathLike[str] | None = None,
    *,
    mapping: ColumnMapping | None = None,
) -> tuple[int, list[MelError]]:
    """Collects all problems of a file of entities, which [`read_entity_file`] raises.

    Args:
        path (`str` or `os.PathLike`): A .jsonl, .ndjson, .json, .csv or .tsv file, as in [`read_entity_file`].
        image_folder (`str` or `os.PathLike`, *optional*): Images outside this folder are errors too. Set it for
            uploaded files, whose authors must not read other files of this machine.
        mapping ([`~hf_mel.row_columns.ColumnMapping`], *optional*): Columns that have other names in the file.

    Returns:
        `tuple[int, list[MelError]]`: The number of rows that were read, and the errors in their order: an
        [`~hf_mel.errors.ImageError`] for each missing or damaged image, which [`read_entity_file`] can go on without, and
        other errors. An error of the whole file, such as an unknown column, is the only one.
    """
    problems: list[MelError] = []
    try:
        rows = _read(Path(path), mapping, problems, problems, None if image_folder is None else Path(image_folder))
    except MelError as error:
        return 0, [error]
    return len(rows) + sum(not isinstance(problem, ImageError) for problem in problems), problems


def _read(
    path: Path,
    mapping: ColumnMapping | None,
    bad_rows: list[MelError],
    bad_images: list[MelError] | list[ImageError] | None,
    image_folder: Path | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[dict[str, Any]]:
    """Returns the good rows of a file of entities.

    Args:
        path, mapping: As in [`read_entity_file`].
        bad_rows (`list`): Receives the errors of bad rows.
        bad_images (`list`, *optional*): Receives the errors of images. Default: no image is opened.
        image_folder (`Path`, *optional*): Rows with images outside this folder are bad.
        share: As in [`read_entity_file`]. The rows of other processes have no images.

    Raises:
        MelError: An error of the whole file.
    """
    mapping = mapping or ColumnMapping()
    mapping.check_targets(ENTITY_COLUMNS)
    taken = {*ENTITY_COLUMNS, *ENTITY_COLUMNS.values(), *entity_features()}
    for name in mapping.kept:
        if name in taken:
            raise DataFormatError(
                f"The column {name!r} is kept anyway.", file=path, remedy="Leave it out of --keep-column."
            )
    accepted = {**ENTITY_COLUMNS, **{name: name for name in mapping.kept}}
    lines: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    records = read_rows(path, accepted, mapping=mapping, required=("id", "name"), bad_rows=bad_rows)
    for line, record in tqdm(records, desc=f"Reading {path.name}", unit=" entities", delay=1):
        try:
            if image_folder is not None:
                _check_inside(path, line, record, image_folder)
            further = {name: _further_cell(path, line, record, name) for name in mapping.kept}
            is_own = len(rows) % share[1] == share[0]
            row = _checked_entity(path, line, record, lines, mapping.inverted_names, bad_images if is_own else None)
            rows.append({**row, **further})
        except MelError as error:
            bad_rows.append(error)
    mapping.check_used(path)
    if not rows and not bad_rows:
        raise KnowledgeBaseError("The file holds no entities.", file=path, remedy="Add at least one row.")
    return rows


def _further_cell(path: Path, line: int, record: Mapping[str, Any], name: str) -> Any:
    """Returns a cell of a column that is kept: a text, number, truth value or list of texts, or `None`."""
    value = record.get(name)
    if isinstance(value, list) or name == "types":
        return texts_cell(path, line, record, name)
    if isinstance(value, dict) or (isinstance(value, float) and not math.isfinite(value)):
        raise DataFormatError(
            f"The cell {name!r} is {value!r}.", file=path, row=line, remedy="Give a text, a number or a list of texts."
        )
    return value.strip() if isinstance(value, str) else value


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
    inverted_names: bool,
    bad_images: list[MelError] | list[ImageError] | None,
) -> dict[str, Any]:
    """Checks and converts one row; `lines` maps the ids of earlier rows to their lines and is updated."""
    row = entity_row(path, line, {**record, "image": None}, inverted_names=inverted_names)
    names = texts_cell(path, line, record, "image")
    if row["entity_id"] in lines:
        raise DuplicateIdError(
            f"The id {row['entity_id']!r} is also that of line {lines[row['entity_id']]}.",
            file=path,
            row=line,
            remedy="Keep one of the two rows.",
        )
    lines[row["entity_id"]] = line
    if bad_images is not None:
        for name in names:
            try:
                row["images"].append(_checked_image(path, line, name))
            except ImageError as error:
                bad_images.append(error)
    return row


def _checked_image(path: Path, line: int, name: str) -> Path:
    image = image_file(path, line, name)
    try:
        verify_image(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error.message}", file=path, row=line, remedy=error.remedy) from error
    return image
