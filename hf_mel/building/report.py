"""Reports on data sets: counts, problems and leakage."""

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

#: Kinds of problems that make a data set unusable, the most serious first, each with its error and the message, which is
#: filled with the problem's detail. All other kinds are warnings.
FATAL: dict[str, tuple[type[MelError], str]] = {
    "unreadable": (DataFormatError, "The file cannot be read ({})."),
    "no_knowledge_base": (
        KnowledgeBaseError,
        "The data set has no configuration 'entities' with rows in a split 'kb'.",
    ),
    "wrong_schema": (DataFormatError, "The columns do not match the schema ({})."),
    "rows_not_as_in_card": (DataFormatError, "The number of rows differs from the card ({})."),
    "empty_split": (DataFormatError, "The split is empty."),
    "null_value": (DataFormatError, "The column {!r} is null in this row."),
    "duplicate_id": (DuplicateIdError, "The id {!r} occurs twice."),
    "wrong_span": (SpanError, "The offsets are wrong ({})."),
    "priors_unlike_candidates": (DataFormatError, "Candidates and priors do not match ({})."),
    "gold_not_in_kb": (UnknownEntityError, "The gold entity {!r} is not in the knowledge base."),
    "broken_image": (ImageError, "{}"),
}


#: Kinds of problems that are a missing image. It is left out of its row, as a broken one is ("broken_image").
MISSING_IMAGE = ("missing_image", "missing_mention_image", "missing_entity_image", "missing_post_image")


@dataclass(kw_only=True)
class CheckReport:
    """Result of checking a data set.

    Args:
        dataset (`str`): Name of the data set, its folder or its Hub id.
        counts (`dict[str, dict[str, int]]`): Number of rows by configuration and split.
        images (`dict[str, dict[str, dict[str, int]]]`): By configuration and split: the number of `images`, and of rows
            without an image (`rows_without`).
        duplicates (`dict[str, int]`): `entities_sharing_their_text`: entities that have the name, description and
            attributes of another entity. `mention_images_in_kb`: mentions with an image that is, byte for byte, in the
            knowledge base.
        leakage (`dict[str, dict[str, dict[str, int]]]`): Numbers of mentions by configuration of mentions and split:
            with a gold entity (`with_gold`), with an image (`with_image`); with a gold entity, text or image that occurs
            in train (`gold_in_train`, `text_in_train`, `image_in_train`; absent for train); with an image that is, byte
            for byte, in the knowledge base (`image_in_kb`), or an image of the gold entity (`image_of_gold`).
        problems (`dict[str, list[tuple[str, str, str]]]`): (file, row, detail) of each problem, by kind.
    """

    dataset: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    images: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    leakage: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    problems: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)

    def problem(self, kind: str, file: str, row: str, detail: str = "") -> None:
        """Adds a problem."""
        self.problems.setdefault(kind, []).append((file, row, detail))

    @property
    def fatal(self) -> list[str]:
        """Kinds of problems in this report that make the data set unusable, the most serious first."""
        return [kind for kind in FATAL if kind in self.problems]

    @property
    def num_missing_images(self) -> int:
        """Number of listed images that do not exist. A builder may list many in one entry."""
        return sum(len(self.problems.get(kind, ())) for kind in MISSING_IMAGE)

    def raise_fatal(self, remedy: str) -> None:
        """Raises the error of the most serious problem that makes the data set unusable, if it has one.

        Args:
            remedy (`str`): Advice to append to the message.
        """
        for kind in self.fatal:
            error, message = FATAL[kind]
            file, row, detail = self.problems[kind][0]
            raise error(message.format(detail), file=file, row=row or None, remedy=remedy)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON values. Each kind of problem has a `count` and, by file, `entries` [row, detail]."""
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
    """Result of building a data set, saved as `report.json`. Extends [`~hf_mel.building.report.CheckReport`].

    Args:
        output (`Path`): Folder that was written (not saved).
        layout (`str`, *optional*): Layout of the raw files.
        license, redistribution (`str`): As the builder states them. An empty `redistribution` means that the built data
            may be passed on.
        options (`dict[str, Any]`): Settings of this build: seed, resize, and options of the builder.
        official (`dict[str, dict[str, int or None]]`): Official number of rows by configuration and split, `None` if
            unknown.
        raw_sha256 (`dict[str, str]`): Digest of each raw file that was read.
        data_sha256 (`str`, *optional*): One digest of all Parquet files, as in
            [`~hf_mel.data.loading.dataset_version`].
        left_out (`dict[str, int]`): Number of raw records that were left out, by kind, of a builder that counts them.
            `problems` then lists the first of each kind.
    """

    output: Path
    layout: str | None = None
    license: str = ""
    redistribution: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    official: dict[str, dict[str, int | None]] = field(default_factory=dict)
    raw_sha256: dict[str, str] = field(default_factory=dict)
    data_sha256: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, content: dict[str, Any], output: Path) -> BuildReport:
        """Returns the report with this content of `report.json`.

        Raises:
            KeyError, TypeError, AttributeError: It is not the content of a report.
        """
        problems = {
            kind: [(file, *entry) for file, entries in listed["entries"].items() for entry in entries]
            for kind, listed in content["problems"].items()
        }
        return cls(output=output, **{**content, "problems": problems})

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `report.json`."""
        checks = super().to_dict()
        return {
            "dataset": checks.pop("dataset"),
            "layout": self.layout,
            "license": self.license,
            "redistribution": self.redistribution,
            "options": self.options,
            "counts": checks.pop("counts"),
            "official": self.official,
            "raw_sha256": dict(sorted(self.raw_sha256.items())),
            "data_sha256": self.data_sha256,
            **({"left_out": self.left_out} if self.left_out else {}),
            **checks,
        }
