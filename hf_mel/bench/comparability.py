"""Checks that results may stand in one table: they need the same protocol on the same data."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_mel.errors import ComparisonError, DataFormatError
from hf_mel.files import file_sha256
from hf_mel.schema import NIL

#: Parts of a protocol → what they are called in messages.
_WORDS = {
    "protocol": "protocol",
    "kb_size": "size of the knowledge base",
    "data": "data",
    "split": "split",
    "config": "configuration of the mentions",
    "num_mentions": "number of mentions",
    "ties": "treatment of ties",
    "candidates": "candidate lists",
}


def protocol_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what two results must have in common to stand in one table.

    Args:
        results (`Mapping`): The results of an evaluation, as `hf-mel evaluate --output` writes them.

    Returns:
        `dict`: "protocol", "kb_size", "data" (sha256, or the name without one), "split", "config", "num_mentions", "ties"
        and "candidates": `None` if the whole knowledge base is ranked, or else source, length and digest of the lists.

    Raises:
        DataFormatError: These are no results of an evaluation.
    """
    try:
        data = results["data"] or {}
        lists = results.get("candidates")
        return {
            "protocol": results["protocol"],
            "kb_size": results["kb_size"],
            "data": data.get("sha256") or data.get("dataset"),
            "split": data.get("split"),
            "config": data.get("config", "mentions"),
            "num_mentions": results["num_mentions"],
            "ties": results["ties"],
            "candidates": None
            if lists is None
            else {"source": lists.get("source"), "k": lists.get("k"), "sha256": lists.get("sha256")},
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise DataFormatError(
            f"These are no results of an evaluation: {error} is missing.",
            remedy="Give the file that `hf-mel evaluate --output` wrote.",
        ) from None


def check_comparable(protocols: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that results may stand in one table.

    Args:
        protocols (`Mapping`): The output of [`protocol_of`] by the name of the results.

    Raises:
        ComparisonError: Two of them have different protocols; names both, and what differs.
    """
    names = list(protocols)
    for name in names[1:]:
        first, other = protocols[names[0]], protocols[name]
        differing = [key for key in _WORDS if first.get(key) != other.get(key)]
        if differing:
            told = "; ".join(
                f"{_WORDS[key]}: {_shown(first.get(key))} and {_shown(other.get(key))}" for key in differing
            )
            raise ComparisonError(
                f"{names[0]!r} and {name!r} cannot stand in one table, because they differ in {told}.",
                remedy="Evaluate both on the same data, with the same knowledge base and the same candidates.",
            )


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {str(item)[:12]}" for key, item in value.items())
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def protocol_line(protocol: Mapping[str, Any]) -> str:
    """Returns a protocol as a sentence for the caption of a table."""
    lists = protocol["candidates"]
    if lists is None:
        ranked = f"all {protocol['kb_size']:,} entities are ranked for every mention"
    else:
        ranked = (
            f"the candidates of {lists['source'] or 'a file'}, up to {lists['k']} for each mention, of {protocol['kb_size']:,} "
            "entities; a gold that is not among them is a miss"
        )
    return f"{protocol['num_mentions']:,} mentions of {protocol['split'] or 'an unnamed split'}; {ranked}; ties {protocol['ties']}"


def load_results(path: Path) -> dict[str, Any]:
    """Reads the results of an evaluation.

    Raises:
        DataFormatError: The file cannot be read, or holds no results of an evaluation.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataFormatError(
            f"The results cannot be read ({error}).", file=path, remedy="Write them with `hf-mel evaluate --output`."
        ) from None
    if not isinstance(content, dict):
        raise DataFormatError("These are no results of an evaluation.", file=path)
    try:
        protocol_of(content)
    except DataFormatError as error:
        raise error.changed(file=path) from None
    return content


def read_predictions(path: Path, with_candidates: bool = False) -> Iterator[dict[str, Any]]:
    """Reads the predictions of an evaluation, record by record.

    Args:
        path (`Path`): The file.
        with_candidates (`bool`): Whether every record must have its candidates.

    Raises:
        DataFormatError: The file cannot be read, or a record lacks a field or its rank is no number; names its row.
    """
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                number += 1
                record = json.loads(line)
                if record["entity_id"] == NIL:
                    record.setdefault("rank", None)
                for name in ("mention_id", "rank", *(("candidates",) if with_candidates else ())):
                    record[name]
                if record["rank"] is not None:
                    float(record["rank"])
                yield record
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataFormatError(
            f"The predictions cannot be read ({error}).",
            file=path,
            row=number or None,
            remedy="Write them with `hf-mel evaluate --predictions`.",
        ) from None


def other_mentions_error(first: Any, name: Any, ids: Collection[str], other_ids: Collection[str]) -> ComparisonError:
    """Returns the error for results of two names that are about other mentions."""
    differing = sorted(set(ids) ^ set(other_ids))
    return ComparisonError(
        f"{first!r} and {name!r} have other mentions, among them {differing[0]!r}.",
        remedy="Evaluate both on the same split.",
    )


class MentionRanks:
    """The rank of the gold of every mention whose gold is in the knowledge base.

    Args:
        ranks (`Mapping[str, float]`): Rank by mention id; `inf` for a gold that was not retrieved.
    """

    def __init__(self, ranks: Mapping[str, float]):
        self.ids = sorted(ranks)
        self.ranks = np.asarray([ranks[mention_id] for mention_id in self.ids], dtype=np.float64)

    @classmethod
    def load(cls, predictions: Path) -> MentionRanks:
        """Reads the predictions of an evaluation.

        Raises:
            DataFormatError: The file cannot be read, or a record lacks its rank.
        """
        return cls(
            {
                record["mention_id"]: float("inf") if record["rank"] is None else float(record["rank"])
                for record in read_predictions(predictions)
                if record["entity_id"] != NIL
            }
        )

    @classmethod
    def of_results(cls, path: Path, results: Mapping[str, Any]) -> MentionRanks:
        """Reads the predictions that belong to results.

        Args:
            path (`Path`): The file of the results.
            results (`Mapping`): Its content.

        Raises:
            ComparisonError: The results were written without predictions, or these have changed since.
        """
        entry = results.get("predictions")
        remedy = "Evaluate again with --output and --predictions."
        if not entry:
            raise ComparisonError(
                "The results have no predictions, so no test can pair mentions.", file=path, remedy=remedy
            )
        file = path.parent / entry["file"]
        if not file.is_file():
            raise ComparisonError(f"The predictions {file} of the results are missing.", file=path, remedy=remedy)
        if file_sha256(file) != entry["sha256"]:
            raise ComparisonError(
                f"The predictions {file} are not those of the results: they were written again since.",
                file=path,
                remedy=remedy,
            )
        return cls.load(file)

    @property
    def mentions(self) -> str:
        """The sha256 of the mention ids, in their order."""
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()

    def scores(self, metric: str) -> np.ndarray:
        """Returns what each mention contributes to a metric, [M]: 1 or 0 for "hits@k", 1 / rank for "mrr"."""
        return scores_of_ranks(self.ranks, metric)


def scores_of_ranks(ranks: np.ndarray, metric: str) -> np.ndarray:
    """Returns what each mention contributes to a metric, [M].

    Args:
        ranks (`np.ndarray` of shape `[M]`): The ranks of the golds; `inf` for one that was not retrieved.
        metric (`str`): "hits@k", to which a mention contributes 1 or 0, or "mrr", to which it contributes 1 / rank.
    """
    return 1 / ranks if metric == "mrr" else (ranks <= int(metric.partition("@")[2])).astype(np.float64)


def packed_ranks(ranks: np.ndarray) -> str:
    """Returns ranks as a short text for a file of results.

    The text is base64 of zlib of 32-bit little-endian integers: twice the rank, because ties give halves, and 0 for a gold
    that was not retrieved.
    """
    doubled = np.where(np.isfinite(ranks), np.round(2 * ranks), 0).astype("<u4")
    return base64.b64encode(zlib.compress(doubled.tobytes(), 9)).decode("ascii")


def unpacked_ranks(text: str) -> np.ndarray:
    """Returns the ranks of the output of [`packed_ranks`], [M].

    Raises:
        DataFormatError: The text is damaged.
    """
    try:
        doubled = np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), dtype="<u4")
    except (binascii.Error, zlib.error, ValueError, TypeError) as error:
        raise DataFormatError(
            f"The ranks of the results are damaged ({error}).", remedy="Take the file that `hf-mel bench` wrote."
        ) from None
    return np.where(doubled == 0, np.inf, doubled / 2)


def mean_scores(ranks: list[MentionRanks], metric: str, names: list[str] | None = None) -> np.ndarray:
    """Returns what each mention contributes to a metric, averaged over runs, [M].

    Args:
        ranks (`list` of [`MentionRanks`]): The ranks of each run, such as one for each seed.
        metric (`str`): "hits@k" or "mrr".
        names (`list` of `str`, *optional*): Names of the runs, for errors.

    Raises:
        ComparisonError: The runs have other mentions.
    """
    for number, run in enumerate(ranks):
        if run.ids != ranks[0].ids:
            name, first = (names[number], names[0]) if names else (number, 0)
            raise other_mentions_error(first, name, ranks[0].ids, run.ids)
    return np.mean([run.scores(metric) for run in ranks], axis=0)
