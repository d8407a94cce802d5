"""Running a suite: what is run, what is not run again, and what becomes of failures."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_mel.bench.cells import CELL, EVALUATION, PREDICTIONS, grid_cells, option_words
from hf_mel.bench.grid import cell_state, data_versions, failure_reason, run_command, run_suite
from hf_mel.bench.suite import Suite
from hf_mel.bench.suite_results import NOT_RUN, suite_results
from hf_mel.bench.suite_tables import write_suite
from tests.bench.tiny_suite import InProcess, write_suite_file
from tests.processes import lock_holder
from tests.toy import toy_entities, toy_mentions, write_toy_dataset


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a suite that has run: its runs are in `runs`, what was said in `messages.json`."""
    folder = tmp_path_factory.mktemp("suite")
    suite = Suite.load(write_suite_file(folder))
    messages: list[str] = []
    # Interrupted twice: before an evaluation, and before a training.
    for stop in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run_suite(suite, folder / "runs", run=InProcess(stop), log=messages.append)
    runner = InProcess()
    progress = run_suite(suite, folder / "runs", run=runner, log=messages.append)
    assert (progress.finished, progress.failed, progress.left) == (4, 0, 0)
    (folder / "messages.json").write_text(json.dumps({"messages": messages, "stages": runner.stages}))
    return folder


@pytest.fixture
def copy(place, tmp_path, monkeypatch) -> Path:
    """A copy of the folder, to change."""
    shutil.copytree(place / "runs", tmp_path / "runs")
    for file in place.glob("*.yaml"):
        shutil.copy(file, tmp_path)
    return tmp_path


def cells_of(folder: Path, suite: Suite):
    return {f"{cell.system.name}, {cell.seed}": cell for cell in grid_cells(suite, folder / "runs")}


def test_an_interrupted_suite_goes_on_where_it_stopped(place):
    told = json.loads((place / "messages.json").read_text())
    # The first run trained one cell; the second evaluated it, and trained the next one.
    assert told["stages"] == [
        "evaluate toy-text_more-seed0",
        "train toy-whole-seed1",
        "evaluate toy-whole-seed1",
        "train toy-text_more-seed1",
        "evaluate toy-text_more-seed1",
    ]
    assert "finished" in told["messages"][-6] or any("finished" in text for text in told["messages"])


def test_a_finished_suite_runs_nothing(copy):
    runner = InProcess()
    progress = run_suite(Suite.load(copy / "tiny.yaml"), copy / "runs", run=runner, log=lambda _: None)
    assert runner.commands == []
    assert progress.finished == 4


def test_commands_have_seed_budget_and_data_of_the_suite(place):
    suite = Suite.load(place / "tiny.yaml")
    cell = cells_of(place, suite)["whole, 1"]
    train, evaluate = cell.commands()
    assert train[:2] == ["train", str(place / "whole.yaml")]
    given = dict(value.partition("=")[::2] for option, value in itertools.pairwise(train) if option == "--set")
    assert given == {"data.dataset": json.dumps(str(place / "data")), "training.max_steps": "2", "training.seed": "1"}
    assert evaluate[:5] == ["evaluate", str(cell.folder / "run"), "--dataset", str(place / "data"), "--split"]
    recipe = yaml.safe_load((cell.folder / "run/recipe.yaml").read_text())
    assert (recipe["training"]["seed"], recipe["training"]["max_steps"]) == (1, 2)
    assert recipe["data"]["dataset"] == str(place / "data")
    record = json.loads((cell.folder / CELL).read_text())
    assert [command.split()[1] for command in record["commands"]] == ["train", "evaluate"]


