"""What the builders of downloaded releases share: finding the files, reading them strictly, locating mentions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from datasets.utils import tqdm

from hf_mel.errors import DataFormatError, DuplicateIdError, UnknownEntityError
from hf_mel.schema import NIL, NO_SPAN

#: Files a layout needs, by name; a tuple means any one of its names.
Layout = Sequence["str | tuple[str, ...]"]


class Release:
    """The raw files of one release on disk, and what was found wrong while reading them.

    A builder that reads files keeps one of these as its `release` attribute; the build pipeline copies `layout`,
    `sha256` and `problems` into the report.

    Args:
        root (`str` or `os.PathLike`): The folder of the raw files.
        layouts (mapping of `str` to [`Layout`]): The layouts the builder reads; the first whose files are all there
            is taken.

    Attributes:
        root (`Path`): The folder.
        layout (`str`): The name of the layout found.
        sha256 (`dict[str, str]`): Digest of every raw file read so far, by file name.
        problems (`dict[str, list[tuple[str, str, str]]]`): By kind: (file, row, detail) of everything that was left
            out, is missing, or could not be used.

    Raises:
        DataFormatError: The folder does not exist, or holds none of the layouts; the message lists every file.
    """

    def __init__(self, root: str | os.PathLike[str] | None, layouts: Mapping[str, Layout]):
        if root is None:
            raise DataFormatError("no folder of raw files given.", remedy="Pass it as data_dir (--raw-dir).")
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataFormatError("is not a folder.", file=self.root, remedy="Give the folder of the raw release.")
        self.sha256: dict[str, str] = {}
        self.problems: dict[str, list[tuple[str, str, str]]] = {}
        for name, files in layouts.items():
            if all(self._present(file) for file in files):
                self.layout = name
                return
        looked_for = "".join(
            f"\n  {name}: "
            + ", ".join(
                f"{' or '.join(file) if isinstance(file, tuple) else file} "
                f"({'found' if self._present(file) else 'missing'})"
                for file in files
            )
            for name, files in layouts.items()
        )
        raise DataFormatError(
            f"holds none of the layouts of this release. Looked for:{looked_for}\n",
            file=self.root,
            remedy="Put all files of one layout into this folder.",
        )

    def _present(self, file: str | tuple[str, ...]) -> bool:
        return any((self.root / name).is_file() for name in ([file] if isinstance(file, str) else file))

    def problem(self, kind: str, file: str, row: str | int, detail: str = "") -> None:
        """Notes that `row` of `file` was left out, is incomplete, or could not be used."""
        self.problems.setdefault(kind, []).append((file, str(row), detail))

    def read_json(self, name: str, expected: type, first_line: bool = False) -> Any:
        """The JSON value in the file `name`.

        Args:
            name (`str`): File name in the release folder.
            expected (`type`): `dict` or `list`.
            first_line (`bool`): Parse the first line only, as the format of some files demands.

        Raises:
            DataFormatError: The file is not UTF-8, not JSON, or not of the expected type.
            DuplicateIdError: The same key stands twice in one object.
        """
        path = self.root / name
        data = path.read_bytes()
        self.sha256[name] = hashlib.sha256(data).hexdigest()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataFormatError(
                f"is not UTF-8 text ({error}).", file=path, remedy="Download the file again."
            ) from error
        if first_line:
            text = text.split("\n", 1)[0]
        try:
            value = json.loads(text, object_pairs_hook=_no_duplicate_keys)
        except _DuplicateKey as error:
            raise DuplicateIdError(f"the key {error.args[0]!r} stands twice.", file=path, row=error.args[0]) from None
        except (ValueError, RecursionError) as error:
            raise DataFormatError(
                f"is not JSON ({error}).", file=path, remedy="Download the file again; it may be cut off."
            ) from error
        if not isinstance(value, expected):
            raise DataFormatError(f"holds a {type(value).__name__}, expected a {expected.__name__}.", file=path)
        return value

    def texts(self, name: str) -> dict[str, str]:
        """A file that maps ids to texts, such as names or attributes by QID."""
        mapping = self.read_json(name, dict)
        for key, value in mapping.items():
            if not isinstance(value, str):
                raise DataFormatError(f"holds {value!r}, expected a text.", file=self.root / name, row=key)
        return mapping

    def first(self, *names: str) -> str | None:
        """The first of `names` that is a file of the release; `None` if none is."""
        return next((name for name in names if self._present(name)), None)

    def lines(self, name: str) -> Iterator[tuple[int, str]]:
        """Row (from 1) and text of each line of the file `name`, read one at a time.

        A byte-order mark and line ends are taken off. A line that is not UTF-8 is left out and, in the first reading,
        listed. The digest is noted when the last line has been read.
        """
        path, digest, again = self.root / name, hashlib.sha256(), name in self.sha256
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
                    if not again:
                        self.problem("line_not_utf8", name, row)
                    continue
                yield row, text.rstrip("\r\n")
        self.sha256[name] = digest.hexdigest()

    def record(self, name: str, row: str | int, value: Any, keys: Mapping[str, type]) -> dict[str, Any]:
        """`value` after checking that it is an object whose `keys` are there and of their type."""
        path = self.root / name
        if not isinstance(value, dict):
            raise DataFormatError(f"is a {type(value).__name__}, expected an object.", file=path, row=row)
        for key, kind in keys.items():
            if key not in value:
                raise DataFormatError(f"has no key {key!r}; it has {', '.join(value)}.", file=path, row=row)
            if not isinstance(value[key], kind):
                raise DataFormatError(
                    f"{key!r} is a {type(value[key]).__name__}, expected {kind.__name__}.", file=path, row=row
                )
        return value

    def folder(self, given: str | os.PathLike[str] | None, *defaults: str) -> Path | None:
        """The folder the user gave, else the first of `defaults` that exists in the release; `None` if none does.

        Raises:
            DataFormatError: The folder the user gave does not exist. Going on would leave every image blank.
        """
        if given is not None:
            if not Path(given).is_dir():
                raise DataFormatError("is not a folder.", file=given, remedy="Give the folder that holds the images.")
            return Path(given)
        return next((self.root / name for name in defaults if (self.root / name).is_dir()), None)


class _DuplicateKey(ValueError):
    pass


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return record


def read_image(folder: Path | None, *names: str) -> dict[str, Any] | None:
    """The bytes of the first of `names` in `folder`, exactly as released; `None` if there is no such file.

    The file name is left out on purpose: in some releases it is the id of the gold entity.
    """
    if folder is not None:
        for name in names:
            path = folder / os.path.basename(name)
            if os.path.isfile(path):  # unlike Path.is_file, no error for a name that no file can have
                return {"bytes": path.read_bytes(), "path": None}
    return None


def locate(text: str, mentions: Sequence[str]) -> list[tuple[int, int]]:
    """Character offsets (end exclusive) of each mention in `text`, by literal search.

    Each mention takes its first occurrence clear of the earlier mentions' spans; failing that, its first occurrence
    that no earlier mention has as its own span (a surname inside a full name). Otherwise it is not located.

    Returns:
        One (start, end) per mention; ([`NO_SPAN`], [`NO_SPAN`]) where it is not located.
    """
    taken: list[tuple[int, int]] = []
    for mention in mentions:
        spans = list(_occurrences(text, mention))
        clear = (s for s in spans if all(s[1] <= t[0] or t[1] <= s[0] for t in taken))
        own = (s for s in spans if s not in taken)
        taken.append(next(clear, None) or next(own, (NO_SPAN, NO_SPAN)))
    return taken


def _occurrences(text: str, mention: str) -> Iterator[tuple[int, int]]:
    start = text.find(mention) if mention else -1
    while start >= 0:
        yield start, start + len(mention)
        start = text.find(mention, start + 1)


def nearest(text: str, mention: str, start: int) -> tuple[int, int]:
    """Offsets (end exclusive) of the occurrence of `mention` in `text` that begins nearest to `start`.

    Returns:
        (start, end); ([`NO_SPAN`], [`NO_SPAN`]) if there is none. Of two as near, the earlier.
    """
    return min(_occurrences(text, mention), key=lambda span: abs(span[0] - start), default=(NO_SPAN, NO_SPAN))


def cleaned_layout(prefix: str) -> Layout:
    """The files of the layout that MIMIC's authors distribute, whose mention files start with `prefix`."""
    return [*(f"{prefix}_{split}.json" for split in ("train", "dev", "test")), "qid2id.json", "kb_entity.json"]


