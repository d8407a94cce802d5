"""Reads Wikidata as Parquet tables of labels, aliases, descriptions, links and claims, as entity documents.

The tables are those of the Hub that https://github.com/lmmx/wikidata-pq makes of a dump (`permutans/wikidata-labels` and
so on): one row for a label, an alias, a description, a link or a statement, sorted by `id` in the order of strings over all
files of a folder. So they are read side by side, once, and memory holds a batch of each and one entity.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_mel.dataset_scripts.wikidata.documents import (
    Selection,
    needed_properties,
    reference_of,
    to_json,
    wanted_languages,
)
from hf_mel.errors import DataFormatError

#: Tables, and the columns that are read of each.
TABLES = {
    "labels": ("id", "language", "value"),
    "descriptions": ("id", "language", "value"),
    "aliases": ("id", "language", "value"),
    "links": ("id", "site"),
    "claims": ("id", "property", "datavalue", "rank"),
}
_NEEDED = ("labels", "claims")
_BATCH_ROWS = 1 << 14


def has_tables(source: Path) -> bool:
    """Returns whether a folder holds folders of tables, such as `labels` or `wikidata-labels`."""
    return source.is_dir() and bool(_table_folders(source))


def table_documents(source: Path, selection: Selection, sha256: dict[str, str]) -> Iterator[bytes]:
    """Yields the entities of the tables as JSON, with what the selection reads of them, in the order of the tables.

    Args:
        source (`Path`): A folder with a folder for each of [`TABLES`]. Only labels and claims must be there.
        selection ([`~hf_mel.dataset_scripts.wikidata.documents.Selection`]): What is read.
        sha256 (`dict`): Receives the digest of each file, by its path.

    Raises:
        DataFormatError: A table lacks, cannot be read or is not sorted.
    """
    folders = _table_folders(source)
    needed = (*_NEEDED, "links") if selection.min_sitelinks else _NEEDED
    for table in needed:
        if table not in folders:
            reason = ", which min_sitelinks counts" if table == "links" else ""
            raise DataFormatError(
                f"The folder has no table of {table}{reason}.",
                file=source,
                remedy=f"Download permutans/wikidata-{table} of the Hub into its folder {table}.",
            )
    streams = []
    for number, (table, folder) in enumerate(folders.items()):
        for files in _sorted_files(folder, table, selection):
            for path in files:
                sha256[path.relative_to(source).as_posix()] = _sha256(path)
            streams.append(_rows(files, table, number, selection))
    for entity_id, rows in groupby(heapq.merge(*streams, key=lambda row: row[:2]), key=lambda row: row[0]):
        yield to_json(_document(entity_id, rows))


def _table_folders(source: Path) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for table in TABLES:
        for folder in (source / table, source / f"wikidata-{table}"):
            if folder.is_dir() and next(folder.rglob("*.parquet"), None) is not None:
                folders.setdefault(table, folder)
    return folders


def _sorted_files(folder: Path, table: str, selection: Selection) -> Iterator[list[Path]]:
    """Yields the files of each folder of a table whose rows are wanted, in the order of their numbers.

    Labels, aliases and descriptions have a folder for each language, or one for all.
    """
    by_folder: dict[Path, list[Path]] = {}
    for path in folder.rglob("*.parquet"):
        by_folder.setdefault(path.parent, []).append(path)
    languages = wanted_languages(selection)
    has_languages = "language" in TABLES[table] and len(by_folder) > 1
    for parent in sorted(by_folder):
        if not has_languages or parent.name in languages:
            yield sorted(by_folder[parent], key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Returns a key that puts part-2 before part-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _rows(
    files: list[Path], table: str, number: int, selection: Selection
) -> Iterator[tuple[str, int, str, dict[str, Any]]]:
    """Yields (id, number of the table, its name, row) of the wanted rows of sorted files.

    Raises:
        DataFormatError: A file cannot be read, lacks a column, or is not sorted.
    """
    last = ""
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                missing = [column for column in TABLES[table] if column not in file.schema_arrow.names]
                if missing:
                    raise DataFormatError(
                        f"The table of {table} lacks the columns {missing}; it has {file.schema_arrow.names}.",
                        file=path,
                        remedy="Take the tables that wikidata-pq makes.",
                    )
                for batch in file.iter_batches(_BATCH_ROWS, columns=list(TABLES[table])):
                    for row in _wanted(batch, table, selection).to_pylist():
                        entity_id = row["id"]
                        if not isinstance(entity_id, str) or entity_id < last:
                            raise DataFormatError(
                                f"The table is not sorted by id: {entity_id!r} comes after {last!r}.",
                                file=path,
                                remedy="Sort it by id, in the order of strings, over all its files.",
                            )
                        last = entity_id
                        yield entity_id, number, table, row
        except (OSError, pa.ArrowException) as error:
            raise DataFormatError(
                f"The table cannot be read ({' '.join(str(error).split())[:200]}).",
                file=path,
                remedy="Download it again, and compare its size and its sum.",
            ) from error


def _wanted(batch: pa.RecordBatch, table: str, selection: Selection) -> pa.RecordBatch:
    """Returns the rows in wanted languages, or with properties that are read."""
    if table == "claims":
        column, values = "property", needed_properties(selection)
    elif "language" in TABLES[table]:
        column, values = "language", wanted_languages(selection)
    else:
        return batch
    return batch.filter(pc.is_in(batch.column(column), value_set=pa.array(sorted(values))))


def _document(entity_id: str, rows: Iterator[tuple[str, int, str, dict[str, Any]]]) -> dict[str, Any]:
    """Returns the document of an entity, as a dump has it, with what was read of it."""
    document: dict[str, Any] = {
        "type": "property" if (reference_of(entity_id) or 0) < 0 else "item",
        "id": entity_id,
        "labels": {},
        "descriptions": {},
        "aliases": {},
        "claims": {},
        "sitelinks": {},
    }
    for _, _, table, row in rows:
        if table == "claims":
            document["claims"].setdefault(row["property"], []).append(_statement(row))
        elif table == "links":
            document["sitelinks"][row["site"]] = {}
        else:
            term = {"language": row["language"], "value": row["value"]}
            if table == "aliases":
                document["aliases"].setdefault(row["language"], []).append(term)
            else:
                document[table][row["language"]] = term
    return document


def _statement(row: dict[str, Any]) -> dict[str, Any]:
    value = _datavalue(row["datavalue"])
    snak = {"snaktype": "somevalue"} if value is None else {"snaktype": "value", "datavalue": value}
    return {"mainsnak": snak, "rank": row["rank"] or "normal"}


def _datavalue(fields: Any) -> dict[str, Any] | None:
    """Returns the value of a statement as a dump has it. Of the fields for all kinds of values, those of one are set."""
    fields = {name: _number(value) for name, value in (fields or {}).items()}
    fields = {name: value for name, value in fields.items() if value is not None}
    if "id" in fields:
        return {"type": "wikibase-entityid", "value": {"id": fields["id"]}}
    if "datavalue__string" in fields:
        return {"type": "string", "value": fields["datavalue__string"]}
    for name, kind in (
        ("time", "time"),
        ("amount", "quantity"),
        ("latitude", "globecoordinate"),
        ("text", "monolingualtext"),
    ):
        if name in fields:
            return {"type": kind, "value": fields}
    return None


def _number(value: Any) -> Any:
    """Returns a value, and of a number that is kept as a whole one or another, the one that is set."""
    if not isinstance(value, dict):
        return value
    return next((number for number in value.values() if number is not None), None)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
