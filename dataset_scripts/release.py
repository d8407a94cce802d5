"""What the builders of downloaded releases share: finding the files, reading them strictly, locating mentions."""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from datasets.utils import tqdm

from hf_mel.errors import DataFormatError, DuplicateIdError, UnknownEntityError
from hf_mel.schema import NIL, NO_SPAN

#: Files a layout needs, by name; a tuple means any one of its names.
Layout = Sequence["str | tuple[str, ...]"]


#: What releases write for "no entity of the knowledge base", in any case; null too.
NIL_SPELLINGS = frozenset({"", "nil", "none", "null", "[nil]", "<nil>", "__nil__", "--nil--", "--nme--"})
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")


class Findings:
    """What reading raw files found: a builder's `release` attribute; the build pipeline copies it into the report.

    Attributes:
        layout (`str` or `None`): The name of the layout found.
        sha256 (`dict[str, str]`): Digest of every raw file read so far, by file name.
        problems (`dict[str, list[tuple[str, str, str]]]`): By kind: (file, row, detail) of everything that was left
            out, is missing, or could not be used.
    """

    layout: str | None = None

    def __init__(self) -> None:
        self.sha256: dict[str, str] = {}
        self.problems: dict[str, list[tuple[str, str, str]]] = {}

    def problem(self, kind: str, file: str, row: str | int, detail: str = "") -> None:
        """Notes that `row` of `file` was left out, is incomplete, or could not be used."""
        self.problems.setdefault(kind, []).append((file, str(row), detail))


