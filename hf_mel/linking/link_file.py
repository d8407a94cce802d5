"""Links the mentions of a file, row by row, and keeps what is done if it is interrupted."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tqdm.auto import tqdm

from hf_mel.data.images import verify_image
from hf_mel.errors import DataFormatError, MelError, first_lines
from hf_mel.files import file_sha256, is_stream, link_target, open_stream, write_text
from hf_mel.linking.linker import EntityLinker
from hf_mel.linking.mentions import locate_mention
from hf_mel.linking.results import LinkResult
from hf_mel.linking.traces import LinkOrigin, LinkTrace, Traces, delete_traces, write_traced
from hf_mel.locks import writer_lock
from hf_mel.row_columns import ColumnMapping
from hf_mel.row_files import MAX_LISTED, ROW_SUFFIXES, int_cell, read_rows, text_cell
from hf_mel.schema import mention_features

#: Columns of a file of mentions that the linker reads, whose names may differ in case.
MENTION_COLUMNS = {name: name for name in (*mention_features(), "document_id", "modality")}
#: Columns that the output adds to a row, so that no row can have them before.
_ADDED_COLUMNS = ("linked", "error")
#: Key of the trace among the kept results of an interrupted run.
_TRACE = "trace"


@dataclass
class InputRow:
    """A row of a file of mentions.

    Args:
        line (`int`): The line of the file on which the row ends (in a .json file the number of the row).
        row (`dict`): The row with all its columns.
        mention (`dict`): The mention for [`EntityLinker`].
        error ([`~hf_mel.errors.MelError`], *optional*): The reason why it cannot be linked.
    """

    line: int
    row: dict[str, Any]
    mention: dict[str, Any]
    error: MelError | None = None


@dataclass
class LinkSummary:
    """Counts of [`link_file`].

    Args:
        num_linked, num_nil, num_review (`int`): Mentions with a result, those of them that are NIL, and those that are
            left to a reviewer.
        bad_rows (`list[MelError]`): Errors of the rows that were left out.
        num_resumed (`int`): Mentions that an interrupted run had linked before.
        warnings (`Counter[str]`): Warnings of the linker, with their numbers.
    """

    num_linked: int = 0
    num_nil: int = 0
    num_review: int = 0
    bad_rows: list[MelError] = field(default_factory=list)
    num_resumed: int = 0
    warnings: Counter[str] = field(default_factory=Counter)

    def add(self, result: Mapping[str, Any]) -> None:
        """Counts one result ([`LinkResult.to_dict`])."""
        self.num_linked += 1
        self.num_nil += result["is_nil"]
        self.num_review += result["needs_review"]
        self.warnings.update(result["warnings"])


def read_mentions(
    path: str | os.PathLike[str], *, mapping: ColumnMapping | None = None, skip_bad_rows: bool = False
) -> list[InputRow]:
    """Reads and checks all rows of a file of mentions, before any is linked.

    Args:
        path (`str` or `os.PathLike`): A file that [`~hf_mel.row_files.read_rows`] reads, with the columns `text`;
            `mention`, or `start` and `end`; and optionally `image`, a path relative to the file. Other columns are kept.
        mapping ([`~hf_mel.row_columns.ColumnMapping`], *optional*): Columns that have other names in the file.
        skip_bad_rows (`bool`): Whether a bad row gets an `error` instead of stopping the run.

    Raises:
        DataFormatError: The file cannot be read, has no rows, or has a column `linked` or `error`, which the output adds;
            or it has bad rows, and `skip_bad_rows` is not set. Names all bad rows.
    """
    rows = read_input_rows(Path(path), MENTION_COLUMNS, mention_of_row, mapping=mapping, added_columns=_ADDED_COLUMNS)
    return checked_rows(Path(path), rows, "mentions", skip_bad_rows)


def read_input_rows(
    path: Path,
    columns: Mapping[str, str],
    read_row: Callable[[Path, int, dict[str, Any]], dict[str, Any]],
    *,
    mapping: ColumnMapping | None,
    added_columns: Sequence[str],
) -> list[InputRow]:
    """Reads the rows of a file for [`write_results`], in their order. A bad row gets an `error`.

    Args:
        path (`Path`): A file that [`~hf_mel.row_files.read_rows`] reads, with a column `text`.
        columns (mapping): Columns that are read; the others are kept.
        read_row: Takes the path, a line and its row, and returns what is linked. Raises a [`~hf_mel.errors.MelError`] for a
            bad row.
        mapping ([`~hf_mel.row_columns.ColumnMapping`], *optional*): Columns that have other names in the file.
        added_columns (sequence of `str`): Columns of the output that no row may have.

    Raises:
        DataFormatError: The file cannot be read, or a row has one of the `added_columns`.
    """
    mapping = mapping or ColumnMapping()
    mapping.check_targets(columns)
    unreadable: list[DataFormatError] = []
    records = read_rows(path, columns, mapping=mapping, required=["text"], keep_others=True, bad_rows=unreadable)
    rows = []
    for line, row in records:
        for column in added_columns:
            if column in row:
                raise DataFormatError(
                    f"The row has the column {column!r}, which the output adds.",
                    file=path,
                    row=line,
                    remedy="Rename or remove it in all rows.",
                )
        try:
            rows.append(InputRow(line, row, read_row(path, line, row)))
        except MelError as error:
            message = error.message if error.file in (None, path) else f"{error.file}: {error.message}"
            rows.append(InputRow(line, row, {}, error.changed(message=message, file=path, row=line)))
    mapping.check_used(path)
    rows += [InputRow(int(error.row or 0), {"row": error.row}, {}, error) for error in unreadable]
    return sorted(rows, key=lambda row: row.line)


def checked_rows(path: Path, rows: list[InputRow], content: str, skip_bad_rows: bool) -> list[InputRow]:
    """Returns the rows of a file of "mentions" or "texts" if they can be linked.

    Raises:
        DataFormatError: There are none, or there are bad rows and `skip_bad_rows` is not set. Names all bad rows.
    """
    if not rows:
        raise DataFormatError(f"The file holds no {content}.", file=path, remedy="Add at least one row.")
    bad = [row.error for row in rows if row.error is not None]
    if bad and not skip_bad_rows:
        raise _bad_rows_error(path, bad, len(rows))
    return rows


def check_output(output: str | os.PathLike[str]) -> None:
    """Checks that the name of an output does not promise another format than JSON lines.

    Raises:
        DataFormatError: It ends in .json, .csv or .tsv.
    """
    suffix = Path(output).suffix.lower()
    if suffix != ".jsonl" and suffix in ROW_SUFFIXES and not is_stream(output):
        raise DataFormatError(
            f"The output has JSON lines, and the suffix {suffix!r} promises another format.",
            file=output,
            remedy="Give a .jsonl file.",
        )


def output_lock(target: Path) -> AbstractContextManager[None]:
    """Lets one process write a file of results, and what lies beside it."""
    return writer_lock(
        target.with_name(f".{target.name}.lock"),
        busy="The output is being written",
        remedy="Wait for it, or give another output.",
        target=target,
    )


def check_relinkable(linker: EntityLinker, output: str | os.PathLike[str]) -> None:
    """Checks that results of a linker can have traces.

    Raises:
        MelError: The index may miss entities, mentions are encoded in bfloat16, or the output is a stream.
    """
    problem = None
    if linker.index.kind != "exact":
        problem = (
            f"The index {linker.index.kind!r} may miss entities, so nothing proves which results an edit can change."
        )
    elif linker.bf16:
        problem = "Encodings in bfloat16 differ between batches, so scores of two runs cannot be compared."
    elif is_stream(output):
        problem = "A stream has no place for the traces of its results."
    if problem is not None:
        raise MelError(problem, file=output, remedy="Link without this, or without traces (--relinkable).")


def link_file(
    linker: EntityLinker,
    rows: Sequence[InputRow],
    output: str | os.PathLike[str],
    *,
    top_k: int = 10,
    batch_size: int = 32,
    resume: bool = False,
    origin: LinkOrigin | None = None,
    progress: bool = False,
) -> LinkSummary:
    """Links rows and writes one JSON object a line, in their order: the row with `linked`, or with `error`.

    Results are written as they come to `.NAME.partial` beside the output, which becomes the output when all rows are
    linked. A stream, such as "-" for standard output, gets them at once.

    Args:
        linker ([`EntityLinker`]): The linker.
        rows (sequence of [`InputRow`]): From [`read_mentions`].
        output (`str` or `os.PathLike`): The .jsonl file, or a stream.
        top_k, batch_size: As in [`EntityLinker.__call__`].
        resume (`bool`): Whether to keep the results of an interrupted run.
        origin ([`~hf_mel.linking.traces.LinkOrigin`], *optional*): The sources of the results. If given, traces are written
            beside the output, with which [`~hf_mel.linking.relinking.relink_file`] links again what a change of the
            knowledge base can change. Requires the index "exact" and encodings in float32.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`LinkSummary`].

    Raises:
        DataFormatError: As in [`check_output`].
        LockedError: Another process is writing the output.
        MelError: The output cannot be written, or `resume` is set and the interrupted run had other rows, settings, model
            or knowledge base, or its kept results are damaged.
    """
    summary = LinkSummary(bad_rows=[row.error for row in rows if row.error is not None])

    def results(mentions: list[dict[str, Any]], done: Container[int]) -> Iterator[tuple[list[int], Sequence[Any]]]:
        options: dict[str, Any] = {"top_k": top_k, "batch_size": batch_size, "done": done}
        if origin is None:
            yield from linker.link_batches(mentions, **options)
            return
        for batch, linked in linker.link_batches(mentions, **options, traced=True):
            yield batch, [_Traced(result) for result in linked]

    settings = {**linker.describe(), "top_k": top_k}
    traces = None
    if origin is not None:
        check_relinkable(linker, output)
        traces = _TraceCollector(settings, origin)
        settings = {**settings, "relinkable": True}
    with tqdm(desc="Linking", unit="mention", delay=1, disable=not progress) as bar:
        for result, is_new in write_results(
            rows, results, output, column="linked", settings=settings, resume=resume, bar=bar, traces=traces
        ):
            summary.add(result)
            summary.num_resumed += not is_new
    return summary


def write_results(
    rows: Sequence[InputRow],
    results: Callable[[list[dict[str, Any]], Container[int]], Iterator[tuple[list[int], Sequence[Any]]]],
    output: str | os.PathLike[str],
    *,
    column: str | None,
    settings: Mapping[str, Any],
    resume: bool,
    bar: tqdm,
    traces: _TraceCollector | None = None,
) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Writes rows with their results as [`link_file`] does.

    Args:
        rows (sequence of [`InputRow`]): The rows.
        results: Takes the inputs of the good rows and the positions of those that have a result, and yields the positions
            of others and their results, which have a method `to_dict`.
        output, resume: As in [`link_file`].
        column (`str`, *optional*): The column of the result in the output. `None`: the columns of the result are those of
            the output.
        settings (mapping): What the results depend on besides the rows.
        bar (`tqdm`): A progress bar.
        traces (*optional*): Takes the traces from the results, and writes them when the output is complete.

    Yields:
        `tuple[dict, bool]`: A result, and whether it is new. Those of an interrupted run come first.

    Raises:
        As in [`link_file`].
    """
    check_output(output)
    good = [row for row in rows if row.error is None]
    if is_stream(output):
        sink: _Stream | _PartialFile = _Stream(output, rows, column)
    else:
        sink = _PartialFile(output, rows, column, _fingerprint(settings, rows), resume, traces)
    try:
        with sink:
            bar.total, bar.initial, bar.n = len(good), len(sink.done), len(sink.done)
            for result in sink.done.values():
                yield result, False
            batches = results([row.mention for row in good], sink.done)
            for batch, batch_results in _with_lines(batches, good):
                pairs = zip(batch, batch_results, strict=True)
                new = [(k, result.to_dict()) for k, result in pairs if k not in sink.done]
                sink.add(new)
                for _, result in new:
                    yield result, True
                bar.update(len(new))
            sink.finish()
    except BrokenPipeError:
        raise  # the reader of a stream, such as `head`, has read enough
    except OSError as error:
        raise MelError(
            f"The output cannot be written ({error}).", file=output, remedy="Check the path and the free disk space."
        ) from error


