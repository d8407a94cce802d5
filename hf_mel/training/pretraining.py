"""Pre-training on posts and the entities they are about, before training for linking.

A batch has the same form for every method: posts, the entity of each post, and the partner of each post. The partner is
the post of the batch that continues the sentence: the post itself, or a post about another entity. The method's
processor turns these into tensors with `processor(posts=rows, entities=rows, partners=numbers)`. The class that
`AutoModelForPreTraining` maps its configuration to computes the loss and shares its weights with the linking model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import datasets
from torch import nn
from transformers import MODEL_FOR_PRETRAINING_MAPPING, MODEL_MAPPING, set_seed

from hf_mel.data.lazy_rows import LazyRows
from hf_mel.data.loading import check_golds, dataset_version, load_entities, load_mentions, load_posts
from hf_mel.detection.gazetteer import Gazetteer
from hf_mel.errors import DataFormatError
from hf_mel.inference.inputs import ModelInputs
from hf_mel.locks import LOADING
from hf_mel.names import fold_name
from hf_mel.protocols import MelProcessor
from hf_mel.schema import NIL, NO_SPAN, mention_features
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.assemble import build_model
from hf_mel.training.base_trainer import BaseTrainer
from hf_mel.training.collators import PretrainingCollator
from hf_mel.training.readable_images import with_readable_images
from hf_mel.training.recipe import Recipe
from hf_mel.training.run_folder import FinishedTraining, RunFolder
from hf_mel.training.sampling import grouping_sampler
from hf_mel.training.tokenizer import texts_of
from hf_mel.training.training_part import training_mentions

logger = logging.getLogger(__name__)

#: Epoch of the draws in every evaluation, so that all evaluations see the same batches.
_EVALUATION_EPOCH = -1


class PretrainingTrainer(BaseTrainer):
    """`transformers.Trainer` for pre-training. Its metric is the loss on held-out posts (`eval_loss`).

    Args:
        model (`PreTrainedModel`): A pre-training model.
        args ([`~hf_mel.training.arguments.MelTrainingArguments`]): The training arguments.
        train_dataset, eval_dataset (`datasets.Dataset`, *optional*): Posts, as [`as_posts`] returns them.
        entities (`datasets.Dataset`): The knowledge base.
        processing_class ([`~hf_mel.protocols.MelProcessor`]): The model's processor, which also accepts `posts` and
            `partners`. It is saved with every checkpoint and becomes the attribute `processor`.
        kwargs: Further arguments of `transformers.Trainer`.

    Raises:
        UnknownEntityError: the entity of a post is not in the knowledge base.
        DuplicateIdError: a post or an entity id occurs twice.
    """

    def __init__(
        self,
        model: nn.Module,
        args: MelTrainingArguments,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | None = None,
        *,
        entities: datasets.Dataset,
        processing_class: MelProcessor,
        **kwargs: Any,
    ):
        args.prediction_loss_only = True
        args.dataloader_persistent_workers = False  # Persistent workers would not see a new epoch.
        for posts in (train_dataset, eval_dataset):
            if posts is not None:
                check_golds(posts, entities["entity_id"])
        self.inputs = ModelInputs(model, processing_class)
        sampler = None
        if train_dataset is not None:
            sampler = grouping_sampler(train_dataset, args.batch_grouping, args.group_size, args.seed)
        super().__init__(
            model,
            args,
            processor=processing_class,
            collator=PretrainingCollator(
                self.inputs,
                entities,
                random_image=args.random_entity_image,
                same_surface=args.batch_grouping != "none",
                seed=args.seed,
            ),
            sampler=sampler,
            train_dataset=None if train_dataset is None else LazyRows(train_dataset),
            eval_dataset=None if eval_dataset is None else LazyRows(eval_dataset),
            **kwargs,
        )
        # Labels of other tasks may be missing: a text without an image has no image to be matched with.
        self.label_names = ["labels"]
        self.inputs.precompute(entities=entities, mentions=train_dataset, progress=self.shows_progress)
        self.inputs.precompute(mentions=eval_dataset, progress=self.shows_progress)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates as the Trainer does, with the same draws every time."""
        epoch, self.collator.epoch = self.collator.epoch, _EVALUATION_EPOCH
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.collator.epoch = epoch


def as_posts(rows: datasets.Dataset) -> datasets.Dataset:
    """Converts mentions or posts to posts for pre-training.

    The context of a mention becomes a post about its entity that still contains the mention. NIL mentions are left out.

    Args:
        rows (`datasets.Dataset`): Mentions, or posts of the schema.

    Returns:
        `datasets.Dataset`: rows with `mention_id`, `mention`, `text`, `image` and `entity_id`. The `mention_id` of a post is
        its `post_id`, and its `mention` is empty if it was not looked for ([`with_found_mentions`]).

    Raises:
        DataFormatError: no row is left.
    """
    if "post_id" in rows.column_names:
        rows = rows.rename_column("post_id", "mention_id")
        if "mention" not in rows.column_names:
            rows = rows.add_column("mention", [""] * len(rows))
    kept = [row for row, entity_id in enumerate(rows["entity_id"]) if entity_id != NIL]
    if not kept:
        raise DataFormatError("The split has no posts to pre-train on: it is empty, or every gold is NIL.")
    if len(kept) == len(rows):
        return rows
    logger.info("Pre-training leaves out %d posts whose entity is NIL.", len(rows) - len(kept))
    return rows.select(kept)