def cleaned_qids(release: Release) -> tuple[dict[str, int], dict[int, str]]:
    """QID → row of the KB, and row → QID, from `qid2id.json` (its first line; the rest is not part of the format).

    Two QIDs may name one row; the first stands for it. The key "nil" is left out.
    """
    rows: dict[str, int] = {}
    qids: dict[int, str] = {}
    for qid, row in release.read_json("qid2id.json", dict, first_line=True).items():
        if qid.lower() == "nil":
            continue
        if not isinstance(row, int):
            raise DataFormatError(f"holds {row!r}, expected a number.", file=release.root / "qid2id.json", row=qid)
        rows[qid] = row
        qids.setdefault(row, qid)
    return rows, qids


def cleaned_mentions(
    release: Release, prefix: str, split: str, images: str | os.PathLike[str] | None
) -> Iterator[dict[str, Any]]:
    """Mention rows of one split of MIMIC's cleaned layout, in file order.

    The rows carry no ids of their own that the format promises: `mention_id` is "<split>-<row, from 0>"; rows with
    the same sentence and image form one context, named after its first row. Mentions are percent-decoded.
    """
    name = f"{prefix}_{split}.json"
    folder = release.folder(images, "mention_image", "mention_images")
    rows, qids = cleaned_qids(release)
    keys = {"sentence": str, "mentions": str, "imgPath": str, "answer": str}
    samples = [release.record(name, k, value, keys) for k, value in enumerate(release.read_json(name, list))]
    contexts: dict[tuple[str, str], list[int]] = {}
    for k, sample in enumerate(samples):
        contexts.setdefault((sample["sentence"], sample["imgPath"]), []).append(k)
    for members in contexts.values():
        spans = locate(samples[members[0]]["sentence"], [unquote(samples[k]["mentions"]) for k in members])
        for k, span in zip(members, spans, strict=True):
            samples[k].update(span=span, context=members[0])
    missing: set[str] = set()
    for k, sample in enumerate(samples):
        image = None
        if file := os.path.basename(sample["imgPath"]):
            # The authors' own loader cuts the name at its first dot, so that is how the files may be stored.
            image = read_image(folder, file, file.split(".")[0] + ".jpg")
            if image is None and file not in missing:
                missing.add(file)
                release.problem("missing_mention_image", name, k, file)
        gold = sample["answer"]
        if gold.lower() == "nil":
            gold = NIL
        elif gold in rows:
            gold = qids[rows[gold]]
        yield {
            "mention_id": f"{split}-{k}",
            "context_id": f"{split}-{sample['context']}",
            "text": sample["sentence"],
            "mention": unquote(sample["mentions"]),
            "start": sample["span"][0],
            "end": sample["span"][1],
            "mention_type": "",
            "topic": "",
            "image": image,
            "entity_id": gold,
            "candidates": [],
        }


