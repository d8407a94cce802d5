"""Your own data: mentions, entities and, if there are any, posts, in JSONL, JSON, CSV or TSV files beside their images.

- `mentions`: a file, or a folder of one file per split (`train.jsonl`, `dev.csv`, …). Columns as in
  [`~hf_mel.schema.mention_features`]: `text`, `mention` and `entity_id` are needed; `mention_id` (or `id`),
  `context_id`, `start`, `end`, `mention_type`, `topic`, `image`, `candidates` and `split` are not. A row without
  `entity_id` must say so: an empty cell, null, or "NIL" in any spelling.
- `entities`: a file or a folder of files with the columns of [`~hf_mel.data.loading.read_entity_file`].
- `posts`: the same with `post_id` (or `id`), `entity_id`, `text`, `image`.

The split of a mention is its cell `split`; without such a column, the name of its file; else, with the option
`split=hash`, its context decides ([`hashed_split`]). A context that has no `context_id` is a text with an image.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from hf_mel.dataset_scripts.release import NIL_SPELLINGS, Findings, locate, read_image
from hf_mel.errors import DataFormatError, DuplicateIdError, KnowledgeBaseError, SpanError, UnknownEntityError
from hf_mel.row_files import (
    ENTITY_COLUMNS,
    ROW_SUFFIXES,
    entity_row,
    id_cell,
    image_file,
    read_rows,
    text_cell,
    texts_cell,
)
from hf_mel.schema import NIL, NO_SPAN, entity_features, mention_features, post_features

_MENTION_COLUMNS = {name: name for name in (*mention_features(), "split")} | {"id": "mention_id"}
_POST_COLUMNS = {name: name for name in post_features()} | {"id": "post_id"}
#: What a split may be called → its name in the data set.
_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def hashed_split(context_id: str) -> str:
    """The split of a context: SHA-256 of its id modulo 10 is 0 for validation, 1 for test, else it is train's."""
    return {0: "validation", 1: "test"}.get(int(hashlib.sha256(context_id.encode()).hexdigest(), 16) % 10, "train")


@dataclass
class JsonlConfig(datasets.BuilderConfig):
    """Where the rows lie.

    Args:
        mentions (`str`): File of the mentions, or a folder of files named after their splits.
        entities (`str`): File of the entities, or a folder of such files.
        posts (`str`, *optional*): File of the posts, or a folder of such files.
        images (`str`, *optional*): The folder where the image paths of mentions and posts start; by default that of
            their file.
        entity_images (`str`, *optional*): The same for entities.
        split (`str`, *optional*): "hash" deals the contexts out to train, validation and test, 80 : 10 : 10.
    """

    mentions: str | None = None
    entities: str | None = None
    posts: str | None = None
    images: str | None = None
    entity_images: str | None = None
    split: str | None = None


