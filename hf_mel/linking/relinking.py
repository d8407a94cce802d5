"""Links again those mentions of stored results that a change of the knowledge base can change, and shows the difference.

A result is its k best entities and their scores. After the knowledge base has changed, it is still right if

- none of its entities was removed or edited (an edited entity has a new row), and
- no new or edited entity reaches the score of the last of them, the *floor*.

The second is proven by bounds, score(q, x) ≤ ⟨q, x⟩ + ⟨w, b⟩ + c ([`~hf_mel.protocols.BoundsScores`]): q, w and c are stored with
the results, so that mentions whose bounds are below the floor are not even encoded. The others are encoded and scored with the
new and edited entities alone. Whom these reach gets a merged list. Only mentions that lost an entity are ranked anew, because
the one after their last is not stored.

What else may change a result:

- Name scores of a mention without namesakes depend on all names, so that it is ranked anew after any change.
- If all ranked entities of a mention are tied, others may be, so that a removal may change their number.
- A reranker reads or ranks mentions of a context together: if one changes, all are reranked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_mel.errors import DataFormatError, KnowledgeBaseError
from hf_mel.files import link_target
from hf_mel.inference.fingerprint import model_difference
from hf_mel.inference.ranking import TIE_TOLERANCE, RankingResult
from hf_mel.kb.indexes.base import rank_rows
from hf_mel.kb.indexes.certified import iter_bound_vectors
from hf_mel.linking.link_file import check_relinkable, mention_of_row, output_lock
from hf_mel.linking.linker import EntityLinker, MentionBatch
from hf_mel.linking.mentions import locate_mention
from hf_mel.linking.results import LinkResult
from hf_mel.linking.traces import Traces, write_traced
from hf_mel.protocols import bounds_scores

#: Mentions whose bounds are computed at a time, and entities.
_BOUNDED_MENTIONS, _BOUNDED_ENTITIES = 1024, 8192
#: Settings that describe states, which are compared one by one.
_STATES = ("model", "reranker", "kb", "tables", "removed_rows")


@dataclass
class MentionChange:
    """A mention whose result has changed.

    Args:
        line (`int`): Line of the results, counted from 1.
        mention, text (`str`): The mention and its text.
        change (`str`): "link" if it is linked to another entity, "candidates" if others are, or their order is another,
            "entity" if an entity among them was edited.
        before, after (`dict`): `entity_id`, its `name` and `score`, and the ids of all `candidates`.
    """

    line: int
    mention: str
    text: str
    change: str
    before: dict[str, Any]
    after: dict[str, Any]


@dataclass
class Relinking:
    """The effect of a change of the knowledge base on stored results.

    Args:
        num_mentions (`int`): Stored mentions.
        num_new_entities, num_gone_entities (`int`): Entities that were added or edited, and removed or edited, since they
            were linked.
        num_encoded (`int`): Mentions that bounds did not clear, so that they were encoded and scored with the new entities.
        num_ranked (`int`): Those of them that were ranked with the whole knowledge base.
        changes (`list[MentionChange]`): Results that differ: links first, in the order of the results.
    """

    num_mentions: int
    num_new_entities: int
    num_gone_entities: int
    num_encoded: int = 0
    num_ranked: int = 0
    changes: list[MentionChange] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)


def relink_file(
    linker: EntityLinker,
    results: str | Path,
    output: str | Path | None = None,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> Relinking:
    """Links again what a change of the knowledge base can change. The results are those of linking all mentions anew.

    Scores that differ by no more than rounding may change places, as in two runs of other batch sizes. Images and texts are
    taken to be as they were.

    Args:
        linker ([`EntityLinker`]): A linker with the models and settings that linked the results, and the changed knowledge
            base.
        results (`str` or `Path`): The .jsonl file that [`~hf_mel.linking.link_file.link_file`] wrote with traces.
        output (`str` or `Path`, *optional*): The .jsonl file of the new results, with traces of their own; it may be that of
            the old ones. Default: nothing is written.
        batch_size (`int`): Mentions per pass over the knowledge base.
        progress (`bool`): Whether to show progress bars.

    Returns:
        [`Relinking`].

    Raises:
        DataFormatError: The results have no traces, were changed (before or meanwhile), or are damaged; or other models or
            settings linked them.
        KnowledgeBaseError: The knowledge base is another one, or was built again.
        ImageError: An image of a mention is missing.
        MelError: The output cannot be written.
    """
    results, target = Path(results), None if output is None else link_target(output)
    with nullcontext() if target is None else output_lock(target):
        state = _file_state(results)
        traces = Traces.read(results)
        _check_same(linker, traces, results)
        if output is not None:
            check_relinkable(linker, output)
        return _Relinker(linker, results, state, traces, batch_size, progress).run(target)


def _file_state(path: Path) -> tuple[int, ...]:
    """Returns what another file of the same name, or a change of this one, has otherwise."""
    try:
        state = path.stat()
    except OSError:
        return ()  # reading tells why
    return state.st_ino, state.st_size, state.st_mtime_ns


def _check_same(linker: EntityLinker, traces: Traces, results: Path) -> None:
    """Checks that a linker would have linked the results, but for the change of the knowledge base."""
    stored, current = traces.settings, json.loads(json.dumps(linker.describe(), default=str))
    for part in ("model", "reranker"):
        one, other = stored[part], current[part]
        if one is None and other is None:
            continue
        difference = "there was none, or is none now" if None in (one, other) else model_difference(one, other)
        if difference is not None:
            raise DataFormatError(
                f"The results were linked by another {part}: {difference}.",
                file=results,
                remedy="Give the one that linked them, or link the mentions anew: hf-mel link --relinkable.",
            )
    kb = stored["kb"]
    if (
        current["kb"][: len(kb)] != kb
        or current["tables"][: len(kb)] != stored["tables"]
        or not set(stored["removed_rows"]) <= set(current["removed_rows"])
    ):
        raise KnowledgeBaseError(
            "The results are not of this knowledge base, or it was built or saved again since, which moves its rows.",
            file=linker.kb.path,
            remedy="Give the one that was changed (kb add, kb remove, kb update), or link the mentions anew: "
            "hf-mel link --relinkable.",
        )
    names = (stored.keys() | current.keys()) - {*_STATES, "top_k"}
    if others := sorted(name for name in names if stored.get(name) != current.get(name)):
        text = ", ".join(f"{name} was {stored.get(name)!r} and is {current.get(name)!r}" for name in others)
        raise DataFormatError(
            f"The results were linked with other settings: {text}.",
            file=results,
            remedy="Give those that linked them.",
        )


class _Relinker:
    """One run of [`relink_file`]."""

    def __init__(
        self,
        linker: EntityLinker,
        results: Path,
        state: tuple[int, ...],
        traces: Traces,
        batch_size: int,
        progress: bool,
    ):
        self.linker, self.results, self.state, self.traces = linker, results, state, traces
        self.batch_size, self.progress = batch_size, progress
        kb, self.top_k = linker.kb, int(traces.settings["top_k"])
        num_stored = sum(rows for rows, _ in traces.settings["kb"])
        #: Rows of the new and edited entities that are ranked, ascending.
        self.new_rows = np.arange(np.searchsorted(kb.physical_rows(np.arange(len(kb))), num_stored), len(kb))
        if (ranked := linker.ranked_rows()) is not None:
            self.new_rows = np.intersect1d(self.new_rows, ranked)
        self.num_results = min(linker.num_ranked(self.top_k), len(kb) if ranked is None else len(ranked))
        self.num_gone = kb.num_physical_rows - len(kb) - len(traces.settings["removed_rows"])
        self.has_changed = bool(self.num_gone) or kb.num_physical_rows > num_stored
        is_ranked = traces.physical_rows >= 0
        self.rows = np.where(is_ranked, kb.rows_of_physical(np.where(is_ranked, traces.physical_rows, 0)), -1)
        self.lost = (is_ranked & (self.rows < 0)).any(1)
        width = traces.scores.shape[1]
        last = traces.scores[:, -1].astype(np.float64) if width else np.full(len(traces), -np.inf)
        last[~np.isfinite(last)] = -np.inf
        self.floors = last - TIE_TOLERANCE * np.maximum(1.0, np.abs(last))
        if width < linker.num_ranked(self.top_k):  # there is room for more
            self.floors[:] = -np.inf
        #: The highest score that a new entity could have, where bounds clear a mention; -inf for the others.
        self.highest = np.full(len(traces), -np.inf)
        self.offsets = _line_offsets(results)
        if len(traces) and traces.lines.max() >= len(self.offsets):
            raise DataFormatError("The traces name lines that the results do not have.", file=results)
        self.report = Relinking(len(traces), len(self.new_rows), self.num_gone)

    def run(self, output: Path | None) -> Relinking:
        """Links again, and writes the new results."""
        changed: dict[int, LinkResult] = {}
        if self.has_changed:
            must = self.lost | ((self.traces.num_tied >= self.traces.scores.shape[1]) & (self.num_gone > 0))
            if self.linker.name_weight:
                must |= ~self._keep_namesakes()
            reached = self._bounded(~must)
            for positions, linked in self._linked(must, reached):
                changed.update(zip(positions, linked, strict=True))
        before = self._compared(changed)
        self.report.changes.sort(key=lambda change: (change.change != "link", change.line))
        if _file_state(self.results) != self.state:
            raise DataFormatError(
                "The results were changed while they were linked again.",
                file=self.results,
                remedy="Repeat the command.",
            )
        if output is not None:
            self._write(output, changed, before)
        return self.report

    def _keep_namesakes(self) -> np.ndarray:
        """Returns which mentions had namesakes and have some: the names change no score of an old entity for them."""
        still = {surface: self.linker.has_namesakes(surface) for surface in set(self._surfaces)}
        return self.traces.has_namesakes & np.array([still[surface] for surface in self._surfaces], dtype=bool)

    @cached_property
    def _surfaces(self) -> list[str]:
        """The surface form of each mention, [M]."""
        return [record["linked"]["mention"] for _, record in self._records(range(len(self.traces)))]

    def _bounded(self, asked: np.ndarray) -> np.ndarray:
        """Returns which of the `asked` mentions [M] a new entity may reach, by their bounds; sets `highest`."""
        linker, queries = self.linker, self.traces.queries
        if not len(self.new_rows):
            return np.zeros(len(asked), dtype=bool)
        if queries is None or not bounds_scores(linker.model):
            return asked.copy()
        highest = np.full(len(asked), -np.inf)
        bar = tqdm(total=len(asked), desc="Bounding", unit="mention", delay=1, disable=not self.progress)
        vectors, extras = self._new_vectors()
        with bar:
            for first in range(0, len(asked), _BOUNDED_MENTIONS):
                some = slice(first, min(first + _BOUNDED_MENTIONS, len(asked)))
                surfaces = self._surfaces[some] if linker.name_weight else [""] * (some.stop - first)
                _, added = linker.added_scores(surfaces)
                added = None if added is None else added.among(self.new_rows)
                for start in range(0, len(vectors), _BOUNDED_ENTITIES):
                    block = slice(start, start + _BOUNDED_ENTITIES)
                    bounds = torch.from_numpy(queries[some].bounds(vectors[block], extras[block]))
                    if added is not None:
                        added.add_to(bounds, 0, start)
                    highest[some] = np.maximum(highest[some], bounds.amax(1).numpy())
                bar.update(some.stop - first)
        reached = asked & ~(highest < self.floors)
        is_cleared = asked & ~reached
        self.highest[is_cleared] = highest[is_cleared]
        return reached

    def _new_vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns x [A, D] and b [A, R] of the A new and edited entities."""
        kb = self.linker.kb
        chosen = kb.physical_rows(self.new_rows)
        parts = []
        for start, vectors, extras in iter_bound_vectors(kb, self.linker.model, int(chosen[0])):
            inside = chosen[(chosen >= start) & (chosen < start + len(vectors))] - start
            parts.append((vectors[inside], extras[inside]))
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _linked(self, must: np.ndarray, reached: np.ndarray) -> Iterator[tuple[list[int], list[LinkResult]]]:
        """Encodes the mentions that may change, and yields the positions and results of those that do."""
        positions = np.flatnonzero(must | reached).tolist()
        if self.linker.reranker is not None:
            every = [self._mention(*pair) for pair in self._records(range(len(self.traces)))]
            keys = [self.linker.example_key(mention) for mention in every]
            chosen = {keys[position] for position in positions}
            positions = [position for position, key in enumerate(keys) if key in chosen]
        mentions = _Mentions(self, positions)
        with tqdm(total=len(positions), desc="Relinking", unit="mention", delay=1, disable=not self.progress) as bar:
            for numbers in self.linker.batches(mentions, self.batch_size):
                batch_mentions = [mentions[number] for number in numbers]
                of_batch = np.asarray([positions[number] for number in numbers])
                spans = [locate_mention(mention, None) for mention in batch_mentions]
                batch = self.linker.encode_batch(batch_mentions, spans, of_batch.tolist())
                ranking, is_changed = self._ranking(batch, of_batch, must[of_batch])
                if self.linker.reranker is not None and is_changed.any():
                    is_changed[:] = True
                self.report.num_encoded += len(numbers)
                bar.update(len(numbers))
                if is_changed.any():
                    kept = np.flatnonzero(is_changed).tolist()
                    linked = self.linker.link_encoded(
                        batch.select(kept), top_k=self.top_k, ranking=_select_ranking(ranking, kept), traced=True
                    )
                    yield of_batch[kept].tolist(), linked

    def _ranking(
        self, batch: MentionBatch, positions: np.ndarray, must: np.ndarray
    ) -> tuple[RankingResult, np.ndarray]:
        """Returns the ranking of the M mentions of a batch, and which of them differ from the stored ones.

        Args:
            batch: The mentions.
            positions (`np.ndarray` `[M]`): Their numbers among the stored ones.
            must (`np.ndarray` `[M]`): Those that are ranked anew.
        """
        linker, count = self.linker, len(positions)
        rows = torch.zeros(count, self.num_results, dtype=torch.long)
        scores = torch.full((count, self.num_results), -torch.inf)
        bounds, is_changed = torch.full((count,), -torch.inf), must.copy()
        if must.any():
            anew = np.flatnonzero(must).tolist()
            chosen = batch.select(anew)
            found = linker.index.find(
                chosen.encodings, self.num_results, added=chosen.added, rows=linker.ranked_rows()
            )
            rows[anew], scores[anew] = found.top_rows, found.top_scores
            if found.bounds is not None:
                bounds[anew] = found.bounds
            self.report.num_ranked += len(anew)
        others = np.flatnonzero(~must).tolist()
        if not others:
            return RankingResult(scores, rows, bounds=bounds), is_changed
        stored_rows, stored_scores = self.rows[positions[others]], self.traces.scores[positions[others]]
        new_rows = np.empty((len(others), 0), dtype=np.int64)
        new_scores = np.empty((len(others), 0), dtype=np.float32)
        if len(self.new_rows):
            chosen = batch.select(others)
            # Of equal scores the lower row comes first, and new rows come last.
            count = min(self.num_results, len(self.new_rows))
            found = rank_rows(
                linker.model, chosen.encodings, linker.kb, self.new_rows, top_k=count, added=chosen.added
            )
            new_rows, new_scores = found.top_rows.numpy(), found.top_scores.numpy()
            is_changed[others] = new_scores[:, 0] >= self.floors[positions[others]]
        merged_rows = np.concatenate([stored_rows, new_rows], 1)
        merged_scores = np.concatenate([stored_scores, new_scores], 1)
        order = np.lexsort((merged_rows, -merged_scores), axis=1)[:, : self.num_results]
        rows[others] = torch.from_numpy(np.take_along_axis(merged_rows, order, 1))
        scores[others] = torch.from_numpy(np.take_along_axis(merged_scores, order, 1))
        stored_bounds = [record["linked"]["bound"] for _, record in self._records(positions[others].tolist())]
        bounds[others] = torch.tensor([-torch.inf if bound is None else bound for bound in stored_bounds])
        return RankingResult(scores, rows, bounds=bounds), is_changed

    def _records(self, positions: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the positions and the stored lines of mentions."""
        with self.results.open("rb") as file:
            for position in positions:
                file.seek(self.offsets[self.traces.lines[position]])
                yield position, json.loads(file.readline())

    def _mention(self, position: int, record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the mention of a stored line."""
        row = {name: value for name, value in record.items() if name != "linked"}
        try:
            return mention_of_row(self.traces.origin.input, int(self.traces.lines[position]) + 1, row)
        except DataFormatError as error:
            raise error.changed(file=self.results) from error

    def _compared(self, changed: Mapping[int, LinkResult]) -> dict[int, dict[str, Any]]:
        """Compares new results with the stored ones, and returns the lines of those."""
        stored = dict(self._records(sorted(changed)))
        for position, record in stored.items():
            old, new = record["linked"], changed[position].to_dict()
            ids = [[candidate["entity_id"] for candidate in result["candidates"]] for result in (old, new)]
            if _decision(old) != _decision(new):
                change = "link"
            elif ids[0] != ids[1]:
                change = "candidates"
            elif [_texts(candidate) for candidate in old["candidates"]] != [_texts(c) for c in new["candidates"]]:
                change = "entity"
            else:
                continue
            line = int(self.traces.lines[position]) + 1
            sides = [_side(old, ids[0]), _side(new, ids[1])]
            text = record.get("text") or ""
            self.report.changes.append(MentionChange(line, old["mention"], text, change, *sides))
        return stored

    def _write(self, output: Path, changed: Mapping[int, LinkResult], stored: Mapping[int, Mapping[str, Any]]) -> None:
        """Writes the new results and their traces."""
        positions = {int(line): position for position, line in enumerate(self.traces.lines)}

        def lines() -> Iterator[str]:
            with self.results.open("rb") as file:
                for number in range(len(self.offsets)):
                    line = file.readline()
                    position = positions.get(number, -1)
                    if position in changed:
                        record = {**stored[position], "linked": changed[position].to_dict()}
                    elif position >= 0 and self.highest[position] > -np.inf:
                        record = json.loads(line)
                        bound = record["linked"]["bound"]
                        record["linked"]["bound"] = max(self.highest[position], -np.inf if bound is None else bound)
                    else:
                        yield line.decode()
                        continue
                    yield json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"

        traces = self.traces
        traces.widen(self.num_results)
        for position, result in changed.items():
            assert result.trace is not None
            traces.replace(position, result.trace)
        traces.settings = {**self.linker.describe(), "top_k": self.top_k}
        write_traced(output, lines(), lambda: traces)


class _Mentions:
    """The mentions at some positions of stored results, read when they are asked for."""

    def __init__(self, relinker: _Relinker, positions: list[int]):
        self.relinker, self.positions = relinker, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int) -> dict[str, Any]:
        ((position, record),) = self.relinker._records([self.positions[number]])
        return self.relinker._mention(position, record)


def _line_offsets(path: Path) -> list[int]:
    """Returns the offset of each line of a file."""
    offsets, end = [], 0
    with path.open("rb") as file:
        for line in file:
            offsets.append(end)
            end += len(line)
    return offsets


def _select_ranking(ranking: RankingResult, numbers: list[int]) -> RankingResult:
    """Returns the ranking of some mentions."""
    assert ranking.bounds is not None
    return RankingResult(ranking.top_scores[numbers], ranking.top_rows[numbers], bounds=ranking.bounds[numbers])


def _decision(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return result["entity_id"], result["is_nil"], result["needs_review"]


def _texts(candidate: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(candidate[column] for column in ("name", "description", "attributes"))


def _side(result: Mapping[str, Any], ids: list[str]) -> dict[str, Any]:
    """Returns one side of a difference."""
    best = result["candidates"][0]
    return {"entity_id": result["entity_id"], "name": best["name"], "score": best["score"], "candidates": ids}
