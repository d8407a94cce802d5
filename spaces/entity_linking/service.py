"""The app without its interface: models, knowledge bases, linking, uploads, and their limits.

Every mistake that a visitor can make raises [`Refused`] with a message that says how to correct it.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import json
import logging
import math
import os
import shutil
import stat
import tempfile
import threading
import time
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from hf_mel import (
    EntityLinker,
    ImageError,
    KnowledgeBase,
    KnowledgeBaseError,
    MelError,
    check_entity_file,
    load_reranker,
    load_retriever,
    open_image,
    read_rows,
)

_log = logging.getLogger(__name__)

#: Limits of one request. A CPU Space has two cores and many visitors.
MAX_TEXT = 2_000
MAX_FILTER = 500
MAX_MENTIONS = 8
MAX_TOP_K = 20
MAX_IMAGE_BYTES = 8 << 20
MAX_IMAGE_PIXELS = 24_000_000
MAX_BATCH_ROWS = 500
MAX_TABLE_BYTES = 4 << 20
MAX_KB_ROWS = 2_000
MAX_ARCHIVE_BYTES = 64 << 20
MAX_ARCHIVE_FILES = 4_000
MAX_UNPACKED_BYTES = 256 << 20
#: Knowledge bases of one visitor that are kept at a time.
MAX_OWN_KBS = 3
#: Rows of a batch that are linked between two updates of the progress bar.
_BATCH_STEP = 16

#: Image types that are unpacked. SVG is excluded because it can contain scripts.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
#: Files of entities and of mentions.
TABLE_SUFFIXES = [".csv", ".tsv", ".json", ".jsonl", ".ndjson"]
_TABLE_KINDS = "a .csv, .tsv, .json or .jsonl file"


class Refused(Exception):
    """A request that cannot be served. Its text is shown to the visitor."""


@dataclass
class Session:
    """The knowledge bases of one visitor, in a folder that is deleted with the session."""

    kbs: dict[str, Path] = field(default_factory=dict)
    linkers: dict[tuple[str, Path], EntityLinker] = field(default_factory=dict)
    _folder: tempfile.TemporaryDirectory | None = None

    @property
    def folder(self) -> Path:
        """The visitor's folder, created on first use."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="mel-space-", ignore_cleanup_errors=True)
        return Path(self._folder.name)

    def __deepcopy__(self, memo) -> Session:
        return Session()  # Gradio copies the initial state for every visitor, and every visitor needs a new folder

    def close(self) -> None:
        """Deletes the visitor's files."""
        self.kbs.clear()
        self.linkers.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class Service:
    """The models and knowledge bases of one app. Its methods may be called from many threads.

    Args:
        models (`dict`): Displayed name → run folder or Hub id, or a dict of these with the keys `model` and `reranker`.
        kbs (`dict[str, str]`): Displayed name → folder or Hub id. A knowledge base is offered only with the models that
            can use it.

    Raises:
        Refused: `models` or `kbs` is empty.
    """

    def __init__(self, models: dict[str, str | dict[str, str]], kbs: dict[str, str]):
        if not models or not kbs:
            raise Refused("The app needs at least one model and one knowledge base.")
        self.models, self.kbs = models, kbs
        self._loaded: dict[str, tuple[Any, Any]] = {}
        self._kbs: dict[str, KnowledgeBase] = {}
        self._linkers: dict[tuple[str, str], EntityLinker] = {}
        self._lock = threading.RLock()

    def linker(self, model: str, kb: str, session: Session | None = None) -> EntityLinker:
        """Returns the linker for a model and a knowledge base. Models and knowledge bases are loaded once and shared.

        Raises:
            Refused: A name is unknown, or the model did not build the knowledge base.
        """
        self._check_model(model)
        own_kbs = {} if session is None else session.kbs
        with self._lock:
            try:
                if kb in self.kbs:
                    if (model, kb) not in self._linkers:
                        if kb not in self._kbs:
                            self._kbs[kb] = KnowledgeBase.from_pretrained(self.kbs[kb])
                        self._linkers[model, kb] = self._new_linker(model, self._kbs[kb])
                    return self._linkers[model, kb]
                if session is not None and kb in own_kbs:
                    key = (model, own_kbs[kb])
                    if key not in session.linkers:
                        session.linkers[key] = self._new_linker(model, KnowledgeBase(own_kbs[kb]))
                    return session.linkers[key]
            except KnowledgeBaseError as error:
                raise Refused(
                    f"“{model}” cannot use “{kb}”: a knowledge base works only with the model that built it. Choose "
                    "another."
                ) from error
            except MelError as error:
                raise Refused(f"“{model}” cannot use “{kb}”: {error.message} {error.remedy or ''}".strip()) from error
        if not kb:
            raise Refused(f"No knowledge base here works with “{model}”. Choose another model, or build your own.")
        raise Refused(
            f"The knowledge base “{_truncate(str(kb), 80)}” does not exist (your own ones are deleted after an hour; build "
            f"it again). Choose one of: {', '.join([*self.kbs, *own_kbs])}."
        )

    def _check_model(self, model: str) -> None:
        if model not in self.models:
            raise Refused(
                f"The model “{_truncate(model, 80)}” does not exist. Choose one of: {', '.join(self.models)}."
            )

    def _new_linker(self, model: str, kb: KnowledgeBase) -> EntityLinker:
        source = self.models[model]
        reranking = {}
        if isinstance(source, dict) and "reranker" in source:
            reranker, processor = self._load(load_reranker, source["reranker"])
            reranking = {"reranker": reranker, "reranker_processor": processor}
        return EntityLinker(*self._load_retriever(model), kb, **reranking)

    def _load_retriever(self, model: str) -> tuple[Any, Any]:
        source = self.models[model]
        return self._load(load_retriever, source if isinstance(source, str) else source["model"])

    def _load(self, load: Callable[[str], tuple[Any, Any]], source: str) -> tuple[Any, Any]:
        """A model and its processor, loaded once even if several names share them."""
        if source not in self._loaded:
            self._loaded[source] = load(source)
        return self._loaded[source]

    def fitting_kbs(self, model: str, session: Session | None = None) -> list[str]:
        """Returns the names of the knowledge bases that `model` can use, which are those it built."""
        fitting = []
        for kb in [*self.kbs, *(session.kbs if session else ())]:
            try:
                self.linker(model, kb, session)
            except Refused:
                continue
            fitting.append(kb)
        return fitting

    def link(
        self,
        text: str,
        mentions: Sequence[str | tuple[int, int]],
        image: Image.Image | None,
        *,
        model: str,
        kb: str,
        session: Session | None = None,
        top_k: int = 5,
        nil_threshold: float | None = None,
        units: Sequence[str] | None = None,
        where: str | None = None,
    ) -> tuple[list[Any], float]:
        """Links the mentions of one text together.

        Args:
            text (`str`): The caption.
            mentions (sequence of `str` or `tuple[int, int]`): Mentions by their words, or by start and end in the text.
            image (`Image.Image`, *optional*): The photo.
            model, kb (`str`): Displayed names.
            session ([`Session`], *optional*): The visitor, whose knowledge bases are available too.
            top_k (`int`): Number of candidates.
            nil_threshold (`float`, *optional*): Replaces the model's own threshold.
            units (sequence of `str`, *optional*): The scoring units to use; all by default.
            where (`str`, *optional*): A filter, which the entities have to pass.

        Returns:
            `tuple[list[LinkResult], float]`: One result per mention, and the seconds it took.

        Raises:
            Refused: An input is missing, too long or invalid, a mention is not in the text, or no entity passes the filter.
        """
        check_text(text, mentions)
        _check_top_k(top_k)
        if nil_threshold is not None and not _is_number(nil_threshold):
            raise Refused("The NIL threshold must be a number.")
        linker = _filtered(self.linker(model, kb, session), where)
        if nil_threshold is not None:
            linker = copy.copy(linker)
            linker.nil_threshold = nil_threshold
        rows = []
        for mention in mentions:
            span = {"mention": mention} if isinstance(mention, str) else {"start": mention[0], "end": mention[1]}
            rows.append({"text": text, "image": image, "context_id": "visitor", **span})
        start = time.perf_counter()
        with _refused_errors():
            results = linker(rows, top_k=int(top_k), units=units)
        return results, time.perf_counter() - start

    def annotate(
        self,
        text: str,
        image: Image.Image | None,
        *,
        model: str,
        kb: str,
        session: Session | None = None,
        top_k: int = 3,
        where: str | None = None,
    ) -> tuple[Any, float]:
        """Finds the names of the knowledge base in a text, and links them together.

        Args:
            text (`str`): The text.
            image (`Image.Image`, *optional*): Its photo.
            model, kb, session, top_k, where: As in [`link`].

        Returns:
            `tuple[AnnotatedText, float]`: The mentions, and the seconds it took.

        Raises:
            Refused: The text is empty or too long, or the filter cannot be read, or no entity passes it.
        """
        check_length(text)
        _check_top_k(top_k)
        linker = _filtered(self.linker(model, kb, session), where)
        start = time.perf_counter()
        with _refused_errors():
            annotated = linker.annotate(text, image=image, top_k=int(top_k))
        return annotated, time.perf_counter() - start

    def explain(self, text: str, image: Image.Image | None, result: Any, linker: EntityLinker) -> Any:
        """Returns the explanation of the best candidate, or `None` if it fails: the answer is shown without it."""
        mention = {"text": text, "mention": result.mention, "start": result.start, "end": result.end, "image": image}
        try:
            with _refused_errors():
                return linker.explain(mention, result.best.entity_id)
        except Refused:
            return None

    def link_batch(
        self,
        path: str | os.PathLike[str],
        *,
        model: str,
        kb: str,
        session: Session | None = None,
        top_k: int = 3,
        progress: Callable[[float], None] = lambda share: None,
    ) -> list[dict[str, Any]]:
        """Links every mention of a CSV or JSONL file with the columns text and mention.

        Args:
            path (`str` or `os.PathLike`): The file.
            model, kb, session, top_k: As in [`link`].
            progress (callable): Receives the finished share of the rows.

        Returns:
            `list[dict]`: The rows in their order, each with `entity_id`, `name`, `score`, `num_tied` and `candidates`, or with
                `error`.

        Raises:
            Refused: The file cannot be read, or has too many rows.
        """
        rows = list(_read_mentions(Path(path)))
        linker = self.linker(model, kb, session)
        _check_top_k(top_k)
        answers: list[dict[str, Any]] = []
        for first in range(0, len(rows), _BATCH_STEP):
            answers += _link_rows(linker, rows[first : first + _BATCH_STEP], int(top_k))
            progress(len(answers) / len(rows))
        return [{**row, **answer} for row, answer in zip(rows, answers, strict=True)]

    def build_kb(
        self,
        name: str,
        table: str | os.PathLike[str],
        archive: str | os.PathLike[str] | None,
        *,
        model: str,
        session: Session,
    ) -> tuple[str, int, list[str]]:
        """Builds a visitor's knowledge base from a table of entities and a zip of their images.

        Args:
            name (`str`): The name that the visitor chose.
            table (`str` or `os.PathLike`): A CSV or JSONL file of entities.
            archive (`str` or `os.PathLike`, *optional*): A zip of their images.
            model (`str`): Displayed name of the model that encodes the entities.
            session ([`Session`]): The visitor.

        Returns:
            `tuple[str, int, list[str]]`: The displayed name of the knowledge base, its number of entities, and a sentence
            for each image that is missing or damaged, so that its entity goes without it.

        Raises:
            Refused: Rows are invalid (the message lists them), or a file is too large.
        """
        table = Path(table)
        if table.suffix.lower() not in TABLE_SUFFIXES:
            raise Refused(f"Upload the entities as {_TABLE_KINDS}.")
        if table.stat().st_size > MAX_TABLE_BYTES:
            raise Refused(f"The table is larger than {MAX_TABLE_BYTES >> 20} MB.")
        self._check_model(model)
        with self._lock, _refused_errors():
            encoder = self._load_retriever(model)
        digest = hashlib.sha256(f"{model}\n{table.suffix}\n".encode())
        digest.update(table.read_bytes())
        if archive is not None:
            digest.update(Path(archive).read_bytes())
        folder = session.folder / digest.hexdigest()[:16]
        kb_folder = folder / "kb"
        label = f"{_printable(name) or 'My knowledge base'} (yours)"
        if not kb_folder.exists():
            source = folder / "source"
            source.mkdir(parents=True)
            try:
                self._build(table, archive, source, kb_folder, encoder)
            finally:
                shutil.rmtree(source, ignore_errors=True)
        while len(session.kbs) >= MAX_OWN_KBS and label not in session.kbs:
            oldest = session.kbs.pop(next(iter(session.kbs)))
            if oldest not in session.kbs.values() and oldest != kb_folder:
                session.linkers = {key: linker for key, linker in session.linkers.items() if key[1] != oldest}
                shutil.rmtree(oldest.parent, ignore_errors=True)
        session.kbs[label] = kb_folder
        kb = KnowledgeBase(kb_folder)
        return label, len(kb), [f"Row {entry['row']}: {entry['problem']}" for entry in kb.left_out_images]

    @staticmethod
    def _build(table: Path, archive: Any, source: Path, kb_folder: Path, encoder: tuple[Any, Any]) -> None:
        entities = source / f"entities{table.suffix.lower()}"
        shutil.copyfile(table, entities)
        if archive is not None:
            unpack_images(Path(archive), source)
        count, problems = check_entity_file(entities, image_folder=source)
        problems = [problem for problem in problems if not isinstance(problem, ImageError)]  # the build goes on
        if count > MAX_KB_ROWS:
            raise Refused(f"The table has {count:,} entities; at most {MAX_KB_ROWS:,} are allowed.")
        _refuse_rows(problems, source)
        with _refused_errors():
            KnowledgeBase.build(str(entities), *encoder, output=str(kb_folder), progress=False)

    def download_kb(self, kb: str, session: Session) -> str:
        """Returns the path of a zip of a visitor's knowledge base.

        Raises:
            Refused: The visitor has no such knowledge base.
        """
        if kb not in session.kbs:
            raise Refused("Only your own knowledge bases can be downloaded; build one first.")
        folder = session.kbs[kb]
        return shutil.make_archive(str(folder.parent / "knowledge_base"), "zip", folder)


