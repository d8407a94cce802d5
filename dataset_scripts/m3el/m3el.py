"""M3EL: names in reviews of movies and faces in their images, linked to Wikipedia, by document.

The release was not available when this was written. The following layout is *ours*; it fits what the paper describes
(1,100 movies with a long review and about 41 images each, textual and visual mentions, seven candidates with priors). The
builder checks it. Keys with other names need a mapping file ([`~hf_mel.dataset_scripts.mapping`]), not code. Files are
JSON lines:

- `train.jsonl`, `val.jsonl`, `test.jsonl`: one document (movie) a line, with `document_id`, `text`, `mentions` and
  optionally `visual_mentions`. A textual mention has `mention`, `gold`, and optionally `start`, `end` (characters),
  `candidates`, `priors`. A visual mention has `image` (a file name), `gold`, and optionally `region` (x0, y0, x1, y1, in
  pixels), `candidates`, `priors`. `candidates` are ids with `priors` in the same order, or pairs of id and prior.
- `entities.jsonl`: one entity a line, with `entity_id`, `name`, and optionally `description`, `aliases`,
  `entity_images` (file names).

A review has 17,000 words on average, too many to repeat in each of its 165 rows: `text` is the 100 words before and
after the mention, and `document_id` identifies the document. The text of a visual mention is empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import datasets

from hf_mel.dataset_scripts.builder import ReleaseBuilder, mention_row
from hf_mel.dataset_scripts.image_files import read_image
from hf_mel.dataset_scripts.mapping import ID, LIST, TEXT, Keys, MappedConfig, as_number, as_texts, read_json_lines
from hf_mel.dataset_scripts.release import ReleaseLog
from hf_mel.dataset_scripts.spans import locate
from hf_mel.errors import DataFormatError
from hf_mel.schema import NO_SPAN

_SPLIT_FILES = {"train": "train.jsonl", "validation": "val.jsonl", "test": "test.jsonl"}
_ENTITIES = "entities.jsonl"
_KEYS = (
    *("document_id", "text", "mentions", "visual_mentions"),
    *("mention", "start", "end", "image", "region", "gold", "candidates", "priors"),
    *("entity_id", "name", "description", "aliases", "entity_images"),
)
#: Words kept before and after a textual mention.
_WINDOW = 100


class M3EL(ReleaseBuilder):
    """Builder of M3EL."""

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
    #: Unknown: the paper counts documents by split, but mentions (181,240) and images (45,297) only in all.
    OFFICIAL_COUNTS: dict[str, dict[str, int]] = {}

    LAYOUTS = {"documents": [*_SPLIT_FILES.values(), _ENTITIES]}
    COLUMNS = {
        "mentions": {
            "document_id": datasets.Value("string"),
            "modality": datasets.Value("string"),
            "candidate_priors": [datasets.Value("float32")],
            "region": [datasets.Value("float32")],
        }
    }
    BUILDER_CONFIG_CLASS = MappedConfig

    def open_release(self) -> ReleaseLog:
        """Reads the mapping file, too."""
        release = super().open_release()
        self.keys = Keys(_KEYS, self.config.mapping)
        return release

    def mentions(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the mentions of a split: of each document the textual ones, then the visual ones."""
        release, file = self.release, _SPLIT_FILES[split]
        for line, record in read_json_lines(release, file):
            document = self.keys.read(
                release,
                file,
                line,
                record,
                {"document_id": ID, "text": TEXT, "mentions": LIST},
                {"visual_mentions": LIST},
            )
            document_row = f"{line} (document {document['document_id']})"
            yield from self._textual_mentions(file, document_row, document)
            yield from self._visual_mentions(file, document_row, document)

    def entities(self) -> Iterator[dict[str, Any]]:
        """Yields the knowledge base."""
        release = self.release
        folder = release.find_folder(self.config.entity_images, "entity_images")
        for line, record in read_json_lines(release, _ENTITIES):
            optional = {"description": TEXT, "aliases": LIST, "entity_images": LIST}
            values = self.keys.read(release, _ENTITIES, line, record, {"entity_id": ID, "name": TEXT}, optional)
            images = []
            for file in as_texts(release, _ENTITIES, line, values["entity_images"] or [], "images"):
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
                "aliases": as_texts(release, _ENTITIES, line, values["aliases"] or [], "aliases"),
                "images": images,
            }

    def _textual_mentions(self, file: str, document_row: str, document: dict[str, Any]) -> Iterator[dict[str, Any]]:
        text = document["text"]
        required = {"mention": TEXT, "gold": (*ID, type(None))}
        optional = {"start": (int,), "end": (int,), "candidates": LIST, "priors": LIST}
        mentions = [
            self.keys.read(self.release, file, f"{document_row}, mention {k}", value, required, optional)
            for k, value in enumerate(document["mentions"])
        ]
        spans: list[tuple[int, int] | None] = []
        for mention in mentions:
            start, end = mention["start"], mention["end"]
            fits = start is not None and end is not None and 0 <= start < end and text[start:end] == mention["mention"]
            spans.append((start, end) if fits else None)
        without_span = [k for k, span in enumerate(spans) if span is None]
        located = dict(zip(without_span, locate(text, [mentions[k]["mention"] for k in without_span]), strict=True))
        for k, (mention, given_span) in enumerate(zip(mentions, spans, strict=True)):
            row = f"{document_row}, mention {k}"
            span = given_span or located[k]
            if span[0] == NO_SPAN:
                self.release.problem("mention_not_in_document", file, row, mention["mention"])
                continue
            if k in located and mention["start"] is not None:
                self.release.problem("offsets_do_not_fit", file, row, mention["mention"])
            left, right = window(text, *span)
            yield mention_row(
                mention_id=f"{document['document_id']}-t{k}",
                text=left + mention["mention"] + right,
                mention=mention["mention"],
                start=len(left),
                end=len(left) + len(mention["mention"]),
                modality="text",
                region=[],
                **self._linking_columns(file, row, document, mention),
            )

    def _visual_mentions(self, file: str, document_row: str, document: dict[str, Any]) -> Iterator[dict[str, Any]]:
        release = self.release
        folder = release.find_folder(self.config.images, "images", "mention_images")
        required = {"image": TEXT, "gold": (*ID, type(None))}
        optional = {"region": LIST, "candidates": LIST, "priors": LIST}
        for k, value in enumerate(document["visual_mentions"] or []):
            row = f"{document_row}, visual mention {k}"
            mention = self.keys.read(release, file, row, value, required, optional)
            region = [as_number(release, file, row, side, "a region") for side in mention["region"] or []]
            if region and not (len(region) == 4 and region[0] < region[2] and region[1] < region[3]):
                raise DataFormatError(
                    f"The mention has the region {region}, expected x0, y0, x1, y1 with x0 < x1 and y0 < y1.",
                    file=release.root / file,
                    row=row,
                )
            image = read_image(folder, mention["image"])
            if image is None:  # without its image a visual mention has no content
                release.problem("visual_mention_without_image", file, row, mention["image"])
                continue
            yield mention_row(
                mention_id=f"{document['document_id']}-v{k}",
                image=image,
                modality="image",
                region=region,
                **self._linking_columns(file, row, document, mention),
            )

    def _linking_columns(
        self, file: str, row: str, document: dict[str, Any], mention: dict[str, Any]
    ) -> dict[str, Any]:
        """Returns document, gold and candidates, which textual and visual mentions have in the same form."""
        release = self.release
        candidates, priors = mention["candidates"] or [], mention["priors"] or []
        if candidates and all(isinstance(pair, list) and len(pair) == 2 for pair in candidates):
            candidates, priors = [pair[0] for pair in candidates], [pair[1] for pair in candidates]
        if priors and len(priors) != len(candidates):
            raise DataFormatError(
                f"The mention has {len(candidates)} candidates and {len(priors)} priors, expected the same number.",
                file=release.root / file,
                row=row,
            )
        return {
            "document_id": document["document_id"],
            "entity_id": release.gold(file, row, mention["gold"]),
            "candidates": [release.identifier(file, row, candidate) for candidate in candidates],
            "candidate_priors": [as_number(release, file, row, prior, "a prior") for prior in priors],
        }


def window(text: str, start: int, end: int, words: int = _WINDOW) -> tuple[str, str]:
    """Returns the text before `start` and after `end`, at most `words` words each, with the white space between them.

    At most 40 characters a word are searched, so long words leave fewer of them.
    """
    left, right = text[max(0, start - 40 * words) : start].lstrip(), text[end : end + 40 * words].rstrip()
    starts = [match.start() for match in re.finditer(r"\S+", left)]
    ends = [match.end() for match in re.finditer(r"\S+", right)]
    return left[starts[-words] if len(starts) > words else 0 :], right[
        : ends[words - 1] if len(ends) > words else None
    ]


BUILDER_CLASS = M3EL
