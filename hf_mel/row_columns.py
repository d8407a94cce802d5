"""Columns of users' files: which are known, which a user renames or joins, and which are left out."""

from __future__ import annotations

import csv
import difflib
import logging
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_mel.errors import DataFormatError

logger = logging.getLogger(__name__)

#: Columns of which a cell holds several values. The cells of several sources become one list.
_LISTS = {"aliases", "candidates", "image"}
#: Endings of the columns of an export of the Wikidata Query Service, whose `?item` has `?itemLabel` and so on.
_WIKIDATA_ENDINGS = {"": "id", "label": "name", "description": "description", "altlabel": "aliases"}


@dataclass
class ColumnMapping:
    """The columns of a user's file that become those of hf_mel.

    ```python
    >>> ColumnMapping({"name": "artist", "attributes": ["gender", "placeOfBirth"]}, ignore_others=True)  # doctest: +SKIP
    ```

    Args:
        sources (mapping of `str` to `str` or sequence of `str`): Column of hf_mel → the columns of the file that it is
            read from. Several columns are joined: to "Key: value." for `attributes`, to one list for `aliases`, `image`
            and `candidates`, and with spaces otherwise. Without any, the column is left out. A column that is not
            mentioned is read under its own name.
        ignore_others (`bool`): Whether columns that hf_mel does not know are left out. Default: they are errors.
        inverted_names (`bool`): Whether names of entities are written "Surname, Forename". "Forename Surname" becomes an
            alias then.
        kept (sequence of `str`): Further columns of a file of entities that are kept under their names, to filter by.
    """

    sources: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    ignore_others: bool = False
    inverted_names: bool = False
    kept: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.sources = {
            target: (columns,) if isinstance(columns, str) else tuple(columns)
            for target, columns in self.sources.items()
        }
        #: The columns of all files that were read so far, in their order.
        self.columns_seen: dict[str, None] = {}

    @classmethod
    def parse(
        cls,
        assignments: Iterable[str],
        *,
        ignore_others: bool = False,
        inverted_names: bool = False,
        kept: Iterable[str] = (),
    ) -> ColumnMapping:
        """Reads assignments such as "name=artist" and "attributes=gender,placeOfBirth".

        Args:
            assignments (iterable of `str`): A column of hf_mel, "=", and columns of the file, separated by commas. A
                column whose name has a comma stands in quotation marks.
            ignore_others, inverted_names, kept: As in [`ColumnMapping`].

        Raises:
            DataFormatError: An assignment has no "=", or two have the same column of hf_mel.
        """
        sources: dict[str, Sequence[str]] = {}
        for assignment in assignments:
            target, equals, columns = (part.strip() for part in assignment.partition("="))
            if not equals or not target:
                raise DataFormatError(
                    f"{assignment!r} does not assign a column.", remedy="Write it as --column name=itemLabel."
                )
            if target in sources:
                raise DataFormatError(
                    f"The column {target!r} is assigned twice.",
                    remedy=f"Give all its columns at once: --column {target}=FIRST,SECOND.",
                )
            try:
                cells = next(csv.reader([columns], skipinitialspace=True), [])
            except csv.Error as error:  # a line end, or a field of over 131,072 characters
                raise DataFormatError(
                    f"The columns of {assignment[:80]!r} cannot be read ({error}).",
                    remedy="Give the names without line ends, separated by commas.",
                ) from error
            sources[target] = [cell.strip() for cell in cells if cell.strip()]
        return cls(sources, ignore_others=ignore_others, inverted_names=inverted_names, kept=tuple(kept))

    def check_targets(self, accepted: Iterable[str]) -> None:
        """Raises an error if a column is assigned that no file has.

        Raises:
            DataFormatError: Names the nearest of the `accepted` columns.
        """
        accepted = list(accepted)
        for target in self.sources:
            if target not in accepted:
                raise DataFormatError(
                    f"The column {target!r} of --column {self._assignment(target)} is unknown.",
                    remedy=f"{_suggestion(target, accepted)}Columns are {', '.join(accepted)}.",
                )

    def check_used(self, file: str | os.PathLike[str] | None = None) -> None:
        """Raises an error if a column is assigned that none of the files read so far has.

        Args:
            file (`str` or `os.PathLike`, *optional*): The only file, for the message.

        Raises:
            DataFormatError: Names the nearest columns of the files.
        """
        for name in self.kept:
            if self.columns_seen and name not in self.columns_seen:
                raise DataFormatError(
                    f"There is no column {name!r}, which --keep-column names.",
                    file=file,
                    remedy=f"{_suggestion(name, list(self.columns_seen))}The columns are {', '.join(self.columns_seen)}.",
                )
        for target, columns in self.sources.items():
            for column in columns:
                if self.columns_seen and _position(column, list(self.columns_seen)) is None:
                    raise DataFormatError(
                        f"There is no column {column!r}, which --column {self._assignment(target)} names.",
                        file=file,
                        remedy=f"{_suggestion(column, list(self.columns_seen))}The columns are "
                        f"{', '.join(self.columns_seen)}.",
                    )

    def restricted(self, accepted: Iterable[str], names: Sequence[str]) -> ColumnMapping:
        """Returns the mapping of one of several files: the assignments of columns that it may have, and has.

        Args:
            accepted (iterable of `str`): Columns of hf_mel for this kind of file.
            names (sequence of `str`): The columns of the file.
        """
        accepted = set(accepted)
        sources = {
            target: columns
            for target, columns in self.sources.items()
            if target in accepted and (not columns or any(_position(name, names) is not None for name in columns))
        }
        return ColumnMapping(sources, self.ignore_others, self.inverted_names, self.kept)

    def _assignment(self, target: str) -> str:
        return f"{target}={','.join(self.sources[target])}"


