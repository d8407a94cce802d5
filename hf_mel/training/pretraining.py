"""Pre-training on posts and the entities they are about, before linking is trained.

Whatever a method makes of it, its data is the same: a batch of posts, each with its own entity, and for each post which
post of the batch its sentence is continued by, which is itself or one about another entity. The method's processor turns
that into tensors, `processor(posts=rows, entities=rows, partners=numbers)`, and the class that `AutoModelForPreTraining`
holds for its configuration computes the loss, and shares the weights of the model that links.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from torch import nn
from transformers import MODEL_FOR_PRETRAINING_MAPPING, EarlyStoppingCallback, Trainer, set_seed

from hf_mel.data.lazy_rows import LazyRow, LazyRows
from hf_mel.data.loading import check_golds, dataset_version, load_entities, load_mentions, load_posts
from hf_mel.errors import DataFormatError, MissingExtraError, UnknownEntityError
from hf_mel.evaluation.full_evaluator import software_versions
from hf_mel.evaluation.tables import write_results
from hf_mel.files import write_text
from hf_mel.hub.model_cards import model_card
from hf_mel.hub.saving import save_model_repository
from hf_mel.inference.features.image_features import ImageFeatures
from hf_mel.inference.inputs import images_per_entity
from hf_mel.schema import NIL, Row
from hf_mel.training import assemble, run_folder
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.plot import plot_training
from hf_mel.training.recipe import Recipe
from hf_mel.training.sampling import GroupingSampler, grouping_sampler, surface_key
from hf_mel.training.tokenizer import texts_of
from hf_mel.training.trainer import MelTrainer, _SetEpoch

#: The epoch of the draws of every evaluation, so that all see the same batches.
_EVALUATION = -1


class PretrainingCollator:
    """Turns posts into a batch of pre-training.

    With probability 1/2 a post's partner is the post itself, else another one of the batch that is about another entity
    (itself again, if there is none); with `same_surface`, one whose mention ends in the same word, if there is any: what
    the knowledge base holds under a similar name (IMN, section 3.2). All draws are a function of seed, epoch and ids.

    Args:
        processor: Takes `posts`, `entities` and `partners`.
        entities (`datasets.Dataset`): The knowledge base, N rows.
        random_image (`bool`, *optional*, defaults to `True`): Whether an entity shows a random one of its images. A
            processor that reads several (`max_entity_images`) gets them all.
        with_features (`Callable`, *optional*): Rows → the same with `image_features`, for a model whose image encoder is
            fixed.
        same_surface (`bool`, *optional*, defaults to `False`): See above.
        seed (`int`, *optional*, defaults to 0): Seed of all draws.

    Attributes:
        epoch (`int`): The epoch, which whoever trains sets.
    """

    def __init__(
        self,
        processor: Any,
        entities: datasets.Dataset,
        *,
        random_image: bool = True,
        with_features: Callable[[Sequence[Row]], Sequence[Row]] | None = None,
        same_surface: bool = False,
        seed: int = 0,
    ):
        self.processor, self.random_image, self.with_features = processor, random_image, with_features
        self.same_surface, self.seed, self.epoch = same_surface, seed, 0
        self.entities = LazyRows(entities)
        self._row_of = {entity_id: row for row, entity_id in enumerate(entities["entity_id"])}

    def __call__(self, posts: Sequence[Row]) -> dict[str, Any]:
        """The batch of P posts: what the processor makes of them.

        Raises:
            UnknownEntityError: a post is about an entity that is not in the knowledge base; names the post.
        """
        owners = [post["entity_id"] for post in posts]
        for post, owner in zip(posts, owners, strict=True):
            if owner not in self._row_of:
                raise UnknownEntityError(
                    f"the entity {owner!r} is not in the knowledge base.", row=post.get("mention_id")
                )
        partners, entities = [], []
        rows = self.entities.__getitems__([self._row_of[owner] for owner in owners])
        surfaces = [surface_key(post["mention"]) for post in posts] if self.same_surface else []
        for place, (post, owner, entity) in enumerate(zip(posts, owners, rows, strict=True)):
            draw = random.Random(f"{self.seed} {self.epoch} {post['mention_id']}")
            others = [k for k, other in enumerate(owners) if other != owner] if draw.random() < 0.5 else []
            if self.same_surface:
                others = [k for k in others if surfaces[k] == surfaces[place]] or others
            partners.append(draw.choice(others) if others else place)
            entities.append(self._shown(entity, draw))
        shown: Sequence[Row] = posts
        if self.with_features is not None:
            shown, entities = self.with_features(posts), list(self.with_features(entities))  # type: ignore[arg-type]
        return dict(self.processor(posts=shown, entities=entities, partners=partners))

    def _shown(self, entity: LazyRow, draw: random.Random) -> LazyRow:
        images = entity.undecoded("images") or ()
        if len(images) < 2 or images_per_entity(self.processor) != 1:
            return entity
        return entity.with_image("images", draw.randrange(len(images)) if self.random_image else 0)


class PretrainingTrainer(MelTrainer):
    """`transformers.Trainer` for pre-training: its metric is the loss on held-out posts (`eval_loss`).

    Optimizer, saving and loading are those of the [`~hf_mel.training.trainer.MelTrainer`]; data and evaluation are not.

    Args:
        model: A pre-training model; what it is trained on is its processor's business.
        args ([`MelTrainingArguments`]): How.
        train_dataset, eval_dataset (`datasets.Dataset`, *optional*): Posts, as [`as_posts`] gives them.
        entities (`datasets.Dataset`): The knowledge base.
        processing_class: Turns posts and entities into tensors; saved with every checkpoint.
        kwargs: Further arguments of `transformers.Trainer`.

    Raises:
        UnknownEntityError: a post is about an entity that is not in the knowledge base.
        DuplicateIdError: a post or an entity id occurs twice.
    """

    args: MelTrainingArguments
    model: Any

    def __init__(
        self,
        model: nn.Module,
        args: MelTrainingArguments,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | None = None,
        *,
        entities: datasets.Dataset,
        processing_class: Any,
        **kwargs: Any,
    ):
        args.prediction_loss_only = True
        args.dataloader_persistent_workers = False  # they would not learn of a new epoch
        args._n_gpu = min(args.n_gpu, 1)  # the rows of a batch point at each other
        self.processor, self.posts = processing_class, train_dataset
        for posts in (train_dataset, eval_dataset):
            if posts is not None:
                check_golds(posts, entities["entity_id"])
        self._collator = PretrainingCollator(
            processing_class,
            entities,
            random_image=args.random_entity_image,
            same_surface=args.batch_grouping != "none",
            seed=args.seed,
        )
        Trainer.__init__(  # not the MelTrainer's, which is about mentions and candidates
            self,
            model=model,
            args=args,
            data_collator=self._collator,
            train_dataset=None if train_dataset is None else LazyRows(train_dataset),
            eval_dataset=None if eval_dataset is None else LazyRows(eval_dataset),
            **kwargs,
        )
        self.label_names = ["labels"]  # others may be missing: a text without an image has none to be matched with
        self.add_callback(_SetEpoch(self))
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch
        if getattr(model, "image_features_are_fixed", False):
            features = ImageFeatures.of(model, processing_class)
            if features is not None:
                for rows in (entities, train_dataset, eval_dataset):
                    if rows is not None:
                        features.add(rows, progress=not args.disable_tqdm and self.is_world_process_zero())
                self._collator.with_features = features.on
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupingSampler:
        assert self.posts is not None
        self._sampler = grouping_sampler(self.posts, self.args.batch_grouping, self.args.group_size, self.args.seed)
        return self._sampler

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, with the same draws every time."""
        epoch, self._collator.epoch = self._collator.epoch, _EVALUATION
        try:
            return Trainer.evaluate(self, *args, **kwargs)
        finally:
            self._collator.epoch = epoch