def test_a_cell_whose_recipe_changed_is_run_again_and_no_other(copy):
    content = yaml.safe_load((copy / "tiny.yaml").read_text())
    content["systems"][1]["set"] = {"training.learning_rate": 2e-3}
    content["systems"][1]["note"] = content["title"] = "Other words"
    (copy / "tiny.yaml").write_text(yaml.safe_dump(content))
    runner, messages = InProcess(), []
    suite = Suite.load(copy / "tiny.yaml", ["seeds=[0]"])
    run_suite(suite, copy / "runs", run=runner, log=messages.append)
    assert runner.stages == ["train toy-text_more-seed0", "evaluate toy-text_more-seed0"]
    assert any("its inputs have changed (recipe)" in text for text in messages)


def test_a_cell_that_fails_is_empty_and_the_others_go_on(copy):
    content = yaml.safe_load((copy / "tiny.yaml").read_text())
    content["seeds"] = [0]
    content["systems"] += [
        {"name": "diverging", "recipe": str(copy / "text.yaml"), "set": {"training.learning_rate": 1e30}},
        {"name": "odd source", "recipe": str(copy / "text.yaml"), "set": {"candidates.source": "telepathy"}},
        {"name": "elsewhere", "recipe": {}},
        {"name": "last", "recipe": str(copy / "text.yaml"), "set": {"training.learning_rate": 5e-3}},
    ]
    (copy / "tiny.yaml").write_text(yaml.safe_dump(content))
    suite = Suite.load(copy / "tiny.yaml")
    progress = run_suite(suite, copy / "runs", run=InProcess(), log=lambda _: None)
    assert (progress.finished, progress.failed) == (3, 3)
    rows = {row["name"]: row for row in suite_results(suite, copy / "runs", "hf-mel bench tiny")["rows"]}
    assert re.match(r"(ScoreError|TrainingError): ", rows["diverging"]["empty"][0]["reason"])
    assert "Candidates cannot come from 'telepathy'" in rows["odd source"]["empty"][0]["reason"]
    assert rows["elsewhere"]["empty"][0]["reason"] == "The system has no recipe for toy."
    assert rows["last"]["seeds"] == [0]
    # Failures are kept until they are asked for again.
    runner = InProcess()
    run_suite(suite, copy / "runs", run=runner, log=lambda _: None)
    assert runner.commands == []
    run_suite(suite, copy / "runs", run=runner, retry=True, log=lambda _: None)
    assert runner.stages == ["train toy-diverging-seed0", "train toy-odd_source-seed0"]
    files = write_suite(suite_results(suite, copy / "runs", "hf-mel bench tiny"), copy / "results")
    text = (copy / "results/tiny.md").read_text()
    assert "diverging (seed 0) is empty: " in text
    assert len(files) == 5


def test_a_cell_of_another_process_is_left_to_it(copy):
    suite = Suite.load(copy / "tiny.yaml")
    cell = cells_of(copy, suite)["whole, 0"]
    (cell.folder / CELL).unlink()
    runner, messages = InProcess(), []
    with lock_holder(cell.folder / ".writer.lock"):
        progress = run_suite(suite, copy / "runs", run=runner, log=messages.append)
    assert runner.commands == []
    assert (progress.finished, progress.left) == (3, 1)
    assert any("left: The cell is being run" in text for text in messages)


DAMAGED = [
    '{"state": "fini',
    "",
    "[]",
    '{"state": "finished"}',
    '{"state": "finished", "inputs": "x", "spent": {}}',
    "\0",
]


def test_damaged_records_count_for_nothing(copy):
    suite = Suite.load(copy / "tiny.yaml")
    cells = cells_of(copy, suite)
    cell, versions = cells["whole, 0"], data_versions(suite)
    for text in DAMAGED:
        (cell.folder / CELL).write_text(text)
        assert cell_state(cell, versions) == "interrupted"
        rows = suite_results(suite, copy / "runs", "hf-mel bench tiny")["rows"]
        assert [(item["seed"], item["reason"]) for item in rows[0]["empty"]] == [(0, NOT_RUN)]
    other = cells["text & more, 0"]
    (other.folder / EVALUATION).write_text("{")
    assert cell_state(other, versions) == "interrupted"
    runner = InProcess()
    run_suite(suite, copy / "runs", run=runner, log=lambda _: None)
    assert runner.stages == ["evaluate toy-whole-seed0", "evaluate toy-text_more-seed0"]


