"""Saving models as Hub repositories: weights, configuration, processor and the code that loads them without hf_mel."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hf_mel.files import write_text

#: The parts of a repository and the Auto class that loads each.
_AUTO_CLASSES = {"model": "AutoModel", "config": "AutoConfig", "processor": "AutoProcessor"}


def save_model_repository(model: Any, processor: Any, folder: str | os.PathLike[str]) -> None:
    """Saves model and processor to a folder for `AutoModel.from_pretrained(folder, trust_remote_code=True)`.

    The folder includes the source files of the model, configuration and processor classes, so loading does not need
    hf_mel. Classes that transformers itself ships are saved without code.

    Args:
        model (`PreTrainedModel`): The model.
        processor (`ProcessorMixin`, *optional*): Its processor.
        folder (`str` or `os.PathLike`): Output folder. It is created if needed; files of the same names are replaced.
    """
    registered = []
    for name, part in {"model": model, "config": model.config, "processor": processor}.items():
        part_class = type(part)
        if part is None or part_class.__module__.startswith("transformers.") or "_auto_class" in vars(part_class):
            continue
        part_class.register_for_auto_class(_AUTO_CLASSES[name])
        registered.append(part_class)
    try:
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
    finally:
        # Undone, because other calls of save_pretrained (such as those for checkpoints) should not copy code.
        for part_class in registered:
            del part_class._auto_class


def change_config(folder: str | os.PathLike[str], **fields: Any) -> None:
    """Changes fields of the configuration in the folder of a model. The weights stay as they are.

    Raises:
        MelError: The file cannot be written.
    """
    path = Path(folder, "config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    write_text(path, [json.dumps({**config, **fields}, indent=2, sort_keys=True, ensure_ascii=False), "\n"])
