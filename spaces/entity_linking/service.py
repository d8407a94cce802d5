"""What the app does, without its looks: models and knowledge bases, linking, uploads, and the limits on each.

Whatever a visitor can get wrong ends in a [`Refused`] with words they can act on.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from hf_mel import (
    EntityLinker,
    KnowledgeBase,
    KnowledgeBaseError,
    MelError,
    check_entity_file,
    load_reranker,
    load_retriever,
    open_image,
)

_log = logging.getLogger(__name__)

#: What one request may bring. A CPU Space has two cores and many visitors.
MAX_TEXT = 2_000
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
#: Own knowledge bases of one visitor kept at a time.
MAX_OWN_KBS = 3
#: Rows of a batch between two movements of the progress bar.
_BATCH_STEP = 16

#: File types of own images. SVG is left out on purpose: it is a program, not a picture.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
TABLE_SUFFIXES = {".csv", ".jsonl"}


class Refused(Exception):
    """A request that cannot be done; its text is for the visitor."""


@dataclass
class Session:
    """What one visitor brought: a folder of their own that is deleted with the session, and the knowledge bases in it."""

    kbs: dict[str, Path] = field(default_factory=dict)
    linkers: dict[tuple[str, Path], EntityLinker] = field(default_factory=dict)
    _folder: tempfile.TemporaryDirectory | None = None

    @property
    def folder(self) -> Path:
        """Made when first asked for; gone with the session, however that ends."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="mel-space-", ignore_cleanup_errors=True)
        return Path(self._folder.name)

    def __deepcopy__(self, memo) -> Session:
        return Session()  # Gradio copies the initial state for every visitor: each gets a folder of their own

    def close(self) -> None:
        """Deletes everything the visitor brought."""
        self.kbs.clear()
        self.linkers.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class Service:
    """The models and knowledge bases of one app; safe to call from many threads.

    Args:
        models (`dict`): Name shown → run folder or Hub id, or `{"model": …, "reranker": …}` of such.
        kbs (`dict[str, str]`): Name shown → folder or Hub id. One that another model built is offered only with the
            models it fits.
    """

    def __init__(self, models: dict[str, str | dict[str, str]], kbs: dict[str, str]):
        if not models or not kbs:
            raise Refused("The app needs a model and a knowledge base to start with.")
        self.models, self.kbs = models, kbs
        self._loaded: dict[str, tuple[Any, Any]] = {}
        self._kbs: dict[str, KnowledgeBase] = {}
        self._linkers: dict[tuple[str, str], EntityLinker] = {}
        self._lock = threading.RLock()

    def linker(self, model: str, kb: str, session: Session | None = None) -> EntityLinker:
        """The linker for a model and a knowledge base; both are loaded once, and models are shared.

        Raises:
            Refused: A name nobody offers, or a pair that does not belong together.
        """
        if model not in self.models:
            raise Refused(f"There is no model “{_short(model)}”. Choose one of: {', '.join(self.models)}.")
        own = {} if session is None else session.kbs
        with self._lock:
            try:
                if kb in self.kbs:
                    if (model, kb) not in self._linkers:
                        if kb not in self._kbs:
                            self._kbs[kb] = KnowledgeBase.from_pretrained(self.kbs[kb])
                        self._linkers[model, kb] = self._new_linker(model, self._kbs[kb])
                    return self._linkers[model, kb]
                if session is not None and kb in own:
                    key = (model, own[kb])
                    if key not in session.linkers:
                        session.linkers[key] = self._new_linker(model, KnowledgeBase(own[kb]))
                    return session.linkers[key]
            except KnowledgeBaseError as error:
                raise Refused(
                    f"“{model}” cannot use “{kb}”: a knowledge base goes with the model that built it. Choose another."
                ) from error
            except MelError as error:
                raise Refused(f"“{model}” cannot use “{kb}”: {error.message} {error.remedy or ''}".strip()) from error
        if not kb:
            raise Refused(
                f"“{model}” built none of the knowledge bases here. Choose another model, or build your own."
            )
        raise Refused(
            f"There is no knowledge base “{_short(str(kb))}” (one of your own is deleted after an hour: build it again). "
            f"Choose one of: {', '.join([*self.kbs, *own])}."
        )

    def _new_linker(self, model: str, kb: KnowledgeBase) -> EntityLinker:
        place = self.models[model]
        parts = {"model": place} if isinstance(place, str) else place
        reranks = {}
        if "reranker" in parts:
            reranker, processor = self._load(load_reranker, parts["reranker"])
            reranks = {"reranker": reranker, "reranker_processor": processor}
        return EntityLinker(*self._load(load_retriever, parts["model"]), kb, **reranks)

    def _load(self, load: Callable[[str], tuple[Any, Any]], place: str) -> tuple[Any, Any]:
        """A model and its processor, loaded once, however many names offer it."""
        if place not in self._loaded:
            self._loaded[place] = load(place)
        return self._loaded[place]

    def fitting_kbs(self, model: str, session: Session | None = None) -> list[str]:
        """The knowledge bases that `model` built: only with those it can link."""
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
    ) -> tuple[list[Any], float]:
        """Links the mentions of one text together.

        Returns:
            One `LinkResult` per mention, and the seconds it took.

        Raises:
            Refused: Something is too long, missing, or not in the text.
        """
        check_text(text, mentions)
        if not _is_number(top_k) or not 1 <= top_k <= MAX_TOP_K:
            raise Refused(f"Between 1 and {MAX_TOP_K} candidates can be shown, not {top_k}.")
        if nil_threshold is not None and not _is_number(nil_threshold):
            raise Refused("The NIL threshold must be a number.")
        linker = self.linker(model, kb, session)
        if nil_threshold is not None:
            linker = copy.copy(linker)
            linker.nil_threshold = nil_threshold
        rows = []
        for mention in mentions:
            place = {"mention": mention} if isinstance(mention, str) else {"start": mention[0], "end": mention[1]}
            rows.append({"text": text, "image": image, "context_id": "visitor", **place})
        start = time.perf_counter()
        results = _asking(lambda: linker(rows, top_k=int(top_k), units=units))
        return results, time.perf_counter() - start

    def explain(self, text: str, image: Image.Image | None, result: Any, linker: EntityLinker) -> Any:
        """Where the model looked for the best candidate, or `None`: an answer is never lost for it."""
        mention = {"text": text, "mention": result.mention, "start": result.start, "end": result.end, "image": image}
        try:
            return _asking(lambda: linker.explain(mention, result.best.entity_id))
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

        Returns:
            The rows in their order, each with `entity_id`, `name`, `score`, `candidates`, or with `error`.

        Raises:
            Refused: The file cannot be read, or has too many rows.
        """
        # Only these two: a path that a file names as its image would be one of this machine.
        rows = [
            {"text": row["text"], "mention": row["mention"]}
            for row in _table(Path(path), ("text", "mention"), MAX_BATCH_ROWS)
        ]
        linker = self.linker(model, kb, session)
        if not _is_number(top_k) or not 1 <= top_k <= MAX_TOP_K:
            raise Refused(f"Between 1 and {MAX_TOP_K} candidates can be shown, not {top_k}.")

        def link(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [_row_of(result) for result in _asking(lambda: linker(some, top_k=int(top_k)))]

        linked: list[dict[str, Any]] = []
        for first in range(0, len(rows), _BATCH_STEP):
            step: list[dict[str, Any]] = rows[first : first + _BATCH_STEP]
            wrong = {k: words for k, row in enumerate(step) if (words := _wrong(row))}
            good = [row for k, row in enumerate(step) if k not in wrong]
            try:
                found = iter(link(good))
            except Refused:  # one bad row does not cost the others
                found = iter([_or_error(link, row) for row in good])
            linked += [{"error": wrong[k]} if k in wrong else next(found) for k in range(len(step))]
            progress(len(linked) / len(rows))
        return [
            {"text": row["text"], "mention": row["mention"], **answer}
            for row, answer in zip(rows, linked, strict=True)
        ]

    def build_kb(
        self,
        name: str,
        table: str | os.PathLike[str],
        archive: str | os.PathLike[str] | None,
        *,
        model: str,
        session: Session,
    ) -> tuple[str, int]:
        """Builds a visitor's own knowledge base from a table of entities and a zip of their images.

        Returns:
            The name it has in this session, and how many entities it holds.

        Raises:
            Refused: Rows that cannot be used, listed all at once, or something too large.
        """
        table = Path(table)
        if table.suffix.lower() not in TABLE_SUFFIXES:
            raise Refused("Entities come as a .csv or .jsonl file.")
        if table.stat().st_size > MAX_TABLE_BYTES:
            raise Refused(f"The table is larger than {MAX_TABLE_BYTES >> 20} MB.")
        if model not in self.models:
            raise Refused(f"There is no model “{_short(model)}”. Choose one of: {', '.join(self.models)}.")
        place = self.models[model]
        with self._lock:
            encoder = _asking(lambda: self._load(load_retriever, place if isinstance(place, str) else place["model"]))
        digest = hashlib.sha256(f"{model}\n{table.suffix}\n".encode())
        digest.update(table.read_bytes())
        if archive is not None:
            digest.update(Path(archive).read_bytes())
        key = digest.hexdigest()[:16]
        kb_folder = session.folder / key / "kb"
        label = f"{_plain(name) or 'My knowledge base'} (yours)"
        if not kb_folder.exists():
            source = session.folder / key / "source"
            source.mkdir(parents=True)
            try:
                self._build(table, archive, source, kb_folder, encoder)
            finally:
                shutil.rmtree(source, ignore_errors=True)
        while len(session.kbs) >= MAX_OWN_KBS and label not in session.kbs:
            oldest = next(iter(session.kbs))
            gone = session.kbs.pop(oldest)
            if gone not in session.kbs.values() and gone != kb_folder:
                session.linkers = {key: linker for key, linker in session.linkers.items() if key[1] != gone}
                shutil.rmtree(gone.parent, ignore_errors=True)
        session.kbs[label] = kb_folder
        return label, len(KnowledgeBase(kb_folder))

    @staticmethod
    def _build(table: Path, archive: Any, source: Path, kb_folder: Path, encoder: tuple[Any, Any]) -> None:
        entities = source / f"entities{table.suffix.lower()}"
        shutil.copyfile(table, entities)
        if archive is not None:
            unpack_images(Path(archive), source)
        count, problems = check_entity_file(entities, image_folder=source)
        if count > MAX_KB_ROWS:
            raise Refused(f"The table has {count:,} entities; this app takes {MAX_KB_ROWS:,}.")
        if problems:
            lines = [f"Row {problem.row}: {problem.message}".replace(f"{source}/", "") for problem in problems[:20]]
            more = f"\n… and {len(problems) - 20:,} more." if len(problems) > 20 else ""
            raise Refused(f"{len(problems):,} rows cannot be used:\n" + "\n".join(lines) + more)
        _asking(lambda: KnowledgeBase.build(str(entities), *encoder, output=str(kb_folder), progress=False))

    def download_kb(self, kb: str, session: Session) -> str:
        """A zip of a visitor's own knowledge base."""
        if kb not in session.kbs:
            raise Refused("Only a knowledge base of your own can be downloaded; build one first.")
        folder = session.kbs[kb]
        return shutil.make_archive(str(folder.parent / "knowledge_base"), "zip", folder)