class ColumnPlan:
    """The plan for the columns of one header, or for the keys of JSON objects that have the same ones: read, joined or left out.

    Args:
        names (sequence of `str`): The columns of the file, in their order.
        accepted (mapping of `str` to `str`, *optional*): Accepted column name → its key in the rows. Default: all columns
            are accepted and keep their names.
        mapping ([`ColumnMapping`]): Columns of other names, and whether unknown ones are left out.
        keep_others (`bool`): Whether unknown columns keep their names.
        file, row: The position of the names, for error messages.

    Attributes:
        names (`list[str]`): The columns without outer white space.
        ignored (`list[str]`): Columns that are left out.
        unknown (`list[str]`): Columns that are errors ([`~ColumnPlan.unknown_error`]).

    Raises:
        DataFormatError: A column occurs twice.
    """

    def __init__(
        self,
        names: Sequence[str],
        accepted: Mapping[str, str] | None,
        mapping: ColumnMapping,
        keep_others: bool,
        *,
        file: str | os.PathLike[str],
        row: int,
    ):
        self.names = [name.strip().strip("\ufeff").strip() for name in names]
        self.ignored: list[str] = []
        self.unknown: list[str] = []
        self._accepted, self._mapping, self._file, self._row = accepted, mapping, file, row
        self._unnamed = [position for position, name in enumerate(self.names) if not name]
        self._sources: dict[str, list[int]] = {}
        self._joined: set[str] = set()
        mapping.columns_seen.update(dict.fromkeys(filter(None, self.names)))
        unread = set(range(len(names))) - set(self._unnamed)
        assigned = set()
        for target, columns in mapping.sources.items():
            if accepted is not None and target not in accepted:
                continue  # a column of another kind of file
            key = target if accepted is None else accepted[target]
            positions = [_position(column, self.names) for column in columns]
            read = [position for position in positions if position is not None]
            if read:
                self._add(key, read, target)
                unread -= set(read)
            if read or not columns:
                assigned.add(key)
            if len(columns) > 1:
                self._joined.add(key)
        for name in mapping.kept:  # also one that is read into another column
            position = _position(name, self.names)
            if position is not None and accepted is not None and name in accepted:
                self._add(name, [position], name)
                unread.discard(position)
        for position in sorted(unread):
            name = self.names[position]
            own_key = self._key(name)
            if own_key is not None and own_key not in assigned:
                self._add(own_key, [position], name)
            elif own_key is not None or (mapping.ignore_others and not keep_others):
                self.ignored.append(name)
            elif keep_others:
                self._add(name, [position], name)
            else:
                self.unknown.append(name)

    def _add(self, key: str, positions: list[int], name: str) -> None:
        if key in self._sources:
            raise repeated_column(name, self._file, self._row)
        self._sources[key] = positions

    def _key(self, name: str) -> str | None:
        """Returns the key of a column, in any case; `None` for an unknown one."""
        if self._accepted is None:
            return name
        position = _position(name, list(self._accepted))
        return None if position is None else list(self._accepted.values())[position]

    def row(self, values: Sequence[Any], row: int) -> dict[str, Any]:
        """Returns a row by its keys.

        Args:
            values (sequence): The values of all columns.
            row (`int`): The row, for error messages.

        Raises:
            DataFormatError: A column without a name has a value, or values cannot be joined.
        """
        for position in self._unnamed:
            if values[position] not in (None, ""):
                raise DataFormatError(
                    f"Column {position + 1} has the value {str(values[position])[:40]!r}, but no name.",
                    file=self._file,
                    row=row,
                    remedy="Name the column in the header, or remove it.",
                )
        return {
            key: self._join(key, positions, values, row) if key in self._joined else values[positions[0]]
            for key, positions in self._sources.items()
        }

    def _join(self, key: str, positions: Sequence[int], values: Sequence[Any], row: int) -> Any:
        if key in _LISTS:
            return [item for position in positions for item in _items(values[position])]
        texts = {self.names[position]: self._text(position, values[position], row) for position in positions}
        texts = {name: text for name, text in texts.items() if text}
        if key == "attributes":
            return " ".join(f"{_words(name)}: {text.rstrip('.')}." for name, text in texts.items())
        return " ".join(texts.values())

    def _text(self, position: int, value: Any, row: int) -> str:
        if value is None:
            return ""
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = ", ".join(value)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataFormatError(
                f"The cell {self.names[position]!r} is {str(value)[:40]}.",
                file=self._file,
                row=row,
                remedy="Write a string.",
            )
        return str(value).strip()

    def check(self, required: Iterable[str]) -> None:
        """Raises an error if a column is unknown, or a required one is missing.

        Args:
            required (iterable of `str`): Keys of columns.

        Raises:
            DataFormatError: Names all such columns.
        """
        if self.unknown:
            raise self.unknown_error()
        names = [name for name in self.names if name]
        if missing := [key for key in required if key not in self._sources]:
            self._mapping.check_used(self._file)
            nearest = {key: next((name for name in names if _nearest(name, [key])), None) for key in missing}
            options = [f"--column {key}={shlex.quote(_quoted(near or 'COLUMN'))}" for key, near in nearest.items()]
            raise DataFormatError(
                f"There is no column {' and no column '.join(map(repr, missing))}; the columns are {', '.join(names)}.",
                file=self._file,
                row=self._row,
                remedy=f"Rename a column, or add: {' '.join(options)}",
            )

    def unknown_error(self, more_names: Iterable[str] = ()) -> DataFormatError:
        """Returns the error of all unknown columns, with the options of the command line that would read them.

        Args:
            more_names (iterable of `str`): Columns of other rows, some of which may be unknown, too.
        """
        accepted = self._accepted or {}
        sources = [column for columns in self._mapping.sources.values() for column in columns]
        others_unknown = (name for name in more_names if self._key(name) is None and _position(name, sources) is None)
        unknown = list(dict.fromkeys([*self.unknown, *others_unknown]))
        missing = [column for column, key in accepted.items() if key not in self._sources]
        variable = self._wikidata_variable()
        suggestions = {name: _wikidata_target(name, variable) or _nearest(name, accepted) for name in unknown}
        targets: dict[str, str] = {}
        for name, target in suggestions.items():
            if target in missing:
                targets.setdefault(target, name)
        remedy = ""
        nearest = [repr(t) if len(unknown) == 1 else f"{t!r} for {name!r}" for name, t in suggestions.items() if t]
        if variable is not None:
            remedy = "The file looks like an export of the Wikidata Query Service. "
        elif nearest:
            remedy = f"Did you mean {', '.join(nearest)}? "
        options = [f"--column {target}={shlex.quote(_quoted(name))}" for target, name in targets.items()]
        if variable is not None and "image" in self._sources:
            options.append("--column image=")  # Wikidata gives addresses of images, not files
        others = [name for name in unknown if name not in targets.values()]
        if others:
            options.append("--ignore-other-columns")
        if others and "attributes" in missing and variable is None:
            examples = shlex.quote(",".join(map(_quoted, others[:2])))
            subject, more = ("it", "") if len(others) == 1 else ("some", " and so on")
            remedy += f"To read {subject} as attributes, add --column attributes={examples}{more}. "
        names, one = ", ".join(map(repr, unknown)), len(unknown) == 1
        return DataFormatError(
            f"The column{'' if one else 's'} {names} {'is' if one else 'are'} unknown; columns are {', '.join(accepted)}.",
            file=self._file,
            row=self._row,
            remedy=f"{remedy}Rename or remove {'it' if one else 'them'}, or add: {' '.join(options)}",
        )

    def _wikidata_variable(self) -> str | None:
        """Returns the variable of an export of the Wikidata Query Service: the column that another one labels."""
        folded = {name.casefold(): name for name in self.names}
        return next((name for key, name in folded.items() if f"{key}label" in folded), None)


