"""Strict reader of rows in JSONL, JSON, CSV and TSV files, with the line of every problem.

[`read_rows`] reads the rows of a file. `text_cell`, `id_cell`, `int_cell` and `texts_cell` check and convert single cells,
and [`entity_row`] converts a whole row of a file of entities.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import reprlib
import shlex
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from hf_mel.errors import DataFormatError, ImageError, MelError, first_lines
from hf_mel.row_columns import ColumnMapping, ColumnPlan, repeated_column
from hf_mel.schema import NIL

logger = logging.getLogger(__name__)

#: Suffixes of the files that [`read_rows`] reads.
ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".ndjson")
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
_DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}
#: Number of bad rows that one message lists.
MAX_LISTED = 20
#: Takes the error of a row: raises it, or notes it so that reading goes on.
_BadRow: TypeAlias = Callable[[DataFormatError], None]


def read_rows(
    path: str | os.PathLike[str],
    columns: Mapping[str, str] | None = None,
    *,
    mapping: ColumnMapping | None = None,
    required: Collection[str] = (),
    keep_others: bool = False,
    bad_rows: list[DataFormatError] | list[MelError] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads the rows of a UTF-8 file, with or without byte-order mark and with any line ends.

    The suffix decides the format: one JSON object a line (.jsonl, .ndjson), one JSON list of objects (.json), or a table
    with a header. The fields of a table are separated by commas (.csv) or tabs (.tsv). If the header has one field
    only, semicolons, commas or tabs in it separate the fields, and a first line such as `sep=;` names the separator. Rows
    without any value, and empty columns without a name, are left out.

    Args:
        path (`str` or `os.PathLike`): A file with one of the [`ROW_SUFFIXES`], in upper or lower case.
        columns (mapping of `str` to `str`, *optional*): Every accepted column name → its key in the rows. Names may
            differ in case. Other columns are errors. Default: all columns are accepted and keep their names.
        mapping ([`~hf_mel.row_columns.ColumnMapping`], *optional*): Columns that have other names in the file, and whether
            unknown columns are left out.
        required (collection of `str`): Keys that the header of a table must have.
        keep_others (`bool`): Whether unknown columns keep their names.
        bad_rows (`list[DataFormatError]`, *optional*): Receives the error of each row that cannot be parsed, and reading
            goes on with the next row. Default: the first of these errors is raised. Errors of the whole file, such as
            a header with an unknown column, are always raised.

    Yields:
        `tuple[int, dict]`: The line on which the row ends (in a .json file the number of the row), counted from 1, and
        the cells of the row. Cells of a table are strings.

    Raises:
        DataFormatError: The file has another suffix, cannot be read or is not UTF-8; a column is unknown or missing; a
            row cannot be parsed, has a column twice, or half of a surrogate pair.
    """
    path = Path(path)
    readers = {
        ".jsonl": _jsonl_rows,
        ".ndjson": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _table_rows,
        ".tsv": _table_rows,
    }
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise DataFormatError(
            f"The suffix {path.suffix!r} is not one of {', '.join(ROW_SUFFIXES)}.",
            file=path,
            remedy="Convert the file to one of these formats. Save a spreadsheet as CSV in UTF-8.",
        )
    text = read_utf8(path)
    header = _Header(path, columns, mapping or ColumnMapping(), required, keep_others)
    yield from readers[suffix](path, text, header, _raise if bad_rows is None else bad_rows.append)


def column_names(path: str | os.PathLike[str], columns: Mapping[str, str], mapping: ColumnMapping) -> list[str]:
    """Returns the columns of a file, those of the header of a table or of all objects of a JSON file.

    Args:
        path, columns: As in [`read_rows`].
        mapping ([`~hf_mel.row_columns.ColumnMapping`]): A mapping of several files, which notes that this one has them.

    Raises:
        DataFormatError: As in [`read_rows`], except for errors of rows.
    """
    own, bad_rows = ColumnMapping(mapping.sources), list[MelError]()
    for _ in read_rows(path, columns, mapping=own, keep_others=True, bad_rows=bad_rows):
        if Path(path).suffix.lower() in (".csv", ".tsv"):
            break
    mapping.columns_seen.update(own.columns_seen)
    return list(own.columns_seen)


