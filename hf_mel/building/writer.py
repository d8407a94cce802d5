"""Writes a split as Parquet files, so that an interrupted build can continue after the last finished file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_mel.files import local_path, write_text

#: Limits on a row group, in rows and in bytes of images. Small groups let readers page through images.
_GROUP_ROWS = 1_000
_GROUP_BYTES = 32 << 20
#: A file is closed after the row group that takes it to this many bytes (uncompressed).
_FILE_BYTES = 256 << 20


def staged_file(stage: Path, config: str, split: str, number: int) -> Path:
    """Returns the path of one Parquet file of a split while the data set is being built."""
    return stage / "parquet" / config / f"{split}-{number:05d}.parquet"


class SplitWriter:
    """Writes the rows of one split to Parquet files, and a note (JSON) beside each finished file.

    A note holds `rows`, `bytes`, `images`, `rows_without` (an image) and `problems` of its file, and `consumed`: the
    number of examples of the split that were used up when the file was closed. A file without a note is unfinished. Its
    rows are written again.

    Args:
        stage (`Path`): Working folder of the build.
        config, split (`str`): Configuration and split that the rows belong to.
        schema (`pyarrow.Schema`): Columns of the rows.

    Attributes:
        notes (`list[dict]`): Notes of the finished files, in order. Those of an interrupted build are read at the start.
    """

    def __init__(self, stage: Path, config: str, split: str, schema: pa.Schema):
        self.stage, self.config, self.split, self.schema = stage, config, split, schema
        self.notes: list[dict[str, Any]] = []
        while (path := self._note_path(len(self.notes))).exists():
            self.notes.append(json.loads(path.read_text(encoding="utf-8")))
        self._group: list[dict[str, Any]] = []
        self._group_bytes = 0
        self._parquet: pq.ParquetWriter | None = None
        self._start_note(self.consumed)

    @property
    def consumed(self) -> int:
        """Number of examples that the finished files have used up."""
        return self.notes[-1]["consumed"] if self.notes else 0

    def write(self, row: dict[str, Any] | None, problems: list[tuple[str, str, str, str]]) -> None:
        """Adds one example: its row, or `None` if it is left out, and its problems: (kind, file, row, detail)."""
        note = self._note
        note["consumed"] += 1
        note["problems"] += problems
        if row is None:
            return
        sizes = [len(image["bytes"]) for image in _images_of(row)]
        note["rows"] += 1
        note["images"] += len(sizes)
        note["rows_without"] += not sizes
        self._group.append(row)
        self._group_bytes += sum(sizes)
        if len(self._group) >= _GROUP_ROWS or self._group_bytes >= _GROUP_BYTES:
            self._write_group()
            if note["bytes"] >= _FILE_BYTES:
                self._close_file()

    def close(self) -> None:
        """Closes the last file. Problems of examples after its last row go into its note."""
        self._write_group()
        self._close_file()
        if self.notes and self._note["problems"]:
            self.notes[-1]["problems"] += self._note["problems"]

    def _note_path(self, number: int) -> Path:
        return self.stage / "notes" / f"{self.config}.{self.split}.{number:05d}.json"

    def _start_note(self, consumed: int) -> None:
        self._note: dict[str, Any] = {
            "consumed": consumed,
            "rows": 0,
            "bytes": 0,
            "images": 0,
            "rows_without": 0,
            "problems": [],
        }

    def _write_group(self) -> None:
        if not self._group:
            return
        table = pa.Table.from_pylist(self._group, schema=self.schema)
        if self._parquet is None:
            path = staged_file(self.stage, self.config, self.split, len(self.notes))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._parquet = pq.ParquetWriter(local_path(path), self.schema, compression="zstd")
        self._parquet.write_table(table)
        self._note["bytes"] += table.nbytes
        self._group, self._group_bytes = [], 0

    def _close_file(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
            self._parquet = None
            write_text(self._note_path(len(self.notes)), [json.dumps(self._note)])
            self.notes.append(self._note)
            self._start_note(self.consumed)


def _images_of(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for value in row.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and "bytes" in item:
                yield item
