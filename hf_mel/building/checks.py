"""Checks a data set in one pass over its Parquet files: a build, or any repository.

Memory holds eight bytes per entity, text and image, and never a row: ids, texts and images are compared by hash. Ids with
equal hashes are compared as strings before they are reported as duplicates.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from hf_mel.building.columns import ID_COLUMNS, SCHEMAS, images_in, kind_of, read_parquet, schema_mismatch
from hf_mel.building.id_set import IdSet
from hf_mel.building.report import CheckReport
from hf_mel.data.images import verify_image
from hf_mel.data.loading import open_repository
from hf_mel.errors import DataFormatError, ImageError
from hf_mel.row_files import other_unicode_form
from hf_mel.schema import NIL

#: Configuration → split → function that yields the rows as tables.
Tables = Mapping[str, Mapping[str, Callable[[], Iterable[pa.Table]]]]


def check_dataset(dataset: str | os.PathLike[str], revision: str | None = None) -> CheckReport:
    """Checks any data set that has the schema of hf_mel, without loading it into memory.

    Args:
        dataset (`str` or `os.PathLike`): A folder, or a data set on the Hub, of Parquet files.
        revision (`str`, *optional*): Branch, tag or commit of a data set on the Hub.

    Returns:
        [`~hf_mel.building.report.CheckReport`]: The data set is unusable if `fatal` is not empty.

    Raises:
        UnknownDatasetError: `dataset` is neither a folder nor a data set on the Hub, or the Hub cannot be reached.
        DataFormatError: The files are not Parquet.
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
            tables[config][str(split)] = _table_reader([str(file) for file in files])
    check_tables(tables, report)
    for config, builder in builders.items():
        for split, info in (builder.info.splits or {}).items():
            num_rows = report.counts.get(config, {}).get(split, 0)
            if info.num_examples is not None and info.num_examples != num_rows:
                detail = f"card: {info.num_examples:,}, files: {num_rows:,}"
                report.problem("rows_not_as_in_card", f"{config}/{split}", "", detail)
    return report


def _table_reader(files: Sequence[str]) -> Callable[[], Iterator[pa.Table]]:
    def read() -> Iterator[pa.Table]:
        for file in files:
            with fsspec.open(file, "rb") as stream:
                yield from read_parquet(stream)

    return read


