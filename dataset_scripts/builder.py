"""The frame that every builder shares, and the row of a mention.

`datasets` 3 runs a builder as a script: it copies the file of the builder to another folder, imports the copy, and takes
the builder class that the copy itself defines. A builder therefore imports the shared modules by their absolute names,
and defines exactly one builder class.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from hf_mel.dataset_scripts.release import Layout, Release, ReleaseLog
from hf_mel.schema import NO_SPAN, entity_features, mention_features, post_features

#: Keeps `datasets` from replacing `open`, `Path` and `os.path` in this module, and below in that of every builder, by
#: versions for addresses. They take "::" in the name of a folder for a separator. Builders read files of this machine.
_patched_for_streaming = True


@dataclass
class ReleaseConfig(datasets.BuilderConfig):
    """Folders of the raw files. A builder with more options derives its configuration class from this one.

    Args:
        data_dir (`str`): Folder of the release's files.
        images (`str`, *optional*): Folder of the mention images. By default the builder looks for one in `data_dir`.
        entity_images (`str`, *optional*): Folder of the entity images, with the same default.
    """

    images: str | None = None
    entity_images: str | None = None


class ReleaseBuilder(datasets.GeneratorBasedBuilder):
    """Base of all builders: opens the release and connects configurations and splits to the methods that yield rows.

    A subclass sets the metadata that [`~hf_mel.building.builders`] lists (`NAME`, `TITLE`, …) and implements
    [`~ReleaseBuilder.mentions`] and [`~ReleaseBuilder.entities`]. If it has a configuration `posts`, it also implements
    [`~ReleaseBuilder.posts`].

    Class attributes:
        LAYOUTS (mapping of `str` to `Layout`): Files of each layout of the release. The builder reads the first layout
            whose files are all present. Empty if the builder reads no release.
        SPLITS (iterable of `str`): Splits of `mentions`.
        CONFIGS (mapping of `str` to `str`): Names of the configurations and a description of each. Configurations other
            than `entities` and `posts` hold mentions.
        COLUMNS (mapping of `str` to mapping): Columns that a configuration has beyond those of the schema.
        BUILDER_CONFIG_CLASS (`type`): [`ReleaseConfig`], or a dataclass derived from it with the builder's options.

    Attributes:
        release ([`~hf_mel.dataset_scripts.release.ReleaseLog`]): The opened release and its problems. The build
            pipeline copies them into `report.json`.
        origins (`dict[str, tuple[str, str]]`): Id of a row → file and row that it was read from, for problems with its
            image. Empty if the id itself tells the row.
    """

    LAYOUTS: Mapping[str, Layout] = {}
    SPLITS: Iterable[str] = ("train", "validation", "test")
    CONFIGS: Mapping[str, str] = {"mentions": "One row per mention.", "entities": "The knowledge base."}
    COLUMNS: Mapping[str, Mapping[str, Any]] = {}

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS: type[datasets.BuilderConfig] = ReleaseConfig
    DEFAULT_CONFIG_NAME = "mentions"
    release: Any
    origins: dict[str, tuple[str, str]]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        sys.modules[cls.__module__]._patched_for_streaming = True  # type: ignore[attr-defined]
        # `datasets` 3 derives a class with configurations of its own when a repository's card lists some.
        if "BUILDER_CONFIGS" not in vars(cls):
            cls.BUILDER_CONFIGS = [
                cls.BUILDER_CONFIG_CLASS(name=name, version=cls.VERSION, description=description)
                for name, description in cls.CONFIGS.items()
            ]

    def open_release(self) -> ReleaseLog:
        """Opens the release in `data_dir`. Runs once per configuration, before [`~ReleaseBuilder.splits`]."""
        return Release(self.config.data_dir, self.LAYOUTS) if self.LAYOUTS else ReleaseLog()

    def splits(self) -> Iterable[str]:
        """Returns the splits of the current configuration of mentions, by default `SPLITS`."""
        return self.SPLITS

    def mentions(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the rows of one split of the current configuration of mentions."""
        raise NotImplementedError

    def entities(self) -> Iterator[dict[str, Any]]:
        """Yields the rows of `entities`."""
        raise NotImplementedError

    def posts(self) -> Iterator[dict[str, Any]]:
        """Yields the rows of `posts`."""
        raise NotImplementedError

    def _info(self) -> datasets.DatasetInfo:
        config = self.config.name
        features = {"entities": entity_features, "posts": post_features}.get(config, mention_features)
        return datasets.DatasetInfo(
            features=features(**self.COLUMNS.get(config, {})),
            homepage=self.HOMEPAGE,
            license=self.LICENSE,
            citation=self.CITATION,
        )

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        self.release, self.origins = self.open_release(), {}
        splits = ["kb"] if self.config.name in ("entities", "posts") else self.splits()
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in splits]

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.config.name == "entities":
            rows, key = self.entities(), "entity_id"
        elif self.config.name == "posts":
            rows, key = self.posts(), "post_id"
        else:
            rows, key = self.mentions(split), "mention_id"
        for row in rows:
            yield row[key], row


def mention_row(*, mention_id: str, entity_id: str, **values: Any) -> dict[str, Any]:
    """Returns a row of `mentions`. Columns without a value get the one that means "not in the release".

    Args:
        mention_id (`str`): Id of the mention, and of its context unless `context_id` is given.
        entity_id (`str`): Id of the gold entity, or [`~hf_mel.schema.NIL`].
        values: Other columns of [`~hf_mel.schema.mention_features`], and further columns of the data set.
    """
    return {
        "mention_id": mention_id,
        "context_id": mention_id,
        "text": "",
        "mention": "",
        "start": NO_SPAN,
        "end": NO_SPAN,
        "mention_type": "",
        "topic": "",
        "image": None,
        "entity_id": entity_id,
        "candidates": [],
        **values,
    }
