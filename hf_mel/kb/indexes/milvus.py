"""Milvus: a file in the knowledge base's folder (Milvus Lite), or the same client against a server."""

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
    Record,
    VectorIndex,
    check_gives_vectors,
    damaged,
    new_record,
    read_record,
    record_path,
    vectors,
    write_record,
)

if TYPE_CHECKING:
    from hf_mel.kb.knowledge_base import KnowledgeBase

_KIND, _FILE = "milvus", "index-milvus.db"
#: HNSW as for faiss.
_SETTINGS = {"M": 32, "efConstruction": 100}
_EF_SEARCH = 512
#: What Milvus gives at most, and how many rows go there at a time.
_LIMIT, _ROWS = 16_384, 2048
_TIMEOUT = 10


class MilvusIndex(VectorIndex):
    """One collection of a Milvus database, `row` and `vector` of every stored row.

    A server's token is read from the environment variable `MILVUS_TOKEN` and written nowhere.
    """

    def __init__(self, kb: KnowledgeBase, model: Any, record: Record, first_stage: int = FIRST_STAGE):
        super().__init__(kb, model, record, first_stage)
        uri, self._collection = record.store.get("uri"), record.store.get("collection")
        if not isinstance(uri, str | None) or not isinstance(self._collection, str):
            raise damaged(record_path(kb.path, _KIND), _KIND, "it names no collection")
        where = uri or str(kb.path / _FILE)
        if uri is None and not (kb.path / _FILE).exists():
            raise damaged(kb.path / _FILE, _KIND, "the file is missing")
        with _talking_to(where):
            self._client = _client(where)
            if not self._client.has_collection(self._collection):
                raise damaged(record_path(kb.path, _KIND), _KIND, f"{where} has no collection {self._collection}")
            self._client.load_collection(self._collection)
            count = _count(self._client, self._collection)
        if count < record.rows:
            raise damaged(record_path(kb.path, _KIND), _KIND, f"{where} holds {count:,} of {record.rows:,} vectors")
        self._where = where

    @classmethod
    def build(cls, kb: KnowledgeBase, model: Any, *, uri: str | None = None, progress: bool = True) -> MilvusIndex:
        """See [`~hf_mel.KnowledgeBase.build_index`]."""
        _pymilvus()
        check_gives_vectors(model)
        if uri is not None and (parts := urlsplit(uri)).scheme not in ("http", "https", "tcp", "unix"):
            raise KnowledgeBaseError(
                f"{parts.scheme or uri!r} is no address of a Milvus server.", remedy="It looks like http://HOST:19530."
            )
        if uri is not None and "@" in uri:
            raise KnowledgeBaseError(
                "the address of a Milvus server is kept in the knowledge base, and this one has a password in it.",
                remedy="Give it without, and the token in the environment variable MILVUS_TOKEN.",
            )
        where = uri or str(kb.path / _FILE)
        record = new_record(kb, model, _KIND)
        # A collection of its own for every state of the knowledge base: readers of an older one keep theirs till the end.
        name = _owner(kb) + hashlib.sha256(json.dumps(kb.shards).encode()).hexdigest()[:16]
        store = {"uri": uri, "collection": name}
        target = kb.path / f"index-{_KIND}"
        with building_folder(target, json.dumps([store, kb.shards])) as stage, _talking_to(where):
            client = _client(where)
            try:
                record, first = _begun(kb, model, replace(record, settings=_SETTINGS, store=store), client, stage)
                if not first:
                    _create(client, name, record.dim)
                    write_record(stage / "notes", record)
                bar = tqdm(total=kb.stored, initial=first, desc=_KIND, unit="entity", delay=1, disable=not progress)
                with bar:
                    for start, part in vectors(kb, model, first, chunk_size=_ROWS):
                        client.upsert(
                            name,
                            [{"row": start + k, "vector": vector} for k, vector in enumerate(record.entities(part))],
                        )
                        write_text(stage / "notes" / "rows.json", [json.dumps(start + len(part))])
                        bar.update(len(part))
                client.flush(name)
                replaced = _replaced(kb, client, uri)
                write_record(kb.path, replace(record, shards=kb.shards))
                for old in replaced - {name}:
                    client.drop_collection(old)
            finally:
                client.close()
        return cls(kb, model, read_record(kb.path, _KIND))

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """See [`VectorIndex`]."""
        # Removed rows are still there: so many more are asked for, and dropped by the caller.
        k = k + self.kb.stored - len(self.kb)
        if k > _LIMIT:
            raise KnowledgeBaseError(
                f"Milvus gives {_LIMIT:,} candidates at most, and {k:,} are needed, of which "
                f"{self.kb.stored - len(self.kb):,} for removed entities.",
                file=self.kb.path,
                remedy="Ask for fewer, or make a copy without the removed ones (kb.save) and build its index.",
            )
        found = np.full((len(queries), k), -1, dtype=np.int64)
        with _talking_to(self._where):
            hits = self._client.search(
                self._collection,
                data=list(queries),
                limit=min(k, _LIMIT),
                search_params={"metric_type": "IP", "params": {"ef": max(2 * k, _EF_SEARCH)}},
                output_fields=["row"],
            )
        for each, of_mention in zip(found, hits, strict=True):
            rows = [hit["row"] for hit in of_mention]
            each[: len(rows)] = rows
        return found