def cleaned_entities(release: Release, images: str | os.PathLike[str] | None) -> Iterator[dict[str, Any]]:
    """Entity rows of MIMIC's cleaned layout, in KB order; names are percent-decoded.

    Raises:
        DataFormatError: The ids are not 0, 1, 2, … in file order.
        UnknownEntityError: `qid2id.json` points at a row the KB does not have.
    """
    name = "kb_entity.json"
    folder = release.folder(images, "kb_image", "kb_images")
    rows, qids = cleaned_qids(release)
    records = release.read_json(name, list)
    for qid, row in rows.items():
        if not 0 <= row < len(records):
            raise UnknownEntityError(
                f"points at row {row}, but {name} has {len(records)} rows.", file=release.root / "qid2id.json", row=qid
            )
    keys = {"id": int, "entity_name": str, "attr": str, "image_list": list}
    for k, value in enumerate(records):
        record = release.record(name, k, value, keys)
        if record["id"] != k:
            raise DataFormatError(f"has id {record['id']}, expected {k}.", file=release.root / name, row=k)
        if k not in qids:
            release.problem("entity_without_qid", name, k, f"entity_id is kb-{k}")
        pictures = []
        for file in record["image_list"]:
            image = read_image(folder, str(file))
            if image is None:
                release.problem("missing_entity_image", name, k, str(file))
            else:
                pictures.append(image)
        yield {
            "entity_id": qids.get(k, f"kb-{k}"),
            "name": unquote(record["entity_name"]),
            "description": "",
            "attributes": record["attr"],
            "aliases": [],
            "images": pictures,
        }


def mapped_entities(
    release: Release, names: str, attributes: str, images: str | os.PathLike[str] | None
) -> Iterator[dict[str, Any]]:
    """Entity rows from a file of names and a file of attributes by QID, with `<QID>.jpg` or `.png` as image."""
    folder = release.folder(images, "entity_images")
    texts = release.texts(attributes)
    qids = release.texts(names)
    for qid in texts:
        if qid not in qids:
            release.problem("attributes_without_entity", attributes, qid)
    for qid, name in qids.items():
        if not texts.get(qid):
            release.problem("entity_without_attributes", attributes, qid)
        image = read_image(folder, f"{qid}.jpg", f"{qid}.png")
        if folder is not None and image is None:
            release.problem("missing_entity_image", names, qid, f"{qid}.jpg")
        yield {
            "entity_id": qid,
            "name": name,
            "description": "",
            "attributes": texts.get(qid, ""),
            "aliases": [],
            "images": [image] if image else [],
        }
