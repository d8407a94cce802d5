"""hf_mel.building.report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_mel.errors import (
    DataFormatError,
    DuplicateIdError,
    ImageError,
    KnowledgeBaseError,
    MelError,
    SpanError,
    UnknownEntityError,
)

#: Problems with which a data set cannot be used; all others are warnings.
FATAL: dict[str, tuple[type[MelError], str]] = {
    "unreadable": (DataFormatError, "cannot be read ({})."),
    "no_knowledge_base": (KnowledgeBaseError, "there is no configuration 'entities' with rows in a split 'kb'."),
    "wrong_schema": (DataFormatError, "does not have the columns of the schema: {}."),
    "rows_not_as_in_card": (DataFormatError, "the card says {}."),
    "empty_split": (DataFormatError, "the split is empty."),
    "null_value": (DataFormatError, "{} is null."),
    "duplicate_id": (DuplicateIdError, "the id {!r} occurs twice."),
    "wrong_span": (SpanError, "{}."),
    "priors_unlike_candidates": (DataFormatError, "{}."),
    "gold_not_in_kb": (UnknownEntityError, "the gold {!r} is not in the knowledge base."),
    "broken_image": (ImageError, "{}"),
}


@dataclass(kw_only=True)
class CheckReport:
    """What was found in a data set.

    Args:
        dataset (`str`): Its name, folder or Hub id.
        counts (`dict[str, dict[str, int]]`): Rows by configuration and split.
        images (`dict[str, dict[str, dict[str, int]]]`): By configuration and split: `images`, and `rows_without`.
        duplicates (`dict[str, int]`): `entities_sharing_their_text`: entities whose name, description and attributes
            another one has too; `mention_images_in_kb`: rows of `mentions` whose image is, byte for byte, in the KB.
        leakage (`dict[str, dict[str, dict[str, int]]]`): By configuration of mentions and split, numbers of mentions:
            `with_gold` (in the KB), `with_image`; of those whose gold, text or image occurs in train
            (`gold_in_train`, `text_in_train`, `image_in_train`; not for train itself); of those whose image is, byte
            for byte, one of the KB (`image_in_kb`) or even of its own gold (`image_of_gold`).
        problems (`dict[str, list[tuple[str, str, str]]]`): By kind: (file, row, detail).
    """

    dataset: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    images: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    leakage: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    problems: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)

    def problem(self, kind: str, file: str, row: str, detail: str = "") -> None:
        """Lists one more problem."""
        self.problems.setdefault(kind, []).append((file, row, detail))

    @property
    def fatal(self) -> list[str]:
        """The kinds of problems found that make the data set unusable, gravest first."""
        return [kind for kind in FATAL if kind in self.problems]

    def raise_fatal(self, remedy: str) -> None:
        """Raises the typed error of the gravest problem, if there is one that makes the data set unusable."""
        for kind in self.fatal:
            error, message = FATAL[kind]
            file, row, detail = self.problems[kind][0]
            raise error(message.format(detail), file=file, row=row or None, remedy=remedy)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: problems counted, their entries [row, detail] by file."""
        problems: dict[str, Any] = {}
        for kind, entries in sorted(self.problems.items()):
            files: dict[str, list[list[str]]] = {}
            for file, row, detail in entries:
                files.setdefault(file, []).append([row, detail])
            problems[kind] = {"count": len(entries), "entries": files}
        return {
            "dataset": self.dataset,
            "counts": self.counts,
            "images": self.images,
            "duplicates": self.duplicates,
            "leakage": self.leakage,
            "problems": problems,
        }


@dataclass(kw_only=True)
class BuildReport(CheckReport):
    """What a build wrote; `report.json` holds the same. Beside what [`~hf_mel.building.report.CheckReport`] has:

    Args:
        layout (`str` or `None`): The raw layout found on disk.
        output (`Path`): The folder written (not in `report.json`).
        license, redistribution (`str`): The builder's; the data may be passed on if the second is empty.
        options (`dict[str, Any]`): What was set for this build: seed, resize, options of the builder.
        official (`dict[str, dict[str, int or None]]`): The official number of rows, `None` where nobody knows it.
        raw_sha256 (`dict[str, str]`): Digest of each raw file read.
        data_sha256 (`str` or `None`): One digest of all Parquet files written, that of
            [`~hf_mel.data.loading.dataset_version`].
    """

    output: Path
    layout: str | None = None
    license: str = ""
    redistribution: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    official: dict[str, dict[str, int | None]] = field(default_factory=dict)
    raw_sha256: dict[str, str] = field(default_factory=dict)
    data_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As in `report.json`: problems counted, their entries [row, detail] by file."""
        found = super().to_dict()
        return {
            "dataset": found.pop("dataset"),
            "layout": self.layout,
            "license": self.license,
            "redistribution": self.redistribution,
            "options": self.options,
            "counts": found.pop("counts"),
            "official": self.official,
            "raw_sha256": dict(sorted(self.raw_sha256.items())),
            "data_sha256": self.data_sha256,
            **found,
        }
