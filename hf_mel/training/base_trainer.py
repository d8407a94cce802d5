"""The base class of the trainers for linking and for pre-training."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerCallback

from hf_mel.errors import RecipeError, TrainingError
from hf_mel.files import write_text
from hf_mel.protocols import MelProcessor
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.collators import BATCH_IDS
from hf_mel.training.sampling import GroupingSampler

logger = logging.getLogger(__name__)


class BaseTrainer(Trainer):
    """`transformers.Trainer` with the sampler, the optimizer, and the saving and loading that all tasks share.

    Args:
        model (`nn.Module`): The model.
        args ([`~hf_mel.training.arguments.MelTrainingArguments`]): The training arguments. The process uses one GPU,
            even if several are visible.
        processor ([`~hf_mel.protocols.MelProcessor`]): Saved with every checkpoint. It is not passed to the Trainer as
            its `processing_class`: the Trainer would write the tokenizer's special tokens into the configuration of the
            text encoder, and would not accept a processor without a tokenizer.
        collator: Turns rows into a batch. Its attribute `epoch` is set at the start of every epoch.
        sampler ([`~hf_mel.training.sampling.GroupingSampler`], *optional*): Order of the training data.
        callbacks (`list[TrainerCallback]`, *optional*): Further callbacks.
        kwargs: Further arguments of `transformers.Trainer`.

    Raises:
        RecipeError: `head_learning_rate` is set, and the model does not name its pretrained parts.
    """

    args: MelTrainingArguments
    model: Any

    def __init__(
        self,
        model: nn.Module,
        args: MelTrainingArguments,
        *,
        processor: MelProcessor,
        collator: Any,
        sampler: GroupingSampler | None,
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
            # DataParallel would split a batch whose rows refer to each other by number.
            logger.warning("Using one of %d GPUs. Start with `accelerate launch` to use them all.", args.n_gpu)
            args._n_gpu = 1
        self.processor: Any = processor
        self.collator, self.sampler = collator, sampler
        collator.names_rows = True
        config = getattr(model, "config", None)
        has_use_cache = hasattr(config, "use_cache")
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            callbacks=[_EpochSetter(self), *(callbacks or [])],
            **kwargs,
        )
        # The loss is a mean over the batch, whatever keywords `forward` accepts, so the Trainer must divide it when it
        # accumulates gradients.
        self.model_accepts_loss_kwargs = False
        if config is not None and not has_use_cache and hasattr(config, "use_cache"):
            del config.use_cache  # The Trainer sets it on every model, and it would be saved in config.json.
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(_Progress())

    @property
    def shows_progress(self) -> bool:
        """Whether this process shows progress bars."""
        return not self.args.disable_tqdm and self.is_world_process_zero()

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupingSampler | None:
        return self.sampler

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Creates the Trainer's optimizer, with separate groups for parameters inside and outside the encoders.

        As in the Trainer, biases and LayerNorm have no weight decay.
        """
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
        """Loads the weights of a checkpoint. The Trainer would silently skip weights that saving renames (ViT)."""
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Does the forward and backward pass of a batch, whose rows the collator names under [`BATCH_IDS`].

        Raises:
            TrainingError: the loss is nan or infinite. The ids of the rows are written beside the checkpoints.
        """
        ids = inputs.pop(BATCH_IDS, [])
        loss = super().training_step(model, inputs, *args, **kwargs)
        # The Trainer would log the mean of the last losses instead, and go on.
        if not torch.isfinite(loss):
            raise self._not_finite(f"The loss is {loss.item()}", self.state.global_step + 1, ids)
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluates a batch, as the Trainer does."""
        inputs.pop(BATCH_IDS, None)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves a checkpoint.

        Raises:
            TrainingError: a weight is nan or infinite, or the checkpoint cannot be written. Earlier ones stay.
        """
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise self._not_finite(f"The weight {name} has become nan or infinite", self.state.global_step, [])
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise TrainingError(
                f"The checkpoint of step {self.state.global_step} cannot be written ({error}).",
                file=self.args.output_dir,
                remedy="Make room on the disk, and repeat the command with --resume. It continues from the checkpoint before.",
            ) from error

    def _not_finite(self, problem: str, step: int, ids: Sequence[str]) -> TrainingError:
        """Returns the error of a training that has left the numbers, and writes the ids of the batch, if there are any."""
        folder = Path(self.args.output_dir or ".")
        last = max(folder.glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime, default=None)
        kept = f"The last good checkpoint is {last.parent}." if last else "No checkpoint was saved before."
        where = ""
        if ids:
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"not_finite-{self.args.process_index}.json"
            content = {"step": step, "epoch": self.state.epoch, "problem": problem, "ids": list(ids)}
            write_text(file, [json.dumps(content, indent=1), "\n"])
            where = f" The ids of its batch are in {file}."
        return TrainingError(
            f"{problem} at step {step}.{where} {kept}",
            remedy=f"{'Look at these rows, or train' if ids else 'Train'} with a lower training.learning_rate or without half "
            "precision (training.bf16=false).",
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model and the processor.

        Args:
            output_dir (`str`, *optional*): The folder. Default: the folder in the training arguments.
        """
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.processor.save_pretrained(output_dir or self.args.output_dir)


class _EpochSetter(TrainerCallback):
    """Sets the epoch of sampler and collator. Accelerate does not when several processes resume inside an epoch."""

    def __init__(self, trainer: BaseTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int(state.epoch or 0)
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(epoch)
        self.trainer.collator.epoch = epoch


class _Progress(ProgressCallback):
    """Progress bar with the latest loss, and one line for each evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        if "eval_mrr" in logs:
            hits = f", H@1 {100 * logs['eval_hits@1']:.1f}" if "eval_hits@1" in logs else ""
            self.training_bar.write(f"epoch {state.epoch:.3g}: validation MRR {100 * logs['eval_mrr']:.1f}{hits}")
        elif "eval_loss" in logs:
            self.training_bar.write(f"epoch {state.epoch:.3g}: validation loss {logs['eval_loss']:.3f}")
