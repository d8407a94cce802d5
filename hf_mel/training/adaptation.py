"""Adapts a retriever to a knowledge base without a label, as a recipe with the task "adaptation" describes."""

from __future__ import annotations

import dataclasses
import logging
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from transformers import AutoConfig, set_seed

from hf_mel.candidates.name_index import name_weight_of
from hf_mel.data.loading import dataset_version, load_posts
from hf_mel.data.posts import posts_as_mentions
from hf_mel.errors import ImageError, KnowledgeBaseError, UnknownModelError, UnknownSplitError
from hf_mel.evaluation.full_evaluator import FullEvaluator, encode_entities
from hf_mel.evaluation.name_weight import choose_name_weight
from hf_mel.evaluation.strata import names_by_id
from hf_mel.files import file_sha256, package_folder
from hf_mel.inference.execution import evaluation_mode
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.probe import sees_images
from hf_mel.inference.text_encoders import is_text_encoder
from hf_mel.kb.encoding import report_bad_images
from hf_mel.kb.entities import check_ids, is_row_file, open_entities
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.kb.manifest import MANIFEST_NAME
from hf_mel.protocols import Reranker, learns_nil
from hf_mel.row_columns import ColumnMapping
from hf_mel.schema import DESCRIBING_COLUMNS, NIL, mention_features
from hf_mel.training.assemble import build_model
from hf_mel.training.made_mentions import look_alike_groups, made_mentions
from hf_mel.training.recipe import AdaptationRecipe, Recipe
from hf_mel.training.run_folder import FinishedTraining, RunFolder, recorded_values
from hf_mel.training.tokenizer import texts_of
from hf_mel.training.trainer import MelTrainer

logger = logging.getLogger(__name__)

#: Recipes for a text encoder and for a trained retriever, and the key of each that names the model.
_ENCODER_RECIPE, _MODEL_RECIPE = ("adapt-encoder", "model.text"), ("adapt-model", "model.from_pretrained")
#: Values of a model's own recipe that its adaptation keeps.
_KEPT_ARGUMENTS = ("learning_rate", "head_learning_rate", "bf16")


