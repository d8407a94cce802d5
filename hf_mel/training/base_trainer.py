"""The base class of the trainers for linking and for pre-training."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import EarlyStoppingCallback, IntervalStrategy, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from hf_mel.errors import RecipeError, TrainingError
from hf_mel.files import write_text
from hf_mel.inference.prefetch import computed_ahead
from hf_mel.locks import LOADING
from hf_mel.protocols import MelProcessor
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.collators import BATCH_IDS, NamesRows
from hf_mel.training.lora import has_lora, load_trained_parameters, merged_state_dict, save_trained_parameters
from hf_mel.training.sampling import GroupingSampler

logger = logging.getLogger(__name__)


class BaseTrainer(Trainer):
    """`transformers.Trainer` with the sampler, the optimizer, and the saving and loading that all tasks share.

    Without workers (`dataloader_num_workers: 0`), a second thread prepares the next batch during a step. It rests while the
    trainer evaluates or saves, because processors cannot run in two threads at once. A callback that calls the processor
    needs `dataloader_num_workers: 1`.

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
        RecipeError: `head_learning_rate` is set, and the model does not name its pretrained parts; or
            `gradient_checkpointing`, and it has no part that can do it.
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
        if args.gradient_checkpointing:
            if not any(hasattr(module, "gradient_checkpointing") for module in model.modules()):
                raise RecipeError(
                    f"No part of {type(model).__name__} can compute its activations again.",
                    remedy="Remove training.gradient_checkpointing.",
                )
            model.supports_gradient_checkpointing = True  # type: ignore[assignment]  # its encoders do
        if args.n_gpu > 1:
            # DataParallel would split a batch whose rows refer to each other by number.
            logger.warning("Using one of %d GPUs. Start with `accelerate launch` to use them all.", args.n_gpu)
            args._n_gpu = 1
        #: Sum and number of the values of each part of the loss since the last log.
        self._parts_of_loss: dict[str, tuple[torch.Tensor, int]] = {}
        self._rows_since_log = 0
        self._since: float | None = None
        #: The batches of an epoch, which a second thread prepares.
        self._ahead: Any = None
        self._preparing = threading.Lock()
        self.processor: Any = processor
        self.collator, self.sampler = collator, sampler
        config = getattr(model, "config", None)
        has_use_cache = hasattr(config, "use_cache")
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            callbacks=[_EpochSetter(self), *(callbacks or [])],
            **kwargs,
        )
        if has_lora(model) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise RecipeError(
                "Checkpoints of LoRA are not written with FSDP or DeepSpeed.",
                remedy="Remove model.lora, training.fsdp or training.deepspeed.",
            )
        # The loss is a mean over the batch, whatever keywords `forward` accepts, so the Trainer must divide it when it
        # accumulates gradients.
        self.model_accepts_loss_kwargs = False
        if config is not None and not has_use_cache and hasattr(config, "use_cache"):
            del config.use_cache  # The Trainer sets it on every model, and it would be saved in config.json.
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self.clock = None if args.max_minutes is None else _TrainingClock(60 * args.max_minutes)
        if self.clock is not None:
            self.add_callback(self.clock)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(_Progress())

    @property
    def shows_progress(self) -> bool:
        """Whether this process shows progress bars."""
        return not self.args.disable_tqdm and self.is_world_process_zero()

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupingSampler | None:
        return self.sampler

    def get_train_dataloader(self) -> Any:
        """Returns the data loader of the training data, whose batches name their rows."""
        plain = self.data_collator
        self.data_collator = NamesRows(plain)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Returns the batches of a step, which a second thread has prepared during the step before it."""
        if self.args.dataloader_num_workers == 0 and self.args.world_size == 1:
            if self._ahead is None:
                self._ahead = computed_ahead(self._one_by_one(epoch_iterator), ahead=0)
            epoch_iterator = self._ahead
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._run_epoch(*args, **kwargs)
        finally:
            if self._ahead is not None:
                self._ahead.close()  # The loader counts its epochs when it ends, which must not be during the next one.
            self._ahead = None

    def _one_by_one(self, batches: Iterator[Any]) -> Iterator[Any]:
        end = object()
        while True:
            with self._preparing:
                batch = next(batches, end)
            if batch is end:
                return
            yield batch

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if not (self.control.should_evaluate or self.control.should_save):
            super()._maybe_log_save_evaluate(*args, **kwargs)
            return
        with self._preparing:  # by the processor, which evaluation and saving need, too
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Creates the Trainer's scheduler, or with `max_minutes` one that also falls with the time.

        Args:
            num_training_steps (`int`): Number of steps.
            optimizer (`torch.optim.Optimizer`, *optional*): The optimizer. Default: that of the trainer.
        """
        if self.clock is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        clock, warmup = self.clock, self.args.get_warmup_steps(num_training_steps) / max(1, num_training_steps)

        def factor(step: int) -> float:
            done = min(1.0, max(step / max(1, num_training_steps), clock.share))
            return done / warmup if done < warmup else (1 - done) / (1 - warmup) if warmup < 1 else 1.0

        chosen: Any = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = LambdaLR(chosen, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

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
        if has_lora(self.model):
            load_trained_parameters(self.model, folder)
            return
        with LOADING:
            saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Does the forward and backward pass of a batch, whose rows are named under [`BATCH_IDS`].

        Raises:
            TrainingError: the loss is nan or infinite. The ids of the rows are written beside the checkpoints.
        """
        ids = inputs.pop(BATCH_IDS, [])
        self._since = time.perf_counter() if self._since is None else self._since
        self._rows_since_log += len(ids)
        loss = super().training_step(model, inputs, *args, **kwargs)
        # The Trainer would log the mean of the last losses instead, and go on.
        if not torch.isfinite(loss):
            raise self._not_finite(f"The loss is {loss.item()}", self.state.global_step + 1, ids)
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Computes the loss of a batch, and keeps its parts for the log, if the model returns them as `losses` or `task_losses`."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training and isinstance(outputs, Mapping):
            for name, part in (outputs.get("losses") or outputs.get("task_losses") or {}).items():
                total, count = self._parts_of_loss.get(name, (0, 0))
                self._parts_of_loss[name] = (total + part.detach(), count + 1)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs as the Trainer does, and with a training loss its parts (`loss_<name>`) and `rows_per_second`.

        A row is a mention or a post. Both are of this process, but for the rows of a batch that processes share.
        """
        if "loss" in logs and self._since is not None:
            logs |= {f"loss_{name}": float(total / count) for name, (total, count) in self._parts_of_loss.items()}
            logs["rows_per_second"] = round(self._rows_since_log / (time.perf_counter() - self._since), 3)
            self.restart_log_interval()
        super().log(logs, *args, **kwargs)

    def restart_log_interval(self) -> None:
        """Forgets what was counted since the last log, so that evaluations and checkpoints do not count as training."""
        self._parts_of_loss.clear()
        self._rows_since_log, self._since = 0, None

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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Saves a plain model, and of one with LoRA what training goes on from, too, in a checkpoint."""
        if not has_lora(self.model):
            super()._save(output_dir, state_dict)
            return
        super()._save(output_dir, merged_state_dict(self.model))
        if (
            self.args.should_save
            and output_dir is not None
            and Path(output_dir).name.startswith(PREFIX_CHECKPOINT_DIR)
        ):
            save_trained_parameters(self.model, output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model and the processor.

        Args:
            output_dir (`str`, *optional*): The folder. Default: the folder in the training arguments.
        """
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.processor.save_pretrained(output_dir or self.args.output_dir)


class _TrainingClock(TrainerCallback, ExportableState):
    """Stops training after a time, which evaluations and checkpoints do not count for, and is saved in checkpoints.

    On a CPU it is the processor time of the process.

    Args:
        budget (`float`): Seconds of training.
        spent (`float`, *optional*, defaults to 0.0): Seconds that have been spent.
    """

    def __init__(self, budget: float, spent: float = 0.0):
        self.budget, self.spent = budget, spent
        self._mark: float | None = None
        self._now = time.perf_counter

    @property
    def share(self) -> float:
        """The share of the budget that is spent."""
        return min(1.0, self.spent / self.budget)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {"args": {"budget": self.budget, "spent": self.spent}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        kept = (state.stateful_callbacks or {}).get(type(self).__name__)
        if isinstance(kept, dict):  # of the checkpoint from which training goes on
            self.spent = kept["args"]["spent"]
        self._now = time.process_time if args.device.type == "cpu" else time.perf_counter
        self._mark = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        assert self._mark is not None
        now = self._now()
        self.spent, self._mark = self.spent + now - self._mark, now
        if args.world_size > 1:
            self.spent = broadcast_object_list([self.spent])[0]  # all processes stop after the same step
        if self.spent >= self.budget:
            control.should_training_stop = True
            # With strategies by epoch, the Trainer itself evaluates and saves when training stops.
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.STEPS
            control.should_save |= args.save_strategy == SaveStrategy.STEPS
        return control

    def on_evaluate(self, args, state, control, **kwargs):
        self._mark = self._now()

    def on_save(self, args, state, control, **kwargs):
        self._mark = self._now()


class _EpochSetter(TrainerCallback):
    """Sets the epoch of sampler and collator. Accelerate does not when several processes resume inside an epoch."""

    def __init__(self, trainer: BaseTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int(state.epoch or 0)
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(epoch)
        self.trainer.collator.epoch = epoch

    def on_evaluate(self, args, state, control, **kwargs):
        self.trainer.restart_log_interval()

    def on_save(self, args, state, control, **kwargs):
        self.trainer.restart_log_interval()


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
