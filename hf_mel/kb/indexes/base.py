"""Finding the entities of mentions: by exact ranking, or by an index whose candidates the model then scores.

An index holds one vector of every physical row of a knowledge base (`index_vectors` of the retriever). For a mention
it finds those with the largest inner products with the mention's vector (`query_vectors`). The model scores these
candidates exactly: an index may miss an entity, but never changes a score.

Graph and list indexes work badly when vector norms vary. We subtract the mean entity vector (this shifts all inner
products of a mention equally) and append one coordinate that equalises norms; queries get 0 there. The order of inner
products is unchanged and now equals the order of distances.

An index is stored beside the knowledge base: `index-KIND.json` is its record, which says what the index covers and
which file or collection holds the vectors. The record is renamed into place last, and what it names never changes.
Candidates that were removed from the knowledge base are dropped. Added entities that the index lacks are all scored,
up to a limit.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_mel.errors import KnowledgeBaseError, ScoreError
from hf_mel.files import file_sha256, fsync_and_describe, write_text
from hf_mel.inference.encodings import num_rows, row_bytes, slice_encodings, to_device
from hf_mel.inference.entity_sources import ChosenEntities
from hf_mel.inference.execution import model_device
from hf_mel.inference.ranking import RankingResult, rank, score_of_units
from hf_mel.inference.sparse_scores import SparseScores
from hf_mel.protocols import Encodings, IndexVectors, TwoStepScores

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hf_mel.kb.knowledge_base import KnowledgeBase

#: Default number of candidates that the model scores.
FIRST_STAGE = 256

_FORMAT, _VERSION = "hf_mel.index", 1
_MAX_RECORD_BYTES = 8 << 20
#: Limit on added entities that the index lacks, which are scored for every mention.
_MAX_UNINDEXED = 4096
#: Mentions whose candidates are ranked together.
_RANKED_TOGETHER = 8
#: A search under a filter finds this many times the entities of which enough should pass.
_SEARCH_SURPLUS = 2
#: And no more than these, which Milvus can return.
_MAX_SEARCHED = 8192
#: Bytes of encodings that are converted to vectors, or bounded, at a time.
_CHUNK_BYTES = 64 << 20
#: Size of the sample that determines mean and radius, and number of consecutive rows in it.
_SAMPLE_ROWS, _SAMPLE_RUN = 16_384, 64


class Index(ABC):
    """Finds the best entities of mentions in a knowledge base.

    Args:
        kb ([`~hf_mel.KnowledgeBase`]): The knowledge base. The index sees entities that are added or removed later.
        model ([`~hf_mel.protocols.Retriever`]): The model that built it.
    """

    kind: str

    def __init__(self, kb: KnowledgeBase, model: Any):
        self.kb, self.model = kb, model

    @abstractmethod
    def find(
        self,
        mentions: Encodings,
        top_k: int,
        *,
        units: Sequence[str] | None = None,
        added: SparseScores | None = None,
        rows: np.ndarray | None = None,
    ) -> RankingResult:
        """Finds the `top_k` best entities of M mentions (or all entities, if fewer), scored by the model.

        Args:
            mentions (`Mapping[str, torch.Tensor]`): Encodings of the mentions, tensors with first axis M.
            top_k (`int`): Number of entities per mention.
            units (sequence of `str`, *optional*): Rank by the mean of these units only.
            added ([`~hf_mel.inference.sparse_scores.SparseScores`], *optional*): Scores of some pairs of the M mentions and
                the entities, which are added to those of the model. An index misses none of these entities. Scores
                `of_entities` count in the order of the entities that it finds, among all and among those with the best.
            rows (`np.ndarray` `[R]`, *optional*): Find only these entities; rows of the knowledge base, ascending.

        Returns:
            [`~hf_mel.inference.ranking.RankingResult`] with `top_scores` and `top_rows`.

        Raises:
            KnowledgeBaseError: The index cannot rank by `units`, or no longer fits the knowledge base.
        """


class ExactIndex(Index):
    """Scores every entity. It needs no build and misses nothing."""

    kind = "exact"

    def find(
        self,
        mentions: Encodings,
        top_k: int,
        *,
        units: Sequence[str] | None = None,
        added: SparseScores | None = None,
        rows: np.ndarray | None = None,
    ) -> RankingResult:
        """Ranks all entities; see [`Index.find`]."""
        return self._rank(mentions, top_k, units, added, rows)

    def count_not_worse(
        self,
        mentions: Encodings,
        entities: np.ndarray,
        *,
        units: Sequence[str] | None = None,
        added: SparseScores | None = None,
        rows: np.ndarray | None = None,
    ) -> list[int]:
        """Returns how many entities score as much as a given one or more, itself included, for each of M mentions.

        Args:
            mentions, units, added, rows: As in [`Index.find`].
            entities (`np.ndarray` `[M]`): The rows of the given entities.
        """
        places = entities if rows is None else np.searchsorted(rows, entities)
        ranked = self._rank(mentions, 1, units, added, rows, places)
        assert ranked.worst_rank is not None
        return ranked.worst_rank.tolist()

    def _rank(
        self,
        mentions: Encodings,
        top_k: int,
        units: Sequence[str] | None,
        added: SparseScores | None,
        rows: np.ndarray | None,
        places: np.ndarray | None = None,
    ) -> RankingResult:
        """Scores all entities; `places` [M] are positions of golds among them."""
        score = None if units is None else score_of_units(self.model, units)
        return rank_rows(self.model, mentions, self.kb, rows, gold_rows=places, top_k=top_k, score=score, added=added)


def rank_rows(
    model: Any,
    mentions: Encodings,
    kb: KnowledgeBase,
    rows: np.ndarray | None,
    *,
    added: SparseScores | None = None,
    **options: Any,
) -> RankingResult:
    """Ranks some entities of a knowledge base exactly, reading and scoring no others.

    Args:
        model, mentions, added, options: As in [`~hf_mel.inference.ranking.rank`]; `added` is about all entities.
        kb ([`~hf_mel.KnowledgeBase`]): The knowledge base.
        rows (`np.ndarray` `[R]`, *optional*): The rows of the entities, ascending. Default: all.

    Returns:
        [`~hf_mel.inference.ranking.RankingResult`], whose `top_rows` are rows of the knowledge base.
    """
    if rows is None:
        return rank(model, mentions, kb, added=added, **options)
    added = None if added is None else added.among(rows)
    ranked = rank(model, mentions, ChosenEntities(kb, rows), added=added, **options)
    return replace(ranked, top_rows=torch.from_numpy(rows)[ranked.top_rows])


@dataclass(frozen=True)
class IndexRecord:
    """Content of `index-KIND.json`.

    Args:
        kind (`str`): The kind of the index.
        shards (`list`): (number of rows, sha256 of the encodings) of the shards that the index covers.
        probe (`list[float]`): The vector of the first physical row [D]; reveals a change of `index_vectors`.
        mean (`list[float]`): The mean entity vector, subtracted from all [D].
        radius (`float`): The norm that all vectors get.
        settings (`dict`): Build settings, specific to the kind.
        store (`dict`): The location of the vectors, specific to the kind.
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
        """The number of physical rows that the index covers."""
        return sum(rows for rows, _ in self.shards)

    @property
    def dim(self) -> int:
        """The dimension of the indexed vectors, D + 1."""
        return len(self.probe) + 1

    def entity_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """Converts entity vectors [n, D] to indexed vectors [n, D + 1] of norm `radius` (more for longer vectors)."""
        centred = vectors - np.array(self.mean, dtype=np.float32)
        rest = np.maximum(self.radius**2 - np.square(centred).sum(1, keepdims=True), 0)
        return np.concatenate([centred, np.sqrt(rest)], 1).astype(np.float32, copy=False)

    @staticmethod
    def mention_vectors(vectors: np.ndarray) -> np.ndarray:
        """Converts mention vectors [m, D] to queries [m, D + 1]."""
        return np.concatenate([vectors, np.zeros_like(vectors[:, :1])], 1).astype(np.float32, copy=False)

    def covers(self, kb: KnowledgeBase) -> bool:
        """Whether the indexed shards are the first shards of the knowledge base, which may have more."""
        return self.shards == kb.shards[: len(self.shards)]

    def fits(self, kb: KnowledgeBase, model: Any) -> bool:
        """Whether the model still returns the vector that was recorded for the first row."""
        current = next(iter_vectors(kb, model, 0, chunk_size=1))[1][0]
        recorded = np.array(self.probe, dtype=np.float32)
        return current.shape == recorded.shape and np.allclose(current, recorded, rtol=1e-2, atol=1e-3)


