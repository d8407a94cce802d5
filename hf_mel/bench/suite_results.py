"""Results of a suite: its cells as rows with mean and standard deviation over seeds, and tests of their differences."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_mel.bench.cells import (
    EVALUATION,
    RUN,
    Cell,
    PreparedCell,
    RowKey,
    cells_by_row,
    prepared_cells,
    read_record,
)
from hf_mel.bench.comparability import (
    MentionRanks,
    check_comparable,
    other_mentions_error,
    packed_ranks,
    protocol_of,
    scores_of_ranks,
    unpacked_ranks,
)
from hf_mel.bench.significance import Difference, corrected, paired_difference
from hf_mel.bench.suite import LIST_ORDER, Suite
from hf_mel.errors import ComparisonError
from hf_mel.evaluation.settings import NUM_CANDIDATES
from hf_mel.files import read_json

#: Metrics whose differences are tested.
TESTED = ("hits@1", "mrr")
#: The correction for many comparisons, by its name in statsmodels.
CORRECTION = "holm"
#: Why a cell is empty that nothing has begun.
NOT_RUN = "It has not been run yet."
#: Entries of metrics that count and are not averaged.
_COUNTS = ("num_ranked", "num_mentions", "num_nil", "num_missed")


def suite_results(
    suite: Suite, runs: Path, command: str, kept: Mapping[RowKey, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Returns the results of a suite, as far as its cells are finished.

    Args:
        suite ([`~hf_mel.bench.suite.Suite`]): The suite.
        runs (`Path`): The folder of its runs.
        command (`str`): The command that runs it.
        kept (`Mapping`, *optional*): Rows of earlier results ([`~hf_mel.bench.kept_rows.rows_to_keep`]). They stand in place of rows
            whose cells are not all finished.

    Returns:
        `dict`: "suite", "title", "description", "command", "budget", "prepared" (what prepared runs took), "rows" and
        "tests". A row has "name", "data", "protocol", "metrics", "strata", "ranks", "inputs", "cost", "versions", "code",
        "commands", and for seeds without a result "empty" with the reason.

    Raises:
        ComparisonError: The seeds of a row were evaluated by different protocols.
        MissingExtraError: The packages for tests are not installed, and the suite has `compare_with`.
    """
    rows = []
    for key, group in cells_by_row(suite, runs).items():
        row = _row(key, group)
        rows.append(dict(kept[key]) if kept and key in kept and row["empty"] else row)
    return {
        "suite": suite.name,
        "title": suite.title,
        "description": suite.description,
        "command": command,
        "budget": {"max_steps": suite.budget.max_steps, "minutes": suite.budget.minutes},
        "compare_with": suite.compare_with,
        "prepared": [_prepared(cell) for cell in prepared_cells(suite, runs)],
        "rows": rows,
        "tests": _tests(suite, rows),
    }


