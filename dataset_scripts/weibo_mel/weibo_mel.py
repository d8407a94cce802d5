"""Weibo-MEL: people and things named in posts of the Chinese network Weibo, linked to an encyclopaedia.

The release was not at hand when this was written. Its repository (MELBench) publishes WikiMEL and RichpediaMEL in one
form, which is what is expected here, and verified: `Weibo-MEL.json`, an object (or list) of samples with the keys
`sentence`, `mentions`, `answer`, and where they are there `id`, `entities`, `imgPath`. `mentions`, `answer` and
`entities` are parallel lists, or texts where there is one mention. Images are found by `imgPath`, else by
`<id>.jpg`. Other names of keys need a mapping file (see `mapping.py`), not code.

The splits (nominally 70, 10 and 20 %) were not released. Three layouts are read, the first whose files are there:

- `split_files`: `train.json`, `dev.json` and `test.json`, each in the form above.
- `split_ids`: `Weibo-MEL.json` and `splits.json`, an object of lists of sample ids under `train`, `dev` and `test`.
- `hashed`: `Weibo-MEL.json` alone; a post's split follows from its text (`split_of_context`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets

from hf_mel.dataset_scripts.mapping import (
    ID,
    TEXT,
    TEXTS,
    Keys,
    Sample,
    entity_images,
    entity_texts,
    keyed_records,
    listed,
    named_entities,
    split_by_id,
    split_of_context,
)
from hf_mel.dataset_scripts.release import Release, read_image
from hf_mel.errors import DataFormatError
from hf_mel.schema import entity_features, mention_features

_SAMPLES = "Weibo-MEL.json"
_SPLIT_FILES = {"train": "train.json", "validation": "dev.json", "test": "test.json"}
_LAYOUTS = {
    "split_files": list(_SPLIT_FILES.values()),
    "split_ids": [_SAMPLES, "splits.json"],
    "hashed": [_SAMPLES],
}
_KEYS = ("id", "sentence", "mentions", "entities", "answer", "imgPath")


@dataclass
class WeiboMelConfig(datasets.BuilderConfig):
    """Where the raw files lie.

    Args:
        data_dir (`str`): Folder of the raw JSON files.
        images (`str`, *optional*): Folder of the posts' images; by default looked for beside the JSON files.
        entity_images (`str`, *optional*): Folder of the entity images, `<entity id>.jpg` or `.png`; the same.
        mapping (`str`, *optional*): A mapping file, where the release's keys have other names.
        entities (`str`, *optional*): JSON lines with `id`, `title` and `text`: descriptions of the entities.
    """

    images: str | None = None
    entity_images: str | None = None
    mapping: str | None = None
    entities: str | None = None


class WeiboMel(datasets.GeneratorBasedBuilder):
    """Builds the configurations `mentions` (train, validation, test) and `entities` (kb) of Weibo-MEL."""

    NAME = "weibo_mel"
    TITLE = "Weibo-MEL"
    TASK = "posts on Weibo, in Chinese → an encyclopaedia"
    LICENSE = "other"
    LANGUAGES = ("zh",)
    HOMEPAGE = "https://github.com/seukgcode/MELBench"
    DOWNLOAD = (
        "the Weibo-MEL archive of MELBench (unpack it to Weibo-MEL.json) and its folder of images, whose link and code"
        " are in MELBench's README"
    )
    REDISTRIBUTION = "The posts and their images belong to their authors on Weibo; the network's terms apply."
    CITATION = """\