class Release(Findings):
    """The raw files of one release on disk, and what was found wrong while reading them.

    Args:
        root (`str` or `os.PathLike`): The folder of the raw files.
        layouts (mapping of `str` to [`Layout`]): The layouts the builder reads; the first whose files are all there
            is taken.

    Attributes:
        root (`Path`): The folder.

    Raises:
        DataFormatError: The folder does not exist, or holds none of the layouts; the message lists every file.
    """

    def __init__(self, root: str | os.PathLike[str] | None, layouts: Mapping[str, Layout]):
        super().__init__()
        if root is None:
            raise DataFormatError("no folder of raw files given.", remedy="Pass it as data_dir (--raw-dir).")
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataFormatError("is not a folder.", file=self.root, remedy="Give the folder of the raw release.")
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

    def read_json(self, name: str, expected: type, first_line: bool = False) -> Any:
        """The JSON value in the file `name`.

        Args:
            name (`str`): File name in the release folder.
            expected (`type`): `dict` or `list`.
            first_line (`bool`): Parse the first line only, as the format of some files demands.

        Raises:
            DataFormatError: The file cannot be read, is not UTF-8, not JSON (which has no NaN and no half of a surrogate
                pair), or not of the expected type.
            DuplicateIdError: The same key stands twice in one object.
        """
        path = self.root / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataFormatError(f"cannot be read ({error.strerror}).", file=path) from error
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
            value = json.loads(text, object_pairs_hook=_no_duplicate_keys, parse_constant=_no_constant)
        except _DuplicateKey as error:
            key = ascii(error.args[0])
            raise DuplicateIdError(f"the key {key} stands twice.", file=path, row=key[1:-1]) from None
        except (ValueError, RecursionError) as error:  # JSONDecodeError, NaN, a number of thousands of digits
            raise DataFormatError(
                f"is not JSON ({error}).", file=path, remedy="Download the file again; it may be cut off."
            ) from error
        if not isinstance(value, expected):
            raise DataFormatError(f"holds a {type(value).__name__}, expected a {expected.__name__}.", file=path)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            rows: Any = value
            where: str | int
            for where, item in rows.items() if expected is dict else enumerate(rows):
                try:
                    json.dumps({str(where): item}, ensure_ascii=False).encode()
                except UnicodeEncodeError as error:
                    raise DataFormatError(
                        f"holds half of a surrogate pair ({error.reason}).",
                        file=path,
                        row=ascii(where)[1:-1] if isinstance(where, str) else where,
                    ) from error
        return value

    def texts(self, name: str) -> dict[str, str]:
        """A file that maps ids to texts, such as names or attributes by QID."""
        mapping = self.read_json(name, dict)
        for key, value in mapping.items():
            if not isinstance(value, str):
                raise DataFormatError(f"holds {reprlib.repr(value)}, expected a text.", file=self.root / name, row=key)
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
            if not isinstance(value[key], kind) or (kind is int and isinstance(value[key], bool)):
                raise DataFormatError(
                    f"{key!r} is a {type(value[key]).__name__}, expected {kind.__name__}.", file=path, row=row
                )
        return value

    def identifier(self, name: str, row: str | int, value: Any) -> str:
        """An id as text, without surrounding spaces; releases have ids as texts and as whole numbers.

        Raises:
            DataFormatError: It is neither, or empty.
        """
        if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
            raise DataFormatError(
                f"has {reprlib.repr(value)} for an id, expected a text or a whole number.",
                file=self.root / name,
                row=row,
            )
        return str(value).strip()

    def gold(self, name: str, row: str | int, value: Any) -> str:
        """The id of a gold, or [`NIL`] for null and every one of [`NIL_SPELLINGS`]."""
        if value is None or (isinstance(value, str) and value.strip().casefold() in NIL_SPELLINGS):
            return NIL
        return self.identifier(name, row, value)

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


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_image(folder: Path | None, *names: str) -> dict[str, Any] | None:
    """The bytes of the first of `names` in `folder`, exactly as released; `None` if there is no such file.

    A name with folders in it (`"Q42/0.jpg"`, `"data/images/7.jpg"`) is looked for at that place below `folder`, then,
    by its last part, in `folder` itself. The name is left out of the result on purpose: in some releases it is the id
    of the gold entity.

    Raises:
        DataFormatError: The file is there and cannot be read.
    """
    if folder is not None:
        for name in names:
            places = [name] if ".." not in Path(name).parts and not Path(name).is_absolute() else []
            for place in [*places, os.path.basename(name)]:
                path = folder / place
                try:
                    if path.is_file():
                        return {"bytes": path.read_bytes(), "path": None}
                except (OSError, ValueError) as error:  # also a name no file can have: that image is missing
                    if isinstance(error, PermissionError):
                        raise DataFormatError(f"cannot be read ({error.strerror}).", file=path) from error
    return None


def images_by_id(folder: Path | None) -> dict[str, list[str]]:
    """The images in a folder named by entity ids, as paths below it, in order.

    An entity may have `<id>.jpg` (or another image suffix), `<id>_0.jpg`, `<id>_1.jpg`, … (also with "-"), and a
    folder `<id>/`: they are taken in this order, numbers by their value.
    """
    found: dict[str, list[tuple[int, list[Any], str]]] = {}
    if folder is not None:
        for entry in os.scandir(folder):
            if entry.is_dir():
                for name in os.listdir(entry.path):
                    if name.lower().endswith(_IMAGE_SUFFIXES):
                        found.setdefault(entry.name, []).append((2, _natural(name), f"{entry.name}/{name}"))
            elif entry.name.lower().endswith(_IMAGE_SUFFIXES):
                stem = os.path.splitext(entry.name)[0]
                numbered = re.fullmatch(r"(.+)[_-](\d+)", stem)
                where = (1, numbered[1]) if numbered else (0, stem)
                found.setdefault(where[1], []).append((where[0], _natural(entry.name), entry.name))
    return {key: [name for _, _, name in sorted(names)] for key, names in found.items()}


def _natural(name: str) -> list[Any]:
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]