def parse_mentions(text: str, mentions: str | None, spans: str | None) -> list[str | tuple[int, int]]:
    """Returns the mentions of the form: selected ones as start and end in the text, typed ones as words.

    Args:
        text (`str`): The caption.
        mentions (`str`, *optional*): The mentions, one per line.
        spans (`str`, *optional*): JSON list of the selected spans, `[[start, end], …]`. Spans whose words are not among
            the lines are ignored.
    """
    try:
        unused = [(int(start), int(end)) for start, end in json.loads(spans or "[]")]
    except (ValueError, TypeError, OverflowError, RecursionError):
        unused = []
    parsed: list[str | tuple[int, int]] = []
    for line in filter(None, map(str.strip, (mentions or "").split("\n"))):
        matching = [(a, b) for a, b in unused if 0 <= a < b and text[a:b].replace("\n", " ") == line]
        parsed.append(matching[0] if matching else line)
        if matching:
            unused.remove(matching[0])
    return parsed


def check_length(text: str) -> None:
    """Checks that there is a text, and that it is not too long.

    Raises:
        Refused: It is missing or too long.
    """
    if not isinstance(text, str) or not text.strip():
        raise Refused("Paste a caption or a text first.")
    if len(text) > MAX_TEXT:
        raise Refused(f"The text has {len(text):,} characters; at most {MAX_TEXT:,} are allowed.")


