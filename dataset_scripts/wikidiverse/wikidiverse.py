"""WikiDiverse: captions of Wikinews images about many topics, linked to Wikipedia.

The builder reads five layouts and recognises them by their files:

- `candidates`: the mentions with ten candidates each (`{train,valid,test}_w_10cands.json`), of version 2.
- `v2`, `v1`: the captions with their mentions (`{train,valid,test}.json`). The release is version 2 if every file has the
  number of captions that its README states; else it is taken for version 1, whose counts are unknown.
- `mimic`: the cleaned files of MIMIC's authors ([`~hf_mel.dataset_scripts.layouts.mimic`]), linked to Wikidata.
- `kgmel`: KGMEL's files ([`~hf_mel.dataset_scripts.layouts.kgmel`]), which group the mentions by sentence.

Except in the last two, an entity is a page of Wikipedia, and its id is the title of the page as [`entity_key`] spells it.
Names, descriptions and image links come from two tables of 7.4 and 9.1 million rows, which are read line by line.
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

from hf_mel.dataset_scripts.builder import ReleaseBuilder, ReleaseConfig, mention_row
from hf_mel.dataset_scripts.image_files import read_image, read_images
from hf_mel.dataset_scripts.layouts import kgmel, mimic
from hf_mel.dataset_scripts.release import Release, ReleaseLog
from hf_mel.dataset_scripts.spans import nearest
from hf_mel.errors import DataFormatError
from hf_mel.schema import NIL

#: Names of the data set in the other layouts.
_MIMIC, _KGMEL = "wiki_diverse", "WikiDiverse"
#: Split → its name in the release.
_SPLITS = {"train": "train", "validation": "valid", "test": "test"}
_CANDIDATE_FILES = {
    split: tuple(f"{folder}{split}_w_10cands.json" for folder in ("wikidiverse_w_cands/", "candidates/", ""))
    for split in _SPLITS.values()
}
_CAPTION_FILES = {split: (f"{split}.json", f"mentions/{split}.json") for split in _SPLITS.values()}
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
#: The part of an image name that the release's script removes to get its suffix.
_STEM = re.compile(rf"\S+(?={'|'.join(map(re.escape, _SUFFIXES))})")


def page_title(url: str) -> tuple[str, str]:
    """Returns language and title of a Wikipedia page, given its URL or title.

    URLs of the release may be damaged before the host. Query and fragment are cut off, percent-encoding is undone up to
    three times, and underscores become spaces. The title is empty if nothing is left. The URL of another site is
    returned whole.
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
    """Returns the entity id of a Wikipedia page: its title with spaces for underscores and hyphens.

    The release compares titles in this form. The id of a page in another language than English is `<language>:<title>`.
    It is empty if the URL names no page.
    """
    language, title = page_title(url)
    key = " ".join(title.replace("-", " ").split()) if "-" in title else title
    if not key:
        return ""
    return key if language == "en" and key != NIL else f"{language}:{key}"


def is_nil(url: str) -> bool:
    """Returns whether an annotation says that Wikipedia has no page: it is `nil` in any case, or blank."""
    return url.strip(" \t\r\n[]").lower() in ("nil", "")


def image_names(url: str) -> Iterator[str]:
    """Yields file names that an image may have: the MD5 of the last part of its URL, with its suffix.

    The release hashes that part unchanged. URLs copied from a browser may be decoded or encoded, so these forms are tried
    too. SVG files are stored as PNG.
    """
    part = url.strip().rpartition("/")[2]
    forms = [part] if _PLAIN.fullmatch(part) else dict.fromkeys((part, unquote(part), quote(unquote(part))))
    for form in forms:
        digest = hashlib.md5(form.encode(), usedforsecurity=False).hexdigest()
        for suffix in dict.fromkeys((_released_suffix(form), form[form.rfind(".") :] if "." in form else "")):
            yield digest + suffix.replace(".svg", ".png").replace(".SVG", ".png")


def _released_suffix(name: str) -> str:
    """Returns the suffix of a name as the release's script computes it, by removing [`_STEM`]."""
    if any(map(str.isspace, name)):
        return _STEM.sub("", name)
    return name[max(0, *(name.rfind(suffix, 1) for suffix in _SUFFIXES)) :]  # same result, much faster