def adaptation_recipe(
    model: str,
    dataset: str,
    *,
    name: str,
    columns: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """Returns the recipe that adapts a model to a knowledge base: a shipped one with these values filled in.

    Args:
        model (`str`): A trained retriever or a text encoder: a folder, a Hub id, or `package:…`.
        dataset (`str`): What to adapt to, as `data.dataset` of the recipe.
        name (`str`): Name of the recipe. Characters that a recipe's name cannot have become "-".
        columns (`Mapping`, *optional*): For a file of entities, arguments of its column mapping.
        overrides (sequence of `str`): As in [`~hf_mel.training.recipe.Recipe.load`].

    Raises:
        UnknownModelError: The model does not exist, or its configuration cannot be read.
        RecipeError: As in [`~hf_mel.training.recipe.Recipe.load`].
    """
    try:
        config: Any = AutoConfig.from_pretrained(package_folder(model))
    except (OSError, ValueError) as error:
        # A model whose code is its own has a configuration that only this code reads, and is no plain encoder.
        if "trust_remote_code" not in str(error):
            raise UnknownModelError(
                f"{model!r} cannot be loaded as a model ({' '.join(str(error).split())[:300]}).",
                remedy="Give a run folder written by `hf-mel train`, a retriever on the Hub, or a text encoder.",
            ) from error
        config = None
    shipped, key = _ENCODER_RECIPE if is_text_encoder(config) else _MODEL_RECIPE
    usable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-") or "adapted"
    filled = [f"name={usable}", f"{key}={model}", f"data.dataset={dataset}"]
    if key == _MODEL_RECIPE[1]:
        own = recorded_values(model, "training")
        filled += [f"training.{key}={own[key]}" for key in _KEPT_ARGUMENTS if own.get(key) is not None]
    recipe = Recipe.load(shipped, [*filled, *overrides])
    if columns:
        recipe = Recipe.from_dict({**recipe.to_dict(), "data": {**recipe.to_dict()["data"], "columns": dict(columns)}})
    return recipe


def run_adaptation(folder: RunFolder) -> FinishedTraining | None:
    """Fits a retriever to a knowledge base: chooses the weight of the names, and trains on made mentions if asked to.

    The weight is chosen by mentions that are made of the entities, among entities with similar names. Made mentions that a
    model was trained on are no measure of it: they become easy while real ones become harder. So nothing of the training is
    checked, and a weight is chosen for the trained model as for any other.

    Args:
        folder ([`~hf_mel.training.run_folder.RunFolder`]): The run folder, with the recipe.

    Returns:
        [`~hf_mel.training.run_folder.FinishedTraining`]: the parts of the run folder; `None` on all processes but the
        first.

    Raises:
        RecipeError: the recipe is not usable as written, or its model is a reranker.
        KnowledgeBaseError: the knowledge base has a single entity, or nothing from which this recipe could learn.
        MelError: the knowledge base or the model is not usable.
    """
    recipe, arguments = folder.recipe, folder.arguments
    setting = recipe.adaptation or AdaptationRecipe()
    if not (setting.names or setting.train):
        raise recipe.error(
            "Nothing would change: adaptation.names and adaptation.train are false, as they are for a model that was trained with "
            "labels.",
            "Choose the weight of the names on labelled mentions: `hf-mel evaluate MODEL --dataset … --name-weight auto "
            "--save-name-weight`. If your texts name entities by their names, --set adaptation.names=true chooses it without.",
        )
    everything, posts, version = open_knowledge(recipe)
    set_seed(arguments.seed)
    model, processor = build_model(recipe, texts_of(everything, *(() if posts is None else (posts,))))
    if isinstance(model, Reranker):
        raise recipe.error(
            f"{type(model).__name__} reranks candidates, and only a retriever adapts to a knowledge base.",
            "Adapt its retriever.",
        )
    _check_material(everything, posts, processor)
    made = MadeData(everything, posts, setting, arguments.seed, learns_nil(model))
    inputs = ModelInputs(model, processor, posts)
    trainer = MelTrainer(
        model,
        arguments,
        train_dataset=made.train if setting.train else None,
        eval_dataset=made.validation,
        entities=made.entities,
        eval_entities=made.ranked,
        processing_class=processor,
        inputs=inputs,
    )
    if setting.train:
        folder.train(trainer)
    else:
        folder.begin(trainer)
    if not trainer.is_world_process_zero():
        return None
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    inputs = trainer.inputs.without_mention_features()
    options: dict[str, Any] = {"batch_size": arguments.per_device_eval_batch_size, "progress": trainer.shows_progress}
    results: dict[str, Any] = {"trained": setting.train}
    is_changed = setting.train
    with evaluation_mode(model):
        encoded = encode_entities(inputs, made.ranked, **options)
    evaluator = FullEvaluator(
        encoded,
        entity_names=names_by_id(made.ranked),
        batch_size=arguments.per_device_eval_batch_size,
        data_version={key: version[key] for key in ("dataset", "revision", "sha256")},
    )
    if setting.names and getattr(model.config, "name_weight", None) is None:
        names = choose_name_weight(inputs, made.validation, encoded, evaluator.name_index(), **options)
        results["names"] = dataclasses.asdict(names)
        if names.weight:
            model.config.name_weight = names.weight
            is_changed = True
    if is_changed:  # thresholds of the model before belong to other scores, and made mentions calibrate none
        for name in ("nil_threshold", "link_calibration"):
            if hasattr(model.config, name):
                setattr(model.config, name, None)
    data = {**version, **made.counts, "entities": len(made.entities), "validation_mentions": len(made.validation)}
    validation = dataclasses.replace(evaluator, name_weight=name_weight_of(model))(inputs, made.validation)
    return FinishedTraining(
        trainer,
        model,
        processor,
        data={**data, **({"nil_is_learned": True} if learns_nil(model) else {})},
        results={"candidates": None, "adaptation": results, "validation": validation.to_dict(), "nil": None},
        model_info={} if inputs.prototypes is None else {"posts": True},
    )


def _check_material(entities: datasets.Dataset, posts: datasets.Dataset | None, processor: Any) -> None:
    """Warns if the knowledge base says too little to learn from.

    Raises:
        KnowledgeBaseError: Nothing tells the entities apart.
    """
    undecoded = entities.select_columns(["images"]).with_format("arrow")
    has_images = pc.any(pc.greater(pc.list_value_length(undecoded[:]["images"]), 0)).as_py()
    is_described = posts is not None or any(any(entities[column]) for column in DESCRIBING_COLUMNS)
    if not is_described and not has_images and len(set(entities["name"])) == 1:
        raise KnowledgeBaseError(
            "Nothing tells the entities apart: they have one name, and no descriptions, attributes or images.",
            remedy="Give them names, descriptions or attributes.",
        )
    if not is_described:
        logger.warning(
            "No entity has an alias, a description or attributes, so that the model learns names alone: which entity a name "
            "means, but not which of several namesakes."
        )
    if not has_images and sees_images(processor):
        logger.warning("The model reads images, but no entity has one. It does not learn from images here.")


class MadeData:
    """Mentions made of the entities of a knowledge base, for training and for validation.

    Args:
        everything (`datasets.Dataset`): N entities.
        posts (`datasets.Dataset`, *optional*): Posts about them.
        setting ([`~hf_mel.training.recipe.AdaptationRecipe`]): What is made.
        seed (`int`): Seed of all draws.
        with_nil (`bool`): Whether training has NIL mentions.

    Attributes:
        entities (`datasets.Dataset`): The entities without those that are left out.
        ranked (`datasets.Dataset`): Those of them that are ranked in validation.
        train, validation (`datasets.Dataset`): The mentions. Without training, the former are none, and no entity is left out.
        counts (`dict`): What was made and left out.
    """

    def __init__(
        self,
        everything: datasets.Dataset,
        posts: datasets.Dataset | None,
        setting: AdaptationRecipe,
        seed: int,
        with_nil: bool,
    ):
        draw = random.Random(f"{seed} adaptation")
        order = [row for group in look_alike_groups(everything["name"], draw) for row in group]
        left_out = sorted(draw.sample(order, int(setting.nil * len(order)))) if setting.train else []
        kept = sorted(set(order) - set(left_out))
        order = [row for row in order if row not in set(left_out)]
        self.entities = everything if not left_out else everything.select(kept)
        # With few mentions for each of many entities, whole groups of look-alikes are taken, which are the hard negatives.
        per_entity = max(1, min(setting.per_entity, setting.limit // max(1, len(kept))))
        trained = sorted(order[: setting.limit // per_entity]) if setting.train else []
        parts = [made_mentions(everything, per_entity, seed=seed, prefix="made", chosen=trained)]
        num_posts = 0
        if posts is not None and setting.posts and setting.train:
            parts.append(_posts(posts, {everything[row]["entity_id"] for row in left_out}, setting, draw))
            num_posts = len(parts[-1])
        if with_nil and left_out:
            parts.append(_as_nil(made_mentions(everything, per_entity, seed=seed, prefix="nil", chosen=left_out)))
        self.train = datasets.concatenate_datasets([part for part in parts if len(part)] or parts)
        self.ranked, self.validation = self._validation(everything, order, left_out, setting, seed)
        self.counts: dict[str, Any] = {
            "train_split": "made",
            "train_mentions": len(self.train),
            "train_nil": self.train["entity_id"].count(NIL),
            "train_posts": num_posts,
            "trained_entities": len(trained),
            "left_out_entities": len(left_out),
            "validation_split": "made",
        }

    def _validation(
        self,
        everything: datasets.Dataset,
        order: list[int],
        left_out: list[int],
        setting: AdaptationRecipe,
        seed: int,
    ) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Returns entities to rank, whole groups of look-alikes, and mentions of some of them and of the left-out ones."""
        ranked = sorted(order[: setting.ranked])
        draw = random.Random(f"{seed} validation")
        num_nil = min(len(left_out), max(1, round(setting.nil * setting.validation))) if left_out else 0
        count = setting.validation - num_nil
        golds = sorted(draw.sample(ranked, min(count, len(ranked))))
        per_entity = max(1, count // max(1, len(golds)))
        parts = [made_mentions(everything, per_entity, seed=seed, prefix="validation", chosen=golds)]
        if num_nil:
            outside = sorted(draw.sample(left_out, num_nil))
            parts.append(_as_nil(made_mentions(everything, 1, seed=seed, prefix="validation-nil", chosen=outside)))
        whole = len(ranked) == len(self.entities)
        return self.entities if whole else everything.select(ranked), datasets.concatenate_datasets(parts)


def open_knowledge(recipe: Recipe) -> tuple[datasets.Dataset, datasets.Dataset | None, dict[str, Any]]:
    """Opens what `data.dataset` of a recipe for adaptation names.

    Returns:
        The entities, the posts about them or `None`, and the version of both, as
        [`~hf_mel.data.loading.dataset_version`] gives it.

    Raises:
        KnowledgeBaseError: There are fewer than two entities.
        MelError: The source cannot be read.
    """
    data, posts = recipe.data, None
    bad_images: list[ImageError] = []
    if is_row_file(data.dataset):
        path = Path(data.dataset)
        mapping = ColumnMapping(**data.columns) if data.columns else None
        entities, name = open_entities(path, bad_images=bad_images, mapping=mapping)
        version = {"dataset": path.name, "revision": None, "sha256": file_sha256(path)}
    elif data.columns:
        raise recipe.error(
            "data.columns does not apply, because data.dataset is not a file of entities.", "Remove data.columns."
        )
    elif (Path(data.dataset) / MANIFEST_NAME).is_file():
        kb = KnowledgeBase(data.dataset)
        entities, name = kb.as_dataset(), data.dataset
        version = {"dataset": Path(data.dataset).resolve().name, "revision": None, "sha256": None}
    else:
        entities, name = open_entities(data.dataset, bad_images=bad_images)
        version = dict(dataset_version(data.dataset, revision=data.revision))
        try:
            posts = load_posts(data.dataset, revision=data.revision)
        except UnknownSplitError:
            posts = None
    report_bad_images(bad_images)
    check_ids(entities, name)
    if len(entities) < 2:
        raise KnowledgeBaseError(
            "The knowledge base has a single entity, so nothing is learned about which one is meant.",
            file=name,
            remedy="Give at least two entities.",
        )
    return entities, posts, version


def _posts(
    posts: datasets.Dataset, left_out: set[str], setting: AdaptationRecipe, draw: random.Random
) -> datasets.Dataset:
    """Returns posts about entities that are not left out as mentions, at most as many as the limit, some of them repeated."""
    kept = [row for row, entity_id in enumerate(posts["entity_id"]) if entity_id not in left_out]
    if len(kept) * setting.posts > setting.limit:
        kept = sorted(draw.sample(kept, max(1, setting.limit // setting.posts)))
    mentions = posts_as_mentions(posts.select(kept))
    features = mention_features()
    parts = []
    for number in range(setting.posts):
        ids = [f"{mention_id}-{number}" for mention_id in mentions["mention_id"]]
        part = mentions.remove_columns("mention_id").add_column("mention_id", ids)
        parts.append(part.select_columns(list(features)).cast(features))
    return datasets.concatenate_datasets(parts)


def _as_nil(mentions: datasets.Dataset) -> datasets.Dataset:
    return mentions.remove_columns("entity_id").add_column("entity_id", [NIL] * len(mentions)).cast(mention_features())