def locate(text: str, mentions: Sequence[str], taken: Sequence[tuple[int, int]] = ()) -> list[tuple[int, int]]:
    """Character offsets (end exclusive) of each mention in `text`, by literal search.

    Each mention takes its first occurrence clear of the earlier mentions' spans; failing that, its first occurrence
    that no earlier mention has as its own span (a surname inside a full name). Otherwise it is not located. The spans
    `taken` count as those of earlier mentions.

    Returns:
        One (start, end) per mention; ([`NO_SPAN`], [`NO_SPAN`]) where it is not located.
    """
    found = list(taken)
    for mention in mentions:
        spans = list(_occurrences(text, mention))
        clear = (s for s in spans if all(s[1] <= t[0] or t[1] <= s[0] for t in found))
        own = (s for s in spans if s not in found)
        found.append(next(clear, None) or next(own, (NO_SPAN, NO_SPAN)))
    return found[len(taken) :]


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
    name = "qid2id.json"
    rows: dict[str, int] = {}
    qids: dict[int, str] = {}
    for key, value in release.read_json(name, dict, first_line=True).items():
        if release.gold(name, key, key) == NIL:
            continue
        qid = release.identifier(name, key, key)
        rows[qid] = _row_number(release, name, key, value)
        qids.setdefault(rows[qid], qid)
    return rows, qids


def _row_number(release: Release, name: str, row: str | int, value: Any) -> int:
    text = release.identifier(name, row, value)
    if not re.fullmatch("-?[0-9]{1,18}", text):
        raise DataFormatError(f"holds {text[:40]!r}, expected a number.", file=release.root / name, row=row)
    return int(text)


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
    keys = {"sentence": str, "mentions": str, "imgPath": str, "answer": object}
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
            image = read_image(folder, sample["imgPath"], file.split(".")[0] + ".jpg")
            if image is None and file not in missing:
                missing.add(file)
                release.problem("missing_mention_image", name, k, file)
        gold = release.gold(name, k, sample["answer"])
        if gold in rows:
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

    An entity has `attr`, which becomes its attributes, or, in the files of M3EL's and MMoE's authors, `desc`, which
    becomes its description.

    Raises:
        DataFormatError: The ids are not 0, 1, 2, … in file order, or an entity has neither `attr` nor `desc`.
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
    for k, value in enumerate(records):
        record = release.record(name, k, value, {"id": object, "entity_name": str, "image_list": list})
        number = _row_number(release, name, k, record["id"])
        if number != k:
            raise DataFormatError(f"has id {number}, expected {k}.", file=release.root / name, row=k)
        texts = [key for key in ("attr", "desc") if key in record] or ["attr"]
        record = release.record(
            name, k, {key: "" if v is None else v for key, v in record.items()}, dict.fromkeys(texts, str)
        )
        if k not in qids:
            release.problem("entity_without_qid", name, k, f"entity_id is kb-{k}")
        pictures = []
        for file in record["image_list"]:
            file = release.identifier(name, k, file)
            image = read_image(folder, file)
            if image is None:
                release.problem("missing_entity_image", name, k, file)
            else:
                pictures.append(image)
        yield {
            "entity_id": qids.get(k, f"kb-{k}"),
            "name": unquote(record["entity_name"]),
            "description": record.get("desc", ""),
            "attributes": record.get("attr", ""),
            "aliases": [],
            "images": pictures,
        }


def mapped_entities(
    release: Release, names: str, attributes: str, images: str | os.PathLike[str] | None
) -> Iterator[dict[str, Any]]:
    """Entity rows from a file of names and a file of attributes by QID, with the images of [`images_by_id`]."""
    folder = release.folder(images, "entity_images", "entity_imgs")
    pictures = images_by_id(folder)
    texts = release.texts(attributes)
    qids = release.texts(names)
    for qid in texts:
        if qid not in qids:
            release.problem("attributes_without_entity", attributes, qid)
    for qid, name in qids.items():
        if not texts.get(qid):
            release.problem("entity_without_attributes", attributes, qid)
        if folder is not None and qid not in pictures:
            release.problem("missing_entity_image", names, qid, f"{qid}.jpg")
        yield {
            "entity_id": entity_id(release, names, qid),
            "name": name,
            "description": "",
            "attributes": texts.get(qid, ""),
            "aliases": [],
            "images": [image for file in pictures.get(qid, []) if (image := read_image(folder, file))],
        }