def mentions_of(text: str, mentions: str | None, spans: str | None) -> list[str | tuple[int, int]]:
    """The mentions a visitor asks for: a selected one by its place in the text, a typed one by its words.

    Args:
        text: the caption.
        mentions: one a line.
        spans: JSON of the places selected so far, `[[start, end], …]`; those that the lines do not name are left out.
    """
    try:
        left = [(int(start), int(end)) for start, end in json.loads(spans or "[]")]
    except (ValueError, TypeError, OverflowError, RecursionError):
        left = []
    found: list[str | tuple[int, int]] = []
    for line in filter(None, map(str.strip, (mentions or "").split("\n"))):
        here = [(a, b) for a, b in left if 0 <= a < b and text[a:b].replace("\n", " ") == line]
        found.append(here[0] if here else line)
        if here:
            left.remove(here[0])
    return found


def check_text(text: str, mentions: Sequence[str | tuple[int, int]]) -> None:
    """Raises [`Refused`] unless text and mentions can be linked."""
    if not isinstance(text, str) or not text.strip():
        raise Refused("Paste a caption first: the sentence the mention stands in.")
    if len(text) > MAX_TEXT:
        raise Refused(f"The text has {len(text):,} characters; at most {MAX_TEXT:,} are read.")
    if not mentions:
        raise Refused("Say which words to link: select them in the caption, or type them under “Mention”.")
    if len(mentions) > MAX_MENTIONS:
        raise Refused(f"At most {MAX_MENTIONS} mentions can be linked at once, not {len(mentions)}.")
    for mention in mentions:
        if not isinstance(mention, (str, tuple)):
            raise Refused("A mention is words of the caption.")
        if isinstance(mention, str) and mention not in text:
            raise Refused(f"“{_short(mention)}” is not in the caption. Write it exactly as it stands there.")


