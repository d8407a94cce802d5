"""Predictions of the memory of a training, and trainings that are refused."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import datasets
import pytest
import torch

from hf_mel.errors import NotEnoughMemoryError
from hf_mel.training import memory
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.trainer import MelTrainer
from tests.toy import ToyProcessor, toy_entities, toy_mentions, toy_model
from tests.training.shared_training import mimic

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


def test_one_long_text_in_a_batch_is_in_every_part_that_is_measured(tmp_path):
    """Texts are padded to the longest of the batch. In the last place, it would make the parabola shoot up or miss it."""
    model, processor = mimic()
    mentions = [dict(row) for row in MENTIONS.select(range(16))]
    for mention in mentions:
        mention["text"] = mention["mention"]
    rows = datasets.Dataset.from_list(mentions, features=MENTIONS.features)
    options = {"save_strategy": "no", "load_best_model_at_end": False, "use_cpu": True, "bf16": False}
    arguments = MelTrainingArguments(str(tmp_path), per_device_train_batch_size=16, disable_tqdm=True, **options)
    plain = MelTrainer(model, arguments, rows, MENTIONS, entities=ENTITIES, processing_class=processor)
    for place in (0, 15):
        mentions[list(plain.sampler)[place]]["text"] = "a word " * 30 + mentions[list(plain.sampler)[place]]["mention"]
        rows = datasets.Dataset.from_list(mentions, features=MENTIONS.features)
        built = MelTrainer(model, arguments, rows, MENTIONS, entities=ENTITIES, processing_class=processor)
        whole = memory._measured(built, list(built.sampler)[:16])
        assert memory._batch_bytes(built) == pytest.approx(memory._STEP_FACTOR * whole, rel=0.25), place
        mentions[list(plain.sampler)[place]]["text"] = mentions[list(plain.sampler)[place]]["mention"]


def test_an_evaluation_that_is_switched_off_needs_no_memory(tmp_path):
    assert memory._evaluation_bytes(trainer(tmp_path, eval_strategy="no")) > 0  # at the end of a run
    assert memory._evaluation_bytes(trainer(tmp_path, eval_strategy="no", final_evaluation=False)) == 0


def test_on_a_gpu_encodings_do_not_count_and_a_prediction_only_warns(tmp_path, monkeypatch, caplog):
    built = trainer(tmp_path)
    gpu = SimpleNamespace(**{name: getattr(built, name) for name in ("reranks", "eval_dataset", "model")})
    gpu.args = SimpleNamespace(device=torch.device("cuda"), eval_strategy="epoch", final_evaluation=True)
    assert memory._evaluation_bytes(gpu) == 0
    monkeypatch.setattr(memory, "_why_not", lambda trainer: None)
    monkeypatch.setattr(memory, "_free_memory", lambda device: 1000)
    monkeypatch.setattr(memory, "predict_memory", lambda trainer: memory.MemoryPrediction(10, 20, 30, 4000, 0))
    with caplog.at_level(logging.WARNING, logger="hf_mel.training.memory"):
        assert memory.check_memory(gpu).peak == 4060
    assert "If memory runs out: Lower training.per_device_train_batch_size" in caplog.text


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
