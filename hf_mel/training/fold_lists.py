"""Candidate lists of the training split, each by a retriever that was not trained on its mention (cross-fitting)."""

from __future__ import annotations

import dataclasses
import random
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from accelerate import PartialState
from transformers import set_seed

from hf_mel.candidates.lists import CandidateLists
from hf_mel.candidates.make import retriever_candidates
from hf_mel.data.examples import example_groups
from hf_mel.data.loading import dataset_version, load_entities
from hf_mel.errors import DataFormatError
from hf_mel.evaluation.evaluator import software_versions
from hf_mel.evaluation.settings import KS
from hf_mel.evaluation.tables import write_results
from hf_mel.files import write_text
from hf_mel.inference.execution import evaluation_mode
from hf_mel.inference.inputs import ModelInputs
from hf_mel.protocols import Retriever, knows_posts
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.assemble import build_model
from hf_mel.training.linking_run import with_extra_mentions
from hf_mel.training.readable_images import with_readable_images
from hf_mel.training.recipe import FoldsRecipe, Recipe
from hf_mel.training.run_folder import CHECKPOINTS, RECIPE, RESULTS, RunFolder, training_arguments
from hf_mel.training.shared_batches import made_by_first
from hf_mel.training.tokenizer import texts_of
from hf_mel.training.trainer import MelTrainer
from hf_mel.training.training_part import training_mentions, training_posts

#: The file that a reranker's recipe names as `candidates.train_file`.
TRAIN_LISTS = "train.parquet"


def fold_rows(mentions: datasets.Dataset, count: int, seed: int) -> list[list[int]]:
    """Divides mentions into parts of similar size. All mentions of a document, or else of a context, are in one part.

    Args:
        mentions (`datasets.Dataset`): M mentions.
        count (`int`): Number of parts.
        seed (`int`): Seed of the division.

    Returns:
        `list[list[int]]`: The row numbers of each part, in order.

    Raises:
        DataFormatError: There are fewer documents than parts.
    """
    groups = example_groups(mentions, "document")
    if len(groups) < count:
        raise DataFormatError(
            f"The training split has {len(groups)} contexts, too few for {count} parts.",
            remedy="Set folds.count to a smaller number, or train on more mentions.",
        )
    random.Random(seed).shuffle(groups)
    return [sorted(row for group in groups[part::count] for row in group) for part in range(count)]


def write_fold_lists(folder: RunFolder) -> None:
    """Trains a retriever for each part of the training split on the other parts, and writes the lists of all mentions.

    The lists are in `train.parquet`. Those of a part are written when they are finished, so that a resumed run trains the
    missing retrievers only. The retrievers are not kept.

    Args:
        folder ([`~hf_mel.training.run_folder.RunFolder`]): The run folder, with the recipe.

    Raises:
        RecipeError: The recipe is not usable as written, or its model is not a retriever.
        DataFormatError: The split has fewer contexts than parts, or a part has no mention to train on.
        MelError: The data set is not usable.
    """
    recipe = dataclasses.replace(folder.recipe, training=_without_evaluation(folder.recipe))
    data, setting = recipe.data, recipe.folds or FoldsRecipe()
    train = training_mentions(recipe)
    entities = load_entities(data.dataset, revision=data.revision)
    parts = fold_rows(train, setting.count, folder.arguments.seed)
    if PartialState().is_main_process:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_text(folder.path / RECIPE, [folder.recipe.to_yaml()])
    lists: list[CandidateLists] = []
    tables: _Tables | None = None
    for number, rows in enumerate(parts):
        file = folder.path / CHECKPOINTS / f"part-{number}.parquet"
        stored = made_by_first(partial(_stored_lists, file))
        if stored is not None:
            lists.append(stored)
            continue
        others = sorted(set(range(len(train))) - set(rows))
        arguments = training_arguments(recipe, folder.path / CHECKPOINTS / "retriever")
        set_seed(arguments.seed)
        model, processor = build_model(recipe, texts_of(train.select(others), entities))
        if not isinstance(model, Retriever):
            raise recipe.error(
                f"{type(model).__name__} is not a retriever.", "Give the model of a retriever's recipe."
            )
        tables = tables or _readable_tables(recipe, model, processor, train, entities)
        trained = _train(model, processor, others, arguments, tables)
        lists.append(made_by_first(partial(_make_lists, trained, tables.train.select(rows), setting.k, file)))
    if PartialState().is_main_process:
        _write(folder, setting, _joined(lists, setting).for_mentions(train), train, len(entities))


