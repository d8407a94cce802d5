"""What can be wrong with a data set, found in one pass over its Parquet files: of a build, or of any repository.

Memory holds eight bytes per entity, text and image, never rows: ids, texts and images are compared by hash. Two ids that
seem equal are compared as written before they are called duplicates.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from hf_mel.building.report import CheckReport
from hf_mel.data.images import verify_image
from hf_mel.data.loading import open_repository
from hf_mel.errors import (
    DataFormatError,
    ImageError,
)
from hf_mel.schema import NIL, entity_features, mention_features, post_features

#: The column that identifies the rows of each kind; the first that is there says what kind a configuration is.
ID_COLUMNS = {"mentions": "mention_id", "posts": "post_id", "entities": "entity_id"}
_SCHEMAS = {"mentions": mention_features, "entities": entity_features, "posts": post_features}
_BATCH_ROWS = 1_000

#: Configuration → split → what yields its tables.
Tables = Mapping[str, Mapping[str, Callable[[], Iterable[pa.Table]]]]


def check_dataset(dataset: str | os.PathLike[str], revision: str | None = None) -> CheckReport:
    """Checks a data set in the schema of hf_mel, whoever built it, without loading it into memory.

    Args:
        dataset (`str` or `os.PathLike`): A folder, or a data set on the Hub, of Parquet files.
        revision (`str`, *optional*): Branch, tag or commit, for a data set on the Hub.

    Returns:
        [`CheckReport`]; the data set is unusable if `fatal` is not empty.

    Raises:
        UnknownDatasetError: Neither a folder nor a data set on the Hub that can be reached.
        DataFormatError: Its files are not Parquet.
    """
    source = os.fspath(dataset)
    report = CheckReport(dataset=source)
    tables: dict[str, dict[str, Callable[[], Iterable[pa.Table]]]] = {}
    builders = open_repository(source, revision)
    for config, builder in builders.items():
        tables[config] = {}
        for split, files in (builder.config.data_files or {}).items():
            if not all(str(file).endswith(".parquet") for file in files):
                raise DataFormatError(
                    f"{config}/{split} is not stored as Parquet.",
                    file=source,
                    remedy="Build it from its files: `hf-mel data build jsonl`.",
                )
            tables[config][str(split)] = _reader([str(file) for file in files])
    check_tables(tables, report)
    for config, builder in builders.items():
        for split, info in (builder.info.splits or {}).items():
            found = report.counts.get(config, {}).get(split, 0)
            if info.num_examples is not None and info.num_examples != found:
                detail = f"{info.num_examples:,} rows, the files have {found:,}"
                report.problem("rows_not_as_in_card", f"{config}/{split}", "", detail)
    return report


def _reader(files: Sequence[str]) -> Callable[[], Iterator[pa.Table]]:
    def read() -> Iterator[pa.Table]:
        for file in files:
            with fsspec.open(file, "rb") as opened:
                yield from read_parquet(opened)

    return read


def read_parquet(file: Any, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The rows of a Parquet file, a thousand at a time at most; an empty file gives one empty table."""
    parquet = pq.ParquetFile(file)
    if parquet.metadata.num_rows == 0:
        yield parquet.read(columns=columns)
    for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
        yield pa.Table.from_batches([batch])


def kind_of(columns: Iterable[str]) -> str | None:
    """What the rows of a configuration are, by its columns: "mentions", "posts", "entities", or none of these."""
    columns = set(columns)
    return next((kind for kind, column in ID_COLUMNS.items() if column in columns), None)


class IdSet:
    """A set of texts, kept as sorted 64-bit hashes."""

    def __init__(self, hashes: array[int] | None = None):
        self._hashes = np.sort(np.frombuffer(hashes, dtype=np.int64)) if hashes else np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._hashes)

    def holds(self, hashes: Sequence[int] | np.ndarray) -> np.ndarray:
        """For each hash (as `hash` gives it), whether its text is in the set: bool, same length."""
        if not len(self._hashes):
            return np.zeros(len(hashes), dtype=bool)
        values = np.asarray(hashes, dtype=np.int64)
        places = np.searchsorted(self._hashes, values)
        return self._hashes[np.minimum(places, len(self._hashes) - 1)] == values

    def __contains__(self, text: object) -> bool:
        return bool(self.holds([hash(text)])[0])


