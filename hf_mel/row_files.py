"""A user's own rows: JSONL, JSON, CSV and TSV files read strictly, with the line of everything that is wrong."""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_mel.errors import DataFormatError, ImageError
from hf_mel.schema import NIL

#: What a file of rows may end in.
ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
#: Every name a column of a file of entities may have → the name that row has it under.
ENTITY_COLUMNS = {
    "id": "id",
    "entity_id": "id",
    "name": "name",
    "description": "description",
    "attributes": "attributes",
    "aliases": "aliases",
    "image": "image",
    "images": "image",
}
_LIST_SEPARATOR = "|"


def read_rows(path: str | os.PathLike[str], columns: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file in UTF-8, with or without byte-order mark, whatever its line ends.

    Args:
        path (`str` or `os.PathLike`): A file ending in one of [`ROW_SUFFIXES`]: one JSON object a line, one JSON list of
            objects, or a table with a header, separated by commas or tabs.
        columns (mapping of `str` to `str`): Every name a column may have → the key it gets in the rows.

    Yields:
        `tuple[int, dict]`: The line the row ends on (in a .json file its number), both from 1; and its cells, texts
        only where the file is a table.

    Raises:
        DataFormatError: Not such a file, not UTF-8, a row that cannot be parsed, an unknown column, one that stands
            twice, or a half of a surrogate pair.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise DataFormatError(
            f"is none of {', '.join(ROW_SUFFIXES)}.", file=path, remedy="Rows come as JSON or as a table."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataFormatError(f"cannot be read ({error.strerror}).", file=path, remedy="Check the path.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataFormatError(
            f"is not UTF-8 text ({error}).", file=path, row=line, remedy="Save it as UTF-8."
        ) from error
    yield from readers[path.suffix.lower()](path, text, columns)


def _jsonl_rows(path: Path, text: str, columns: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines: it also splits at characters that JSON allows inside a text (U+2028, form feed).
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            yield line, _object(path, line, _parse(path, line, content), columns)


def _json_rows(path: Path, text: str, columns: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    if not text.strip():
        return
    rows = _parse(path, None, text)
    if isinstance(rows, _Pairs) or not isinstance(rows, list):
        raise DataFormatError("is not a list.", file=path, remedy="Write [{…}, {…}], or one object a line as .jsonl.")
    for number, row in enumerate(rows, start=1):
        if isinstance(row, _Pairs) and "\\u" in text:
            _check_encodable(path, number, row)
        yield number, _object(path, number, row, columns)


class _Pairs(list):
    """The keys and values of a JSON object, which may hold a key twice."""


def _parse(path: Path, line: int | None, text: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_Pairs, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, NaN, a number of thousands of digits
        raise DataFormatError(f"is not JSON ({error}).", file=path, row=line) from error
    if line is not None and "\\u" in text:
        _check_encodable(path, line, value)
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _check_encodable(path: Path, line: int, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataFormatError(f"holds half of a surrogate pair ({error.reason}).", file=path, row=line) from error


def _object(path: Path, line: int, value: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(value, _Pairs):
        example = ", ".join(f'"{column}": …' for column in list(columns)[:2])
        raise DataFormatError("is not a JSON object.", file=path, row=line, remedy=f"Write {{{example}}}.")
    names = _keys(path, line, [key for key, _ in value], columns)
    return dict(zip(names, (_plain(item) for _, item in value), strict=True))


def _plain(value: Any) -> Any:
    """Objects inside a cell as a dict; no column takes one, but the error shows it."""
    return dict(value) if isinstance(value, _Pairs) else value


def _csv_rows(path: Path, text: str, columns: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
    limit = csv.field_size_limit(max(len(text), 1))  # the default refuses fields over 131,072 characters
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names: list[str] | None = None
        for record in reader:
            if not record:
                continue
            if names is None:
                names = _keys(path, reader.line_num, record, columns)
            elif len(record) != len(names):
                raise DataFormatError(
                    f"does not have {len(names)} fields as the header has.",
                    file=path,
                    row=reader.line_num,
                    remedy=f"Quote fields that hold {'tabs' if delimiter != ',' else 'commas'} or line ends.",
                )
            else:
                yield reader.line_num, dict(zip(names, record, strict=True))
    except csv.Error as error:
        raise DataFormatError(f"is not CSV ({error}).", file=path, row=reader.line_num) from error
    finally:
        csv.field_size_limit(limit)


def _keys(path: Path, line: int, names: list[str], columns: Mapping[str, str]) -> list[str]:
    keys: list[str] = []
    for name in names:
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=1)
            meant = f"Did you mean {near[0]!r}? " if near else ""
            raise DataFormatError(
                f"has a column {name!r}, which means nothing here.",
                file=path,
                row=line,
                remedy=f"{meant}Rename or remove it; columns are {', '.join(columns)}.",
            )
        if columns[name] in keys:
            raise DataFormatError(f"has the column {name!r} twice.", file=path, row=line)
        keys.append(columns[name])
    return keys


def text_cell(path: Path, line: int, row: Mapping[str, Any], column: str, required: bool = False) -> str:
    """A cell as text, "" if it is absent, null or empty.

    Raises:
        DataFormatError: It is no text, or required and blank.
    """
    value = row.get(column)
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise DataFormatError(f"{column!r} is {reprlib.repr(value)}, expected a text.", file=path, row=line)
    if required and not value.strip():
        raise DataFormatError(f"has no {column!r}.", file=path, row=line, remedy="Every row needs one.")
    return value


def id_cell(path: Path, line: int, row: Mapping[str, Any], column: str, required: bool = False) -> str:
    """As [`text_cell`], of a text or a whole number."""
    value = row.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_cell(path, line, row, column, required)


def texts_cell(path: Path, line: int, row: Mapping[str, Any], column: str) -> list[str]:
    """A cell of several texts: a JSON list, or one text separated by "|"; blank ones are left out."""
    value = row.get(column)
    items = [part.strip() for part in value.split(_LIST_SEPARATOR)] if isinstance(value, str) else value or []
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise DataFormatError(f"{column!r} is {reprlib.repr(value)}, expected texts.", file=path, row=line)
    return [item for item in items if item]


def image_file(path: Path, line: int, name: str, folder: Path | None = None) -> Path:
    """The image that a cell names: a path below `folder`, by default the folder of the file of rows.

    Raises:
        ImageError: There is no such file.
    """
    image = (folder or path.parent) / name
    try:
        there = image.is_file()
    except (OSError, ValueError):  # a name no file can have
        there = False
    if not there:
        where = "the file's folder" if folder is None else f"{folder}"
        raise ImageError(f"there is no image {image}.", file=path, row=line, remedy=f"Image paths start at {where}.")
    return image


def entity_row(path: Path, line: int, row: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """A row of a file of entities ([`read_rows`] with [`ENTITY_COLUMNS`]) in the schema's columns.

    Returns:
        `dict` as [`~hf_mel.schema.entity_features`], but `images` are paths (`list[Path]`).

    Raises:
        DataFormatError: A value is missing or of the wrong type, or the id is [`~hf_mel.schema.NIL`].
        ImageError: An image is not there.
    """
    entity_id, name = (cell(path, line, row, key, True) for cell, key in ((id_cell, "id"), (text_cell, "name")))
    if entity_id == NIL:
        raise DataFormatError(f"the id {NIL!r} stands for no entity.", file=path, row=line, remedy="Choose another.")
    return {
        "entity_id": entity_id,
        "name": name,
        "description": text_cell(path, line, row, "description"),
        "attributes": text_cell(path, line, row, "attributes"),
        "aliases": texts_cell(path, line, row, "aliases"),
        "images": [image_file(path, line, image, folder) for image in texts_cell(path, line, row, "image")],
    }