def as_posts(rows: datasets.Dataset) -> datasets.Dataset:
    """Mentions or posts as what is pre-trained on: `mention_id`, `mention`, `text`, `image` and `entity_id`.

    The context of a mention is a post about its entity, the mention kept in it; NIL mentions are left out. A post has no
    mention, and its id takes the place of one.
    """
    if "post_id" in rows.column_names:
        rows = rows.rename_column("post_id", "mention_id").add_column("mention", [""] * len(rows))
    kept = [row for row, owner in enumerate(rows["entity_id"]) if owner != NIL]
    if not kept:
        raise DataFormatError("there are no posts to pre-train on: the split is empty, or every gold is NIL.")
    return rows if len(kept) == len(rows) else rows.select(kept)


def pretraining_model(recipe: Recipe, texts: Iterable[str] = ()) -> tuple[Any, Any]:
    """The recipe's pre-training model, with the weights of the model it describes, and its processor.

    Raises:
        RecipeError: the method has no pre-training, or the recipe cannot be used as written.
    """
    linking, processor = assemble.build_model(recipe, texts)
    config_class = type(linking.config)
    if config_class not in MODEL_FOR_PRETRAINING_MAPPING:
        raise recipe.error(
            f"task: {linking.config.model_type!r} has no pre-training.", "Leave 'task' out to train it for linking."
        )
    model_class: Any = MODEL_FOR_PRETRAINING_MAPPING[config_class]
    model = model_class(linking.config)
    model.load_state_dict(linking.state_dict(), strict=False)
    return model, processor


