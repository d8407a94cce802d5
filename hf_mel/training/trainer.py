"""Trainer of retrievers, with in-batch negatives, and of rerankers, on candidate lists."""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput, speed_metrics

from hf_mel.candidates.lists import CandidateLists, missing_candidates_error
from hf_mel.candidates.make import retriever_candidates
from hf_mel.data.examples import example_groups, sample_examples
from hf_mel.data.lazy_rows import LazyRows
from hf_mel.data.loading import check_golds
from hf_mel.errors import DataFormatError, MissingExtraError, RecipeError
from hf_mel.evaluation.candidate_evaluator import CandidateEvaluator, CandidateResult
from hf_mel.evaluation.full_evaluator import FullEvaluator, FullResult
from hf_mel.evaluation.strata import has_image, names_by_id
from hf_mel.inference.execution import evaluation_mode
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.prefetch import computed_ahead
from hf_mel.names import namesakes_of
from hf_mel.protocols import (
    FitsFeatures,
    MelProcessor,
    Reranker,
    Retriever,
    learns_nil,
    max_mentions,
    reads_list_scores,
)
from hf_mel.schema import NIL
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.base_trainer import BaseTrainer
from hf_mel.training.collators import BATCH_IDS, Examples, NamesRows, PairCollator, RetrieverCollator
from hf_mel.training.memory import check_memory
from hf_mel.training.sampling import EasyShareSampler, GroupingSampler, grouping_sampler
from hf_mel.training.shared_batches import SHARED_SIZES, gathered_encodings, made_by_first, unsharded_loader

logger = logging.getLogger(__name__)


