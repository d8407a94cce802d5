"""A user's own data: mentions, entities and optionally posts, in JSONL, JSON, CSV or TSV files beside their images.

- `mentions`: a file, or a folder with one file per split (`train.jsonl`, `dev.csv`, …). Columns are those of
  [`~hf_mel.schema.mention_features`]. `text`, `mention` and `entity_id` are required; `mention_id` (or `id`),
  `context_id`, `start`, `end`, `mention_type`, `topic`, `image`, `candidates` and `split` are optional. A mention without
  gold has an empty cell, null, or "NIL" in any spelling as its `entity_id`, unless an entity has that spelling as its id.
- `entities`: a file, or a folder of files, with the columns of [`~hf_mel.row_files.entity_row`].
- `posts`: the same with `post_id` (or `id`), `entity_id`, `text`, `image`.

The split of a mention is its cell `split`. Without that column it is the name of the file, and with the option
`split=hash` it follows from the context ([`hashed_split`]). Rows without `context_id` share a context if they have the
same text and image.

All bad rows are collected, so that one error tells them all.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from hf_mel.dataset_scripts.builder import ReleaseBuilder, ReleaseConfig, mention_row
from hf_mel.dataset_scripts.image_files import read_image
from hf_mel.dataset_scripts.release import NIL_SPELLINGS, ReleaseLog
from hf_mel.dataset_scripts.spans import locate
from hf_mel.errors import (
    DataFormatError,
    DuplicateIdError,
    ImageError,
    KnowledgeBaseError,
    MelError,
    SpanError,
    UnknownEntityError,
)
from hf_mel.row_columns import ColumnMapping
from hf_mel.row_files import (
    ENTITY_COLUMNS,
    ROW_SUFFIXES,
    bad_rows_error,
    column_names,
    entity_row,
    id_cell,
    ids_cell,
    image_file,
    other_unicode_form,
    read_rows,
    text_cell,
    texts_cell,
)
from hf_mel.schema import NIL, NO_SPAN, mention_features, post_features

_MENTION_COLUMNS = {name: name for name in (*mention_features(), "split")} | {"id": "mention_id"}
_POST_COLUMNS = {name: name for name in post_features()} | {"id": "post_id"}
#: Option of the builder → the columns of its files.
_COLUMNS = {"entities": ENTITY_COLUMNS, "mentions": _MENTION_COLUMNS, "posts": _POST_COLUMNS}
#: Gives the split of a row from its line, its cells and the id of its context.
_SplitReader: TypeAlias = Callable[[int, Mapping[str, Any], str], str]
#: Name that a split may have in the user's files → its name in the data set.
_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def hashed_split(context_id: str) -> str:
    """Returns the split of a context: SHA-256 of its id modulo 10 is 0 for validation, 1 for test, else train."""
    return {0: "validation", 1: "test"}.get(int(hashlib.sha256(context_id.encode()).hexdigest(), 16) % 10, "train")


@dataclass
class JsonlConfig(ReleaseConfig):
    """Files and folders of the rows.

    Args:
        mentions (`str`): File of the mentions, or a folder of files named after their splits.
        entities (`str`): File of the entities, or a folder of entity files.
        posts (`str`, *optional*): File of the posts, or a folder of post files.
        images (`str`, *optional*): Folder to which the image paths of mentions and posts are relative. Defaults to the
            folder of their file.
        entity_images (`str`, *optional*): The same for entities.
        split (`str`, *optional*): "hash" assigns contexts to train, validation and test by their ids, 80 : 10 : 10.
        column (`str` or list of `str`, *optional*): Assignments of columns that have other names in the files, such as
            "name=artist" or "attributes=gender,placeOfBirth" ([`~hf_mel.row_columns.ColumnMapping.parse`]). Each counts
            for the files that have these columns.
        ignore_other_columns (`bool`): Whether unknown columns are left out. Default: they are errors.
        inverted_names (`bool`): Whether "Forename Surname" is an alias of an entity named "Surname, Forename".
    """

    mentions: str | None = None
    entities: str | None = None
    posts: str | None = None
    split: str | None = None
    column: str | list[str] | None = None
    ignore_other_columns: bool | str = False
    inverted_names: bool | str = False


class Jsonl(ReleaseBuilder):
    """Builder of a user's own data."""

    NAME = "jsonl"
    TITLE = "Own data"
    TASK = "your own mentions and entities, from JSONL, JSON, CSV or TSV files"
    LICENSE = "unknown"
    LANGUAGES = ()
    HOMEPAGE = "https://huggingface.co/docs/hub/datasets-adding"
    DOWNLOAD = "nothing: --mentions FILE --entities FILE, rows as in hf_mel.schema"
    REDISTRIBUTION = ""
    CITATION = """\
@misc{own,
  note = {Write here how this data is to be cited.}
}"""
    NEEDS_RAW = False
    OFFICIAL_COUNTS: dict[str, dict[str, int]] = {"mentions": {}, "entities": {}, "posts": {}}

    CONFIGS = {
        "mentions": "One row per mention.",
        "entities": "The knowledge base.",
        "posts": "Texts about the entities.",
    }
    BUILDER_CONFIG_CLASS = JsonlConfig

    @classmethod
    def configs_in(cls, data_dir: Any, options: Mapping[str, Any]) -> list[str]:
        """Returns the configurations that the user gave files for."""
        return [config for config in cls.CONFIGS if config != "posts" or options.get("posts") is not None]

    def open_release(self) -> ReleaseLog:
        """Returns the log of the files, after checking that they have the assigned columns."""
        column = self.config.column or []
        self.bad_rows: list[MelError] = []
        self.mapping = ColumnMapping.parse(
            [column] if isinstance(column, str) else column,
            ignore_others=_flag("ignore_other_columns", self.config.ignore_other_columns),
            inverted_names=_flag("inverted_names", self.config.inverted_names),
        )
        self.mapping.check_targets({**ENTITY_COLUMNS, **_MENTION_COLUMNS, **_POST_COLUMNS})
        if self.mapping.sources:
            for option, columns in _COLUMNS.items():
                if getattr(self.config, option) is not None:
                    for path in self._files(option):
                        column_names(path, columns, self.mapping)
            self.mapping.check_used()
        return ReleaseLog()

    def splits(self) -> list[str]:
        """Reads the mentions and returns their splits."""
        self._entity_rows()
        self.rows_by_split = self._mention_rows()
        self._raise_bad_rows()
        return list(self.rows_by_split)

    def mentions(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the mentions of a split."""
        for row in self.rows_by_split[split]:
            yield {**row, "image": _read_cell(row["image"])}

    def entities(self) -> Iterator[dict[str, Any]]:
        """Yields the knowledge base."""
        rows = self._entity_rows()
        if self.bad_rows:  # told together with those of the other files
            for option, read in (("mentions", self._mention_rows), ("posts", self._post_rows)):
                if getattr(self.config, option) is not None:
                    self._collect(read)
        self._raise_bad_rows()
        for row in rows:
            yield {**row, "images": [_read_cell(path) for path in row["images"]]}

    def posts(self) -> Iterator[dict[str, Any]]:
        """Yields the posts."""
        self._entity_rows()
        rows = self._post_rows()
        self._raise_bad_rows()
        for row in rows:
            yield {**row, "image": _read_cell(row["image"])}

    def _collect(self, read: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function; its error becomes that of a bad row."""
        try:
            return read(*arguments)
        except MelError as error:
            self.bad_rows.append(error)
            return None

    def _raise_bad_rows(self) -> None:
        if self.bad_rows:
            raise bad_rows_error(self.bad_rows)

    def _entity_rows(self) -> list[dict[str, Any]]:
        """Returns the good rows of the entities, with paths for images."""
        folder = _image_folder(self.config.entity_images)
        self.entity_positions: dict[str, str] = {}  # also of bad rows
        rows = []
        for path in self._files("entities"):
            for line, record in self._read_rows(path, ENTITY_COLUMNS, ("id", "name")):
                row = self._collect(self._entity, path, line, record, folder)
                if row is not None:
                    rows.append(row)
        if not rows and not self.bad_rows:
            raise KnowledgeBaseError(
                "The file holds no entities.", file=self.config.entities, remedy="Write at least one."
            )
        return rows

    def _entity(self, path: Path, line: int, record: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
        entity_id = id_cell(path, line, record, "id", True)
        _check_unique(self.entity_positions, entity_id, path, line)
        inverted_names = self.mapping.inverted_names
        row = entity_row(path, line, {**record, "image": None}, inverted_names=inverted_names)
        if self.config.name == "entities":  # the other configurations need only the ids
            names = texts_cell(path, line, record, "image")
            row["images"] = self._existing_images(path, line, names, folder, "missing_entity_image")
            self.origins[entity_id] = (path.name, str(line))
        return row

    def _mention_rows(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the good rows of the mentions by split, with paths for images."""
        if self.config.split not in (None, "hash"):
            raise DataFormatError(
                f"The option split={self.config.split!r} is not 'hash'.",
                file=self.config.mentions,
                remedy="Give split=hash, or leave the option out.",
            )
        folder = _image_folder(self.config.images)
        rows: list[tuple[Path, int, dict[str, Any]]] = []
        for path in self._files("mentions"):
            records = list(self._read_rows(path, _MENTION_COLUMNS, ("text", "mention", "entity_id")))
            if not records:
                continue
            split_of = self._split_reader(path, any("split" in record for _, record in records))
            for line, record in records:
                row = self._collect(self._mention, path, line, record, folder, split_of)
                if row is not None:
                    rows.append((path, line, row))
        if not rows and not self.bad_rows:
            raise DataFormatError(
                "The file holds no mentions.", file=self.config.mentions, remedy="Write at least one."
            )
        self.bad_rows += _complete_contexts(rows)
        self.origins = {row["mention_id"]: (path.name, str(line)) for path, line, row in rows}
        rows_by_split: dict[str, list[dict[str, Any]]] = {split: [] for split in _SPLIT_NAMES.values()}
        rows_by_split |= {split: [] for split in sorted({row["split"] for _, _, row in rows} - rows_by_split.keys())}
        for _, _, row in rows:
            rows_by_split[row.pop("split")].append(row)
        return {split: members for split, members in rows_by_split.items() if members}

    def _mention(
        self, path: Path, line: int, record: Mapping[str, Any], folder: Path | None, split_of: _SplitReader
    ) -> dict[str, Any]:
        """Returns one row. `mention_id` may be empty, and `start` is `None` if the file has no span."""
        text = text_cell(path, line, record, "text", True)
        mention = text_cell(path, line, record, "mention", True)
        if "entity_id" not in record:
            raise DataFormatError(
                "The row has no 'entity_id'.",
                file=path,
                row=line,
                remedy=f"Write the gold's id, or {NIL!r} if there is none.",
            )
        gold = id_cell(path, line, record, "entity_id")
        # An id is any string: "None" or "null" names an entity if an entity has it.
        is_nil = gold not in self.entity_positions and gold.casefold() in NIL_SPELLINGS
        entity_id = NIL if is_nil else gold
        _check_gold(path, line, entity_id, self.entity_positions)
        image = text_cell(path, line, record, "image")
        context_id = id_cell(path, line, record, "context_id")
        context_id = context_id or "c" + hashlib.sha256(f"{text}\0{image}".encode()).hexdigest()[:16]
        if other_unicode_form(text, mention):
            # The same letters: the mention is found if it is written as the text is.
            same = next((form for form in _unicode_forms(mention) if form in text), None)
            if same is not None:
                self.release.problem("mention_in_other_unicode_form", path.name, line, mention)
                mention = same
        start, end = (_offset_cell(path, line, record, column) for column in ("start", "end"))
        if (start is None) != (end is None):
            raise SpanError(
                "The row has only one of 'start' and 'end'.", file=path, row=line, remedy="Give both, or neither."
            )
        if start is not None and end is not None and (start, end) != (NO_SPAN, NO_SPAN):
            at_span = text[start:end] if 0 <= start <= end else ""
            if at_span != mention:
                [(first, last)] = locate(text, [mention])
                position = f"The mention is at {first}:{last}." if first >= 0 else "The mention is not in the text."
                raise SpanError(
                    f"The text at {start}:{end} is {at_span[:80]!r}, not the mention {mention!r}.",
                    file=path,
                    row=line,
                    remedy=f"{position} Offsets count characters from 0, end exclusive; leave both out to search for it.",
                )
        return mention_row(
            mention_id=id_cell(path, line, record, "mention_id"),
            context_id=context_id,
            text=text,
            mention=mention,
            start=start,
            end=end,
            mention_type=text_cell(path, line, record, "mention_type"),
            topic=text_cell(path, line, record, "topic"),
            image=self._existing_image(path, line, image, folder, "missing_mention_image"),
            entity_id=entity_id,
            candidates=ids_cell(path, line, record, "candidates"),
            split=split_of(line, record, context_id),
        )

    def _split_reader(self, path: Path, has_split_column: bool) -> _SplitReader:
        """Returns a function that gives the split of a row from its line, its cells and the id of its context."""
        if has_split_column:
            return lambda line, record, context_id: _split_cell(path, line, record)
        if path.stem.casefold() in _SPLIT_NAMES:
            return lambda line, record, context_id: _SPLIT_NAMES[path.stem.casefold()]
        if self.config.split == "hash":
            return lambda line, record, context_id: hashed_split(context_id)
        raise DataFormatError(
            "The file does not say which split its rows belong to.",
            file=path,
            remedy="Add a column 'split', or name one file per split (train.jsonl, validation.jsonl, test.jsonl) and give"
            " their folder, or assign contexts to splits 80 : 10 : 10 with --option split=hash.",
        )

    def _post_rows(self) -> list[dict[str, Any]]:
        """Returns the good rows of the posts, with paths for images."""
        folder = _image_folder(self.config.images)
        first_rows: dict[str, str] = {}
        rows: list[dict[str, Any]] = []

        def post(path: Path, line: int, record: Mapping[str, Any]) -> None:
            image = text_cell(path, line, record, "image")
            row: dict[str, Any] = {
                "post_id": id_cell(path, line, record, "post_id") or f"post-{len(rows)}",
                "entity_id": id_cell(path, line, record, "entity_id", True),
                "text": text_cell(path, line, record, "text", True),
                "image": self._existing_image(path, line, image, folder, "missing_post_image"),
            }
            self.origins[row["post_id"]] = (path.name, str(line))
            _check_gold(path, line, row["entity_id"], self.entity_positions)
            _check_unique(first_rows, row["post_id"], path, line)
            rows.append(row)

        for path in self._files("posts"):
            for line, record in self._read_rows(path, _POST_COLUMNS, ("entity_id", "text")):
                self._collect(post, path, line, record)
        return rows

    def _existing_image(self, path: Path, line: int, name: str, folder: Path | None, kind: str) -> Path | None:
        images = self._existing_images(path, line, [name] if name else [], folder, kind)
        return images[0] if images else None

    def _existing_images(self, path: Path, line: int, names: list[str], folder: Path | None, kind: str) -> list[Path]:
        """Returns those image files of a row that exist, and lists the others as problems of this kind."""
        images = []
        for name in names:
            try:
                images.append(image_file(path, line, name, folder))
            except ImageError:
                self.release.problem(kind, path.name, line, Path(name).name if os.path.isabs(name) else name[:200])
        return images

    def _files(self, option: str) -> list[Path]:
        """Returns the file of an option, or the files of its folder."""
        given = getattr(self.config, option)
        if given is None:
            raise DataFormatError(
                f"No {option} were given.", file=f"--{option}", remedy=f"Pass a file or a folder: --{option} FILE."
            )
        path = Path(given)
        if not path.is_dir():
            return [path]
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in ROW_SUFFIXES and file.is_file())
        if option == "mentions":
            files = [file for file in files if file.stem.casefold() in _SPLIT_NAMES]
            files.sort(key=lambda file: list(_SPLIT_NAMES).index(file.stem.casefold()))
        else:
            other_names = {*_SPLIT_NAMES, *({"entities", "posts"} - {option})}
            files = [file for file in files if file.stem.casefold() not in other_names]
        if not files:
            names = "train, validation or test" if option == "mentions" else option
            raise DataFormatError(
                f"The folder holds no file of {option}.",
                file=path,
                remedy=f"Name it {names}, ending in {' or '.join(ROW_SUFFIXES)}.",
            )
        return files

    def _read_rows(
        self, path: Path, columns: Mapping[str, str], required: Collection[str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the rows of a file, then logs its digest."""
        yield from read_rows(path, columns, mapping=self.mapping, required=required, bad_rows=self.bad_rows)
        name = path.name if path.name not in self.release.sha256 else f"{path.parent.name}/{path.name}"
        self.release.sha256[name] = hashlib.sha256(path.read_bytes()).hexdigest()


def _split_cell(path: Path, line: int, record: Mapping[str, Any]) -> str:
    name = text_cell(path, line, record, "split", True).strip()
    split = _SPLIT_NAMES.get(name.casefold(), name)
    if not re.fullmatch(r"[A-Za-z]\w*", split, re.ASCII) or split == "all":
        raise DataFormatError(
            f"{name!r} cannot be the name of a split.",
            file=path,
            row=line,
            remedy="Use letters, digits and _, and another name than 'all'.",
        )
    return split


def _unicode_forms(text: str) -> list[str]:
    return [unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)]


def _flag(name: str, value: bool | str) -> bool:
    """Returns an option that is a `bool`, or its text from the command line."""
    values: dict[bool | str, bool] = {True: True, False: False, "true": True, "false": False}
    if value not in values:
        raise DataFormatError(f"The option {name}={value!r} is neither true nor false.", file=f"--option {name}")
    return values[value]


def _image_folder(given: str | os.PathLike[str] | None) -> Path | None:
    if given is not None and not Path(given).is_dir():
        raise DataFormatError(
            "This path is not a folder.", file=given, remedy="Give the folder that holds the images."
        )
    return None if given is None else Path(given)


def _read_cell(path: Path | None) -> dict[str, Any] | None:
    return None if path is None else read_image(path.parent, path.name)


def _offset_cell(path: Path, line: int, record: Mapping[str, Any], column: str) -> int | None:
    text = id_cell(path, line, record, column)
    if not text:
        return None
    if not re.fullmatch("-?[0-9]{1,9}", text):
        raise SpanError(
            f"The cell {column!r} is {text[:40]!r}, expected a whole number.",
            file=path,
            row=line,
            remedy="Give the offset in characters.",
        )
    return int(text)


def _check_unique(first_rows: dict[str, str], row_id: str, path: Path, line: int) -> None:
    """Raises an error if an earlier row has the same id; `first_rows` are their positions by id."""
    if row_id in first_rows:
        raise DuplicateIdError(
            f"The id {row_id!r} is also that of {first_rows[row_id]}.",
            file=path,
            row=line,
            remedy="Give every row an id of its own.",
        )
    first_rows[row_id] = f"{path.name}, row {line}"


def _check_gold(path: Path, line: int, gold: str, entity_ids: Container[str]) -> None:
    if gold != NIL and gold not in entity_ids:
        raise UnknownEntityError(
            f"The gold {gold!r} is not among the entities.",
            file=path,
            row=line,
            remedy=f"Add it to the entities, or write {NIL!r}.",
        )


def _complete_contexts(rows: list[tuple[Path, int, dict[str, Any]]]) -> list[MelError]:
    """Fills in missing mention ids (`<context>-<number>`) and spans, in place.

    Returns:
        `list[MelError]`: An error for each row that differs from the first of its context in text or image, and for each
        that has the id of another one.
    """
    errors: list[MelError] = []
    contexts: dict[str, list[tuple[Path, int, dict[str, Any]]]] = {}
    for path, line, row in rows:
        contexts.setdefault(row["context_id"], []).append((path, line, row))
    for context_id, members in contexts.items():
        first_path, first_line, first = members[0]
        for path, line, row in members:
            if (row["text"], row["image"]) != (first["text"], first["image"]):
                errors.append(
                    DataFormatError(
                        f"The row has the context {context_id!r}, but another text or image than {first_path.name}, row"
                        f" {first_line}.",
                        file=path,
                        row=line,
                        remedy="Give the mentions of one context the same text and image.",
                    )
                )
        taken = [(row["start"], row["end"]) for _, _, row in members if row["start"] not in (None, NO_SPAN)]
        without_span = [row for _, _, row in members if row["start"] is None]
        spans = locate(first["text"], [row["mention"] for row in without_span], taken)
        for row, (start, end) in zip(without_span, spans, strict=True):
            row["start"], row["end"] = start, end
        for k, (_, _, row) in enumerate(members):
            row["mention_id"] = row["mention_id"] or (context_id if len(members) == 1 else f"{context_id}-{k}")
    first_rows: dict[str, str] = {}
    for path, line, row in rows:
        try:
            _check_unique(first_rows, row["mention_id"], path, line)
        except DuplicateIdError as error:
            errors.append(error)
    return errors


BUILDER_CLASS = Jsonl
