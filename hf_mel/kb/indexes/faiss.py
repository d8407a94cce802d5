"""faiss indexes: one file of vectors or codes, memory-mapped when read."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from hf_mel.errors import KnowledgeBaseError, MissingExtraError
from hf_mel.files import building_folder, write_errors
from hf_mel.kb.indexes.base import (
    FIRST_STAGE,
    IndexRecord,
    VectorIndex,
    check_gives_vectors,
    create_record,
    damaged_index_error,
    install_file,
    iter_vectors,
    read_record,
    record_path,
    sample_vectors,
    verified_path,
    write_record,
)

if TYPE_CHECKING:
    from hf_mel.kb.knowledge_base import KnowledgeBase

#: Product quantisation: coordinates that share a code of four bits, and number of rows on which k-means is run.
_DIMS_PER_CODE, _TRAINING_ROWS = 2, 1 << 16
_SUFFIX = ".faiss"
#: Seconds between checkpoints of a build.
_CHECKPOINT_SECONDS = 120


class FaissIndex(VectorIndex):
    """Index in a faiss file.

    "faiss-pq" compares a query with a product-quantised code of every vector, at two bits per coordinate. "faiss-flat"
    compares it with every vector in half precision.

    Args:
        kb, model, record, first_stage: As in [`VectorIndex`].

    Raises:
        KnowledgeBaseError: As in [`VectorIndex`]; also if the file is missing or damaged.
        MissingExtraError: faiss is not installed.
    """

    def __init__(self, kb: KnowledgeBase, model: Any, record: IndexRecord, first_stage: int = FIRST_STAGE):
        super().__init__(kb, model, record, first_stage)
        path = verified_path(kb.path, record, _SUFFIX)
        self._index = _read_index(path, record.kind, mapped=True)
        if (self._index.ntotal, self._index.d) != (record.rows, _padded_dim(record)):
            raise damaged_index_error(path, record.kind, f"it holds {self._index.ntotal:,} vectors")
        self._selector: tuple[int, Any] = (0, None)  # number of removed entities, and the selector made for it

    @classmethod
    def build(cls, kb: KnowledgeBase, model: Any, kind: str, *, progress: bool = True) -> FaissIndex:
        """Builds the index or extends the existing one; see [`~hf_mel.kb.indexes.build_index`]."""
        _import_faiss()
        check_gives_vectors(model)
        target = kb.path / f"index-{kind}"
        with building_folder(target, json.dumps([kind, kb.shards])) as stage, write_errors(target):
            record, index = (
                _load_checkpoint(stage, kind) or _load_to_extend(kb, model, kind) or _create_index(kb, model, kind)
            )
            total = kb.num_physical_rows
            last_checkpoint = time.monotonic()
            bar = tqdm(total=total, initial=index.ntotal, desc=kind, unit="entity", delay=1, disable=not progress)
            with bar:
                for _, vectors in iter_vectors(kb, model, index.ntotal):
                    index.add(_pad(record.entity_vectors(vectors), index))
                    bar.update(len(vectors))
                    if time.monotonic() - last_checkpoint > _CHECKPOINT_SECONDS and index.ntotal < total:
                        _save_checkpoint(stage, record, index)
                        last_checkpoint = time.monotonic()
            path = stage / "index.faiss"
            _write_index(index, path)
            del index
            install_file(kb, record, path, _SUFFIX)
        return cls(kb, model, read_record(kb.path, kind))

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Searches the faiss index; see [`VectorIndex.search`]."""
        if self.kind == "faiss-pq":
            # IndexPQFastScan supports no selector, so removed rows are requested in addition and dropped later.
            num_removed = self.kb.num_physical_rows - len(self.kb)
            return self._index.search(_pad(queries, self._index), min(k + num_removed, self.record.rows))[1]
        parameters = _import_faiss().SearchParameters(sel=self._select_active())
        return self._index.search(queries, k, params=parameters)[1]

    def _select_active(self) -> Any:
        """Returns a selector of the rows that are not removed, cached until more are removed."""
        num_removed = self.kb.num_physical_rows - len(self.kb)
        if self._selector[0] != num_removed:
            is_active = self.kb.rows_of_physical(np.arange(self.record.rows)) >= 0
            bitmap = _import_faiss().IDSelectorBitmap(np.packbits(is_active, bitorder="little"))
            self._selector = num_removed, bitmap
        return self._selector[1]


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingExtraError(
            "This index needs faiss, which is not installed.", remedy='Run pip install "hf_mel[faiss]".'
        ) from None
    return faiss


