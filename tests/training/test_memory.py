"""Predictions of the memory of a training, and trainings that are refused."""

from __future__ import annotations

import logging

import pytest
import torch

from hf_mel.errors import NotEnoughMemoryError
from hf_mel.training import memory
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.trainer import MelTrainer
from tests.toy import ToyProcessor, toy_entities, toy_mentions, toy_model

ENTITIES, MENTIONS = toy_entities(12), toy_mentions(24)


def trainer(tmp_path, **options) -> MelTrainer:
    options = {"per_device_train_batch_size": 16, "max_steps": 1, "disable_tqdm": True, **options}
    strategies = {"save_strategy": "no", "load_best_model_at_end": False, "use_cpu": True, "bf16": False}
    return MelTrainer(
        toy_model(),
        MelTrainingArguments(str(tmp_path), **strategies, **options),
        MENTIONS,
        MENTIONS,
        entities=ENTITIES,
        processing_class=ToyProcessor(),
    )


def test_parts_of_a_prediction_are_those_of_the_model(tmp_path):
    prediction = memory.predict_memory(trainer(tmp_path))
    parameters = sum(parameter.numel() for parameter in toy_model().parameters())
    assert prediction.gradients == 4 * parameters
    assert prediction.optimizer == 8 * parameters  # two moments
    dim = toy_model().config.dim
    assert prediction.evaluation == memory._RANKING + (12 + 24) * 2 * 4 * dim  # text and vision
    assert memory.predict_memory(trainer(tmp_path, optim="sgd")).optimizer == 0


def test_kept_activations_of_a_part_of_the_batch_give_those_of_the_whole(tmp_path):
    """ToyModel pads every text to one length, so that the parabola through the parts is exact but for shared entities."""
    built = trainer(tmp_path)
    whole = memory._measured(built, list(built.sampler)[:16])
    assert memory._batch_bytes(built) == pytest.approx(memory._STEP_FACTOR * whole, rel=0.25)


def test_a_prediction_changes_neither_weights_nor_random_numbers(tmp_path):
    built = trainer(tmp_path)
    before = [parameter.clone() for parameter in built.model.parameters()]
    torch.manual_seed(3)
    memory.predict_memory(built)
    number = torch.rand(1)
    torch.manual_seed(3)
    assert torch.rand(1).equal(number)
    assert all(parameter.grad is None for parameter in built.model.parameters())
    assert all(new.equal(old) for new, old in zip(built.model.parameters(), before, strict=True))


def test_a_training_that_does_not_fit_is_refused_unless_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_free_memory", lambda device: 1000)
    with pytest.raises(NotEnoughMemoryError, match=r"predicted to need .* training\.check_memory=false"):
        trainer(tmp_path).train()
    assert trainer(tmp_path, check_memory=False).train().global_step == 1


def test_what_cannot_be_predicted_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="hf_mel.training.memory"):
        assert memory.check_memory(trainer(tmp_path, optim="adafactor")) is None
    assert "The memory of training is not predicted: what the optimizer" in caplog.text


def test_the_limit_of_a_control_group_counts(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 500\n")
    real = memory.Path
    monkeypatch.setattr(memory, "Path", lambda *parts: real(tmp_path, *parts[1:]))
    assert memory._free_memory(torch.device("cpu")) == 2500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._free_memory(torch.device("cpu")) > 5000
