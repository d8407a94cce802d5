"""Reads a dump, a folder of entity documents, or Parquet tables, in parts, on all cores.

The input is cut into parts of about 32 MiB. Where it is cut depends on the input alone. A worker turns each part into
[`~hf_mel.dataset_scripts.wikidata.documents.Records`] and writes them to two files. A part whose files are there is not
parsed again, so that an interrupted build goes on where it was. Memory holds a few parts for each core.
"""

from __future__ import annotations

import bz2
import gc
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from hf_mel.dataset_scripts.wikidata.documents import (
    Records,
    Selection,
    parse_json,
    read_document,
    read_line,
    to_json,
)
from hf_mel.dataset_scripts.wikidata.parquet_tables import has_tables, table_documents
from hf_mel.errors import DataFormatError, MelError

#: Bytes of a part, at least. More make fewer files and need more memory.
PART_BYTES = 32 << 20
#: Limit on a line. The largest entities of Wikidata have a few MB.
_MAX_LINE = 256 << 20
_SUFFIXES = tuple(f"{kind}{packed}" for kind in (".json", ".jsonl", ".ndjson") for packed in ("", ".gz", ".bz2"))
_SUMMARY = "summary.json"


@dataclass
class Part:
    """Some bytes of the input.

    Args:
        lines (`bool`): Whether they are lines of a dump. Otherwise each is a whole document.
        contents (`list[tuple[str, int, bytes]]`): (file, number of its first line, bytes).
    """

    lines: bool
    contents: list[tuple[str, int, bytes]]


@dataclass
class Summary:
    """The result of reading all parts: their number, the sha256 of each file, and the layout."""

    num_parts: int
    sha256: dict[str, str]
    layout: str