def mention_of_row(path: Path, line: int, row: dict[str, Any]) -> dict[str, Any]:
    """Returns the mention of a row, whose offsets become integers. Images are relative to the folder of `path`."""
    is_table = path.suffix.lower() in (".csv", ".tsv")
    mention = {column: cell for column, cell in row.items() if not (is_table and cell == "")}
    for column in ("text", "mention", "image"):
        is_required = column == "text" and row.get("modality") != "image"
        text_cell(path, line, mention, column, is_required)
    for column in mention.keys() & {"start", "end"}:
        row[column] = mention[column] = int_cell(path, line, mention, column)
    mention["image"] = path.parent / mention["image"] if mention.get("image") else None
    locate_mention(mention, line)
    if mention["image"] is not None:
        verify_image(mention["image"], row=line)
    return mention


def _with_lines(
    batches: Iterator[tuple[list[int], Sequence[Any]]], rows: Sequence[InputRow]
) -> Iterator[tuple[list[int], Sequence[Any]]]:
    """Yields the batches, with the line of the file in errors in place of the position of the mention."""
    try:
        yield from batches
    except MelError as error:
        if not isinstance(error.row, int):
            raise
        raise error.changed(row=rows[error.row].line) from error


def _bad_rows_error(path: Path, bad: Sequence[MelError], total: int) -> MelError:
    """Returns one error for the bad rows of a file, which names them and the option that leaves them out."""
    if len(bad) == 1:
        remedy = f"{bad[0].remedy or ''} Or leave the row out with --skip-bad-rows.".strip()
        return bad[0].changed(file=path, remedy=remedy)
    lines = first_lines([f"row {error.row}: {error.message}" for error in bad], MAX_LISTED)
    return DataFormatError(
        f"{len(bad):,} of {total:,} rows cannot be linked:" + "".join(f"\n  {line}" for line in lines) + "\n",
        file=path,
        remedy="Correct them, or leave them out with --skip-bad-rows.",
    )