@inproceedings{zhou2021weibo,
  title = {Weibo-MEL, Wikidata-MEL and Richpedia-MEL: Multimodal Entity Linking Benchmark Datasets},
  author = {Zhou, Xingchen and Wang, Peng and Li, Guozheng and Xie, Jiafeng and Wu, Jiangheng},
  booktitle = {Knowledge Graph and Semantic Computing: Knowledge Graph Empowers New Infrastructure Construction},
  year = {2021},
  pages = {315--320}
}"""
    NEEDS_RAW = True
    #: Only the number of posts (25,602) was published, not that of mentions, and no split.
    OFFICIAL_COUNTS: dict[str, dict[str, int]] = {}

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = WeiboMelConfig
    BUILDER_CONFIGS = [
        WeiboMelConfig(name="mentions", version=VERSION, description="Mentions with their post, image and gold."),
        WeiboMelConfig(name="entities", version=VERSION, description="The golds of all splits."),
    ]
    DEFAULT_CONFIG_NAME = "mentions"

    def _info(self) -> datasets.DatasetInfo:
        features = entity_features() if self.config.name == "entities" else mention_features()
        return datasets.DatasetInfo(features=features, homepage=self.HOMEPAGE, citation=self.CITATION)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        self.release = Release(self.config.data_dir, _LAYOUTS)
        self.keys = Keys(_KEYS, self.config.mapping)
        splits = ["kb"] if self.config.name == "entities" else list(_SPLIT_FILES)
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in splits]

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        release = self.release
        if split == "kb":
            for row in self._entities():
                yield row["entity_id"], row
            return
        folder = release.folder(self.config.images, "images", "mention_images")
        for file, sample in self._samples(split):
            names = [sample.image] if sample.image else [f"{sample.context_id}.jpg", f"{sample.context_id}.png"]
            image = read_image(folder, *names)
            if image is None:
                release.problem("missing_mention_image", file, sample.row, names[0])
            for row in sample.rows(release, file, image):
                yield row["mention_id"], row

    def _samples(self, split: str | None) -> Iterator[tuple[str, Sample]]:
        """The samples of a split, or of all, with the file each stands in."""
        release = self.release
        if release.layout == "split_files":
            for name, file in _SPLIT_FILES.items():
                if split in (name, None):
                    for row, value in keyed_records(release, file):
                        yield file, self._sample(file, row, value, f"{name}-{row}")
            return
        where = split_by_id(release) if release.layout == "split_ids" else None
        seen = set()
        for row, value in keyed_records(release, _SAMPLES):
            sample = self._sample(_SAMPLES, row, value, row)
            seen.add(sample.context_id)
            own = split_of_context(sample.text) if where is None else where.get(sample.context_id)
            if own is None and split == "train":  # once, not in every split
                release.problem("post_without_split", _SAMPLES, row)
            if own is not None and split in (own, None):
                yield _SAMPLES, sample
        for sample_id, own in (where or {}).items():
            if own == split and sample_id not in seen:
                release.problem("split_id_without_post", "splits.json", sample_id, own)

    def _sample(self, file: str, row: str, value: Any, default_id: str) -> Sample:
        release = self.release
        values = self.keys.read(
            release,
            file,
            row,
            value,
            {"sentence": TEXT, "mentions": TEXTS, "answer": (*TEXTS, type(None))},
            {"id": ID, "entities": TEXTS, "imgPath": TEXT},
        )
        mentions = listed(release, file, row, values["mentions"], "mentions")
        answers = values["answer"] if isinstance(values["answer"], list) else [values["answer"]]
        names = [""] * len(mentions)
        if values["entities"] is not None:
            names = listed(release, file, row, values["entities"], "entities")
        if not len(mentions) == len(answers) == len(names):
            raise DataFormatError(
                f"has {len(mentions)} mentions, {len(answers)} answers and {len(names)} entities; they must be as many.",
                file=release.root / file,
                row=row,
            )
        sample_id = default_id if values["id"] is None else values["id"]
        return Sample(
            row=row,
            context_id=sample_id,
            mention_ids=[sample_id] if len(mentions) == 1 else [f"{sample_id}-{k}" for k in range(len(mentions))],
            text=values["sentence"],
            mentions=mentions,
            names=names,
            golds=[release.gold(file, row, answer) for answer in answers],
            image=values["imgPath"] or "",
        )

    def _entities(self) -> Iterator[dict[str, Any]]:
        release = self.release
        images = entity_images(release, release.folder(self.config.entity_images, "entity_images"), "entities")
        names = named_entities(sample for _, sample in self._samples(None))
        texts = entity_texts(release, self.config.entities, names)
        for entity_id, (name, *others) in ((key, known or [key]) for key, known in names.items()):
            if self.config.entities is not None and entity_id not in texts:
                release.problem("entity_without_text", "entities", entity_id, name)
            title, description = texts.get(entity_id, (name, ""))
            yield {
                "entity_id": entity_id,
                "name": title,
                "description": description,
                "attributes": "",
                "aliases": [other for other in (name, *others) if other != title],
                "images": images(entity_id),
            }


BUILDER_CLASS = WeiboMel
