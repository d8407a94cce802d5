"""Milvus index: a database file in the folder of the knowledge base (Milvus Lite), or a collection on a server."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from tqdm.auto import tqdm

from hf_mel.errors import KnowledgeBaseError, MissingExtraError
from hf_mel.files import building_folder, write_text
from hf_mel.kb.indexes.base import (
    FIRST_STAGE,
    IndexRecord,
    VectorIndex,
    check_gives_vectors,
    create_record,
    damaged_index_error,
    iter_vectors,
    read_record,
    record_path,
    write_record,
)

if TYPE_CHECKING:
    from hf_mel.kb.knowledge_base import KnowledgeBase

_KIND, _FILE = "milvus", "index-milvus.db"
#: Parameters of the HNSW graph, and the least number of nodes that a search visits.
_HNSW_SETTINGS = {"M": 32, "efConstruction": 100}
_EF_SEARCH = 512
#: Milvus's limit on results per query.
_MAX_RESULTS = 16_384
#: Rows per insertion.
_BATCH_ROWS = 2048
_TIMEOUT_SECONDS = 10


class MilvusIndex(VectorIndex):
    """Index in a collection of a Milvus database, with the fields `row` and `vector` of every physical row.

    The token of a server is read from the environment variable `MILVUS_TOKEN` and never written to disk.

    Args:
        kb, model, record, first_stage: As in [`VectorIndex`].

    Raises:
        KnowledgeBaseError: As in [`VectorIndex`]; also if the collection is missing or incomplete, or the server cannot
            be reached.
        MissingExtraError: pymilvus is not installed.
    """

    def __init__(self, kb: KnowledgeBase, model: Any, record: IndexRecord, first_stage: int = FIRST_STAGE):
        super().__init__(kb, model, record, first_stage)
        uri, self._collection = record.store.get("uri"), record.store.get("collection")
        if not isinstance(uri, str | None) or not isinstance(self._collection, str):
            raise damaged_index_error(record_path(kb.path, _KIND), _KIND, "it names no collection")
        self._address = uri or str(kb.path / _FILE)
        if uri is None and not (kb.path / _FILE).exists():
            raise damaged_index_error(kb.path / _FILE, _KIND, "the file is missing")
        with _milvus_errors(self._address):
            self._client = _connect(self._address)
            if not self._client.has_collection(self._collection):
                raise damaged_index_error(
                    record_path(kb.path, _KIND), _KIND, f"{self._address} has no collection {self._collection}"
                )
            self._client.load_collection(self._collection)
            count = _count_rows(self._client, self._collection)
        if count < record.rows:
            raise damaged_index_error(
                record_path(kb.path, _KIND), _KIND, f"{self._address} holds {count:,} of {record.rows:,} vectors"
            )

    @classmethod
    def build(cls, kb: KnowledgeBase, model: Any, *, uri: str | None = None, progress: bool = True) -> MilvusIndex:
        """Builds the index; see [`~hf_mel.kb.indexes.build_index`]."""
        _import_pymilvus()
        check_gives_vectors(model)
        if uri is not None and (parts := urlsplit(uri)).scheme not in ("http", "https", "tcp", "unix"):
            raise KnowledgeBaseError(
                f"{parts.scheme or uri!r} is not the address of a Milvus server.",
                remedy="Give an address such as http://HOST:19530.",
            )
        if uri is not None and "@" in uri:
            raise KnowledgeBaseError(
                "The address of the Milvus server contains a password, and addresses are stored in the knowledge base.",
                remedy="Remove the password, and set the environment variable MILVUS_TOKEN instead.",
            )
        address = uri or str(kb.path / _FILE)
        record = create_record(kb, model, _KIND)
        # Every state of the knowledge base gets another collection, so that open readers keep the one they use.
        name = _collection_prefix(kb) + hashlib.sha256(json.dumps(kb.shards).encode()).hexdigest()[:16]
        store = {"uri": uri, "collection": name}
        target = kb.path / f"index-{_KIND}"
        with building_folder(target, json.dumps([store, kb.shards])) as stage, _milvus_errors(address):
            client = _connect(address)
            try:
                record = replace(record, settings=_HNSW_SETTINGS, store=store)
                record, first = _find_progress(kb, model, record, client, stage)
                if not first:
                    _create_collection(client, name, record.dim)
                    write_record(stage / "notes", record)
                bar = tqdm(
                    total=kb.num_physical_rows, initial=first, desc=_KIND, unit="entity", delay=1, disable=not progress
                )
                with bar:
                    for start, vectors in iter_vectors(kb, model, first, chunk_size=_BATCH_ROWS):
                        rows = enumerate(record.entity_vectors(vectors), start=start)
                        client.upsert(name, [{"row": row, "vector": vector} for row, vector in rows])
                        write_text(stage / "notes" / "rows.json", [json.dumps(start + len(vectors))])
                        bar.update(len(vectors))
                client.flush(name)
                replaced = _replaced_collections(kb, client, uri)
                write_record(kb.path, replace(record, shards=kb.shards))
                for old in replaced - {name}:
                    client.drop_collection(old)
            finally:
                client.close()
        return cls(kb, model, read_record(kb.path, _KIND))

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Searches the collection; see [`VectorIndex.search`]."""
        # The collection still has removed rows. They are requested in addition and dropped by the caller.
        num_removed = self.kb.num_physical_rows - len(self.kb)
        k = k + num_removed
        if k > _MAX_RESULTS:
            raise KnowledgeBaseError(
                f"Milvus returns {_MAX_RESULTS:,} candidates at most, and {k:,} are needed, of which "
                f"{num_removed:,} for removed entities.",
                file=self.kb.path,
                remedy="Ask for fewer candidates, or make a copy without removed entities (kb.save) and build its index.",
            )
        result = np.full((len(queries), k), -1, dtype=np.int64)
        with _milvus_errors(self._address):
            hits = self._client.search(
                self._collection,
                data=list(queries),
                limit=min(k, _MAX_RESULTS),
                search_params={"metric_type": "IP", "params": {"ef": max(2 * k, _EF_SEARCH)}},
                output_fields=["row"],
            )
        for number, mention_hits in enumerate(hits):
            result[number, : len(mention_hits)] = [hit["row"] for hit in mention_hits]
        return result


