"""Conversion of published checkpoints to model folders that `AutoModel.from_pretrained` reads."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from hf_mel.errors import DataFormatError, MelError, RecipeError
from hf_mel.files import link_target, write_text
from hf_mel.hub.saving import save_model_repository
from hf_mel.locks import LOADING


def convert_checkpoint(
    method: str,
    state_dict: str | os.PathLike,
    config: str | os.PathLike,
    output: str | os.PathLike,
    tokenizer: str | None = None,
    report: str | os.PathLike | None = None,
) -> tuple[int, list[str]]:
    """Converts published weights to a model folder.

    Args:
        method (`str`): Name of the method: a folder of `modeling/` with a module `convert_<method>.py` that defines
            `convert_config` and `convert_state_dict`, and optionally `PROCESSOR_OPTIONS`.
        state_dict (`str` or `os.PathLike`): The published weights, a safetensors file or a PyTorch checkpoint. Only
            tensors and plain containers are unpickled; anything else is refused.
        config (`str` or `os.PathLike`): The published configuration, a JSON file.
        output (`str` or `os.PathLike`): Output folder. It must be empty or not exist.
        tokenizer (`str`, *optional*): Hub id or folder of the tokenizer (and encoder) the network was trained with.
            Without it the output has no processor, which evaluation and linking need.
        report (`str` or `os.PathLike`, *optional*): A JSON file for the keys that do not match, written even if the
            conversion fails: `unused` (known to the method but not used by any score), `unknown`, `missing`, `no_place`
            and `other_shape`.

    Returns:
        The number of converted tensors, and the unused keys.

    Raises:
        RecipeError: The method has no conversion.
        DataFormatError: A file is missing or unreadable, or a key is unknown, missing or of another shape.
        MelError: The output cannot be written, or the tokenizer cannot be loaded.
    """
    state_dict, config, output = Path(state_dict), Path(config), link_target(output)
    try:
        module = import_module(f"hf_mel.modeling.{method}.convert_{method}")
    except ModuleNotFoundError:
        raise RecipeError(
            f"The method {method!r} has no conversion.", remedy=f"Use one of: {', '.join(_convertible_methods())}."
        ) from None
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise MelError("The output exists and is not an empty folder.", file=output, remedy="Give a new folder.")

    published_config = _read_config(config)
    try:
        model_config = module.convert_config(published_config)
    except (ValueError, TypeError) as error:
        raise DataFormatError(
            str(error), file=config, remedy=f"Compare it with convert_config in convert_{method}.py."
        ) from error
    weights, unused, unknown = module.convert_state_dict(read_state_dict(state_dict))

    with LOADING:
        model = AutoModel.from_config(model_config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    keys = {
        "unused": list(unused),
        "unknown": list(unknown),
        "missing": sorted(expected.keys() - weights.keys()),
        "no_place": sorted(weights.keys() - expected.keys()),
        "other_shape": [
            f"{key} has shape {tuple(weights[key].shape)}, the configuration needs {expected[key]}"
            for key in sorted(expected.keys() & weights.keys())
            if tuple(weights[key].shape) != expected[key]
        ],
    }
    if report is not None:
        write_text(report, [json.dumps(keys, indent=2, ensure_ascii=False) + "\n"])
    problems = [f"unknown key {key}" for key in keys["unknown"]]
    problems += [f"missing {key}" for key in keys["missing"]]
    problems += [f"no place for {key}" for key in keys["no_place"]]
    problems += keys["other_shape"]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise DataFormatError(
            f"The weights do not match the configuration: {shown}.",
            file=state_dict,
            remedy="Check that both belong to the same run. --report FILE lists all keys that do not match.",
        )
    model.load_state_dict(weights)
    processor = None
    if tokenizer is not None:
        try:
            processor_class: Any = PROCESSOR_MAPPING[type(model_config)]
            processor = processor_class.from_backbones(tokenizer, **getattr(module, "PROCESSOR_OPTIONS", {}))
        except (OSError, ValueError) as error:
            raise MelError(
                f"The tokenizer {tokenizer!r} cannot be loaded ({error}).", remedy="Check --tokenizer."
            ) from error

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as work:
            save_model_repository(model, processor, Path(work) / "model")
            (Path(work) / "model").replace(output)
    except OSError as error:
        raise MelError(
            f"The output cannot be written ({error}).", file=output, remedy="Give another folder."
        ) from error
    return len(weights), unused


def read_state_dict(path: Path) -> Mapping[str, torch.Tensor]:
    """Reads the tensors of a safetensors file or a PyTorch checkpoint, or those under its key `state_dict`.

    Raises:
        DataFormatError: The file is missing, unreadable, holds more than tensors and plain containers, or holds no state
            dict.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataFormatError("The file does not exist.", file=path, remedy="Check --state-dict.") from None
    except pickle.UnpicklingError:
        # torch's own message explains how to switch weights_only off, which would run the file's code.
        raise DataFormatError(
            "The checkpoint was refused: it holds more than tensors and plain containers and would run code.",
            file=path,
            remedy="If you trust it, save its state dict with safetensors.torch.save_file.",
        ) from None
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        kind = "safetensors file" if path.suffix == ".safetensors" else "PyTorch checkpoint"
        raise DataFormatError(
            f"The file is not a {kind} ({error}).",
            file=path,
            remedy="Save the checkpoint's state dict with safetensors.torch.save_file first.",
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise DataFormatError(
            "The file holds no state dict, that is, tensors by name.", file=path, remedy="Check --state-dict."
        )
    return content


def _convertible_methods() -> list[str]:
    roots = import_module("hf_mel.modeling").__path__
    return sorted(file.parent.name for root in roots for file in Path(root).glob("*/convert_*.py"))


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataFormatError("The file does not exist.", file=path, remedy="Check --config.") from None
    except OSError as error:
        raise DataFormatError(f"The file cannot be read ({error}).", file=path, remedy="Check --config.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataFormatError(f"The file is not JSON ({error}).", file=path, remedy="Check --config.") from None
    if not isinstance(content, Mapping):
        raise DataFormatError(
            f"The file holds a {type(content).__name__}, not a JSON object.", file=path, remedy="Check --config."
        )
    return content