def check_tables(tables: Tables, report: CheckReport, *, verify_images: bool = True, progress: bool = True) -> None:
    """Checks a data set that is given as tables, and fills in `report`.

    Args:
        tables ([`Tables`]): Rows of every configuration and split. They are read once, and once more to name duplicates.
        report ([`~hf_mel.building.report.CheckReport`]): Receives counts, images, duplicates, leakage and problems.
        verify_images (`bool`): Decode every image, on all cores. Unnecessary right after a build.
        progress (`bool`): Show progress bars.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        checker = _DatasetChecker(report, threads, verify_images)
        # The knowledge base comes first, because golds are looked up in it.
        for config in sorted(tables, key=lambda name: name != "entities"):
            for split, read in tables[config].items():
                file = f"{config}/{split}"
                report.counts.setdefault(config, {})[split] = 0
                report.images.setdefault(config, {})[split] = {"images": 0, "rows_without": 0}
                with tqdm(desc=f"checking {file}", unit=" rows", delay=1, disable=not progress) as bar:
                    try:
                        for table in read():
                            if not checker.check_table(config, split, table):
                                break
                            bar.update(len(table))
                        else:
                            if not report.counts[config][split]:
                                report.problem("empty_split", file, "")
                    except (pa.ArrowException, OSError) as error:
                        report.problem("unreadable", file, "", str(error))
            checker.finish_config(config, tables[config])
        checker.finish()
    # Report the configurations in the order given.
    configs = [config for config in tables if config in report.counts]
    report.counts = {config: report.counts[config] for config in configs}
    report.images = {config: report.images[config] for config in configs}
    report.leakage = {config: report.leakage[config] for config in configs if config in report.leakage}


def _hashes() -> array[int]:
    return array("q")


@dataclass
class _MentionHashes:
    """Hashes of the mentions of one split, one per row. 0 means NIL in `golds`, and none in `texts` and `images`.

    `num_images_of_gold` counts the mentions with an image of their gold entity.
    """

    golds: array[int] = field(default_factory=_hashes)
    texts: array[int] = field(default_factory=_hashes)
    images: array[int] = field(default_factory=_hashes)
    num_images_of_gold: int = 0


class _DatasetChecker:
    """Checks tables one after the other, and keeps the hashes that later tables are compared with.

    Args:
        report ([`~hf_mel.building.report.CheckReport`]): Receives the results.
        threads (`ThreadPoolExecutor`): Threads that decode images.
        verify_images (`bool`): Decode every image.
    """

    def __init__(self, report: CheckReport, threads: ThreadPoolExecutor, verify_images: bool):
        self.report, self.threads, self.verify_images = report, threads, verify_images
        self.kinds: dict[str, str] = {}
        self.config_ids = _hashes()  # of the configuration that is being read
        self.mentions: dict[str, dict[str, _MentionHashes]] = {}
        # Of the knowledge base: hashes that are collected while it is read, and sets of them afterwards.
        self.entity_texts, self.image_hashes, self.owner_hashes = _hashes(), _hashes(), _hashes()
        self.entity_ids, self.entity_images, self.image_owners = IdSet(), IdSet(), IdSet()

    def check_table(self, config: str, split: str, table: pa.Table) -> bool:
        """Checks some rows of a split. Returns `False` if their columns do not match the schema."""
        file = f"{config}/{split}"
        kind = config if config in SCHEMAS else kind_of(table.column_names)
        if kind is None:
            mismatch = f"no id column ({', '.join(ID_COLUMNS.values())}); found: {', '.join(table.column_names)}"
        else:
            mismatch = schema_mismatch(table.schema, SCHEMAS[kind]())
        if kind is None or mismatch:
            self.report.problem("wrong_schema", file, "", mismatch)
            return False
        self.kinds[config] = kind
        ids = table[ID_COLUMNS[kind]].to_pylist()
        self.report.counts[config][split] += len(ids)
        self.config_ids.extend(map(hash, ids))
        self._check_nulls(file, ids, table, kind)
        images = self._check_images(config, split, table, ids)
        if kind == "entities":
            self._add_entities(ids, table, images)
        else:
            golds = table["entity_id"].to_pylist()
            gold_hashes = [0 if gold == NIL else hash(gold) for gold in golds]
            for row in np.flatnonzero(~self.entity_ids.contains_hashes(gold_hashes)):
                if golds[row] not in (NIL, None):
                    self.report.problem("gold_not_in_kb", file, ids[row], golds[row])
            if kind == "mentions":
                self._add_mentions(config, split, table, golds, gold_hashes, images)
                self._check_mentions(file, ids, table)
        return True

    def _add_entities(self, ids: list[Any], table: pa.Table, images: list[tuple[int, int]]) -> None:
        texts = zip(*(table[name].to_pylist() for name in ("name", "description", "attributes")), strict=True)
        self.entity_texts.extend(map(hash, texts))
        self.image_hashes.extend(digest for _, digest in images)
        self.owner_hashes.extend(hash((ids[row], digest)) for row, digest in images)

    def _add_mentions(
        self,
        config: str,
        split: str,
        table: pa.Table,
        golds: list[Any],
        gold_hashes: list[int],
        images: list[tuple[int, int]],
    ) -> None:
        mentions = self.mentions.setdefault(config, {}).setdefault(split, _MentionHashes())
        mentions.golds.extend(gold_hashes)
        mentions.texts.extend(hash(text) if text else 0 for text in table["text"].to_pylist())
        image_of_row = dict(images)
        mentions.images.extend(image_of_row.get(row, 0) for row in range(len(table)))
        owners = [hash((golds[row], digest)) for row, digest in images]
        mentions.num_images_of_gold += int(self.image_owners.contains_hashes(owners).sum())

    def _check_nulls(self, file: str, ids: list[Any], table: pa.Table, kind: str) -> None:
        for name in SCHEMAS[kind]():
            column = table[name]
            if pa.types.is_struct(column.type) or not column.null_count:  # images may be null
                continue
            for row in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)):
                self.report.problem("null_value", file, str(ids[row]), name)

    def _check_images(self, config: str, split: str, table: pa.Table, ids: list[Any]) -> list[tuple[int, int]]:
        """Returns (row, hash) of each good image in a table. Counts images and reports broken ones."""
        good: list[tuple[int, int]] = []
        for column in table.columns:
            images = list(images_in(column))
            inspected = self.threads.map(self._inspect_image, [data for _, data in images])
            for (row, _), (digest, error) in zip(images, inspected, strict=True):
                if error is None:
                    good.append((row, digest))
                else:
                    self.report.problem("broken_image", f"{config}/{split}", str(ids[row]), error)
        counts = self.report.images[config][split]
        counts["images"] += len(good)
        counts["rows_without"] += len(ids) - len({row for row, _ in good})
        return good

    def _inspect_image(self, data: pa.Buffer | None) -> tuple[int, str | None]:
        """Returns the hash of an image, and the reason if it cannot be used."""
        if data is None:
            return 0, "The image is stored as a path, so it is not part of the data set."
        if self.verify_images:
            try:
                verify_image(data.to_pybytes())
            except ImageError as error:
                return 0, error.message
        return image_hash(data), None

    def _check_mentions(self, file: str, ids: list[Any], table: pa.Table) -> None:
        names = ("text", "mention", "start", "end", "candidates")
        columns: list[list[Any]] = [table[name].to_pylist() for name in names]
        for name in ("modality", "candidate_priors"):
            columns.append(table[name].to_pylist() if name in table.column_names else [None] * len(ids))
        for row_id, text, mention, start, end, candidates, modality, priors in zip(ids, *columns, strict=True):
            if text is None or mention is None or start is None or end is None:
                continue  # reported as null_value
            if modality == "image" and not mention:
                pass  # an object in the image has no span in the text
            elif start < 0:
                # If the text does contain the mention, an earlier mention has taken the only occurrence.
                kind = "mention_not_located" if mention in text else "mention_not_in_text"
                if other_unicode_form(text, mention):
                    kind = "mention_in_other_unicode_form"
                self.report.problem(kind, file, row_id, mention)
            elif text[start:end] != mention:
                detail = f"characters {start}:{end} are {text[start:end]!r}, the mention is {mention!r}"
                self.report.problem("wrong_span", file, row_id, detail)
            if priors and len(priors) != len(candidates or []):
                detail = f"candidates: {len(candidates or []):,}, candidate_priors: {len(priors):,}"
                self.report.problem("priors_unlike_candidates", file, row_id, detail)
            if candidates:
                is_entity = self.entity_ids.contains_hashes([hash(candidate) for candidate in candidates])
                for index in np.flatnonzero(~is_entity):
                    if candidates[index] != NIL:
                        self.report.problem("candidate_not_in_kb", file, row_id, str(candidates[index]))

    def finish_config(self, config: str, splits: Mapping[str, Callable[[], Iterable[pa.Table]]]) -> None:
        """Runs the checks that need a whole configuration: duplicate ids, leakage, and an empty knowledge base."""
        ids, self.config_ids = self.config_ids, _hashes()
        if config == "entities":
            if not self.report.counts.get(config, {}).get("kb"):
                self.report.problem("no_knowledge_base", config, "")
            self.entity_ids = IdSet(ids)
            self.entity_images, self.image_owners = IdSet(self.image_hashes), IdSet(self.owner_hashes)
            self.image_hashes, self.owner_hashes = _hashes(), _hashes()
        if config in self.kinds:
            self._check_duplicate_ids(config, splits, ids)
        train = self.mentions.get(config, {}).get("train") or self.mentions.get("mentions", {}).get("train")
        for split, mentions in self.mentions.get(config, {}).items():
            self.report.leakage.setdefault(config, {})[split] = self._leakage(mentions, train)

    def _check_duplicate_ids(
        self, config: str, splits: Mapping[str, Callable[[], Iterable[pa.Table]]], ids: array[int]
    ) -> None:
        hashes, counts = np.unique(np.frombuffer(ids, dtype=np.int64), return_counts=True)
        repeated = set(hashes[counts > 1].tolist())
        if not repeated:
            return
        seen = set()
        for split, read in splits.items():
            for table in read():
                for row_id in table[ID_COLUMNS[self.kinds[config]]].to_pylist():
                    if hash(row_id) not in repeated:
                        continue
                    if row_id in seen:
                        self.report.problem("duplicate_id", f"{config}/{split}", str(row_id), str(row_id))
                    seen.add(row_id)

    def _leakage(self, mentions: _MentionHashes, train: _MentionHashes | None) -> dict[str, int]:
        leakage = {
            "with_gold": int(np.count_nonzero(mentions.golds)),
            "with_image": int(np.count_nonzero(mentions.images)),
        }
        if train is not None and train is not mentions:
            for name, hashes, train_hashes in (
                ("gold_in_train", mentions.golds, train.golds),
                ("text_in_train", mentions.texts, train.texts),
                ("image_in_train", mentions.images, train.images),
            ):
                leakage[name] = int(IdSet(train_hashes).contains_hashes(_nonzero(hashes)).sum())
        leakage["image_in_kb"] = int(self.entity_images.contains_hashes(_nonzero(mentions.images)).sum())
        leakage["image_of_gold"] = mentions.num_images_of_gold
        return leakage

    def finish(self) -> None:
        """Runs the checks that need the whole data set."""
        if "entities" not in self.report.counts:
            self.report.problem("no_knowledge_base", "entities", "")
        _, counts = np.unique(np.frombuffer(self.entity_texts, dtype=np.int64), return_counts=True)
        self.report.duplicates = {
            "entities_sharing_their_text": int(counts[counts > 1].sum()),
            "mention_images_in_kb": sum(
                split["image_in_kb"] for splits in self.report.leakage.values() for split in splits.values()
            ),
        }


def image_hash(data: Any) -> int:
    """Returns the first 64 bits of the sha256 of an image file, or 1 if they are 0."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little", signed=True) or 1


def _nonzero(hashes: array[int]) -> np.ndarray:
    values = np.frombuffer(hashes, dtype=np.int64)
    return values[values != 0]