def entity_id(release: Release, name: str, qid: str) -> str:
    """A key that names an entity.

    Raises:
        DataFormatError: It is empty, or a spelling of [`NIL`].
    """
    if release.gold(name, qid, qid) == NIL:
        raise DataFormatError(f"the id {qid!r} stands for no entity.", file=release.root / name, row=qid)
    return qid


_KGMEL_FOLDERS = ("data/dataset/", "dataset/", "")


def kgmel_layout(dataset: str) -> Layout:
    """The files of KGMEL's layout: `data/dataset/<dataset>.json` and `mapping/ids_split_mappings.json` beside it.

    The folder of raw files may be the repository, its `data/`, or `data/dataset/`.
    """
    files = (f"{dataset}.json", "mapping/ids_split_mappings.json", "mapping/qids_answer.json")
    return [tuple(folder + file for folder in _KGMEL_FOLDERS) for file in files]


def _kgmel_mapping(release: Release, file: str, dataset: str, expected: type) -> tuple[str, Any]:
    """The name of one of KGMEL's mapping files, and what it holds under the name of the data set."""
    name = release.first(*(f"{folder}mapping/{file}" for folder in _KGMEL_FOLDERS))
    if name is None:
        return file, expected()
    return name, release.record(name, dataset, release.read_json(name, dict), {dataset: expected})[dataset]


