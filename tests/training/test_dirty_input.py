"""Training on rows that lack something, and on batches that teach nothing."""

from __future__ import annotations

import logging

import datasets
import pytest
import torch

from hf_mel.errors import DataFormatError, ImageError, UnknownEntityError
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.trainer import MelTrainer
from tests.toy import ToyProcessor, toy_entities, toy_mentions, toy_model

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
def test_batches_of_one_entity_have_loss_zero_and_change_nothing(tmp_path, batch_size):
    """A softmax over one entity is 1, whether the batch has one mention or all its golds are the same."""
    rows = [{**row, "entity_id": "Q1"} for row in toy_mentions(8)]
    mentions = datasets.Dataset.from_list(rows, features=toy_mentions(1).features)
    trainer = train(tmp_path, mentions, logging_steps=1, per_device_train_batch_size=batch_size)
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == [0.0, 0.0]
    for new, old in zip(weights(trainer), toy_model().parameters(), strict=True):
        assert new.equal(old)


def test_a_knowledge_base_of_one_entity_is_trained_on(tmp_path):
    mentions = toy_mentions(4, entities=1)
    assert train(tmp_path, mentions, ENTITIES.select([0])).state.global_step == 2


def test_a_split_without_mentions_is_an_error(tmp_path):
    with pytest.raises(DataFormatError, match="no mentions to train on: it is empty"):
        train(tmp_path, toy_mentions(1).select([]))


def test_a_gold_outside_the_knowledge_base_is_an_error_before_training(tmp_path):
    with pytest.raises(UnknownEntityError, match=r"row 5: The gold 'Q12' of mention 'm5'"):
        train(tmp_path, toy_mentions(12), ENTITIES.select(range(11)))
