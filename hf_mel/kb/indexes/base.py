"""What finds the entities of mentions: the exact ranking, or an index whose candidates the model then scores.

An index holds one vector of every stored row of a knowledge base (`index_vectors` of the retriever) and finds those
with the largest inner products with a mention's (`query_vectors`). What it finds is scored as exactly as everything
else would be: an index may miss an entity, but gives none another score.

Graphs and lists of neighbours go astray where vectors differ in length: long ones are near everything, short ones near
nothing. So the mean is taken off all vectors, which takes the same off all inner products with a mention, and one
coordinate is added that brings them to one length, against a 0 in the mention's: the order of inner products stays, and
among the entities it becomes that of distances.

It lies beside the knowledge base: `index-KIND.json`, which says what it covers, and what that names. The JSON is
renamed into place last, and what it names is not changed after that. Removed entities are left out of what is found;
added ones that the index does not have yet are scored, all of them, until they are too many.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_mel.errors import KnowledgeBaseError, ScoreError
from hf_mel.files import write_text
from hf_mel.inference.encodings import num_rows, row_bytes, slice_encodings, to_device
from hf_mel.inference.ranking import EncodedEntities, RankingResult, rank, score_of_units
from hf_mel.protocols import Encodings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_mel.kb.knowledge_base import KnowledgeBase

#: Candidates that the model scores.
FIRST_STAGE = 256

_FORMAT, _VERSION = "hf_mel.index", 1
_RECORD_BYTES = 8 << 20
#: Entities that are scored for every mention because the index does not have them yet.
_UNINDEXED = 4096
#: Encodings that are turned into vectors at a time.
_CHUNK_BYTES = 64 << 20
#: Rows that mean and length are taken from, and how many of a sample stand together.
_MEASURED, _RUN = 16_384, 64


@dataclass(frozen=True)
class Capabilities:
    """What an index can do.

    Args:
        exact (`bool`): It finds what ranking every entity finds.
        units (`bool`): It can rank by some of the model's units.
    """

    exact: bool
    units: bool


class Index(ABC):
    """Finds the best entities of mentions in a knowledge base.

    Args:
        kb ([`~hf_mel.KnowledgeBase`]): The knowledge base; what is added and removed is seen at once.
        model ([`~hf_mel.protocols.Retriever`]): The one that built it.
    """

    kind: str
    capabilities: Capabilities

    def __init__(self, kb: KnowledgeBase, model: Any):
        self.kb, self.model = kb, model

    @abstractmethod
    def find(self, mentions: Encodings, top_k: int, *, units: Sequence[str] | None = None) -> RankingResult:
        """The `top_k` best entities of M mentions (all entities, if there are fewer), scored by the model.

        Args:
            mentions (`Mapping[str, torch.Tensor]`): Their encodings, tensors with first axis M.
            top_k (`int`): How many.
            units (sequence of `str`, *optional*): Rank by the mean of these units only.

        Returns:
            [`~hf_mel.inference.ranking.RankingResult`] with `top_scores` and `top_rows`.

        Raises:
            KnowledgeBaseError: `units` for an index that cannot rank by them; or the index became unusable.
        """


class ExactIndex(Index):
    """Scores every entity: nothing to build, nothing to miss."""

    kind = "exact"
    capabilities = Capabilities(exact=True, units=True)

    def find(self, mentions: Encodings, top_k: int, *, units: Sequence[str] | None = None) -> RankingResult:
        """See [`Index`]."""
        score = None if units is None else score_of_units(self.model, units)
        return rank(self.model, mentions, self.kb, top_k=top_k, score=score)


@dataclass(frozen=True)
class Record:
    """What `index-KIND.json` says.

    Args:
        kind (`str`): Which index.
        shards (`list`): (rows, sha256 of the encodings) of the shards whose rows it has.
        probe (`list[float]`): The vector of the first stored row [D]: another `index_vectors` shows in it.
        mean (`list[float]`): What is taken off every vector [D].
        radius (`float`): The length that vectors are brought to.
        settings (`dict`): How it was built, as its kind understands it.
        store (`dict`): Where the vectors are, as its kind understands it.
    """

    kind: str
    shards: list[tuple[int, str]]
    probe: list[float]
    mean: list[float]
    radius: float
    settings: dict[str, Any] = field(default_factory=dict)
    store: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """How many stored rows it has."""
        return sum(rows for rows, _ in self.shards)

    @property
    def dim(self) -> int:
        """Coordinates of what is stored: D + 1."""
        return len(self.probe) + 1

    def entities(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors of entities [n, D] as they are stored, [n, D + 1] and of length `radius` (no longer ones are)."""
        centred = vectors - np.array(self.mean, dtype=np.float32)
        rest = np.maximum(self.radius**2 - np.square(centred).sum(1, keepdims=True), 0)
        return np.concatenate([centred, np.sqrt(rest)], 1).astype(np.float32, copy=False)

    @staticmethod
    def mentions(vectors: np.ndarray) -> np.ndarray:
        """Vectors of mentions [m, D] as they are searched for, [m, D + 1]."""
        return np.concatenate([vectors, np.zeros_like(vectors[:, :1])], 1).astype(np.float32, copy=False)

    def covers(self, kb: KnowledgeBase) -> bool:
        """Whether the rows are still those of the knowledge base, which may have more."""
        return self.shards == kb.shards[: len(self.shards)]

    def fits(self, kb: KnowledgeBase, model: Any) -> bool:
        """Whether the model still gives these vectors, by that of the first row."""
        now, then = first_vector(kb, model), np.array(self.probe, dtype=np.float32)
        return now.shape == then.shape and np.allclose(now, then, rtol=1e-2, atol=1e-3)


