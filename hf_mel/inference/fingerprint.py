"""Who made these encodings: enough of a model and a processor to tell, later, whether others would make the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_mel.inference.probe import _image, _probe
from hf_mel.protocols import MelProcessor

# Configuration fields that change no encoding and no score. A name that starts with "_" is left out as well.
_SILENT = {
    "architectures",
    "auto_map",
    "dtype",
    "gradient_checkpointing",
    "nil_threshold",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def describe_model(model: Any) -> dict[str, Any]:
    """What identifies a model: `name`, `revision`, `type`, `dtype`, `weights` (sha256) and `config` (what scores see).

    A local folder is recorded by its last part only, so that a published knowledge base tells nobody's home directory.
    """
    config = getattr(model, "config", None)
    name = str(getattr(config, "name_or_path", "") or type(model).__name__)
    return {
        "name": Path(name).resolve().name if Path(name).exists() else name,
        "revision": getattr(config, "_commit_hash", None),
        "type": getattr(config, "model_type", type(model).__name__),
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "weights": model_fingerprint(model),
        "config": json.loads(json.dumps(_audible(config.to_dict()), default=str)) if config is not None else {},
    }


def describe_processor(processor: MelProcessor, *, posts: bool = False) -> dict[str, Any]:
    """What identifies a processor on the entity side: `type`, and `tensors`, a sha256 of what it makes of fixed rows.

    Of a model that knows entities by `posts` the rows are posts: what is made of an entity is vectors that came of them.

    Comparing what it does, not how it is saved, is safe against a processor that was saved by another version of
    transformers, or whose mention side alone changed.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_probe(processor, _image(), posts).items()):
        # Floats rounded, since resizing and normalising may differ in the last bit between machines.
        values = (tensor.float() * 100).round().to(torch.int64) if tensor.is_floating_point() else tensor.long()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(values.contiguous().numpy().tobytes())
    return {"type": type(processor).__name__, "tensors": digest.hexdigest()}


def model_difference(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """Why two of [`describe_model`] are not the same model, or `None` if they are.

    Configuration fields that only one of the two knows are not compared: they come with another transformers version.
    """
    if recorded["type"] != current["type"]:
        return f"it is a {current['type']!r}, not a {recorded['type']!r}"
    if changed := list(_changed(recorded["config"], current["config"], "")):
        return f"its configuration differs: {'; '.join(changed[:3])}"
    if recorded["dtype"] != current["dtype"]:
        return f"its weights are {current['dtype']}, not {recorded['dtype']}"
    return "its weights differ (was it trained since?)" if recorded["weights"] != current["weights"] else None


def processor_difference(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """Why two of [`describe_processor`] make different tensors, or `None` if they make the same."""
    if recorded["type"] != current["type"]:
        return f"it is a {current['type']}, not a {recorded['type']}"
    return "it makes other tensors of the same entity" if recorded["tensors"] != current["tensors"] else None


def _audible(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _audible(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _SILENT and not str(key).startswith("_")
    }


def _changed(recorded: Mapping[str, Any], current: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in sorted(recorded.keys() & current.keys()):
        old, new = recorded[key], current[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changed(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} is {_short(new)}, was {_short(old)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def model_fingerprint(model: Any) -> str:
    """sha256 over names, types, shapes and values of all weights: the same for the same weights wherever they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
