"""Arguments of [`~hf_mel.training.trainer.MelTrainer`]."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from transformers import IntervalStrategy, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_mel.inference.precision import native_bf16, training_device_type
from hf_mel.training.sampling import BATCH_GROUPINGS

logger = logging.getLogger(__name__)


@dataclass
class MelTrainingArguments(TrainingArguments):
    r"""
    `transformers.TrainingArguments` for entity linking, with the fields below. By default, training evaluates against
    the whole knowledge base after every epoch and keeps the checkpoint with the best MRR.

    Args:
        head_learning_rate (`float`, *optional*):
            Learning rate of all parameters outside the pretrained encoders, which the model lists in
            `backbone_names`. `None`: `learning_rate` everywhere.
        batch_grouping (`str`, *optional*, defaults to `"none"`):
            `"none"` shuffles the mentions. `"surface"` puts mentions whose surface form ends in the same word side by
            side, in groups of `group_size`, so that a batch contains harder negatives. `"namesakes"` does the same with
            mentions of different entities only.
        group_size (`int`, *optional*, defaults to 4):
            Number of mentions in a group.
        random_entity_image (`bool`, *optional*, defaults to `True`):
            Whether training uses a random image of an entity that has several. Evaluation always uses the first.
        num_negatives (`int`, *optional*, defaults to 1):
            For a reranker: number of negatives per mention, drawn from its candidates. A model that links whole
            documents should train on whole lists, as in evaluation: the number of candidates minus one.
        negatives_from (`int`, *optional*):
            For a reranker: draw negatives from this many of the other candidates, counted from the start of the list.
            These are the hardest if the list is sorted by score. `None`: all other candidates.
        fill_short_lists (`bool`, *optional*, defaults to `True`):
            For a reranker: whether random entities of the knowledge base are negatives of a mention that has fewer than
            `num_negatives` other candidates. With `False`, training reads its list as it is, as evaluation does.
        hard_negatives (`int`, *optional*, defaults to 0):
            For a reranker: how many of the `num_negatives` are not drawn, but the first of the other candidates.
        context_negatives (`bool`, *optional*, defaults to `False`):
            For a reranker: whether the golds of the other mentions of its context are negatives of a mention, beside the
            `num_negatives`. A model that reads the whole text would otherwise learn whether an entity is spoken of in it,
            and not whether this mention means it.
        easy_share (`float`, *optional*, defaults to 1.0):
            For a reranker: the share of the easy examples that an epoch trains on, drawn anew in every epoch. An example
            is easy if its mentions are alone in their context, and no other entity than the gold has a name with all words
            of the mention. The others are in every epoch.
        mined_negatives (`int`, *optional*, defaults to 0):
            For a retriever: beside the golds of its mentions, every batch has this many negatives for each of them, from
            the whole knowledge base. They are the entities with the highest scores of the model before training, without
            the gold. An entity that is never a gold is a negative in this way only.
        random_negatives (`int`, *optional*, defaults to 0):
            For a retriever: every batch has this many further entities of the whole knowledge base, drawn at random, which
            are negatives of all its mentions.
        prior_correction (`float`, *optional*, defaults to 0.0):
            For a retriever: add this many times the logarithm of how often an entity is a gold in training to its scores
            inside the loss. With 1.0, the scores do not learn which entities are frequent, so that entities without
            training mentions are not put behind them. For scores that are cosines, take less, such as 0.01. An entity counts
            half a mention more than it has.
        simulated_nil (`float`, *optional*, defaults to 0.0):
            For a retriever that learns NIL: share of the golds of a batch that are left out of it, so that their mentions are
            NIL there. It is for data whose training split has few or no NIL mentions.
        augment_images (`bool` or `str`, *optional*, defaults to `False`):
            For a retriever: mirror, turn, zoom, move and light the images of mentions at random. `"strong"` also cuts, blurs
            and coarsens them, for mentions that show their entity's own image.
        eval_mentions (`int`, *optional*):
            For a reranker: evaluate on a fixed random sample of about this many mentions (whole contexts or documents)
            instead of all. Reranking all of them after every epoch can take longer than the epoch.
        final_evaluation (`bool`, *optional*, defaults to `True`):
            Whether a run ends with an evaluation of the trained model on the validation split, in full precision. Without it
            the results have no validation, and a retriever stores neither a NIL threshold nor the calibration of its links.
            For a large knowledge base it can take longer than a short training.
        early_stopping_patience (`int`, *optional*):
            Stop after this many consecutive evaluations without an improvement of `metric_for_best_model`.
        max_minutes (`float`, *optional*):
            Stop after this many minutes of training, without those of evaluations and checkpoints: processor time of the
            process on a CPU, so that other work on the machine costs nothing, and the clock otherwise. The learning rate
            falls linearly to 0 with the time or the steps, whichever runs out first. A resumed run goes on counting.
        check_memory (`bool`, *optional*, defaults to `True`):
            Whether the peak memory is predicted before training. Training that needs more than there is is refused on a CPU, and
            warned of on a GPU.
        bf16 (`bool` or `str`, *optional*, defaults to `"auto"`):
            Whether to train in bfloat16 mixed precision. `"auto"` is `True` if the processor or GPU computes in bfloat16
            natively, and `False` otherwise or if `fp16` is set. The attribute is always a `bool`.
    """

    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate outside the model's pretrained encoders."}
    )
    batch_grouping: str = field(
        default="none", metadata={"help": "'none', or 'surface' or 'namesakes' for harder negatives."}
    )
    group_size: int = field(default=4, metadata={"help": "Number of mentions in a group of batch_grouping."})
    random_entity_image: bool = field(default=True, metadata={"help": "Use a random image of each entity."})
    num_negatives: int = field(default=1, metadata={"help": "Number of a reranker's negatives per mention."})
    negatives_from: int | None = field(
        default=None, metadata={"help": "Draw a reranker's negatives from this many of the first other candidates."}
    )
    fill_short_lists: bool = field(
        default=True, metadata={"help": "Fill a reranker's lists with random entities up to num_negatives."}
    )
    hard_negatives: int = field(
        default=0, metadata={"help": "How many of a reranker's negatives are the first of the other candidates."}
    )
    context_negatives: bool = field(
        default=False,
        metadata={"help": "A reranker's negatives include the golds of the other mentions of a context."},
    )
    easy_share: float = field(
        default=1.0, metadata={"help": "Share of the easy examples that a reranker sees in an epoch."}
    )
    mined_negatives: int = field(
        default=0, metadata={"help": "Negatives of a retriever's mention from the whole knowledge base."}
    )
    random_negatives: int = field(
        default=0,
        metadata={"help": "Negatives of a retriever's batch, drawn at random from the whole knowledge base."},
    )
    prior_correction: float = field(
        default=0.0, metadata={"help": "Weight of a retriever's correction for how often entities are golds."}
    )
    simulated_nil: float = field(
        default=0.0,
        metadata={"help": "Share of the golds of a retriever's batch that are left out, so that NIL is learned."},
    )
    augment_images: bool | str = field(
        default=False, metadata={"help": "Change the images of a retriever's mentions at random; 'strong': more."}
    )
    eval_mentions: int | None = field(
        default=None, metadata={"help": "Evaluate a reranker on a random sample of about this many mentions."}
    )
    final_evaluation: bool = field(
        default=True, metadata={"help": "Evaluate the trained model on the validation split at the end of a run."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Number of evaluations without improvement before training stops."}
    )
    max_minutes: float | None = field(default=None, metadata={"help": "Minutes of training after which it stops."})
    check_memory: bool = field(
        default=True,
        metadata={"help": "Predict the memory of training, and refuse what does not fit (on a GPU: warn)."},
    )

    bf16: bool | str = field(  # type: ignore[assignment]
        default="auto", metadata={"help": "bfloat16 mixed precision; 'auto': if the hardware has it natively."}
    )
    eval_strategy: IntervalStrategy | str = "epoch"
    save_strategy: SaveStrategy | str = "epoch"
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "eval_mrr"
    greater_is_better: bool | None = True
    save_total_limit: int | None = 2
    logging_steps: float = 10
    report_to: str | list[str] | None = "none"
    remove_unused_columns: bool = False
    seed: int = 0
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self):
        if self.batch_grouping not in BATCH_GROUPINGS:
            raise ValueError(f"batch_grouping={self.batch_grouping!r} is not one of {', '.join(BATCH_GROUPINGS)}.")
        for name in ("group_size", "num_negatives", "negatives_from", "eval_mentions", "early_stopping_patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        for name in ("mined_negatives", "random_negatives", "prior_correction", "hard_negatives"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")
        if self.hard_negatives > self.num_negatives:
            raise ValueError(
                f"hard_negatives={self.hard_negatives} are some of the num_negatives={self.num_negatives}, so not more."
            )
        if not isinstance(self.augment_images, bool) and self.augment_images != "strong":
            raise ValueError(f"augment_images={self.augment_images!r} is not True, False or 'strong'.")
        if not 0 <= self.easy_share <= 1:
            raise ValueError(f"easy_share={self.easy_share} must be between 0 and 1.")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes={self.max_minutes} must be above 0.")
        if self.max_minutes is not None and self.lr_scheduler_type != "linear":
            raise ValueError("max_minutes needs lr_scheduler_type: linear, which it stretches over the time.")
        if not 0 <= self.simulated_nil < 1:
            raise ValueError(f"simulated_nil={self.simulated_nil} must be at least 0 and below 1.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False, because the processor reads the columns.")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # The Trainer refuses bf16 on a CPU unless this is set.
        if self.bf16 == "auto":
            self.bf16 = self._choose_bf16()
        elif not isinstance(self.bf16, bool):
            raise ValueError(f"bf16={self.bf16!r} is not True, False or 'auto'.")
        super().__post_init__()

    def _choose_bf16(self) -> bool:
        if self.fp16:
            return False
        native, reason = native_bf16(training_device_type(self.use_cpu))
        logger.info("Training in %s: %s.", "bfloat16 mixed precision" if native else "float32", reason)
        return native
