"""Opens a downloaded release, reads its files strictly, and logs what had to be left out."""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from datasets.utils import tqdm

from hf_mel.errors import DataFormatError, DuplicateIdError
from hf_mel.schema import NIL

#: Names of the files that a layout needs. A tuple stands for any one of its names.
Layout = Sequence["str | tuple[str, ...]"]
#: Spellings of "no entity of the knowledge base" in releases, in any case. Null means the same.
NIL_SPELLINGS = frozenset({"", "nil", "none", "null", "[nil]", "<nil>", "__nil__", "--nil--", "--nme--"})


class ReleaseLog:
    """Log of a builder's reading: layout, digests and problems. The build pipeline copies it into `report.json`.

    Attributes:
        layout (`str` or `None`): Name of the layout of the files on disk.
        sha256 (`dict[str, str]`): Digest of every raw file read so far, by file name.
        problems (`dict[str, list[tuple[str, str, str]]]`): By kind: (file, row, detail) of everything that was left
            out, is missing, or could not be used.
        left_out (`dict[str, int]`): Number of records that were left out, by kind, of a release with too many to list.
            `problems` then lists the first of each kind.
    """

    layout: str | None = None

    def __init__(self) -> None:
        self.sha256: dict[str, str] = {}
        self.problems: dict[str, list[tuple[str, str, str]]] = {}
        self.left_out: dict[str, int] = {}

    def problem(self, kind: str, file: str, row: str | int, detail: str = "") -> None:
        """Logs that `row` of `file` was left out, is incomplete, or could not be used."""
        self.problems.setdefault(kind, []).append((file, str(row), detail))

    def merge(self, other: ReleaseLog) -> None:
        """Adds digests and problems of another log."""
        self.sha256.update(other.sha256)
        for kind, entries in other.problems.items():
            self.problems.setdefault(kind, []).extend(entries)


