"""Device, dtype and mode of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def model_device(model: Any) -> torch.device:
    """Returns the model's device, or the CPU for an object that has none."""
    return torch.device(getattr(model, "device", "cpu"))


def to_model(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Moves processor outputs to the model's device and casts floating-point tensors to its dtype."""
    device, dtype = model_device(model), getattr(model, "dtype", torch.float32)
    return {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in tensors.items()}


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Puts a model in evaluation mode, and back in training mode afterwards if it was training."""
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