def read_image(source: str | os.PathLike[str] | None) -> Image.Image | None:
    """An uploaded image as RGB, scaled down to what a model sees; `None` stays `None`."""
    if source is None:
        return None
    path = Path(source)
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise Refused(f"The image is larger than {MAX_IMAGE_BYTES >> 20} MB.")
    try:
        with Image.open(path) as opened:
            width, height = opened.size
    except Exception as error:
        raise Refused("This file is not an image that can be read. Use JPEG, PNG, WebP or GIF.") from error
    if width * height > MAX_IMAGE_PIXELS:
        raise Refused(f"The image has {width:,} × {height:,} pixels; scale it to at most 24 million.")
    image = _asking(lambda: open_image(path))
    image.thumbnail((1024, 1024))
    return image


def unpack_images(archive: Path, folder: Path) -> int:
    """Unpacks the images of a zip into `folder` and returns how many; nothing else is unpacked.

    Raises:
        Refused: Not a zip, too large, or a member whose name leads out of the folder.
    """
    if archive.stat().st_size > MAX_ARCHIVE_BYTES:
        raise Refused(f"The zip is larger than {MAX_ARCHIVE_BYTES >> 20} MB.")
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [member for member in packed.infolist() if not member.is_dir()]
            if len(members) > MAX_ARCHIVE_FILES:
                raise Refused(f"The zip holds {len(members):,} files; at most {MAX_ARCHIVE_FILES:,} are taken.")
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
                    raise Refused(f"The zip holds a file that leads out of it: “{_short(name)}”.")
                if target.suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                written += _copy_member(packed, member, target, MAX_UNPACKED_BYTES - written)
            return len(members)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise Refused(f"The zip cannot be unpacked ({error}). Make it anew, without a password.") from error


