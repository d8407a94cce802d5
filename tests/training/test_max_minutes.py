"""Training for a time: when it stops, what the learning rate does, and what a resumed run remembers."""

from __future__ import annotations

import json

import pytest

from hf_mel.errors import RecipeError
from hf_mel.training import base_trainer
from hf_mel.training.recipe import Recipe
from hf_mel.training.run import run_recipe
from hf_mel.training.run_folder import training_arguments
from tests.training.toy_run import recipe_dict, write_dataset


class Clock:
    """A clock that every step moves by 6 seconds, and the end of an epoch, where evaluations are, by an hour."""

    def __init__(self, monkeypatch):
        self.now, clock = 0.0, self
        monkeypatch.setattr(base_trainer.time, "process_time", lambda: clock.now)

        class Setter(base_trainer._EpochSetter):
            def on_step_begin(self, args, state, control, **kwargs):
                clock.now += 6

            def on_epoch_end(self, args, state, control, **kwargs):
                clock.now += 3600

        monkeypatch.setattr(base_trainer, "_EpochSetter", Setter)


def log_of(folder):
    return json.loads((folder / "training_log.json").read_text())


def test_training_stops_when_the_time_is_spent_and_keeps_the_evaluated_model(tmp_path, monkeypatch):
    Clock(monkeypatch)
    recipe = recipe_dict(write_dataset(tmp_path / "data"), max_minutes=0.45, num_train_epochs=50, logging_steps=1)
    folder = run_recipe(Recipe.from_dict(recipe), tmp_path / "run")
    steps = [entry for entry in log_of(folder) if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5]  # 27 seconds, of 6 each; evaluations do not count
    rates = [entry["learning_rate"] for entry in steps]
    shares = [0, 1 / 150, 6 / 27, 12 / 27, 18 / 27]  # of 150 steps, or of the time before the last step
    assert rates == pytest.approx([1e-3 * (1 - share) for share in shares])
    assert [entry["step"] for entry in log_of(folder) if "eval_mrr" in entry] == [3, 5]
    assert json.loads((folder / "results.json").read_text())["best"]["step"] in (3, 5)


def test_steps_that_run_out_first_end_the_schedule(tmp_path, monkeypatch):
    Clock(monkeypatch)
    training = {"max_minutes": 100, "max_steps": 4, "logging_steps": 1, "warmup_steps": 0.5}
    recipe = recipe_dict(write_dataset(tmp_path / "data"), **training)
    folder = run_recipe(Recipe.from_dict(recipe), tmp_path / "run")
    rates = [entry["learning_rate"] for entry in log_of(folder) if "loss" in entry]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5e-4])


def test_a_resumed_run_goes_on_counting(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    recipe = Recipe.from_dict(
        recipe_dict(write_dataset(tmp_path / "data"), max_minutes=0.75, num_train_epochs=50, logging_steps=1)
    )
    saved = base_trainer.BaseTrainer._save_checkpoint

    def save_and_stop(self, *args, **kwargs):
        saved(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(base_trainer.BaseTrainer, "_save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, tmp_path / "run")
    clock.now = 0.0  # another process
    folder = run_recipe(recipe, tmp_path / "run", resume=True)
    assert max(entry["step"] for entry in log_of(folder)) == 8  # 45 seconds, of 6 each, 3 of them before


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"max_minutes": 0}, "max_minutes=0 must be above 0"),
        ({"max_minutes": 1, "lr_scheduler_type": "cosine"}, "linear"),
    ],
)
def test_limits_that_mean_nothing_are_errors(tmp_path, training, message):
    with pytest.raises(RecipeError, match=message):
        training_arguments(Recipe.from_dict(recipe_dict(tmp_path, **training)), tmp_path)