class _Annotation(NamedTuple):
    """One mention of the release."""

    row: str  #: number of the row; `<row>-<position>` in files whose rows have several mentions
    context: int  #: number of the first row with the same caption and image
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
class WikiDiverseConfig(ReleaseConfig):
    """Folders of the release, and the size of the knowledge base.

    Args:
        entities (`str`): Entities of the knowledge base: `"candidates"` (all golds and candidates), `"all"` (also every
            page of the table), or a file of titles or URLs of pages, one a line.
    """

    entities: str = "candidates"


class WikiDiverse(ReleaseBuilder):
    """Builder of WikiDiverse."""

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

    LAYOUTS = {
        "candidates": list(_CANDIDATE_FILES.values()),
        "v2": list(_CAPTION_FILES.values()),
        "mimic": mimic.files(_MIMIC),
        "kgmel": kgmel.files(_KGMEL),
    }
    COLUMNS = {"mentions": {"entity_url": datasets.Value("string")}}
    BUILDER_CONFIG_CLASS = WikiDiverseConfig

    def open_release(self) -> ReleaseLog:
        """Distinguishes the layouts `v1` and `v2`, which have the same files."""
        release = Release(self.config.data_dir, self.LAYOUTS)
        if release.layout == "v2":
            for split, expected in _V2_CAPTIONS.items():
                name = release.find_file(*_CAPTION_FILES[split])
                captions = len(release.read_json(str(name), list))
                if captions != expected:
                    release.layout = "v1"
                    release.problem(
                        "not_version_2", str(name), "", f"{captions:,} captions, version 2 has {expected:,}"
                    )
        return release

    def mentions(self, split: str) -> Iterator[dict[str, Any]]:
        """Yields the mentions of a split."""
        if self.release.layout == "mimic":
            rows = mimic.mentions(self.release, _MIMIC, split, self.config.images)
        elif self.release.layout == "kgmel":
            rows = kgmel.mentions(self.release, _KGMEL, split, self.config.images)
        else:
            rows = self._caption_mentions(_SPLITS[split])
        for row in rows:
            yield {"entity_url": "", **row}

    def entities(self) -> Iterator[dict[str, Any]]:
        """Yields the knowledge base."""
        if self.release.layout == "mimic":
            return mimic.entities(self.release, self.config.entity_images)
        if self.release.layout == "kgmel":
            return kgmel.entities(self.release, _KGMEL, self.config.entity_images)
        return self._page_entities()

    def _caption_mentions(self, split: str) -> Iterator[dict[str, Any]]:
        release = self.release
        folder = release.find_folder(self.config.images, "wikinewsImgs", "mention_images", "images")
        missing: set[str] = set()
        name = self._file(split)
        for annotation in self._annotations(split):
            row, url, text = annotation.row, annotation.url, annotation.text
            surface, image_url = annotation.mention.strip(), annotation.image_url
            gold = NIL if is_nil(url) else entity_key(url)
            if not surface or not gold:
                kind = "unusable_gold_url" if surface else "empty_mention"
                release.problem(kind, name, row, f"{annotation.mention!r}, {url!r}")
                continue
            if not url.strip():
                release.problem("gold_missing_taken_as_nil", name, row, surface)
            elif "wikipedia" not in url.lower() and _OTHER_SITE.match(url):
                release.problem("gold_not_on_wikipedia", name, row, url)
            start, end = annotation.start, annotation.end
            if not _is_span(text, start, end, surface):
                start, end = nearest(text, surface, start if isinstance(start, int) else 0)
                if start >= 0:
                    release.problem("span_repaired", name, row, f"{annotation.start}:{annotation.end} → {start}:{end}")
            image = read_image(folder, *image_names(image_url)) if image_url else None
            if image is None and image_url and image_url not in missing:
                missing.add(image_url)
                release.problem("missing_mention_image", name, row, image_url)
            yield mention_row(
                mention_id=f"{split}-{row}",
                context_id=f"{split}-{annotation.context}",
                text=text,
                mention=surface,
                start=start,
                end=end,
                mention_type=annotation.mention_type,
                topic=annotation.topic,
                image=image,
                entity_id=gold,
                candidates=list(_urls_by_key(annotation.candidates)),
                entity_url=url,
            )

    def _file(self, split: str) -> str:
        names = _CANDIDATE_FILES if self.release.layout == "candidates" else _CAPTION_FILES
        return str(self.release.find_file(*names[split]))

    def _annotations(self, split: str) -> Iterator[_Annotation]:
        """Yields the mentions of one file, in file order, after checking the types of their fields."""
        name = self._file(split)
        path = self.release.root / name
        contexts: dict[tuple[str, str], int] = {}
        for k, row in enumerate(self.release.read_json(name, list)):
            if self.release.layout == "candidates":
                text, image_url, mention, kind, _, _, url, candidates, topic, start, end = _check_list(
                    row, 11, path, k
                )
                context = contexts.setdefault((str(text), str(image_url)), k)
                annotations = [(str(k), mention, kind, start, end, url, candidates)]
            else:
                text, image_url, topic, entries = _check_list(row, 4, path, k)
                if not isinstance(entries, list):
                    raise DataFormatError("The row has no list of mentions.", file=path, row=k)
                context = k
                annotations = [(f"{k}-{i}", *_check_list(entry, 5, path, k), []) for i, entry in enumerate(entries)]
            for annotation_row, mention, *fields in annotations:
                kind, start, end, url, candidates = fields
                candidates = [] if candidates is None else candidates
                if not isinstance(candidates, list):
                    raise DataFormatError(
                        f"The row holds {candidates!r}, expected a list of pages.", file=path, row=annotation_row
                    )
                texts = [image_url, topic, kind, url, *candidates]
                texts = [text, mention, *("" if value is None else value for value in texts)]
                for value in texts:
                    if not isinstance(value, str):
                        raise DataFormatError(
                            f"The row holds {value!r}, expected a string.", file=path, row=annotation_row
                        )
                _, _, image, topic, kind, url, *pages = texts
                start, end = _offset(start), _offset(end)
                yield _Annotation(annotation_row, context, start, end, text, mention, image, topic, kind, url, pages)

    def _required_entities(self) -> dict[str, str]:
        """Returns the URL of each entity that must be in the knowledge base, by key."""
        urls: dict[str, str] = {}
        if self.config.entities in ("candidates", "all"):
            for split in _SPLITS.values():
                for annotation in self._annotations(split):
                    for key, url in _urls_by_key([annotation.url, *annotation.candidates]).items():
                        urls.setdefault(key, url)
            return urls
        path = Path(self.config.entities)
        if not path.is_file():
            raise DataFormatError(
                "The option entities is not a file.",
                file=path,
                remedy='Give "candidates", "all", or a file of pages, one a line.',
            )
        folder = Release(path.resolve().parent, {"": [path.name]})
        for row, line in folder.read_lines(path.name):
            if not is_nil(line) and (key := entity_key(line)):
                urls.setdefault(key, line)
            elif line.strip():
                self.release.problem("unusable_page", path.name, row, line)
        self.release.merge(folder)
        return urls

    def _page_entities(self) -> Iterator[dict[str, Any]]:
        """Yields the entities of the layouts that link to Wikipedia: those with a row in the table, then the others."""
        release = self.release
        remaining, all_pages = self._required_entities(), self.config.entities == "all"
        table = release.find_file(*_DESCRIPTIONS)
        if table is None:
            if all_pages:
                raise DataFormatError(
                    f"The folder has no {_DESCRIPTIONS[0]}, which lists all entities.",
                    file=release.root,
                    remedy="Download it, or build the entities that are golds or candidates (entities=candidates).",
                )
            release.problem("missing_file", _DESCRIPTIONS[0], "", "descriptions are left empty")
        keys = None if all_pages else set(remaining)
        folder = release.find_folder(self.config.entity_images, "entity_images", "images")
        images = {} if folder is None else self._images(folder, keys)
        if table is not None:
            for key, page, description in self._first_rows(table, keys):
                remaining.pop(key, None)
                yield _entity(key, page, description, folder, images)
        for key, url in remaining.items():
            if table is not None:
                release.problem("entity_without_row", table, key, url)
            yield _entity(key, url, "", folder, images)

    def _first_rows(self, table: str, keys: set[str] | None) -> Iterator[tuple[str, str, str]]:
        """Yields key, page and text of the first row of each of `keys` (`None`: of every key), and logs later rows."""
        if keys is not None:
            seen: set[str] = set()
            for row, key, page, text in self._table_rows(table):
                if key in keys:
                    if key in seen:
                        self.release.problem("duplicate_entity", table, row, page)
                        continue
                    seen.add(key)
                    yield key, page, text
            return
        # A set of millions of titles would take a gigabyte. Digests of 64 bits take eight bytes each.
        digests = array("Q", (_digest(key) for _, key, _, _ in self._table_rows(table)))
        first = np.zeros(len(digests), dtype=bool)
        first[np.unique(np.frombuffer(digests, dtype=np.uint64), return_index=True)[1]] = True
        for is_first, (row, key, page, text) in zip(first, self._table_rows(table), strict=True):
            if is_first:
                yield key, page, text
            else:
                self.release.problem("duplicate_entity", table, row, page)

    def _table_rows(self, table: str) -> Iterator[tuple[int, str, str, str]]:
        """Yields row, key, page and second field of each row of a table.

        Malformed rows are left out and, the first time the table is read, logged.
        """
        read_before = table in self.release.sha256
        for row, line in self.release.read_lines(table):
            page, separator, text = line.partition("@@@@")
            key = entity_key(page) if separator else ""
            if key:
                yield row, key, page, text
            elif not read_before:
                self.release.problem("malformed_row", table, row, line[:80])

    def _images(self, folder: Path, keys: set[str] | None) -> dict[str, list[str]]:
        """Returns the image files in the folder by entity, of `keys` or (`None`) of every entity."""
        release = self.release
        table = release.find_file(*_IMAGE_LINKS)
        if table is None:
            release.problem("missing_file", _IMAGE_LINKS[0], "", "entities have no images")
            return {}
        files = {entry.name for entry in os.scandir(folder)}
        images: dict[str, list[str]] = {}
        num_missing = 0
        for row, key, _, links in self._table_rows(table):
            if keys is not None and key not in keys:
                continue
            for link in links.split("[AND]"):
                if not link.strip():
                    continue
                name = next((name for name in image_names(link) if name in files), None)
                if name is None:
                    num_missing += 1
                    if keys is not None:
                        release.problem("missing_entity_image", table, row, link.strip())
                elif name not in (names := images.setdefault(key, [])):
                    names.append(name)
        if num_missing and keys is None:  # up to millions: one entry for all
            release.problem("missing_entity_image", table, "", f"{num_missing:,} linked images are not in the folder")
        return images


