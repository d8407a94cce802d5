"""Other people's checkpoints → model folders that `AutoModel.from_pretrained` reads."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_mel.errors import DataFormatError, MelError, RecipeError
from hf_mel.files import write_text
from hf_mel.hub.saving import save_model_repository


@dataclass
class ConversionReport:
    """What became of every key of a checkpoint.

    Args:
        output (`Path`): the model folder.
        converted (`int`): tensors taken over.
        unused (`list[str]`): keys that are the method's but that no score uses.
    """

    output: Path
    converted: int
    unused: list[str] = field(default_factory=list)


def convert_checkpoint(
    method: str,
    state_dict: str | os.PathLike,
    config: str | os.PathLike,
    output: str | os.PathLike,
    tokenizer: str | None = None,
    report: str | os.PathLike | None = None,
) -> ConversionReport:
    """Writes a model folder from published weights.

    Args:
        method (`str`): a folder of `modeling/` with a `convert_<method>.py` that offers `convert_config` and
            `convert_state_dict`.
        state_dict: the weights under their published names: a safetensors file, or a checkpoint of PyTorch, of which
            tensors and plain containers are read and anything else is refused.
        config: a JSON file with the published configuration.
        output: the folder to write; must not exist or be empty.
        tokenizer (`str`, *optional*): Hub id or folder of the tokenizer (and encoder) the network was trained with;
            without it the folder holds no processor, which evaluating and linking need.
        report: a JSON file to write, of every key that found no place, whether the conversion succeeds or not:
            `unused` (the method's, but no score uses them), `unknown`, `missing`, `no_place` and `other_shape`.

    Raises:
        RecipeError: no such method.
        DataFormatError: a file is missing or unreadable, or keys are unknown, missing or of another shape.
        MelError: the output cannot be written, or the tokenizer cannot be loaded.
    """
    from transformers import AutoModel
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    import hf_mel.auto  # noqa: F401 (registers the method's classes with the Auto classes)

    state_dict, config, output = Path(state_dict), Path(config), Path(output)
    try:
        module = import_module(f"hf_mel.modeling.{method}.convert_{method}")
    except ModuleNotFoundError:
        raise RecipeError(f"No conversion for {method!r}.", remedy=f"Known: {', '.join(_convertible())}.") from None
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise MelError("The output is there, and is not an empty folder.", file=output, remedy="Give a new folder.")

    model_config = _call(module.convert_config, _read_json(config), file=config)
    published = _read_state_dict(state_dict)
    weights, unused, unknown = module.convert_state_dict(published)

    model = AutoModel.from_config(model_config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    keys = {
        "unused": list(unused),
        "unknown": list(unknown),
        "missing": sorted(expected.keys() - weights.keys()),
        "no_place": sorted(weights.keys() - expected.keys()),
        "other_shape": [
            f"{key} is {tuple(weights[key].shape)}, the configuration needs {expected[key]}"
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
            f"The weights do not fit the configuration: {shown}.",
            file=state_dict,
            remedy="Check that both are of one run. --report FILE writes every such key.",
        )
    model.load_state_dict(weights)
    processor = None
    if tokenizer is not None:
        try:
            processor_class: Any = PROCESSOR_MAPPING[type(model_config)]
            processor = processor_class.from_backbones(tokenizer)
        except (OSError, ValueError) as error:
            raise MelError(
                f"The tokenizer {tokenizer!r} cannot be loaded ({error}).", remedy="Check --tokenizer."
            ) from error

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as work:
            save_model_repository(model, processor, Path(work) / "model")
            (Path(work) / "model").replace(output)  # an empty folder gives way
    except OSError as error:
        raise MelError(f"Cannot be written ({error}).", file=output, remedy="Give another folder.") from error
    return ConversionReport(output, len(weights), unused)


def _convertible() -> list[str]:
    import hf_mel.modeling

    roots = [Path(path) for path in hf_mel.modeling.__path__]
    return sorted(path.parent.name for root in roots for path in root.glob("*/convert_*.py"))


def _read_state_dict(path: Path) -> Mapping[str, Any]:
    """The tensors of a file by name; of a checkpoint that holds more, its `state_dict`."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataFormatError("No such file.", file=path, remedy="Check --state-dict.") from None
    except pickle.UnpicklingError:
        # torch's own message says how to loosen weights_only; nobody should.
        raise DataFormatError(
            "Refused: a checkpoint of more than tensors and plain containers runs code when it is opened.",
            file=path,
            remedy="Where you trust it, save its state dict with safetensors.torch.save_file.",
        ) from None
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        kind = "safetensors file" if path.suffix == ".safetensors" else "checkpoint of PyTorch"
        raise DataFormatError(
            f"Not a {kind} ({error}).",
            file=path,
            remedy="Save the checkpoint's state dict with safetensors.torch.save_file first.",
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise DataFormatError("Holds no state dict: tensors by name.", file=path, remedy="Check --state-dict.")
    return content


def _call(convert, published: Mapping, *, file: Path):
    try:
        return convert(published)
    except (ValueError, TypeError) as error:
        raise DataFormatError(str(error), file=file, remedy="Compare it with the method's convert_ module.") from error


def _read_json(path: Path) -> Mapping:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataFormatError("No such file.", file=path, remedy="Check --config.") from None
    except OSError as error:
        raise DataFormatError(f"Cannot be read ({error}).", file=path, remedy="Check --config.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataFormatError(f"Not JSON ({error}).", file=path) from None
    if not isinstance(content, Mapping):
        raise DataFormatError(f"Expected a JSON object, found {type(content).__name__}.", file=path)
    return content
