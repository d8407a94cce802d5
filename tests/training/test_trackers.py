"""Tests of the log in TensorBoard, Trackio and the plot: the loss and its parts, the learning rate, the speed, the validation."""

from __future__ import annotations

import sqlite3

import pytest
from PIL import Image

from hf_mel.errors import RecipeError
from hf_mel.training.plot import plot_training
from hf_mel.training.recipe import Recipe
from hf_mel.training.run import run_recipe
from tests.training.toy_run import recipe_dict, write_dataset

#: What each tracker gets, beside what the Trainer adds.
LOGGED = ["loss", "loss_overall", "loss_text", "loss_vision", "loss_cross_modal", "learning_rate", "rows_per_second"]
VALIDATED = ["mrr", "hits@1", "mr"]


def run(tmp_path, tracker: str):
    data = write_dataset(tmp_path / "data")
    recipe = recipe_dict(
        data, report_to=tracker, logging_steps=1, num_train_epochs=1, max_steps=4, eval_strategy="steps", eval_steps=2
    )
    recipe["training"] |= {"save_strategy": "steps", "save_steps": 2}
    return run_recipe(Recipe.from_dict(recipe), tmp_path / "run")


def test_tensorboard_gets_losses_learning_rate_speed_and_validation(tmp_path, monkeypatch):
    events_of = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run(tmp_path, "tensorboard")
    events = events_of(str(next((tmp_path / "board").rglob("events*")).parent))
    events.Reload()
    values = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for name in LOGGED:
        assert len(values[f"train/{name}"]) == 4, sorted(values)
    for name in VALIDATED:
        assert len(values[f"eval/{name}"]) == 2, sorted(values)
    for number, loss in enumerate(values["train/loss"]):
        parts = sum(values[f"train/{name}"][number] for name in LOGGED if name.startswith("loss_"))
        assert parts == pytest.approx(loss, rel=1e-3)
    assert min(values["train/rows_per_second"]) > 0


def test_trackio_gets_the_same_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # Trackio reads it when it is imported
    run(tmp_path, "trackio")
    files = [*(tmp_path / "trackio").rglob("*.db")]
    text = " ".join(str(row) for file in files for row in sqlite3.connect(file).execute("select * from metrics"))
    for name in (*LOGGED, *VALIDATED):
        assert name in text


def test_a_tracker_that_is_not_installed_is_an_error_before_training(tmp_path):
    with pytest.raises(RecipeError, match="wandb"):
        run(tmp_path, "wandb")
    assert not (tmp_path / "run").exists()


def test_the_plot_shows_losses_and_validation(tmp_path):
    """The loss is drawn in grey over the whole width, the metrics in colour; other logs give other plots."""
    log = [{"epoch": epoch, "loss": 4.0 / epoch} for epoch in (1.0, 2.0, 3.0)]
    plot_training(log, tmp_path / "loss.png", title="a")
    metrics = [{"epoch": epoch, "eval_mrr": 0.2 * epoch, "eval_hits@1": 0.1 * epoch} for epoch in (1.0, 2.0, 3.0)]
    plot_training([*log, *metrics], tmp_path / "both.png", title="a")
    without, both = (Image.open(tmp_path / name).convert("RGB") for name in ("loss.png", "both.png"))
    assert without.size == both.size == (840, 480)
    blue, orange = (31, 119, 180), (255, 127, 14)
    colours = set(both.getdata())
    assert {blue, orange} <= colours
    assert not {blue, orange} & set(without.getdata())