def check_text(text: str, mentions: Sequence[str | tuple[int, int]]) -> None:
    """Checks that text and mentions can be linked.

    Raises:
        Refused: The text is missing or too long, or the mentions are missing, too many or not in the text.
    """
    check_length(text)
    if not mentions:
        raise Refused("Say which words to link: select them in the caption, or type them under “Mention”.")
    if len(mentions) > MAX_MENTIONS:
        raise Refused(f"At most {MAX_MENTIONS} mentions can be linked at once, not {len(mentions)}.")
    for mention in mentions:
        if not isinstance(mention, (str, tuple)):
            raise Refused("Every mention must be a string.")
        if isinstance(mention, str) and mention not in text:
            raise Refused(f"“{_truncate(mention, 80)}” is not in the caption. Copy it exactly from the caption.")


def _filtered(linker: EntityLinker, where: str | None) -> EntityLinker:
    """Returns the linker, or a copy of it that links only to entities that pass a filter.

    Raises:
        Refused: The filter is no text, or too long.
    """
    if where is None or (isinstance(where, str) and not where.strip()):
        return linker
    if not isinstance(where, str) or len(where) > MAX_FILTER:
        raise Refused(f"The filter must be a text of at most {MAX_FILTER} characters.")
    linker = copy.copy(linker)
    linker.where = where
    return linker