class VectorIndex(Index):
    """First stage by inner products of vectors, followed by exact scores of `first_stage` candidates.

    A mention is ranked against every entity if the first stage finds too few candidates for it, or if the knowledge
    base has no more than `first_stage` entities.

    Args:
        kb ([`~hf_mel.KnowledgeBase`]): The knowledge base.
        model ([`~hf_mel.protocols.Retriever`]): The model that built it.
        record ([`IndexRecord`]): The record of the index.
        first_stage (`int`): Number of candidates that the model scores.

    Raises:
        KnowledgeBaseError: The index does not fit the knowledge base or the model.
    """

    def __init__(self, kb: KnowledgeBase, model: Any, record: IndexRecord, first_stage: int = FIRST_STAGE):
        super().__init__(kb, model)
        if first_stage < 1:
            raise ValueError(f"first_stage must be at least 1, not {first_stage}.")
        self.kind, self.record, self.first_stage = record.kind, record, first_stage
        check_gives_vectors(model)
        self._check_covers()
        if not record.fits(kb, model):
            raise stale_index_error(kb, self.kind, "its vectors differ from those that this model gives")

    @abstractmethod
    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Finds physical rows [M, C] with the largest inner products with M queries [M, D + 1].

        At least k of them are not removed, if so many are found. Missing positions are -1.
        """

    def find(
        self,
        mentions: Encodings,
        top_k: int,
        *,
        units: Sequence[str] | None = None,
        added: SparseScores | None = None,
        rows: np.ndarray | None = None,
    ) -> RankingResult:
        """Finds candidates and ranks them by exact scores; see [`Index.find`].

        If few entities may be found, all of them are ranked, which then costs less than a search that passes over most of
        what it finds.
        """
        if units is not None:
            raise KnowledgeBaseError(
                f"The index {self.kind!r} finds candidates by all units, not by {', '.join(units)} alone.",
                file=self.kb.path,
                remedy="Use the index 'exact'.",
            )
        count, total = max(self.first_stage, top_k), len(self.kb)
        choices = [rows]  # of entities, among which candidates are found
        if added is not None and added.of_entities is not None and added.of_entities.any():
            choices.append(_among(np.flatnonzero(added.of_entities == added.of_entities.max()), rows))
        num_mentions, num_results = num_rows(mentions), min(top_k, total if rows is None else len(rows))
        if rows is not None and not len(rows):
            raise ValueError("There are no rows to find entities among.")
        if count >= total or (rows is not None and self._too_few(rows, count)):
            return rank_rows(self.model, mentions, self.kb, rows, top_k=top_k, added=added)
        found = [self._candidates_among(mentions, choice, count) for choice in choices]
        result = RankingResult(
            torch.empty(num_mentions, num_results),
            torch.empty(num_mentions, num_results, dtype=torch.long),
            bounds=torch.full((num_mentions,), torch.inf),
        )
        candidates = list(map(_union, zip(*found, strict=True)))
        if added is not None:
            candidates = [np.union1d(lists, _among(added[k][0], rows)) for k, lists in enumerate(candidates)]
        enough = [number for number, lists in enumerate(candidates) if len(lists) >= num_results]
        groups = [[number] for number in range(num_mentions) if len(candidates[number]) < num_results]
        # Only the first of two steps is computed for the candidates of other mentions, so several mentions cost less together.
        step = _RANKED_TOGETHER if isinstance(self.model, TwoStepScores) else 1
        groups += [enough[first : first + step] for first in range(0, len(enough), step)]
        for numbers in groups:
            of_group = slice_encodings(mentions, numbers)
            added_to_group = None if added is None else added.select(numbers)
            lists = [candidates[number] for number in numbers]
            # Rows ascend, so that ties are ordered as in the ranking of all entities.
            union = np.unique(np.concatenate(lists))
            chosen = rows if len(lists[0]) < num_results else union
            among = None if len(numbers) == 1 else _memberships(union, lists)
            ranked = rank_rows(
                self.model, of_group, self.kb, chosen, top_k=num_results, added=added_to_group, among=among
            )
            result.top_rows[numbers], result.top_scores[numbers] = ranked.top_rows, ranked.top_scores
            if result.bounds is not None and len(lists[0]) < num_results:  # all entities were ranked
                result.bounds[numbers] = -torch.inf
        return result

    def _too_few(self, rows: np.ndarray, count: int) -> bool:
        """Whether scoring all of these rows costs no more than scoring what a search must find to hold `count` of them."""
        return len(rows) <= count or self._num_searched(rows, count) > min(len(rows), _MAX_SEARCHED)

    def _num_searched(self, rows: np.ndarray, count: int) -> int:
        """Returns how many entities a search must find so that `count` of these rows are likely among them."""
        return int(_SEARCH_SURPLUS * count * len(self.kb) / len(rows))

    def _candidates_among(self, mentions: Encodings, rows: np.ndarray | None, count: int) -> list[np.ndarray]:
        """Returns up to about `count` candidates of each of M mentions that are among these rows, ascending."""
        if rows is None:
            return self.candidates(mentions, count)
        if not len(rows) or self._too_few(rows, count):
            return [rows] * num_rows(mentions)
        return [_among(found, rows) for found in self.candidates(mentions, self._num_searched(rows, count))]

    def candidates(self, mentions: Encodings, count: int | None = None) -> list[np.ndarray]:
        """Returns the rows of the entities that the first stage finds for each of M mentions, ascending.

        Args:
            mentions (`Mapping[str, torch.Tensor]`): Encodings with first axis M.
            count (`int`, *optional*): Number of candidates per mention. Default: `first_stage`.
        """
        self._check_covers()
        device = model_device(self.model)
        with torch.inference_mode():
            queries = self.model.query_vectors(to_device(mentions, device)).float().cpu().numpy()
        if not np.isfinite(queries).all():
            raise ScoreError("The vector of a mention is nan or infinite.", remedy="Check the weights of the model.")
        num_indexed = self.record.rows
        physical = self.search(self.record.mention_vectors(queries), min(count or self.first_stage, num_indexed))
        added = self.kb.rows_of_physical(np.arange(num_indexed, self.kb.num_physical_rows))
        candidates = [np.union1d(rows, added) for rows in self.kb.rows_of_physical(physical)]
        return [rows[rows >= 0] for rows in candidates]

    def _check_covers(self) -> None:
        if not self.record.covers(self.kb):
            raise stale_index_error(self.kb, self.kind, "it was built from other encodings")
        num_added = self.kb.num_physical_rows - self.record.rows
        if num_added > _MAX_UNINDEXED:
            raise stale_index_error(self.kb, self.kind, f"it lacks {num_added:,} added entities")


def _among(rows: np.ndarray, choice: np.ndarray | None) -> np.ndarray:
    """Returns the rows that are among a choice, in their order; all of them without a choice."""
    return rows if choice is None else rows[np.isin(rows, choice, assume_unique=True)]


def _memberships(rows: np.ndarray, lists: Sequence[np.ndarray]) -> torch.Tensor:
    """Returns which rows [U], ascending, are in each of M lists of some of them: [M, U]."""
    among = torch.zeros(len(lists), len(rows), dtype=torch.bool)
    for number, members in enumerate(lists):
        among[number, torch.from_numpy(np.searchsorted(rows, members))] = True
    return among


def _union(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the rows of all parts, ascending."""
    return parts[0] if len(parts) == 1 else np.unique(np.concatenate(parts))