def repeated_column(name: str, file: str | os.PathLike[str], row: int) -> DataFormatError:
    """Returns the error of a column that occurs twice."""
    return DataFormatError(
        f"The row has the column {name!r} twice.", file=file, row=row, remedy="Keep one of the two."
    )


def _wikidata_target(name: str, variable: str | None) -> str | None:
    if variable is None or not name.casefold().startswith(variable.casefold()):
        return None
    return _WIKIDATA_ENDINGS.get(name.casefold()[len(variable) :])


def _position(name: str, names: Sequence[str]) -> int | None:
    """Returns where a name stands among others: the same one, or else the only one that differs just in case."""
    if name in names:
        return names.index(name)
    positions = [k for k, other in enumerate(names) if other.casefold() == name.casefold()]
    return positions[0] if len(positions) == 1 else None


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """Returns the name that another one is most likely meant to be: a very similar one, or one that is a word of it."""
    names = list(names)
    similar = difflib.get_close_matches(name.casefold(), names, n=1)
    words = _words(name).casefold().split()
    if similar and difflib.SequenceMatcher(None, name.casefold(), similar[0]).ratio() >= 0.75:
        return similar[0]
    return max((other for other in names if other in words), key=len, default=similar[0] if similar else None)


def _suggestion(name: str, names: Iterable[str]) -> str:
    nearest = _nearest(name, names)
    return f"Did you mean {nearest!r}? " if nearest else ""


def _quoted(name: str) -> str:
    """Returns a column name as [`ColumnMapping.parse`] reads it."""
    return '"' + name.replace('"', '""') + '"' if "," in name or '"' in name else name


def _words(name: str) -> str:
    """Returns a column name as words: `placeOfBirth` and `place_of_birth` as "Place of birth"."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).replace("_", " ").split()
    words = [word if word.isupper() and len(word) > 1 else word.lower() for word in words]
    return " ".join(words)[:1].upper() + " ".join(words)[1:]


def _items(value: Any) -> list[Any]:
    """Returns the items of one of several cells that become a list."""
    if isinstance(value, str):
        return value.split("|")
    if isinstance(value, list):
        return value
    return [] if value is None else [value]