class MelTrainer(BaseTrainer):
    """`transformers.Trainer` for a [`~hf_mel.protocols.Retriever`] or a [`~hf_mel.protocols.Reranker`].

    The batch of a retriever has B mentions, their gold entities, `mined_negatives` more for each mention and
    `random_negatives` more for all. Every entity of the batch that is not a mention's gold is its negative. Evaluation
    ranks all entities for every mention of `eval_dataset` (`eval_mrr`, `eval_hits@1`, …).

    The batch of a reranker has B examples. A mention comes with its gold and with negatives from its candidates
    ([`~hf_mel.training.collators.PairCollator`]). Evaluation follows the candidate protocol end to end, and ranks jointly
    if the model does: for `eval_mrr`, a gold that is not among the candidates counts as 0.

    P processes with batches of B train as one process with a batch of P·B: they share every batch, each encodes its part, and
    the negatives of a mention are the entities of the whole batch. They share the evaluation, too. What a model computes
    from a batch as such, as batch normalisation does, it computes from the part of its process.

    Resuming, mixed precision and gradient accumulation work as in the Trainer.

    Args:
        model ([`~hf_mel.protocols.Retriever`] or [`~hf_mel.protocols.Reranker`]): The model to train.
        args ([`~hf_mel.training.arguments.MelTrainingArguments`]): The training arguments.
        train_dataset (`datasets.Dataset`, *optional*): Mentions to train on. Mentions whose gold is NIL are left out, and
            their number is logged, unless the model is a retriever that learns NIL ([`~hf_mel.protocols.learns_nil`]).
        eval_dataset (`datasets.Dataset`, *optional*): Mentions to evaluate on.
        entities (`datasets.Dataset`): The knowledge base.
        eval_entities (`datasets.Dataset`, *optional*): For a retriever, a part of the knowledge base that is ranked in
            evaluation, instead of the whole.
        processing_class ([`~hf_mel.protocols.MelProcessor`]): The model's processor, saved with every checkpoint. It
            becomes the attribute `processor`.
        train_candidates, eval_candidates ([`~hf_mel.candidates.lists.CandidateLists`], *optional*): For a reranker, the
            candidates of both sets of mentions.
        inputs ([`~hf_mel.inference.inputs.ModelInputs`], *optional*): `model` and `processing_class` with posts about the
            entities, for a retriever that represents entities by posts. The posts are encoded once, before training. A
            batch leaves out the posts whose text is the text of one of its mentions. Default: inputs without posts.
        callbacks (`list[TrainerCallback]`, *optional*): Further callbacks.
        kwargs: Further arguments of `transformers.Trainer`.

    Attributes:
        mentions (`datasets.Dataset`, *optional*): The mentions to train on.
        eval_total (`int`, *optional*): Size of `eval_dataset` before `eval_mentions` were sampled.
        reranks (`bool`): Whether the model is a reranker.

    Raises:
        UnknownEntityError: a gold is not in the knowledge base.
        DuplicateIdError: a mention or an entity id occurs twice.
        DataFormatError: no mention is left to train on, a mention has no list of candidates, a prior is no probability, or
            a document has more mentions than the model's `max_mentions`.
        RecipeError: `head_learning_rate` is set, and the model does not name its pretrained parts; or a reranker has no
            candidates, or reads their scores and they have none.
    """

    def __init__(
        self,
        model: Retriever | Reranker,
        args: MelTrainingArguments,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | None = None,
        *,
        entities: datasets.Dataset,
        eval_entities: datasets.Dataset | None = None,
        processing_class: MelProcessor,
        train_candidates: CandidateLists | None = None,
        eval_candidates: CandidateLists | None = None,
        inputs: ModelInputs | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        self.inputs = ModelInputs(model, processing_class) if inputs is None else inputs
        self.entities, self.eval_candidates = entities, eval_candidates
        self.eval_entities = entities if eval_entities is None else eval_entities
        self.reranks, self._batches_of_one_entity = isinstance(model, Reranker), 0
        for mentions, ranked, lists in (
            (train_dataset, entities, train_candidates),
            (eval_dataset, self.eval_entities, eval_candidates),
        ):
            if mentions is not None:
                check_golds(mentions, ranked["entity_id"])
                if self.reranks:
                    _check_candidates(model, mentions, lists, entities)
        self.eval_total = None if eval_dataset is None else len(eval_dataset)
        if isinstance(model, Reranker) and eval_dataset is not None and args.eval_mentions is not None:
            unit = "document" if model.example_unit == "document" else "context"
            eval_dataset = sample_examples(eval_dataset, unit, args.eval_mentions, args.seed)
            logger.warning("Evaluating on %d of %d mentions (eval_mentions).", len(eval_dataset), self.eval_total)
        self.mentions = (
            None if train_dataset is None else _trainable(train_dataset, learns_nil(model), args.simulated_nil > 0)
        )
        rows: Any = None
        sampler: GroupingSampler | None = None
        collator: Any
        if isinstance(model, Reranker):
            args.dataloader_persistent_workers = False  # Persistent workers would not see a new epoch.
            unit = str(model.example_unit)
            if self.mentions is not None:
                rows = Examples(self.mentions, unit, max_mentions(model))
                sampler = (
                    GroupingSampler(range(len(rows)), seed=args.seed)
                    if args.easy_share == 1
                    else EasyShareSampler(_easy_examples(self.mentions, entities, unit), args.easy_share, args.seed)
                )
            collator = PairCollator(
                self.inputs,
                entities,
                train_candidates.by_mention if train_candidates is not None else {},
                priors=None if train_candidates is None else train_candidates.priors,
                list_scores=None if train_candidates is None else train_candidates.relative_scores,
                num_negatives=args.num_negatives,
                hard_negatives=args.hard_negatives,
                negatives_from=args.negatives_from,
                fill_short_lists=args.fill_short_lists,
                context_golds=_golds_by_context(self.mentions) if args.context_negatives else None,
                unit=unit,
                mentions_per_example=getattr(model, "mentions_per_example", 1),
                random_image=args.random_entity_image,
                seed=args.seed,
            )
        else:
            if self.mentions is not None:
                rows = LazyRows(self.mentions)
                sampler = grouping_sampler(self.mentions, args.batch_grouping, args.group_size, args.seed)
            collator = RetrieverCollator(
                self.inputs,
                entities,
                random_image=args.random_entity_image,
                seed=args.seed,
                random_negatives=args.random_negatives,
                augment_images=args.augment_images,
                simulated_nil=args.simulated_nil,
            )
            if args.simulated_nil and not learns_nil(model):
                raise RecipeError(
                    f"simulated_nil is set, but {type(model).__name__} does not learn NIL.",
                    remedy="Set model.config.nil_score: true, or remove training.simulated_nil.",
                )
            if args.prior_correction and self.mentions is not None:
                model_class: Any = type(model)
                if "entity_log_prior" not in inspect.signature(model_class.forward).parameters:
                    raise RecipeError(
                        f"prior_correction is set, but {model_class.__name__} takes no entity_log_prior.",
                        remedy="Remove training.prior_correction.",
                    )
                collator.log_prior = _log_priors(self.mentions, entities, args.prior_correction)
        super().__init__(
            model,  # type: ignore[arg-type]  # The protocols do not say that a model is a module.
            args,
            processor=processing_class,
            collator=collator,
            sampler=sampler,
            train_dataset=rows,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            **kwargs,
        )
        collator.part = (args.process_index, args.world_size)
        self.inputs.precompute(entities=entities, mentions=self.mentions, progress=self.shows_progress)
        if self.reranks:
            self.inputs.precompute(mentions=eval_dataset, progress=self.shows_progress)
        elif args.mined_negatives and self.mentions is not None:
            # Of the model as it is now, so that a resumed run has the same negatives.
            mine = partial(_mined_negatives, self.inputs, self.mentions, entities, args, self.shows_progress)
            collator.negatives = made_by_first(mine)
        if self.mentions is not None and self.is_world_process_zero():
            _log_gaps(self.mentions, entities)
            self._warn_of_left_out_texts(self.mentions)

    def get_train_dataloader(self) -> Any:
        """Returns the data loader of the training mentions. Of several processes, all read every batch, of P·B mentions."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        if self.train_dataset is None:
            raise ValueError("The trainer has no train_dataset. Pass one to MelTrainer.")
        args = self.args
        loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=self._train_batch_size * args.world_size,
            sampler=self.sampler,
            collate_fn=NamesRows(self.data_collator),
            drop_last=args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return unsharded_loader(loader, self.accelerator.device)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Computes the loss of a batch. Its mean over processes is the loss of the batch that they share."""
        sizes = inputs.pop(SHARED_SIZES, None)
        if self.reranks:
            num_entities = inputs["pair_mask"].shape[1] if "pair_mask" in inputs else None
        elif sizes is None:
            num_entities = next((len(tensor) for name, tensor in inputs.items() if name.startswith("entity_")), None)
        else:
            num_entities = int(sizes[1])
        self._batches_of_one_entity += num_entities == 1
        if sizes is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if not self.reranks:
            with gathered_encodings(self.accelerator.unwrap_model(model), *sizes.tolist()):
                return super().compute_loss(model, inputs, *args, **kwargs)
        num_counted, num_mentions = sizes.tolist()
        outcome = super().compute_loss(model, inputs, *args, **kwargs)
        loss, *others = outcome if isinstance(outcome, tuple) else (outcome,)
        loss = loss * (num_counted * self.args.world_size / num_mentions)
        return (loss, *others) if others else loss

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains as the Trainer does, or fits a model that is fitted without gradients ([`~hf_mel.protocols.FitsFeatures`]).

        Fitting reads the training mentions `num_train_epochs` times, with other negatives each time, or until `max_steps`
        batches or `max_minutes` are over. It writes no checkpoint, so that an interrupted run starts again.

        Raises:
            NotEnoughMemoryError: training on a CPU is predicted to need more memory than there is
                ([`~hf_mel.training.memory.check_memory`]).
            MissingExtraError: a package that fits the model is not installed.
            RecipeError: a model that is fitted is trained by several processes, or on pairs of one kind.
        """
        if not isinstance(self.model, FitsFeatures):
            self._batches_of_one_entity = 0
            if self.args.check_memory and self.train_dataset is not None:
                check_memory(self)
            output = super().train(*args, **kwargs)
            if self._batches_of_one_entity:
                logger.warning(
                    "%d batches had a single entity, so that nothing was learned about which one is meant. Raise "
                    "training.per_device_train_batch_size%s.",
                    self._batches_of_one_entity,
                    "" if self.reranks else " or training.random_negatives",
                )
            return output
        if self.args.world_size > 1:
            raise RecipeError(
                f"{type(self.model).__name__} is fitted by one process, but {self.args.world_size} were started.",
                remedy="Train it without accelerate launch.",
            )
        features, labels = [], []
        with evaluation_mode(self.model):
            for batch in self._fitting_batches():
                batch = self._prepare_inputs(batch)
                batch.pop(BATCH_IDS, None)
                golds, mask = batch.pop("labels"), batch["pair_mask"].bool()
                is_gold = torch.arange(mask.shape[1], device=mask.device) == golds.unsqueeze(1)
                features.append(self.model.pair_features(**batch)[mask].cpu())
                labels.append(is_gold[mask].cpu())
        try:
            self.model.fit(torch.cat(features), torch.cat(labels), seed=self.args.seed)
        except ImportError as error:
            raise MissingExtraError(str(error)) from error
        except ValueError as error:
            raise RecipeError(f"The model cannot be fitted: {error}") from error
        self.state.global_step = sum(map(len, labels))
        metrics: dict[str, float] = {}
        if self.eval_dataset is not None:
            metrics = self.evaluate()
            self.state.best_global_step = self.state.global_step
        return TrainOutput(self.state.global_step, 0.0, metrics)

    def _fitting_batches(self) -> Iterator[dict[str, Any]]:
        """Yields the training batches of a model that is fitted, until the epochs, `max_steps` or `max_minutes` are over."""
        read, limit = 0, self.args.max_steps
        epochs = itertools.count() if limit > 0 else range(math.ceil(self.args.num_train_epochs))
        if self.clock is not None:
            self.clock.on_train_begin(self.args, self.state, self.control)
        for epoch in epochs:
            self.state.epoch = float(epoch)
            self.callback_handler.on_epoch_begin(self.args, self.state, self.control)  # sets the collator's epoch
            loader = self.get_train_dataloader()
            if not len(loader):
                raise RecipeError(
                    "Fitting has no batch: the training mentions are fewer than a batch, and smaller ones are dropped.",
                    remedy="Lower training.per_device_train_batch_size, or leave out training.dataloader_drop_last.",
                )
            with closing(computed_ahead(loader, ahead=0)) as ahead:  # type: ignore[type-var]
                batches = tqdm(ahead, "Features", len(loader), unit="batch", delay=1, disable=not self.shows_progress)
                for number, batch in enumerate(batches, 1):
                    yield batch
                    read += 1
                    self.state.epoch = epoch + number / len(loader)
                    if self.clock is not None:
                        self.clock.on_step_end(self.args, self.state, self.control)
                    if read == limit or self.control.should_training_stop:
                        return

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: datasets.Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluates as [`MelTrainer.evaluate_detailed`] does, and logs the metrics.

        Args:
            eval_dataset (`datasets.Dataset`, *optional*): Mentions. Default: the `eval_dataset` of the trainer.
            ignore_keys (`list[str]`, *optional*): Not used.
            metric_key_prefix (`str`): Prefix of every metric's name, followed by an underscore.

        Returns:
            `dict[str, float]`: the metrics. Processes share the entities of a retriever, and the contexts or documents of a
            reranker. All return the numbers of the first, so that they agree on the best checkpoint.
        """
        mentions: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if mentions is None:
            raise ValueError("The trainer has no eval_dataset. Pass one to MelTrainer or to evaluate.")
        start = time.time()
        if not self.reranks:
            # With a frozen mention encoder, the mentions are encoded once for all evaluations.
            self.inputs.precompute(mentions=mentions, progress=self.shows_progress)
        processes = PartialState() if self.args.world_size > 1 else None
        result = self._evaluate_inputs(self.inputs, mentions, processes=processes)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.metrics.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(mentions))
        if self.args.world_size > 1:
            metrics = broadcast_object_list([metrics])[0]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_detailed(self, mentions: datasets.Dataset, **options: Any) -> FullResult | CandidateResult:
        """Evaluates with the full protocol, or for a reranker the candidate protocol, in the precision of training.

        Args:
            mentions (`datasets.Dataset`): Mentions. For a reranker, `eval_candidates` must have their candidates.
            options: Settings of [`~hf_mel.evaluation.FullEvaluator`] or [`~hf_mel.evaluation.CandidateEvaluator`].

        Returns:
            [`~hf_mel.evaluation.full_evaluator.FullResult`] or
            [`~hf_mel.evaluation.candidate_evaluator.CandidateResult`]: the result with its ranking and settings.
        """
        # Cached mention features are half precision, so the mentions are encoded again.
        return self._evaluate_inputs(self.inputs.without_mention_features(), mentions, **options)

    def measure(self, mentions: datasets.Dataset, **options: Any) -> FullResult | CandidateResult:
        """Deprecated name of [`MelTrainer.evaluate_detailed`]."""
        warnings.warn(
            "MelTrainer.measure is now called evaluate_detailed. The old name will be removed in the next release.",
            FutureWarning,
            stacklevel=2,
        )
        return self.evaluate_detailed(mentions, **options)

    def _warn_of_left_out_texts(self, mentions: datasets.Dataset) -> None:
        """Logs how many texts the processor truncates. A reranker reads a mention with its gold."""
        left_out = self.inputs.left_out
        if not self.reranks:
            left_out.add_dataset("mentions", mentions)
            left_out.add_dataset("entities", self.entities)
        else:
            left_out.add_gold_pairs(mentions, self.entities)
        for kind in ("mentions", "entities", "pairs"):
            left_out.warn(kind)

    def _evaluate_inputs(
        self, inputs: ModelInputs, mentions: datasets.Dataset, *, processes: PartialState | None = None, **options: Any
    ) -> FullResult | CandidateResult:
        options = {
            "batch_size": self.args.per_device_eval_batch_size,
            "progress": self.shows_progress,
            **options,
        }
        with self.accelerator.autocast():
            if not self.reranks:
                return FullEvaluator(self.eval_entities, **options)(inputs, mentions, processes=processes)
            assert self.eval_candidates is not None
            return CandidateEvaluator(self.entities, **options)(
                inputs, mentions, self.eval_candidates, processes=processes
            )


