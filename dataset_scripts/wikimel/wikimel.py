"""WikiMEL (Wikidata-MEL): people named in captions of Wikipedia images, linked to Wikidata.

The builder reads three releases and recognises them by their files:

- `melbench`: the sentences of MELBench (`Wikidata-MEL.json`) with the splits and entity maps of GHMFC (`splits.json`,
  `qid2ne.json`, `qid2abs.json`). Images are `<sample id>.jpg`, and `<QID>.jpg` or several per entity.
- `mimic`: the cleaned files of MIMIC's authors ([`~hf_mel.dataset_scripts.layouts.mimic`]), with a knowledge base six
  times as large.
- `kgmel`: KGMEL's files ([`~hf_mel.dataset_scripts.layouts.kgmel`]), which group the mentions by sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_mel.dataset_scripts.builder import ReleaseBuilder, mention_row
from hf_mel.dataset_scripts.image_files import read_image
from hf_mel.dataset_scripts.layouts import ghmfc, kgmel, mimic
from hf_mel.dataset_scripts.spans import locate
from hf_mel.errors import DataFormatError, DuplicateIdError

_SENTENCES = "Wikidata-MEL.json"
_SPLITS_FILE = "splits.json"
#: Names of the data set in the other layouts.
_MIMIC, _KGMEL = "WIKIMEL", "WikiMEL"
#: Split → its name in `splits.json`.
_SPLITS = {"train": "train", "validation": "dev", "test": "test"}


class WikiMel(ReleaseBuilder):
    """Builder of WikiMEL."""

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
    #: melbench: ids in `splits.json` that have a sentence. mimic: Table 3 of the MIMIC paper (KDD 2023). kgmel: unknown;
    #: only its sentences were counted (16,111 / 2,540 / 5,012).
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

    LAYOUTS = {
        "melbench": [_SENTENCES, _SPLITS_FILE, "qid2ne.json", "qid2abs.json"],
        "mimic": mimic.files(_MIMIC),
        "kgmel": kgmel.files(_KGMEL),
    }

    def mentions(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the mentions of a split."""
        if self.release.layout == "mimic":
            return mimic.mentions(self.release, _MIMIC, split, self.config.images)
        if self.release.layout == "kgmel":
            return kgmel.mentions(self.release, _KGMEL, split, self.config.images)
        return self._melbench_mentions(_SPLITS[split])

    def entities(self) -> Iterator[dict[str, Any]]:
        """Yields the knowledge base."""
        if self.release.layout == "mimic":
            return mimic.entities(self.release, self.config.entity_images)
        if self.release.layout == "kgmel":
            return kgmel.entities(self.release, _KGMEL, self.config.entity_images)
        return ghmfc.entities(self.release, "qid2ne.json", "qid2abs.json", self.config.entity_images)

    def _melbench_mentions(self, split: str) -> Iterator[dict[str, Any]]:
        release, path = self.release, self.release.root / _SENTENCES
        folder = release.find_folder(self.config.images, "mention_images", "images")
        samples = release.read_json(_SENTENCES, dict)
        keys = {"id": object, "sentence": str, "mentions": list, "answer": list}
        for sample_id in self._sample_ids(split, samples):
            if sample_id not in samples:
                release.problem("split_id_without_sentence", _SPLITS_FILE, sample_id, split)
                continue
            sample = release.check_record(_SENTENCES, sample_id, samples[sample_id], keys)
            inner_id = release.identifier(_SENTENCES, sample_id, sample["id"])
            surfaces = sample["mentions"]
            golds = [release.gold(_SENTENCES, sample_id, value) for value in sample["answer"]]
            if inner_id != sample_id:
                raise DataFormatError(
                    f"The sample has id {inner_id!r}.",
                    file=path,
                    row=sample_id,
                    remedy="Its id must be its key in the file.",
                )
            if len(surfaces) != len(golds):
                raise DataFormatError(
                    f"The sample has {len(surfaces)} mentions and {len(golds)} answers, expected the same number.",
                    file=path,
                    row=sample_id,
                )
            if not all(isinstance(surface, str) for surface in surfaces):
                raise DataFormatError("The sample has a mention that is not a string.", file=path, row=sample_id)
            image = read_image(folder, *(f"{sample_id}{suffix}" for suffix in (".jpg", ".jpeg", ".png")))
            if image is None:
                release.problem("missing_mention_image", _SENTENCES, sample_id, f"{sample_id}.jpg")
            spans = locate(sample["sentence"], surfaces)
            for k, (surface, gold, (start, end)) in enumerate(zip(surfaces, golds, spans, strict=True)):
                yield mention_row(
                    mention_id=sample_id if len(surfaces) == 1 else f"{sample_id}-{k}",
                    context_id=sample_id,
                    text=sample["sentence"],
                    mention=surface,
                    start=start,
                    end=end,
                    image=image,
                    entity_id=gold,
                )

    def _sample_ids(self, split: str, samples: dict[str, Any]) -> list[str]:
        """Returns the ids that `splits.json` lists for a split, after checking that each is in one split only."""
        release = self.release
        lists = release.check_record(
            _SPLITS_FILE, split, release.read_json(_SPLITS_FILE, dict), dict.fromkeys(_SPLITS.values(), list)
        )
        split_of: dict[str, str] = {}
        for name in _SPLITS.values():
            for value in lists[name]:
                sample_id = release.identifier(_SPLITS_FILE, name, value)
                if sample_id in split_of:
                    raise DuplicateIdError(
                        f"The id is in {name} and in {split_of[sample_id]}.",
                        file=release.root / _SPLITS_FILE,
                        row=sample_id,
                        remedy="Remove it from one of them.",
                    )
                split_of[sample_id] = name
        if split == "train":  # logged once, not for every split
            for sample_id in samples:
                if sample_id not in split_of:
                    release.problem("sentence_without_split", _SENTENCES, sample_id)
        return [sample_id for sample_id, name in split_of.items() if name == split]


BUILDER_CLASS = WikiMel
