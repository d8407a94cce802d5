"""Annotates the texts of a file or folder, and keeps what is done if it is interrupted."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_mel.data.images import verify_image
from hf_mel.data.text_files import TEXT_SUFFIXES, read_text_file, text_files
from hf_mel.detection.spans import MentionDetector
from hf_mel.errors import MelError
from hf_mel.linking.annotating import AnnotatedText, annotate_batches, check_text
from hf_mel.linking.link_file import InputRow, checked_rows, read_input_rows, write_results
from hf_mel.linking.linker import EntityLinker
from hf_mel.row_columns import ColumnMapping
from hf_mel.row_files import parse_json, text_cell

#: Columns of a file of texts that are read, whose names may differ in case.
TEXT_COLUMNS = {name: name for name in ("text", "image", "spans")}
#: Columns that the output adds to a row, so that no row can have them before.
_ADDED_COLUMNS = ("mentions", "warnings", "error")


@dataclass
class AnnotateSummary:
    """Counts of [`annotate_file`].

    Args:
        num_texts, num_mentions, num_nil, num_review (`int`): Texts, their mentions, those of them that are NIL, and those
            that were not linked.
        num_empty (`int`): Texts without mentions.
        bad_rows (`list[MelError]`): Errors of the rows that were left out.
        num_resumed (`int`): Texts that an interrupted run had annotated before.
        warnings (`Counter[str]`): Warnings of the linker, with the numbers of their mentions.
    """

    num_texts: int = 0
    num_mentions: int = 0
    num_nil: int = 0
    num_review: int = 0
    num_empty: int = 0
    bad_rows: list[MelError] = field(default_factory=list)
    num_resumed: int = 0
    warnings: Counter[str] = field(default_factory=Counter)

    def add(self, result: Mapping[str, Any]) -> None:
        """Counts the mentions of one text."""
        mentions = result["mentions"]
        self.num_texts += 1
        self.num_mentions += len(mentions)
        self.num_nil += sum(mention.get("is_nil", False) for mention in mentions)
        self.num_review += sum(mention["entity_id"] is None for mention in mentions)
        self.num_empty += not mentions
        for mention in mentions:
            self.warnings.update(mention.get("warnings", ()))


@dataclass
class _Result:
    """The columns of the output that a text gets."""

    annotated: AnnotatedText

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self.annotated.to_dict().items() if key != "text"}


def read_texts(
    path: str | os.PathLike[str], *, mapping: ColumnMapping | None = None, skip_bad_rows: bool = False
) -> list[InputRow]:
    """Reads and checks all texts of a file or folder, before any is annotated.

    Args:
        path (`str` or `os.PathLike`): A file that [`~hf_mel.row_files.read_rows`] reads, with the columns `text`,
            optionally `image`, a path relative to the file, and optionally `spans`, a list of `[start, end]` or of
            objects with `start`, `end` and `label` (in a table as JSON). Other columns are kept. Or a text file
            ([`~hf_mel.data.text_files.TEXT_SUFFIXES`]), or a folder of them: these rows have the columns `file` and `text`.
        mapping ([`~hf_mel.row_columns.ColumnMapping`], *optional*): Columns that have other names in the file.
        skip_bad_rows (`bool`): Whether a bad row gets an `error` instead of stopping the run.

    Raises:
        DataFormatError: The file cannot be read, has no rows, or has a column `mentions`, `warnings` or `error`, which the
            output adds; or it has bad rows, and `skip_bad_rows` is not set. Names all bad rows.
    """
    path = Path(path)
    if path.is_dir():
        rows = [_file_row(number, file, path) for number, file in enumerate(text_files(path), 1)]
    elif path.suffix.lower() in TEXT_SUFFIXES:
        rows = [_file_row(1, path, path.parent)]
    else:
        rows = read_input_rows(path, TEXT_COLUMNS, _text_of, mapping=mapping, added_columns=_ADDED_COLUMNS)
    return checked_rows(path, rows, "texts", skip_bad_rows)


def annotate_file(
    linker: EntityLinker,
    rows: Sequence[InputRow],
    output: str | os.PathLike[str],
    detector: MentionDetector,
    *,
    overlapping: bool = False,
    top_k: int = 5,
    batch_size: int | None = None,
    resume: bool = False,
    progress: bool = False,
) -> AnnotateSummary:
    """Annotates texts and writes one JSON object a line, in their order: the row with `mentions` and `warnings`, or with
    `error`.

    Results are written as they come to `.NAME.partial` beside the output, which becomes the output when all texts are
    done. A stream, such as "-" for standard output, gets them at once.

    Args:
        linker ([`~hf_mel.EntityLinker`]): The linker.
        rows (sequence of [`~hf_mel.linking.link_file.InputRow`]): From [`read_texts`].
        output (`str` or `os.PathLike`): The .jsonl file, or a stream.
        detector, overlapping, top_k, batch_size: As in [`~hf_mel.EntityLinker.annotate`].
        resume (`bool`): Whether to keep the results of an interrupted run.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`AnnotateSummary`].

    Raises:
        MelError: As in [`~hf_mel.linking.link_file.link_file`]; another detector is another setting.
    """
    summary = AnnotateSummary(bad_rows=[row.error for row in rows if row.error is not None])

    def results(texts: list[dict[str, Any]], done: Container[int]) -> Iterator[tuple[list[int], list[_Result]]]:
        options: dict[str, Any] = {"overlapping": overlapping, "top_k": top_k, "batch_size": batch_size, "done": done}
        for batch, annotated in annotate_batches(linker, texts, detector, **options):
            yield batch, [_Result(text) for text in annotated]

    describe = getattr(detector, "describe", None)
    settings = {
        **linker.describe(),
        "top_k": top_k,
        "overlapping": overlapping,
        "detector": describe() if describe else repr(detector),
    }
    with tqdm(desc="Annotating", unit="text", delay=1, disable=not progress) as bar:
        for result, is_new in write_results(
            rows, results, output, column=None, settings=settings, resume=resume, bar=bar
        ):
            summary.add(result)
            summary.num_resumed += not is_new
    return summary


def _file_row(number: int, file: Path, folder: Path) -> InputRow:
    row: dict[str, Any] = {"file": file.relative_to(folder).as_posix()}
    try:
        row["text"] = read_text_file(file)
    except MelError as error:
        return InputRow(
            number, row, {}, error.changed(message=f"{row['file']}: {error.message}", file=folder, row=number)
        )
    return InputRow(number, row, {"text": row["text"]})


def _text_of(path: Path, line: int, row: dict[str, Any]) -> dict[str, Any]:
    """Returns the text of a row of a table, whose spans are read if they are JSON."""
    text: dict[str, Any] = {"text": row.get("text")}
    if image := text_cell(path, line, row, "image"):
        text["image"] = path.parent / image
        verify_image(text["image"], row=line)
    spans = row.get("spans")
    if isinstance(spans, str):
        spans = parse_json(spans, file=path, row=line) if spans.strip() else None
    if spans is not None:
        row["spans"] = text["spans"] = spans
    check_text(text, line)
    return text


def read_annotated(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields the records of an output of [`annotate_file`]."""
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)