def _owner(kb: KnowledgeBase) -> str:
    """What the names of a folder's collections begin with: copies of a knowledge base may share a server."""
    place = json.dumps([platform.node(), str(kb.path.resolve())])
    return f"hf_mel_{hashlib.sha256(place.encode()).hexdigest()[:8]}_"


def _pymilvus() -> Any:
    try:
        import pymilvus
    except ImportError:
        raise MissingExtraError(
            "This index needs pymilvus, which is not installed.", remedy='Run pip install "hf_mel[milvus]".'
        ) from None
    return pymilvus


def _client(where: str) -> Any:
    remote = "://" in where
    token = {"token": os.environ.get("MILVUS_TOKEN", "")} if remote else {}
    return _pymilvus().MilvusClient(where, timeout=_TIMEOUT, **token)


@contextmanager
def _talking_to(where: str) -> Iterator[None]:
    pymilvus = _pymilvus()
    try:
        yield
    except pymilvus.exceptions.MilvusException as error:
        remote = "://" in where
        raise KnowledgeBaseError(
            f"Milvus at {where} does not answer as it should ({' '.join(str(error.message).split())[:200]}).",
            remedy="Check that the server runs and can be reached, and MILVUS_TOKEN if it wants one; then repeat."
            if remote
            else "Check that no other process has the file open and that the disk has room; then repeat.",
        ) from error


def _create(client: Any, name: str, dim: int) -> None:
    types = _pymilvus().DataType
    if client.has_collection(name):
        client.drop_collection(name)
    schema = client.create_schema(auto_id=False)
    schema.add_field("row", types.INT64, is_primary=True)
    schema.add_field("vector", types.FLOAT_VECTOR, dim=dim)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="HNSW", metric_type="IP", params=_SETTINGS)
    client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")


def _count(client: Any, name: str) -> int:
    return client.query(name, filter="", output_fields=["count(*)"])[0]["count(*)"]


def _begun(kb: KnowledgeBase, model: Any, new: Record, client: Any, stage: Path) -> tuple[Record, int]:
    """What an interrupted build began, or the finished index; and how many rows of it are there. Or `new`, and none."""
    name, note = new.store["collection"], stage / "notes" / "rows.json"
    try:
        record = read_record(stage / "notes" if note.is_file() else kb.path, _KIND)
    except KnowledgeBaseError:
        return new, 0
    rows = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else record.rows
    right = record.store == new.store and record.covers(kb) and record.fits(kb, model)
    there = right and client.has_collection(name) and _count(client, name) >= rows
    return (record, rows) if there else (new, 0)


def _replaced(kb: KnowledgeBase, client: Any, uri: str | None) -> set[str]:
    """Collections that nobody needs once the index is there: all of a file of ours, the one before on a server."""
    if uri is None:
        return set(client.list_collections())
    try:
        store = read_record(kb.path, _KIND).store
    except KnowledgeBaseError:
        return set()
    ours = store.get("uri") == uri and store["collection"].startswith(_owner(kb))
    return {store["collection"]} if ours else set()
