"""A knowledge base on disk: entities, and what a model keeps of each to score it.

A knowledge base is a folder:

- `kb.json`: everything else by name, size and sha256; which model and processor made it; which rows are removed;
- `encodings-00000.safetensors`, …: the encodings of the rows of one shard, memory-mapped when read;
- `entities-00000.parquet`, …: the same rows in the columns of [`~hf_mel.schema.entity_features`], the first image only;
- `index-….json` and what it names, if an index was built: see [`~hf_mel.kb.indexes.base`].

A file is never changed once `kb.json` names it. Adding writes one more shard, removing marks rows, and either takes
effect when a new `kb.json` is renamed into place: a reader, or a crash, sees the state before or the state after.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors import safe_open
from tqdm.auto import tqdm

from hf_mel.data.images import open_image
from hf_mel.errors import (
    DuplicateIdError,
    HubError,
    KnowledgeBaseError,
    UnknownEntityError,
)
from hf_mel.files import building_folder, file_sha256, replace_folder, writing
from hf_mel.hub_errors import hub_errors
from hf_mel.inference.encode import encode_batches
from hf_mel.inference.encodings import as_float, concat_encodings, num_rows, slice_encodings
from hf_mel.inference.features.post_prototypes import Prototypes, knows_posts
from hf_mel.inference.fingerprint import (
    describe_model,
    describe_processor,
    model_difference,
    processor_difference,
)
from hf_mel.kb.entities import _TEXT_COLUMNS, EntitiesLike, _as_stored, _checked_ids, _content_sha256, _entity_rows
from hf_mel.kb.manifest import _FORMAT, _MANIFEST, _VERSION, DTYPES, _damaged, _read_manifest, _write_manifest
from hf_mel.kb.shards import _by_block, _check_finite, _check_parquet, _decoded, _reading, _schema, _ShardWriter
from hf_mel.protocols import MelProcessor

if TYPE_CHECKING:
    from hf_mel.kb.indexes.base import Index


#: Two plain names: a path of that form that is not there is taken for an id.
_REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


class KnowledgeBase:
    """N entities and their encodings in a folder, in a fixed order; row numbers count the entities that are there.

    ```python
    >>> kb = KnowledgeBase.build("data/wikimel", model, processor, output="kb/wikimel")  # doctest: +SKIP
    >>> kb.add("mine.jsonl", model, processor)  # doctest: +SKIP
    >>> kb.remove(["Q42"])  # doctest: +SKIP
    >>> kb = KnowledgeBase.load("kb/wikimel")  # doctest: +SKIP
    ```

    It is made by [`~KnowledgeBase.build`], [`~KnowledgeBase.load`] or [`~KnowledgeBase.from_pretrained`]. `add` and `remove` change the folder itself, at
    once and atomically; there is nothing to save afterwards. A folder has one writer at a time (a second one is
    refused) and any number of readers.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._temporary: tempfile.TemporaryDirectory | None = None  # holds a folder that nobody named
        self._downloaded: str | None = None  # the Hub id, if the folder is the client's cache, which is not ours
        self.path = Path(path)
        self._read()

    def _read(self) -> None:
        self._written, self._manifest = _read_manifest(self.path)
        sizes = [shard["rows"] for shard in self._manifest["shards"]]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        here = np.ones(self._starts[-1], dtype=bool)
        here[self._manifest["removed"]] = False
        self._active = np.flatnonzero(here)  # physical row of each row
        self._tensors: dict[int, dict[str, torch.Tensor]] = {}
        self._parquets: dict[int, tuple[pq.ParquetFile, np.ndarray]] = {}
        for name in ("entity_ids", "_rows_by_id", "_rows_by_stored"):
            self.__dict__.pop(name, None)

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
        progress: bool = True,
    ) -> KnowledgeBase:
        """Encodes entities, batch by batch, into a new folder that appears whole or not at all.

        Memory holds one shard, whatever the number of entities. Images are decoded as they are needed, and not at
        all for a processor that does not look at them. A build that was interrupted goes on with the first shard it
        had not finished when the same entities are built into the same `output` again, with the same model.

        Args:
            entities ([`EntitiesLike`]): A data set's folder or Hub id, a .jsonl or .csv file of your own entities
                ([`~hf_mel.data.loading.read_entity_file`]), or a `datasets.Dataset` with
                the columns of [`~hf_mel.schema.entity_features`].
            model ([`~hf_mel.protocols.Retriever`]): What encodes them, in eval mode.
            processor ([`~hf_mel.protocols.MelProcessor`]): What prepares them; it has to pad all batches alike.
            output (`str` or `os.PathLike`, *optional*): The folder. A knowledge base that is there is replaced.
                Default: a temporary folder that goes when the object does.
            posts (`str` or `datasets.Dataset`, *optional*): What a model knows its entities by, if it knows them by
                posts; see [`~hf_mel.inference.features.post_prototypes.Prototypes.from_data`].
            batch_size (`int`): Entities per forward pass.
            dtype (`str`): `"float32"`, `"float16"` or `"bfloat16"`, the type floating-point encodings are stored in.
            progress (`bool`): Whether to show a progress bar.

        Returns:
            [`KnowledgeBase`] of N entities in the order given.

        Raises:
            KnowledgeBaseError: No entities; `output` is something else; the model is no retriever, or gives encodings
                that are not finite in `dtype` or change shape between batches.
            MelError: Another process builds into `output`.
            DuplicateIdError: An id occurs twice.
            DataFormatError: Columns or ids are missing.
            ImageError: An image is missing or damaged.
        """
        if dtype not in DTYPES:
            raise KnowledgeBaseError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}.")
        temporary = tempfile.TemporaryDirectory(prefix="hf_mel-kb-") if output is None else None
        target = Path(temporary.name, "kb") if temporary else Path(os.fspath(output))  # type: ignore[arg-type]
        _check_target(target)
        source, name = _entity_rows(entities)
        _checked_ids(source, name)
        prototypes = Prototypes.from_data(None if name is None else entities, model, processor, posts)  # type: ignore[arg-type]
        made_by = {
            "model": describe_model(model),
            "processor": describe_processor(processor, posts=prototypes is not None),
        }
        known_by = None if prototypes is None or prototypes.posts is None else _content_sha256(prototypes.posts)
        fingerprint = json.dumps(
            {**made_by, "dtype": dtype, "entities": _content_sha256(source), "posts": known_by}, sort_keys=True
        )
        with building_folder(target, fingerprint) as stage:
            work = stage / "kb"
            work.mkdir(exist_ok=True)
            writer = _ShardWriter(work, 0, dtype, notes=stage / "notes")
            if writer.done:
                print(f"{target}: an interrupted build goes on; {writer.done:,} entities are there.", file=sys.stderr)
            rest = source.select(range(writer.done, len(source)))
            if len(rest):
                _encode(rest, name, model, processor, prototypes, writer, batch_size, progress)
            shards = writer.close()
            _write_manifest(
                work,
                {
                    "format": _FORMAT,
                    "version": _VERSION,
                    **made_by,
                    "dtype": dtype,
                    "encodings": writer.layout,
                    "shards": shards,
                    "removed": [],
                },
            )
            with writing(target):
                replace_folder(work, target)
        kb = cls(target)
        kb._temporary = temporary
        return kb

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = False) -> KnowledgeBase:
        """Opens a folder; encodings stay on disk and are memory-mapped, shard by shard, when they are first read.

        Args:
            path (`str` or `os.PathLike`): The folder.
            verify (`bool`): Also compare the sha256 of every file, which reads all of them. Sizes are always compared.

        Raises:
            KnowledgeBaseError: No knowledge base there, a file is missing, cut off or not the one that was written.
        """
        kb = cls(path)
        if verify:
            files = [shard[part] for shard in kb._manifest["shards"] for part in ("encodings", "entities")]
            for entry in tqdm(files, desc="Verifying", unit="file", delay=1):
                if file_sha256(kb.path / entry["file"]) != entry["sha256"]:
                    raise _damaged(kb.path / entry["file"], "its content is not what was written")
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
        """Opens a folder, or a knowledge base on the Hub, which is downloaded into the client's cache and mapped there.

        One from the Hub cannot be changed in place; [`~KnowledgeBase.save`] makes a copy that can.

        Args:
            name (`str` or `os.PathLike`): A folder, or the id of a data-set repository that holds a knowledge base.
            revision (`str`, *optional*): Branch, tag or commit, for one on the Hub.
            local_files_only (`bool`): Take what is in the cache and do not ask the Hub.
            verify (`bool`): As in [`~KnowledgeBase.load`].

        Raises:
            KnowledgeBaseError: As in [`~KnowledgeBase.load`]; also a revision of a folder.
            HubError: The Hub has no such repository or revision, or not for this account, or cannot be reached.
        """
        source = os.fspath(name)
        if Path(source).exists() or not _REPO_ID.fullmatch(source):
            if revision is not None:
                raise KnowledgeBaseError(f"is a folder, and has no revision {revision!r}.", file=source)
            return cls.load(source, verify=verify)
        try:
            with hub_errors(source, revision):
                folder = huggingface_hub.snapshot_download(
                    source,
                    repo_type="dataset",
                    revision=revision,
                    local_files_only=local_files_only,
                    allow_patterns=[_MANIFEST, "encodings-*.safetensors", "entities-*.parquet"],
                )
        except HubError as error:
            raise HubError(
                f"there is no such folder here; on the Hub: {error.message}",
                file=source,
                remedy=error.remedy,
            ) from None
        kb = cls.load(folder, verify=verify)
        kb._downloaded = source
        return kb

    def save(self, path: str | os.PathLike[str], *, progress: bool = True) -> KnowledgeBase:
        """Writes a compact copy: removed entities left out, shards merged. The folder appears whole or not at all.

        The copy has no index: rows have other numbers there, so it is built again.

        Args:
            path (`str` or `os.PathLike`): The folder. A knowledge base that is there is replaced; this one's own
                folder may be given, too.
            progress (`bool`): Whether to show a progress bar.

        Returns:
            [`KnowledgeBase`]: the copy.

        Raises:
            KnowledgeBaseError: `path` is something else, cannot be written, or this knowledge base is damaged.
        """
        target = Path(path)
        _check_target(target)
        own = target.resolve() == self.path.resolve()
        if own:
            self._check_unchanged()
        with (
            _staging(target) as work,
            tqdm(total=len(self), desc="Saving", unit="row", delay=1, disable=not progress) as bar,
        ):
            writer = _ShardWriter(work, 0, self.dtype)
            for first, encodings in self._stored_chunks(1024):
                rows = np.arange(first, first + num_rows(encodings))
                writer.add(encodings, self._table(rows, [*_TEXT_COLUMNS, "images"]))
                bar.update(len(rows))
            _write_manifest(work, self._manifest | {"shards": writer.close(), "removed": []})
            if own:
                self._check_unchanged()
        if own:
            self._read()
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
        progress: bool = True,
    ) -> int:
        """Encodes more entities into a new shard; the ones there are not touched. The folder changes at once.

        Args:
            entities, model, processor, posts, batch_size, progress: As in [`~KnowledgeBase.build`].
            replace (`bool`): An entity whose id is there takes the place of the old one, at the end of the order,
                instead of being an error.

        Returns:
            `int`: how many entities were added.

        Raises:
            KnowledgeBaseError: Another model or processor made this knowledge base, or somebody changed it meanwhile.
            DuplicateIdError: An id is there already, or occurs twice.
            DataFormatError, ImageError: As in [`~KnowledgeBase.build`].
        """
        self._check_ours()
        self.check_made_by(model, processor)
        source, name = _entity_rows(entities)
        ids = _checked_ids(source, name)
        known = [entity_id for entity_id in ids if entity_id in self._rows_by_id]
        if known and not replace:
            raise DuplicateIdError(
                f"the knowledge base has {known[0]!r} already"
                + (f" (and {len(known) - 1} more of these)." if len(known) > 1 else "."),
                file=name,
                remedy="Remove it first, leave it out, or replace it (replace=True, --replace).",
            )
        replaced = self._active[[self._rows_by_id[entity_id] for entity_id in known]]
        work = Path(tempfile.mkdtemp(prefix=".adding-", dir=self.path))
        try:
            writer = _ShardWriter(work, len(self._manifest["shards"]), self.dtype, self._manifest["encodings"])
            prototypes = Prototypes.from_data(None if name is None else entities, model, processor, posts)  # type: ignore[arg-type]
            _encode(source, name, model, processor, prototypes, writer, batch_size, progress)
            shards = writer.close()
            self._check_unchanged()
            for entry in (shard[part] for shard in shards for part in ("encodings", "entities")):
                os.replace(work / entry["file"], self.path / entry["file"])
            self._commit({"shards": self._manifest["shards"] + shards}, replaced)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return len(ids)

    def remove(self, ids: Sequence[str]) -> int:
        """Marks entities as removed; nothing ranks or shows them any more. The folder changes at once.

        [`~KnowledgeBase.save`] is what gives their bytes back. A removed id may be added again.

        Args:
            ids (sequence of `str`): Which.

        Returns:
            `int`: how many entities were removed.

        Raises:
            UnknownEntityError: An id is not in the knowledge base; nothing is removed.
            KnowledgeBaseError: None would be left, or somebody changed the folder meanwhile.
        """
        self._check_ours()
        rows = sorted({self.row_of(entity_id) for entity_id in ([ids] if isinstance(ids, str) else ids)})
        if len(rows) == len(self):
            raise KnowledgeBaseError(
                "nothing would be left of the knowledge base.", file=self.path, remedy="Delete the folder instead."
            )
        self._check_unchanged()
        self._commit({}, self._active[rows])
        return len(rows)

    def check_made_by(self, model: Any, processor: MelProcessor) -> None:
        """Checks that this model and this processor would make these encodings.

        Raises:
            KnowledgeBaseError: They would not; the message says what differs.
        """
        made = self._manifest["model"]
        difference = model_difference(made, describe_model(model))
        culprit = "model"
        if difference is None:
            difference = processor_difference(
                self._manifest["processor"], describe_processor(processor, posts=knows_posts(model))
            )
            culprit = "processor"
        if difference is not None:
            revision = f", revision {made['revision']}" if made["revision"] else ""
            raise KnowledgeBaseError(
                f"the {culprit} given is not the one that built this knowledge base ({made['name']}{revision}): "
                f"{difference}.",
                file=self.path,
                remedy="Use that one, or build the knowledge base again: hf-mel kb build.",
            )

    def build_index(
        self, kind: str, model: Any, processor: MelProcessor, *, uri: str | None = None, progress: bool = True
    ) -> Index:
        """Builds an index, which finds candidates in much less time than it takes to score every entity.

        It is kept beside the knowledge base and takes the place of one of the same kind. Entities that were added
        since are added to the one that is there; Milvus gets all of them anew. A build that was interrupted goes on.

        Args:
            kind (`str`): One of [`~hf_mel.kb.indexes.KINDS`] other than "exact".
            model ([`~hf_mel.protocols.Retriever`]): The one that built this knowledge base; it gives vectors for a first
                stage (`index_vectors`).
            processor ([`~hf_mel.protocols.MelProcessor`]): Its processor.
            uri (`str`, *optional*): Of a Milvus server, for "milvus". Default: a file in the knowledge base's folder.
            progress (`bool`): Whether to show a progress bar.

        Raises:
            KnowledgeBaseError: An unknown kind, another model, one that gives no vectors, no room on the disk, or a
                server that cannot be reached. An index that was there stays.
            MissingExtraError: The index needs a package that is not installed.
            MelError: Another process builds this index.
        """
        from hf_mel.linking import indexes

        self._check_ours()
        self.check_made_by(model, processor)
        return indexes.build_index(self, kind, model, uri=uri, progress=progress)

    def open_index(self, kind: str, model: Any, *, first_stage: int | None = None) -> Index:
        """What finds the entities of mentions: an index that was built, or "exact", which needs none.

        Args:
            kind (`str`): One of [`~hf_mel.kb.indexes.KINDS`].
            model ([`~hf_mel.protocols.Retriever`]): The one that built this knowledge base.
            first_stage (`int`, *optional*): How many candidates the index finds for the model to score. Default:
                [`~hf_mel.kb.indexes.base.FIRST_STAGE`].

        Raises:
            KnowledgeBaseError: No such index, a damaged one, or one of other encodings.
            MissingExtraError: As in [`~KnowledgeBase.build_index`].
        """
        from hf_mel.linking import indexes

        return indexes.open_index(self, kind, model, first_stage=first_stage)

    def __len__(self) -> int:
        return len(self._active)

    def __repr__(self) -> str:
        return f"KnowledgeBase({str(self.path)!r}, {len(self):,} entities)"

    @property
    def dtype(self) -> str:
        """What floating-point encodings are stored in; they are always given as float32."""
        return self._manifest["dtype"]

    @cached_property
    def entity_ids(self) -> list[str]:
        """The id of every row, [N]."""
        ids: list[str] = []
        for shard in range(len(self._manifest["shards"])):
            with _reading(self._file(shard, "entities")):
                table = self._parquet(shard)[0].read(columns=["entity_id"])
                ids += _decoded(table, self._file(shard, "entities")).column(0).to_pylist()
        return ids if len(ids) == len(self) else [ids[row] for row in self._active]

    @cached_property
    def _rows_by_id(self) -> dict[str, int]:
        return {entity_id: row for row, entity_id in enumerate(self.entity_ids)}

    def row_of(self, entity_id: str) -> int:
        """The row number of an entity.

        Raises:
            UnknownEntityError: It is not in the knowledge base.
        """
        try:
            return self._rows_by_id[entity_id]
        except (KeyError, TypeError):
            raise UnknownEntityError(
                f"there is no entity {entity_id!r} in the knowledge base.",
                file=self.path,
                remedy=f"Its {len(self):,} ids look like {self.entity_ids[0]!r}.",
            ) from None

    def __contains__(self, entity_id: object) -> bool:
        return entity_id in self._rows_by_id

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Entity rows to show: `entity_id`, `name`, `description`, `attributes`, `aliases`.

        Args:
            indices (integers [R]): Row numbers, in any order.
        """
        return self._table(np.asarray(indices, dtype=np.int64), _TEXT_COLUMNS).to_pylist()

    def image(self, index: int) -> Image.Image | None:
        """The first image of the entity in a row, RGB; `None` if it has none.

        Raises:
            ImageError: It is damaged.
        """
        row = self._table(np.array([index]), ["entity_id", "images"]).to_pylist()[0]
        return open_image(row["images"][0], file=self.path, row=row["entity_id"]) if row["images"] else None

    def encodings(self, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Encodings of some entities: tensors with first axis R, on the CPU, floating point as float32.

        Args:
            indices (integers [R]): Row numbers, in any order.
        """
        return as_float(self._stored(np.asarray(indices, dtype=np.int64)))

    def iter_chunks(
        self, chunk_size: int, *, rows: range | None = None, as_stored: bool = False
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Yields (number of the first row, encodings of up to `chunk_size` rows), in row order and without gaps.

        Tensors are on the CPU, floating point as float32 or, `as_stored`, as it is in the file; a chunk of a shard whose
        type that is, is a view of the mapped file. `rows` (without a step) limits it to some.
        """
        for first, encodings in self._stored_chunks(chunk_size, rows):
            yield first, encodings if as_stored else as_float(encodings)

    def info(self) -> dict[str, Any]:
        """What it is made of: counts, sizes in bytes, types, model."""
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
        """Names of the files the knowledge base is made of, kb.json first. An index is not part of it."""
        shards = self._manifest["shards"]
        return [_MANIFEST, *(shard[part]["file"] for shard in shards for part in ("encodings", "entities"))]

    # What an index sees: rows as they are stored, the removed ones too. Their numbers stay when entities come and go.

    @property
    def shards(self) -> list[tuple[int, str]]:
        """Rows and sha256 of the encodings of each shard: of an older state, a part from the start."""
        return [(shard["rows"], shard["encodings"]["sha256"]) for shard in self._manifest["shards"]]

    @property
    def stored(self) -> int:
        """How many rows are stored."""
        return int(self._starts[-1])

    def rows_of_stored(self, stored: np.ndarray) -> np.ndarray:
        """Row numbers of stored rows; -1 for a removed one, and for -1."""
        if len(self) == self.stored:
            return stored
        return np.where(stored < 0, -1, self._rows_by_stored[stored])

    @cached_property
    def _rows_by_stored(self) -> np.ndarray:
        rows = np.full(self._starts[-1], -1, dtype=np.int64)
        rows[self._active] = np.arange(len(self))
        return rows

    def iter_stored(self, first: int, chunk_size: int) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """As [`~KnowledgeBase.iter_chunks`], of stored rows from `first` on."""
        for start in range(first, self.stored, chunk_size):
            yield start, as_float(self._gather(np.arange(start, min(start + chunk_size, self.stored))))

    def _stored_chunks(
        self, chunk_size: int, rows: range | None = None
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        rows = range(len(self)) if rows is None else rows
        for first in range(rows.start, rows.stop, chunk_size):
            yield first, self._stored(np.arange(first, min(first + chunk_size, rows.stop)))

    def _stored(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        return self._gather(self._active[rows])

    def _gather(self, stored: np.ndarray) -> dict[str, torch.Tensor]:
        parts, places = [], []
        for shard, where in _by_block(stored, self._starts):
            local = stored[where] - self._starts[shard]
            tensors = self._shard_tensors(shard)
            if local[-1] - local[0] + 1 == len(local) and (np.diff(local) == 1).all():
                parts.append(slice_encodings(tensors, slice(int(local[0]), int(local[-1]) + 1)))
            else:
                parts.append(slice_encodings(tensors, torch.from_numpy(local)))
            places.append(where)
        if not parts:
            return slice_encodings(self._shard_tensors(0), slice(0, 0))
        order = np.concatenate(places)
        joined = parts[0] if len(parts) == 1 else concat_encodings(parts)
        return joined if (np.diff(order) > 0).all() else slice_encodings(joined, torch.from_numpy(np.argsort(order)))

    def _table(self, rows: np.ndarray, columns: list[str]) -> pa.Table:
        stored = self._active[rows]
        parts, places = [_schema().empty_table().select(columns)], []
        for shard, where in _by_block(stored, self._starts):
            local = stored[where] - self._starts[shard]
            with _reading(self._file(shard, "entities")):
                file, starts = self._parquet(shard)
                for group, inside in _by_block(local, starts):
                    # One thread: a group of texts is read in less time than threads take to start.
                    table = file.read_row_group(group, columns=columns, use_threads=False).select(columns)
                    taken = table.take(pa.array(local[inside] - starts[group]))
                    parts.append(_decoded(taken, self._file(shard, "entities")))
                    places.append(where[inside])
        order = np.argsort(np.concatenate(places)) if places else np.array([], dtype=np.int64)
        return pa.concat_tables(parts).take(pa.array(order))

    def _file(self, shard: int, part: str) -> Path:
        return self.path / self._manifest["shards"][shard][part]["file"]

    def _shard_tensors(self, shard: int) -> dict[str, torch.Tensor]:
        if shard not in self._tensors:
            path, rows = self._file(shard, "encodings"), self._manifest["shards"][shard]["rows"]
            with _reading(path), safe_open(path, framework="pt") as file:
                # Mapped: a tensor's pages are read when they are used, and the system drops them when memory is short.
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()}
            layout = self._manifest["encodings"]
            if found != {name: (spec["dtype"], [rows, *spec["shape"]]) for name, spec in layout.items()}:
                raise _damaged(path, f"its tensors are not those {_MANIFEST} tells of")
            self._tensors[shard] = tensors
        return self._tensors[shard]

    def _parquet(self, shard: int) -> tuple[pq.ParquetFile, np.ndarray]:
        """The file of a shard, and the first row of each of its row groups."""
        if shard not in self._parquets:
            path = self._file(shard, "entities")
            with _reading(path):
                file = pq.ParquetFile(path, memory_map=True)
                _check_parquet(file, path)
                # Read as dictionaries, a text that is there a million times takes its bytes once: see _decoded.
                texts = [file.schema.column(i).path for i in range(len(file.schema))]
                file = pq.ParquetFile(path, memory_map=True, metadata=file.metadata, read_dictionary=texts)
            if file.metadata.num_rows != self._manifest["shards"][shard]["rows"]:
                raise _damaged(path, f"it has {file.metadata.num_rows} rows, not those {_MANIFEST} tells of")
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            self._parquets[shard] = file, np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        return self._parquets[shard]

    def _check_ours(self) -> None:
        if self._downloaded is not None:
            raise KnowledgeBaseError(
                "was downloaded from the Hub, and is not changed in the cache.",
                file=self._downloaded,
                remedy="Make a copy of your own with kb.save(FOLDER), and change that.",
            )

    def _check_unchanged(self) -> None:
        if _read_manifest(self.path)[0] != self._written:
            raise KnowledgeBaseError(
                "the knowledge base was changed by somebody else since it was loaded.",
                file=self.path,
                remedy="Load it again and repeat.",
            )

    def _commit(self, changes: dict[str, Any], removed: np.ndarray) -> None:
        marked = sorted({*self._manifest["removed"], *removed.tolist()})
        _write_manifest(self.path, self._manifest | changes | {"removed": marked})
        self._read()


def _encode(
    source: datasets.Dataset,
    name: str | None,
    model: Any,
    processor: MelProcessor,
    prototypes: Prototypes | None,
    writer: _ShardWriter,
    batch_size: int,
    progress: bool,
) -> None:
    if not hasattr(model, "encode_entities"):
        raise KnowledgeBaseError(
            f"{type(model).__name__} does not encode entities by themselves.",
            remedy="A knowledge base needs a retriever; a reranker orders the candidates a retriever finds.",
        )
    schema = _schema()
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        first = 0
        stored = source.with_format("arrow")  # plain formatting would decode every image
        batches = encode_batches(
            model, processor, source, "entities", prototypes=prototypes, batch_size=batch_size, progress=progress
        )
        for encodings in batches:
            columns = _as_stored(stored[first : first + batch_size].to_pydict(), name)
            ids = columns["entity_id"]
            if num_rows(encodings) != len(ids):
                raise KnowledgeBaseError(f"the model gave {num_rows(encodings)} encodings of {len(ids)} entities.")
            _check_finite(encodings, writer.dtype, ids, name)
            writer.add(encodings, pa.Table.from_pydict(columns, schema=schema))
            first += len(ids)
    finally:
        if training:
            model.train()


def _check_target(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise KnowledgeBaseError("is there and is not a folder.", file=target, remedy="Choose another output.")
    if target.exists() and any(target.iterdir()) and not (target / _MANIFEST).is_file():
        raise KnowledgeBaseError(
            "is not empty and is not a knowledge base.", file=target, remedy="Choose another output."
        )


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place if the block succeeds, and vanishes if it does not."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        with writing(target):
            work.chmod(0o755)  # mkdtemp makes it private
            replace_folder(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
