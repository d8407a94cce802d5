"""Training on rows that lack something, and on batches that teach nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from hf_mel.errors import DataFormatError, ImageError, UnknownEntityError
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.readable_images import with_readable_images
from hf_mel.training.recipe import CandidatesRecipe, Recipe
from hf_mel.training.run import run_recipe
from hf_mel.training.trainer import MelTrainer
from tests.recipes.test_rerankers import encoders, load  # noqa: F401 (a fixture)
from tests.toy import ToyProcessor, toy_entities, toy_mentions, toy_model
from tests.training.toy_run import recipe_dict, write_dataset

ENTITIES = toy_entities(12)


def train(tmp_path, mentions, entities=ENTITIES, **arguments):
    """Trains two steps, and returns the trainer."""
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "disable_tqdm": True,
    } | arguments
    strategies = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": []}
    trainer = MelTrainer(
        toy_model(),
        MelTrainingArguments(output_dir=str(tmp_path), **options, **strategies, use_cpu=True),
        train_dataset=mentions,
        entities=entities,
        processing_class=ToyProcessor(),
    )
    trainer.train()
    return trainer


def changed(mentions: datasets.Dataset, **values) -> datasets.Dataset:
    """Returns mentions with values in place of those of every second one."""
    rows = mentions.cast_column("image", datasets.Image(decode=False)).to_list()
    rows = [{**row, **(values if number % 2 else {})} for number, row in enumerate(rows)]
    return datasets.Dataset.from_list(rows, features=mentions.features)


def weights(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_missing_texts_and_images_are_counted_and_trained_on(tmp_path, caplog):
    mentions = changed(toy_mentions(8), text="", mention="", image=None)
    with caplog.at_level(logging.INFO, logger="hf_mel.training.trainer"):
        trainer = train(tmp_path, mentions)
    without = sum(image is None for image in mentions["image"])
    bare = sum(not images for images in ENTITIES["images"])
    assert (
        f"Training reads 4 mentions without a text, {without} mentions without an image, "
        f"{bare} entities without an image." in caplog.text
    )
    assert all(weight.isfinite().all() for weight in weights(trainer))
    assert any(not new.equal(old) for new, old in zip(weights(trainer), toy_model().parameters(), strict=True))


def test_complete_rows_are_not_spoken_of(tmp_path, caplog):
    complete = [row for row, image in enumerate(toy_mentions(8)["image"]) if image is not None]
    entities = ENTITIES.filter(lambda row: bool(row["images"]))
    mentions = toy_mentions(8).select(complete)
    known = set(entities["entity_id"])
    with caplog.at_level(logging.INFO, logger="hf_mel.training.trainer"):
        train(tmp_path, mentions.filter(lambda row: row["entity_id"] in known), entities)
    assert "without" not in caplog.text


def test_a_damaged_image_is_an_error_that_names_its_mention(tmp_path):
    mentions = changed(toy_mentions(8), image={"bytes": b"GIF89a half", "path": None})
    with pytest.raises(ImageError, match=r"row m[1357]: The image is damaged|row m[1357]: The file is not an image"):
        train(tmp_path, mentions)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batches_of_one_entity_have_loss_zero_and_change_nothing_and_are_counted(tmp_path, batch_size, caplog):
    """A softmax over one entity is 1, whether the batch has one mention or all its golds are the same."""
    rows = [{**row, "entity_id": "Q1"} for row in toy_mentions(8)]
    mentions = datasets.Dataset.from_list(rows, features=toy_mentions(1).features)
    trainer = train(tmp_path, mentions, logging_steps=1, per_device_train_batch_size=batch_size)
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == [0.0, 0.0]
    for new, old in zip(weights(trainer), toy_model().parameters(), strict=True):
        assert new.equal(old)
    assert "2 batches had a single entity" in caplog.text


def test_a_knowledge_base_of_one_entity_is_trained_on(tmp_path):
    mentions = toy_mentions(4, entities=1)
    assert train(tmp_path, mentions, ENTITIES.select([0])).state.global_step == 2


def test_a_split_without_mentions_is_an_error(tmp_path):
    with pytest.raises(DataFormatError, match="no mentions to train on: it is empty"):
        train(tmp_path, toy_mentions(1).select([]))


def test_a_gold_outside_the_knowledge_base_is_an_error_before_training(tmp_path):
    with pytest.raises(UnknownEntityError, match=r"row 5: The gold 'Q12' of mention 'm5'"):
        train(tmp_path, toy_mentions(12), ENTITIES.select(range(11)))


DAMAGED = {"bytes": b"GIF89a half", "path": None}


def damaged_data(folder):
    """Writes a data set with two damaged images of mentions, one of an entity that has another, and one missing file."""
    data = write_dataset(folder)
    damaged_rows(data / "mentions/train.parquet", {1: DAMAGED, 7: {"bytes": None, "path": "no/such/file.png"}})
    damaged_rows(data / "mentions/validation.parquet", {2: DAMAGED})
    whole = datasets.Dataset.from_parquet(str(data / "entities/kb.parquet"), keep_in_memory=True)
    image = whole.with_format("arrow")[1]["images"].to_pylist()[0][0]
    damaged_rows(data / "entities/kb.parquet", {1: [image, DAMAGED, image]})
    return data


def damaged_rows(file, images):
    """Replaces the images of rows of a Parquet file."""
    rows = datasets.Dataset.from_parquet(str(file), keep_in_memory=True)
    column = "images" if "images" in rows.column_names else "image"
    values = rows.with_format("arrow")[:].to_pylist()
    for number, value in images.items():
        values[number][column] = value
    # `to_parquet` would look for the missing file.
    pq.write_table(datasets.Dataset.from_list(values, features=rows.features).data.table, file)


def test_damaged_images_are_left_out_of_a_run_and_counted(tmp_path, caplog):
    """The run ends as one of a data set that never had them, drawn images of entities included."""
    with caplog.at_level(logging.INFO, logger="hf_mel"):
        damaged = run_recipe(Recipe.from_dict(recipe_dict(damaged_data(tmp_path / "data"))), tmp_path / "damaged")
    assert "4 images are missing or damaged, and left out. The first: row m1: " in caplog.text
    clean = write_dataset(tmp_path / "clean")
    damaged_rows(clean / "mentions/train.parquet", {1: None, 7: None})
    damaged_rows(clean / "mentions/validation.parquet", {2: None})
    whole = datasets.Dataset.from_parquet(str(clean / "entities/kb.parquet"), keep_in_memory=True)
    image = whole.with_format("arrow")[1]["images"].to_pylist()[0][0]
    damaged_rows(clean / "entities/kb.parquet", {1: [image, image]})
    expected = run_recipe(Recipe.from_dict(recipe_dict(clean)), tmp_path / "run")
    weights, others = (load_file(folder / "model.safetensors") for folder in (damaged, expected))
    assert all(weights[name].equal(others[name]) for name in others)
    results, other = (json.loads((folder / "results.json").read_text()) for folder in (damaged, expected))
    assert results["validation"]["metrics"] == other["validation"]["metrics"]


def test_a_table_without_a_readable_image_is_an_error_before_training(tmp_path):
    """As where the folder of the images is not mounted: a run without any would be another one."""
    data = write_dataset(tmp_path / "data")
    file = data / "mentions/train.parquet"
    num_rows = len(datasets.Dataset.from_parquet(str(file), keep_in_memory=True))
    damaged_rows(file, {row: {"bytes": None, "path": f"not/mounted/{row}.png"} for row in range(num_rows)})
    with pytest.raises(ImageError, match="row m0"):
        run_recipe(Recipe.from_dict(recipe_dict(data)), tmp_path / "run")


def test_a_reranker_trains_without_damaged_images_and_without_nil(tmp_path, encoders, caplog):  # noqa: F811
    recipe = load("att_flags", "", encoders)
    recipe.data.dataset, recipe.candidates = str(damaged_data(tmp_path / "data")), CandidatesRecipe("name", k=4)
    recipe.training |= {"max_steps": 1, "use_cpu": True, "bf16": False, "disable_tqdm": True, "eval_strategy": "no"}
    recipe.training |= {"save_strategy": "no", "load_best_model_at_end": False}
    train = Path(recipe.data.dataset, "mentions/train.parquet")
    rows = datasets.Dataset.from_parquet(str(train), keep_in_memory=True).with_format("arrow")
    golds = ["NIL" if number < 5 else gold for number, gold in enumerate(rows[:]["entity_id"].to_pylist())]
    values = [{**row, "entity_id": gold} for row, gold in zip(rows[:].to_pylist(), golds, strict=True)]
    pq.write_table(datasets.Dataset.from_list(values, features=rows.features).data.table, train)
    with caplog.at_level(logging.INFO, logger="hf_mel"):
        run_recipe(recipe, tmp_path / "run")
    assert "4 images are missing or damaged, and left out." in caplog.text
    assert "Training leaves out 5 mentions whose gold is NIL." in caplog.text


def test_for_a_model_that_reads_no_images_none_is_opened(tmp_path):
    class TextOnly(ToyProcessor):
        def _encode(self, texts, images):
            return super()._encode(texts, [None] * len(texts))

    mentions = changed(toy_mentions(4), image=DAMAGED)
    assert with_readable_images(toy_model(), TextOnly(), mentions)[0] is mentions
    assert with_readable_images(toy_model(), ToyProcessor(), mentions)[0]["image"].count(None) >= 2


def test_pretraining_leaves_out_damaged_images_and_nil(tmp_path, caplog, encoders):  # noqa: F811
    recipe = load("pfmel-pretraining_flags", "", encoders)
    recipe.data.dataset, recipe.data.posts_split = str(damaged_data(tmp_path / "data")), None
    recipe.training |= {"max_steps": 1, "use_cpu": True, "bf16": False, "disable_tqdm": True}
    recipe.training |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    with caplog.at_level(logging.INFO, logger="hf_mel"):
        run_recipe(recipe, tmp_path / "run")
    assert "4 images are missing or damaged, and left out." in caplog.text


def test_all_golds_that_are_not_in_the_knowledge_base_are_counted(tmp_path):
    with pytest.raises(UnknownEntityError, match=r"row 2: The gold .* 4 of 12 mentions have such golds\."):
        train(tmp_path, toy_mentions(12), ENTITIES.select([row for row in range(12) if row not in (2, 4, 5, 11)]))


def test_a_validation_split_without_mentions_is_an_error_before_training(tmp_path):
    data = write_dataset(tmp_path / "data")
    toy_mentions(1).select([]).to_parquet(data / "mentions/validation.parquet")
    with pytest.raises(DataFormatError, match="validation"):
        run_recipe(Recipe.from_dict(recipe_dict(data)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
