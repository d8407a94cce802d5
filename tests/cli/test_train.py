"""`hf-mel train`: its files, its output, and its error messages."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hf_mel.cli import app
from hf_mel.errors import RecipeError
from tests.training.toy_run import recipe_dict, write_dataset


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe_dict(write_dataset(folder / "toy_data"))))
    return file


def test_train_ends_with_the_table_the_files_and_the_next_commands(recipe, tmp_path):
    output = tmp_path / "runs/tiny"
    arguments = ["train", str(recipe), "--set", "training.num_train_epochs=1", "--output", str(output)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    printed = " ".join(done.stdout.split())
    assert "validation" in printed
    assert "H@1" in printed
    for name in ("results.json", "recipe.yaml", "training_log.json", "training.png", "README.md"):
        assert (output / name).exists()
        assert name in printed
    assert f"hf-mel evaluate {output} --dataset {recipe.parent / 'toy_data'}" in printed
    assert f"hf-mel kb build {output}" in printed
    assert yaml.safe_load((output / "recipe.yaml").read_text())["training"]["num_train_epochs"] == 1

    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, RecipeError)
    assert CliRunner().invoke(app, [*arguments, "--resume"]).exit_code == 0


def test_out_of_fold_lists_end_with_their_recall_and_the_option_that_reads_them(recipe, tmp_path):
    output = tmp_path / "runs/folds"
    options = ("task=candidates", "folds.k=4", "training.num_train_epochs=1")
    arguments = [
        "train",
        str(recipe),
        *(part for each in options for part in ("--set", each)),
        "--output",
        str(output),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    printed = " ".join(done.stdout.split())
    recall = json.loads((output / "results.json").read_text())["candidates"]["recall"]
    assert "Trained 2 retrievers" in printed
    assert f"{100 * recall['recall@4']:.1f} at 4" in printed
    assert f"--set candidates.train_file={output / 'train.parquet'}" in printed


def test_train_py_prints_an_error_in_one_line(tmp_path, monkeypatch, capsys):
    root = Path(__file__).parents[2]
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "nothing.yaml")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(root / "train.py"), run_name="__main__")
    assert stopped.value.code == 1
    printed = capsys.readouterr().err
    assert "RecipeError" in printed
    assert "The recipe file does not exist" in printed
    assert "Traceback" not in printed
