"""Runs a recipe: trains a model and writes a run folder, which is ready to be a model repository."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from hf_mel.training.adaptation import run_adaptation
from hf_mel.training.fold_lists import write_fold_lists
from hf_mel.training.linking_run import run_linking
from hf_mel.training.pretraining import run_pretraining
from hf_mel.training.recipe import Recipe
from hf_mel.training.run_folder import RESULTS, RUNS, RunFolder, quiet_transformers, run_lock
from hf_mel.training.shared_batches import wait_for_first


def run_recipe(recipe: Recipe, output: str | os.PathLike[str] | None = None, resume: bool = False) -> Path:
    """Trains the model of a recipe and writes the run folder.

    The folder contains weights, configuration, processor, the code that loads them without hf_mel, the model card, the
    recipe with all its defaults, the training log and its plot, and results.json, which is written last. During
    training, it contains only the recipe and the checkpoints. The checkpoints are removed at the end. With the task
    "candidates", it contains the candidate lists of the training split instead of a model.

    Args:
        recipe ([`~hf_mel.training.recipe.Recipe`]): The recipe.
        output (`str` or `os.PathLike`, *optional*): The run folder. Default: `runs/<name of the recipe>`.
        resume (`bool`, *optional*, defaults to `False`): Continue an interrupted run from its last checkpoint. A run
            without a checkpoint starts again. A finished run is not changed.

    Returns:
        `Path`: the run folder.

    Raises:
        RecipeError: the recipe is not usable as written, or the folder contains another run.
        LockedError: another process trains into the folder.
        MelError: the data set, the knowledge base or the model is not usable.
    """
    path = RUNS / recipe.name if output is None else Path(output)
    is_finished = resume and (path / RESULTS).exists()  # then nothing is written
    with nullcontext() if is_finished else run_lock(path):
        folder = RunFolder(path, recipe, resume)
        if folder.is_finished:
            return folder.path
        with quiet_transformers():
            if recipe.task == "candidates":
                write_fold_lists(folder)
                wait_for_first()  # which writes
                return folder.path
            runs = {"pretraining": run_pretraining, "adaptation": run_adaptation}
            finished = runs.get(recipe.task, run_linking)(folder)
            if finished is not None:
                folder.write(finished)
            wait_for_first()  # which evaluates on validation, and writes
    return folder.path
