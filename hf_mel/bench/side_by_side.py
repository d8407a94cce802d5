"""Comparisons of finished evaluations: tests against a baseline, and cases in which systems decide differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_mel.bench.comparability import (
    MentionRanks,
    check_comparable,
    load_results,
    mean_scores,
    other_mentions_error,
    protocol_of,
    read_predictions,
)
from hf_mel.bench.significance import corrected, paired_difference
from hf_mel.bench.suite_results import CORRECTION, TESTED, over_seeds
from hf_mel.errors import ComparisonError


def compare_results(systems: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Compares evaluations of several systems with that of the first one, over the same mentions.

    Args:
        systems (`Mapping[str, Sequence[Path]]`): Name of a system → its results, one file for each seed.

    Returns:
        `dict`: "protocol"; "rows" with "name", "files" and "metrics" over seeds; "tests" as in
        [`~hf_mel.bench.suite_results.suite_results`].

    Raises:
        ComparisonError: The results have other protocols or mentions, or no predictions.
        DataFormatError: A file holds no results.
    """
    if len(systems) < 2:
        raise ComparisonError("A comparison needs the results of two systems.", remedy="Give two files or more.")
    contents = {path: load_results(path) for paths in systems.values() for path in paths}
    check_comparable({str(path): protocol_of(content) for path, content in contents.items()})
    ranks = {
        name: [MentionRanks.of_results(path, contents[path]) for path in paths] for name, paths in systems.items()
    }
    names = [(name, [str(path) for path in paths]) for name, paths in systems.items()]
    rows = [
        {
            "name": name,
            "files": files,
            "metrics": {
                metric: over_seeds([contents[Path(file)]["metrics"].get(metric) for file in files])
                for metric in contents[Path(files[0])]["metrics"]
                if metric.startswith("hits@") or metric in ("mrr", "mr")
            },
        }
        for name, files in names
    ]
    (first, first_files), others = names[0], names[1:]
    tests: list[dict[str, Any]] = []
    for metric in TESTED:
        second = mean_scores(ranks[first], metric, first_files)
        differences = []
        for name, files in others:
            mean_scores([ranks[first][0], ranks[name][0]], metric, [first_files[0], files[0]])  # the same mentions
            differences.append(paired_difference(mean_scores(ranks[name], metric, files), second))
        for (name, _), difference in zip(others, corrected(differences, CORRECTION), strict=True):
            tests.append(
                {"row": name, "against": first, "metric": metric, "correction": CORRECTION, "comparisons": len(others)}
                | difference.to_dict()
            )
    return {"protocol": protocol_of(next(iter(contents.values()))), "rows": rows, "tests": tests}


def cases(predictions: Mapping[str, Path], top: int = 3) -> list[dict[str, Any]]:
    """Returns the best candidates of several systems side by side for the mentions on which they decide differently.

    A mention is a case if its gold is the first candidate of one system and not of another. Cases on which the first
    system is right come first.

    Args:
        predictions (`Mapping[str, Path]`): Name of a system → its predictions, as `hf-mel evaluate --predictions` writes
            them.
        top (`int`): Number of candidates.

    Returns:
        `list` of `dict` with "mention_id", "entity_id" (the gold) and "systems": {name: {"rank", "candidates"}}.

    Raises:
        ComparisonError: The predictions have other mentions, or are those of one system.
        DataFormatError: A file holds no predictions.
    """
    if len(predictions) < 2:
        raise ComparisonError("Cases need the predictions of two systems.", remedy="Give two files or more.")
    records = {
        name: {record["mention_id"]: record for record in read_predictions(path, with_candidates=True)}
        for name, path in predictions.items()
    }
    first = next(iter(records.values()))
    for name, of_system in records.items():
        if of_system.keys() != first.keys():
            raise other_mentions_error(next(iter(records)), name, first, of_system)
    found = []
    for mention_id, record in first.items():
        rows = {name: of_system[mention_id] for name, of_system in records.items()}
        right = [row["rank"] is not None and row["rank"] <= 1 for row in rows.values()]
        if any(right) and not all(right):
            shown = {name: {"rank": row["rank"], "candidates": row["candidates"][:top]} for name, row in rows.items()}
            case = {"mention_id": mention_id, "entity_id": record["entity_id"], "systems": shown}
            found.append((not right[0], case))
    return [case for _, case in sorted(found, key=lambda item: item[0])]
