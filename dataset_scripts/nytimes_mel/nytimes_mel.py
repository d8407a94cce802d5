"""NYTimes-MEL: people in captions of the New York Times, several to a caption, linked to Wikidata.

The release was not at hand when this was written; what is expected is the form that the authors' code (MMEL) reads and
writes, and it is verified. Other names of keys need a mapping file (see `mapping.py`), not code. Three layouts are
read, the first whose files are there:

- `nel_12n`: `nel_12n.json`, an object of samples with `sentence`, `imgPath` and the parallel lists `mentions`,
  `entities`, `answer`.
- `nel_121`: `nel_121.json`, the same one mention at a time, as texts; the mentions of one caption have the keys `k-0`,
  `k-1`, …
- `dataset`: `dataset.json`, as the first without `answer`, and `ne2qid.json` (entity name → QID).

In the first step of the authors' construction the sentence still holds the entities' full names, later each is
replaced by its mention. Both are read: a name is replaced by its mention where the mention does not stand in the
sentence outside the names. The answer "missing" (a name without QID) becomes NIL.

The splits were not released as far as is known: `splits.json` (an object of lists of keys under `train`, `dev` and
`test`) is taken if it is there, else a caption's split follows from its text (`split_of_context`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets

from hf_mel.dataset_scripts.mapping import (
    ID,
    LIST,
    TEXT,
    Keys,
    Sample,
    entity_images,
    keyed_records,
    listed,
    named_entities,
    split_by_id,
    split_of_context,
)
from hf_mel.dataset_scripts.release import Release, read_image
from hf_mel.errors import DataFormatError
from hf_mel.schema import NIL, entity_features, mention_features

_LAYOUTS = {
    "nel_12n": ["nel_12n.json"],
    "nel_121": ["nel_121.json"],
    "dataset": ["dataset.json", "ne2qid.json"],
}
_KEYS = ("sentence", "imgPath", "mentions", "entities", "answer")
_SPLITS = ("train", "validation", "test")


@dataclass
class NYTimesMelConfig(datasets.BuilderConfig):
    """Where the raw files lie.

    Args:
        data_dir (`str`): Folder of the raw JSON files.
        images (`str`, *optional*): Folder of the captions' images; by default looked for beside the JSON files.
        entity_images (`str`, *optional*): Folder of the entity images, `<QID>.jpg`; the same.
        mapping (`str`, *optional*): A mapping file, where the release's keys have other names.
    """

    images: str | None = None
    entity_images: str | None = None
    mapping: str | None = None


class NYTimesMel(datasets.GeneratorBasedBuilder):
    """Builds the configurations `mentions` (train, validation, test) and `entities` (kb) of NYTimes-MEL."""

    NAME = "nytimes_mel"
    TITLE = "NYTimes-MEL"
    TASK = "people in news captions, several to a caption → Wikidata"
    LICENSE = "unknown"
    LANGUAGES = ("en",)
    HOMEPAGE = "https://github.com/ycm094/MMEL-main"
    DOWNLOAD = (
        "nel_12n.json (or nel_121.json, or dataset.json with ne2qid.json), the images and entity_imgs/ of NYTimes-MEL;"
        " the repository of MMEL holds the code only, so ask its authors"
    )
    REDISTRIBUTION = "No licence is stated; the captions and images belong to the New York Times and others."
    CITATION = """\