@pytest.mark.parametrize("text", ["", "[]", '{"digest": 3}'])
def test_what_damaged_inputs_have_left_is_not_used(copy, text):
    suite = Suite.load(copy / "tiny.yaml", ["seeds=[0]"])
    cell = cells_of(copy, suite)["whole, 0"]
    (cell.folder / CELL).unlink()
    (cell.folder / "inputs.json").write_text(text)
    messages: list[str] = []
    runner = InProcess(0)
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, copy / "runs", run=runner, log=messages.append)
    assert not (cell.folder / "run").exists()
    assert any("its inputs have changed" in text for text in messages)


def test_a_system_that_reads_nothing_of_a_data_set_is_empty(copy):
    """Images alone tell nothing on a data set of texts; a mean rank of ties is no result."""
    texts = toy_mentions(36, 12).map(lambda row: {"image": None})
    splits = {name: texts.select(range(12 * i, 12 * i + 12)) for i, name in enumerate(("train", "validation", "test"))}
    write_toy_dataset(copy / "texts", entities=toy_entities(12, images=False), **splits)
    recipe = yaml.safe_load((copy / "text.yaml").read_text())
    recipe["model"]["config"]["units"] = ["vision"]
    (copy / "images.yaml").write_text(yaml.safe_dump(recipe))
    content = yaml.safe_load((copy / "tiny.yaml").read_text())
    content |= {"seeds": [0], "data": {"texts": {"dataset": str(copy / "texts")}}, "compare_with": []}
    content["systems"] = [{"name": name, "recipe": str(copy / f"{name}.yaml")} for name in ("images", "text")]
    suite = Suite.load(write(copy, content))
    progress = run_suite(suite, copy / "texts_runs", run=InProcess(), log=lambda _: None)
    assert (progress.finished, progress.failed) == (1, 1)
    images, text = suite_results(suite, copy / "texts_runs", "hf-mel bench tiny")["rows"]
    assert images["empty"][0]["reason"].startswith("Every entity has the same score for every mention")
    assert (images["metrics"], text["empty"]) == ({}, [])


def test_a_prepared_run_comes_first_and_its_failure_is_told(place, tmp_path):
    content = yaml.safe_load((place / "tiny.yaml").read_text())
    del content["compare_with"]
    content |= {
        "seeds": [0],
        "prepare": {"start": {"recipe": str(place / "text.yaml"), "set": {"model.config.units": ["none"]}}},
    }
    content["systems"] = [
        {"name": "continued", "recipe": str(place / "text.yaml"), "set": {"model.from_pretrained": "run:start"}}
    ]
    with pytest.raises(Exception, match="needs either 'type' or 'from_pretrained'"):
        Suite.load(write(tmp_path, content))
    content["systems"][0]["set"] = {"model.text": "part:text_model:run:start", "processor.tokenizer": None}
    suite = Suite.load(write(tmp_path, content))
    runner = InProcess()
    progress = run_suite(suite, tmp_path / "runs", run=runner, log=lambda _: None)
    assert (progress.finished, progress.failed) == (0, 1)
    assert len(runner.commands) == 1
    assert "--output" in runner.commands[0]
    cell = next(iter(grid_cells(suite, tmp_path / "runs")))
    reason = json.loads((cell.folder / CELL).read_text())["reason"]
    assert reason.startswith("It needs the prepared run 'start', which failed: RecipeError")
    assert cell.recipe().model.text == f"part:text_model:{tmp_path}/runs/prepared/start/run"


