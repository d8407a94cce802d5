"""Training of retrievers with in-batch negatives, evaluated against the whole knowledge base."""

from __future__ import annotations

import logging
import time
from typing import Any

import datasets
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.optim import Optimizer
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import speed_metrics

from hf_mel.data.batching import GroupingSampler, surface_key
from hf_mel.data.collator import LazyRows, RetrieverCollator
from hf_mel.data.loading import check_golds
from hf_mel.errors import DataFormatError, RecipeError
from hf_mel.evaluation.full import evaluate_full
from hf_mel.schema import NIL, MelProcessor
from hf_mel.training.arguments import MelTrainingArguments

logger = logging.getLogger(__name__)


class MelTrainer(Trainer):
    """`transformers.Trainer` for a [`~hf_mel.schema.Retriever`].

    A batch is B mentions and the entities they mean; every entity that is not a mention's gold is its negative.
    Evaluation ranks every mention of `eval_dataset` against all entities (`eval_mrr`, `eval_hits@1`, …). Resuming,
    mixed precision, gradient accumulation and distributed training are the Trainer's. In a distributed run each
    process draws its negatives from its own batch.

    Args:
        model ([`~hf_mel.schema.Retriever`]): What is trained.
        args ([`MelTrainingArguments`]): How.
        train_dataset (`datasets.Dataset`, *optional*): Mentions; those whose gold is NIL are left out, with a count.
        eval_dataset (`datasets.Dataset`, *optional*): Mentions to evaluate on.
        entities (`datasets.Dataset`): The knowledge base.
        processing_class ([`~hf_mel.schema.MelProcessor`]): Turns rows into tensors; saved with every checkpoint. It is the
            attribute `processor` of the trainer.
        callbacks (`list[TrainerCallback]`, *optional*): Further callbacks.
        kwargs: further arguments of `transformers.Trainer`.

    Raises:
        UnknownEntityError: a gold is not in the knowledge base.
        DuplicateIdError: a mention or an entity id occurs twice.
        DataFormatError: no mention is left to train on.
        RecipeError: `head_learning_rate` is set, and the model does not say which of its parts are pretrained.
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
        processing_class: MelProcessor,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        if args.head_learning_rate is not None and not getattr(model, "backbone_names", None):
            raise RecipeError(
                f"head_learning_rate is set, but {type(model).__name__} does not name its pretrained parts "
                "(backbone_names).",
                remedy="Use learning_rate alone.",
            )
        if args.n_gpu > 1:
            # DataParallel would cut the batch between mentions and the columns their labels point to.
            logger.warning("Using one of %d GPUs; start with `accelerate launch` to use them all.", args.n_gpu)
            args._n_gpu = 1
        # Kept from the Trainer, which would write the tokenizer's special tokens into the text encoder's configuration,
        # and could not train with a processor that has no tokenizer.
        self.processor: Any = processing_class
        self.entities = entities
        #: What is trained on: the mentions whose entity is in the knowledge base.
        self.mentions: datasets.Dataset | None = None
        for mentions in (train_dataset, eval_dataset):
            if mentions is not None:
                check_golds(mentions, entities["entity_id"])
        rows = None
        if train_dataset is not None:
            self.mentions = _linkable(train_dataset)
            rows = LazyRows(self.mentions)
        collator = RetrieverCollator(processing_class, entities, random_image=args.random_entity_image, seed=args.seed)
        config = getattr(model, "config", None)
        declared = hasattr(config, "use_cache")
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=rows,
            eval_dataset=eval_dataset,
            callbacks=[_SetEpoch(self), *(callbacks or [])],
            **kwargs,
        )
        # The loss is a mean over the batch, whatever keywords `forward` takes: the Trainer must divide it when it
        # accumulates gradients.
        self.model_accepts_loss_kwargs = False
        if config is not None and not declared and hasattr(config, "use_cache"):
            del config.use_cache  # the Trainer sets it on every model; it would end up in config.json
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(_Progress())

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupingSampler:
        assert self.mentions is not None
        grouped = self.args.batch_grouping == "surface"
        keys = [surface_key(mention) for mention in self.mentions["mention"]] if grouped else range(len(self.mentions))
        self._sampler = GroupingSampler(keys, self.args.group_size if grouped else 1, seed=self.args.seed)
        return self._sampler

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The Trainer's optimizer (no weight decay on biases and LayerNorm), its groups split by learning rate."""
        if self.optimizer is not None or self.args.head_learning_rate is None:
            return super().create_optimizer(*args, **kwargs)
        optimizer = super().create_optimizer(*args, **kwargs)
        prefixes = tuple(f"{name}." for name in self.model.backbone_names)
        backbone = {id(p) for name, p in self.model.named_parameters() if name.startswith(prefixes)}
        for group in list(optimizer.param_groups):
            head = [parameter for parameter in group["params"] if id(parameter) not in backbone]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in backbone]
            if head:
                optimizer.add_param_group({**group, "params": head, "lr": self.args.head_learning_rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.state.best_model_checkpoint is None:
            super()._load_best_model()
        else:
            self._load_weights(self.state.best_model_checkpoint)

    def _load_weights(self, folder: str) -> None:
        """Weights of a checkpoint. The Trainer's own loading skips, silently, those that are renamed on saving (ViT)."""
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves model and processor to `output_dir`, by default that of the arguments."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.processor.save_pretrained(output_dir or self.args.output_dir)

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: datasets.Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Ranks every mention against every entity, in the precision of training.

        Args:
            eval_dataset (`datasets.Dataset`, *optional*): Mentions; default: those given to the trainer.
            ignore_keys: not used.
            metric_key_prefix (`str`): Goes before every name, with an underscore.

        Returns:
            `dict[str, float]`: the metrics of [`~hf_mel.evaluation.full.evaluate_full`]. All processes evaluate, and
            all get the numbers of the first, so that they agree about which checkpoint is best.
        """
        mentions: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if mentions is None:
            raise ValueError("MelTrainer: evaluation needs an eval_dataset.")
        start = time.time()
        with self.accelerator.autocast():
            result = evaluate_full(
                self.accelerator.unwrap_model(self.model),
                self.processor,
                mentions,
                self.entities,
                batch_size=self.args.per_device_eval_batch_size,
                progress=not self.args.disable_tqdm and self.is_world_process_zero(),
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.metrics.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(mentions))
        if self.args.world_size > 1:
            metrics = broadcast_object_list([metrics])[0]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _linkable(mentions: datasets.Dataset) -> datasets.Dataset:
    """The mentions whose entity is in the knowledge base."""
    known = [row for row, gold in enumerate(mentions["entity_id"]) if gold != NIL]
    if not known:
        raise DataFormatError("there are no mentions to train on: every gold is NIL, or the split is empty.")
    if len(known) < len(mentions):
        logger.info("%d mentions whose gold is NIL are left out of training.", len(mentions) - len(known))
        mentions = mentions.select(known)
    return mentions


class _SetEpoch(TrainerCallback):
    """Tells the sampler which epoch it is; Accelerate does not, when it resumes inside one on several processes."""

    def __init__(self, trainer: MelTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer._sampler.set_epoch(int(state.epoch or 0))


class _Progress(ProgressCallback):
    """A bar with the latest loss, and one line for every evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        if "eval_mrr" in logs:
            hits = f", H@1 {100 * logs['eval_hits@1']:.1f}" if "eval_hits@1" in logs else ""
            self.training_bar.write(f"epoch {state.epoch:.3g}: validation MRR {100 * logs['eval_mrr']:.1f}{hits}")
