"""NYTimes-MEL: people in captions of the New York Times, several to a caption, linked to Wikidata.

The release was not available when this was written. The builder expects the form that the authors' code (MMEL) reads and
writes, and checks it. Keys with other names need a mapping file ([`~hf_mel.dataset_scripts.mapping`]), not code. It reads
the first of these layouts whose files are present:

- `nel_12n`: `nel_12n.json`, an object of samples with `sentence`, `imgPath` and the lists `mentions`, `entities`,
  `answer`, which have the same length.
- `nel_121`: `nel_121.json`, the same with one mention a sample, as strings. The mentions of one caption have the keys
  `k-0`, `k-1`, …
- `dataset`: `dataset.json`, as the first without `answer`, and `ne2qid.json` (QID by name of the entity).

In the first step of the authors' construction a sentence has the full names of the entities; later each name is replaced
by its mention. The builder reads both: it replaces a name if its mention does not occur in the sentence outside the
names. The answer "missing" (a name without QID) becomes NIL.

The splits were not released, as far as we know. The builder takes `splits.json` (an object of lists of keys under
`train`, `dev` and `test`) if it exists; otherwise the split of a caption follows from its text (`split_of_context`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from hf_mel.dataset_scripts.builder import ReleaseBuilder
from hf_mel.dataset_scripts.image_files import read_image
from hf_mel.dataset_scripts.mapping import (
    ID,
    LIST,
    TEXT,
    Keys,
    MappedConfig,
    Sample,
    as_texts,
    entity_image_reader,
    entity_names,
    read_keyed_records,
    read_splits,
    split_of_context,
)
from hf_mel.dataset_scripts.release import ReleaseLog
from hf_mel.errors import DataFormatError
from hf_mel.schema import NIL

_QIDS = "ne2qid.json"
_KEYS = ("sentence", "imgPath", "mentions", "entities", "answer")


class NYTimesMel(ReleaseBuilder):
    """Builder of NYTimes-MEL. Its knowledge base is the people of `ne2qid.json` and all golds."""

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
    #: Unknown: Table 1 of the paper counts captions by split, but mentions (14,689) only in all.
    OFFICIAL_COUNTS: dict[str, dict[str, int]] = {}

    LAYOUTS = {
        "nel_12n": ["nel_12n.json"],
        "nel_121": ["nel_121.json"],
        "dataset": ["dataset.json", _QIDS],
    }
    BUILDER_CONFIG_CLASS = MappedConfig

    def open_release(self) -> ReleaseLog:
        """Reads the mapping file, too."""
        release = super().open_release()
        self.keys = Keys(_KEYS, self.config.mapping)
        self.file = self.LAYOUTS[str(release.layout)][0]
        return release

    def mentions(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the mentions of a split."""
        release = self.release
        folder = release.find_folder(self.config.images, "images", "imgs", "mention_images")
        split_of = read_splits(release) if release.find_file("splits.json") else None
        all_keys: set[str] = set()
        for sample in self._samples():
            # splits.json may list a caption, or each of its mentions.
            keys = (sample.context_id, *sample.mention_ids)
            all_keys.update(keys)
            sample_split = (
                split_of_context(sample.text)
                if split_of is None
                else next((split_of[key] for key in keys if key in split_of), None)
            )
            if sample_split is None and split == "train":  # logged once, not for every split
                release.problem("caption_without_split", self.file, sample.row)
            if sample_split != split:
                continue
            if elsewhere := [key for key in sample.mention_ids if split_of and split_of.get(key, split) != split]:
                raise DataFormatError(
                    f"The mentions of one caption are in two splits ({', '.join(elsewhere)}).",
                    file=release.root / "splits.json",
                    row=sample.context_id,
                    remedy="Put all of them into one split.",
                )
            image = read_image(folder, sample.image) if sample.image else None
            if image is None:
                release.problem("missing_mention_image", self.file, sample.row, sample.image)
            for mention_id, answer in zip(sample.mention_ids, sample.golds, strict=True):
                if answer == NIL:
                    release.problem("name_without_qid", self.file, sample.row, mention_id)
            yield from sample.rows(release, self.file, image)
        for key, listed_split in (split_of or {}).items():
            if listed_split == split and key not in all_keys:
                release.problem("split_id_without_caption", "splits.json", key, listed_split)

    def entities(self) -> Iterator[dict[str, Any]]:
        """Yields the knowledge base."""
        release = self.release
        folder = release.find_folder(self.config.entity_images, "entity_imgs", "entity_images")
        read_entity_images = entity_image_reader(release, folder, "entities")
        names: dict[str, list[str]] = {}
        if release.find_file(_QIDS):
            for name, qid in self._read_qids().items():
                if qid == NIL:
                    release.problem("name_without_qid", _QIDS, name)
                else:
                    names.setdefault(qid, []).append(name)
        for qid, titles in entity_names(self._samples()).items():
            listed = names.setdefault(qid, [])
            listed += [title for title in titles if title not in listed]
        attributes = release.read_texts("qid2abs.json") if release.find_file("qid2abs.json") else {}
        for qid, titles in names.items():
            yield {
                "entity_id": qid,
                "name": titles[0] if titles else qid,
                "description": "",
                "attributes": attributes.get(qid, ""),
                "aliases": titles[1:],
                "images": read_entity_images(qid),
            }

    def _samples(self) -> Iterator[Sample]:
        release = self.release
        records = read_keyed_records(release, self.file)
        if release.layout == "nel_121":
            yield from self._joined_samples(records)
            return
        qids = self._read_qids() if release.layout == "dataset" else None
        for row, value in records:
            required = {"sentence": TEXT, "imgPath": TEXT, "mentions": LIST, "entities": LIST}
            if qids is None:
                required["answer"] = LIST
            values = self.keys.read(release, self.file, row, value, required)
            mentions = as_texts(release, self.file, row, values["mentions"], "mentions")
            names = as_texts(release, self.file, row, values["entities"], "entities")
            answers = values["answer"] if qids is None else [qids.get(name) for name in names]
            yield self._sample(row, values, mentions, names, answers, [])

    def _joined_samples(self, records: list[tuple[str, Any]]) -> Iterator[Sample]:
        """Yields the mentions `k-0`, `k-1`, … of a caption as one sample if they have the same sentence and image."""
        keys = {"sentence": TEXT, "imgPath": TEXT, "mentions": TEXT, "entities": TEXT, "answer": (*ID, type(None))}
        values_of = {row: self.keys.read(self.release, self.file, row, value, keys) for row, value in records}
        groups: dict[tuple[str, str, str], list[str]] = {}
        for row, values in values_of.items():
            stem = re.sub(r"-\d+\Z", "", row)
            context = stem if f"{stem}-0" in values_of else row
            groups.setdefault((context, values["sentence"], values["imgPath"]), []).append(row)
        groups_of_context = Counter(context for context, _, _ in groups)
        for (context, _, _), rows in groups.items():
            members = [values_of[row] for row in rows]
            yield self._sample(
                context if groups_of_context[context] == 1 else rows[0],
                members[0],
                [values["mentions"] for values in members],
                [values["entities"] for values in members],
                [values["answer"] for values in members],
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
                f"The sample has {len(mentions)} mentions, {len(names)} entities and {len(answers)} answers, expected the"
                " same number of each.",
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

    def _read_qids(self) -> dict[str, str]:
        return {name: self._gold(_QIDS, name, qid) for name, qid in self.release.read_json(_QIDS, dict).items()}

    def _gold(self, file: str, row: str, answer: Any) -> str:
        return NIL if answer == "missing" else self.release.gold(file, row, answer)


def with_mentions(sentence: str, mentions: list[str], names: list[str]) -> str:
    """Returns the sentence with the names of entities replaced by their mentions.

    A mention that occurs in the sentence outside all names was inserted before; the name of its entity is then not
    replaced. Longer names are replaced first, and inserted mentions are not replaced again.
    """
    unique_names = [name for name in dict.fromkeys(names) if name]
    if not unique_names:
        return sentence
    pattern = re.compile("|".join(map(re.escape, sorted(unique_names, key=len, reverse=True))))
    outside = pattern.split(sentence)
    replacements: dict[str, str] = {}
    for mention, name in zip(mentions, names, strict=True):
        inserted = any(mention in part for part in outside) or (name in mention and mention in sentence)
        if mention and name and not inserted:
            replacements.setdefault(name, mention)
    return pattern.sub(lambda match: replacements.get(match[0], match[0]), sentence)


BUILDER_CLASS = NYTimesMel
