"""WikiDiverse: captions of Wikinews images about many topics, linked to Wikipedia.

Read in five layouts, chosen by the files in the raw folder:

- `candidates`: the mentions with ten candidates each (`{train,valid,test}_w_10cands.json`), of version 2.
- `v2`, `v1`: the captions with their mentions (`{train,valid,test}.json`); version 2 if every file has as many captions
  as the release says, else taken for version 1, of which no counts are known.
- `mimic`: the cleaned files of MIMIC's authors (`wiki_diverse_{train,dev,test}.json`, `qid2id.json`, `kb_entity.json`,
  `mention_image/`, `kb_image/`), linked to Wikidata.
- `kgmel`: KGMEL's regrouping of these by sentence (`data/dataset/WikiDiverse.json` and `mapping/`).

Except in the last two, an entity is a page of Wikipedia and its id the page's title as [`entity_key`] spells it. Names,
descriptions and image links come from two tables of 7.4 and 9.1 million rows, which are read line by line.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import datasets
import numpy as np

from hf_mel.dataset_scripts.release import (
    Release,
    cleaned_entities,
    cleaned_layout,
    cleaned_mentions,
    kgmel_entities,
    kgmel_layout,
    kgmel_mentions,
    nearest,
    read_image,
)
from hf_mel.errors import DataFormatError
from hf_mel.schema import NIL, entity_features, mention_features

_PREFIX, _KGMEL = "wiki_diverse", "WikiDiverse"
#: Our name of each split → the release's; the later layouts have their own names for "valid".
_SPLITS = {"train": "train", "validation": "valid", "test": "test"}
_CANDIDATES = {
    split: tuple(f"{folder}{split}_w_10cands.json" for folder in ("wikidiverse_w_cands/", "candidates/", ""))
    for split in _SPLITS.values()
}
_PASSAGES = {split: (f"{split}.json", f"mentions/{split}.json") for split in _SPLITS.values()}
_LAYOUTS = {
    "candidates": list(_CANDIDATES.values()),
    "v2": list(_PASSAGES.values()),
    "mimic": cleaned_layout(_PREFIX),
    "kgmel": kgmel_layout(_KGMEL),
}
_DESCRIPTIONS = ("wikipedia_entity2desc_filtered.tsv", "entities/wikipedia_entity2desc_filtered.tsv")
_IMAGE_LINKS = ("wikipedia_entity2imgs.tsv", "entities/wikipedia_entity2imgs.tsv")
_V2_CAPTIONS = {"train": 6_312, "valid": 755, "test": 757}
_V2_MENTIONS: dict[str, int | None] = {"train": 13_205, "validation": 1_552, "test": 1_570}

_PAGE = re.compile(
    r"(?:([a-z][a-z-]{1,11})(?:\.m)?\.)?wikipedia\.org/+(?:wiki/+|w/index\.php\?title=)(.*)", re.I | re.S
)
_OTHER_SITE = re.compile(r"\W*\w{1,7}:/+\w")
_QUERY = re.compile(r"[?&][a-z_]+=.*", re.I | re.S)
_FORBIDDEN = re.compile(r"[\[\]{}|<>]")
_PLAIN = re.compile(r"[A-Za-z0-9_.~-]*")
_SUFFIXES = (".jpg", ".JPG", ".png", ".PNG", ".svg", ".SVG", ".jpeg", ".JPEG")
#: What the release's own script takes off an image's name to find its suffix.
_STEM = re.compile(rf"\S+(?={'|'.join(map(re.escape, _SUFFIXES))})")


def page_title(url: str) -> tuple[str, str]:
    """Language and title of a Wikipedia page, from its address (however damaged before the host) or its title.

    Query and fragment are cut off, percent-encoding is undone as often as it was done, and underscores are spaces.
    The title is empty if none is left. An address on another site is returned whole.
    """
    language, title = "en", url
    if "wikipedia" in url.lower():
        page = _PAGE.search(url) or _PAGE.search(unquote(url))
        if page:
            language, title = (page[1] or "en").lower(), _QUERY.sub("", page[2].partition("#")[0])
    elif _OTHER_SITE.match(url):
        return "en", url.strip()
    for _ in range(3):
        if "%" not in title:
            break
        try:
            title = unquote(title, errors="strict")
        except UnicodeDecodeError:
            break
    title = title.partition("#")[0]
    if not title.isascii():
        title = unicodedata.normalize("NFC", title)
    title = " ".join(_FORBIDDEN.sub("", title).replace("_", " ").split())
    return "en" if language == "www" else language, title[:1].upper() + title[1:]


def entity_key(url: str) -> str:
    """The entity id of a Wikipedia page: its title with spaces for underscores and hyphens, as the release compares.

    A page of another language than English is "<language>:<title>". Empty if the address names no page.
    """
    language, title = page_title(url)
    key = " ".join(title.replace("-", " ").split()) if "-" in title else title
    if not key:
        return ""
    return key if language == "en" and key != NIL else f"{language}:{key}"


def is_nil(url: str) -> bool:
    """Whether an annotation says that Wikipedia has no page: `nil` in any case, or nothing."""
    return url.strip(" \t\r\n[]").lower() in ("nil", "")


def image_names(url: str) -> Iterator[str]:
    """File names an image may be stored under: the MD5 of the last part of its address, with its suffix.

    The release hashes that part as it stands in the address; addresses copied from a browser may be decoded or encoded
    differently, so these forms are tried too. SVG files are stored as PNG.
    """
    part = url.strip().rpartition("/")[2]
    forms = [part] if _PLAIN.fullmatch(part) else dict.fromkeys((part, unquote(part), quote(unquote(part))))
    for form in forms:
        digest = hashlib.md5(form.encode(), usedforsecurity=False).hexdigest()
        for suffix in dict.fromkeys((_released_suffix(form), form[form.rfind(".") :] if "." in form else "")):
            yield digest + suffix.replace(".svg", ".png").replace(".SVG", ".png")


def _released_suffix(name: str) -> str:
    """What is left of a name once the release's script has taken off all before a known suffix."""
    if any(map(str.isspace, name)):
        return _STEM.sub("", name)
    return name[max(0, *(name.rfind(suffix, 1) for suffix in _SUFFIXES)) :]  # the same, and much faster


