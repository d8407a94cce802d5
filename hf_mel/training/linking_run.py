"""Trains a model for linking, as a recipe with the task "linking" or "knowledge" describes."""

from __future__ import annotations

import dataclasses
from typing import Any

import datasets
from transformers import set_seed

from hf_mel.candidates.lists import CandidateLists
from hf_mel.candidates.make import check_source, default_cache, make_candidates
from hf_mel.data.loading import dataset_version, load_entities, load_mentions, load_posts
from hf_mel.data.posts import entities_as_mentions, posts_as_mentions
from hf_mel.errors import RecipeError, UnknownSplitError
from hf_mel.evaluation.candidate_evaluator import CandidateEvaluator
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.inference.inputs import ModelInputs
from hf_mel.protocols import Reranker, knows_posts, learns_nil
from hf_mel.schema import NIL, mention_features
from hf_mel.training.assemble import build_model
from hf_mel.training.lora import merge_lora
from hf_mel.training.readable_images import with_readable_images
from hf_mel.training.recipe import Recipe
from hf_mel.training.run_folder import FinishedTraining, RunFolder
from hf_mel.training.shared_batches import made_by_first
from hf_mel.training.tokenizer import texts_of
from hf_mel.training.trainer import MelTrainer
from hf_mel.training.training_part import training_mentions, training_posts


def run_linking(folder: RunFolder) -> FinishedTraining | None:
    """Trains the model of a recipe for linking and evaluates it on the validation split.

    A retriever's NIL threshold is stored in its configuration if the validation split has NIL mentions.

    Args:
        folder ([`~hf_mel.training.run_folder.RunFolder`]): The run folder, with the recipe.

    Returns:
        [`~hf_mel.training.run_folder.FinishedTraining`]: the parts of the run folder; `None` on all processes but the
        first.

    Raises:
        RecipeError: the recipe is not usable as written.
        MelError: the data set, the candidates or the model is not usable.
    """
    recipe, arguments, data = folder.recipe, folder.arguments, folder.recipe.data
    _check_candidate_source(recipe)
    train = training_mentions(recipe)
    validation = load_mentions(data.dataset, data.validation_split, data.revision, config=data.config)
    entities = load_entities(data.dataset, revision=data.revision)
    train, entities = with_extra_datasets(recipe, train, entities)
    set_seed(arguments.seed)
    model, processor = build_model(recipe, texts_of(train, entities))
    if recipe.candidates is not None and not isinstance(model, Reranker):
        raise recipe.error(f"{type(model).__name__} ranks all entities.", "Remove the section 'candidates'.")
    posts = training_posts(recipe, train) if knows_posts(model) else None
    if any(data.extra_mentions.values()):
        if isinstance(model, Reranker):
            raise recipe.error(
                f"{type(model).__name__} needs candidates, which extra mentions lack.", "Remove data.extra_mentions."
            )
        train = with_extra_mentions(recipe, train, entities)
    tables: Any = with_readable_images(model, processor, train, validation, entities, posts)
    train, validation, entities, posts = tables
    lists: dict[str, Any] = {}
    if isinstance(model, Reranker):
        lists = {
            "train_candidates": candidates_from_recipe(recipe, data.train_split, train, train, entities),
            "eval_candidates": candidates_from_recipe(recipe, data.validation_split, validation, train, entities),
        }
    inputs = ModelInputs(model, processor, posts)
    if recipe.task == "knowledge":
        if inputs.prototypes is None:
            raise recipe.error(
                f"{type(model).__name__} does not represent entities by posts.", "Remove task: knowledge."
            )
        model.to(arguments.device)
        inputs.precompute(entities=entities, progress=not arguments.disable_tqdm)
        train = posts_as_mentions(inputs.prototypes.support_set(entities))
    trainer = MelTrainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        entities=entities,
        processing_class=processor,
        inputs=inputs,
        **lists,
    )
    folder.train(trainer)
    if not trainer.is_world_process_zero():
        return None
    extra_datasets = [dataset_version(dataset) for dataset in data.extra_datasets]
    return evaluate_training(
        recipe,
        trainer,
        validation,
        {
            **dataset_version(data.dataset, revision=data.revision),
            "train_split": "posts" if recipe.task == "knowledge" else data.train_split,
            "train_mentions": len(train),
            **({} if data.train_fraction == 1 else {"train_fraction": data.train_fraction}),
            "train_nil": list(train["entity_id"]).count(NIL),
            **({"extra_datasets": extra_datasets} if extra_datasets else {}),
            "validation_split": data.validation_split,
        },
    )


