"""Tests of `hf-mel evaluate` with a retriever."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import typer
import yaml
from typer.testing import CliRunner

from hf_mel.cli.evaluate import evaluate
from hf_mel.data.loading import dataset_version
from hf_mel.errors import CalibrationError, RecipeError, UnknownDatasetError, UnknownModelError, UnknownSplitError
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.inference.inputs import ModelInputs
from tests.toy import ToyProcessor, register, toy_entities, toy_mentions, toy_model, write_toy_dataset
from tests.training.toy_run import recipe_dict, write_dataset

APP = typer.Typer()
APP.command()(evaluate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    register()
    folder = tmp_path_factory.mktemp("evaluate")
    toy_model().save_pretrained(folder / "model")
    ToyProcessor().save_pretrained(folder / "model")
    write_toy_dataset(folder / "data")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*arguments, model=folder / "model", dataset=folder / "data"):
        words = [str(model), "--dataset", str(dataset), "--device", "cpu", *map(str, arguments)]
        return CliRunner().invoke(APP, words, env={"COLUMNS": "200"}, catch_exceptions=False)

    return run


def test_results_and_predictions(run, folder, tmp_path):
    outcome = run("--output", tmp_path / "r.json", "--predictions", tmp_path / "p.jsonl", "--top-k", 3, "--ks", "1,4")
    assert outcome.exit_code == 0
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))

    whole = toy_mentions(60, nil_every=6)
    test, train = whole.select(range(40, 60)), whole.select(range(20))
    expected = FullEvaluator(toy_entities(), ks=(1, 4), train_golds=set(train["entity_id"]), top_k=3)(
        ModelInputs(toy_model(), ToyProcessor()), test
    )
    assert results["metrics"] == pytest.approx(expected.metrics)
    assert results["strata"].keys() == expected.strata.keys()
    for stratification in ("gold in training", "name of mention"):
        assert results["strata"][stratification] == expected.strata[stratification]
    assert results["data"] == {**dataset_version(folder / "data"), "split": "test"}
    assert len(results["data"]["sha256"]) == 64
    assert results["model"]["weights"] == expected.setting["model"]["weights"]

    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["mention_id"] for record in records] == list(test["mention_id"])
    assert {len(record["candidates"]) for record in records} == {3}

    assert f"{100 * expected.metrics['mrr']:.1f}" in outcome.stdout
    assert "stratum: image" in outcome.stdout


def test_a_retriever_can_encode_in_bfloat16(run, tmp_path):
    scores = {}
    for name, options in {"float32": [], "bf16": ["--bf16"]}.items():
        outcome = run("--output", tmp_path / f"{name}.json", "--predictions", tmp_path / f"{name}.jsonl", *options)
        assert outcome.exit_code == 0
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        scores[name] = [candidate["score"] for line in lines for candidate in json.loads(line)["candidates"][:1]]
        assert json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")).get("bf16", False) == bool(options)
    assert scores["bf16"] != scores["float32"]
    assert scores["bf16"] == pytest.approx(scores["float32"], rel=0.03, abs=0.03)


def test_options_reach_the_evaluator(run, tmp_path):
    run("--output", tmp_path / "r.json", "--units", "vision", "--ties", "pessimistic", "--split", "validation")
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert (results["units"], results["ties"], results["data"]["split"]) == (["vision"], "pessimistic", "validation")
    assert results["nil_threshold"] is None


def test_the_nil_threshold_is_calibrated_on_another_split(run, tmp_path):
    run("--output", tmp_path / "r.json", "--nil-from", "validation")
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    validation = toy_mentions(60, nil_every=6).select(range(20, 40))
    expected = FullEvaluator(toy_entities())(
        ModelInputs(toy_model(), ToyProcessor()), validation
    ).calibrate_nil_threshold()
    assert results["nil_threshold"] == results["nil_calibration"]["threshold"] == pytest.approx(expected.threshold)
    assert results["nil_calibration"]["split"] == "validation"
    assert not results["nil_calibration"]["simulated"]
    assert "nil_recall" in results["metrics"]


def test_a_stated_precision_is_calibrated_on_another_split_or_by_the_model(run, tmp_path):
    outcome = run("--output", tmp_path / "r.json", "--nil-from", "validation", "--precision", 0.3)
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    whole = toy_mentions(60, nil_every=6)
    inputs, evaluator = ModelInputs(toy_model(), ToyProcessor()), FullEvaluator(toy_entities())
    calibrated_on, tested = (evaluator(inputs, whole.select(range(first, first + 20))) for first in (20, 40))
    threshold = calibrated_on.calibrate_nil_threshold().threshold
    expected = tested.at_precision(0.3, calibrated_on.risk_coverage(threshold), threshold)
    assert results["at_precision"] == pytest.approx(expected)
    assert f"{expected['links']} links" in outcome.stdout
    assert "NIL mentions: AUC of the best score" in outcome.stdout
    assert results["nil_detection"]["annotated"]["auc"] == tested.nil_detection()["annotated"]["auc"]

    with pytest.raises(CalibrationError, match="stores no calibration"):
        run("--precision", 0.3)
    model = toy_model()
    model.config.link_calibration = {"confidences": [-1.0], "links": [100], "wrong": [0], "mentions": 100}
    model.save_pretrained(tmp_path / "model")
    ToyProcessor().save_pretrained(tmp_path / "model")
    run("--output", tmp_path / "r.json", "--precision", 0.9, model=tmp_path / "model")
    assert json.loads((tmp_path / "r.json").read_text())["at_precision"]["links"] == 20
    assert run("--precision", 2).exit_code == run("--precision", 0.9, "--top-k", 1).exit_code == 2


def test_the_default_threshold_is_that_of_the_model(run, tmp_path):
    model = toy_model()
    model.config.nil_threshold = 0.125
    model.save_pretrained(tmp_path / "model")
    ToyProcessor().save_pretrained(tmp_path / "model")
    run("--output", tmp_path / "r.json", model=tmp_path / "model")
    assert json.loads((tmp_path / "r.json").read_text())["nil_threshold"] == 0.125
    run("--output", tmp_path / "r.json", "--units", "text", model=tmp_path / "model")
    assert json.loads((tmp_path / "r.json").read_text())["nil_threshold"] is None


def test_data_without_a_training_split_has_no_unseen_golds(run, tmp_path):
    dataset = write_toy_dataset(tmp_path / "data", test=toy_mentions(6))
    run("--output", tmp_path / "r.json", dataset=dataset)
    results = json.loads((tmp_path / "r.json").read_text())
    assert "gold in training" not in results["strata"]


def test_invalid_input_is_an_error(run, tmp_path):
    output = tmp_path / "r.json"
    with pytest.raises(UnknownSplitError, match="'dev'"):
        run("--split", "dev", "--output", output)
    with pytest.raises(UnknownDatasetError):
        run("--output", output, dataset=tmp_path / "typo")
    with pytest.raises(UnknownModelError, match="typo"):
        run("--output", output, model=tmp_path / "typo")
    with pytest.raises(RecipeError, match="sound"):
        run("--units", "sound", "--output", output)
    for wrong in (
        ["--ks", "1,x"],
        ["--ks", "0"],
        ["--nil-threshold", "1", "--nil-from", "test"],
        ["--ties", "fair"],
        ["--predictions", tmp_path],
    ):
        outcome = run(*map(str, wrong), "--output", output)
        assert outcome.exit_code == 2
        assert wrong[-2] in outcome.output
    assert not output.exists()


def test_two_processes_train_and_evaluate(tmp_path):
    # `accelerate launch` starts a single process on a machine without a GPU.
    root, launch = Path(__file__).parents[2], [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc_per_node", "2"]
    recipe = recipe_dict(write_dataset(tmp_path / "data"), num_train_epochs=1)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

    def run(*words):
        done = subprocess.run([*map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = run(*launch, root / "train.py", "tiny.yaml", "--output", "run")
    assert printed.count("Trained in") == 1
    assert json.loads((tmp_path / "run/results.json").read_text())["validation"]["metrics"]["num_mentions"] == 12

    results = {}
    for name, start in {"two": [*launch, "-m", "hf_mel"], "one": [sys.executable, "-m", "hf_mel"]}.items():
        words = ["evaluate", "run", "--dataset", "data", "--split", "validation", "--device", "cpu"]
        printed = run(*start, *words, "--output", f"{name}.json", "--predictions", f"{name}.jsonl")
        assert printed.count("Results:") == 1
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert results["two"]["metrics"] == results["one"]["metrics"]
    assert results["two"]["strata"] == results["one"]["strata"]
    two, one = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in results
    )
    for mine, expected in zip(two, one, strict=True):
        for record in (mine, expected):
            scores = [entity.pop("score") for entity in record["candidates"]]
            record["scores"] = pytest.approx([*scores, record.pop("gold_score") or 0.0], rel=1e-5)
        mine["scores"] = mine["scores"].expected
        assert mine == expected


def test_results_go_to_standard_output_alone(run):
    outcome = run("--output", "-")
    assert json.loads(outcome.stdout)["num_mentions"] == 20
    assert "mentions against" in outcome.stderr


def test_an_infinite_threshold_is_written_as_json_and_nan_is_refused(run, tmp_path):
    def refuse(word):
        raise AssertionError(word)

    for word, share in (("inf", 1.0), ("-inf", 0.0)):
        assert run("--nil-threshold", word, "--output", tmp_path / "r.json").exit_code == 0
        results = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
        assert results["metrics"]["nil_recall"] == share
        assert abs(results["nil_threshold"]) == sys.float_info.max
    outcome = run("--nil-threshold", "nan", "--output", tmp_path / "n.json")
    assert outcome.exit_code == 2
    with pytest.raises(ValueError, match="nan"):
        FullEvaluator(toy_entities(), nil_threshold=float("nan"))


def test_the_weight_of_the_names_is_chosen_on_validation_and_saved_for_linking(run, folder, tmp_path):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    outcome = run("--name-weight", "auto", "--save-name-weight", "--output", tmp_path / "r.json", model=model)
    assert outcome.exit_code == 0, outcome.output
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    chosen = results["chosen_name_weight"]
    assert chosen["split"] == "validation"
    assert (
        results["name_weight"]
        == chosen["weight"]
        == float(max(chosen["chosen_by_mrr"], key=chosen["chosen_by_mrr"].get))
    )
    assert json.loads((model / "config.json").read_text(encoding="utf-8"))["name_weight"] == chosen["weight"]
    run("--output", tmp_path / "again.json", model=model)
    again = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    assert again["name_weight"] == chosen["weight"]
    assert again["metrics"] == results["metrics"]
    run("--output", tmp_path / "plain.json", "--name-weight", 0, model=model)
    run("--output", tmp_path / "old.json")
    plain, old = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("plain.json", "old.json"))
    assert plain["metrics"] == old["metrics"]


def test_a_saved_weight_comes_with_a_threshold_of_its_scores(run, folder, tmp_path):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "nil_threshold": 1.0}), encoding="utf-8")
    run("--name-weight", "auto", "--save-name-weight", "--output", tmp_path / "r.json", model=model)
    results = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    saved = json.loads((model / "config.json").read_text(encoding="utf-8"))["nil_threshold"]
    assert saved == results["nil_threshold"] == results["nil_calibration"]["threshold"] != 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name-weight", "much"], "neither a number of at least 0 nor auto"),
        (["--name-weight", "-1"], "neither a number of at least 0 nor auto"),
        (["--save-name-weight"], "Give the weight to save"),
        (["--name-weight", "1", "--units", "text"], "all units"),
    ],
)
def test_an_unusable_weight_of_the_names_is_an_error(run, arguments, message):
    outcome = run(*arguments)
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.output.replace("│", " ").split())
