"""Weibo-MEL: people and things named in posts of the Chinese network Weibo, linked to an encyclopaedia.

The release was not available when this was written. Its repository (MELBench) publishes WikiMEL and RichpediaMEL in one
form. The builder expects that form and checks it: `Weibo-MEL.json` is an object (or list) of samples with the keys
`sentence`, `mentions`, `answer`, and optionally `id`, `entities`, `imgPath`. `mentions`, `answer` and `entities` are lists
of the same length, or strings if the sample has one mention. An image is found by `imgPath`, else by `<id>.jpg`. Keys
with other names need a mapping file ([`~hf_mel.dataset_scripts.mapping`]), not code.

The splits (nominally 70, 10 and 20 %) were not released. The builder reads the first of these layouts whose files are
present:

- `split_files`: `train.json`, `dev.json` and `test.json`, each in the form above.
- `split_ids`: `Weibo-MEL.json` and `splits.json`, an object of lists of sample ids under `train`, `dev` and `test`.
- `hashed`: `Weibo-MEL.json` alone. The split of a post follows from its text (`split_of_context`).

IMN represents an entity by its timeline (61,200 posts, 122 an entity), which its authors collected and did not release. Timelines of
yours become the configuration `posts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_mel.dataset_scripts.builder import ReleaseBuilder
from hf_mel.dataset_scripts.image_files import read_image
from hf_mel.dataset_scripts.mapping import (
    ID,
    TEXT,
    TEXTS,
    Keys,
    MappedConfig,
    Sample,
    as_texts,
    entity_image_reader,
    entity_names,
    read_entity_texts,
    read_json_lines,
    read_keyed_records,
    read_splits,
    split_of_context,
)
from hf_mel.dataset_scripts.release import Release, ReleaseLog
from hf_mel.errors import DataFormatError

_SAMPLES = "Weibo-MEL.json"
_SPLIT_FILES = {"train": "train.json", "validation": "dev.json", "test": "test.json"}
_POST_KEYS = ("id", "entity_id", "text", "image")
_KEYS = ("id", "sentence", "mentions", "entities", "answer", "imgPath")


@dataclass
class WeiboMelConfig(MappedConfig):
    """Folders and files of the release.

    Args:
        entities (`str`, *optional*): JSON lines with `id`, `title` and `text`: descriptions of the entities.
        timelines (`str`, *optional*): JSON lines with `id`, `entity_id`, `text` and possibly `image`, a file name in a folder
            `timeline_images` beside the file: posts about the entities.
    """

    entities: str | None = None
    timelines: str | None = None


class WeiboMel(ReleaseBuilder):
    """Builder of Weibo-MEL. Its knowledge base is the golds of all splits."""

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
    #: Unknown: only the number of posts (25,602) was published.
    OFFICIAL_COUNTS: dict[str, dict[str, int]] = {}

    CONFIGS = {
        "mentions": "One row per mention.",
        "entities": "The knowledge base.",
        "posts": "The timelines of the entities.",
    }
    LAYOUTS = {
        "split_files": list(_SPLIT_FILES.values()),
        "split_ids": [_SAMPLES, "splits.json"],
        "hashed": [_SAMPLES],
    }
    BUILDER_CONFIG_CLASS = WeiboMelConfig

    @classmethod
    def configs_in(cls, data_dir: Any, options: Mapping[str, Any]) -> list[str]:
        """Returns the configurations that the user gave files for."""
        return [config for config in cls.CONFIGS if config != "posts" or options.get("timelines") is not None]

    def open_release(self) -> ReleaseLog:
        """Reads the mapping file, too."""
        release = super().open_release()
        self.keys = Keys(_KEYS, self.config.mapping)
        return release

    def mentions(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the mentions of a split."""
        release = self.release
        folder = release.find_folder(self.config.images, "images", "mention_images")
        for file, sample in self._samples(split):
            names = [sample.image] if sample.image else [f"{sample.context_id}.jpg", f"{sample.context_id}.png"]
            image = read_image(folder, *names)
            if image is None:
                release.problem("missing_mention_image", file, sample.row, names[0])
            yield from sample.rows(release, file, image)

    def entities(self) -> Iterator[dict[str, Any]]:
        """Yields the knowledge base."""
        release = self.release
        folder = release.find_folder(self.config.entity_images, "entity_images")
        read_entity_images = entity_image_reader(release, folder, "entities")
        names = entity_names(sample for _, sample in self._samples(None))
        texts = read_entity_texts(release, self.config.entities, names)
        for entity_id, titles in names.items():
            titles = titles or [entity_id]
            if self.config.entities is not None and entity_id not in texts:
                release.problem("entity_without_text", "entities", entity_id, titles[0])
            name, description = texts.get(entity_id, (titles[0], ""))
            yield {
                "entity_id": entity_id,
                "name": name,
                "description": description,
                "attributes": "",
                "aliases": [title for title in titles if title != name],
                "images": read_entity_images(entity_id),
            }

    def posts(self) -> Iterator[dict[str, Any]]:
        """Yields the posts of the timelines, each once. Posts about entities that are no gold are left out."""
        release, path = self.release, Path(self.config.timelines)
        if not path.is_file():
            raise DataFormatError(
                "The file of timelines is not a file.",
                file=path,
                remedy="Give a file of JSON lines with id, entity_id, text and image.",
            )
        entity_ids = entity_names(sample for _, sample in self._samples(None))
        release.problems.clear()  # those of the mentions, which `mentions` logs
        timelines = Release(path.parent, {"timelines": [path.name]})
        folder, keys, seen = timelines.find_folder(None, "timeline_images"), Keys(_POST_KEYS), set()
        required = {"id": ID, "entity_id": ID, "text": TEXT}
        for row, record in read_json_lines(timelines, path.name):
            values = keys.read(timelines, path.name, row, record, required, {"image": TEXT})
            if values["entity_id"] not in entity_ids:
                release.problem("post_about_no_gold", path.name, row, values["entity_id"])
            elif values["id"] in seen:
                release.problem("repeated_post", path.name, row, values["id"])
            else:
                seen.add(values["id"])
                image = read_image(folder, values["image"]) if values["image"] else None
                if image is None and values["image"]:
                    release.problem("missing_post_image", path.name, row, values["image"])
                yield {
                    "post_id": values["id"],
                    "entity_id": values["entity_id"],
                    "text": values["text"],
                    "image": image,
                }
        release.merge(timelines)

    def _samples(self, split: str | None) -> Iterator[tuple[str, Sample]]:
        """Yields the samples of a split (`None`: of all splits), each with the name of its file."""
        release = self.release
        if release.layout == "split_files":
            for name, file in _SPLIT_FILES.items():
                if split in (name, None):
                    for row, value in read_keyed_records(release, file):
                        yield file, self._sample(file, row, value, f"{name}-{row}")
            return
        split_of = read_splits(release) if release.layout == "split_ids" else None
        sample_ids = set()
        for row, value in read_keyed_records(release, _SAMPLES):
            sample = self._sample(_SAMPLES, row, value, row)
            sample_ids.add(sample.context_id)
            sample_split = split_of_context(sample.text) if split_of is None else split_of.get(sample.context_id)
            if sample_split is None and split == "train":  # logged once, not for every split
                release.problem("post_without_split", _SAMPLES, row)
            if sample_split is not None and split in (sample_split, None):
                yield _SAMPLES, sample
        for sample_id, listed_split in (split_of or {}).items():
            if listed_split == split and sample_id not in sample_ids:
                release.problem("split_id_without_post", "splits.json", sample_id, listed_split)

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
        mentions = as_texts(release, file, row, values["mentions"], "mentions")
        answers = values["answer"] if isinstance(values["answer"], list) else [values["answer"]]
        names = [""] * len(mentions)
        if values["entities"] is not None:
            names = as_texts(release, file, row, values["entities"], "entities")
        if not len(mentions) == len(answers) == len(names):
            raise DataFormatError(
                f"The sample has {len(mentions)} mentions, {len(answers)} answers and {len(names)} entities, expected the"
                " same number of each.",
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


BUILDER_CLASS = WeiboMel
