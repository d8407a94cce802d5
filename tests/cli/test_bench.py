"""`hf-mel bench`: a suite from the command line, and comparisons of what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_mel.bench import grid
from hf_mel.bench.cells import EVALUATION, PREDICTIONS, grid_cells
from hf_mel.bench.suite import Suite
from hf_mel.cli import app
from hf_mel.errors import ComparisonError, MelError, SuiteError
from tests.bench.tiny_suite import InProcess, write_suite_file


def run(*words: str) -> str:
    result = CliRunner(env={"COLUMNS": "250"}).invoke(app, ["bench", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def printed(place) -> str:
    file = write_suite_file(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "run_command", lambda launcher: InProcess())
        return run(file, "--runs", place / "runs", "--results", place / "results", "--set", "seeds=[3]")


def test_a_suite_writes_its_tables(place, printed):
    assert "toy, 12 mentions of test; all 12 entities are ranked for every mention" in printed
    names = {path.name for path in (place / "results").iterdir()}
    assert names == {f"tiny.{suffix}" for suffix in ("json", "md", "tex", "csv", "png")}
    content = json.loads((place / "results/tiny.json").read_text())
    assert content["command"].endswith("tiny.yaml --set 'seeds=[3]'")
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == ["whole", "text & more"]
    whole = rows["whole"]
    assert whole["seeds"] == [3]
    assert (whole["protocol"]["protocol"], whole["protocol"]["kb_size"]) == ("full", 12)
    assert len(whole["protocol"]["data"]) == 64
    assert whole["cost"]["steps"] == 2
    assert whole["cost"]["parameters"] > 0
    assert (whole["cost"]["train_seconds"], whole["cost"]["peak_bytes"]) == (2.0, 3 * 10**8)
    assert whole["versions"]["torch"]
    assert [command.split()[:2] for command in whole["commands"]] == [["hf-mel", "train"], ["hf-mel", "evaluate"]]
    evaluation = json.loads((cells(place)["whole"] / EVALUATION).read_text())
    assert whole["metrics"]["hits@1"]["values"] == [evaluation["metrics"]["hits@1"]]
    seen = whole["strata"]["gold in training"]["seen"]["mrr"]["mean"]
    assert seen == evaluation["strata"]["gold in training"]["seen"]["mrr"]
    assert set(whole["strata"]["image of mention"]) == {"with", "without"}


def cells(place: Path) -> dict[str, Path]:
    suite = Suite.load(place / "tiny.yaml", ["seeds=[3]"])
    return {cell.system.name: cell.folder for cell in grid_cells(suite, place / "runs" / "tiny")}


def test_comparing_its_files_gives_its_tests(place, printed):
    first, second = (folder / EVALUATION for folder in cells(place).values())
    output = place / "comparison.json"
    text = run("compare", f"whole={first}", f"text & more={second}", "--output", output)
    assert "Differences from whole, in points" in text
    compared = json.loads(output.read_text())["tests"]
    tests = json.loads((place / "results/tiny.json").read_text())["tests"]
    assert [test.pop("data") for test in tests] == ["toy", "toy"]
    assert tests == compared


def test_cases_have_texts_and_names(place, printed):
    files = [f"{name}={folder / PREDICTIONS}" for name, folder in cells(place).items()]
    output = place / "cases.json"
    text = run("cases", *files, "--dataset", place / "data", "--output", output, "--limit", "1")
    listed = json.loads(output.read_text())
    assert f"{len(listed)} of 12 mentions are cases." in text
    for case in listed:
        assert case["text"]
        assert case["name"]
        right = [of_system["rank"] == 1 for of_system in case["systems"].values()]
        assert sorted(right) == [False, True]
        assert all(len(of_system["candidates"]) == 3 for of_system in case["systems"].values())


def test_listing_and_reporting_run_nothing(place, printed, monkeypatch):
    monkeypatch.setattr(grid, "run_command", lambda launcher: pytest.fail("Something runs."))
    options = (place / "tiny.yaml", "--runs", place / "runs", "--results", place / "other", "--set", "seeds=[3, 4]")
    listed = run(*options, "--list")
    assert "finished     toy · whole · seed 3" in listed
    assert "to do        toy · whole · seed 4" in listed
    reported = run(*options, "--report")
    assert "whole (seed 4) is empty: It has not been run yet." in reported


def test_errors_say_what_is_wrong(place, printed, tmp_path):
    with pytest.raises(SuiteError, match="does not exist"):
        run(tmp_path / "nothing.yaml")
    with pytest.raises(SuiteError, match=r"The data set 'toy' cannot be read .* --set data.toy.dataset=FOLDER"):
        run(place / "tiny.yaml", "--list", "--set", f"data.toy.dataset={tmp_path}/none")
    with pytest.raises(ComparisonError, match="two systems"):
        run("compare", cells(place)["whole"] / EVALUATION)


@pytest.mark.parametrize("option", ["--runs", "--results"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(tmp_path, monkeypatch, option):
    file = write_suite_file(tmp_path)
    (tmp_path / "taken").write_text("not a folder")
    monkeypatch.setattr(grid, "run_command", lambda launcher: pytest.fail("it ran"))
    folders = {"--runs": tmp_path / "runs", "--results": tmp_path / "results", option: tmp_path / "taken"}
    with pytest.raises(MelError, match=f"taken.*Nothing can be written to the folder.*Choose another {option}"):
        run(file, *(word for pair in folders.items() for word in pair))
    assert (tmp_path / "taken").read_text() == "not a folder"
