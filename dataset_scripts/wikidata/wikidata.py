"""Wikidata as a knowledge base: items of a JSON dump, or of entity documents, without mentions.

`data_dir` is a dump (`.json`, `.json.gz` or `.json.bz2`, one entity a line), a folder of dumps and of documents as
`Special:EntityData` and `wbgetentities` give them, or a folder of Parquet tables
([`~hf_mel.dataset_scripts.wikidata.parquet_tables`]). See [`WikidataConfig`] for the options. The dump is read once
([`~hf_mel.dataset_scripts.wikidata.parts`]). The tree of classes and the labels of values are in the same dump, so that
rows are made from what was read when its end is reached ([`~hf_mel.dataset_scripts.wikidata.tables`]).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from hf_mel.dataset_scripts.builder import ReleaseBuilder, ReleaseConfig
from hf_mel.dataset_scripts.release import ReleaseLog
from hf_mel.dataset_scripts.wikidata.documents import YEARS, Selection, reference_of
from hf_mel.dataset_scripts.wikidata.parts import read_parts
from hf_mel.dataset_scripts.wikidata.tables import Tables
from hf_mel.errors import DataFormatError, KnowledgeBaseError

#: Properties that become attributes by default, in this order, and the names that they get if the files do not hold their
#: documents. A dump does.
PROPERTIES = {
    "P21": "sex or gender",
    "P569": "date of birth",
    "P19": "place of birth",
    "P570": "date of death",
    "P20": "place of death",
    "P27": "country of citizenship",
    "P106": "occupation",
    "P39": "position held",
    "P108": "employer",
    "P463": "member of",
    "P54": "member of sports team",
    "P101": "field of work",
    "P1412": "languages spoken, written or signed",
    "P136": "genre",
    "P17": "country",
    "P131": "located in the administrative territorial entity",
    "P159": "headquarters location",
    "P571": "inception",
    "P452": "industry",
    "P50": "author",
    "P57": "director",
    "P175": "performer",
    "P577": "publication date",
}


@dataclass
class WikidataConfig(ReleaseConfig):
    """Options of the build: the items that are taken, and what is read of them. Lists have commas.

    Args:
        languages (`str`): Languages of labels, descriptions and aliases, the most wanted first ("en,de"). A text is in
            the first that has it, else in "mul", which holds for every language.
        classes (`str`, *optional*): Items must be instances (P31) of one of these, or of a class below it (P279).
        min_sitelinks (`int`): Number of pages of Wikimedia's projects that an item must have.
        having (`str`, *optional*): Properties that an item must have all ("P18"), or their values ("P27=Q183").
        ids (`str`, *optional*): Ids of the wanted items, or a text file with one a line.
        properties (`str`, *optional*): Properties that become attributes, in this order. Default: [`PROPERTIES`].
    """

    languages: str = "en"
    classes: str | None = None
    min_sitelinks: int | str = 0
    having: str | None = None
    ids: str | None = None
    properties: str | None = None


class Wikidata(ReleaseBuilder):
    """Builder of a knowledge base from Wikidata."""

    NAME = "wikidata"
    TITLE = "Wikidata"
    TASK = "no mentions: a knowledge base of the items that you choose"
    LICENSE = "cc0-1.0"
    LANGUAGES = ()
    HOMEPAGE = "https://www.wikidata.org/wiki/Wikidata:Database_download"
    DOWNLOAD = (
        "the JSON dump, latest-all.json.gz, or entity documents of Special:EntityData or wbgetentities, or the Parquet"
        " tables permutans/wikidata-labels, -aliases, -descriptions, -links and -claims of the Hub"
    )
    REDISTRIBUTION = ""
    CITATION = """\
