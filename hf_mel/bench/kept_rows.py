"""Rows of earlier results that stand in the results of a suite without being run again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_mel.bench.cells import Cell, RowKey, cells_by_row, empty_reason, inputs_digest
from hf_mel.bench.suite import Suite
from hf_mel.errors import DataFormatError
from hf_mel.files import read_json


def rows_to_keep(suite: Suite, runs: Path, file: Path, versions: Mapping[str, Any]) -> dict[RowKey, dict[str, Any]]:
    """Returns the rows of an earlier file of results that a suite needs not run again.

    A row is kept if it has a result for every seed of the suite, and if all that these depend on is the same: recipe, options
    of the evaluation, data, and the models and files that they name. The code is not among it, as for finished cells.

    Args:
        suite ([`~hf_mel.bench.suite.Suite`]): The suite.
        runs (`Path`): The folder of its runs.
        file (`Path`): The results, as `hf-mel bench` wrote them.
        versions (`Mapping`): What identifies each data set of the suite ([`~hf_mel.bench.grid.data_versions`]).

    Raises:
        DataFormatError: The file cannot be read, or holds no results of a suite.
    """
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise DataFormatError(
            "The file holds no results of a suite.",
            file=file,
            remedy="Give the <suite>.json that `hf-mel bench` wrote.",
        )
    earlier = {_identity(row): row for row in content["rows"] if isinstance(row, dict)}
    kept = {}
    for key, group in cells_by_row(suite, runs).items():
        sweep = None if key.field is None else key.value
        row = earlier.get((key.data, key.system, key.train_fraction, key.field, sweep))
        if row is None or not isinstance(row.get("ranks"), dict) or not isinstance(row.get("inputs"), dict):
            continue  # of a version that stored no ranks, or of a row without a result
        if row["inputs"] == {str(cell.seed): _digest(cell, versions) for cell in group}:
            kept[key] = row
    return kept


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    sweep = row.get("sweep") or {}
    value = json.dumps(sweep["value"]) if "value" in sweep else None
    return row.get("data"), row.get("system"), row.get("train_fraction"), sweep.get("field"), value


def _digest(cell: Cell, versions: Mapping[str, Any]) -> str | None:
    return None if empty_reason(cell) is not None else inputs_digest(cell.inputs(versions.__getitem__))
