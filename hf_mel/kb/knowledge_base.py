"""Knowledge base on disk: entities, and the encodings with which a model scores them.

A knowledge base is a folder:

- `kb.json`: the manifest. It lists all other files with size and sha256, the model and processor that encoded the
  entities, and the removed rows.
- `encodings-00000.safetensors`, …: the encodings of one shard of rows, memory-mapped when read.
- `entities-00000.parquet`, …: the same rows in the columns of [`~hf_mel.schema.entity_features`], with the first image
  only, and in further columns of their source, to filter by ([`~KnowledgeBase.where`]).
- `index-….json` and the files it names, if an index was built: see [`~hf_mel.kb.indexes.base`].
- `left_out_images.jsonl`, if images were missing or damaged: see [`~KnowledgeBase.left_out_images`].

Files never change once `kb.json` names them, and their names are not used again. Adding entities writes another shard,
removing them marks rows, and a new build writes new shards. All take effect when a new `kb.json` is renamed into place, so
that readers and crashes see either the old or the new state. A knowledge base maps all its files when it is opened, so it
keeps its state when another process changes the folder. Writers hold the lock `.writer.lock`.

A *row* is the position of an entity among those that are not removed. A *physical row* is a position in the shards,
removed entities included. It never changes when entities are added or removed, so indexes use it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from hf_mel.data.images import open_image
from hf_mel.errors import DuplicateIdError, HubError, ImageError, KnowledgeBaseError, UnknownEntityError
from hf_mel.files import building_folder, file_sha256, write_errors
from hf_mel.hub_errors import hub_errors
from hf_mel.inference.encode import window_rows
from hf_mel.inference.encodings import as_float, concat_encodings, slice_encodings
from hf_mel.inference.fingerprint import describe_model, describe_processor, model_difference, processor_difference
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.padding import masks_of
from hf_mel.inference.quantisation import dequantised, is_quantised
from hf_mel.inference.ranking import ProcessGroup, process_group
from hf_mel.kb.encoding import open_inputs, report_bad_images, source_digests, write_encodings
from hf_mel.kb.entities import (
    LEFT_OUT_NAME,
    TEXT_COLUMNS,
    EntitiesLike,
    check_ids,
    content_sha256,
    open_entities,
    read_left_out_images,
    row_digest,
    write_left_out_images,
)
from hf_mel.kb.filters import Filter
from hf_mel.kb.folders import (
    delete_unnamed_entries,
    install_kb,
    kb_lock,
    lock_existing,
    manifest_text,
    next_shard_number,
    temporary_folder_beside,
    writable_target,
)
from hf_mel.kb.manifest import DTYPES, FORMAT, MANIFEST_NAME, VERSION, damage_error, read_manifest, write_manifest
from hf_mel.kb.shards import (
    DecodedGroups,
    EntityTable,
    ShardWriter,
    as_index,
    further_columns,
    group_by_block,
    map_encodings,
    read_errors,
    take_rows,
)
from hf_mel.kb.shared_build import build_together
from hf_mel.protocols import MelProcessor, entity_token_masks, knows_posts
from hf_mel.row_columns import ColumnMapping
from hf_mel.schema import entity_features

logger = logging.getLogger(__name__)

#: The form OWNER/NAME. A path of this form that does not exist is taken for a Hub id.
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
#: Members that were renamed; the old names work until the next release.
_RENAMED = {"stored": "num_physical_rows", "rows_of_stored": "rows_of_physical", "iter_stored": "iter_physical"}


@dataclass(frozen=True)
class KnowledgeBaseUpdate:
    """The changes that [`KnowledgeBase.update`] made.

    Args:
        added, changed, removed (`list[str]`): Ids of entities.
        num_unchanged (`int`): Number of entities that were not encoded again.
    """

    added: list[str]
    changed: list[str]
    removed: list[str]
    num_unchanged: int


class KnowledgeBase:
    """N entities and their encodings, in a folder and in a fixed order.

    ```python
    >>> kb = KnowledgeBase.build("data/wikimel", model, processor, output="kb/wikimel")  # doctest: +SKIP
    >>> kb.add("mine.jsonl", model, processor)  # doctest: +SKIP
    >>> kb.remove(["Q42"])  # doctest: +SKIP
    >>> kb = KnowledgeBase.from_pretrained("kb/wikimel")  # doctest: +SKIP
    ```

    [`~KnowledgeBase.build`] creates a knowledge base and [`~KnowledgeBase.from_pretrained`] opens one. `add` and
    `remove` change the folder at once and atomically, so there is nothing to save afterwards. Encodings stay on disk and
    are memory-mapped.

    A folder has any number of readers, which keep the state that they opened, and one writer at a time. A second writer
    is refused with a [`~hf_mel.errors.LockedError`], or waits in [`~KnowledgeBase.writing`]. A writer first reads the
    current state of the folder, so no change undoes that of another process.

    Args:
        path (`str` or `os.PathLike`): The folder of a knowledge base.

    Raises:
        KnowledgeBaseError: The folder holds no knowledge base, or a file is missing or has the wrong size.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._temporary: tempfile.TemporaryDirectory | None = None  # keeps a temporary folder alive
        self._hub_id: str | None = None  # Hub id if the folder is the shared Hub cache (then read-only)
        self._writer: tuple[int, int] | None = None  # process and thread that hold the lock
        self._encodings: list[dict[str, torch.Tensor]] = []
        self._tables: list[EntityTable] = []
        self._kept = DecodedGroups()
        self._files: list[tuple[str, str]] = []  # name and sha256 of the encodings of each mapped shard
        self.path = Path(path)
        self._reload()

    def _reload(self) -> None:
        """Opens the current state of the folder."""
        attempted = manifest_text(self.path)
        while True:
            try:
                self._manifest_text, self._manifest = read_manifest(self.path)
                self._map_shards()
                break
            except KnowledgeBaseError:
                # Another process may have replaced the files since we read their names.
                text = manifest_text(self.path)
                if text == attempted:
                    raise
                attempted = text
        sizes = [shard["rows"] for shard in self._manifest["shards"]]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        is_active = np.ones(self._starts[-1], dtype=bool)
        is_active[self._manifest["removed"]] = False
        self._active = np.flatnonzero(is_active)  # physical row of each row
        for name in ("entity_ids", "_row_by_id", "_row_by_physical", "_schema"):
            self.__dict__.pop(name, None)

    def _map_shards(self) -> None:
        """Maps the files of all shards. Those that were mapped before are kept."""
        mapped = dict(zip(self._files, zip(self._encodings, self._tables, strict=True), strict=True))
        files, encodings, tables = [], [], []
        for shard in self._manifest["shards"]:
            key = (shard["encodings"]["file"], shard["encodings"]["sha256"])
            tensors, table = mapped.get(key) or (
                map_encodings(self.path / key[0], shard["rows"], self._manifest["encodings"]),
                EntityTable(self.path / shard["entities"]["file"], shard["rows"], self._kept),
            )
            files.append(key)
            encodings.append(tensors)
            tables.append(table)
        self._files, self._encodings, self._tables = files, encodings, tables

    @classmethod
    def build(
        cls,
        entities: EntitiesLike,
        model: Any,
        processor: MelProcessor,
        *,
        output: str | os.PathLike[str] | None = None,
        posts: str | datasets.Dataset | None = "auto",
        batch_size: int = 64,
        dtype: str = "float32",
        strict: bool = False,
        mapping: ColumnMapping | None = None,
        processes: PartialState | None = None,
        progress: bool = True,
    ) -> KnowledgeBase:
        """Encodes entities into a new folder, which appears only when it is complete.

        Memory holds one shard, whatever the number of entities. A missing or damaged image does not stop the build: its
        entity goes without it, and [`~KnowledgeBase.left_out_images`] lists it. An interrupted build resumes after its last finished shard when it is repeated with the same entities, model and
        `output`.

        Args:
            entities ([`EntitiesLike`]): The folder or Hub id of a data set, a .jsonl, .json, .csv or .tsv file of your
                own entities ([`~hf_mel.data.entity_files.read_entity_file`]), or a `datasets.Dataset` with the columns of
                [`~hf_mel.schema.entity_features`].
            model ([`~hf_mel.protocols.Retriever`]): The model that encodes the entities, in eval mode.
            processor ([`~hf_mel.protocols.MelProcessor`]): Its processor, which must pad all batches to one length.
            output (`str` or `os.PathLike`, *optional*): The folder. An existing knowledge base is replaced, and cannot be
                changed by others until then. Default: a temporary folder that is deleted with the object.
            posts (`str` or `datasets.Dataset`, *optional*): The posts about the entities, for a post-based model; see
                [`~hf_mel.inference.inputs.ModelInputs.from_data`].
            batch_size (`int`): Entities per forward pass.
            dtype (`str`): The form in which floating-point encodings are stored: `"float32"`, `"float16"`, `"bfloat16"`,
                or in few bits `"int8"` or `"int4"` ([`~hf_mel.inference.quantisation`]).
            strict (`bool`): Whether to raise an error for the first missing or damaged image instead.
            mapping ([`~hf_mel.row_columns.ColumnMapping`], *optional*): Columns that have other names in a file of
                entities.
            processes (`accelerate.PartialState`, *optional*): Processes that share the entities. All of them make this call
                with the same arguments, and see the folder of `output`. The files are those of one process, if it has as
                many threads as each of them.
            progress (`bool`): Whether to show a progress bar.

        Returns:
            [`KnowledgeBase`] of N entities in the given order.

        Raises:
            KnowledgeBaseError: The source has no entities; `output` is something other than a knowledge base; the model
                is no retriever; encodings are not finite in `dtype`, or change shape between batches; the processes have
                other arguments or do not share the output.
            LockedError: Another process builds into `output`, or changes the knowledge base there.
            DuplicateIdError: An id occurs twice.
            DataFormatError: Columns or ids are missing.
            ImageError: An image is missing or damaged, and the build is `strict`.
        """
        if dtype not in DTYPES:
            raise KnowledgeBaseError(
                f"dtype={dtype!r} is not supported.", remedy=f"Choose one of {', '.join(DTYPES)}."
            )
        group = process_group(processes)
        if group.size > 1 and output is None:
            raise KnowledgeBaseError(
                "Several processes cannot build a temporary knowledge base.", remedy="Give an output."
            )
        temporary = tempfile.TemporaryDirectory(prefix="hf_mel-kb-") if output is None else None
        with group.without_limit(), group.raise_together():  # hosts may read the entities at very different speeds
            target = writable_target(Path(temporary.name, "kb") if temporary else Path(os.fspath(output)))  # type: ignore[arg-type]
            bad_images: list[ImageError] | None = None if strict else []
            source, name = open_entities(entities, bad_images, mapping, group)
            if group.index == 0:  # it holds all ids in memory
                check_ids(source, name)
            inputs = open_inputs(entities, name, model, processor, posts, bad_images, group)
            left_out = report_bad_images(bad_images)
            prototypes = inputs.prototypes
            fingerprints = {
                "model": describe_model(model),
                "processor": describe_processor(processor, posts=prototypes is not None),
            }
            posts_sha256 = None if prototypes is None or prototypes.posts is None else content_sha256(prototypes.posts)
            settings = {**fingerprints, "dtype": dtype, "entities": content_sha256(source), "posts": posts_sha256}

        def finish(work: Path, shards: list[dict[str, Any]], layout: dict[str, Any] | None) -> None:
            manifest = {"format": FORMAT, "version": VERSION, **fingerprints, "dtype": dtype}
            write_manifest(work, manifest | {"encodings": layout, "shards": shards, "removed": []})
            write_left_out_images(work, left_out)
            install_kb(work, target)

        if isinstance(group, ProcessGroup):
            build_together(
                target,
                {**settings, "images": left_out},
                source,
                name,
                inputs,
                dtype=dtype,
                batch_size=batch_size,
                group=group,
                progress=progress,
                finish=finish,
            )
            return cls(target)
        # The lock comes first: an error inside of the working folder deletes what an interrupted build has finished.
        with lock_existing(target), building_folder(target, json.dumps(settings, sort_keys=True)) as stage:
            work = stage / "kb"
            work.mkdir(exist_ok=True)
            writer = ShardWriter(
                work,
                0,
                dtype,
                step=window_rows(batch_size),
                notes=stage / "notes",
                masks=entity_token_masks(model),
            )
            if writer.num_finished:
                logger.info(
                    "Resuming the interrupted build of %s; %s entities are done.", target, f"{writer.num_finished:,}"
                )
            if writer.num_finished < len(source):
                remaining = source.select(range(writer.num_finished, len(source)))
                write_encodings(remaining, name, inputs, writer, batch_size, progress)
            shards = writer.close()
            finish(work, shards, writer.layout)
        kb = cls(target)
        kb._temporary = temporary
        return kb

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        verify: bool = False,
    ) -> KnowledgeBase:
        """Opens a knowledge base from a folder or the Hub.

        A knowledge base on the Hub is downloaded into the Hub cache and memory-mapped there. It is read-only;
        [`~KnowledgeBase.save`] makes a copy that can be changed.

        Args:
            name (`str` or `os.PathLike`): A folder, or the id of a data-set repository that holds a knowledge base.
            revision (`str`, *optional*): Branch, tag or commit of a knowledge base on the Hub.
            local_files_only (`bool`): Whether to use only the cache and not contact the Hub.
            verify (`bool`): Whether to also compare the sha256 of every file ([`~KnowledgeBase.verify`]).

        Raises:
            KnowledgeBaseError: The folder holds no knowledge base or a damaged one; or `revision` is given for a folder.
            HubError: The Hub cannot be reached, or the repository or revision does not exist or is not accessible.
        """
        source = os.fspath(name)
        is_folder = Path(source).exists() or not _REPO_ID.fullmatch(source)
        if is_folder:
            if revision is not None:
                raise KnowledgeBaseError(
                    f"A folder has no revision {revision!r}.", file=source, remedy="Leave the revision out."
                )
            kb = cls(source)
        else:
            try:
                with hub_errors(source, revision):
                    folder = huggingface_hub.snapshot_download(
                        source,
                        repo_type="dataset",
                        revision=revision,
                        local_files_only=local_files_only,
                        allow_patterns=[MANIFEST_NAME, "encodings-*.safetensors", "entities-*.parquet"],
                    )
            except HubError as error:
                raise HubError(
                    f"The folder does not exist. As a repository on the Hub: {error.message}",
                    file=source,
                    remedy=f"Check the path. {error.remedy}",
                ) from None
            kb = cls(folder)
            kb._hub_id = source
        if verify:
            kb.verify()
        return kb

    def verify(self) -> None:
        """Reads every file and compares its sha256 with the manifest. Sizes are already compared on opening.

        Raises:
            KnowledgeBaseError: The content of a file has changed, or another process replaced the files.
        """
        entries = [shard[part] for shard in self._manifest["shards"] for part in ("encodings", "entities")]
        for entry in tqdm(entries, desc="Verifying", unit="file", delay=1):
            path = self.path / entry["file"]
            if path.exists() and file_sha256(path) == entry["sha256"]:
                continue
            if manifest_text(self.path) != self._manifest_text:
                raise KnowledgeBaseError(
                    "The knowledge base was changed by another process since it was opened.",
                    file=self.path,
                    remedy="Open it again, and repeat.",
                )
            raise damage_error(path, "its content is not what was written" if path.exists() else "the file is missing")

    def save(self, path: str | os.PathLike[str], *, progress: bool = True) -> KnowledgeBase:
        """Writes a compact copy, without removed entities and with merged shards. It appears only when complete.

        Indexes are not copied, because row numbers change. Build them again for the copy.

        Args:
            path (`str` or `os.PathLike`): The folder. An existing knowledge base, this one included, is replaced.
            progress (`bool`): Whether to show a progress bar.

        Returns:
            [`KnowledgeBase`]: The copy.

        Raises:
            KnowledgeBaseError: `path` is something other than a knowledge base or cannot be written, or this knowledge
                base is damaged.
            LockedError: Another process changes the knowledge base at `path`.
        """
        target = writable_target(Path(path))
        in_place = target.resolve() == self.path.resolve()
        with self.writing() if in_place else lock_existing(target):
            with (
                temporary_folder_beside(target) as work,
                tqdm(total=len(self), desc="Saving", unit="row", delay=1, disable=not progress) as bar,
            ):
                layout = self._manifest["encodings"]
                writer = ShardWriter(work, 0, self.dtype, layout)
                for first in range(0, len(self), 1024):
                    rows = np.arange(first, min(first + 1024, len(self)))
                    writer.add_stored(self._stored_rows(self._active[rows], layout)[0])
                    writer.add_table(self._read_table(rows, self._schema.names))
                    bar.update(len(rows))
                write_manifest(work, self._manifest | {"shards": writer.close(), "removed": []})
                write_left_out_images(work, self.left_out_images)
                install_kb(work, target)
            if in_place:
                self._reload()
        return KnowledgeBase(target)

    def add(
        self,
        entities: EntitiesLike,
        model: Any,
        processor: MelProcessor,
        *,
        posts: str | datasets.Dataset | None = "auto",
        replace: bool = False,
        batch_size: int = 64,
        strict: bool = False,
        mapping: ColumnMapping | None = None,
        progress: bool = True,
    ) -> int:
        """Encodes more entities into a new shard. The folder changes at once; existing entities are not encoded again.

        Args:
            entities, model, processor, posts, batch_size, strict, mapping, progress: As in [`~KnowledgeBase.build`].
            replace (`bool`): Whether an entity whose id exists replaces the old one (at the end of the order) instead of
                raising an error.

        Returns:
            `int`: The number of added entities.

        Raises:
            KnowledgeBaseError: Another model or processor built this knowledge base, or it is the Hub cache.
            LockedError: Another process changes the folder.
            DuplicateIdError: An id exists already, or occurs twice.
            DataFormatError, ImageError: As in [`~KnowledgeBase.build`].
        """
        with self.writing():
            self.check_made_by(model, processor)
            bad_images: list[ImageError] | None = None if strict else []
            source, name = open_entities(entities, bad_images, mapping)
            ids = check_ids(source, name)
            self._check_columns(source, name)
            existing = [entity_id for entity_id in ids if entity_id in self._row_by_id]
            if existing and not replace:
                raise DuplicateIdError(
                    f"The knowledge base already has the id {existing[0]!r}"
                    + (f" (and {len(existing) - 1} more of these)." if len(existing) > 1 else "."),
                    file=name,
                    remedy="Remove the entity first, omit it, or replace it (replace=True, --replace).",
                )
            replaced = self._active[[self._row_by_id[entity_id] for entity_id in existing]]
            inputs = open_inputs(entities, name, model, processor, posts, bad_images)
            left_out = report_bad_images(bad_images)
            with self._new_shards(source, name, inputs, batch_size, progress) as shards:
                write_left_out_images(self.path, self.left_out_images + left_out if left_out else [])
                self._commit({"shards": self._manifest["shards"] + shards}, replaced)
        return len(ids)

    @contextmanager
    def _new_shards(
        self, source: datasets.Dataset, name: str | None, inputs: ModelInputs, batch_size: int, progress: bool
    ) -> Iterator[list[dict[str, Any]]]:
        """Encodes entities into new shards, which the block adds to the manifest."""
        with write_errors(self.path):
            delete_unnamed_entries(self.path, self._manifest, ("encodings-", "entities-", ".adding-"))
            work = Path(tempfile.mkdtemp(prefix=".adding-", dir=self.path))
        try:
            writer = ShardWriter(work, next_shard_number(self.path), self.dtype, self._manifest["encodings"])
            write_encodings(source, name, inputs, writer, batch_size, progress)
            shards = writer.close()
            for entry in (shard[part] for shard in shards for part in ("encodings", "entities")):
                os.replace(work / entry["file"], self.path / entry["file"])
            yield shards
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def update(
        self,
        entities: EntitiesLike,
        model: Any,
        processor: MelProcessor,
        *,
        batch_size: int = 64,
        strict: bool = False,
        mapping: ColumnMapping | None = None,
        progress: bool = True,
    ) -> KnowledgeBaseUpdate:
        """Makes the knowledge base hold exactly the given entities. Only new and changed ones are encoded.

        An entity has changed if a text, its first image or a further column has. Changed and new entities come to the end of the order.
        The others keep their rows in the shards, so that indexes stay valid. The folder changes at once, or not at all.

        Args:
            entities, model, processor, batch_size, strict, mapping, progress: As in [`~KnowledgeBase.build`].

        Returns:
            [`KnowledgeBaseUpdate`]: The ids of what changed.

        Raises:
            KnowledgeBaseError: Another model or processor built this knowledge base, it is the Hub cache, or the model
                represents entities by posts, whose changes the entities do not show.
            LockedError: Another process changes the folder.
            DuplicateIdError, DataFormatError, ImageError: As in [`~KnowledgeBase.build`].
        """
        if knows_posts(model):
            raise KnowledgeBaseError(
                "The model represents entities by the posts about them, so that an update would miss new posts.",
                file=self.path,
                remedy="Build the knowledge base again: hf-mel kb build.",
            )
        with self.writing():
            self.check_made_by(model, processor)
            bad_images: list[ImageError] | None = None if strict else []
            source, name = open_entities(entities, bad_images, mapping)
            ids = check_ids(source, name)
            self._check_columns(source, name)
            left_out = report_bad_images(bad_images)
            stored = self._digests(progress)
            rows = [
                row
                for row, digest in enumerate(source_digests(source, name, progress))
                if stored.get(ids[row]) != digest
            ]
            given = set(ids)
            removed = [entity_id for entity_id in self.entity_ids if entity_id not in given]
            changed = [ids[row] for row in rows if ids[row] in stored]
            added = [ids[row] for row in rows if ids[row] not in stored]
            gone = self._active[[self._row_by_id[entity_id] for entity_id in removed + changed]]
            if rows:
                inputs = open_inputs(entities, name, model, processor, None, None)
                with self._new_shards(source.select(rows), name, inputs, batch_size, progress) as shards:
                    self._commit({"shards": self._manifest["shards"] + shards}, gone)
            elif removed:
                self._commit({}, gone)
            if not left_out:
                (self.path / LEFT_OUT_NAME).unlink(missing_ok=True)
            write_left_out_images(self.path, left_out)
        return KnowledgeBaseUpdate(added, changed, removed, len(ids) - len(rows))

    def _digests(self, progress: bool) -> dict[str, bytes]:
        """Returns a digest of each row as it is stored, by id."""
        digests: dict[str, bytes] = {}
        with tqdm(total=len(self), desc="Comparing", unit="row", delay=1, disable=not progress) as bar:
            for first in range(0, len(self), 1024):
                rows = np.arange(first, min(first + 1024, len(self)))
                for row in self._read_table(rows, self._schema.names).to_pylist():
                    digests[row["entity_id"]] = row_digest(row)
                bar.update(len(rows))
        return digests

    def remove(self, ids: Sequence[str]) -> int:
        """Marks entities as removed, so that they are no longer ranked or shown. The folder changes at once.

        [`~KnowledgeBase.save`] frees their disk space. A removed id may be added again.

        Args:
            ids (sequence of `str`): The ids of the entities.

        Returns:
            `int`: The number of removed entities.

        Raises:
            UnknownEntityError: An id is not in the knowledge base. Nothing is removed.
            KnowledgeBaseError: No entity would remain, or it is the Hub cache.
            LockedError: Another process changes the folder.
        """
        with self.writing():
            rows = sorted({self.row_of(entity_id) for entity_id in ([ids] if isinstance(ids, str) else ids)})
            if len(rows) == len(self):
                raise KnowledgeBaseError(
                    "The removal would leave no entities.", file=self.path, remedy="Delete the folder instead."
                )
            self._commit({}, self._active[rows])
        return len(rows)

    @contextmanager
    def writing(self, *, wait: float = 0.0) -> Iterator[None]:
        """Holds the folder for several changes, or waits until another process has made its own.

        The object first reads the current state of the folder. `add`, `remove`, `save` and
        [`~hf_mel.kb.indexes.build_index`] do this themselves, without waiting.

        ```python
        >>> with kb.writing(wait=60):  # doctest: +SKIP
        ...     kb.remove(["Q42"])
        ...     kb.add("mine.jsonl", model, processor)
        ```

        Args:
            wait (`float`): Seconds to wait for another writer.

        Raises:
            LockedError: Another process changes the folder, after the wait; names it, and since when.
            KnowledgeBaseError: It is the Hub cache, or the folder holds no knowledge base anymore.
            MelError: The folder is read-only.
        """
        self.check_writable()
        writer = (os.getpid(), threading.get_ident())
        if self._writer == writer:
            yield
            return
        with kb_lock(self.path, wait):
            if manifest_text(self.path) != self._manifest_text:
                self._reload()
            self._writer = writer
            try:
                yield
            finally:
                self._writer = None

    def check_made_by(self, model: Any, processor: MelProcessor) -> None:
        """Checks that this model and processor would produce the encodings of this knowledge base.

        Raises:
            KnowledgeBaseError: They would not; the message says what differs.
        """
        built_by = self._manifest["model"]
        difference = model_difference(built_by, describe_model(model))
        culprit = "model"
        if difference is None:
            difference = processor_difference(
                self._manifest["processor"], describe_processor(processor, posts=knows_posts(model))
            )
            culprit = "processor"
        if difference is not None:
            revision = f", revision {built_by['revision']}" if built_by["revision"] else ""
            raise KnowledgeBaseError(
                f"The {culprit} given is not the one that built this knowledge base ({built_by['name']}{revision}): "
                f"{difference}.",
                file=self.path,
                remedy="Use the one that built it, or build the knowledge base again: hf-mel kb build.",
            )

    def check_writable(self) -> None:
        """Checks that the folder may be changed.

        Raises:
            KnowledgeBaseError: The folder is the Hub cache, which other programs share.
        """
        if self._hub_id is not None:
            raise KnowledgeBaseError(
                "The knowledge base is in the Hub cache, which is read-only.",
                file=self._hub_id,
                remedy="Copy it with kb.save(FOLDER), and change the copy.",
            )

    def __len__(self) -> int:
        return len(self._active)

    def __repr__(self) -> str:
        return f"KnowledgeBase({str(self.path)!r}, {len(self):,} entities)"

    @property
    def dtype(self) -> str:
        """The form in which floating-point encodings are stored. They are returned as float32."""
        return self._manifest["dtype"]

    @cached_property
    def entity_ids(self) -> list[str]:
        """The id of every row, [N]."""
        ids: list[str] = []
        for table in self._tables:
            ids += table.read_column("entity_id")
        return ids if len(ids) == len(self) else [ids[physical] for physical in self._active]

    @cached_property
    def _row_by_id(self) -> dict[str, int]:
        return {entity_id: row for row, entity_id in enumerate(self.entity_ids)}

    def row_of(self, entity_id: str) -> int:
        """Returns the row of an entity.

        Raises:
            UnknownEntityError: The entity is not in the knowledge base.
        """
        try:
            return self._row_by_id[entity_id]
        except (KeyError, TypeError):
            raise UnknownEntityError(
                f"The knowledge base has no entity {entity_id!r}.",
                file=self.path,
                remedy=f"Give one of its {len(self):,} ids, for instance {self.entity_ids[0]!r}.",
            ) from None

    def __contains__(self, entity_id: object) -> bool:
        return entity_id in self._row_by_id

    def rows(self, indices: Sequence[int] | np.ndarray, *, further: bool = False) -> list[dict[str, Any]]:
        """Returns the texts of entities: `entity_id`, `name`, `description`, `attributes`, `aliases`.

        Args:
            indices (integers [R]): Rows, in any order.
            further (`bool`): Whether to return also the further columns of their source.
        """
        columns = [name for name in self._schema.names if name != "images"] if further else TEXT_COLUMNS
        return self._read_table(np.asarray(indices, dtype=np.int64), columns).to_pylist()

    def as_dataset(self) -> datasets.Dataset:
        """Returns all entities as rows in the columns of [`~hf_mel.schema.entity_features`], each with its first image."""
        features = entity_features()
        table = self._read_table(np.arange(len(self)), list(features))
        return datasets.Dataset.from_dict(table.to_pydict(), features=features)

    def names(self) -> Iterator[list[str]]:
        """Iterates over the names of every row: the name of the entity, and its aliases."""
        for shard, table in enumerate(self._tables):
            first, stop = np.searchsorted(self._active, self._starts[shard : shard + 2])
            names, aliases = table.read_column("name"), table.read_column("aliases")
            for row in (self._active[first:stop] - self._starts[shard]).tolist():
                yield [names[row], *aliases[row]]

    @cached_property
    def _schema(self) -> pa.Schema:
        """The columns of all shards. A shard that lacks one has nulls there."""
        return pa.unify_schemas([table.schema for table in self._tables])

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The columns to filter by, and their types: the texts of entities, and the further columns of their source."""
        return {field.name: field.type for field in self._schema if field.name != "images"}

    def where(self, text: str) -> np.ndarray:
        """Returns the rows of the entities that pass a filter, ascending.

        Args:
            text (`str`): The filter, such as "type = 'human' and born < 1900" ([`~hf_mel.kb.filters`]).

        Raises:
            FilterError: The filter cannot be read, or names a column that the entities do not have.
        """
        mask = Filter(text, self.columns).mask(self._read_column)
        return np.flatnonzero(np.asarray(mask.to_numpy(zero_copy_only=False))[self._active])

    def _read_column(self, name: str) -> pa.ChunkedArray:
        """Returns a column of all physical rows."""
        column_type = self._schema.field(name).type
        chunks = [chunk for table in self._tables for chunk in table.read_array(name).cast(column_type).chunks]
        return pa.chunked_array(chunks, column_type)

    def _check_columns(self, source: datasets.Dataset, name: str | None) -> None:
        """Checks that further columns of entities to add have the types of those that are there."""
        for column, column_type in further_columns(source).items():
            stored = self.columns.get(column, column_type)
            if stored != column_type:
                raise KnowledgeBaseError(
                    f"The column {column!r} is {column_type}, and in the knowledge base it is {stored}.",
                    file=name,
                    remedy="Give it that type, or another name.",
                )

    def image(self, index: int) -> Image.Image | None:
        """Returns the first image of the entity in a row as RGB, or `None` if it has no image.

        Raises:
            ImageError: The image is damaged.
        """
        row = self._read_table(np.array([index]), ["entity_id", "images"]).to_pylist()[0]
        return open_image(row["images"][0], file=self.path, row=row["entity_id"]) if row["images"] else None

    def encodings(
        self, indices: Sequence[int] | np.ndarray, *, as_stored: bool = False, names: Sequence[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns encodings of entities: CPU tensors with first axis R, floating-point ones as float32.

        Args:
            indices (integers [R]): Rows, in any order.
            as_stored (`bool`): Whether floating-point tensors keep the dtype of the file. Those that are stored in few bits
                are float32 all the same.
            names (sequence of `str`, *optional*): Only these encodings are read. Default: all.
        """
        encodings = self._gather(self._active[np.asarray(indices, dtype=np.int64)], names)
        return encodings if as_stored else as_float(encodings)

    @property
    def converts(self) -> bool:
        """Whether reading converts what is stored in few bits, so that it takes less time to read fewer encodings."""
        return is_quantised(self._manifest["encodings"])

    def iter_chunks(
        self,
        chunk_size: int,
        *,
        rows: range | None = None,
        as_stored: bool = False,
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Iterates over the encodings in row order.

        Args:
            chunk_size (`int`): Rows per chunk, at most.
            rows (`range`, *optional*): Only these rows; a range with step 1.
            as_stored (`bool`): Whether floating-point tensors keep the dtype of the file. A chunk within one shard is
                then a view of the mapped file. Otherwise, and if they are stored in few bits, they are float32.
            names (sequence of `str`, *optional*): Only these encodings are read. Default: all.

        Yields:
            `tuple[int, dict[str, torch.Tensor]]`: The first row of the chunk, and CPU tensors with first axis up to
            `chunk_size`.
        """
        rows = range(len(self)) if rows is None else rows
        for first in range(rows.start, rows.stop, chunk_size):
            encodings = self._gather(self._active[first : min(first + chunk_size, rows.stop)], names)
            yield first, encodings if as_stored else as_float(encodings)

    @property
    def left_out_images(self) -> list[dict[str, Any]]:
        """The images that were missing or damaged when their entities were encoded, so that these go without them.

        Each is a `dict` of the `file` and `row` that named the image (in a data set the id of the entity or post), and
        the `problem`. The folder keeps the list as `left_out_images.jsonl`. It is not published.

        Raises:
            KnowledgeBaseError: The list is damaged.
        """
        return read_left_out_images(self.path)

    def info(self) -> dict[str, Any]:
        """Returns counts, sizes in bytes, dtypes, the model, and the kinds of the indexes that were built."""
        shards = self._manifest["shards"]
        return {
            "path": str(self.path),
            "entities": len(self),
            "removed": len(self._manifest["removed"]),
            "shards": len(shards),
            "encoding_bytes": sum(shard["encodings"]["bytes"] for shard in shards),
            "entity_bytes": sum(shard["entities"]["bytes"] for shard in shards),
            "dtype": self.dtype,
            "encodings": self._manifest["encodings"],
            "model": {k: v for k, v in self._manifest["model"].items() if k != "config"},
            "indexes": sorted(path.stem.removeprefix("index-") for path in self.path.glob("index-*.json")),
        }

    def files(self) -> list[str]:
        """Returns the names of the files of the knowledge base, kb.json first. Indexes are not included."""
        shards = self._manifest["shards"]
        return [MANIFEST_NAME, *(shard[part]["file"] for shard in shards for part in ("encodings", "entities"))]

    # Physical rows, including removed ones. Indexes use these because physical row numbers never change.

    @property
    def shards(self) -> list[tuple[int, str]]:
        """(number of rows, sha256 of the encodings) of each shard. Later states of the folder only append to it."""
        return [(shard["rows"], shard["encodings"]["sha256"]) for shard in self._manifest["shards"]]

    @property
    def tables(self) -> list[str]:
        """The sha256 of the table of entities of each shard: of columns that no model encodes, too."""
        return [shard["entities"]["sha256"] for shard in self._manifest["shards"]]

    @property
    def removed_rows(self) -> list[int]:
        """The physical rows of removed entities."""
        return list(self._manifest["removed"])

    @property
    def num_physical_rows(self) -> int:
        """The number of rows in the shards, including removed ones."""
        return int(self._starts[-1])

    def physical_rows(self, rows: np.ndarray) -> np.ndarray:
        """Maps rows to physical rows."""
        return self._active[rows]

    def rows_of_physical(self, physical: np.ndarray) -> np.ndarray:
        """Maps physical rows to rows. Removed rows, and -1, become -1."""
        if len(self) == self.num_physical_rows:
            return physical
        return np.where(physical < 0, -1, self._row_by_physical[physical])

    @cached_property
    def _row_by_physical(self) -> np.ndarray:
        rows = np.full(self._starts[-1], -1, dtype=np.int64)
        rows[self._active] = np.arange(len(self))
        return rows

    def iter_physical(
        self, first: int, chunk_size: int, *, as_stored: bool = False
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Iterates over the encodings of physical rows, starting at `first`, as [`~KnowledgeBase.iter_chunks`] does."""
        for start in range(first, self.num_physical_rows, chunk_size):
            physical = np.arange(start, min(start + chunk_size, self.num_physical_rows))
            encodings = self._gather(physical)
            yield start, encodings if as_stored else as_float(encodings)

    def _gather(self, physical: np.ndarray, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Returns the encodings of physical rows, in the given order and the dtype of the file; float32 for few bits.

        `names` are those that are read; by default all.
        """
        layout = self._manifest["encodings"]
        if not is_quantised(layout):
            return self._gather_stored(physical, names)
        names = list(layout) if names is None else names
        needed = {name: layout[name] for name in names}
        needed |= {mask: layout[mask] for mask in masks_of(needed).values()}
        stored, order = self._stored_rows(physical, needed)
        restored = dequantised(stored, needed)
        encodings = {name: restored[name] for name in names}
        in_order = (np.diff(order) == 1).all()
        return encodings if in_order else slice_encodings(encodings, torch.from_numpy(np.argsort(order)))

    def _stored_rows(self, physical: np.ndarray, layout: dict[str, Any]) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        """Returns the tensors of the file in physical rows, shard by shard, and the positions in `physical` of these rows."""
        blocks = list(group_by_block(physical, self._starts)) or [(0, np.arange(0))]
        parts = []
        for shard, at in blocks:
            with read_errors(self.path / self._files[shard][0]):
                parts.append(take_rows(self._encodings[shard], physical[at] - self._starts[shard], layout))
        stored = parts[0] if len(parts) == 1 else concat_encodings(parts)
        return stored, np.concatenate([at for _, at in blocks])

    def _gather_stored(self, physical: np.ndarray, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Returns the tensors of the file in physical rows, in the given order; those of `names`, or all.

        Each of the rows has one row in every tensor: the file is not one of few bits.
        """
        blocks = list(group_by_block(physical, self._starts))
        names = list(self._encodings[0]) if names is None else names
        shards = {
            shard: {name: self._encodings[shard][name] for name in names} for shard in {0, *(b for b, _ in blocks)}
        }
        if len(blocks) < 2:
            shard = blocks[0][0] if blocks else 0
            return slice_encodings(shards[shard], as_index(physical - self._starts[shard]))
        gathered = {name: tensor.new_empty((len(physical), *tensor.shape[1:])) for name, tensor in shards[0].items()}
        for shard, at in blocks:
            source, target = as_index(physical[at] - self._starts[shard]), as_index(at)
            for name, tensor in shards[shard].items():
                if isinstance(target, slice) and not isinstance(source, slice):  # copied once
                    torch.index_select(tensor, 0, source, out=gathered[name][target])
                else:
                    gathered[name][target] = tensor[source]
        return gathered

    def _read_table(self, rows: np.ndarray, columns: list[str]) -> pa.Table:
        physical = self._active[rows]
        parts, positions = [self._schema.empty_table().select(columns)], []
        for shard, at in group_by_block(physical, self._starts):
            for table, inside in self._tables[shard].read(physical[at] - self._starts[shard], columns):
                parts.append(table)
                positions.append(at[inside])
        order = np.argsort(np.concatenate(positions)) if positions else np.array([], dtype=np.int64)
        return pa.concat_tables(parts, promote_options="default").take(pa.array(order))

    def _commit(self, changes: dict[str, Any], removed: np.ndarray) -> None:
        all_removed = sorted({*self._manifest["removed"], *removed.tolist()})
        write_manifest(self.path, self._manifest | changes | {"removed": all_removed})
        self._reload()

    # Deprecated members, kept for one release.

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = False) -> KnowledgeBase:
        """Deprecated: use [`~KnowledgeBase.from_pretrained`]."""
        _warn_deprecated("load", "KnowledgeBase.from_pretrained")
        kb = cls(path)
        if verify:
            kb.verify()
        return kb

    def build_index(self, kind: str, model: Any, processor: MelProcessor, **options: Any) -> Any:
        """Deprecated: use [`hf_mel.kb.indexes.build_index`]."""
        return _index_function("build_index")(self, kind, model, processor, **options)

    def open_index(self, kind: str, model: Any, **options: Any) -> Any:
        """Deprecated: use [`hf_mel.kb.indexes.open_index`]."""
        return _index_function("open_index")(self, kind, model, **options)

    def __getattr__(self, name: str) -> Any:
        if name in _RENAMED:
            _warn_deprecated(name, f"KnowledgeBase.{_RENAMED[name]}")
            return getattr(self, _RENAMED[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _warn_deprecated(name: str, replacement: str) -> None:
    warnings.warn(
        f"KnowledgeBase.{name} is deprecated and will be removed in the next release. Use {replacement}.",
        FutureWarning,
        stacklevel=3,
    )


def _index_function(name: str) -> Any:
    warnings.warn(
        f"KnowledgeBase.{name} is deprecated and will be removed in the next release. Use hf_mel.kb.{name}.",
        FutureWarning,
        stacklevel=3,
    )
    # Imported by name: indexes import this module, and these methods go with the next release.
    return getattr(importlib.import_module("hf_mel.kb.indexes"), name)
