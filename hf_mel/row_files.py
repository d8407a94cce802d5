"""Strict reader of rows in JSONL, JSON, CSV and TSV files, with the line of every problem.

[`read_rows`] reads the rows of a file. `text_cell`, `id_cell`, `int_cell` and `texts_cell` check and convert single cells,
and [`entity_row`] converts a whole row of a file of entities.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from hf_mel.errors import DataFormatError, ImageError
from hf_mel.schema import NIL

#: Suffixes of the files that [`read_rows`] reads.
ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
#: Every accepted column name of a file of entities → the key of the column in its rows.
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
#: Takes the error of a row: raises it, or notes it so that reading goes on.
_BadRow: TypeAlias = Callable[[DataFormatError], None]


def read_rows(
    path: str | os.PathLike[str],
    columns: Mapping[str, str] | None = None,
    *,
    bad_rows: list[DataFormatError] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads the rows of a UTF-8 file, with or without byte-order mark and with any line ends.

    The suffix decides the format: one JSON object a line (.jsonl), one JSON list of objects (.json), or a table with a
    header, separated by commas (.csv) or tabs (.tsv).

    Args:
        path (`str` or `os.PathLike`): A file with one of the [`ROW_SUFFIXES`], in upper or lower case.
        columns (mapping of `str` to `str`, *optional*): Every accepted column name → its key in the rows. Other columns
            are errors. Default: all columns are accepted and keep their names.
        bad_rows (`list[DataFormatError]`, *optional*): Receives the error of each row that cannot be parsed, and reading
            goes on with the next row. Default: the first of these errors is raised. Errors of the whole file, such as
            a header with an unknown column, are always raised.

    Yields:
        `tuple[int, dict]`: The line on which the row ends (in a .json file the number of the row), counted from 1, and
        the cells of the row. Cells of a table are strings.

    Raises:
        DataFormatError: The file has another suffix, cannot be read or is not UTF-8; a row cannot be parsed, has an
            unknown column, a column twice, or half of a surrogate pair.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _table_rows, ".tsv": _table_rows}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise DataFormatError(
            f"The suffix {path.suffix!r} is not one of {', '.join(ROW_SUFFIXES)}.",
            file=path,
            remedy="Convert the file to one of these formats.",
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataFormatError(
            f"The file cannot be read ({error.strerror}).", file=path, remedy="Check the path."
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataFormatError(
            f"The file is not UTF-8 text ({error}).", file=path, row=line, remedy="Save it as UTF-8."
        ) from error
    bad_row = _raise if bad_rows is None else bad_rows.append
    yield from readers[suffix](path, text, columns, bad_row)


def _raise(error: DataFormatError) -> None:
    raise error


def parse_json(text: str, *, file: str | os.PathLike[str], row: int | str | None = None) -> Any:
    """Parses one JSON value strictly.

    Args:
        text (`str`): The JSON text of a file or of one of its lines.
        file (`str` or `os.PathLike`), row (`int` or `str`, *optional*): The source, for error messages.

    Raises:
        DataFormatError: The text is not JSON (which has no NaN), or nests too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_JsonObject, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError includes numbers of thousands of digits
        subject = "file" if row is None else "line"
        raise DataFormatError(
            f"The {subject} is not JSON ({error}).", file=file, row=row, remedy="Correct it, or save it again as JSON."
        ) from error


