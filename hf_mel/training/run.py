"""From a recipe to a run folder, which is a model repository before it is uploaded."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import Any

import datasets
from transformers import (
    set_seed,
)

from hf_mel.candidates.lists import CandidateLists
from hf_mel.candidates.make import check_source, default_cache, make_candidates
from hf_mel.data.loading import dataset_version, load_entities, load_mentions
from hf_mel.data.posts import posts_as_mentions, posts_of
from hf_mel.errors import MissingExtraError, RecipeError
from hf_mel.evaluation.candidate_evaluator import evaluate_candidates
from hf_mel.evaluation.full_evaluator import evaluate_full
from hf_mel.evaluation.tables import write_results
from hf_mel.files import write_text
from hf_mel.hub.model_cards import model_card
from hf_mel.hub.saving import save_model_repository
from hf_mel.inference.features.post_prototypes import Prototypes
from hf_mel.protocols import Reranker
from hf_mel.schema import NIL
from hf_mel.training.assemble import build_model
from hf_mel.training.plot import plot_training
from hf_mel.training.recipe import Recipe
from hf_mel.training.run_folder import (
    CARD,
    CHECKPOINTS,
    LOG,
    PLOT,
    RECIPE,
    RESULTS,
    RUNS,
    _best,
    _quiet,
    _start,
    training_arguments,
)
from hf_mel.training.tokenizer import texts_of
from hf_mel.training.trainer import MelTrainer


def run_recipe(recipe: Recipe, output: str | os.PathLike[str] | None = None, resume: bool = False) -> Path:
    """Trains what a recipe describes and writes the run folder.

    The folder holds weights, configuration, processor, the code that loads them without hf_mel, the model card, the
    recipe with all its defaults, the training log and its plot, and results.json, written last. While training runs,
    it holds the recipe and checkpoints only; they are removed at the end.

    Args:
        recipe ([`~hf_mel.training.recipe.Recipe`]): What to train, on what, how.
        output (`str` or `os.PathLike`, *optional*): The run folder. Default: `runs/<name of the recipe>`.
        resume (`bool`, *optional*, defaults to `False`): Go on from the last checkpoint of an interrupted run; start if
            there is none; do nothing if the run is finished.

    Returns:
        `Path`: the run folder.

    Raises:
        RecipeError: the recipe cannot be used as written, or the folder holds another run.
        MelError: whatever the data set, the knowledge base or the model raise.
    """
    if recipe.task == "pretraining":
        from hf_mel.training.pretraining import run_pretraining  # which uses this module

        return run_pretraining(recipe, output, resume)
    folder = RUNS / recipe.name if output is None else Path(output)
    arguments = training_arguments(recipe, folder / CHECKPOINTS)
    checkpoint = _start(folder, recipe, resume)
    if (folder / RESULTS).exists():
        return folder
    _check_candidates(recipe)
    started = time.time()
    with _quiet():
        data = recipe.data
        train = load_mentions(data.dataset, data.train_split, data.revision, config=data.config)
        validation = load_mentions(data.dataset, data.validation_split, data.revision, config=data.config)
        entities = load_entities(data.dataset, revision=data.revision)
        set_seed(arguments.seed)
        model, processor = build_model(recipe, texts_of(train, entities))
        lists: dict[str, Any] = {}
        if isinstance(model, Reranker):
            lists = {
                "train_candidates": candidates_for(recipe, data.train_split, train, train, entities),
                "eval_candidates": candidates_for(recipe, data.validation_split, validation, train, entities),
            }
        elif recipe.candidates is not None:
            raise recipe.error(f"{type(model).__name__} ranks all entities; leave 'candidates' out.")
        prototypes = Prototypes.from_data(
            data.dataset, model, processor, revision=data.revision, config=data.config, train_split=data.train_split
        )
        if recipe.task == "knowledge":
            if prototypes is None:
                raise recipe.error(f"task: {type(model).__name__} does not know entities by posts.")
            model.to(arguments.device)
            prototypes.add(entities, progress=not arguments.disable_tqdm)
            train = posts_as_mentions(prototypes.support(entities))
        trainer = MelTrainer(
            model,
            arguments,
            train_dataset=train,
            eval_dataset=validation,
            entities=entities,
            processing_class=processor,
            prototypes=prototypes,
            **lists,
        )
        main = trainer.is_world_process_zero()
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / RECIPE, [recipe.to_yaml()])
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if main:
            _finish(folder, recipe, trainer, train, validation, entities, started, resumed=checkpoint is not None)
        trainer.accelerator.wait_for_everyone()
    return folder


def candidates_for(
    recipe: Recipe,
    split: str,
    mentions: datasets.Dataset,
    training: datasets.Dataset,
    entities: datasets.Dataset,
) -> CandidateLists:
    """The candidates that a recipe gives to the mentions of a split; made once, and kept for the next run.

    Raises:
        RecipeError: it does not say where they come from.
        DataFormatError: the file it names is not there, or lacks a mention.
        UnknownModelError: the retriever it names cannot be loaded.
    """
    wanted = recipe.candidates
    if wanted is None:
        raise recipe.error("a reranker needs candidates.", "For instance candidates: {source: name, k: 100}.")
    if wanted.source == "file":
        assert wanted.file is not None
        return CandidateLists.load(wanted.file.replace("{split}", split)).of(mentions).top(wanted.k)
    return make_candidates(
        wanted.source,
        mentions,
        entities,
        k=wanted.k,
        scorer=wanted.scorer,
        training=training,
        retriever=wanted.retriever,
        posts=lambda: posts_of(
            recipe.data.dataset,
            revision=recipe.data.revision,
            config=recipe.data.config,
            train_split=recipe.data.train_split,
        ),
        cache_dir=default_cache(),
        progress=True,
    )


def _check_candidates(recipe: Recipe) -> None:
    wanted = recipe.candidates
    if wanted is not None and wanted.source != "file":
        try:
            check_source(wanted.source, k=wanted.k, scorer=wanted.scorer, retriever=wanted.retriever)
        except RecipeError as error:
            raise recipe.error(f"candidates: {error.message}", error.remedy) from None


def _finish(
    folder: Path,
    recipe: Recipe,
    trainer: MelTrainer,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    entities: datasets.Dataset,
    started: float,
    resumed: bool,
) -> None:
    """Everything that comes after training, on one process: evaluate, calibrate, write; results.json last."""
    model, processor = trainer.accelerator.unwrap_model(trainer.model).eval(), trainer.processor
    version = dataset_version(recipe.data.dataset, revision=recipe.data.revision)
    batch_size = trainer.args.per_device_eval_batch_size
    evaluation: Any
    nil = None
    if trainer.reranks:
        assert trainer.eval_candidates is not None
        validation = trainer.eval_dataset  # all of it, or eval_mentions
        evaluation = evaluate_candidates(
            model,
            processor,
            validation,
            entities,
            trainer.eval_candidates,
            images=trainer.image_features,
            batch_size=batch_size,
            data_version=version,
        )
    else:
        evaluation = evaluate_full(
            model,
            processor,
            validation,
            entities,
            prototypes=trainer.prototypes,
            batch_size=batch_size,
            data_version=version,
        )
        nil = evaluation.calibrate_nil_threshold() if len(validation) and len(entities) > 1 else None
    # Made-up NIL cases are half of all by construction; where the data has none, they must not switch NIL on unasked.
    if nil is not None and not nil.simulated and hasattr(model.config, "nil_threshold"):
        model.config.nil_threshold = nil.threshold
    state, device = trainer.state, evaluation.setting["device"]
    results = {
        "recipe": recipe.name,
        "description": recipe.description,
        "license": recipe.license,
        "citation": recipe.citation,
        "model": {
            "type": model.config.model_type,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "from_pretrained": recipe.model.from_pretrained,
            "text": recipe.model.text,
            "vision": recipe.model.vision,
            **({} if trainer.prototypes is None else {"posts": True}),
        },
        "data": {
            **version,
            "train_split": "posts" if recipe.task == "knowledge" else recipe.data.train_split,
            "train_mentions": len(train),
            "train_nil": list(train["entity_id"]).count(NIL),
            "validation_split": recipe.data.validation_split,
            "validation_mentions": len(validation),
            "entities": len(entities),
            **({"validation_mentions_of": trainer.eval_total} if trainer.reranks else {}),
        },
        "candidates": None if recipe.candidates is None else dataclasses.asdict(recipe.candidates),
        "validation": evaluation.to_dict(),
        "nil": None if nil is None else dataclasses.asdict(nil),
        "best": _best(state),
        "training": recipe.training,
        "seed": trainer.args.seed,
        "run": {
            "seconds": round(time.time() - started, 1),
            "resumed": resumed,
            "device": f"{os.cpu_count()} CPU cores" if device == "cpu" else f"{trainer.args.world_size} × {device}",
        },
        "versions": evaluation.setting["software"],
    }
    save_model_repository(model, processor, folder)
    write_results(state.log_history, folder / LOG)
    try:
        plot_training(state.log_history, folder / PLOT, title=recipe.name)
    except MissingExtraError as error:
        print(f"No {PLOT}: {error}")
    write_text(folder / CARD, [model_card(results)])
    write_results(results, folder / RESULTS)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