def _fingerprint(settings: Mapping[str, Any], rows: Sequence[InputRow]) -> str:
    """Returns a digest of everything that the results depend on."""
    images = (row.mention.get("image") for row in rows)
    digests = [image and file_sha256(image) for image in images]  # a path says nothing about what its file holds now
    content = [[row.line, row.row, str(row.error), digest] for row, digest in zip(rows, digests, strict=True)]
    return hashlib.sha256(json.dumps({**settings, "rows": content}, sort_keys=True, default=str).encode()).hexdigest()


def _record(row: InputRow, column: str | None, result: Mapping[str, Any] | None) -> str:
    """Returns the output line of a row."""
    added: Mapping[str, Any] = (
        {"error": str(row.error)} if result is None else result if column is None else {column: result}
    )
    record = {**row.row, **added}
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


class _Traced:
    """A result whose plain data hold its trace."""

    def __init__(self, result: LinkResult):
        self.result = result

    def to_dict(self) -> dict[str, Any]:
        """Returns the plain data."""
        assert self.result.trace is not None
        return {**self.result.to_dict(), _TRACE: self.result.trace.to_dict()}


class _TraceCollector:
    """Takes traces from results in the order of their lines, and writes them beside the output."""

    def __init__(self, settings: Mapping[str, Any], origin: LinkOrigin):
        self.settings, self.origin = settings, origin
        self.traces: list[LinkTrace] = []
        self.lines: list[int] = []

    def take(self, result: dict[str, Any], line: int) -> None:
        """Moves the trace out of the plain data of a result."""
        self.traces.append(LinkTrace.from_dict(result.pop(_TRACE)))
        self.lines.append(line)

    def join(self) -> Traces:
        """Returns all traces."""
        return Traces.join(self.traces, self.lines, self.settings, self.origin)


