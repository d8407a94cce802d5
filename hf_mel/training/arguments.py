"""Arguments of [`~hf_mel.training.trainer.MelTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import IntervalStrategy, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_mel.training.sampling import BATCH_GROUPINGS


@dataclass
class MelTrainingArguments(TrainingArguments):
    r"""
    `transformers.TrainingArguments` for entity linking: the fields below, and defaults that evaluate over the whole
    knowledge base after every epoch and keep the checkpoint with the best MRR.

    Args:
        head_learning_rate (`float`, *optional*):
            Learning rate of all parameters outside the pretrained encoders, which the model names in
            `backbone_names`. `None`: `learning_rate` everywhere.
        batch_grouping (`str`, *optional*, defaults to `"none"`):
            `"surface"` puts mentions whose surface form ends in the same word side by side, in groups of
            `group_size`, so that a batch holds harder negatives; `"namesakes"` too, but only mentions of different entities;
            `"none"` shuffles.
        group_size (`int`, *optional*, defaults to 4):
            Mentions in a group.
        random_entity_image (`bool`, *optional*, defaults to `True`):
            Whether training shows a random image of an entity that has several. Evaluation always takes the first.
        num_negatives (`int`, *optional*, defaults to 1):
            For a reranker: entities that each mention's gold is trained against, drawn from its candidates. One that
            links whole documents should see whole lists, as in evaluation: one less than the candidates of a mention.
        negatives_from (`int`, *optional*):
            For a reranker: draw negatives from the first so many of the other candidates, the hardest where a list has
            the best first. `None`: from all of them.
        eval_mentions (`int`, *optional*):
            For a reranker: evaluate on a fixed random choice of about this many mentions (whole contexts or documents)
            instead of
            all. Reranking them all after every epoch can cost more than the epoch.
        early_stopping_patience (`int`, *optional*):
            Stop after this many evaluations in a row without a better `metric_for_best_model`.
    """

    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate outside the model's pretrained encoders."}
    )
    batch_grouping: str = field(
        default="none", metadata={"help": "'none'; 'surface' or 'namesakes' for harder negatives."}
    )
    group_size: int = field(default=4, metadata={"help": "Mentions in a group of batch_grouping."})
    random_entity_image: bool = field(default=True, metadata={"help": "Show a random image of each entity."})
    num_negatives: int = field(default=1, metadata={"help": "A reranker's negatives per mention."})
    negatives_from: int | None = field(
        default=None, metadata={"help": "Draw a reranker's negatives from the first so many of the other candidates."}
    )
    eval_mentions: int | None = field(
        default=None, metadata={"help": "A reranker is evaluated on a random choice of this many mentions."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without improvement before training stops."}
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
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1.")
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives={self.num_negatives} must be at least 1.")
        if self.negatives_from is not None and self.negatives_from < 1:
            raise ValueError(f"negatives_from={self.negatives_from} must be at least 1.")
        if self.eval_mentions is not None and self.eval_mentions < 1:
            raise ValueError(f"eval_mentions={self.eval_mentions} must be at least 1.")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(f"early_stopping_patience={self.early_stopping_patience} must be at least 1.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: the processor makes tensors of the columns.")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # or the Trainer refuses bf16, which a CPU can do
        super().__post_init__()
