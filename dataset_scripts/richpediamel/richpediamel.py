"""RichpediaMEL: people of the Richpedia knowledge graph, one mention in the text about each of them.

Read in four layouts, chosen by the files in the raw folder:

- `ghmfc`: GHMFC's files (`train.json`, `test.json`, `qid2ne.json`, `qid2abs_long.json` or the shorter
  `qid2abs.json`); images `<QID>.jpg`, for mentions those of `img_list.json` if it is there. The release has no validation part: one is held out of `train.json`, namely
  the mentions whose gold QID has a SHA-256 divisible by ten ([`held_out`]).
- `ghmfc_train`: the same without `test.json`.
- `mimic`: the cleaned files of MIMIC's authors (`RichpediaMEL_{train,dev,test}.json`, `qid2id.json`,
  `kb_entity.json`, `mention_images/`, `kb_image/`); also with M3EL's `desc` for `attr`.
- `kgmel`: KGMEL's files (`data/dataset/RichpediaMEL.json` and `mapping/`), mentions in lists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import datasets

from hf_mel.dataset_scripts.release import (
    Release,
    cleaned_entities,
    cleaned_layout,
    cleaned_mentions,
    kgmel_entities,
    kgmel_layout,
    kgmel_mentions,
    locate,
    mapped_entities,
    read_image,
)
from hf_mel.errors import DataFormatError
from hf_mel.schema import entity_features, mention_features

_PREFIX = "RichpediaMEL"
_ENTITIES = ["qid2ne.json", ("qid2abs_long.json", "qid2abs.json")]
_LAYOUTS = {
    "ghmfc": ["train.json", "test.json", *_ENTITIES],
    "ghmfc_train": ["train.json", *_ENTITIES],
    "mimic": cleaned_layout(_PREFIX),
    "kgmel": kgmel_layout(_PREFIX),
}
_SPLITS = ("train", "validation", "test")


def held_out(qid: str) -> bool:
    """Whether a mention of `train.json` with this gold goes to validation: SHA-256 of the QID, modulo 10, is 0."""
    return int(hashlib.sha256(qid.encode()).hexdigest(), 16) % 10 == 0


@dataclass
class RichpediaMelConfig(datasets.BuilderConfig):
    """Where the raw files lie.

    Args:
        data_dir (`str`): Folder of the raw JSON files.
        images (`str`, *optional*): Folder of the mention images; by default looked for beside the JSON files.
        entity_images (`str`, *optional*): Folder of the entity images; the same.
    """

    images: str | None = None
    entity_images: str | None = None


class RichpediaMel(datasets.GeneratorBasedBuilder):
    """Builds the configurations `mentions` (train, validation, test) and `entities` (kb) of RichpediaMEL."""

    NAME = "richpediamel"
    TITLE = "RichpediaMEL"
    LICENSE = "other"
    LANGUAGES = ("en",)
    HOMEPAGE = "https://github.com/seukgcode/MEL-GHMFC"
    CITATION = """\
