"""hf_mel.candidates.lists."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from hf_mel.errors import DataFormatError, MelError, UnknownEntityError
from hf_mel.schema import NIL

#: The source of [`CandidateLists.scores`] whose scores are p(e|m).
PRIOR = "prior"


_FORMAT = b"hf_mel.candidates"


_SCORE = "score "


@dataclass
class CandidateLists:
    """Candidates of M mentions, and where each came from.

    Args:
        mention_ids (`list` of `str` `[M]`): The mentions.
        entity_ids (`list` of `list` of `str` `[M]`): Their candidates, best first, none twice; a list may be empty.
        scores (`dict`): By source ("name", "prior", "retriever", …), the score it gave each candidate, as lists like
            `entity_ids`; higher is better, nan for a candidate that came from other sources only.
        setting (`dict`): How the lists were made.
    """

    mention_ids: list[str]
    entity_ids: list[list[str]]
    scores: dict[str, list[list[float]]]
    setting: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        lengths = [len(each) for each in self.entity_ids]
        if len(self.mention_ids) != len(lengths):
            raise ValueError(f"{len(self.mention_ids)} mentions need as many lists, not {len(lengths)}.")
        for source, scores in self.scores.items():
            if [len(each) for each in scores] != lengths:
                raise ValueError(f"The scores of {source!r} are not as many as the candidates.")

    def __len__(self) -> int:
        return len(self.mention_ids)

    @property
    def by_mention(self) -> dict[str, list[str]]:
        """The candidates by mention id."""
        return dict(zip(self.mention_ids, self.entity_ids, strict=True))

    @property
    def priors(self) -> dict[str, dict[str, float]] | None:
        """p(e|m) of the candidates by mention id and entity id; `None` if no source gave any.

        A candidate that came from other sources only is not in it: its prior is 0.

        Raises:
            DataFormatError: A prior is negative or infinite; names the mention.
        """
        if PRIOR not in self.scores:
            return None
        found: dict[str, dict[str, float]] = {}
        for mention_id, listed, scores in zip(self.mention_ids, self.entity_ids, self.scores[PRIOR], strict=True):
            found[mention_id] = {e: float(s) for e, s in zip(listed, scores, strict=True) if not math.isnan(s)}
            wrong = [e for e, prior in found[mention_id].items() if not 0 <= prior < math.inf]
            if wrong:
                raise DataFormatError(
                    f"the prior of the candidate {wrong[0]!r} is {found[mention_id][wrong[0]]}.",
                    row=mention_id,
                    remedy="A prior is a probability, p(e|m).",
                )
        return found

    @property
    def longest(self) -> int:
        """The length of the longest list."""
        return max(map(len, self.entity_ids), default=0)

    def top(self, k: int) -> CandidateLists:
        """The first `k` candidates of every mention."""
        return self._map(lambda values: values[:k], range(len(self)), {**self.setting, "k": k})

    def of(self, mentions: datasets.Dataset) -> CandidateLists:
        """The lists of these mentions, in their order.

        Raises:
            DataFormatError: A mention has no list (an empty one is a list).
        """
        row_of = {mention_id: row for row, mention_id in enumerate(self.mention_ids)}
        missing = [mention_id for mention_id in mentions["mention_id"] if mention_id not in row_of]
        if missing:
            raise DataFormatError(
                f"there are no candidates of {len(missing)} of {len(mentions)} mentions, among them {missing[0]!r}.",
                remedy="Make the candidates from the same data set and split.",
            )
        return self._map(list, [row_of[mention_id] for mention_id in mentions["mention_id"]], self.setting)

    def rows(self, entity_ids: Sequence[str]) -> list[list[int]]:
        """The candidates as row numbers of a knowledge base.

        Args:
            entity_ids (sequence of `str` `[N]`): Ids of the knowledge base.

        Raises:
            UnknownEntityError: A candidate is not in it; names the mention.
        """
        row_of = {entity_id: row for row, entity_id in enumerate(entity_ids)}
        found = []
        for mention_id, listed in zip(self.mention_ids, self.entity_ids, strict=True):
            for entity_id in listed:
                if entity_id not in row_of:
                    raise UnknownEntityError(
                        f"the candidate {entity_id!r} is not in the knowledge base.",
                        row=mention_id,
                        remedy="Make the candidates from this knowledge base.",
                    )
            found.append([row_of[entity_id] for entity_id in listed])
        return found

    def recall(self, golds: Sequence[str], ks: Iterable[int]) -> dict[str, float]:
        """Share of the mentions with a gold (not NIL) that have it among their first k candidates, as "recall@k"."""
        places = [
            listed.index(gold) if gold in listed else math.inf
            for gold, listed in zip(golds, self.entity_ids, strict=True)
            if gold != NIL
        ]
        return {
            f"recall@{k}": sum(place < k for place in places) / len(places) if places else math.nan
            for k in sorted(set(ks))
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a Parquet file, whole or not at all.

        Raises:
            MelError: The place cannot be written to.
        """
        path = Path(path)
        columns: dict[str, pa.Array] = {
            "mention_id": pa.array(self.mention_ids, pa.string()),
            "entity_ids": pa.array(self.entity_ids, pa.list_(pa.string())),
        }
        for source, scores in self.scores.items():
            columns[_SCORE + source] = pa.array(scores, pa.list_(pa.float32()))
        table = pa.table(columns).replace_schema_metadata({_FORMAT: json.dumps(self.setting).encode()})
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                pq.write_table(table, temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise MelError(f"Cannot be written ({error}).", file=path, remedy="Give another place.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CandidateLists:
        """Reads what [`CandidateLists.save`] wrote.

        Raises:
            DataFormatError: No such file, or not one of candidates.
        """
        try:
            table = pq.ParquetFile(path).read()
        except (OSError, pa.ArrowException) as error:
            raise DataFormatError(
                f"cannot be read ({error}).", file=path, remedy="Write one with `hf-mel candidates`."
            ) from error
        metadata = table.schema.metadata or {}
        if _FORMAT not in metadata:
            raise DataFormatError("holds no candidates.", file=path, remedy="Write one with `hf-mel candidates`.")
        scores = {
            name.removeprefix(_SCORE): table[name].to_pylist()
            for name in table.column_names
            if name.startswith(_SCORE)
        }
        return cls(
            table["mention_id"].to_pylist(), table["entity_ids"].to_pylist(), scores, json.loads(metadata[_FORMAT])
        )

    def _map(self, change: Callable[[list], list], rows: Iterable[int], setting: dict[str, Any]) -> CandidateLists:
        rows = list(rows)
        return CandidateLists(
            [self.mention_ids[row] for row in rows],
            [change(self.entity_ids[row]) for row in rows],
            {source: [change(scores[row]) for row in rows] for source, scores in self.scores.items()},
            setting,
        )
