"""What the builders of releases whose layout is partly a guess share: keys that can be renamed, lines, splits, texts.

The layouts these builders read were documented by others, in papers or code, and could not be checked against the
files. So every key is verified on reading; a release that says the same under other names is read with a *mapping
file*, a JSON object `{"our key": "key in the release"}`, where a dot leads into an inner object (`"meta.text"`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_mel.dataset_scripts.release import Release, images_by_id, locate, read_image
from hf_mel.errors import DataFormatError, DuplicateIdError
from hf_mel.schema import NIL

#: What a value may be: a text; an id (a text or a whole number); a list; a text or a list of texts; a number.
TEXT, ID, LIST, TEXTS, NUMBER = (str,), (str, int), (list,), (str, int, list), (int, float)
#: Our name of each split → its names in the releases.
SPLIT_NAMES = {"train": ("train",), "validation": ("dev", "valid", "val", "validation"), "test": ("test",)}


class Keys:
    """Where a builder's keys stand in the records of a release: under their own names, or where a mapping file says.

    Args:
        ours (sequence of `str`): The keys the builder reads.
        file (`str` or `os.PathLike`, *optional*): The mapping file.

    Raises:
        DataFormatError: The mapping file is missing, is not an object of texts, or names a key that is not ours.
    """

    def __init__(self, ours: Sequence[str], file: str | os.PathLike[str] | None = None):
        self.names = {key: key for key in ours}
        if file is None:
            return
        path, form = Path(file), 'Write a JSON object such as {"sentence": "text"}: our key, then that of the release.'
        if not path.is_file():
            raise DataFormatError("is not a file.", file=path, remedy=form)
        try:
            given = json.loads(path.read_bytes().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataFormatError(f"is not JSON ({error}).", file=path, remedy=form) from error
        if not isinstance(given, dict):
            raise DataFormatError(f"holds a {type(given).__name__}, expected an object.", file=path, remedy=form)
        for key, name in given.items():
            if key not in self.names:
                raise DataFormatError(f"maps {key!r}; our keys are {', '.join(ours)}.", file=path, row=key)
            if not isinstance(name, str) or not name:
                raise DataFormatError(f"maps it to {name!r}, expected a key.", file=path, row=key, remedy=form)
            self.names[key] = name

    def read(
        self,
        release: Release,
        file: str,
        row: str | int,
        record: Any,
        required: Mapping[str, tuple[type, ...]],
        optional: Mapping[str, tuple[type, ...]] | None = None,
    ) -> dict[str, Any]:
        """The values of our keys in one record, of the kinds asked for (`ID`s as `str`); `None` for absent optional ones.

        Raises:
            DataFormatError: The record is no object, lacks a required key (the message lists the keys it has and shows
                a mapping file made from them), or a value is of another kind.
        """
        path = release.root / file
        if not isinstance(record, dict):
            raise DataFormatError(f"is a {type(record).__name__}, expected an object.", file=path, row=row)
        optional = optional or {}
        values = {key: _follow(record, self.names[key]) for key in (*required, *optional)}
        if missing := [key for key in required if values[key] is _ABSENT]:
            raise DataFormatError(
                f"lacks {', '.join(map(self._named, missing))}; it has the keys {', '.join(map(repr, record))}."
                f" Expected: {', '.join(map(self._named, required))}.",
                file=path,
                row=row,
                remedy="If they stand under other names, write a mapping file such as"
                f" {self._example(record, missing, required)} and pass it as the option mapping"
                " (--option mapping=FILE).",
            )
        for key, value in values.items():
            if key in optional and (value is _ABSENT or value is None):
                values[key] = None
                continue
            kinds = required.get(key) or optional[key]
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise DataFormatError(
                    f"{self._named(key)} is {_type(value)}, expected {' or '.join(k.__name__ for k in kinds)}.",
                    file=path,
                    row=row,
                )
            values[key] = release.identifier(file, row, value) if kinds == ID else value
        return values

    def _named(self, key: str) -> str:
        return repr(key) if self.names[key] == key else f"{key!r} (mapped to {self.names[key]!r})"

    def _example(self, record: dict[str, Any], missing: list[str], required: Mapping[str, tuple[type, ...]]) -> str:
        free = [name for name in record if name not in {self.names[key] for key in required}]
        example = {key: name for key, name in self.names.items() if key != name and key not in missing}
        for key in missing:
            fitting = [name for name in free if isinstance(record[name], required[key])]
            example[key] = fitting[0] if fitting else "…"
            free = [name for name in free if name != example[key]]
        return json.dumps(example, ensure_ascii=False)


_ABSENT = object()


def _follow(record: dict[str, Any], name: str) -> Any:
    """The value under `name`, or at the dotted path `name`; `_ABSENT` if there is none."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _type(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def listed(release: Release, file: str, row: str | int, value: Any, what: str) -> list[str]:
    """A text, or a list of texts, as a list; whole numbers become texts and null the empty text."""
    values = value if isinstance(value, list) else [value]
    for item in values:
        if item is not None and (isinstance(item, bool) or not isinstance(item, (str, int))):
            raise DataFormatError(
                f"has {_type(item)} among its {what}, expected a text.", file=release.root / file, row=row
            )
    return ["" if item is None else str(item).strip() for item in values]


