"""Encodings: named tensors that share their first axis, computed by a retriever once per mention or entity.

A model returns them as a `ModelOutput`, a knowledge base as a plain dict. The functions here take either and return
plain dicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from hf_mel.protocols import Encodings


def num_rows(encodings: Encodings) -> int:
    """Returns the length of the first axis, which all tensors share.

    Raises:
        `ValueError`: The encodings have no tensors, or their first axes differ.
    """
    lengths = {name: len(tensor) for name, tensor in encodings.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"Encodings need tensors with one common first axis, not lengths {lengths}.")
    return next(iter(lengths.values()))


def slice_encodings(encodings: Encodings, index: slice | torch.Tensor | Sequence[int]) -> dict[str, torch.Tensor]:
    """Returns the rows `index` of every tensor: views for a slice, copies for a list or tensor of row numbers."""
    if not isinstance(index, slice | torch.Tensor):
        index = torch.as_tensor(index, dtype=torch.long)
    return {name: tensor[index] for name, tensor in encodings.items()}


def as_float(encodings: Encodings) -> dict[str, torch.Tensor]:
    """Converts floating-point tensors to float32 and leaves the others unchanged."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in encodings.items()}


def concat_encodings(parts: Iterable[Encodings]) -> dict[str, torch.Tensor]:
    """Concatenates the rows of all parts.

    Raises:
        `ValueError`: `parts` is empty, or its members differ in names or in a shape after the first axis.
    """
    parts = list(parts)
    layouts = [{name: tuple(tensor.shape[1:]) for name, tensor in part.items()} for part in parts]
    if not parts:
        raise ValueError("There are no encodings to join.")
    for layout in layouts:
        if layout != layouts[0]:
            raise ValueError(f"Encodings of different shapes cannot be joined: {layouts[0]} and {layout}.")
    return {name: torch.cat([part[name] for part in parts]) for name in layouts[0]}


def to_device(encodings: Encodings, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Moves every tensor to `device`. Tensors that are on it are not copied."""
    return {name: tensor.to(device) for name, tensor in encodings.items()}


def row_lengths(inputs: Encodings) -> np.ndarray:
    """Returns a number for each row of a model's inputs that grows with the length of its text: its integers that are not 0."""
    total = np.zeros(num_rows(inputs), dtype=np.int64)
    for tensor in inputs.values():
        if not tensor.is_floating_point() and tensor.dim() > 1:
            total = total + tensor.flatten(1).count_nonzero(1).cpu().numpy()
    return total


def row_bytes(encodings: Encodings) -> int:
    """Returns the bytes of one row over all tensors."""
    return (
        sum(tensor.element_size() * tensor[0].numel() for tensor in encodings.values()) if num_rows(encodings) else 0
    )