def _create_index(kb: KnowledgeBase, model: Any, kind: str) -> tuple[IndexRecord, Any]:
    """Creates an index without vectors, trained if its kind needs training."""
    faiss = _import_faiss()
    record = create_record(kb, model, kind)
    if kind == "faiss-flat":
        metric = faiss.METRIC_INNER_PRODUCT
        return record, faiss.IndexScalarQuantizer(record.dim, faiss.ScalarQuantizer.QT_fp16, metric)
    dim = _padded_dim(record)
    index = faiss.IndexPQFastScan(dim, dim // _DIMS_PER_CODE, 4, faiss.METRIC_INNER_PRODUCT)
    index.pq.cp.min_points_per_centroid = 1
    rows = record.entity_vectors(sample_vectors(kb, model, _TRAINING_ROWS))
    # k-means with 16 centroids needs at least 16 rows, so those of a tiny knowledge base are repeated.
    index.train(_pad(np.resize(rows, (max(len(rows), 16), record.dim)), index))
    return replace(record, settings={"per_code": _DIMS_PER_CODE}), index


def _padded_dim(record: IndexRecord) -> int:
    """Returns the dimension of the vectors in faiss. Product quantisation needs an even number of codes."""
    if record.kind != "faiss-pq":
        return record.dim
    multiple = 2 * _DIMS_PER_CODE
    return -(-record.dim // multiple) * multiple


def _pad(vectors: np.ndarray, index: Any) -> np.ndarray:
    """Appends zeros up to the dimension of an index."""
    padded = np.zeros((len(vectors), index.d), dtype=vectors.dtype)  # np.pad takes 20 times as long
    padded[:, : vectors.shape[1]] = vectors
    return padded


def _load_to_extend(kb: KnowledgeBase, model: Any, kind: str) -> tuple[IndexRecord, Any] | None:
    """Loads the existing index, or returns `None` if it is unusable or covers less than half of the entities."""
    try:
        record = read_record(kb.path, kind)
        path = verified_path(kb.path, record, _SUFFIX)
        if record.rows < kb.num_physical_rows // 2 or not (record.covers(kb) and record.fits(kb, model)):
            return None
        return record, _read_index(path, kind, mapped=False)
    except KnowledgeBaseError:
        return None


def _load_checkpoint(stage: Path, kind: str) -> tuple[IndexRecord, Any] | None:
    """Loads the last checkpoint of an interrupted build."""
    if not record_path(stage / "notes", kind).is_file():
        return None
    record = read_record(stage / "notes", kind)
    return record, _read_index(stage / record.store["file"], kind, mapped=False)


def _save_checkpoint(stage: Path, record: IndexRecord, index: Any) -> None:
    path = stage / f"part-{index.ntotal}.faiss"
    _write_index(index, path)
    write_record(stage / "notes", replace(record, store={"file": path.name}))
    for old in stage.glob("part-*.faiss"):
        if old != path:
            old.unlink()


def _write_index(index: Any, path: Path) -> None:
    """Writes an index through a Python file, because faiss does not report a full disk when it closes its own."""
    faiss = _import_faiss()
    with path.open("wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _read_index(path: Path, kind: str, *, mapped: bool) -> Any:
    faiss = _import_faiss()
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        raise damaged_index_error(path, kind, " ".join(str(error).split())[-200:]) from error
