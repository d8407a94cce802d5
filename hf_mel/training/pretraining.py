"""Pre-training on posts and the entities they are about, before training for linking.

A batch has the same form for every method: posts, the entity of each post, and the partner of each post. The partner is
the post of the batch that continues the sentence: the post itself, or a post about another entity. The method's
processor turns these into tensors with `processor(posts=rows, entities=rows, partners=numbers)`. The class that
`AutoModelForPreTraining` maps its configuration to computes the loss and shares its weights with the linking model.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
from torch import nn
from transformers import MODEL_FOR_PRETRAINING_MAPPING, MODEL_MAPPING, EarlyStoppingCallback, Trainer, set_seed

from hf_mel.data.lazy_rows import LazyRow, LazyRows
from hf_mel.data.loading import check_golds, dataset_version, load_entities, load_mentions, load_posts
from hf_mel.errors import DataFormatError, UnknownEntityError
from hf_mel.inference.inputs import ModelInputs
from hf_mel.protocols import images_per_entity
from hf_mel.schema import NIL, Row
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.assemble import build_model
from hf_mel.training.recipe import Recipe
from hf_mel.training.run_folder import FinishedTraining, RunFolder
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
        inputs ([`~hf_mel.inference.inputs.ModelInputs`]): A pre-training model and its processor, which takes `posts`,
            `entities` and `partners`. Precomputed image features are used.
        entities (`datasets.Dataset`): The knowledge base, N rows.
        random_image (`bool`, *optional*, defaults to `True`): Whether an entity shows a random one of its images. A
            processor that reads several (`max_entity_images`) gets them all.
        same_surface (`bool`, *optional*, defaults to `False`): See above.
        seed (`int`, *optional*, defaults to 0): Seed of all draws.

    Attributes:
        epoch (`int`): The epoch, which whoever trains sets.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        entities: datasets.Dataset,
        *,
        random_image: bool = True,
        same_surface: bool = False,
        seed: int = 0,
    ):
        self.inputs, self.random_image = inputs, random_image
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
        pairs: dict[str, Any] = {
            "posts": self.inputs.mention_rows(posts),
            "entities": self.inputs.entity_rows(entities),
        }
        return dict(self.inputs.processor(**pairs, partners=partners))

    def _shown(self, entity: LazyRow, draw: random.Random) -> LazyRow:
        images = entity.undecoded("images") or ()
        if len(images) < 2 or images_per_entity(self.inputs.processor) != 1:
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
        self.inputs = ModelInputs(model, processing_class)
        self._collator = PretrainingCollator(
            self.inputs,
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
        progress = not args.disable_tqdm and self.is_world_process_zero()
        self.inputs.precompute(entities=entities, mentions=train_dataset, progress=progress)
        self.inputs.precompute(mentions=eval_dataset, progress=progress)
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
    """Converts mentions or posts to posts for pre-training.

    The context of a mention becomes a post about its entity that still contains the mention. NIL mentions are left out.

    Args:
        rows (`datasets.Dataset`): Mentions, or posts of the schema.

    Returns:
        `datasets.Dataset`: rows with `mention_id`, `mention`, `text`, `image` and `entity_id`. The `mention_id` of a post is
        its `post_id`, and its `mention` is empty.

    Raises:
        DataFormatError: no row is left.
    """
    if "post_id" in rows.column_names:
        rows = rows.rename_column("post_id", "mention_id").add_column("mention", [""] * len(rows))
    kept = [row for row, entity_id in enumerate(rows["entity_id"]) if entity_id != NIL]
    if not kept:
        raise DataFormatError("The split has no posts to pre-train on: it is empty, or every gold is NIL.")
    return rows if len(kept) == len(rows) else rows.select(kept)


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
    model = model_class(linking.config)
    model.load_state_dict(linking.state_dict(), strict=False)
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
        train = load_mentions(data.dataset, data.train_split, data.revision, config=data.config)
    else:
        train = load_posts(data.dataset, data.posts_split, revision=data.revision)
    train = as_posts(train)
    validation = as_posts(load_mentions(data.dataset, data.validation_split, data.revision, config=data.config))
    set_seed(folder.arguments.seed)
    model, processor = pretraining_model(recipe, texts_of(train, entities))
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
