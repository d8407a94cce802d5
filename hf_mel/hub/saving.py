"""Writing a model repository: weights, configuration, processor, and the code that loads them without this package."""

from __future__ import annotations

import os
from typing import Any

#: Attributes of a model object and the Auto class that finds each in a repository.
_AUTO_CLASSES = (("model", "AutoModel"), ("config", "AutoConfig"), ("processor", "AutoProcessor"))


def save_model_repository(model: Any, processor: Any, folder: str | os.PathLike[str]) -> None:
    """Saves model and processor into one folder that `AutoModel.from_pretrained(folder, trust_remote_code=True)` reads.

    The folder carries the source files of the three classes, so hf_mel need not be installed where it is loaded.
    Classes that transformers itself ships need no code and bring none.

    Args:
        model (`PreTrainedModel`): The model.
        processor (`ProcessorMixin`, *optional*): Its processor.
        folder (`str` or `os.PathLike`): Where to; made if needed, files of the same names are replaced.
    """
    registered = []
    objects = {"model": model, "config": model.config, "processor": processor}
    for name, auto_class in _AUTO_CLASSES:
        kind = type(objects[name])
        if objects[name] is None:
            continue
        if "_auto_class" not in vars(kind) and not kind.__module__.startswith("transformers."):
            kind.register_for_auto_class(auto_class)
            registered.append(kind)
    try:
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
    finally:
        for kind in registered:  # a checkpoint or a test that saves later should not carry code unasked
            del kind._auto_class