def _copy_member(packed: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, room: int) -> int:
    """Unpacks one file, trusting no size that the archive states."""
    size = 0
    with packed.open(member) as source, target.open("wb") as out:
        while block := source.read(1 << 16):
            size += len(block)
            if size > room:
                raise Refused(f"The zip unpacks to more than {MAX_UNPACKED_BYTES >> 20} MB.")
            out.write(block)
    return size


def write_results(rows: Sequence[dict[str, Any]], folder: Path) -> tuple[str, str]:
    """The linked rows as a CSV and a JSON file; returns both paths."""
    json_path, csv_path = folder / "linked.json", folder / "linked.csv"
    json_path.write_text(json.dumps(list(rows), ensure_ascii=False, indent=2), encoding="utf-8")
    out = io.StringIO()
    columns = ["text", "mention", "entity_id", "name", "score", "error"]
    writer = csv.DictWriter(out, columns, extrasaction="ignore", restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})
    csv_path.write_text(out.getvalue(), encoding="utf-8-sig")
    return str(csv_path), str(json_path)


def _cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula is marked as text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t") else value


def _table(path: Path, columns: Sequence[str], limit: int) -> Iterator[dict[str, str]]:
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise Refused("Mentions come as a .csv or .jsonl file with the columns " + " and ".join(columns) + ".")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise Refused(f"The file is larger than {MAX_TABLE_BYTES >> 20} MB.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused("The file is not UTF-8 text. Save it as UTF-8.") from error
    if path.suffix.lower() == ".csv":
        try:
            records: list[Any] = list(csv.DictReader(io.StringIO(text), strict=True))
        except csv.Error as error:
            raise Refused(f"The file is not CSV ({error}).") from error
    else:
        records = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise Refused(f"Line {number} is not JSON ({error}).") from error
    if not records:
        raise Refused("The file holds no mentions.")
    if len(records) > limit:
        raise Refused(f"The file has {len(records):,} rows; at most {limit:,} are linked at once.")
    for number, record in enumerate(records, start=1):
        for column in columns:
            if not isinstance(record, dict) or not isinstance(record.get(column), str):
                raise Refused(f"Row {number} has no text in the column “{column}”.")
        yield record


def _asking(work: Callable[[], Any]) -> Any:
    """Runs `work`; an error of the library becomes words for the visitor, without paths of the server."""
    try:
        return work()
    except MelError as error:
        where = f"Row {error.row}: " if error.row is not None else ""
        raise Refused(f"{where}{error.message} {error.remedy or ''}".strip()) from error
    except Exception as error:  # whatever it is, its words are not for strangers, and the app goes on
        _log.exception("a request failed")
        raise Refused("This went wrong on our side, not on yours. Try once more, or another text or photo.") from error


def _wrong(row: dict[str, str]) -> str:
    try:
        check_text(row["text"], [row["mention"]])
    except Refused as error:
        return str(error)
    return ""


def _or_error(link: Callable[[list], list[dict[str, Any]]], row: dict[str, str]) -> dict[str, Any]:
    try:
        return link([row])[0]
    except Refused as error:
        return {"error": str(error)}


def _row_of(result: Any) -> dict[str, Any]:
    return {
        "entity_id": result.entity_id,
        "name": "" if result.is_nil else result.best.name,
        "score": result.best.score,
        "candidates": [{"entity_id": c.entity_id, "name": c.name, "score": c.score} for c in result.candidates],
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(name: str | None) -> str:
    """A name without control characters, at most 60 of them."""
    return "".join(c for c in name or "" if unicodedata.category(c)[0] != "C").strip()[:60]


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"
