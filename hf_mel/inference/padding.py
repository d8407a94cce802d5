"""Vectors of tokens without padding: in a file, those of all rows follow one another.

A retriever says which encodings of entities have padding that no score reads, and which mask tells it
([`~hf_mel.protocols.entity_token_masks`]). The layout of such an encoding [N, L, …] names the mask, under "mask". A file has the
T vectors where the mask [N, L] is True, the mask in bits, and for each row the number of its first vector. When it is read,
padding is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

#: Ending of the name of a tensor with the number of the first vector of each row; the start is the name of a mask.
FIRST = ".first"


def masks_of(layout: Mapping[str, Any]) -> dict[str, str]:
    """Returns the encodings of a layout that are stored without padding, and the names of their masks."""
    return {name: spec["mask"] for name, spec in layout.items() if "mask" in spec}


def without_padding(encodings: Mapping[str, torch.Tensor], masks: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Returns encodings of N rows with vectors [T, …] in place of [N, L, …], and masks [N, ⌈L / 8⌉] of bits."""
    packed = {name: tensor[encodings[masks[name]]] if name in masks else tensor for name, tensor in encodings.items()}
    return packed | {mask: torch.from_numpy(np.packbits(encodings[mask].numpy(), axis=-1)) for mask in masks.values()}


def with_padding(packed: Mapping[str, torch.Tensor], layout: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the encodings of what [`without_padding`] gave, zero where there is padding."""
    masks = masks_of(layout)
    restored = dict(packed) | {mask: _mask(packed[mask], layout[mask]) for mask in masks.values()}
    for name, mask in masks.items():
        kept, vectors = restored[mask].numpy(), packed[name].numpy()
        rows = np.zeros((kept.size, *vectors.shape[1:]), vectors.dtype)  # whose pages of padding alone take no memory
        rows[np.flatnonzero(kept)] = vectors
        restored[name] = torch.from_numpy(rows).view(*kept.shape, *vectors.shape[1:])
    return restored


def packed_layout(layout: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the dtype, and the shape of one row or vector, of each tensor of a file whose encodings have a layout."""
    masks = masks_of(layout)
    packed = {
        name: {"dtype": spec["dtype"], "shape": spec["shape"][1:] if name in masks else spec["shape"]}
        for name, spec in layout.items()
    }
    for mask in masks.values():
        packed[mask] = {"dtype": "uint8", "shape": [-(-layout[mask]["shape"][0] // 8)]}
        packed[mask + FIRST] = {"dtype": "int64", "shape": []}
    return packed


def first_vectors(packed: Mapping[str, torch.Tensor], layout: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the tensors [N] of a file of N packed rows that tell the first vector of each."""
    lengths = {mask: _mask(packed[mask], layout[mask]).sum(1) for mask in masks_of(layout).values()}
    return {mask + FIRST: length.cumsum(0) - length for mask, length in lengths.items()}


def num_vectors(file: Mapping[str, torch.Tensor], layout: Mapping[str, Any]) -> dict[str, int]:
    """Returns for each mask the number of vectors of all rows of a file, of which it has at least one."""
    return {
        mask: int(file[mask + FIRST][-1] + _mask(file[mask][-1:], layout[mask]).sum())
        for mask in masks_of(layout).values()
    }


def vectors_of_rows(
    file: Mapping[str, torch.Tensor], rows: slice | torch.Tensor, layout: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns for each mask the numbers of the vectors of some rows, row by row.

    Raises:
        `ValueError`: The file has no such vectors.
    """
    numbers = {}
    for name, mask in masks_of(layout).items():
        lengths = _mask(file[mask][rows], layout[mask]).sum(1).numpy()
        before = lengths.cumsum() - lengths
        vectors = np.repeat(file[mask + FIRST][rows].numpy() - before, lengths) + np.arange(lengths.sum())
        if len(vectors) and not 0 <= vectors.min() <= vectors.max() < len(file[name]):
            raise ValueError(f"{mask}{FIRST} does not fit {mask}")
        numbers[mask] = vectors
    return numbers


def is_sound(layout: Mapping[str, Any]) -> bool:
    """Whether the masks that a layout from an untrusted source names are masks of its encodings."""
    masks = masks_of(layout)
    return all(
        isinstance(mask, str)
        and mask not in masks
        and len(layout[name]["shape"]) > 1
        and layout.get(mask) == {"dtype": "bool", "shape": layout[name]["shape"][:1]}
        for name, mask in masks.items()
    )


def _mask(bits: torch.Tensor, spec: Mapping[str, Any]) -> torch.Tensor:
    """Returns a mask [N, L] of bits [N, ⌈L / 8⌉]; `spec` has the shape [L]."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=spec["shape"][0]).view(np.bool_))
