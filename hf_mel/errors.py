"""Typed errors: each says what is wrong, where (file, row), and what to do about it."""

from __future__ import annotations

from os import PathLike


class MelError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        message (`str`): What is wrong, with the offending value.
        file (`str` or `os.PathLike`, *optional*): The file it was found in.
        row (`int` or `str`, *optional*): The row, record id or key inside that file.
        remedy (`str`, *optional*): What the user can do.
    """

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

    def __reduce__(self) -> tuple:
        # Keyword-only arguments are lost by the default reduce, and worker processes send errors by pickle.
        return _rebuild, (type(self), self.message, self.file, self.row, self.remedy)


def _rebuild(cls: type[MelError], message: str, file, row, remedy) -> MelError:
    return cls(message, file=file, row=row, remedy=remedy)


class DataFormatError(MelError, ValueError):
    """A file is missing, unreadable, or does not have the expected layout, keys or types."""


class CountMismatchError(DataFormatError):
    """A built split does not have the official number of rows."""


class DuplicateIdError(DataFormatError):
    """The same mention, entity or post id occurs twice."""


class UnknownEntityError(MelError, KeyError):
    """An entity id (a gold, a candidate, an argument) is not in the knowledge base."""

    __str__ = Exception.__str__  # KeyError would print the repr of the message


class SpanError(MelError, ValueError):
    """A mention is not where, or not at all, in its text."""


class ImageError(MelError, ValueError):
    """An image is missing, truncated, too large, or not an image."""


class UnknownDatasetError(MelError, ValueError):
    """No data set builder, folder or repository of that name."""


class UnknownSplitError(MelError, ValueError):
    """The data set has no such split or configuration."""


class UnknownModelError(MelError, ValueError):
    """No model of that name, or one that cannot be used as it is."""


class KnowledgeBaseError(MelError, ValueError):
    """A knowledge base is empty, damaged, or was built by another model."""


class RecipeError(MelError, ValueError):
    """A recipe or a model configuration cannot be used as written."""


class MissingExtraError(MelError, ImportError):
    """An optional dependency is not installed; the remedy names the extra."""


class ScoreError(MelError, ValueError):
    """A model gave a score that cannot be ranked: nan or infinite."""


class HubError(MelError, RuntimeError):
    """The Hub cannot be reached, has no such repository or revision, or does not let this account do that."""


class PublishError(MelError, ValueError):
    """What is to be published is not fit to be, or may not be."""