def bad_rows_error(errors: Sequence[MelError]) -> MelError:
    """Returns one error that lists several, of their class if they have the same. A single one is returned itself."""
    if len(errors) == 1:
        return errors[0]
    classes, files = {type(error) for error in errors}, {error.file for error in errors}
    file = files.pop() if len(files) == 1 else None
    lines = first_lines([str(error if file is None else error.changed(file=None)) for error in errors], MAX_LISTED)
    kind = classes.pop() if len(classes) == 1 else DataFormatError
    return kind(f"{len(errors):,} rows cannot be used:" + "".join(f"\n  {line}" for line in lines), file=file)


def _raise(error: DataFormatError) -> None:
    raise error


def read_utf8(path: Path) -> str:
    """Returns the text of a file in UTF-8.

    Raises:
        DataFormatError: The file cannot be read, or has another encoding; names the one that fits.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataFormatError(
            f"The file cannot be read ({error.strerror}).", file=path, remedy="Check the path."
        ) from error
    marks = {
        b"\xff\xfe\x00\x00": "UTF-32",
        b"\x00\x00\xfe\xff": "UTF-32",
        b"\xff\xfe": "UTF-16",
        b"\xfe\xff": "UTF-16",
    }
    encoding = next((name for mark, name in marks.items() if data.startswith(mark)), None)
    if (
        encoding is None and len(data) > 3 and 0 in data[:4]
    ):  # text without a mark, of which each ASCII letter has a zero
        encoding = "UTF-16LE" if data[1] == 0 else "UTF-16BE"
    if encoding is not None:
        raise DataFormatError(
            f"The file is {encoding} text, not UTF-8.", file=path, row=1, remedy=_conversion(path, encoding)
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message, remedy = f"The file is not UTF-8 text ({error}).", "Save it as UTF-8."
        start = data.rfind(b"\n", 0, error.start) + 1
        try:
            data.decode("cp1252")
            text = data[max(start, error.start - 30) : error.start + 30].decode("cp1252").splitlines()[0].strip()
        except (UnicodeDecodeError, IndexError):
            text = ""
        # If there are characters of UTF-8 before, the file is UTF-8 with damaged bytes.
        if text and data[: error.start].isascii():
            message = f"The file is not UTF-8 text. Read as Windows-1252, this line has {text!r}."
            remedy = f"If that is right: {_conversion(path, 'WINDOWS-1252')}"
        raise DataFormatError(message, file=path, row=line, remedy=remedy) from error


def _conversion(path: Path, encoding: str) -> str:
    target = path.with_name(f"{path.stem}-utf8{path.suffix}")
    command = shlex.join(["iconv", "-f", encoding, "-t", "UTF-8", str(path)])
    return f'Save it as UTF-8 (in Excel: "CSV UTF-8"), or run: {command} > {shlex.quote(str(target))}'


@dataclass
class _Header:
    """The arguments of [`read_rows`] that decide what becomes of the columns, and the plans made so far by their names."""

    path: Path
    columns: Mapping[str, str] | None
    mapping: ColumnMapping
    required: Collection[str]
    keep_others: bool
    plans: dict[tuple[str, ...], ColumnPlan] = field(default_factory=dict)

    def plan(self, names: Sequence[str], row: int) -> ColumnPlan:
        """Returns what becomes of columns of these names; says once which are left out."""
        key = tuple(names)
        if key not in self.plans:
            arguments = (names, self.columns, self.mapping, self.keep_others)
            plan = ColumnPlan(*arguments, file=self.path, row=row)
            before = {name for other in self.plans.values() for name in other.ignored}
            if ignored := [name for name in plan.ignored if name not in before]:
                logger.info("%s: these columns are left out: %s.", self.path, ", ".join(ignored))
            self.plans[key] = plan
        return self.plans[key]

    def num_known(self, names: Sequence[str]) -> int:
        """Returns how many of some names are those of columns."""
        accepted = {*(self.columns or ()), *(name for names in self.mapping.sources.values() for name in names)}
        folded = {name.casefold() for name in accepted}
        return sum(name.strip().casefold() in folded for name in names)


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


def _jsonl_rows(path: Path, text: str, header: _Header, bad_row: _BadRow) -> Iterator[tuple[int, dict[str, Any]]]:
    values = _jsonl_values(path, text, bad_row)
    yield from _object_rows(path, values, header, bad_row)


def _jsonl_values(path: Path, text: str, bad_row: _BadRow) -> Iterator[tuple[int, Any]]:
    if text.lstrip().startswith("["):
        raise DataFormatError(
            "The file is a JSON list, not one object a line.", file=path, row=1, remedy="Name such a file .json."
        )
    # Not splitlines, which also splits at characters that JSON allows inside a string (U+2028, form feed).
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            value = parse_json(content, file=path, row=line)
            if "\\u" in content:
                _check_encodable(path, line, value)
        except DataFormatError as error:
            bad_row(error)
            continue
        yield line, value


def _json_rows(path: Path, text: str, header: _Header, bad_row: _BadRow) -> Iterator[tuple[int, dict[str, Any]]]:
    if not text.strip():
        return
    try:
        rows = parse_json(text, file=path)
    except DataFormatError as error:
        if text.lstrip().startswith("{") and "Extra data" in error.message:
            error = DataFormatError(error.message, file=path, remedy="Name a file with one object a line .jsonl.")
        raise error from error.__cause__
    if isinstance(rows, dict) and {"head", "results"} <= rows.keys():
        raise DataFormatError(
            "The file has the form of SPARQL results.", file=path, remedy="Download the results as CSV."
        )
    if not isinstance(rows, list):
        raise DataFormatError(
            "The file is not a list of rows.", file=path, remedy="Write [{…}, {…}], or one object a line as .jsonl."
        )
    yield from _object_rows(path, _json_values(path, text, rows, bad_row), header, bad_row)


def _json_values(path: Path, text: str, rows: list[Any], bad_row: _BadRow) -> Iterator[tuple[int, Any]]:
    for number, value in enumerate(rows, start=1):
        if "\\u" in text:
            try:
                _check_encodable(path, number, value)
            except DataFormatError as error:
                bad_row(error)
                continue
        yield number, value


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


def _object_rows(
    path: Path, values: Iterable[tuple[int, Any]], header: _Header, bad_row: _BadRow
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of JSON objects. An unknown column is an error of the whole file, which names those of all rows."""
    values = iter(values)
    for line, value in values:
        try:
            plan = header.plan(_column_names(path, line, value, header), line)
            row = plan.row(list(value.values()), line)
        except DataFormatError as error:
            bad_row(error)
            continue
        if plan.unknown:
            raise plan.unknown_error(name for _, other in values if isinstance(other, dict) for name in other)
        yield line, row


