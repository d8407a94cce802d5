"""Batches that several processes share, so that P processes with batches of B train as one process with a batch of P·B.

Every process draws the same batch and computes the encodings of its part. The encodings of all parts are gathered, with
their gradients, before the pairs are scored: the negatives of a mention are the entities of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from hf_mel.inference.entity_sources import part_of
from hf_mel.inference.ranking import portable, unlimited_group
from hf_mel.protocols import Encodings

T = TypeVar("T")

#: Key of a batch under which a collator says how many rows there are in all parts. The trainer takes it out.
SHARED_SIZES = "shared_sizes"


def part_rows(rows: Sequence[T], part: tuple[int, int]) -> Sequence[T]:
    """Returns the rows of a part, in order and evenly; the first row for a part that would be empty.

    Args:
        rows (sequence): Rows of a batch, at least one.
        part (`tuple[int, int]`): Number of the part, and how many there are.
    """
    chosen = part_of(len(rows), *part)
    return rows[chosen.start : chosen.stop] or rows[:1]


def unsharded_loader(loader: DataLoader, device: torch.device) -> Any:
    """Prepares a data loader whose every batch goes to all processes."""
    return prepare_data_loader(loader, device, num_processes=1, process_index=0, put_on_device=True)


def made_by_first(make: Callable[[], T]) -> T:
    """Returns in every process what the first one makes, however long it takes. If making it is an error, it is one in all of them.

    Args:
        make (`Callable`): Makes something that can be pickled. Only the first process calls it.
    """
    processes = PartialState()
    if processes.num_processes == 1:
        return make()
    group = unlimited_group()
    outcome: list[Any] = [None, None]
    if processes.is_main_process:
        try:
            outcome[0] = make()
        except Exception as error:  # any kind, because the other processes wait for this one
            outcome[1] = error
    local_error = outcome[1]
    dist.broadcast_object_list([None, portable(local_error)] if local_error else outcome, 0, group)
    dist.destroy_process_group(group)
    if outcome[1] is not None:
        raise local_error or outcome[1]
    return outcome[0]


def wait_for_first() -> None:
    """Waits until the first process comes here, too, however long it takes."""
    made_by_first(lambda: None)


@contextmanager
def gathered_encodings(model: Any, num_mentions: int, num_entities: int) -> Iterator[None]:
    """Lets a retriever's `forward` see the encodings of all processes while the block runs.

    All processes run the block together. Their gradients add up, so that the mean over processes, which distributed
    training takes, is the gradient of one process with the whole batch.

    Args:
        model ([`~hf_mel.protocols.Retriever`]): The module that encodes its part of the batch.
        num_mentions, num_entities (`int`): Sizes of the whole batch.

    Raises:
        `RuntimeError`: `forward` did not call `encode_mentions` and `encode_entities`.
    """
    sizes = {"encode_mentions": num_mentions, "encode_entities": num_entities}
    called = set()

    def gathering(name: str, encode: Any) -> Any:
        def encode_all(*args: Any, **kwargs: Any) -> Encodings:
            called.add(name)
            encodings = encode(*args, **kwargs)
            gathered = gather_encodings(encodings, sizes[name])
            return type(encodings)(**gathered) if hasattr(encodings, "to_tuple") else gathered

        return encode_all

    for name in sizes:
        setattr(model, name, gathering(name, getattr(model, name)))
    try:
        yield
    finally:
        for name in sizes:
            delattr(model, name)
    if called != sizes.keys():
        raise RuntimeError(
            f"{type(model).__name__}.forward does not call encode_mentions and encode_entities, so several processes "
            "cannot share its negatives."
        )


def gather_encodings(encodings: Mapping[str, torch.Tensor | None], total: int) -> dict[str, torch.Tensor]:
    """Gathers the encodings of all processes, in the order of the processes and with gradients.

    Texts may be padded to different lengths: shorter ones get more padding, which is zero.

    Args:
        encodings (`Mapping[str, torch.Tensor]`): Tensors of the rows of this process ([`part_rows`]).
        total (`int`): Number of rows of all processes.
    """
    tensors = {name: tensor for name, tensor in encodings.items() if tensor is not None}
    shapes = gather_object([{name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}])
    counts = [len(part_of(total, k, len(shapes))) for k in range(len(shapes))]
    gathered = {}
    for name, tensor in tensors.items():
        shape = [max(counts), *(max(sizes) for sizes in zip(*(each[name] for each in shapes), strict=True))]
        padding = [
            side for size, wanted in zip(tensor.shape[::-1], shape[::-1], strict=True) for side in (0, wanted - size)
        ]
        # A part that would be empty has one row all the same, and bool has no sum over processes.
        padded = F.pad(tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor, padding)
        parts = _AllGather.apply(padded)
        rows = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        gathered[name] = rows.to(tensor.dtype)
    return gathered


class _AllGather(torch.autograd.Function):
    """Stacks the tensors of all processes [P, ...]. The gradient of a tensor is the sum over all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        """Gathers tensors of one shape."""
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """Adds up the gradients of all processes, and returns that of this process."""
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank()]
