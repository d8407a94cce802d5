"""Indexes of faiss: one file of vectors or their codes, memory-mapped when it is read."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from hf_mel.errors import KnowledgeBaseError, MissingExtraError
from hf_mel.files import building_folder, file_sha256, sealed, writing
from hf_mel.kb.indexes.base import (
    FIRST_STAGE,
    Record,
    VectorIndex,
    check_gives_vectors,
    damaged,
    new_record,
    read_record,
    record_path,
    sample,
    vectors,
    write_record,
)

if TYPE_CHECKING:
    from hf_mel.kb.knowledge_base import KnowledgeBase

#: HNSW: links of a node, candidates while a link is looked for, and while an entity is (at least; twice those wanted).
_LINKS, _EF_BUILD, _EF_SEARCH = 32, 100, 512
#: IVF: rows per centroid that k-means sees, and the share and least number of lists that a search looks into.
_ROWS_PER_LIST, _PROBED, _LEAST_PROBED = 64, 1 / 16, 32
#: PQ: coordinates that share a code of four bits, and rows that k-means sees.
_PER_CODE, _CODE_ROWS = 2, 1 << 16
#: What is lost at most when a build is interrupted, in seconds.
_CHECKPOINT_SECONDS = 120


class FaissIndex(VectorIndex):
    """faiss-pq compares with a code of every vector, two bits a coordinate; faiss-flat with every vector, in half
    precision; faiss-ivf with those in the lists nearest to the mention's; faiss-hnsw walks a graph of neighbours.
    """

    def __init__(self, kb: KnowledgeBase, model: Any, record: Record, first_stage: int = FIRST_STAGE):
        super().__init__(kb, model, record, first_stage)
        path = _checked_path(kb.path, record)
        self._index = _read(path, record.kind, mapped=True)
        if (self._index.ntotal, self._index.d) != (record.rows, _width(record)):
            raise damaged(path, record.kind, f"it holds {self._index.ntotal:,} vectors")
        self._left_out: tuple[int, Any] = (0, None)

    @classmethod
    def build(cls, kb: KnowledgeBase, model: Any, kind: str, *, progress: bool = True) -> FaissIndex:
        """See [`~hf_mel.KnowledgeBase.build_index`]."""
        _faiss()
        check_gives_vectors(model)
        target = kb.path / f"index-{kind}"
        with building_folder(target, json.dumps([kind, kb.shards])) as stage, writing(target):
            record, index = _continued(stage, kind) or _extended(kb, model, kind) or _empty(kb, model, kind)
            saved = time.monotonic()
            bar = tqdm(total=kb.stored, initial=index.ntotal, desc=kind, unit="entity", delay=1, disable=not progress)
            with bar:
                for _, part in vectors(kb, model, index.ntotal):
                    index.add(_padded(record.entities(part), index))
                    bar.update(len(part))
                    if time.monotonic() - saved > _CHECKPOINT_SECONDS and index.ntotal < kb.stored:
                        _checkpoint(stage, record, index)
                        saved = time.monotonic()
            made = stage / "index.faiss"
            _write(index, made)
            del index
            store = sealed(made)
            store["file"] = f"index-{kind}-{store['sha256'][:16]}.faiss"
            made.replace(kb.path / store["file"])
            write_record(kb.path, replace(record, shards=kb.shards, store=store))
            for old in kb.path.glob(f"index-{kind}-*.faiss"):
                if old.name != store["file"]:
                    old.unlink(missing_ok=True)
        return cls(kb, model, read_record(kb.path, kind))

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """See [`VectorIndex`]."""
        faiss = _faiss()
        if self.kind == "faiss-pq":  # it cannot leave rows out, so more are asked for
            removed = self.kb.stored - len(self.kb)
            return self._index.search(_padded(queries, self._index), min(k + removed, self.record.rows))[1]
        selector = self._selector()
        if self.kind == "faiss-hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(2 * k, _EF_SEARCH), sel=selector)
        elif self.kind == "faiss-ivf":
            # One mention: the threads share its lists. Many: each takes some mentions.
            self._index.parallel_mode = 1 if len(queries) == 1 else 0
            lists = max(_LEAST_PROBED, round(self._index.nlist * _PROBED))
            parameters = faiss.SearchParametersIVF(nprobe=lists, sel=selector)
        else:
            parameters = faiss.SearchParameters(sel=selector)
        return self._index.search(queries, k, params=parameters)[1]

    def _selector(self) -> Any:
        """What leaves the removed rows out, made anew when there are more of them."""
        removed = self.kb.stored - len(self.kb)
        if self._left_out[0] != removed:
            here = self.kb.rows_of_stored(np.arange(self.record.rows)) >= 0
            self._left_out = removed, _faiss().IDSelectorBitmap(np.packbits(here, bitorder="little"))
        return self._left_out[1]


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingExtraError(
            "This index needs faiss, which is not installed.", remedy='Run pip install "hf_mel[faiss]".'
        ) from None
    return faiss


def _empty(kb: KnowledgeBase, model: Any, kind: str) -> tuple[Record, Any]:
    """An index without vectors, trained if need be."""
    faiss = _faiss()
    half, product = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    record = new_record(kb, model, kind)
    if kind == "faiss-flat":
        return record, faiss.IndexScalarQuantizer(record.dim, half, product)
    if kind == "faiss-pq":
        width = _width(record)
        index = faiss.IndexPQFastScan(width, width // _PER_CODE, 4, product)
        index.pq.cp.min_points_per_centroid = 1
        rows = record.entities(sample(kb, model, _CODE_ROWS))
        index.train(_padded(np.resize(rows, (max(len(rows), 16), record.dim)), index))  # 16 centroids, not fewer rows
        return replace(record, settings={"per_code": _PER_CODE}), index
    if kind == "faiss-hnsw":
        index = faiss.IndexHNSWSQ(record.dim, half, _LINKS, product)
        index.hnsw.efConstruction = _EF_BUILD
        return replace(record, settings={"links": _LINKS, "ef_build": _EF_BUILD}), index
    lists = max(1, min(4 * isqrt(kb.stored), kb.stored // _ROWS_PER_LIST))
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(record.dim), record.dim, lists, half, product, False)
    index.cp.min_points_per_centroid = 1  # a list of a small knowledge base has few
    index.train(record.entities(sample(kb, model, lists * _ROWS_PER_LIST)))
    return replace(record, settings={"lists": lists}), index


def _width(record: Record) -> int:
    """Coordinates of the vectors in faiss: an even number of whole codes for PQ."""
    whole = 2 * _PER_CODE
    return record.dim if record.kind != "faiss-pq" else -(-record.dim // whole) * whole


def _padded(vectors: np.ndarray, index: Any) -> np.ndarray:
    """With zeros up to the coordinates of an index."""
    return np.pad(vectors, ((0, 0), (0, index.d - vectors.shape[1])))


def _extended(kb: KnowledgeBase, model: Any, kind: str) -> tuple[Record, Any] | None:
    """The index that is there, for the entities added since; `None` if these are so many that it is built anew."""
    try:
        record = read_record(kb.path, kind)
        path = _checked_path(kb.path, record)
        if record.rows < kb.stored // 2 or not (record.covers(kb) and record.fits(kb, model)):
            return None
        return record, _read(path, kind, mapped=False)
    except KnowledgeBaseError:
        return None


def _continued(stage: Path, kind: str) -> tuple[Record, Any] | None:
    """What an interrupted build left in its folder."""
    if not record_path(stage / "notes", kind).is_file():
        return None
    record = read_record(stage / "notes", kind)
    return record, _read(stage / record.store["file"], kind, mapped=False)


def _checkpoint(stage: Path, record: Record, index: Any) -> None:
    part = stage / f"part-{index.ntotal}.faiss"
    _write(index, part)
    write_record(stage / "notes", replace(record, store={"file": part.name}))
    for old in stage.glob("part-*.faiss"):
        if old != part:
            old.unlink()


def _write(index: Any, path: Path) -> None:
    """Writes through Python's file: faiss's own does not tell of a disk that turns out full when the file is closed."""
    faiss = _faiss()
    with path.open("wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _read(path: Path, kind: str, *, mapped: bool) -> Any:
    faiss = _faiss()
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        raise damaged(path, kind, " ".join(str(error).split())[-200:]) from error


def _checked_path(folder: Path, record: Record) -> Path:
    """The file of an index, which is as it was written."""
    digest, size = record.store.get("sha256"), record.store.get("bytes")
    if not isinstance(digest, str) or not digest.isalnum():  # no name that leads out of the folder is made of it
        raise damaged(record_path(folder, record.kind), record.kind, "it names no file")
    path = folder / f"index-{record.kind}-{digest[:16]}.faiss"
    if not path.is_file():
        raise damaged(path, record.kind, "the file is missing")
    if path.stat().st_size != size:
        raise damaged(path, record.kind, f"it has {path.stat().st_size:,} bytes, {size:,} were written")
    # All of it, before native code takes it apart; and it is in memory after that, where the first searches want it.
    if file_sha256(path) != digest:
        raise damaged(path, record.kind, "its content is not what was written")
    return path
