"""Rows of a suite from the files of its cells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hf_mel.bench.cells import CELL, EVALUATION, PREDICTIONS, grid_cells
from hf_mel.bench.suite import Suite
from hf_mel.bench.suite_results import suite_results, tables_of
from hf_mel.errors import ComparisonError
from hf_mel.files import file_sha256

SUITE = {
    "data": {"toy": "data/toy"},
    "compare_with": ["MIMIC", "list"],
    "evaluate": {"candidates": "retriever", "retriever": "runs/x", "num_candidates": 4},
    "systems": [
        {"name": "MIMIC", "recipe": "mimic_flags", "seeds": [0, 1]},
        {"name": "MMEL", "recipe": "mmel_flags"},
        {"name": "list", "order": "list"},
        {"name": "names", "order": "name", "note": "By WRatio."},
        {"name": "namesake", "order": "namesake", "seeds": [0, 5], "evaluate": {"num_candidates": 9}},
        {"name": "not run", "recipe": "mimic-plain_flags"},
    ],
}
LISTS = {
    "list": {"source": "retriever", "k": 4, "sha256": "l"},
    "names": {"source": "name", "k": 4, "sha256": "n"},
    "namesake": {"source": "namesake", "k": 9, "sha256": "m"},
}
LISTS["MMEL"] = LISTS["list"]


def finish(cell, ranks: list[float | None], **changes) -> None:
    """Writes what a finished cell leaves."""
    cell.folder.mkdir(parents=True)
    records = [{"mention_id": f"m{i}", "entity_id": "Q1", "rank": rank} for i, rank in enumerate(ranks)]
    (cell.folder / PREDICTIONS).write_text("".join(json.dumps(record) + "\n" for record in records))
    hits = sum(rank is not None and rank <= 1 for rank in ranks) / len(ranks)
    metrics = {
        "hits@1": hits,
        "hits@5": 1.0,
        "mrr": sum(0 if r is None else 1 / r for r in ranks) / len(ranks),
        "mr": 3.0,
    }
    evaluation = {
        "protocol": "candidates (end to end)" if cell.system.name in LISTS else "full",
        "candidates": LISTS.get(cell.system.name),
        "kb_size": 12,
        "num_mentions": len(ranks),
        "ties": "realistic",
        "data": {"sha256": "s", "split": "test"},
        "metrics": {**metrics, "num_ranked": len(ranks)},
        "strata": {},
        "predictions": {"file": PREDICTIONS, "sha256": file_sha256(cell.folder / PREDICTIONS)},
        "wall_time_seconds": 2.0,
        **changes,
    }
    (cell.folder / EVALUATION).write_text(json.dumps({k: v for k, v in evaluation.items() if v is not None}))
    spent = {"seconds": 10.0, "cpu_seconds": 8.0, "peak_bytes": 5, "error": None, "stopped": False}
    record = {"state": "finished", "inputs": "", "spent": {"evaluate": spent}, "commands": ["hf-mel evaluate"]}
    (cell.folder / CELL).write_text(json.dumps(record))


@pytest.fixture
def suite(tmp_path) -> Suite:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(SUITE))
    return Suite.load(file)


RANKS = {
    ("MIMIC", 0): [1, 1, 1, 2],
    ("MIMIC", 1): [1, 2, 1, 2],
    ("MMEL", 0): [1, 1, None, 2],
    ("list", 0): [1, 2, None, 2],
    ("names", 0): [2, None, 1, 3],
    ("namesake", 0): [1, 2, 2, 2],
    ("namesake", 5): [2, 1, 1, 2],
}


def test_orders_stand_beside_what_they_are(suite, tmp_path):
    cells = {(cell.system.name, cell.seed): cell for cell in grid_cells(suite, tmp_path)}
    assert set(cells) == {*RANKS, ("not run", 0)}
    assert cells["namesake", 5].evaluate_arguments()[-2:] == ["--seed", "5"]
    for key, ranks in RANKS.items():
        finish(cells[key], ranks)
    results = suite_results(suite, tmp_path, "hf-mel bench mine")
    names = [[row["name"] for row in table] for table in tables_of(results["rows"])]
    assert names == [["MIMIC", "names", "namesake", "not run"], ["MMEL", "list"]]
    rows = {row["name"]: row for row in results["rows"]}
    assert "mr" in rows["MIMIC"]["metrics"]
    assert "mr" in rows["list"]["metrics"]
    assert "mr" not in rows["names"]["metrics"]  # the places of golds that it does not keep are not known
    assert "hits@5" not in rows["names"]["metrics"]  # of 4 candidates
    assert "hits@5" in rows["namesake"]["metrics"]  # of 9
    assert rows["names"]["note"].startswith("By WRatio. The first 4 places of a ranking without a model")
    assert rows["MIMIC"]["metrics"]["hits@1"]["values"] == [0.75, 0.5]
    assert rows["namesake"]["seeds"] == [0, 5]
    assert rows["not run"]["empty"] == [{"seed": 0, "reason": "It has not been run yet."}]
    tests = {(test["row"], test["metric"]): test for test in results["tests"]}
    assert {row: test["against"] for (row, _), test in tests.items()} == {
        "names": "MIMIC", "namesake": "MIMIC", "MMEL": "list",
    }  # fmt: skip
    assert tests["namesake", "hits@1"]["difference"] == pytest.approx((0.25 + 0.5) / 2 - 0.625)
    assert tests["names", "mrr"]["comparisons"] == 2
    assert rows["MIMIC"]["cost"]["mentions_per_second"] == 2.0


def test_seeds_of_different_protocols_are_no_row(suite, tmp_path):
    cells = {(cell.system.name, cell.seed): cell for cell in grid_cells(suite, tmp_path)}
    finish(cells["MIMIC", 0], [1, 2])
    finish(cells["MIMIC", 1], [1, 2], kb_size=13)
    with pytest.raises(ComparisonError, match=r"'MIMIC, seed 0' and 'MIMIC, seed 1' .* size of the knowledge base"):
        suite_results(suite, tmp_path, "x")


def test_a_row_needs_the_predictions_of_its_tests(suite, tmp_path):
    cells = {(cell.system.name, cell.seed): cell for cell in grid_cells(suite, Path(tmp_path))}
    finish(cells["MMEL", 0], [1, 2])
    finish(cells["list", 0], [1, 1])
    (cells["list", 0].folder / PREDICTIONS).unlink()
    with pytest.raises(ComparisonError, match="are missing"):
        suite_results(suite, tmp_path, "x")