def _log_priors(mentions: datasets.Dataset, entities: datasets.Dataset, weight: float) -> dict[str, float]:
    """Returns the weighted logarithm of how often an entity is a gold, relative to the mean, by entity id."""
    counts = Counter(mentions["entity_id"])
    smoothed = {entity_id: counts[entity_id] + 0.5 for entity_id in entities["entity_id"]}
    mean = sum(smoothed.values()) / len(smoothed)
    return {entity_id: weight * math.log(count / mean) for entity_id, count in smoothed.items()}


def _easy_examples(mentions: datasets.Dataset, entities: datasets.Dataset, unit: str) -> list[bool]:
    """Returns for each example whether all its mentions are alone in their context and have no namesake but the gold."""
    contexts = Counter(mentions["context_id"])
    names = names_by_id(entities) or {}
    namesakes = namesakes_of((surface or "" for surface in mentions["mention"]), names)
    is_easy = [
        contexts[context] == 1 and not namesakes[surface or ""] - {gold}
        for context, surface, gold in zip(
            mentions["context_id"], mentions["mention"], mentions["entity_id"], strict=True
        )
    ]
    return [all(is_easy[row] for row in rows) for rows in example_groups(mentions, unit)]


def _golds_by_context(mentions: datasets.Dataset | None) -> dict[str, list[str]]:
    golds: dict[str, list[str]] = {}
    if mentions is not None:
        for context, gold in zip(mentions["context_id"], mentions["entity_id"], strict=True):
            golds.setdefault(context, []).append(gold)
    return golds