def _column_names(path: Path, line: int, value: Any, header: _Header) -> list[str]:
    if not isinstance(value, _JsonObject):
        columns = list(header.columns or ())[:2] or ["text"]
        example = ", ".join(f'"{column}": …' for column in columns)
        raise DataFormatError("The row is not a JSON object.", file=path, row=line, remedy=f"Write {{{example}}}.")
    if value.repeated_key is not None:
        raise repeated_column(value.repeated_key, path, line)
    return list(value)


def _table_rows(path: Path, text: str, header: _Header, bad_row: _BadRow) -> Iterator[tuple[int, dict[str, Any]]]:
    limit = csv.field_size_limit(max(len(text), 1))  # the default refuses fields over 131,072 characters
    try:
        delimiter, first_line, text = _delimiter(path, text, header)
        records = _records(path, text, delimiter, first_line)
        plan = None
        for line, record in records:
            if isinstance(record, DataFormatError):
                if plan is None:
                    raise record
                bad_row(record)
            elif not any(cell.strip() for cell in record):
                continue
            elif plan is None:
                plan = header.plan(record, line)
                plan.check(header.required)
            else:
                try:
                    row = plan.row(_fit(path, line, record, len(plan.names), delimiter), line)
                except DataFormatError as error:
                    bad_row(error)
                    continue
                yield line, row
    finally:
        csv.field_size_limit(limit)