class _Tables(NamedTuple):
    """Mentions of training, what `data.extra_mentions` adds, entities and posts, without images that cannot be opened."""

    train: datasets.Dataset
    extra: datasets.Dataset | None
    entities: datasets.Dataset
    posts: datasets.Dataset | None


def _readable_tables(
    recipe: Recipe, model: Any, processor: Any, train: datasets.Dataset, entities: datasets.Dataset
) -> _Tables:
    """Opens the images that all parts train on, once."""
    posts = training_posts(recipe, training_mentions(recipe)) if knows_posts(model) else None
    extra = None
    if any(recipe.data.extra_mentions.values()):
        extra = with_extra_mentions(recipe, train.select([]), entities)
    tables: Any = with_readable_images(model, processor, train, extra, entities, posts)
    return _Tables(*tables)


def _stored_lists(file: Path) -> CandidateLists | None:
    return CandidateLists.load(file) if file.exists() else None


def _make_lists(trained: MelTrainer, mentions: datasets.Dataset, k: int, file: Path) -> CandidateLists:
    """Returns the lists of mentions by a trained retriever, and writes them."""
    with evaluation_mode(trained.inputs.model), trained.accelerator.autocast():
        lists = retriever_candidates(
            trained.inputs,
            mentions,
            trained.entities,
            k=k,
            batch_size=trained.args.per_device_eval_batch_size,
            progress=trained.shows_progress,
        )
    file.parent.mkdir(exist_ok=True)
    lists.save(file)
    return lists


def _without_evaluation(recipe: Recipe) -> dict[str, object]:
    """Returns the training arguments without evaluation and checkpoints, which choose among the states of one model."""
    return {
        **recipe.training,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "early_stopping_patience": None,
    }


def _train(
    model: Any, processor: Any, rows: list[int], arguments: MelTrainingArguments, tables: _Tables
) -> MelTrainer:
    """Trains a new retriever on rows of the training mentions, and on the extra mentions, none of which is one of them."""
    mentions = tables.train.select(rows)
    if tables.extra is not None:
        mentions = mentions.select_columns(tables.extra.column_names).cast(tables.extra.features)
        mentions = datasets.concatenate_datasets([mentions, tables.extra])
    trainer = MelTrainer(
        model,
        arguments,
        train_dataset=mentions,
        entities=tables.entities,
        processing_class=processor,
        inputs=ModelInputs(model, processor, tables.posts),
    )
    trainer.train()
    return trainer


def _joined(lists: list[CandidateLists], setting: FoldsRecipe) -> CandidateLists:
    """Returns the lists of all parts as one."""
    return CandidateLists(
        [mention_id for part in lists for mention_id in part.mention_ids],
        [entity_ids for part in lists for entity_ids in part.entity_ids],
        {source: [scores for part in lists for scores in part.scores[source]] for source in lists[0].scores},
        {"k": setting.k, "folds": setting.count},
    )


def _write(
    folder: RunFolder, setting: FoldsRecipe, lists: CandidateLists, train: datasets.Dataset, num_entities: int
) -> None:
    recipe, data = folder.recipe, folder.recipe.data
    lists.save(folder.path / TRAIN_LISTS)
    results = {
        "recipe": recipe.name,
        "task": recipe.task,
        "description": recipe.description,
        "data": {
            **dataset_version(data.dataset, revision=data.revision),
            "train_split": data.train_split,
            "train_mentions": len(train),
            "entities": num_entities,
        },
        "candidates": {
            **dataclasses.asdict(setting),
            "recall": lists.recall(list(train["entity_id"]), [k for k in KS if k < setting.k] + [setting.k]),
        },
        "training": recipe.training,
        "seed": folder.arguments.seed,
        "run": {"seconds": round(time.time() - folder.started, 1)},
        "versions": software_versions(),
    }
    write_results(results, folder.path / RESULTS)
    shutil.rmtree(folder.path / CHECKPOINTS, ignore_errors=True)
