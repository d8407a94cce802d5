"""Run folders: the files that a training run writes, and the checks before it starts or resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
import yaml
from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks

from hf_mel.errors import MelError, MissingExtraError, RecipeError, StoppedError
from hf_mel.evaluation.evaluator import device_name, software_versions
from hf_mel.evaluation.tables import write_results
from hf_mel.files import read_json, write_text
from hf_mel.hub.model_cards import model_card
from hf_mel.hub.saving import save_model_repository
from hf_mel.locks import writer_lock
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.environment import environment
from hf_mel.training.plot import plot_training
from hf_mel.training.recipe import YAML_ERRORS, AdaptationRecipe, Recipe, as_bool
from hf_mel.training.stopping import StopsOnSigterm

logger = logging.getLogger(__name__)

#: Default parent of run folders.
RUNS = Path("runs")

#: Written last, so a folder that contains it holds a finished run.
RESULTS = "results.json"
RECIPE = "recipe.yaml"
LOG = "training_log.json"
#: One entry for each start of the run: time, arguments with their defaults, code, packages and machine.
ENVIRONMENT = "environment.json"
PLOT = "training.png"
CARD = "README.md"
CHECKPOINTS = "checkpoints"
_LOCK = ".writer.lock"

#: The Trainer writes this file last, so a checkpoint without it is incomplete.
_CHECKPOINT_STATE = "trainer_state.json"


@dataclasses.dataclass
class FinishedTraining:
    """The parts of a run folder that depend on the task of the recipe.

    Args:
        trainer (`transformers.Trainer`): The trainer, after training.
        model (`PreTrainedModel`): The model to save.
        processor ([`~hf_mel.protocols.MelProcessor`]): The processor to save.
        data (`dict`): The section `data` of the results.
        results (`dict`): Further results by key, among them `validation`.
        model_info (`dict`): Further entries of the section `model` of the results.
    """

    trainer: Trainer
    model: Any
    processor: Any
    data: dict[str, Any]
    results: dict[str, Any]
    model_info: dict[str, Any] = dataclasses.field(default_factory=dict)


class RunFolder:
    """The folder of one training run. Creating the object checks that the folder is usable; it writes nothing.

    Args:
        path (`Path`): The folder.
        recipe ([`~hf_mel.training.recipe.Recipe`]): The recipe of the run.
        resume (`bool`, *optional*, defaults to `False`): Whether to accept a folder with a run of the same recipe.

    Attributes:
        recipe ([`~hf_mel.training.recipe.Recipe`]): The recipe with the choice that was made for `bf16: auto`. A resumed
            run keeps the choice of its start, even on another machine.
        arguments ([`~hf_mel.training.arguments.MelTrainingArguments`]): The recipe's training arguments.
        checkpoint (`Path`, *optional*): The last complete checkpoint of the run to resume.

    Raises:
        RecipeError: the training arguments are wrong, or the folder contains other files or another run.
    """

    def __init__(self, path: Path, recipe: Recipe, resume: bool = False):
        self.path, self.started = path, time.time()
        recorded = _recorded_recipe(path) if resume and (path / RECIPE).exists() else None
        if recorded is not None and recipe.training.get("bf16", "auto") == "auto":
            recipe = _with_bf16(recipe, recorded["training"]["bf16"])
        self.arguments = training_arguments(recipe, path / CHECKPOINTS)
        self.recipe = _with_bf16(recipe, bool(self.arguments.bf16))
        self.checkpoint: Path | None = None
        if path.exists() and not all(map(_is_of_a_start, path.iterdir())):
            self._check_contents(recorded, resume)

    def _check_contents(self, recorded: dict[str, Any] | None, resume: bool) -> None:
        if not (self.path / RECIPE).exists():
            raise RecipeError(
                "The folder is not empty and contains no run.", file=self.path, remedy="Choose another --output."
            )
        checkpoint = _last_checkpoint(self.path / CHECKPOINTS)
        if not resume:
            if self.is_finished or checkpoint:
                state, verb = ("a finished", "Keep") if self.is_finished else ("an interrupted", "Continue")
                raise RecipeError(
                    f"The folder contains {state} run.",
                    file=self.path,
                    remedy=f"{verb} it with --resume, remove the folder, or choose another --output.",
                )
            return
        changed = sorted(_differences(recorded, self.recipe.to_dict()))
        if changed:
            raise RecipeError(
                f"The run was started with other values of {', '.join(changed)}.",
                file=self.path / RECIPE,
                remedy="Resume with the same recipe, or choose another --output.",
            )
        self.checkpoint = checkpoint

    @property
    def is_finished(self) -> bool:
        """Whether the folder contains the results of a finished run."""
        return (self.path / RESULTS).exists()

    def begin(self, trainer: Trainer) -> None:
        """Writes the recipe, and what the run starts with."""
        if trainer.is_world_process_zero():
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / RECIPE, [self.recipe.to_yaml()])
            starts = read_json(self.path / ENVIRONMENT) if self.checkpoint else None
            start = {
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
                "from_checkpoint": self.checkpoint.name if self.checkpoint else None,
                "processes": trainer.args.world_size,
                **environment(),
                "arguments": trainer.args.to_dict(),  # tokens are not in it
            }
            write_results([*(starts if isinstance(starts, list) else []), start], self.path / ENVIRONMENT)

    def train(self, trainer: Trainer) -> None:
        """Writes the recipe, then trains, from the last checkpoint if the run is resumed.

        Raises:
            StoppedError: the process got SIGTERM. There is a checkpoint of the last step.
            TrainingError: the loss is no number, or a checkpoint cannot be written.
        """
        self.begin(trainer)
        stopping = StopsOnSigterm()
        trainer.add_callback(stopping)
        with stopping.listening():
            trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        if stopping.stopped_at is not None:
            raise StoppedError(
                f"Training was stopped by SIGTERM after step {stopping.stopped_at} of {trainer.state.max_steps}, which is saved.",
                file=self.path,
                remedy="Repeat the command with --resume to go on.",
            )

    def write(self, finished: FinishedTraining) -> None:
        """Writes the model repository, the log and its plot, the card and the results, then removes the checkpoints."""
        recipe, trainer, model = self.recipe, finished.trainer, finished.model
        for left in self.path.glob(".*.tmp"):  # of a process that was killed while it wrote a file
            left.unlink(missing_ok=True)
        device = device_name(trainer.accelerator.unwrap_model(trainer.model))
        results = {
            "recipe": recipe.name,
            **({"task": recipe.task} if recipe.task == "pretraining" else {}),
            "description": recipe.description,
            "license": recipe.license,
            "citation": recipe.citation,
            "model": {
                "type": model.config.model_type,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "from_pretrained": recipe.model.from_pretrained,
                "text": recipe.model.text,
                "vision": recipe.model.vision,
                **finished.model_info,
            },
            "data": finished.data,
            **finished.results,
            "best": best_evaluation(trainer.state),
            "training": recipe.training,
            "seed": trainer.args.seed,
            "run": {
                "seconds": round(time.time() - self.started, 1),
                "resumed": self.checkpoint is not None,
                "device": f"{os.cpu_count()} CPU cores"
                if device == "cpu"
                else f"{trainer.args.world_size} × {device}",
            },
            "versions": software_versions(),
        }
        save_model_repository(model, finished.processor, self.path)
        write_results(trainer.state.log_history, self.path / LOG)
        if trainer.state.log_history:
            try:
                plot_training(trainer.state.log_history, self.path / PLOT, title=recipe.name)
            except MissingExtraError as error:
                logger.warning("%s was not written. %s", PLOT, error)
        write_text(self.path / CARD, [model_card(results)])
        write_results(results, self.path / RESULTS)
        shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)


@contextlib.contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Keeps other runs out of a run folder, which is created if needed. Of several devices, the first holds the lock.

    Args:
        path (`Path`): The run folder.

    Raises:
        LockedError: another process trains into the folder.
        MelError: the folder cannot be created or written.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    is_new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MelError(
            f"The run folder cannot be created ({error}).", file=path, remedy="Choose another --output."
        ) from error
    try:
        with writer_lock(
            path / _LOCK,
            busy="A model is being trained into the folder",
            remedy="Wait for it, or choose another --output.",
            target=path,
        ):
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                path.rmdir()  # only if nothing was written


def training_arguments(recipe: Recipe, output_dir: str | os.PathLike[str]) -> MelTrainingArguments:
    """Returns the training arguments of a recipe, after a check of their names and types.

    Args:
        recipe ([`~hf_mel.training.recipe.Recipe`]): The recipe.
        output_dir (`str` or `os.PathLike`): Folder for checkpoints.

    Raises:
        RecipeError: an argument is unknown or has a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(MelTrainingArguments) if field.init}
    fields.pop("output_dir")
    recipe.check_keys("training", recipe.training, fields)
    values = {
        key: as_bool(value) if "bool" in str(fields[key].type) else value for key, value in recipe.training.items()
    }
    for key, value in values.items():
        default, expected = fields[key].default, None
        if key == "bf16":
            expected = None if value == "auto" or isinstance(value, bool) else "true, false or 'auto'"
        elif key == "augment_images":
            expected = None if value == "strong" or isinstance(value, bool) else "true, false or 'strong'"
        elif isinstance(default, bool):
            expected = None if isinstance(value, bool) else "true or false"
        elif isinstance(default, (int, float)):
            expected = None if isinstance(value, (int, float)) and not isinstance(value, bool) else "a number"
        if expected is not None:
            raise recipe.error(f"The value {value!r} of training.{key} is not {expected}.")
    if (
        recipe.task == "adaptation"
        and not (recipe.adaptation or AdaptationRecipe()).train
        and values.get("bf16") == "auto"
    ):
        values["bf16"] = False  # nothing trains, so that no precision of training is chosen and told
    options: dict[str, Any] = {"disable_tqdm": False, "log_level": "error"}
    if recipe.task == "pretraining":
        options |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    try:
        arguments = MelTrainingArguments(output_dir=str(Path(output_dir).resolve()), **options | values)
    except (TypeError, ValueError, ImportError) as error:
        raise recipe.error(f"The training arguments are not valid: {error}") from error
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()  # is an error if its package is not installed
    except (ValueError, ImportError, RuntimeError) as error:
        raise recipe.error(
            f"training.report_to is not usable: {error}",
            'Install the package (for tensorboard and trackio: pip install "hf_mel[trackers]"), or remove training.report_to.',
        ) from error
    return arguments


