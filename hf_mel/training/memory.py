"""Predicts the peak memory of a training before it starts, and compares it with what the machine has."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import IntervalStrategy

from hf_mel.errors import NotEnoughMemoryError
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.encodings import row_bytes
from hf_mel.inference.execution import evaluation_mode
from hf_mel.protocols import FitsFeatures
from hf_mel.schema import DESCRIBING_COLUMNS

logger = logging.getLogger(__name__)

#: Number of float32 values that an optimizer keeps of each parameter, by the start of its name.
_OPTIMIZER_VALUES = {"adamw_torch": 2, "sgd": 0}
#: Shares of a batch whose activations are measured. A parabola through them gives those of the whole batch. Smaller ones would
#: multiply what parts have by chance, such as entities that several of their mentions mean: 1/8, 1/4 and 1/2 by up to 29, these by 7.
_PROBES = (1 / 4, 1 / 2, 3 / 4)
#: Peak of a step relative to what its forward pass keeps: the gradients of these tensors, and what the allocator does not
#: use again. Measured on `mimic_flags`, `bi-encoder_flags` and `ghmfc_flags` on a CPU (`benchmarks/memory.py`).
_STEP_FACTOR = 3.0
#: Memory of ranking beside the encodings, in bytes: a chunk of entities and a block of scores (`rank`), on a CPU.
_RANKING = 2**26


@dataclass
class MemoryPrediction:
    """Predicted peak memory of a training, in bytes.

    Args:
        start (`int`): What the process, or the GPU, holds already: the weights, the data, and on a CPU the program.
        gradients, optimizer (`int`): One value for each trained parameter, and what the optimizer keeps of it.
        batch (`int`): A step: its tensors, what the forward pass keeps for the backward pass, and their gradients.
        evaluation (`int`): The encoded entities and mentions of a retriever, and the memory of ranking. On a GPU it is 0: they
            stay on the CPU.
    """

    start: int
    gradients: int
    optimizer: int
    batch: int
    evaluation: int

    @property
    def peak(self) -> int:
        """The peak: a batch and an evaluation are never in memory together."""
        return self.start + self.gradients + self.optimizer + max(self.batch, self.evaluation)


def check_memory(trainer: Any) -> MemoryPrediction | None:
    """Logs the predicted peak memory of a training, or why it is not predicted. On a GPU, where it was not measured, it only warns.

    Args:
        trainer ([`~hf_mel.training.trainer.MelTrainer`]): The trainer, before training.

    Returns:
        [`MemoryPrediction`], or `None` if it cannot be predicted.

    Raises:
        NotEnoughMemoryError: The machine or the control group of the process has less.
    """
    reason = _why_not(trainer)
    if reason is not None:
        logger.info("The memory of training is not predicted: %s.", reason)
        return None
    prediction = predict_memory(trainer)
    available = prediction.start + _free_memory(trainer.args.device)
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in asdict(prediction).items())
    logger.info("Training is predicted to need %s of %s GB (%s).", _gb(prediction.peak), _gb(available), parts)
    if prediction.peak > available:
        if prediction.batch >= prediction.evaluation:
            advice = "Lower training.per_device_train_batch_size, or set training.bf16=true"
        else:
            advice = "Evaluate on fewer entities, or with smaller dimensions of the model"
        problem = (
            f"Training is predicted to need {_gb(prediction.peak)} GB ({parts}), and {_gb(available)} GB are there."
        )
        if trainer.args.device.type == "cuda":
            logger.warning("%s Predictions were not measured on GPUs. If memory runs out: %s.", problem, advice)
            return prediction
        raise NotEnoughMemoryError(
            problem, remedy=f"{advice}. To train all the same, set training.check_memory=false."
        )
    return prediction


def predict_memory(trainer: Any) -> MemoryPrediction:
    """Returns the predicted peak memory of a training.

    The activations are measured on parts of the first batch. A prediction leaves the weights, the random numbers and all
    buffers as they were.

    Args:
        trainer ([`~hf_mel.training.trainer.MelTrainer`]): The trainer, before training.
    """
    model, device = trainer.model, trainer.args.device
    start = psutil.Process().memory_info().rss
    if device.type == "cuda":
        start = torch.cuda.memory_allocated(device)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    values = _optimizer_values(trainer.args) or 0
    return MemoryPrediction(
        start, 4 * trained, 4 * values * trained, _batch_bytes(trainer), _evaluation_bytes(trainer)
    )


def _why_not(trainer: Any) -> str | None:
    """Returns why the memory of a training cannot be predicted, or `None`."""
    args = trainer.args
    if args.world_size > 1 or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "it is shared by several processes"
    if args.gradient_checkpointing or args.torch_compile:
        return "activations are computed again, or compiled"
    if isinstance(trainer.model, FitsFeatures):
        return "the model is fitted without gradients"
    if _optimizer_values(args) is None:
        return f"what the optimizer {args.optim.value} keeps is not known"
    if args.device.type not in ("cpu", "cuda"):
        return f"the memory of a device of type {args.device.type!r} is not known"
    return None


def _optimizer_values(args: Any) -> int | None:
    """Returns how many values the optimizer keeps of each parameter, or `None` if that is not known."""
    return next((count for name, count in _OPTIMIZER_VALUES.items() if args.optim.value.startswith(name)), None)


def _batch_bytes(trainer: Any) -> int:
    """Returns the bytes of a batch and of what its forward pass keeps, by a parabola through those of parts of it.

    Each part has the longest texts of the batch, so that its texts are padded as those of the whole batch are.
    """
    size = min(trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
    numbers = _longest_first(trainer, list(trainer.sampler)[:size])
    sizes = sorted({max(1, math.ceil(share * size)) for share in _PROBES}) if size > 8 else [size]
    measured = []
    model = trainer.model
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    was_training, device = model.training, trainer.args.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.train()
        try:
            for count in sizes:
                measured.append(_measured(trainer, numbers[:count]))
        finally:
            model.train(was_training)
            for buffer, before in buffers:
                buffer.data.copy_(before)
    if len(sizes) == 1:
        return int(_STEP_FACTOR * measured[0])
    curve = np.polyfit(sizes, measured, len(sizes) - 1)
    # Parts differ in how many of their entities are the same, so that the parabola may bend down; memory never grows slower.
    return int(_STEP_FACTOR * max(np.polyval(curve, size), measured[-1] * size / sizes[-1]))


def _longest_first(trainer: Any, numbers: list[int]) -> list[int]:
    """Returns row numbers, first those of the longest text of a mention and of the longest text of a gold."""
    examples = trainer.train_dataset.__getitems__(numbers)
    mentions = [example if isinstance(example, list) else [example] for example in examples]
    entities, row_of = trainer.collator.entities, trainer.collator._row_of

    def gold_length(rows: list[Any]) -> int:
        golds = entities.__getitems__([row_of[row["entity_id"]] for row in rows if row["entity_id"] in row_of])
        columns = ("name", *DESCRIBING_COLUMNS)
        return max((sum(len(str(gold.get(name) or "")) for name in columns) for gold in golds), default=0)

    order = range(len(numbers))
    texts = [sum(len(row["text"] or "") for row in rows) for rows in mentions]
    golds = [gold_length(rows) for rows in mentions]
    chosen = dict.fromkeys([max(order, key=texts.__getitem__), max(order, key=golds.__getitem__), *order])
    return [numbers[place] for place in chosen]


def _measured(trainer: Any, numbers: Sequence[int]) -> int:
    """Returns the bytes of a batch of some rows, and of the tensors that its forward pass keeps for the backward pass."""
    batch = trainer._prepare_inputs(trainer.collator(trainer.train_dataset.__getitems__(list(numbers))))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), trainer.accelerator.autocast():
        output = trainer.model(**batch)
    for parameter in trainer.model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    inputs = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in batch.values()}
    del output
    # In the backward pass, the gradients of the largest of these are there, too.
    return sum((inputs | kept).values()) + 2 * max(kept.values(), default=0)


def _evaluation_bytes(trainer: Any) -> int:
    """Returns the bytes of the encodings of a retriever's evaluation, and of ranking; 0 for a reranker and on a GPU."""
    if trainer.reranks or trainer.eval_dataset is None or not len(trainer.eval_dataset):
        return 0
    is_off = trainer.args.eval_strategy == IntervalStrategy.NO and not trainer.args.final_evaluation
    if is_off or trainer.args.device.type == "cuda":  # encodings of entities stay on the CPU
        return 0
    total = _RANKING
    inputs = trainer.inputs
    with evaluation_mode(trainer.model):
        entities, mentions = trainer.eval_entities, trainer.eval_dataset
        total += len(entities) * row_bytes(encode_rows(inputs, entities.select([0]), "entities"))
        # A mention of training, whose features may be cached: each is encoded once in a training.
        total += len(mentions) * row_bytes(encode_rows(inputs, trainer.mentions.select([0]), "mentions"))
    return total


def _free_memory(device: torch.device) -> int:
    """Returns the bytes that a process can still get: of a GPU, or of the machine within its control group."""
    if device.type == "cuda":
        # PyTorch keeps memory for later tensors, which is free for this process alone.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = [psutil.virtual_memory().available]
    for limit, used in (
        ("memory.max", "memory.current"),  # control groups, version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            room = int(Path("/sys/fs/cgroup", limit).read_text()) - _used(Path("/sys/fs/cgroup", used))
            free.append(max(0, room))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    return min(free)


def _used(file: Path) -> int:
    """Returns the bytes that a control group uses, without cached files, which make room."""
    try:
        sizes = dict(line.split() for line in (file.parent / "memory.stat").read_text().splitlines())
        # In version 1, the total includes the group's own.
        cached = int(sizes.get("total_inactive_file", sizes.get("inactive_file", 0)))
    except (OSError, ValueError):
        cached = 0
    return int(file.read_text()) - cached


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