def run_pretraining(recipe: Recipe, output: str | os.PathLike[str] | None = None, resume: bool = False) -> Path:
    """Pre-trains what a recipe with `task: pretraining` describes, and writes the run folder.

    Data are the mentions of the training split, or with `data.posts_split` the data set's posts; the checkpoint with the
    lowest loss on the mentions of the validation split is kept. The folder holds the model that links, with what it
    learned: give it as `model.from_pretrained` to a recipe that trains linking.

    Args and errors as in [`~hf_mel.training.run.run_recipe`].

    Returns:
        `Path`: the run folder.
    """
    folder = run_folder.RUNS / recipe.name if output is None else Path(output)
    by_loss = {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    arguments = run_folder.training_arguments(
        dataclasses.replace(recipe, training=by_loss | recipe.training), folder / run_folder.CHECKPOINTS
    )
    checkpoint = run_folder._start(folder, recipe, resume)
    if (folder / run_folder.RESULTS).exists():
        return folder
    started, data = time.time(), recipe.data
    with run_folder._quiet():
        entities = load_entities(data.dataset, revision=data.revision)
        if data.posts_split is None:
            train = load_mentions(data.dataset, data.train_split, data.revision, config=data.config)
        else:
            train = load_posts(data.dataset, data.posts_split, revision=data.revision)
        train = as_posts(train)
        validation = as_posts(load_mentions(data.dataset, data.validation_split, data.revision, config=data.config))
        set_seed(arguments.seed)
        model, processor = pretraining_model(recipe, texts_of(train, entities))
        trainer = PretrainingTrainer(
            model, arguments, train, validation, entities=entities, processing_class=processor
        )
        main = trainer.is_world_process_zero()
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / run_folder.RECIPE, [recipe.to_yaml()])
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        loss = trainer.evaluate()["eval_loss"]
        if main:
            _finish(folder, recipe, trainer, train, validation, entities, loss, started, checkpoint is not None)
        trainer.accelerator.wait_for_everyone()
    return folder


def _finish(folder, recipe, trainer, train, validation, entities, loss, started, resumed) -> None:
    """Writes the model that links, the log and its plot; results.json last."""
    trained = trainer.accelerator.unwrap_model(trainer.model)
    linking_class: Any = transformers.MODEL_MAPPING[type(trained.config)]
    linking = linking_class(trained.config)
    linking.load_state_dict(trained.state_dict(), strict=False)
    state, data = trainer.state, recipe.data
    results: Mapping[str, Any] = {
        "recipe": recipe.name,
        "task": recipe.task,
        "description": recipe.description,
        "license": recipe.license,
        "citation": recipe.citation,
        "model": {
            "type": linking.config.model_type,
            "parameters": sum(parameter.numel() for parameter in linking.parameters()),
            "from_pretrained": recipe.model.from_pretrained,
            "text": recipe.model.text,
            "vision": recipe.model.vision,
        },
        "data": {
            **dataset_version(data.dataset, revision=data.revision),
            "train_split": data.train_split if data.posts_split is None else data.posts_split,
            "train_posts": len(train),
            "validation_split": data.validation_split,
            "validation_posts": len(validation),
            "entities": len(entities),
        },
        "validation": {"loss": loss},
        "best": next(
            (
                {"step": entry["step"], "epoch": entry["epoch"]}
                for entry in state.log_history
                if entry["step"] == state.best_global_step and "eval_loss" in entry
            ),
            None,
        ),
        "training": recipe.training,
        "seed": trainer.args.seed,
        "run": {
            "seconds": round(time.time() - started, 1),
            "resumed": resumed,
            "device": f"{os.cpu_count()} CPU cores" if trained.device.type == "cpu" else str(trained.device),
        },
        "versions": software_versions(),
    }
    save_model_repository(linking, trainer.processor, folder)
    write_results(state.log_history, folder / run_folder.LOG)
    try:
        plot_training(state.log_history, folder / run_folder.PLOT, title=recipe.name)
    except MissingExtraError as error:
        print(f"No {run_folder.PLOT}: {error}")
    write_text(folder / run_folder.CARD, [model_card(results)])
    write_results(results, folder / run_folder.RESULTS)
    shutil.rmtree(folder / run_folder.CHECKPOINTS, ignore_errors=True)