def _mined_negatives(
    inputs: ModelInputs,
    mentions: datasets.Dataset,
    entities: datasets.Dataset,
    args: MelTrainingArguments,
    progress: bool,
) -> dict[str, list[str]]:
    """Returns the entities with the highest scores of each mention except its gold, by mention id."""
    with evaluation_mode(inputs.model):
        lists = retriever_candidates(
            inputs,
            mentions,
            entities,
            k=args.mined_negatives + 1,
            batch_size=args.per_device_eval_batch_size,
            progress=progress,
        )
    gold_of = dict(zip(mentions["mention_id"], mentions["entity_id"], strict=True))
    return {
        mention_id: [entity_id for entity_id in ranked if entity_id != gold_of[mention_id]][: args.mined_negatives]
        for mention_id, ranked in lists.by_mention.items()
    }


def _check_candidates(
    model: Retriever | Reranker, mentions: datasets.Dataset, lists: CandidateLists | None, entities: datasets.Dataset
) -> None:
    """Checks that every mention has a list of candidates, and that all candidates are in the knowledge base."""
    if lists is None:
        raise missing_candidates_error(
            type(model).__name__, "Give train_candidates and eval_candidates, or in a recipe candidates.source."
        )
    if reads_list_scores(model):
        lists.check_relative_scores()
    lists.for_mentions(mentions).rows(entities["entity_id"])