@dataclass
class _Split:
    """Hashes of the mentions of one split; 0 in `golds` is NIL, in `texts` no text, in `images` no image."""

    golds: array = field(default_factory=lambda: array("q"))
    texts: array = field(default_factory=lambda: array("q"))
    images: array = field(default_factory=lambda: array("q"))
    own: int = 0


def check_tables(tables: Tables, report: CheckReport, *, verify_images: bool = True, progress: bool = True) -> None:
    """Checks a data set given as tables and fills `report` in.

    Args:
        tables ([`Tables`]): Rows of every configuration and split; each is read once, and twice to name duplicates.
        report ([`CheckReport`]): Counts, images, duplicates, leakage and problems go there.
        verify_images (`bool`): Whether to decode every image, on all cores; not needed right after building.
        progress (`bool`): Whether to show progress bars.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = _Checks(report, pool, verify_images)
        for config in sorted(tables, key=lambda c: c != "entities"):  # golds are checked against the knowledge base
            for split, read in tables[config].items():
                where = f"{config}/{split}"
                report.counts.setdefault(config, {})[split] = 0
                report.images.setdefault(config, {})[split] = {"images": 0, "rows_without": 0}
                with tqdm(desc=f"checking {where}", unit=" rows", delay=1, disable=not progress) as bar:
                    try:
                        for table in read():
                            if not checks.table(config, split, table):
                                break
                            bar.update(len(table))
                        else:
                            if not report.counts[config][split]:
                                report.problem("empty_split", where, "")
                    except (pa.ArrowException, OSError) as error:
                        report.problem("unreadable", where, "", str(error))
            checks.end_of(config, tables[config])
        checks.finish()
    order = {config: None for config in tables if config in report.counts}
    report.counts = {config: report.counts[config] for config in order}
    report.images = {config: report.images[config] for config in order}
    report.leakage = {config: report.leakage[config] for config in order if config in report.leakage}


class _Checks:
    """What has to be remembered from table to table, across configurations."""

    def __init__(self, report: CheckReport, pool: ThreadPoolExecutor, verify: bool):
        self.report, self.pool, self.verify = report, pool, verify
        self.ids = array("q")  # of the current configuration
        self.entity_ids, self.entity_images, self.owned_images = IdSet(), IdSet(), IdSet()
        self.entity_texts, self.kb_images, self.kb_owned = array("q"), array("q"), array("q")
        self.splits: dict[str, dict[str, _Split]] = {}
        self.kinds: dict[str, str] = {}

    def table(self, config: str, split: str, table: pa.Table) -> bool:
        """Checks some rows of a split; `False` if its columns are not those of the schema."""
        where = f"{config}/{split}"
        kind = config if config in _SCHEMAS else kind_of(table.column_names)
        if kind is None or (wrong := _wrong_columns(table.schema, _SCHEMAS[kind]())):
            known = f"none of {', '.join(ID_COLUMNS.values())} is among {', '.join(table.column_names)}"
            self.report.problem("wrong_schema", where, "", known if kind is None else wrong)
            return False
        self.kinds[config] = kind
        ids = table[ID_COLUMNS[kind]].to_pylist()
        self.report.counts[config][split] += len(ids)
        self.ids.extend(map(hash, ids))
        self._nulls(where, ids, table, kind)
        pictures = self._images(config, split, table, ids)
        if kind == "entities":
            texts = zip(*(table[name].to_pylist() for name in ("name", "description", "attributes")), strict=True)
            self.entity_texts.extend(map(hash, texts))
            self.kb_images.extend(digest for _, digest in pictures)
            self.kb_owned.extend(hash((ids[row], digest)) for row, digest in pictures)
            return True
        golds = table["entity_id"].to_pylist()
        hashes = [0 if gold == NIL else hash(gold) for gold in golds]
        for row in np.flatnonzero(~self.entity_ids.holds(hashes)):
            if golds[row] not in (NIL, None):
                self.report.problem("gold_not_in_kb", where, ids[row], golds[row])
        if kind == "mentions":
            found = self.splits.setdefault(config, {}).setdefault(split, _Split())
            found.golds.extend(hashes)
            found.texts.extend(hash(text) if text else 0 for text in table["text"].to_pylist())
            images = dict(pictures)
            found.images.extend(images.get(row, 0) for row in range(len(ids)))
            owned = [hash((golds[row], digest)) for row, digest in pictures]
            found.own += int(self.owned_images.holds(owned).sum())
            self._mentions(where, ids, table)
        return True

    def _nulls(self, where: str, ids: list[Any], table: pa.Table, kind: str) -> None:
        for name in _SCHEMAS[kind]():
            column = table[name]
            if pa.types.is_struct(column.type) or not column.null_count:
                continue
            for row in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)):
                self.report.problem("null_value", where, str(ids[row]), name)

    def _images(self, config: str, split: str, table: pa.Table, ids: list[Any]) -> list[tuple[int, int]]:
        """(row, hash) of each image that the table holds; what is wrong with images is listed."""
        where, found = f"{config}/{split}", []
        with_image: set[int] = set()
        for column in table.columns:
            pictures = list(_pictures(column))
            inspected = self.pool.map(self._inspect, [data for _, data in pictures])
            for (row, _), (digest, error) in zip(pictures, inspected, strict=True):
                if error is not None:
                    self.report.problem("broken_image", where, str(ids[row]), error)
                    continue
                with_image.add(row)
                found.append((row, digest))
        stats = self.report.images[config][split]
        stats["images"] += len(found)
        stats["rows_without"] += len(ids) - len(with_image)
        return found

    def _inspect(self, data: pa.Buffer | None) -> tuple[int, str | None]:
        if data is None:
            return 0, "the image is a path, and not part of the data set."
        if self.verify:
            try:
                verify_image(data.to_pybytes())
            except ImageError as error:
                return 0, error.message
        return image_hash(data), None

    def _mentions(self, where: str, ids: list[Any], table: pa.Table) -> None:
        names = ("text", "mention", "start", "end", "candidates")
        columns: list[list[Any]] = [table[name].to_pylist() for name in names]
        for name in ("modality", "candidate_priors"):
            columns.append(table[name].to_pylist() if name in table.column_names else [None] * len(ids))
        for row_id, text, mention, start, end, candidates, modality, priors in zip(ids, *columns, strict=True):
            if text is None or mention is None or start is None or end is None:
                continue  # listed already
            if modality == "image" and not mention:
                pass  # something in the picture has no place in the text
            elif start < 0:  # two kinds: the text lacks it, or an earlier mention has its only place
                kind = "mention_not_located" if mention in text else "mention_not_in_text"
                self.report.problem(kind, where, row_id, mention)
            elif text[start:end] != mention:
                detail = f"{text[start:end]!r} stands at {start}:{end}, not the mention {mention!r}"
                self.report.problem("wrong_span", where, row_id, detail)
            if priors and len(priors) != len(candidates or []):
                detail = f"there are {len(candidates or []):,} candidates and {len(priors):,} candidate_priors"
                self.report.problem("priors_unlike_candidates", where, row_id, detail)
            if candidates:
                for k in np.flatnonzero(~self.entity_ids.holds([hash(candidate) for candidate in candidates])):
                    if candidates[k] != NIL:
                        self.report.problem("candidate_not_in_kb", where, row_id, str(candidates[k]))

    def end_of(self, config: str, splits: Mapping[str, Callable[[], Iterable[pa.Table]]]) -> None:
        """Looks back on a whole configuration: ids that occur twice, and the knowledge base as sets."""
        ids, self.ids = self.ids, array("q")
        kind = self.kinds.get(config)
        if config == "entities":
            if not self.report.counts.get(config, {}).get("kb"):
                self.report.problem("no_knowledge_base", config, "")
            self.entity_images, self.owned_images = IdSet(self.kb_images), IdSet(self.kb_owned)
            self.kb_images, self.kb_owned = array("q"), array("q")
            self.entity_ids = IdSet(ids)
        values, times = np.unique(np.frombuffer(ids, dtype=np.int64), return_counts=True)
        if kind is not None and (times > 1).any():
            suspects, seen = set(values[times > 1].tolist()), set()
            for split, read in splits.items():
                for table in read():
                    for row_id in table[ID_COLUMNS[kind]].to_pylist():
                        if hash(row_id) in suspects:
                            if row_id in seen:
                                self.report.problem("duplicate_id", f"{config}/{split}", str(row_id), str(row_id))
                            seen.add(row_id)
        train = self.splits.get(config, {}).get("train") or self.splits.get("mentions", {}).get("train")
        for split, mentions in self.splits.get(config, {}).items():
            self.report.leakage.setdefault(config, {})[split] = self._leakage(mentions, train)

    def _leakage(self, split: _Split, train: _Split | None) -> dict[str, int]:
        found = {"with_gold": int(np.count_nonzero(split.golds)), "with_image": int(np.count_nonzero(split.images))}
        if train is not None and train is not split:
            for name, values, seen in (
                ("gold_in_train", split.golds, train.golds),
                ("text_in_train", split.texts, train.texts),
                ("image_in_train", split.images, train.images),
            ):
                here = np.frombuffer(values, dtype=np.int64)
                found[name] = int(IdSet(seen).holds(here[here != 0]).sum()) if len(here) else 0
        images = np.frombuffer(split.images, dtype=np.int64)
        found["image_in_kb"] = int(self.entity_images.holds(images[images != 0]).sum())
        found["image_of_gold"] = split.own
        return found

    def finish(self) -> None:
        if "entities" not in self.report.counts:
            self.report.problem("no_knowledge_base", "entities", "")
        _, times = np.unique(np.frombuffer(self.entity_texts, dtype=np.int64), return_counts=True)
        self.report.duplicates = {
            "entities_sharing_their_text": int(times[times > 1].sum()),
            "mention_images_in_kb": sum(
                split["image_in_kb"] for splits in self.report.leakage.values() for split in splits.values()
            ),
        }


def image_hash(data: Any) -> int:
    """64 bits of the sha256 of an image's bytes; never 0."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little", signed=True) or 1