def read_parts(source: str | os.PathLike[str], folder: Path, selection: Selection) -> Summary:
    """Reads everything, and writes the records of each part into `folder` ([`load_labels`], [`load_items`]).

    Args:
        source (`str` or `os.PathLike`): A dump, or a folder of dumps and documents, or of Parquet tables.
        folder (`Path`): Folder for the records, which may hold those of an interrupted run of the same call.
        selection ([`~hf_mel.dataset_scripts.wikidata.documents.Selection`]): What is read of each document.

    Raises:
        DataFormatError: The source cannot be read, is cut off, or holds no file of the kind; or a table is not sorted.
        OSError: The disk is full.
    """
    summary_file = folder / _SUMMARY
    if summary_file.is_file():
        return Summary(**json.loads(summary_file.read_text(encoding="utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    sha256: dict[str, str] = {}
    num_parts = 0
    layouts: set[str] = set()
    has_parquet = has_tables(Path(source))
    parts = _table_parts(Path(source), selection, sha256) if has_parquet else _parts(_files(Path(source)), sha256)
    with ExitStack() as stack:
        workers = stack.enter_context(_Workers(folder, selection))
        for part in parts:
            layouts.add("Parquet tables" if has_parquet else "JSON dump" if part.lines else "entity documents")
            workers.process(num_parts, part)
            num_parts += 1
        workers.finish()
    summary = Summary(num_parts, _few(sha256, Path(source).name), " and ".join(sorted(layouts)))
    _write(summary_file, json.dumps(asdict(summary)).encode())
    return summary


def load_labels(folder: Path, number: int) -> list[list[Any]]:
    """Returns the labels of a part: [reference, label] each."""
    return parse_json(zlib.decompress(_labels_file(folder, number).read_bytes()))


def load_items(folder: Path, number: int) -> dict[str, Any]:
    """Returns the other fields of [`~hf_mel.dataset_scripts.wikidata.documents.Records`] of a part."""
    return parse_json(zlib.decompress(_items_file(folder, number).read_bytes()))


def process_part(folder: Path, number: int, part: Part, selection: Selection) -> None:
    """Reads a part and writes its records.

    Values of JSON hold no cycles, so that the garbage collector, which took half of the time, is off meanwhile.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        _process_part(folder, number, part, selection)
    finally:
        if was_enabled:
            gc.enable()


def _process_part(folder: Path, number: int, part: Part, selection: Selection) -> None:
    records = Records()
    for file, first, data in part.contents:
        if part.lines:
            for number_of_line, line in enumerate(data.split(b"\n"), first):
                read_line(line, file, number_of_line, selection, records)
        else:
            read_document(data, file, selection, records)
    fields = {**vars(records)}
    _write(_labels_file(folder, number), zlib.compress(to_json(fields.pop("labels")), 1))
    # Written last: a part is finished if this file is there.
    _write(_items_file(folder, number), zlib.compress(to_json(fields), 1))


def _labels_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.labels"


def _items_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.items"


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _few(sha256: dict[str, str], name: str) -> dict[str, str]:
    """Returns the digests of all files, or of more than a thousand one digest of them all."""
    if len(sha256) <= 1000:
        return sha256
    lines = "".join(f"{file} {digest}\n" for file, digest in sorted(sha256.items()))
    return {f"{name} ({len(sha256):,} files)": hashlib.sha256(lines.encode()).hexdigest()}


def _files(source: Path) -> list[Path]:
    """Returns the file itself, or the files of a folder that may hold entities, by name."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataFormatError(
            "This path is no file and no folder.",
            file=source,
            remedy="Give a dump (.json, .json.gz or .json.bz2), or a folder of entity documents or of Parquet tables.",
        )
    files = sorted(path for path in source.iterdir() if path.name.lower().endswith(_SUFFIXES) and path.is_file())
    if not files:
        raise DataFormatError(
            f"The folder holds no file that ends in {', '.join(_SUFFIXES)}.",
            file=source,
            remedy="Give a dump (.json, .json.gz or .json.bz2), or a folder of entity documents or of Parquet tables.",
        )
    return files


def _parts(files: list[Path], sha256: dict[str, str]) -> Iterator[Part]:
    """Cuts files into parts. The digest of a file is noted after its last byte."""
    documents: list[tuple[str, int, bytes]] = []
    size = 0
    for path in files:
        try:
            if _has_lines(path):
                yield from _line_parts(path, sha256)
                continue
            with _open(path) as (stream, digest):
                data = stream.read()
                sha256[path.name] = digest()
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(path, error) from error
        documents.append((path.name, 1, data))
        size += len(data)
        if size >= PART_BYTES:
            yield Part(False, documents)
            documents, size = [], 0
    if documents:
        yield Part(False, documents)


def _table_parts(source: Path, selection: Selection, sha256: dict[str, str]) -> Iterator[Part]:
    """Cuts the entities of Parquet tables into parts. Their numbers are lines."""
    first = number = 1
    lines: list[bytes] = []
    size = 0
    for document in table_documents(source, selection, sha256):
        lines.append(document)
        size += len(document) + 1
        number += 1
        if size >= PART_BYTES:
            yield Part(True, [(source.name, first, b"\n".join(lines))])
            lines, size, first = [], 0, number
    if lines:
        yield Part(True, [(source.name, first, b"\n".join(lines))])


def _line_parts(path: Path, sha256: dict[str, str]) -> Iterator[Part]:
    first = 1
    with _open(path) as (stream, digest):
        while data := stream.read(PART_BYTES):
            data += stream.readline(_MAX_LINE)
            if not data.endswith(b"\n") and stream.peek(1):
                raise DataFormatError(
                    f"A line has more than {_MAX_LINE >> 20} MiB.",
                    file=path,
                    row=first + data.count(b"\n"),
                    remedy="Give a dump with one entity a line.",
                )
            yield Part(True, [(path.name, first, data)])
            first += data.count(b"\n")
        sha256[path.name] = digest()


def _has_lines(path: Path) -> bool:
    """Whether a file has an entity a line. Otherwise it is one document."""
    with _open(path) as (stream, _):
        head = stream.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")
        if head.startswith(b"["):
            return True
        if re.match(rb'\{\s*"(entities|success|searchinfo|warnings)"', head):
            return False
        line = head.partition(b"\n")[0] if b"\n" in head else head + stream.readline(_MAX_LINE)
    try:
        entity = parse_json(line.strip().rstrip(b","))
    except ValueError:
        return not head.startswith(b"{")  # something else: its lines are listed
    return not isinstance(entity, dict) or "entities" not in entity


def _unreadable(path: Path, error: Exception) -> MelError:
    is_cut = isinstance(error, EOFError)
    reason = "it ends in the middle" if is_cut else str(error)
    return DataFormatError(
        f"The file cannot be read to its end ({reason}).",
        file=path,
        remedy="Download it again, and compare its size and its sum.",
    )


class _HashingFile(io.RawIOBase):
    """A file whose bytes are digested as they are read."""

    def __init__(self, path: Path):
        self._file, self._sha256 = path.open("rb", buffering=0), hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self._sha256.update(memoryview(buffer)[:count])
        return count

    def digest(self) -> str:
        while block := self._file.read(1 << 20):  # bytes after the end of a compressed stream
            self._sha256.update(block)
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()


class _open:
    """Opens a file that may be compressed. Yields its stream, and a function that returns its sha256 at its end."""

    def __init__(self, path: Path):
        self._path, self._stack = path, ExitStack()

    def __enter__(self) -> tuple[io.BufferedReader, Any]:
        raw = self._stack.enter_context(_HashingFile(self._path))
        stream: Any = self._stack.enter_context(io.BufferedReader(raw, 1 << 20))
        name = self._path.name.lower()
        if name.endswith(".gz"):
            stream = io.BufferedReader(self._stack.enter_context(gzip.GzipFile(fileobj=stream)), 1 << 20)
        elif name.endswith(".bz2"):
            stream = io.BufferedReader(self._stack.enter_context(bz2.BZ2File(stream)), 1 << 20)
        return stream, raw.digest

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


class _Workers:
    """Processes that read parts, one a core.

    They are started when a second part comes, because a small input is read faster without. They are plain child
    processes that read parts from their standard input: a caller's script is not imported again, as `multiprocessing`
    would do, and they end with this process even if it is killed.
    """

    def __init__(self, folder: Path, selection: Selection):
        self._folder, self._selection = folder, selection
        self._first: tuple[int, Part] | None = None
        self._num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._threads: ThreadPoolExecutor | None = None
        self._local = threading.local()
        self._processes: list[subprocess.Popen] = []
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: Any) -> None:
        for process in self._processes:
            process.kill() if error[0] else process.stdin.close()  # type: ignore[union-attr]
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]

    def process(self, number: int, part: Part) -> None:
        """Reads a part, now or later. Waits while too many parts are in memory."""
        if _items_file(self._folder, number).is_file():
            return
        if self._threads is None and self._first is None:
            self._first = (number, part)
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._num_workers)
        for waiting_number, waiting_part in [self._first, (number, part)] if self._first else [(number, part)]:
            self._waiting.append(self._threads.submit(self._send, waiting_number, waiting_part))
        self._first = None
        while len(self._waiting) > self._num_workers + 1:
            self._waiting.popleft().result()

    def finish(self) -> None:
        """Waits until all parts have been read."""
        if self._first is not None:
            process_part(self._folder, *self._first, self._selection)
        while self._waiting:
            self._waiting.popleft().result()

    def _send(self, number: int, part: Part) -> None:
        """Has the process of this thread read a part."""
        process = getattr(self._local, "process", None)
        if process is None:
            process = self._local.process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send_part(process.stdin, number, part)
            error = json.loads(process.stdout.readline())
        except (OSError, ValueError) as failure:
            raise MelError(
                "A process that reads the dump has ended (out of memory, or killed).",
                file=part.contents[0][0],
                row=part.contents[0][1],
                remedy="Repeat the command: finished parts are kept.",
            ) from failure
        if error is not None:
            raise OSError(*error["os_error"]) if "os_error" in error else RuntimeError(error["text"])

    def _start(self) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C goes to the parent alone
        )
        self._processes.append(process)
        assert process.stdin is not None
        ids = self._selection.ids
        selection = {**asdict(self._selection), "ids": None if ids is None else sorted(ids)}
        process.stdin.write(json.dumps([str(self._folder), selection]).encode() + b"\n")
        return process


