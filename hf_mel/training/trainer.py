"""Training of retrievers with in-batch negatives, evaluated against the whole knowledge base, and of rerankers on
candidate lists."""

from __future__ import annotations

import logging
import random
import time
from typing import Any

import datasets
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.optim import Optimizer
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import speed_metrics

from hf_mel.candidates.lists import CandidateLists
from hf_mel.data.examples import example_groups
from hf_mel.data.lazy_rows import LazyRows
from hf_mel.data.loading import check_golds
from hf_mel.errors import DataFormatError, RecipeError
from hf_mel.evaluation.candidate_evaluator import CandidateResult, evaluate_candidates
from hf_mel.evaluation.full_evaluator import FullResult, evaluate_full
from hf_mel.inference.inputs import ModelInputs
from hf_mel.protocols import MelProcessor, Reranker, max_mentions
from hf_mel.schema import NIL
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.collators import Examples, PairCollator, RetrieverCollator
from hf_mel.training.sampling import GroupingSampler, grouping_sampler

logger = logging.getLogger(__name__)


class MelTrainer(Trainer):
    """`transformers.Trainer` for a [`~hf_mel.protocols.Retriever`] or a [`~hf_mel.protocols.Reranker`].

    A retriever's batch is B mentions and the entities they mean; every entity that is not a mention's gold is its
    negative. Evaluation ranks every mention of `eval_dataset` against all entities (`eval_mrr`, `eval_hits@1`, …). In a
    distributed run each process draws its negatives from its own batch.

    A reranker's batch is B of its examples, each mention beside its gold and negatives of its candidates
    ([`~hf_mel.training.collators.PairCollator`]). Evaluation is the candidate protocol end to end, ranking jointly if the model
    does: `eval_mrr` counts a gold that is not among the candidates as 0.

    Resuming, mixed precision, gradient accumulation and distributed training are the Trainer's.

    Args:
        model ([`~hf_mel.protocols.Retriever`] or [`~hf_mel.protocols.Reranker`]): What is trained.
        args ([`MelTrainingArguments`]): How.
        train_dataset (`datasets.Dataset`, *optional*): Mentions; those whose gold is NIL are left out, with a count.
        eval_dataset (`datasets.Dataset`, *optional*): Mentions to evaluate on.
        entities (`datasets.Dataset`): The knowledge base.
        train_candidates, eval_candidates ([`~hf_mel.candidates.lists.CandidateLists`], *optional*): For a reranker, the
            candidates of both sets of mentions.
        inputs ([`~hf_mel.inference.inputs.ModelInputs`], *optional*): `model` and `processing_class` with the posts about
            the entities, for a retriever that represents entities by posts. These are encoded once, before training. A
            batch shows no post that is the text of one of its mentions. Default: inputs without posts.
        processing_class ([`~hf_mel.protocols.MelProcessor`]): Turns rows into tensors; saved with every checkpoint. It is the
            attribute `processor` of the trainer.
        callbacks (`list[TrainerCallback]`, *optional*): Further callbacks.
        kwargs: further arguments of `transformers.Trainer`.

    Raises:
        UnknownEntityError: a gold is not in the knowledge base.
        DuplicateIdError: a mention or an entity id occurs twice.
        DataFormatError: no mention is left to train on, one has no list of candidates, a prior is no probability, or a
            document has more mentions than the model's `max_mentions`.
        RecipeError: `head_learning_rate` is set, and the model does not say which of its parts are pretrained; or a
            reranker without candidates.
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
        train_candidates: CandidateLists | None = None,
        eval_candidates: CandidateLists | None = None,
        inputs: ModelInputs | None = None,
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
        #: The model, its processor, and what of rows is computed before training because it stays the same.
        self.inputs = ModelInputs(model, processing_class) if inputs is None else inputs
        self.entities = entities
        #: What is trained on: the mentions whose entity is in the knowledge base.
        self.mentions: datasets.Dataset | None = None
        #: Whether the model reranks candidates, and those of the evaluation.
        self.reranks, self.eval_candidates = isinstance(model, Reranker), eval_candidates
        for mentions, lists in ((train_dataset, train_candidates), (eval_dataset, eval_candidates)):
            if mentions is not None:
                check_golds(mentions, entities["entity_id"])
                if self.reranks:
                    _check_candidates(model, mentions, lists, entities)
        self.eval_total = None if eval_dataset is None else len(eval_dataset)
        if self.reranks and eval_dataset is not None and args.eval_mentions is not None:
            whole = "document" if model.example_unit == "document" else "context"
            eval_dataset = _some_examples(eval_dataset, whole, args.eval_mentions, args.seed)
            logger.warning("Evaluating on %d of %d mentions (eval_mentions).", len(eval_dataset), self.eval_total)
        if train_dataset is not None:
            self.mentions = _linkable(train_dataset)
        rows: Any = None
        collator: Any
        if self.reranks:
            args.dataloader_persistent_workers = False  # they would not learn of a new epoch
            unit = str(model.example_unit)
            if self.mentions is not None:
                rows = Examples(self.mentions, unit, max_mentions(model))
            collator = PairCollator(
                self.inputs,
                entities,
                train_candidates.by_mention if train_candidates is not None else {},
                priors=None if train_candidates is None else train_candidates.priors,
                num_negatives=args.num_negatives,
                negatives_from=args.negatives_from,
                unit=unit,
                mentions_per_example=getattr(model, "mentions_per_example", 1),
                random_image=args.random_entity_image,
                seed=args.seed,
            )
        else:
            if self.mentions is not None:
                rows = LazyRows(self.mentions)
            collator = RetrieverCollator(self.inputs, entities, random_image=args.random_entity_image, seed=args.seed)
        self._collator = collator
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
        progress = not args.disable_tqdm and self.is_world_process_zero()
        self.inputs.precompute(entities=entities, mentions=self.mentions, progress=progress)
        if self.reranks:
            self.inputs.precompute(mentions=eval_dataset, progress=progress)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(_Progress())

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupingSampler:
        assert self.mentions is not None
        if self.reranks:
            self._sampler = GroupingSampler(range(len(self.train_dataset)), seed=self.args.seed)  # type: ignore[arg-type]
            return self._sampler
        self._sampler = grouping_sampler(self.mentions, self.args.batch_grouping, self.args.group_size, self.args.seed)
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
        """[`MelTrainer.measure`], logged.

        Args:
            eval_dataset (`datasets.Dataset`, *optional*): Mentions; default: those given to the trainer.
            ignore_keys: not used.
            metric_key_prefix (`str`): Goes before every name, with an underscore.

        Returns:
            `dict[str, float]`: the metrics. All processes evaluate, and all get the numbers of the first, so that they
            agree about which checkpoint is best.
        """
        mentions: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if mentions is None:
            raise ValueError("MelTrainer: evaluation needs an eval_dataset.")
        start = time.time()
        if not self.reranks:  # a frozen mention encoder reads the mentions of all evaluations once
            progress = not self.args.disable_tqdm and self.is_world_process_zero()
            self.inputs.precompute(mentions=mentions, progress=progress)
        measured = self._measure(self.inputs, mentions).metrics
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(mentions))
        if self.args.world_size > 1:
            metrics = broadcast_object_list([metrics])[0]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, mentions: datasets.Dataset, **options: Any) -> FullResult | CandidateResult:
        """The full protocol, or for a reranker the candidate protocol, in the precision of training.

        Args:
            mentions (`datasets.Dataset`): Mentions; of a reranker, some that the evaluation's candidates are of.
            options: Further arguments of [`~hf_mel.evaluation.full_evaluator.evaluate_full`] or
                [`~hf_mel.evaluation.candidate_evaluator.evaluate_candidates`].
        """
        return self._measure(self.inputs.without_mention_features(), mentions, **options)

    def _measure(
        self, inputs: ModelInputs, mentions: datasets.Dataset, **options: Any
    ) -> FullResult | CandidateResult:
        options = {
            "batch_size": self.args.per_device_eval_batch_size,
            "progress": not self.args.disable_tqdm and self.is_world_process_zero(),
            **options,
        }
        with self.accelerator.autocast():
            if not self.reranks:
                return evaluate_full(inputs, mentions, self.entities, **options)
            assert self.eval_candidates is not None
            return evaluate_candidates(inputs, mentions, self.entities, self.eval_candidates, **options)


def _check_candidates(model: Any, mentions: datasets.Dataset, lists: CandidateLists | None, entities) -> None:
    if lists is None:
        raise RecipeError(
            f"{type(model).__name__} reranks candidates, and none were given.",
            remedy="Say where they come from: candidates.source in a recipe.",
        )
    lists.of(mentions).rows(entities["entity_id"])


def _some_examples(mentions: datasets.Dataset, unit: str, count: int, seed: int) -> datasets.Dataset:
    """The mentions of randomly chosen contexts or documents, `count` or a few more, in their order; all if there are
    fewer."""
    groups = example_groups(mentions, unit)
    random.Random(seed).shuffle(groups)
    chosen: list[int] = []
    for group in groups:
        if len(chosen) >= count:
            break
        chosen += group
    return mentions.select(sorted(chosen))


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
    """Tells sampler and collator which epoch it is; Accelerate does not, when it resumes inside one on several
    processes."""

    def __init__(self, trainer: MelTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer._sampler.set_epoch(int(state.epoch or 0))
        self.trainer._collator.epoch = int(state.epoch or 0)


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