def _pictures(column: pa.ChunkedArray) -> Iterator[tuple[int, pa.Buffer | None]]:
    """(row, bytes) of each image of a column; `None` for one of which only the path is there. Nothing is copied."""
    start = 0
    for chunk in column.chunks:
        rows: Sequence[int] = range(len(chunk))
        images = chunk
        if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
            rows, images = pc.list_parent_indices(chunk).to_pylist(), pc.list_flatten(chunk)
        if pa.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
            data = pc.struct_field(images, "bytes")
            for row, image, content in zip(rows, images, data, strict=True):
                if content.is_valid:
                    yield start + row, content.as_buffer()
                elif image.is_valid:
                    yield start + row, None
        start += len(chunk)


def _wrong_columns(schema: pa.Schema, features: datasets.Features) -> str:
    """What of the schema's columns is missing or of another type; empty if nothing is."""
    if missing := [name for name in features if name not in schema.names]:
        return f"it lacks {', '.join(missing)} and has {', '.join(schema.names)}"
    wrong = [
        f"{expected.name} is {schema.field(expected.name).type}"
        for expected in features.arrow_schema
        if not _alike(schema.field(expected.name).type, expected.type)
    ]
    return ", ".join(wrong)


def _alike(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether values of one Arrow type can stand for those of another: other widths may, other kinds may not."""
    kinds = pa.types
    if kinds.is_list(expected):
        return (kinds.is_list(found) or kinds.is_large_list(found)) and _alike(found.value_type, expected.value_type)
    if kinds.is_struct(expected):
        return kinds.is_struct(found) and all(
            (index := found.get_field_index(part.name)) >= 0 and _alike(found[index].type, part.type)
            for part in expected
        )
    if kinds.is_string(expected):
        return kinds.is_string(found) or kinds.is_large_string(found)
    if kinds.is_binary(expected):
        return kinds.is_binary(found) or kinds.is_large_binary(found)
    return found == expected or (kinds.is_integer(found) and kinds.is_integer(expected))