def _delimiter(path: Path, text: str, header: _Header) -> tuple[str, int, str]:
    """Returns the separator of a table, the number of its first line, and the text from there.

    The separator is that of the suffix, unless a first line `sep=;` names another one, or another one gives more known
    columns or, of a header that is one field, more fields.
    """
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    if named := re.match(r'"?sep=(.)"?\r?(?:\n|$)', text, re.IGNORECASE):
        return named[1], 2, text[named.end() :]

    def quality(delimiter: str) -> tuple[int, int]:
        names = next((record for _, record in _csv_records(path, text, delimiter, 1) if record), [])
        if isinstance(names, DataFormatError):
            return -1, 0
        return header.num_known(names), len(names)

    qualities = {delimiter: quality(delimiter) for delimiter in (usual, ";", "\t", ",")}
    known, num_fields = qualities[usual]
    if num_fields > 1 and header.columns is None:
        return usual, 1, text
    best = max(qualities, key=lambda delimiter: qualities[delimiter])
    if num_fields > 1 and qualities[best][0] <= known:
        best = usual
    if best != usual:
        logger.info("%s: fields are separated by %s.", path, _DELIMITER_NAMES.get(best, repr(best)))
    return best, 1, text


def _records(
    path: Path, text: str, delimiter: str, first_line: int
) -> Iterator[tuple[int, list[str] | DataFormatError]]:
    """Yields the last line and the cells of every row of a table, or its error.

    Fields with the separator, a line end or quotation marks are quoted as in CSV. Many TSV files have no quoting: if
    every line of a file has all fields and a field is not quoted as in CSV, quotation marks are text.
    """
    if delimiter == "\t" and '"' in text:
        lines = [line.split("\t") for line in io.StringIO(text, newline=None).read().split("\n")]
        widths = {len(line) for line in lines if any(line)}
        quoted = [cell for line in lines for cell in line if cell.startswith('"')]
        if len(widths) == 1 and not all(map(_is_quoted, quoted)) and not any('""' in cell for cell in quoted):
            yield from enumerate(lines, start=first_line)
            return
    yield from _csv_records(path, text, delimiter, first_line)


def _is_quoted(cell: str) -> bool:
    return re.fullmatch(r'"(?:[^"]|"")*"', cell) is not None