def _log_gaps(mentions: datasets.Dataset, entities: datasets.Dataset) -> None:
    """Logs how many training mentions lack a text or an image, and how many entities an image, which all are trained on."""
    texts: Any = mentions["text"] if "text" in mentions.column_names else []
    gaps = {"mentions without a text": sum(not (text or "").strip() for text in texts)}
    if "image" in mentions.column_names:
        gaps["mentions without an image"] = has_image(mentions).count(False)
    if "images" in entities.column_names:
        undecoded = entities.select_columns(["images"]).with_format("arrow")
        gaps["entities without an image"] = sum(
            not images
            for batch in undecoded.iter(1000)
            for images in pc.list_value_length(batch["images"]).to_pylist()
        )
    parts = [f"{count:,} {what}" for what, count in gaps.items() if count]
    if parts:
        logger.info("Training reads %s.", ", ".join(parts))


def _trainable(mentions: datasets.Dataset, learns_nil: bool, is_simulated: bool = False) -> datasets.Dataset:
    """Returns the mentions to train on. Unless the model learns NIL, NIL mentions are left out, and their number is logged.

    Args:
        mentions (`datasets.Dataset`): Mentions.
        learns_nil, is_simulated (`bool`): Whether the model learns NIL, and whether NIL mentions are simulated.
    """
    kept = [row for row, gold in enumerate(mentions["entity_id"]) if gold != NIL]
    if not kept:
        raise DataFormatError("The split has no mentions to train on: it is empty, or every gold is NIL.")
    if learns_nil:
        logger.info("Training learns NIL from %d mentions.", len(mentions) - len(kept))
        if len(kept) == len(mentions) and not is_simulated:
            logger.warning(
                "The model learns NIL, but no training mention is NIL. Set training.simulated_nil, such as 0.1, or "
                "model.config.nil_score: false."
            )
        return mentions
    if len(kept) < len(mentions):
        logger.info("Training leaves out %d mentions whose gold is NIL.", len(mentions) - len(kept))
        mentions = mentions.select(kept)
    return mentions
