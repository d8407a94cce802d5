"""WikiMEL (Wikidata-MEL): people named in captions of Wikipedia images, linked to Wikidata.

Three releases of it exist and are read, chosen by the files in the raw folder:

- `melbench`: the sentences of MELBench (`Wikidata-MEL.json`) with the splits and entity maps of GHMFC (`splits.json`,
  `qid2ne.json`, `qid2abs.json`); images `<sample id>.jpg`, and `<QID>.jpg` or several per entity.
- `mimic`: the cleaned files of MIMIC's authors (`WIKIMEL_{train,dev,test}.json`, `qid2id.json`, `kb_entity.json`,
  `mention_image/`, `kb_image/`), with a knowledge base six times as large; also with M3EL's `desc` for `attr`.
- `kgmel`: KGMEL's regrouping of these by sentence (`data/dataset/WikiMEL.json` and `mapping/`), mentions in lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
from hf_mel.errors import DataFormatError, DuplicateIdError
from hf_mel.schema import entity_features, mention_features

_SENTENCES = "Wikidata-MEL.json"
_PREFIX = "WIKIMEL"
_LAYOUTS = {
    "melbench": [_SENTENCES, "splits.json", "qid2ne.json", "qid2abs.json"],
    "mimic": cleaned_layout(_PREFIX),
    "kgmel": kgmel_layout("WikiMEL"),
}
#: Our name of each split → the release's.
_SPLITS = {"train": "train", "validation": "dev", "test": "test"}


@dataclass
class WikiMelConfig(datasets.BuilderConfig):
    """Where the raw files lie.

    Args:
        data_dir (`str`): Folder of the raw JSON files.
        images (`str`, *optional*): Folder of the mention images; by default looked for beside the JSON files.
        entity_images (`str`, *optional*): Folder of the entity images; the same.
    """

    images: str | None = None
    entity_images: str | None = None


class WikiMel(datasets.GeneratorBasedBuilder):
    """Builds the configurations `mentions` (train, validation, test) and `entities` (kb) of WikiMEL."""

    NAME = "wikimel"
    TITLE = "WikiMEL"
    LICENSE = "other"
    LANGUAGES = ("en",)
    HOMEPAGE = "https://github.com/seukgcode/MELBench"
    CITATION = """\
