"""Typed errors. Each says what is wrong, where (file and row), and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any


class MelError(Exception):
    """Base of all errors that this package raises deliberately.

    Args:
        message (`str`): The problem and the offending value: a full sentence with a capital and a full stop.
        file (`str` or `os.PathLike`, *optional*): The file with the problem.
        row (`int` or `str`, *optional*): The row, record id or key inside that file.
        remedy (`str`, *optional*): What the user can do, in the imperative.

    Attributes:
        exit_status (`int`): The exit status of a command line that ends with this error.
    """

    exit_status = 1

    def __init__(
        self,
        message: str,
        *,
        file: str | PathLike[str] | None = None,
        row: int | str | None = None,
        remedy: str | None = None,
    ):
        self.message, self.file, self.row, self.remedy = message, file, row, remedy
        where = f"{file}" if file is not None else ""
        if row is not None:
            where += f"{', ' if where else ''}row {row}"
        text = f"{where}: {message}" if where else message
        super().__init__(f"{text} {remedy}" if remedy else text)

    def changed(self, **fields: Any) -> MelError:
        """Returns an error of the same class with other fields: `message`, `file`, `row` or `remedy`."""
        own = {"message": self.message, "file": self.file, "row": self.row, "remedy": self.remedy} | fields
        return _rebuild(type(self), **own)

    def __reduce__(self) -> tuple:
        # Worker processes pickle errors, and the default __reduce__ loses keyword-only arguments.
        return _rebuild, (type(self), self.message, self.file, self.row, self.remedy)


def _rebuild(cls: type[MelError], message: str, file, row, remedy) -> MelError:
    return cls(message, file=file, row=row, remedy=remedy)


def first_lines(lines: Sequence[str], limit: int) -> list[str]:
    """Returns the first lines of a list for a message, and one that says how many more there are."""
    more = [f"… and {len(lines) - limit:,} more"] if len(lines) > limit else []
    return [*lines[:limit], *more]


class DataFormatError(MelError, ValueError):
    """A file is missing, unreadable, or does not have the expected layout, keys or types."""


class CountMismatchError(DataFormatError):
    """A built split does not have the official number of rows."""


class DuplicateIdError(DataFormatError):
    """A mention, entity or post id occurs twice."""


class UnknownEntityError(MelError, KeyError):
    """An entity id (of a gold, a candidate or an argument) is not in the knowledge base."""

    __str__ = Exception.__str__  # KeyError would print the repr of the message


class SpanError(MelError, ValueError):
    """A mention is not in its text, or not at its offsets."""


class ImageError(MelError, ValueError):
    """An image file is missing, truncated, too large, or not an image."""


class UnknownDatasetError(MelError, ValueError):
    """A name is no data-set builder, folder or repository."""


class UnknownSplitError(MelError, ValueError):
    """A data set has no such split or configuration."""


class UnknownModelError(MelError, ValueError):
    """A model does not exist or cannot be used."""


class KnowledgeBaseError(MelError, ValueError):
    """A knowledge base is empty, damaged, or was built by another model."""


class LockedError(MelError, RuntimeError):
    """Another process is writing to the same folder."""


class LostProcessError(MelError, RuntimeError):
    """Another of the processes that work together has ended without an error, or no longer runs."""


class RecipeError(MelError, ValueError):
    """A recipe or a model configuration cannot be used as written."""


class TrainingError(MelError, RuntimeError):
    """A training cannot go on: its loss is no number, or a checkpoint cannot be written."""


class NotEnoughMemoryError(MelError, RuntimeError):
    """A training is predicted to need more memory than there is."""


class StoppedError(MelError, RuntimeError):
    """A training was stopped by a signal, after it had saved a checkpoint. The exit status is that of SIGTERM."""

    exit_status = 143


class SuiteError(MelError, ValueError):
    """A suite of runs cannot be used as written."""


class ComparisonError(MelError, ValueError):
    """Results cannot be compared: they have other protocols, data or mentions, or lack what the comparison needs."""


class MissingExtraError(MelError, ImportError):
    """An optional dependency is not installed; the remedy names the extra."""


class ScoreError(MelError, ValueError):
    """A score is nan or infinite, so that it cannot be ranked."""


class CalibrationError(MelError, ValueError):
    """A stated precision is asked of a model whose links are not calibrated."""


class FilterError(MelError, ValueError):
    """A filter of entities cannot be read, names a column that is not there, or is passed by no entity."""


class HubError(MelError, RuntimeError):
    """The Hub cannot be reached, has no such repository or revision, or denies access."""


class PublishError(MelError, ValueError):
    """Something cannot or must not be published."""
