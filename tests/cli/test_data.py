from __future__ import annotations

import json
import subprocess
import sys

import datasets
import pytest
from typer.testing import CliRunner

from hf_mel.building import build as building
from hf_mel.building.builders import known_datasets
from hf_mel.cli.data import app
from tests.building.test_checks import entity, mention, small, write_folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"}, catch_exceptions=False)

    return run


def test_list_shows_every_data_set_within_80_columns(run):
    done = run("list")
    assert done.exit_code == 0
    assert max(map(len, done.output.splitlines())) <= 80
    for name in known_datasets():
        assert any(line.startswith(f"{name}  ") for line in done.output.splitlines())
    listed = json.loads(run("list", "--json").output)
    assert [entry["name"] for entry in listed] == known_datasets()
    for entry in listed:
        assert entry["task"]
        assert entry["license"]
        assert isinstance(entry["languages"], list)
        assert isinstance(entry["options"], list)


def test_listing_loads_no_models():
    code = """
import sys
sys.argv[0] = "hf-mel"
from typer.testing import CliRunner
from hf_mel.cli.data import app
assert CliRunner().invoke(app, ["list"]).exit_code == 0
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_check_of_a_good_data_set(run, tmp_path):
    done = run("check", write_folder(tmp_path / "good", small()))
    assert done.exit_code == 0
    assert "This data set can be used." in done.output
    assert "warning" not in done.output


def test_check_warns_with_exit_status_0(run, tmp_path):
    rows = [mention("[/b]", text="Two.", start=-1, end=-1), mention("m")]  # an id in square brackets is not markup
    folder = write_folder(tmp_path / "data", small({"train": [mention("t")], "test": rows}))
    done = run("check", folder)
    assert done.exit_code == 0
    assert "mention not in text" in done.output
    assert "row [/b]" in done.output
    assert "2 of 2 (100.0%)" in done.output  # test mentions with a gold that occurs in train
    assert "1 of 2 (50.0%)" in done.output  # with a text that occurs in train
    assert "1 warning." in done.output
    assert max(map(len, done.output.splitlines())) <= 80


def test_check_fails_with_exit_status_1_and_the_reasons(run, tmp_path):
    data = small({"test": [mention("a", "E9"), mention("a")]}, [entity("E1")])
    folder = write_folder(tmp_path / "data", data)
    done = run("check", folder)
    assert done.exit_code == 1
    assert "This data set is unusable: duplicate id, gold not in kb." in " ".join(done.output.split())
    as_json = run("check", folder, "--json")
    assert as_json.exit_code == 1
    report = json.loads(as_json.stdout)
    assert report["usable"] is False
    assert report["fatal"] == ["duplicate_id", "gold_not_in_kb"]
    assert report["problems"]["gold_not_in_kb"] == {"count": 1, "entries": {"mentions/test": [["a", "E9"]]}}


def test_options_of_a_builder_and_files_of_your_own_are_passed_on(run, tmp_path, monkeypatch):
    received = {}

    def build_dataset(name, **arguments):
        received.update(arguments, name=name)
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "build_dataset", build_dataset)
    words = ["build", "jsonl", "--output", tmp_path / "out", "--resize", 64, "--mentions", "m.jsonl"]
    done = run(*words, "--entities", "e.csv", "--option", "posts=p=1.csv", "--option", "split=test")
    assert done.exit_code == 130
    assert "The same command continues the build." in done.output
    assert received["resize"] == 64
    assert received["config_options"] == {
        "mentions": "m.jsonl",
        "entities": "e.csv",
        "posts": "p=1.csv",
        "split": "test",
    }
    for wrong in ("posts", "=p"):
        done = run(*words, "--option", wrong)
        assert done.exit_code == 2
        assert "is not KEY=VALUE" in done.output
