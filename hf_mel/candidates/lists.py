"""Candidate lists: the few entities each mention may mean, with scores by source, kept in a Parquet file."""

from __future__ import annotations

import hashlib
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

from hf_mel.errors import DataFormatError, MelError, RecipeError, UnknownEntityError
from hf_mel.files import local_path, replace_file
from hf_mel.schema import NIL

#: The source of [`CandidateLists`] whose scores are p(e|m).
PRIOR = "prior"
#: The source whose scores are the share of each of the mention's namesakes.
DICTIONARY = "dictionary"

#: The source whose scores a reranker starts from.
_RETRIEVER = "retriever"

#: Key of the Parquet metadata that holds the setting, and marks the file as one of candidates.
_METADATA_KEY = b"hf_mel.candidates"
#: Prefix of a column of scores, before the name of the source.
_SCORE_PREFIX = "score "


def missing_candidates_error(model: str, remedy: str) -> RecipeError:
    """Returns the error for a reranker without candidates. `remedy` names the arguments or options that give them."""
    return RecipeError(f"{model} reranks candidates, but none were given.", remedy=remedy)


@dataclass
class CandidateLists:
    """Candidates of M mentions, with the scores of the sources they came from.

    Args:
        mention_ids (`list` of `str` `[M]`): The mentions.
        entity_ids (`list` of `list` of `str` `[M]`): Their candidates, best first and without duplicates. A list may be
            empty.
        scores (`dict`): The scores of each source ("name", "prior", "retriever", …), as lists in the shape of
            `entity_ids`. Higher is better; nan for a candidate that this source did not give.
        setting (`dict`): How the lists were made.

    Raises:
        `ValueError`: The lengths of the arguments do not match.
    """

    mention_ids: list[str]
    entity_ids: list[list[str]]
    scores: dict[str, list[list[float]]]
    setting: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        lengths = list(map(len, self.entity_ids))
        if len(self.mention_ids) != len(lengths):
            raise ValueError(f"{len(self.mention_ids)} mentions need as many lists, not {len(lengths)}.")
        for source, scores in self.scores.items():
            if list(map(len, scores)) != lengths:
                raise ValueError(f"The number of scores of {source!r} is not the number of candidates.")

    def __len__(self) -> int:
        return len(self.mention_ids)

    @property
    def by_mention(self) -> dict[str, list[str]]:
        """Candidates by mention id."""
        return dict(zip(self.mention_ids, self.entity_ids, strict=True))

    @property
    def priors(self) -> dict[str, dict[str, float]] | None:
        """p(e|m) of the candidates by mention id and entity id; `None` without priors.

        Of the sources "prior" (counts of links) and "dictionary" (names), it is the mean if there are both, as in MM-nel
        (§4.1). A candidate that neither gave is missing; its prior is 0.

        Raises:
            DataFormatError: A prior is negative or infinite; names the mention.
        """
        halves = [self.scores[source] for source in (PRIOR, DICTIONARY) if source in self.scores]
        if not halves:
            return None
        priors: dict[str, dict[str, float]] = {}
        for mention_id, entity_ids, *scores in zip(self.mention_ids, self.entity_ids, *halves, strict=True):
            priors[mention_id] = {}
            for entity_id, *values in zip(entity_ids, *scores, strict=True):
                given = [value for value in values if not math.isnan(value)]
                for value in given:
                    if not 0 <= value < math.inf:
                        raise DataFormatError(
                            f"The prior of the candidate {entity_id!r} is {value}.",
                            row=mention_id,
                            remedy="Give probabilities p(e|m) as priors.",
                        )
                if given:
                    priors[mention_id][entity_id] = float(sum(given)) / len(halves)
        return priors

    @property
    def relative_scores(self) -> dict[str, dict[str, float]] | None:
        """Scores by mention id and entity id, less the best score of the mention, so at most 0.

        They are the scores of the source "retriever", or without it those of the only source that has any but priors.
        Without such a source the value is `None`. A candidate that the source did not give has the lowest score of its
        list; a list without any score has zeros.
        """
        sources = [source for source in self.scores if source != PRIOR and any(map(_has_number, self.scores[source]))]
        if _RETRIEVER in sources:
            sources = [_RETRIEVER]
        if len(sources) != 1:
            return None
        relative: dict[str, dict[str, float]] = {}
        for mention_id, entity_ids, scores in zip(
            self.mention_ids, self.entity_ids, self.scores[sources[0]], strict=True
        ):
            numbers = [score for score in scores if not math.isnan(score)] or [0.0]
            best, lowest = max(numbers), min(numbers)
            relative[mention_id] = {
                entity_id: (lowest if math.isnan(score) else score) - best
                for entity_id, score in zip(entity_ids, scores, strict=True)
            }
        return relative

    def check_relative_scores(self) -> None:
        """Raises a [`~hf_mel.errors.RecipeError`] if [`CandidateLists.relative_scores`] has no scores."""
        if self.relative_scores is None:
            raise RecipeError(
                "The model reads the scores of the list that it reranks, but the candidates have none, or those of several "
                "sources without a retriever.",
                remedy="Make the candidates from one source: retriever, or name.",
            )

    @property
    def sha256(self) -> str:
        """Digest of the mentions and their candidates, which is the same for the same lists, however they were made."""
        return hashlib.sha256(json.dumps([self.mention_ids, self.entity_ids]).encode()).hexdigest()

    @property
    def longest(self) -> int:
        """Length of the longest list."""
        return max(map(len, self.entity_ids), default=0)

    def top(self, k: int) -> CandidateLists:
        """Returns the first `k` candidates of every mention."""
        return self._map(lambda values: values[:k], range(len(self)), {**self.setting, "k": k})

    def for_mentions(self, mentions: datasets.Dataset) -> CandidateLists:
        """Returns the lists of these mentions, in their order.

        Raises:
            DataFormatError: A mention has no list. An empty list is allowed.
        """
        row_of = {mention_id: row for row, mention_id in enumerate(self.mention_ids)}
        missing = [mention_id for mention_id in mentions["mention_id"] if mention_id not in row_of]
        if missing:
            raise DataFormatError(
                f"The candidate lists lack {len(missing)} of {len(mentions)} mentions, among them {missing[0]!r}.",
                remedy="Make the candidates from the same data set and split.",
            )
        return self._map(list, [row_of[mention_id] for mention_id in mentions["mention_id"]], self.setting)

    def rows(self, entity_ids: Sequence[str]) -> list[list[int]]:
        """Returns the candidates as row numbers of a knowledge base.

        Args:
            entity_ids (sequence of `str` `[N]`): Ids of the knowledge base.

        Raises:
            UnknownEntityError: A candidate is not in the knowledge base; names the mention.
        """
        row_of = {entity_id: row for row, entity_id in enumerate(entity_ids)}
        rows = []
        for mention_id, candidates in zip(self.mention_ids, self.entity_ids, strict=True):
            for entity_id in candidates:
                if entity_id not in row_of:
                    raise UnknownEntityError(
                        f"The candidate {entity_id!r} is not in the knowledge base.",
                        row=mention_id,
                        remedy="Make the candidates from this knowledge base.",
                    )
            rows.append([row_of[entity_id] for entity_id in candidates])
        return rows

    def recall(self, golds: Sequence[str], ks: Iterable[int]) -> dict[str, float]:
        """Returns, as "recall@k", the fraction of mentions whose gold is among their first k candidates.

        Mentions whose gold is NIL do not count.
        """
        places = [
            candidates.index(gold) if gold in candidates else math.inf
            for gold, candidates in zip(golds, self.entity_ids, strict=True)
            if gold != NIL
        ]
        return {
            f"recall@{k}": sum(place < k for place in places) / len(places) if places else math.nan
            for k in sorted(set(ks))
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a Parquet file, which appears only when it is complete.

        Raises:
            MelError: The file cannot be written.
        """
        path = Path(path)
        columns: dict[str, pa.Array] = {
            "mention_id": pa.array(self.mention_ids, pa.string()),
            "entity_ids": pa.array(self.entity_ids, pa.list_(pa.string())),
        }
        for source, scores in self.scores.items():
            columns[_SCORE_PREFIX + source] = pa.array(scores, pa.list_(pa.float32()))
        table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(self.setting).encode()})
        try:
            with replace_file(path) as temporary:
                pq.write_table(table, local_path(temporary))
        except OSError as error:
            raise MelError(
                f"The candidates cannot be written ({error}).", file=path, remedy="Choose another path."
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CandidateLists:
        """Reads a file that [`CandidateLists.save`] wrote.

        Raises:
            DataFormatError: The file does not exist, or holds no candidates.
        """
        remedy = "Write one with `hf-mel candidates`."
        try:
            table = pq.ParquetFile(local_path(path)).read()
            table.validate(full=True)  # of damaged texts, too, which Arrow would return
            metadata = table.schema.metadata or {}
            if _METADATA_KEY not in metadata:
                raise DataFormatError("The file holds no candidates.", file=path, remedy=remedy)
            scores = {
                name.removeprefix(_SCORE_PREFIX): table[name].to_pylist()
                for name in table.column_names
                if name.startswith(_SCORE_PREFIX)
            }
            setting = json.loads(metadata[_METADATA_KEY])
            return cls(table["mention_id"].to_pylist(), table["entity_ids"].to_pylist(), scores, setting)
        except MelError:
            raise
        # Arrow raises ValueError for names that are no UTF-8, and columns may be missing or of another type.
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataFormatError(
                f"The file of candidates cannot be read ({error}).", file=path, remedy=remedy
            ) from error

    def _map(self, change: Callable[[list], list], rows: Iterable[int], setting: dict[str, Any]) -> CandidateLists:
        rows = list(rows)
        return CandidateLists(
            [self.mention_ids[row] for row in rows],
            [change(self.entity_ids[row]) for row in rows],
            {source: [change(scores[row]) for row in rows] for source, scores in self.scores.items()},
            setting,
        )


def _has_number(scores: Sequence[float]) -> bool:
    return not all(map(math.isnan, scores))
