"""Readers for releases whose layout could not be checked: keys that can be renamed, splits, samples, entity texts.

Papers or code of others describe the layouts of these releases, and the files were not available when the builders were
written. Readers therefore check every key. If a release has the same content under other keys, the user writes a
*mapping file*, a JSON object `{"our key": "key in the release"}`. A dot in a key of the release leads into an inner
object (`"meta.text"`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_mel.dataset_scripts.builder import ReleaseConfig, mention_row
from hf_mel.dataset_scripts.image_files import images_by_id, read_images
from hf_mel.dataset_scripts.release import Release
from hf_mel.dataset_scripts.spans import locate
from hf_mel.errors import DataFormatError
from hf_mel.schema import NIL

#: Types that a value may have: a string; an id (a string or a whole number); a list; an id or a list.
TEXT, ID, LIST, TEXTS = (str,), (str, int), (list,), (str, int, list)
#: Split → its names in releases.
SPLIT_NAMES = {"train": ("train",), "validation": ("dev", "valid", "val", "validation"), "test": ("test",)}


@dataclass
class MappedConfig(ReleaseConfig):
    """Configuration of a builder whose keys can be renamed.

    Args:
        mapping (`str`, *optional*): A mapping file, if the keys of the release have other names.
    """

    mapping: str | None = None


class Keys:
    """Keys of a builder and their names in the records of a release.

    Args:
        keys (sequence of `str`): Keys that the builder reads.
        file (`str` or `os.PathLike`, *optional*): A mapping file. Without it the keys have their own names.

    Raises:
        DataFormatError: The mapping file does not exist, is not an object of strings, or maps an unknown key.
    """

    def __init__(self, keys: Sequence[str], file: str | os.PathLike[str] | None = None):
        self.names = {key: key for key in keys}
        if file is None:
            return
        path = Path(file)
        form = 'Write a JSON object such as {"sentence": "text"}: our key, then the key in the release.'
        if not path.is_file():
            raise DataFormatError("The mapping file is not a file.", file=path, remedy=form)
        try:
            mapping = json.loads(path.read_bytes().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataFormatError(f"The mapping file is not JSON ({error}).", file=path, remedy=form) from error
        if not isinstance(mapping, dict):
            raise DataFormatError(
                f"The mapping file holds a {type(mapping).__name__}, expected an object.", file=path, remedy=form
            )
        for key, name in mapping.items():
            if key not in self.names:
                raise DataFormatError(
                    f"The mapping file maps {key!r}; our keys are {', '.join(keys)}.",
                    file=path,
                    row=key,
                    remedy="Remove the entry, or correct its key.",
                )
            if not isinstance(name, str) or not name:
                raise DataFormatError(
                    f"The entry maps to {name!r}, expected a key of the release.", file=path, row=key, remedy=form
                )
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
        """Returns the values of our keys in one record.

        Args:
            release ([`~hf_mel.dataset_scripts.release.Release`]): The release.
            file (`str`), row (`str` or `int`): Position of the record, for errors.
            record (`Any`): The record.
            required, optional (mapping of `str` to tuple of `type`): Keys to read and the types of their values.

        Returns:
            `dict[str, Any]`: Values by key. [`ID`]s are strings; absent optional values are `None`.

        Raises:
            DataFormatError: The record is not an object, lacks a required key, or has a value of another type. For
                missing keys the message lists those of the record and proposes a mapping file.
        """
        path = release.root / file
        if not isinstance(record, dict):
            raise DataFormatError(f"The row is a {type(record).__name__}, expected an object.", file=path, row=row)
        optional = optional or {}
        values = {key: _follow(record, self.names[key]) for key in (*required, *optional)}
        if missing := [key for key in required if values[key] is _ABSENT]:
            raise DataFormatError(
                f"The row lacks {', '.join(map(self._describe, missing))}; it has the keys"
                f" {', '.join(map(repr, record))}. Expected: {', '.join(map(self._describe, required))}.",
                file=path,
                row=row,
                remedy="If the release has other names for them, write a mapping file such as"
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
                    f"The value of {self._describe(key)} is {_type_name(value)}, expected"
                    f" {' or '.join(kind.__name__ for kind in kinds)}.",
                    file=path,
                    row=row,
                )
            values[key] = release.identifier(file, row, value) if kinds == ID else value
        return values

    def _describe(self, key: str) -> str:
        return repr(key) if self.names[key] == key else f"{key!r} (mapped to {self.names[key]!r})"

    def _example(self, record: dict[str, Any], missing: list[str], required: Mapping[str, tuple[type, ...]]) -> str:
        """A mapping file that could fit the record: unused keys with values of the right type for the missing ones."""
        unused = [name for name in record if name not in {self.names[key] for key in required}]
        example = {key: name for key, name in self.names.items() if key != name and key not in missing}
        for key in missing:
            fitting = [name for name in unused if isinstance(record[name], required[key])]
            example[key] = fitting[0] if fitting else "…"
            unused = [name for name in unused if name != example[key]]
        return json.dumps(example, ensure_ascii=False)


_ABSENT = object()


def _follow(record: dict[str, Any], name: str) -> Any:
    """Returns the value under the key or at the dotted path `name`; [`_ABSENT`] without one."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _type_name(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def as_texts(release: Release, file: str, row: str | int, value: Any, name: str) -> list[str]:
    """Returns one string, or a list of strings, as a list. Whole numbers become strings, null the empty string."""
    values = value if isinstance(value, list) else [value]
    for item in values:
        if item is not None and (isinstance(item, bool) or not isinstance(item, (str, int))):
            raise DataFormatError(
                f"The row has {_type_name(item)} among its {name}, expected a string.",
                file=release.root / file,
                row=row,
            )
    return ["" if item is None else str(item).strip() for item in values]