def _check_list(row: Any, length: int, path: Path, k: int) -> list[Any]:
    if not isinstance(row, list) or len(row) != length:
        content = f"{len(row)} fields" if isinstance(row, list) else f"a {type(row).__name__}"
        raise DataFormatError(f"The row has {content}, expected a list of {length}.", file=path, row=k)
    return row


def _offset(value: Any) -> Any:
    """Converts an offset that the release has as a string of digits; returns any other value unchanged."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}\s*", value) else value


def _is_span(text: str, start: Any, end: Any, mention: str) -> bool:
    return type(start) is int and type(end) is int and 0 <= start < end and text[start:end] == mention


def _entity(
    key: str, page: str, description: str, folder: Path | None, images: Mapping[str, list[str]]
) -> dict[str, Any]:
    return {
        "entity_id": key,
        "name": page_title(page)[1],
        "description": description.strip(),
        "attributes": "",
        "aliases": [],
        "images": read_images(folder, images.get(key, ())),
    }


def _urls_by_key(urls: list[str]) -> dict[str, str]:
    """Returns the first URL of each entity that the URLs name, by key."""
    first: dict[str, str] = {}
    for url in urls:
        if not is_nil(url) and (key := entity_key(url)):
            first.setdefault(key, url)
    return first


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


BUILDER_CLASS = WikiDiverse
