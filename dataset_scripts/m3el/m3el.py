"""M3EL: names in reviews of movies and faces in their images, linked to Wikipedia, by document.

The release was not at hand when this was written. What the paper says of it (1,100 movies with a long review and about
41 images each, textual and visual mentions, seven candidates with priors) fits the following layout, which is *ours*;
it is verified, and other names of keys need a mapping file (see `mapping.py`), not code. Files are JSON lines.

- `train.jsonl`, `val.jsonl`, `test.jsonl`: one document (movie) a line, with `document_id`, `text`, `mentions` and
  `visual_mentions` (which may be absent). A textual mention has `mention`, `gold`, and where they are there `start`,
  `end` (characters), `candidates`, `priors`; a visual one `image` (a file name), `gold`, and where they are there
  `region` (x0, y0, x1, y1, in pixels), `candidates`, `priors`. `candidates` are ids with `priors` beside them, or
  pairs of id and prior.
- `entities.jsonl`: one entity a line, with `entity_id`, `name`, and where they are there `description`, `aliases`,
  `entity_images` (file names).

A review has 17,000 words on average, too many to repeat in each of its 165 rows: `text` is the 100 words before and
after the mention, and `document_id` keeps the document together. The text of a visual mention is empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets

from hf_mel.dataset_scripts.mapping import ID, LIST, TEXT, Keys, json_lines, listed, number
from hf_mel.dataset_scripts.release import Release, locate, read_image
from hf_mel.errors import DataFormatError
from hf_mel.schema import NO_SPAN, entity_features, mention_features

_SPLITS = {"train": "train.jsonl", "validation": "val.jsonl", "test": "test.jsonl"}
_ENTITIES = "entities.jsonl"
_LAYOUTS = {"documents": [*_SPLITS.values(), _ENTITIES]}
_KEYS = (
    *("document_id", "text", "mentions", "visual_mentions"),
    *("mention", "start", "end", "image", "region", "gold", "candidates", "priors"),
    *("entity_id", "name", "description", "aliases", "entity_images"),
)
#: Words kept on either side of a textual mention.
_WINDOW = 100


@dataclass
class M3ELConfig(datasets.BuilderConfig):
    """Where the raw files lie.

    Args:
        data_dir (`str`): Folder of the JSON lines.
        images (`str`, *optional*): Folder of the movies' images; by default looked for beside the JSON lines.
        entity_images (`str`, *optional*): Folder of the entity images; the same.
        mapping (`str`, *optional*): A mapping file, where the release's keys have other names.
    """

    images: str | None = None
    entity_images: str | None = None
    mapping: str | None = None


class M3EL(datasets.GeneratorBasedBuilder):
    """Builds the configurations `mentions` (train, validation, test) and `entities` (kb) of M3EL."""

    NAME = "m3el"
    TITLE = "M3EL"
    TASK = "names in movie reviews and faces in movie images → Wikipedia"
    LICENSE = "unknown"
    LANGUAGES = ("en",)
    HOMEPAGE = "https://jingrug.github.io/research/M3EL"
    DOWNLOAD = "documents, images and entities from the project page of M3EL, as JSON lines in the layout of the card"
    REDISTRIBUTION = "No licence is known; the reviews and images are of IMDb, TMDb and others."
    CITATION = """\