def recorded_values(model: str | os.PathLike[str], section: str) -> dict[str, Any]:
    """Returns a section of the recipe that a model was trained with; empty if it is no run folder, or has no such section.

    Args:
        model (`str` or `os.PathLike`): A run folder, or any other model.
        section (`str`): Name of the section, such as "training".
    """
    try:
        content = yaml.safe_load(Path(model, RECIPE).read_text(encoding="utf-8"))
    except (OSError, *YAML_ERRORS):
        return {}
    values = content.get(section) if isinstance(content, dict) else None
    return values if isinstance(values, dict) else {}


def best_evaluation(state: transformers.TrainerState) -> dict[str, float] | None:
    """Returns step and epoch of the best evaluation, or `None` if none was made during training."""
    for entry in state.log_history:
        if entry["step"] == state.best_global_step and ("eval_mrr" in entry or "eval_loss" in entry):
            return {"step": entry["step"], "epoch": entry["epoch"]}
    return None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the notes of transformers about newly initialized weights and the files it reads."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def _is_of_a_start(entry: Path) -> bool:
    """Returns whether a process that was killed before it had written the recipe may have left an entry of a run folder."""
    is_empty = entry.name == CHECKPOINTS and entry.is_dir() and not any(entry.iterdir())
    return entry.name == _LOCK or entry.suffix == ".tmp" or is_empty


def _with_bf16(recipe: Recipe, bf16: bool) -> Recipe:
    return dataclasses.replace(recipe, training={**recipe.training, "bf16": bf16})


def _recorded_recipe(path: Path) -> dict[str, Any]:
    """Reads the recipe that a run was started with."""
    file = path / RECIPE
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, *YAML_ERRORS) as error:
        raise RecipeError(
            f"The recorded recipe is not readable ({error}).",
            file=file,
            remedy="Choose another --output, or remove the folder.",
        ) from error
    recorded = Recipe.from_dict(content if isinstance(content, dict) else {}, file=str(file)).to_dict()
    # Recipes recorded before `bf16: auto` existed trained in float32 by default.
    recorded["training"].setdefault("bf16", False)
    return recorded


def _differences(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """Yields the dotted keys whose values differ between two nested dictionaries."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in before.keys() | after.keys():
            yield from _differences(before.get(name), after.get(name), f"{key}.{name}" if key else str(name))
    elif before != after:
        yield key


def _last_checkpoint(folder: Path) -> Path | None:
    """Returns the complete checkpoint with the highest step, if any."""
    states = folder.glob(f"checkpoint-*/{_CHECKPOINT_STATE}")
    complete = [path.parent for path in states if read_json(path) is not None]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
