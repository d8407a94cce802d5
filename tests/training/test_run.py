"""Run folders: their files, resuming, loading elsewhere, and the signs of a finished run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from hf_mel.data.loading import check_golds, dataset_version, load_entities, load_mentions
from hf_mel.errors import LockedError, MissingExtraError, RecipeError
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.inference.inputs import ModelInputs
from hf_mel.training import run_folder
from hf_mel.training.assemble import build_model
from hf_mel.training.linking_run import with_extra_datasets, with_extra_mentions
from hf_mel.training.recipe import Recipe
from hf_mel.training.run import run_recipe
from hf_mel.training.run_folder import training_arguments
from hf_mel.training.trainer import MelTrainer
from tests.processes import lock_holder
from tests.training.toy_run import add_posts, recipe_dict, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("toy") / "toy_data", nil_every=6)


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> Path:
    return run_recipe(Recipe.from_dict(recipe_dict(dataset)), tmp_path_factory.mktemp("runs") / "tiny")


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_the_folder_contains_a_model_repository_and_the_record_of_its_run(finished, dataset):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "README.md", "config.json", "configuration_mimic.py", "dual_bounds_mimic.py", "environment.json", "model.safetensors", "modeling_mimic.py",
        "processing_mimic.py", "processor_config.json", "recipe.yaml", "results.json", "scoring_mimic.py",
        "tokenizer.json", "tokenizer_config.json", "training.png", "training_log.json",
    }  # fmt: skip
    assert Recipe.load(finished / "recipe.yaml").to_dict() == Recipe.from_dict(recipe_dict(dataset)).to_dict()
    results = results_of(finished)
    assert results["data"] == {
        **dataset_version(dataset),
        "train_split": "train",
        "train_mentions": 24,
        "train_nil": 4,
        "validation_split": "validation",
        "validation_mentions": 12,
        "entities": 12,
    }
    assert results["model"]["type"] == "mimic"
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_folder_says_by_which_code_and_on_which_machine_it_was_trained(finished):
    (start,) = json.loads((finished / "environment.json").read_text())
    assert start["packages"]["torch"] == torch.__version__
    assert start["packages"]["pyarrow"] == version("pyarrow")
    assert re.fullmatch("[0-9a-f]{40}", start["code"]["commit"] or "0" * 40)
    assert start["machine"]["cores"] == os.cpu_count()
    assert start["machine"]["memory_gb"] > 0
    assert start["arguments"]["learning_rate"] == 1e-3
    assert start["arguments"]["weight_decay"] == 0  # a default
    assert (start["processes"], start["from_checkpoint"]) == (1, None)


def test_the_same_recipe_twice_gives_the_same_results(finished, dataset, tmp_path):
    again = run_recipe(Recipe.from_dict(recipe_dict(dataset)), tmp_path / "tiny")
    assert (again / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    first, second = results_of(finished), results_of(again)
    for results in (first, second):
        results.pop("run")  # the time that it took
        results["validation"].pop("wall_time_seconds")
    assert first == second


def test_the_saved_model_reproduces_the_recorded_results(finished, dataset):
    model = AutoModel.from_pretrained(finished)
    processor = AutoProcessor.from_pretrained(finished)
    again = FullEvaluator(load_entities(dataset), progress=False)(
        ModelInputs(model, processor), load_mentions(dataset, "validation")
    )
    results = results_of(finished)
    assert again.metrics == pytest.approx(results["validation"]["metrics"])
    log = json.loads((finished / "training_log.json").read_text())
    best = max((entry for entry in log if "eval_mrr" in entry), key=lambda entry: entry["eval_mrr"])
    assert results["best"] == {"step": best["step"], "epoch": best["epoch"]}
    assert again.metrics["mrr"] == pytest.approx(best["eval_mrr"])
    assert model.config.nil_threshold == results["nil"]["threshold"]
    assert model.config.nil_threshold == again.calibrate_nil_threshold().threshold
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert model.config.text_config.pad_token_id == processor.tokenizer.pad_token_id


def test_without_nil_mentions_no_threshold_is_stored(tmp_path):
    dataset = write_dataset(tmp_path / "all_known", nil_every=0)
    folder = run_recipe(Recipe.from_dict(recipe_dict(dataset)), tmp_path / "tiny")
    nil = results_of(folder)["nil"]
    assert nil["simulated"]
    assert nil["threshold"] is not None
    assert AutoModel.from_pretrained(folder).config.nil_threshold is None


def test_posts_and_entities_are_further_training_mentions(dataset, tmp_path):
    recipe = recipe_dict(dataset, num_train_epochs=1, random_negatives=2, prior_correction=1.0, augment_images=True)
    recipe["data"]["extra_mentions"] = {"entities": 2}
    recipe["model"]["config"]["nil_score"] = True
    folder = run_recipe(Recipe.from_dict(recipe), tmp_path / "more")
    data = results_of(folder)["data"]
    assert (data["train_mentions"], data["train_nil"]) == (24 + 2 * 12, 4)
    assert AutoModel.from_pretrained(folder).config.nil_score
    assert "training mentions from which NIL is learned" in (folder / "README.md").read_text()

    recipe["data"]["extra_mentions"] = {"posts": 1}
    with pytest.raises(RecipeError, match="has no posts"):
        run_recipe(Recipe.from_dict(recipe), tmp_path / "none")


def test_posts_are_taken_as_often_as_the_recipe_says(tmp_path):
    dataset = write_dataset(tmp_path / "posted")
    posts = add_posts(dataset)
    recipe = Recipe.from_dict(recipe_dict(dataset, num_train_epochs=1))
    recipe.data.extra_mentions = {"posts": 2, "entities": 0}
    train, entities = load_mentions(dataset, "train"), load_entities(dataset)
    mentions = with_extra_mentions(recipe, train, entities)
    assert len(mentions) == len(train) + 2 * len(posts)
    assert len(set(mentions["mention_id"])) == len(mentions)
    assert mentions["entity_id"][len(train) :] == posts["entity_id"][:] * 2


def test_a_model_is_trained_on_two_data_sets(dataset, tmp_path):
    more = write_dataset(tmp_path / "more", mentions=10, entities=15)
    recipe = Recipe.from_dict(recipe_dict(dataset, num_train_epochs=1))
    recipe.data.extra_datasets = [str(more), str(dataset)]
    folder = run_recipe(recipe, tmp_path / "both")
    data = results_of(folder)["data"]
    assert (data["train_mentions"], data["train_nil"], data["entities"]) == (24 + 10 + 24, 2 * 4, 15)
    assert data["validation_mentions"] == 12
    assert [version["dataset"] for version in data["extra_datasets"]] == ["more", dataset.name]
    card = (folder / "README.md").read_text()
    assert f"`more`, sha256 `{dataset_version(more)['sha256']}`" in card


def test_ids_of_two_data_sets_stay_apart_and_their_entities_meet(dataset, tmp_path):
    more = write_dataset(tmp_path / "more", mentions=10, entities=15)
    recipe = Recipe.from_dict(recipe_dict(dataset))
    train, entities = load_mentions(dataset, "train"), load_entities(dataset)
    first = train.add_column("candidate_priors", [[0.5]] * len(train))
    recipe.data.extra_datasets = [str(more)]
    mentions, all_entities = with_extra_datasets(recipe, first, entities)
    check_golds(mentions, all_entities["entity_id"])
    assert all_entities["entity_id"][:] == [f"Q{number}" for number in range(1, 16)]
    assert mentions.select_columns(train.column_names)[:24] == train[:24]
    others = mentions.select(range(24, 34))
    assert not set(others["context_id"]) & set(train["context_id"])
    assert others["candidate_priors"][:] == [None] * 10
    kept = [name for name in train.column_names if name not in ("mention_id", "context_id", "image")]
    assert others.select_columns(kept)[:] == load_mentions(more, "train").select_columns(kept)[:]

    lengths = train.remove_columns("text").add_column("text", [len(text) for text in train["text"]])
    with pytest.raises(RecipeError, match="columns that do not fit"):
        with_extra_datasets(recipe, lengths, entities)


def test_the_card_runs_where_hf_mel_is_not_installed(finished, tmp_path):
    card = (finished / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("hf-mel/tiny", str(finished))
    script = (
        "import sys\nsys.modules['hf_mel'] = None\n" + snippet + "\nprint(tuple(scores.shape), type(model).__module__)"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.strip().splitlines()[-2:]
    assert first in ("Jordan", "Michael Jordan")
    assert second.startswith("(1, 2) transformers_modules.")


class Interrupted(BaseException):
    """Stands for an interruption by Ctrl-C."""


@pytest.mark.parametrize(
    ("training", "fail_at"),
    [
        ({}, 4),  # in the second epoch; resumes from its start
        (  # the checkpoint is inside an epoch, and restores the random state of dropout
            {
                "eval_strategy": "steps",
                "save_strategy": "steps",
                "eval_steps": 2,
                "save_steps": 2,
                "save_total_limit": 1,
            },
            6,
        ),
    ],
    ids=["between epochs", "inside an epoch"],
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    dataset, tmp_path, monkeypatch, training, fail_at
):
    recipe = Recipe.from_dict(recipe_dict(dataset, batch_grouping="surface", group_size=2, **training))
    whole = run_recipe(recipe, tmp_path / "whole")

    steps, training_step = [], MelTrainer.training_step

    def failing(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == fail_at:
            raise Interrupted
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MelTrainer, "training_step", failing)
        with pytest.raises(Interrupted):
            run_recipe(recipe, tmp_path / "parts")
    assert not (tmp_path / "parts/results.json").exists()
    assert not (tmp_path / "parts/config.json").exists()
    with pytest.raises(RecipeError, match=r"contains an interrupted run\. Continue it with --resume"):
        run_recipe(recipe, tmp_path / "parts")

    torch.manual_seed(99)
    parts = run_recipe(recipe, tmp_path / "parts", resume=True)
    expected, resumed = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0, msg=name)
    assert results_of(parts)["run"]["resumed"]
    starts = json.loads((parts / "environment.json").read_text())
    assert [start["from_checkpoint"] for start in starts] == [None, f"checkpoint-{3 if not training else 4}"]
    assert results_of(parts)["validation"]["metrics"] == results_of(whole)["validation"]["metrics"]
    assert not (parts / "checkpoints").exists()


def test_an_interruption_after_training_resumes_without_training_again(dataset, tmp_path, monkeypatch):
    recipe = Recipe.from_dict(recipe_dict(dataset))

    def fail(*args, **kwargs):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "model_card", fail)
        with pytest.raises(Interrupted):
            run_recipe(recipe, tmp_path / "tiny")
    assert not (tmp_path / "tiny/results.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(MelTrainer, "training_step", fail)
        folder = run_recipe(recipe, tmp_path / "tiny", resume=True)
        before = (folder / "results.json").stat().st_mtime_ns
        assert run_recipe(recipe, folder, resume=True) == folder  # a finished run is not changed
    assert (folder / "results.json").stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match=r"contains a finished run\. Keep it with --resume"):
        run_recipe(recipe, folder)


def test_an_incomplete_checkpoint_is_ignored(tmp_path):
    for step, complete in ((2, True), (10, True), (12, False)):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        if complete:
            (checkpoint / "trainer_state.json").write_text("{}")
    assert run_folder._last_checkpoint(tmp_path).name == "checkpoint-10"
    assert run_folder._last_checkpoint(tmp_path / "none") is None


def test_a_folder_without_a_run_is_not_changed(dataset, tmp_path):
    recipe = Recipe.from_dict(recipe_dict(dataset))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="is not empty and contains no run"):
        run_recipe(recipe, tmp_path)
    with pytest.raises(RecipeError, match="is not empty and contains no run"):
        run_recipe(recipe, tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_resuming_with_another_recipe_names_what_differs(dataset, finished):
    content = recipe_dict(dataset, num_train_epochs=3)
    content["model"]["config"]["text_dim"] = 16
    with pytest.raises(RecipeError, match=r"other values of model.config.text_dim, training.num_train_epochs\."):
        run_recipe(Recipe.from_dict(content), finished, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_into_which_another_process_trains_is_refused(dataset, tmp_path, monkeypatch, resume):
    recipe = Recipe.from_dict(recipe_dict(dataset))
    (tmp_path / "tiny").mkdir()
    with lock_holder(tmp_path / "tiny/.writer.lock") as process, pytest.raises(LockedError, match=f"{process.pid}"):
        run_recipe(recipe, tmp_path / "tiny", resume=resume)
    assert list((tmp_path / "tiny").iterdir()) == []
    training_step, refused = MelTrainer.training_step, []

    def training(self, *args, **kwargs):
        if not refused:
            with pytest.raises(LockedError):
                run_recipe(recipe, tmp_path / "tiny", resume=resume)
            refused.append(1)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(MelTrainer, "training_step", training)
    run_recipe(recipe, tmp_path / "tiny", resume=resume)
    assert refused
    assert not (tmp_path / "tiny/.writer.lock").exists()


def test_a_recipe_that_cannot_be_used_leaves_no_folder(dataset, tmp_path):
    with pytest.raises(RecipeError):
        run_recipe(Recipe.from_dict(recipe_dict(dataset, no_such_argument=1)), tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_failed_before_its_first_checkpoint_starts_over(dataset, tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: before\n")
    recipe = Recipe.from_dict(
        recipe_dict(dataset, max_steps=1, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    )
    folder = run_recipe(recipe, tmp_path)
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["name"] == "tiny"


def test_training_continues_from_a_model_repository(dataset, finished, tmp_path):
    content = {key: value for key, value in recipe_dict(dataset).items() if key != "processor"}
    content["model"] = {"from_pretrained": str(finished), "config": {"temperature": 0.5}}
    recipe = Recipe.from_dict(content)
    model, _ = build_model(recipe)
    assert model.config.temperature == 0.5
    weights = AutoModel.from_pretrained(finished).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    content["model"]["from_pretrained"] = str(tmp_path / "nothing")
    with pytest.raises(RecipeError, match=r"nothing' .* does not load"):
        build_model(Recipe.from_dict(content))


def test_encoders_can_be_parts_of_another_model(dataset, finished):
    content = {key: value for key, value in recipe_dict(dataset).items() if key != "processor"}
    content["model"] = {
        "type": "mmel",
        "text": f"part:text_model:{finished}",
        "vision": f"part:vision_model:{finished}",
        "config": {"hidden_size": 8, "num_attention_heads": 2},
    }
    content["candidates"] = {"source": "name"}
    model, processor = build_model(Recipe.from_dict(content))
    source, parts = AutoModel.from_pretrained(finished), AutoProcessor.from_pretrained(finished)
    for name in ("text_model", "vision_model"):
        weights = getattr(source, name).state_dict()
        taken = getattr(model, name).state_dict()
        assert taken.keys() <= weights.keys()
        assert all(torch.equal(tensor, weights[key]) for key, tensor in taken.items())
    assert processor.tokenizer.get_vocab() == parts.tokenizer.get_vocab()
    assert processor.image_processor.size == parts.image_processor.size
    content["model"]["text"] = f"part:tglu:{finished}"
    with pytest.raises(RecipeError, match="no part 'tglu'; it has text_model, vision_model"):
        build_model(Recipe.from_dict(content))


def test_without_matplotlib_the_plot_is_skipped_with_a_log_line(dataset, tmp_path, monkeypatch, caplog):
    def missing(*args, **kwargs):
        raise MissingExtraError("The plot needs matplotlib.", remedy='Run pip install "hf_mel[plot]".')

    monkeypatch.setattr(run_folder, "plot_training", missing)
    recipe = Recipe.from_dict(
        recipe_dict(dataset, max_steps=1, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    )
    folder = run_recipe(recipe, tmp_path / "tiny")
    assert not (folder / "training.png").exists()
    assert results_of(folder)["best"] is None
    assert 'training.png was not written. The plot needs matplotlib. Run pip install "hf_mel[plot]".' in caplog.text


def changed(dataset, *overrides: str) -> Recipe:
    content = recipe_dict(dataset)
    from hf_mel.training.recipe import apply_override

    for override in overrides:
        apply_override(content, override, "mine.yaml")
    return Recipe.from_dict(content, file="mine.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.type=mimik", "The model type 'mimik' .* is not registered with AutoConfig"),
        ("model.type=bert", "The model type 'bert' .* has no model and processor class"),
        ("model.type=clip", "unknown key 'model.config.text_pooling'"),
        ("model.config.text_dims=8", r"unknown key 'model.config.text_dims'. Did you mean 'text_dim'\?"),
        (
            "model.config.text_config.hiden_size=8",
            r"'model.config.text_config.hiden_size'. Did you mean 'hidden_size'\?",
        ),
        ("model.config.gate=vectro", "The section 'model' .*: gate='vectro' is not one of"),
        ("processor.options.max_lenght=8", r"unknown key 'processor.options.max_lenght'. Did you mean 'max_length'\?"),
    ],
)
def test_settings_that_do_not_fit_the_method_are_rejected(dataset, override, message):
    with pytest.raises(RecipeError, match=f"mine.yaml: .*{message}"):
        build_model(changed(dataset, override), ["some text"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.num_epochs=3",
            r"The recipe has an unknown key 'training.num_epochs'. Did you mean 'num_train_epochs'\?",
        ),
        ("training.output_dir=x", "The recipe has an unknown key 'training.output_dir'"),
        ("training.learning_rate=fast", "The value 'fast' of training.learning_rate is not a number"),
        ("training.bf16=yes please", "The value 'yes please' of training.bf16 is not true, false or 'auto'"),
        ("training.augment_images=much", "The value 'much' of training.augment_images is not true, false or 'strong'"),
        ("training.num_train_epochs=true", "The value True of training.num_train_epochs is not a number"),
        ("training.batch_grouping=name", "The training arguments are not valid: batch_grouping='name' is not one of"),
        (
            "training.eval_strategy=sometimes",
            "The training arguments are not valid: '?sometimes'? is not a valid IntervalStrategy",
        ),
    ],
)
def test_training_arguments_are_checked(dataset, override, message):
    with pytest.raises(RecipeError, match=f"mine.yaml: {message}"):
        training_arguments(changed(dataset, override), "nowhere")


def test_a_run_that_was_killed_while_it_wrote_its_recipe_starts_over(dataset, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.recipe.yaml.2f6e8e86acc24754.tmp").write_text("name: ti")
    recipe = Recipe.from_dict(recipe_dict(dataset, max_steps=1, num_train_epochs=1))
    folder = run_recipe(recipe, tmp_path / "run", resume=True)
    assert not list(folder.glob(".*.tmp"))