def check_gives_vectors(model: Any) -> None:
    """Checks that a retriever returns vectors for a first stage.

    Raises:
        KnowledgeBaseError: It does not, so that only the exact ranking can use it.
    """
    if not isinstance(model, IndexVectors):
        raise KnowledgeBaseError(
            f"{type(model).__name__} has no vectors for an index (query_vectors, index_vectors).",
            remedy="Use the index 'exact', which needs no vectors.",
        )


def iter_vectors(
    kb: KnowledgeBase, model: Any, first: int, chunk_size: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Iterates over the entity vectors [n, D] of physical rows, starting at `first`; see [`iter_computed`]."""
    for start, (vectors,) in iter_computed(kb, model, lambda rows: [model.index_vectors(rows)], first, chunk_size):
        yield start, np.ascontiguousarray(vectors)


def iter_computed(
    kb: KnowledgeBase,
    model: Any,
    compute: Callable[[Encodings], Sequence[torch.Tensor]],
    first: int,
    chunk_size: int | None = None,
    *,
    most_rows: int = 1 << 14,
    as_stored: bool = False,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Iterates over what a model computes from the encodings of physical rows, starting at `first`.

    Args:
        kb ([`~hf_mel.KnowledgeBase`]): The knowledge base.
        model ([`~hf_mel.protocols.Retriever`]): The model that built it.
        compute (`Callable`): Returns tensors [n, D] from the encodings of n rows on the device of the model.
        first (`int`): The first physical row.
        chunk_size (`int`, *optional*): Rows per chunk. Default: as many as fit into 64 MB of encodings.
        most_rows (`int`): The largest default of `chunk_size`.
        as_stored (`bool`): Whether encodings keep the dtype of the file.

    Yields:
        `tuple[int, list[np.ndarray]]`: The first row of the chunk, and its arrays [n, D] as float32.

    Raises:
        KnowledgeBaseError: Arrays have the wrong shape, or are nan or infinite.
    """
    device = model_device(model)
    if chunk_size is None:
        chunk_size = default_chunk_size(kb, most_rows, as_stored=as_stored)
    for start, encodings in kb.iter_physical(first, chunk_size, as_stored=as_stored):
        with torch.inference_mode():
            arrays = [part.float().cpu().numpy() for part in compute(to_device(encodings, device))]
        count = num_rows(encodings)
        if any(array.ndim != 2 or len(array) != count for array in arrays):
            raise KnowledgeBaseError(
                f"The model returned vectors of shape {' and '.join(str(array.shape) for array in arrays)} for {count} entities.",
                remedy="Return [N, D] from index_vectors, and [N, D] and [N, R] from bound_vectors.",
            )
        is_finite = np.all([np.isfinite(array).all(1) for array in arrays], axis=0)
        if not is_finite.all():
            raise KnowledgeBaseError(
                "The vector of an entity is nan or infinite.",
                file=kb.path,
                row=start + int(np.flatnonzero(~is_finite)[0]),
                remedy="Check the weights of the model.",
            )
        yield start, arrays
        del encodings, arrays


def default_chunk_size(kb: KnowledgeBase, most_rows: int, *, as_stored: bool) -> int:
    """Returns the rows that [`iter_computed`] reads at a time by default."""
    _, one_row = next(kb.iter_physical(0, 1, as_stored=as_stored))
    return rows_per_chunk(row_bytes(one_row), most_rows)


def rows_per_chunk(bytes_per_row: int, most_rows: int) -> int:
    """Returns how many rows of encodings are read at a time: as many as fit into 64 MB, but no more than `most_rows`."""
    return max(1, min(most_rows, _CHUNK_BYTES // max(1, bytes_per_row)))


def create_record(kb: KnowledgeBase, model: Any, kind: str) -> IndexRecord:
    """Creates the record of an index that is about to be built, without `settings` and `store`."""
    vectors = sample_vectors(kb, model, _SAMPLE_ROWS)
    mean = vectors.mean(0)
    # 5 % more than the longest of the sample, because other vectors may be longer.
    radius = 1.05 * float(np.linalg.norm(vectors - mean, axis=1).max())
    probe = next(iter_vectors(kb, model, 0, chunk_size=1))[1][0]
    return IndexRecord(kind, kb.shards, probe.tolist(), mean.tolist(), max(radius, 1e-6))


def sample_vectors(kb: KnowledgeBase, model: Any, count: int) -> np.ndarray:
    """Returns the vectors of about `count` physical rows (all, if fewer), in runs spread over the knowledge base: [n, D]."""
    total = kb.num_physical_rows
    if count < total:
        starts = np.linspace(0, max(0, total - _SAMPLE_RUN), max(1, count // _SAMPLE_RUN)).astype(np.int64).tolist()
        run_length, chunk_size = _SAMPLE_RUN, _SAMPLE_RUN
    else:
        starts, run_length, chunk_size = [0], total, None
    parts: list[np.ndarray] = []
    for start in starts:
        stop = min(start + run_length, total)
        for first, part in iter_vectors(kb, model, start, chunk_size):
            parts.append(part[: stop - first])
            if first + len(part) >= stop:
                break
    return np.concatenate(parts)


def read_record(folder: Path, kind: str) -> IndexRecord:
    """Reads `index-KIND.json`.

    Raises:
        KnowledgeBaseError: The record does not exist or is damaged.
    """
    path = record_path(folder, kind)
    try:
        if path.stat().st_size > _MAX_RECORD_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or content["version"] != _VERSION or content["kind"] != kind:
            raise ValueError("this hf_mel does not write such a record")
        record = IndexRecord(
            kind,
            [(int(rows), str(digest)) for rows, digest in content["shards"]],
            [float(value) for value in content["probe"]],
            [float(value) for value in content["mean"]],
            float(content["radius"]),
            dict(content["settings"]),
            dict(content["store"]),
        )
        if not record.shards or len(record.mean) != len(record.probe):
            raise ValueError("it has no shards, or mean and probe differ in length")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise KnowledgeBaseError(
            f"The knowledge base has no index {kind!r}.",
            file=folder,
            remedy=f"Build it: {_build_command(folder, kind)}",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged_index_error(path, kind, f"{type(error).__name__}: {error}") from error
    return record


def write_record(folder: Path, record: IndexRecord) -> None:
    """Writes `index-KIND.json` atomically."""
    content: Mapping[str, Any] = {"format": _FORMAT, "version": _VERSION, **asdict(record)}
    write_text(record_path(folder, record.kind), [json.dumps(content, indent=1), "\n"])


def record_path(folder: Path, kind: str) -> Path:
    """Returns the path of `index-KIND.json`."""
    return folder / f"index-{kind}.json"


def damaged_index_error(path: Path, kind: str, problem: str) -> KnowledgeBaseError:
    """Returns the error for an index whose files are damaged or missing."""
    return KnowledgeBaseError(
        f"The index {kind!r} is damaged: {problem}.",
        file=path,
        remedy=f"The knowledge base itself is intact. Build the index again: {_build_command(path.parent, kind)}",
    )


def stale_index_error(kb: KnowledgeBase, kind: str, problem: str) -> KnowledgeBaseError:
    """Returns the error for an index that does not fit the current state of the knowledge base or model."""
    return KnowledgeBaseError(
        f"The index {kind!r} does not fit the knowledge base: {problem}.",
        file=kb.path,
        remedy=f"Bring it up to date: {_build_command(kb.path, kind)}",
    )


def _build_command(folder: Path, kind: str) -> str:
    return f"hf-mel kb index {folder} --model MODEL --kind {kind}"


def install_file(kb: KnowledgeBase, record: IndexRecord, path: Path, suffix: str) -> None:
    """Moves the complete file of an index into the knowledge base, writes its record, and deletes files of older ones."""
    store = fsync_and_describe(path)
    store["file"] = _file_name(record.kind, store["sha256"], suffix)
    path.replace(kb.path / store["file"])
    write_record(kb.path, replace(record, shards=kb.shards, store=store))
    for old in kb.path.glob(f"index-{record.kind}-*{suffix}"):
        if old.name != store["file"]:
            old.unlink(missing_ok=True)


def verified_path(folder: Path, record: IndexRecord, suffix: str) -> Path:
    """Returns the file of an index after comparing its size and sha256 with the record.

    Raises:
        KnowledgeBaseError: The file is missing, or is not what was written.
    """
    digest, size = record.store.get("sha256"), record.store.get("bytes")
    # The name is derived from the digest, so that a manipulated record cannot lead out of the folder.
    if not isinstance(digest, str) or not digest.isalnum():
        raise damaged_index_error(record_path(folder, record.kind), record.kind, "it names no file")
    path = folder / _file_name(record.kind, digest, suffix)
    if not path.is_file():
        raise damaged_index_error(path, record.kind, "the file is missing")
    if path.stat().st_size != size:
        raise damaged_index_error(path, record.kind, f"it has {path.stat().st_size:,} bytes, {size:,} were written")
    # Native code must not parse a manipulated file. Reading all of it also warms the page cache for the first searches.
    if file_sha256(path) != digest:
        raise damaged_index_error(path, record.kind, "its content is not what was written")
    return path


def _file_name(kind: str, digest: str, suffix: str) -> str:
    return f"index-{kind}-{digest[:16]}{suffix}"
