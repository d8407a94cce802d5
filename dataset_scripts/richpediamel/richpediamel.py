"""RichpediaMEL: people of the Richpedia knowledge graph, with one mention in a text about each of them.

The builder reads four layouts and recognises them by their files:

- `ghmfc`: GHMFC's files (`train.json`, `test.json`, `qid2ne.json`, and `qid2abs_long.json` or the shorter
  `qid2abs.json`). Images are `<QID>.jpg`, those of mentions the files in `img_list.json` if it exists. The release has no
  validation split: the builder holds one out of `train.json` ([`held_out`]).
- `ghmfc_train`: the same without `test.json`.
- `mimic`: the cleaned files of MIMIC's authors ([`~hf_mel.dataset_scripts.layouts.mimic`]).
- `kgmel`: KGMEL's files ([`~hf_mel.dataset_scripts.layouts.kgmel`]).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from hf_mel.dataset_scripts.builder import ReleaseBuilder, mention_row
from hf_mel.dataset_scripts.image_files import read_image
from hf_mel.dataset_scripts.layouts import ghmfc, kgmel, mimic
from hf_mel.dataset_scripts.spans import locate
from hf_mel.errors import DataFormatError

#: Name of the data set in the other layouts.
_NAME = "RichpediaMEL"
_ENTITIES = ["qid2ne.json", ("qid2abs_long.json", "qid2abs.json")]


def held_out(qid: str) -> bool:
    """Returns whether a mention of `train.json` with this gold goes to validation: if SHA-256 of the QID modulo 10 is 0."""
    return int(hashlib.sha256(qid.encode()).hexdigest(), 16) % 10 == 0


class RichpediaMel(ReleaseBuilder):
    """Builder of RichpediaMEL."""

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
    #: ghmfc: rows of the released files; [`held_out`] splits the 14,244 of train.json. mimic: mentions from Table 3 of the
    #: MIMIC paper (KDD 2023), entities from the released configuration (Table 3 has 160,935). kgmel: unknown; only its
    #: sentences were counted (12,460 / 1,776 / 3,560).
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

    LAYOUTS = {
        "ghmfc": ["train.json", "test.json", *_ENTITIES],
        "ghmfc_train": ["train.json", *_ENTITIES],
        "mimic": mimic.files(_NAME),
        "kgmel": kgmel.files(_NAME),
    }

    def splits(self) -> Iterable[str]:
        """Returns the splits, without test if there is no `test.json`."""
        return ("train", "validation") if self.release.layout == "ghmfc_train" else self.SPLITS

    def mentions(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the mentions of a split."""
        if self.release.layout == "mimic":
            return mimic.mentions(self.release, _NAME, split, self.config.images)
        if self.release.layout == "kgmel":
            return kgmel.mentions(self.release, _NAME, split, self.config.images)
        return self._ghmfc_mentions(split)

    def entities(self) -> Iterator[dict[str, Any]]:
        """Yields the knowledge base."""
        if self.release.layout == "mimic":
            return mimic.entities(self.release, self.config.entity_images)
        if self.release.layout == "kgmel":
            return kgmel.entities(self.release, _NAME, self.config.entity_images)
        attributes = self.release.find_file("qid2abs_long.json", "qid2abs.json")
        return ghmfc.entities(self.release, "qid2ne.json", attributes, self.config.entity_images)

    def _ghmfc_mentions(self, split: str) -> Iterator[dict[str, Any]]:
        release = self.release
        folder = release.find_folder(self.config.images, "mention_images", "images", "imgs", "raw_data/imgs")
        listed_images = self._listed_images()
        name = "test.json" if split == "test" else "train.json"
        keys = {"id": object, "sentence": str, "mentions": str, "answer": object}
        for sample_id, value in release.read_json(name, dict).items():
            sample = release.check_record(name, sample_id, value, keys)
            if release.identifier(name, sample_id, sample["id"]) != sample_id:
                raise DataFormatError(
                    f"The sample has the id {sample['id']!r}.",
                    file=release.root / name,
                    row=sample_id,
                    remedy="Its id must be its key in the file.",
                )
            gold = release.gold(name, sample_id, sample["answer"])
            if split != "test" and held_out(gold) != (split == "validation"):
                continue
            file = f"{sample_id}.jpg" if listed_images is None else listed_images.get(sample_id)
            image = read_image(folder, file) if file else None
            if file and image is None:
                release.problem("missing_mention_image", name, sample_id, file)
            [(start, end)] = locate(sample["sentence"], [sample["mentions"]])
            yield mention_row(
                mention_id=sample_id,
                text=sample["sentence"],
                mention=sample["mentions"],
                start=start,
                end=end,
                image=image,
                entity_id=gold,
            )

    def _listed_images(self) -> dict[str, str] | None:
        """Returns the image of each sample that `img_list.json` lists, by sample id; `None` without that file."""
        release, name = self.release, "img_list.json"
        if not release.find_file(name):
            return None
        files = [release.identifier(name, k, value) for k, value in enumerate(release.read_json(name, list))]
        return {PurePosixPath(file).stem: file for file in files}


BUILDER_CLASS = RichpediaMel