def read_image(source: str | os.PathLike[str] | None) -> Image.Image | None:
    """Returns an uploaded image as RGB with at most 1024 × 1024 pixels; `None` stays `None`.

    Raises:
        Refused: The file is no readable image, or too large.
    """
    if source is None:
        return None
    path = Path(source)
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise Refused(f"The image is larger than {MAX_IMAGE_BYTES >> 20} MB.")
    try:
        with Image.open(path) as opened:
            width, height = opened.size
    except Exception as error:
        raise Refused("The file is not an image that can be read. Use JPEG, PNG, WebP or GIF.") from error
    if width * height > MAX_IMAGE_PIXELS:
        raise Refused(f"The image has {width:,} × {height:,} pixels; scale it to at most 24 million.")
    with _refused_errors():
        image = open_image(path)
    image.thumbnail((1024, 1024))
    return image


def unpack_images(archive: Path, folder: Path) -> int:
    """Unpacks the images of a zip to `folder`; files of other types are skipped.

    Returns:
        `int`: The number of files in the zip.

    Raises:
        Refused: The file is not a zip or is too large, or the path of a file leads out of the folder.
    """
    if archive.stat().st_size > MAX_ARCHIVE_BYTES:
        raise Refused(f"The zip is larger than {MAX_ARCHIVE_BYTES >> 20} MB.")
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [member for member in packed.infolist() if not member.is_dir()]
            if len(members) > MAX_ARCHIVE_FILES:
                raise Refused(f"The zip holds {len(members):,} files; at most {MAX_ARCHIVE_FILES:,} are allowed.")
            if sum(member.file_size for member in members) > MAX_UNPACKED_BYTES:
                raise Refused(f"The zip unpacks to more than {MAX_UNPACKED_BYTES >> 20} MB.")
            written = 0
            for member in members:
                name = member.filename.replace("\\", "/")
                target = (folder / name).resolve()
                if (
                    name.startswith("/")
                    or not target.is_relative_to(folder.resolve())
                    or stat.S_ISLNK(member.external_attr >> 16)
                ):
                    raise Refused(f"The path of a file in the zip leads out of it: “{_truncate(name, 80)}”.")
                if target.suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                written += _copy_member(packed, member, target, MAX_UNPACKED_BYTES - written)
            return len(members)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise Refused(f"The zip cannot be unpacked ({error}). Create it again, without a password.") from error