@inproceedings{wang2022multimodal,
  title = {Multimodal Entity Linking with Gated Hierarchical Fusion and Contrastive Training},
  author = {Wang, Peng and Wu, Jiangheng and Chen, Xiaohang},
  booktitle = {Proceedings of the 45th International ACM SIGIR Conference on Research and Development in Information
               Retrieval},
  year = {2022},
  pages = {938--948}
}"""
    TASK = "people named in captions of Wikipedia's images"
    DOWNLOAD = (
        "one of: Wikidata-MEL.json (MELBench's repository) with splits.json, qid2ne.json and qid2abs.json"
        " (datasets/WikiMEL/input_data of seukgcode/MEL-GHMFC); the cleaned WikiMEL archive (linked in the readme of"
        " pengfei-luo/MIMIC); data/ and the linked image archives of juyeonnn/KGMEL"
    )
    REDISTRIBUTION = (
        "GHMFC's maps and MIMIC's and KGMEL's files state no licence, and the images belong to their authors on"
        " Wikimedia Commons; keep a copy that has them to yourself, or ask"
    )
    NEEDS_RAW = True
    #: melbench: rows of `splits.json` that have a sentence. mimic: Table 3 of the MIMIC paper (KDD 2023). kgmel: only
    #: its sentences were counted (16,111 / 2,540 / 5,012), not its mentions.
    OFFICIAL_COUNTS: dict[str, Any] = {
        "melbench": {
            "mentions": {"train": 18_088, "validation": 2_627, "test": 5_131},
            "entities": {"kb": 18_880},
        },
        "mimic": {
            "mentions": {"train": 18_092, "validation": 2_585, "test": 5_169},
            "entities": {"kb": 109_976},
        },
        "kgmel": {
            "mentions": {"train": None, "validation": None, "test": None},
            "entities": {"kb": None},
        },
    }

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = WikiMelConfig
    BUILDER_CONFIGS = [
        WikiMelConfig(name="mentions", version=VERSION, description="Mentions with their sentence, image and gold."),
        WikiMelConfig(name="entities", version=VERSION, description="The knowledge base."),
    ]
    DEFAULT_CONFIG_NAME = "mentions"

    def _info(self) -> datasets.DatasetInfo:
        features = entity_features() if self.config.name == "entities" else mention_features()
        return datasets.DatasetInfo(features=features, homepage=self.HOMEPAGE, citation=self.CITATION)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        self.release = Release(self.config.data_dir, _LAYOUTS)
        splits = ["kb"] if self.config.name == "entities" else list(_SPLITS)
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in splits]

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        release, images, entity_images = self.release, self.config.images, self.config.entity_images
        if split == "kb":
            if release.layout == "mimic":
                rows = cleaned_entities(release, entity_images)
            elif release.layout == "kgmel":
                rows = kgmel_entities(release, "WikiMEL", entity_images)
            else:
                rows = mapped_entities(release, "qid2ne.json", "qid2abs.json", entity_images)
            for row in rows:
                yield row["entity_id"], row
        else:
            if release.layout == "mimic":
                rows = cleaned_mentions(release, _PREFIX, _SPLITS[split], images)
            elif release.layout == "kgmel":
                rows = kgmel_mentions(release, "WikiMEL", "val" if split == "validation" else split, images)
            else:
                rows = self._melbench_mentions(_SPLITS[split])
            for row in rows:
                yield row["mention_id"], row

    def _melbench_mentions(self, split: str) -> Iterator[dict[str, Any]]:
        release = self.release
        folder = release.folder(self.config.images, "mention_images", "images")
        samples = release.read_json(_SENTENCES, dict)
        for sample_id in self._ids_of(split, samples):
            if sample_id not in samples:
                release.problem("split_id_without_sentence", "splits.json", sample_id, split)
                continue
            keys = {"id": object, "sentence": str, "mentions": list, "answer": list}
            sample = release.record(_SENTENCES, sample_id, samples[sample_id], keys)
            own_id = release.identifier(_SENTENCES, sample_id, sample["id"])
            surfaces = sample["mentions"]
            golds = [release.gold(_SENTENCES, sample_id, value) for value in sample["answer"]]
            if own_id != sample_id or len(surfaces) != len(golds):
                raise DataFormatError(
                    f"has id {own_id!r}, {len(surfaces)} mentions and {len(golds)} answers; the id must be the"
                    " key, and the lists equally long.",
                    file=release.root / _SENTENCES,
                    row=sample_id,
                )
            if not all(isinstance(surface, str) for surface in surfaces):
                raise DataFormatError(
                    "has a mention that is not a string.", file=release.root / _SENTENCES, row=sample_id
                )
            image = read_image(folder, *(f"{sample_id}{suffix}" for suffix in (".jpg", ".jpeg", ".png")))
            if image is None:
                release.problem("missing_mention_image", _SENTENCES, sample_id, f"{sample_id}.jpg")
            spans = locate(sample["sentence"], surfaces)
            for k, (surface, gold, (start, end)) in enumerate(zip(surfaces, golds, spans, strict=True)):
                yield {
                    "mention_id": sample_id if len(surfaces) == 1 else f"{sample_id}-{k}",
                    "context_id": sample_id,
                    "text": sample["sentence"],
                    "mention": surface,
                    "start": start,
                    "end": end,
                    "mention_type": "",
                    "topic": "",
                    "image": image,
                    "entity_id": gold,
                    "candidates": [],
                }

    def _ids_of(self, split: str, samples: dict[str, Any]) -> list[str]:
        release = self.release
        names = dict.fromkeys(_SPLITS.values(), list)
        splits = release.record("splits.json", split, release.read_json("splits.json", dict), names)
        where: dict[str, str] = {}
        for name in names:
            for value in splits[name]:
                sample_id = release.identifier("splits.json", name, value)
                if sample_id in where:
                    raise DuplicateIdError(
                        f"is in {name} and in {where[sample_id]}.", file=release.root / "splits.json", row=sample_id
                    )
                where[sample_id] = name
        if split == "train":  # once, not in every split
            for sample_id in samples:
                if sample_id not in where:
                    release.problem("sentence_without_split", _SENTENCES, sample_id)
        return [sample_id for sample_id, name in where.items() if name == split]


BUILDER_CLASS = WikiMel
