"""Trainings that end before their time: by SIGTERM, with a loss that is no number, on a full disk, and half-written checkpoints."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import Trainer

from hf_mel.cli import main
from hf_mel.errors import StoppedError, TrainingError
from hf_mel.training.recipe import Recipe
from hf_mel.training.run import run_recipe
from hf_mel.training.sampling import GroupingSampler
from hf_mel.training.trainer import MelTrainer
from tests.training.toy_run import recipe_dict, write_dataset

STEPWISE = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    return Recipe.from_dict(recipe_dict(write_dataset(tmp_path_factory.mktemp("data")), **STEPWISE))


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    return run_recipe(recipe, tmp_path_factory.mktemp("whole") / "run")


def at_step(monkeypatch, number: int, act):
    """Calls `act` with the trainer at the start of a step, counted from 1."""
    training_step = MelTrainer.training_step

    def acting(self, *args, **kwargs):
        if self.state.global_step + 1 == number:
            act(self)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(MelTrainer, "training_step", acting)


def assert_same_weights(folder: Path, expected: Path) -> None:
    actual, weights = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert actual.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, msg=name)


def test_sigterm_saves_the_step_and_the_resumed_run_is_as_if_nothing_had_been(recipe, whole, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(
            StoppedError, match=r"after step 3 of 6, which is saved\. Repeat the command with --resume"
        ):
            run_recipe(recipe, tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) == before
    assert (tmp_path / "run/checkpoints/checkpoint-3/trainer_state.json").exists()
    assert_same_weights(run_recipe(recipe, tmp_path / "run", resume=True), whole)


def test_sigterm_in_the_last_step_finishes_the_run(recipe, whole, tmp_path, monkeypatch):
    at_step(monkeypatch, 6, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    assert_same_weights(run_recipe(recipe, tmp_path / "run"), whole)


def test_the_exit_status_says_that_a_signal_stopped_it(monkeypatch, capsys):
    app = typer.Typer()

    @app.command()
    def train():
        raise StoppedError("Training was stopped.")

    monkeypatch.setattr(sys, "argv", ["hf-mel"])
    with pytest.raises(SystemExit) as ended:
        main(app)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "StoppedError: Training was stopped." in capsys.readouterr().err


def test_a_loss_that_is_no_number_names_its_rows_and_the_last_good_checkpoint(recipe, tmp_path, monkeypatch):
    compute_loss = MelTrainer.compute_loss

    def broken(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step == 3 else loss

    monkeypatch.setattr(MelTrainer, "compute_loss", broken)
    with pytest.raises(
        TrainingError, match=r"The loss is nan at step 4.*The last good checkpoint is .*checkpoint-2\."
    ):
        run_recipe(recipe, tmp_path / "run")
    content = json.loads((tmp_path / "run/checkpoints/not_finite-0.json").read_text())
    sampler = GroupingSampler(range(24))
    sampler.set_epoch(1)  # three batches of 8 in an epoch
    assert content["step"] == 4
    assert content["ids"] == [f"m{number}" for number in list(sampler)[:8]]


def test_weights_that_are_no_numbers_are_not_saved(recipe, tmp_path, monkeypatch):
    def break_weight(trainer):
        with torch.no_grad():
            next(iter(trainer.model.parameters())).fill_(torch.nan)

    monkeypatch.setattr(MelTrainer, "compute_loss", lambda self, *_, **__: torch.zeros((), requires_grad=True))
    at_step(monkeypatch, 4, break_weight)
    recipe = dataclasses.replace(
        recipe, training={**recipe.training, "eval_strategy": "no", "load_best_model_at_end": False}
    )
    with pytest.raises(TrainingError, match=r"The weight \S+ has become nan or infinite at step 4\. .*checkpoint-2\."):
        run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run/checkpoints/checkpoint-4").exists()


def test_a_full_disk_keeps_the_checkpoint_before(recipe, whole, tmp_path, monkeypatch):
    save = Trainer._save_checkpoint

    def half(self, model, trial):
        if self.state.global_step == 4:
            folder = Path(self.args.output_dir, "checkpoint-4")
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, model, trial)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", half)
        with pytest.raises(TrainingError, match=r"checkpoint of step 4 cannot be written \(.*No space left"):
            run_recipe(recipe, tmp_path / "run")
    assert_same_weights(run_recipe(recipe, tmp_path / "run", resume=True), whole)


def test_a_checkpoint_whose_last_file_is_cut_off_is_not_loaded(recipe, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StoppedError):
            run_recipe(recipe, tmp_path / "run")
    state = tmp_path / "run/checkpoints/checkpoint-5/trainer_state.json"
    state.write_text(state.read_text()[:-20])
    (state.parent / "model.safetensors").write_bytes(b"half")
    assert_same_weights(run_recipe(recipe, tmp_path / "run", resume=True), whole)


def test_the_best_checkpoint_stays_while_old_ones_rotate_and_becomes_the_model(recipe, tmp_path, monkeypatch):
    evaluate, best = MelTrainer.evaluate, {}

    def second_is_best(self, *args, **kwargs):
        return evaluate(self, *args, **kwargs) | {"eval_mrr": 0.9 if self.state.global_step == 2 else 0.1}

    def look(trainer):
        folder = Path(trainer.args.output_dir)
        assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-5"}
        best.update(load_file(folder / "checkpoint-2/model.safetensors"))

    monkeypatch.setattr(MelTrainer, "evaluate", second_is_best)
    at_step(monkeypatch, 6, look)
    every_step = {**recipe.training, "eval_steps": 1, "save_steps": 1, "save_total_limit": 2}
    run = run_recipe(dataclasses.replace(recipe, training=every_step), tmp_path / "run")
    assert best
    assert all(torch.equal(tensor, best[name]) for name, tensor in load_file(run / "model.safetensors").items())