def _collection_prefix(kb: KnowledgeBase) -> str:
    """Returns a prefix for the collections of one folder on one machine. Copies of it may share a server."""
    folder = json.dumps([platform.node(), str(kb.path.resolve())])
    return f"hf_mel_{hashlib.sha256(folder.encode()).hexdigest()[:8]}_"


def _import_pymilvus() -> Any:
    try:
        import pymilvus
    except ImportError:
        raise MissingExtraError(
            "This index needs pymilvus, which is not installed.", remedy='Run pip install "hf_mel[milvus]".'
        ) from None
    return pymilvus


def _connect(address: str) -> Any:
    is_server = "://" in address
    token = {"token": os.environ.get("MILVUS_TOKEN", "")} if is_server else {}
    return _import_pymilvus().MilvusClient(address, timeout=_TIMEOUT_SECONDS, **token)


@contextmanager
def _milvus_errors(address: str) -> Iterator[None]:
    """Turns errors of Milvus into [`~hf_mel.errors.KnowledgeBaseError`]."""
    pymilvus = _import_pymilvus()
    try:
        yield
    except pymilvus.exceptions.MilvusException as error:
        is_server = "://" in address
        raise KnowledgeBaseError(
            f"Milvus at {address} reports an error ({' '.join(str(error.message).split())[:200]}).",
            remedy="Check the server, the network and, if the server needs a token, MILVUS_TOKEN. Then repeat."
            if is_server
            else "Check that no other process has the file open and that the disk has room. Then repeat.",
        ) from error


def _create_collection(client: Any, name: str, dim: int) -> None:
    types = _import_pymilvus().DataType
    if client.has_collection(name):
        client.drop_collection(name)
    schema = client.create_schema(auto_id=False)
    schema.add_field("row", types.INT64, is_primary=True)
    schema.add_field("vector", types.FLOAT_VECTOR, dim=dim)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="HNSW", metric_type="IP", params=_HNSW_SETTINGS)
    client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")


def _count_rows(client: Any, name: str) -> int:
    return client.query(name, filter="", output_fields=["count(*)"])[0]["count(*)"]


def _find_progress(
    kb: KnowledgeBase, model: Any, new: IndexRecord, client: Any, stage: Path
) -> tuple[IndexRecord, int]:
    """Returns the record of an interrupted or finished build and its number of rows, or `new` and 0."""
    name, note = new.store["collection"], stage / "notes" / "rows.json"
    try:
        record = read_record(stage / "notes" if note.is_file() else kb.path, _KIND)
    except KnowledgeBaseError:
        return new, 0
    rows = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else record.rows
    is_usable = record.store == new.store and record.covers(kb) and record.fits(kb, model)
    if is_usable and client.has_collection(name) and _count_rows(client, name) >= rows:
        return record, rows
    return new, 0


def _replaced_collections(kb: KnowledgeBase, client: Any, uri: str | None) -> set[str]:
    """Returns the collections that the new index replaces: all in our file, or the previous one on a server."""
    if uri is None:
        return set(client.list_collections())
    try:
        store = read_record(kb.path, _KIND).store
    except KnowledgeBaseError:
        return set()
    is_ours = store.get("uri") == uri and store["collection"].startswith(_collection_prefix(kb))
    return {store["collection"]} if is_ours else set()
