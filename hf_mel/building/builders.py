"""hf_mel.building.builders."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.util import find_spec
from typing import Any

import datasets

import hf_mel.dataset_scripts
from hf_mel.errors import UnknownDatasetError

#: Fields of a configuration that are not options: those of `datasets`, and those with arguments of their own.
_NOT_OPTIONS = {"name", "version", "data_dir", "data_files", "description", "images", "entity_images", "seed", "kind"}


def known_datasets() -> list[str]:
    """Names of the data sets that can be built."""
    return sorted(
        module.name
        for module in pkgutil.iter_modules(hf_mel.dataset_scripts.__path__)
        if module.ispkg and find_spec(f"hf_mel.dataset_scripts.{module.name}.{module.name}")
    )


def find_builder(name: str) -> type[datasets.GeneratorBasedBuilder]:
    """The builder class of a data set.

    Raises:
        UnknownDatasetError: No builder has that name; the message lists those there are.
    """
    known = known_datasets()
    if name not in known:
        raise UnknownDatasetError(
            f"no builder is named {name!r}.", remedy=f"There are builders for: {', '.join(known)}."
        )
    return importlib.import_module(f"hf_mel.dataset_scripts.{name}.{name}").BUILDER_CLASS


def builder_options(builder_class: Any) -> list[str]:
    """Names of what a builder's configuration holds beyond folders, images and seed: `--option key=value`."""
    return sorted(set(vars(builder_class.BUILDER_CONFIGS[0])) - _NOT_OPTIONS)