class _Stream:
    """Writes output lines to a stream, each as soon as all rows before it have one."""

    def __init__(self, path: str | os.PathLike[str], rows: Sequence[InputRow], column: str | None):
        self.path, self.rows, self.column = path, rows, column
        self.done: dict[int, Mapping[str, Any]] = {}
        self._results: dict[int, Mapping[str, Any]] = {}
        self._next_row = self._next_result = 0

    def __enter__(self) -> _Stream:
        self._opened = ExitStack()
        self._stream: BinaryIO = self._opened.enter_context(open_stream(self.path))
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def add(self, results: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        """Adds results by the position of their row among the good ones."""
        self._results.update(results)
        while self._next_row < len(self.rows):
            row = self.rows[self._next_row]
            if row.error is None and self._next_result not in self._results:
                break
            result = None
            if row.error is None:
                result = self._results.pop(self._next_result)
                self._next_result += 1
            self._stream.write(_record(row, self.column, result).encode())
            self._next_row += 1
        self._stream.flush()

    def finish(self) -> None:
        """Writes what is left."""
        self.add([])


class _PartialFile:
    """Collects results in `.NAME.partial`, and writes the output from it in the order of the rows."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        rows: Sequence[InputRow],
        column: str | None,
        fingerprint: str,
        resume: bool,
        traces: _TraceCollector | None = None,
    ):
        self.column, self.traces = column, traces
        self.target, self.rows, self.fingerprint = link_target(path), rows, fingerprint
        self.partial = self.target.with_name(f".{self.target.name}.partial")
        self.resume = resume
        self.done: dict[int, Mapping[str, Any]] = {}

    def _read(self) -> dict[int, Mapping[str, Any]]:
        """Returns the results of an interrupted run, by position."""
        try:
            lines = self.partial.read_bytes().split(b"\n")[:-1]  # what follows the last line end is incomplete
        except FileNotFoundError:
            return {}
        try:
            fingerprint, *results = map(json.loads, lines)
            done: dict[int, Mapping[str, Any]] = {int(position): dict(result) for position, result in results}
        except (ValueError, TypeError) as error:  # no line at all is a ValueError, too
            raise MelError(
                "The kept results of the interrupted run are damaged.",
                file=self.partial,
                remedy="Leave out --resume to start over.",
            ) from error
        if fingerprint != self.fingerprint:
            raise MelError(
                "The interrupted run had other rows, settings, models or another knowledge base.",
                file=self.target,
                remedy="Run it again as it was, or leave out --resume to start over.",
            )
        return done

    def __enter__(self) -> _PartialFile:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            opened.enter_context(output_lock(self.target))
            if self.resume:
                self.done = self._read()
            self._start()
            self._opened = opened.pop_all()
        return self

    def _start(self) -> None:
        lines = [json.dumps(self.fingerprint), *map(json.dumps, self.done.items())]
        write_text(self.partial, [line + "\n" for line in lines])
        self._file = self.partial.open("ab")

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._opened.close()

    def add(self, results: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        """Adds results by the position of their row among the good ones."""
        self._file.write("".join(json.dumps(result, allow_nan=False) + "\n" for result in results).encode())
        self._file.flush()

    def finish(self) -> None:
        """Writes the output, and deletes the collected results."""
        self._file.close()
        with self.partial.open("rb") as file:
            next(file)
            offsets: dict[int, int] = {}
            while line := file.readline():
                offsets[json.loads(line)[0]] = file.tell() - len(line)

            def read(position: int, line: int) -> Mapping[str, Any]:
                file.seek(offsets[position])
                result = json.loads(file.readline())[1]
                if self.traces is not None:
                    self.traces.take(result, line)
                return result

            good = iter(range(len(offsets)))
            lines = (
                _record(row, self.column, None if row.error is not None else read(next(good), line))
                for line, row in enumerate(self.rows)
            )
            if self.traces is not None:
                write_traced(self.target, lines, self.traces.join)
            else:
                write_text(self.target, lines)
                delete_traces(self.target)
        self.partial.unlink()