@article{vrandecic-krotzsch-2014-wikidata,
  title = {Wikidata: A Free Collaborative Knowledgebase},
  author = {Vrande{\\v{c}}i{\\'c}, Denny and Kr{\\"o}tzsch, Markus},
  journal = {Communications of the ACM},
  volume = {57},
  number = {10},
  pages = {78--85},
  year = {2014},
  doi = {10.1145/2629489}
}"""
    NEEDS_RAW = True
    OFFICIAL_COUNTS: dict[str, dict[str, int]] = {}

    CONFIGS = {"entities": "The knowledge base."}
    DEFAULT_CONFIG_NAME = "entities"
    COLUMNS = {
        "entities": {
            "types": [datasets.Value("string")],
            **{column: datasets.Value("int32") for column in YEARS},
            "place": datasets.Value("string"),
            "latitude": datasets.Value("float64"),
            "longitude": datasets.Value("float64"),
            "sitelinks": datasets.Value("int32"),
            "image_file": datasets.Value("string"),
        }
    }
    BUILDER_CONFIG_CLASS = WikidataConfig
    #: Folder that outlives an interruption. The build pipeline sets it.
    work_folder: Path | None = None

    def open_release(self) -> ReleaseLog:
        """Reads everything, unless an interrupted build has."""
        release = ReleaseLog()
        self.selection, classes = _selection(self.config)
        self._temporary = tempfile.TemporaryDirectory() if self.work_folder is None else None
        folder = Path(self._temporary.name) if self._temporary else self.work_folder
        assert folder is not None
        summary = read_parts(self.config.data_dir, folder, self.selection)
        release.layout, release.sha256 = summary.layout, summary.sha256
        self.tables = Tables(folder, summary.num_parts, self.selection, classes, PROPERTIES, release)
        return release

    def entities(self) -> Iterator[dict[str, Any]]:
        """Yields the items.

        Raises:
            KnowledgeBaseError: No item is left.
        """
        row = None
        for row in self.tables.rows():
            yield row
        if row is None:
            counts = ", ".join(f"{kind.replace('_', ' ')} {n:,}" for kind, n in sorted(self.release.left_out.items()))
            raise KnowledgeBaseError(
                f"No item was taken. Left out: {counts or 'nothing'}.",
                file=self.config.data_dir,
                remedy="Check that the files hold the wanted items, and the options classes, ids, having, languages and "
                "min_sitelinks. A folder of documents has subclasses only if it holds their documents.",
            )


def _selection(config: Any) -> tuple[Selection, list[int]]:
    """Returns what the options say, and the references of the wanted classes.

    Raises:
        DataFormatError: An option cannot be understood.
    """
    languages = [language.strip() for language in str(config.languages).split(",")]
    for language in languages:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", language):
            raise _bad_option("languages", language, "Give language codes of Wikidata, such as en,de.")
    min_sitelinks = str(config.min_sitelinks)
    if not re.fullmatch(r"[0-9]{1,9}", min_sitelinks):
        raise _bad_option("min_sitelinks", min_sitelinks, "Give a number, 0 for no limit.")
    required: list[tuple[str, int | None]] = []
    for item in _items(config.having):
        property_id, equals, value = item.partition("=")
        reference = reference_of(value)
        if not _is_property(property_id) or (equals and (reference is None or reference < 0)):
            raise _bad_option("having", item, "Give properties, or properties with a value: P18,P27=Q183.")
        required.append((property_id, reference))
    properties = _items(config.properties) if config.properties is not None else list(PROPERTIES)
    for item in properties:
        if not _is_property(item):
            raise _bad_option("properties", item, "Give ids of properties, such as P106,P27.")
    selection = Selection(
        languages=tuple(languages),
        properties=tuple(dict.fromkeys(properties)),
        min_sitelinks=int(min_sitelinks),
        required=tuple(required),
        ids=frozenset(_item_ids("ids", _ids(config.ids))) if config.ids is not None else None,
    )
    return selection, list(_item_ids("classes", ((item, None, None) for item in _items(config.classes))))


def _items(value: Any) -> list[str]:
    return [item for item in (item.strip() for item in str(value or "").split(",")) if item]


def _is_property(item: str) -> bool:
    return (reference_of(item) or 0) < 0


def _bad_option(name: str, value: str, remedy: str, file: Any = None, row: Any = None) -> DataFormatError:
    return DataFormatError(
        f"{value[:40]!r} is not a value of {name}.", file=file or f"--option {name}", row=row, remedy=remedy
    )


def _ids(value: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields (id, file, line) of a file of ids, or of a list. Addresses end in the id."""
    if not Path(value).is_file():
        yield from ((item, None, None) for item in _items(value))
        return
    try:
        lines = Path(value).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataFormatError(
            f"The list of ids cannot be read ({error}).", file=value, remedy="Write one id a line, in UTF-8."
        ) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield line.strip().rpartition("/")[2], value, number


def _item_ids(name: str, ids: Iterator[tuple[str, Any, Any]]) -> Iterator[int]:
    for item, file, row in ids:
        reference = reference_of(item)
        if reference is None or reference < 0:
            raise _bad_option(name, item, "Give ids of items, such as Q5.", file, row)
        yield reference


BUILDER_CLASS = Wikidata
