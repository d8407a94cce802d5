"""Finds the builders of data sets.

A builder is a package `dataset_scripts/<name>` with a module `<name>.py`, whose `BUILDER_CLASS` is a
`datasets.GeneratorBasedBuilder`. It has the configurations `mentions` and `entities` (a mere knowledge base has no
`mentions`), optionally `posts`, and any number of further ones with the columns of `mentions`. `README.template.md` beside the module is the body of the data set's card
([`~hf_mel.building.dataset_card.dataset_card`]). The class has these attributes:

- `NAME`, `TITLE`, `LICENSE` (a Hub licence id), `LANGUAGES`, `HOMEPAGE`, `CITATION`;
- `TASK`: one line on what is linked to what;
- `DOWNLOAD`: what to fetch, and where the release describes it;
- `REDISTRIBUTION`: why the built data may not be passed on under `LICENSE`; empty if it may;
- `NEEDS_RAW`: whether the builder reads raw files (its configuration then has `data_dir`, `images`, `entity_images`);
- `OFFICIAL_COUNTS`: `{config: {split: rows}}`, or `{layout: {config: {split: rows}}}` for a builder that reads several
  layouts; `None` for an unknown number of rows.

Every other field of its `BuilderConfig` is an option for the user (`--option key=value`). An image in a row is
`{"bytes": …, "path": None}`, or `{"bytes": None, "path": …}` for a file that the pipeline reads.

A builder that reads files sets an attribute `release` in `_split_generators`, with `layout` (`str`), `sha256`
(`{file: digest}`) and `problems` (`{kind: [(file, row, detail)]}`) for everything that it left out or did not find. With
too much to list, `problems` has the first of each kind, and `left_out` (`{kind: number}`) counts all.

The pipeline sets an attribute `work_folder` (`Path`) before that. It is a folder, which may not exist yet, that outlives
an interruption. A builder may keep there what took long to read.

A builder of a user's own files sets an attribute `origins` there, or while it yields its rows: the id of a row → (file,
row) that it was read from. A problem with its image is then listed there.

A builder with configurations that need files a user may lack has a classmethod `configs_in(data_dir, options)`, which
returns the names of the configurations that can be built.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.util import find_spec
from typing import Any

import datasets

import hf_mel.dataset_scripts
from hf_mel.errors import UnknownDatasetError

#: Fields of a builder's configuration that are not options: those of `datasets`, and arguments of `build_dataset`.
_NOT_OPTIONS = {"name", "version", "data_dir", "data_files", "description", "images", "entity_images", "seed", "kind"}


def known_datasets() -> list[str]:
    """Returns the names of the data sets that can be built, sorted."""
    return sorted(
        module.name
        for module in pkgutil.iter_modules(hf_mel.dataset_scripts.__path__)
        if module.ispkg and find_spec(f"hf_mel.dataset_scripts.{module.name}.{module.name}")
    )


def find_builder(name: str) -> type[datasets.GeneratorBasedBuilder]:
    """Returns the builder class of a data set.

    Raises:
        UnknownDatasetError: No builder has this name. The message lists all names.
    """
    names = known_datasets()
    if name not in names:
        raise UnknownDatasetError(f"No builder is named {name!r}.", remedy=f"Choose from: {', '.join(names)}.")
    return importlib.import_module(f"hf_mel.dataset_scripts.{name}.{name}").BUILDER_CLASS


def builder_options(builder_class: Any) -> list[str]:
    """Returns the names of a builder's options, sorted: the KEY of `--option KEY=VALUE`."""
    return sorted(set(vars(builder_class.BUILDER_CONFIGS[0])) - _NOT_OPTIONS)


def official_counts(builder_class: Any, layout: str | None) -> dict[str, dict[str, int | None]]:
    """Returns the official number of rows by configuration and split.

    Args:
        builder_class (`type`): The builder, or an instance of it.
        layout (`str`, *optional*): Layout of the raw files, for a builder that reads several.
    """
    counts = builder_class.OFFICIAL_COUNTS
    return counts if layout is None or "entities" in counts else counts.get(layout, {})