def tables_of(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Divides rows into tables: one for each data set and protocol, in the order of their first row.

    Rows without any result are in the first table of their data set.
    """
    tables: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    first_of: dict[str, tuple[str, str]] = {}
    rows = list(rows)
    for row in rows:
        if row["protocol"] is not None:
            key = row["data"], json.dumps(row["protocol"], sort_keys=True)
            first_of.setdefault(row["data"], key)
            tables.setdefault(key, [])
    for row in rows:
        if row["protocol"] is not None:
            tables[row["data"], json.dumps(row["protocol"], sort_keys=True)].append(row)
        else:
            tables.setdefault(first_of.get(row["data"], (row["data"], "")), []).append(row)
    return list(tables.values())


def over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Returns mean, sample standard deviation (`None` for one seed) and values of a figure over seeds."""
    known = [float(value) for value in values if value is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "values": list(values),
    }


def _prepared(cell: PreparedCell) -> dict[str, Any]:
    record = read_record(cell) or {}
    results = read_json(cell.folder / RUN / "results.json") or {}
    return {
        "name": cell.prepared.name,
        "seed": cell.seed,
        "recipe": cell.prepared.recipe,
        "state": record.get("state", "not run"),
        "reason": record.get("reason"),
        "spent": (record.get("spent") or {}).get("train"),
        "parameters": (results.get("model") or {}).get("parameters"),
        "commands": record.get("commands", []),
    }


def _row(key: RowKey, cells: Sequence[Cell]) -> dict[str, Any]:
    """Returns a row of the results."""
    records = {cell.seed: read_record(cell) for cell in cells}
    finished = [cell for cell in cells if (records[cell.seed] or {}).get("state") == "finished"]
    evaluations = {cell.seed: json.loads((cell.folder / EVALUATION).read_text(encoding="utf-8")) for cell in finished}
    order, note = cells[0].system.order, cells[0].system.note
    protocols = {f"{key.label}, seed {seed}": protocol_of(results) for seed, results in evaluations.items()}
    if order not in (None, LIST_ORDER):
        # A source ranks the knowledge base and keeps the first places, which are those of a ranking of all of it.
        limit = cells[0].evaluate_options(resolved=False).get("num_candidates", NUM_CANDIDATES)
        protocols = {
            name: {**protocol, "protocol": "full", "candidates": None} for name, protocol in protocols.items()
        }
        if protocols:
            note = (
                f"{note} The first {limit:,} places of a ranking without a model; other golds count as misses.".strip()
            )
    check_comparable(protocols)
    first = next(iter(evaluations.values()), None)
    empty = [
        {"seed": cell.seed, "reason": (records[cell.seed] or {}).get("reason") or NOT_RUN}
        for cell in cells
        if cell not in finished
    ]
    kept_records = [record for cell in finished if (record := records[cell.seed]) is not None]
    metrics = {} if first is None else _averaged([results["metrics"] for results in evaluations.values()])
    strata = _strata([results["strata"] for results in evaluations.values()])
    if order not in (None, LIST_ORDER):
        for part in (metrics, *(group for groups in strata.values() for group in groups.values())):
            _drop_unknown(part, limit)
    return {
        "name": key.label,
        "system": key.system,
        "data": key.data,
        "train_fraction": key.train_fraction,
        "sweep": None if key.field is None else {"field": key.field, "value": json.loads(str(key.value))},
        "recipe": cells[0].recipe_name,
        "order": order,
        "note": note,
        "seeds": [cell.seed for cell in finished],
        "protocol": next(iter(protocols.values()), None),
        "metrics": metrics,
        "strata": strata,
        "ranks": _ranks(finished, evaluations),
        "inputs": {str(cell.seed): (records[cell.seed] or {})["inputs"] for cell in finished},
        "cost": _cost(finished, kept_records, list(evaluations.values())),
        "versions": None if first is None else first.get("software"),
        "code": [record.get("code") for record in kept_records],
        "machine": kept_records[0].get("machine") if kept_records else None,
        "commands": kept_records[0]["commands"] if kept_records else [],
        "empty": empty,
    }


def _averaged(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns every metric over seeds; counts, which do not depend on the seed, as they are."""
    return {
        name: metrics[0][name] if name in _COUNTS else over_seeds([part.get(name) for part in metrics])
        for name in metrics[0]
        if name in _COUNTS or metrics[0][name] is None or isinstance(metrics[0][name], int | float)
    }


def _drop_unknown(metrics: dict[str, Any], limit: int) -> None:
    """Drops the metrics that need more places than the first `limit` of a ranking."""
    for name in list(metrics):
        if name == "mr" or (name.startswith("hits@") and int(name.partition("@")[2]) > limit):
            del metrics[name]


def _strata(strata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not strata:
        return {}
    return {
        stratification: {
            group: _averaged([part[stratification][group] for part in strata if group in part.get(stratification, {})])
            for group in groups
        }
        for stratification, groups in strata[0].items()
    }


def _cost(cells: Sequence[Cell], records: Sequence[Any], evaluations: Sequence[Any]) -> dict[str, Any]:
    """Returns what training and evaluation took. Times of a resumed training are those of its last part."""
    if not cells:
        return {}
    trained = [read_json(cell.folder / RUN / "results.json") or {} for cell in cells]
    logs = [read_json(cell.folder / RUN / "training_log.json") or [] for cell in cells]
    train = [(record["spent"].get("train") or {}) for record in records]
    evaluate = [(record["spent"].get("evaluate") or {}) for record in records]
    steps = [max((entry.get("step", 0) for entry in log), default=None) for log in logs]
    speeds = [
        results["num_mentions"] / results["wall_time_seconds"] if results.get("wall_time_seconds") else None
        for results in evaluations
    ]
    return {
        "parameters": (trained[0].get("model") or {}).get("parameters"),
        "train_mentions": (trained[0].get("data") or {}).get("train_mentions"),
        "steps": steps[0] if len(set(steps)) == 1 else over_seeds(steps)["mean"],
        "train_seconds": over_seeds([spent.get("seconds") for spent in train])["mean"],
        "train_cpu_seconds": over_seeds([spent.get("cpu_seconds") or None for spent in train])["mean"],
        "evaluate_seconds": over_seeds([spent.get("seconds") for spent in evaluate])["mean"],
        "evaluate_cpu_seconds": over_seeds([spent.get("cpu_seconds") or None for spent in evaluate])["mean"],
        "mentions_per_second": over_seeds(speeds)["mean"],
        "peak_bytes": max((spent.get("peak_bytes", 0) for spent in [*train, *evaluate]), default=0) or None,
        "resumed": any(spent.get("resumed") for spent in train),
        "device": evaluations[0].get("device"),
    }


def _ranks(cells: Sequence[Cell], evaluations: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Returns the rank of every gold, for tests: "mentions" (a digest of their ids) and "seeds" (packed ranks by seed).

    It is `None` for a row without predictions, which cannot be tested.

    Raises:
        ComparisonError: The seeds have other mentions, or predictions are missing.
    """
    if not cells or not all(evaluations[cell.seed].get("predictions") for cell in cells):
        return None
    ranks = [MentionRanks.of_results(cell.folder / EVALUATION, evaluations[cell.seed]) for cell in cells]
    for cell, of_cell in zip(cells, ranks, strict=True):
        if of_cell.ids != ranks[0].ids:
            raise other_mentions_error(cells[0].label, cell.label, ranks[0].ids, of_cell.ids)
    packed = {str(cell.seed): packed_ranks(of_cell.ranks) for cell, of_cell in zip(cells, ranks, strict=True)}
    return {"mentions": ranks[0].mentions, "seeds": packed}


def _tests(suite: Suite, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the tests of all rows against the row to compare with, corrected within a table and a metric."""
    tests: list[dict[str, Any]] = []

    def scores_of(row: Mapping[str, Any], metric: str) -> np.ndarray:
        ranks = [unpacked_ranks(text) for text in row["ranks"]["seeds"].values()]
        return np.mean([scores_of_ranks(of_seed, metric) for of_seed in ranks], axis=0)

    for table in tables_of(rows):
        filled = [row for row in table if row["protocol"] is not None]
        wanted = [row for name in suite.compare_with for row in filled if name in (row["name"], row["system"])]
        if not wanted:
            continue
        against = wanted[0]
        others = [row for row in filled if row is not against]
        for row in filled:
            if row["ranks"] is None:
                raise ComparisonError(
                    f"{row['name']!r} has no predictions, so no test can pair mentions.",
                    remedy="Evaluate again with --output and --predictions.",
                )
            if row["ranks"]["mentions"] != against["ranks"]["mentions"]:
                raise ComparisonError(
                    f"{row['name']!r} and {against['name']!r} have other mentions.",
                    remedy="Evaluate both on the same split.",
                )
        for metric in TESTED:
            second = scores_of(against, metric)
            differences: list[Difference] = [paired_difference(scores_of(row, metric), second) for row in others]
            for row, difference in zip(others, corrected(differences, CORRECTION), strict=True):
                tests.append(
                    {"data": row["data"], "row": row["name"], "against": against["name"], "metric": metric}
                    | {"correction": CORRECTION, "comparisons": len(others)}
                    | difference.to_dict()
                )
    return tests
