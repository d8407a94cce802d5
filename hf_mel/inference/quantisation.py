"""Encodings in few bits: integers of 8 or 4 bits, and a scale of each vector.

A vector x of d numbers, the last axis of a tensor, becomes integers k and a scale s with x ≈ s·k. s is the largest |xᵢ|
divided by the largest integer, 127 or 7, and rounded up to bfloat16, so no |kᵢ| exceeds it and |xᵢ - s·kᵢ| ≤ s / 2. A zero
vector has s = 0. Two integers of 4 bits share a byte.

`"int8"` keeps every vector in 8 bits. `"int4"` keeps vectors of tokens, of which an entity has many, in 4 bits, and an
entity's single vectors in 8. Other tensors keep their dtype: masks, and numbers that are no vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from hf_mel.inference import padding

#: Forms of encodings in few bits, by name.
QUANTISED = ("int8", "int4")
#: Ending of the name of a tensor of scales.
SCALES = ".scale"
#: The largest absolute value of a vector. Above it, 7 times a scale that was rounded up may exceed float32.
LARGEST_VALUE = 3e38
_LARGEST = {"int8": 127, "int4": 7}
#: Start of the dtype of such an encoding in a layout, which tells it from a tensor of plain integers.
_SCALED = "scaled "


def quantise(vectors: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds vectors [..., d] to integers.

    Args:
        vectors (`torch.Tensor` `[..., d]`): Floating-point numbers, none above [`LARGEST_VALUE`].
        form (`str`): "int8" or "int4".

    Returns:
        `tuple`: The integers, int8 [..., d] or uint8 [..., ⌈d / 2⌉], and the scales, bfloat16 [...].
    """
    vectors, largest = vectors.float(), _LARGEST[form]
    scales = (
        _rounded_up(vectors.abs().amax(-1) / largest) if vectors.shape[-1] else vectors.new_zeros(vectors.shape[:-1])
    )
    divisors = scales.float().masked_fill(scales == 0, 1)[..., None]
    integers = (vectors / divisors).round_().clamp_(-largest, largest).to(torch.int8)
    return (integers if form == "int8" else _packed(integers)), scales.to(torch.bfloat16)


def dequantise(integers: torch.Tensor, scales: torch.Tensor, width: int) -> torch.Tensor:
    """Returns the vectors [..., d] (float32) of what [`quantise`] gave; `width` is d."""
    integers = _unpacked(integers, width) if integers.dtype == torch.uint8 else integers
    return integers.float().mul_(scales.float()[..., None])


def quantised(encodings: Mapping[str, torch.Tensor], layout: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the tensors in which encodings of n rows are stored: integers, with scales beside them under another name.

    `layout` is that of [`layout_of`]. Vectors whose padding is left out have their number as first axis, in place of n.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in padding.without_padding(encodings, padding.masks_of(layout)).items():
        form = layout[name]["dtype"]
        if form.startswith(_SCALED):
            stored[name], stored[name + SCALES] = quantise(tensor, form.removeprefix(_SCALED))
        else:
            stored[name] = tensor.float() if tensor.is_floating_point() else tensor
    return stored


def dequantised(stored: Mapping[str, torch.Tensor], layout: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the encodings, floating-point ones as float32, of what [`quantised`] gave with the same layout."""
    packed = {
        name: dequantise(stored[name], stored[name + SCALES], spec["shape"][-1])
        if spec["dtype"].startswith(_SCALED)
        else stored[name]
        for name, spec in layout.items()
    }
    return padding.with_padding(packed, layout)


def is_quantised(layout: Mapping[str, Any]) -> bool:
    """Whether encodings of a layout are stored in few bits."""
    return any(spec["dtype"].startswith(_SCALED) for spec in layout.values())


def layout_of(
    encodings: Mapping[str, torch.Tensor], dtype: str, masks: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Returns the dtype and the shape of one row of each encoding: of its vectors, not of its bytes.

    `masks` tells the encodings whose padding is left out ([`~hf_mel.protocols.entity_token_masks`]).
    """
    layout: dict[str, dict[str, Any]] = {}
    for name, tensor in encodings.items():
        form = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_floating_point():
            form = "float32" if tensor.dim() == 1 else _SCALED + _form(dtype, tensor)
        layout[name] = {"dtype": form, "shape": list(tensor.shape[1:])}
    for name, mask in (masks or {}).items():
        layout[name]["mask"] = mask
    return layout


def is_sound(layout: Mapping[str, Any], dtype: str) -> bool:
    """Whether a layout from an untrusted source can be one of encodings that are stored as `dtype`."""
    forms = {_SCALED + form for form in QUANTISED} if dtype in QUANTISED else set()
    scaled = [spec for spec in layout.values() if spec["dtype"].startswith(_SCALED) or "mask" in spec]
    return all(spec["dtype"] in forms and spec["shape"] for spec in scaled) and padding.is_sound(layout)


def stored_layout(layout: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the dtype and the shape of one row of each tensor in which encodings of a layout are stored.

    Where padding is left out, it is the shape of one vector.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for name, spec in padding.packed_layout(layout).items():
        if not spec["dtype"].startswith(_SCALED):
            tensors[name] = {"dtype": spec["dtype"], "shape": list(spec["shape"])}
            continue
        *rows, width = spec["shape"]
        packed = spec["dtype"] == _SCALED + "int4"
        tensors[name] = {"dtype": "uint8" if packed else "int8", "shape": [*rows, -(-width // 2) if packed else width]}
        tensors[name + SCALES] = {"dtype": "bfloat16", "shape": rows}
    return tensors


def _form(dtype: str, tensor: torch.Tensor) -> str:
    """Returns the form of a tensor of vectors [n, …, d]."""
    return "int8" if tensor.dim() == 2 else dtype


def _rounded_up(scales: torch.Tensor) -> torch.Tensor:
    """Rounds scales (float32, not negative) up to numbers that bfloat16 can hold, which are the upper halves of their bits."""
    bits = scales.view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32)


def _packed(integers: torch.Tensor) -> torch.Tensor:
    """Packs integers from -7 to 7 [..., d] two to a byte: the first has the lower half."""
    shifted = F.pad(integers, (0, integers.shape[-1] % 2)).add(8).to(torch.uint8)
    return shifted[..., ::2] | (shifted[..., 1::2] << 4)


def _unpacked(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Returns the integers [..., d] (int8) of bytes [..., ⌈d / 2⌉]."""
    halves = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :width]
    return halves.to(torch.int8).sub_(8)