def write(folder: Path, content: dict) -> Path:
    file = folder / "other.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_options_become_words():
    options = {"num_candidates": 16, "joint": False, "bf16": True, "ks": [1, 5], "retriever": None, "units": "text"}
    assert option_words(options) == [
        "--num-candidates",
        "16",
        "--no-joint",
        "--bf16",
        "--ks",
        "1,5",
        "--units",
        "text",
    ]
    assert option_words({"bf16": False, "joint": True}) == ["--joint"]


@pytest.mark.parametrize(
    ("printed", "code", "reason"),
    [
        ("some\nScoreError: The score is nan.\nMore.\n", 1, "ScoreError: The score is nan. More."),
        ("Traceback (most recent call last):\n  x\ntorch.OutOfMemoryError: CUDA\n", 1, "torch.OutOfMemoryError: CUDA"),
        ("Usage: hf-mel\nError: No such option\n", 2, "Error: No such option"),
        ("Usage: x\n╭─ Error ───╮\n│ No such option: --x │\n╰───────────╯\n", 2, "No such option: --x"),
        ("just words\n", 3, "just words"),
        ("", 3, "The command ended with status 3."),
        ("", -int(signal.SIGKILL), "The process was ended by SIGKILL, perhaps for lack of memory."),
        ("", -int(signal.SIGTERM), "The process was ended by SIGTERM."),
    ],
)
def test_the_reason_of_a_failure(printed, code, reason):
    assert failure_reason(printed, code) == reason


def test_commands_run_in_a_process_of_their_own(tmp_path):
    script = tmp_path / "launch.py"
    script.write_text("import sys\nprint('SpanError: as asked', sys.argv[1:])\nsys.exit(len(sys.argv) - 4)\n")
    run = run_command([sys.executable, str(script)])
    good = run(["train"], tmp_path / "log.txt")
    assert good.error is None
    assert good.peak_bytes > 10**6
    bad = run(["train", "x"], tmp_path / "log.txt")
    assert bad.error == "SpanError: as asked ['-m', 'hf_mel', 'train', 'x']"
    assert (good.stopped, bad.stopped) == (False, False)
    script.write_text("import sys\nsys.exit(143)\n")
    assert run(["train"], tmp_path / "log.txt").stopped
    assert run(["--help"], tmp_path / "other.txt", True).error is None  # one process, without the launcher
    assert "Usage" in (tmp_path / "other.txt").read_text()
    log = (tmp_path / "log.txt").read_text()
    assert re.findall(r"^\$ (.*)$", log, re.MULTILINE) == ["hf-mel train", "hf-mel train x", "hf-mel train"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child when its parent is killed")
def test_a_killed_suite_leaves_no_training_behind(tmp_path):
    program = (
        "import sys, pathlib\nfrom hf_mel.bench.grid import run_command\n"
        f"run_command([sys.executable, {str(tmp_path / 'child.py')!r}])([], pathlib.Path({str(tmp_path / 'log')!r}))\n"
    )
    (tmp_path / "child.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = 1200
        while not (
            pids := re.findall(r"^\d+$", (tmp_path / "log").read_text() if (tmp_path / "log").exists() else "", re.M)
        ):
            deadline -= 1
            assert deadline
            assert parent.poll() is None
            _sleep()
    finally:
        parent.kill()
        parent.wait()
    for _ in range(600):
        if not Path(f"/proc/{pids[0]}").exists() or "Z (zombie)" in Path(f"/proc/{pids[0]}/status").read_text():
            return
        _sleep()
    pytest.fail("The child still runs.")


def _sleep():
    import time

    time.sleep(0.05)


def test_the_files_of_a_cell(place):
    for cell in grid_cells(Suite.load(place / "tiny.yaml"), place / "runs"):
        results = json.loads((cell.folder / EVALUATION).read_text())
        assert results["predictions"]["file"] == PREDICTIONS
        assert len((cell.folder / PREDICTIONS).read_text().splitlines()) == results["num_mentions"] == 12
