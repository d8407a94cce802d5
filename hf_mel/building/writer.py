"""hf_mel.building.writer."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from hf_mel.building.checks import ID_COLUMNS, IdSet, kind_of
from hf_mel.data.images import resize_image, verify_image
from hf_mel.errors import DataFormatError, ImageError
from hf_mel.files import write_text
from hf_mel.schema import NIL

#: A row group is written when it holds this many rows or bytes of images; a file is closed at the second size.
_GROUP_ROWS = 1_000


_GROUP_BYTES = 32 << 20


_FILE_BYTES = 256 << 20


#: Rows whose images are being read and decoded at one time, per core.
_ROWS_PER_CORE = 8


def _prepared(
    examples: Iterable[dict[str, Any]],
    features: datasets.Features,
    where: str,
    known: IdSet,
    pool: ThreadPoolExecutor,
    resize: int | None,
) -> Iterator[tuple[dict[str, Any] | None, list[tuple[str, str, str]]]]:
    """Each example as a row with its images in it, or `None` if it is left out, and its problems (kind, row, detail).

    Images of a few rows ahead are read and decoded on all cores; rows come in the order of the examples.
    """
    kind = kind_of(features) or ""
    columns = [name for name, feature in features.items() if _holds_images(feature)]
    embed = partial(_embed, columns=columns, id_column=ID_COLUMNS[kind], verdicts={}, resize=resize)
    limit = _ROWS_PER_CORE * (os.cpu_count() or 1)
    window: deque[Any] = deque()
    for example in examples:
        row = features.encode_example(example)
        if kind != "entities" and row["entity_id"] != NIL and row["entity_id"] not in known:
            window.append((None, [("gold_not_in_kb", row[ID_COLUMNS[kind]], row["entity_id"])]))
        elif any(row[column] for column in columns):
            window.append(pool.submit(embed, row))
        else:
            window.append((row, []))
        while window and (len(window) > limit or not isinstance(window[0], Future)):
            yield _result(window.popleft())
    while window:
        yield _result(window.popleft())


def _result(item: Any) -> Any:
    return item.result() if isinstance(item, Future) else item


def _embed(
    row: dict[str, Any], columns: list[str], id_column: str, verdicts: dict[bytes, str | None], resize: int | None
) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    problems: list[tuple[str, str, str]] = []
    for column in columns:
        images = row[column] if isinstance(row[column], list) else [row[column]]
        kept = []
        for image in images:
            if image is None:
                continue
            try:
                kept.append({"bytes": _image(image, verdicts, resize), "path": None})  # names may tell the gold
            except FileNotFoundError:
                problems.append(("missing_image", row[id_column], os.path.basename(image["path"])))
            except ImageError as error:
                problems.append(("broken_image", row[id_column], error.message))
            except OSError as error:
                raise DataFormatError(f"cannot be read ({error.strerror}).", file=image["path"]) from error
        row[column] = kept if isinstance(row[column], list) else (kept[0] if kept else None)
    return row, problems


def _image(image: dict[str, Any], verdicts: dict[bytes, str | None], resize: int | None) -> bytes:
    """The bytes to store. Raises `ImageError` if they cannot be decoded, `OSError` if they cannot be read."""
    data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    if resize is not None:
        return resize_image(data, resize)
    digest = hashlib.sha256(data).digest()
    if digest not in verdicts:  # the mentions of one text share an image
        if len(verdicts) > 10_000:
            verdicts.clear()
        try:
            verify_image(data)
            verdicts[digest] = None
        except ImageError as error:
            verdicts[digest] = error.message
            raise
    elif (verdict := verdicts.get(digest)) is not None:
        raise ImageError(verdict)
    return data


def _holds_images(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or isinstance(getattr(feature, "feature", None), datasets.Image)


class _Writer:
    """Parquet files of one split, in row groups small enough to page through images, each with a note.

    A note tells how many examples are used up (`consumed`) when its file ends, and of the file: `rows`, `bytes`,
    `images`, `rows_without` and `problems`. It is written when the file is whole; files that have none are not there.

    Attributes:
        notes (`list[dict]`): Those of the finished files, in order.
    """

    def __init__(self, stage: Path, config: str, split: str, schema: pa.Schema):
        self.stage, self.config, self.split, self.schema = stage, config, split, schema
        self.notes: list[dict[str, Any]] = []
        while (path := self._note(len(self.notes))).exists():
            self.notes.append(json.loads(path.read_text(encoding="utf-8")))
        self._group: list[dict[str, Any]] = []
        self._group_bytes = 0
        self._parquet: pq.ParquetWriter | None = None
        self._new_note(self.consumed)

    @property
    def consumed(self) -> int:
        return self.notes[-1]["consumed"] if self.notes else 0

    def _note(self, number: int) -> Path:
        return self.stage / "notes" / f"{self.config}.{self.split}.{number:05d}.json"

    def _new_note(self, consumed: int) -> None:
        self._current: dict[str, Any] = {
            "consumed": consumed,
            "rows": 0,
            "bytes": 0,
            "images": 0,
            "rows_without": 0,
            "problems": [],
        }

    def write(self, row: dict[str, Any] | None, problems: list[tuple[str, str, str]]) -> None:
        note = self._current
        note["consumed"] += 1
        note["problems"] += problems
        if row is None:
            return
        images = [len(image["bytes"]) for image in _images_of(row)]
        note["rows"] += 1
        note["images"] += len(images)
        note["rows_without"] += not images
        self._group.append(row)
        self._group_bytes += sum(images)
        if len(self._group) >= _GROUP_ROWS or self._group_bytes >= _GROUP_BYTES:
            self._flush()
            if note["bytes"] >= _FILE_BYTES:
                self._close_file()

    def _flush(self) -> None:
        if not self._group:
            return
        table = pa.Table.from_pylist(self._group, schema=self.schema)
        if self._parquet is None:
            path = _shard(self.stage, self.config, self.split, len(self.notes))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._parquet = pq.ParquetWriter(path, self.schema, compression="zstd")
        self._parquet.write_table(table)
        self._current["bytes"] += table.nbytes
        self._group, self._group_bytes = [], 0

    def _close_file(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
            self._parquet = None
            write_text(self._note(len(self.notes)), [json.dumps(self._current)])
            self.notes.append(self._current)
            self._new_note(self.consumed)

    def close(self) -> None:
        """Ends the last file. What was left out after its last row is noted with it."""
        self._flush()
        self._close_file()
        if self.notes and self._current["problems"]:
            self.notes[-1]["problems"] += self._current["problems"]


def _shard(stage: Path, config: str, split: str, number: int) -> Path:
    return stage / "parquet" / config / f"{split}-{number:05d}.parquet"


def _images_of(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for value in row.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and "bytes" in item:
                yield item


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for reading and decoding images, which let go of Python's lock; on an error what waits is dropped."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
