"""hf_mel.inference.inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def images_per_entity(processor: Any) -> int | None:
    """How many images of an entity the processor reads, `None` for all: its `max_entity_images`, else one."""
    return getattr(processor, "max_entity_images", 1)


def model_inputs(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a processor gave, on the model's device, and floating-point tensors in its type."""
    device, dtype = getattr(model, "device", "cpu"), getattr(model, "dtype", torch.float32)
    return {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in tensors.items()}