@inproceedings{yang2023mmel,
  title = {{MMEL}: A Joint Learning Framework for Multi-Mention Entity Linking},
  author = {Yang, Chengmei and He, Bowei and Wu, Yimeng and Xing, Chao and He, Lianghua and Ma, Chen},
  booktitle = {Proceedings of the Thirty-Ninth Conference on Uncertainty in Artificial Intelligence},
  year = {2023}
}"""
    NEEDS_RAW = True
    #: Table 1 of the paper counts captions by split, and 14,689 mentions in all, but none by split.
    OFFICIAL_COUNTS: dict[str, dict[str, int]] = {}

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = NYTimesMelConfig
    BUILDER_CONFIGS = [
        NYTimesMelConfig(name="mentions", version=VERSION, description="Mentions with their caption, image and gold."),
        NYTimesMelConfig(name="entities", version=VERSION, description="The people of ne2qid.json and all golds."),
    ]
    DEFAULT_CONFIG_NAME = "mentions"

    def _info(self) -> datasets.DatasetInfo:
        features = entity_features() if self.config.name == "entities" else mention_features()
        return datasets.DatasetInfo(features=features, homepage=self.HOMEPAGE, citation=self.CITATION)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        self.release = Release(self.config.data_dir, _LAYOUTS)
        self.keys = Keys(_KEYS, self.config.mapping)
        self.file = _LAYOUTS[self.release.layout][0]
        splits = ["kb"] if self.config.name == "entities" else list(_SPLITS)
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in splits]

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if split == "kb":
            for row in self._entities():
                yield row["entity_id"], row
            return
        release = self.release
        folder = release.folder(self.config.images, "images", "imgs", "mention_images")
        where = split_by_id(release) if (release.root / "splits.json").is_file() else None
        seen: set[str] = set()
        for sample in self._samples():
            # splits.json may name a caption, or each of its mentions.
            keys = (sample.context_id, *sample.mention_ids)
            seen.update(keys)
            own = (
                split_of_context(sample.text)
                if where is None
                else next((where[key] for key in keys if key in where), None)
            )
            if own is None and split == "train":  # once, not in every split
                release.problem("caption_without_split", self.file, sample.row)
            if own != split:
                continue
            if split_of_names := [key for key in sample.mention_ids if where and where.get(key, own) != own]:
                raise DataFormatError(
                    f"puts the mentions of one caption into two splits ({', '.join(split_of_names)}).",
                    file=release.root / "splits.json",
                    row=sample.context_id,
                )
            image = read_image(folder, sample.image) if sample.image else None
            if image is None:
                release.problem("missing_mention_image", self.file, sample.row, sample.image)
            for mention_id, answer in zip(sample.mention_ids, sample.golds, strict=True):
                if answer == NIL:
                    release.problem("name_without_qid", self.file, sample.row, mention_id)
            for row in sample.rows(release, self.file, image):
                yield row["mention_id"], row
        for key, own in (where or {}).items():
            if own == split and key not in seen:
                release.problem("split_id_without_caption", "splits.json", key, own)

    def _samples(self) -> Iterator[Sample]:
        release = self.release
        records = keyed_records(release, self.file)
        if release.layout == "nel_121":
            yield from self._joined(records)
            return
        qids = self._qids() if release.layout == "dataset" else None
        for row, value in records:
            required = {"sentence": TEXT, "imgPath": TEXT, "mentions": LIST, "entities": LIST}
            if qids is None:
                required["answer"] = LIST
            values = self.keys.read(release, self.file, row, value, required)
            mentions = listed(release, self.file, row, values["mentions"], "mentions")
            names = listed(release, self.file, row, values["entities"], "entities")
            answers = values["answer"] if qids is None else [qids.get(name) for name in names]
            yield self._sample(row, values, mentions, names, answers, [])

    def _joined(self, records: list[tuple[str, Any]]) -> Iterator[Sample]:
        """The mentions `k-0`, `k-1`, … of one caption as one sample, where they have the same sentence and image."""
        keys = {"sentence": TEXT, "imgPath": TEXT, "mentions": TEXT, "entities": TEXT, "answer": (*ID, type(None))}
        read = {row: self.keys.read(self.release, self.file, row, value, keys) for row, value in records}
        groups: dict[tuple[str, str, str], list[str]] = {}
        for row, values in read.items():
            stem = re.sub(r"-\d+\Z", "", row)
            context = stem if f"{stem}-0" in read else row
            groups.setdefault((context, values["sentence"], values["imgPath"]), []).append(row)
        shared = Counter(context for context, _, _ in groups)
        for (context, _, _), rows in groups.items():
            of_rows = [read[row] for row in rows]
            yield self._sample(
                context if shared[context] == 1 else rows[0],
                of_rows[0],
                [values["mentions"] for values in of_rows],
                [values["entities"] for values in of_rows],
                [values["answer"] for values in of_rows],
                rows,
            )

    def _sample(
        self,
        row: str,
        values: dict[str, Any],
        mentions: list[str],
        names: list[str],
        answers: list[Any],
        ids: list[str],
    ) -> Sample:
        if not len(mentions) == len(names) == len(answers):
            raise DataFormatError(
                f"has {len(mentions)} mentions, {len(names)} entities and {len(answers)} answers; they must be as many.",
                file=self.release.root / self.file,
                row=row,
            )
        return Sample(
            row=row,
            context_id=row,
            mention_ids=ids or ([row] if len(mentions) == 1 else [f"{row}-{k}" for k in range(len(mentions))]),
            text=with_mentions(values["sentence"], mentions, names),
            mentions=mentions,
            names=names,
            golds=[self._gold(self.file, row, answer) for answer in answers],
            image=values["imgPath"],
        )

    def _qids(self) -> dict[str, str]:
        qids = self.release.read_json("ne2qid.json", dict)
        return {name: self._gold("ne2qid.json", name, qid) for name, qid in qids.items()}

    def _gold(self, file: str, row: str, answer: Any) -> str:
        return NIL if answer == "missing" else self.release.gold(file, row, answer)

    def _entities(self) -> Iterator[dict[str, Any]]:
        release = self.release
        folder = release.folder(self.config.entity_images, "entity_imgs", "entity_images")
        images = entity_images(release, folder, "entities")
        names: dict[str, list[str]] = {}
        if (release.root / "ne2qid.json").is_file():
            for name, qid in self._qids().items():
                if qid == NIL:
                    release.problem("name_without_qid", "ne2qid.json", name)
                else:
                    names.setdefault(qid, []).append(name)
        for qid, known in named_entities(self._samples()).items():
            others = names.setdefault(qid, [])
            others += [name for name in known if name not in others]
        attributes = release.texts("qid2abs.json") if (release.root / "qid2abs.json").is_file() else {}
        for qid, known in names.items():
            yield {
                "entity_id": qid,
                "name": known[0] if known else qid,
                "description": "",
                "attributes": attributes.get(qid, ""),
                "aliases": known[1:],
                "images": images(qid),
            }


def with_mentions(sentence: str, mentions: list[str], names: list[str]) -> str:
    """The sentence with each entity's name replaced by its mention, where that was not done before.

    A mention that stands in the sentence outside all names was put there before; its entity's name, should it stand
    there too, is left alone. Longer names go first, and what was put in is not replaced again.
    """
    wanted = [name for name in dict.fromkeys(names) if name]
    if not wanted:
        return sentence
    pattern = re.compile("|".join(map(re.escape, sorted(wanted, key=len, reverse=True))))
    outside = pattern.split(sentence)
    replace: dict[str, str] = {}
    for mention, name in zip(mentions, names, strict=True):
        there = any(mention in part for part in outside) or (name in mention and mention in sentence)
        if mention and name and not there:
            replace.setdefault(name, mention)
    return pattern.sub(lambda found: replace.get(found[0], found[0]), sentence)


BUILDER_CLASS = NYTimesMel
