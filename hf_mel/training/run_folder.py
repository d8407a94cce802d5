"""hf_mel.training.run_folder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
import yaml

from hf_mel.errors import RecipeError
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.recipe import Recipe

#: Where run folders go.
RUNS = Path("runs")


#: Written last: a run folder that has it is a finished run.
RESULTS = "results.json"


RECIPE = "recipe.yaml"


LOG = "training_log.json"


PLOT = "training.png"


CARD = "README.md"


CHECKPOINTS = "checkpoints"


#: Written last by the Trainer: a checkpoint without it was interrupted.
_CHECKPOINT_STATE = "trainer_state.json"


def training_arguments(recipe: Recipe, output_dir: str | os.PathLike[str]) -> MelTrainingArguments:
    """The recipe's training arguments, checked.

    Raises:
        RecipeError: an unknown argument, or a value that does not fit.
    """
    known = {item.name: item for item in dataclasses.fields(MelTrainingArguments) if item.init}
    known.pop("output_dir")
    recipe.check_keys("training", recipe.training, known)
    for key, value in recipe.training.items():
        default = known[key].default
        if key == "bf16" and value != "auto" and not isinstance(value, bool):
            raise recipe.error(f"training.bf16: {value!r} is not true, false or 'auto'.")
        if isinstance(default, bool) != isinstance(value, bool) and isinstance(default, (bool, int, float)):
            raise recipe.error(
                f"training.{key}: {value!r} is not {'true or false' if isinstance(default, bool) else 'a number'}."
            )
        if isinstance(default, (int, float)) and not isinstance(value, (int, float)):
            raise recipe.error(f"training.{key}: {value!r} is not a number.")
    options = {"disable_tqdm": False, "log_level": "error", **recipe.training}
    try:
        return MelTrainingArguments(output_dir=str(Path(output_dir).resolve()), **options)
    except (TypeError, ValueError, ImportError) as error:
        raise recipe.error(f"training: {error}") from error


def _start(folder: Path, recipe: Recipe, resume: bool) -> Path | None:
    """Checks that the folder may be used; the checkpoint to go on from, if any."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / RECIPE).exists():
        raise RecipeError("is not empty, and holds no run.", file=folder, remedy="Give another --output.")
    finished, checkpoint = (folder / RESULTS).exists(), _last_checkpoint(folder / CHECKPOINTS)
    if not resume:
        if finished or checkpoint:
            raise RecipeError(
                f"holds {'a finished' if finished else 'an interrupted'} run.",
                file=folder,
                remedy=f"{'Keep' if finished else 'Continue'} it with --resume, remove the folder, or give another --output.",
            )
        return None
    try:
        before = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(
            f"cannot be read ({error}).", file=folder / RECIPE, remedy="Give another --output, or remove the folder."
        ) from error
    changed = sorted(_differences(before, recipe.to_dict()))
    if changed:
        raise RecipeError(
            f"was started with other values of {', '.join(changed)}.",
            file=folder / RECIPE,
            remedy="Resume with the same recipe, or give another --output.",
        )
    return checkpoint


def _differences(before: Any, after: Any, key: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in before.keys() | after.keys():
            yield from _differences(before.get(name), after.get(name), f"{key}.{name}" if key else str(name))
    elif before != after:
        yield key


def _last_checkpoint(folder: Path) -> Path | None:
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{_CHECKPOINT_STATE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _best(state: transformers.TrainerState) -> dict[str, float] | None:
    """Step and epoch of the best evaluation."""
    for entry in state.log_history:
        if entry["step"] == state.best_global_step and "eval_mrr" in entry:
            return {"step": entry["step"], "epoch": entry["epoch"]}
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports every freshly started weight and every file it reads; a user waits for numbers."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        transformers.logging.enable_progress_bar()
