"""Fingerprints of the model and processor that produced a set of encodings, to detect a mismatch later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_mel.inference.probe import entity_side_tensors, probe_image
from hf_mel.protocols import MelProcessor

#: Configuration fields that change no encoding and no score. Fields that start with "_" are ignored, too.
_IGNORED_FIELDS = {
    "architectures",
    "auto_map",
    "dtype",
    "gradient_checkpointing",
    "link_calibration",
    "name_weight",
    "nil_threshold",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def describe_model(model: Any) -> dict[str, Any]:
    """Returns what identifies a model: `name`, `revision`, `type`, `dtype`, `weights` (sha256), and the fields of
    `config` that change encodings or scores.

    Of a local folder only the last part is recorded, so that a published knowledge base shows no home directory.
    """
    config = getattr(model, "config", None)
    name = str(getattr(config, "name_or_path", "") or type(model).__name__)
    return {
        "name": Path(name).resolve().name if Path(name).exists() else name,
        "revision": getattr(config, "_commit_hash", None),
        "type": getattr(config, "model_type", type(model).__name__),
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "weights": model_fingerprint(model),
        "config": json.loads(json.dumps(_scoring_fields(config.to_dict()), default=str)) if config is not None else {},
    }


def describe_processor(processor: MelProcessor, *, posts: bool = False) -> dict[str, Any]:
    """Returns what identifies a processor on the entity side: `type`, and `tensors`, a sha256 of its output for fixed
    rows.

    Comparing outputs instead of saved files ignores differences that do not matter: files saved by another version of
    transformers, and changes of the mention side alone.

    Args:
        processor ([`~hf_mel.protocols.MelProcessor`]): The processor.
        posts (`bool`): Whether the model represents entities by posts. The rows are posts then, because entities reach
            the processor only as vectors computed from posts.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(entity_side_tensors(processor, probe_image(), posts=posts).items()):
        # Floats are rounded, because resizing and normalising may differ in the last bit between machines.
        values = (tensor.float() * 100).round().to(torch.int64) if tensor.is_floating_point() else tensor.long()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(values.contiguous().numpy().tobytes())
    return {"type": type(processor).__name__, "tensors": digest.hexdigest()}


def model_difference(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """Returns why two results of [`describe_model`] are different models, or `None` if they are the same.

    Configuration fields that only one of them has are not compared, because they come from another version of
    transformers.
    """
    if recorded["type"] != current["type"]:
        return f"it is a {current['type']!r}, not a {recorded['type']!r}"
    if changed := list(_changed_fields(recorded["config"], current["config"], "")):
        return f"its configuration differs: {'; '.join(changed[:3])}"
    if recorded["dtype"] != current["dtype"]:
        return f"its weights are {current['dtype']}, not {recorded['dtype']}"
    return "its weights differ (was it trained since?)" if recorded["weights"] != current["weights"] else None


def processor_difference(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """Returns why two results of [`describe_processor`] produce different tensors, or `None` if they produce the same."""
    if recorded["type"] != current["type"]:
        return f"it is a {current['type']}, not a {recorded['type']}"
    return "it makes other tensors of the same entity" if recorded["tensors"] != current["tensors"] else None


def _scoring_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _scoring_fields(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _IGNORED_FIELDS and not str(key).startswith("_")
    }


def _changed_fields(recorded: Mapping[str, Any], current: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in sorted(recorded.keys() & current.keys()):
        old, new = recorded[key], current[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changed_fields(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} is {_abbreviated_repr(new)}, was {_abbreviated_repr(old)}"


def _abbreviated_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def model_fingerprint(model: Any) -> str:
    """Returns the sha256 of names, dtypes, shapes and values of all weights, whatever device they are on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