@inproceedings{wang2022multimodal,
  title = {Multimodal Entity Linking with Gated Hierarchical Fusion and Contrastive Training},
  author = {Wang, Peng and Wu, Jiangheng and Chen, Xiaohang},
  booktitle = {Proceedings of the 45th International ACM SIGIR Conference on Research and Development in Information
               Retrieval},
  year = {2022},
  pages = {938--948}
}"""
    TASK = "people of the Richpedia knowledge graph in the text about each of them"
    DOWNLOAD = (
        "one of: train.json, test.json, qid2ne.json and qid2abs_long.json (datasets/Richpedia-MEL of"
        " seukgcode/MEL-GHMFC); the cleaned RichpediaMEL archive (linked in the readme of pengfei-luo/MIMIC); data/ and"
        " the linked image archives of juyeonnn/KGMEL"
    )
    REDISTRIBUTION = (
        "GHMFC's, MIMIC's and KGMEL's files state no licence, and the images belong to their authors on Wikimedia"
        " Commons; keep a copy that has them to yourself, or ask"
    )
    NEEDS_RAW = True
    #: ghmfc: rows of the released files; train.json's 14,244 are split by [`held_out`]. mimic: mentions from Table 3
    #: of the MIMIC paper (KDD 2023); entities from the released configuration, where Table 3 has 160,935. kgmel: only
    #: its sentences were counted (12,460 / 1,776 / 3,560), not its mentions.
    OFFICIAL_COUNTS: dict[str, Any] = {
        "ghmfc": {
            "mentions": {"train": 12_841, "validation": 1_403, "test": 3_561},
            "entities": {"kb": 17_805},
        },
        "ghmfc_train": {
            "mentions": {"train": 12_841, "validation": 1_403},
            "entities": {"kb": 17_805},
        },
        "mimic": {
            "mentions": {"train": 12_463, "validation": 1_780, "test": 3_562},
            "entities": {"kb": 160_933},
        },
        "kgmel": {
            "mentions": {"train": None, "validation": None, "test": None},
            "entities": {"kb": None},
        },
    }

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = RichpediaMelConfig
    BUILDER_CONFIGS = [
        RichpediaMelConfig(name="mentions", version=VERSION, description="Mentions with text, image and gold."),
        RichpediaMelConfig(name="entities", version=VERSION, description="The knowledge base."),
    ]
    DEFAULT_CONFIG_NAME = "mentions"

    def _info(self) -> datasets.DatasetInfo:
        features = entity_features() if self.config.name == "entities" else mention_features()
        return datasets.DatasetInfo(features=features, homepage=self.HOMEPAGE, citation=self.CITATION)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        self.release = Release(self.config.data_dir, _LAYOUTS)
        mentions = _SPLITS[:2] if self.release.layout == "ghmfc_train" else _SPLITS
        splits = ["kb"] if self.config.name == "entities" else mentions
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in splits]

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        release, images, entity_images = self.release, self.config.images, self.config.entity_images
        if split == "kb":
            if release.layout == "mimic":
                rows = cleaned_entities(release, entity_images)
            elif release.layout == "kgmel":
                rows = kgmel_entities(release, _PREFIX, entity_images)
            else:
                long = (release.root / "qid2abs_long.json").is_file()
                attributes = "qid2abs_long.json" if long else "qid2abs.json"
                rows = mapped_entities(release, "qid2ne.json", attributes, entity_images)
            for row in rows:
                yield row["entity_id"], row
        else:
            if release.layout == "mimic":
                rows = cleaned_mentions(release, _PREFIX, "dev" if split == "validation" else split, images)
            elif release.layout == "kgmel":
                rows = kgmel_mentions(release, _PREFIX, "val" if split == "validation" else split, images)
            else:
                rows = self._ghmfc_mentions(split)
            for row in rows:
                yield row["mention_id"], row

    def _ghmfc_mentions(self, split: str) -> Iterator[dict[str, Any]]:
        release = self.release
        folder = release.folder(self.config.images, "mention_images", "images", "imgs", "raw_data/imgs")
        pictures = self._listed_images()
        name = "test.json" if split == "test" else "train.json"
        keys = {"id": object, "sentence": str, "mentions": str, "answer": object}
        for sample_id, value in release.read_json(name, dict).items():
            sample = release.record(name, sample_id, value, keys)
            if release.identifier(name, sample_id, sample["id"]) != sample_id:
                raise DataFormatError(f"has the id {sample['id']!r}.", file=release.root / name, row=sample_id)
            gold = release.gold(name, sample_id, sample["answer"])
            if split != "test" and held_out(gold) != (split == "validation"):
                continue
            file = f"{sample_id}.jpg" if pictures is None else pictures.get(sample_id)
            image = read_image(folder, file) if file else None
            if file and image is None:
                release.problem("missing_mention_image", name, sample_id, file)
            [(start, end)] = locate(sample["sentence"], [sample["mentions"]])
            yield {
                "mention_id": sample_id,
                "context_id": sample_id,
                "text": sample["sentence"],
                "mention": sample["mentions"],
                "start": start,
                "end": end,
                "mention_type": "",
                "topic": "",
                "image": image,
                "entity_id": gold,
                "candidates": [],
            }

    def _listed_images(self) -> dict[str, str] | None:
        """Sample id → file of `img_list.json`, the paths of the pictures there are; `None` without that file."""
        release, name = self.release, "img_list.json"
        if not release.first(name):
            return None
        files = [release.identifier(name, k, value) for k, value in enumerate(release.read_json(name, list))]
        return {PurePosixPath(file).stem: file for file in files}


BUILDER_CLASS = RichpediaMel