def _kgmel_samples(release: Release, dataset: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """File, sample id and sample; its three lists are equally long and hold texts."""
    name = release.first(*(f"{folder}{dataset}.json" for folder in _KGMEL_FOLDERS)) or ""
    keys = {"id": object, "sentence": str, "imgPath": str, "mention": list, "entity": list, "answer": list}
    for k, value in enumerate(release.read_json(name, list)):
        sample = release.record(name, k, value, keys)
        lists = [sample[key] for key in ("mention", "entity", "answer")]
        if len({len(values) for values in lists}) > 1:
            raise DataFormatError(
                f"has {', '.join(str(len(values)) for values in lists)} mentions, entities and answers, expected as many"
                " of each.",
                file=release.root / name,
                row=k,
            )
        if not all(isinstance(text, str) for text in [*lists[0], *lists[1]]):
            raise DataFormatError("has a mention or an entity that is no text.", file=release.root / name, row=k)
        yield name, release.identifier(name, k, sample["id"]), sample


def kgmel_mentions(
    release: Release, dataset: str, split: str, images: str | os.PathLike[str] | None
) -> Iterator[dict[str, Any]]:
    """Mention rows of one split ("train", "val", "test") of KGMEL's layout, in the order of its list of ids.

    A sample is a sentence with several mentions; its id is the context's. Images are `image/<dataset>/`, the name up to
    its first dot and `.jpg`; samples of `ids_blank_image.json` have a blank picture there, which is left out.
    """
    mapping, splits = _kgmel_mapping(release, "ids_split_mappings.json", dataset, dict)
    splits = release.record(mapping, dataset, splits, {split: list})
    where: dict[str, str] = {}
    for part, ids in splits.items():
        for value in ids if isinstance(ids, list) else []:
            sample_id = release.identifier(mapping, part, value)
            if sample_id in where:
                raise DuplicateIdError(
                    f"is in {part} and in {where[sample_id]}.", file=release.root / mapping, row=sample_id
                )
            where[sample_id] = part
    blanks, ids = _kgmel_mapping(release, "ids_blank_image.json", dataset, list)
    blank = {release.identifier(blanks, dataset, value) for value in ids}
    folder = release.folder(
        images,
        *(f"{base}{name}" for base in _KGMEL_FOLDERS for name in (f"image/{dataset}", "image", "mention_image")),
    )
    samples: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, sample_id, sample in _kgmel_samples(release, dataset):
        if sample_id in samples:
            raise DuplicateIdError(f"the id {sample_id!r} occurs twice.", file=release.root / name, row=sample_id)
        samples[sample_id] = name, sample
    for sample_id in (key for key, part in where.items() if part == split):
        if sample_id not in samples:
            release.problem("split_id_without_sentence", mapping, sample_id, split)
            continue
        name, sample = samples[sample_id]
        image = None
        if sample["imgPath"] and sample_id not in blank:
            file = os.path.basename(sample["imgPath"])
            image = read_image(folder, file.split(".")[0] + ".jpg", file)
            if image is None:
                release.problem("missing_mention_image", name, sample_id, file)
        surfaces = [unquote(surface) for surface in sample["mention"]]
        spans = locate(sample["sentence"], surfaces)
        for k, (surface, gold, (start, end)) in enumerate(zip(surfaces, sample["answer"], spans, strict=True)):
            yield {
                "mention_id": sample_id if len(surfaces) == 1 else f"{sample_id}-{k}",
                "context_id": sample_id,
                "text": sample["sentence"],
                "mention": surface,
                "start": start,
                "end": end,
                "mention_type": "",
                "topic": "",
                "image": image,
                "entity_id": release.gold(name, sample_id, gold),
                "candidates": [],
            }


def kgmel_entities(release: Release, dataset: str, images: str | os.PathLike[str] | None) -> Iterator[dict[str, Any]]:
    """Entity rows of KGMEL's layout.

    The knowledge base is the list of `mapping/qids_candidate.json`, or, where that was not published, the golds
    (`mapping/qids_answer.json`). Names and descriptions are those of `KB/QID2Label.tsv` or `qid2ne.json` if it lies
    there, else the title the mentions have for their gold; attributes those of `qid2abs.json`. Images are `KB/image/`.
    """
    mapping, qids = _kgmel_mapping(release, "qids_candidate.json", dataset, list)
    if not qids:
        mapping, qids = _kgmel_mapping(release, "qids_answer.json", dataset, list)
        release.problem("knowledge_base_of_golds_only", mapping, dataset, f"{len(qids)} entities")
    # Null and nil stand in these lists where a mention has no entity.
    kept = {gold: None for value in qids if (gold := release.gold(mapping, dataset, value)) != NIL}
    names: dict[str, str] = {}
    descriptions: dict[str, str] = {}
    for name, sample_id, sample in _kgmel_samples(release, dataset):
        for title, value in zip(sample["entity"], sample["answer"], strict=True):
            names.setdefault(release.gold(name, sample_id, value), unquote(title))
    if file := release.first("qid2ne.json"):
        names.update(release.texts(file))
    if file := release.first("data/KB/QID2Label.tsv", "KB/QID2Label.tsv", "../KB/QID2Label.tsv", "QID2Label.tsv"):
        for _, line in release.lines(file):
            qid, label, description = [*line.split("\t"), "", ""][:3]
            if qid in kept and label:
                names[qid], descriptions[qid] = label, description
    file = release.first("qid2abs.json")
    attributes = release.texts(file) if file else {}
    folder = release.folder(images, "data/KB/image", "KB/image", "../KB/image", "kb_image")
    pictures = images_by_id(folder)
    for qid in kept:
        if not names.get(qid):
            release.problem("entity_without_name", mapping, qid)
        if folder is not None and qid not in pictures:
            release.problem("missing_entity_image", mapping, qid, f"{qid}.jpg")
        yield {
            "entity_id": qid,
            "name": names.get(qid, ""),
            "description": descriptions.get(qid, ""),
            "attributes": attributes.get(qid, ""),
            "aliases": [],
            "images": [image for file in pictures.get(qid, []) if (image := read_image(folder, file))],
        }