def _copy_member(packed: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, max_bytes: int) -> int:
    """Unpacks one file and counts its bytes, because the size stated in the archive may be wrong."""
    size = 0
    with packed.open(member) as source, target.open("wb") as out:
        while block := source.read(1 << 16):
            size += len(block)
            if size > max_bytes:
                raise Refused(f"The zip unpacks to more than {MAX_UNPACKED_BYTES >> 20} MB.")
            out.write(block)
    return size


def write_results(rows: Sequence[dict[str, Any]], folder: Path) -> tuple[str, str]:
    """Writes the rows of [`Service.link_batch`] to a CSV and a JSON file and returns both paths."""
    json_path, csv_path = folder / "linked.json", folder / "linked.csv"
    json_path.write_text(json.dumps(list(rows), ensure_ascii=False, indent=2), encoding="utf-8")
    out = io.StringIO()
    columns = ["text", "mention", "entity_id", "name", "score", "error"]
    writer = csv.DictWriter(out, columns, extrasaction="ignore", restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _csv_cell(value) for key, value in row.items()})
    csv_path.write_text(out.getvalue(), encoding="utf-8-sig")
    return str(csv_path), str(json_path)


def _csv_cell(value: Any) -> Any:
    """The value, with a quote in front of text that a spreadsheet would run as a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t") else value


def _refuse_rows(problems: Sequence[MelError], folder: Path) -> None:
    """Refuses a file with bad rows, and names them without the folder of the server."""
    if problems:
        lines = [f"Row {problem.row}: {problem.message}".replace(f"{folder}/", "") for problem in problems[:20]]
        more = f"\n… and {len(problems) - 20:,} more." if len(problems) > 20 else ""
        raise Refused(f"{len(problems):,} rows cannot be used:\n" + "\n".join(lines) + more)


def _read_mentions(path: Path) -> Iterator[dict[str, str]]:
    """The columns text and mention of every row. An image column is ignored: its paths would be those of the server."""
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise Refused(f"Upload the mentions as {_TABLE_KINDS} with the columns text and mention.")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise Refused(f"The file is larger than {MAX_TABLE_BYTES >> 20} MB.")
    with _refused_errors():
        # Names of columns may differ in case.
        bad_rows: list[Any] = []
        columns = {"text": "text", "mention": "mention"}
        rows = list(read_rows(path, columns, keep_others=True, bad_rows=bad_rows))
    _refuse_rows(bad_rows, path.parent)
    if not rows:
        raise Refused("The file holds no mentions.")
    if len(rows) > MAX_BATCH_ROWS:
        raise Refused(f"The file has {len(rows):,} rows; at most {MAX_BATCH_ROWS:,} are linked at once.")
    for line, row in rows:
        for column in ("text", "mention"):
            if not isinstance(row.get(column), str):
                raise Refused(f"Row {line} has no text in the column “{column}”.")
        yield {"text": row["text"], "mention": row["mention"]}


def _link_rows(linker: EntityLinker, rows: Sequence[dict[str, str]], top_k: int) -> list[dict[str, Any]]:
    """Links rows together or, if that fails, one by one, so that one bad row does not cost the others."""
    answers: list[dict[str, Any]] = [{} for _ in rows]
    valid = []
    for number, row in enumerate(rows):
        try:
            check_text(row["text"], [row["mention"]])
            valid.append(number)
        except Refused as refused:
            answers[number] = {"error": str(refused)}

    def link(numbers: Sequence[int]) -> None:
        with _refused_errors():
            results = linker([rows[number] for number in numbers], top_k=top_k)
        for number, result in zip(numbers, results, strict=True):
            answers[number] = {
                "entity_id": result.entity_id,
                "name": "" if result.is_nil else result.best.name,
                "score": result.best.score,
                "num_tied": result.num_tied,
                "candidates": [
                    {"entity_id": c.entity_id, "name": c.name, "score": c.score} for c in result.candidates
                ],
            }

    try:
        link(valid)
    except Refused:
        for number in valid:
            try:
                link([number])
            except Refused as refused:
                answers[number] = {"error": str(refused)}
    return answers


@contextmanager
def _refused_errors() -> Iterator[None]:
    """Turns errors of the library into [`Refused`], without paths of the server."""
    try:
        yield
    except MelError as error:
        row = f"Row {error.row}: " if error.row is not None else ""
        raise Refused(f"{row}{error.message} {error.remedy or ''}".strip()) from error
    except Exception as error:  # the message of an unexpected error may hold paths, so it only goes to the log
        _log.exception("a request failed")
        raise Refused("Something went wrong on our side. Try again, or try another text or photo.") from error


def _check_top_k(top_k: Any) -> None:
    if not _is_number(top_k) or not 1 <= top_k <= MAX_TOP_K:
        raise Refused(f"Choose between 1 and {MAX_TOP_K} candidates, not {top_k}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _printable(name: str | None) -> str:
    """The first 60 characters of a name that are no control characters."""
    return "".join(c for c in name or "" if unicodedata.category(c)[0] != "C").strip()[:60]


def _truncate(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