class Release(ReleaseLog):
    """The files of one release in a folder, with readers that check them.

    Args:
        root (`str` or `os.PathLike`): Folder of the raw files.
        layouts (mapping of `str` to [`Layout`]): Layouts that the builder reads. The release has the first one whose
            files are all present.

    Attributes:
        root (`Path`): The folder.

    Raises:
        DataFormatError: The folder does not exist, or has none of the layouts; the message lists every file.
    """

    def __init__(self, root: str | os.PathLike[str] | None, layouts: Mapping[str, Layout]):
        super().__init__()
        if root is None:
            raise DataFormatError(
                "No folder of raw files was given.", remedy="Pass it as the argument data_dir (--raw-dir)."
            )
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataFormatError(
                "This path is not a folder.", file=self.root, remedy="Give the folder of the raw release."
            )
        for name, files in layouts.items():
            if all(self._is_present(file) for file in files):
                self.layout = name
                return
        expected = "".join(
            f"\n  {name}: "
            + ", ".join(
                f"{' or '.join(file) if isinstance(file, tuple) else file} "
                f"({'found' if self._is_present(file) else 'missing'})"
                for file in files
            )
            for name, files in layouts.items()
        )
        raise DataFormatError(
            f"The folder holds none of the layouts of this release, which are:{expected}\n",
            file=self.root,
            remedy="Put all files of one layout into this folder.",
        )

    def _is_present(self, file: str | tuple[str, ...]) -> bool:
        return any((self.root / name).is_file() for name in ([file] if isinstance(file, str) else file))

    def find_file(self, *names: str) -> str | None:
        """Returns the first of `names` that is a file of the release, or `None`."""
        return next((name for name in names if self._is_present(name)), None)

    def find_folder(self, given: str | os.PathLike[str] | None, *defaults: str) -> Path | None:
        """Returns the folder that the user gave, else the first of `defaults` in the release, or `None`.

        Raises:
            DataFormatError: The user's folder does not exist. Without this error every image would be missing.
        """
        if given is not None:
            if not Path(given).is_dir():
                raise DataFormatError(
                    "This path is not a folder.", file=given, remedy="Give the folder that holds the images."
                )
            return Path(given)
        return next((self.root / name for name in defaults if (self.root / name).is_dir()), None)

    def read_json(self, name: str, expected: type, first_line: bool = False) -> Any:
        """Reads a JSON file.

        Args:
            name (`str`): File name in the folder of the release.
            expected (`type`): Type of the value: `dict`, `list`, or `object` for any.
            first_line (`bool`): Parse the first line only. Some formats have other content below it.

        Raises:
            DataFormatError: The file cannot be read, is not UTF-8 or not JSON, has a value of another type, or contains
                NaN or an unpaired surrogate.
            DuplicateIdError: An object has a key twice.
        """
        path = self.root / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataFormatError(
                f"The file cannot be read ({error.strerror}).", file=path, remedy="Check its path and permissions."
            ) from error
        self.sha256[name] = hashlib.sha256(data).hexdigest()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataFormatError(
                f"The file is not UTF-8 text ({error}).", file=path, remedy="Download it again."
            ) from error
        if first_line:
            text = text.split("\n", 1)[0]
        try:
            value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_reject_constant)
        except _DuplicateKey as error:
            key = ascii(error.args[0])
            raise DuplicateIdError(
                f"The key {key} occurs twice in one object.",
                file=path,
                row=key[1:-1],
                remedy="Download the file again.",
            ) from None
        except (ValueError, RecursionError) as error:  # JSONDecodeError, NaN, a number of thousands of digits
            raise DataFormatError(
                f"The file is not JSON ({error}).", file=path, remedy="Download it again; it may be cut off."
            ) from error
        if not isinstance(value, expected):
            raise DataFormatError(
                f"The file holds a {type(value).__name__}, expected a {expected.__name__}.",
                file=path,
                remedy="Check that it is the right file of the release.",
            )
        if re.search(r"\\u[dD][89a-fA-F]", text):
            rows: Any = value.items() if isinstance(value, dict) else enumerate(cast(list, value))
            for row, item in rows:
                try:
                    json.dumps({str(row): item}, ensure_ascii=False).encode()
                except UnicodeEncodeError as error:
                    raise DataFormatError(
                        f"The row contains an unpaired surrogate ({error.reason}).",
                        file=path,
                        row=ascii(row)[1:-1] if isinstance(row, str) else row,
                        remedy="Correct the escape sequence \\uXXXX.",
                    ) from error
        return value

    def read_texts(self, name: str) -> dict[str, str]:
        """Reads a JSON file that maps ids to strings, such as names or attributes by QID."""
        texts = self.read_json(name, dict)
        for key, value in texts.items():
            if not isinstance(value, str):
                raise DataFormatError(
                    f"The value is {reprlib.repr(value)}, expected a string.", file=self.root / name, row=key
                )
        return texts

    def read_lines(self, name: str) -> Iterator[tuple[int, str]]:
        """Reads a text file line by line, without byte-order mark and line ends.

        A line that is not UTF-8 is left out and, the first time the file is read, logged. The digest of the file is
        logged after its last line.

        Yields:
            `tuple[int, str]`: Number of the line, from 1, and its text.
        """
        path, digest, read_before = self.root / name, hashlib.sha256(), name in self.sha256
        with (
            path.open("rb") as file,
            tqdm(total=path.stat().st_size, desc=name, unit="B", unit_scale=True, delay=2, leave=False) as bar,
        ):
            for row, line in enumerate(file, 1):
                digest.update(line)
                bar.update(len(line))
                try:
                    text = line.decode("utf-8-sig" if row == 1 else "utf-8")
                except UnicodeDecodeError:
                    if not read_before:
                        self.problem("line_not_utf8", name, row)
                    continue
                yield row, text.rstrip("\r\n")
        self.sha256[name] = digest.hexdigest()

    def check_record(self, name: str, row: str | int, value: Any, keys: Mapping[str, type]) -> dict[str, Any]:
        """Returns `value` after checking that it is an object that has `keys`, with values of their types."""
        path = self.root / name
        if not isinstance(value, dict):
            raise DataFormatError(f"The row is a {type(value).__name__}, expected an object.", file=path, row=row)
        for key, kind in keys.items():
            if key not in value:
                raise DataFormatError(
                    f"The row has no key {key!r}; it has {', '.join(value) or 'none'}.", file=path, row=row
                )
            if not isinstance(value[key], kind) or (kind is int and isinstance(value[key], bool)):
                raise DataFormatError(
                    f"The value of {key!r} is a {type(value[key]).__name__}, expected {kind.__name__}.",
                    file=path,
                    row=row,
                )
        return value

    def identifier(self, name: str, row: str | int, value: Any) -> str:
        """Returns an id as a string without surrounding spaces. Releases have ids as strings and as whole numbers.

        Raises:
            DataFormatError: The value is neither, or blank.
        """
        if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
            raise DataFormatError(
                f"The row has {reprlib.repr(value)} for an id, expected a string or a whole number.",
                file=self.root / name,
                row=row,
            )
        return str(value).strip()

    def splits_by_id(self, name: str, lists: Mapping[str, Iterable[Any]]) -> dict[str, str]:
        """Returns the split of each id, in the order of the lists.

        Args:
            name (`str`): The file of the lists, for errors.
            lists (mapping of `str` to iterable): Split → its ids.

        Raises:
            DataFormatError: A value is not an id.
            DuplicateIdError: An id is in two splits, or twice in one.
        """
        split_of: dict[str, str] = {}
        for split, values in lists.items():
            for value in values:
                sample_id = self.identifier(name, split, value)
                if sample_id in split_of:
                    raise DuplicateIdError(
                        f"The id is in {split_of[sample_id]} and in {split}.",
                        file=self.root / name,
                        row=sample_id,
                        remedy="Remove it from one of them.",
                    )
                split_of[sample_id] = split
        return split_of

    def gold(self, name: str, row: str | int, value: Any) -> str:
        """Returns the id of a gold entity, or [`NIL`] for null and each of [`NIL_SPELLINGS`]."""
        if value is None or (isinstance(value, str) and value.strip().casefold() in NIL_SPELLINGS):
            return NIL
        return self.identifier(name, row, value)


class _DuplicateKey(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key, value in pairs:
        if key in record:
            raise _DuplicateKey(key)
        record[key] = value
    return record


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