class _JsonObject(dict):
    """JSON object that remembers a key which occurs twice."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        keys = [key for key, _ in pairs]
        self.repeated_key = next((key for key in keys if keys.count(key) > 1), None) if len(self) < len(keys) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _jsonl_rows(
    path: Path, text: str, columns: Mapping[str, str] | None, bad_row: _BadRow
) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines, which also splits at characters that JSON allows inside a string (U+2028, form feed).
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            value = parse_json(content, file=path, row=line)
            if "\\u" in content:
                _check_encodable(path, line, value)
            row = _rename_keys(path, line, value, columns)
        except DataFormatError as error:
            bad_row(error)
            continue
        yield line, row


def _json_rows(
    path: Path, text: str, columns: Mapping[str, str] | None, bad_row: _BadRow
) -> Iterator[tuple[int, dict[str, Any]]]:
    if not text.strip():
        return
    rows = parse_json(text, file=path)
    if not isinstance(rows, list):
        raise DataFormatError(
            "The file is not a list of rows.", file=path, remedy="Write [{…}, {…}], or one object a line as .jsonl."
        )
    for number, value in enumerate(rows, start=1):
        try:
            if "\\u" in text:
                _check_encodable(path, number, value)
            row = _rename_keys(path, number, value, columns)
        except DataFormatError as error:
            bad_row(error)
            continue
        yield number, row


def _check_encodable(path: Path, line: int, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataFormatError(
            f"The row has half of a surrogate pair ({error.reason}).",
            file=path,
            row=line,
            remedy="Write the whole character, or remove it.",
        ) from error


def _rename_keys(path: Path, line: int, value: Any, columns: Mapping[str, str] | None) -> dict[str, Any]:
    if not isinstance(value, _JsonObject):
        example = ", ".join(f'"{column}": …' for column in list(columns)[:2]) if columns else '"text": …'
        raise DataFormatError("The row is not a JSON object.", file=path, row=line, remedy=f"Write {{{example}}}.")
    if value.repeated_key is not None:
        raise _repeated_column(path, line, value.repeated_key)
    return dict(zip(_column_keys(path, line, list(value), columns), value.values(), strict=True))


def _table_rows(
    path: Path, text: str, columns: Mapping[str, str] | None, bad_row: _BadRow
) -> Iterator[tuple[int, dict[str, Any]]]:
    limit = csv.field_size_limit(max(len(text), 1))  # the default refuses fields over 131,072 characters
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    keys: list[str] | None = None
    try:
        while True:
            first_line = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                error_of_row = _unquoted_error(path, first_line, reader.line_num, error)
                if keys is None:
                    raise error_of_row from error
                bad_row(error_of_row)
                continue
            if not record:
                continue
            if keys is None:
                keys = _column_keys(path, reader.line_num, record, columns)
            elif len(record) == len(keys):
                yield reader.line_num, dict(zip(keys, record, strict=True))
            else:
                bad_row(
                    DataFormatError(
                        f"The row has {len(record)} fields, not the {len(keys)} fields of the header.",
                        file=path,
                        row=reader.line_num,
                        remedy=f"Quote fields that contain {'tabs' if delimiter != ',' else 'commas'} or line ends.",
                    )
                )
    finally:
        csv.field_size_limit(limit)


def _unquoted_error(path: Path, first_line: int, line: int, error: csv.Error) -> DataFormatError:
    """Returns the error of a row with misplaced quotation marks, which was read from `first_line` to `line`."""
    begin = "" if first_line == line else f" It begins on line {first_line}."
    return DataFormatError(
        f"The row is not {path.suffix[1:].upper()} ({error}).{begin}",
        file=path,
        row=line,
        remedy="Check the quotation marks.",
    )


def _column_keys(path: Path, line: int, names: list[str], columns: Mapping[str, str] | None) -> list[str]:
    keys: list[str] = []
    for name in names:
        if columns is not None and name not in columns:
            similar = difflib.get_close_matches(name, columns, n=1)
            suggestion = f"Did you mean {similar[0]!r}? " if similar else ""
            raise DataFormatError(
                f"The column {name!r} is unknown.",
                file=path,
                row=line,
                remedy=f"{suggestion}Rename or remove it; columns are {', '.join(columns)}.",
            )
        key = name if columns is None else columns[name]
        if key in keys:
            raise _repeated_column(path, line, name)
        keys.append(key)
    return keys


def _repeated_column(path: Path, line: int, name: str) -> DataFormatError:
    return DataFormatError(
        f"The row has the column {name!r} twice.", file=path, row=line, remedy="Keep one of the two."
    )


def text_cell(path: Path, line: int, row: Mapping[str, Any], column: str, required: bool = False) -> str:
    """Returns a cell as a string, "" if it is absent, null or empty.

    Raises:
        DataFormatError: The cell is not a string, or it is required and blank.
    """
    value = row.get(column)
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise DataFormatError(
            f"The cell {column!r} is {reprlib.repr(value)}.", file=path, row=line, remedy="Write a string."
        )
    if required and not value.strip():
        raise DataFormatError(
            f"The row has no {column!r}.", file=path, row=line, remedy=f"Give a {column!r} in every row."
        )
    return value


def id_cell(path: Path, line: int, row: Mapping[str, Any], column: str, required: bool = False) -> str:
    """Returns a cell as a string, as [`text_cell`] does; whole numbers are accepted and converted."""
    value = row.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_cell(path, line, row, column, required)


def int_cell(path: Path, line: int, row: Mapping[str, Any], column: str) -> int | None:
    """Returns a cell as an integer of at most nine digits, or `None` if it is absent, null or blank.

    Raises:
        DataFormatError: The cell is not a whole number.
    """
    value = row.get(column)
    text = value.strip() if isinstance(value, str) else "" if value is None else repr(value)
    if not text:
        return None
    if not re.fullmatch("-?[0-9]{1,9}", text, re.ASCII):
        raise DataFormatError(
            f"The cell {column!r} is {reprlib.repr(value)}.", file=path, row=line, remedy="Write a whole number."
        )
    return int(text)


def texts_cell(path: Path, line: int, row: Mapping[str, Any], column: str) -> list[str]:
    """Returns a cell as a list of strings, without empty ones.

    The cell is a JSON list, or one string whose parts are separated by "|".

    Raises:
        DataFormatError: The cell is neither.
    """
    value = row.get(column)
    items = [part.strip() for part in value.split(_LIST_SEPARATOR)] if isinstance(value, str) else value or []
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise DataFormatError(
            f"The cell {column!r} is {reprlib.repr(value)}.",
            file=path,
            row=line,
            remedy=f"Write a list of strings, or one string with parts separated by {_LIST_SEPARATOR!r}.",
        )
    return [item for item in items if item]


def image_file(path: Path, line: int, name: str, folder: Path | None = None) -> Path:
    """Returns the path of the image file that a cell names.

    Args:
        path (`Path`), line (`int`): The file of rows and the line, for error messages.
        name (`str`): The path in the cell.
        folder (`Path`, *optional*): The folder to which it is relative. Default: that of the file of rows.

    Raises:
        ImageError: The file does not exist.
    """
    image = (folder or path.parent) / name
    try:
        exists = image.is_file()
    except (OSError, ValueError):  # names that no file can have: too long, or with a null character
        exists = False
    if not exists:
        base = "the folder of this file" if folder is None else f"{folder}"
        raise ImageError(
            f"The image file {name[:200]} does not exist.",
            file=path,
            row=line,
            remedy=f"Give a path relative to {base}.",
        )
    return image


def entity_row(path: Path, line: int, row: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Converts a row of a file of entities to the columns of the schema.

    Args:
        path (`Path`), line (`int`): The file of rows and the line, for error messages.
        row (mapping): A row that [`read_rows`] returned for [`ENTITY_COLUMNS`].
        folder (`Path`, *optional*): The folder to which image paths are relative. Default: that of the file.

    Returns:
        `dict` with the keys of [`~hf_mel.schema.entity_features`]; `images` is a list of paths.

    Raises:
        DataFormatError: A cell is missing or has the wrong type, or the id is [`~hf_mel.schema.NIL`].
        ImageError: An image file does not exist.
    """
    entity_id, name = id_cell(path, line, row, "id", True), text_cell(path, line, row, "name", True)
    if entity_id == NIL:
        raise DataFormatError(
            f"The id {NIL!r} is reserved for mentions without an entity.",
            file=path,
            row=line,
            remedy="Choose another id.",
        )
    return {
        "entity_id": entity_id,
        "name": name,
        "description": text_cell(path, line, row, "description"),
        "attributes": text_cell(path, line, row, "attributes"),
        "aliases": texts_cell(path, line, row, "aliases"),
        "images": [image_file(path, line, image, folder) for image in texts_cell(path, line, row, "image")],
    }