def number(release: Release, file: str, row: str | int, value: Any, what: str) -> float:
    """A finite number, small enough for 32 bits."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30:  # nan is not
        return float(value)
    raise DataFormatError(f"has {what} that is no finite number.", file=release.root / file, row=row)


def json_lines(release: Release, file: str) -> Iterator[tuple[int, Any]]:
    """The JSON value of every line that is not blank, with the number of the line."""
    for k, line in release.lines(file):
        if line.strip():
            try:
                value = json.loads(line)
                if "\\u" in line:  # JSON can spell half of a surrogate pair, which no file can hold
                    json.dumps(value, ensure_ascii=False).encode()
                yield k, value
            except (ValueError, RecursionError) as error:
                raise DataFormatError(
                    f"is not JSON ({error}).",
                    file=release.root / file,
                    row=k,
                    remedy="Download the file again; it may be cut off.",
                ) from error


def entity_texts(
    release: Release, file: str | os.PathLike[str] | None, wanted: Iterable[str]
) -> dict[str, tuple[str, str]]:
    """Title and text, by id, of the `wanted` entities in a user's file of JSON lines (`id`, `title`, `text`).

    A line is wanted by its `id` or, failing that, its `title`; `id` may be absent. The file may be much larger than
    what is wanted of it: it is read line by line.
    """
    if file is None:
        return {}
    path = Path(file)
    if not path.is_file():
        raise DataFormatError("is not a file.", file=path, remedy="Give a file of JSON lines with id, title and text.")
    names, keys = set(wanted), Keys(["id", "title", "text"])
    own = Release(path.parent, {"entities": [path.name]})
    found: dict[str, tuple[str, str]] = {}
    for k, record in json_lines(own, path.name):
        values = keys.read(own, path.name, k, record, {"title": TEXT, "text": TEXT}, {"id": ID})
        for name in (values["id"], values["title"]):
            if name in names:
                found.setdefault(name, (values["title"], values["text"]))
                break
    release.sha256.update(own.sha256)
    for kind, entries in own.problems.items():
        release.problems.setdefault(kind, []).extend(entries)
    return found


def split_of_context(text: str) -> str:
    """The split of a context where the release has none: 70 % train, 10 % validation, 20 % test.

    SHA-256 of the text (UTF-8, outer white space removed), its first 8 bytes as a big-endian number, modulo 10:
    0 to 6 train, 7 validation, 8 and 9 test. All mentions of one text fall together.
    """
    tenth = int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big") % 10
    return "train" if tenth < 7 else "validation" if tenth == 7 else "test"


def split_by_id(release: Release, file: str = "splits.json") -> dict[str, str]:
    """Sample id → our split, from an object of lists of ids under train, dev (or valid, val, validation) and test.

    Raises:
        DataFormatError: A split is missing.
        DuplicateIdError: An id stands in two splits, or twice in one.
    """
    path = release.root / file
    where: dict[str, str] = {}
    splits = release.read_json(file, dict)
    for split, names in SPLIT_NAMES.items():
        ids = next((splits[name] for name in names if name in splits), None)
        if not isinstance(ids, list):
            raise DataFormatError(
                f"has no list under {' or '.join(map(repr, names))}; it has {', '.join(map(repr, splits))}.", file=path
            )
        for value in ids:
            sample_id = release.identifier(file, split, value)
            if sample_id in where:
                raise DuplicateIdError(f"is in {where[sample_id]} and in {split}.", file=path, row=sample_id)
            where[sample_id] = split
    return where


@dataclass
class Sample:
    """A context and its mentions, as WikiMEL's releases and those that followed its form have them.

    Args:
        row (`str`): Its key in the file.
        context_id (`str`): Names the context.
        mention_ids, mentions, names, golds (list of `str`): Parallel; a name is the title of the gold, "" if unknown.
        text (`str`): The sentence.
        image (`str`): File name of its image; "" if it has none.
    """

    row: str
    context_id: str
    mention_ids: list[str]
    text: str
    mentions: list[str]
    names: list[str]
    golds: list[str]
    image: str

    def rows(self, release: Release, file: str, image: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """Its rows of `mentions`; a mention without a surface form is left out."""
        spans = locate(self.text, self.mentions)
        for mention_id, mention, entity_id, (start, end) in zip(
            self.mention_ids, self.mentions, self.golds, spans, strict=True
        ):
            if not mention:
                release.problem("mention_without_surface", file, self.row, mention_id)
                continue
            yield {
                "mention_id": mention_id,
                "context_id": self.context_id,
                "text": self.text,
                "mention": mention,
                "start": start,
                "end": end,
                "mention_type": "",
                "topic": "",
                "image": image,
                "entity_id": entity_id,
                "candidates": [],
            }


def named_entities(samples: Iterable[Sample]) -> dict[str, list[str]]:
    """The golds of the samples with the names the samples give them, in the order they come; without [`NIL`]."""
    names: dict[str, list[str]] = {}
    for sample in samples:
        for entity_id, name in zip(sample.golds, sample.names, strict=True):
            if entity_id != NIL:
                known = names.setdefault(entity_id, [])
                if name and name not in known:
                    known.append(name)
    return names


def entity_images(release: Release, folder: Path | None, file: str) -> Callable[[str], list[dict[str, Any]]]:
    """A function from an entity's id to its images in `folder`; it lists the entities of `file` that have none."""
    names = images_by_id(folder)

    def of(entity_id: str) -> list[dict[str, Any]]:
        found = [image for name in names.get(entity_id, []) if (image := read_image(folder, name))]
        if folder is not None and not found:
            release.problem("missing_entity_image", file, entity_id, f"{entity_id}.jpg")
        return found

    return of


def keyed_records(release: Release, file: str) -> list[tuple[str, Any]]:
    """The records of a JSON file with their keys: those of an object, or of a list by number, from 0."""
    data = release.read_json(file, object)
    if isinstance(data, dict):
        return list(data.items())
    if isinstance(data, list):
        return [(str(k), value) for k, value in enumerate(data)]
    raise DataFormatError(f"holds {_type(data)}, expected an object or a list.", file=release.root / file)