@inproceedings{gan2021multimodal,
  title = {Multimodal Entity Linking: A New Dataset and A Baseline},
  author = {Gan, Jingru and Luo, Jinchang and Wang, Haiwei and Wang, Shuhui and He, Wei and Huang, Qingming},
  booktitle = {Proceedings of the 29th ACM International Conference on Multimedia},
  year = {2021},
  pages = {993--1001}
}"""
    NEEDS_RAW = True
    #: The paper counts 181,240 textual mentions and 45,297 images in all, and documents, but no mentions, by split.
    OFFICIAL_COUNTS: dict[str, dict[str, int]] = {}

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = M3ELConfig
    BUILDER_CONFIGS = [
        M3ELConfig(name="mentions", version=VERSION, description="Textual and visual mentions of the documents."),
        M3ELConfig(name="entities", version=VERSION, description="The knowledge base."),
    ]
    DEFAULT_CONFIG_NAME = "mentions"

    def _info(self) -> datasets.DatasetInfo:
        if self.config.name == "entities":
            features = entity_features()
        else:
            features = mention_features(
                document_id=datasets.Value("string"),
                modality=datasets.Value("string"),
                candidate_priors=[datasets.Value("float32")],
                region=[datasets.Value("float32")],
            )
        return datasets.DatasetInfo(features=features, homepage=self.HOMEPAGE, citation=self.CITATION)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        self.release = Release(self.config.data_dir, _LAYOUTS)
        self.keys = Keys(_KEYS, self.config.mapping)
        splits = ["kb"] if self.config.name == "entities" else list(_SPLITS)
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in splits]

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        release = self.release
        if split == "kb":
            for row in self._entities():
                yield row["entity_id"], row
            return
        file = _SPLITS[split]
        for line, record in json_lines(release, file):
            document = self.keys.read(
                release,
                file,
                line,
                record,
                {"document_id": ID, "text": TEXT, "mentions": LIST},
                {"visual_mentions": LIST},
            )
            where = f"{line} (document {document['document_id']})"
            for row in self._textual(file, where, document):
                yield row["mention_id"], row
            for row in self._visual(file, where, document):
                yield row["mention_id"], row

    def _textual(self, file: str, where: str, document: dict[str, Any]) -> Iterator[dict[str, Any]]:
        text, keys = document["text"], {"start": (int,), "end": (int,), "candidates": LIST, "priors": LIST}
        mentions = [
            self.keys.read(
                self.release, file, f"{where}, mention {k}", value, {"mention": TEXT, "gold": (*ID, type(None))}, keys
            )
            for k, value in enumerate(document["mentions"])
        ]
        spans: list[tuple[int, int] | None] = []
        for mention in mentions:
            start, end = mention["start"], mention["end"]
            fits = start is not None and end is not None and 0 <= start < end and text[start:end] == mention["mention"]
            spans.append((start, end) if fits else None)
        lost = [k for k, span in enumerate(spans) if span is None]
        for k, span in zip(lost, locate(text, [mentions[k]["mention"] for k in lost]), strict=True):
            spans[k] = span
        searched = set(lost)
        for k, (mention, span) in enumerate(zip(mentions, spans, strict=True)):
            row = f"{where}, mention {k}"
            if span is None or span[0] == NO_SPAN:
                self.release.problem("mention_not_in_document", file, row, mention["mention"])
                continue
            if k in searched and mention["start"] is not None:
                self.release.problem("offsets_do_not_fit", file, row, mention["mention"])
            left, right = window(text, *span)
            mention_id = f"{document['document_id']}-t{k}"
            yield {
                "mention_id": mention_id,
                "context_id": mention_id,
                "text": left + mention["mention"] + right,
                "mention": mention["mention"],
                "start": len(left),
                "end": len(left) + len(mention["mention"]),
                "image": None,
                "modality": "text",
                "region": [],
                **self._linked(file, row, document, mention),
            }

    def _visual(self, file: str, where: str, document: dict[str, Any]) -> Iterator[dict[str, Any]]:
        release = self.release
        folder = release.folder(self.config.images, "images", "mention_images")
        required, optional = (
            {"image": TEXT, "gold": (*ID, type(None))},
            {"region": LIST, "candidates": LIST, "priors": LIST},
        )
        for k, value in enumerate(document["visual_mentions"] or []):
            row = f"{where}, visual mention {k}"
            mention = self.keys.read(release, file, row, value, required, optional)
            region = [number(release, file, row, side, "a region") for side in mention["region"] or []]
            if region and not (len(region) == 4 and region[0] < region[2] and region[1] < region[3]):
                raise DataFormatError(
                    f"has the region {region}, expected x0, y0, x1, y1 with x0 < x1 and y0 < y1.",
                    file=release.root / file,
                    row=row,
                )
            image = read_image(folder, mention["image"])
            if image is None:  # nothing is left of a visual mention then
                release.problem("visual_mention_without_image", file, row, mention["image"])
                continue
            mention_id = f"{document['document_id']}-v{k}"
            yield {
                "mention_id": mention_id,
                "context_id": mention_id,
                "text": "",
                "mention": "",
                "start": NO_SPAN,
                "end": NO_SPAN,
                "image": image,
                "modality": "image",
                "region": region,
                **self._linked(file, row, document, mention),
            }

    def _linked(self, file: str, row: str, document: dict[str, Any], mention: dict[str, Any]) -> dict[str, Any]:
        """The columns that textual and visual mentions fill alike."""
        release = self.release
        candidates, priors = mention["candidates"] or [], mention["priors"] or []
        if candidates and all(isinstance(pair, list) and len(pair) == 2 for pair in candidates):
            candidates, priors = [pair[0] for pair in candidates], [pair[1] for pair in candidates]
        if priors and len(priors) != len(candidates):
            raise DataFormatError(
                f"has {len(candidates)} candidates and {len(priors)} priors.", file=release.root / file, row=row
            )
        return {
            "document_id": document["document_id"],
            "mention_type": "",
            "topic": "",
            "entity_id": release.gold(file, row, mention["gold"]),
            "candidates": [release.identifier(file, row, candidate) for candidate in candidates],
            "candidate_priors": [number(release, file, row, prior, "a prior") for prior in priors],
        }

    def _entities(self) -> Iterator[dict[str, Any]]:
        release = self.release
        folder = release.folder(self.config.entity_images, "entity_images")
        for line, record in json_lines(release, _ENTITIES):
            optional = {"description": TEXT, "aliases": LIST, "entity_images": LIST}
            values = self.keys.read(release, _ENTITIES, line, record, {"entity_id": ID, "name": TEXT}, optional)
            images = []
            for file in listed(release, _ENTITIES, line, values["entity_images"] or [], "images"):
                image = read_image(folder, file)
                if image is None:
                    release.problem("missing_entity_image", _ENTITIES, line, file)
                else:
                    images.append(image)
            yield {
                "entity_id": values["entity_id"],
                "name": values["name"],
                "description": values["description"] or "",
                "attributes": "",
                "aliases": listed(release, _ENTITIES, line, values["aliases"] or [], "aliases"),
                "images": images,
            }


def window(text: str, start: int, end: int, words: int = _WINDOW) -> tuple[str, str]:
    """What stands before `start` and after `end` in `text`, at most `words` words each, with the white space between.

    Of words of more than 40 characters on average, fewer are kept.
    """
    left, right = text[max(0, start - 40 * words) : start].lstrip(), text[end : end + 40 * words].rstrip()
    starts = [found.start() for found in re.finditer(r"\S+", left)]
    ends = [found.end() for found in re.finditer(r"\S+", right)]
    return left[starts[-words] if len(starts) > words else 0 :], right[
        : ends[words - 1] if len(ends) > words else None
    ]


BUILDER_CLASS = M3EL