def _csv_records(
    path: Path, text: str, delimiter: str, first_line: int
) -> Iterator[tuple[int, list[str] | DataFormatError]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = first_line + reader.line_num
        try:
            record: list[str] | DataFormatError = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            end = first_line + reader.line_num - 1
            begin = "" if line == end else f" It begins on line {line}."
            record = DataFormatError(
                f"The row is not {path.suffix[1:].upper()} ({error}).{begin}",
                file=path,
                row=end,
                remedy='Check the quotation marks: a field that has some is written as """Gold Coast"" of old".',
            )
        yield first_line + reader.line_num - 1, record


def _fit(path: Path, line: int, record: list[str], width: int, delimiter: str) -> list[str]:
    """Returns the fields of a row without empty ones beyond the header."""
    if len(record) < width or any(cell.strip() for cell in record[width:]):
        raise DataFormatError(
            f"The row has {len(record)} field{'' if len(record) == 1 else 's'}, not the {width} of the header.",
            file=path,
            row=line,
            remedy=f"Quote fields that contain {_DELIMITER_NAMES.get(delimiter, repr(delimiter))} or line ends.",
        )
    return record[:width]


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
    """Returns a cell as an id ([`clean_id`]), as [`text_cell`] does; whole numbers are accepted and converted."""
    value = row.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return clean_id(text_cell(path, line, row, column, required))


def clean_id(text: str) -> str:
    """Returns an id without outer white space, in the Unicode form NFC, and of an address of Wikidata only its end.

    So ids that look the same are the same, and `http://www.wikidata.org/entity/Q42` is `Q42`.
    """
    text = unicodedata.normalize("NFC", text.strip())
    return re.sub(r"^https?://www\.wikidata\.org/(entity|wiki)/(?=Q[0-9]+$)", "", text)


def ids_cell(path: Path, line: int, row: Mapping[str, Any], column: str) -> list[str]:
    """Returns a cell as a list of ids ([`clean_id`]), as [`texts_cell`] does."""
    return list(map(clean_id, texts_cell(path, line, row, column)))


def other_unicode_form(text: str, mention: str) -> str | None:
    """Returns a sentence about a mention that is in its text, but in another Unicode form; `None` for any other one."""
    if mention in text or unicodedata.normalize("NFC", mention) not in unicodedata.normalize("NFC", text):
        return None
    forms = f"the mention {_unicode_form(mention)}, the text {_unicode_form(text)}"
    return f"They are in different Unicode forms ({forms}): convert both to NFC."


def _unicode_form(text: str) -> str:
    return next((form for form in ("NFC", "NFD") if unicodedata.is_normalized(form, text)), "a mixed form")


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
    items = value.split(_LIST_SEPARATOR) if isinstance(value, str) else value or []
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise DataFormatError(
            f"The cell {column!r} is {reprlib.repr(value)}.",
            file=path,
            row=line,
            remedy=f"Write a list of strings, or one string with parts separated by {_LIST_SEPARATOR!r}.",
        )
    return [item.strip() for item in items if item.strip()]


def image_file(path: Path, line: int, name: str, folder: Path | None = None) -> Path:
    """Returns the path of the image file that a cell names.

    Args:
        path (`Path`), line (`int`): The file of rows and the line, for error messages.
        name (`str`): The path in the cell.
        folder (`Path`, *optional*): The folder to which it is relative. Default: that of the file of rows.

    Raises:
        ImageError: The file does not exist.
    """
    if re.match("https?://", name, re.IGNORECASE):
        raise ImageError(
            f"The image {name!r} is an address, not a file.",
            file=path,
            row=line,
            remedy="Download it and give its path, or leave the column out (--column image=).",
        )
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


def entity_row(
    path: Path, line: int, row: Mapping[str, Any], folder: Path | None = None, *, inverted_names: bool = False
) -> dict[str, Any]:
    """Converts a row of a file of entities to the columns of the schema.

    Args:
        path (`Path`), line (`int`): The file of rows and the line, for error messages.
        row (mapping): A row that [`read_rows`] returned for [`ENTITY_COLUMNS`].
        folder (`Path`, *optional*): The folder to which image paths are relative. Default: that of the file.
        inverted_names (`bool`): Whether "Forename Surname" is an alias of an entity named "Surname, Forename".

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
    aliases = texts_cell(path, line, row, "aliases")
    if inverted_names and (upright := _upright_name(name)) and upright not in aliases:
        aliases.insert(0, upright)
    return {
        "entity_id": entity_id,
        "name": name,
        "description": text_cell(path, line, row, "description"),
        "attributes": text_cell(path, line, row, "attributes"),
        "aliases": aliases,
        "images": [image_file(path, line, image, folder) for image in texts_cell(path, line, row, "image")],
    }


def _upright_name(name: str) -> str | None:
    """Returns "Forename Surname" of "Surname, Forename", and "Forename Surname, Senior" of "Surname, Forename, Senior"."""
    surname, *others = (part.strip() for part in name.split(","))
    if not others or not surname or not others[0] or "(" in name:
        return None
    return ", ".join([f"{others[0]} {surname}", *others[1:]])