def with_found_mentions(posts: datasets.Dataset, entities: datasets.Dataset) -> datasets.Dataset:
    """Finds a mention in every post: a name or alias of an entity ([`~hf_mel.detection.gazetteer.Gazetteer`]).

    The longest name of the post's own entity is its mention, or else the longest name that is found. A post whose entity is NIL
    gets the entity that has the longest name of which it is the only bearer; without one it keeps NIL. A post without a name
    has an empty mention.

    Args:
        posts (`datasets.Dataset`): P posts of the schema.
        entities (`datasets.Dataset`): The knowledge base, N rows.

    Returns:
        `datasets.Dataset`: the posts, with `mention`, `start` and `end` (-1 without a mention).
    """
    columns = entities.select_columns(["entity_id", "name", "aliases"])[:]
    ids_of_name: dict[str, set[str]] = {}
    all_names: list[str] = []
    for entity_id, name, aliases in zip(*columns.values(), strict=True):
        names = [each for each in (name, *(aliases or ())) if each]
        all_names += names
        for each in names:
            ids_of_name.setdefault(fold_name(each), set()).add(entity_id)
    texts = [text or "" for text in posts["text"]]
    found = Gazetteer(all_names)(texts)
    golds, mentions, spans = [], [], []
    for gold, text, of_text in zip(posts["entity_id"], texts, found, strict=True):
        bearers = [(span, ids_of_name.get(fold_name(text[span.start : span.end]), set())) for span in of_text]
        bearers.sort(key=lambda each: (each[0].start - each[0].end, each[0].start))  # the longest first
        if gold == NIL:
            gold = next((min(ids) for _, ids in bearers if len(ids) == 1), NIL)
        span = next((span for span, ids in bearers if gold in ids), bearers[0][0] if bearers else None)
        golds.append(gold)
        mentions.append("" if span is None else text[span.start : span.end])
        spans.append((NO_SPAN, NO_SPAN) if span is None else (span.start, span.end))
    logger.info("Found a mention in %d of %d posts.", sum(map(bool, mentions)), len(posts))
    rows = posts.remove_columns(
        [name for name in ("entity_id", "mention", "start", "end") if name in posts.column_names]
    )
    for column, values in (
        ("entity_id", golds),
        ("mention", mentions),
        ("start", [start for start, _ in spans]),
        ("end", [end for _, end in spans]),
    ):
        rows = rows.add_column(column, values, feature=mention_features()[column])
    return rows


def pretraining_model(recipe: Recipe, texts: Iterable[str] = ()) -> tuple[nn.Module, Any]:
    """Builds the pre-training model of a recipe and its processor.

    Args:
        recipe ([`~hf_mel.training.recipe.Recipe`]): The recipe.
        texts (iterable of `str`): Texts to train a tokenizer on, if the recipe asks for one.

    Returns:
        the pre-training model, with the weights of the linking model that the recipe describes, and the processor.

    Raises:
        RecipeError: the method has no pre-training, or the recipe is not usable as written.
    """
    linking, processor = build_model(recipe, texts)
    config_class = type(linking.config)
    if config_class not in MODEL_FOR_PRETRAINING_MAPPING:
        raise recipe.error(
            f"The method {linking.config.model_type!r} has no pre-training.", "Remove 'task' to train it for linking."
        )
    model_class: Any = MODEL_FOR_PRETRAINING_MAPPING[config_class]
    with LOADING:
        model = model_class(linking.config)
    model.load_state_dict(linking.state_dict(), strict=False)
    names = getattr(linking, "backbone_names", None)
    if names is not None:
        # A linking model may know that one of its parts is new, for instance a head that the checkpoint lacks.
        model.backbone_names = names
    return model, processor


def run_pretraining(folder: RunFolder) -> FinishedTraining | None:
    """Pre-trains the model of a recipe with `task: pretraining`.

    The data are the mentions of the training split, or the data set's posts if the recipe has `data.posts_split`. The best
    checkpoint has the lowest loss on the mentions of the validation split. The saved model is the linking model with the
    pre-trained weights: name its folder as `model.from_pretrained` in a recipe that trains linking.

    Args:
        folder ([`~hf_mel.training.run_folder.RunFolder`]): The run folder, with the recipe.

    Returns:
        [`~hf_mel.training.run_folder.FinishedTraining`]: the parts of the run folder; `None` on all processes but the
        first.

    Raises:
        RecipeError: the recipe is not usable as written.
        MelError: the data set or the model is not usable.
    """
    recipe, data = folder.recipe, folder.recipe.data
    entities = load_entities(data.dataset, revision=data.revision)
    if data.posts_split is None:
        train = training_mentions(recipe)
    else:
        train = load_posts(data.dataset, data.posts_split, revision=data.revision)
        if data.find_mentions:
            train = with_found_mentions(train, entities)
    train = as_posts(train)
    validation = as_posts(load_mentions(data.dataset, data.validation_split, data.revision, config=data.config))
    set_seed(folder.arguments.seed)
    model, processor = pretraining_model(recipe, texts_of(train, entities))
    tables: Any = with_readable_images(None, processor, train, validation, entities)
    train, validation, entities = tables
    trainer = PretrainingTrainer(
        model, folder.arguments, train, validation, entities=entities, processing_class=processor
    )
    folder.train(trainer)
    loss = trainer.evaluate()["eval_loss"]
    if not trainer.is_world_process_zero():
        return None
    trained = trainer.accelerator.unwrap_model(trainer.model)
    linking_class: Any = MODEL_MAPPING[type(trained.config)]
    linking = linking_class(trained.config)
    linking.load_state_dict(trained.state_dict(), strict=False)
    return FinishedTraining(
        trainer,
        linking,
        processor,
        data={
            **dataset_version(data.dataset, revision=data.revision),
            "train_split": data.train_split if data.posts_split is None else data.posts_split,
            "train_posts": len(train),
            "validation_split": data.validation_split,
            "validation_posts": len(validation),
            "entities": len(entities),
        },
        results={"validation": {"loss": loss}},
    )