class _Annotation(NamedTuple):
    """One mention as the release has it."""

    row: str  #: the row in its file, and the position in the row where a row has several
    context: int  #: the first row with this caption and image
    start: Any
    end: Any
    text: str
    mention: str
    image_url: str
    topic: str
    mention_type: str
    url: str
    candidates: list[str]


@dataclass
class WikiDiverseConfig(datasets.BuilderConfig):
    """Where the raw files lie, and how large the knowledge base is to be.

    Args:
        data_dir (`str`): Folder of the raw files.
        images (`str`, *optional*): Folder of the mention images; by default looked for beside the raw files.
        entity_images (`str`, *optional*): Folder of the entity images; the same.
        entities (`str`): The entities of the knowledge base: `"candidates"` (all golds and candidates), `"all"` (every
            page of the table, and these), or a file of titles or addresses of pages, one a line.
    """

    images: str | None = None
    entity_images: str | None = None
    entities: str = "candidates"


class WikiDiverse(datasets.GeneratorBasedBuilder):
    """Builds the configurations `mentions` (train, validation, test) and `entities` (kb) of WikiDiverse."""

    NAME = "wikidiverse"
    TITLE = "WikiDiverse"
    TASK = "entities of all kinds in news captions → Wikipedia"
    LICENSE = "cc-by-sa-4.0"
    LANGUAGES = ("en",)
    HOMEPAGE = "https://github.com/wangxw5/wikiDiverse"
    DOWNLOAD = (
        "the annotated data or the data with 10 candidates, entity2desc (filtered), entity2imgs and the Wikinews images:"
        " links in the README of the homepage"
    )
    REDISTRIBUTION = ""
    CITATION = """\
@inproceedings{wang2022wikidiverse,
  title = {{WikiDiverse}: A Multimodal Entity Linking Dataset with Diversified Contextual Topics and Entity Types},
  author = {Wang, Xuwu and Tian, Junfeng and Gui, Min and Li, Zhixu and Wang, Rui and Yan, Ming and Chen, Lihan and
            Xiao, Yanghua},
  booktitle = {Proceedings of the 60th Annual Meeting of the Association for Computational Linguistics},
  year = {2022},
  pages = {4785--4797}
}"""
    NEEDS_RAW = True
    #: candidates, v2: the release's README. mimic: Table 3 of the MIMIC paper (KDD 2023). kgmel: its files, counted.
    OFFICIAL_COUNTS: dict[str, dict[str, Mapping[str, int | None]]] = {
        "candidates": {"mentions": _V2_MENTIONS, "entities": {"kb": None}},
        "v2": {"mentions": _V2_MENTIONS, "entities": {"kb": None}},
        "v1": {"mentions": dict.fromkeys(_SPLITS), "entities": {"kb": None}},
        "mimic": {
            "mentions": {"train": 11_351, "validation": 1_664, "test": 2_078},
            "entities": {"kb": 132_460},
        },
        "kgmel": {
            "mentions": {"train": 11_204, "validation": 1_663, "test": 2_044},
            "entities": {"kb": None},
        },
    }

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = WikiDiverseConfig
    BUILDER_CONFIGS = [
        WikiDiverseConfig(name="mentions", version=VERSION, description="Mentions with caption, image and gold."),
        WikiDiverseConfig(name="entities", version=VERSION, description="The knowledge base."),
    ]
    DEFAULT_CONFIG_NAME = "mentions"

    def _info(self) -> datasets.DatasetInfo:
        if self.config.name == "entities":
            features = entity_features()
        else:
            features = mention_features(entity_url=datasets.Value("string"))
        return datasets.DatasetInfo(features=features, homepage=self.HOMEPAGE, citation=self.CITATION)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        self.release = release = Release(self.config.data_dir, _LAYOUTS)
        if release.layout == "v2":
            self._tell_version()
        splits = ["kb"] if self.config.name == "entities" else list(_SPLITS)
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in splits]

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        release, layout, config = self.release, self.release.layout, self.config
        if split == "kb":
            if layout == "mimic":
                rows = cleaned_entities(release, config.entity_images)
            elif layout == "kgmel":
                rows = kgmel_entities(release, _KGMEL, config.entity_images)
            else:
                rows = self._entities()
            for row in rows:
                yield row["entity_id"], row
        else:
            if layout == "mimic":
                rows = cleaned_mentions(release, _PREFIX, "dev" if split == "validation" else split, config.images)
            elif layout == "kgmel":
                rows = kgmel_mentions(release, _KGMEL, "val" if split == "validation" else split, config.images)
            else:
                rows = self._mentions(_SPLITS[split])
            for row in rows:
                yield row["mention_id"], {"entity_url": "", **row}

    def _tell_version(self) -> None:
        release = self.release
        for split, expected in _V2_CAPTIONS.items():
            name = release.first(*_PASSAGES[split])
            captions = len(release.read_json(name, list))
            if captions != expected:
                release.layout = "v1"
                release.problem("not_version_2", name, "", f"{captions:,} captions, version 2 has {expected:,}")

    def _mentions(self, split: str) -> Iterator[dict[str, Any]]:
        release = self.release
        folder = release.folder(self.config.images, "wikinewsImgs", "mention_images", "images")
        missing: set[str] = set()
        name = self._file(split)
        for note in self._annotations(split):
            surface, text = note.mention.strip(), note.text
            gold = NIL if is_nil(note.url) else entity_key(note.url)
            if not surface or not gold:
                kind = "unusable_gold_url" if surface else "empty_mention"
                release.problem(kind, name, note.row, f"{note.mention!r}, {note.url!r}")
                continue
            if not note.url.strip():
                release.problem("gold_missing_taken_as_nil", name, note.row, surface)
            elif "wikipedia" not in note.url.lower() and _OTHER_SITE.match(note.url):
                release.problem("gold_not_on_wikipedia", name, note.row, note.url)
            start, end = note.start, note.end
            if not _is_span(text, start, end, surface):
                start, end = nearest(text, surface, start if isinstance(start, int) else 0)
                if start >= 0:
                    release.problem("span_repaired", name, note.row, f"{note.start}:{note.end} → {start}:{end}")
            image = read_image(folder, *image_names(note.image_url)) if note.image_url else None
            if image is None and note.image_url and note.image_url not in missing:
                missing.add(note.image_url)
                release.problem("missing_mention_image", name, note.row, note.image_url)
            yield {
                "mention_id": f"{split}-{note.row}",
                "context_id": f"{split}-{note.context}",
                "text": text,
                "mention": surface,
                "start": start,
                "end": end,
                "mention_type": note.mention_type,
                "topic": note.topic,
                "image": image,
                "entity_id": gold,
                "candidates": list(_pages(note.candidates)),
                "entity_url": note.url,
            }

    def _file(self, split: str) -> str:
        names = _CANDIDATES if self.release.layout == "candidates" else _PASSAGES
        return str(self.release.first(*names[split]))

    def _annotations(self, split: str) -> Iterator[_Annotation]:
        """The mentions of one file, in file order, checked for their types."""
        name = self._file(split)
        path = self.release.root / name
        contexts: dict[tuple[str, str], int] = {}
        for k, row in enumerate(self.release.read_json(name, list)):
            if self.release.layout == "candidates":
                text, image_url, mention, kind, _, _, url, candidates, topic, start, end = _checked(row, 11, path, k)
                context = contexts.setdefault((str(text), str(image_url)), k)
                found = [(str(k), mention, kind, start, end, url, candidates)]
            else:
                text, image_url, topic, entries = _checked(row, 4, path, k)
                if not isinstance(entries, list):
                    raise DataFormatError("has no list of mentions.", file=path, row=k)
                context = k
                found = [(f"{k}-{i}", *_checked(entry, 5, path, k), []) for i, entry in enumerate(entries)]
            for where, mention, *fields in found:
                kind, start, end, url, candidates = fields
                candidates = [] if candidates is None else candidates
                if not isinstance(candidates, list):
                    raise DataFormatError(f"holds {candidates!r}, expected a list of pages.", file=path, row=where)
                texts = [image_url, topic, kind, url, *candidates]
                texts = [text, mention, *("" if value is None else value for value in texts)]
                for value in texts:
                    if not isinstance(value, str):
                        raise DataFormatError(f"holds {value!r}, expected a text.", file=path, row=where)
                _, _, image, topic, kind, url, *pages = texts
                yield _Annotation(
                    where, context, _number(start), _number(end), text, mention, image, topic, kind, url, pages
                )

    def _wanted(self) -> tuple[dict[str, str], bool]:
        """Key → address of the entities that must be in the knowledge base, and whether there are others."""
        wanted: dict[str, str] = {}
        if self.config.entities not in ("candidates", "all"):
            path = Path(self.config.entities)
            if not path.is_file():
                raise DataFormatError(
                    "is not a file.",
                    file=path,
                    remedy='entities is "candidates", "all", or a file of pages, one a line.',
                )
            listed = Release(path.resolve().parent, {"": [path.name]})
            for row, line in listed.lines(path.name):
                if not is_nil(line) and (key := entity_key(line)):
                    wanted.setdefault(key, line)
                elif line.strip():
                    self.release.problem("unusable_page", path.name, row, line)
            self.release.sha256[path.name] = listed.sha256[path.name]
            for kind, entries in listed.problems.items():
                self.release.problems.setdefault(kind, []).extend(entries)
            return wanted, False
        for split in _SPLITS.values():
            for note in self._annotations(split):
                for key, url in _pages([note.url, *note.candidates]).items():
                    wanted.setdefault(key, url)
        return wanted, self.config.entities == "all"

    def _entities(self) -> Iterator[dict[str, Any]]:
        release = self.release
        missing, everything = self._wanted()
        table = release.first(*_DESCRIPTIONS)
        if table is None:
            if everything:
                raise DataFormatError(
                    f"holds no {_DESCRIPTIONS[0]}, which lists all entities.",
                    file=release.root,
                    remedy="Download it, or build the entities that are golds or candidates (entities=candidates).",
                )
            release.problem("missing_file", _DESCRIPTIONS[0], "", "descriptions are left empty")
        folder = release.folder(self.config.entity_images, "entity_images", "images")
        images = {} if folder is None else self._images(folder, None if everything else set(missing))
        if table is not None:
            for key, page, description in self._once(table, None if everything else set(missing)):
                missing.pop(key, None)
                yield _entity(key, page, description, folder, images)
        for key, url in missing.items():
            if table is not None:
                release.problem("entity_without_row", table, key, url)
            yield _entity(key, url, "", folder, images)

    def _once(self, table: str, wanted: set[str] | None) -> Iterator[tuple[str, str, str]]:
        """Key, page and text of the first row of each wanted key (`None`: of each key); later rows are listed."""
        if wanted is not None:
            seen: set[str] = set()
            for row, key, page, rest in self._rows(table):
                if key in wanted:
                    if key in seen:
                        self.release.problem("duplicate_entity", table, row, page)
                        continue
                    seen.add(key)
                    yield key, page, rest
            return
        # A set of millions of titles would take a gigabyte; 64 bits of their digests take eight bytes each.
        digests = array("Q", (_digest(key) for _, key, _, _ in self._rows(table)))
        first = np.zeros(len(digests), dtype=bool)
        first[np.unique(np.frombuffer(digests, dtype=np.uint64), return_index=True)[1]] = True
        for is_first, (row, key, page, rest) in zip(first, self._rows(table), strict=True):
            if is_first:
                yield key, page, rest
            else:
                self.release.problem("duplicate_entity", table, row, page)

    def _rows(self, table: str) -> Iterator[tuple[int, str, str, str]]:
        """Row, key, page and second field of each row of a table; rows without them are listed in the first reading."""
        again = table in self.release.sha256
        for row, line in self.release.lines(table):
            page, separator, rest = line.partition("@@@@")
            key = entity_key(page) if separator else ""
            if key:
                yield row, key, page, rest
            elif not again:
                self.release.problem("malformed_row", table, row, line[:80])

    def _images(self, folder: Path, wanted: set[str] | None) -> dict[str, list[str]]:
        """Key → image files that are in the folder, of the wanted entities or of all."""
        release = self.release
        table = release.first(*_IMAGE_LINKS)
        if table is None:
            release.problem("missing_file", _IMAGE_LINKS[0], "", "entities have no images")
            return {}
        there = {entry.name for entry in os.scandir(folder)}
        found: dict[str, list[str]] = {}
        absent = 0
        for row, key, _, links in self._rows(table):
            if wanted is not None and key not in wanted:
                continue
            for link in links.split("[AND]"):
                if not link.strip():
                    continue
                name = next((name for name in image_names(link) if name in there), None)
                if name is None:
                    absent += 1
                    if wanted is not None:
                        release.problem("missing_entity_image", table, row, link.strip())
                elif name not in (names := found.setdefault(key, [])):
                    names.append(name)
        if absent and wanted is None:  # millions: one line for all
            release.problem("missing_entity_image", table, "", f"{absent:,} linked images are not in the folder")
        return found