class Jsonl(datasets.GeneratorBasedBuilder):
    """Builds the configurations `mentions`, `entities` (kb) and `posts` (kb) from a user's own files."""

    NAME = "jsonl"
    TITLE = "Own data"
    LICENSE = "unknown"
    LANGUAGES = ()
    HOMEPAGE = "https://huggingface.co/docs/hub/datasets-adding"
    CITATION = """\
@misc{own,
  note = {Write here how this data is to be cited.}
}"""
    TASK = "your own mentions and entities, from JSONL, JSON, CSV or TSV files"
    DOWNLOAD = "nothing: --mentions FILE --entities FILE, rows as in hf_mel.schema"
    REDISTRIBUTION = ""
    NEEDS_RAW = False
    OFFICIAL_COUNTS: dict[str, dict[str, int]] = {"mentions": {}, "entities": {}, "posts": {}}

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = JsonlConfig
    BUILDER_CONFIGS = [
        JsonlConfig(name="mentions", version=VERSION, description="One row per mention."),
        JsonlConfig(name="entities", version=VERSION, description="The knowledge base."),
        JsonlConfig(name="posts", version=VERSION, description="Texts about the entities."),
    ]
    DEFAULT_CONFIG_NAME = "mentions"

    @classmethod
    def configs_in(cls, data_dir: Any, options: Mapping[str, Any]) -> list[str]:
        """The configurations there are files for."""
        return [c.name for c in cls.BUILDER_CONFIGS if c.name != "posts" or options.get("posts") is not None]

    def _info(self) -> datasets.DatasetInfo:
        features = {"mentions": mention_features, "entities": entity_features, "posts": post_features}
        return datasets.DatasetInfo(features=features[self.config.name](), homepage=self.HOMEPAGE)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        self.release = Findings()
        if self.config.name == "entities":
            splits: dict[str, list[dict[str, Any]]] = {"kb": list(self._entities())}
        elif self.config.name == "posts":
            splits = {"kb": list(self._posts())}
        else:
            splits = self._mentions()
        return [datasets.SplitGenerator(name=name, gen_kwargs={"rows": rows}) for name, rows in splits.items()]

    def _generate_examples(self, rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in rows:
            row = dict(row)
            for column in ("image", "images"):
                if isinstance(row.get(column), Path):
                    row[column] = _stored(row[column])
                elif isinstance(row.get(column), list):
                    row[column] = [_stored(path) for path in row[column]]
            yield row.get("mention_id") or row.get("post_id") or row["entity_id"], row

    def _entities(self) -> Iterator[dict[str, Any]]:
        folder = _folder(self.config.entity_images)
        seen: dict[str, str] = {}
        for path in self._files("entities"):
            for line, record in self._rows(path, ENTITY_COLUMNS):
                row = entity_row(path, line, record, folder)
                if row["entity_id"].strip().casefold() in NIL_SPELLINGS:
                    raise DataFormatError(
                        f"the id {row['entity_id']!r} stands for no entity.",
                        file=path,
                        row=line,
                        remedy="Choose another.",
                    )
                _once(seen, row["entity_id"], path, line)
                yield row
        if not seen:
            raise KnowledgeBaseError(
                "holds no entities.", file=self.config.entities, remedy="A knowledge base needs at least one."
            )

    def _mentions(self) -> dict[str, list[dict[str, Any]]]:
        if self.config.split not in (None, "hash"):
            raise DataFormatError(f"the option split={self.config.split!r} is not 'hash'.", file=self.config.mentions)
        known = {row["entity_id"] for row in self._entities()}
        folder = _folder(self.config.images)
        rows: list[tuple[Path, int, dict[str, Any]]] = []
        for path in self._files("mentions"):
            records = list(self._rows(path, _MENTION_COLUMNS))
            column = any("split" in record for _, record in records)
            for line, record in records:
                row = self._mention(path, line, record, folder)
                row["split"] = self._split(path, line, record, column, row["context_id"])
                _check_gold(path, line, row["entity_id"], known)
                rows.append((path, line, row))
        if not rows:
            raise DataFormatError("holds no mentions.", file=self.config.mentions, remedy="Check the file.")
        _name_and_place(rows)
        splits = dict.fromkeys([*dict.fromkeys(_SPLIT_NAMES.values()), *sorted({row["split"] for _, _, row in rows})])
        dealt = {split: [row for _, _, row in rows if row["split"] == split] for split in splits}
        for _, _, row in rows:
            del row["split"]
        return {split: part for split, part in dealt.items() if part}

    def _mention(self, path: Path, line: int, record: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
        """One row; `mention_id` may be empty, and `start` is `None` where the file leaves the span open."""
        text = text_cell(path, line, record, "text", True)
        mention = text_cell(path, line, record, "mention", True)
        if "entity_id" not in record:
            raise DataFormatError(
                "has no 'entity_id'.", file=path, row=line, remedy=f"Write the gold's id, or {NIL!r} if there is none."
            )
        gold = id_cell(path, line, record, "entity_id")
        image = text_cell(path, line, record, "image")
        context = id_cell(path, line, record, "context_id")
        start, end = (_offset(path, line, record, column) for column in ("start", "end"))
        if (start is None) != (end is None):
            raise SpanError("has one of 'start' and 'end'.", file=path, row=line, remedy="Give both, or neither.")
        if start is not None and end is not None and (start, end) != (NO_SPAN, NO_SPAN):
            found = text[start:end] if 0 <= start <= end else ""
            if found != mention:
                [(at, to)] = locate(text, [mention])
                stands = f"It stands at {at}:{to}." if at >= 0 else "It does not stand in the text."
                raise SpanError(
                    f"{found[:80]!r} stands at {start}:{end}, not the mention {mention!r}.",
                    file=path,
                    row=line,
                    remedy=f"{stands} Offsets count characters from 0, end exclusive; leave both out to have it found.",
                )
        return {
            "mention_id": id_cell(path, line, record, "mention_id"),
            "context_id": context or "c" + hashlib.sha256(f"{text}\0{image}".encode()).hexdigest()[:16],
            "text": text,
            "mention": mention,
            "start": start,
            "end": end,
            "mention_type": text_cell(path, line, record, "mention_type"),
            "topic": text_cell(path, line, record, "topic"),
            "image": image_file(path, line, image, folder) if image else None,
            "entity_id": NIL if gold.strip().casefold() in NIL_SPELLINGS else gold,
            "candidates": texts_cell(path, line, record, "candidates"),
        }

    def _split(self, path: Path, line: int, record: Mapping[str, Any], column: bool, context_id: str) -> str:
        if column:
            name = text_cell(path, line, record, "split", True).strip()
            split = _SPLIT_NAMES.get(name.casefold(), name)
            if not re.fullmatch(r"[A-Za-z]\w*", split, re.ASCII) or split == "all":
                raise DataFormatError(
                    f"{name!r} cannot be a split.", file=path, row=line, remedy="Letters, digits and _ make its name."
                )
            return split
        if path.stem.casefold() in _SPLIT_NAMES:
            return _SPLIT_NAMES[path.stem.casefold()]
        if self.config.split == "hash":
            return hashed_split(context_id)
        raise DataFormatError(
            "does not say which split its rows belong to.",
            file=path,
            remedy="Add a column 'split', name one file per split (train.jsonl, validation.jsonl, test.jsonl) and give"
            " their folder, or deal the contexts out 80 : 10 : 10 with --option split=hash.",
        )

    def _posts(self) -> Iterator[dict[str, Any]]:
        known = {row["entity_id"] for row in self._entities()}
        folder = _folder(self.config.images)
        seen: dict[str, str] = {}
        number = 0
        for path in self._files("posts"):
            for line, record in self._rows(path, _POST_COLUMNS):
                image = text_cell(path, line, record, "image")
                row: dict[str, Any] = {
                    "post_id": id_cell(path, line, record, "post_id") or f"post-{number}",
                    "entity_id": id_cell(path, line, record, "entity_id", True),
                    "text": text_cell(path, line, record, "text", True),
                    "image": image_file(path, line, image, folder) if image else None,
                }
                _check_gold(path, line, row["entity_id"], known)
                _once(seen, row["post_id"], path, line)
                number += 1
                yield row

    def _files(self, option: str) -> list[Path]:
        """The files of an option, which may be a folder of them."""
        given = getattr(self.config, option)
        if given is None:
            raise DataFormatError(
                f"no {option} were given.", file=f"--{option}", remedy=f"Pass a file or a folder: --{option} FILE."
            )
        path = Path(given)
        if not path.is_dir():
            return [path]
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in ROW_SUFFIXES and file.is_file())
        if option == "mentions":
            files = [file for file in files if file.stem.casefold() in _SPLIT_NAMES]
            files.sort(key=lambda file: list(_SPLIT_NAMES).index(file.stem.casefold()))
        else:
            others = {*_SPLIT_NAMES, *({"entities", "posts"} - {option})}
            files = [file for file in files if file.stem.casefold() not in others]
        if not files:
            names = "train, validation or test" if option == "mentions" else option
            raise DataFormatError(
                f"holds no file of {option}.", file=path, remedy=f"Call it {names}{' or '.join(ROW_SUFFIXES)}."
            )
        return files

    def _rows(self, path: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from read_rows(path, columns)
        name = path.name if path.name not in self.release.sha256 else f"{path.parent.name}/{path.name}"
        self.release.sha256[name] = hashlib.sha256(path.read_bytes()).hexdigest()


def _folder(given: str | os.PathLike[str] | None) -> Path | None:
    if given is not None and not Path(given).is_dir():
        raise DataFormatError("is not a folder.", file=given, remedy="Give the folder that holds the images.")
    return None if given is None else Path(given)


def _stored(path: Path) -> dict[str, Any] | None:
    return read_image(path.parent, path.name)


def _offset(path: Path, line: int, record: Mapping[str, Any], column: str) -> int | None:
    text = id_cell(path, line, record, column)
    if not text:
        return None
    if not re.fullmatch("-?[0-9]{1,9}", text):
        raise SpanError(f"{column!r} is {text[:40]!r}, expected a whole number.", file=path, row=line)
    return int(text)


def _once(seen: dict[str, str], row_id: str, path: Path, line: int) -> None:
    if row_id in seen:
        raise DuplicateIdError(f"the id {row_id!r} is that of {seen[row_id]} too.", file=path, row=line)
    seen[row_id] = f"{path.name}, row {line}"


def _check_gold(path: Path, line: int, gold: str, known: set[str]) -> None:
    if gold != NIL and gold not in known:
        raise UnknownEntityError(
            f"the gold {gold!r} is not among the entities.",
            file=path,
            row=line,
            remedy=f"Add it to the entities, or write {NIL!r}.",
        )


def _name_and_place(rows: list[tuple[Path, int, dict[str, Any]]]) -> None:
    """Fills in mention ids ("<context>-<number>") and spans; rows of one context must agree on text and image."""
    contexts: dict[str, list[tuple[Path, int, dict[str, Any]]]] = {}
    for path, line, row in rows:
        contexts.setdefault(row["context_id"], []).append((path, line, row))
    for context_id, members in contexts.items():
        first_path, first_line, first = members[0]
        for path, line, row in members:
            if (row["text"], row["image"]) != (first["text"], first["image"]):
                raise DataFormatError(
                    f"is of the context {context_id!r}, but its text or image is not that of {first_path.name}, row"
                    f" {first_line}.",
                    file=path,
                    row=line,
                    remedy="The mentions of one context share both.",
                )
        taken = [(row["start"], row["end"]) for _, _, row in members if row["start"] not in (None, NO_SPAN)]
        open_rows = [row for _, _, row in members if row["start"] is None]
        spans = locate(first["text"], [row["mention"] for row in open_rows], taken)
        for row, (start, end) in zip(open_rows, spans, strict=True):
            row["start"], row["end"] = start, end
        for k, (_, _, row) in enumerate(members):
            row["mention_id"] = row["mention_id"] or (context_id if len(members) == 1 else f"{context_id}-{k}")
    seen: dict[str, str] = {}
    for path, line, row in rows:
        _once(seen, row["mention_id"], path, line)


BUILDER_CLASS = Jsonl