def _send_part(stream: IO[bytes], number: int, part: Part) -> None:
    """Writes a part: a line of JSON that says how many bytes of each file follow, and the bytes."""
    files = [[file, first, len(data)] for file, first, data in part.contents]
    stream.write(json.dumps([number, part.lines, files]).encode() + b"\n")
    for _, _, data in part.contents:
        stream.write(data)
    stream.flush()


def _work(parts: IO[bytes], answers: IO[bytes]) -> None:
    """Reads parts from a stream until it ends, and answers each with a line of JSON: `null`, or the error."""
    folder, fields = json.loads(parts.readline())
    fields |= {"languages": tuple(fields["languages"]), "properties": tuple(fields["properties"])}
    fields |= {"required": tuple(tuple(pair) for pair in fields["required"])}
    selection = Selection(**fields | {"ids": None if fields["ids"] is None else frozenset(fields["ids"])})
    # The parent may be killed in the middle of a part: half of one must not look finished.
    while (header := parts.readline()).endswith(b"\n"):
        number, lines, files = json.loads(header)
        contents = [(file, first, parts.read(length)) for file, first, length in files]
        if any(len(data) < length for (_, _, data), (_, _, length) in zip(contents, files, strict=True)):
            return
        answer: dict[str, Any] | None = None
        try:
            process_part(Path(folder), number, Part(lines, contents), selection)
        except OSError as failure:  # a full disk
            answer = {"os_error": [failure.errno, failure.strerror]}
        except Exception as failure:  # the parent raises it
            answer = {"text": f"{type(failure).__name__}: {failure}"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    _work(sys.stdin.buffer, sys.stdout.buffer)