def _checked(row: Any, length: int, path: Path, k: int) -> list[Any]:
    if not isinstance(row, list) or len(row) != length:
        held = f"{len(row)} fields" if isinstance(row, list) else f"a {type(row).__name__}"
        raise DataFormatError(f"has {held}, expected a list of {length}.", file=path, row=k)
    return row


def _number(value: Any) -> Any:
    """An offset, whether released as a number or as its digits; anything else as it is."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}\s*", value) else value


def _is_span(text: str, start: Any, end: Any, mention: str) -> bool:
    return type(start) is int and type(end) is int and 0 <= start < end and text[start:end] == mention


def _entity(
    key: str, page: str, description: str, folder: Path | None, images: Mapping[str, list[str]]
) -> dict[str, Any]:
    pictures = [read_image(folder, name) for name in images.get(key, ())]
    return {
        "entity_id": key,
        "name": page_title(page)[1],
        "description": description.strip(),
        "attributes": "",
        "aliases": [],
        "images": [picture for picture in pictures if picture is not None],
    }


def _pages(urls: list[str]) -> dict[str, str]:
    """Key → first address, of the addresses that name a page."""
    pages: dict[str, str] = {}
    for url in urls:
        if not is_nil(url) and (key := entity_key(url)):
            pages.setdefault(key, url)
    return pages


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


BUILDER_CLASS = WikiDiverse