def as_number(release: Release, file: str, row: str | int, value: Any, name: str) -> float:
    """Returns a finite number that fits into 32 bits."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30:  # false for nan
        return float(value)
    raise DataFormatError(f"The row has {name} that is no finite number.", file=release.root / file, row=row)


def read_json_lines(release: Release, file: str) -> Iterator[tuple[int, Any]]:
    """Yields the number and the JSON value of every line that is not blank."""
    for row, line in release.read_lines(file):
        if line.strip():
            try:
                value = json.loads(line)
                if "\\u" in line:  # an escaped unpaired surrogate cannot be encoded
                    json.dumps(value, ensure_ascii=False).encode()
                yield row, value
            except (ValueError, RecursionError) as error:
                raise DataFormatError(
                    f"The line is not JSON ({error}).",
                    file=release.root / file,
                    row=row,
                    remedy="Download the file again; it may be cut off.",
                ) from error


def read_keyed_records(release: Release, file: str) -> list[tuple[str, Any]]:
    """Reads the records of a JSON object with their keys, or of a JSON list with their numbers, from 0."""
    data = release.read_json(file, object)
    if isinstance(data, dict):
        return list(data.items())
    if isinstance(data, list):
        return [(str(k), value) for k, value in enumerate(data)]
    raise DataFormatError(
        f"The file holds {_type_name(data)}, expected an object or a list.", file=release.root / file
    )


def read_entity_texts(
    release: Release, file: str | os.PathLike[str] | None, names: Iterable[str]
) -> dict[str, tuple[str, str]]:
    """Reads title and text of entities from a user's file of JSON lines with `title`, `text` and possibly `id`.

    The file may be much larger than what is needed of it, and is read line by line.

    Args:
        release ([`~hf_mel.dataset_scripts.release.Release`]): The release, which logs the digest of the file.
        file (`str` or `os.PathLike`, *optional*): The file.
        names (iterable of `str`): Ids or titles of the entities to read. A line matches by its `id`, else by its `title`.

    Returns:
        `dict[str, tuple[str, str]]`: Title and text by the name that matched.
    """
    if file is None:
        return {}
    path = Path(file)
    if not path.is_file():
        raise DataFormatError(
            "The file of entities is not a file.",
            file=path,
            remedy="Give a file of JSON lines with id, title and text.",
        )
    needed, keys = set(names), Keys(["id", "title", "text"])
    folder = Release(path.parent, {"entities": [path.name]})
    texts: dict[str, tuple[str, str]] = {}
    for row, record in read_json_lines(folder, path.name):
        values = keys.read(folder, path.name, row, record, {"title": TEXT, "text": TEXT}, {"id": ID})
        for name in (values["id"], values["title"]):
            if name in needed:
                texts.setdefault(name, (values["title"], values["text"]))
                break
    release.merge(folder)
    return texts


def split_of_context(text: str) -> str:
    """Returns the split of a context in a release without splits: 70 % train, 10 % validation, 20 % test.

    The first 8 bytes of the SHA-256 of the text (UTF-8, outer white space removed), as a big-endian number modulo 10,
    decide: 0 to 6 is train, 7 validation, 8 and 9 test. All mentions of one text get the same split.
    """
    tenth = int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big") % 10
    return "train" if tenth < 7 else "validation" if tenth == 7 else "test"


def read_splits(release: Release, file: str = "splits.json") -> dict[str, str]:
    """Reads the split of each sample from an object of lists of ids under [`SPLIT_NAMES`].

    Returns:
        `dict[str, str]`: Split by sample id.

    Raises:
        DataFormatError: A split is missing.
        DuplicateIdError: An id is in two splits, or twice in one.
    """
    path = release.root / file
    lists = release.read_json(file, dict)
    ids_of: dict[str, list[Any]] = {}
    for split, names in SPLIT_NAMES.items():
        ids = next((lists[name] for name in names if name in lists), None)
        if not isinstance(ids, list):
            raise DataFormatError(
                f"The file has no list under {' or '.join(map(repr, names))}; it has"
                f" {', '.join(map(repr, lists)) or 'no keys'}.",
                file=path,
                remedy="Give each split a list of ids.",
            )
        ids_of[split] = ids
    return release.splits_by_id(file, ids_of)


@dataclass
class Sample:
    """A context with its mentions, in the form of WikiMEL's releases and of those that followed them.

    Args:
        row (`str`): Key of the sample in its file.
        context_id (`str`): Id of the context.
        mention_ids, mentions, names, golds (list of `str`): Ids, surface forms, titles of the golds ("" if unknown) and
            ids of the golds, one per mention.
        text (`str`): The sentence.
        image (`str`): File name of the image; "" without one.
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
        """Yields a row of `mentions` for each mention that has a surface form."""
        spans = locate(self.text, self.mentions)
        for mention_id, mention, entity_id, (start, end) in zip(
            self.mention_ids, self.mentions, self.golds, spans, strict=True
        ):
            if not mention:
                release.problem("mention_without_surface", file, self.row, mention_id)
                continue
            yield mention_row(
                mention_id=mention_id,
                context_id=self.context_id,
                text=self.text,
                mention=mention,
                start=start,
                end=end,
                image=image,
                entity_id=entity_id,
            )


def entity_names(samples: Iterable[Sample]) -> dict[str, list[str]]:
    """Returns the titles that the samples give each gold, by its id and in order of appearance, without [`NIL`]."""
    names: dict[str, list[str]] = {}
    for sample in samples:
        for entity_id, name in zip(sample.golds, sample.names, strict=True):
            if entity_id != NIL:
                titles = names.setdefault(entity_id, [])
                if name and name not in titles:
                    titles.append(name)
    return names


def entity_image_reader(release: Release, folder: Path | None, file: str) -> Callable[[str], list[dict[str, Any]]]:
    """Returns a function that reads the images of an entity from `folder`, and logs entities of `file` without any."""
    image_names = images_by_id(folder)

    def read_entity_images(entity_id: str) -> list[dict[str, Any]]:
        images = read_images(folder, image_names.get(entity_id, []))
        if folder is not None and not images:
            release.problem("missing_entity_image", file, entity_id, f"{entity_id}.jpg")
        return images

    return read_entity_images