class VectorIndex(Index):
    """A first stage by inner products of vectors; the model scores the `first_stage` candidates it finds.

    A mention for which it finds fewer than are asked for, and one that wants all of a small knowledge base, is ranked
    against every entity.
    """

    capabilities = Capabilities(exact=False, units=False)

    def __init__(self, kb: KnowledgeBase, model: Any, record: Record, first_stage: int = FIRST_STAGE):
        super().__init__(kb, model)
        if first_stage < 1:
            raise ValueError(f"first_stage must be at least 1, not {first_stage}.")
        self.kind, self.record, self.first_stage = record.kind, record, first_stage
        check_gives_vectors(model)
        self._check_covers()
        if not record.fits(kb, model):
            raise stale(kb, self.kind, "it holds other vectors than this model gives now")

    @abstractmethod
    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Numbers [M, C] of the stored rows with the largest inner products with M vectors [M, D + 1].

        At least k of them are not removed, if it finds as many. -1 fills up a row.
        """

    def find(self, mentions: Encodings, top_k: int, *, units: Sequence[str] | None = None) -> RankingResult:
        """See [`Index`]."""
        if units is not None:
            raise KnowledgeBaseError(
                f"the index {self.kind!r} finds candidates by all units, not by {', '.join(units)} alone.",
                file=self.kb.path,
                remedy="Use the index 'exact' for that.",
            )
        count, kept = num_rows(mentions), min(top_k, len(self.kb))
        if max(self.first_stage, top_k) >= len(self.kb):
            return rank(self.model, mentions, self.kb, top_k=top_k)
        result = RankingResult(torch.empty(count, kept), torch.empty(count, kept, dtype=torch.long))
        for k, rows in enumerate(self.candidates(mentions, max(self.first_stage, top_k))):
            one = slice_encodings(mentions, slice(k, k + 1))
            if len(rows) < kept:
                found = rank(self.model, one, self.kb, top_k=kept)
                result.top_rows[k] = found.top_rows[0]
            else:
                # In the order of the knowledge base, so that equal scores come in the same order as in all of it.
                some = EncodedEntities([str(row) for row in rows], self.kb.encodings(rows))
                found = rank(self.model, one, some, top_k=kept)
                result.top_rows[k] = torch.from_numpy(rows)[found.top_rows[0]]
            result.top_scores[k] = found.top_scores[0]
        return result

    def candidates(self, mentions: Encodings, count: int | None = None) -> list[np.ndarray]:
        """Rows of the entities that the first stage finds for each of M mentions, ascending.

        Args:
            mentions (`Mapping[str, torch.Tensor]`): Encodings with first axis M.
            count (`int`, *optional*): How many to look for. Default: `first_stage`.
        """
        self._check_covers()
        device = getattr(self.model, "device", "cpu")
        with torch.inference_mode():
            queries = self.model.query_vectors(to_device(mentions, device)).float().cpu().numpy()
        if not np.isfinite(queries).all():
            raise ScoreError("the vector of a mention is nan or infinite.", remedy="Look at the weights of the model.")
        covered = self.record.rows
        found = self.search(self.record.mentions(queries), min(count or self.first_stage, covered))
        added = self.kb.rows_of_stored(np.arange(covered, self.kb.stored))
        rows = [np.union1d(each, added) for each in self.kb.rows_of_stored(found)]
        return [each[each >= 0] for each in rows]

    def _check_covers(self) -> None:
        if not self.record.covers(self.kb):
            raise stale(self.kb, self.kind, "it was built from other encodings")
        if self.kb.stored - self.record.rows > _UNINDEXED:
            raise stale(self.kb, self.kind, f"it lacks {self.kb.stored - self.record.rows:,} added entities")


def check_gives_vectors(model: Any) -> None:
    """Raises a [`~hf_mel.errors.KnowledgeBaseError`] for a retriever that only the exact ranking can use."""
    if not all(callable(getattr(model, name, None)) for name in ("query_vectors", "index_vectors")):
        raise KnowledgeBaseError(
            f"{type(model).__name__} gives no vectors for a first stage (query_vectors, index_vectors).",
            remedy="Use the index 'exact', which needs none.",
        )


def vectors(
    kb: KnowledgeBase, model: Any, first: int, chunk_size: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (number of the first row, vectors [n, D] as float32) of the stored rows from `first` on."""
    device = getattr(model, "device", "cpu")
    if chunk_size is None:
        _, one = next(kb.iter_stored(0, 1))
        chunk_size = max(1, min(1 << 14, _CHUNK_BYTES // row_bytes(one)))
    for start, encodings in kb.iter_stored(first, chunk_size):
        with torch.inference_mode():
            made = model.index_vectors(to_device(encodings, device)).float().cpu().numpy()
        if made.shape[:1] != (num_rows(encodings),) or made.ndim != 2:
            raise KnowledgeBaseError(
                f"the model gave vectors of shape {made.shape} of {num_rows(encodings)} entities."
            )
        if not np.isfinite(made).all():
            row = start + int((~np.isfinite(made)).any(1).nonzero()[0][0])
            raise KnowledgeBaseError(
                "the vector of an entity is nan or infinite.", file=kb.path, row=row, remedy="Look at the weights."
            )
        yield start, np.ascontiguousarray(made)
        del encodings, made


def new_record(kb: KnowledgeBase, model: Any, kind: str) -> Record:
    """The record of an index that is about to be built: all but `settings` and `store`."""
    some = sample(kb, model, _MEASURED)
    mean = some.mean(0)
    radius = 1.05 * float(np.linalg.norm(some - mean, axis=1).max())  # others may be a little longer
    return Record(kind, kb.shards, first_vector(kb, model).tolist(), mean.tolist(), max(radius, 1e-6))


def sample(kb: KnowledgeBase, model: Any, count: int) -> np.ndarray:
    """The vectors of `count` stored rows (all, if there are fewer), in runs from all over the knowledge base: [n, D]."""
    runs = max(1, count // _RUN)
    starts = np.linspace(0, max(0, kb.stored - _RUN), runs).astype(np.int64) if count < kb.stored else [0]
    size = _RUN if count < kb.stored else kb.stored
    found: list[np.ndarray] = []
    for start in starts:
        wanted = min(start + size, kb.stored)
        for first, part in vectors(kb, model, int(start), size if size == _RUN else None):
            found.append(part[: wanted - first])
            if first + len(part) >= wanted:
                break
    return np.concatenate(found)


def first_vector(kb: KnowledgeBase, model: Any) -> np.ndarray:
    """The vector of the first stored row, [D]."""
    return next(vectors(kb, model, 0, chunk_size=1))[1][0]


def read_record(folder: Path, kind: str) -> Record:
    """What `index-KIND.json` says.

    Raises:
        KnowledgeBaseError: There is none, or it is damaged.
    """
    path = record_path(folder, kind)
    try:
        if path.stat().st_size > _RECORD_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != _FORMAT or found["version"] != _VERSION or found["kind"] != kind:
            raise ValueError("it is not what this hf_mel writes")
        record = Record(
            kind,
            [(int(rows), str(digest)) for rows, digest in found["shards"]],
            [float(value) for value in found["probe"]],
            [float(value) for value in found["mean"]],
            float(found["radius"]),
            dict(found["settings"]),
            dict(found["store"]),
        )
        if not record.shards or len(record.mean) != len(record.probe):
            raise ValueError("it has no shards, or a mean of another length")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise KnowledgeBaseError(
            f"the knowledge base has no index {kind!r}.", file=folder, remedy=f"Build it: {_command(folder, kind)}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, kind, f"{type(error).__name__}: {error}") from error
    return record


def write_record(folder: Path, record: Record) -> None:
    """Writes `index-KIND.json`, and renames it into place."""
    content: Mapping[str, Any] = {"format": _FORMAT, "version": _VERSION, **asdict(record)}
    write_text(record_path(folder, record.kind), [json.dumps(content, indent=1), "\n"])


def record_path(folder: Path, kind: str) -> Path:
    """Where an index says what it is."""
    return folder / f"index-{kind}.json"


def damaged(path: Path, kind: str, what: str) -> KnowledgeBaseError:
    """An index that cannot be used because of what happened to its files."""
    remedy = f"The knowledge base is not touched by that. Build the index again: {_command(path.parent, kind)}"
    return KnowledgeBaseError(f"the index {kind!r} is damaged: {what}.", file=path, remedy=remedy)


def stale(kb: KnowledgeBase, kind: str, what: str) -> KnowledgeBaseError:
    """An index that does not belong to the knowledge base as it is now."""
    remedy = f"Bring it up to date: {_command(kb.path, kind)}"
    return KnowledgeBaseError(
        f"the index {kind!r} does not fit the knowledge base: {what}.", file=kb.path, remedy=remedy
    )


def _command(folder: Path, kind: str) -> str:
    return f"hf-mel kb index {folder} --model MODEL --kind {kind}"