def with_extra_datasets(
    recipe: Recipe, train: datasets.Dataset, entities: datasets.Dataset
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Returns the training mentions and the entities of a recipe's data set and of its `data.extra_datasets`.

    Ids of mentions, contexts and documents of a further data set start with its number and name, so that they are no ids of
    another. An entity that several data sets have is that of the first. A column that a data set lacks is empty.

    Args:
        recipe ([`~hf_mel.training.recipe.Recipe`]): The recipe.
        train, entities (`datasets.Dataset`): Training mentions and entities of `data.dataset`.

    Raises:
        RecipeError: two data sets have columns of the same name and different types.
        MelError: as for [`~hf_mel.data.loading.load_mentions`].
    """
    data, mention_parts, entity_parts = recipe.data, [train], [entities]
    entity_ids = set(entities["entity_id"])
    for number, dataset in enumerate(data.extra_datasets, 2):
        name = f"{number}:{dataset_version(dataset)['dataset']}"
        mentions = load_mentions(dataset, data.train_split, config=data.config)
        for column in {"mention_id", "context_id", "document_id"} & set(mentions.column_names):
            ids = [f"{name}:{value}" if value else value for value in mentions[column]]
            mentions = mentions.remove_columns(column).add_column(column, ids)
        mention_parts.append(mentions)
        rows = load_entities(dataset)
        rows = rows.select([row for row, entity_id in enumerate(rows["entity_id"]) if entity_id not in entity_ids])
        entity_ids.update(rows["entity_id"])
        entity_parts.append(rows)
    try:
        return datasets.concatenate_datasets(mention_parts), datasets.concatenate_datasets(entity_parts)
    except ValueError as error:  # features that cannot be aligned
        raise recipe.error(
            f"The data sets {[data.dataset, *data.extra_datasets]} have columns that do not fit ({error}).",
            "Build them with this version of hf_mel.",
        ) from error


def with_extra_mentions(recipe: Recipe, train: datasets.Dataset, entities: datasets.Dataset) -> datasets.Dataset:
    """Returns the training mentions, and those that `data.extra_mentions` makes of posts and entities."""
    data, parts = recipe.data, [train.select_columns(list(mention_features()))]
    if count := data.extra_mentions.get("posts"):
        try:
            posts = posts_as_mentions(load_posts(data.dataset, revision=data.revision))
        except UnknownSplitError as error:
            raise recipe.error(f"{data.dataset} has no posts.", "Remove data.extra_mentions.posts.") from error
        for number in range(count):
            ids = [f"{mention_id}-{number}" if number else mention_id for mention_id in posts["mention_id"]]
            parts.append(posts.remove_columns("mention_id").add_column("mention_id", ids))
    if count := data.extra_mentions.get("entities"):
        parts.append(entities_as_mentions(entities, count, seed=int(recipe.training.get("seed", 0))))
    features = parts[0].features
    return datasets.concatenate_datasets([part.select_columns(list(features)).cast(features) for part in parts])


def evaluate_training(
    recipe: Recipe, trainer: MelTrainer, validation: datasets.Dataset, data: dict[str, Any]
) -> FinishedTraining:
    """Evaluates a trained model in full precision, and calibrates the NIL threshold of a retriever.

    With `final_evaluation: false` it does neither.

    Args:
        recipe ([`~hf_mel.training.recipe.Recipe`]): The recipe.
        trainer ([`~hf_mel.training.trainer.MelTrainer`]): The trainer, after training.
        validation (`datasets.Dataset`): The mentions of validation.
        data (`dict`): What the results say about the data: the version, the splits, and the training mentions.
    """
    model, processor = trainer.accelerator.unwrap_model(trainer.model).eval(), trainer.processor
    merge_lora(model)
    entities = trainer.eval_entities
    version = {key: data[key] for key in ("dataset", "revision", "sha256")}
    options: dict[str, Any] = {"batch_size": trainer.args.per_device_eval_batch_size, "data_version": version}
    evaluation: Any = None
    nil = curve = None
    if trainer.args.final_evaluation and trainer.reranks:
        assert trainer.eval_candidates is not None
        validation = trainer.eval_dataset  # all mentions, or a sample of `eval_mentions`
        evaluation = CandidateEvaluator(entities, **options)(trainer.inputs, validation, trainer.eval_candidates)
    elif trainer.args.final_evaluation:
        # Mentions are encoded again, because their cached features are half precision.
        inputs = trainer.inputs.without_mention_features()
        evaluation = FullEvaluator(entities, **options)(inputs, validation)
        nil = evaluation.calibrate_nil_threshold() if len(validation) and len(entities) > 1 else None
        if len(validation) and hasattr(model.config, "link_calibration"):
            curve = evaluation.risk_coverage(None if nil is None or nil.simulated else nil.threshold)
            model.config.link_calibration = dataclasses.asdict(curve)
    # A threshold calibrated on simulated NIL mentions is not stored: it would enable NIL on data that has none.
    if nil is not None and not nil.simulated and hasattr(model.config, "nil_threshold"):
        model.config.nil_threshold = nil.threshold
    return FinishedTraining(
        trainer,
        model,
        processor,
        data={
            **data,
            **({"nil_is_learned": True} if learns_nil(model) else {}),
            "validation_mentions": len(validation),
            "entities": len(trainer.entities),
            **({"validation_mentions_of": trainer.eval_total} if trainer.reranks else {}),
        },
        results={
            "candidates": None if recipe.candidates is None else dataclasses.asdict(recipe.candidates),
            "validation": None if evaluation is None else evaluation.to_dict(),
            "nil": None if nil is None else dataclasses.asdict(nil),
            **({} if curve is None else {"risk_coverage": dataclasses.asdict(curve)}),
        },
        model_info={} if trainer.inputs.prototypes is None else {"posts": True},
    )


def candidates_from_recipe(
    recipe: Recipe,
    split: str,
    mentions: datasets.Dataset,
    training: datasets.Dataset,
    entities: datasets.Dataset,
) -> CandidateLists:
    """Returns the candidates of the mentions of a split, as the section `candidates` of a recipe describes.

    Candidates that take work are cached for the next run. Of several processes, the first makes them.

    Args:
        recipe ([`~hf_mel.training.recipe.Recipe`]): The recipe.
        split (`str`): Name of the split, for `candidates.file`.
        mentions, training, entities (`datasets.Dataset`): The mentions of the split, those of the training split, and
            the knowledge base.

    Raises:
        RecipeError: the recipe has no section `candidates`.
        DataFormatError: the candidate file does not exist, or lacks a mention.
        UnknownModelError: the retriever does not load.
    """
    section = recipe.candidates
    if section is None:
        raise recipe.error(
            "A reranker needs candidates.", "Add a section, for instance candidates: {source: name, k: 100}."
        )
    file = section.file.replace("{split}", split) if section.file is not None else None
    if split == recipe.data.train_split and section.train_file is not None:
        file = section.train_file
    if file is not None:
        return CandidateLists.load(file).for_mentions(mentions).top(section.k)
    return made_by_first(
        lambda: make_candidates(
            section.source,
            mentions,
            entities,
            k=section.k,
            scorer=section.scorer,
            training=training,
            retriever=section.retriever,
            posts=lambda: training_posts(recipe, training),
            cache_dir=default_cache(),
            progress=True,
        )
    )


def _check_candidate_source(recipe: Recipe) -> None:
    """Checks the section `candidates` before anything is loaded."""
    section = recipe.candidates
    if section is not None and section.source != "file":
        try:
            check_source(section.source, k=section.k, scorer=section.scorer, retriever=section.retriever)
        except RecipeError as error:
            raise recipe.error(error.message, error.remedy) from None
