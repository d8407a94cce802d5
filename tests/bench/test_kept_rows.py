"""Rows of earlier results, which a suite takes in place of running them again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_mel.bench.comparability import packed_ranks, unpacked_ranks
from hf_mel.bench.grid import data_versions, run_suite
from hf_mel.bench.kept_rows import rows_to_keep
from hf_mel.bench.suite import Suite
from hf_mel.bench.suite_results import suite_results
from hf_mel.bench.suite_tables import write_suite
from hf_mel.errors import DataFormatError
from tests.bench.tiny_suite import InProcess, write_suite_file


@given(st.lists(st.one_of(st.integers(2, 2 * 10**8).map(lambda value: value / 2), st.just(float("inf")))))
def test_packed_ranks_are_read_as_they_were(ranks):
    assert unpacked_ranks(packed_ranks(np.asarray(ranks, dtype=float))).tolist() == ranks


def test_damaged_ranks_are_an_error():
    with pytest.raises(DataFormatError, match="damaged"):
        unpacked_ranks(packed_ranks(np.ones(9))[:-6])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the results of a suite whose runs are gone."""
    folder = tmp_path_factory.mktemp("kept")
    suite = Suite.load(write_suite_file(folder))
    run_suite(suite, folder / "runs", run=InProcess())
    write_suite(suite_results(suite, folder / "runs", "hf-mel bench tiny"), folder)
    return folder


def run_again(place: Path, folder: Path, suite: Suite) -> tuple[list[str], dict]:
    kept = rows_to_keep(suite, folder / "runs", place / "tiny.json", data_versions(suite))
    runner = InProcess()
    progress = run_suite(suite, folder / "runs", run=runner, kept=kept)
    assert (progress.failed, progress.left) == (0, 0)
    return runner.stages, suite_results(suite, folder / "runs", "hf-mel bench tiny", kept)


def test_what_is_unchanged_is_not_run_and_gives_the_same_results(place, tmp_path):
    stages, results = run_again(place, tmp_path, Suite.load(place / "tiny.yaml"))
    assert stages == []
    written = json.loads((place / "tiny.json").read_text())
    assert json.loads(json.dumps(results)) == written
    assert [test["p_t"] for test in written["tests"]]


def changed_suite(place: Path, folder: Path, **changes) -> Suite:
    content = yaml.safe_load((place / "tiny.yaml").read_text()) | changes
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return Suite.load(file)


def test_a_row_that_is_added_is_run_and_tested_against_a_kept_one(place, tmp_path):
    systems = yaml.safe_load((place / "tiny.yaml").read_text())["systems"]
    added = {"name": "slow", "recipe": str(place / "text.yaml"), "set": {"training.learning_rate": 1e-5}}
    stages, results = run_again(place, tmp_path, changed_suite(place, tmp_path, systems=[*systems, added]))
    assert stages == [f"{verb} toy-slow-seed{seed}" for seed in (0, 1) for verb in ("train", "evaluate")]
    assert [(row["name"], row["seeds"]) for row in results["rows"]] == [
        ("whole", [0, 1]), ("text & more", [0, 1]), ("slow", [0, 1]),
    ]  # fmt: skip
    assert {test["row"]: test["against"] for test in results["tests"]} == {"text & more": "whole", "slow": "whole"}
    assert {test["comparisons"] for test in results["tests"]} == {2}  # corrected for all rows of the table


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"seeds": [0, 2]}, id="another seed"),
        pytest.param({"budget": {"max_steps": 3}}, id="another budget"),
        pytest.param({"evaluate": {"top_k": 3}}, id="other options of the evaluation"),
    ],
)
def test_a_row_with_other_inputs_is_not_kept(place, tmp_path, changes):
    suite = changed_suite(place, tmp_path, **changes)
    assert rows_to_keep(suite, tmp_path / "runs", place / "tiny.json", data_versions(suite)) == {}


def test_rows_without_ranks_are_not_kept(place, tmp_path):
    content = json.loads((place / "tiny.json").read_text())
    for row in content["rows"]:
        del row["ranks"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    suite = Suite.load(place / "tiny.yaml")
    assert rows_to_keep(suite, tmp_path / "runs", tmp_path / "old.json", data_versions(suite)) == {}


def test_another_file_is_an_error(place, tmp_path):
    suite = Suite.load(place / "tiny.yaml")
    (tmp_path / "other.json").write_text('{"metrics": {}}')
    with pytest.raises(DataFormatError, match=r"other\.json.*no results of a suite"):
        rows_to_keep(suite, tmp_path / "runs", tmp_path / "other.json", data_versions(suite))
